// The CPU's kernel. CMake compiles this file once per instruction set, with FASTAST_KERNEL, the
// kernel's name, and FASTAST_LANES, the frames it takes at a time.
//
// As many frames as a register has lanes go through the filterbank together, with number i of all
// of them side by side in memory. At 16 kHz and 16 lanes they occupy 58 KiB, so only the samples
// and the rows that come out leave the second-level cache. Frames are loaded as rows of samples
// and transposed on the way in; rows of mel bins are transposed on the way out.

// Before what is written over it: a template finds operations on vectors only if they are declared.
#include "lanes.h"

#include "../tile.h"
#include "kernel.h"

namespace fastast::mel {
namespace {

constexpr int kLanes = FASTAST_LANES;
using V = Lanes<kLanes>;

struct LaneTile {
  using Value = V;

  std::int32_t half;
  const std::int32_t* where;
  V *x, *z, average;

  int points() const { return half; }
  V* samples(int) const { return x; }
  V mean(int) const { return average; }
  V* spectrum(int) const { return z; }
  int sample_at(int i) const { return i; }
  int point_at(int i) const { return i; }
  int bin_at(int k) const { return where[k]; }

  template <class F>
  FASTAST_INLINE void each(int count, const F& f) const {
    for (int j = 0; j < count; ++j) f(0, j);
  }
};

// The samples of a group of frames, transposed. Frames that are not inside their clip are put
// together in `edges` first.
template <class Sample>
FASTAST_INLINE void load_samples(const Task& task, const Row (&rows)[kLanes], float* edges, V* x) {
  const int length = task.window_length;
  const Sample* frames[kLanes];
  for (int lane = 0; lane < kLanes; ++lane) {
    const Row& row = rows[lane];
    if (row.inside(length)) {
      frames[lane] = static_cast<const Sample*>(task.waveforms) + row.begin + row.start;
      continue;
    }
    Sample* edge = reinterpret_cast<Sample*>(edges + lane * length);
    for (int i = 0; i < length; ++i) edge[i] = row.alive ? read_sample<Sample>(task, row, i) : 0;
    frames[lane] = edge;
  }
  const float scale = sample_scale<Sample>();
  if (length < kLanes) {
    for (int i = 0; i < length; ++i) {
      for (int lane = 0; lane < kLanes; ++lane) x[i][lane] = scale * frames[lane][i];
    }
    return;
  }
  for (int begin = 0; begin < length; begin += kLanes) {
    // The last block overlaps the one before it.
    const int i = begin < length - kLanes ? begin : length - kLanes;
    V block[kLanes];
    FASTAST_UNROLL
    for (int lane = 0; lane < kLanes; ++lane) {
      typedef Sample Samples __attribute__((vector_size(sizeof(Sample) * kLanes)));
      Samples samples;
      std::memcpy(&samples, frames[lane] + i, sizeof(samples));
      block[lane] = convert<V>(samples) * scale;
    }
    transpose<kLanes>(block);
    FASTAST_UNROLL
    for (int r = 0; r < kLanes; ++r) x[i + r] = block[r];
  }
}

FASTAST_INLINE void add_noise(const Task& task, const Row (&rows)[kLanes], V* x) {
  Wide<V> state;
  for (int lane = 0; lane < kLanes; ++lane) state[lane] = rows[lane].noise;
  for (int i = 0; i < task.window_length; ++i) {
    x[i] = x[i] + task.dither * gaussian<V>(splitmix64(state ^ static_cast<std::uint64_t>(i)));
  }
}

// The frame's mean, and its first sample subtracted beforehand: a large DC offset then cancels
// without a rounding error.
FASTAST_INLINE V remove_first(int length, V* x) {
  constexpr int kSums = 4;
  const V first = x[0];
  V sums[kSums] = {};
  for (int i = 0; i < length; i += kSums) {
    const int count = length - i < kSums ? length - i : kSums;
    for (int s = 0; s < count; ++s) {
      x[i + s] = x[i + s] - first;
      sums[s] = sums[s] + x[i + s];
    }
  }
  return ((sums[0] + sums[1]) + (sums[2] + sums[3])) / static_cast<float>(length);
}

FASTAST_INLINE void store_values(V values, int count, float* out) {
  std::memcpy(out, &values, sizeof(float) * count);
}

FASTAST_INLINE void store_values(V values, int count, std::uint16_t* out) {
  const auto bits = convert<typename Vectors<kLanes>::Unsigned16>(bfloat16_bits(values));
  std::memcpy(out, &bits, sizeof(std::uint16_t) * count);
}

// `values[m]` holds mel bin m of all frames; rows past `count` are not written.
template <class Out>
FASTAST_INLINE void store_rows(const Task& task, const Row (&rows)[kLanes], const V* values,
                               std::int64_t begin, int count) {
  for (int m = 0; m < task.num_mels; m += kLanes) {
    const int width = task.num_mels - m < kLanes ? task.num_mels - m : kLanes;
    V block[kLanes];
    FASTAST_UNROLL
    for (int r = 0; r < kLanes; ++r) block[r] = values[m + r];
    transpose<kLanes>(block);
    for (int lane = 0; lane < count; ++lane) {
      Out* out = static_cast<Out*>(task.out) + (begin + lane) * task.num_mels + m;
      const V row = rows[lane].alive ? block[lane] : V{};
      width == kLanes ? store_values(row, kLanes, out) : store_values(row, width, out);
    }
  }
}

void run(const Task& task, const std::int32_t* bin_at, float* scratch, std::int64_t begin,
         std::int64_t end) {
  V* x = reinterpret_cast<V*>(scratch);
  V* z = x + task.window_length;
  V* values = z + task.fft_size;
  float* edges = reinterpret_cast<float*>(values + task.num_mels + kLanes);
  for (int m = task.num_mels; m < task.num_mels + kLanes; ++m) values[m] = V{};
  for (std::int64_t group = begin; group < end; group += kLanes) {
    const int count = end - group < kLanes ? static_cast<int>(end - group) : kLanes;
    Row rows[kLanes] = {};
    for (int lane = 0; lane < count; ++lane) rows[lane] = find_row(task, group + lane);

    task.int16_samples ? load_samples<std::int16_t>(task, rows, edges, x)
                       : load_samples<float>(task, rows, edges, x);
    if (task.dither_keys) add_noise(task, rows, x);
    LaneTile tile{task.fft_size / 2, bin_at, x, z, V{}};
    if (task.remove_dc) tile.average = remove_first(task.window_length, x);
    compute_powers(tile, task);
    for (int m = 0; m < task.num_mels; ++m) {
      V value[1];
      log_mel(tile, task, 0, m, value);
      values[m] = value[0];
    }
    task.bfloat16_out ? store_rows<std::uint16_t>(task, rows, values, group, count)
                      : store_rows<float>(task, rows, values, group, count);
  }
}

}  // namespace

#define FASTAST_STRING(name) FASTAST_QUOTE(name)
#define FASTAST_QUOTE(name) #name
extern const CpuKernel FASTAST_KERNEL = {FASTAST_STRING(FASTAST_KERNEL), kLanes, run};

}  // namespace fastast::mel
