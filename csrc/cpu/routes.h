// Rows grouped by the task they belong to, and cut into pieces that are worked on independently.
#pragma once

#include <algorithm>
#include <vector>

#include "host.h"

namespace mtl {

// A stable counting sort of the row numbers. Rows are counted and placed by slices, so that threads share the work.
class Routes {
 public:
  Routes(const Tensor& route, int64_t rows, int64_t tasks) : rows_(rows), begin_(tasks + 1, 0) {
    STD_TORCH_CHECK(route.is_cpu() && route.dim() == 1 && route.scalar_type() == ScalarType::Long,
                    "route: expected a CPU vector of int64");
    check_size(route.size(0), rows, "route: size of dimension 0");
    const int64_t* task = static_cast<const int64_t*>(route.const_data_ptr());
    const int64_t stride = route.stride(0), slices = std::clamp<int64_t>(rows / kSliceRows, 1, kSlices);
    std::vector<int64_t> place(slices * tasks, 0);
    std::vector<int64_t> wrong(slices, -1);
    const auto first = [&](int64_t slice) { return rows * slice / slices; };
    torch::stable::parallel_for(0, slices, 1, [&](int64_t s0, int64_t s1) {
      for (int64_t s = s0; s < s1; ++s)
        for (int64_t r = first(s); r < first(s + 1); ++r) {
          const int64_t t = task[r * stride];
          if (t < 0 || t >= tasks) {
            wrong[s] = r;
            break;
          }
          ++place[s * tasks + t];
        }
    });
    for (int64_t r : wrong) STD_TORCH_CHECK(r < 0, "route: expected tasks in [0, ", tasks, "), got another in row ", r);
    int64_t sum = 0;
    for (int64_t t = 0; t < tasks; ++t) {
      begin_[t] = sum;
      for (int64_t s = 0; s < slices; ++s) {
        const int64_t count = place[s * tasks + t];
        place[s * tasks + t] = sum;
        sum += count;
      }
    }
    begin_[tasks] = sum;
    order_ = make_buffer(rows * static_cast<int64_t>(sizeof(int64_t)));
    int64_t* order = static_cast<int64_t*>(order_.get());
    torch::stable::parallel_for(0, slices, 1, [&](int64_t s0, int64_t s1) {
      for (int64_t s = s0; s < s1; ++s)
        for (int64_t r = first(s); r < first(s + 1); ++r) order[place[s * tasks + task[r * stride]]++] = r;
    });
  }
  int64_t rows() const { return rows_; }
  int64_t tasks() const { return static_cast<int64_t>(begin_.size()) - 1; }
  int64_t begin(int64_t task) const { return begin_[task]; }
  int64_t count(int64_t task) const { return begin_[task + 1] - begin_[task]; }
  // The rows in the order of their tasks.
  const int64_t* order() const { return static_cast<const int64_t*>(order_.get()); }

 private:
  static constexpr int64_t kSliceRows = 16384, kSlices = 16;
  int64_t rows_;
  std::vector<int64_t> begin_;
  Buffer order_;
};

// Some rows of one task: [first, first + rows) of the order.
struct Piece {
  int64_t task, first, rows;
  int64_t number, of;  // of the task's pieces
};

// Enough pieces for many threads, few enough that their sums, `numbers` for each, stay below what is read anyway.
inline std::vector<Piece> pieces_of(const Routes& routes, int64_t numbers) {
  constexpr int64_t kRows = 512, kMost = 32;
  const int64_t most = std::clamp<int64_t>((int64_t(1) << 24) / std::max<int64_t>(1, numbers), 1, kMost);
  std::vector<Piece> pieces;
  for (int64_t t = 0; t < routes.tasks(); ++t) {
    const int64_t rows = routes.count(t);
    if (rows == 0) continue;
    const int64_t of = std::clamp<int64_t>((rows + kRows / 2) / kRows, 1, most);
    for (int64_t i = 0; i < of; ++i) {
      const int64_t first = rows * i / of;
      pieces.push_back({t, routes.begin(t) + first, rows * (i + 1) / of - first, i, of});
    }
  }
  return pieces;
}

// Calls f(begin, end) for runs of pieces that make equal shares of the work, which is what a piece costs.
template <class Cost, class F>
void share_out(const std::vector<Piece>& pieces, Cost cost, F f) {
  constexpr int64_t kShares = 64;
  std::vector<int64_t> border{0};
  double total = 0, sum = 0;
  for (const Piece& piece : pieces) total += cost(piece);
  for (size_t i = 0; i < pieces.size(); ++i) {
    sum += cost(pieces[i]);
    if (sum >= total / kShares * static_cast<double>(border.size()) || i + 1 == pieces.size())
      border.push_back(static_cast<int64_t>(i) + 1);
  }
  const int64_t shares = static_cast<int64_t>(border.size()) - 1;
  const int64_t per_share = static_cast<int64_t>(total / static_cast<double>(std::max<int64_t>(1, shares)));
  torch::stable::parallel_for(0, shares, grain(per_share),
                              [&](int64_t begin, int64_t end) { f(border[begin], border[end]); });
}

}  // namespace mtl
