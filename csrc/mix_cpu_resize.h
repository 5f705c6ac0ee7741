// Rows of a resized image on the CPU: where its columns look, and their blend.
#pragma once

#include <cstdint>

#include "mix.h"
#include "mix_cpu_memory.h"

#if defined(__SSE2__)
#include <emmintrin.h>
#endif
#if defined(__AVX__)
#include <immintrin.h>
#endif

namespace sdmp {
namespace SDMP_ISA {
namespace {

struct Taps {  // of one axis, for one box
  int32_t* first;
  int32_t* step;
  float* w0;  // weights of the first and the second source pixel
  float* w1;

  // `unit` turns pixels into elements.
  void fill(int64_t target, int64_t extent, float scale, int64_t unit) {
    for (int64_t k = 0; k < target; ++k) {
      const Tap tap =
          resize_tap(static_cast<int32_t>(k), static_cast<int32_t>(target), static_cast<int32_t>(extent), scale);
      first[k] = static_cast<int32_t>(tap.first * unit);
      step[k] = static_cast<int32_t>(tap.step * unit);
      w0[k] = tap.w0;
      w1[k] = tap.w1;
    }
  }
};

constexpr int64_t kPad = 3 * kFloats;  // elements that vectors may touch behind a row

// out[k] = the blend of the pixel at taps.first[k] and its right neighbour, for `n` columns from `begin` on. May touch
// kPad elements too many.
void blend_columns(const float* row, const Taps& taps, int64_t begin, int64_t n, int64_t group, float* out) {
  const int32_t* first = taps.first + begin;
  const float* w0 = taps.w0 + begin;
  const float* w1 = taps.w1 + begin;
  int64_t k = 0;
#if defined(__AVX512F__)
  if (group == 1) {  // two loads hold what sixteen pixels are made of, if that is near enough
    for (; k + kFloats <= n && first[k + kFloats - 1] - first[k] < 2 * kFloats; k += kFloats) {
      const float* from = row + first[k];
      const __m512i at = _mm512_sub_epi32(_mm512_loadu_si512(first + k), _mm512_set1_epi32(first[k]));
      const __m512 left = _mm512_permutex2var_ps(_mm512_loadu_ps(from), at, _mm512_loadu_ps(from + kFloats));
      const __m512 right = _mm512_permutex2var_ps(_mm512_loadu_ps(from + 1), at, _mm512_loadu_ps(from + 1 + kFloats));
      const __m512 a = _mm512_mul_ps(left, _mm512_loadu_ps(w0 + k));
      _mm512_storeu_ps(out + k, _mm512_add_ps(a, _mm512_mul_ps(right, _mm512_loadu_ps(w1 + k))));
    }
  }
#endif
#if defined(__SSE2__)
  if (group == 1) {  // two neighbours are one load
    const auto pair = [row](int32_t at) { return reinterpret_cast<const double*>(row + at); };
    for (; k + 4 <= n; k += 4) {
      const __m128 a = _mm_castpd_ps(_mm_loadh_pd(_mm_load_sd(pair(first[k])), pair(first[k + 1])));
      const __m128 b = _mm_castpd_ps(_mm_loadh_pd(_mm_load_sd(pair(first[k + 2])), pair(first[k + 3])));
      const __m128 left = _mm_mul_ps(_mm_shuffle_ps(a, b, 0x88), _mm_loadu_ps(w0 + k));
      const __m128 right = _mm_mul_ps(_mm_shuffle_ps(a, b, 0xdd), _mm_loadu_ps(w1 + k));
      _mm_storeu_ps(out + k, _mm_add_ps(left, right));
    }
  } else if (group == 3) {  // three channels and one lane to spare
    for (; k < n; ++k) {
      const __m128 a = _mm_mul_ps(_mm_loadu_ps(row + first[k]), _mm_set1_ps(w0[k]));
      const __m128 b = _mm_mul_ps(_mm_loadu_ps(row + first[k] + 3), _mm_set1_ps(w1[k]));
      _mm_storeu_ps(out + 3 * k, _mm_add_ps(a, b));
    }
  }
#endif
  for (; k < n; ++k) {
    const float* left = row + first[k];
    for (int64_t c = 0; c < group; ++c) {
      out[k * group + c] = blend(left[c], w0[k], left[group + c], w1[k]);
    }
  }
}

}  // namespace
}  // namespace SDMP_ISA
}  // namespace sdmp
