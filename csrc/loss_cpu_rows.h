// How the CPU kernels of the losses read rows of any type and stride, and write rows of gradients.
#pragma once

#include <type_traits>

#include "loss_cpu.h"
#include "loss_job.h"

namespace sdmp {
namespace SDMP_ISA {
namespace {

// A run of elements as float32.
template <class In>
void widen(const In* in, int64_t step, int64_t n, float* out) {
  if (step != 1) {
    for (int64_t k = 0; k < n; ++k) out[k] = load(in[k * step]);
    return;
  }
  int64_t k = 0;
#if defined(__F16C__)
  if constexpr (std::is_same_v<In, Half>) {
    for (; k + 8 <= n; k += 8) {
      _mm256_storeu_ps(out + k, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(in + k))));
    }
  }
#endif
#pragma GCC ivdep
  for (; k < n; ++k) out[k] = load(in[k]);
}

// Bytes to anywhere, whole cache lines past the cache.
inline void write_past(char* to, const char* from, int64_t bytes) {
  const int64_t head = (kLine - static_cast<int64_t>(reinterpret_cast<uintptr_t>(to) % kLine)) % kLine;
  if (head >= bytes) {
    std::memcpy(to, from, bytes);
    return;
  }
  std::memcpy(to, from, head);
  int64_t k = head;
  for (; k + kLine <= bytes; k += kLine) stream_line(to + k, from + k);
  std::memcpy(to + k, from + k, bytes - k);
}

// At most kBlock float32 in the type of the result.
template <class Out>
void put(const float* values, int64_t n, bool stream, Out* out) {
  const char* bytes = reinterpret_cast<const char*>(values);
  alignas(64) Out narrow[std::is_same_v<Out, float> ? 1 : kBlock];
  if constexpr (!std::is_same_v<Out, float>) {
#pragma GCC ivdep
    for (int64_t k = 0; k < n; ++k) store(values[k], narrow[k]);
    bytes = reinterpret_cast<const char*>(narrow);
  }
  const int64_t size = n * static_cast<int64_t>(sizeof(Out));
  if (stream) {
    write_past(reinterpret_cast<char*>(out), bytes, size);
  } else {
    std::memcpy(out, bytes, size);
  }
}

inline Columns columns_of(const TargetView& target, int64_t row, int64_t count) {
  Columns t;
  t.first = target.first[row * target.first_step];
  t.second = target.second[row * target.second_step];
  const int64_t at = row * target.weight_step;
  const double w = target.wide ? reinterpret_cast<const double*>(target.weight)[at]
                               : reinterpret_cast<const float*>(target.weight)[at];
  t.w = t.first >= 0 && t.first < count ? w : 0;
  t.v = t.second >= 0 && t.second < count ? 1 - w : 0;
  return t;
}

// How far a target's logit is below the largest; 0 where the column has no weight and is not read.
inline double gap_of(float peak, const float* z, int64_t column, double weight) {
  return weight > 0 ? static_cast<double>(peak) - z[column] : 0;
}

// out_k = factor * e_k - share, less `first` and `second` at the columns of the target. e has kRoom elements more.
template <class Out>
void write_gradient(const float* e, int64_t n, float factor, float share, const Columns& t, const Pulls& pulls,
                    bool stream, Out* out) {
  alignas(64) float block[kBlock];
  for (int64_t begin = 0; begin < n; begin += kBlock) {
    const int64_t size = n - begin < kBlock ? n - begin : kBlock;
    for (int64_t k = 0; k < size; k += kLanes) write(read(e + begin + k) * factor - share, block + k);
    // A column of weight 0 is not touched: it may be out of range.
    if (t.w > 0 && t.first >= begin && t.first < begin + size) block[t.first - begin] -= static_cast<float>(pulls.first);
    if (t.v > 0 && t.second >= begin && t.second < begin + size) {
      block[t.second - begin] -= static_cast<float>(pulls.second);
    }
    put(block, size, stream, out + begin);
  }
}

}  // namespace
}  // namespace SDMP_ISA
}  // namespace sdmp
