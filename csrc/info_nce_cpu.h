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

// A block of columns of products, (rows, columns) contiguous, of rows that are finished once all their blocks are through.
// Their largest product is not known then: `shift` takes its place, which no product exceeds.
struct InfoNceBlock {
  float* products;      // they become exp((product - shift) * gain), and 0 at the target's columns
  int64_t rows, columns;
  int64_t begin, all;   // the block's first column, and how many columns there are
  TargetView target;
  float shift, gain;
  double* sums;         // (rows,), added to
  float* picked;        // (rows, 2): the products at the target's columns, where they are in this block
};

// Rows of which every block is through: their loss, and the sums over keys of those exponentials become the gradient.
struct InfoNceEnd {
  float* gradient;      // (rows, width) contiguous
  int64_t rows, width;
  const float* keys;    // (columns, width) contiguous
  int64_t columns;
  TargetView target;
  double shift, gain;
  bool mixture;
  const double* sums;
  const float* picked;
  double scale;         // of the gradient
  double* losses;       // (rows,)
};

// Elements of scratch that one thread needs.
inline int64_t info_nce_scratch(int64_t columns) { return (columns + 63) / 64 * 64 + 64; }

// Rows [begin, end) of a job, one namespace per instruction set. `scratch` is aligned to 64 bytes.
namespace portable {
void info_nce(const InfoNceJob& job, int64_t begin, int64_t end, float* scratch);
void info_nce_block(const InfoNceBlock& job, int64_t begin, int64_t end, float* scratch);
void info_nce_end(const InfoNceEnd& job, int64_t begin, int64_t end);
}  // namespace portable
namespace avx2 {
void info_nce(const InfoNceJob& job, int64_t begin, int64_t end, float* scratch);
void info_nce_block(const InfoNceBlock& job, int64_t begin, int64_t end, float* scratch);
void info_nce_end(const InfoNceEnd& job, int64_t begin, int64_t end);
}  // namespace avx2
namespace avx512 {
void info_nce(const InfoNceJob& job, int64_t begin, int64_t end, float* scratch);
void info_nce_block(const InfoNceBlock& job, int64_t begin, int64_t end, float* scratch);
void info_nce_end(const InfoNceEnd& job, int64_t begin, int64_t end);
}  // namespace avx512

}  // namespace sdmp
