// Functions of numbers: logarithm, noise, reflection at a clip's edges.

#pragma once

#include "portable.h"

namespace fastast::mel {

// ln x to about one unit in the last place, from ln m = 2 atanh((m - 1) / (m + 1)), whose series
// in |s| < 0.172 is cut where a term would be 2e-9 of the sum. Infinity and NaN stay themselves;
// what is below the smallest normal number counts as zero.
template <class V>
FASTAST_INLINE V natural_log(V x) {
  constexpr float kInfinity = __builtin_inff();
  constexpr float kSmallest = 1.17549435e-38f;
  constexpr std::uint32_t kRootHalf = 0x3f3504f3;  // so that m lies in [sqrt(1/2), sqrt(2))
  const auto bits = bit_cast<Unsigned<V>>(x);
  const auto exponent = bit_cast<Signed<V>>(bits - kRootHalf) >> 23;
  const V m = bit_cast<V>(bits - (bit_cast<Unsigned<V>>(exponent) << 23));
  const V s = (m - 1.0f) / (m + 1.0f);
  const V square = s * s;
  V tail = square * (2.0f / 9) + 2.0f / 7;
  tail = square * tail + 2.0f / 5;
  tail = square * (square * tail + 2.0f / 3);
  const V e = convert<V>(exponent);
  // ln 2 in two parts, of which the first times an exponent is exact.
  const V value = e * 0.693359375f + (e * -2.12194440e-4f + (2.0f * s + s * tail));
  const V finite = x < kSmallest ? broadcast<V>(-kInfinity) : value;
  return x < kInfinity ? finite : x;
}

// The same for what is rounded anyway: on a GPU its own logarithm, which is exact to about 2e-7 near
// 1 and to one unit in the last place elsewhere.
template <class V>
FASTAST_INLINE V fast_log(V x) {
#ifdef __CUDA_ARCH__
  return 0.693147180559945309f * __log2f(x);
#else
  return natural_log(x);
#endif
}

// One step of splitmix64. Source: Steele, Lea and Flood, "Fast splittable pseudorandom number
// generators" (2014).
template <class W>
FASTAST_INLINE W splitmix64(W x) {
  x = x + 0x9E3779B97F4A7C15ull;
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ull;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBull;
  return x ^ (x >> 31);
}

// cos(2 pi u) for u in [0, 1): the sine's series on a quarter turn to either side.
template <class V>
FASTAST_INLINE V cos_turns(V u) {
  const V t = u - 0.5f;
  const V x = 6.28318530717958648f * ((t < 0.0f ? -t : t) - 0.25f);
  const V q = x * x;
  V series = q * (-1.0f / 39916800) + 1.0f / 362880;
  series = q * series - 1.0f / 5040;
  series = q * series + 1.0f / 120;
  series = q * series - 1.0f / 6;
  return x * (q * series + 1.0f);
}

// A standard normal number from 64 random bits (Box and Muller, 1958).
template <class V>
FASTAST_INLINE V gaussian(Wide<V> bits) {
  const V radius = (convert<V>(convert<Signed<V>>(bits >> 40)) + 1.0f) * 0x1p-24f;  // (0, 1]
  const V angle = convert<V>(convert<Signed<V>>((bits >> 16) & 0xFFFFFFull)) * 0x1p-24f;
  return square_root(-2.0f * natural_log(radius)) * cos_turns(angle);
}

// Index of a sample of the signal that continues beyond [0, length) as its own mirror image, with
// the edge samples repeated or not.
FASTAST_INLINE std::int64_t reflect(std::int64_t index, std::int64_t length, bool repeat_edge) {
  const std::int64_t period = 2 * length - (repeat_edge ? 0 : 2);
  if (period <= 0) return 0;
  index %= period;
  if (index < 0) index += period;
  return index < length ? index : period - index - (repeat_edge ? 1 : 0);
}

}  // namespace fastast::mel
