// Power spectrum of real frames.
//
// The 2 n samples of a frame are the real and imaginary parts of n complex points. Their transform
// works in place by decimation in frequency: a pass over transforms of length L with radix R
//
//     z[m L/R + o]  <-  W_L^(o m)  sum_r W_R^(r m) z[r L/R + o],    W_L = exp(-2 pi i / L)
//
// leaves R transforms of length L / R side by side. A butterfly writes where it has read, so the
// butterflies of a pass can run in any order, and one barrier per pass is enough. Nothing is
// brought back into order: `position` says where a bin ended up. Last, each pair of bins k and
// n - k is turned into the two powers of the real transform (`split`).
//
// Sources: Cooley and Tukey (1965); Sorensen et al., "Real-valued fast Fourier transform
// algorithms" (1987). The tables are computed in double precision.

#pragma once

#include "task.h"

namespace fastast::mel {

template <class V>
struct Complex {
  V re, im;
};

template <class V>
FASTAST_INLINE Complex<V> operator+(const Complex<V>& a, const Complex<V>& b) {
  return {a.re + b.re, a.im + b.im};
}

template <class V>
FASTAST_INLINE Complex<V> operator-(const Complex<V>& a, const Complex<V>& b) {
  return {a.re - b.re, a.im - b.im};
}

// b may be the same number in all lanes, or one for each.
template <class V, class W>
FASTAST_INLINE Complex<V> operator*(const Complex<V>& a, const Complex<W>& b) {
  return {a.re * b.re - a.im * b.im, a.re * b.im + a.im * b.re};
}

template <class V>
FASTAST_INLINE Complex<V> times_minus_i(const Complex<V>& a) {
  return {a.im, -a.re};
}

// The radix of the pass over transforms of this length: 8, as long as no 2 is left at the end.
constexpr FASTAST_INLINE int radix_of(int length) { return length == 4 || length == 16 ? 4 : 8; }

// Where bin k of a transform of `points` ends up.
FASTAST_INLINE int position(int k, int points) {
  int result = 0;
  while (points > 1) {
    const int radix = radix_of(points);
    points /= radix;
    result += (k & (radix - 1)) * points;
    k /= radix;
  }
  return result;
}

// Roots of unity. A pass over length L with radix R reads passes[L + (m - 1) L/R + o] = W_L^(o m);
// the split of n points reads halves[n/2 + k] = W_2n^k, 0 <= k < n/2.
struct Roots {
  static constexpr int kMostPoints = kLargestFft / 2;
  Complex<float> passes[2 * kMostPoints];
  Complex<float> halves[kMostPoints];
};

constexpr Complex<float> root_of_unity(int power, int order) {
  const int nearest = 2 * power > order ? power - order : power;  // the angle in [-pi, pi]
  const double angle = -6.283185307179586476925 * nearest / order;
  double cosine = 1.0, sine = 0.0, term = 1.0;
  for (int i = 1; i < 30; i += 2) {
    term *= angle / i;
    sine += term;
    term *= -angle / (i + 1);
    cosine += term;
  }
  return {static_cast<float>(cosine), static_cast<float>(sine)};
}

constexpr Roots make_roots() {
  Roots roots{};
  for (int length = 4; length <= Roots::kMostPoints; length *= 2) {
    const int radix = radix_of(length), stride = length / radix;
    for (int m = 1; m < radix; ++m) {
      for (int o = 0; o < stride; ++o) {
        roots.passes[length + (m - 1) * stride + o] = root_of_unity(o * m, length);
      }
    }
    for (int k = 0; k < length / 2; ++k) {
      roots.halves[length / 2 + k] = root_of_unity(k, 2 * length);
    }
  }
  return roots;
}

inline constexpr Roots kRoots = make_roots();
#ifdef __CUDACC__
__device__ const Roots kDeviceRoots = make_roots();
#endif

FASTAST_INLINE const Roots& roots() {
#ifdef __CUDA_ARCH__
  return kDeviceRoots;
#else
  return kRoots;
#endif
}

template <class V>
FASTAST_INLINE void transform(Complex<V> (&a)[4]) {
  const Complex<V> even = a[0] + a[2], odd = a[1] + a[3];
  const Complex<V> rest = a[0] - a[2], turned = times_minus_i(a[1] - a[3]);
  a[0] = even + odd;
  a[1] = rest + turned;
  a[2] = even - odd;
  a[3] = rest - turned;
}

template <class V>
FASTAST_INLINE void transform(Complex<V> (&a)[8]) {
  constexpr float kRootHalf = 0.707106781186547524f;
  Complex<V> even[4] = {a[0], a[2], a[4], a[6]}, odd[4] = {a[1], a[3], a[5], a[7]};
  transform(even);
  transform(odd);
  odd[1] = {kRootHalf * (odd[1].re + odd[1].im), kRootHalf * (odd[1].im - odd[1].re)};
  odd[2] = times_minus_i(odd[2]);
  odd[3] = {kRootHalf * (odd[3].im - odd[3].re), -kRootHalf * (odd[3].re + odd[3].im)};
  FASTAST_UNROLL
  for (int m = 0; m < 4; ++m) {
    a[m] = even[m] + odd[m];
    a[m + 4] = even[m] - odd[m];
  }
}

// Butterfly j of points / kRadix of a pass. `load(i)` gives point i, `store(i, z)` takes it.
template <int kRadix, class V, class Load, class Store>
FASTAST_INLINE void butterfly(int length, int j, const Load& load, const Store& store) {
  const int stride = length / kRadix, o = j & (stride - 1);
  const int first = (j - o) * kRadix + o;
  const Complex<float>* root = roots().passes + length + o;
  Complex<V> a[kRadix];
  FASTAST_UNROLL
  for (int m = 0; m < kRadix; ++m) a[m] = load(first + m * stride);
  transform(a);
  store(first, a[0]);
  FASTAST_UNROLL
  for (int m = 1; m < kRadix; ++m) store(first + m * stride, a[m] * root[(m - 1) * stride]);
}

template <class V>
FASTAST_INLINE V power_of(const Complex<V>& z, bool magnitude) {
  const V power = z.re * z.re + z.im * z.im;
  return magnitude ? square_root(power) : power;
}

// The powers of bins k and n - k of the real transform, for 0 < k < n/2, from those of the
// complex one.
template <class V, class W>
FASTAST_INLINE void split(const Complex<V>& z, const Complex<V>& mirror, const Complex<W>& root,
                          bool magnitude, V& power, V& power_mirror) {
  const Complex<V> even = {0.5f * (z.re + mirror.re), 0.5f * (z.im - mirror.im)};
  const Complex<V> odd = {0.5f * (z.im + mirror.im), 0.5f * (mirror.re - z.re)};
  const Complex<V> turned = odd * root;
  power = power_of(even + turned, magnitude);
  power_mirror = power_of(even - turned, magnitude);
}

}  // namespace fastast::mel
