// `distillation` on the CPU: the operator sdmp::distillation_cpu.
#include "distillation_cpu.h"
#include "loss_torch.h"

namespace sdmp {
namespace {

decltype(&portable::distillation) kernel() {
  switch (instruction_set()) {
#if defined(SDMP_WITH_AVX512)
    case Set::kAvx512:
      return avx512::distillation;
#endif
#if defined(SDMP_WITH_AVX2)
    case Set::kAvx2:
      return avx2::distillation;
#endif
    default:
      return portable::distillation;
  }
}

Crops crops_of(const Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(tensor.dim() == 3, name, " must have three dimensions");
  const int64_t column = tensor.size(2) == 1 ? 1 : tensor.stride(2);
  return {static_cast<const char*>(tensor.data_ptr()), tensor.size(0), tensor.size(1), tensor.size(2),
          tensor.stride(0), tensor.stride(1), column, float_type_of(tensor, name)};
}

Weights weights_of(const Tensor& tensor, const char* name, const Crops& student, const Crops& teacher) {
  STD_TORCH_CHECK(tensor.dim() == 3 && tensor.size(0) == student.crops && tensor.size(1) == teacher.crops &&
                      tensor.size(2) == student.rows && tensor.scalar_type() == ScalarType::Float,
                  name, " must be float32 of shape (V, T, N)");
  return {static_cast<const float*>(tensor.data_ptr()), tensor.stride(0), tensor.stride(1), tensor.stride(2)};
}

void distillation_cpu(const Tensor& student, const Tensor& teacher, const Tensor& own,
                      const std::optional<Tensor>& other, const std::optional<Tensor>& partner,
                      const std::optional<Tensor>& center, double student_temperature, double teacher_temperature,
                      double scale, const std::optional<Tensor>& upstream, std::optional<Tensor> loss,
                      std::optional<Tensor> gradient) {
  DistillationJob job;
  job.student = crops_of(student, "student");
  job.teacher = crops_of(teacher, "teacher");
  const int64_t n = job.student.rows, k = job.student.columns;
  STD_TORCH_CHECK(job.teacher.rows == n && job.teacher.columns == k, "student and teacher must have the same rows");
  job.own = weights_of(own, "own", job.student, job.teacher);
  job.other = other.has_value() ? weights_of(*other, "other", job.student, job.teacher) : Weights{};
  job.partner = nullptr;
  if (partner.has_value()) {
    STD_TORCH_CHECK(partner->dim() == 1 && partner->size(0) == n && partner->is_contiguous() &&
                        partner->scalar_type() == ScalarType::Long,
                    "partner must be contiguous int64 of shape (", n, ",)");
    job.partner = static_cast<const int64_t*>(partner->data_ptr());
  }
  job.center = nullptr;
  if (center.has_value()) {
    STD_TORCH_CHECK(center->dim() == 1 && center->size(0) == k && center->is_contiguous() &&
                        center->scalar_type() == ScalarType::Float,
                    "center must be contiguous float32 of shape (", k, ",)");
    job.center = static_cast<const float*>(center->data_ptr());
  }
  job.student_temperature = student_temperature;
  job.teacher_temperature = teacher_temperature;
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
    STD_TORCH_CHECK(gradient->dim() == 3 && gradient->numel() == student.numel() && gradient->is_contiguous() &&
                        gradient->scalar_type() == student.scalar_type(),
                    "gradient must be contiguous and like the student");
    job.gradient = static_cast<char*>(gradient->data_ptr());
    job.stream = gradient->numel() * static_cast<int64_t>(gradient->element_size()) >= kLossStreamBytes;
  }
  job.pairs = job.other.data != nullptr && job.partner == nullptr;
  job.units = job.pairs ? (n + 1) / 2 : n;
  const auto run = kernel();
  const int64_t elements = (job.student.crops + job.teacher.crops) * k * (job.pairs ? 2 : 1);
  run_rows(job.units, elements, distillation_scratch(job),
           [&](int64_t begin, int64_t end, float* scratch) { run(job, begin, end, scratch); });
  if (loss.has_value()) put_losses(losses, scale, *loss);
}

}  // namespace
}  // namespace sdmp

STABLE_TORCH_LIBRARY_FRAGMENT(sdmp, m) {
  m.def(
      "distillation_cpu(Tensor student, Tensor teacher, Tensor own, Tensor? other, Tensor? partner, Tensor? center, "
      "float student_temperature, float teacher_temperature, float scale, Tensor? upstream, Tensor(a!)? loss, "
      "Tensor(b!)? gradient) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(sdmp, CPU, m) {
  m.impl("distillation_cpu", TORCH_BOX(&sdmp::distillation_cpu));
}
