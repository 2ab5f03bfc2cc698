#include "filterbank.h"

#include <algorithm>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>
#include <vector>

#include "../fft.h"

namespace fastast::mel {
namespace {

// Rows that a thread takes at a time, at least.
constexpr std::int64_t kChunkRows = 256;

// Frames that a clip has (fastast/ops/mel_plan.py, frame_counts).
std::int64_t frame_count(std::int64_t length, std::int64_t window, std::int64_t shift,
                         Padding padding) {
  if (padding == Padding::kKaldi) return (length + shift / 2) / shift;
  const std::int64_t least = padding == Padding::kNone ? window : 1;
  if (length < least) return 0;
  return 1 + (padding == Padding::kNone ? length - window : length) / shift;
}

std::string text(std::int64_t number) { return std::to_string(number); }

void check(const Task& task) {
  for (std::int64_t clip = 0; clip < task.num_clips; ++clip) {
    const std::int64_t frames = task.frame_offsets[clip + 1] - task.frame_offsets[clip];
    const std::int64_t length = task.sample_offsets[clip + 1] - task.sample_offsets[clip];
    // An empty clip may have no shift.
    const std::int64_t shift = task.frame_shift[clip] < 1 ? 1 : task.frame_shift[clip];
    const std::int64_t possible =
        length < 0 ? 0 : frame_count(length, task.window_length, shift, task.padding);
    if (frames < 0 || length < 0 || frames > possible) {
      throw std::invalid_argument(
          "frames gives clip " + text(clip) + " " + text(frames) + " frames, but its " +
          text(length) + " samples have " + text(possible) + " at its frame_shift of " +
          text(shift) + "; make frames with frame_segments from the same numbers");
    }
  }
  const std::int64_t end = task.sample_offsets[task.num_clips];
  if (task.sample_offsets[0] < 0 || end > task.num_samples) {
    throw std::invalid_argument("sample_offsets ends at " + text(end) + ", past the " +
                                text(task.num_samples) + " samples of waveforms");
  }
  const std::int64_t rows = task.frame_offsets[task.num_clips];
  if (rows > task.num_rows) {
    throw std::invalid_argument("num_rows=" + text(task.num_rows) + " is less than the " +
                                text(rows) + " rows of frames; pass the budget's tokens");
  }
  for (std::int32_t m = 0; m < task.num_mels; ++m) {
    const std::int64_t begin = task.mel_starts[m], end_of_bin = task.mel_starts[m + 1];
    if (begin < 0 || end_of_bin < begin || end_of_bin > task.num_taps) {
      throw std::invalid_argument("mel_starts must rise from 0 to the " + text(task.num_taps) +
                                  " entries of mel_taps, got " + text(begin) + " and " +
                                  text(end_of_bin) + " for mel bin " + text(m));
    }
  }
  for (std::int32_t tap = 0; tap < task.num_taps; ++tap) {
    if (task.mel_bins[tap] < 0 || task.mel_bins[tap] > task.fft_size / 2) {
      throw std::invalid_argument("mel_bins holds " + text(task.mel_bins[tap]) +
                                  ", but the bins of the transform are 0 to " +
                                  text(task.fft_size / 2));
    }
  }
}

struct Free {
  void operator()(float* memory) const { ::operator delete(memory, std::align_val_t{64}); }
};

}  // namespace

const std::vector<const CpuKernel*>& cpu_kernels() {
  static const std::vector<const CpuKernel*> kernels = [] {
    std::vector<const CpuKernel*> found;
#ifdef FASTAST_X86_KERNELS
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl")) {
      found.push_back(&kAvx512Kernel);
    }
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
      found.push_back(&kAvx2Kernel);
    }
#endif
    found.push_back(&kBaselineKernel);
    return found;
  }();
  return kernels;
}

void run_on_cpu(const Task& task, const CpuKernel& kernel, const ParallelFor& parallel_for) {
  check(task);
  const int points = task.fft_size / 2;
  std::vector<std::int32_t> bin_at(points);
  for (int k = 0; k < points; ++k) bin_at[k] = position(k, points);
  const std::size_t bytes = kernel.scratch_floats(task) * sizeof(float);
  const std::int64_t chunks = (task.num_rows + kChunkRows - 1) / kChunkRows;
  parallel_for(chunks, [&](std::int64_t first, std::int64_t last) {
    const std::unique_ptr<float, Free> scratch(
        static_cast<float*>(::operator new(bytes, std::align_val_t{64})));
    kernel.run(task, bin_at.data(), scratch.get(), first * kChunkRows,
               std::min(last * kChunkRows, task.num_rows));
  });
}

}  // namespace fastast::mel
