// The CUDA kernels of `mix` as CPU operators, sdmp::mix_emulated and sdmp::mix_backward_emulated: with the arguments of
// sdmp::mix_cuda, through the same choice of kernels. They return which kernel ran: 1 for the vector kernel.
#include "cuda_on_cpu.h"

#include "mix_cuda_kernels.h"
#include "mix_cuda_torch.h"

namespace sdmp {
namespace {

struct OnCpu {
  bool vector;

  template <class Job>
  int64_t operator()(void (*kernel)(Job), int64_t blocks, const Job& job) const {
    launch_on_cpu(kernel, blocks, SDMP_ISA::kThreads, job);
    return vector ? 1 : 0;
  }
};

int64_t mix_emulated(const Tensor& images, const std::optional<Tensor>& partners, const Tensor& rule,
                     const Tensor& partner, const Tensor& lam, const Tensor& box, bool mirrored,
                     const std::optional<std::vector<double>>& mean, const std::optional<std::vector<double>>& std,
                     Tensor mixed, std::optional<Tensor> clean) {
  const GpuMix job = gpu_mix_of(images, partners, rule, partner, lam, box, mirrored, mean, std, mixed, clean);
  return SDMP_ISA::run_mix(job, OnCpu{SDMP_ISA::vectorised(job)});
}

int64_t mix_backward_emulated(const std::optional<Tensor>& grad_mixed, const std::optional<Tensor>& grad_clean,
                              const Tensor& rule, const Tensor& partner, const Tensor& lam, const Tensor& box,
                              bool mirrored, const std::optional<Tensor>& order, const std::optional<Tensor>& starts,
                              const std::optional<std::vector<double>>& std, Tensor grad_images,
                              std::optional<Tensor> grad_partners) {
  const GpuGrad job = gpu_grad_of(grad_mixed, grad_clean, rule, partner, lam, box, mirrored, order, starts, std,
                                  grad_images, grad_partners);
  return SDMP_ISA::run_mix_backward(job, OnCpu{SDMP_ISA::vectorised(job)});
}

}  // namespace
}  // namespace sdmp

STABLE_TORCH_LIBRARY_FRAGMENT(sdmp, m) {
  m.def(
      "mix_emulated(Tensor images, Tensor? partners, Tensor rule, Tensor partner, Tensor lam, Tensor box, "
      "bool mirrored, float[]? mean, float[]? std, Tensor(a!) mixed, Tensor(b!)? clean) -> int");
  m.def(
      "mix_backward_emulated(Tensor? grad_mixed, Tensor? grad_clean, Tensor rule, Tensor partner, Tensor lam, "
      "Tensor box, bool mirrored, Tensor? order, Tensor? starts, float[]? std, Tensor(a!) grad_images, "
      "Tensor(b!)? grad_partners) -> int");
}

STABLE_TORCH_LIBRARY_IMPL(sdmp, CPU, m) {
  m.impl("mix_emulated", TORCH_BOX(&sdmp::mix_emulated));
  m.impl("mix_backward_emulated", TORCH_BOX(&sdmp::mix_backward_emulated));
}
