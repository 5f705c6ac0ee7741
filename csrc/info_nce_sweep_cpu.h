// What the CPU kernel of `info_nce` that makes its own products is told: filled by info_nce_sweep_cpu_op.cpp.
#pragma once

#include "loss_job.h"

namespace sdmp {

// Keys of a block: as deep as one tile of the second product goes, and so few that what belongs to it stays in the cache
// nearest to a core.
constexpr int64_t kBlockKeys = 256;
// What any instruction set's groups of rows and panels of columns go into.
constexpr int64_t kRowUnit = 12, kColumnUnit = 32;

inline int64_t rounded_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

struct InfoNceSweep {
  Matrix q, k;
  TargetView target;
  double gain;               // logits per product
  bool mixture;
  double slope;              // of the gradient
  double* losses;            // (rows,)
  float* gradient = nullptr; // of q, (rows, width) contiguous, or null
  const float* packed = nullptr;       // every block of keys, packed beforehand, or null: each task packs them as it goes
  float largest_key = 0;               // of those
};

inline int64_t blocks_of(const InfoNceSweep& job) { return (job.k.rows + kBlockKeys - 1) / kBlockKeys; }

// Elements of a packed block of keys: for products with it, and for products of exponentials with it.
inline int64_t packed_block(int64_t width) { return kBlockKeys * (width + rounded_up(width, kColumnUnit)); }

// Elements that a task needs to pack a block itself: the block, and room for rows that are not as they are packed.
inline int64_t own_block(const InfoNceSweep& job) {
  const int64_t width = rounded_up(job.q.columns, kColumnUnit);
  return job.packed == nullptr ? packed_block(width) + kColumnUnit * width : 0;
}

// Elements of scratch for a task of `rows` rows.
inline int64_t sweep_scratch(const InfoNceSweep& job, int64_t rows) {
  const int64_t width = rounded_up(job.q.columns, kColumnUnit), all = rounded_up(rows, kRowUnit);
  return all * (2 * width + kBlockKeys + 16) + 12 * width + own_block(job);
}

#define SDMP_INFO_NCE_SWEEP                                                                                           \
  /* Whether products are made by the processor's fused multiply-add. */                                              \
  bool fuses();                                                                                                       \
  /* Packs a block of keys; returns the largest of them, infinity where one is not finite. `room`: kColumnUnit rows. */ \
  float pack_keys(const Matrix& k, int64_t block, float* out, float* room);                                           \
  /* Rows [begin, end); false, and nothing of them is right, where a product may overflow or is not finite. */        \
  bool info_nce_sweep(const InfoNceSweep& job, int64_t begin, int64_t end, float* scratch);

namespace portable {
SDMP_INFO_NCE_SWEEP
}
namespace avx2 {
SDMP_INFO_NCE_SWEEP
}
namespace avx512 {
SDMP_INFO_NCE_SWEEP
}

}  // namespace sdmp
