// Launches the kernels of mix_cuda_kernels.h. The torch side is in mix_cuda_op.cpp, so that nvcc sees no torch header.
#include <cuda_runtime.h>

#include "mix_cuda_kernels.h"

namespace sdmp {
namespace {

// One launch on the given stream; returns what went wrong, or null.
struct OnStream {
  cudaStream_t stream;

  template <class Job>
  const char* operator()(void (*kernel)(Job), int64_t blocks, const Job& job) const {
    if (blocks > INT32_MAX) return "more images than one launch can serve; mix them in parts";
    kernel<<<static_cast<unsigned>(blocks), SDMP_ISA::kThreads, 0, stream>>>(job);
    const cudaError_t error = cudaGetLastError();
    return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
  }
};

}  // namespace

const char* launch_mix(const GpuMix& job, void* stream) {
  return SDMP_ISA::run_mix(job, OnStream{static_cast<cudaStream_t>(stream)});
}

const char* launch_mix_backward(const GpuGrad& job, void* stream) {
  return SDMP_ISA::run_mix_backward(job, OnStream{static_cast<cudaStream_t>(stream)});
}

}  // namespace sdmp
