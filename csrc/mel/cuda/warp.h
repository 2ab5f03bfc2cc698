// The GPU's algorithm for transforms of 512, 1024 and 2048 points: what a warp does with
// neighbouring output rows, by itself.
//
// A warp transforms 1024 complex points at a time: four frames of 512 samples, two of 1024 or one
// of 2048, 32 points in the registers of each lane. With n points to a frame and R = n / 32, lane l
// begins with the points l + 32 m of each frame. Decimation in frequency with radix R,
//
//     y[r][l] = W_n^(l r) sum_m W_R^(m r) z[l + 32 m],
//
// leaves R transforms of length 32 per frame, 32 in all: they change hands once, through shared
// memory, so that each lane has one in its registers. Lane f R + r then holds the bins r + R q of
// frame f, 0 <= q < 32. Their mirror images n - r - R q lie in lane f R + (R - r) % R and come by
// shuffles; both powers of a pair go to shared memory, from where the mel bins are summed. Nothing
// but the samples is read from device memory, nothing but the rows is written.
//
// The steps are written for a `Warp`, whose numbers V are a float on a GPU (kernel.cu) and a vector
// of 32 lanes on a CPU (testing/harness.cpp), where they are tested without a GPU:
//   each(f)             calls f(lane)                     at(v, lane)   one lane's number
//   map(f)              the numbers f(lane)               sum(v)        of all, for all lanes
//   choose(f, a, b)     a where f(lane), else b           shuffle(v, f) v of lane f(lane)
//   put(f, z), get(f)   complex numbers to and from the places f(lane) of shared memory
//   store(lane, i, x), load(lane, i)   a float, which is half of such a place
//   rows(count, f)      lets row(i) be f(i)
//   sync()              what was stored before it can be loaded after it; what was loaded, replaced

#pragma once

#include <utility>

#include "../tile.h"

namespace fastast::mel {

constexpr int kLanes = 32;

// f(Constant<0>{}), ..., f(Constant<kCount - 1>{})
template <class F, int... kIndex>
FASTAST_INLINE void for_constants(const F& f, std::integer_sequence<int, kIndex...>) {
  (f(Constant<kIndex>{}), ...);
}

template <int kCount, class F>
FASTAST_INLINE void for_constants(const F& f) {
  for_constants(f, std::make_integer_sequence<int, kCount>{});
}

// W_order^power, as numbers in the code.
template <int kPower, int kOrder>
struct ConstantRoot {
  static constexpr float re = root_of_unity(kPower % kOrder, kOrder).re;
  static constexpr float im = root_of_unity(kPower % kOrder, kOrder).im;
};

template <int kPower, int kOrder, class V>
FASTAST_INLINE Complex<V> turned(const Complex<V>& z) {
  if constexpr (kPower % kOrder == 0) {
    return z;
  } else if constexpr (4 * (kPower % kOrder) == kOrder) {
    return times_minus_i(z);
  } else {
    const Complex<float> root = {ConstantRoot<kPower, kOrder>::re, ConstantRoot<kPower, kOrder>::im};
    return z * root;
  }
}

// The transform of 16 or 32 numbers, in order: 4 transforms of every fourth, then across them.
template <int kSize, class V>
FASTAST_INLINE void transform(Complex<V> (&a)[kSize]) {
  constexpr int kRest = kSize / 4;
  static_assert(kRest == 4 || kRest == 8, "16 or 32 numbers");
  Complex<V> parts[4][kRest];
  for_constants<4>([&](auto r) {
    for_constants<kRest>([&](auto j) { parts[r.value][j.value] = a[r.value + 4 * j.value]; });
    transform(parts[r.value]);
  });
  for_constants<kRest>([&](auto k) {
    Complex<V> column[4];
    for_constants<4>([&](auto r) {
      column[r.value] = turned<r.value * k.value, kSize>(parts[r.value][k.value]);
    });
    transform(column);
    for_constants<4>([&](auto q) { a[k.value + kRest * q.value] = column[q.value]; });
  });
}

// passes[r][l] = W_n^(l r); splits[r] = W_2n^r.
template <int kPoints>
struct WarpRoots {
  static constexpr int kRadix = kPoints / kLanes;
  Complex<float> passes[kRadix][kLanes];
  Complex<float> splits[kRadix];
};

template <int kPoints>
constexpr WarpRoots<kPoints> make_warp_roots() {
  WarpRoots<kPoints> roots{};
  for (int r = 0; r < kPoints / kLanes; ++r) {
    for (int lane = 0; lane < kLanes; ++lane) {
      roots.passes[r][lane] = root_of_unity(lane * r % kPoints, kPoints);
    }
    roots.splits[r] = root_of_unity(r, 2 * kPoints);
  }
  return roots;
}

template <int kPoints>
inline constexpr WarpRoots<kPoints> kWarpRoots = make_warp_roots<kPoints>();
#ifdef __CUDACC__
template <int kPoints>
__device__ const WarpRoots<kPoints> kDeviceWarpRoots = make_warp_roots<kPoints>();
#endif

template <int kPoints>
FASTAST_INLINE const WarpRoots<kPoints>& warp_roots() {
#ifdef __CUDA_ARCH__
  return kDeviceWarpRoots<kPoints>;
#else
  return kWarpRoots<kPoints>;
#endif
}

// What a warp works on, and the shared memory it takes.
template <int kPoints>
struct WarpShape {
  static constexpr int kFrames = 1024 / kPoints;
  static constexpr int kRadix = kPoints / kLanes;
  // In numbers, complex ones between the two transforms. One more to a row, or to a frame as many
  // as there are lanes to it: then the lanes of a warp always lie in different banks.
  static constexpr int kRow = kLanes + 1;
  static constexpr int kFrame = kPoints + kRadix;
  static constexpr int kBytes = kLanes * kRow * 8;
  static_assert(kFrames * kFrame * 4 <= kBytes, "the powers fit where the points were");
};

// An index into the window. To read something and then discard it costs less than a branch.
FASTAST_INLINE int clamped(const Task& task, int i) {
  return i < task.window_length ? i : task.window_length - 1;
}

// The frames' samples, in pairs, less each frame's first one: a large DC offset then cancels without
// a rounding error. Straight from the clips, if all frames lie inside them and there is no noise;
// else by way of shared memory, in a loop that keeps mirror images and noise out of the unrolled
// code.
template <int kPoints, class Sample, class Warp, class V>
FASTAST_INLINE void load_frames(
    const Warp& warp, const Task& task,
    Complex<V> (&z)[WarpShape<kPoints>::kFrames][WarpShape<kPoints>::kRadix]) {
  using Shape = WarpShape<kPoints>;
  const float scale = sample_scale<Sample>();
  const auto first_of = [&](const Row& row) {
    return task.remove_dc && row.alive ? scale * read_sample<Sample>(task, row, 0) : 0.0f;
  };
  bool plain = !task.dither_keys;
  for (int f = 0; f < Shape::kFrames; ++f) plain = plain && warp.row(f).inside(task.window_length);
  if (plain) {
    for_constants<Shape::kFrames>([&](auto f) {
      const Row& row = warp.row(f.value);
      const Sample* source = static_cast<const Sample*>(task.waveforms) + row.begin + row.start;
      const float first = task.remove_dc ? scale * source[0] : 0.0f;
      const auto sample = [&](int i) {
        const float value = scale * source[clamped(task, i)] - first;
        return i < task.window_length ? value : 0.0f;
      };
      for_constants<Shape::kRadix>([&](auto m) {
        const auto place = [&](int lane) { return 2 * (lane + kLanes * m.value); };
        z[f.value][m.value] = {warp.map([&](int lane) { return sample(place(lane)); }),
                               warp.map([&](int lane) { return sample(place(lane) + 1); })};
      });
    });
    return;
  }
  warp.each([&](int lane) {
    for (int f = 0; f < Shape::kFrames; ++f) {
      const Row& row = warp.row(f);
      const float first = first_of(row);
      for (int i = lane; i < 2 * kPoints; i += kLanes) {
        float value = 0.0f;
        if (i < task.window_length) {
          if (row.alive) value = scale * read_sample<Sample>(task, row, i);
          if (task.dither_keys) {
            value += task.dither * gaussian<float>(splitmix64(row.noise ^ std::uint64_t(i)));
          }
          value -= first;
        }
        warp.store(lane, f * 2 * kPoints + i, value);
      }
    }
  });
  warp.sync();
  for_constants<Shape::kFrames>([&](auto f) {
    for_constants<Shape::kRadix>([&](auto m) {
      z[f.value][m.value] =
          warp.get([&](int lane) { return f.value * kPoints + kLanes * m.value + lane; });
    });
  });
  warp.sync();
}

// DC removal, pre-emphasis and window, of all frames.
template <int kPoints, class Warp, class V>
FASTAST_INLINE void window_frames(
    const Warp& warp, const Task& task,
    Complex<V> (&z)[WarpShape<kPoints>::kFrames][WarpShape<kPoints>::kRadix]) {
  constexpr int kFrames = WarpShape<kPoints>::kFrames;
  V means[kFrames];
  for_constants<kFrames>([&](auto f) {
    V sum{};
    for_constants<WarpShape<kPoints>::kRadix>(
        [&](auto m) { sum = sum + (z[f.value][m.value].re + z[f.value][m.value].im); });
    means[f.value] = V{};
    if (task.remove_dc) means[f.value] = warp.sum(sum) / static_cast<float>(task.window_length);
  });
  V earlier[kFrames];  // what the first lane finds before its samples: the last lane's, a round ago
  const auto is_first = [](int lane) { return lane == 0; };
  for_constants<WarpShape<kPoints>::kRadix>([&](auto m) {
    const auto weight = [&](int i) {
      const float value = task.window[clamped(task, i)];
      return i < task.window_length ? value : 0.0f;
    };
    const V even = warp.map([&](int lane) { return weight(2 * (lane + kLanes * m.value)); });
    const V odd = warp.map([&](int lane) { return weight(2 * (lane + kLanes * m.value) + 1); });
    for_constants<kFrames>([&](auto f) {
      Complex<V>& point = z[f.value][m.value];
      const V here = point.re - means[f.value], next = point.im - means[f.value];
      const V neighbour = warp.shuffle(next, [](int lane) { return (lane - 1) & (kLanes - 1); });
      if constexpr (m.value == 0) earlier[f.value] = here;  // the first sample repeats
      const V before = warp.choose(is_first, earlier[f.value], neighbour);
      earlier[f.value] = neighbour;
      point = {(here - task.preemphasis * before) * even, (next - task.preemphasis * here) * odd};
    });
  });
}

// Powers of bins 0 to n of each frame, to shared memory.
template <int kPoints, class Warp, class V>
FASTAST_INLINE void put_powers(const Warp& warp, const Complex<V> (&z)[kLanes]) {
  using Shape = WarpShape<kPoints>;
  constexpr int kRadix = Shape::kRadix;
  const auto& splits = warp_roots<kPoints>().splits;
  const auto is_zero = [](int lane) { return lane % kRadix == 0; };
  const auto mirrored = [](int lane) {
    return lane / kRadix * kRadix + (kRadix - lane % kRadix) % kRadix;
  };
  const auto place = [](int lane) { return lane / kRadix * Shape::kFrame; };
  const Complex<V> root = {warp.map([&](int lane) { return splits[lane % kRadix].re; }),
                           warp.map([&](int lane) { return splits[lane % kRadix].im; })};
  for_constants<kLanes / 2>([&](auto q) {
    // Bins r + R q and n - r - R q; of bin 0 the mirror image is itself, of n - 0 the Nyquist bin.
    constexpr int kOther = kLanes - 1 - q.value, kOwn = (kLanes - q.value) % kLanes;
    const Complex<V> mirror = {
        warp.choose(is_zero, z[kOwn].re, warp.shuffle(z[kOther].re, mirrored)),
        warp.choose(is_zero, z[kOwn].im, warp.shuffle(z[kOther].im, mirrored))};
    V power, power_mirror;
    split(z[q.value], mirror, turned<q.value, 2 * kLanes>(root), false, power, power_mirror);
    const auto bin = [&](int lane) { return lane % kRadix + kRadix * q.value; };
    warp.each([&](int lane) {
      warp.store(lane, place(lane) + bin(lane), warp.at(power, lane));
      warp.store(lane, place(lane) + kPoints - bin(lane), warp.at(power_mirror, lane));
    });
  });
  // Bin n / 2, its own mirror image.
  const V middle = power_of(z[kLanes / 2], false);
  warp.each([&](int lane) {
    if (is_zero(lane)) warp.store(lane, place(lane) + kPoints / 2, warp.at(middle, lane));
  });
}

// Mel bins lane, lane + 32, ... of all frames, which share the table's reads.
template <int kPoints, class Warp>
FASTAST_INLINE void write_warp_rows(const Warp& warp, const Task& task, std::int64_t first,
                                    int lane) {
  using Shape = WarpShape<kPoints>;
  for (int m = lane; m < task.num_mels; m += kLanes) {
    float energies[Shape::kFrames] = {};
    const auto end = static_cast<int>(task.mel_starts[m + 1]);
    for (auto tap = static_cast<int>(task.mel_starts[m]); tap < end; ++tap) {
      const auto bin = static_cast<int>(task.mel_bins[tap]);
      const float weight = task.mel_taps[tap];
      FASTAST_UNROLL
      for (int f = 0; f < Shape::kFrames; ++f) {
        energies[f] = energies[f] + weight * warp.load(lane, f * Shape::kFrame + bin);
      }
    }
    FASTAST_UNROLL
    for (int f = 0; f < Shape::kFrames; ++f) {
      if (first + f < task.num_rows) {
        const float value = warp.row(f).alive ? log_energy(task, energies[f]) : 0.0f;
        store_output(task, (first + f) * task.num_mels + m, value);
      }
    }
  }
}

// Warp `index` of ceil(num_rows / kFrames).
template <int kPoints, class Warp>
FASTAST_INLINE void run_warp(const Warp& warp, const Task& task, std::int64_t index) {
  using Shape = WarpShape<kPoints>;
  using V = typename Warp::Value;
  constexpr int kFrames = Shape::kFrames, kRadix = Shape::kRadix;
  const std::int64_t first = index * kFrames;
  warp.rows(kFrames, [&](int f) { return find_row(task, first + f); });

  Complex<V> frames[kFrames][kRadix];
  if (task.int16_samples) {
    load_frames<kPoints, std::int16_t>(warp, task, frames);
  } else {
    load_frames<kPoints, float>(warp, task, frames);
  }
  window_frames<kPoints>(warp, task, frames);

  for_constants<kFrames>([&](auto f) { transform(frames[f.value]); });
  const auto& passes = warp_roots<kPoints>().passes;
  for_constants<kRadix>([&](auto r) {
    Complex<V> root = {V{} + 1.0f, V{}};
    if constexpr (r.value > 0) {
      root = {warp.map([&](int lane) { return passes[r.value][lane].re; }),
              warp.map([&](int lane) { return passes[r.value][lane].im; })};
    }
    for_constants<kFrames>([&](auto f) {
      const Complex<V> point = frames[f.value][r.value];
      warp.put([&](int lane) { return (f.value * kRadix + r.value) * Shape::kRow + lane; },
               r.value > 0 ? point * root : point);
    });
  });
  warp.sync();
  Complex<V> z[kLanes];
  for_constants<kLanes>([&](auto i) {
    z[i.value] = warp.get([&](int lane) { return lane * Shape::kRow + i.value; });
  });
  transform(z);
  warp.sync();
  put_powers<kPoints>(warp, z);
  warp.sync();
  if (task.magnitude) {
    warp.each([&](int lane) {
      for (int i = lane; i < kFrames * Shape::kFrame; i += kLanes) {
        warp.store(lane, i, square_root(warp.load(lane, i)));
      }
    });
    warp.sync();
  }
  warp.each([&](int lane) { write_warp_rows<kPoints>(warp, task, first, lane); });
}

}  // namespace fastast::mel
