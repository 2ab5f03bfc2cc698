// The kernels as C functions, for tests that need neither torch nor a GPU
// (tests/csrc/test_mel_kernels.py).

// Vectors first, see cpu/kernel.cpp.
#include "../cpu/lanes.h"

#include <algorithm>
#include <cmath>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

#include "../cpu/filterbank.h"
#include "../cuda/block.h"
#include "../cuda/warp.h"

namespace fastast::mel {
template <>
struct Integers<Lanes<kLanes>> : LaneIntegers<kLanes> {};
}  // namespace fastast::mel

namespace mel = fastast::mel;

namespace {

// Stands for a block's threads between two barriers. What they do to different elements may happen
// in any order, so it happens in a random one: a step that relies on another of the same phase
// gives other numbers for another seed.
class ShuffledThreads {
 public:
  explicit ShuffledThreads(unsigned seed) : random_(seed) {}

  template <class F>
  void each(int count, const F& f) const {
    std::vector<int> order(count);
    std::iota(order.begin(), order.end(), 0);
    std::shuffle(order.begin(), order.end(), random_);
    for (const int i : order) f(i);
  }

 private:
  mutable std::mt19937 random_;
};

// Stands for a warp, all of whose lanes take each step together. On a GPU they need not: between two
// calls of sync() a lane may be ahead of another. So what was stored cannot be loaded before the next
// one (it is NaN till then), nor can a place be stored to that another lane has used since the last
// (it becomes NaN).
class LockstepWarp {
 public:
  using Value = mel::Lanes<mel::kLanes>;

  explicit LockstepWarp(int bytes) : memory_(bytes / 4) {}

  template <class F>
  void each(const F& f) const {
    for (int lane = 0; lane < mel::kLanes; ++lane) f(lane);
  }
  template <class F>
  Value map(const F& f) const {
    Value values;
    each([&](int lane) { values[lane] = f(lane); });
    return values;
  }
  template <class F>
  Value choose(const F& f, const Value& a, const Value& b) const {
    return map([&](int lane) { return f(lane) ? a[lane] : b[lane]; });
  }
  template <class F>
  Value shuffle(const Value& value, const F& f) const {
    return map([&](int lane) { return value[f(lane)]; });
  }
  Value sum(Value value) const {
    for (int step = mel::kLanes / 2; step > 0; step /= 2) {
      value = value + shuffle(value, [&](int lane) { return lane ^ step; });
    }
    return value;
  }
  template <class F>
  void put(const F& f, const mel::Complex<Value>& z) const {
    each([&](int lane) {
      store(lane, 2 * f(lane), z.re[lane]);
      store(lane, 2 * f(lane) + 1, z.im[lane]);
    });
  }
  template <class F>
  mel::Complex<Value> get(const F& f) const {
    return {map([&](int lane) { return load(lane, 2 * f(lane)); }),
            map([&](int lane) { return load(lane, 2 * f(lane) + 1); })};
  }
  float at(const Value& value, int lane) const { return value[lane]; }
  float load(int lane, int place) const {
    Word& word = memory_.at(place);
    word.reader = word.reader == kNobody || word.reader == lane ? lane : kSeveral;
    return word.writer == kNobody ? word.value : std::nanf("");
  }
  void store(int lane, int place, float value) const {
    Word& word = memory_.at(place);
    const auto other = [&](int who) { return who != kNobody && who != lane; };
    word.value = other(word.reader) || other(word.writer) ? std::nanf("") : value;
    word.writer = lane;
  }
  template <class F>
  void rows(int count, const F& f) const {
    rows_.clear();
    for (int i = 0; i < count; ++i) rows_.push_back(f(i));
  }
  const mel::Row& row(int i) const { return rows_.at(i); }
  void sync() const {
    for (Word& word : memory_) word.reader = word.writer = kNobody;
  }

 private:
  static constexpr int kNobody = -1, kSeveral = -2;
  struct Word {
    float value = std::nanf("");
    int reader = kNobody, writer = kNobody;
  };

  mutable std::vector<Word> memory_;
  mutable std::vector<mel::Row> rows_;
};

template <int kPoints>
void run_all_warps(const mel::Task& task) {
  using Shape = mel::WarpShape<kPoints>;
  for (std::int64_t index = 0; index * Shape::kFrames < task.num_rows; ++index) {
    mel::run_warp<kPoints>(LockstepWarp(Shape::kBytes), task, index);
  }
}

}  // namespace

extern "C" {

int task_bytes() { return sizeof(mel::Task); }

const char* cpu_kernel_name(int index) {
  const auto& kernels = mel::cpu_kernels();
  return index < static_cast<int>(kernels.size()) ? kernels[index]->name : nullptr;
}

// In pieces of so many chunks of rows, the last first.
void run_cpu(const mel::Task* task, int index, int piece) {
  mel::run_on_cpu(*task, *mel::cpu_kernels()[index], [&](std::int64_t count, const auto& body) {
    for (std::int64_t end = count; end > 0; end -= piece) {
      body(std::max<std::int64_t>(end - piece, 0), end);
    }
  });
}

// What the GPU's blocks do, one after the other, on shared memory that starts as NaN.
void run_blocks(const mel::Task* task, unsigned seed) {
  const mel::BlockShape shape = mel::block_shape(*task);
  const std::size_t words = (shape.bytes() + 7) / 8;
  for (std::int64_t block = 0; block * shape.frames < task->num_rows; ++block) {
    const std::unique_ptr<double[]> memory(new double[words]);
    std::fill_n(memory.get(), words, std::nan(""));
    mel::run_block(ShuffledThreads(seed), *task, shape, memory.get(), block);
  }
}

// What the GPU's warps do, for the sizes of the transform that they have code for.
bool run_warps(const mel::Task* task) {
  switch (task->fft_size) {
    case 512:
      run_all_warps<256>(*task);
      return true;
    case 1024:
      run_all_warps<512>(*task);
      return true;
    case 2048:
      run_all_warps<1024>(*task);
      return true;
    default:
      return false;
  }
}

int block_bytes(const mel::Task* task) {
  return mel::block_shape(*task).bytes();
}

int block_frames(const mel::Task* task) {
  return mel::block_shape(*task).frames;
}

void natural_log(const float* x, float* out, int count) {
  for (int i = 0; i < count; ++i) out[i] = mel::natural_log(x[i]);
}

void gaussian(const std::uint64_t* bits, float* out,
                                                     int count) {
  for (int i = 0; i < count; ++i) out[i] = mel::gaussian<float>(bits[i]);
}

// Of the transform: where the GPU keeps point i, where bin k of so many ends up, a pass's radix.
int point_at(int i) {
  const ShuffledThreads threads(0);
  return mel::BlockTile<ShuffledThreads>(threads, mel::BlockShape(1, 8, 1), nullptr).point_at(i);
}

int position(int k, int points) { return mel::position(k, points); }

int radix_of(int length) { return mel::radix_of(length); }
}
