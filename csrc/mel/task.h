// What a filterbank call consists of. Its pointers are all on the device that works on it.

#pragma once

#include "arithmetic.h"

namespace fastast::mel {

// Where frames begin and what lies beyond a clip's edges: fastast/ops/mel_plan.py.
enum class Padding : std::int32_t { kNone = 0, kKaldi = 1, kReflect = 2, kZeros = 3 };

struct Task {
  const void* waveforms;  // float, or int16 if int16_samples
  std::int64_t num_samples;
  const std::int64_t* sample_offsets;  // [num_clips + 1]
  const std::int32_t* frame_shift;     // [num_clips]
  const std::int32_t* frame_offsets;   // [num_clips + 1]
  std::int64_t num_clips;
  const float* window;  // [window_length]
  const std::int64_t* mel_bins;      // [num_taps]
  const float* mel_taps;             // [num_taps]
  const std::int64_t* mel_starts;    // [num_mels + 1]
  const std::int64_t* dither_keys;  // [num_clips], or null
  void* out;                        // [num_rows, num_mels], float, or bfloat16 bits
  std::int64_t num_rows;
  std::int32_t window_length;
  std::int32_t num_mels;
  std::int32_t num_taps;
  std::int32_t fft_size;
  Padding padding;
  float dither;
  float preemphasis;
  float floor;
  float offset;
  float log_scale;
  float mean;
  float scale;  // the output is (value - mean) * scale
  bool remove_dc;
  bool magnitude;
  bool int16_samples;
  bool bfloat16_out;
};

constexpr std::int32_t kSmallestFft = 8;
constexpr std::int32_t kLargestFft = 4096;

// The frame of an output row. Rows past the last frame are not alive.
struct Row {
  std::int64_t begin;   // the clip's first sample
  std::int64_t length;  // of the clip, cut to what waveforms holds
  std::int64_t start;   // the frame's first sample, counted from begin; may be outside
  std::uint64_t noise;  // sample i's noise is gaussian(splitmix64(noise ^ i))
  bool alive;

  FASTAST_INLINE bool inside(std::int32_t window_length) const {
    return alive && start >= 0 && start + window_length <= length;
  }
};

FASTAST_INLINE std::int64_t first_sample(std::int64_t frame, std::int64_t shift,
                                         std::int64_t window, Padding padding) {
  switch (padding) {
    case Padding::kNone:
      return frame * shift;
    case Padding::kKaldi:
      return frame * shift + shift / 2 - window / 2;
    default:
      return frame * shift - window / 2;
  }
}

FASTAST_INLINE Row find_row(const Task& task, std::int64_t row) {
  Row found{};
  if (task.num_clips == 0 || row >= task.frame_offsets[task.num_clips]) return found;
  // The last clip that begins at this row or before: empty clips before it begin there as well.
  auto low = 0u, high = static_cast<unsigned>(task.num_clips);
  while (high - low > 1) {
    const auto middle = (low + high) / 2;
    (task.frame_offsets[middle] <= row ? low : high) = middle;
  }
  const std::int64_t frame = row - task.frame_offsets[low];
  const std::int64_t begin = task.sample_offsets[low];
  std::int64_t end = task.sample_offsets[low + 1];
  end = end < task.num_samples ? end : task.num_samples;
  found.begin = begin;
  found.length = end - begin;
  found.start = first_sample(frame, task.frame_shift[low], task.window_length, task.padding);
  found.alive = begin >= 0 && found.length > 0;
  if (task.dither_keys) {
    const auto key = static_cast<std::uint64_t>(task.dither_keys[low]);
    found.noise = splitmix64(key ^ static_cast<std::uint64_t>(frame));
  }
  return found;
}

// What a sample is multiplied with to lie in [-1, 1).
template <class Sample>
FASTAST_INLINE float sample_scale() {
  return sizeof(Sample) == sizeof(std::int16_t) ? 0x1p-15f : 1.0f;
}

// Sample i of a frame that is alive, inside the clip or not.
template <class Sample>
FASTAST_INLINE Sample read_sample(const Task& task, const Row& row, std::int32_t i) {
  std::int64_t index = row.start + i;
  if (index < 0 || index >= row.length) {
    if (task.padding == Padding::kNone || task.padding == Padding::kZeros) return Sample{};
    index = reflect(index, row.length, task.padding == Padding::kKaldi);
  }
  return static_cast<const Sample*>(task.waveforms)[row.begin + index];
}

}  // namespace fastast::mel
