// Which of the instruction sets that kernels are compiled for this processor runs well.
#pragma once

namespace sdmp {

#if defined(__x86_64__)
inline bool runs_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }

inline bool runs_avx512() {
  // Not on the first processors with 512 bits, which slow down for them: they lack the last of these.
  return __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vbmi2");
}
#endif

}  // namespace sdmp

// SDMP_BEST(name): of portable::name, avx2::name and avx512::name the one for the best instruction set that was built and
// that this processor has. Within namespace sdmp.
#if defined(SDMP_WITH_AVX512)
#define SDMP_IF_AVX512(name) \
  if (runs_avx512()) return avx512::name;
#else
#define SDMP_IF_AVX512(name)
#endif
#if defined(SDMP_WITH_AVX2)
#define SDMP_IF_AVX2(name) \
  if (runs_avx2()) return avx2::name;
#else
#define SDMP_IF_AVX2(name)
#endif
#define SDMP_BEST(name)                      \
  ([]() -> decltype(&portable::name) {       \
    SDMP_IF_AVX512(name)                     \
    SDMP_IF_AVX2(name)                       \
    return portable::name;                   \
  }())
