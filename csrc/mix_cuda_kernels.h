// The CUDA kernels of `mix` and the choice between them. No torch and no launch syntax in here: mix_cuda.cu launches, and
// the tests compile this file with a C++ compiler and run the same kernels, thread by thread, on the CPU.
//
// Two kernels for each direction. The vector kernel serves dense images: a thread owns vectors of 16 bytes of every
// result (forward: three, where an image has three planes one of each), so that all stores are 128-bit and coalesced,
// and of both images of a mirrored pair. It asks for all that it reads before it looks at the plan. What is resized, it
// computes element by element, neighbouring threads on neighbouring elements. The scalar kernel serves the rest.
#pragma once

#include "mix.h"
#include "mix_cuda.h"

namespace sdmp {
namespace SDMP_ISA {

constexpr int kThreads = 256;
constexpr int kVectors = 3;  // of a thread of the forward kernel

// ---- 16 bytes at a time, kept in registers as words ----

template <int kBytes>
struct Words {
  uint32_t word[kBytes / 4];
};

struct alignas(8) Two {
  uint32_t x, y;
};

struct alignas(16) Four {
  uint32_t x, y, z, w;
};

template <int kBytes>
__device__ __forceinline__ Words<kBytes> load_words(const char* from) {
  Words<kBytes> words;
  if constexpr (kBytes == 4) {
    words.word[0] = *reinterpret_cast<const uint32_t*>(from);
  } else if constexpr (kBytes == 8) {
    const Two two = *reinterpret_cast<const Two*>(from);
    words.word[0] = two.x;
    words.word[1] = two.y;
  } else {
#pragma unroll
    for (int k = 0; k < kBytes / 16; ++k) {
      const Four four = reinterpret_cast<const Four*>(from)[k];
      words.word[4 * k] = four.x;
      words.word[4 * k + 1] = four.y;
      words.word[4 * k + 2] = four.z;
      words.word[4 * k + 3] = four.w;
    }
  }
  return words;
}

__device__ __forceinline__ void store_words(char* to, const Words<16>& words) {
  *reinterpret_cast<Four*>(to) = Four{words.word[0], words.word[1], words.word[2], words.word[3]};
}

// The k-th stored value of some words, as its bits.
template <class T, int kBytes>
__device__ __forceinline__ uint32_t get(const Words<kBytes>& words, int k) {
  if constexpr (sizeof(T) == 4) return words.word[k];
  if constexpr (sizeof(T) == 2) return words.word[k / 2] >> (16 * (k % 2)) & 0xffffu;
  return words.word[k / 4] >> (8 * (k % 4)) & 0xffu;
}

template <class T>
__device__ __forceinline__ void put(Words<16>& words, int k, uint32_t bits) {
  constexpr int kPer = 4 / sizeof(T), kShift = 8 * sizeof(T);
  if (k % kPer == 0) words.word[k / kPer] = 0;
  words.word[k / kPer] |= kPer == 1 ? bits : bits << (kShift * (k % kPer));
}

__device__ __forceinline__ float decode(float, uint32_t bits) { return from_bits(bits); }
__device__ __forceinline__ float decode(uint8_t, uint32_t bits) { return load(static_cast<uint8_t>(bits)); }
__device__ __forceinline__ float decode(Half, uint32_t bits) { return load(Half{static_cast<uint16_t>(bits)}); }
__device__ __forceinline__ float decode(Bf16, uint32_t bits) { return load(Bf16{static_cast<uint16_t>(bits)}); }

__device__ __forceinline__ uint32_t encode(float, float value) { return bits_of(value); }
__device__ __forceinline__ uint32_t encode(uint8_t out, float value) {
  store(value, out);
  return out;
}
__device__ __forceinline__ uint32_t encode(Half out, float value) {
  store(value, out);
  return out.bits;
}
__device__ __forceinline__ uint32_t encode(Bf16 out, float value) {
  store(value, out);
  return out.bits;
}

template <class In, class Out>
__device__ __forceinline__ constexpr bool same_type(In, Out) {
  return false;
}

template <class T>
__device__ __forceinline__ constexpr bool same_type(T, T) {
  return true;
}

// One stored value of a tensor whose type is known at run time only.
__device__ __forceinline__ uint32_t read_bits(Type type, const char* data, int64_t offset) {
  if (type == Type::kFloat) return reinterpret_cast<const uint32_t*>(data)[offset];
  if (type == Type::kUint8) return reinterpret_cast<const uint8_t*>(data)[offset];
  return reinterpret_cast<const uint16_t*>(data)[offset];
}

__device__ __forceinline__ void write_bits(Type type, char* data, int64_t offset, uint32_t bits) {
  if (type == Type::kFloat) {
    reinterpret_cast<uint32_t*>(data)[offset] = bits;
  } else if (type == Type::kUint8) {
    reinterpret_cast<uint8_t*>(data)[offset] = static_cast<uint8_t>(bits);
  } else {
    reinterpret_cast<uint16_t*>(data)[offset] = static_cast<uint16_t>(bits);
  }
}

__device__ __forceinline__ float decode(Type type, uint32_t bits) {
  return type == Type::kFloat   ? decode(float{}, bits)
         : type == Type::kUint8 ? decode(uint8_t{}, bits)
         : type == Type::kHalf  ? decode(Half{}, bits)
                                : decode(Bf16{}, bits);
}

__device__ __forceinline__ uint32_t encode(Type type, float value) {
  return type == Type::kFloat   ? encode(float{}, value)
         : type == Type::kUint8 ? encode(uint8_t{}, value)
         : type == Type::kHalf  ? encode(Half{}, value)
                                : encode(Bf16{}, value);
}

// ---- where an element is ----

struct Spot {
  int32_t c, y, x;
};

template <class Integer, class Job>
__device__ __forceinline__ Spot divide_spot(const Job& job, Integer rest) {
  Spot spot;
  if (job.interleaved) {
    spot.c = static_cast<int32_t>(rest % job.channels);
    rest /= job.channels;
  }
  spot.x = static_cast<int32_t>(rest % job.width);
  rest /= job.width;
  spot.y = static_cast<int32_t>(rest % job.height);
  if (!job.interleaved) spot.c = static_cast<int32_t>(rest / job.height);
  return spot;
}

// Elements of an image are counted in the order of its memory: channels first or last.
template <class Job>
__device__ __forceinline__ Spot spot_of(const Job& job, int64_t element) {
  if (element < INT32_MAX) return divide_spot(job, static_cast<uint32_t>(element));  // much the faster division
  return divide_spot(job, element);
}

__device__ __forceinline__ bool inside(const Row& row, const Spot& spot) {
  return spot.y >= row.top && spot.y < row.bottom && spot.x >= row.left && spot.x < row.right;
}

__device__ __forceinline__ int64_t offset_of(const View& view, int64_t n, int32_t c, int32_t y, int32_t x) {
  return n * view.n + c * view.c + y * view.h + x * view.w;
}

template <class Job>
__device__ __forceinline__ int64_t partner_of(const Job& job, int64_t row) {
  if (job.plan.mirrored) return job.n - 1 - row;
  const int64_t partner = job.plan.partner[row];  // clamped: a wrong number must not read out of bounds
  return partner < 0 ? 0 : partner < job.partner_rows ? partner : job.partner_rows - 1;
}

template <class Job>
__device__ __forceinline__ Row row_of(const Job& job, int64_t row, int64_t partner) {
  return read_row(job.plan.rule[row], job.plan.lam[row], job.plan.box + 4 * row, job.height, job.width,
                  job.own_partners && partner == row);
}

// A row as it is before its scales, which RESIZEMIX alone needs.
template <class Job>
__device__ __forceinline__ Row unscaled_row_of(const Job& job, int64_t row, int64_t partner) {
  return read_row_unscaled(job.plan.rule[row], job.plan.lam[row], job.plan.box + 4 * row, job.height, job.width,
                           job.own_partners && partner == row);
}

// ---- forward ----

// A pixel of the box looks at four pixels of the partner's image: where they are, and what they weigh.
struct Taps {
  int64_t at[4];  // upper left, lower left, upper right, lower right
  float upper, lower, left, right;
};

__device__ __forceinline__ Taps taps_of(const GpuMix& job, const Row& row, const Spot& spot, int64_t partner) {
  const Tap y = resize_tap(spot.y - row.top, row.bottom - row.top, job.height, row.scale_y);
  const Tap x = resize_tap(spot.x - row.left, row.right - row.left, job.width, row.scale_x);
  const int64_t at = offset_of(job.partners, partner, spot.c, y.first, x.first);
  const int64_t down = y.step * job.partners.h, right = x.step * job.partners.w;
  return Taps{{at, at + down, at + right, at + down + right}, y.w0, y.w1, x.w0, x.w1};
}

// Its rows blended first and then its columns; read(k) is the k-th of the four.
template <class Read>
__device__ __forceinline__ float blend_taps(const Taps& taps, Read read) {
  const float left = blend(read(0), taps.upper, read(1), taps.lower);
  const float right = blend(read(2), taps.upper, read(3), taps.lower);
  return blend(left, taps.left, right, taps.right);
}

// The constants of a vector's elements: element k has those of k % 3. All three are one channel's but for three
// interleaved channels.
struct Scales {
  float centre[3], scale[3];
};

template <class Job>
__device__ __forceinline__ Scales scales_of(const Job& job, int32_t c) {
  Scales scales = {};
  if (!job.scaled) return scales;
#pragma unroll
  for (int k = 0; k < 3; ++k) {
    const int32_t channel = job.interleaved ? (c + k) % 3 : c;
    scales.centre[k] = job.constants.centre[channel];
    scales.scale[k] = job.constants.scale[channel];
  }
  return scales;
}

// What a row of the plan means for one vector, which lies in one row of pixels.
struct Part {
  Rule rule;
  uint32_t mask;  // one bit for every element that is in the box
  float own, other;
};

template <class Job>
__device__ __forceinline__ uint32_t mask_of(const Job& job, const Row& row, const Spot& spot, int elements) {
  if (!row.boxed() || spot.y < row.top || spot.y >= row.bottom) return 0;
  const int32_t group = job.interleaved ? job.channels : 1;
  const int32_t x = spot.x * group + (job.interleaved ? spot.c : 0);
  const auto bits_below = [x, elements](int32_t end) {
    const int32_t count = end - x < elements ? end - x : elements;
    return count <= 0 ? 0u : (1u << count) - 1u;
  };
  return bits_below(row.right * group) & ~bits_below(row.left * group);
}

template <class Job>
__device__ __forceinline__ Part part_of(const Job& job, int64_t index, int64_t partner, const Spot& spot,
                                        int elements) {
  const Row row = row_of(job, index, partner);
  return Part{row.rule, mask_of(job, row, spot, elements), row.own, row.other};
}

template <class In, class Out, class Job>
__device__ __forceinline__ uint32_t finish(const Job& job, float value, float centre, float scale) {
  return encode(Out{}, job.scaled ? normalise(value, centre, scale) : value);
}

// Where a vector lies: its row of pixels, its first element in that row, and that one's channel.
struct Place {
  int32_t y, begin, c;
};

// `element` counts within a plane where the job is planar, else within an image.
__device__ __forceinline__ Place place_of(const GpuMix& job, int32_t element) {
  const uint32_t length = static_cast<uint32_t>(job.width) * (job.interleaved ? job.channels : 1);
  const uint32_t at = static_cast<uint32_t>(element), row = at / length;
  Place place = {static_cast<int32_t>(row), static_cast<int32_t>(at - row * length), 0};
  if (job.interleaved) {
    if (job.scaled) place.c = place.begin % 3;  // `whole_vectors`
  } else if (!job.planar) {
    place.c = place.y / job.height;
    place.y -= place.c * job.height;
  }
  return place;
}

// One bit for every one of a vector's elements that is in the row's box.
__device__ __forceinline__ uint32_t bits_in_box(const GpuMix& job, const Row& row, const Place& place, int elements) {
  if (!row.boxed() || place.y < row.top || place.y >= row.bottom) return 0;
  const int32_t group = job.interleaved ? job.channels : 1;
  const auto bits_below = [&place, elements](int32_t end) {
    const int32_t count = end - place.begin < elements ? end - place.begin : elements;
    return count <= 0 ? 0u : (1u << count) - 1u;
  };
  return bits_below(row.right * group) & ~bits_below(row.left * group);
}

// The elements of `other` where the mask has a bit, and those of `own` elsewhere.
template <class In, int kBytes>
__device__ __forceinline__ Words<kBytes> pick(const Words<kBytes>& own, const Words<kBytes>& other, uint32_t mask) {
  constexpr int kPer = 4 / sizeof(In);
  constexpr uint32_t kAll = (1u << (kBytes / sizeof(In))) - 1u;
  if (mask == 0) return own;
  if (mask == kAll) return other;
  Words<kBytes> picked;
#pragma unroll
  for (int w = 0; w < kBytes / 4; ++w) {
    uint32_t bits = 0;
#pragma unroll
    for (int k = 0; k < kPer; ++k) {
      const uint32_t each = kPer == 1 ? 0xffffffffu : (1u << (32 / kPer)) - 1u;
      if (mask >> (w * kPer + k) & 1u) bits |= each << (32 / kPer * (kPer == 1 ? 0 : k));
    }
    picked.word[w] = (own.word[w] & ~bits) | (other.word[w] & bits);
  }
  return picked;
}

// Stored values as they go into a result: unchanged, converted, or normalised too.
template <class In, class Out, int kBytes>
__device__ __forceinline__ Words<16> converted(const GpuMix& job, const Words<kBytes>& pixels, const Scales& scales) {
  constexpr int kElements = 16 / sizeof(Out);
  Words<16> out = {};
  if (job.scaled) {
#pragma unroll
    for (int k = 0; k < kElements; ++k) {
      const float value = decode(In{}, get<In>(pixels, k));
      put<Out>(out, k, encode(Out{}, normalise(value, scales.centre[k % 3], scales.scale[k % 3])));
    }
  } else {
#pragma unroll
    for (int k = 0; k < kElements; ++k) {
      const uint32_t bits = get<In>(pixels, k);  // one type: unchanged, whatever NaN it is
      put<Out>(out, k, same_type(In{}, Out{}) ? bits : encode(Out{}, decode(In{}, bits)));
    }
  }
  return out;
}

template <class In, class Out, int kBytes>
__device__ __forceinline__ Words<16> blended(const GpuMix& job, const Row& row, const Words<kBytes>& own,
                                             const Words<kBytes>& other, const Scales& scales) {
  constexpr int kElements = 16 / sizeof(Out);
  Words<16> out = {};
  const auto value = [&](int k) {
    return blend(decode(In{}, get<In>(own, k)), row.own, decode(In{}, get<In>(other, k)), row.other);
  };
  if (job.scaled) {
#pragma unroll
    for (int k = 0; k < kElements; ++k) {
      put<Out>(out, k, encode(Out{}, normalise(value(k), scales.centre[k % 3], scales.scale[k % 3])));
    }
  } else {
#pragma unroll
    for (int k = 0; k < kElements; ++k) put<Out>(out, k, encode(Out{}, value(k)));
  }
  return out;
}

// Whether the vector that holds an element of this place meets the box: of a RESIZEMIX row, such vectors are made
// element by element.
template <int kElements>
__device__ __forceinline__ bool in_boxed_vector(const GpuMix& job, const Row& row, Place place) {
  place.begin -= place.begin % kElements;
  return bits_in_box(job, row, place, kElements) != 0;
}

// An element of a RESIZEMIX row whose vector meets the box, in one plane or at the same place of three.
template <class In, class Out, int kPlanes>
__device__ __forceinline__ void resize_element(const GpuMix& job, const Row& row, int64_t index, int64_t partner,
                                               int32_t element) {
  const Place place = place_of(job, element);
  if (!in_boxed_vector<16 / sizeof(Out)>(job, row, place)) return;
  Spot spot = {place.c, place.y, place.begin};
  if (job.interleaved) {
    spot.x = place.begin / job.channels;
    spot.c = place.begin - spot.x * job.channels;
  }
  const Type type = sizeof(In) == 4 ? Type::kFloat : sizeof(In) == 2 ? Type::kHalf : Type::kUint8;
  const Type out = sizeof(Out) == 4 ? Type::kFloat : sizeof(Out) == 2 ? Type::kHalf : Type::kUint8;
  uint32_t bits[kPlanes];
  const bool pasted = inside(row, spot);
  if (pasted) {
    const Taps taps = taps_of(job, row, spot, partner);
    uint32_t read[kPlanes][4];
#pragma unroll
    for (int p = 0; p < kPlanes; ++p) {
#pragma unroll
      for (int tap = 0; tap < 4; ++tap) {
        read[p][tap] = read_bits(type, job.partners.data, taps.at[tap] + p * job.partners.c);
      }
    }
#pragma unroll
    for (int p = 0; p < kPlanes; ++p) {
      const float value = blend_taps(taps, [&read, p](int tap) { return decode(In{}, read[p][tap]); });
      const int32_t channel = job.scaled ? spot.c + p : 0;
      bits[p] = finish<In, Out>(job, value, job.constants.centre[channel], job.constants.scale[channel]);
    }
  } else {
#pragma unroll
    for (int p = 0; p < kPlanes; ++p) {
      bits[p] = read_bits(type, job.images.data, index * job.images.n + p * job.images.c + element);
      const int32_t channel = job.scaled ? spot.c + p : 0;
      if (!job.copies) {
        bits[p] = finish<In, Out>(job, decode(In{}, bits[p]), job.constants.centre[channel],
                                  job.constants.scale[channel]);
      }
    }
  }
#pragma unroll
  for (int p = 0; p < kPlanes; ++p) {
    write_bits(out, job.mixed.data, index * job.mixed.n + p * job.mixed.c + element, bits[p]);
  }
}

template <class T>
__device__ __forceinline__ void exchange(T& a, T& b) {
  const T c = a;
  a = b;
  b = c;
}

// A thread's vectors of one image: its own pixels, those of its partner, and where it goes.
template <class In, class Out, int kBytes>
__device__ __forceinline__ void store_image(const GpuMix& job, const Row& row, int64_t index, const Words<kBytes>* own,
                                            const Words<kBytes>* other, int32_t element, int32_t stride,
                                            int32_t elements) {
  constexpr int kElements = 16 / sizeof(Out);
  char* mixed = job.mixed.data + index * job.mixed.n * sizeof(Out);
  char* clean = job.clean.data == nullptr ? nullptr : job.clean.data + index * job.clean.n * sizeof(Out);
  Place place = place_of(job, element);
  uint32_t mask = bits_in_box(job, row, place, kElements);
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    const int32_t at = element + v * stride;
    if (v > 0 && !job.planar) {
      if (at >= elements) return;
      place = place_of(job, at);
      mask = bits_in_box(job, row, place, kElements);
    }
    const Scales scales = scales_of(job, job.planar ? v : place.c);
    const int64_t bytes = static_cast<int64_t>(at) * sizeof(Out);
    if (clean != nullptr) store_words(clean + bytes, converted<In, Out>(job, own[v], scales));
    if (row.rule == Rule::kResizeMix && mask != 0) continue;
    store_words(mixed + bytes,
                row.rule == Rule::kMixup
                    ? blended<In, Out>(job, row, own[v], other[v], scales)
                    : converted<In, Out>(job, pick<In>(own[v], other[v], mask), scales));
  }
}

// What of a RESIZEMIX row meets its box, within the chunk of a block.
template <class In, class Out>
__device__ __forceinline__ void resize_chunk(const GpuMix& job, Row row, int64_t index, int64_t partner, int32_t chunk,
                                             int32_t elements) {
  constexpr int kElements = 16 / sizeof(Out);
  set_scales(row, job.height, job.width);
  const int32_t each = job.planar ? kElements : kVectors * kElements;
#pragma unroll 1
  for (int32_t k = 0; k < each; ++k) {
    const int32_t at = chunk + k * kThreads + static_cast<int32_t>(threadIdx.x);
    if (at >= elements) return;
    if (job.planar) {
      resize_element<In, Out, kVectors>(job, row, index, partner, at);
    } else {
      resize_element<In, Out, 1>(job, row, index, partner, at);
    }
  }
}

template <class In, class Out>
__global__ void __launch_bounds__(kThreads, sizeof(In) > sizeof(Out) || sizeof(Out) == 1 ? 2 : 3)
mix_vector_kernel(const __grid_constant__ GpuMix job) {
  constexpr int kElements = 16 / sizeof(Out);
  constexpr int kBytes = kElements * sizeof(In);
  constexpr int32_t kChunk = kThreads * kElements;
  const uint32_t blocks = static_cast<uint32_t>(job.chunks);  // per unit
  const int64_t unit = blockIdx.x / blocks;
  // Elements of a plane, or of an image; the vectors of a thread are in the planes, or a block's width apart.
  const int32_t elements = job.planar ? job.height * job.width : static_cast<int32_t>(job.elements);
  const int32_t stride = job.planar ? elements : kChunk;
  const int32_t chunk = static_cast<int32_t>(blockIdx.x % blocks) * (job.planar ? kChunk : kVectors * kChunk);
  const int32_t element = chunk + static_cast<int32_t>(threadIdx.x) * kElements;
  Words<kBytes> own[kVectors] = {}, other[kVectors] = {};
  const auto load_image = [&](Words<kBytes>* words, const View& view, int64_t index) {
    const char* image = view.data + index * view.n * sizeof(In);
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      const int32_t at = element + v * stride;
      if (job.planar ? element < elements : at < elements) {
        words[v] = load_words<kBytes>(image + static_cast<int64_t>(at) * sizeof(In));
      }
    }
  };
  // Loads first: of a mirrored pair both images are needed whatever the plan says.
  load_image(own, job.images, unit);
  const bool paired = job.pairs && job.n - 1 - unit != unit;
  if (paired) load_image(other, job.images, job.n - 1 - unit);
  const int64_t mate = partner_of(job, unit);
  const Row row = unscaled_row_of(job, unit, mate);
  const Row back = paired ? unscaled_row_of(job, mate, unit) : Row{};
  if (!paired && (row.rule == Rule::kMixup || row.rule == Rule::kCutMix)) load_image(other, job.partners, mate);
  if (element < elements) {
    store_image<In, Out>(job, row, unit, own, other, element, stride, elements);
    // What is the one's own is the other's partner.
    if (paired) store_image<In, Out>(job, back, mate, other, own, element, stride, elements);
  }
  // Once more for what is resized; nothing of the vectors is kept until here.
  if (row.rule == Rule::kResizeMix) resize_chunk<In, Out>(job, row, unit, mate, chunk, elements);
  if (paired && back.rule == Rule::kResizeMix) resize_chunk<In, Out>(job, back, mate, unit, chunk, elements);
}

// One element of a row: any strides, any types.
__device__ __forceinline__ uint32_t mixed_bits(const GpuMix& job, const Row& row, int64_t partner, uint32_t own,
                                               uint32_t other, const Spot& spot) {
  const auto finish = [&job, &spot](float value) {
    if (job.scaled) value = normalise(value, job.constants.centre[spot.c], job.constants.scale[spot.c]);
    return encode(job.out, value);
  };
  if (row.rule == Rule::kMixup) return finish(blend(decode(job.in, own), row.own, decode(job.in, other), row.other));
  const bool pasted = row.boxed() && inside(row, spot);
  if (pasted && row.rule == Rule::kResizeMix) {
    const Taps taps = taps_of(job, row, spot, partner);
    const auto read = [&](int tap) { return decode(job.in, read_bits(job.in, job.partners.data, taps.at[tap])); };
    return finish(blend_taps(taps, read));
  }
  const uint32_t bits = pasted ? other : own;
  return job.copies ? bits : finish(decode(job.in, bits));
}

__device__ __forceinline__ uint32_t clean_bits(const GpuMix& job, uint32_t bits, const Spot& spot) {
  if (job.copies) return bits;
  float value = decode(job.in, bits);
  if (job.scaled) value = normalise(value, job.constants.centre[spot.c], job.constants.scale[spot.c]);
  return encode(job.out, value);
}

__global__ void __launch_bounds__(kThreads) mix_scalar_kernel(const __grid_constant__ GpuMix job) {
  const int64_t at = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t unit = at / job.elements;
  if (unit >= job.units) return;
  const Spot spot = spot_of(job, at - unit * job.elements);
  const int64_t mate = partner_of(job, unit);
  uint32_t own = read_bits(job.in, job.images.data, offset_of(job.images, unit, spot.c, spot.y, spot.x));
  uint32_t other = read_bits(job.in, job.partners.data, offset_of(job.partners, mate, spot.c, spot.y, spot.x));
#pragma unroll 1
  for (int member = 0; member < (job.pairs && mate != unit ? 2 : 1); ++member) {
    const int64_t index = member == 0 ? unit : mate, partner = member == 0 ? mate : unit;
    write_bits(job.out, job.mixed.data, offset_of(job.mixed, index, spot.c, spot.y, spot.x),
               mixed_bits(job, row_of(job, index, partner), partner, own, other, spot));
    if (job.clean.data != nullptr) {
      write_bits(job.out, job.clean.data, offset_of(job.clean, index, spot.c, spot.y, spot.x),
                 clean_bits(job, own, spot));
    }
    exchange(own, other);
  }
}

// ---- backward: every pixel gathers what the rows give that took it ----

// The first of `target` positions whose taps may reach source pixel `pixel`; taps ascend.
__device__ __forceinline__ int32_t first_reaching(int32_t pixel, int32_t target, int32_t extent, float scale) {
  int32_t k = clamp(static_cast<int32_t>((static_cast<float>(pixel) - 0.5f) / scale - 0.5f), 0, target - 1);
  while (k > 0 && resize_tap(k - 1, target, extent, scale).first >= pixel - 1) --k;
  while (k < target && resize_tap(k, target, extent, scale).first < pixel - 1) ++k;
  return k;
}

// What row `from`, which pasted this image resized, gives to one pixel of it; added to `sum`.
template <class Read>
__device__ __forceinline__ float add_resized(const GpuGrad& job, const Row& row, const Spot& spot, int64_t from,
                                             float sum, Read read) {
  const int32_t height = row.bottom - row.top, width = row.right - row.left;
  const int32_t begin = first_reaching(spot.y, height, job.height, row.scale_y);
  for (int32_t i = first_reaching(spot.x, width, job.width, row.scale_x); i < width; ++i) {
    const Tap x = resize_tap(i, width, job.width, row.scale_x);
    if (x.first > spot.x) break;
    const bool left = x.first == spot.x, right = x.first + x.step == spot.x;
    if (!left && !right) continue;
    float column = 0.0f;
    for (int32_t k = begin; k < height; ++k) {
      const Tap y = resize_tap(k, height, job.height, row.scale_y);
      if (y.first > spot.y) break;
      const bool upper = y.first == spot.y, lower = y.first + y.step == spot.y;
      if (!upper && !lower) continue;
      const float grad = read(offset_of(job.grad_mixed, from, spot.c, row.top + k, row.left + i));
      if (upper) column = add_product(column, y.w0, grad);
      if (lower) column = add_product(column, y.w1, grad);
    }
    if (left) sum = add_product(sum, x.w0, column);
    if (right) sum = add_product(sum, x.w1, column);
  }
  return sum;
}

// `sum` plus what a mixed image's gradient gives to its own pixel.
__device__ __forceinline__ float add_own(const Row& row, const Spot& spot, float sum, float grad) {
  if (row.rule == Rule::kMixup) return add_product(sum, row.own, grad);
  return row.boxed() && inside(row, spot) ? sum : sum + grad;
}

// `sum` plus what row `from` gives to the pixel it took, at the same place.
template <class Read>
__device__ __forceinline__ float add_partner(const GpuGrad& job, const Row& row, const Spot& spot, int64_t from,
                                             float sum, float grad, Read read) {
  if (row.rule == Rule::kMixup) return add_product(sum, row.other, grad);
  if (row.rule == Rule::kCutMix && inside(row, spot)) return sum + grad;
  if (row.rule == Rule::kResizeMix) return add_resized(job, row, spot, from, sum, read);
  return sum;
}

// One element of image `index`, whose mirror partner `from` pasted it resized.
template <class In, class Out>
__device__ __forceinline__ void resized_gradient(const GpuGrad& job, const Row& row, const Row& back, int64_t index,
                                                 int64_t from, int64_t element) {
  const Type type = sizeof(In) == 4 ? Type::kFloat : Type::kHalf, out = sizeof(Out) == 4 ? Type::kFloat : Type::kHalf;
  const char* mixed = job.grad_mixed.data;
  const auto read = [mixed, type](int64_t at) { return decode(In{}, read_bits(type, mixed, at)); };
  const Spot spot = spot_of(job, element);
  float sum = 0.0f;
  if (job.grad_clean.data != nullptr) {
    sum = decode(In{}, read_bits(type, job.grad_clean.data, index * job.grad_clean.n + element));
  }
  sum = add_own(row, spot, sum, read(index * job.grad_mixed.n + element));
  sum = add_resized(job, back, spot, from, sum, read);
  const int32_t channel = job.scaled ? spot.c : 0;
  const uint32_t bits = finish<In, Out>(job, sum, 0.0f, job.constants.scale[channel]);
  write_bits(out, job.grad_images.data, index * job.grad_images.n + element, bits);
}

template <class In, class Out>
__global__ void __launch_bounds__(kThreads, 3) mix_backward_vector_kernel(const __grid_constant__ GpuGrad job) {
  constexpr int kElements = 16 / sizeof(Out);
  constexpr int kBytes = kElements * sizeof(In);
  constexpr int32_t kChunk = kThreads * kElements;
  const bool mixed = job.grad_mixed.data != nullptr;
  const uint32_t blocks = static_cast<uint32_t>(job.chunks);  // per unit
  const int64_t unit = blockIdx.x / blocks, mate = job.n - 1 - unit;
  const int32_t chunk = static_cast<int32_t>(blockIdx.x % blocks) * kChunk;
  const int32_t element = chunk + static_cast<int32_t>(threadIdx.x) * kElements;
  const int members = mate != unit ? 2 : 1;
  if (element < job.elements) {
    const Spot spot = spot_of(job, element);
    Part part = part_of(job, unit, mate, spot, kElements), back = part_of(job, mate, unit, spot, kElements);
    Words<kBytes> own = {}, other = {};
    if (mixed) {
      own = load_words<kBytes>(job.grad_mixed.data + (unit * job.grad_mixed.n + element) * sizeof(In));
      other = load_words<kBytes>(job.grad_mixed.data + (mate * job.grad_mixed.n + element) * sizeof(In));
    }
    const Scales scales = scales_of(job, spot.c);
#pragma unroll 1
    for (int member = 0; member < members; ++member) {
      const int64_t index = member == 0 ? unit : mate;
      if (!mixed || back.rule != Rule::kResizeMix) {
        Words<kBytes> clean = {};
        if (job.grad_clean.data != nullptr) {
          clean = load_words<kBytes>(job.grad_clean.data + (index * job.grad_clean.n + element) * sizeof(In));
        }
        const uint32_t taken = back.rule == Rule::kCutMix ? back.mask : 0;  // by the partner's box
        Words<16> out;
#pragma unroll
        for (int k = 0; k < kElements; ++k) {
          float sum = decode(In{}, get<In>(clean, k));
          const float a = decode(In{}, get<In>(own, k)), b = decode(In{}, get<In>(other, k));
          if (mixed) {
            const float kept = part.rule == Rule::kMixup ? add_product(sum, part.own, a) : sum + a;
            sum = part.mask >> k & 1u ? sum : kept;
            const float given = back.rule == Rule::kMixup ? add_product(sum, back.other, b) : sum + b;
            sum = back.rule == Rule::kMixup || (taken >> k & 1u) ? given : sum;
          }
          put<Out>(out, k, finish<In, Out>(job, sum, 0.0f, scales.scale[k % 3]));
        }
        store_words(job.grad_images.data + (index * job.grad_images.n + element) * sizeof(Out), out);
      }
      exchange(own, other);
      exchange(part, back);
    }
  }
#pragma unroll 1
  for (int member = 0; mixed && member < members; ++member) {
    const int64_t index = member == 0 ? unit : mate, from = member == 0 ? mate : unit;
    const Row back = row_of(job, from, index);
    if (back.rule != Rule::kResizeMix) continue;
    const Row row = row_of(job, index, from);
#pragma unroll 1
    for (int k = 0; k < kElements; ++k) {
      const int32_t at = chunk + k * kThreads + static_cast<int32_t>(threadIdx.x);
      if (at < job.elements) resized_gradient<In, Out>(job, row, back, index, from, at);
    }
  }
}

__global__ void __launch_bounds__(kThreads, 4) mix_backward_scalar_kernel(const __grid_constant__ GpuGrad job) {
  const auto read = [&job](int64_t offset) { return decode(job.in, read_bits(job.in, job.grad_mixed.data, offset)); };
  const int64_t at = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t unit = at / job.elements;
  if (unit >= job.units) return;
  const Spot spot = spot_of(job, at - unit * job.elements);
  const bool is_partner = unit >= job.n;  // a row of `partners`, which are images of their own
  const int64_t index = is_partner ? unit - job.n : unit;
  float sum = 0.0f;
  if (!is_partner && job.grad_clean.data != nullptr) {
    const int64_t clean = offset_of(job.grad_clean, index, spot.c, spot.y, spot.x);
    sum = decode(job.in, read_bits(job.in, job.grad_clean.data, clean));
  }
  if (job.grad_mixed.data != nullptr && !is_partner) {
    const Row row = row_of(job, index, partner_of(job, index));
    sum = add_own(row, spot, sum, read(offset_of(job.grad_mixed, index, spot.c, spot.y, spot.x)));
  }
  if (job.grad_mixed.data != nullptr && (is_partner || job.own_partners)) {
    const bool mirrored = job.plan.mirrored;
    const int64_t end = mirrored ? 1 : job.starts[index + 1];
    for (int64_t taker = mirrored ? 0 : job.starts[index]; taker < end; ++taker) {
      const int64_t from = mirrored ? job.n - 1 - index : job.order[taker];
      const Row row = row_of(job, from, index);
      const float grad = read(offset_of(job.grad_mixed, from, spot.c, spot.y, spot.x));
      sum = add_partner(job, row, spot, from, sum, grad, read);
    }
  }
  if (job.scaled) sum = normalise(sum, 0.0f, job.constants.scale[spot.c]);
  const View& view = is_partner ? job.grad_partners : job.grad_images;
  write_bits(job.out, view.data, offset_of(view, index, spot.c, spot.y, spot.x), encode(job.out, sum));
}

// ---- which kernel serves a job ----

inline int64_t bytes_of(Type type) { return type == Type::kUint8 ? 1 : type == Type::kFloat ? 4 : 2; }

// Whether an image of the view is one dense block in the job's order of channels, and every image 16-byte aligned.
template <class Job>
bool dense_and_aligned(const Job& job, const View& view, Type type) {
  if (view.data == nullptr) return true;
  const int64_t c = job.channels, h = job.height, w = job.width;
  const bool dense = job.interleaved ? view.c == 1 && view.w == c && view.h == w * c
                                     : view.w == 1 && view.h == w && view.c == h * w;
  const int64_t bytes = bytes_of(type);
  return dense && reinterpret_cast<uintptr_t>(view.data) % 16 == 0 && view.n * bytes % 16 == 0;
}

// Whether vectors are whole, lie in one row each, and need no more constants than `Scales` has.
template <class Job>
bool whole_vectors(const Job& job) {
  const int64_t length = static_cast<int64_t>(job.width) * (job.interleaved ? job.channels : 1);
  const bool simple = !job.scaled || !job.interleaved || job.channels == 3;
  return length % (16 / bytes_of(job.out)) == 0 && job.elements < INT32_MAX - kThreads * 16 && simple;
}

// The pairs of types that vector kernels exist for; the scalar kernels know all.
inline bool common_types(Type in, Type out) {
  return in == out || in == Type::kUint8 || out == Type::kFloat || (in == Type::kFloat && out != Type::kUint8);
}

inline bool vectorised(const GpuMix& job) {
  return common_types(job.in, job.out) && whole_vectors(job) && dense_and_aligned(job, job.images, job.in) &&
         dense_and_aligned(job, job.partners, job.in) && dense_and_aligned(job, job.mixed, job.out) &&
         dense_and_aligned(job, job.clean, job.out);
}

inline bool vectorised(const GpuGrad& job) {
  return job.pairs && (job.in == job.out || job.out == Type::kFloat || job.in == Type::kFloat) && whole_vectors(job) &&
         dense_and_aligned(job, job.grad_mixed, job.in) && dense_and_aligned(job, job.grad_clean, job.in) &&
         dense_and_aligned(job, job.grad_images, job.out);
}

// visit(in, out): values of the two types, which are common ones.
template <class Visit>
auto with_types(Type in, Type out, Visit visit) {
  const auto same_or_float = [&](auto value) {
    return out == Type::kFloat ? visit(value, float{}) : visit(value, value);
  };
  const auto to_float_type = [&](auto value) {
    if (out == Type::kHalf) return visit(value, Half{});
    return out == Type::kBf16 ? visit(value, Bf16{}) : visit(value, float{});
  };
  if (in == Type::kHalf) return same_or_float(Half{});
  if (in == Type::kBf16) return same_or_float(Bf16{});
  if (in == Type::kFloat) return to_float_type(float{});
  if constexpr (Visit::kBytesToo) {
    return out == Type::kUint8 ? visit(uint8_t{}, uint8_t{}) : to_float_type(uint8_t{});
  }
  return to_float_type(float{});
}

// `launch(kernel, blocks, job)` runs one kernel of kThreads threads per block, and what it returns is returned.
template <class Launch>
struct MixVector {
  static constexpr bool kBytesToo = true;
  const Launch& launch;
  const GpuMix& job;

  template <class In, class Out>
  auto operator()(In, Out) const {
    return launch(mix_vector_kernel<In, Out>, job.units * job.chunks, job);
  }
};

template <class Launch>
struct GradVector {
  static constexpr bool kBytesToo = false;
  const Launch& launch;
  const GpuGrad& job;

  template <class In, class Out>
  auto operator()(In, Out) const {
    return launch(mix_backward_vector_kernel<In, Out>, job.units * job.chunks, job);
  }
};

// Blocks of a unit whose threads own `vectors` vectors each.
template <class Job>
int64_t chunks_of(const Job& job, int vectors) {
  const int64_t chunk = vectors * kThreads * 16 / bytes_of(job.out);
  return (job.elements + chunk - 1) / chunk;
}

template <class Launch>
auto run_mix(GpuMix job, Launch launch) {
  if (!vectorised(job)) {
    return launch(mix_scalar_kernel, (job.units * job.elements + kThreads - 1) / kThreads, job);
  }
  job.planar = !job.interleaved && job.channels == kVectors;
  job.chunks = chunks_of(job, kVectors);
  return with_types(job.in, job.out, MixVector<Launch>{launch, job});
}

template <class Launch>
auto run_mix_backward(GpuGrad job, Launch launch) {
  if (!vectorised(job)) {
    job.units = job.n + (job.own_partners ? 0 : job.partner_rows);  // a thread owns one pixel of one image
    return launch(mix_backward_scalar_kernel, (job.units * job.elements + kThreads - 1) / kThreads, job);
  }
  job.chunks = chunks_of(job, 1);
  return with_types(job.in, job.out, GradVector<Launch>{launch, job});
}

}  // namespace SDMP_ISA
}  // namespace sdmp
