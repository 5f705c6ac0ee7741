// What the CPU kernel of `soft_cross_entropy` is told: filled by soft_cross_entropy_cpu_op.cpp.
#pragma once

#include "loss_job.h"

namespace sdmp {

struct SoftCrossEntropyJob : LossJob {
  Matrix logits;
  TargetView target;
  double smoothing;
  bool mixture;
};

// Elements of scratch that one thread needs.
inline int64_t soft_cross_entropy_scratch(int64_t columns) { return (columns + 63) / 64 * 64 + 64; }

// Rows [begin, end) of a job, one namespace per instruction set. `scratch` is aligned to 64 bytes.
namespace portable {
void soft_cross_entropy(const SoftCrossEntropyJob& job, int64_t begin, int64_t end, float* scratch);
}  // namespace portable
namespace avx2 {
void soft_cross_entropy(const SoftCrossEntropyJob& job, int64_t begin, int64_t end, float* scratch);
}  // namespace avx2
namespace avx512 {
void soft_cross_entropy(const SoftCrossEntropyJob& job, int64_t begin, int64_t end, float* scratch);
}  // namespace avx512

}  // namespace sdmp
