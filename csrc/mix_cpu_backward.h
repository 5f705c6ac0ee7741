// The gradients of mixing on the CPU: every tile gathers what the rows gave that took its pixels.
#pragma once

#include <cstdint>
#include <cstring>

#include "mix_cpu_tiles.h"

namespace sdmp {
namespace SDMP_ISA {
namespace {

void add_run(float* sum, const float* values, int64_t n) {
#pragma GCC ivdep
  for (int64_t k = 0; k < n; ++k) sum[k] += values[k];
}

void add_scaled(float* sum, float weight, const float* values, int64_t n) {
#pragma GCC ivdep
  for (int64_t k = 0; k < n; ++k) sum[k] = add_product(sum[k], weight, values[k]);
}

class Gradient {
 public:
  Gradient(const GradJob& job, char* scratch)
      : job_(job), g_(job.geometry), scratch_(scratch, job.geometry), out_size_(size_of(job.out)) {
    const Scaled kind = job.scale == nullptr ? Scaled::kNo : g_.interleaved ? Scaled::kPeriod : Scaled::kPlane;
    write_ = writer_for(job.in, job.out, kind);
    if (kind == Scaled::kPeriod) scaling_ = repeat(nullptr, job.scale, g_.group, scratch_.periodic);
  }

  void run(int64_t task) {
    const auto [unit, plane, chunk] = task_of(g_, task);
    plane_ = plane;
    if (job_.scale != nullptr && !g_.interleaved) scaling_ = Scaling{&zero_, job_.scale + plane_, 1};
    each_tile(g_, chunk, [this, unit = unit](const Run& run) {
      run_ = run;
      if (unit >= job_.n) {
        partner_tile(unit - job_.n);
      } else {
        image_tile(unit);
        if (job_.pairs && unit != job_.n - 1 - unit) image_tile(job_.n - 1 - unit);
      }
    });
  }

 private:
  Row plan_row(int64_t index) const {
    const int64_t partner = job_.plan.mirrored ? job_.n - 1 - index : job_.plan.partner[index];
    return read_row(job_.plan.rule[index], job_.plan.lam[index], job_.plan.box + 4 * index,
                    static_cast<int32_t>(job_.height), static_cast<int32_t>(job_.width),
                    job_.own_partners && partner == index);
  }

  void image_tile(int64_t index) {
    float* sum = scratch_.sum;
    if (job_.grad_clean.data != nullptr) {
      std::memcpy(sum, tile_of(job_.grad_clean, index, 0), run_.count * sizeof(float));
    } else {
      std::memset(sum, 0, run_.count * sizeof(float));
    }
    if (job_.grad_mixed.data != nullptr) {
      const Row row = plan_row(index);
      const float* grad = tile_of(job_.grad_mixed, index, 0);
      each_part(row, g_, run_, [&](Part part, int64_t from, int64_t n) {
        if (part == Part::kOwn) add_run(sum + from, grad + from, n);
        if (part == Part::kBlend) add_scaled(sum + from, row.own, grad + from, n);
      });
      if (job_.own_partners) add_from_mixed(index);
    }
    write(job_.grad_images, index);
  }

  void partner_tile(int64_t index) {
    std::memset(scratch_.sum, 0, run_.count * sizeof(float));
    if (job_.grad_mixed.data != nullptr) add_from_mixed(index);
    write(job_.grad_partners, index);
  }

  // The gradients of all rows that took pixels of row `index`, in ascending order.
  void add_from_mixed(int64_t index) {
    if (job_.plan.mirrored) {
      add_from(job_.n - 1 - index);
      return;
    }
    for (int64_t k = job_.starts[index]; k < job_.starts[index + 1]; ++k) add_from(job_.order[k]);
  }

  void add_from(int64_t from_row) {
    const Row row = plan_row(from_row);
    if (row.rule == Rule::kKeep) return;
    if (row.rule == Rule::kResizeMix) {
      add_resized(from_row, row);
      return;
    }
    const float* grad = tile_of(job_.grad_mixed, from_row, 1);
    float* sum = scratch_.sum;
    each_part(row, g_, run_, [&](Part part, int64_t from, int64_t n) {
      if (part == Part::kOther) add_run(sum + from, grad + from, n);
      if (part == Part::kBlend) add_scaled(sum + from, row.other, grad + from, n);
    });
  }

  // The transpose of resizing: every pixel of the box gives to the four it was made of.
  void add_resized(int64_t from_row, const Row& row) {
    const int64_t height = row.bottom - row.top, width = row.right - row.left;
    if (tapped_ != from_row) {
      scratch_.x[0].fill(width, job_.width, row.scale_x, g_.group);
      scratch_.y.fill(height, job_.height, row.scale_y, 1);
      tapped_ = from_row;
    }
    const Taps& taps = scratch_.y;
    float* blended = scratch_.rows[2];
    for (int64_t at = run_.begin; at < run_.end();) {
      const int64_t y = at / g_.length, stop = smaller(run_.end(), (y + 1) * g_.length);
      std::memset(blended, 0, width * g_.group * sizeof(float));
      for (int64_t k = first_at_least(taps.first, height, y - 1); k < height && taps.first[k] <= y; ++k) {
        const bool upper = taps.first[k] == y, lower = taps.first[k] + taps.step[k] == y;
        if (!upper && !lower) continue;
        const Place box_row =
            place(job_.grad_mixed, g_, job_.in, from_row, plane_, row.top + k, row.left * g_.group);
        char* gathered = reinterpret_cast<char*>(scratch_.rows[1]);
        const float* grad = values(box_row, width * g_.group, gathered, scratch_.rows[0]);
        if (upper) add_scaled(blended, taps.w0[k], grad, width * g_.group);
        if (lower) add_scaled(blended, taps.w1[k], grad, width * g_.group);
      }
      scatter_row(blended, width, at - y * g_.length, stop - y * g_.length, scratch_.sum + (at - run_.begin));
      at = stop;
    }
  }

  // Adds a row of the box, spread over the image's columns, to the elements [low, high) of the image's row.
  void scatter_row(const float* blended, int64_t width, int64_t low, int64_t high, float* sum) {
    const Taps& taps = scratch_.x[0];
    const int64_t group = g_.group;
    for (int64_t k = first_at_least(taps.first, width, low - group); k < width && taps.first[k] < high; ++k) {
      const int64_t first = taps.first[k], second = first + taps.step[k];
      for (int64_t c = 0; c < group; ++c) {
        const float value = blended[k * group + c];
        if (first >= low) sum[first - low + c] = add_product(sum[first - low + c], taps.w0[k], value);
        if (second < low || second >= high) continue;
        sum[second - low + c] = add_product(sum[second - low + c], taps.w1[k], value);
      }
    }
  }

  static int64_t first_at_least(const int32_t* ascending, int64_t n, int64_t value) {
    int64_t low = 0;
    while (low < n) {
      const int64_t middle = (low + n) / 2;
      if (ascending[middle] < value) {
        low = middle + 1;
      } else {
        n = middle;
      }
    }
    return low;
  }

  // A tile of a gradient in float32.
  const float* tile_of(const View& view, int64_t n, int slot) {
    const Place from = place(view, g_, job_.in, n, plane_, run_.row, run_.x);
    return values(from, run_.count, scratch_.raw[slot], scratch_.values[slot]);
  }

  const float* values(const Place& from, int64_t count, char* gathered, float* memory) {
    const char* raw = contiguous(from, job_.in, count, gathered);
    if (job_.in == Type::kFloat) return reinterpret_cast<const float*>(raw);
    kLoaders[static_cast<int>(job_.in)](raw, count, memory);
    return memory;
  }

  void write(const View& view, int64_t index) {
    const Place at = place(view, g_, job_.out, index, plane_, run_.row, run_.x);
    Output out(at, out_size_, job_.stream, scratch_.out);
    write_(scratch_.sum, run_.count, scaling_, out.piece());
    out.made(run_.count);
    out.finish();
  }

  const GradJob& job_;
  const Geometry& g_;
  Scratch scratch_;
  int64_t out_size_;
  Writer write_;
  Scaling scaling_;
  const float zero_ = 0.0f;
  int64_t plane_ = 0, tapped_ = -1;
  Run run_{};
};

}  // namespace
}  // namespace SDMP_ISA
}  // namespace sdmp
