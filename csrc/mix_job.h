// Tensors and plans as plain structures, for the CPU and the CUDA kernels of `mix`; filled by mix_torch.h.
#pragma once

#include <cstddef>
#include <cstdint>

namespace sdmp {

enum class Type : int32_t { kUint8, kHalf, kBf16, kFloat };

// A (N, C, H, W) tensor: strides in elements; `data` is null for a tensor that was not given.
struct View {
  char* data = nullptr;
  int64_t n = 0, c = 0, h = 0, w = 0;
};

// The rows of a plan; all contiguous.
struct PlanView {
  const uint8_t* rule;
  const int64_t* partner;
  const float* lam;
  const int32_t* box;
  bool mirrored;
};

// What is written over boxes of the mixed images (`Erasure` in sdmp_kernels/ops/mix/arguments.py); all contiguous.
struct ErasureView {
  const int32_t* boxes = nullptr;  // (n, count, 5): top, left, height, width, row of `fill`; null where nothing is
  int64_t count = 0;               // erased
  const float* fill = nullptr;     // (rows, channels)
  bool per_pixel = false;
};

}  // namespace sdmp
