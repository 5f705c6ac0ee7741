// What the CPU kernel of `distillation` is told: filled by distillation_cpu_op.cpp.
#pragma once

#include "loss_job.h"

namespace sdmp {

// (crops, rows, columns), strides in elements.
struct Crops {
  const char* data;
  int64_t crops, rows, columns, crop, row, column;
  Type type;
};

// (V, T, N) weights in float32, strides in elements; `data` is null where there are none.
struct Weights {
  const float* data;
  int64_t view, crop, row;
};

struct DistillationJob : LossJob {
  Crops student, teacher;
  Weights own, other;
  const int64_t* partner;  // (N,) contiguous, or null for the flip
  const float* center;     // (K,) contiguous, or null
  double student_temperature, teacher_temperature;
  bool pairs;              // a task owns rows i and n-1-i, whose partners they are
  int64_t units;           // pairs, or rows
};

inline int64_t distillation_row(int64_t columns) { return (columns + 63) / 64 * 64 + 64; }

// Elements of scratch that one thread needs: the probabilities of every teacher for two rows, the exponentials of a
// student, and its logits where they have to be converted.
inline int64_t distillation_scratch(const DistillationJob& job) {
  return (2 * job.teacher.crops + 2) * distillation_row(job.student.columns) + 64;
}

// Units [begin, end) of a job, one namespace per instruction set. `scratch` is aligned to 64 bytes.
namespace portable {
void distillation(const DistillationJob& job, int64_t begin, int64_t end, float* scratch);
}  // namespace portable
namespace avx2 {
void distillation(const DistillationJob& job, int64_t begin, int64_t end, float* scratch);
}  // namespace avx2
namespace avx512 {
void distillation(const DistillationJob& job, int64_t begin, int64_t end, float* scratch);
}  // namespace avx512

}  // namespace sdmp
