// What the CPU kernel of `info_nce` is told: filled by info_nce_cpu_op.cpp.
#pragma once

#include "loss_job.h"

namespace sdmp {

// Rows of products q k^T, (rows, columns) contiguous.
struct InfoNceJob {
  float* products;        // where `gradient`, they become the gradient of the products
  int64_t rows, columns;
  TargetView target;
  double gain;            // logits per product
  bool mixture;
  bool gradient;
  double* losses;         // (rows,), or null
  Scale scale;            // of the gradient
};

// Elements of scratch that one thread needs.
inline int64_t info_nce_scratch(int64_t columns) { return (columns + 63) / 64 * 64 + 64; }

// Rows [begin, end) of a job, one namespace per instruction set. `scratch` is aligned to 64 bytes.
namespace portable {
void info_nce(const InfoNceJob& job, int64_t begin, int64_t end, float* scratch);
}  // namespace portable
namespace avx2 {
void info_nce(const InfoNceJob& job, int64_t begin, int64_t end, float* scratch);
}  // namespace avx2
namespace avx512 {
void info_nce(const InfoNceJob& job, int64_t begin, int64_t end, float* scratch);
}  // namespace avx512

}  // namespace sdmp
