// `soft_cross_entropy` on the CPU: the operator sdmp::soft_cross_entropy_cpu.
#include "loss_torch.h"
#include "soft_cross_entropy_cpu.h"

namespace sdmp {
namespace {

decltype(&portable::soft_cross_entropy) kernel() {
  switch (instruction_set()) {
#if defined(SDMP_WITH_AVX512)
    case Set::kAvx512:
      return avx512::soft_cross_entropy;
#endif
#if defined(SDMP_WITH_AVX2)
    case Set::kAvx2:
      return avx2::soft_cross_entropy;
#endif
    default:
      return portable::soft_cross_entropy;
  }
}

void soft_cross_entropy_cpu(const Tensor& logits, const Tensor& first, const Tensor& second, const Tensor& weight,
                            double label_smoothing, bool mixture, double scale, const std::optional<Tensor>& upstream,
                            std::optional<Tensor> loss, std::optional<Tensor> gradient) {
  SoftCrossEntropyJob job;
  job.logits = matrix_of(logits, "logits");
  const int64_t n = job.logits.rows, k = job.logits.columns;
  job.target = target_of(first, second, weight, n);
  job.smoothing = label_smoothing;
  job.mixture = mixture;
  job.scale = scale;
  job.upstream = nullptr;
  job.upstream_step = 0;
  if (upstream.has_value()) {
    STD_TORCH_CHECK(upstream->dim() == 1 && upstream->size(0) == n && upstream->scalar_type() == ScalarType::Float,
                    "upstream must be float32 of shape (", n, ",)");
    job.upstream = static_cast<const float*>(upstream->data_ptr());
    job.upstream_step = upstream->stride(0);
  }
  std::vector<double> losses(loss.has_value() ? n : 0);
  if (loss.has_value()) {
    STD_TORCH_CHECK(loss->scalar_type() == ScalarType::Float && loss->is_contiguous() &&
                        (loss->dim() == 0 || (loss->dim() == 1 && loss->size(0) == n)),
                    "loss must be float32 of shape () or (", n, ",)");
  }
  job.losses = loss.has_value() ? losses.data() : nullptr;
  job.gradient = nullptr;
  job.stream = false;
  if (gradient.has_value()) {
    STD_TORCH_CHECK(gradient->dim() == 2 && gradient->size(0) == n && gradient->size(1) == k &&
                        gradient->is_contiguous() && gradient->scalar_type() == logits.scalar_type(),
                    "gradient must be contiguous and like the logits");
    job.gradient = static_cast<char*>(gradient->data_ptr());
    job.stream = n * k * static_cast<int64_t>(gradient->element_size()) >= kLossStreamBytes;
  }
  const auto run = kernel();
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
