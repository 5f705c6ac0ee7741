// How a plan is drawn: rules, lam and boxes from the numbers of a stream. sdmp_kernels/plan.py and
// sdmp_kernels/timm/mixup.py define it with numpy; this gives the same bits, without a call for every step of it. No
// torch in here.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "mix.h"

namespace sdmp {

// numpy.random.Generator(numpy.random.Philox(key=(seed, step), counter=(0, 0, third, last))).
class Stream {
 public:
  Stream(uint64_t seed, uint64_t step, uint64_t last, uint64_t third)
      : key_{seed, step}, counter_{0, 0, third, last} {}

  // numpy's random(): uniform in [0, 1).
  double next() { return static_cast<double>(bits() >> 11) * (1.0 / 9007199254740992.0); }

  // numpy's beta(alpha, alpha) for alpha in [kLeastAlpha, 1]: Johnk's algorithm.
  double beta(double alpha) {
    for (;;) {
      const double u = next(), v = next();
      const double x = power(u, alpha), y = power(v, alpha), sum = x + y;
      if (sum > 1.0 || u + v <= 0.0) continue;
      if (x > 0.0 && y > 0.0) return x / sum;
      double log_x = std::log(u) / alpha, log_y = std::log(v) / alpha;
      const double larger = log_x > log_y ? log_x : log_y;
      log_x -= larger;
      log_y -= larger;
      return std::exp(log_x - std::log(std::exp(log_x) + std::exp(log_y)));
    }
  }

 private:
  static double power(double base, double alpha) { return alpha == 1.0 ? base : std::pow(base, 1.0 / alpha); }

  uint64_t bits() {
    if (used_ == 4) {
      for (uint64_t& word : counter_) {
        if (++word != 0) break;
      }
      philox();
      used_ = 0;
    }
    return block_[used_++];
  }

  // Philox4x64 of ten rounds (Salmon et al. 2011).
  void philox() {
    uint64_t c[4] = {counter_[0], counter_[1], counter_[2], counter_[3]}, key[2] = {key_[0], key_[1]};
    for (int round = 0; round < 10; ++round) {
      const auto a = static_cast<unsigned __int128>(0xD2E7470EE14C6C93u) * c[0];
      const auto b = static_cast<unsigned __int128>(0xCA5A826395121157u) * c[2];
      c[0] = static_cast<uint64_t>(b >> 64) ^ c[1] ^ key[0];
      c[1] = static_cast<uint64_t>(b);
      c[2] = static_cast<uint64_t>(a >> 64) ^ c[3] ^ key[1];
      c[3] = static_cast<uint64_t>(a);
      key[0] += 0x9E3779B97F4A7C15u;
      key[1] += 0xBB67AE8584CAA73Bu;
    }
    std::copy(c, c + 4, block_);
  }

  uint64_t key_[2], counter_[4], block_[4] = {};
  int used_ = 4;
};

// What stays the same from step to step: `Drawing.numbers` in sdmp_kernels/plan.py, in this order.
struct Law {
  double rules, rule[4], edges[4];  // how many, their values, their cumulated probabilities
  double alpha[4];                  // of every Rule
  double height, width, prob, low, high;
  double one_rule, one_lam;         // for all rows
  double clip, global;              // boxes of CutMix and ResizeMix are clipped; the flip goes over all ranks

  Rule pick(double number) const {
    const int count = static_cast<int>(rules);
    const auto above = std::upper_bound(edges, edges + count, number) - edges;
    return static_cast<Rule>(static_cast<uint8_t>(rule[std::min<int64_t>(above, count - 1)]));
  }
};

constexpr int64_t kLawNumbers = sizeof(Law) / sizeof(double);

// What is drawn of some rows.
struct Drawn {
  std::vector<Rule> rule;
  std::vector<double> lam;
  std::vector<int32_t> box;  // four of each row: top, left, height, width; zeros where it has none

  explicit Drawn(int64_t rows) : rule(rows), lam(rows), box(4 * rows) {}

  int64_t rows() const { return static_cast<int64_t>(rule.size()); }
  bool boxed(int64_t i) const { return rule[i] == Rule::kCutMix || rule[i] == Rule::kResizeMix; }
};

inline std::vector<double> uniform(Stream& stream, int64_t count) {
  std::vector<double> numbers(count);
  for (double& number : numbers) number = stream.next();
  return numbers;
}

// The box of row i, from the row's numbers for the two axes.
inline void place_box(const Law& law, Drawn& drawn, int64_t i, double down, double across, bool clip) {
  const double lam = drawn.rule[i] == Rule::kResizeMix ? law.low + (law.high - law.low) * drawn.lam[i] : drawn.lam[i];
  const double ratio = std::sqrt(std::max(1.0 - lam, 0.0));
  const double extents[2] = {law.height, law.width}, numbers[2] = {down, across};
  for (int axis = 0; axis < 2; ++axis) {
    const double extent = extents[axis];
    double cut = std::floor(extent * ratio), start;
    if (clip) {
      const double centre = std::min(std::floor(numbers[axis] * extent), extent - 1.0);
      start = std::clamp(centre - std::floor(cut / 2.0), 0.0, extent);
      cut = std::clamp(centre + std::floor((cut + 1.0) / 2.0), 0.0, extent) - start;
    } else {
      const double room = extent - cut;
      start = std::min(std::floor(numbers[axis] * (room + 1.0)), room);
    }
    drawn.box[4 * i + axis] = static_cast<int32_t>(start);
    drawn.box[4 * i + 2 + axis] = static_cast<int32_t>(cut);
  }
}

// `draw_plan`: all rows of all ranks. The boxes of every view have a stream of their own.
inline Drawn draw_rows(const Law& law, int64_t rows, uint64_t seed, uint64_t step, uint64_t view) {
  Drawn drawn(rows);
  Stream stream(seed, step, 0, 0);
  if (law.one_rule != 0.0) {
    std::fill(drawn.rule.begin(), drawn.rule.end(), law.pick(stream.next()));
  } else {
    for (Rule& rule : drawn.rule) rule = law.pick(stream.next());
  }
  const std::vector<double> mixed = uniform(stream, rows);
  const auto lam = [&](int64_t i) { return stream.beta(law.alpha[static_cast<int>(drawn.rule[i])]); };
  if (law.one_lam != 0.0) {
    if (rows > 0) std::fill(drawn.lam.begin(), drawn.lam.end(), lam(0));
  } else {
    for (int64_t i = 0; i < rows; ++i) drawn.lam[i] = lam(i);
  }
  bool boxed = false;
  for (int64_t i = 0; i < rows; ++i) {
    if (mixed[i] >= law.prob) drawn.rule[i] = Rule::kKeep;
    boxed = boxed || drawn.boxed(i);
  }
  if (!boxed) return drawn;
  Stream places(seed, step, view + 1, 0);
  const std::vector<double> numbers = uniform(places, 2 * rows);
  for (int64_t i = 0; i < rows; ++i) {
    if (drawn.boxed(i)) place_box(law, drawn, i, numbers[i], numbers[rows + i], law.clip != 0.0);
  }
  return drawn;
}

// The drop-in for timm's Mixup: `units` draws, of which each row takes one. CutMix has clipped boxes, ResizeMix inner
// ones, from numbers of their own.
inline Drawn draw_units(const Law& law, int64_t units, uint64_t seed, uint64_t step, uint64_t salt) {
  Drawn drawn(units);
  Stream stream(seed, step, salt, 1);
  const std::vector<double> mixed = uniform(stream, units);
  for (Rule& rule : drawn.rule) rule = law.pick(stream.next());
  for (int64_t i = 0; i < units; ++i) drawn.lam[i] = stream.beta(law.alpha[static_cast<int>(drawn.rule[i])]);
  bool cut = false;
  for (int64_t i = 0; i < units; ++i) {
    if (mixed[i] >= law.prob) drawn.rule[i] = Rule::kKeep;
    cut = cut || drawn.rule[i] == Rule::kCutMix;
  }
  const std::vector<double> inner = uniform(stream, 2 * units);
  const std::vector<double> clipped = cut ? uniform(stream, 2 * units) : std::vector<double>();
  for (int64_t i = 0; i < units; ++i) {
    if (!drawn.boxed(i)) continue;
    const bool clip = drawn.rule[i] == Rule::kCutMix;
    const std::vector<double>& numbers = clip ? clipped : inner;
    place_box(law, drawn, i, numbers[i], numbers[units + i], clip);
  }
  return drawn;
}

// The share of a row's own pixels, counted from its box.
inline float counted_lam(const Law& law, const Drawn& drawn, int64_t i) {
  if (drawn.rule[i] == Rule::kKeep) return 1.0f;
  if (!drawn.boxed(i)) return static_cast<float>(drawn.lam[i]);
  const double area = static_cast<double>(drawn.box[4 * i + 2]) * static_cast<double>(drawn.box[4 * i + 3]);
  return static_cast<float>(1.0 - area / (law.height * law.width));
}

}  // namespace sdmp
