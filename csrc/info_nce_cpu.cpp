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

void info_nce_block(const InfoNceBlock& job, int64_t begin, int64_t end, float* scratch) {
  const int64_t n = job.columns;
  for (int64_t i = begin; i < end; ++i) {
    float* z = job.products + i * n;
    const Columns t = columns_of(job.target, i, job.all);
    const int64_t places[] = {t.w > 0 ? t.first - job.begin : -1, t.v > 0 ? t.second - job.begin : -1};
    for (int64_t c = 0; c < 2; ++c) {
      if (places[c] >= 0 && places[c] < n) job.picked[2 * i + c] = z[places[c]];
    }
    for (const int64_t place : places) {
      if (place >= 0 && place < n) z[place] = kLowest;
    }
    if (n % kStep == 0) {
      job.sums[i] += exponentials<true>(z, n, job.shift, job.gain, z, nullptr);
    } else {  // the last round writes beyond the row
      job.sums[i] += exponentials<true>(z, n, job.shift, job.gain, scratch, nullptr);
      std::memcpy(z, scratch, n * sizeof(float));
    }
  }
}

void info_nce_end(const InfoNceEnd& job, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    const Columns t = columns_of(job.target, i, job.columns);
    const double a = t.w > 0 ? (job.shift - job.picked[2 * i]) * job.gain : 0;
    const double b = t.v > 0 ? (job.shift - job.picked[2 * i + 1]) * job.gain : 0;
    const bool one = t.w > 0 && t.v > 0 && t.first == t.second;
    const double at_first = t.w > 0 ? std::exp(-a) : 0, at_second = t.v > 0 && !one ? std::exp(-b) : 0;
    const double sum = job.sums[i] + at_first + at_second;
    const Pulls pulls = pulls_of(t, a, b, job.mixture);
    job.losses[i] = two_hot_loss(std::log(sum), t, a, b, job.mixture);
    const double factor = job.scale * (pulls.first + pulls.second) / sum;
    // What the softmax gives a key of the target and what the target takes from it: one small difference.
    const float first = static_cast<float>(factor * at_first - job.scale * pulls.first);
    const float second = static_cast<float>(factor * at_second - job.scale * pulls.second);
    const float all = static_cast<float>(factor);
    float* out = job.gradient + i * job.width;
    const float* from_first = job.keys + (t.w > 0 ? t.first * job.width : 0);
    const float* from_second = job.keys + (t.v > 0 ? t.second * job.width : 0);
    const float to_first = t.w > 0 ? first : 0, to_second = t.v > 0 ? second : 0;
#pragma GCC ivdep
    for (int64_t c = 0; c < job.width; ++c) {
      out[c] = out[c] * all + from_first[c] * to_first + from_second[c] * to_second;
    }
  }
}

}  // namespace SDMP_ISA
}  // namespace sdmp
