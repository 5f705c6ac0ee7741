// From tensors to the plain structures of the kernels, on the LibTorch stable ABI: for the CPU and the CUDA operators.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <vector>

#include "mix_job.h"

#define SDMP_MIX_ARGUMENTS                                                                                            \
  "Tensor images, Tensor? partners, Tensor rule, Tensor partner, Tensor lam, Tensor box, bool mirrored, "             \
  "float[]? mean, float[]? std, Tensor(a!) mixed, Tensor(b!)? clean"
#define SDMP_MIX_SCHEMA "(" SDMP_MIX_ARGUMENTS ") -> ()"
// With what is erased, which the CPU kernels alone do.
#define SDMP_MIX_ERASE_SCHEMA \
  "(" SDMP_MIX_ARGUMENTS ", Tensor? boxes=None, Tensor? fill=None, bool per_pixel=False) -> ()"
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

// The boxes of an erasure, all of them within the image, and what fills them.
inline ErasureView erasure_of(const std::optional<Tensor>& boxes, const std::optional<Tensor>& fill, bool per_pixel,
                              const Tensor& images) {
  if (!boxes.has_value()) return ErasureView{};
  const int64_t rows = images.size(0);
  STD_TORCH_CHECK(boxes->dim() == 3 && boxes->size(0) == rows && boxes->size(2) == 5 && boxes->is_contiguous() &&
                      boxes->scalar_type() == ScalarType::Int,
                  "boxes must be contiguous int32 of shape (", rows, ", R, 5)");
  STD_TORCH_CHECK(fill.has_value() && fill->dim() == 2 && fill->size(1) == images.size(1) && fill->is_contiguous() &&
                      fill->scalar_type() == ScalarType::Float,
                  "fill must be contiguous float32 of shape (F, ", images.size(1), ")");
  const ErasureView view{static_cast<const int32_t*>(boxes->data_ptr()), boxes->size(1),
                         static_cast<const float*>(fill->data_ptr()), per_pixel};
  for (int64_t k = 0; k < rows * view.count; ++k) {
    const int32_t* box = view.boxes + 5 * k;
    const int64_t area = static_cast<int64_t>(box[2]) * box[3];
    const int64_t used = per_pixel || area == 0 ? area : 1;
    STD_TORCH_CHECK(box[0] >= 0 && box[1] >= 0 && box[2] >= 0 && box[3] >= 0 &&
                        static_cast<int64_t>(box[0]) + box[2] <= images.size(2) &&
                        static_cast<int64_t>(box[1]) + box[3] <= images.size(3),
                    "box ", k % view.count, " of row ", k / view.count, " does not lie within the image");
    STD_TORCH_CHECK(box[4] >= 0 && box[4] + used <= fill->size(0), "box ", k % view.count, " of row ", k / view.count,
                    " needs ", box[4] + used, " rows of fill, which has ", fill->size(0));
  }
  return view;
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

}  // namespace sdmp
