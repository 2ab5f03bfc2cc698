// Packing clips into bins of limited size, as a data loader does when it forms batches.
//
// Every strategy takes some clips of a stream, whose lengths are in tokens, and puts each into one
// of the bins that are open already or into a new one. This file is plain C++ and knows nothing of
// Python. For n clips and b open bins:
//
// next_fit: fill the last bin in the given order; the clip that would exceed a limit opens the
//   next one, and bins before the last are never revisited, so each bin is a run of neighbouring
//   clips. O(n).
//   Source: ElasticAST, section 2.2 "Sequence Packing" (default limit there: 2048 tokens a row).
//
// first_fit: in the given order, each clip into the first bin that can hold it. A tournament tree
//   over the bins' room finds it: O(n log(n + b)).
//
// best_fit_decreasing: longest clip first, equal lengths in the given order, each into the fullest
//   bin that can hold it, the first of several. O(n log(n + b)).
//   Source of both: Johnson, "Near-optimal bin packing algorithms" (1973).

#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <numeric>
#include <set>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace fastast::packing {

// Indices into the stream.
using Clips = std::vector<std::size_t>;

// What a bin may hold; a bin that exactly reaches a limit is still legal.
struct Limits {
  std::int64_t max_tokens;
  std::int64_t max_items;
};

struct Bin {
  std::int64_t tokens = 0;
  Clips clips;

  void add(std::size_t clip, std::int64_t length) {
    tokens += length;
    clips.push_back(clip);
  }

  // The longest clip that still fits, or -1 where not even an empty one does. Whoever asks
  // compares with this, because a sum could overflow where the limit is near INT64_MAX.
  std::int64_t room(const Limits& limits) const {
    const bool full = clips.size() >= static_cast<std::uint64_t>(limits.max_items);
    return full ? -1 : limits.max_tokens - tokens;
  }
};

// Puts the clips begin .. end - 1 of the stream into `bins`, opening new ones at its end.
using Place = void (*)(const std::int64_t* lengths, std::size_t begin, std::size_t end,
                       const Limits& limits, std::vector<Bin>& bins);

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

// The clips by their length, longest first; equal lengths stay in order.
inline void sort_longest_first(const std::int64_t* lengths, Clips& clips) {
  std::stable_sort(clips.begin(), clips.end(),
                   [=](std::size_t a, std::size_t b) { return lengths[a] > lengths[b]; });
}

inline void next_fit(const std::int64_t* lengths, std::size_t begin, std::size_t end,
                     const Limits& limits, std::vector<Bin>& bins) {
  for (std::size_t clip = begin; clip < end; ++clip) {
    if (bins.empty() || bins.back().room(limits) < lengths[clip]) bins.emplace_back();
    bins.back().add(clip, lengths[clip]);
  }
}

// The room of many bins: node i of the tree holds the larger of its children 2i and 2i + 1.
class RoomTree {
 public:
  RoomTree(std::size_t bins, std::int64_t room) {
    while (leaves_ < bins) leaves_ *= 2;
    room_.assign(2 * leaves_, room);
  }

  // The first bin with so much room; there must be one.
  std::size_t first(std::int64_t length) const {
    std::size_t node = 1;
    while (node < leaves_) {
      node *= 2;
      if (room_[node] < length) ++node;
    }
    return node - leaves_;
  }

  void set(std::size_t bin, std::int64_t room) {
    std::size_t node = bin + leaves_;
    room_[node] = room;
    for (node /= 2; node > 0; node /= 2) {
      room_[node] = std::max(room_[2 * node], room_[2 * node + 1]);
    }
  }

 private:
  std::size_t leaves_ = 1;
  std::vector<std::int64_t> room_;
};

inline void first_fit(const std::int64_t* lengths, std::size_t begin, std::size_t end,
                      const Limits& limits, std::vector<Bin>& bins) {
  // Bins that are not open yet stand in the tree with all their room, so a bin is opened by being
  // the first that fits.
  RoomTree tree(bins.size() + (end - begin), limits.max_tokens);
  for (std::size_t bin = 0; bin < bins.size(); ++bin) tree.set(bin, bins[bin].room(limits));
  for (std::size_t clip = begin; clip < end; ++clip) {
    const std::size_t bin = tree.first(lengths[clip]);
    if (bin == bins.size()) bins.emplace_back();
    bins[bin].add(clip, lengths[clip]);
    tree.set(bin, bins[bin].room(limits));
  }
}

inline void best_fit_decreasing(const std::int64_t* lengths, std::size_t begin, std::size_t end,
                                const Limits& limits, std::vector<Bin>& bins) {
  // (room, bin): the first entry with enough room is the fullest bin, and of several the first.
  // Bins that hold max_items clips are absent.
  std::set<std::pair<std::int64_t, std::size_t>> by_room;
  const auto enter = [&](std::size_t bin) {
    const std::int64_t room = bins[bin].room(limits);
    if (room >= 0) by_room.emplace(room, bin);
  };
  for (std::size_t bin = 0; bin < bins.size(); ++bin) enter(bin);
  Clips clips(end - begin);
  std::iota(clips.begin(), clips.end(), begin);
  sort_longest_first(lengths, clips);
  for (const std::size_t clip : clips) {
    const auto fit = by_room.lower_bound({lengths[clip], 0});
    std::size_t bin = bins.size();
    if (fit == by_room.end()) {
      bins.emplace_back();
    } else {
      bin = fit->second;
      by_room.erase(fit);
    }
    bins[bin].add(clip, lengths[clip]);
    enter(bin);
  }
}

struct Strategy {
  const char* name;
  Place place;
  bool keeps_order;  // a bin is a run of neighbouring clips, and bins should stay in their order
};

inline constexpr Strategy strategies[] = {
    {"next_fit", next_fit, true},
    {"first_fit", first_fit, false},
    {"best_fit_decreasing", best_fit_decreasing, false},
};

}  // namespace fastast::packing
