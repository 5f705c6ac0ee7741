// What the CPU kernel of `soft_cross_entropy` is told: filled by soft_cross_entropy_cpu_op.cpp.
#pragma once

#include "loss_job.h"

namespace sdmp {

struct SoftCrossEntropyJob {
  Matrix logits;
  TargetView target;
  double smoothing;
  bool mixture;
  double* losses;         // (N,), or null
  char* gradient;         // (N, K) contiguous, of the type of the logits, or null
  double scale;           // of the gradient, and where `upstream` is not null its rows too
  const float* upstream;
  int64_t upstream_step;
  bool stream;            // write past the cache: the gradient is larger than it
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
