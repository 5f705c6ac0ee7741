// `distillation` on the CPU: the operator sdmp::distillation_cpu.
#include "distillation_cpu.h"
#include "loss_torch.h"

namespace sdmp {
namespace {

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
  const std::vector<double> losses = prepare(job, n, scale_of(scale, upstream, n), loss, gradient, student);
  job.pairs = job.other.data != nullptr && job.partner == nullptr;
  job.units = job.pairs ? (n + 1) / 2 : n;
  const auto run = SDMP_BEST(distillation);
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
