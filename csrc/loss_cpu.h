// What the CPU kernels of the losses share: vectors of float32, exponentials, and the scalar arithmetic of a two-hot
// target. Compiled once per instruction set, see mix.h.
//
// A row's sums are taken block by block in float32 and added up in double, so that they do not lose digits with the
// length of the row. What is computed once per row is computed in double, where no finite logits overflow.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "mix.h"
#include "stream_cpu.h"

namespace sdmp {
namespace SDMP_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int64_t kLanes = 16;
#elif defined(__AVX__)
constexpr int64_t kLanes = 8;
#else
constexpr int64_t kLanes = 4;
#endif

typedef float Floats __attribute__((vector_size(4 * kLanes)));
typedef uint32_t Words __attribute__((vector_size(4 * kLanes)));

constexpr int64_t kChains = 4;               // sums side by side, so that none waits for the one before
constexpr int64_t kStep = kChains * kLanes;  // elements of one round of all of them
constexpr int64_t kBlock = 1024;             // elements that are summed in float32
constexpr int64_t kRoom = 64;                // elements that may be written behind a row in scratch: the largest kStep
constexpr float kLowest = -std::numeric_limits<float>::infinity();

inline Floats read(const float* from) {
  Floats values;
  std::memcpy(&values, from, sizeof values);
  return values;
}

inline void write(Floats values, float* to) { std::memcpy(to, &values, sizeof values); }

inline Floats all(float value) { return Floats{} + value; }

inline Floats larger(Floats a, Floats b) { return a > b ? a : b; }

// Lane j of the result is lane j ^ lanes.
inline Floats swapped(Floats values, uint32_t lanes) {
  Floats result;
#pragma GCC unroll 16
  for (uint32_t j = 0; j < kLanes; ++j) result[j] = values[j ^ lanes];
  return result;
}

inline double total(Floats values) {
  double sum = 0;
  for (int64_t j = 0; j < kLanes; ++j) sum += values[j];
  return sum;
}

// e^x for x <= 0, within 2 ulp; 0 below -87, where e^x is hardly a normal number; NaN stays NaN.
//
// x = n log 2 + r with |r| <= log(2) / 2: 2^n goes into the exponent, e^r is a polynomial of degree 7. log 2 comes in
// two parts, of which the first has so few digits that n times it is exact.
inline Floats exponential(Floats x) {
  const Floats lowest = all(-87.0f);
  const Floats kept = x < lowest ? lowest : x;
  const Floats shifted = kept * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: the sum ends in the bits of n
  const Floats n = shifted - 12582912.0f;
  const Floats r = (kept - n * 0.693359375f) - n * -2.12194440e-4f;
  Floats p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  const Words power = (reinterpret_cast<const Words&>(shifted) << 23) + 0x3f800000u;
  return x < lowest ? Floats{} : p * reinterpret_cast<const Floats&>(power);
}

// The largest of n numbers; NaN is passed over, and found by the exponentials.
inline float peak_of(const float* z, int64_t n) {
  Floats peaks[kChains];
  for (Floats& peak : peaks) peak = all(kLowest);
  int64_t k = 0;
  for (; k + kStep <= n; k += kStep) {
#pragma GCC unroll 4
    for (int64_t c = 0; c < kChains; ++c) peaks[c] = larger(read(z + k + c * kLanes), peaks[c]);
  }
  Floats each = larger(larger(peaks[0], peaks[1]), larger(peaks[2], peaks[3]));
#pragma GCC unroll 4
  for (uint32_t lanes = kLanes / 2; lanes > 0; lanes /= 2) each = larger(each, swapped(each, lanes));
  float peak = each[0];
  for (; k < n; ++k) peak = z[k] > peak ? z[k] : peak;
  return peak;
}

// Sum of exp((z_k - peak) * gain), the terms into e unless that is null; e may be z, and has kRoom elements more than n.
// `next`: as many bytes as z has are asked for into the cache on the way, or null.
template <bool keep>
double exponentials(const float* z, int64_t n, float peak, float gain, float* e, const char* next) {
  double sum = 0;
  const Floats top = all(peak);
  for (int64_t begin = 0; begin < n; begin += kBlock) {
    const int64_t end = n - begin < kBlock ? n : begin + kBlock;
    Floats sums[kChains] = {};
    int64_t k = begin;
    for (; k + kStep <= end; k += kStep) {
#pragma GCC unroll 4
      for (int64_t c = 0; c < kChains; ++c) {
        const Floats term = exponential((read(z + k + c * kLanes) - top) * gain);
        if (keep) write(term, e + k + c * kLanes);
        sums[c] += term;
      }
      if (next != nullptr) {
        for (int64_t line = 0; line < 4 * kStep; line += kLine) __builtin_prefetch(next + 4 * k + line, 0, 2);
      }
    }
    if (k < end) {
      alignas(64) float last[kStep];
      for (int64_t j = 0; j < kStep; ++j) last[j] = k + j < end ? z[k + j] : kLowest;
      for (int64_t c = 0; c < kChains; ++c) {
        const Floats term = exponential((read(last + c * kLanes) - top) * gain);
        if (keep) write(term, e + k + c * kLanes);
        sums[c] += term;
      }
    }
    sum += total(sums[0] + sums[1]) + total(sums[2] + sums[3]);
  }
  return sum;
}

// Sum of peak - z_k. Shares of 1 / 256 are subtracted, so that a block of finite logits does not overflow.
inline double depth_of(const float* z, int64_t n, float peak) {
  constexpr float kShare = 1.0f / 256;
  double sum = 0;
  const Floats top = all(peak * kShare);
  for (int64_t begin = 0; begin < n; begin += kBlock) {
    const int64_t end = n - begin < kBlock ? n : begin + kBlock;
    Floats sums[kChains] = {};
    int64_t k = begin;
    for (; k + kStep <= end; k += kStep) {
#pragma GCC unroll 4
      for (int64_t c = 0; c < kChains; ++c) sums[c] += top - read(z + k + c * kLanes) * kShare;
    }
    sum += total(sums[0] + sums[1]) + total(sums[2] + sums[3]);
    for (; k < end; ++k) sum += peak * kShare - z[k] * kShare;
  }
  return sum / kShare;
}

// ---- a two-hot target of one row, in double ----

// A column out of range has weight 0 and is never read.
struct Columns {
  int64_t first, second;
  double w, v;
};

struct Pulls {
  double first, second;
};

// The loss less its log-sum: with a and b how far the target's logits are below the largest, "ce" w a + v b and
// "log_mixture" -log(w e^-a + v e^-b). A column of weight 0 has no say, whatever its logit.
inline double distance_of(const Columns& t, double a, double b, bool mixture) {
  if (!mixture) return (t.w > 0 ? t.w * a : 0) + (t.v > 0 ? t.v * b : 0);
  const double far = std::numeric_limits<double>::infinity();
  const double x = t.w > 0 ? a - std::log(t.w) : far, y = t.v > 0 ? b - std::log(t.v) : far;
  if (x != x || y != y) return x + y;
  if (x == far || y == far) return x < y ? x : y;
  return (x < y ? x : y) - std::log1p(std::exp(-std::fabs(x - y)));
}

// What the target draws to its columns: their weights, or the posterior of each given the mixture.
inline Pulls pulls_of(const Columns& t, double a, double b, bool mixture) {
  if (!mixture) return {t.w, t.v};
  if (!(t.w > 0 && t.v > 0)) return {t.w > 0 ? 1.0 : 0.0, t.v > 0 ? 1.0 : 0.0};
  // The gaps are subtracted first: each may be so large that a logarithm added to it leaves no trace.
  const double odds = std::log(t.w) - std::log(t.v) + (b - a);
  return {1 / (1 + std::exp(-odds)), 1 / (1 + std::exp(odds))};
}

// The loss of a row; none is negative, and NaN stays NaN.
inline double two_hot_loss(double log_sum, const Columns& t, double a, double b, bool mixture) {
  const double loss = (mixture ? log_sum : log_sum * (t.w + t.v)) + distance_of(t, a, b, mixture);
  return loss < 0 ? 0 : loss;
}

}  // namespace
}  // namespace SDMP_ISA
}  // namespace sdmp
