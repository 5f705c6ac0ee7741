// `augment` on the CPU: one image at a time, which stays in cache from the crop to the last byte of its view.
//
// A view is held as float32 planes. Each of its rows is made by a vertical pass over the crop's rows (along memory,
// whatever the layout), then a horizontal pass; colours follow in the same sweep where nothing has to be known of the
// whole view first. Compiled once per instruction set, whose name is SDMP_ISA.
#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <vector>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "augment_cpu.h"

namespace sdmp::SDMP_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float Floats __attribute__((vector_size(4 * kLanes)));
typedef int32_t Ints __attribute__((vector_size(4 * kLanes)));
typedef float Pixel __attribute__((vector_size(16)));  // up to four channels of one pixel

// ITU-R 601, as Pillow and torchvision.
constexpr float kRed = 0.299f, kGreen = 0.587f, kBlue = 0.114f;
constexpr float kTop = 255.0f;
// Added to a number of at most 2^22, it leaves that number rounded to nearest, ties to even, in the lowest bits.
constexpr float kRounder = 12582912.0f;

inline Floats load(const float* from) {
  Floats v;
  std::memcpy(&v, from, sizeof v);
  return v;
}
inline void store(float* to, Floats v) { std::memcpy(to, &v, sizeof v); }
inline Floats load_bytes(const uint8_t* from) {
  // The compiler spells a conversion of so short vectors of bytes element by element.
#if defined(__AVX512F__)
  return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
#elif defined(__AVX2__)
  return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from))));
#else
  return Floats{float(from[0]), float(from[1]), float(from[2]), float(from[3])};
#endif
}
inline Floats all(float value) { return Floats{} + value; }
inline Floats lesser(Floats a, Floats b) { return a < b ? a : b; }
inline Floats greater(Floats a, Floats b) { return a > b ? a : b; }
inline Floats clamped(Floats v) { return lesser(greater(v, all(0.0f)), all(kTop)); }
inline Floats luma(Floats r, Floats g, Floats b) { return r * kRed + g * kGreen + b * kBlue; }

inline int64_t padded(int64_t count) { return (count + 15) / 16 * 16; }

// What one output sample takes of the samples of an axis: `taps` weights from `first[i]` on, zeros where there are fewer.
struct Axis {
  int64_t taps = 0;
  std::vector<int64_t> first;
  std::vector<float> weights;  // (out, taps)

  const float* of(int64_t i) const { return weights.data() + i * taps; }
};

double filter(double x, bool cubic) {
  x = std::abs(x);
  if (!cubic) return x < 1 ? 1 - x : 0;
  constexpr double a = -0.5;
  if (x < 1) return ((a + 2) * x - (a + 3)) * x * x + 1;
  return x < 2 ? (((x - 5) * x + 8) * x - 4) * a : 0;
}

// The antialiased filter of torch.nn.functional.interpolate: `out` samples over [start, start + length) of an axis
// whose samples [low, high) may be read.
void make_axis(Axis& axis, double start, double length, int64_t out, int64_t low, int64_t high, bool cubic,
               bool mirrored) {
  const double scale = length / static_cast<double>(out);
  const double stretch = std::max(scale, 1.0), support = (cubic ? 2.0 : 1.0) * stretch;
  axis.first.resize(out);
  axis.taps = std::min<int64_t>(2 * static_cast<int64_t>(std::ceil(support)) + 1, high - low);
  axis.weights.assign(out * axis.taps, 0.0f);
  std::vector<double> exact(axis.taps);
  for (int64_t i = 0; i < out; ++i) {
    const double centre = start + scale * (static_cast<double>(i) + 0.5);
    int64_t first = std::max(static_cast<int64_t>(centre - support + 0.5), low);
    first = std::min(first, high - 1);
    const int64_t last = std::max(std::min(static_cast<int64_t>(centre + support + 0.5), high), first + 1);
    const int64_t count = std::min(last - first, axis.taps);
    double sum = 0;
    for (int64_t k = 0; k < count; ++k) {
      exact[k] = filter((static_cast<double>(first + k) - centre + 0.5) / stretch, cubic);
      sum += exact[k];
    }
    const int64_t at = mirrored ? out - 1 - i : i;
    axis.first[at] = first;
    for (int64_t k = 0; k < count; ++k) {
      axis.weights[at * axis.taps + k] = static_cast<float>(sum != 0 ? exact[k] / sum : 1.0 / count);
    }
  }
}

// sums[j] = the weighted sum of `taps` rows of bytes at j, for j in [0, count); `sums` has room for a vector more.
void blend_rows(float* sums, const uint8_t* const* rows, const float* weights, int64_t taps, int64_t count) {
  int64_t j = 0;
  for (; j + 2 * kLanes <= count; j += 2 * kLanes) {
    Floats left = load_bytes(rows[0] + j) * weights[0], right = load_bytes(rows[0] + j + kLanes) * weights[0];
    for (int64_t k = 1; k < taps; ++k) {
      left += load_bytes(rows[k] + j) * weights[k];
      right += load_bytes(rows[k] + j + kLanes) * weights[k];
    }
    store(sums + j, left);
    store(sums + j + kLanes, right);
  }
  for (; j < count; ++j) {
    float sum = static_cast<float>(rows[0][j]) * weights[0];
    for (int64_t k = 1; k < taps; ++k) sum += static_cast<float>(rows[k][j]) * weights[k];
    sums[j] = sum;
  }
}

inline Pixel filter_pixel(const float* at, const float* weights, int64_t taps) {
  Pixel sum = {};
  for (int64_t k = 0; k < taps; ++k) {
    Pixel pixel;
    std::memcpy(&pixel, at + 3 * k, sizeof pixel);
    sum += pixel * weights[k];
  }
  return sum;
}

typedef int32_t Four __attribute__((vector_size(16)));
inline Pixel shuffled(Pixel a, Pixel b, Four places) { return __builtin_shuffle(a, b, places); }
inline void store_pixel(float* to, Pixel pixel) { std::memcpy(to, &pixel, sizeof pixel); }

// Pixels of three interleaved channels, filtered along the row into three planes; reads one float past the last tap.
void filter_row_rgb(const float* row, int64_t left, const Axis& axis, int64_t out, float* const* planes) {
  const int64_t taps = axis.taps;
  int64_t x = 0;
  for (; x + 4 <= out; x += 4) {
    const float* at = row - 3 * left;
    const int64_t* first = axis.first.data() + x;
    const float* weights = axis.of(x);
    const Pixel p = filter_pixel(at + 3 * first[0], weights, taps);
    const Pixel q = filter_pixel(at + 3 * first[1], weights + taps, taps);
    const Pixel r = filter_pixel(at + 3 * first[2], weights + 2 * taps, taps);
    const Pixel s = filter_pixel(at + 3 * first[3], weights + 3 * taps, taps);
    const Pixel low = shuffled(p, q, Four{0, 4, 1, 5}), high = shuffled(r, s, Four{0, 4, 1, 5});
    store_pixel(planes[0] + x, shuffled(low, high, Four{0, 1, 4, 5}));
    store_pixel(planes[1] + x, shuffled(low, high, Four{2, 3, 6, 7}));
    store_pixel(planes[2] + x, shuffled(shuffled(p, q, Four{2, 6, 2, 6}), shuffled(r, s, Four{2, 6, 2, 6}), Four{0, 1, 4, 5}));
  }
  for (; x < out; ++x) {
    const float* at = row + 3 * (axis.first[x] - left);
    for (int c = 0; c < 3; ++c) {
      float sum = 0;
      for (int64_t k = 0; k < taps; ++k) sum += at[3 * k + c] * axis.of(x)[k];
      planes[c][x] = sum;
    }
  }
}

void filter_row(const float* row, int64_t left, int64_t channels, const Axis& axis, int64_t out,
                float* const* planes) {
  if (channels == 3) return filter_row_rgb(row, left, axis, out, planes);
  for (int64_t x = 0; x < out; ++x) {
    const float* at = row + channels * (axis.first[x] - left);
    const float* weights = axis.of(x);
    for (int64_t c = 0; c < channels; ++c) {
      float sum = at[c] * weights[0];
      for (int64_t k = 1; k < axis.taps; ++k) sum += at[channels * k + c] * weights[k];
      planes[c][x] = sum;
    }
  }
}

// hue: turns, within [-1, 1]. Through hue, chroma and value of HSV; a grey pixel stays as it is.
inline void turn_hue(Floats& r, Floats& g, Floats& b, float turns) {
  const Floats value = greater(greater(r, g), b), chroma = value - lesser(lesser(r, g), b);
  const Floats divisor = chroma == 0.0f ? all(1.0f) : chroma;
  Floats sixths = value == r ? (g - b) / divisor : value == g ? (b - r) / divisor + 2.0f : (r - g) / divisor + 4.0f;
  sixths += 6.0f * turns;
  for (int wrap = 0; wrap < 2; ++wrap) {
    sixths = sixths < 0.0f ? sixths + 6.0f : sixths;
    sixths = sixths >= 6.0f ? sixths - 6.0f : sixths;
  }
  const auto channel = [&](float phase) {
    Floats k = sixths + phase;
    k = k >= 6.0f ? k - 6.0f : k;
    return value - chroma * greater(lesser(lesser(k, 4.0f - k), all(1.0f)), all(0.0f));
  };
  r = channel(5.0f);
  g = channel(3.0f);
  b = channel(1.0f);
}

// The sum of a row's luma; of its channels' mean where there are not three of them.
double luma_sum(const float* const* planes, int64_t channels, int64_t width) {
  Floats sums = {};
  double sum = 0;
  const int64_t whole = width / kLanes * kLanes;
  if (channels == 3) {
    for (int64_t x = 0; x < whole; x += kLanes) sums += luma(load(planes[0] + x), load(planes[1] + x), load(planes[2] + x));
    for (int64_t x = whole; x < width; ++x) sum += planes[0][x] * kRed + planes[1][x] * kGreen + planes[2][x] * kBlue;
  } else {
    for (int64_t c = 0; c < channels; ++c) {
      for (int64_t x = 0; x < whole; x += kLanes) sums += load(planes[c] + x);
      for (int64_t x = whole; x < width; ++x) sum += planes[c][x];
    }
  }
  for (int lane = 0; lane < kLanes; ++lane) sum += sums[lane];
  return channels == 3 ? sum : sum / static_cast<double>(channels);
}

struct Colours {
  float contrast, mean, saturation, hue;
  bool gray;

  bool neutral() const { return contrast == 1.0f && saturation == 1.0f && hue == 0.0f && !gray; }
};

// Contrast, saturation, hue, grey: in this order, clamped after each. `count` is a multiple of kLanes.
void recolour(float* const* planes, int64_t channels, int64_t count, const Colours& colours) {
  const bool contrast = colours.contrast != 1.0f;
  const float pull = colours.mean * (1.0f - colours.contrast);
  if (channels != 3) {
    for (int64_t c = 0; contrast && c < channels; ++c) {
      for (int64_t x = 0; x < count; x += kLanes) {
        store(planes[c] + x, clamped(load(planes[c] + x) * colours.contrast + pull));
      }
    }
    return;
  }
  for (int64_t x = 0; x < count; x += kLanes) {
    Floats r = load(planes[0] + x), g = load(planes[1] + x), b = load(planes[2] + x);
    if (contrast) {
      r = clamped(r * colours.contrast + pull);
      g = clamped(g * colours.contrast + pull);
      b = clamped(b * colours.contrast + pull);
    }
    if (colours.saturation != 1.0f) {
      const Floats grey = luma(r, g, b) * (1.0f - colours.saturation);
      r = clamped(r * colours.saturation + grey);
      g = clamped(g * colours.saturation + grey);
      b = clamped(b * colours.saturation + grey);
    }
    if (colours.hue != 0.0f) turn_hue(r, g, b, colours.hue);
    if (colours.gray) r = g = b = luma(r, g, b);
    store(planes[0] + x, r);
    store(planes[1] + x, g);
    store(planes[2] + x, b);
  }
}

// The place within [0, size) that `i` stands for where edges are reflected without being repeated, again and again.
int64_t reflected(int64_t i, int64_t size) {
  if (size == 1) return 0;
  const int64_t period = 2 * (size - 1);
  i = ((i % period) + period) % period;
  return i < size ? i : period - i;
}

// half[k]: the weight at distance k, for k in [0, radius].
void blur_row(float* row, int64_t width, const std::vector<float>& half, float* extended) {
  const int64_t radius = static_cast<int64_t>(half.size()) - 1;
  for (int64_t k = 1; k <= radius; ++k) {
    extended[radius - k] = row[reflected(-k, width)];
    extended[radius + width - 1 + k] = row[reflected(width - 1 + k, width)];
  }
  std::memcpy(extended + radius, row, sizeof(float) * width);
  const float* centre = extended + radius;
  for (int64_t x = 0; x < width; x += kLanes) {
    Floats sum = load(centre + x) * half[0];
    for (int64_t k = 1; k <= radius; ++k) sum += (load(centre + x - k) + load(centre + x + k)) * half[k];
    store(row + x, sum);
  }
}

void blur_column(const float* plane, int64_t stride, int64_t height, int64_t width, int64_t y,
                 const std::vector<float>& half, float* sums) {
  const int64_t radius = static_cast<int64_t>(half.size()) - 1;
  for (int64_t x = 0; x < width; x += kLanes) store(sums + x, load(plane + y * stride + x) * half[0]);
  for (int64_t k = 1; k <= radius; ++k) {
    const float* above = plane + reflected(y - k, height) * stride;
    const float* below = plane + reflected(y + k, height) * stride;
    for (int64_t x = 0; x < width; x += kLanes) {
      store(sums + x, load(sums + x) + (load(above + x) + load(below + x)) * half[k]);
    }
  }
}

// Round, solarise, and put one row's channels side by side.
void write_row(const float* const* planes, int64_t channels, int64_t width, bool solarize, uint8_t* out) {
  const auto whole = [&](const float* from) {
    const Floats rounded = load(from) + kRounder;
    Ints value;
    std::memcpy(&value, &rounded, sizeof value);
    value &= 255;
    return solarize ? (value >= 128 ? 255 - value : value) : value;
  };
  int32_t lanes[kLanes];
  if (channels == 3) {
    for (int64_t x = 0; x < width; x += kLanes) {
      const Ints pixels = whole(planes[0] + x) | whole(planes[1] + x) << 8 | whole(planes[2] + x) << 16;
      std::memcpy(lanes, &pixels, sizeof lanes);
      const int64_t count = std::min<int64_t>(kLanes, width - x);
      // Four bytes at a time, of which the next pixel overwrites the last; after a row's last pixel nothing may go.
      for (int64_t i = 0; i < count - 1; ++i) std::memcpy(out + 3 * (x + i), lanes + i, 4);
      std::memcpy(out + 3 * (x + count - 1), lanes + count - 1, 3);
    }
    return;
  }
  for (int64_t c = 0; c < channels; ++c) {
    for (int64_t x = 0; x < width; x += kLanes) {
      const Ints values = whole(planes[c] + x);
      std::memcpy(lanes, &values, sizeof lanes);
      const int64_t count = std::min<int64_t>(kLanes, width - x);
      for (int64_t i = 0; i < count; ++i) out[channels * (x + i) + c] = static_cast<uint8_t>(lanes[i]);
    }
  }
}

struct Crop {
  double top, left, height, width;
  bool whole;  // cut out before it is resized
};

// Memory that one thread reuses from view to view.
struct Workshop {
  int64_t channels, height, width, stride;  // of a view; floats from one row of a plane to the next
  std::vector<float> planes;                // (channels, height, stride)
  std::vector<float> blended;               // one row of the crop after the vertical pass
  std::vector<float> blurred;               // (channels, stride)
  std::vector<float> extended;
  std::vector<float> half;                  // a blur's weights by distance
  std::vector<float> weights;               // those of a row's vertical taps that are not zero
  std::vector<uint8_t> copied;              // the crop, where its channels lie in no usual way
  std::vector<const uint8_t*> rows;
  std::vector<float*> at;
  Axis vertical, horizontal;

  Workshop(int64_t channels, int64_t height, int64_t width)
      : channels(channels), height(height), width(width), stride(padded(width)),
        planes(channels * height * stride), blurred(channels * stride), at(channels) {}

  float* row(int64_t c, int64_t y) { return planes.data() + (c * height + y) * stride; }
  float* const* rows_at(int64_t y) {
    for (int64_t c = 0; c < channels; ++c) at[c] = row(c, y);
    return at.data();
  }
};

// The rows that the crop's filters read, channels side by side: `picture` itself, or a copy of that part.
Picture interleaved(Workshop& shop, const Picture& picture, int64_t channels, int64_t top, int64_t bottom,
                    int64_t left, int64_t right) {
  if (picture.column == channels && (picture.channel == 1 || channels == 1)) return picture;
  const int64_t height = bottom - top, width = right - left;
  shop.copied.resize(height * width * channels);
  for (int64_t y = 0; y < height; ++y) {
    for (int64_t c = 0; c < channels; ++c) {
      const uint8_t* from = picture.data + (top + y) * picture.row + left * picture.column + c * picture.channel;
      uint8_t* to = shop.copied.data() + y * width * channels + c;
      for (int64_t x = 0; x < width; ++x) to[x * channels] = from[x * picture.column];
    }
  }
  const int64_t row = width * channels;
  return {shop.copied.data() - top * row - left * channels, picture.height, picture.width, 1, row, channels};
}

struct Stretch {
  int64_t begin, end;
};

Stretch stretch_of(const Axis& axis) {
  const auto [least, most] = std::minmax_element(axis.first.begin(), axis.first.end());
  return {*least, *most + axis.taps};
}

// Crop, resize, flip, brightness. Returns the mean luma, where `measure` asks for it.
template <class AfterRow>
double make_rows(Workshop& shop, const Picture& source, const Crop& crop, bool cubic, bool flip, float brightness,
                 bool measure, AfterRow after_row) {
  const int64_t channels = shop.channels;
  const auto whole = [](double value) { return static_cast<int64_t>(value); };
  const int64_t low_y = crop.whole ? whole(crop.top) : 0;
  const int64_t high_y = crop.whole ? whole(crop.top + crop.height) : source.height;
  const int64_t low_x = crop.whole ? whole(crop.left) : 0;
  const int64_t high_x = crop.whole ? whole(crop.left + crop.width) : source.width;
  make_axis(shop.vertical, crop.top, crop.height, shop.height, low_y, high_y, cubic, false);
  make_axis(shop.horizontal, crop.left, crop.width, shop.width, low_x, high_x, cubic, flip);
  Stretch down = stretch_of(shop.vertical), across = stretch_of(shop.horizontal);
  down.end = std::min(down.end, high_y);
  const int64_t readable = std::min(across.end, high_x) - across.begin;
  const Picture picture = interleaved(shop, source, channels, down.begin, down.end, across.begin,
                                      across.begin + readable);
  // Taps of weight zero may lie past the crop, and a pixel of three channels is read as four: zeros are there.
  shop.blended.assign(padded((across.end - across.begin) * channels + 16), 0.0f);
  shop.rows.resize(shop.vertical.taps);
  shop.weights.resize(shop.vertical.taps);
  double sum = 0;
  for (int64_t y = 0; y < shop.height; ++y) {
    int64_t taps = 0;
    for (int64_t k = 0; k < shop.vertical.taps; ++k) {
      const float weight = shop.vertical.of(y)[k];
      if (weight == 0.0f && k > 0) continue;
      shop.rows[taps] = picture.data + (shop.vertical.first[y] + k) * picture.row + across.begin * channels;
      shop.weights[taps++] = weight;
    }
    blend_rows(shop.blended.data(), shop.rows.data(), shop.weights.data(), taps, readable * channels);
    float* const* planes = shop.rows_at(y);
    filter_row(shop.blended.data(), across.begin, channels, shop.horizontal, shop.width, planes);
    if (cubic || brightness != 1.0f) {
      for (int64_t c = 0; c < channels; ++c) {
        for (int64_t x = 0; x < shop.stride; x += kLanes) {
          Floats v = load(planes[c] + x);
          if (cubic) v = clamped(v);
          store(planes[c] + x, brightness != 1.0f ? clamped(v * brightness) : v);
        }
      }
    }
    if (measure) sum += luma_sum(planes, channels, shop.width);
    after_row(planes, y);
  }
  return sum / static_cast<double>(shop.height * shop.width);
}

void make_view(const AugmentJob& job, int64_t i, Workshop& shop) {
  const Crop crop = job.box != nullptr
                        ? Crop{double(job.box[4 * i]), double(job.box[4 * i + 1]), double(job.box[4 * i + 2]),
                               double(job.box[4 * i + 3]), true}
                        : Crop{job.fractional_box[4 * i], job.fractional_box[4 * i + 1],
                               job.fractional_box[4 * i + 2], job.fractional_box[4 * i + 3], false};
  Colours colours{job.contrast[i], 0.0f, job.saturation[i], job.hue[i], job.gray[i] != 0};
  const float sigma = job.sigma[i];
  const bool solarize = job.solarize[i] != 0, blurs = sigma > 0, waits = colours.contrast != 1.0f;
  uint8_t* out = job.out + i * job.out_image;
  const int64_t row_bytes = shop.width * shop.channels;

  const auto write = [&](const float* const* planes, int64_t y) {
    write_row(planes, shop.channels, shop.width, solarize, out + y * row_bytes);
  };
  const auto finish_row = [&](float* const* planes, int64_t y) {
    if (!colours.neutral()) recolour(planes, shop.channels, shop.stride, colours);
    if (!blurs) write(planes, y);
  };
  const double mean = make_rows(shop, job.pictures[i], crop, job.cubic, job.flip[i] != 0, job.brightness[i], waits,
                                [&](float* const* planes, int64_t y) {
                                  if (!waits) finish_row(planes, y);
                                });
  if (waits) {
    colours.mean = static_cast<float>(mean);
    for (int64_t y = 0; y < shop.height; ++y) finish_row(shop.rows_at(y), y);
  }
  if (!blurs) return;

  const int64_t radius = static_cast<int64_t>(std::ceil(3.0 * sigma));
  std::vector<double> exact(radius + 1);
  double total = 0;
  for (int64_t k = 0; k <= radius; ++k) {
    exact[k] = std::exp(-static_cast<double>(k * k) / (2.0 * sigma * sigma));
    total += (k == 0 ? 1 : 2) * exact[k];
  }
  shop.half.resize(radius + 1);
  for (int64_t k = 0; k <= radius; ++k) shop.half[k] = static_cast<float>(exact[k] / total);
  // A grey image is blurred once for all its channels.
  const int64_t distinct = colours.gray && shop.channels == 3 ? 1 : shop.channels;
  shop.extended.resize(padded(shop.width) + 2 * radius + 16);
  for (int64_t c = 0; c < distinct; ++c) {
    for (int64_t y = 0; y < shop.height; ++y) blur_row(shop.row(c, y), shop.width, shop.half, shop.extended.data());
  }
  for (int64_t y = 0; y < shop.height; ++y) {
    for (int64_t c = 0; c < shop.channels; ++c) {
      float* sums = shop.blurred.data() + (c < distinct ? c : 0) * shop.stride;
      if (c < distinct) blur_column(shop.row(c, 0), shop.stride, shop.height, shop.width, y, shop.half, sums);
      shop.at[c] = sums;
    }
    write(shop.at.data(), y);
  }
}

}  // namespace

void augment(const AugmentJob& job, int64_t begin, int64_t end) {
  Workshop shop(job.channels, job.height, job.width);
  for (int64_t i = begin; i < end; ++i) make_view(job, i, shop);
}

}  // namespace sdmp::SDMP_ISA
