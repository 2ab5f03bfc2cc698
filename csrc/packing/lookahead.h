// Packing a long stream of clips, in the order of an epoch, for training on several ranks.
//
// One optimiser step takes `group` bins, one for each rank: step s owns the bins s * group to
// s * group + group - 1, and rank r gets bin s * group + r. Ranks that hold equally many tokens
// wait least for each other, and full bins waste least; yet the clips of a step should not come
// from all over the epoch, whose order is random for a reason. Hence a look-ahead:
//
//   1. The next `window` clips are placed by the strategy, in the bins still open and new ones.
//   2. If more than `group` bins are open then, whole steps are dealt out: as many as leave a bin
//      open. Those least full stay open, to be filled from the next window, but a bin stays open
//      only once.
//   3. The bins dealt out are sorted by their tokens and cut into steps, so that the bins of a
//      step are about equally full. Within a step the fullest bin goes to the rank that has had
//      the fewest tokens so far: two ranks' totals never differ by more than two bins of one step.
//   4. The bins that are open at the end of the stream, at most `group`, make the last step. Its
//      clips are spread over `group` bins, longest first, each into the emptiest bin. Where a clip
//      finds no room, which is rare unless all `group` bins are full, the bins stay as packed and
//      the fullest are halved until there are `group`. A bin is empty only if clips are fewer than
//      bins.
//
// No clip waits long. At most `group` bins stay open and the next steps dealt out take at least
// `group`, so every bin that stayed open can go out with them, and by rule 2 it does. For the same
// reason clips stay in the bin they were put into: packed anew with each window, an awkward clip
// could be left over again and again. It also means that a clip is placed once, whatever the group.
//
// A strategy that keeps the order of clips keeps that of bins too: the last bins stay open instead
// of the least full, steps are runs of consecutive bins, and ranks take them in order. The result
// does not depend on the window then.

#pragma once

#include <functional>
#include <queue>
#include <tuple>

#include "strategies.h"

namespace fastast::packing {

inline bool fuller(const Bin& a, const Bin& b) { return a.tokens > b.tokens; }

// Deals bins out to the ranks, one step after the other.
class Dealer {
 public:
  // bin_of: [clips of the stream], receives the numbers of the bins
  Dealer(std::size_t group, bool keeps_order, std::int64_t* bin_of)
      : group_(group), keeps_order_(keeps_order), bin_of_(bin_of), ranks_(group), ahead_(group) {
    std::iota(ranks_.begin(), ranks_.end(), std::size_t{0});
  }

  // The bins of the next step, at most one per rank: fullest first unless they keep their order.
  void deal(const Bin* bins, std::size_t count) {
    for (std::size_t i = 0; i < count; ++i) {
      for (const std::size_t clip : bins[i].clips) {
        bin_of_[clip] = static_cast<std::int64_t>(step_ * group_ + ranks_[i]);
      }
    }
    ++step_;
    if (keeps_order_) return;
    for (std::size_t i = 0; i < count; ++i) {
      ahead_[ranks_[i]] += static_cast<std::uint64_t>(bins[i].tokens);
    }
    std::stable_sort(ranks_.begin(), ranks_.end(),
                     [this](std::size_t a, std::size_t b) { return ahead_[a] < ahead_[b]; });
    const std::uint64_t least = ahead_[ranks_[0]];
    for (std::uint64_t& tokens : ahead_) tokens -= least;
  }

 private:
  std::size_t group_;
  bool keeps_order_;
  std::int64_t* bin_of_;
  std::size_t step_ = 0;
  // In the order in which the next step's bins go to them: fewest tokens so far first.
  std::vector<std::size_t> ranks_;
  // Tokens that each rank has had more than the rank that has had fewest. At most max_tokens by
  // rule 3, so another bin's tokens do not overflow.
  std::vector<std::uint64_t> ahead_;
};

// Spreads clips over `count` bins, longest first, each into the emptiest bin, of several the one
// with fewest clips. No bins where a clip finds no room.
inline std::vector<Bin> spread(const std::int64_t* lengths, Clips clips, const Limits& limits,
                               std::size_t count) {
  std::vector<Bin> bins(count);
  using Entry = std::tuple<std::int64_t, std::size_t, std::size_t>;  // tokens, clips, bin
  std::priority_queue<Entry, std::vector<Entry>, std::greater<Entry>> emptiest;
  for (std::size_t bin = 0; bin < count; ++bin) emptiest.emplace(0, 0, bin);
  sort_longest_first(lengths, clips);
  for (const std::size_t clip : clips) {
    if (emptiest.empty()) return {};
    const std::size_t index = std::get<2>(emptiest.top());
    Bin& bin = bins[index];
    if (bin.room(limits) < lengths[clip]) return {};
    emptiest.pop();
    bin.add(clip, lengths[clip]);
    if (bin.room(limits) >= 0) emptiest.emplace(bin.tokens, bin.clips.size(), index);
  }
  return bins;
}

// The bins of the last step, made of those that were packed (rule 4).
inline std::vector<Bin> spread_last(const std::int64_t* lengths, std::vector<Bin> packed,
                                    const Limits& limits, std::size_t group) {
  Clips clips;
  for (const Bin& bin : packed) clips.insert(clips.end(), bin.clips.begin(), bin.clips.end());
  // In the order of the stream, so that equal lengths are spread in it.
  std::sort(clips.begin(), clips.end());
  std::vector<Bin> even = spread(lengths, clips, limits, std::min(group, clips.size()));
  if (!even.empty()) return even;

  while (packed.size() < group) {
    // A single clip cannot be halved. There are more clips than bins, or `spread` had succeeded.
    const auto fullest =
        std::max_element(packed.begin(), packed.end(), [](const Bin& a, const Bin& b) {
          return std::make_pair(a.clips.size() > 1, a.tokens) <
                 std::make_pair(b.clips.size() > 1, b.tokens);
        });
    std::vector<Bin> halves = spread(lengths, fullest->clips, limits, 2);
    *fullest = std::move(halves[0]);
    packed.push_back(std::move(halves[1]));
  }
  return packed;
}

// Throws std::invalid_argument for a window, group or limit out of range, or a clip too long.
// lengths, bin_of: [count]
inline void pack(const std::int64_t* lengths, std::size_t count, const Limits& limits,
                 const Strategy& strategy, std::int64_t window, std::int64_t group,
                 std::int64_t* bin_of) {
  check(lengths, count, limits);
  if (window < 1) {
    throw std::invalid_argument("window is " + std::to_string(window) +
                                "; it must be at least 1");
  }
  if (group < 1) {
    throw std::invalid_argument("group is " + std::to_string(group) + "; it must be at least 1");
  }
  const auto ranks = static_cast<std::size_t>(group);
  Dealer dealer(ranks, strategy.keeps_order, bin_of);
  std::vector<Bin> open;
  std::size_t stayed = 0;  // so many bins, the first ones, were left open by the last steps
  for (std::size_t begin = 0; begin < count;) {
    const std::size_t end = begin + std::min<std::size_t>(window, count - begin);
    strategy.place(lengths, begin, end, limits, open);
    begin = end;
    const std::size_t complete = (open.size() - 1) / ranks * ranks;
    if (complete == 0) continue;
    if (!strategy.keeps_order) {
      std::stable_sort(open.begin() + stayed, open.end(), fuller);
      std::stable_sort(open.begin(), open.begin() + complete, fuller);
    }
    for (std::size_t i = 0; i < complete; i += ranks) dealer.deal(&open[i], ranks);
    open.erase(open.begin(), open.begin() + complete);
    stayed = open.size();
  }
  if (open.empty()) return;
  std::vector<Bin> last = spread_last(lengths, std::move(open), limits, ranks);
  if (!strategy.keeps_order) std::stable_sort(last.begin(), last.end(), fuller);
  dealer.deal(last.data(), last.size());
}

}  // namespace fastast::packing
