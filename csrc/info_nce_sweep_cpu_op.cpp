// `info_nce` on the CPU with its matrix products: the operator sdmp::info_nce_sweep_cpu.
#include <atomic>
#include <limits>

#include "info_nce_sweep_cpu.h"
#include "loss_torch.h"

namespace sdmp {
namespace {

// Rows of a task at most: a block of keys in the cache serves all of them.
constexpr int64_t kTaskRows = 96;
// The same where every task packs the keys for itself: then this costs little beside the products.
constexpr int64_t kLoneRows = 384;
// Bytes of keys that are packed for all tasks, and of kept gradients of products.
constexpr int64_t kPackedBytes = int64_t{12} << 20, kKeptBytes = int64_t{8} << 20;

struct Kernels {
  decltype(&portable::pack_keys) pack_keys;
  decltype(&portable::pack_queries) pack_queries;
  decltype(&portable::info_nce_sweep) sweep;
  decltype(&portable::info_nce_keys) keys;
};

Kernels kernels() {
  return {SDMP_BEST(pack_keys), SDMP_BEST(pack_queries), SDMP_BEST(info_nce_sweep), SDMP_BEST(info_nce_keys)};
}

using Memory = std::unique_ptr<float, FreeMemory>;

Memory floats(int64_t count) {
  Memory memory(static_cast<float*>(std::aligned_alloc(64, (4 * count + 63) / 64 * 64)));
  if (!memory) throw std::bad_alloc();
  return memory;
}

// run(i, scratch) for i in [0, tasks), each taken by the thread that is free first.
template <class Run>
void run_tasks(int64_t tasks, int64_t scratch, Run run) {
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, tasks, 1, [&](int64_t, int64_t) {
    const Memory memory = floats(scratch);
    for (int64_t i = next++; i < tasks; i = next++) run(i, memory.get());
  });
}

void larger_of(std::atomic<float>& largest, float size) {
  float known = largest;
  while (size > known && !largest.compare_exchange_weak(known, size)) {
  }
}

// Rows of each task, at most `most`, so that every thread has as many tasks.
int64_t task_rows(int64_t rows, int64_t most) {
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t share = (rows + threads - 1) / threads, tasks = (share + most - 1) / most;
  return rounded_up((share + tasks - 1) / tasks, kRowUnit);
}

// Rows [begin, end).
bool run_rows(InfoNceSweep& job, const Kernels& run, int64_t begin, int64_t end) {
  const int64_t step = task_rows(end - begin, job.packed == nullptr ? kLoneRows : kTaskRows);
  std::atomic<bool> fine{true};
  run_tasks((end - begin + step - 1) / step, sweep_scratch(job, step), [&](int64_t i, float* scratch) {
    const int64_t from = begin + i * step;
    if (fine && !run.sweep(job, from, std::min(from + step, end), scratch)) fine = false;
  });
  return fine;
}

bool run_all(InfoNceSweep& job, const Kernels& run, float* key_gradient) {
  const int64_t rows = job.q.rows, width = job.q.columns, blocks = blocks_of(job);
  Memory packed;
  if (4 * blocks * packed_block(width) <= kPackedBytes) {
    packed = floats(blocks * packed_block(width));
    std::atomic<float> largest{0};
    run_tasks(blocks, kColumnUnit * width, [&](int64_t block, float* row) {
      larger_of(largest, run.pack_keys(job.k, block, packed.get() + block * packed_block(width), row));
    });
    job.packed = packed.get();
    job.largest_key = largest;
  }
  if (key_gradient == nullptr) return run_rows(job, run, 0, rows);
  const int64_t fit = kKeptBytes / (4 * blocks * kBlockKeys) / kTaskRows * kTaskRows;
  job.kept_rows = std::min(std::max(fit, kTaskRows), rounded_up(rows, kRowUnit));
  const Memory kept = floats(blocks * job.kept_rows * kBlockKeys);
  const Memory queries = floats(job.kept_rows * rounded_up(width, kColumnUnit) + width);
  const Memory ends = floats(2 * job.kept_rows);
  job.kept = kept.get();
  job.kept_ends = ends.get();
  for (int64_t begin = 0; begin < rows; begin += job.kept_rows) {
    const int64_t end = std::min(begin + job.kept_rows, rows);
    job.kept_from = begin;
    if (!run_rows(job, run, begin, end)) return false;
    run.pack_queries(job.q, begin, end - begin, queries.get(),
                     queries.get() + job.kept_rows * rounded_up(width, kColumnUnit));
    const InfoNceKeys keys{job.kept, job.kept_rows, end - begin, job.kept_ends, queries.get(), job.q,
                           begin,    job.target,    key_gradient, job.k.rows,  width};
    run_tasks(blocks, keys_scratch(keys), [&](int64_t block, float* scratch) { run.keys(keys, block, scratch); });
  }
  return true;
}

// (rows, width) contiguous float32, or null.
float* result_of(std::optional<Tensor>& tensor, const char* name, const Matrix& like) {
  if (!tensor.has_value()) return nullptr;
  STD_TORCH_CHECK(tensor->dim() == 2 && tensor->size(0) == like.rows && tensor->size(1) == like.columns &&
                      tensor->is_contiguous() && tensor->scalar_type() == ScalarType::Float,
                  name, " must be contiguous float32 of shape (", like.rows, ", ", like.columns, ")");
  return static_cast<float*>(tensor->data_ptr());
}

// Whether it was done; where not, the results hold anything.
bool info_nce_sweep_cpu(const Tensor& q, const Tensor& k, const Tensor& first, const Tensor& second,
                        const Tensor& weight, double temperature, bool mixture, double slope, Tensor loss,
                        std::optional<Tensor> dq, std::optional<Tensor> dk) {
  InfoNceSweep job;
  job.q = matrix_of(q, "q");
  job.k = matrix_of(k, "k");
  STD_TORCH_CHECK(job.k.columns == job.q.columns, "q and k must have the same number of columns");
  job.target = target_of(first, second, weight, job.q.rows);
  job.gain = std::min(1 / temperature, static_cast<double>(std::numeric_limits<float>::max()));
  job.mixture = mixture;
  job.slope = slope;
  STD_TORCH_CHECK(loss.dim() == 1 && loss.size(0) == job.q.rows && loss.is_contiguous() &&
                      loss.scalar_type() == ScalarType::Double,
                  "loss must be contiguous float64 of shape (", job.q.rows, ",)");
  job.losses = static_cast<double*>(loss.data_ptr());
  job.gradient = result_of(dq, "dq", job.q);
  float* key_gradient = result_of(dk, "dk", job.k);
  if (!SDMP_BEST(fuses)()) return false;
  if (key_gradient != nullptr) std::fill_n(key_gradient, job.k.rows * job.k.columns, 0.0f);
  return run_all(job, kernels(), key_gradient);
}

}  // namespace
}  // namespace sdmp

STABLE_TORCH_LIBRARY_FRAGMENT(sdmp, m) {
  m.def(
      "info_nce_sweep_cpu(Tensor q, Tensor k, Tensor first, Tensor second, Tensor weight, float temperature, "
      "bool mixture, float slope, Tensor(a!) loss, Tensor(b!)? dq, Tensor(c!)? dk) -> bool");
}

STABLE_TORCH_LIBRARY_IMPL(sdmp, CPU, m) { m.impl("info_nce_sweep_cpu", TORCH_BOX(&sdmp::info_nce_sweep_cpu)); }
