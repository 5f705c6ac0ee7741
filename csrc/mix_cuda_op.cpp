// `mix` on a GPU: the operators sdmp::mix_cuda and sdmp::mix_backward_cuda, on the device and the current stream of
// their tensors. Nothing is read back from the device.
#include <torch/csrc/stable/accelerator.h>

#include "mix_cuda_torch.h"

namespace sdmp {
namespace {

void* current_stream(int32_t device) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  return stream;
}

void check_device(const Tensor& tensor, const char* name, int32_t device) {
  STD_TORCH_CHECK(tensor.is_cuda() && tensor.get_device_index() == device, name, " must be on cuda:", device);
}

void check_device(const std::optional<Tensor>& tensor, const char* name, int32_t device) {
  if (tensor.has_value()) check_device(*tensor, name, device);
}

void check_plan_device(const Tensor& rule, const Tensor& partner, const Tensor& lam, const Tensor& box,
                       int32_t device) {
  check_device(rule, "rule", device);
  check_device(partner, "partner", device);
  check_device(lam, "lam", device);
  check_device(box, "box", device);
}

void mix_cuda(const Tensor& images, const std::optional<Tensor>& partners, const Tensor& rule, const Tensor& partner,
              const Tensor& lam, const Tensor& box, bool mirrored, const std::optional<std::vector<double>>& mean,
              const std::optional<std::vector<double>>& std, Tensor mixed, std::optional<Tensor> clean) {
  const int32_t device = images.get_device_index();
  check_device(images, "images", device);
  check_device(partners, "partners", device);
  check_device(mixed, "mixed", device);
  check_device(clean, "clean", device);
  check_plan_device(rule, partner, lam, box, device);
  const GpuMix job = gpu_mix_of(images, partners, rule, partner, lam, box, mirrored, mean, std, mixed, clean);
  if (job.elements == 0 || job.units == 0) return;
  const torch::stable::accelerator::DeviceGuard guard(device);
  const char* wrong = launch_mix(job, current_stream(device));
  STD_TORCH_CHECK(wrong == nullptr, "mix on cuda:", device, ": ", wrong);
}

void mix_backward_cuda(const std::optional<Tensor>& grad_mixed, const std::optional<Tensor>& grad_clean,
                       const Tensor& rule, const Tensor& partner, const Tensor& lam, const Tensor& box, bool mirrored,
                       const std::optional<Tensor>& order, const std::optional<Tensor>& starts,
                       const std::optional<std::vector<double>>& std, Tensor grad_images,
                       std::optional<Tensor> grad_partners) {
  const int32_t device = grad_images.get_device_index();
  check_device(grad_images, "grad_images", device);
  check_device(grad_partners, "grad_partners", device);
  check_device(grad_mixed, "grad_mixed", device);
  check_device(grad_clean, "grad_clean", device);
  check_device(order, "order", device);
  check_device(starts, "starts", device);
  check_plan_device(rule, partner, lam, box, device);
  const GpuGrad job = gpu_grad_of(grad_mixed, grad_clean, rule, partner, lam, box, mirrored, order, starts, std,
                                  grad_images, grad_partners);
  if (job.elements == 0 || job.units == 0) return;
  const torch::stable::accelerator::DeviceGuard guard(device);
  const char* wrong = launch_mix_backward(job, current_stream(device));
  STD_TORCH_CHECK(wrong == nullptr, "mix_backward on cuda:", device, ": ", wrong);
}

}  // namespace
}  // namespace sdmp

STABLE_TORCH_LIBRARY_FRAGMENT(sdmp, m) {
  m.def("mix_cuda" SDMP_MIX_SCHEMA);
  m.def("mix_backward_cuda" SDMP_MIX_BACKWARD_SCHEMA);
}

STABLE_TORCH_LIBRARY_IMPL(sdmp, CUDA, m) {
  m.impl("mix_cuda", TORCH_BOX(&sdmp::mix_cuda));
  m.impl("mix_backward_cuda", TORCH_BOX(&sdmp::mix_backward_cuda));
}
