// The kernels over edges on buffers without a byte to spare, for the sanitizers: rows gathered and reduced, with hubs,
// the gradient of max, edges' products, and products of blocks. The values are compared with plain loops.
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "common.h"
#include "cuda/block_products.cuh"
#include "cuda/edge_dots.cuh"
#include "cuda/gather.cuh"

using namespace mtl;
using namespace mtl::cuda;

namespace {

uint64_t seen = 1469598103934665603u;  // a hash of all results: the same in every order of the threads
void expect_and_see(double got, double wanted, double size, double eps) {
  expect(got, wanted, size, eps);
  uint64_t bits;
  std::memcpy(&bits, &got, 8);
  seen = (seen ^ bits) * 1099511628211u;
}

// Few different ones, so that there are ties.
template <class T>
std::vector<T> numbers(int64_t count) {
  std::vector<T> v(count);
  for (T& x : v) x = converted<T>(static_cast<float>(rand() % 33 - 16) / 8);
  return v;
}
template <class T>
DType type_of() {
  if (sizeof(T) == 8) return DType::kFloat64;
  if (sizeof(T) == 4) return DType::kFloat32;
  return std::is_same_v<T, BFloat16> ? DType::kBFloat16 : DType::kFloat16;
}

struct Graph {
  std::vector<int64_t> ptr{0}, index, place;
  Neighbours of(int64_t sources) const {
    const auto rows = static_cast<int64_t>(ptr.size()) - 1, edges = static_cast<int64_t>(index.size());
    return {ptr.data(), index.data(), place.data(), rows, sources, edges};
  }
};
Graph random_graph(const std::vector<int64_t>& degrees, int64_t sources) {
  Graph g;
  for (const int64_t degree : degrees) {
    for (int64_t i = 0; i < degree; ++i) g.index.push_back(rand() % sources);
    g.ptr.push_back(static_cast<int64_t>(g.index.size()));
  }
  const auto edges = static_cast<int64_t>(g.index.size());
  for (int64_t e = 0; e < edges; ++e) g.place.push_back((e * 7 + 3) % edges);  // 7 divides none of the graphs here
  return g;
}

template <class Take, bool kVector, class In, class Out>
void gather(GatherTask<In, Out> task) {
  const Neighbours& graph = task.job.graph;
  using Sum = typename SumOf<In>::type;
  const int64_t columns = task.job.columns, most = 2 * graph.edges / kPieceEdges;
  unsigned long long counts = 0;
  std::vector<Hub> list(most);
  std::vector<Sum> parts(most * columns);
  const unsigned blocks = static_cast<unsigned>((graph.rows + kThreads - 1) / kThreads);
  task.hubs = {&counts, list.data(), most};
  task.parts = parts.data();
  check(launch(find_hubs_kernel, dim3(blocks), dim3(kThreads), 0, nullptr, graph, task.hubs, task.wrong));
  const auto grid = [&](int64_t items, int per) {
    const int groups = kThreads / task.lanes, step = task.lanes * per;
    return dim3(static_cast<unsigned>((items + groups - 1) / groups),
                static_cast<unsigned>((columns + step - 1) / step));
  };
  // In two runs of rows, of which the first one does the pieces.
  const int64_t middle = graph.rows / 2;
  Out* const out = task.out;
  for (const int64_t first : {int64_t(0), middle}) {
    task.lanes = 4 + 4 * static_cast<int>(columns > 16);
    task.first = first;
    task.last = first ? graph.rows : middle;
    task.pieces = first ? 0 : most;
    task.out = out ? out + first * columns : nullptr;
    check(launch(gather_kernel<Take, kVector, In, Out>, grid(task.pieces + task.last - first, kPart<In, kVector>),
                 dim3(kThreads), 0, nullptr, task));
    check(launch(add_parts_kernel<Take, In, Out>, dim3(2, grid(1, kPart<Sum, false>).y), dim3(kThreads), 0, nullptr,
                 task));
  }
}

const std::vector<int64_t> kDegrees{3, 0, 700, 1, 256, 257, 16, 4, 0, 900, 300};
constexpr int64_t kSources = 11;

template <class T, bool kVector>
void reduced(int64_t columns, double eps) {
  using Sum = typename SumOf<T>::type;
  const Graph g = random_graph(kDegrees, kSources);
  const std::vector<T> x = numbers<T>(kSources * columns), weights = numbers<T>(g.index.size());
  std::vector<Sum> factors(kSources);
  for (Sum& f : factors) f = Sum(0.5) + Sum(rand() % 8) / 8;
  const auto rows = static_cast<int64_t>(kDegrees.size());
  for (const Reduce reduce : {Reduce::kSum, Reduce::kMean, Reduce::kMax, Reduce::kMin}) {
    const bool linear = reduce == Reduce::kSum || reduce == Reduce::kMean;
    std::vector<T> out(rows * columns);
    int wrong[2] = {};
    GatherTask<T, T> task{};
    task.job = {g.of(kSources),
                reduce,
                x.data(),
                columns,
                columns,
                linear ? weights.data() : nullptr,
                type_of<T>(),
                linear ? factors.data() : nullptr,
                nullptr,
                nullptr,
                0};
    task.out = out.data();
    task.wrong = wrong;
    if (linear)
      gather<TakeSum, kVector>(task);
    else
      gather<TakeExtreme, kVector>(task);
    if (wrong[0] || wrong[1]) exit(3);
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t c = 0; c < columns; ++c) {
        double exact = 0, size = 0;
        for (int64_t e = g.ptr[r]; e < g.ptr[r + 1]; ++e) {
          double v = number(x[g.index[e] * columns + c]);
          if (linear) v *= number(weights[g.place[e]]) * factors[g.index[e]];
          if (linear)
            exact += v;
          else if (e == g.ptr[r] || (reduce == Reduce::kMax ? v > exact : v < exact))
            exact = v;
          size = linear ? size + fabs(v) : fabs(exact);
        }
        const double by = reduce == Reduce::kMean && kDegrees[r] ? static_cast<double>(kDegrees[r]) : 1;
        expect_and_see(number(out[r * columns + c]), exact / by, size / by, eps);
      }
  }
}

// The gradient of max: of a graph and the same turned around.
template <class T>
void ties(int64_t columns, double eps) {
  using Sum = typename SumOf<T>::type;
  const Graph g = random_graph(kDegrees, kSources);
  const auto rows = static_cast<int64_t>(kDegrees.size()), edges = static_cast<int64_t>(g.index.size());
  Graph turned;
  for (int64_t s = 0; s < kSources; ++s) {
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t e = g.ptr[r]; e < g.ptr[r + 1]; ++e)
        if (g.index[e] == s) turned.index.push_back(r);
    turned.ptr.push_back(static_cast<int64_t>(turned.index.size()));
  }
  turned.place.resize(edges);
  const std::vector<T> x = numbers<T>(kSources * columns), grad = numbers<T>(rows * columns);
  std::vector<T> best(rows * columns), dx(kSources * columns);
  std::vector<double> count(rows * columns), exact(kSources * columns), size(kSources * columns);
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < columns; ++c) {
      double most = -1e30;
      for (int64_t e = g.ptr[r]; e < g.ptr[r + 1]; ++e) most = fmax(most, number(x[g.index[e] * columns + c]));
      best[r * columns + c] = converted<T>(static_cast<float>(g.ptr[r] == g.ptr[r + 1] ? 0 : most));
      for (int64_t e = g.ptr[r]; e < g.ptr[r + 1]; ++e)
        count[r * columns + c] += number(x[g.index[e] * columns + c]) == most;
      for (int64_t e = g.ptr[r]; e < g.ptr[r + 1]; ++e)
        if (number(x[g.index[e] * columns + c]) == most) {
          exact[g.index[e] * columns + c] += number(grad[r * columns + c]) / count[r * columns + c];
          size[g.index[e] * columns + c] += fabs(number(grad[r * columns + c])) / count[r * columns + c];
        }
    }
  std::vector<Sum> shares(rows * columns);
  int wrong[2] = {};
  GatherTask<T, T> task{};
  task.wrong = wrong;
  task.job = {g.of(kSources), Reduce::kSum, x.data(), columns, columns, nullptr,
              type_of<T>(),   nullptr,      nullptr,  nullptr, 0};
  task.own = best.data();
  task.own_row = columns;
  task.grad = grad.data();
  task.grad_row = columns;
  task.grad_col = 1;
  // The results in one run: `own` and `shares` are those of all rows.
  std::vector<T> unused(rows * columns);
  task.out = unused.data();
  std::vector<Sum> wide(rows * columns);
  gather<CountTies, false>(task);
  for (int64_t i = 0; i < rows * columns; ++i) {
    shares[i] = count[i] > 0 ? static_cast<Sum>(number(grad[i]) / count[i]) : Sum(0);
    expect_and_see(number(unused[i]), static_cast<double>(shares[i]), fabs(static_cast<double>(shares[i])), eps);
  }
  task.job.graph = turned.of(rows);
  task.job.x = best.data();
  task.own = x.data();
  task.shares = shares.data();
  task.out = dx.data();
  gather<SumTies, false>(task);
  if (wrong[0] || wrong[1]) exit(3);
  for (int64_t i = 0; i < kSources * columns; ++i) expect_and_see(number(dx[i]), exact[i], size[i], eps);
}

template <class T, bool kVector>
void dots(int64_t columns, double eps) {
  using Sum = typename SumOf<T>::type;
  const Graph g = random_graph(kDegrees, kSources);
  const auto rows = static_cast<int64_t>(kDegrees.size()), edges = static_cast<int64_t>(g.index.size());
  const std::vector<T> x = numbers<T>(kSources * columns), a = numbers<T>(rows * columns);
  std::vector<T> out(edges);
  int wrong[2] = {};
  DotsTask<T> task{};
  task.job = {g.of(kSources), Reduce::kMean, x.data(), columns, columns, nullptr,
              type_of<T>(),   nullptr,       nullptr,  nullptr, 0};
  task.a = a.data();
  task.a_row = columns;
  task.lanes = 4;
  task.out = out.data();
  task.wrong = wrong;
  const unsigned blocks = static_cast<unsigned>((edges + kThreads - 1) / kThreads);
  check(launch(edge_dots_kernel<Sum, kVector, T>, dim3(blocks), dim3(kThreads), 0, nullptr, task));
  if (wrong[0] || wrong[1]) exit(3);
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t e = g.ptr[r]; e < g.ptr[r + 1]; ++e) {
      double exact = 0, size = 0;
      for (int64_t c = 0; c < columns; ++c) {
        const double v = number(a[r * columns + c]) * number(x[g.index[e] * columns + c]);
        exact += v;
        size += fabs(v);
      }
      const auto by = static_cast<double>(kDegrees[r]);
      expect_and_see(number(out[g.place[e]]), exact / by, size / by, eps);
    }
}

// Two blocks of different widths: C = A W^T + add, with sums as A.
template <class Engine, class T>
void blocks(double eps) {
  using Sum = typename Engine::Sum;
  const int64_t n = 133, widths[2] = {40, 5}, out_widths[2] = {7, 66}, d = 45, k = 73;
  const std::vector<Sum> h = numbers<Sum>(n * d), add = numbers<Sum>(n * k);
  const std::vector<T> w[2] = {numbers<T>(40 * 7), numbers<T>(5 * 66)};
  std::vector<T> out(n * k);
  std::vector<BlockJob<Sum, T, Sum, T>> jobs;
  for (int b = 0; b < 2; ++b)
    jobs.push_back({view_of<Sum>(h.data() + b * widths[0], n, widths[b], d, 1),
                    view_of<T>(w[b].data(), out_widths[b], widths[b], widths[b], 1), add.data() + b * out_widths[0], k,
                    1, out.data() + b * out_widths[0], k});
  check(block_products<Engine, false, false>(jobs, 1, 0, nullptr));
  for (int b = 0; b < 2; ++b)
    for (int64_t r = 0; r < n; ++r)
      for (int64_t c = 0; c < out_widths[b]; ++c) {
        const int64_t at = r * k + b * out_widths[0] + c;
        double exact = static_cast<double>(add[at]), size = fabs(exact);
        for (int64_t i = 0; i < widths[b]; ++i) {
          const double v = static_cast<double>(h[r * d + b * widths[0] + i]) * number(w[b][c * widths[b] + i]);
          exact += v;
          size += fabs(v);
        }
        expect_and_see(number(out[at]), exact, size, eps);
      }
}

// Numbers that name nothing: reported, and no byte is read or written through them.
void refused() {
  const int64_t columns = 5, rows = 4;
  const std::vector<float> x = numbers<float>(kSources * columns);
  for (int how = 0; how < 8; ++how) {
    Graph g = random_graph({300, 2, 0, 400}, kSources);
    const auto edges = static_cast<int64_t>(g.index.size());
    const bool of_ptr = how < 5;
    if (how == 0) g.ptr[2] = edges + 9;
    if (how == 1) g.ptr[1] = -7;
    if (how == 2) g.ptr = {0, edges, 0, edges, edges};
    if (how == 3) g.ptr[4] = edges - 1;
    if (how == 4) g.ptr[0] = 1;
    if (how == 5) g.index[301] = kSources;
    if (how == 6) g.index[7] = INT64_MIN;
    if (how == 7) g.place[edges - 1] = edges;
    std::vector<float> out(rows * columns), weights(edges, 1.0f), dots(edges);
    int wrong[2] = {};
    GatherTask<float, float> task{};
    task.job = {g.of(kSources),  Reduce::kSum, x.data(), columns, columns, weights.data(),
                DType::kFloat32, nullptr,      nullptr,  nullptr, 0};
    task.out = out.data();
    task.wrong = wrong;
    gather<TakeSum, false>(task);
    if (!wrong[of_ptr ? 0 : 1]) exit(5);
    wrong[0] = wrong[1] = 0;
    const DotsTask<float> dot{task.job, out.data(), columns, 4, dots.data(), wrong};
    const unsigned blocks = static_cast<unsigned>((edges + kThreads - 1) / kThreads);
    check(launch(edge_dots_kernel<float, false, float>, dim3(blocks), dim3(kThreads), 0, nullptr, dot));
    if (!wrong[of_ptr ? 0 : 1]) exit(6);
  }
}

template <class Engine, class T>
void all(double eps) {
  constexpr int64_t kPiece = 16 / sizeof(T);
  for (const int64_t columns : {int64_t(1), int64_t(7), int64_t(35)}) {
    reduced<T, false>(columns, eps);
    ties<T>(columns, eps);
    dots<T, false>(columns, eps);
  }
  for (const int64_t columns : {kPiece, 5 * kPiece}) {
    reduced<T, true>(columns, eps);
    dots<T, true>(columns, eps);
  }
  blocks<Engine, T>(eps);
}

}  // namespace

int main(int, char** arguments) {
  srand(1);
  const std::string name = arguments[1];
  if (name == "graphs_float32")
    all<Exact32, float>(4e-6);
  else if (name == "graphs_float64")
    all<Exact64, double>(1e-14);
  else if (name == "graphs_bfloat16")
    all<TensorTf32, BFloat16>(8e-3);
  else if (name == "graphs_float16")
    all<TensorTf32, Float16>(1e-3);
  else if (name == "graphs_refused")
    refused();
  else
    return 4;
  printf("%s: %g of what is allowed, results %016llx\n", name.c_str(), worst, static_cast<unsigned long long>(seen));
  return worst <= 1 ? 0 : 1;
}
