// `soft_cross_entropy` on the CPU, compiled once per instruction set (SDMP_ISA): value and gradient of a row in one
// sweep. A row comes from memory once, to find its largest logit; what follows finds it in the cache, and meanwhile the
// next row is asked for. The gradient is written once, a block at a time with the two columns of the target in it.
#include "soft_cross_entropy_cpu.h"

#include "loss_cpu_rows.h"

namespace sdmp {
namespace SDMP_ISA {
namespace {

template <class Stored>
void rows(const SoftCrossEntropyJob& job, int64_t begin, int64_t end, float* scratch) {
  const Matrix& logits = job.logits;
  const int64_t n = logits.columns;
  for (int64_t i = begin; i < end; ++i) {
    const Stored* row = reinterpret_cast<const Stored*>(logits.data) + i * logits.row;
    const float* z = scratch;
    const char* next = nullptr;
    if constexpr (std::is_same_v<Stored, float>) {
      if (logits.column == 1) {
        z = row;
        if (i + 1 < end) next = reinterpret_cast<const char*>(row + logits.row);
      }
    }
    if (z == scratch) widen(row, logits.column, n, scratch);
    const float peak = peak_of(z, n);
    const Columns t = columns_of(job.target, i, n);
    const double a = gap_of(peak, z, t.first, t.w), b = gap_of(peak, z, t.second, t.v);
    const double depth = job.smoothing > 0 && job.losses != nullptr ? depth_of(z, n, peak) / n : 0;
    const double sum = job.gradient != nullptr ? exponentials<true>(z, n, peak, 1.0f, scratch, next)
                                               : exponentials<false>(z, n, peak, 1.0f, nullptr, next);
    if (job.losses != nullptr) {
      const double log_sum = std::log(sum);
      double loss = (1 - job.smoothing) * two_hot_loss(log_sum, t, a, b, job.mixture);
      if (job.smoothing > 0) loss = (job.smoothing < 1 ? loss : 0) + job.smoothing * (log_sum + depth);
      job.losses[i] = loss;
    }
    if (job.gradient != nullptr) {
      const double scale = job.scale.of(i);
      const double kept = scale * (1 - job.smoothing);
      Pulls pulls = pulls_of(t, a, b, job.mixture);
      const double factor = kept * (pulls.first + pulls.second) + scale * job.smoothing;
      pulls = {kept * pulls.first, kept * pulls.second};
      write_gradient(scratch, n, static_cast<float>(factor / sum), static_cast<float>(scale * job.smoothing / n), t,
                     pulls, job.stream, reinterpret_cast<Stored*>(job.gradient) + i * n);
    }
  }
}

}  // namespace

void soft_cross_entropy(const SoftCrossEntropyJob& job, int64_t begin, int64_t end, float* scratch) {
  switch (job.logits.type) {
    case Type::kHalf:
      rows<Half>(job, begin, end, scratch);
      break;
    case Type::kBf16:
      rows<Bf16>(job, begin, end, scratch);
      break;
    default:
      rows<float>(job, begin, end, scratch);
  }
  if (job.stream) finish_streams();
}

}  // namespace SDMP_ISA
}  // namespace sdmp
