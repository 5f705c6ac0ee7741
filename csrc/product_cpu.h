// Products of matrices in float32 for kernels that use them at once, tile by tile of registers. Compiled once per
// instruction set, see mix.h; without a fused multiply-add (`kFused`) PyTorch's own product is faster.
//
// A library's product packs both operands anew for every block it is asked for. Here each is packed once: one in groups of
// kGroup rows, from which a number is broadcast, the other in panels of kPanel columns, which are read as vectors; both
// depth by depth.
#pragma once

#include "loss_cpu.h"

namespace sdmp {
namespace SDMP_ISA {
namespace {

#if defined(__AVX512F__) || defined(__FMA__)
constexpr bool kFused = true;
#else
constexpr bool kFused = false;
#endif

// The sums of a tile fill the registers, but for two of one operand and one of the other.
constexpr int64_t kGroup = kLanes == 16 ? 12 : 6;
constexpr int64_t kPanel = 2 * kLanes;

inline Floats fused(Floats a, Floats b, Floats c) {
#if defined(__AVX512F__)
  return reinterpret_cast<Floats>(
      _mm512_fmadd_ps(reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b), reinterpret_cast<__m512>(c)));
#elif defined(__FMA__)
  return reinterpret_cast<Floats>(
      _mm256_fmadd_ps(reinterpret_cast<__m256>(a), reinterpret_cast<__m256>(b), reinterpret_cast<__m256>(c)));
#else
  return a * b + c;
#endif
}

// One number in all lanes. `all` adds it to zeros, which a compiler must not take for the number: -0 is another.
inline Floats spread(const float* from) {
#if defined(__AVX512F__)
  return reinterpret_cast<Floats>(_mm512_set1_ps(*from));
#elif defined(__AVX__)
  return reinterpret_cast<Floats>(_mm256_broadcast_ss(from));
#else
  return all(*from);
#endif
}

// 2^(depth * (gain + rest)) for depth <= 0, within 2 ulp; 0 below 2^-125; both numbers finite, or depth minus infinity.
// `gain` and `rest` are one number in two parts.
//
// The exponent is n + r with |r| <= 1 / 2: 2^r is a polynomial, whose coefficients are the best ones for its relative
// error (2e-9), and n goes into its exponent.
inline Floats power_of_two(Floats depth, Floats gain, Floats rest, Floats lowest) {
  const Floats shifted = fused(depth, gain, all(12582912.0f));  // 1.5 * 2^23: the sum ends in the bits of n
  const Floats n = shifted - 12582912.0f;
  const Floats r = fused(depth, rest, fused(depth, gain, -n));
  Floats p = fused(r, all(1.535336196e-04f), all(1.339887502e-03f));
  p = fused(p, r, all(9.618436918e-03f));
  p = fused(p, r, all(5.550332367e-02f));
  p = fused(p, r, all(2.402264774e-01f));
  p = fused(p, r, all(6.931471825e-01f));
  p = fused(p, r, all(1.0f));
  Words bits, power;
  std::memcpy(&bits, &p, sizeof bits);
  std::memcpy(&power, &shifted, sizeof power);
  bits += power << 23;
  std::memcpy(&p, &bits, sizeof p);
  return depth < lowest ? Floats{} : p;
}

// z_k, k < n, becomes e^((z_k - peak) * gain); returns their sum. What follows z up to a multiple of kStep is written too.
inline double exponentiate(float* z, int64_t n, float peak, double gain) {
  constexpr double kLog2e = 1.4426950408889634;
  const float near = static_cast<float>(gain * kLog2e);
  const Floats top = all(peak), by = all(near), rest = all(static_cast<float>(gain * kLog2e - near));
  const Floats lowest = all(static_cast<float>(-125 / (gain * kLog2e)));
  for (int64_t k = n; k % kStep != 0; ++k) z[k] = kLowest;
  Floats sums[kChains] = {};
  for (int64_t k = 0; k < n; k += kStep) {
#pragma GCC unroll 4
    for (int64_t c = 0; c < kChains; ++c) {
      const Floats term = power_of_two(read(z + k + c * kLanes) - top, by, rest, lowest);
      write(term, z + k + c * kLanes);
      sums[c] += term;
    }
  }
  Floats sum = (sums[0] + sums[1]) + (sums[2] + sums[3]);
#pragma GCC unroll 4
  for (uint32_t lanes = kLanes / 2; lanes > 0; lanes /= 2) sum += swapped(sum, lanes);
  return sum[0];
}

// out[r][c] = sum over k < depth of a[r * row + k * step] * b[k * kPanel + c], and what is there already if `add`:
// kGroup rows, `stride` apart, of kPanel columns. On the way, kAhead elements for each k are asked for from `next` on, into
// the cache: tiles after this one would wait for them.
constexpr int64_t kAhead = 4;

template <int64_t row, int64_t step, bool add>
inline void tile(const float* a, const float* b, int64_t depth, int64_t stride, float* out, const float* next) {
  Floats sums[kGroup][2];
#pragma GCC unroll 16
  for (int64_t r = 0; r < kGroup; ++r) {
    sums[r][0] = add ? read(out + r * stride) : Floats{};
    sums[r][1] = add ? read(out + r * stride + kLanes) : Floats{};
  }
#pragma GCC unroll 2
  for (int64_t k = 0; k < depth; ++k) {
    const Floats left = read(b), right = read(b + kLanes);
#pragma GCC unroll 16
    for (int64_t r = 0; r < kGroup; ++r) {
      const Floats factor = spread(a + r * row);
      sums[r][0] = fused(factor, left, sums[r][0]);
      sums[r][1] = fused(factor, right, sums[r][1]);
    }
    __builtin_prefetch(next + k * kAhead);
    a += step;
    b += kPanel;
  }
#pragma GCC unroll 16
  for (int64_t r = 0; r < kGroup; ++r) {
    write(sums[r][0], out + r * stride);
    write(sums[r][1], out + r * stride + kLanes);
  }
}

// One row, the k-th of `depth`, of an operand of `columns` columns into its panels, one behind the other: (depth, kPanel)
// each, filled up with zeros.
inline void pack_columns(const float* from, int64_t columns, int64_t k, int64_t depth, float* out) {
  for (int64_t begin = 0; begin < columns; begin += kPanel, out += depth * kPanel) {
    const int64_t count = columns - begin < kPanel ? columns - begin : kPanel;
    float* to = out + k * kPanel;
    if (count == kPanel) {
      std::memcpy(to, from + begin, kPanel * sizeof(float));
    } else {
      for (int64_t c = 0; c < kPanel; ++c) to[c] = c < count ? from[begin + c] : 0;
    }
  }
}

}  // namespace
}  // namespace SDMP_ISA
}  // namespace sdmp
