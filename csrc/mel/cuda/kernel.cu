#include "kernel.h"

#include <cstdlib>
#include <cstring>

#include "block.h"
#include "warp.h"

namespace fastast::mel {
namespace {

struct DeviceThreads {
  template <class F>
  __device__ __forceinline__ void each(int count, const F& f) const {
    for (int i = threadIdx.x; i < count; i += kBlockThreads) f(i);
    __syncthreads();
  }
};

// The usual sizes of the transform are known to the compiler; 0 stands for any other.
template <int kFftSize>
__global__ void __launch_bounds__(kBlockThreads, kFftSize == 2048 ? 3 : 4)
    mel_kernel(const __grid_constant__ Task task, int frames) {
  extern __shared__ __align__(16) unsigned char memory[];
  const BlockShape shape(frames, kFftSize > 0 ? kFftSize : task.fft_size, task.window_length);
  run_block(DeviceThreads{}, task, shape, memory, blockIdx.x);
}

struct DeviceWarp {
  using Value = float;
  static constexpr unsigned kAll = 0xffffffffu;

  float* memory;
  Row* first_row;

  static __device__ __forceinline__ int lane() { return threadIdx.x % kLanes; }

  template <class F>
  __device__ __forceinline__ void each(const F& f) const {
    f(lane());
  }
  template <class F>
  __device__ __forceinline__ float map(const F& f) const {
    return f(lane());
  }
  template <class F>
  __device__ __forceinline__ float choose(const F& f, float a, float b) const {
    return f(lane()) ? a : b;
  }
  template <class F>
  __device__ __forceinline__ float shuffle(float value, const F& f) const {
    return __shfl_sync(kAll, value, f(lane()));
  }
  __device__ __forceinline__ float sum(float value) const {
    FASTAST_UNROLL
    for (int step = kLanes / 2; step > 0; step /= 2) value += __shfl_xor_sync(kAll, value, step);
    return value;
  }
  template <class F>
  __device__ __forceinline__ void put(const F& f, const Complex<float>& z) const {
    reinterpret_cast<float2*>(memory)[f(lane())] = {z.re, z.im};
  }
  template <class F>
  __device__ __forceinline__ Complex<float> get(const F& f) const {
    const float2 z = reinterpret_cast<const float2*>(memory)[f(lane())];
    return {z.x, z.y};
  }
  __device__ __forceinline__ void store(int, int place, float value) const {
    memory[place] = value;
  }
  __device__ __forceinline__ float load(int, int place) const { return memory[place]; }
  __device__ __forceinline__ float at(float value, int) const { return value; }
  template <class F>
  __device__ __forceinline__ void rows(int count, const F& f) const {
    if (lane() < count) first_row[lane()] = f(lane());
    __syncwarp();
  }
  __device__ __forceinline__ const Row& row(int i) const { return first_row[i]; }
  __device__ __forceinline__ void sync() const { __syncwarp(); }
};

constexpr int kWarpsPerBlock = 4;

// The largest transform needs more registers than four blocks leave to each.
template <int kPoints>
__global__ void __launch_bounds__(kWarpsPerBlock* kLanes, kPoints < 1024 ? 4 : 2)
    warp_kernel(const __grid_constant__ Task task) {
  using Shape = WarpShape<kPoints>;
  __shared__ __align__(16) unsigned char memory[kWarpsPerBlock][Shape::kBytes];
  __shared__ Row rows[kWarpsPerBlock][Shape::kFrames];
  const int warp = threadIdx.x / kLanes;
  const std::int64_t index = std::int64_t(blockIdx.x) * kWarpsPerBlock + warp;
  if (index * Shape::kFrames >= task.num_rows) return;  // the whole warp
  run_warp<kPoints>(DeviceWarp{reinterpret_cast<float*>(memory[warp]), rows[warp]}, task, index);
}

template <int kPoints>
void start_warps(const Task& task, cudaStream_t stream) {
  constexpr int kRows = kWarpsPerBlock * WarpShape<kPoints>::kFrames;
  const auto blocks = static_cast<unsigned>((task.num_rows + kRows - 1) / kRows);
  warp_kernel<kPoints><<<blocks, kWarpsPerBlock * kLanes, 0, stream>>>(task);
}

void start_blocks(const Task& task, cudaStream_t stream) {
  const BlockShape shape = block_shape(task);
  const auto blocks = static_cast<unsigned>((task.num_rows + shape.frames - 1) / shape.frames);
  const auto start = [&](auto kernel) {
    kernel<<<blocks, kBlockThreads, shape.bytes(), stream>>>(task, shape.frames);
  };
  switch (task.fft_size) {
    case 512:
      start(mel_kernel<512>);
      break;
    case 1024:
      start(mel_kernel<1024>);
      break;
    case 2048:
      start(mel_kernel<2048>);
      break;
    default:
      start(mel_kernel<0>);
  }
}

// The warps' kernels have not run on a GPU yet: FASTAST_GPU_KERNELS=all lets them.
bool warps_are_on() {
  static const bool on = [] {
    const char* value = std::getenv("FASTAST_GPU_KERNELS");
    return value && std::strcmp(value, "all") == 0;
  }();
  return on;
}

}  // namespace

int launch(const Task& task, void* stream) {
  const auto queue = static_cast<cudaStream_t>(stream);
  if (warps_are_on() && task.fft_size == 512) {
    start_warps<256>(task, queue);
  } else if (warps_are_on() && task.fft_size == 1024) {
    start_warps<512>(task, queue);
  } else if (warps_are_on() && task.fft_size == 2048) {
    start_warps<1024>(task, queue);
  } else {
    start_blocks(task, queue);
  }
  return cudaGetLastError();
}

}  // namespace fastast::mel
