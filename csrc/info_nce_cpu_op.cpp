// `info_nce` on the CPU: sdmp::info_nce_rows_cpu, what is between PyTorch's matrix products; and sdmp::info_nce_few_cpu for
// problems so small that beginning a matrix product costs more than all their arithmetic.
#include <cmath>

#include "info_nce_cpu.h"
#include "loss_cpu.h"
#include "loss_cpu_rows.h"
#include "loss_torch.h"

namespace sdmp {
namespace {

// A result (terms, ...) of which one term is written: contiguous, `size` elements a term.
template <class Value>
Value* term_of(std::optional<Tensor>& tensor, const char* name, ScalarType type, int64_t term, int64_t size) {
  if (!tensor.has_value()) return nullptr;
  STD_TORCH_CHECK(tensor->is_contiguous() && tensor->scalar_type() == type && tensor->numel() >= (term + 1) * size,
                  name, " must be contiguous, of its dtype and with ", size, " elements per term");
  return static_cast<Value*>(tensor->data_ptr()) + term * size;
}

void info_nce_rows_cpu(Tensor products, const Tensor& first, const Tensor& second, const Tensor& weight, double gain,
                       bool mixture, double scale, const std::optional<Tensor>& upstream, bool gradient,
                       std::optional<Tensor> loss) {
  STD_TORCH_CHECK(products.dim() == 2 && products.is_contiguous() && products.scalar_type() == ScalarType::Float,
                  "products must be contiguous float32 of shape (rows, columns)");
  InfoNceJob job;
  job.products = static_cast<float*>(products.data_ptr());
  job.rows = products.size(0);
  job.columns = products.size(1);
  job.target = target_of(first, second, weight, job.rows);
  job.gain = gain;
  job.mixture = mixture;
  job.gradient = gradient;
  job.losses = term_of<double>(loss, "loss", ScalarType::Double, 0, job.rows);
  job.scale = scale_of(scale, upstream, job.rows);
  const auto run = SDMP_BEST(info_nce);
  run_rows(job.rows, job.columns, info_nce_scratch(job.columns),
           [&](int64_t begin, int64_t end, float* scratch) { run(job, begin, end, scratch); });
}

// ---- a few rows: all of it in double, where nothing overflows ----

template <class Stored>
void widen_all(const Matrix& matrix, double* out) {
  const Stored* from = reinterpret_cast<const Stored*>(matrix.data);
  for (int64_t i = 0; i < matrix.rows; ++i) {
    for (int64_t j = 0; j < matrix.columns; ++j) {
      *out++ = portable::load(from[i * matrix.row + j * matrix.column]);
    }
  }
}

std::vector<double> doubles_of(const Matrix& matrix) {
  std::vector<double> values(matrix.rows * matrix.columns);
  switch (matrix.type) {
    case Type::kHalf:
      widen_all<portable::Half>(matrix, values.data());
      break;
    case Type::kBf16:
      widen_all<portable::Bf16>(matrix, values.data());
      break;
    default:
      widen_all<float>(matrix, values.data());
  }
  return values;
}

double dot(const double* a, const double* b, int64_t n) {
  double sum = 0;
  for (int64_t j = 0; j < n; ++j) sum += a[j] * b[j];
  return sum;
}

void add_scaled(double factor, const double* from, int64_t n, double* to) {
  for (int64_t j = 0; j < n; ++j) to[j] += factor * from[j];
}

void info_nce_few_cpu(const Tensor& q_given, const Tensor& k_given, const Tensor& first, const Tensor& second,
                      const Tensor& weight, double temperature, bool mixture, double scale,
                      const std::optional<Tensor>& upstream, int64_t term, bool reduced, std::optional<Tensor> loss,
                      std::optional<Tensor> dq, std::optional<Tensor> dk) {
  const Matrix q_matrix = matrix_of(q_given, "q"), k_matrix = matrix_of(k_given, "k");
  const int64_t n = q_matrix.rows, m = k_matrix.rows, d = q_matrix.columns;
  STD_TORCH_CHECK(k_matrix.columns == d, "q and k must have the same number of columns");
  const TargetView target = target_of(first, second, weight, n);
  const Scale factor = scale_of(scale / temperature, upstream, n);
  float* losses = term_of<float>(loss, "loss", ScalarType::Float, term, reduced ? 1 : n);
  float* dqs = term_of<float>(dq, "dq", ScalarType::Float, term, n * d);
  float* dks = term_of<float>(dk, "dk", ScalarType::Float, 0, m * d);
  const std::vector<double> q = doubles_of(q_matrix), k = doubles_of(k_matrix);
  std::vector<double> z(m), slope(d), key_slopes(dks != nullptr ? m * d : 0);
  double total_loss = 0;
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t j = 0; j < m; ++j) z[j] = dot(&q[i * d], &k[j * d], d);
    double peak = -std::numeric_limits<double>::infinity();
    for (const double product : z) peak = product > peak ? product : peak;
    const portable::Columns t = portable::columns_of(target, i, m);
    const double a = t.w > 0 ? (peak - z[t.first]) / temperature : 0;
    const double b = t.v > 0 ? (peak - z[t.second]) / temperature : 0;
    double sum = 0;
    for (double& value : z) sum += value = std::exp((value - peak) / temperature);
    const double log_sum = std::log(sum);
    const portable::Pulls pulls = portable::pulls_of(t, a, b, mixture);
    if (losses != nullptr) {
      const double value = scale * portable::two_hot_loss(log_sum, t, a, b, mixture);
      total_loss += value;
      if (!reduced) losses[i] = static_cast<float>(value);
    }
    if (dqs == nullptr && dks == nullptr) continue;
    const double row = factor.of(i);
    for (double& value : z) value *= row * (pulls.first + pulls.second) / sum;
    // A column of weight 0 is not touched: it may be out of range.
    if (t.w > 0) z[t.first] -= row * pulls.first;
    if (t.v > 0) z[t.second] -= row * pulls.second;
    if (dqs != nullptr) {
      std::fill(slope.begin(), slope.end(), 0.0);
      for (int64_t j = 0; j < m; ++j) add_scaled(z[j], &k[j * d], d, slope.data());
      for (int64_t c = 0; c < d; ++c) dqs[i * d + c] = static_cast<float>(slope[c]);
    }
    if (dks != nullptr) {
      for (int64_t j = 0; j < m; ++j) add_scaled(z[j], &q[i * d], d, &key_slopes[j * d]);
    }
  }
  if (losses != nullptr && reduced) losses[0] = static_cast<float>(total_loss);
  for (size_t c = 0; c < key_slopes.size(); ++c) dks[c] = static_cast<float>(key_slopes[c]);
}

}  // namespace
}  // namespace sdmp

STABLE_TORCH_LIBRARY_FRAGMENT(sdmp, m) {
  m.def(
      "info_nce_rows_cpu(Tensor(a!) products, Tensor first, Tensor second, Tensor weight, float gain, bool mixture, "
      "float scale, Tensor? upstream, bool gradient, Tensor(b!)? loss) -> ()");
  m.def(
      "info_nce_few_cpu(Tensor q, Tensor k, Tensor first, Tensor second, Tensor weight, float temperature, "
      "bool mixture, float scale, Tensor? upstream, int term, bool reduced, Tensor(a!)? loss, Tensor(b!)? dq, "
      "Tensor(c!)? dk) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(sdmp, CPU, m) {
  m.impl("info_nce_rows_cpu", TORCH_BOX(&sdmp::info_nce_rows_cpu));
  m.impl("info_nce_few_cpu", TORCH_BOX(&sdmp::info_nce_few_cpu));
}
