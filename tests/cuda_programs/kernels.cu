// The kernels of the heads on buffers without a byte to spare, for the sanitizers: products in every type and
// orientation, and one launch of heads with losses. The values are compared with plain loops.
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "common.h"
#include "cuda/logits_loss.cuh"
#include "cuda/warp_loss.cuh"

using namespace mtl;
using namespace mtl::cuda;

namespace {

template <class T>
std::vector<T> numbers(int64_t count, double scale) {
  std::vector<T> v(count);
  for (T& x : v) x = converted<T>(static_cast<float>((rand() % 2001 - 1000) / 1000.0 * scale));
  return v;
}

template <class Engine, bool kTransposedA, bool kTransposedB>
void product(int64_t m, int64_t n, int64_t depth, int64_t slices, double eps) {
  using T = typename Engine::Element;
  using Sum = typename Engine::Sum;
  const std::vector<T> a = numbers<T>(m * depth, 1), b = numbers<T>(depth * n, 1), bias = numbers<T>(n, 1);
  std::vector<Sum> parts(slices * m * n), sum(m * n);
  const View<T> va = kTransposedA ? view_of<T>(a.data(), depth, m, m, 1) : view_of<T>(a.data(), m, depth, depth, 1);
  const View<T> vb = kTransposedB ? view_of<T>(b.data(), depth, n, n, 1) : view_of<T>(b.data(), n, depth, depth, 1);
  check(gemm<Engine, Sum, kTransposedA, kTransposedB>(
      {va, vb, slices == 1 ? bias.data() : nullptr, 1, parts.data(), m, n, depth}, slices, nullptr));
  check(sum_parts(parts.data(), slices, m * n, sum.data(), nullptr));
  for (int64_t i = 0; i < m; ++i)
    for (int64_t j = 0; j < n; ++j) {
      double exact = slices == 1 ? number(bias[j]) : 0, size = fabs(exact);
      for (int64_t k = 0; k < depth; ++k) {
        const double term = number(kTransposedA ? a[k * m + i] : a[i * depth + k]) *
                            number(kTransposedB ? b[k * n + j] : b[j * depth + k]);
        exact += term;
        size += fabs(term);
      }
      expect(sum[i * n + j], exact, size, eps);
    }
}
template <class Engine>
void products(double eps) {
  const int64_t shapes[][4] = {{1, 1, 1, 1},     {70, 33, 50, 1}, {130, 129, 40, 1},
                               {64, 128, 32, 1}, {7, 5, 700, 3},  {33, 40, 0, 1}};
  for (const auto& [m, n, depth, slices] : shapes) {
    product<Engine, false, false>(m, n, depth, slices, eps);
    product<Engine, false, true>(m, n, depth, slices, eps);
    product<Engine, true, true>(m, n, depth, slices, eps);
  }
}

// The gradients of x, weights and biases from those at the logits, in float64.
struct Gradients {
  int64_t k, d;
  std::vector<double> dw, dw_size, db;

  Gradients(int64_t columns, int64_t depth) : k(columns), d(depth), dw(k * d), dw_size(k * d), db(k) {}

  template <class T>
  void row(int64_t r, const std::vector<double>& g, const std::vector<T>& x, const std::vector<T>& w,
           const std::vector<T>& dx, double eps) {
    for (int64_t i = 0; i < d; ++i) {
      double exact = 0, size = 0;
      for (int64_t c = 0; c < k; ++c) {
        const double term = g[c] * number(w[c * d + i]), of_weight = g[c] * number(x[r * d + i]);
        exact += term;
        size += fabs(term);
        dw[c * d + i] += of_weight;
        dw_size[c * d + i] += fabs(of_weight);
      }
      expect(number(dx[r * d + i]), exact, size, eps);
    }
    for (int64_t c = 0; c < k; ++c) db[c] += g[c];
  }
  // Of two blocks.
  void check(const std::vector<float>& of_weight, const std::vector<float>& of_bias, int64_t rows, double eps,
             double bias_eps) const {
    for (int64_t i = 0; i < k * d; ++i) expect(of_weight[i] + of_weight[k * d + i], dw[i], dw_size[i], eps);
    for (int64_t c = 0; c < k; ++c) expect(of_bias[c] + of_bias[k + c], db[c], static_cast<double>(rows), bias_eps);
  }
};

// Two tasks of squared errors and one of classes, some labels missing: dx, dW and db of all in one launch.
template <class Engine, int K, int D>
void fused(int64_t n, int64_t d, int64_t classes, double eps) {
  using T = typename Engine::Element;
  const int64_t k = classes + 2, blocks = 2;
  const std::vector<T> x = numbers<T>(n * d, 1), w = numbers<T>(k * d, 0.3), bias = numbers<T>(k, 1);
  std::vector<float> labels(3 * n), scale = {0.5f, 0.25f, 2.0f};
  // The kernel finds these factors: weights over the sum of what two blocks have counted.
  const std::vector<double> weight = {2, 1, 8}, norms(6, NAN);
  const std::vector<long long> counts = {1, 3, 2, 2, 4, 0};
  std::vector<long long> count_out(3);
  std::vector<double> norm_out(3);
  for (int64_t r = 0; r < n; ++r) {
    labels[r] = r % 3 == 0 ? NAN : static_cast<float>(r % 5) - 2;
    labels[n + r] = static_cast<float>(r % classes);
    labels[2 * n + r] = r % 7 == 1 ? NAN : 0.5f;
  }
  DeviceTask tasks[3] = {};
  const int64_t widths[3] = {1, classes, 1};
  for (int t = 0, begin = 0; t < 3; begin += static_cast<int>(widths[t++])) {
    tasks[t].begin = begin;
    tasks[t].width = widths[t];
    tasks[t].label_row = t;
    tasks[t].numbers = -1;
    tasks[t].labels.columns = 1;
    tasks[t].loss = t == 1 ? Loss::kCrossEntropy : Loss::kMse;
    tasks[t].counts = true;
  }
  std::vector<T> dx(n * d);
  std::vector<float> weight_parts(blocks * k * d), bias_parts(blocks * k);
  std::vector<double> loss_parts(blocks * 3);
  const LossJob<T, float> job{
      view_of<T>(x.data(), n, d, d, 1),
      view_of<T>(w.data(), k, d, d, 1),
      bias.data(),
      1,
      tasks,
      nullptr,
      labels.data(),
      nullptr,
      {tasks, weight.data(), counts.data(), norms.data(), 3, 2, count_out.data(), norm_out.data()},
      3,
      n,
      dx.data(),
      true,
      weight_parts.data(),
      bias_parts.data(),
      loss_parts.data()};
  const auto kernel = fused_loss_kernel<Engine, K, D>;
  check(allow_shared(kernel, FusedShape<Engine, K, D>::kShared));
  check(launch(kernel, dim3(blocks), dim3(kThreads), FusedShape<Engine, K, D>::kShared, nullptr, job));

  std::vector<double> loss(3);
  Gradients exact(k, d);
  for (int64_t r = 0; r < n; ++r) {
    std::vector<double> z(k), g(k);
    for (int64_t c = 0; c < k; ++c) {
      z[c] = number(bias[c]);
      for (int64_t i = 0; i < d; ++i) z[c] += number(x[r * d + i]) * number(w[c * d + i]);
    }
    for (int t : {0, 2}) {
      const int64_t c = tasks[t].begin;
      const double y = labels[t * n + r];
      if (y != y) continue;
      loss[t] += (z[c] - y) * (z[c] - y);
      g[c] = 2 * (z[c] - y) * scale[t];
    }
    double total = 0;
    for (int64_t c = 1; c <= classes; ++c) total += exp(z[c]);
    const auto own = static_cast<int64_t>(labels[n + r]);
    loss[1] += log(total) - z[1 + own];
    for (int64_t c = 0; c < classes; ++c) g[1 + c] = (exp(z[1 + c]) / total - (c == own)) * scale[1];
    exact.row(r, g, x, w, dx, eps);
  }
  exact.check(weight_parts, bias_parts, n, eps, eps);
  for (int t = 0; t < 3; ++t) {
    expect(loss_parts[t] + loss_parts[3 + t], loss[t], loss[t], eps);
    expect(static_cast<double>(count_out[t]), 4, 0, 0);
    expect(norm_out[t], 4, 0, 0);
  }
}

// Cross-entropy in the rows of warps: tasks of `classes`, 3 without labels, and 9, two fragments.
template <class Engine, int K, int D>
void warps(int64_t n, int64_t d, int64_t classes, double eps) {
  using T = typename Engine::Element;
  using Shape = WarpLossShape<Engine, K, D>;
  const int64_t widths[3] = {classes, 3, 9}, k = classes + 12, blocks = 2, step = (n + 3) / 4 * 4;
  const std::vector<T> x = numbers<T>(n * d, 1), w = numbers<T>(k * d, 0.3), bias = numbers<T>(k, 1);
  const std::vector<float> scale = {0.5f, 0.25f, 2.0f};
  std::vector<float> labels(2 * step, 77.0f);  // what lies behind the rows is nobody's label
  for (int64_t r = 0; r < n; ++r) {
    labels[r] = r % 3 == 0 ? NAN : static_cast<float>(r % classes);
    labels[step + r] = static_cast<float>(r % 9);
  }
  std::vector<Slot> slots;
  std::vector<WarpTask> tasks;
  for (int t = 0, begin = 0; t < 3; begin += static_cast<int>(widths[t++])) {
    const int pieces = static_cast<int>((widths[t] + 7) / 8);
    tasks.push_back({static_cast<int>(slots.size()), pieces, t == 0 ? 0 : t == 1 ? -1 : 1, 0.0f});
    for (int c = 0; c < widths[t]; c += 8)
      slots.push_back({begin + c, static_cast<int>(widths[t] - c < 8 ? widths[t] - c : 8)});
  }
  std::vector<T> dx(n * d);
  std::vector<float> weight_parts(blocks * k * d), bias_parts(blocks * k);
  std::vector<double> loss_parts(blocks * 3);
  WarpLossJob<T> job{};
  job.loss.x = view_of<T>(x.data(), n, d, d, 1);
  job.loss.weight = view_of<T>(w.data(), k, d, d, 1);
  job.loss.bias = bias.data();
  job.loss.bias_stride = 1;
  job.loss.labels = labels.data();
  job.loss.label_step = step;
  job.loss.scale = scale.data();
  job.loss.norm.task_count = 3;
  job.loss.task_count = 3;
  job.loss.dx = dx.data();
  job.loss.need_sums = true;
  job.loss.weight_parts = weight_parts.data();
  job.loss.bias_parts = bias_parts.data();
  job.loss.loss_parts = loss_parts.data();
  job.slots = slots.data();
  job.tasks = tasks.data();
  job.slot_count = static_cast<int>(slots.size());
  job.task_count = 3;
  job.label_rows = 2;
  const auto kernel = warp_loss_kernel<Engine, K, D>;
  check(allow_shared(kernel, Shape::shared(2)));
  check(launch(kernel, dim3(blocks), dim3(Shape::kBlock), Shape::shared(2), nullptr, job));

  std::vector<double> loss(3);
  Gradients exact(k, d);
  for (int64_t r = 0; r < n; ++r) {
    std::vector<double> g(k);
    int64_t begin = 0;
    for (int t = 0; t < 3; begin += widths[t++]) {
      const float y = t == 1 ? NAN : labels[t / 2 * step + r];
      if (y != y) continue;
      std::vector<double> z(widths[t]);
      double total = 0;
      for (int64_t c = 0; c < widths[t]; ++c) {
        z[c] = number(bias[begin + c]);
        for (int64_t i = 0; i < d; ++i) z[c] += number(x[r * d + i]) * number(w[(begin + c) * d + i]);
        total += exp(z[c]);
      }
      const auto own = static_cast<int64_t>(y);
      loss[t] += log(total) - z[own];
      for (int64_t c = 0; c < widths[t]; ++c) g[begin + c] = (exp(z[c]) / total - (c == own)) * scale[t];
    }
    exact.row(r, g, x, w, dx, eps);
  }
  exact.check(weight_parts, bias_parts, n, eps, 64 * 0x1p-24);
  for (int t = 0; t < 3; ++t) expect(loss_parts[t] + loss_parts[3 + t], loss[t], loss[t], 64 * 0x1p-24);
}

// Losses of logits in memory, in tiles for `planned` rows, of which there are `n`: gradients in both types, their
// columns' sums, losses. `rows`, `parts`: the tile that is to come out.
template <class Element, class Sum, int kAtOnce>
void logits(int64_t planned, int64_t n, const std::vector<int64_t>& widths, int rows, int parts, double eps) {
  const int64_t count = static_cast<int64_t>(widths.size()), blocks = 2;
  TaskWidths of_tasks{count, 0, 0};
  std::vector<DeviceTask> tasks(count);
  int64_t k = 0;
  for (int64_t t = 0; t < count; ++t) {
    of_tasks.beyond_narrow += widths[t] > kNarrowTask;
    of_tasks.beyond_narrow_in_wide += widths[t] > kNarrowInWide;
    tasks[t] = {};
    tasks[t].begin = k;
    tasks[t].width = widths[t];
    tasks[t].label_row = t;
    tasks[t].numbers = -1;
    tasks[t].labels.columns = 1;
    tasks[t].loss = Loss::kCrossEntropy;
    tasks[t].counts = true;
    k += widths[t];
  }
  const LogitTile tile = logit_tile<Sum>(planned, of_tasks, k, kAtOnce);
  expect(tile.rows, rows, 0, 0);
  expect(tile.parts, parts, 0, 0);
  const std::vector<Sum> before = numbers<Sum>(n * k, 2);
  const std::vector<Element> bias = numbers<Element>(k, 1);
  std::vector<Sum> z = before, labels(count * n), scale(count), bias_parts(blocks * k);
  std::vector<Element> g(n * k);
  for (int64_t t = 0; t < count; ++t) {
    scale[t] = static_cast<Sum>(0.25 * static_cast<double>(t % 3 + 1));
    for (int64_t r = 0; r < n; ++r)
      labels[t * n + r] = (r + t) % 4 == 0 ? static_cast<Sum>(NAN) : static_cast<Sum>(r % widths[t]);
  }
  std::vector<double> loss_parts(blocks * count);
  LogitsJob<Element, Sum> job{};
  job.loss.bias = bias.data();
  job.loss.bias_stride = 1;
  job.loss.tasks = tasks.data();
  job.loss.labels = labels.data();
  job.loss.scale = scale.data();
  job.loss.task_count = count;
  job.loss.label_step = n;
  job.loss.bias_parts = bias_parts.data();
  job.loss.loss_parts = loss_parts.data();
  job.n = n;
  job.k = k;
  job.z = z.data();
  job.g = sizeof(Element) == sizeof(Sum) ? nullptr : g.data();
  job.gradient = job.add_bias = job.keep = true;
  const auto kernel = logit_tiles_kernel<Element, Sum, kAtOnce>;
  check(allow_shared(kernel, tile.shared));
  check(launch(kernel, dim3(blocks), dim3(kThreads), tile.shared, nullptr, job, tile));

  std::vector<double> sums(k);
  for (int64_t t = 0; t < count; ++t) {
    double loss = 0;
    for (int64_t r = 0; r < n; ++r) {
      double total = 0;
      const auto at = [&](int64_t c) {
        return number(before[r * k + tasks[t].begin + c]) + number(bias[tasks[t].begin + c]);
      };
      for (int64_t c = 0; c < widths[t]; ++c) total += exp(at(c));
      const double y = static_cast<double>(labels[t * n + r]);
      if (y == y) loss += log(total) - at(static_cast<int64_t>(y));
      for (int64_t c = 0; c < widths[t]; ++c) {
        const double exact = y == y ? (exp(at(c)) / total - (c == y)) * static_cast<double>(scale[t]) : 0;
        const int64_t place = r * k + tasks[t].begin + c;
        sums[tasks[t].begin + c] += exact;
        expect(number(z[place]), exact, 1, eps);
        if (job.g) expect(number(g[place]), exact, fabs(exact), 0x1p-8);
      }
    }
    expect(loss_parts[t] + loss_parts[count + t], loss, loss + static_cast<double>(n), eps);
  }
  for (int64_t c = 0; c < k; ++c)
    expect(number(bias_parts[c]) + number(bias_parts[k + c]), sums[c], static_cast<double>(n), eps);
}
template <class Element, class Sum>
void logits(double eps) {
  const int64_t million = 1 << 20;
  const std::vector<int64_t> nine(9, 2);
  logits<Element, Sum, 1>(million, 300, {3}, 256, 8, eps);
  logits<Element, Sum, 2>(million, 300, {3, 3}, 128, 4, eps);
  logits<Element, Sum, 1>(million, 100, {3, 3, 3, 3, 3}, 64, 2, eps);
  logits<Element, Sum, 2>(million, 70, nine, 32, 1, eps);
  logits<Element, Sum, 4>(70, 70, {40}, 32, 8, eps);
  logits<Element, Sum, 1>(70, 70, {40, 2, 1}, 32, 8, eps);
  logits<Element, Sum, 4>(70, 70, {2, 34, 4, 5, 3, 36}, 32, 4, eps);
}

void run(const std::string& name) {
  const double single = 64 * 0x1p-24, half = 4 * 0x1p-8;
  if (name == "products_float32") products<Exact32>(single);
  if (name == "products_float64") products<Exact64>(64 * 0x1p-53);
  if (name == "products_tf32") products<TensorTf32>(4 * 0x1p-11);
  if (name == "products_bfloat16") products<TensorBFloat16>(single);
  if (name == "products_float16") products<TensorFloat16>(single);
  if (name == "fused_float32") {
    fused<Exact32, 32, 64>(150, 40, 5, single);
    fused<Exact32, 128, 128>(70, 101, 70, single);
  }
  if (name == "fused_tf32") fused<TensorTf32, 32, 128>(150, 72, 5, 4 * 0x1p-10);
  if (name == "fused_bfloat16") {
    fused<TensorBFloat16, 32, 64>(150, 40, 5, half);
    fused<TensorBFloat16, 128, 128>(200, 128, 126, half);
  }
  if (name == "warps_bfloat16") {
    warps<TensorBFloat16, 128, 128>(300, 128, 100, half);
    warps<TensorBFloat16, 32, 64>(200, 50, 5, half);
  }
  if (name == "logits_float32") {
    logits<float, float>(single);
    logits<float, float, 4>(20, 20, {600, 2, 2}, 16, 4, single);
    logits<float, float, 4>(20, 20, {1100, 2, 2}, 8, 2, single);
  }
  if (name == "logits_float64") logits<double, double>(64 * 0x1p-53);
  if (name == "logits_bfloat16") logits<BFloat16, float>(single);
  if (name == "warps_float16") warps<TensorFloat16, 64, 128>(140, 72, 16, half / 8);
  if (name == "fused_float16") fused<TensorFloat16, 128, 64>(65, 33, 40, half / 8);
}

}  // namespace

int main(int, char** names) {
  run(names[1]);
  printf("%g of what is allowed\n", worst);
  return worst <= 1 ? 0 : 1;
}
