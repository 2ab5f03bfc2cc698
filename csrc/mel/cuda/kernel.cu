#include "kernel.h"

#include "block.h"

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
__global__ void __launch_bounds__(kBlockThreads, 4)
    mel_kernel(const __grid_constant__ Task task, int frames) {
  extern __shared__ __align__(16) unsigned char memory[];
  const BlockShape shape(frames, kFftSize > 0 ? kFftSize : task.fft_size, task.window_length);
  run_block(DeviceThreads{}, task, shape, memory, blockIdx.x);
}

}  // namespace

int launch(const Task& task, void* stream) {
  const BlockShape shape = block_shape(task);
  const auto blocks = static_cast<unsigned>((task.num_rows + shape.frames - 1) / shape.frames);
  const auto start = [&](auto kernel) {
    kernel<<<blocks, kBlockThreads, shape.bytes(), static_cast<cudaStream_t>(stream)>>>(
        task, shape.frames);
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
  return cudaGetLastError();
}

}  // namespace fastast::mel
