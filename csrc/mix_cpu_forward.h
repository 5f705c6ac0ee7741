// Mixing on the CPU: one task after another, both images of a mirrored pair together.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "mix_cpu_tiles.h"

namespace sdmp {
namespace SDMP_ISA {
namespace {

class Mixer {
 public:
  Mixer(const MixJob& job, char* scratch)
      : job_(job), g_(job.geometry), scratch_(scratch, job.geometry), in_size_(size_of(job.in)),
        out_size_(size_of(job.out)) {
    const Scaled kind = job.scale == nullptr ? Scaled::kNo : g_.interleaved ? Scaled::kPeriod : Scaled::kPlane;
    write_ = writer_for(job.in, job.out, kind);
    blend_ = blender_for(job.in, job.out, kind);
    write_fill_ = writer_for(Type::kFloat, job.out, Scaled::kNo);
    copies_ = kind == Scaled::kNo && job.in == job.out;
    plain_float_ = kind == Scaled::kNo && job.out == Type::kFloat;
    if (kind == Scaled::kPeriod) scaling_ = repeat(job.centre, job.scale, g_.group, scratch_.periodic);
  }

  void run(int64_t task) {
    const auto [unit, plane, chunk] = task_of(g_, task);
    plane_ = plane;
    if (job_.scale != nullptr && !g_.interleaved) scaling_ = Scaling{job_.centre + plane_, job_.scale + plane_, 1};
    members_ = 0;
    masked_ = false;
    add_member(unit);
    if (job_.pairs && unit != job_.n - 1 - unit) add_member(job_.n - 1 - unit);
    each_tile(g_, chunk, [this](const Run& run) { tile(run); });
  }

 private:
  struct Member {
    int64_t index, partner;
    Row row;
    Boxes erased;  // none where no box of it has a pixel
  };

  // A tile of a source image, in its own type and, once asked for, in float32.
  struct Source {
    const char* raw;
    const float* values;
  };

  void add_member(int64_t index) {
    const int64_t partner = job_.plan.mirrored ? job_.n - 1 - index : job_.plan.partner[index];
    const bool itself = job_.own_partners && partner == index;
    const Row row = read_row(job_.plan.rule[index], job_.plan.lam[index], job_.plan.box + 4 * index,
                             static_cast<int32_t>(job_.height), static_cast<int32_t>(job_.width), itself);
    if (row.rule == Rule::kResizeMix) {
      scratch_.x[members_].fill(row.right - row.left, job_.width, row.scale_x, g_.group);
    }
    const Boxes erased{job_.erasure.boxes + 5 * job_.erasure.count * index, job_.erasure.count};
    member_[members_++] = Member{index, partner, row, erased.any() ? erased : Boxes{}};
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
    if (job_.in_place && members_ == 2) {
      write_both();
    } else {
      for (int m = 0; m < members_; ++m) write_mixed(m);
    }
  }

  // In place, the first image of a pair is overwritten before the second has taken from it.
  void write_both() {
    const Place first = place(job_.mixed, g_, job_.out, member_[0].index, plane_, run_.row, run_.x);
    const Place second = place(job_.mixed, g_, job_.out, member_[1].index, plane_, run_.row, run_.x);
    const bool erases = member_[0].erased.count + member_[1].erased.count > 0;
    if (copies_ && first.step == 1 && !erases) {
      if (plain_float_ && both(Rule::kMixup)) {
        blend_both(reinterpret_cast<float*>(first.at), reinterpret_cast<float*>(second.at));
        return;
      }
      if (both(Rule::kCutMix)) {
        in_size_ == 1   ? exchange<uint8_t>(first.at, second.at)
        : in_size_ == 2 ? exchange<uint16_t>(first.at, second.at)
                        : exchange<uint32_t>(first.at, second.at);
        return;
      }
    }
    save_first();
    for (int m = 0; m < 2; ++m) write_mixed(m);
  }

  bool both(Rule rule) const { return member_[0].row.rule == rule && member_[1].row.rule == rule; }

  void save_first() {
    std::memcpy(scratch_.saved, source_[0].raw, run_.count * in_size_);
    source_[0] = Source{scratch_.saved, nullptr};
  }

  void blend_both(float* a, float* b) {
    const Row &first = member_[0].row, &second = member_[1].row;
#pragma GCC ivdep
    for (int64_t k = 0; k < run_.count; ++k) {
      const float x = a[k], y = b[k];
      a[k] = blend(x, first.own, y, first.other);
      b[k] = blend(y, second.own, x, second.other);
    }
  }

  // Row by row, each image's box filled from the other: where the boxes overlap, pixels change places.
  template <class Word>
  void exchange(char* a, char* b) {
    const Row &first = member_[0].row, &second = member_[1].row;
    const int64_t top = smaller(first.top, second.top), begin = run_.begin / g_.length;
    const int64_t bottom = first.bottom > second.bottom ? first.bottom : second.bottom;
    if (!masked_) {
      mask_columns<Word>(first, scratch_.rows[0]);
      mask_columns<Word>(second, scratch_.rows[1]);
      masked_ = true;
    }
    if (run_.begin % g_.length == 0 && run_.count % g_.length == 0) {
      const int64_t end = begin + run_.count / g_.length;
      int64_t cuts[] = {first.top, first.bottom, second.top, second.bottom};
      for (int64_t& cut : cuts) cut = cut < begin ? begin : smaller(cut, end);
      std::sort(cuts, cuts + 4);
      for (int k = 0; k < 3; ++k) exchange_rows<Word>(a, b, cuts[k], cuts[k + 1] - cuts[k]);
      return;
    }
    for (int64_t y = begin > top ? begin : top; y < bottom && y * g_.length < run_.end(); ++y) {
      exchange_rows<Word>(a, b, y, 1);
    }
  }

  // `rows` rows of the tile from `y` on, all of which are in the same of the two boxes.
  template <class Word>
  void exchange_rows(char* a, char* b, int64_t y, int64_t rows) const {
    const Stretch from_b = within(member_[0].row, y), from_a = within(member_[1].row, y);
    if (rows == 0) return;
    if (from_b.count() > 0 && from_a.count() > 0) {
      exchange_masked(reinterpret_cast<Word*>(a), reinterpret_cast<Word*>(b), from_b.with(from_a), y, rows);
      return;
    }
    const Stretch stretch = from_b.count() > 0 ? from_b : from_a;
    char* to = (from_b.count() > 0 ? a : b) + stretch.begin * in_size_;
    const char* from = (from_b.count() > 0 ? b : a) + stretch.begin * in_size_;
    const int64_t bytes = stretch.count() * in_size_, step = g_.length * in_size_;
    for (int64_t k = 0; k < rows; ++k, to += step, from += step) copy_bytes(to, from, bytes);
  }

  // Elements of the tile.
  struct Stretch {
    int64_t begin, end;

    int64_t count() const { return end - begin; }

    // From the first element of either to the last.
    Stretch with(Stretch other) const {
      return Stretch{smaller(begin, other.begin), end > other.end ? end : other.end};
    }
  };

  // Of the tile's row `y` what the box covers.
  Stretch within(const Row& row, int64_t y) const {
    if (y < row.top || y >= row.bottom) return Stretch{0, 0};
    const int64_t at = y * g_.length - run_.begin;
    return Stretch{in_tile(at + row.left * g_.group), in_tile(at + row.right * g_.group)};
  }

  int64_t in_tile(int64_t position) const { return position < 0 ? 0 : smaller(position, run_.count); }

  // All bits of a row's elements that lie in the columns of the box.
  template <class Word>
  void mask_columns(const Row& row, float* memory) const {
    Word* mask = reinterpret_cast<Word*>(memory);
    for (int64_t k = 0; k < g_.length; ++k) mask[k] = 0;
    for (int64_t k = row.left * g_.group; k < row.right * g_.group; ++k) mask[k] = static_cast<Word>(~Word{0});
  }

  // Where a mask has bits, the two images' change places. The stretch grows to whole vectors where the row goes on.
  template <class Word>
  void exchange_masked(Word* a, Word* b, Stretch stretch, int64_t y, int64_t rows) const {
    constexpr int64_t kWords = 32 / sizeof(Word);
    const int64_t at = y * g_.length - run_.begin, first = in_tile(at), last = in_tile(at + g_.length);
    const int64_t begin = first + (stretch.begin - first) / kWords * kWords;
    const int64_t end = smaller(last, begin + (stretch.end - begin + kWords - 1) / kWords * kWords);
    const Word* into_a = reinterpret_cast<const Word*>(scratch_.rows[0]) + (begin - at);
    const Word* into_b = reinterpret_cast<const Word*>(scratch_.rows[1]) + (begin - at);
    const int64_t count = end - begin;
    a += begin;
    b += begin;
    for (int64_t row = 0; row < rows; ++row, a += g_.length, b += g_.length) {
#pragma GCC ivdep
      for (int64_t k = 0; k < count; ++k) {
        const Word x = a[k], other = b[k], differ = static_cast<Word>(x ^ other);
        a[k] = static_cast<Word>(x ^ (differ & into_a[k]));
        b[k] = static_cast<Word>(other ^ (differ & into_b[k]));
      }
    }
  }

  Source read(const View& view, int64_t n, int slot) {
    const Place from = place(view, g_, job_.in, n, plane_, run_.row, run_.x);
    if (from.step == 1 && (member_[0].row.rule == Rule::kResizeMix || !copies_)) {
      fetch(from.at + run_.count * in_size_, run_.count * in_size_);
    }
    return Source{contiguous(from, job_.in, run_.count, scratch_.raw[slot]), nullptr};
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
    const Boxes& erased = member_[m].erased;
    Output out = output(job_.mixed, member_[m].index);
    if (row.rule == Rule::kCutMix && copies_ && erased.count == 0) {
      if (char* lines = out.lines(run_.count)) {
        CutWriter cut(source_[m].raw, source_[1 - m].raw, lines);
        each_part(row, g_, run_, [&](Part part, int64_t from, int64_t n) {
          if (part == Part::kOther) cut.box(from * in_size_, (from + n) * in_size_);
        });
        cut.finish(run_.count * in_size_);
        return;
      }
    }
    each_part(row, g_, run_, [&](Part part, int64_t from, int64_t n) {
      if (erased.count == 0) {
        write_part(out, m, part, from, n);
        return;
      }
      each_erased(erased, g_, run_, from, n, [&](int64_t box, int64_t at, int64_t count) {
        if (box == kNone) {
          write_part(out, m, part, at, count);
        } else {
          fill_part(out, erased, box, at, count);
        }
      });
    });
    out.finish();
  }

  void write_part(Output& out, int m, Part part, int64_t from, int64_t n) {
    const Row& row = member_[m].row;
    if (part == Part::kOwn && job_.in_place && copies_ && out.direct()) {
      out.skip(n);  // own pixels are where they belong
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
  }

  // `n` elements of an erased box, all in one row.
  void fill_part(Output& out, const Boxes& boxes, int64_t box, int64_t from, int64_t n) {
    const int64_t at = run_.begin + from, y = at / g_.length, column = (at - y * g_.length) / g_.group;
    const bool each = job_.erasure.per_pixel;
    const int64_t pixel = each ? (y - boxes.top(box)) * boxes.width(box) + column - boxes.left(box) : 0;
    const float* colours = job_.erasure.fill + (boxes.row_of_fill(box) + pixel) * job_.channels;
    const float* values = colours;  // of interleaved channels a row of colours is what a row of pixels is
    if (g_.group == 1) {
      const int64_t step = each ? job_.channels : 0;
      for (int64_t k = 0; k < n; ++k) scratch_.sum[k] = colours[plane_ + k * step];
      values = scratch_.sum;
    } else if (!each) {
      for (int64_t k = 0; k < n; k += g_.group) {
        for (int64_t c = 0; c < g_.group; ++c) scratch_.sum[k + c] = colours[c];
      }
      values = scratch_.sum;
    }
    write_fill_(values, n, Scaling{}, out.piece());
    out.made(n);
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
  Writer write_, write_fill_;
  Blender blend_;
  bool copies_, plain_float_;
  Scaling scaling_;
  int64_t plane_ = 0;
  Run run_{};
  Member member_[2];
  Source source_[2];
  int members_ = 0;
  bool masked_ = false;  // whether scratch holds the columns of both boxes
};

}  // namespace
}  // namespace SDMP_ISA
}  // namespace sdmp
