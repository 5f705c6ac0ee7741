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

}  // namespace sdmp
