// Whole cache lines written past the cache, for results that are larger than it: shared by all CPU kernels.
#pragma once

#include <cstdint>
#include <cstring>

#ifndef SDMP_ISA
#define SDMP_ISA portable
#endif

#if defined(__SSE2__)
#include <emmintrin.h>
#endif
#if defined(__AVX__)
#include <immintrin.h>
#endif

namespace sdmp {
namespace SDMP_ISA {
namespace {

constexpr int64_t kLine = 64;  // bytes of a cache line

inline void stream_line(char* to, const char* from) {
#if defined(__AVX512F__)
  _mm512_stream_si512(reinterpret_cast<__m512i*>(to), _mm512_loadu_si512(from));
#elif defined(__AVX__)
  for (int64_t k = 0; k < kLine; k += 32) {
    const __m256i data = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + k));
    _mm256_stream_si256(reinterpret_cast<__m256i*>(to + k), data);
  }
#elif defined(__SSE2__)
  for (int64_t k = 0; k < kLine; k += 16) {
    const __m128i data = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + k));
    _mm_stream_si128(reinterpret_cast<__m128i*>(to + k), data);
  }
#else
  std::memcpy(to, from, kLine);
#endif
}

inline void finish_streams() {
#if defined(__SSE2__)
  _mm_sfence();  // the stores are in no order with what another thread reads next
#endif
}

}  // namespace
}  // namespace SDMP_ISA
}  // namespace sdmp
