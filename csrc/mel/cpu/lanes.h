// Vectors with a lane per frame, in the vector types of GCC and Clang, for any instruction set.

#pragma once

#include <utility>

#include "../portable.h"

namespace fastast::mel {

template <int kLanes>
struct Vectors {
  typedef float Float __attribute__((vector_size(4 * kLanes)));
  typedef std::int32_t Int __attribute__((vector_size(4 * kLanes)));
  typedef std::uint32_t Unsigned __attribute__((vector_size(4 * kLanes)));
  typedef std::uint64_t Wide __attribute__((vector_size(8 * kLanes)));
  typedef std::int16_t Int16 __attribute__((vector_size(2 * kLanes)));
  typedef std::uint16_t Unsigned16 __attribute__((vector_size(2 * kLanes)));
};

template <int kLanes>
using Lanes = typename Vectors<kLanes>::Float;

template <int kLanes>
struct LaneIntegers {
  using Signed = typename Vectors<kLanes>::Int;
  using Unsigned = typename Vectors<kLanes>::Unsigned;
  using Wide = typename Vectors<kLanes>::Wide;
};

template <>
struct Integers<Lanes<4>> : LaneIntegers<4> {};
template <>
struct Integers<Lanes<8>> : LaneIntegers<8> {};
template <>
struct Integers<Lanes<16>> : LaneIntegers<16> {};

template <class V, class = typename Integers<V>::Signed>
FASTAST_INLINE V square_root(V x) {
  V root;
  for (unsigned lane = 0; lane < sizeof(V) / 4; ++lane) root[lane] = __builtin_sqrtf(x[lane]);
  return root;
}

// Lane i of `a` and `b`, which count on from one to the other, is taken from pick(i).
template <int kLanes, class Pick, int... kIndex>
FASTAST_INLINE Lanes<kLanes> shuffle(Lanes<kLanes> a, Lanes<kLanes> b, Pick,
                                     std::integer_sequence<int, kIndex...>) {
#ifdef __clang__
  return __builtin_shufflevector(a, b, Pick::of(kIndex)...);
#else
  return __builtin_shuffle(a, b, typename Vectors<kLanes>::Int{Pick::of(kIndex)...});
#endif
}

// What row r (upper = false) or row r + kStep takes from these two rows.
template <int kLanes, int kStep, bool kUpper>
struct Exchange {
  static constexpr int of(int lane) {
    const bool from_second = lane & kStep;
    const int kept = kUpper ? lane | kStep : lane & ~kStep;
    return from_second ? kLanes + kept : kept;
  }
};

// Rows become columns: blocks of kStep x kStep change places, then those within them.
template <int kLanes, int kStep = kLanes / 2>
FASTAST_INLINE void transpose(Lanes<kLanes> (&rows)[kLanes]) {
  if constexpr (kStep > 0) {
    constexpr auto kIndex = std::make_integer_sequence<int, kLanes>{};
    FASTAST_UNROLL
    for (int r = 0; r < kLanes; ++r) {
      if (r & kStep) continue;
      const Lanes<kLanes> a = rows[r], b = rows[r + kStep];
      rows[r] = shuffle<kLanes>(a, b, Exchange<kLanes, kStep, false>{}, kIndex);
      rows[r + kStep] = shuffle<kLanes>(a, b, Exchange<kLanes, kStep, true>{}, kIndex);
    }
    transpose<kLanes, kStep / 2>(rows);
  }
}

}  // namespace fastast::mel
