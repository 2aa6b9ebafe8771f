// Gathering as the host code of the ops sees it. The kernels are in gather.cuh, and compiled in gather.cu alone.
#pragma once

#include "graph_host.h"

namespace mtl::cuda {

// kCountTies, kSumTies: the two steps of the gradient of max and min, see gather.cuh.
enum class Gathered { kReduced, kCountTies, kSumTies };

struct GatherCall {
  GatherJob job;
  DType in, out;  // of job.x and of the result; sums have float32, for float64 float64
  Gathered what = Gathered::kReduced;
  const void* own = nullptr;
  int64_t own_row = 0;
  const void* grad = nullptr;
  int64_t grad_row = 0, grad_col = 0;
  const void* shares = nullptr;
};

// Where rows of the result go. All begin with the first one, and have contiguous columns.
struct GatherTarget {
  void* out = nullptr;        // in the type of the result, or null
  void* wide = nullptr;       // as sums, or null
  const void* add = nullptr;  // sums added to the rows, for sums and means
  int64_t add_row = 0;
};

// As many lanes as a row has parts of `per` numbers: a power of two, so that a warp has whole groups.
inline int lanes_for(int64_t columns, int64_t per) {
  int lanes = 4;
  while (lanes < 32 && lanes * per < columns) lanes *= 2;
  return lanes;
}

// The rows of a call, in as many runs as are asked for. What is read has to live as long.
class Gathering {
 public:
  Gathering(const GatherCall& call, const Tensor& like);
  void rows(int64_t first, int64_t last, const GatherTarget& target);

 private:
  GatherCall call_;
  GraphCheck check_;
  cudaStream_t stream_;
  int blocks_;  // for work whose size the device alone knows
  int64_t most_pieces_;
  bool pieces_done_ = false;
  std::optional<Tensor> counts_, list_, parts_;

  template <class Take, class In, class Out>
  void run(int64_t first, int64_t last, const GatherTarget& target);
};

}  // namespace mtl::cuda
