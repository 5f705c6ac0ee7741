// What the CUDA kernels of `mix` are told: jobs that mix_cuda_torch.h fills.
#pragma once

#include "mix_job.h"

namespace sdmp {

constexpr int kMaxChannels = 64;  // of a normalised image on a GPU: the constants travel as a kernel argument

struct Constants64 {
  float centre[kMaxChannels];
  float scale[kMaxChannels];
};

// A MixJob as a CUDA kernel gets it; pointers are the device's.
struct GpuMix {
  int64_t n, partner_rows;
  int32_t channels, height, width;
  int64_t elements;  // of one image
  View images, partners, mixed, clean;
  PlanView plan;
  bool own_partners, pairs;
  bool interleaved;  // elements are counted channels first or last
  bool scaled;       // normalised by `constants`
  bool copies;       // stored values go over unchanged: one type, not normalised
  Type in, out;
  int64_t units, chunks;
  bool planar;  // a thread's vectors are of one place of three planes, else they follow each other
  Constants64 constants;
};

struct GpuGrad {
  int64_t n, partner_rows;
  int32_t channels, height, width;
  int64_t elements;
  View grad_mixed, grad_clean, grad_images, grad_partners;
  PlanView plan;
  const int64_t* order;
  const int64_t* starts;
  bool own_partners, pairs, interleaved, scaled;
  Type in, out;
  int64_t units, chunks;
  Constants64 constants;
};

// In mix_cuda.cu: one launch on a cudaStream_t of the current device. They return what went wrong, or null.
const char* launch_mix(const GpuMix& job, void* stream);
const char* launch_mix_backward(const GpuGrad& job, void* stream);

}  // namespace sdmp
