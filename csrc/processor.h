// Which of the instruction sets that kernels are compiled for this processor runs well.
#pragma once

namespace sdmp {

#if defined(__x86_64__)
inline bool runs_avx2() { return __builtin_cpu_supports("avx2"); }

inline bool runs_avx512() {
  // Not on the first processors with 512 bits, which slow down for them: they lack the last of these.
  return __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vbmi2");
}
#endif

}  // namespace sdmp
