// How a task of the CPU kernels of `mix` is walked: its tiles, what each is made of, where that is read and written.
#pragma once

#include <cstdint>

#include "mix.h"
#include "mix_cpu.h"
#include "mix_cpu_memory.h"
#include "mix_cpu_resize.h"
#include "mix_cpu_runs.h"

namespace sdmp {
namespace SDMP_ISA {
namespace {

struct Scratch {
  char* raw[2];        // gathered tiles
  char* saved;         // the first tile of a pair, where its memory is overwritten before its last read
  char* out;           // a tile of the result, where it is not written in place
  float* values[2];    // tiles in float32
  float* sum;          // resized pixels; or the sum of gradients
  float* periodic;     // constants of interleaved channels
  float* rows[3];      // two rows of an image, and their vertical blend
  Taps x[2];
  Taps y;

  Scratch(char* memory, const Geometry& g) {
    float* next = reinterpret_cast<float*>(memory);
    const auto take = [&next](int64_t floats) {
      float* part = next;
      next += (floats + 15) / 16 * 16;
      return part;
    };
    const auto take_taps = [&take](int64_t n) {
      return Taps{reinterpret_cast<int32_t*>(take(n)), reinterpret_cast<int32_t*>(take(n)), take(n), take(n)};
    };
    raw[0] = reinterpret_cast<char*>(take(kTile));
    raw[1] = reinterpret_cast<char*>(take(kTile));
    saved = reinterpret_cast<char*>(take(kTile));
    out = reinterpret_cast<char*>(take(kTile));
    values[0] = take(kTile);
    values[1] = take(kTile);
    sum = take(kTile + kPad);
    periodic = take(kTile);
    for (float*& row : rows) row = take(g.length + g.group + kPad);
    x[0] = take_taps(g.columns);
    x[1] = take_taps(g.columns);
    y = take_taps(g.rows);
  }
};

// The constants of interleaved channels, repeated so that the loop over them is long enough to vectorise.
Scaling repeat(const float* centre, const float* scale, int64_t group, float* memory) {
  const int64_t period = kTile / 4 / group * group;
  float* centres = memory;
  float* scales = memory + period;
  for (int64_t k = 0; k < period; ++k) {
    centres[k] = centre == nullptr ? 0.0f : centre[k % group];
    scales[k] = scale[k % group];
  }
  return Scaling{centres, scales, period};
}

// ---- where things are ----

// A run of one plane: where it begins, also counted along the flattened rows, and how many elements it has.
struct Run {
  int64_t row, x, begin, count;

  int64_t end() const { return begin + count; }
};

struct Place {
  char* at;
  int64_t step;  // elements between neighbours
};

Place place(const View& view, const Geometry& g, Type type, int64_t n, int64_t plane, int64_t row, int64_t x) {
  const int64_t step = g.interleaved ? 1 : view.w;
  const int64_t offset = n * view.n + plane * view.c + row * view.h + x * step;
  return Place{view.data + offset * size_of(type), step};
}

// A run of a tensor as contiguous elements: where it lies, or gathered into `memory`.
const char* contiguous(const Place& from, Type type, int64_t count, char* memory) {
  if (from.step == 1 || count <= 1) return from.at;
  gather(from.at, from.step, count, size_of(type), memory);
  return memory;
}

struct Task {
  int64_t unit, plane, chunk;
};

// The chunks of a plane follow one another: a resized image takes rows that its neighbours' own pixels are in.
Task task_of(const Geometry& g, int64_t task) {
  return Task{task / g.chunks / g.planes, task / g.chunks % g.planes, task % g.chunks};
}

// Cuts a task into tiles: stretches of a dense plane, where `x` may run on beyond the row, else parts of a row.
template <class Visit>
void each_tile(const Geometry& g, int64_t chunk, Visit visit) {
  const int64_t first = chunk * g.chunk, last = smaller(g.rows, first + g.chunk);
  const int64_t rows = g.dense ? 1 : last - first;
  const int64_t length = g.dense ? (last - first) * g.length : g.length;
  for (int64_t k = 0; k < rows; ++k) {
    for (int64_t x = 0; x < length; x += g.tile) {
      visit(Run{first + k, x, (first + k) * g.length + x, smaller(g.tile, length - x)});
    }
  }
}

// What a tile of the result is made of, piece by piece: visit(part, elements from the tile's begin, elements).
enum class Part { kOwn, kOther, kBlend, kResized };

template <class Visit>
void each_part(const Row& row, const Geometry& g, const Run& run, Visit visit) {
  if (!row.boxed()) {
    visit(row.rule == Rule::kMixup ? Part::kBlend : Part::kOwn, int64_t{0}, run.count);
    return;
  }
  const Part inner = row.rule == Rule::kCutMix ? Part::kOther : Part::kResized;
  const int64_t first = run.begin / g.length;
  int64_t at = 0;
  const auto go_to = [&](Part part, int64_t position) {
    const int64_t stop = smaller(position - run.begin, run.count);
    if (at < stop) {
      visit(part, at, stop - at);
      at = stop;
    }
  };
  for (int64_t y = first > row.top ? first : row.top; y < row.bottom && at < run.count; ++y) {
    go_to(Part::kOwn, y * g.length + row.left * g.group);
    go_to(inner, y * g.length + row.right * g.group);
  }
  go_to(Part::kOwn, run.end());
}

// The boxes of one image that are erased.
struct Boxes {
  const int32_t* at = nullptr;  // (count, 5)
  int64_t count = 0;

  int64_t top(int64_t k) const { return at[5 * k]; }
  int64_t left(int64_t k) const { return at[5 * k + 1]; }
  int64_t bottom(int64_t k) const { return top(k) + at[5 * k + 2]; }
  int64_t width(int64_t k) const { return at[5 * k + 3]; }
  int64_t right(int64_t k) const { return left(k) + width(k); }
  int64_t row_of_fill(int64_t k) const { return at[5 * k + 4]; }

  bool any() const {
    for (int64_t k = 0; k < count; ++k) {
      if (top(k) < bottom(k) && width(k) > 0) return true;
    }
    return false;
  }
};

constexpr int64_t kNone = -1;

// Cuts elements [from, from + n) of a run where erased boxes begin and end: visit(the box that lies on top there or
// kNone, elements from the run's begin, elements). A stretch of a box is in one row.
template <class Visit>
void each_erased(const Boxes& boxes, const Geometry& g, const Run& run, int64_t from, int64_t n, Visit visit) {
  const int64_t stop = from + n;
  for (int64_t at = from; at < stop;) {
    const int64_t y = (run.begin + at) / g.length, line = y * g.length - run.begin, x = at - line;
    int64_t on_top = kNone, next = g.rows;
    bool near = false;
    for (int64_t k = 0; k < boxes.count; ++k) {
      if (y < boxes.top(k)) next = smaller(next, boxes.top(k));
      if (y < boxes.top(k) || y >= boxes.bottom(k)) continue;
      near = true;
      if (x >= boxes.left(k) * g.group && x < boxes.right(k) * g.group) on_top = k;
    }
    int64_t end = line + (near ? 1 : next - y) * g.length;
    if (on_top != kNone) end = line + boxes.right(on_top) * g.group;
    for (int64_t k = on_top + 1; near && k < boxes.count; ++k) {
      const bool here = y >= boxes.top(k) && y < boxes.bottom(k) && boxes.width(k) > 0;
      if (here && boxes.left(k) * g.group > x) end = smaller(end, line + boxes.left(k) * g.group);
    }
    end = smaller(end, stop);
    visit(on_top, at, end - at);
    at = end;
  }
}

// A tile of a result, made piece by piece from left to right: where it belongs if its elements are neighbours there
// (or past the cache), else in scratch and then spread.
class Output {
 public:
  Output(const Place& place, int64_t size, bool stream, char* memory)
      : place_(place.at), step_(place.step), size_(size), stream_(stream && step_ == 1),
        direct_(!stream && step_ == 1), memory_(memory), next_(direct_ ? place_ : memory), lines_(place_) {}

  bool direct() const { return direct_; }

  // Where to make the next piece, before `made` says how many elements it has.
  char* piece() const { return stream_ ? memory_ : next_; }

  void made(int64_t count) {
    if (stream_) {
      lines_.append(memory_, count * size_, true);  // the scratch behind it is there to be read
    } else {
      next_ += count * size_;
    }
  }

  // Where to make the next piece past the cache in whole lines, or null where `made` has to do that.
  char* lines(int64_t count) {
    if (!stream_ || !lines_.aligned() || count * size_ % kLine != 0) return nullptr;
    char* next = lines_.next();
    lines_.skip(count * size_);
    return next;
  }

  // A piece that exists already; `behind` it, so many elements more may be read.
  void copy(const char* from, int64_t count, int64_t behind) {
    if (stream_) {
      lines_.append(from, count * size_, behind * size_ >= kLine);
      return;
    }
    if (from != next_) copy_bytes(next_, from, count * size_);
    next_ += count * size_;
  }

  // A piece that is where it belongs; of direct outputs.
  void skip(int64_t count) { next_ += count * size_; }

  void finish() {
    if (stream_) {
      lines_.finish();
    } else if (!direct_) {
      scatter(memory_, step_, (next_ - memory_) / size_, size_, place_);
    }
  }

 private:
  char* place_;
  int64_t step_, size_;
  bool stream_, direct_;
  char* memory_;
  char* next_;
  LineWriter lines_;
};

}  // namespace
}  // namespace SDMP_ISA
}  // namespace sdmp
