// What the CPU kernels of `mix` are told: jobs that mix_cpu_op.cpp fills and cuts into tasks, and mix_cpu.cpp does.
#pragma once

#include "mix_job.h"

namespace sdmp {

// Images are walked as `planes` of `rows` rows of `length` elements. A channels_last image is one plane whose rows
// interleave `group` channels; any other has one plane per channel and `group` 1.
struct Geometry {
  int64_t planes, rows, length, group;
  bool interleaved;
  bool dense;       // every tensor is contiguous within a plane, so that a tile may run on from row to row
  int64_t tile;     // elements worked on at once: what fits the first-level cache
  int64_t chunk;    // rows per task
  int64_t chunks;   // tasks per plane
  int64_t columns;  // pixels in a row, length / group
};

struct MixJob {
  int64_t n, channels, height, width;
  View images, partners, mixed, clean;
  PlanView plan;
  ErasureView erasure;
  bool own_partners;    // partner indexes `images` itself
  bool pairs;           // mirrored: a task owns rows i and n-1-i, reads both once and writes both
  bool in_place;        // `mixed` is `images`
  bool stream;          // write past the cache: the outputs are larger than it
  Type in, out;
  const float* centre;  // (channels,) each, or null
  const float* scale;
  Geometry geometry;
  int64_t units;        // pairs, or rows
};

// The gradients of float images: the transpose of a MixJob.
struct GradJob {
  int64_t n, channels, height, width;
  View grad_mixed, grad_clean;     // either may be missing
  View grad_images, grad_partners; // the second is missing where images are the partners
  int64_t partner_rows;
  PlanView plan;
  const int64_t* order;   // rows of the plan sorted by partner, and where each partner's begin;
  const int64_t* starts;  // null where mirrored
  bool own_partners;
  Type in, out;
  const float* scale;     // (channels,) 1 / std, or null
  Geometry geometry;
  bool pairs;             // mirrored: a task owns rows i and n-1-i, whose gradients read the same two rows
  bool stream;
  int64_t units;          // pairs, or rows of images followed by rows of partners
};

constexpr int64_t kTile = 2048;       // elements: 8 KiB of float32
constexpr int64_t kTask = 16384;      // elements a task aims at
constexpr int64_t kMaxGroup = 64;     // more interleaved channels than this are walked plane by plane

// Bytes of scratch that one thread needs for jobs of this geometry: tiles, three rows, and taps.
inline int64_t scratch_bytes(const Geometry& g) {
  return 4 * (8 * (kTile + 32) + 3 * (g.length + g.group + 64) + 2 * 4 * (g.columns + 32) + 4 * (g.rows + 32));
}

// In mix_cpu.cpp: tasks [begin, end) of a job, one namespace per instruction set. `scratch` is aligned to 64 bytes.
namespace portable {
void mix(const MixJob& job, int64_t begin, int64_t end, char* scratch);
void mix_backward(const GradJob& job, int64_t begin, int64_t end, char* scratch);
}  // namespace portable
namespace avx2 {
void mix(const MixJob& job, int64_t begin, int64_t end, char* scratch);
void mix_backward(const GradJob& job, int64_t begin, int64_t end, char* scratch);
}  // namespace avx2
namespace avx512 {
void mix(const MixJob& job, int64_t begin, int64_t end, char* scratch);
void mix_backward(const GradJob& job, int64_t begin, int64_t end, char* scratch);
}  // namespace avx512

}  // namespace sdmp
