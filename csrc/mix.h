// The arithmetic of `mix`, shared by the CPU and the CUDA kernels, so that the tests of the one exercise the other:
// what a row of the plan means, how two pixels are blended, resized, normalised and rounded. No torch, no threads, no
// memory layout in here.
//
// Products and sums round one by one (built with contraction off), as they do in the reference.
#pragma once

#include <cstdint>
#include <cstring>

// The CPU kernels are compiled once per instruction set. Each set has its own namespace: functions of one name would
// be merged by the linker, and a plain machine could end up in code made for a newer one.
#ifndef SDMP_ISA
#define SDMP_ISA portable
#endif

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define SDMP_FN __host__ __device__ __forceinline__
#else
#define SDMP_FN inline
#endif

namespace sdmp {

// As in sdmp_kernels/plan.py.
enum class Rule : uint8_t { kKeep = 0, kMixup = 1, kCutMix = 2, kResizeMix = 3 };

constexpr Rule kLastRule = Rule::kResizeMix;

namespace SDMP_ISA {

struct Half {
  uint16_t bits;
};

struct Bf16 {
  uint16_t bits;
};

SDMP_FN uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

SDMP_FN float from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// ---- reading: every stored type becomes float32 exactly ----

SDMP_FN float load(float value) { return value; }
SDMP_FN float load(uint8_t value) { return static_cast<float>(value); }
SDMP_FN float load(Bf16 value) { return from_bits(static_cast<uint32_t>(value.bits) << 16); }

SDMP_FN float load(Half value) {
#if defined(__CUDA_ARCH__)
  return __half2float(__ushort_as_half(value.bits));
#else
  // Without branches, so that it vectorises: shift the fields into place, then mend the two special exponents.
  const uint32_t shifted = (value.bits & 0x7fffu) << 13;
  const uint32_t exponent = shifted & 0x0f800000u;
  const uint32_t normal = shifted + 0x38000000u;                                // exponent bias 15 -> 127
  const uint32_t special = shifted + 0x70000000u;                               // infinity and NaN
  const uint32_t tiny = bits_of(from_bits(shifted + 0x38800000u) - from_bits(0x38800000u));  // subnormal
  const uint32_t magnitude = exponent == 0x0f800000u ? special : exponent == 0 ? tiny : normal;
  return from_bits(magnitude | (value.bits & 0x8000u) << 16);
#endif
}

// ---- writing: one rounding to nearest, ties to even; NaN stays NaN, and becomes 0 in uint8 ----

SDMP_FN void store(float value, float& out) { out = value; }

SDMP_FN void store(float value, uint8_t& out) {
  // Adding 2^23 leaves the rounded integer in the low bits; the comparisons send NaN to 0.
  const float low = value > 0.0f ? value : 0.0f;
  const float kept = low < 255.0f ? low : 255.0f;
  out = static_cast<uint8_t>(bits_of(kept + 8388608.0f));
}

SDMP_FN void store(float value, Bf16& out) {
#if defined(__CUDA_ARCH__)
  out.bits = __bfloat16_as_ushort(__float2bfloat16_rn(value));
#else
  const uint32_t bits = bits_of(value);
  const uint32_t rounded = bits + 0x7fffu + (bits >> 16 & 1u);
  const uint32_t nan = value != value ? 0xffffffffu : 0u;  // rounding could carry a NaN over into zero
  out.bits = static_cast<uint16_t>((rounded | nan) >> 16);
#endif
}

SDMP_FN void store(float value, Half& out) {
#if defined(__CUDA_ARCH__)
  out.bits = __half_as_ushort(__float2half_rn(value));
#else
  const uint32_t bits = bits_of(value);
  const uint32_t magnitude = bits & 0x7fffffffu;
  const uint32_t special = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;          // NaN, or too large
  const uint32_t tiny = bits_of(from_bits(magnitude) + 0.5f) - 0x3f000000u;      // subnormal: the adder rounds
  const uint32_t normal = (magnitude + 0xc8000fffu + (magnitude >> 13 & 1u)) >> 13;
  const uint32_t half = magnitude >= 0x47800000u ? special : magnitude < 0x38800000u ? tiny : normal;
  out.bits = static_cast<uint16_t>(half | (bits >> 16 & 0x8000u));
#endif
}

// ---- one value ----

SDMP_FN float blend(float a, float wa, float b, float wb) {
#if defined(__CUDA_ARCH__)
  return __fadd_rn(__fmul_rn(wa, a), __fmul_rn(wb, b));
#else
  return wa * a + wb * b;
#endif
}

SDMP_FN float add_product(float sum, float weight, float value) {
#if defined(__CUDA_ARCH__)
  return __fadd_rn(sum, __fmul_rn(weight, value));
#else
  return sum + weight * value;
#endif
}

// (x - mean) / std with the constants folded: uint8 has centre 255 * mean and scale 1 / (255 * std).
SDMP_FN float normalise(float value, float centre, float scale) { return (value - centre) * scale; }

// ---- one row of the plan ----

struct Row {
  Rule rule;  // what is left to do: KEEP where lam = 1, the box is empty or an image would be blended with itself
  float own;  // weights of a MIXUP row
  float other;
  int32_t top, left, bottom, right;  // half open; within the image whatever the plan said
  float scale_y, scale_x;            // source pixels per pixel of the box

  SDMP_FN bool boxed() const { return rule == Rule::kCutMix || rule == Rule::kResizeMix; }
};

SDMP_FN int32_t clamp(int32_t value, int32_t low, int32_t high) {
  return value < low ? low : value > high ? high : value;
}

// torch.nn.functional.interpolate computes the scale in float32 from the two sizes.
SDMP_FN float resize_scale(int32_t extent, int32_t target) {
  return target > 0 ? static_cast<float>(extent) / static_cast<float>(target) : 1.0f;
}

// A row without `scale_y` and `scale_x`, which RESIZEMIX alone needs and which take two divisions.
SDMP_FN Row read_row_unscaled(uint8_t rule, float lam, const int32_t* box, int32_t height, int32_t width, bool itself) {
  Row row = {};
  row.rule = rule <= static_cast<uint8_t>(kLastRule) ? static_cast<Rule>(rule) : Rule::kKeep;
  row.own = lam;
  row.other = 1.0f - lam;
  row.top = clamp(box[0], 0, height);
  row.left = clamp(box[1], 0, width);
  row.bottom = row.top + clamp(box[2], 0, height - row.top);
  row.right = row.left + clamp(box[3], 0, width - row.left);
  const bool empty = row.top == row.bottom || row.left == row.right;
  if ((row.rule == Rule::kMixup && (lam == 1.0f || itself)) || (row.boxed() && empty)) row.rule = Rule::kKeep;
  return row;
}

SDMP_FN void set_scales(Row& row, int32_t height, int32_t width) {
  row.scale_y = resize_scale(height, row.bottom - row.top);
  row.scale_x = resize_scale(width, row.right - row.left);
}

SDMP_FN Row read_row(uint8_t rule, float lam, const int32_t* box, int32_t height, int32_t width, bool itself) {
  Row row = read_row_unscaled(rule, lam, box, height, width, itself);
  set_scales(row, height, width);
  return row;
}

// ---- resizing: bilinear, align_corners=False, no antialias ----

struct Tap {
  int32_t first;   // the first source pixel
  int32_t step;    // 1 where the second one is its neighbour, 0 where it is the same
  float w0, w1;
};

// Where pixel `position` of `target` ones looks in an axis of `extent` pixels. torch's own kernels, on CPUs with
// fused multiply-add and on GPUs, round scale * (position + 0.5) - 0.5 once; the double product is exact.
SDMP_FN Tap resize_tap(int32_t position, int32_t target, int32_t extent, float scale) {
  if (target == extent) return Tap{position, 0, 1.0f, 0.0f};
  const float middle = static_cast<float>(position) + 0.5f;
#if defined(__CUDA_ARCH__)
  const float wanted = __fmaf_rn(scale, middle, -0.5f);
#else
  const float wanted = static_cast<float>(static_cast<double>(scale) * static_cast<double>(middle) - 0.5);
#endif
  const float source = wanted > 0.0f ? wanted : 0.0f;
  const int32_t floor = static_cast<int32_t>(source);
  const int32_t first = floor < extent - 1 ? floor : extent - 1;
  const float fraction = source - static_cast<float>(first);
  const float w1 = fraction < 1.0f ? fraction : 1.0f;
  return Tap{first, first < extent - 1 ? 1 : 0, 1.0f - w1, w1};
}

}  // namespace SDMP_ISA
}  // namespace sdmp
