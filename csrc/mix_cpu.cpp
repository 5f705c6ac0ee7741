// The CPU kernels of `mix`, compiled once per instruction set (SDMP_ISA); the compiler vectorises the inner loops.
//
// Everything goes through tiles that stay in the first-level cache: a tile of an image is a run of one plane. Both
// images of a mirrored pair are read once, both results are written once; results larger than the cache are
// written past it in whole lines, which spares reading the lines they replace, most after assembly in a tile.
#include <type_traits>

#include "mix.h"
#include "mix_job.h"

#if defined(__SSE2__)
#include <emmintrin.h>
#endif
#if defined(__AVX__)
#include <immintrin.h>
#endif

namespace sdmp {
namespace SDMP_ISA {
namespace {

// A bfloat16 made from bytes. No NaN comes of those but the processor's own, which rounds to a NaN without a look.
struct ByteBf16 {
  uint16_t bits;
};

using SDMP_ISA::store;

inline void store(float value, ByteBf16& out) {
  const uint32_t bits = bits_of(value);
  out.bits = static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

// ---- runs: the inner loops ----

// What normalising a run takes: one constant for the plane, or `period` of them for interleaved channels.
struct Scaling {
  const float* centre = nullptr;
  const float* scale = nullptr;
  int64_t period = 0;
};

enum class Scaled { kNo, kPlane, kPeriod };

using Loader = void (*)(const char* in, int64_t n, float* out);
using Writer = void (*)(const float* values, int64_t n, const Scaling& scaling, char* out);
using Blender = void (*)(const float* a, float wa, const float* b, float wb, int64_t n, const Scaling& s, char* out);

template <class In>
void load_run(const char* in, int64_t n, float* out) {
  const In* values = reinterpret_cast<const In*>(in);
  int64_t k = 0;
#if defined(__F16C__)
  if constexpr (std::is_same_v<In, Half>) {
    for (; k + 8 <= n; k += 8) {
      _mm256_storeu_ps(out + k, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(values + k))));
    }
  }
#endif
#pragma GCC ivdep
  for (; k < n; ++k) out[k] = load(values[k]);
}

// out[k] = store(value(k)). Halves go in blocks, eight at a time, where the processor converts them itself.
template <class Out, class Value>
inline void store_each(int64_t n, Out* out, Value value) {
  int64_t k = 0;
#if defined(__F16C__)
  if constexpr (std::is_same_v<Out, Half>) {
    constexpr int64_t kBlock = 64;
    alignas(32) float block[kBlock];
    for (; k + kBlock <= n; k += kBlock) {
#pragma GCC ivdep
      for (int64_t j = 0; j < kBlock; ++j) block[j] = value(k + j);
      for (int64_t j = 0; j < kBlock; j += 8) {
        const __m128i halves = _mm256_cvtps_ph(_mm256_load_ps(block + j), _MM_FROUND_TO_NEAREST_INT);
        _mm_storeu_si128(reinterpret_cast<__m128i*>(out + k + j), halves);
      }
    }
  }
#endif
#pragma GCC ivdep
  for (; k < n; ++k) store(value(k), out[k]);
}

template <class Out, Scaled kind, class Value>
inline void write_each(int64_t n, const Scaling& s, Out* out, Value value) {
  if constexpr (kind == Scaled::kNo) {
    store_each(n, out, value);
  } else if constexpr (kind == Scaled::kPlane) {
    const float centre = s.centre[0], scale = s.scale[0];
    store_each(n, out, [=](int64_t k) { return normalise(value(k), centre, scale); });
  } else {
    const float* centre = s.centre;
    const float* scale = s.scale;
    for (int64_t at = 0; at < n; at += s.period) {
      const int64_t size = n - at < s.period ? n - at : s.period;
      store_each(size, out + at, [=](int64_t k) { return normalise(value(at + k), centre[k], scale[k]); });
    }
  }
}

template <class Out, Scaled kind>
void write_run(const float* values, int64_t n, const Scaling& s, char* out) {
  write_each<Out, kind>(n, s, reinterpret_cast<Out*>(out), [=](int64_t k) { return values[k]; });
}

template <class Out, Scaled kind>
void blend_run(const float* a, float wa, const float* b, float wb, int64_t n, const Scaling& s, char* out) {
  write_each<Out, kind>(n, s, reinterpret_cast<Out*>(out), [=](int64_t k) { return blend(a[k], wa, b[k], wb); });
}

constexpr Loader kLoaders[] = {load_run<uint8_t>, load_run<Half>, load_run<Bf16>, load_run<float>};

template <Scaled kind>
constexpr Writer kWriters[] = {write_run<uint8_t, kind>, write_run<Half, kind>, write_run<Bf16, kind>,
                               write_run<float, kind>, write_run<ByteBf16, kind>};
template <Scaled kind>
constexpr Blender kBlenders[] = {blend_run<uint8_t, kind>, blend_run<Half, kind>, blend_run<Bf16, kind>,
                                 blend_run<float, kind>, blend_run<ByteBf16, kind>};

// Where the tables have what makes `out` of `in`.
int entry(Type in, Type out) {
  return in == Type::kUint8 && out == Type::kBf16 ? 4 : static_cast<int>(out);
}

Writer writer_for(Type in, Type out, Scaled kind) {
  const auto* table = kind == Scaled::kNo      ? kWriters<Scaled::kNo>
                      : kind == Scaled::kPlane ? kWriters<Scaled::kPlane>
                                               : kWriters<Scaled::kPeriod>;
  return table[entry(in, out)];
}

Blender blender_for(Type in, Type out, Scaled kind) {
  const auto* table = kind == Scaled::kNo      ? kBlenders<Scaled::kNo>
                      : kind == Scaled::kPlane ? kBlenders<Scaled::kPlane>
                                               : kBlenders<Scaled::kPeriod>;
  return table[entry(in, out)];
}

int64_t size_of(Type type) { return type == Type::kUint8 ? 1 : type == Type::kFloat ? 4 : 2; }

int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// ---- memory: strided runs, and stores past the cache ----

template <class Word>
void gather(const char* in, int64_t step, int64_t n, char* out) {
  const Word* from = reinterpret_cast<const Word*>(in);
  Word* to = reinterpret_cast<Word*>(out);
  for (int64_t k = 0; k < n; ++k) to[k] = from[k * step];
}

template <class Word>
void scatter(const char* in, int64_t step, int64_t n, char* out) {
  const Word* from = reinterpret_cast<const Word*>(in);
  Word* to = reinterpret_cast<Word*>(out);
  for (int64_t k = 0; k < n; ++k) to[k * step] = from[k];
}

void gather(const char* in, int64_t step, int64_t n, int64_t size, char* out) {
  size == 1 ? gather<uint8_t>(in, step, n, out)
  : size == 2 ? gather<uint16_t>(in, step, n, out)
              : gather<uint32_t>(in, step, n, out);
}

void scatter(const char* in, int64_t step, int64_t n, int64_t size, char* out) {
  size == 1 ? scatter<uint8_t>(in, step, n, out)
  : size == 2 ? scatter<uint16_t>(in, step, n, out)
              : scatter<uint32_t>(in, step, n, out);
}

// Runs of a few hundred bytes, for which a call of memcpy costs as much as the copy.
void copy_bytes(char* to, const char* from, int64_t bytes) {
  constexpr int64_t kBlock = 32;
  int64_t k = 0;
  for (; k + kBlock <= bytes; k += kBlock) std::memcpy(to + k, from + k, kBlock);
  if (bytes >= kBlock) {
    std::memcpy(to + bytes - kBlock, from + bytes - kBlock, kBlock);
  } else {
    for (; k < bytes; ++k) to[k] = from[k];
  }
}

constexpr int64_t kLine = 64;  // bytes of a cache line
constexpr int64_t kFloats = kLine / static_cast<int64_t>(sizeof(float));

// Memory that is read soon is asked for, into the second-level cache: the first has no room for it. A processor does so
// by itself along one run only, and those of boxes break off.
constexpr int64_t kAhead = 4 * kTile;  // bytes: a tile of float32
// Rows of a resized image are done sooner than memory answers: what the next one takes would come too late.
constexpr int64_t kRowsAhead = 8;

inline void fetch(const void* from) { __builtin_prefetch(from, 0, 2); }

void fetch(const char* from, int64_t bytes) {
  for (int64_t k = 0; k < bytes; k += kLine) fetch(from + k);
}

void stream_line(char* to, const char* from) {
#if defined(__AVX512F__)
  _mm512_stream_si512(reinterpret_cast<__m512i*>(to), _mm512_loadu_si512(from));
#elif defined(__AVX__)
  for (int64_t k = 0; k < kLine; k += 32) {
    const __m256i data = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + k));
    _mm256_stream_si256(reinterpret_cast<__m256i*>(to + k), data);
  }
#elif defined(__SSE2__)
  for (int64_t k = 0; k < kLine; k += 16) {
    const __m128i data = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + k));
    _mm_stream_si128(reinterpret_cast<__m128i*>(to + k), data);
  }
#else
  std::memcpy(to, from, kLine);
#endif
}

// A blend in float32, in whole lines past the cache.
void stream_blend(const float* a, float wa, const float* b, float wb, int64_t n, char* out) {
  alignas(kLine) float line[kFloats];
  for (int64_t k = 0; k < n; k += kFloats, out += kLine) {
    fetch(reinterpret_cast<const char*>(a + k) + kAhead);  // and b when it is its turn to be a
    for (int64_t j = 0; j < kFloats; ++j) line[j] = blend(a[k + j], wa, b[k + j], wb);
    stream_line(out, reinterpret_cast<const char*>(line));
  }
}

// Writes pieces one behind the other, whole cache lines past the cache. A line made of several pieces is put together
// first; the ends, which may share a line with a neighbour, are written plainly.
class LineWriter {
 public:
  explicit LineWriter(char* to) : to_(to) {}

  // Whether the next byte begins a line, and where that is.
  bool aligned() const { return held_ == 0 && (reinterpret_cast<uintptr_t>(to_) & (kLine - 1)) == 0; }
  char* next() const { return to_; }
  void skip(int64_t bytes) { to_ += bytes; }

  // `roomy`: a line may be read from the end of the piece on, which spares a copy of uneven length.
  void append(const char* from, int64_t bytes, bool roomy) {
    if (!aligned()) {
      const int64_t taken = start_line(from, bytes, roomy);
      from += taken;
      bytes -= taken;
    }
    char* to = to_;
    for (; bytes >= kLine; bytes -= kLine, from += kLine, to += kLine) stream_line(to, from);
    to_ = to;
    if (bytes > 0) {
      hold(from, bytes, roomy);
      held_ = bytes;
    }
  }

  void finish() {
    copy_bytes(to_, line_, held_);
    to_ += held_;
    held_ = 0;
  }

 private:
  // Fills up the line under way.
  int64_t start_line(const char* from, int64_t bytes, bool roomy) {
    const int64_t at = held_ > 0 ? held_ : reinterpret_cast<uintptr_t>(to_) & (kLine - 1);
    const int64_t taken = smaller(bytes, kLine - at);
    if (held_ == 0) {
      copy_bytes(to_, from, taken);
      to_ += taken;
      return taken;
    }
    hold(from, taken, roomy);
    held_ += taken;
    if (held_ == kLine) {
      stream_line(to_, line_);
      to_ += kLine;
      held_ = 0;
    }
    return taken;
  }

  void hold(const char* from, int64_t bytes, bool roomy) {
    if (roomy) {
      std::memcpy(line_ + held_, from, kLine);  // what is too much, the next piece overwrites
    } else {
      copy_bytes(line_ + held_, from, bytes);
    }
  }

  char* to_;
  int64_t held_ = 0;
  alignas(kLine) char line_[2 * kLine];
};

// Writes a run of whole lines past the cache: `own`, and within boxes `other`. Unlike pieces of any two sources, those
// of one place share their lines, so that a line of both is two loads and a choice.
class CutWriter {
 public:
  CutWriter(const char* own, const char* other, char* to) : own_(own), other_(other), to_(to) {}

  // Bytes [begin, end) come from `other`; called in ascending order.
  void box(int64_t begin, int64_t end) {
    const int64_t first = begin / kLine * kLine, last = end / kLine * kLine;
    if (first == last) {
      choose(first, begin - first, end - first);
      return;
    }
    if (begin > first) choose(first, begin - first, kLine);
    own_until(first);
    stream_until(other_, last);
    if (end > last) choose(last, 0, end - last);
  }

  void finish(int64_t bytes) { own_until(bytes); }

 private:
  // Bytes [begin, end) of a line from `other`, the rest from `own` or as chosen before.
  void choose(int64_t line, int64_t begin, int64_t end) {
    if (chosen_ != line) {
      own_until(line);
      std::memcpy(line_, own_ + line, kLine);
      chosen_ = line;
    }
    const char* other = other_ + line;
    const int8_t low = static_cast<int8_t>(begin), high = static_cast<int8_t>(end);
    for (int8_t k = 0; k < kLine; ++k) line_[k] = (k >= low) & (k < high) ? other[k] : line_[k];
  }

  void own_until(int64_t position) {
    if (chosen_ >= 0) {
      stream_line(to_ + chosen_, line_);
      at_ = chosen_ + kLine;
      chosen_ = -1;
    }
    stream_until(own_, position);
  }

  void stream_until(const char* from, int64_t position) {
    for (; at_ < position; at_ += kLine) {
      fetch(from + at_ + kAhead);
      stream_line(to_ + at_, from + at_);
    }
  }

  const char* own_;
  const char* other_;
  char* to_;
  int64_t at_ = 0, chosen_ = -1;
  alignas(kLine) char line_[kLine];
};

void finish_streams() {
#if defined(__SSE2__)
  _mm_sfence();  // the stores are in no order with what another thread reads next
#endif
}

// ---- scratch ----

struct Taps {  // of one axis, for one box
  int32_t* first;
  int32_t* step;
  float* w0;  // weights of the first and the second source pixel
  float* w1;

  // `unit` turns pixels into elements.
  void fill(int64_t target, int64_t extent, float scale, int64_t unit) {
    for (int64_t k = 0; k < target; ++k) {
      const Tap tap =
          resize_tap(static_cast<int32_t>(k), static_cast<int32_t>(target), static_cast<int32_t>(extent), scale);
      first[k] = static_cast<int32_t>(tap.first * unit);
      step[k] = static_cast<int32_t>(tap.step * unit);
      w0[k] = tap.w0;
      w1[k] = tap.w1;
    }
  }
};

constexpr int64_t kPad = 3 * kFloats;  // elements that vectors may touch behind a row

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

// out[k] = the blend of the pixel at taps.first[k] and its right neighbour, for `n` columns from `begin` on. May touch
// kPad elements too many.
void blend_columns(const float* row, const Taps& taps, int64_t begin, int64_t n, int64_t group, float* out) {
  const int32_t* first = taps.first + begin;
  const float* w0 = taps.w0 + begin;
  const float* w1 = taps.w1 + begin;
  int64_t k = 0;
#if defined(__AVX512F__)
  if (group == 1) {  // two loads hold what sixteen pixels are made of, if that is near enough
    for (; k + kFloats <= n && first[k + kFloats - 1] - first[k] < 2 * kFloats; k += kFloats) {
      const float* from = row + first[k];
      const __m512i at = _mm512_sub_epi32(_mm512_loadu_si512(first + k), _mm512_set1_epi32(first[k]));
      const __m512 left = _mm512_permutex2var_ps(_mm512_loadu_ps(from), at, _mm512_loadu_ps(from + kFloats));
      const __m512 right = _mm512_permutex2var_ps(_mm512_loadu_ps(from + 1), at, _mm512_loadu_ps(from + 1 + kFloats));
      const __m512 a = _mm512_mul_ps(left, _mm512_loadu_ps(w0 + k));
      _mm512_storeu_ps(out + k, _mm512_add_ps(a, _mm512_mul_ps(right, _mm512_loadu_ps(w1 + k))));
    }
  }
#endif
#if defined(__SSE2__)
  if (group == 1) {  // two neighbours are one load
    const auto pair = [row](int32_t at) { return reinterpret_cast<const double*>(row + at); };
    for (; k + 4 <= n; k += 4) {
      const __m128 a = _mm_castpd_ps(_mm_loadh_pd(_mm_load_sd(pair(first[k])), pair(first[k + 1])));
      const __m128 b = _mm_castpd_ps(_mm_loadh_pd(_mm_load_sd(pair(first[k + 2])), pair(first[k + 3])));
      const __m128 left = _mm_mul_ps(_mm_shuffle_ps(a, b, 0x88), _mm_loadu_ps(w0 + k));
      const __m128 right = _mm_mul_ps(_mm_shuffle_ps(a, b, 0xdd), _mm_loadu_ps(w1 + k));
      _mm_storeu_ps(out + k, _mm_add_ps(left, right));
    }
  } else if (group == 3) {  // three channels and one lane to spare
    for (; k < n; ++k) {
      const __m128 a = _mm_mul_ps(_mm_loadu_ps(row + first[k]), _mm_set1_ps(w0[k]));
      const __m128 b = _mm_mul_ps(_mm_loadu_ps(row + first[k] + 3), _mm_set1_ps(w1[k]));
      _mm_storeu_ps(out + 3 * k, _mm_add_ps(a, b));
    }
  }
#endif
  for (; k < n; ++k) {
    const float* left = row + first[k];
    for (int64_t c = 0; c < group; ++c) {
      out[k * group + c] = blend(left[c], w0[k], left[group + c], w1[k]);
    }
  }
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

// ---- forward ----

class Mixer {
 public:
  Mixer(const MixJob& job, char* scratch)
      : job_(job), g_(job.geometry), scratch_(scratch, job.geometry), in_size_(size_of(job.in)),
        out_size_(size_of(job.out)) {
    const Scaled kind = job.scale == nullptr ? Scaled::kNo : g_.interleaved ? Scaled::kPeriod : Scaled::kPlane;
    write_ = writer_for(job.in, job.out, kind);
    blend_ = blender_for(job.in, job.out, kind);
    copies_ = kind == Scaled::kNo && job.in == job.out;
    plain_float_ = kind == Scaled::kNo && job.out == Type::kFloat;
    if (kind == Scaled::kPeriod) scaling_ = repeat(job.centre, job.scale, g_.group, scratch_.periodic);
  }

  void run(int64_t task) {
    const auto [unit, plane, chunk] = task_of(g_, task);
    plane_ = plane;
    if (job_.scale != nullptr && !g_.interleaved) scaling_ = Scaling{job_.centre + plane_, job_.scale + plane_, 1};
    members_ = 0;
    add_member(unit);
    if (job_.pairs && unit != job_.n - 1 - unit) add_member(job_.n - 1 - unit);
    each_tile(g_, chunk, [this](const Run& run) { tile(run); });
  }

 private:
  struct Member {
    int64_t index, partner;
    Row row;
  };

  // A tile of a source image, in its own type and, once asked for, in float32.
  struct Source {
    const char* raw;
    const float* values;
  };

  void add_member(int64_t index) {
    const int64_t partner = job_.plan.mirrored ? job_.n - 1 - index : job_.plan.partner[index];
    const bool itself = job_.own_partners && partner == index;
    const Row row = read_row(job_.plan.rule[index], job_.plan.lam[index], job_.plan.box + 4 * index, job_.height,
                             job_.width, itself);
    if (row.rule == Rule::kResizeMix) {
      scratch_.x[members_].fill(row.right - row.left, job_.width, row.scale_x, g_.group);
    }
    member_[members_++] = Member{index, partner, row};
  }

  void tile(const Run& run) {
    run_ = run;
    source_[0] = read(job_.images, member_[0].index, 0);
    const Rule rule = member_[0].row.rule;
    const bool positionwise = rule == Rule::kMixup || rule == Rule::kCutMix;
    if (members_ == 2) {
      source_[1] = read(job_.images, member_[1].index, 1);
    } else if (job_.own_partners && member_[0].partner == member_[0].index) {
      source_[1] = source_[0];
    } else if (positionwise) {
      source_[1] = read(job_.partners, member_[0].partner, 1);
    }
    if (job_.clean.data != nullptr) {
      for (int m = 0; m < members_; ++m) write_clean(m);
    }
    if (job_.in_place && members_ == 2) save_first();
    for (int m = 0; m < members_; ++m) write_mixed(m);
  }

  Source read(const View& view, int64_t n, int slot) {
    const Place from = place(view, g_, job_.in, n, plane_, run_.row, run_.x);
    if (from.step == 1 && (member_[0].row.rule == Rule::kResizeMix || !copies_)) {
      fetch(from.at + run_.count * in_size_, run_.count * in_size_);
    }
    return Source{contiguous(from, job_.in, run_.count, scratch_.raw[slot]), nullptr};
  }

  void save_first() {
    std::memcpy(scratch_.saved, source_[0].raw, run_.count * in_size_);
    source_[0] = Source{scratch_.saved, nullptr};
  }

  const float* values(int slot) {
    Source& source = source_[slot];
    if (source.values == nullptr) {
      if (job_.in == Type::kFloat) {
        source.values = reinterpret_cast<const float*>(source.raw);
      } else {
        kLoaders[static_cast<int>(job_.in)](source.raw, run_.count, scratch_.values[slot]);
        source.values = scratch_.values[slot];
      }
    }
    return source.values;
  }

  Output output(const View& view, int64_t n) {
    const Place at = place(view, g_, job_.out, n, plane_, run_.row, run_.x);
    return Output(at, out_size_, job_.stream, scratch_.out);
  }

  void write_clean(int m) {
    Output out = output(job_.clean, member_[m].index);
    copy_part(out, m, 0, run_.count);
    out.finish();
  }

  void write_mixed(int m) {
    const Row& row = member_[m].row;
    Output out = output(job_.mixed, member_[m].index);
    if (row.rule == Rule::kCutMix && copies_) {
      if (char* lines = out.lines(run_.count)) {
        CutWriter cut(source_[m].raw, source_[1 - m].raw, lines);
        each_part(row, g_, run_, [&](Part part, int64_t from, int64_t n) {
          if (part == Part::kOther) cut.box(from * in_size_, (from + n) * in_size_);
        });
        cut.finish(run_.count * in_size_);
        return;
      }
    }
    const bool untouched = job_.in_place && copies_ && out.direct();  // own pixels are where they belong
    each_part(row, g_, run_, [&](Part part, int64_t from, int64_t n) {
      if (part == Part::kOwn && untouched) {
        out.skip(n);
      } else if (part == Part::kOwn) {
        copy_part(out, m, from, n);
      } else if (part == Part::kOther) {
        copy_part(out, 1 - m, from, n);
      } else if (part == Part::kBlend) {
        const float* own = values(m) + from;
        const float* other = values(1 - m) + from;
        char* lines = plain_float_ ? out.lines(n) : nullptr;
        if (lines != nullptr) {
          stream_blend(own, row.own, other, row.other, n, lines);
        } else {
          blend_(own, row.own, other, row.other, n, scaling_, out.piece());
          out.made(n);
        }
      } else {
        resize_part(m, run_.begin + from, n);
        if (plain_float_) {
          out.copy(reinterpret_cast<const char*>(scratch_.sum), n, kLine);  // followed by more scratch
        } else {
          write_(scratch_.sum, n, scaling_, out.piece());
          out.made(n);
        }
      }
    });
    out.finish();
  }

  // Pixels taken over as they are: bit for bit where nothing is converted.
  void copy_part(Output& out, int slot, int64_t from, int64_t n) {
    if (copies_) {
      out.copy(source_[slot].raw + from * in_size_, n, run_.count - from - n);
    } else {
      write_(values(slot) + from, n, scaling_, out.piece());
      out.made(n);
    }
  }

  // `n` elements of the partner's image resized to the box, from flattened position `at` on, all in one row: two rows
  // of the image blended, and then its columns.
  void resize_part(int m, int64_t at, int64_t n) {
    const Member& member = member_[m];
    const Row& row = member.row;
    const Taps& taps = scratch_.x[m];
    const int64_t y = at / g_.length, group = g_.group;
    const int64_t begin = (at - y * g_.length) / group - row.left, columns = n / group;
    const Tap tap = box_tap(row, y);
    const int64_t low = taps.first[begin];
    const int64_t last = begin + columns - 1;
    const int64_t count = taps.first[last] + taps.step[last] + group - low;
    const float* upper = partner_row(member.partner, tap.first, low, count, scratch_.rows[0]);
    const float* lower = partner_row(member.partner, tap.first + tap.step, low, count, scratch_.rows[1]);
    float* blended = scratch_.rows[2];
    int64_t k = 0;
    if (job_.in == Type::kFloat && y + kRowsAhead < row.bottom) {
      const int64_t ahead = (box_tap(row, y + kRowsAhead).first - tap.first) * job_.partners.h;
      for (; k + kFloats <= count; k += kFloats) {
        fetch(upper + k + ahead);
        fetch(lower + k + ahead);
        for (int64_t j = k; j < k + kFloats; ++j) blended[j] = blend(upper[j], tap.w0, lower[j], tap.w1);
      }
    }
#pragma GCC ivdep
    for (; k < count; ++k) blended[k] = blend(upper[k], tap.w0, lower[k], tap.w1);
    if (row.right - row.left == job_.width) {
      for (int64_t k = 0; k < n; ++k) scratch_.sum[k] = blend(blended[k], 1.0f, blended[k], 0.0f);
      return;
    }
    // The last pixel's neighbour is itself: so every second tap is one pixel on.
    for (int64_t k = 0; k < group; ++k) blended[count + k] = blended[count - group + k];
    blend_columns(blended - low, taps, begin, columns, group, scratch_.sum);
  }

  Tap box_tap(const Row& row, int64_t y) const {
    return resize_tap(static_cast<int32_t>(y - row.top), row.bottom - row.top, static_cast<int32_t>(job_.height),
                      row.scale_y);
  }

  const float* partner_row(int64_t n, int64_t y, int64_t x, int64_t count, float* memory) {
    // A gathered row is turned into float32 from scratch memory that holds a whole row of the widest type.
    char* gathered = reinterpret_cast<char*>(scratch_.rows[2]);
    const char* raw = contiguous(place(job_.partners, g_, job_.in, n, plane_, y, x), job_.in, count, gathered);
    if (job_.in == Type::kFloat && raw != gathered) return reinterpret_cast<const float*>(raw);
    kLoaders[static_cast<int>(job_.in)](raw, count, memory);
    return memory;
  }

  const MixJob& job_;
  const Geometry& g_;
  Scratch scratch_;
  int64_t in_size_, out_size_;
  Writer write_;
  Blender blend_;
  bool copies_, plain_float_;
  Scaling scaling_;
  int64_t plane_ = 0;
  Run run_{};
  Member member_[2];
  Source source_[2];
  int members_ = 0;
};

// ---- backward ----

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
    return read_row(job_.plan.rule[index], job_.plan.lam[index], job_.plan.box + 4 * index, job_.height, job_.width,
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

void mix(const MixJob& job, int64_t begin, int64_t end, char* scratch) {
  Mixer mixer(job, scratch);
  for (int64_t task = begin; task < end; ++task) mixer.run(task);
  if (job.stream) finish_streams();
}

void mix_backward(const GradJob& job, int64_t begin, int64_t end, char* scratch) {
  Gradient gradient(job, scratch);
  for (int64_t task = begin; task < end; ++task) gradient.run(task);
  if (job.stream) finish_streams();
}

}  // namespace SDMP_ISA
}  // namespace sdmp
