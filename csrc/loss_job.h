// What the CPU kernels of the losses are told of a matrix and of a two-hot target; filled by loss_torch.h.
#pragma once

#include <cstdint>

#include "mix_job.h"

namespace sdmp {

// (rows, columns), strides in elements.
struct Matrix {
  const char* data = nullptr;
  int64_t rows = 0, columns = 0, row = 0, column = 0;
  Type type = Type::kFloat;
};

// (rows,) each, strides in elements; weights are float32, or float64 where `wide`.
struct TargetView {
  const int64_t* first;
  const int64_t* second;
  const char* weight;
  int64_t first_step, second_step, weight_step;
  bool wide;
};

// What a gradient is multiplied by: one number, and where `rows` is not null that of each row too.
struct Scale {
  double all = 1;
  const float* rows = nullptr;  // (rows,), `step` apart
  int64_t step = 0;
  double of(int64_t row) const { return rows == nullptr ? all : all * rows[row * step]; }
};

// What comes out of a loss whose logits are given, beside its own arguments.
struct LossJob {
  double* losses = nullptr;  // (rows,), not scaled, or null
  char* gradient = nullptr;  // contiguous, of the type of the logits, or null
  Scale scale;               // of the gradient
  bool stream = false;       // write past the cache: the gradient is larger than it
};

}  // namespace sdmp
