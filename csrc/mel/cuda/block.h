// The GPU's algorithm: what a block of threads does with a tile of neighbouring output rows.
//
// The rows of all clips form one list, and a block takes a few neighbours, whichever clips they
// belong to. It finds their clips, stages their samples in shared memory, transforms them in place
// and writes log-mel values; nothing else touches device memory.
//
// The steps are written for `Threads`, whose each(count, f) calls f(0) .. f(count - 1) on the
// block's threads and then waits for all of them. On a GPU that is a strided loop and a barrier
// (kernel.cu). On a CPU it is a loop, in any order (testing/harness.cpp): so the algorithm is
// tested where there is no GPU. A step is correct only if the order of its calls does not matter.

#pragma once

#include "../tile.h"

namespace fastast::mel {

constexpr int kBlockThreads = 256;
constexpr int kWarp = 32;

// Shared memory of a block, without asking for more than every GPU grants.
struct BlockShape {
  static constexpr int kMostBytes = 48 * 1024;

  int frames;
  int points;
  int half;  // where samples of odd index begin

  FASTAST_INLINE BlockShape(int frames, int fft_size, int window_length)
      : frames(frames),
        points(fft_size / 2),
        // Half the banks further, so that neighbouring samples are stored without a conflict.
        half(((window_length + 1) / 2 + kWarp - 1) / kWarp * kWarp + kWarp / 2) {}

  FASTAST_INLINE int sample_stride() const { return 2 * half; }
  FASTAST_INLINE int frame_bytes() const {
    return static_cast<int>(sizeof(Row)) + 4 * (2 * points + sample_stride() + kWarp + 1);
  }
  FASTAST_INLINE int bytes() const { return frames * frame_bytes() + 2 * points; }
};

// The most frames, a power of two, that fit.
inline BlockShape block_shape(const Task& task) {
  BlockShape shape(8, task.fft_size, task.window_length);
  while (shape.frames > 1 && shape.bytes() > BlockShape::kMostBytes) shape.frames /= 2;
  return shape;
}

template <class Threads>
struct BlockTile {
  using Value = float;

  const Threads& threads;
  BlockShape shape;
  Row* rows;
  float *spectra, *staged, *sums, *means;
  std::uint16_t* places;

  FASTAST_INLINE BlockTile(const Threads& threads, const BlockShape& shape, void* memory)
      : threads(threads), shape(shape) {
    rows = static_cast<Row*>(memory);
    spectra = reinterpret_cast<float*>(rows + shape.frames);
    staged = spectra + shape.frames * 2 * shape.points;
    sums = staged + shape.frames * shape.sample_stride();
    means = sums + shape.frames * kWarp;
    places = reinterpret_cast<std::uint16_t*>(means + shape.frames);
  }

  FASTAST_INLINE int points() const { return shape.points; }
  FASTAST_INLINE float* samples(int frame) const { return staged + frame * shape.sample_stride(); }
  FASTAST_INLINE float mean(int frame) const { return means[frame]; }
  FASTAST_INLINE float* spectrum(int frame) const { return spectra + frame * 2 * shape.points; }
  // Samples of even and of odd index apart: a point of the transform takes one of each.
  FASTAST_INLINE int sample_at(int i) const { return (i & 1) * shape.half + (i >> 1); }
  // A butterfly's stride is a power of two. Mixing the higher bits of an index into the lowest
  // five, which say in which of the 32 banks it lies, spreads the threads of a warp over the banks
  // in every pass, for every size.
  FASTAST_INLINE int point_at(int i) const {
    const int high = i >> 5;
    return i ^ ((high ^ (high << 2) ^ (high >> 3)) & (kWarp - 1));
  }
  FASTAST_INLINE int bin_at(int k) const { return places[k]; }

  template <class F>
  FASTAST_INLINE void each(int count, const F& f) const {
    int bits = 0;
    while ((1 << bits) < count) ++bits;
    threads.each(shape.frames << bits, [&](int i) { f(i >> bits, i & (count - 1)); });
  }
};

template <class Sample, class Tile>
FASTAST_INLINE void stage_samples(Tile& tile, const Task& task) {
  tile.each(kWarp, [&](int frame, int lane) {
    const Row& row = tile.rows[frame];
    float* x = tile.samples(frame);
    const float scale = sample_scale<Sample>();
    const bool inside = row.inside(task.window_length);
    // A large DC offset cancels without a rounding error if a sample is subtracted beforehand.
    const float first = task.remove_dc && row.alive ? scale * read_sample<Sample>(task, row, 0) : 0;
    const Sample* source = static_cast<const Sample*>(task.waveforms) + row.begin + row.start;
    float sum = 0.0f;
    for (int i = lane; i < task.window_length; i += kWarp) {
      float value = 0.0f;
      if (row.alive) value = scale * (inside ? source[i] : read_sample<Sample>(task, row, i));
      if (task.dither_keys) {
        value += task.dither * gaussian<float>(splitmix64(row.noise ^ std::uint64_t(i)));
      }
      x[tile.sample_at(i)] = value - first;
      sum += value - first;
    }
    tile.sums[frame * kWarp + lane] = sum;
  });
  tile.each(1, [&](int frame, int) {
    float sum = 0.0f;
    for (int lane = 0; lane < kWarp; ++lane) sum += tile.sums[frame * kWarp + lane];
    tile.means[frame] = task.remove_dc ? sum / static_cast<float>(task.window_length) : 0.0f;
  });
}

template <int kFrames, class Threads>
FASTAST_INLINE void write_rows(const BlockTile<Threads>& tile, const Task& task,
                               std::int64_t first) {
  tile.threads.each(tile.shape.frames / kFrames * task.num_mels, [&](int i) {
    const int m = i % task.num_mels, frame = i / task.num_mels * kFrames;
    float values[kFrames];
    log_mel(tile, task, frame, m, values);
    FASTAST_UNROLL
    for (int f = 0; f < kFrames; ++f) {
      if (first + frame + f >= task.num_rows) continue;
      const float value = tile.rows[frame + f].alive ? values[f] : 0.0f;
      store_output(task, (first + frame + f) * task.num_mels + m, value);
    }
  });
}

// Block `block` of ceil(num_rows / shape.frames).
template <class Threads>
FASTAST_INLINE void run_block(const Threads& threads, const Task& task, const BlockShape& shape,
                              void* memory, std::int64_t block) {
  BlockTile<Threads> tile(threads, shape, memory);
  const std::int64_t first = block * shape.frames;
  threads.each(shape.frames, [&](int f) { tile.rows[f] = find_row(task, first + f); });
  threads.each(shape.points, [&](int k) {
    tile.places[k] = static_cast<std::uint16_t>(tile.point_at(position(k, shape.points)));
  });
  if (task.int16_samples) {
    stage_samples<std::int16_t>(tile, task);
  } else {
    stage_samples<float>(tile, task);
  }
  compute_powers(tile, task);
  if (shape.frames >= 4) {
    write_rows<4>(tile, task, first);
  } else {
    write_rows<1>(tile, task, first);
  }
}

}  // namespace fastast::mel
