// `augment` on the CPU: the operator sdmp::augment_cpu.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <vector>

#include "augment_cpu.h"
#include "processor.h"

namespace sdmp {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class Value>
const Value* rows_of(const Tensor& tensor, const char* name, ScalarType type, int64_t rows) {
  STD_TORCH_CHECK(tensor.scalar_type() == type && tensor.is_contiguous() && tensor.size(0) == rows, name,
                  " must be contiguous, of the draws' dtype and with ", rows, " rows");
  return static_cast<const Value*>(tensor.data_ptr());
}

// One (N, C, H, W) batch, or N images (H, W, C).
std::vector<Picture> pictures_of(const std::vector<Tensor>& images, int64_t n, int64_t channels) {
  std::vector<Picture> pictures;
  pictures.reserve(n);
  for (const Tensor& image : images) {
    STD_TORCH_CHECK(image.scalar_type() == ScalarType::Byte, "images must be uint8");
    const auto* data = static_cast<const uint8_t*>(image.data_ptr());
    if (image.dim() == 4) {
      STD_TORCH_CHECK(image.size(1) == channels, "images have ", image.size(1), " channels, the views ", channels);
      for (int64_t i = 0; i < image.size(0); ++i) {
        pictures.push_back({data + i * image.stride(0), image.size(2), image.size(3), image.stride(1),
                            image.stride(2), image.stride(3)});
      }
    } else {
      STD_TORCH_CHECK(image.dim() == 3 && image.size(2) == channels, "an image must be (H, W, ", channels, ")");
      pictures.push_back(
          {data, image.size(0), image.size(1), image.stride(2), image.stride(0), image.stride(1)});
    }
  }
  STD_TORCH_CHECK(static_cast<int64_t>(pictures.size()) == n, "there are ", pictures.size(), " images for ", n,
                  " views");
  return pictures;
}

void check_boxes(const AugmentJob& job) {
  for (int64_t i = 0; i < job.n; ++i) {
    const auto inside = [&](const auto* box, double slack) {
      const Picture& p = job.pictures[i];
      return box[0] >= 0 && box[1] >= 0 && box[2] > 0 && box[3] > 0 &&
             double(box[0]) + double(box[2]) <= double(p.height) + slack &&
             double(box[1]) + double(box[3]) <= double(p.width) + slack;
    };
    // Fractions are rounded to float32, so that the last of them may end a little outside.
    const double slack = 1e-3 * static_cast<double>(job.pictures[i].height + job.pictures[i].width);
    STD_TORCH_CHECK(job.box != nullptr ? inside(job.box + 4 * i, 0.0) : inside(job.fractional_box + 4 * i, slack),
                    "box of row ", i, " does not lie inside its image of ", job.pictures[i].height, " x ",
                    job.pictures[i].width, " pixels");
  }
}

void augment_cpu(std::vector<Tensor> images, const Tensor& box, const Tensor& flip, const Tensor& brightness,
                 const Tensor& contrast, const Tensor& saturation, const Tensor& hue, const Tensor& gray,
                 const Tensor& sigma, const Tensor& solarize, bool cubic, Tensor out) {
  AugmentJob job{};
  job.n = out.size(0);
  job.channels = out.size(1);
  job.height = out.size(2);
  job.width = out.size(3);
  if (out.numel() == 0) return;
  STD_TORCH_CHECK(out.scalar_type() == ScalarType::Byte && (job.channels == 1 || out.stride(1) == 1) &&
                      (job.width == 1 || out.stride(3) == job.channels) &&
                      (job.height == 1 || out.stride(2) == job.width * job.channels),
                  "out must be uint8 and channels_last");
  const std::vector<Picture> pictures = pictures_of(images, job.n, job.channels);
  job.pictures = pictures.data();
  if (box.scalar_type() == ScalarType::Int) {
    job.box = rows_of<int32_t>(box, "box", ScalarType::Int, job.n);
  } else {
    job.fractional_box = rows_of<float>(box, "box", ScalarType::Float, job.n);
  }
  check_boxes(job);
  job.flip = rows_of<uint8_t>(flip, "flip", ScalarType::Bool, job.n);
  job.brightness = rows_of<float>(brightness, "brightness", ScalarType::Float, job.n);
  job.contrast = rows_of<float>(contrast, "contrast", ScalarType::Float, job.n);
  job.saturation = rows_of<float>(saturation, "saturation", ScalarType::Float, job.n);
  job.hue = rows_of<float>(hue, "hue", ScalarType::Float, job.n);
  job.gray = rows_of<uint8_t>(gray, "gray", ScalarType::Bool, job.n);
  job.sigma = rows_of<float>(sigma, "sigma", ScalarType::Float, job.n);
  job.solarize = rows_of<uint8_t>(solarize, "solarize", ScalarType::Bool, job.n);
  job.cubic = cubic;
  job.out = static_cast<uint8_t*>(out.data_ptr());
  job.out_image = job.n == 1 ? 0 : out.stride(0);
  const auto run = SDMP_BEST(augment);
  torch::stable::parallel_for(0, job.n, 1, [&](int64_t begin, int64_t end) { run(job, begin, end); });
}

}  // namespace
}  // namespace sdmp

STABLE_TORCH_LIBRARY_FRAGMENT(sdmp, m) {
  m.def(
      "augment_cpu(Tensor[] images, Tensor box, Tensor flip, Tensor brightness, Tensor contrast, Tensor saturation, "
      "Tensor hue, Tensor gray, Tensor sigma, Tensor solarize, bool cubic, Tensor(a!) out) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(sdmp, CompositeExplicitAutograd, m) { m.impl("augment_cpu", TORCH_BOX(&sdmp::augment_cpu)); }
