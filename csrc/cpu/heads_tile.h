// One tile of rows through heads with hidden layers while it is in the cache: hidden units, logits, losses or gradients
// from outside, and from these the parts of dX, dW, db and the Gramian. Included inside an unnamed namespace by
// kernels_impl.h. Maths: torch_mtl_pyg/ops/multi_head_mlp.py.
//
// Everything is computed in accumulators, whatever the stored type is. Hidden units lie row-major, all tasks of a group
// side by side; logits lie transposed, as the losses take them.
#pragma once

template <class T>
MTL_INLINE int64_t line_stride(int64_t columns) {  // whole lines, and an odd number of them
  constexpr int64_t kLine = 64 / static_cast<int64_t>(sizeof(T));
  return (ceil_div(columns, kLine) | 1) * kLine;
}

template <class T>
struct HeadsScratch {
  T *x, *x_panels, *dx, *h, *slope, *tail, *h_panels, *columns, *panel, *z, *labels, *factors, *jacobian;
  int64_t stride, layer_size, jacobian_size, bytes;

  HeadsScratch(const HeadsJob& job, char* memory) {
    constexpr int64_t L = VectorOf<T>::lanes;
    const int64_t rows = job.tile_rows, hidden = job.heads.layers - 1, d = job.loss.d;
    const bool back = job.gradient, parameters = job.loss.need_weight;
    stride = line_stride<T>(rows);
    layer_size = hidden ? rows * line_stride<T>(job.widest_hidden) + 4 * L : 0;
    jacobian_size = rows * d;
    Pieces pieces{memory};
    x = pieces.take<T>(job.x_in_place && !job.routed ? 0 : rows * d);
    x_panels = pieces.take<T>(parameters ? panel_at<Fma<T>>(rows, d) + rows * 3 * L : 0);
    dx = pieces.take<T>(!job.needs_dx || (job.dx_in_place && !job.routed) ? 0 : rows * d);
    h = pieces.take<T>(hidden * layer_size);
    slope = pieces.take<T>(back ? hidden * layer_size : 0);
    tail = pieces.take<T>(back && hidden ? rows * job.widest_units : 0);
    h_panels = pieces.take<T>(parameters && hidden ? panel_at<Fma<T>>(rows, job.widest_units) + rows * 3 * L : 0);
    columns = pieces.take<T>(parameters && hidden ? rows * job.widest_hidden + 64 : 0);
    panel = pieces.take<T>(rows * 3 * L);
    z = pieces.take<T>(job.out ? 0 : job.loss.widest_group * stride);
    labels = pieces.take<T>(job.out ? 0 : (kLabelColumns + 1) * stride);
    factors = pieces.take<T>(job.heads.drops ? job.widest_hidden + 4 * L : 0);
    jacobian = pieces.take<T>(job.loss.need_gramian && !job.routed ? job.loss.group_count * jacobian_size : 0);
    bytes = pieces.used;
  }
};

// C = A * B + bias for all columns: element (i, p) of A at a[i * a_row + p].
template <class T>
static void dense(int64_t rows, int64_t p, const T* a, int64_t a_row, const void* panels, int64_t n, const T* bias,
                  bool accumulate, T* c, int64_t c_stride) {
  const int64_t padded = padded_columns<Fma<T>>(n);
  for (int64_t p0 = 0; p0 == 0 || p0 < p; p0 += kDepth) {
    const int64_t elements = min_of(p0 + kDepth, p) - p0;
    multiply_columns<Fma<T>>(rows, elements, a + p0, a_row, static_cast<const T*>(panels) + p0 * padded, n, 0, n,
                             accumulate || p0 > 0, p0 + elements == p ? bias : nullptr, c, c_stride, kNothingAhead);
  }
}

// The logits of one product, of whole panels: f(first column, columns, values, stride of the rows).
template <class T, class F>
static void each_logit_panel(int64_t rows, int64_t p, const T* a, int64_t a_row, const void* panels, int64_t n,
                             const T* bias, T* panel_out, F f) {
  constexpr int64_t L = VectorOf<T>::lanes;
  const int64_t padded = padded_columns<Fma<T>>(n);
  for (int64_t j = 0; j < n;) {
    const int vectors = panel_vectors<T>(n - j);
    const int64_t width = vectors * L;
    for (int64_t p0 = 0; p0 == 0 || p0 < p; p0 += kDepth) {
      const int64_t elements = min_of(p0 + kDepth, p) - p0;
      multiply_vectors<Fma<T>>(
          vectors, rows, elements, a + p0, a_row, 1, static_cast<const T*>(panels) + p0 * padded + j * elements, p0 > 0,
          bias && p0 + elements == p ? bias + j : nullptr, panel_out, width, static_cast<int>(width));
    }
    f(j, min_of(width, n - j), panel_out, width);
    j += width;
  }
}

// sum[k, d] += sum over the rows of G[r, k] * panels[r, d], and column_sum[k] += sum over the rows of G[r, k].
template <class T>
static void add_outer(const Matrix& g, int64_t d, T* sum, T* column_sum, const T* panels, T* scratch) {
  outer_panels<Fma<T>, T, 2>(g, d, sum, d, panels, scratch);
  outer_panels<Fma<T>, T, 1>(g, d, sum, d, panels, scratch);
  outer_panels<Fma<T>, T, 3>(g, d, sum, d, panels, scratch);
  if (!column_sum) return;
  for (int64_t c = 0; c < g.cols; ++c) scratch[c] = T(0);
  for (int64_t r = 0; r < g.rows; ++r) add_run(at<T>(g, r, 0), g.cols, scratch);
  add_run(scratch, g.cols, column_sum);
}

// a[r, j] *= b[r, j]
template <class T>
static void multiply_into(int64_t rows, int64_t n, T* a, int64_t a_row, const T* b, int64_t b_row) {
  constexpr int64_t L = VectorOf<T>::lanes;
  for (int64_t r = 0; r < rows; ++r) {
    T* to = a + r * a_row;
    const T* by = b + r * b_row;
    int64_t j = 0;
    for (; j + L <= n; j += L) store<T>(to + j, load<T>(to + j) * load<T>(by + j));
    for (; j < n; ++j) to[j] *= by[j];
  }
}

// The tile of x, where it is not read as it lies.
template <class T, class In>
static void read_rows(const HeadsJob& job, const HeadsTile& tile, T* out) {
  const int64_t d = job.loss.d;
  for (int64_t r = 0; r < tile.rows; ++r) {
    if (tile.index && r + 8 < tile.rows && tile.x.col_stride == 1) {
      const char* ahead = reinterpret_cast<const char*>(at<In>(tile.x, tile.index[r + 8], 0));
      for (int64_t b = 0; b < d * static_cast<int64_t>(sizeof(In)); b += 64) __builtin_prefetch(ahead + b, 0, 2);
    }
    widen_run(at<In>(tile.x, tile.index ? tile.index[r] : tile.row + r, 0), d, tile.x.col_stride, out + r * d);
  }
}

// One label column of the rows of an index; rows past the end are missing.
template <class T>
static void read_indexed(const Labels& labels, int64_t c, const HeadsTile& tile, int64_t padded, T* out) {
  with_label_type(labels, [&](auto* in) {
    for (int64_t r = 0; r < tile.rows; ++r)
      out[r] = static_cast<T>(label_value(in[tile.index[r] * labels.row_stride + c * labels.col_stride]));
  });
  for (int64_t r = tile.rows; r < padded; ++r) out[r] = static_cast<T>(__builtin_nan(""));
}

// The losses of the one task of routed rows.
template <class T>
static void indexed_losses(const HeadsJob& job, int64_t t, const HeadsTile& tile, int64_t padded, T* z, int64_t stride,
                           T* labels, double* loss) {
  const TaskSpec& task = job.loss.tasks[t];
  const T scale = static_cast<T>(job.loss.scale[t]);
  if (!task.counts()) {
    for (int64_t c = 0; c < task.width; ++c)
      for (int64_t r = 0; r < padded; ++r) z[c * stride + r] = T(0);
    return;
  }
  for (int64_t c = 0; c < task.labels.columns; ++c) {
    read_indexed<T>(task.labels, c, tile, padded, labels);
    if (task.loss == Loss::kOutside) {
      for (int64_t r = 0; r < padded; ++r) z[c * stride + r] = r < tile.rows ? labels[r] : T(0);
      continue;
    }
    *loss += task_loss<T>(task, z, stride, padded, scale, job.gradient, labels, c);
  }
}

// One group of tasks: what is common to its steps.
template <class T>
struct GroupWork {
  const HeadsJob& job;
  const HeadsGroup& group;
  const HeadsTile& tile;
  const HeadsScratch<T>& s;
  const T* x;
  int64_t x_row;

  int64_t layers() const { return job.heads.layers; }
  int64_t tasks() const { return group.last_task - group.first_task; }
  int64_t units(int64_t layer) const { return job.heads.sizes[layer + 1]; }  // of one task in a hidden layer
  int64_t columns(int64_t layer) const { return tasks() * units(layer); }
  int64_t row(int64_t layer) const { return line_stride<T>(columns(layer)); }
  T* h(int64_t layer) const { return s.h + layer * s.layer_size; }
  T* slope(int64_t layer) const { return s.slope + layer * s.layer_size; }
  const void* panels(int64_t t, int64_t layer) const { return group.task_panels[t * (layers() - 1) + layer - 1]; }
  const void* back_panels(int64_t t, int64_t layer) const { return group.task_back[t * (layers() - 1) + layer - 1]; }
  const T* bias(int64_t layer) const { return static_cast<const T*>(group.bias[layer]); }
  // What comes into a layer of one task.
  const T* input(int64_t t, int64_t layer) const { return layer ? h(layer - 1) + t * units(layer - 1) : x; }
  int64_t input_row(int64_t layer) const { return layer ? row(layer - 1) : x_row; }
};

// Hidden units of all tasks, and their slopes where there will be gradients.
template <class T>
static void hidden_layers(const GroupWork<T>& w) {
  const HeadsSpec& heads = w.job.heads;
  const int64_t rows = w.tile.rows;
  for (int64_t layer = 0; layer + 1 < w.layers(); ++layer) {
    const int64_t units = w.units(layer), columns = w.columns(layer), stride = w.row(layer);
    T* const h = w.h(layer);
    if (layer == 0) {
      dense<T>(rows, w.job.loss.d, w.x, w.x_row, w.group.panels, columns, w.bias(0), false, h, stride);
    } else {
      for (int64_t t = 0; t < w.tasks(); ++t)
        dense<T>(rows, w.units(layer - 1), w.input(t, layer), w.input_row(layer), w.panels(t, layer), units,
                 w.bias(layer) ? w.bias(layer) + t * units : nullptr, false, h + t * units, stride);
    }
    T* const slope = w.job.gradient ? w.slope(layer) : nullptr;
    for (int64_t r = 0; r < rows; ++r) {
      T *values = h + r * stride, *slopes = slope ? slope + r * stride : nullptr;
      activate_run<T>(heads.act, columns, values, slopes);
      if (!heads.drops) continue;
      const int64_t number = w.tile.index ? w.tile.index[r] : w.tile.row + r;
      for (int64_t t = 0; t < w.tasks(); ++t)
        mask_run<T>(heads, number, w.group.first_task + t, layer, units, w.s.factors + t * units);
      // A unit that is dropped is 0 whatever it was; a slope of it too.
      for (int64_t c = 0; c < columns; ++c) {
        values[c] = w.s.factors[c] == T(0) ? T(0) : values[c] * w.s.factors[c];
        if (slopes) slopes[c] = w.s.factors[c] == T(0) ? T(0) : slopes[c] * w.s.factors[c];
      }
    }
  }
}

// The gradients of one group, from those at its logits in s.z.
template <class T>
static void heads_backward(const GroupWork<T>& w, bool first, T* dx, int64_t dx_row, T* jacobian, HeadsSums sums) {
  constexpr int64_t L = VectorOf<T>::lanes;
  const HeadsJob& job = w.job;
  const int64_t rows = w.tile.rows, padded = ceil_div(rows, L) * L, last = w.layers() - 1, d = job.loss.d;
  const T* const z = w.s.z;
  // The first row of a task in the sums of a layer.
  const auto offset = [&](int64_t t, int64_t layer) {
    const int64_t task = w.group.first_task + t;
    return layer == last ? job.loss.tasks[task].begin - job.loss.tasks[sums.first_task].begin
                         : (task - sums.first_task) * w.units(layer);
  };
  const auto weight_sum = [&](int64_t t, int64_t layer) {
    return static_cast<T*>(sums.weight[layer]) + offset(t, layer) * job.heads.sizes[layer];
  };
  const auto bias_sum = [&](int64_t t, int64_t layer) {
    return sums.bias[layer] ? static_cast<T*>(sums.bias[layer]) + offset(t, layer) : nullptr;
  };
  for (int64_t t = 0; t < w.tasks(); ++t) {
    const TaskSpec& task = job.loss.tasks[w.group.first_task + t];
    const T* own = z + (task.begin - w.group.begin) * w.s.stride;
    const int64_t inputs = job.heads.sizes[last];
    if (job.loss.need_weight) {
      if (T* db = bias_sum(t, last))
        for (int64_t c = 0; c < task.width; ++c) db[c] += sum_of_row<T>(own + c * w.s.stride, padded);
      const T* panels = w.s.x_panels;
      if (last) {
        pack_tile<Fma<T>, T>({w.input(t, last), rows, inputs, w.input_row(last), 1}, w.s.h_panels);
        panels = w.s.h_panels;
      }
      T* dw = weight_sum(t, last);
      for (int64_t j = 0; j < inputs;) {
        const int vectors = panel_vectors<T>(inputs - j);
        multiply_vectors<Fma<T>>(vectors, task.width, rows, own, w.s.stride, 1, panels + panel_at<Fma<T>>(rows, j),
                                 true, nullptr, dw + j, inputs, static_cast<int>(min_of(vectors * L, inputs - j)));
        j += vectors * L;
      }
    }
    if (last == 0) continue;
    const T* g = own;
    for (int64_t layer = last; layer > 0; --layer) {
      const int64_t below = w.units(layer - 1);
      if (layer == last)
        multiply_panels<Fma<T>>(rows, task.width, g, 1, w.s.stride, static_cast<const T*>(w.back_panels(t, layer)),
                                below, false, w.s.tail, below);
      else
        dense<T>(rows, w.units(layer), g, w.row(layer), w.back_panels(t, layer), below, nullptr, false, w.s.tail,
                 below);
      T* const to = w.slope(layer - 1) + t * below;
      multiply_into<T>(rows, below, to, w.row(layer - 1), w.s.tail, below);
      if (layer > 1 && job.loss.need_weight) {
        const int64_t under = w.units(layer - 2);
        pack_tile<Fma<T>, T>({w.input(t, layer - 1), rows, under, w.input_row(layer - 1), 1}, w.s.h_panels);
        add_outer<T>({to, rows, below, w.row(layer - 1), 1}, under, weight_sum(t, layer - 1), bias_sum(t, layer - 1),
                     w.s.h_panels, w.s.columns);
      }
      g = to;
    }
  }
  if (last > 0 && job.loss.need_weight)
    add_outer<T>({w.slope(0), rows, w.columns(0), w.row(0), 1}, d, weight_sum(0, 0), bias_sum(0, 0), w.s.x_panels,
                 w.s.columns);
  T* const to = jacobian ? jacobian : dx;
  if (!to) return;
  const bool add = !jacobian && !first;
  if (last > 0)
    dense<T>(rows, w.columns(0), w.slope(0), w.row(0), w.group.back_panels, d, nullptr, add, to, jacobian ? d : dx_row);
  else
    multiply_panels<Fma<T>>(rows, w.group.end - w.group.begin, z, 1, w.s.stride,
                            static_cast<const T*>(w.group.back_panels), d, add, to, jacobian ? d : dx_row);
}

// gram[i, j] += <J_i, J_j> for j >= i, of `count` vectors of n numbers that follow each other.
template <class T>
static void add_gramian(const T* jacobian, int64_t count, int64_t n, double* gram) {
  constexpr int64_t L = VectorOf<T>::lanes, kPart = 512;
  for (int64_t p0 = 0; p0 < n; p0 += kPart) {
    const int64_t p1 = min_of(p0 + kPart, n), whole = p0 + (p1 - p0) / L * L;
    for (int64_t i = 0; i < count; ++i) {
      const T* a = jacobian + i * n;
      for (int64_t j0 = i; j0 < count; j0 += 4) {
        const T* b[4];
        for (int64_t v = 0; v < 4; ++v) b[v] = jacobian + min_of(j0 + v, count - 1) * n;
        Vec<T> sum[4] = {};
        for (int64_t p = p0; p < whole; p += L) {
          const Vec<T> x = load<T>(a + p);
          MTL_UNROLL
          for (int v = 0; v < 4; ++v) sum[v] = sum[v] + x * load<T>(b[v] + p);
        }
        for (int64_t v = 0; v < min_of(4, count - j0); ++v) {
          double total = sum_lanes<T>(sum[v]);
          for (int64_t p = whole; p < p1; ++p) total += static_cast<double>(a[p]) * static_cast<double>(b[v][p]);
          gram[i * count + j0 + v] += total;
        }
      }
    }
  }
}

template <class T, class In>
static void heads_tile_as(const HeadsJob& job, const HeadsGroup* groups, int64_t group_count, const HeadsTile& tile,
                          const HeadsSums& sums, void* memory) {
  constexpr int64_t L = VectorOf<T>::lanes;
  const HeadsScratch<T> s(job, static_cast<char*>(memory));
  const int64_t rows = tile.rows, padded = ceil_div(rows, L) * L, d = job.loss.d;
  const T* x = s.x;
  int64_t x_row = d;
  // Rows that follow each other, as those of a sorted route, stay where they lie.
  const int64_t row = tile.index ? tile.index[0] : tile.row;
  const bool in_order = !tile.index || tile.index[rows - 1] - row == rows - 1;
  if (job.x_in_place && in_order) {
    x = at<T>(tile.x, row, 0);
    x_row = tile.x.row_stride;
  } else {
    read_rows<T, In>(job, tile, s.x);
  }
  if (job.loss.need_weight) pack_tile<Fma<T>, T>({x, rows, d, x_row, 1}, s.x_panels);
  T* dx = nullptr;
  if (job.needs_dx) dx = job.dx_in_place && in_order ? static_cast<T*>(tile.dx) + row * d : s.dx;

  for (int64_t g = 0; g < group_count; ++g) {
    const HeadsGroup& group = groups[g];
    const GroupWork<T> w{job, group, tile, s, x, x_row};
    hidden_layers<T>(w);
    const int64_t last = job.heads.layers - 1;
    // Linear heads are one product, others one for each task.
    const int64_t products = last ? w.tasks() : 1;
    for (int64_t t = 0; t < products; ++t) {
      const TaskSpec& task = job.loss.tasks[group.first_task + t];
      const int64_t begin = (last ? task.begin : group.begin), width = last ? task.width : group.end - group.begin;
      const T* bias = w.bias(last) ? w.bias(last) + (begin - group.begin) : nullptr;
      each_logit_panel<T>(rows, job.heads.sizes[last], w.input(t, last), w.input_row(last),
                          last ? w.panels(t, last) : group.panels, width, bias, s.panel,
                          [&](int64_t j, int64_t columns, const T* values, int64_t stride) {
                            if (!job.out) {
                              const int64_t at = begin - group.begin + j;
                              transpose<T>(values, stride, rows, columns, s.z + at * s.stride, s.stride);
                              return;
                            }
                            const int64_t at = (job.routed ? 0 : begin) + j;
                            for (int64_t r = 0; r < rows; ++r) {
                              const int64_t to = tile.index ? tile.index[r] : tile.row + r;
                              In* row = static_cast<In*>(job.out) + to * job.out_columns;
                              narrow_run(values + r * stride, columns, row + at);
                              if (job.routed && j + columns == width)
                                __builtin_memset(row + width, 0, (job.out_columns - width) * sizeof(In));
                            }
                          });
    }
    if (job.out) continue;
    for (int64_t c = 0; c < group.end - group.begin; ++c)
      for (int64_t r = rows; r < padded; ++r) s.z[c * s.stride + r] = T(0);
    if (tile.index) {
      indexed_losses<T>(job, group.first_task, tile, padded, s.z, s.stride, s.labels, sums.loss);
    } else {
      const LossGroup own{group.first_task, group.last_task, group.begin, group.end, nullptr, nullptr, nullptr};
      group_losses<T>(job.loss, own, tile.row, rows, padded, s.z, s.stride, job.gradient, s.labels, sums.loss);
    }
    if (job.gradient)
      heads_backward<T>(w, g == 0, dx, d, job.routed || !job.loss.need_gramian ? nullptr : s.jacobian + g * rows * d,
                        sums);
  }
  if (job.out) return;
  if (job.loss.need_gramian && job.routed) {
    double square = 0;
    for (int64_t r = 0; r < rows; ++r) {
      Vec<T> sum{};
      int64_t j = 0;
      for (; j + L <= d; j += L) sum = sum + load<T>(dx + r * d + j) * load<T>(dx + r * d + j);
      square += sum_lanes<T>(sum);
      for (; j < d; ++j) square += static_cast<double>(dx[r * d + j]) * static_cast<double>(dx[r * d + j]);
    }
    *sums.gram += square;
  } else if (job.loss.need_gramian) {
    add_gramian<T>(s.jacobian, group_count, rows * d, sums.gram);
  } else if (job.loss.need_x && dx == s.dx) {
    for (int64_t r = 0; r < rows; ++r)
      narrow_run(dx + r * d, d, static_cast<In*>(tile.dx) + (tile.index ? tile.index[r] : tile.row + r) * d);
  }
}
