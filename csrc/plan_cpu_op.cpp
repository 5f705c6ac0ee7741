// Drawing plans on the CPU: the operators sdmp::draw_plan_cpu and sdmp::draw_mixup_cpu.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>

#include "plan.h"

namespace sdmp {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// A contiguous tensor of one column, or of `columns`.
template <class Value>
struct Made {
  Tensor tensor;
  Value* at;

  Made(int32_t dtype, int64_t rows, int64_t columns = 0) {
    const int64_t sizes[2] = {rows, columns}, strides[2] = {columns == 0 ? 1 : columns, 1};
    AtenTensorHandle handle = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(columns == 0 ? 1 : 2, sizes, strides, dtype,
                                                    aoti_torch_device_type_cpu(), 0, &handle));
    tensor = Tensor(handle);
    at = static_cast<Value*>(tensor.data_ptr());
  }
};

// The tensors of a MixPlan.
struct Columns {
  Made<uint8_t> rule;
  Made<int64_t> partner;
  Made<float> lam, partner_lam;
  Made<int32_t> box;

  explicit Columns(int64_t n)
      : rule(aoti_torch_dtype_uint8(), n), partner(aoti_torch_dtype_int64(), n), lam(aoti_torch_dtype_float32(), n),
        partner_lam(aoti_torch_dtype_float32(), n), box(aoti_torch_dtype_int32(), n, 4) {}

  // Row i from row `at` of what was drawn, its partner's share from row `other`.
  void put(int64_t i, int64_t n, const Law& law, const Drawn& drawn, int64_t at, int64_t other) {
    rule.at[i] = static_cast<uint8_t>(drawn.rule[at]);
    partner.at[i] = n - 1 - i;
    lam.at[i] = counted_lam(law, drawn, at);
    partner_lam.at[i] = counted_lam(law, drawn, other);
    std::copy_n(drawn.box.data() + 4 * at, 4, box.at + 4 * i);
  }
};

const Law& law_of(const Tensor& numbers) {
  STD_TORCH_CHECK(numbers.dim() == 1 && numbers.size(0) == kLawNumbers && numbers.is_contiguous() &&
                      numbers.scalar_type() == ScalarType::Double,
                  "law must be ", kLawNumbers, " contiguous float64 numbers");
  const Law& law = *static_cast<const Law*>(numbers.data_ptr());
  STD_TORCH_CHECK(law.rules >= 1 && law.rules <= 4, "law must have one to four rules");
  for (int k = 0; k < 4; ++k) {
    STD_TORCH_CHECK(law.rule[k] >= 0 && law.rule[k] <= static_cast<double>(kLastRule), "law has an unknown rule");
  }
  return law;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> draw_plan_cpu(const Tensor& law, int64_t n, int64_t seed,
                                                                int64_t step, int64_t view, int64_t rank,
                                                                int64_t world_size) {
  const Law& given = law_of(law);
  const int64_t total = n * world_size, first = rank * n;
  STD_TORCH_CHECK(n >= 0 && rank >= 0 && rank < world_size, "rank must be one of ", world_size);
  const Drawn drawn =
      draw_rows(given, total, static_cast<uint64_t>(seed), static_cast<uint64_t>(step), static_cast<uint64_t>(view));
  Columns columns(n);
  for (int64_t i = 0; i < n; ++i) {
    const int64_t other = given.global != 0.0 ? total - 1 - (first + i) : first + n - 1 - i;
    columns.put(i, n, given, drawn, first + i, other);
  }
  return {columns.rule.tensor, columns.partner.tensor, columns.lam.tensor, columns.partner_lam.tensor,
          columns.box.tensor};
}

// (N, K) targets of smoothed class numbers, each row's own and its partner's: what `dense_target` in
// sdmp_kernels/_drop_in.py makes, in its order; false where a label is no class.
bool put_target(const int64_t* labels, const float* lam, int64_t n, int64_t classes, double smoothing, float* target) {
  for (int64_t i = 0; i < n; ++i) {
    if (labels[i] < 0 || labels[i] >= classes) return false;
  }
  std::fill_n(target, n * classes, static_cast<float>(smoothing / static_cast<double>(classes)));
  const float kept = static_cast<float>(1.0 - smoothing);
  for (int64_t i = 0; i < n; ++i) {
    float* row = target + i * classes;
    row[labels[i]] += kept * lam[i];
    row[labels[n - 1 - i]] += kept * (1.0f - lam[i]);
  }
  return true;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> draw_mixup_cpu(const Tensor& law,
                                                                        const std::optional<Tensor>& labels, int64_t n,
                                                                        int64_t units, int64_t seed, int64_t step,
                                                                        int64_t salt, int64_t classes,
                                                                        double smoothing) {
  const Law& given = law_of(law);
  STD_TORCH_CHECK(n >= 0 && (units == n || units == (n + 1) / 2 || (units == 1 && n > 0)),
                  "units must be one for all rows, one for a pair or one for each");
  const Drawn drawn = draw_units(given, units, static_cast<uint64_t>(seed), static_cast<uint64_t>(step),
                                 static_cast<uint64_t>(salt));
  Columns columns(n);
  for (int64_t i = 0; i < n; ++i) {
    const auto unit = [&](int64_t row) { return units == 1 ? 0 : units == n ? row : std::min(row, n - 1 - row); };
    columns.put(i, n, given, drawn, unit(i), unit(n - 1 - i));
  }
  const bool wanted = labels.has_value() && n > 0;
  Made<float> target(aoti_torch_dtype_float32(), wanted ? n : 0, classes);
  if (wanted) {
    STD_TORCH_CHECK(labels->dim() == 1 && labels->size(0) == n && labels->is_contiguous() &&
                        labels->scalar_type() == ScalarType::Long && classes > 0,
                    "labels must be ", n, " contiguous int64 numbers, and classes above 0");
    if (!put_target(static_cast<const int64_t*>(labels->data_ptr()), columns.lam.at, n, classes, smoothing,
                    target.at)) {
      target = Made<float>(aoti_torch_dtype_float32(), 0, classes);
    }
  }
  return {columns.rule.tensor, columns.partner.tensor,     columns.lam.tensor, columns.partner_lam.tensor,
          columns.box.tensor,  target.tensor};
}

}  // namespace
}  // namespace sdmp

STABLE_TORCH_LIBRARY_FRAGMENT(sdmp, m) {
  m.def(
      "draw_plan_cpu(Tensor law, int n, int seed, int step, int view, int rank, int world_size) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "draw_mixup_cpu(Tensor law, Tensor? labels, int n, int units, int seed, int step, int salt, int classes, "
      "float smoothing) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(sdmp, CPU, m) {
  m.impl("draw_plan_cpu", TORCH_BOX(&sdmp::draw_plan_cpu));
  m.impl("draw_mixup_cpu", TORCH_BOX(&sdmp::draw_mixup_cpu));
}
