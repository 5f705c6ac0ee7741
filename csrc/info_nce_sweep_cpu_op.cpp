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
// Bytes of keys that are packed for all tasks.
constexpr int64_t kPackedBytes = int64_t{12} << 20;

struct Kernels {
  decltype(&portable::pack_keys) pack_keys;
  decltype(&portable::info_nce_sweep) sweep;
};

Kernels kernels() {
  return {SDMP_BEST(pack_keys), SDMP_BEST(info_nce_sweep)};
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

bool run_all(InfoNceSweep& job, const Kernels& run) {
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
  const int64_t step = task_rows(rows, job.packed == nullptr ? kLoneRows : kTaskRows);
  std::atomic<bool> fine{true};
  run_tasks((rows + step - 1) / step, sweep_scratch(job, step), [&](int64_t i, float* scratch) {
    const int64_t from = i * step;
    if (fine && !run.sweep(job, from, std::min(from + step, rows), scratch)) fine = false;
  });
  return fine;
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
                        std::optional<Tensor> dq) {
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
  if (!SDMP_BEST(fuses)()) return false;
  return run_all(job, kernels());
}

}  // namespace
}  // namespace sdmp

STABLE_TORCH_LIBRARY_FRAGMENT(sdmp, m) {
  m.def(
      "info_nce_sweep_cpu(Tensor q, Tensor k, Tensor first, Tensor second, Tensor weight, float temperature, "
      "bool mixture, float slope, Tensor(a!) loss, Tensor(b!)? dq) -> bool");
}

STABLE_TORCH_LIBRARY_IMPL(sdmp, CPU, m) { m.impl("info_nce_sweep_cpu", TORCH_BOX(&sdmp::info_nce_sweep_cpu)); }
