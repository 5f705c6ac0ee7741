// How the CPU kernels of `mix` touch memory: strided runs, pieces, what is asked for ahead, lines past the cache.
#pragma once

#include <cstdint>
#include <cstring>

#include "mix.h"
#include "mix_cpu.h"
#include "mix_cpu_runs.h"
#include "stream_cpu.h"

namespace sdmp {
namespace SDMP_ISA {
namespace {

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

// From `size` to twice as many bytes.
template <int64_t size>
void copy_ends(char* to, const char* from, int64_t bytes) {
  char first[size], last[size];
  std::memcpy(first, from, size);
  std::memcpy(last, from + bytes - size, size);
  std::memcpy(to, first, size);
  std::memcpy(to + bytes - size, last, size);
}

// Runs of a few hundred bytes, for which a call of memcpy costs as much as the copy.
void copy_bytes(char* to, const char* from, int64_t bytes) {
  constexpr int64_t kBlock = 32;
  int64_t k = 0;
  for (; k + kBlock <= bytes; k += kBlock) std::memcpy(to + k, from + k, kBlock);
  if (bytes >= kBlock) {
    std::memcpy(to + bytes - kBlock, from + bytes - kBlock, kBlock);
  } else if (bytes >= 16) {
    copy_ends<16>(to, from, bytes);
  } else if (bytes >= 8) {
    copy_ends<8>(to, from, bytes);
  } else if (bytes >= 4) {
    copy_ends<4>(to, from, bytes);
  } else {
    for (; k < bytes; ++k) to[k] = from[k];
  }
}

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

}  // namespace
}  // namespace SDMP_ISA
}  // namespace sdmp
