// `distillation` on the CPU, compiled once per instruction set (SDMP_ISA): value and gradient in one sweep. The teachers'
// exponentials of a row, or of a row and its flip, are made once and stay in the cache while all crops of the student
// pass by. A student's row comes from memory once, to find its largest logit; its gradient is written once.
#include "distillation_cpu.h"

#include <vector>

#include "loss_cpu_rows.h"

namespace sdmp {
namespace SDMP_ISA {
namespace {

// Logits are multiplied by this power of two before they are subtracted and summed, which rounds nothing and keeps
// differences, and sums of them, from overflowing however large the logits are. As in reference.py.
constexpr float kScale = 1.0f / (1 << 20) / (1 << 20);

template <class Student, class Teacher>
class Distiller {
 public:
  Distiller(const DistillationJob& job, float* scratch)
      : job_(job), n_(job.student.columns), room_(distillation_row(job.student.columns)),
        crops_(job.teacher.crops), teachers_(scratch), e_(scratch + 2 * crops_ * room_), z_(e_ + room_),
        sums_(2 * crops_), factors_(2 * crops_), rows_(2 * crops_) {}

  void run(int64_t unit) {
    const int64_t rows = job_.student.rows;
    if (job_.pairs) {
      const int64_t flip = rows - 1 - unit;
      // Of the middle row of an odd number both are one.
      probabilities(unit, 0);
      if (flip != unit) probabilities(flip, 1);
      students(unit, 0, flip == unit ? 0 : 1);
      if (flip != unit) students(flip, 1, 0);
      return;
    }
    probabilities(unit, 0);
    int64_t half = -1;
    if (job_.other.data != nullptr) {
      const int64_t partner = job_.partner[unit];
      if (partner == unit) half = 0;
      if (partner != unit && partner >= 0 && partner < rows) probabilities(partner, half = 1);
    }
    students(unit, 0, half);
  }

 private:
  // The exponentials of every teacher for a row, and their sums, into one half of the room for them.
  void probabilities(int64_t row, int64_t half) {
    const Crops& teacher = job_.teacher;
    const float gain = static_cast<float>(1 / (job_.teacher_temperature * kScale));
    for (int64_t t = 0; t < crops_; ++t) {
      const Teacher* from = reinterpret_cast<const Teacher*>(teacher.data) + t * teacher.crop + row * teacher.row;
      float* e = teachers_ + (half * crops_ + t) * room_;
      widen(from, teacher.column, n_, e);
      if (job_.center != nullptr) {
        for (int64_t k = 0; k < n_; ++k) e[k] = e[k] * kScale - job_.center[k] * kScale;
      } else {
        for (int64_t k = 0; k < n_; ++k) e[k] *= kScale;
      }
      sums_[half * crops_ + t] = exponentials<true>(e, n_, peak_of(e, n_), gain, e, nullptr);
    }
  }

  static double weight(const Weights& weights, int64_t v, int64_t t, int64_t row) {
    return weights.data[v * weights.view + t * weights.crop + row * weights.row];
  }

  // Term p of the combined target: the probabilities of a teacher times a weight.
  void place(int64_t p, int64_t teacher, double weight) {
    rows_[p] = teachers_ + teacher * room_;
    factors_[p] = static_cast<float>(weight / sums_[teacher]);
  }

  // All crops of a row, with the probabilities of its own half and of its partner's, -1 where there are none.
  void students(int64_t row, int64_t own, int64_t other) {
    const Crops& student = job_.student;
    double loss = 0;
    for (int64_t v = 0; v < student.crops; ++v) {
      // Own terms come first whichever half they are in, so that the flip adds up as any other partner does.
      double total = 0;
      int64_t used = 0;
      for (int64_t t = 0; t < crops_; ++t, ++used) {
        const double w = weight(job_.own, v, t, row);
        total += w;
        place(used, own * crops_ + t, w);
      }
      for (int64_t t = 0; job_.other.data != nullptr && other >= 0 && t < crops_; ++t, ++used) {
        const double w = weight(job_.other, v, t, row);
        total += w;
        place(used, other * crops_ + t, w);
      }
      const Student* from = reinterpret_cast<const Student*>(student.data) + v * student.crop + row * student.row;
      const float* z = z_;
      if constexpr (std::is_same_v<Student, float>) {
        if (student.column == 1) z = from;
      }
      if (z == z_) widen(from, student.column, n_, z_);
      const char* next = z != z_ && v + 1 < student.crops ? reinterpret_cast<const char*>(from + student.crop) : nullptr;
      const float peak = peak_of(z, n_);
      const float gain = static_cast<float>(1 / job_.student_temperature);
      const double sum = job_.gradient != nullptr ? exponentials<true>(z, n_, peak, gain, e_, next)
                                                  : exponentials<false>(z, n_, peak, gain, nullptr, next);
      double scale = 0;
      Student* out = nullptr;
      if (job_.gradient != nullptr) {
        scale = job_.scale.of(row) / job_.student_temperature;
        out = reinterpret_cast<Student*>(job_.gradient) + (v * student.rows + row) * n_;
      }
      const double crossed = combine(z, peak, used, static_cast<float>(total / sum), static_cast<float>(scale), out);
      loss += total * std::log(sum) - crossed / (job_.student_temperature * kScale);
    }
    if (job_.losses != nullptr) job_.losses[row] = loss;
  }

  // Sum of the combined target times the logits less the largest, in units of 1 / kScale; and where `out` is given
  // scale * (share * e - target).
  double combine(const float* z, float peak, int64_t used, float share, float scale, Student* out) {
    alignas(64) float target[kBlock];
    const float top = peak * kScale;
    double crossed = 0;
    for (int64_t begin = 0; begin < n_; begin += kBlock) {
      const int64_t size = n_ - begin < kBlock ? n_ - begin : kBlock;
      const int64_t whole = size / kLanes * kLanes;
      // What is behind the end of a row of exponentials is theirs too.
      for (int64_t k = 0; k < size; k += kLanes) {
        Floats sum = {};
        for (int64_t p = 0; p < used; ++p) {
          sum += read(rows_[p] + begin + k) * factors_[p];
        }
        write(sum, target + k);
      }
      if (job_.losses != nullptr) {
        Floats sums = {};
        for (int64_t k = 0; k < whole; k += kLanes) sums += read(target + k) * (read(z + begin + k) * kScale - top);
        crossed += total(sums);
        for (int64_t k = whole; k < size; ++k) crossed += target[k] * (z[begin + k] * kScale - top);
      }
      if (out != nullptr) {
        for (int64_t k = 0; k < size; k += kLanes) {
          write((read(e_ + begin + k) * share - read(target + k)) * scale, target + k);
        }
        put(target, size, job_.stream, out + begin);
      }
    }
    return crossed;
  }

  const DistillationJob& job_;
  const int64_t n_, room_, crops_;
  float* const teachers_;
  float* const e_;
  float* const z_;
  std::vector<double> sums_;
  std::vector<float> factors_;
  std::vector<const float*> rows_;
};

template <class Student, class Teacher>
void units(const DistillationJob& job, int64_t begin, int64_t end, float* scratch) {
  Distiller<Student, Teacher> distiller(job, scratch);
  for (int64_t unit = begin; unit < end; ++unit) distiller.run(unit);
}

template <class Student>
void by_teacher(const DistillationJob& job, int64_t begin, int64_t end, float* scratch) {
  switch (job.teacher.type) {
    case Type::kHalf:
      return units<Student, Half>(job, begin, end, scratch);
    case Type::kBf16:
      return units<Student, Bf16>(job, begin, end, scratch);
    default:
      return units<Student, float>(job, begin, end, scratch);
  }
}

}  // namespace

void distillation(const DistillationJob& job, int64_t begin, int64_t end, float* scratch) {
  switch (job.student.type) {
    case Type::kHalf:
      by_teacher<Half>(job, begin, end, scratch);
      break;
    case Type::kBf16:
      by_teacher<Bf16>(job, begin, end, scratch);
      break;
    default:
      by_teacher<float>(job, begin, end, scratch);
  }
  if (job.stream) finish_streams();
}

}  // namespace SDMP_ISA
}  // namespace sdmp
