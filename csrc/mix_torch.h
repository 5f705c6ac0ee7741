// From tensors to the plain structures of the kernels, on the LibTorch stable ABI: for the CPU and the CUDA operators.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "mix_job.h"

#define SDMP_MIX_SCHEMA                                                                                               \
  "(Tensor images, Tensor? partners, Tensor rule, Tensor partner, Tensor lam, Tensor box, bool mirrored, "            \
  "float[]? mean, float[]? std, Tensor(a!) mixed, Tensor(b!)? clean) -> ()"
#define SDMP_MIX_BACKWARD_SCHEMA                                                                                      \
  "(Tensor? grad_mixed, Tensor? grad_clean, Tensor rule, Tensor partner, Tensor lam, Tensor box, bool mirrored, "     \
  "Tensor? order, Tensor? starts, float[]? std, Tensor(a!) grad_images, Tensor(b!)? grad_partners) -> ()"

namespace sdmp {

using torch::stable::Tensor;
using torch::headeronly::ScalarType;

inline Type type_of(const Tensor& tensor, const char* name) {
  switch (tensor.scalar_type()) {
    case ScalarType::Byte:
      return Type::kUint8;
    case ScalarType::Half:
      return Type::kHalf;
    case ScalarType::BFloat16:
      return Type::kBf16;
    case ScalarType::Float:
      return Type::kFloat;
    default:
      STD_TORCH_CHECK(false, name, " must be uint8, float16, bfloat16 or float32");
  }
}

// A view with one spelling per memory layout: the stride of an axis of one element says nothing, so it is set to what
// a contiguous tensor has.
inline View view_of(const Tensor& tensor) {
  View view{static_cast<char*>(tensor.data_ptr()), tensor.stride(0), tensor.stride(1), tensor.stride(2),
            tensor.stride(3)};
  const int64_t channels = tensor.size(1), height = tensor.size(2), width = tensor.size(3);
  if (channels == 1) view.c = height * width;
  if (width == 1) view.w = channels > 1 && view.c == 1 ? channels : 1;
  if (height == 1) view.h = width * view.w;
  if (tensor.size(0) == 1) view.n = channels * height * width;
  return view;
}

inline View view_of(const std::optional<Tensor>& tensor) { return tensor.has_value() ? view_of(*tensor) : View{}; }

inline void check_vector(const Tensor& tensor, const char* name, ScalarType type, int64_t rows, int64_t columns) {
  const bool shape = tensor.dim() == (columns == 0 ? 1 : 2) && tensor.size(0) == rows &&
                     (columns == 0 || tensor.size(1) == columns);
  STD_TORCH_CHECK(shape && tensor.scalar_type() == type && tensor.is_contiguous(),
                  name, " must be contiguous, of the plan's dtype and with ", rows, " rows");
}

inline PlanView plan_of(const Tensor& rule, const Tensor& partner, const Tensor& lam, const Tensor& box, bool mirrored,
                        int64_t rows) {
  check_vector(rule, "rule", ScalarType::Byte, rows, 0);
  check_vector(partner, "partner", ScalarType::Long, rows, 0);
  check_vector(lam, "lam", ScalarType::Float, rows, 0);
  check_vector(box, "box", ScalarType::Int, rows, 4);
  return PlanView{static_cast<const uint8_t*>(rule.data_ptr()), static_cast<const int64_t*>(partner.data_ptr()),
                  static_cast<const float*>(lam.data_ptr()), static_cast<const int32_t*>(box.data_ptr()), mirrored};
}

inline void check_shape(const Tensor& tensor, const Tensor& images, const char* name, bool any_rows) {
  STD_TORCH_CHECK(tensor.dim() == 4, name, " must have shape (N, C, H, W)");
  for (int64_t d = any_rows ? 1 : 0; d < 4; ++d) {
    STD_TORCH_CHECK(tensor.size(d) == images.size(d), name, " has size ", tensor.size(d), " in dimension ", d,
                    ", expected ", images.size(d));
  }
}

// The shapes and types that hold on every device.
inline void check_images(const Tensor& images, const std::optional<Tensor>& partners, const Tensor& mixed,
                         const std::optional<Tensor>& clean) {
  STD_TORCH_CHECK(images.dim() == 4, "images must have shape (N, C, H, W)");
  check_shape(mixed, images, "mixed", false);
  if (partners.has_value()) {
    check_shape(*partners, images, "partners", true);
    STD_TORCH_CHECK(partners->scalar_type() == images.scalar_type(), "partners must have the dtype of images");
  }
  if (clean.has_value()) {
    check_shape(*clean, images, "clean", false);
    STD_TORCH_CHECK(clean->scalar_type() == mixed.scalar_type(), "clean must have the dtype of mixed");
  }
}

inline void check_gradients(const std::optional<Tensor>& grad_mixed, const std::optional<Tensor>& grad_clean,
                            const Tensor& grad_images, const std::optional<Tensor>& grad_partners) {
  STD_TORCH_CHECK(grad_mixed.has_value() || grad_clean.has_value(), "give grad_mixed, grad_clean or both");
  STD_TORCH_CHECK(grad_images.dim() == 4, "grad_images must have shape (N, C, H, W)");
  if (grad_mixed.has_value()) check_shape(*grad_mixed, grad_images, "grad_mixed", false);
  if (grad_clean.has_value()) check_shape(*grad_clean, grad_images, "grad_clean", false);
  STD_TORCH_CHECK(!grad_mixed.has_value() || !grad_clean.has_value() ||
                      grad_mixed->scalar_type() == grad_clean->scalar_type(),
                  "grad_clean must have the dtype of grad_mixed");
  if (grad_partners.has_value()) {
    check_shape(*grad_partners, grad_images, "grad_partners", true);
    STD_TORCH_CHECK(grad_partners->scalar_type() == grad_images.scalar_type(),
                    "grad_partners must have the dtype of grad_images");
  }
}

// The rows sorted by partner, or where each partner's begin.
inline const int64_t* takers_of(const std::optional<Tensor>& tensor, const char* name, int64_t rows) {
  STD_TORCH_CHECK(tensor.has_value(), "an arbitrary partner vector needs order and starts");
  check_vector(*tensor, name, ScalarType::Long, rows, 0);
  return static_cast<const int64_t*>(tensor->data_ptr());
}

inline bool same_place(const View& a, const View& b) {
  return a.data == b.data && a.n == b.n && a.c == b.c && a.h == b.h && a.w == b.w;
}

// The folded constants of (x - mean) / std, computed in double and rounded once: see `normalise` in mix.h.
struct Constants {
  std::vector<float> centre, scale;

  Constants(const std::optional<std::vector<double>>& mean, const std::optional<std::vector<double>>& std,
            double range, int64_t channels) {
    if (!std.has_value()) return;
    STD_TORCH_CHECK(static_cast<int64_t>(std->size()) == channels, "std must have one value per channel");
    STD_TORCH_CHECK(!mean.has_value() || mean->size() == std->size(), "mean must have one value per channel");
    for (size_t c = 0; c < std->size(); ++c) {
      centre.push_back(mean.has_value() ? static_cast<float>(range * (*mean)[c]) : 0.0f);
      scale.push_back(static_cast<float>(1.0 / (range * (*std)[c])));
    }
  }

  const float* centre_or_null() const { return scale.empty() ? nullptr : centre.data(); }
  const float* scale_or_null() const { return scale.empty() ? nullptr : scale.data(); }
};

// ---- the jobs of the CUDA kernels; the tests fill them from tensors on the CPU ----

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
