// Checks and counts labels: before the first gradient the norms must be known, and before the first look-up the
// classes. Included inside an unnamed namespace by kernels_impl.h.
#pragma once

// What a task may have: numbers in [low, high], whole ones where `whole` is set.
template <class T>
struct LabelRange {
  T low, high, missing;  // missing: NaN where no number stands for it
  typename IntOf<T>::type whole;
};
template <class T>
static LabelRange<T> label_range(const TaskSpec& task) {
  const T largest = sizeof(T) == 8 ? static_cast<T>(1.7976931348623157e308) : static_cast<T>(3.4028234663852886e38);
  LabelRange<T> range{-largest, largest, static_cast<T>(__builtin_nan("")), 0};
  if (task.missing_number) range.missing = static_cast<T>(task.missing);
  if (task.loss == Loss::kPoissonNll || task.loss == Loss::kBce || task.loss == Loss::kCrossEntropy) range.low = T(0);
  if (task.loss == Loss::kBce) range.high = T(1);
  if (task.loss == Loss::kCrossEntropy) {
    // Rounded down: a class that is out of range must not pass.
    range.high = static_cast<T>(task.width - 1);
    if (static_cast<double>(range.high) > static_cast<double>(task.width - 1))
      range.high = range.high * (T(1) - (sizeof(T) == 8 ? static_cast<T>(0x1p-52) : static_cast<T>(0x1p-23)));
    range.whole = -1;
  }
  if (task.loss == Loss::kNone) range.low = T(1), range.high = T(0);
  return range;
}

// Adds the labels present to `count` (as -1 each) and what is wrong to `bad`.
template <class T>
MTL_INLINE void check_labels(Vec<T> v, Vec<T> low, Vec<T> high, Vec<T> missing, VecInt<T> whole, VecInt<T>& count,
                             VecInt<T>& bad) {
  // 1.5 * 2^52 or 2^23: adding it rounds to an integer. Between half of that and `exact` whole numbers may be refused,
  // which sends float32 labels on to the check in float64.
  const T round = sizeof(T) == 8 ? static_cast<T>(6755399441055744.0) : static_cast<T>(12582912.0);
  const T exact = sizeof(T) == 8 ? static_cast<T>(0x1p52) : static_cast<T>(0x1p23);
  const VecInt<T> has = (v == v) & (v != missing);
  const VecInt<T> rounded = ((v + round) - round == v) | (v >= broadcast(exact));
  const VecInt<T> good = (v >= low) & (v <= high) & (rounded | ~whole);
  count = count + has;
  bad = bad | (has & ~good);
}

// A matrix of labels as it lies, row by row: the tasks [0, tasks), a multiple of the lanes. Returns false if any label
// is wrong.
template <class T>
static MTL_NOINLINE bool count_matrix(const LossJob& job, int64_t tasks, int64_t first, int64_t last, int64_t* count) {
  constexpr int64_t L = VectorOf<T>::lanes, kTasks = 256, kRows = 1 << 20;
  using Int = typename IntOf<T>::type;
  alignas(64) T low[kTasks], high[kTasks], missing[kTasks];
  alignas(64) Int whole[kTasks], counts[kTasks];
  VecInt<T> bad{};
  for (int64_t t0 = 0; t0 < tasks; t0 += kTasks) {
    const int64_t width = min_of(kTasks, tasks - t0);
    for (int64_t t = 0; t < width; ++t) {
      const TaskSpec& task = job.tasks[t0 + t];
      const LabelRange<T> range = label_range<T>(task);
      low[t] = range.low, high[t] = range.high, missing[t] = range.missing, whole[t] = range.whole;
    }
    for (int64_t r0 = first; r0 < last; r0 += kRows) {
      for (int64_t t = 0; t < width; ++t) counts[t] = 0;
      for (int64_t r = r0; r < min_of(r0 + kRows, last); ++r) {
        const T* row = static_cast<const T*>(job.label_matrix.data) + r * job.label_matrix.row_stride + t0;
        for (int64_t t = 0; t < width; t += L) {
          VecInt<T> sum = load<Int>(counts + t);
          check_labels<T>(load<T>(row + t), load<T>(low + t), load<T>(high + t), load<T>(missing + t),
                          load<Int>(whole + t), sum, bad);
          store<Int>(counts + t, sum);
        }
      }
      for (int64_t t = 0; t < width; ++t) count[t0 + t] -= counts[t];
    }
  }
  Int any = 0;
  for (int i = 0; i < L; ++i) any |= bad[i];
  return any == 0;
}

// One column of labels, gathered as numbers.
static bool count_column(const TaskSpec& task, int64_t padded, const double* labels, int64_t* count) {
  const LabelRange<double> range = label_range<double>(task);
  VecInt<double> sum{}, bad{};
  for (int64_t r = 0; r < padded; r += VectorOf<double>::lanes)
    check_labels<double>(load<double>(labels + r), broadcast(range.low), broadcast(range.high),
                         broadcast(range.missing), VecInt<double>{} + range.whole, sum, bad);
  int64_t any = 0;
  for (int i = 0; i < VectorOf<double>::lanes; ++i) {
    any |= bad[i];
    *count -= sum[i];
  }
  return any == 0;
}

// Counts the labels of all tasks in the rows [first, last), for a class-weighted task also the weights of its labels.
// Returns a task that has a label it cannot have, or -1.
static int64_t count_labels_of(const LossJob& job, int64_t task_count, int64_t first, int64_t last, int64_t* count,
                               double* norm) {
  constexpr int64_t kRows = 32;
  const int64_t step = job.label_matrix.col_stride;
  // Tasks that are done as they lie; where something is wrong, the way below finds out whose it is.
  int64_t done = 0;
  if (step == 1 && job.label_matrix.type == LabelType::kFloat32) {
    done = task_count / VectorOf<float>::lanes * VectorOf<float>::lanes;
    for (int64_t t = 0; t < done; ++t)
      if (job.tasks[t].loss == Loss::kOutside) done = t / VectorOf<float>::lanes * VectorOf<float>::lanes;
    if (!count_matrix<float>(job, done, first, last, count)) {
      for (int64_t t = 0; t < done; ++t) count[t] = 0;
      done = 0;
    }
  }
  double labels[kLabelColumns * kRows];
  for (int64_t row = first; row < last; row += kRows) {
    const int64_t rows = min_of(kRows, last - row);
    int64_t read = -1;  // the first of the tasks whose labels are in `labels`
    for (int64_t t = 0; t < task_count; ++t) {
      const TaskSpec& task = job.tasks[t];
      if (!task.labels.data || task.loss == Loss::kOutside) continue;
      const bool weighted = task.loss == Loss::kCrossEntropy && task.numbers;
      if (t < done && !weighted) continue;
      double column[kRows];
      for (int64_t c = 0; c < task.labels.columns; ++c) {
        const double* y = column;
        if (step) {
          if (read < 0 || t >= read + kLabelColumns) {
            read = t;
            read_labels<double>(job.label_matrix, t, step, min_of(kLabelColumns, task_count - t), row, rows, kRows,
                                labels, kRows);
          }
          y = labels + (t - read) * kRows;
        } else {
          read_labels<double>(task.labels, c, task.labels.col_stride, 1, row, rows, kRows, column, kRows);
        }
        if (t >= done && !count_column(task, kRows, y, count + t)) return t;
        if (weighted)
          for (int64_t r = 0; r < rows; ++r)
            if (y[r] == y[r] && !(task.missing_number && y[r] == static_cast<double>(task.missing)))
              norm[t] += task.numbers[static_cast<int64_t>(y[r])];
      }
    }
  }
  return -1;
}
