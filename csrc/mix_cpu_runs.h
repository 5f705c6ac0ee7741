// The inner loops of the CPU kernels of `mix`: runs of elements read, blended, normalised and written, in every type.
#pragma once

#include <cstdint>
#include <type_traits>

#include "mix.h"
#include "mix_job.h"

#if defined(__AVX__)
#include <immintrin.h>
#endif

namespace sdmp {
namespace SDMP_ISA {
namespace {

// A bfloat16 made from bytes. No NaN comes of those but the processor's own, which rounds to a NaN without a look.
struct ByteBf16 {
  uint16_t bits;
};

using SDMP_ISA::store;

inline void store(float value, ByteBf16& out) {
  const uint32_t bits = bits_of(value);
  out.bits = static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

// ---- runs: the inner loops ----

// What normalising a run takes: one constant for the plane, or `period` of them for interleaved channels.
struct Scaling {
  const float* centre = nullptr;
  const float* scale = nullptr;
  int64_t period = 0;
};

enum class Scaled { kNo, kPlane, kPeriod };

using Loader = void (*)(const char* in, int64_t n, float* out);
using Writer = void (*)(const float* values, int64_t n, const Scaling& scaling, char* out);
using Blender = void (*)(const float* a, float wa, const float* b, float wb, int64_t n, const Scaling& s, char* out);

template <class In>
void load_run(const char* in, int64_t n, float* out) {
  const In* values = reinterpret_cast<const In*>(in);
  int64_t k = 0;
#if defined(__F16C__)
  if constexpr (std::is_same_v<In, Half>) {
    for (; k + 8 <= n; k += 8) {
      _mm256_storeu_ps(out + k, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(values + k))));
    }
  }
#endif
#pragma GCC ivdep
  for (; k < n; ++k) out[k] = load(values[k]);
}

// out[k] = store(value(k)). Halves go in blocks, eight at a time, where the processor converts them itself.
template <class Out, class Value>
inline void store_each(int64_t n, Out* out, Value value) {
  int64_t k = 0;
#if defined(__F16C__)
  if constexpr (std::is_same_v<Out, Half>) {
    constexpr int64_t kBlock = 64;
    alignas(32) float block[kBlock];
    for (; k + kBlock <= n; k += kBlock) {
#pragma GCC ivdep
      for (int64_t j = 0; j < kBlock; ++j) block[j] = value(k + j);
      for (int64_t j = 0; j < kBlock; j += 8) {
        const __m128i halves = _mm256_cvtps_ph(_mm256_load_ps(block + j), _MM_FROUND_TO_NEAREST_INT);
        _mm_storeu_si128(reinterpret_cast<__m128i*>(out + k + j), halves);
      }
    }
  }
#endif
#pragma GCC ivdep
  for (; k < n; ++k) store(value(k), out[k]);
}

template <class Out, Scaled kind, class Value>
inline void write_each(int64_t n, const Scaling& s, Out* out, Value value) {
  if constexpr (kind == Scaled::kNo) {
    store_each(n, out, value);
  } else if constexpr (kind == Scaled::kPlane) {
    const float centre = s.centre[0], scale = s.scale[0];
    store_each(n, out, [=](int64_t k) { return normalise(value(k), centre, scale); });
  } else {
    const float* centre = s.centre;
    const float* scale = s.scale;
    for (int64_t at = 0; at < n; at += s.period) {
      const int64_t size = n - at < s.period ? n - at : s.period;
      store_each(size, out + at, [=](int64_t k) { return normalise(value(at + k), centre[k], scale[k]); });
    }
  }
}

template <class Out, Scaled kind>
void write_run(const float* values, int64_t n, const Scaling& s, char* out) {
  write_each<Out, kind>(n, s, reinterpret_cast<Out*>(out), [=](int64_t k) { return values[k]; });
}

template <class Out, Scaled kind>
void blend_run(const float* a, float wa, const float* b, float wb, int64_t n, const Scaling& s, char* out) {
  write_each<Out, kind>(n, s, reinterpret_cast<Out*>(out), [=](int64_t k) { return blend(a[k], wa, b[k], wb); });
}

constexpr Loader kLoaders[] = {load_run<uint8_t>, load_run<Half>, load_run<Bf16>, load_run<float>};

template <Scaled kind>
constexpr Writer kWriters[] = {write_run<uint8_t, kind>, write_run<Half, kind>, write_run<Bf16, kind>,
                               write_run<float, kind>, write_run<ByteBf16, kind>};
template <Scaled kind>
constexpr Blender kBlenders[] = {blend_run<uint8_t, kind>, blend_run<Half, kind>, blend_run<Bf16, kind>,
                                 blend_run<float, kind>, blend_run<ByteBf16, kind>};

// Where the tables have what makes `out` of `in`: by the Type of `out`, with ByteBf16 behind the last of them.
int entry(Type in, Type out) {
  constexpr int kByteBf16 = static_cast<int>(Type::kFloat) + 1;
  return in == Type::kUint8 && out == Type::kBf16 ? kByteBf16 : static_cast<int>(out);
}

Writer writer_for(Type in, Type out, Scaled kind) {
  const auto* table = kind == Scaled::kNo      ? kWriters<Scaled::kNo>
                      : kind == Scaled::kPlane ? kWriters<Scaled::kPlane>
                                               : kWriters<Scaled::kPeriod>;
  return table[entry(in, out)];
}

Blender blender_for(Type in, Type out, Scaled kind) {
  const auto* table = kind == Scaled::kNo      ? kBlenders<Scaled::kNo>
                      : kind == Scaled::kPlane ? kBlenders<Scaled::kPlane>
                                               : kBlenders<Scaled::kPeriod>;
  return table[entry(in, out)];
}

int64_t size_of(Type type) { return type == Type::kUint8 ? 1 : type == Type::kFloat ? 4 : 2; }

int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

}  // namespace
}  // namespace SDMP_ISA
}  // namespace sdmp
