// The CPU kernels of `mix`, compiled once per instruction set (SDMP_ISA); the compiler vectorises the inner loops.
//
// Everything goes through tiles that stay in the first-level cache: a tile of an image is a run of one plane. Both
// images of a mirrored pair are read once, both results are written once; results larger than the cache are
// written past it in whole lines, which spares reading the lines they replace, most after assembly in a tile.
//
// The headers mix_cpu_*.h are its parts, from the innermost loops outwards: runs, memory, resize, tiles, then forward
// and backward. Nothing else includes them.
#include "mix_cpu_backward.h"
#include "mix_cpu_forward.h"

namespace sdmp {
namespace SDMP_ISA {

void mix(const MixJob& job, int64_t begin, int64_t end, char* scratch) {
  Mixer mixer(job, scratch);
  for (int64_t task = begin; task < end; ++task) mixer.run(task);
  if (job.stream) finish_streams();
}

void mix_backward(const GradJob& job, int64_t begin, int64_t end, char* scratch) {
  Gradient gradient(job, scratch);
  for (int64_t task = begin; task < end; ++task) gradient.run(task);
  if (job.stream) finish_streams();
}

}  // namespace SDMP_ISA
}  // namespace sdmp
