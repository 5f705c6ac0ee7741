// From tensors to the plain structures of the losses' CPU kernels, on the LibTorch stable ABI.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <new>
#include <vector>

#include "loss_job.h"
#include "mix_torch.h"
#include "processor.h"

namespace sdmp {

// Elements that a task aims at.
constexpr int64_t kLossTask = 32768;
// Results of this many bytes are written past the cache: they would only push out what is still needed.
constexpr int64_t kLossStreamBytes = int64_t{16} << 20;

inline Type float_type_of(const Tensor& tensor, const char* name) {
  const Type type = type_of(tensor, name);
  STD_TORCH_CHECK(type != Type::kUint8, name, " must be float16, bfloat16 or float32");
  return type;
}

inline Matrix matrix_of(const Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(tensor.dim() == 2, name, " must have two dimensions");
  // The stride of an axis of one element says nothing.
  const int64_t column = tensor.size(1) == 1 ? 1 : tensor.stride(1);
  return {static_cast<const char*>(tensor.data_ptr()), tensor.size(0), tensor.size(1), tensor.stride(0), column,
          float_type_of(tensor, name)};
}

inline TargetView target_of(const Tensor& first, const Tensor& second, const Tensor& weight, int64_t rows) {
  for (const Tensor* tensor : {&first, &second, &weight}) {
    STD_TORCH_CHECK(tensor->dim() == 1 && tensor->size(0) == rows, "a target must have shape (", rows, ",)");
  }
  STD_TORCH_CHECK(first.scalar_type() == ScalarType::Long && second.scalar_type() == ScalarType::Long,
                  "the columns of a target must be int64");
  const bool wide = weight.scalar_type() == ScalarType::Double;
  STD_TORCH_CHECK(wide || weight.scalar_type() == ScalarType::Float, "weight must be float32 or float64");
  return {static_cast<const int64_t*>(first.data_ptr()), static_cast<const int64_t*>(second.data_ptr()),
          static_cast<const char*>(weight.data_ptr()), first.stride(0), second.stride(0), weight.stride(0), wide};
}

struct FreeMemory {
  void operator()(float* memory) const { std::free(memory); }
};

// run(begin, end, scratch) over `rows` rows in parallel, each thread with so many elements of scratch, aligned to a
// cache line. The cut into tasks changes no number: a row is always one thread's.
template <class Run>
void run_rows(int64_t rows, int64_t elements_per_row, int64_t scratch, Run run) {
  const int64_t grain = std::max<int64_t>(1, kLossTask / std::max<int64_t>(1, elements_per_row));
  torch::stable::parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) {
    const size_t bytes = static_cast<size_t>((4 * scratch + 63) / 64 * 64);
    const std::unique_ptr<float, FreeMemory> memory(static_cast<float*>(std::aligned_alloc(64, bytes)));
    if (!memory) throw std::bad_alloc();
    run(begin, end, memory.get());
  });
}

inline Scale scale_of(double all, const std::optional<Tensor>& upstream, int64_t rows) {
  if (!upstream.has_value()) return {all};
  STD_TORCH_CHECK(upstream->dim() == 1 && upstream->size(0) == rows && upstream->scalar_type() == ScalarType::Float,
                  "upstream must be float32 of shape (", rows, ",)");
  return {all, static_cast<const float*>(upstream->data_ptr()), upstream->stride(0)};
}

// What a job is to fill, of `rows` rows: the losses that are returned, and `gradient`, which is like `logits`.
inline std::vector<double> prepare(LossJob& job, int64_t rows, Scale scale, const std::optional<Tensor>& loss,
                                   const std::optional<Tensor>& gradient, const Tensor& logits) {
  std::vector<double> losses(loss.has_value() ? rows : 0);
  if (loss.has_value()) {
    STD_TORCH_CHECK(loss->scalar_type() == ScalarType::Float && loss->is_contiguous() &&
                        (loss->dim() == 0 || (loss->dim() == 1 && loss->size(0) == rows)),
                    "loss must be float32 of shape () or (", rows, ",)");
    job.losses = losses.data();
  }
  job.scale = scale;
  if (gradient.has_value()) {
    bool alike = gradient->dim() == logits.dim() && gradient->scalar_type() == logits.scalar_type();
    for (int64_t d = 0; alike && d < logits.dim(); ++d) alike = gradient->size(d) == logits.size(d);
    STD_TORCH_CHECK(alike && gradient->is_contiguous(), "gradient must be contiguous and like the logits");
    job.gradient = static_cast<char*>(gradient->data_ptr());
    job.stream = gradient->numel() * static_cast<int64_t>(gradient->element_size()) >= kLossStreamBytes;
  }
  return losses;
}

// The losses as the result has them: one by one, or added up in order where it has no dimension.
inline void put_losses(const std::vector<double>& losses, double scale, Tensor& result) {
  float* out = static_cast<float*>(result.data_ptr());
  if (result.dim() > 0) {
    for (size_t i = 0; i < losses.size(); ++i) out[i] = static_cast<float>(losses[i] * scale);
    return;
  }
  double sum = 0;
  for (const double loss : losses) sum += loss * scale;
  out[0] = static_cast<float>(sum);
}

}  // namespace sdmp
