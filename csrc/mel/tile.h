// From the samples of a tile's frames to their log-mel values: the part that all devices share.
//
// A Tile has some frames under way and the memory they are worked on in:
//   Value                 what a number is: float, or a lane per frame
//   points()              of the complex transform: half of fft_size
//   each(count, f)        f(frame, j) for all frames of the tile and 0 <= j < count, a power of
//                         two, in any order or at once; returns when all are done
//   samples(frame)        window_length samples, sample i at sample_at(i)
//   mean(frame)           to be subtracted from them
//   spectrum(frame)       2 * points() values: real parts, then imaginary parts, in one order
//   point_at(i)           that order
//   bin_at(k)             where bin k < points() is after the transform: point_at(position(k))

#pragma once

#include "fft.h"

namespace fastast::mel {

// Point i of the complex transform: two samples after DC removal, pre-emphasis and window.
template <class Tile>
FASTAST_INLINE Complex<typename Tile::Value> windowed_point(const Tile& tile, const Task& task,
                                                            int frame, int i) {
  using V = typename Tile::Value;
  const int first = 2 * i, second = first + 1;
  if (first >= task.window_length) return {V{}, V{}};
  const V* x = tile.samples(frame);
  const V mean = tile.mean(frame);
  const V here = x[tile.sample_at(first)] - mean;
  const V before = x[tile.sample_at(first > 0 ? first - 1 : 0)] - mean;
  Complex<V> z = {(here - task.preemphasis * before) * task.window[first], V{}};
  if (second < task.window_length) {
    const V next = x[tile.sample_at(second)] - mean;
    z.im = (next - task.preemphasis * here) * task.window[second];
  }
  return z;
}

// Leaves the power, or magnitude, of bin k at spectrum[bin_at(k)], and that of the Nyquist bin
// where the imaginary part of bin 0 was.
template <class Tile>
FASTAST_INLINE void compute_powers(Tile& tile, const Task& task) {
  using V = typename Tile::Value;
  const int points = tile.points();

  const auto pass = [&](int length, const auto& load) {
    const auto butterflies = [&](auto radix) {
      tile.each(points / radix.value, [&](int frame, int j) {
        V* z = tile.spectrum(frame);
        butterfly<radix.value, V>(
            length, j, [&](int i) { return load(frame, i); },
            [&](int i, const Complex<V>& value) {
              z[tile.point_at(i)] = value.re;
              z[points + tile.point_at(i)] = value.im;
            });
      });
    };
    radix_of(length) == 8 ? butterflies(Constant<8>{}) : butterflies(Constant<4>{});
  };
  pass(points, [&](int frame, int i) { return windowed_point(tile, task, frame, i); });
  for (int length = points / radix_of(points); length > 1; length /= radix_of(length)) {
    pass(length, [&](int frame, int i) {
      const V* z = tile.spectrum(frame);
      return Complex<V>{z[tile.point_at(i)], z[points + tile.point_at(i)]};
    });
  }

  tile.each(points / 2, [&](int frame, int k) {
    V *re = tile.spectrum(frame), *im = re + points;
    if (k > 0) {
      const int here = tile.bin_at(k), there = tile.bin_at(points - k);
      const Complex<V> z = {re[here], im[here]}, mirror = {re[there], im[there]};
      split(z, mirror, roots().halves[points / 2 + k], task.magnitude, re[here], re[there]);
    } else {
      const int first = tile.bin_at(0), middle = tile.bin_at(points / 2);
      const V sum = re[first] + im[first], difference = re[first] - im[first];
      re[first] = power_of(Complex<V>{sum, V{}}, task.magnitude);
      im[first] = power_of(Complex<V>{difference, V{}}, task.magnitude);
      re[middle] = power_of(Complex<V>{re[middle], im[middle]}, task.magnitude);
    }
  });
}

// What the energy of a mel bin becomes.
template <class V>
FASTAST_INLINE V log_energy(const Task& task, V energy) {
  energy = energy < task.floor ? broadcast<V>(task.floor) : energy;
  return (task.log_scale * fast_log(energy + task.offset) - task.mean) * task.scale;
}

// Mel bin m of `kFrames` frames from `frame` on, which share the table's reads.
template <int kFrames, class Tile, class V = typename Tile::Value>
FASTAST_INLINE void log_mel(const Tile& tile, const Task& task, int frame, int m,
                            V (&out)[kFrames]) {
  FASTAST_UNROLL
  for (int f = 0; f < kFrames; ++f) out[f] = V{};
  const auto end = static_cast<int>(task.mel_starts[m + 1]);
  for (auto tap = static_cast<int>(task.mel_starts[m]); tap < end; ++tap) {
    const auto bin = static_cast<int>(task.mel_bins[tap]);
    const int place = bin < tile.points() ? tile.bin_at(bin) : tile.points() + tile.bin_at(0);
    const float weight = task.mel_taps[tap];
    FASTAST_UNROLL
    for (int f = 0; f < kFrames; ++f) out[f] = out[f] + weight * tile.spectrum(frame + f)[place];
  }
  FASTAST_UNROLL
  for (int f = 0; f < kFrames; ++f) out[f] = log_energy(task, out[f]);
}

// The upper half of a float, rounded to the nearest, ties to even; NaN stays NaN.
template <class V>
FASTAST_INLINE Unsigned<V> bfloat16_bits(V x) {
#ifdef __CUDA_ARCH__
  std::uint16_t rounded;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(rounded) : "f"(x));
  return rounded;
#else
  const auto bits = bit_cast<Unsigned<V>>(x);
  const auto rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return x == x ? rounded : rounded * 0u + 0x7fc0u;
#endif
}

// One number of the output.
FASTAST_INLINE void store_output(const Task& task, std::int64_t place, float value) {
  if (task.bfloat16_out) {
    static_cast<std::uint16_t*>(task.out)[place] = static_cast<std::uint16_t>(bfloat16_bits(value));
  } else {
    static_cast<float*>(task.out)[place] = value;
  }
}

}  // namespace fastast::mel
