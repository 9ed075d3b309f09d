// Sixteen lanes of fp32 in GCC's vector notation. The compiler maps them to the registers of the instruction set (one
// of AVX-512, two of AVX2, four of SSE), so every build of a source adds in the same order. As the build also disables
// the contraction into FMA, every build gives the same bits.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include "arguments.h"

#define EVE_INLINE inline __attribute__((always_inline))
#define EVE_LAMBDA_INLINE __attribute__((always_inline))

namespace eve_ds {
namespace EVE_ISA {

constexpr int64_t kLanes = 16;
typedef float Floats __attribute__((vector_size(64)));
typedef int32_t Ints __attribute__((vector_size(64)));
typedef float Floats8 __attribute__((vector_size(32)));
typedef float Floats4 __attribute__((vector_size(16)));
typedef int32_t Ints8 __attribute__((vector_size(32)));
typedef int32_t Ints4 __attribute__((vector_size(16)));
typedef uint32_t Words __attribute__((vector_size(64)));
typedef uint16_t Halves __attribute__((vector_size(32)));

struct BFloat16 {
  uint16_t bits;
};

EVE_INLINE Floats broadcast(float value) { return value - Floats{}; }

EVE_INLINE Floats load(const float* from) {
  Floats value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

EVE_INLINE void store(float* to, Floats value) { std::memcpy(to, &value, sizeof value); }

// Store that bypasses the cache, for results too large to stay in it: a plain store would first read the line that it
// fills. The address must be a multiple of 64 bytes; call stream_fence() before another thread reads the result.
EVE_INLINE void stream(float* to, Floats value) {
#if defined(__AVX512F__)
  _mm512_stream_ps(to, (__m512)value);
#elif defined(__SSE2__)
  for (int i = 0; i < 4; ++i) {
    __m128 part;
    std::memcpy(&part, reinterpret_cast<const char*>(&value) + 16 * i, sizeof part);
    _mm_stream_ps(to + 4 * i, part);
  }
#else
  store(to, value);
#endif
}

EVE_INLINE void stream_fence() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

EVE_INLINE Floats load(const BFloat16* from) {
  Halves bits;
  std::memcpy(&bits, from, sizeof bits);
  return (Floats)(__builtin_convertvector(bits, Words) << 16);
}

// Rounds to nearest, ties to even; NaN stays NaN.
EVE_INLINE Halves round_to_bfloat16(Floats value) {
  const Words bits = (Words)value;
  const Words rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const Words not_a_number = Words{} + 0x7fc0;
  return __builtin_convertvector(value == value ? rounded : not_a_number, Halves);
}

EVE_INLINE void store(BFloat16* to, Floats value) {
  const Halves halves = round_to_bfloat16(value);
  std::memcpy(to, &halves, sizeof halves);
}

// The address must be a multiple of 32 bytes.
EVE_INLINE void stream(BFloat16* to, Floats value) {
#if defined(__SSE2__)
  const Halves halves = round_to_bfloat16(value);
  for (int i = 0; i < 2; ++i) {
    __m128i part;
    std::memcpy(&part, reinterpret_cast<const char*>(&halves) + 16 * i, sizeof part);
    _mm_stream_si128(reinterpret_cast<__m128i*>(to) + i, part);
  }
#else
  store(to, value);
#endif
}

EVE_INLINE float load_one(const float* from) { return *from; }
EVE_INLINE void store_one(float* to, float value) { *to = value; }

EVE_INLINE float load_one(const BFloat16* from) {
  const uint32_t bits = static_cast<uint32_t>(from->bits) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

EVE_INLINE void store_one(BFloat16* to, float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  to->bits = value == value ? (bits + 0x7fff + ((bits >> 16) & 1)) >> 16 : 0x7fc0;
}

// Loads the first `count` < 16 values and fills up the rest; the second function stores them.
template <typename T>
EVE_INLINE Floats load_part(const T* from, int64_t count, float fill) {
  Floats value = broadcast(fill);
  for (int64_t i = 0; i < count; ++i) value[i] = load_one(from + i);
  return value;
}

template <typename T>
EVE_INLINE void store_part(T* to, Floats value, int64_t count) {
  for (int64_t i = 0; i < count; ++i) store_one(to + i, value[i]);
}

// Reduces lane by lane, halves onto halves: 16 to 8 to 4 to 2 to 1.
template <typename Narrow, typename Wide>
EVE_INLINE Narrow half(Wide v, int which) {
  Narrow part;
  std::memcpy(&part, reinterpret_cast<const char*>(&v) + which * sizeof part, sizeof part);
  return part;
}

EVE_INLINE float sum(Floats v) {
  const Floats8 eight = half<Floats8>(v, 0) + half<Floats8>(v, 1);
  const Floats4 four = half<Floats4>(eight, 0) + half<Floats4>(eight, 1);
  return (four[0] + four[2]) + (four[1] + four[3]);
}

EVE_INLINE float largest(Floats v) {
  const Floats8 a = half<Floats8>(v, 0), b = half<Floats8>(v, 1);
  const Floats8 eight = a > b ? a : b;
  const Floats4 c = half<Floats4>(eight, 0), d = half<Floats4>(eight, 1);
  const Floats4 four = c > d ? c : d;
  const float even = four[0] > four[2] ? four[0] : four[2], odd = four[1] > four[3] ? four[1] : four[3];
  return even > odd ? even : odd;
}

EVE_INLINE int32_t smallest(Ints v) {
  const Ints8 a = half<Ints8>(v, 0), b = half<Ints8>(v, 1);
  const Ints8 eight = a < b ? a : b;
  const Ints4 c = half<Ints4>(eight, 0), d = half<Ints4>(eight, 1);
  const Ints4 four = c < d ? c : d;
  const int32_t even = four[0] < four[2] ? four[0] : four[2], odd = four[1] < four[3] ? four[1] : four[3];
  return even < odd ? even : odd;
}

// Content of one register. GCC splits sums and products of wider vectors into registers, but comparisons and
// conversions into single lanes, which is several times slower. Functions with such steps are therefore applied part by
// part.
#if defined(__AVX512F__)
typedef Floats Part;
typedef Ints IntPart;
#elif defined(__AVX2__)
typedef Floats8 Part;
typedef Ints8 IntPart;
#else
typedef Floats4 Part;
typedef Ints4 IntPart;
#endif

EVE_INLINE Part broadcast_part(float value) { return value - Part{}; }

// Works lane by lane, so that the result does not depend on the number of lanes in a part.
template <typename Function, typename... Vectors>
EVE_INLINE Floats by_parts(Function function, Vectors... vectors) {
  Floats result;
  for (int i = 0; i < static_cast<int>(sizeof(Floats) / sizeof(Part)); ++i) {
    const Part part = function(half<Part>(vectors, i)...);
    std::memcpy(reinterpret_cast<char*>(&result) + i * sizeof part, &part, sizeof part);
  }
  return result;
}

// e^x for x <= 0 within 2 units in the last place: e^x = 2^n * e^r with |r| <= ln 2 / 2, and a Taylor polynomial of e^r
// of degree 7. Below the smallest normal number the result is 0.
EVE_INLINE Part exponential_part(Part x) {
  const Part clamped = x > -87.0f ? x : broadcast_part(-87.0f);
  const Part magic = broadcast_part(12582912.0f);  // 1.5 * 2^23: adding it rounds to a whole number
  const Part n = (clamped * 1.44269504f + magic) - magic;
  const Part r = (clamped - n * 0.693145752f) - n * 1.42860677e-6f;
  Part p = broadcast_part(1.0f / 5040);
  p = p * r + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  const IntPart exponent = (__builtin_convertvector(n, IntPart) + 127) << 23;
  const Part value = p * (Part)exponent;
  return x > -87.0f ? value : Part{};
}

EVE_INLINE Floats maximum(Floats a, Floats b) {
  return by_parts([](Part one, Part other) EVE_LAMBDA_INLINE { return one > other ? one : other; }, a, b);
}

EVE_INLINE Floats exponential(Floats x) {
  return by_parts([](Part part) EVE_LAMBDA_INLINE { return exponential_part(part); }, x);
}

}  // namespace EVE_ISA
}  // namespace eve_ds
