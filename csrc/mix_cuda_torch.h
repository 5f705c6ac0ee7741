// The jobs of the CUDA kernels of `mix`, filled from tensors: by mix_cuda_op.cpp, and in the tests from tensors on the
// CPU.
#pragma once

#include <algorithm>

#include "mix_cuda.h"
#include "mix_torch.h"

namespace sdmp {

// The sizes of the images, which a kernel counts in 32 bits.
template <class Job>
void set_sizes(Job& job, const Tensor& images) {
  for (int64_t d = 1; d < 4; ++d) {
    STD_TORCH_CHECK(images.size(d) <= INT32_MAX, "dimension ", d, " has ", images.size(d), " elements: too many");
  }
  job.n = images.size(0);
  job.channels = static_cast<int32_t>(images.size(1));
  job.height = static_cast<int32_t>(images.size(2));
  job.width = static_cast<int32_t>(images.size(3));
  job.elements = images.size(1) * images.size(2) * images.size(3);
}

template <class Job>
void set_constants(Job& job, const Constants& constants) {
  job.scaled = !constants.scale.empty();
  STD_TORCH_CHECK(!job.scaled || job.channels <= kMaxChannels, "normalising serves up to ", kMaxChannels,
                  " channels in one launch, got ", job.channels);
  std::copy(constants.centre.begin(), constants.centre.end(), job.constants.centre);
  std::copy(constants.scale.begin(), constants.scale.end(), job.constants.scale);
}

inline bool channels_last(const View& view, int64_t channels) {
  return channels > 1 && view.c == 1 && view.w == channels;
}

inline GpuMix gpu_mix_of(const Tensor& images, const std::optional<Tensor>& partners, const Tensor& rule,
                         const Tensor& partner, const Tensor& lam, const Tensor& box, bool mirrored,
                         const std::optional<std::vector<double>>& mean,
                         const std::optional<std::vector<double>>& std, const Tensor& mixed,
                         const std::optional<Tensor>& clean) {
  check_images(images, partners, mixed, clean);
  GpuMix job{};
  set_sizes(job, images);
  job.own_partners = !partners.has_value();
  job.partner_rows = job.own_partners ? job.n : partners->size(0);
  STD_TORCH_CHECK(job.n == 0 || (job.partner_rows > 0 && (!mirrored || job.partner_rows == job.n)), "partners has ",
                  job.partner_rows, " rows for ", job.n, " images");
  job.in = type_of(images, "images");
  job.out = type_of(mixed, "mixed");
  job.images = view_of(images);
  job.partners = job.own_partners ? job.images : view_of(*partners);
  job.mixed = view_of(mixed);
  job.clean = view_of(clean);
  job.plan = plan_of(rule, partner, lam, box, mirrored, job.n);
  job.pairs = mirrored && job.own_partners;
  STD_TORCH_CHECK(job.elements == 0 || !same_place(job.images, job.mixed) || job.pairs,
                  "in place works with mirrored partners only; give a copy of the images");
  job.interleaved = channels_last(job.mixed, job.channels);
  set_constants(job, Constants(mean, std, job.in == Type::kUint8 ? 255.0 : 1.0, job.channels));
  STD_TORCH_CHECK(!job.scaled || job.out != Type::kUint8, "uint8 cannot hold normalised values");
  job.copies = job.in == job.out && !job.scaled;
  job.units = job.pairs ? (job.n + 1) / 2 : job.n;
  return job;
}

inline GpuGrad gpu_grad_of(const std::optional<Tensor>& grad_mixed, const std::optional<Tensor>& grad_clean,
                           const Tensor& rule, const Tensor& partner, const Tensor& lam, const Tensor& box,
                           bool mirrored, const std::optional<Tensor>& order, const std::optional<Tensor>& starts,
                           const std::optional<std::vector<double>>& std, const Tensor& grad_images,
                           const std::optional<Tensor>& grad_partners) {
  check_gradients(grad_mixed, grad_clean, grad_images, grad_partners);
  GpuGrad job{};
  set_sizes(job, grad_images);
  job.own_partners = !grad_partners.has_value();
  job.partner_rows = job.own_partners ? job.n : grad_partners->size(0);
  STD_TORCH_CHECK(!mirrored || job.partner_rows == job.n, "a mirrored plan needs ", job.n, " partners");
  job.in = type_of(grad_mixed.has_value() ? *grad_mixed : *grad_clean, "grad_mixed");
  job.out = type_of(grad_images, "grad_images");
  job.grad_mixed = view_of(grad_mixed);
  job.grad_clean = view_of(grad_clean);
  job.grad_images = view_of(grad_images);
  job.grad_partners = view_of(grad_partners);
  job.plan = plan_of(rule, partner, lam, box, mirrored, job.n);
  if (!mirrored) {
    job.order = takers_of(order, "order", job.n);
    job.starts = takers_of(starts, "starts", job.partner_rows + 1);
  }
  job.pairs = mirrored && job.own_partners;
  job.interleaved = channels_last(job.grad_images, job.channels);
  set_constants(job, Constants(std::nullopt, std, 1.0, job.channels));
  job.units = job.pairs ? (job.n + 1) / 2 : job.n + (job.own_partners ? 0 : job.partner_rows);
  return job;
}

}  // namespace sdmp
