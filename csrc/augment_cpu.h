// What the kernels of `augment` are told: plain structures that `augment_cpu_op.cpp` fills from tensors.
#pragma once

#include <cstdint>

namespace sdmp {

// One decoded image of uint8: strides in bytes.
struct Picture {
  const uint8_t* data;
  int64_t height, width;
  int64_t channel, row, column;
};

struct AugmentJob {
  int64_t n, channels, height, width;  // of the views
  const Picture* pictures;             // (n,)
  // (n, 4) top, left, height, width of the crops; one of the two is null. Whole crops are cut out before they are
  // resized, so that the filter stops at their edges; fractions are for evaluation views, where it stops at the image's.
  const int32_t* box;
  const float* fractional_box;
  // (n,) each, see ViewDraws.
  const uint8_t* flip;
  const float* brightness;
  const float* contrast;
  const float* saturation;
  const float* hue;
  const uint8_t* gray;
  const float* sigma;
  const uint8_t* solarize;
  bool cubic;
  uint8_t* out;      // (n, height, width, channels), contiguous within an image
  int64_t out_image; // bytes from one view to the next
};

// In augment_cpu.cpp: views [begin, end) of a job, one namespace per instruction set.
namespace portable {
void augment(const AugmentJob& job, int64_t begin, int64_t end);
}
namespace avx2 {
void augment(const AugmentJob& job, int64_t begin, int64_t end);
}
namespace avx512 {
void augment(const AugmentJob& job, int64_t begin, int64_t end);
}

}  // namespace sdmp
