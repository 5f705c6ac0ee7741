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

}  // namespace sdmp
