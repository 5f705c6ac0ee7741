// Just enough of CUDA's language to compile kernels as C++ and run them on the CPU, one thread after another: what
// reaches memory is the same as long as threads do not talk to each other, which those of this project never do.
#pragma once

#include <cstdint>

#define __global__ inline
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

struct Index {
  unsigned x;
};

inline Index blockIdx, threadIdx;

// Runs `kernel` for every thread of every block.
template <class Job>
void launch_on_cpu(void (*kernel)(Job), int64_t blocks, int threads, const Job& job) {
  for (int64_t block = 0; block < blocks; ++block) {
    blockIdx.x = static_cast<unsigned>(block);
    for (int thread = 0; thread < threads; ++thread) {
      threadIdx.x = static_cast<unsigned>(thread);
      kernel(job);
    }
  }
}
