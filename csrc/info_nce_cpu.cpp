// `info_nce` on the CPU between its two matrix products, compiled once per instruction set (SDMP_ISA): rows of products
// q k^T, still in the cache, give their loss and become the gradient of the products.
#include "info_nce_cpu.h"

#include "loss_cpu_rows.h"

namespace sdmp {
namespace SDMP_ISA {

void info_nce(const InfoNceJob& job, int64_t begin, int64_t end, float* scratch) {
  const int64_t n = job.columns;
  const float gain = static_cast<float>(job.gain);
  for (int64_t i = begin; i < end; ++i) {
    float* z = job.products + i * n;
    const float peak = peak_of(z, n);
    const Columns t = columns_of(job.target, i, n);
    const double a = gap_of(peak, z, t.first, t.w) * job.gain, b = gap_of(peak, z, t.second, t.v) * job.gain;
    const double sum = job.gradient ? exponentials<true>(z, n, peak, gain, scratch, nullptr)
                                    : exponentials<false>(z, n, peak, gain, nullptr, nullptr);
    const double log_sum = std::log(sum);
    const Pulls pulls = pulls_of(t, a, b, job.mixture);
    if (job.losses != nullptr) job.losses[i] = two_hot_loss(log_sum, t, a, b, job.mixture);
    if (job.gradient) {
      const double scale = job.scale.of(i);
      const double factor = scale * (pulls.first + pulls.second) / sum;
      const Pulls drawn = {scale * pulls.first, scale * pulls.second};
      write_gradient(scratch, n, static_cast<float>(factor), 0.0f, t, drawn, false, z);
    }
  }
}

}  // namespace SDMP_ISA
}  // namespace sdmp
