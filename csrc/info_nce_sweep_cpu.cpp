// `info_nce` on the CPU with its matrix products, compiled once per instruction set (SDMP_ISA): as fused attention, some
// rows against a block of keys at a time, whose products never leave the cache nearest to a core.
//
// Exponentials are taken below the largest product of the row so far; where a later block has a larger one, what there
// is is scaled down. The keys of a row's target are left out of its sums: what the softmax gives them and what the target
// takes from them is one small difference at the end.
#include "info_nce_sweep_cpu.h"

#include <algorithm>

#include "loss_cpu_rows.h"
#include "product_cpu.h"

namespace sdmp {
namespace SDMP_ISA {
namespace {

static_assert(kRowUnit % kGroup == 0 && kColumnUnit % kPanel == 0 && kBlockKeys % kPanel == 0 && kBlockKeys % kStep == 0);

// Row i of a matrix as float32.
void read_row(const Matrix& matrix, int64_t i, float* out) {
  const int64_t at = i * matrix.row, n = matrix.columns;
  switch (matrix.type) {
    case Type::kHalf:
      return widen(reinterpret_cast<const Half*>(matrix.data) + at, matrix.column, n, out);
    case Type::kBf16:
      return widen(reinterpret_cast<const Bf16*>(matrix.data) + at, matrix.column, n, out);
    default:
      return widen(reinterpret_cast<const float*>(matrix.data) + at, matrix.column, n, out);
  }
}

// The largest of n numbers either way; infinity where one is not finite.
float largest_of(const float* values, int64_t n) {
  Words largest = {};  // without their signs numbers are in the order of their bits, NaN above infinity
  int64_t k = 0;
  for (; k + kLanes <= n; k += kLanes) {
    Words bits;
    std::memcpy(&bits, values + k, sizeof bits);
    bits &= 0x7fffffffu;
    largest = bits > largest ? bits : largest;
  }
  const uint32_t infinity = bits_of(std::numeric_limits<float>::infinity());
  uint32_t found = 0;
  for (int64_t j = 0; j < kLanes; ++j) found = largest[j] > found ? largest[j] : found;
  for (; k < n; ++k) {
    const uint32_t bits = bits_of(values[k]) & 0x7fffffffu;
    found = bits > found ? bits : found;
  }
  return from_bits(found < infinity ? found : infinity);
}

// Row i of a matrix as float32: where it is, if it is such a row, or else in `room`.
const float* row_of(const Matrix& matrix, int64_t i, float* room) {
  if (matrix.type == Type::kFloat && matrix.column == 1) return reinterpret_cast<const float*>(matrix.data) + i * matrix.row;
  read_row(matrix, i, room);
  return room;
}

// The rows [begin, begin + rows) of a matrix, `rows` at most `width`, into a group of `width` rows, depth by depth and
// filled up with zeros; returns the largest of them. `room`: as many rows of the matrix.
template <int64_t width>
float pack_group(const Matrix& matrix, int64_t begin, int64_t rows, float* out, float* room) {
  const int64_t depth = matrix.columns;
  const float* from[width];
  float largest = 0;
  for (int64_t r = 0; r < width; ++r) {
    if (r < rows) {
      from[r] = row_of(matrix, begin + r, room + r * depth);
      const float size = largest_of(from[r], depth);
      largest = size > largest ? size : largest;
    } else {
      from[r] = static_cast<const float*>(std::memset(room + r * depth, 0, depth * sizeof(float)));
    }
  }
  for (int64_t k = 0; k < depth; ++k, out += width) {
#pragma GCC unroll 32
    for (int64_t r = 0; r < width; ++r) out[r] = from[r][k];
  }
  return largest;
}

// The parts of a task's scratch.
struct Task {
  int64_t begin, rows, groups, width;  // width: that of q, filled up to whole panels
  float* queries;    // (groups, columns of q, kGroup)
  float* products;   // (groups * kGroup, kBlockKeys)
  float* attended;   // (groups * kGroup, width)
  float* block;      // a block of keys, packed as it is needed
  double* sums;      // (rows,) of the exponentials, without the target's
  float* peaks;      // (rows,)
  float* picked;     // (rows, 2) the target's products
  float* first;      // (width,) a row of a matrix, and another one
  float* second;
  float* zeros;      // (width,)
};

Task task_of(const InfoNceSweep& job, int64_t begin, int64_t end, float* scratch) {
  Task task;
  task.begin = begin;
  task.rows = end - begin;
  task.groups = (task.rows + kGroup - 1) / kGroup;
  task.width = rounded_up(job.q.columns, kColumnUnit);
  const int64_t all = rounded_up(task.rows, kRowUnit);
  task.queries = scratch;
  task.products = task.queries + all * task.width;
  task.attended = task.products + all * kBlockKeys;
  task.block = task.attended + all * task.width;
  task.sums = reinterpret_cast<double*>(task.block + own_block(job));
  task.peaks = reinterpret_cast<float*>(task.sums + all);
  task.picked = task.peaks + all;
  task.first = task.picked + 2 * all;
  task.second = task.first + task.width;
  task.zeros = task.second + task.width;
  std::fill_n(task.zeros, task.width, 0.0f);
  return task;
}

// Packs the queries; returns the largest of them.
float pack_task(const InfoNceSweep& job, const Task& task) {
  float largest = 0;
  for (int64_t g = 0; g < task.groups; ++g) {
    const int64_t from = g * kGroup, rows = task.rows - from < kGroup ? task.rows - from : kGroup;
    float* to = task.queries + from * job.q.columns;
    const float size = pack_group<kGroup>(job.q, task.begin + from, rows, to, task.attended);
    largest = size > largest ? size : largest;
  }
  return largest;
}

// Where the g-th tile of a panel of `depth` rows asks ahead: in the panel after it, which all of them go through together.
inline const float* ahead(const float* panel, int64_t depth, int64_t g) {
  return panel + depth * (kPanel + g * kAhead % kPanel);
}

// Products of the task's rows with a block of keys.
void multiply_queries(const InfoNceSweep& job, const Task& task, const float* keys, int64_t count) {
  const int64_t depth = job.q.columns;
  for (int64_t c = 0; c < count; c += kPanel, keys += depth * kPanel) {
    for (int64_t g = 0; g < task.groups; ++g) {
      tile<1, kGroup, false>(task.queries + g * kGroup * depth, keys, depth, kBlockKeys,
                             task.products + g * kGroup * kBlockKeys + c, ahead(keys, depth, g));
    }
  }
}

// What is there of the sums over keys, scaled down to a larger product.
void lower(const InfoNceSweep& job, const Task& task, int64_t i, double factor) {
  task.sums[i] *= factor;
  if (job.gradient == nullptr) return;
  const Floats by = all(static_cast<float>(factor));
  float* out = task.attended + i * task.width;
  for (int64_t c = 0; c < task.width; c += kLanes) write(read(out + c) * by, out + c);
}

// Products of row i with a block of keys become exponentials.
void to_exponentials(const InfoNceSweep& job, const Task& task, int64_t i, int64_t block, int64_t count) {
  const int64_t from = block * kBlockKeys;
  float* z = task.products + i * kBlockKeys;
  const Columns t = columns_of(job.target, task.begin + i, job.k.rows);
  const float peak = peak_of(z, count);
  if (block == 0) {
    task.peaks[i] = peak;
    task.sums[i] = 0;
  } else if (peak > task.peaks[i]) {
    lower(job, task, i, std::exp((static_cast<double>(task.peaks[i]) - peak) * job.gain));
    task.peaks[i] = peak;
  }
  const int64_t places[] = {t.w > 0 ? t.first - from : -1, t.v > 0 ? t.second - from : -1};
  for (int64_t c = 0; c < 2; ++c) {
    if (places[c] >= 0 && places[c] < count) task.picked[2 * i + c] = z[places[c]];
  }
  for (const int64_t place : places) {
    if (place >= 0 && place < count) z[place] = kLowest;
  }
  task.sums[i] += exponentiate(z, count, task.peaks[i], job.gain);
}

// Sums over a block of keys, weighted with the exponentials.
void multiply_keys(const Task& task, const float* keys, int64_t count, bool add) {
  for (int64_t c = 0; c < task.width; c += kPanel, keys += kBlockKeys * kPanel) {
    for (int64_t g = 0; g < task.groups; ++g) {
      const float* from = task.products + g * kGroup * kBlockKeys;
      float* to = task.attended + g * kGroup * task.width + c;
      const float* next = ahead(keys, kBlockKeys, g);
      add ? tile<kBlockKeys, 1, true>(from, keys, count, task.width, to, next)
          : tile<kBlockKeys, 1, false>(from, keys, count, task.width, to, next);
    }
  }
}

// What multiplies a row's exponentials in its gradient, and what there is of the target's keys.
struct Ends {
  double loss, factor, first, second;
};

Ends ends_of(const InfoNceSweep& job, const Task& task, int64_t i, const Columns& t) {
  const double peak = task.peaks[i];
  const double a = t.w > 0 ? (peak - task.picked[2 * i]) * job.gain : 0;
  const double b = t.v > 0 ? (peak - task.picked[2 * i + 1]) * job.gain : 0;
  const bool one = t.w > 0 && t.v > 0 && t.first == t.second;
  const double at_first = t.w > 0 ? std::exp(-a) : 0, at_second = t.v > 0 && !one ? std::exp(-b) : 0;
  const double sum = task.sums[i] + at_first + at_second;
  const Pulls pulls = pulls_of(t, a, b, job.mixture);
  const double factor = job.slope * (pulls.first + pulls.second) / sum;
  return {two_hot_loss(std::log(sum), t, a, b, job.mixture), factor, factor * at_first - job.slope * pulls.first,
          factor * at_second - job.slope * pulls.second};
}

float representable(double value) {
  constexpr double kLimit = std::numeric_limits<float>::max();
  return static_cast<float>(value > kLimit ? kLimit : value < -kLimit ? -kLimit : value);
}

void finish_queries(const InfoNceSweep& job, const Task& task, int64_t i, const Columns& t, const Ends& ends) {
  const int64_t width = job.q.columns;
  const float* from = task.attended + i * task.width;
  float* out = job.gradient + (task.begin + i) * width;
  // A column of weight 0 is not read: it may be out of range.
  const float by = representable(ends.factor * job.gain), first = representable(ends.first * job.gain),
              second = representable(ends.second * job.gain);
  const float* one = t.w > 0 ? row_of(job.k, t.first, task.first) : task.zeros;
  const float* two = t.v > 0 ? row_of(job.k, t.second, task.second) : task.zeros;
#pragma GCC ivdep
  for (int64_t c = 0; c < width; ++c) out[c] = from[c] * by + one[c] * first + two[c] * second;
}

}  // namespace

bool fuses() { return kFused; }

float pack_keys(const Matrix& k, int64_t block, float* out, float* room) {
  const int64_t from = block * kBlockKeys, depth = k.columns;
  const int64_t count = k.rows - from < kBlockKeys ? k.rows - from : kBlockKeys;
  float largest = 0;
  for (int64_t i = 0; i < count; i += kPanel) {
    const int64_t rows = count - i < kPanel ? count - i : kPanel;
    const float size = pack_group<kPanel>(k, from + i, rows, out + i * depth, room);
    largest = size > largest ? size : largest;
    for (int64_t r = 0; r < rows; ++r) {
      pack_columns(row_of(k, from + i + r, room), depth, i + r, kBlockKeys, out + kBlockKeys * depth);
    }
  }
  return largest;
}

bool info_nce_sweep(const InfoNceSweep& job, int64_t begin, int64_t end, float* scratch) {
  const Task task = task_of(job, begin, end, scratch);
  const int64_t depth = job.q.columns, blocks = blocks_of(job), packed = packed_block(depth);
  const double largest = static_cast<double>(pack_task(job, task)) * depth * (job.gain > 1 ? job.gain : 1);
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t from = block * kBlockKeys;
    const int64_t count = job.k.rows - from < kBlockKeys ? job.k.rows - from : kBlockKeys;
    float size = job.largest_key;
    if (job.packed == nullptr) size = pack_keys(job.k, block, task.block, task.block + packed_block(task.width));
    if (!(largest * size < 1e30)) return false;
    const float* keys = job.packed == nullptr ? task.block : job.packed + block * packed;
    multiply_queries(job, task, keys, count);
    for (int64_t i = 0; i < task.rows; ++i) to_exponentials(job, task, i, block, count);
    if (job.gradient != nullptr) multiply_keys(task, keys + kBlockKeys * depth, count, block > 0);
  }
  for (int64_t i = 0; i < task.rows; ++i) {
    const Columns t = columns_of(job.target, begin + i, job.k.rows);
    const Ends ends = ends_of(job, task, i, t);
    job.losses[begin + i] = ends.loss;
    if (job.gradient != nullptr) finish_queries(job, task, i, t, ends);
  }
  return true;
}

}  // namespace SDMP_ISA
}  // namespace sdmp
