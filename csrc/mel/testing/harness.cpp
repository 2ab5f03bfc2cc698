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
