// `soft_cross_entropy` on the CPU: the operator sdmp::soft_cross_entropy_cpu.
#include "loss_torch.h"
#include "soft_cross_entropy_cpu.h"

namespace sdmp {
namespace {

void soft_cross_entropy_cpu(const Tensor& logits, const Tensor& first, const Tensor& second, const Tensor& weight,
                            double label_smoothing, bool mixture, double scale, const std::optional<Tensor>& upstream,
                            std::optional<Tensor> loss, std::optional<Tensor> gradient) {
  SoftCrossEntropyJob job;
  job.logits = matrix_of(logits, "logits");
  const int64_t n = job.logits.rows, k = job.logits.columns;
  job.target = target_of(first, second, weight, n);
  job.smoothing = label_smoothing;
  job.mixture = mixture;
  const std::vector<double> losses = prepare(job, n, scale_of(scale, upstream, n), loss, gradient, logits);
  const auto run = SDMP_BEST(soft_cross_entropy);
  run_rows(n, k, soft_cross_entropy_scratch(k),
           [&](int64_t begin, int64_t end, float* scratch) { run(job, begin, end, scratch); });
  if (loss.has_value()) put_losses(losses, scale, *loss);
}

}  // namespace
}  // namespace sdmp

STABLE_TORCH_LIBRARY_FRAGMENT(sdmp, m) {
  m.def(
      "soft_cross_entropy_cpu(Tensor logits, Tensor first, Tensor second, Tensor weight, float label_smoothing, "
      "bool mixture, float scale, Tensor? upstream, Tensor(a!)? loss, Tensor(b!)? gradient) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(sdmp, CPU, m) {
  m.impl("soft_cross_entropy_cpu", TORCH_BOX(&sdmp::soft_cross_entropy_cpu));
}
