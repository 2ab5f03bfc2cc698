// Packing clips into rows of limited size, as a data loader does when it forms batches.
//
// Every strategy reads the lengths of the clips, in tokens, and writes for each clip the number of
// the bin (row, batch) that it goes into. This file is plain C++ and knows nothing of Python.
//
// next_fit: fill the open bin in the given order; the clip that would exceed a limit opens the next
//   bin, and closed bins are never revisited. Bin numbers therefore never decrease, so each bin is
//   a run of neighbouring clips. O(n) time, no memory beyond the result.
//   Source: ElasticAST, section 2.2 "Sequence Packing" (default limit there: 2048 tokens a row).

#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

namespace fastast::packing {

// What a bin may hold; a bin that exactly reaches a limit is still legal.
struct Limits {
  std::int64_t max_tokens;
  std::int64_t max_items;
};

// Throws std::invalid_argument unless every clip fits into a bin of its own.
inline void check(const std::int64_t* lengths, std::size_t count, const Limits& limits) {
  if (limits.max_tokens < 0) {
    throw std::invalid_argument("max_tokens is " + std::to_string(limits.max_tokens) +
                                "; it must not be negative");
  }
  if (limits.max_items < 1) {
    throw std::invalid_argument("max_items is " + std::to_string(limits.max_items) +
                                "; it must be at least 1");
  }
  for (std::size_t i = 0; i < count; ++i) {
    if (lengths[i] < 0 || lengths[i] > limits.max_tokens) {
      throw std::invalid_argument("lengths[" + std::to_string(i) + "] is " +
                                  std::to_string(lengths[i]) +
                                  "; it must lie between 0 and max_tokens = " +
                                  std::to_string(limits.max_tokens));
    }
  }
}

// lengths, bins: [count]
inline void next_fit(const std::int64_t* lengths, std::size_t count, const Limits& limits,
                     std::int64_t* bins) {
  check(lengths, count, limits);
  std::int64_t bin = 0;
  std::int64_t tokens = 0;
  std::int64_t items = 0;
  for (std::size_t i = 0; i < count; ++i) {
    // Compared by subtraction, because the sum could overflow where the limit is near INT64_MAX.
    if (lengths[i] > limits.max_tokens - tokens || items == limits.max_items) {
      ++bin;
      tokens = 0;
      items = 0;
    }
    tokens += lengths[i];
    ++items;
    bins[i] = bin;
  }
}

}  // namespace fastast::packing
