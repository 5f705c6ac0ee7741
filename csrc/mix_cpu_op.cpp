// `mix` on the CPU: the operators sdmp::mix_cpu, sdmp::mix_plain_cpu and sdmp::mix_backward_cpu, and how their work is cut into tasks.
#include <algorithm>
#include <cstdlib>
#include <initializer_list>
#include <memory>
#include <new>

#include "mix.h"
#include "mix_cpu.h"
#include "mix_torch.h"
#include "processor.h"

namespace sdmp {
namespace {

// Results of this many bytes are written past the cache: they would only push out what is still needed.
constexpr int64_t kStreamBytes = int64_t{16} << 20;

bool interleaved(const View& view, int64_t channels) {
  return view.data == nullptr || (view.c == 1 && view.w == channels);
}

Geometry geometry_of(std::initializer_list<View> views, int64_t channels, int64_t height, int64_t width) {
  Geometry g;
  g.interleaved = channels > 1 && channels <= kMaxGroup && width <= INT32_MAX / channels &&
                  std::all_of(views.begin(), views.end(), [&](const View& v) { return interleaved(v, channels); });
  g.group = g.interleaved ? channels : 1;
  g.planes = g.interleaved ? 1 : channels;
  g.rows = height;
  g.columns = width;
  g.length = width * g.group;
  g.dense = std::all_of(views.begin(), views.end(), [&](const View& v) {
    return v.data == nullptr || ((g.interleaved || v.w == 1) && v.h == g.length);
  });
  // Tiles end where a pixel does and, where that fits, where a cache line does.
  const int64_t unit = g.group * 64 <= kTile ? g.group * 64 : g.group;
  g.tile = kTile / unit * unit;
  g.chunk = std::clamp<int64_t>(kTask / g.length, 1, height);
  g.chunks = (height + g.chunk - 1) / g.chunk;
  return g;
}

struct Free {
  void operator()(char* memory) const { std::free(memory); }
};

template <class Job, class Run>
void run_tasks(const Job& job, Run run) {
  const int64_t tasks = job.units * job.geometry.planes * job.geometry.chunks;
  const int64_t bytes = (scratch_bytes(job.geometry) + 63) / 64 * 64;
  torch::stable::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
    const std::unique_ptr<char, Free> scratch(static_cast<char*>(std::aligned_alloc(64, bytes)));
    if (!scratch) throw std::bad_alloc();
    run(job, begin, end, scratch.get());
  });
}

void check_plan_values(const PlanView& plan, int64_t n, int64_t partner_rows) {
  for (int64_t i = 0; i < n; ++i) {
    STD_TORCH_CHECK(plan.rule[i] <= static_cast<uint8_t>(kLastRule), "rule of row ", i, " is ",
                    static_cast<int>(plan.rule[i]), ", expected 0 to ", static_cast<int>(kLastRule));
    STD_TORCH_CHECK(plan.mirrored || (plan.partner[i] >= 0 && plan.partner[i] < partner_rows), "partner of row ", i,
                    " is ", plan.partner[i], ", but there are ", partner_rows, " rows");
  }
}

bool has_rule(const PlanView& plan, int64_t n, Rule rule) {
  return std::find(plan.rule, plan.rule + n, static_cast<uint8_t>(rule)) != plan.rule + n;
}

void mix_cpu(const Tensor& images, const std::optional<Tensor>& partners, const Tensor& rule, const Tensor& partner,
             const Tensor& lam, const Tensor& box, bool mirrored, const std::optional<std::vector<double>>& mean,
             const std::optional<std::vector<double>>& std, Tensor mixed, std::optional<Tensor> clean,
             const std::optional<Tensor>& boxes, const std::optional<Tensor>& fill, bool per_pixel) {
  check_images(images, partners, mixed, clean);
  MixJob job;
  job.n = images.size(0);
  job.channels = images.size(1);
  job.height = images.size(2);
  job.width = images.size(3);
  if (images.numel() == 0) return;
  job.in = type_of(images, "images");
  job.out = type_of(mixed, "mixed");
  job.own_partners = !partners.has_value();
  job.images = view_of(images);
  job.partners = job.own_partners ? job.images : view_of(*partners);
  job.mixed = view_of(mixed);
  job.clean = view_of(clean);
  job.plan = plan_of(rule, partner, lam, box, mirrored, job.n);
  job.erasure = erasure_of(boxes, fill, per_pixel, images);
  const int64_t partner_rows = job.own_partners ? job.n : partners->size(0);
  STD_TORCH_CHECK(!mirrored || partner_rows == job.n, "a mirrored plan needs ", job.n, " partners");
  check_plan_values(job.plan, job.n, partner_rows);
  const Constants constants(mean, std, job.in == Type::kUint8 ? 255.0 : 1.0, job.channels);
  job.centre = constants.centre_or_null();
  job.scale = constants.scale_or_null();
  STD_TORCH_CHECK(job.scale == nullptr || job.out != Type::kUint8, "uint8 cannot hold normalised values");
  job.pairs = mirrored && job.own_partners;
  job.in_place = same_place(job.images, job.mixed);
  STD_TORCH_CHECK(!job.in_place || !job.own_partners || (mirrored && !has_rule(job.plan, job.n, Rule::kResizeMix)),
                  "in place works for KEEP, MIXUP and CUTMIX with mirrored partners; give a copy of the images");
  const int64_t bytes = mixed.numel() * static_cast<int64_t>(mixed.element_size()) * (clean.has_value() ? 2 : 1);
  job.stream = !job.in_place && bytes >= kStreamBytes;
  job.units = job.pairs ? (job.n + 1) / 2 : job.n;
  job.geometry = geometry_of({job.images, job.partners, job.mixed, job.clean}, job.channels, job.height, job.width);
  run_tasks(job, SDMP_BEST(mix));
}

// Whether a view holds images one behind the other, in rows of planes or of pixels.
bool packed(const View& view, int64_t channels, int64_t height, int64_t width) {
  const bool planes = view.w == 1 && view.h == width && view.c == height * width;
  const bool pixels = view.c == 1 && view.w == channels && view.h == width * channels;
  return (planes || pixels) && view.n == channels * height * width;
}

bool plain_vector(const Tensor& tensor, int64_t rows, int64_t columns) {
  return tensor.dim() == (columns == 0 ? 1 : 2) && tensor.size(0) == rows &&
         (columns == 0 || tensor.size(1) == columns) && tensor.is_contiguous();
}

// Mixes packed images of `height` x `width` pixels into `mixed`, of their dtype, elsewhere or in place. False, and
// nothing is done, where anything is wrong or unusual: the caller's checks then say what, or go another way.
bool mix_plain_cpu(const Tensor& images, const Tensor& rule, const Tensor& partner, const Tensor& lam,
                   const Tensor& box, bool mirrored, int64_t height, int64_t width, Tensor mixed) {
  if (images.dim() != 4 || mixed.dim() != 4 || images.numel() == 0) return false;
  const int64_t n = images.size(0), channels = images.size(1);
  const ScalarType type = images.scalar_type();
  if (images.size(2) != height || images.size(3) != width || mixed.scalar_type() != type) return false;
  for (int64_t d = 0; d < 4; ++d) {
    if (mixed.size(d) != images.size(d)) return false;
  }
  if (type != ScalarType::Byte && type != ScalarType::Half && type != ScalarType::BFloat16 &&
      type != ScalarType::Float) {
    return false;
  }
  if (type == ScalarType::Byte && width <= 4) return false;  // which may be images with their channels last
  if (!plain_vector(rule, n, 0) || !plain_vector(partner, n, 0) || !plain_vector(lam, n, 0) ||
      !plain_vector(box, n, 4)) {
    return false;
  }
  const View from = view_of(images), to = view_of(mixed);
  if (!packed(from, channels, height, width) || !packed(to, channels, height, width)) return false;
  const PlanView plan = plan_of(rule, partner, lam, box, mirrored, n);
  bool resizes = false;
  for (int64_t i = 0; i < n; ++i) {
    if (plan.rule[i] > static_cast<uint8_t>(kLastRule)) return false;
    if (!mirrored && (plan.partner[i] < 0 || plan.partner[i] >= n)) return false;
    resizes = resizes || plan.rule[i] == static_cast<uint8_t>(Rule::kResizeMix);
  }
  const int64_t bytes = images.numel() * static_cast<int64_t>(images.element_size());
  if (same_place(from, to)) {
    if (!mirrored || resizes) return false;
  } else if (from.data < to.data + bytes && to.data < from.data + bytes) {
    return false;
  }
  mix_cpu(images, std::nullopt, rule, partner, lam, box, mirrored, std::nullopt, std::nullopt, mixed, std::nullopt,
          std::nullopt, std::nullopt, false);
  return true;
}

void mix_backward_cpu(const std::optional<Tensor>& grad_mixed, const std::optional<Tensor>& grad_clean,
                      const Tensor& rule, const Tensor& partner, const Tensor& lam, const Tensor& box, bool mirrored,
                      const std::optional<Tensor>& order, const std::optional<Tensor>& starts,
                      const std::optional<std::vector<double>>& std, Tensor grad_images,
                      std::optional<Tensor> grad_partners) {
  check_gradients(grad_mixed, grad_clean, grad_images, grad_partners);
  GradJob job;
  job.n = grad_images.size(0);
  job.channels = grad_images.size(1);
  job.height = grad_images.size(2);
  job.width = grad_images.size(3);
  if (job.channels * job.height * job.width == 0) return;
  job.in = type_of(grad_mixed.has_value() ? *grad_mixed : *grad_clean, "grad_mixed");
  job.out = type_of(grad_images, "grad_images");
  job.grad_mixed = view_of(grad_mixed);
  job.grad_clean = view_of(grad_clean);
  job.grad_images = view_of(grad_images);
  job.grad_partners = view_of(grad_partners);
  job.plan = plan_of(rule, partner, lam, box, mirrored, job.n);
  job.own_partners = !grad_partners.has_value();
  job.partner_rows = job.own_partners ? job.n : grad_partners->size(0);
  STD_TORCH_CHECK(!mirrored || job.partner_rows == job.n, "a mirrored plan needs ", job.n, " partners");
  check_plan_values(job.plan, job.n, job.partner_rows);
  job.order = job.starts = nullptr;
  if (!mirrored) {
    job.order = takers_of(order, "order", job.n);
    job.starts = takers_of(starts, "starts", job.partner_rows + 1);
  }
  const Constants constants(std::nullopt, std, 1.0, job.channels);
  job.scale = constants.scale_or_null();
  job.pairs = mirrored && job.own_partners;
  job.stream = grad_images.numel() * static_cast<int64_t>(grad_images.element_size()) >= kStreamBytes;
  job.geometry = geometry_of({job.grad_mixed, job.grad_clean, job.grad_images, job.grad_partners}, job.channels,
                             job.height, job.width);
  if (job.pairs) {
    // A task walks the first half of the rows and takes each one's partner along.
    job.units = (job.n + 1) / 2;
  } else {
    job.units = job.n + (job.own_partners ? 0 : job.partner_rows);
  }
  run_tasks(job, SDMP_BEST(mix_backward));
}

}  // namespace
}  // namespace sdmp

STABLE_TORCH_LIBRARY_FRAGMENT(sdmp, m) {
  m.def("mix_cpu" SDMP_MIX_ERASE_SCHEMA);
  m.def("mix_backward_cpu" SDMP_MIX_BACKWARD_SCHEMA);
  m.def(
      "mix_plain_cpu(Tensor images, Tensor rule, Tensor partner, Tensor lam, Tensor box, bool mirrored, int height, "
      "int width, Tensor(a!) mixed) -> bool");
}

STABLE_TORCH_LIBRARY_IMPL(sdmp, CPU, m) {
  m.impl("mix_cpu", TORCH_BOX(&sdmp::mix_cpu));
  m.impl("mix_backward_cpu", TORCH_BOX(&sdmp::mix_backward_cpu));
  m.impl("mix_plain_cpu", TORCH_BOX(&sdmp::mix_plain_cpu));
}
