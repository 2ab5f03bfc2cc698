// What lets one source serve a GPU thread and a CPU's vector lanes.
//
// The arithmetic of the filterbank is written over a value type V. On a GPU, V is float: a thread
// works on one number of one frame. On a CPU, V is a vector with one lane per frame (cpu/lanes.h):
// the same operations in the same order, for as many frames as the registers have lanes. Either
// way no operation mixes frames, so a frame's numbers do not depend on its neighbours.

#pragma once

#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define FASTAST_INLINE __host__ __device__ __forceinline__
#else
// Inlined always: the CPU's kernels are compiled once per instruction set, and a copy that is
// shared between them by its name would run instructions that a machine lacks.
#define FASTAST_INLINE inline __attribute__((always_inline))
#endif

#if defined(__CUDACC__) || defined(__clang__)
#define FASTAST_UNROLL _Pragma("unroll")
#else
#define FASTAST_UNROLL _Pragma("GCC unroll 16")
#endif

namespace fastast::mel {

// The integers that go with V: of 32 bits, signed and unsigned, and unsigned of 64 bits.
template <class V>
struct Integers;

template <>
struct Integers<float> {
  using Signed = std::int32_t;
  using Unsigned = std::uint32_t;
  using Wide = std::uint64_t;
};

template <class V>
using Signed = typename Integers<V>::Signed;
template <class V>
using Unsigned = typename Integers<V>::Unsigned;
template <class V>
using Wide = typename Integers<V>::Wide;

template <class To, class From>
FASTAST_INLINE To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast keeps the size");
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

template <class To, class From>
FASTAST_INLINE To convert(const From& from) {
#ifdef __CUDACC__
  return static_cast<To>(from);
#else
  if constexpr (sizeof(To) <= 8 && sizeof(From) <= 8) {
    return static_cast<To>(from);
  } else {
    return __builtin_convertvector(from, To);
  }
#endif
}

// The same number in every lane.
template <class V>
FASTAST_INLINE V broadcast(float value) {
  return V{} + value;
}

// A number that the compiler knows, as an argument.
template <int kValue>
struct Constant {
  static constexpr int value = kValue;
};

FASTAST_INLINE float square_root(float x) { return __builtin_sqrtf(x); }

}  // namespace fastast::mel
