// Heads of 16-bit numbers with cross-entropy losses and all gradients in one launch. One or two warps have 16 rows of a
// tile, and half of the columns each where they are two. The limits, and what was measured, are in csrc/README.md.
//
// Columns: each task begins at a multiple of eight, a fragment's width; its last fragment is filled up with weights of
// zero. Tasks: cross-entropy without class weights and label smoothing, and those without labels.
#pragma once

#include "loss_kernels.cuh"

namespace mtl::cuda {

// ptxas needs more registers for compute capability 8.0, and there are 128: loops take one step at a time there.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
#define MTL_STEPS _Pragma("unroll 1")
constexpr int kRowsAtOnce = 2, kPiecesAtOnce = 1;
#else
#define MTL_STEPS
constexpr int kRowsAtOnce = 8, kPiecesAtOnce = 2;
#endif

constexpr int kMostSlots = 16;  // of eight columns
struct Slot {
  int begin, count;  // `count` columns from `begin` of the packed logits
};
struct WarpTask {
  int slot, slots;
  int label_row;  // or -1
  float scale;
};

template <class Element>
struct WarpLossJob {
  LossJob<Element, float> loss;
  const Slot* slots;
  const WarpTask* tasks;
  int slot_count, task_count, label_rows;
};

template <class Engine, int K, int D>
struct WarpLossShape {
  using Element = typename Engine::Element;
  // Registers hold dW: with more columns more warps share it, and a multiprocessor has one block instead of two.
  static constexpr int kBlocks = K <= 32 ? 2 : 1, kCount = K <= 32 ? 8 : 16, kBlock = 32 * kCount, kHalves = kCount / 8;
  static constexpr int kRows = 128, kSlots = K / 8;
  // Rows of logits begin four banks apart, so that lanes that have a row each read 16 bytes without conflicts.
  static constexpr int kRow = row_of<Element>(D), kGradientRow = row_of<Element>(K), kLogitRow = K + 4;
  static constexpr int kWeights = K * kRow, kTile = kRows * kRow, kGradients = kRows * kGradientRow;
  static constexpr size_t kElements = sizeof(Element) * (kWeights + 2 * kTile + kGradients);
  static constexpr size_t kLogits = sizeof(float) * kRows * kLogitRow;
  static constexpr size_t kLosses = sizeof(double) * kCount * kSlots;
  static constexpr size_t kTables = (sizeof(Slot) + sizeof(WarpTask)) * kSlots + sizeof(float) * K;
  static size_t shared(int64_t label_rows) {
    return kElements + kLogits + kLosses + kTables + 2 * sizeof(float) * kRows * label_rows;
  }
};

// The columns [first, first + N) of the logits of 16 rows x [16, depth], with weights in rows of depth, and their bias.
template <class Element, int N>
__device__ void warp_logits(const Element* x, const Element* weight, int row, int depth, int first, const float* bias,
                            float* z, int z_row) {
  const int lane = static_cast<int>(threadIdx.x) % 32, quarter = lane / 8, in_quarter = lane % 8;
  float sum[N / 8][4];
#pragma unroll
  for (int j = 0; j < N / 8; ++j)
#pragma unroll
    for (int q = 0; q < 4; ++q) sum[j][q] = 0.0f;
  x += lane % 16 * row + lane / 16 * 8;
  weight += (first + in_quarter + quarter / 2 * 8) * row + quarter % 2 * 8;
#pragma unroll 1
  for (int k = 0; k < depth; k += 16) {
    uint32_t left[4];
    ldmatrix_x4(left, x + k);
#pragma unroll
    for (int j = 0; j < N / 8; j += 2) {
      uint32_t right[4];
      ldmatrix_x4(right, weight + j * 8 * row + k);
      const uint32_t one[2] = {right[0], right[1]}, two[2] = {right[2], right[3]};
      mma(sum[j], left, one, Element{});
      mma(sum[j + 1], left, two, Element{});
    }
  }
  struct alignas(8) Two {
    float a, b;
  };
#pragma unroll
  for (int j = 0; j < N / 8; ++j) {
    const int c = first + j * 8 + lane % 4 * 2;
    const Two own = *reinterpret_cast<const Two*>(bias + c);
#pragma unroll
    for (int h = 0; h < 2; ++h)
      *reinterpret_cast<Two*>(z + (lane / 4 + h * 8) * z_row + c) = {sum[j][h * 2] + own.a, sum[j][h * 2 + 1] + own.b};
  }
}

// log(1 + x) for x >= 0, also where it is small.
__device__ inline float fast_log1p(float x) {
  const float series = x * (1.0f + x * (-0.5f + x * (0.33333333f + x * (-0.25f + x * 0.2f))));
  return x < 0.03125f ? series : fast_log(1.0f + x);
}

// A row of a task: its loss, and its gradients in place of the logits and, rounded, in `to`. Maths as in losses.cuh;
// what is as large as the largest logit is counted, not added, so that the rest keeps its digits. Columns that fill up
// a fragment have logits of -inf, which add nothing.
struct Row {
  Four<float>* own;
  int label;
  bool missing;
  float scale;
};
struct alignas(16) Eight {
  uint32_t v[4];
};
struct Exponentials {
  float all = 0.0f, rest = 0.0f;

  __device__ void add(Four<float>& four, float largest) {
#pragma unroll
    for (int q = 0; q < 4; ++q) {
      const float e = fast_exp(four.v[q] - largest);
      four.v[q] = e;
      all += e;
      rest += e >= 1.0f ? 0.0f : e;
    }
  }
  // Of all but one that is as large as the largest.
  __device__ float beside() const { return rest + (rintf(all - rest) - 1.0f); }
};
__device__ inline float largest_of(float largest, const Four<float>& four) {
  return fmaxf(fmaxf(largest, fmaxf(four.v[0], four.v[1])), fmaxf(four.v[2], four.v[3]));
}
template <class Element>
__device__ void store_gradients(Four<float>* own, Element* to, Four<float>& a, Four<float>& b, float factor,
                                bool missing) {
#pragma unroll
  for (int q = 0; q < 4; ++q) {
    a.v[q] = missing ? 0.0f : a.v[q] * factor;
    b.v[q] = missing ? 0.0f : b.v[q] * factor;
  }
  own[0] = a;
  own[1] = b;
  *reinterpret_cast<Eight*>(to) = {pack<Element>(a.v[0], a.v[1]), pack<Element>(a.v[2], a.v[3]),
                                   pack<Element>(b.v[0], b.v[1]), pack<Element>(b.v[2], b.v[3])};
}
template <class Element>
__device__ float end_row(const Row& row, Element* to, float at_label, float e, float beside, float factor) {
  if (row.missing) return 0.0f;
  const float at_own = e * factor - row.scale;
  asm volatile("" ::: "memory");  // behind the pieces that hold these numbers too, in another type
  reinterpret_cast<float*>(row.own)[row.label] = at_own;
  to[row.label] = from_float<Element>(at_own);
  return fast_log1p(beside) - at_label;
}

// Of at most 16 columns: read once, and kept in registers.
template <class Element, int kPieces>
__device__ float narrow_row(const Row& row, Element* to) {
  Four<float> piece[kPieces];
  float largest = __uint_as_float(0xff800000u);
#pragma unroll
  for (int p = 0; p < kPieces; ++p) {
    piece[p] = row.own[p];
    largest = largest_of(largest, piece[p]);
  }
  const float at_label = reinterpret_cast<const float*>(row.own)[row.label] - largest;
  Exponentials sums;
#pragma unroll
  for (int p = 0; p < kPieces; ++p) sums.add(piece[p], largest);
  const float beside = sums.beside(), factor = fast_divide(row.scale, 1.0f + beside);
#pragma unroll
  for (int p = 0; p < kPieces; p += 2)
    store_gradients(row.own + p, to + p * 4, piece[p], piece[p + 1], factor, row.missing);
  return end_row(row, to, at_label, fast_exp(at_label), beside, factor);
}
template <class Element>
__device__ float wide_row(const Row& row, Element* to, int pieces) {
  float largest = __uint_as_float(0xff800000u);
  for (int p = 0; p < pieces; ++p) largest = largest_of(largest, row.own[p]);
  const float at_label = reinterpret_cast<const float*>(row.own)[row.label] - largest;
  Exponentials sums;
  for (int p = 0; p < pieces; ++p) {
    Four<float> four = row.own[p];
    sums.add(four, largest);
    row.own[p] = four;
  }
  const float beside = sums.beside(), factor = fast_divide(row.scale, 1.0f + beside);
  const float e = reinterpret_cast<const float*>(row.own)[row.label];
  MTL_STEPS
  for (int p = 0; p < pieces; p += 2) {
    Four<float> a = row.own[p], b = row.own[p + 1];
    store_gradients(row.own + p, to + p * 4, a, b, factor, row.missing);
  }
  return end_row(row, to, at_label, e, beside, factor);
}

// Losses of the warp's rows, added to losses[task], and their gradients at the logits, to g. A lane has a row of a
// task.
template <class Element>
__device__ void warp_losses(const WarpTask* tasks, int task_count, int first, int step, const float* labels,
                            int label_row_step, int64_t live_rows, float* z, int z_row, Element* g, int g_row,
                            double* losses) {
  const int lane = static_cast<int>(threadIdx.x) % 32, r = lane % 16;
  for (int t = first + lane / 16; t < task_count; t += step) {
    const WarpTask task = tasks[t];
    const float y = task.label_row >= 0 && r < live_rows ? labels[task.label_row * label_row_step + r]
                                                         : __uint_as_float(0x7fc00000u);
    const bool missing = y != y;
    const Row row{reinterpret_cast<Four<float>*>(z + r * z_row + task.slot * 8), missing ? 0 : static_cast<int>(y),
                  missing, task.scale};
    Element* const to = g + r * g_row + task.slot * 8;
    float loss;
    if (task.slots == 1)
      loss = narrow_row<Element, 2>(row, to);
    else if (task.slots == 2)
      loss = narrow_row<Element, 4>(row, to);
    else
      loss = wide_row(row, to, task.slots * 2);
    loss = lanes_sum<16>(loss);
    if (r == 0) losses[t] += static_cast<double>(loss);
  }
}

// A tile that lies inside of the matrix as a whole, by pieces of 16 bytes: less to compute than in load_tile.
template <int kRows, int D, int kBlock, class Element>
__device__ void load_whole_tile(Element* tile, int tile_row, const View<Element>& m, int64_t row) {
  constexpr int kPieces = D / 8, kStepRows = kBlock / kPieces;
  const int thread = static_cast<int>(threadIdx.x), r = thread / kPieces, c = thread % kPieces * 8;
  const Element* from = m.data + (row + r) * m.row_stride + c;
  Element* to = tile + r * tile_row + c;
  const int64_t step = kStepRows * m.row_stride;
#pragma unroll
  for (int i = 0; i < kRows / kStepRows; ++i, from += step, to += kStepRows * tile_row) cp_async_16(to, from, true);
}

template <class Engine, int K, int D>
__global__ void __launch_bounds__(WarpLossShape<Engine, K, D>::kBlock, WarpLossShape<Engine, K, D>::kBlocks)
    warp_loss_kernel(WarpLossJob<typename Engine::Element> warp_job) {
  using Shape = WarpLossShape<Engine, K, D>;
  using Element = typename Engine::Element;
  constexpr int kRows = Shape::kRows, kRow = Shape::kRow, kGradientRow = Shape::kGradientRow, kSlots = Shape::kSlots;
  constexpr int kBlock = Shape::kBlock, kHalves = Shape::kHalves, kLogitRow = Shape::kLogitRow;
  const LossJob<Element, float>& job = warp_job.loss;
  MTL_DYNAMIC_SHARED(unsigned char, memory);
  Element* const weight = reinterpret_cast<Element*>(memory);
  Element* const tiles = weight + Shape::kWeights;
  Element* const gradients = tiles + 2 * Shape::kTile;
  float* const z = reinterpret_cast<float*>(memory + Shape::kElements);
  double* const losses = reinterpret_cast<double*>(memory + Shape::kElements + Shape::kLogits);
  WarpTask* const tasks = reinterpret_cast<WarpTask*>(losses + Shape::kCount * kSlots);
  Slot* const slots = reinterpret_cast<Slot*>(tasks + kSlots);
  float* const bias = reinterpret_cast<float*>(slots + kSlots);
  float* const label_tiles = bias + K;

  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32, lane = thread % 32;
  const int quarter = lane / 8, in_quarter = lane % 8, group = warp / kHalves, half = warp % kHalves;
  const int64_t n = job.x.rows;
  const int d = static_cast<int>(job.x.cols), tile_count = static_cast<int>((n + kRows - 1) / kRows);
  const bool gradient = job.dx || job.need_sums;
  const int label_size = warp_job.label_rows * kRows;
  const auto load = [&](int tile, int at) {
    const int64_t first = static_cast<int64_t>(tile) * kRows;
    if (job.x.aligned && d == D && first + kRows <= n)
      load_whole_tile<kRows, D, kBlock>(tiles + at * Shape::kTile, kRow, job.x, first);
    else
      load_tile<kPiecesAtOnce>(tiles + at * Shape::kTile, kRow, job.x, first, kRows, 0, D, thread, kBlock);
    MTL_STEPS
    for (int i = thread; i < label_size / 4; i += kBlock) {
      const int64_t row = first + i % (kRows / 4) * 4;
      const float* const from = job.labels + i / (kRows / 4) * job.label_step + row;
      cp_async_16(label_tiles + at * label_size + i * 4, row < n ? from : job.labels, row < n);
    }
    cp_async_commit();
  };
  int tile = static_cast<int>(blockIdx.x);
  load(tile, 0);
  if (thread < kSlots) slots[thread] = thread < warp_job.slot_count ? warp_job.slots[thread] : Slot{0, 0};
  if (thread < warp_job.task_count) tasks[thread] = warp_job.tasks[thread];
  for (int i = thread; i < Shape::kGradients; i += kBlock) gradients[i] = Element{};  // of slots without a task
  for (int i = thread; i < Shape::kCount * kSlots; i += kBlock) losses[i] = 0;
  __syncthreads();
  for (int j = 0; j < kSlots; ++j) {
    View<Element> own = job.weight;
    own.rows = slots[j].begin + slots[j].count;
    load_tile<kPiecesAtOnce>(weight + j * 8 * kRow, kRow, own, slots[j].begin, 8, 0, D, thread, kBlock);
  }
  cp_async_commit();
  finish_labels_first<float>(job.norm, job.scale, Shape::kCount, [&](int t, float own) { tasks[t].scale = own; });
  for (int i = thread; i < K; i += kBlock) {
    const Slot& s = slots[i / 8];
    const float own = job.bias && i % 8 < s.count ? to_float(job.bias[(s.begin + i % 8) * job.bias_stride]) : 0.0f;
    bias[i] = i % 8 < s.count ? own : __uint_as_float(0xff800000u);
  }

  Product16<Element, K, D, true, true, Shape::kCount> weight_sum;
  weight_sum.clear();
  // Of some columns of the gradients, the group's rows of each tile, before they are rounded.
  constexpr int kSums = K / (32 * kHalves);
  constexpr int kSumStep = 32 * kHalves;
  const int first_sum = half * 32 + lane;
  float bias_sum[kSums] = {};
  // The warps that have the same rows meet.
  const auto meet = [&] {
    if constexpr (kHalves > 1)
      sync_threads(1 + group, 32 * kHalves);
    else
      __syncwarp();
  };
  const int depth = round_up(d, kStep);
  for (int at = 0; tile < tile_count; tile += static_cast<int>(gridDim.x), at ^= 1) {
    Element* const x = tiles + at * Shape::kTile;
    Element* const own_gradients = gradients + group * 16 * kGradientRow;
    float* const own_z = z + group * 16 * kLogitRow;
    const int64_t row = static_cast<int64_t>(tile) * kRows + group * 16;
    cp_async_wait<0>();
    __syncthreads();  // this tile is here, and nobody reads the one before or its gradients any more
    load(tile + static_cast<int>(gridDim.x), at ^ 1);
    warp_logits<Element, K / kHalves>(x + group * 16 * kRow, weight, kRow, depth, half * (K / kHalves), bias, own_z,
                                      kLogitRow);
    meet();
    warp_losses(tasks, warp_job.task_count, half * 2, 2 * kHalves, label_tiles + at * label_size + group * 16, kRows,
                n - row, own_z, kLogitRow, own_gradients, kGradientRow, losses + warp * kSlots);
    if (!gradient) continue;
    meet();
    if (job.need_sums) {
#pragma unroll kRowsAtOnce
      for (int r = 0; r < 16; ++r)
#pragma unroll
        for (int c = 0; c < kSums; ++c) bias_sum[c] += own_z[r * kLogitRow + first_sum + c * kSumStep];
    }
    if (job.dx) {
      // Columns of dx of a warp; at a time. They go out by way of the logits' place, which all have read then.
      constexpr int kOwn = D / kHalves, kWide = kOwn < 64 ? kOwn : 64, kOutRow = 2 * kLogitRow;
      static_assert(kHalves * kWide <= kOutRow, "they find a place there");
      Element* const out = reinterpret_cast<Element*>(own_z) + half * kWide;
#pragma unroll 1
      for (int first = 0; first < kOwn; first += kWide) {
        float sum[kWide / 8][4];
#pragma unroll
        for (int j = 0; j < kWide / 8; ++j)
#pragma unroll
          for (int q = 0; q < 4; ++q) sum[j][q] = 0.0f;
        const Element* const g = own_gradients + lane % 16 * kGradientRow + lane / 16 * 8;
        const Element* const w = weight + (in_quarter + quarter % 2 * 8) * kRow + half * kOwn + first + quarter / 2 * 8;
#pragma unroll 1
        for (int s = 0; s < K; s += 16) {
          uint32_t left[4];
          ldmatrix_x4(left, g + s);
#pragma unroll
          for (int j = 0; j < kWide / 8; j += 2) {
            uint32_t right[4];
            ldmatrix_x4_trans(right, w + s * kRow + j * 8);
            const uint32_t low[2] = {right[0], right[1]}, high[2] = {right[2], right[3]};
            mma(sum[j], left, low, Element{});
            mma(sum[j + 1], left, high, Element{});
          }
        }
        if (first == 0)
          meet();
        else
          __syncwarp();
#pragma unroll
        for (int j = 0; j < kWide / 8; ++j)
#pragma unroll
          for (int h = 0; h < 2; ++h)
            *reinterpret_cast<uint32_t*>(out + (h * 8 + lane / 4) * kOutRow + j * 8 + lane % 4 * 2) =
                pack<Element>(sum[j][h * 2], sum[j][h * 2 + 1]);
        __syncwarp();
        const int column = half * kOwn + first;
        if (d == D && row + 16 <= n) {
          constexpr int kPieces = kWide / 8, kStepRows = 32 / kPieces;
          const int r = lane / kPieces, c = lane % kPieces * 8;
          Element* to = job.dx + (row + r) * D + column + c;
#pragma unroll
          for (int i = 0; i < 16 / kStepRows; ++i, to += kStepRows * D)
            *reinterpret_cast<int4*>(to) = *reinterpret_cast<const int4*>(out + (r + i * kStepRows) * kOutRow + c);
        } else if (row < n && column < d) {
          store_tile(out, kOutRow, job.dx, d, row, n - row < 16 ? static_cast<int>(n - row) : 16, column,
                     d - column < kWide ? d - column : kWide, lane, 32);
        }
        __syncwarp();  // lanes may have stored more or less
      }
    }
    if (!job.need_sums) continue;
    __syncthreads();  // all gradients of the tile are here
    weight_sum.add(gradients, kGradientRow, x, kRow, kRows);
  }
  cp_async_wait<0>();
  __syncthreads();
  for (int64_t t = thread; t < job.task_count; t += kBlock) {
    double sum = 0;
    for (int w = 0; w < Shape::kCount; ++w) sum += losses[w * kSlots + t];
    job.loss_parts[blockIdx.x * job.task_count + t] = sum;
  }
  if (!job.need_sums) return;
  const int64_t k = job.weight.rows;
  float* const own = job.weight_parts + blockIdx.x * k * d;
  weight_sum.each([&](int r, int c, float v) {
    const Slot& s = slots[r / 8];
    if (r % 8 < s.count && c < d) own[(s.begin + r % 8) * d + c] = v;
  });
#pragma unroll
  for (int c = 0; c < kSums; ++c) z[group * K + first_sum + c * kSumStep] = bias_sum[c];
  __syncthreads();
  if (thread >= K) return;
  float sum = 0.0f;
  for (int g = 0; g < kRows / 16; ++g) sum += z[g * K + thread];
  const Slot& s = slots[thread / 8];
  if (thread % 8 < s.count) job.bias_parts[blockIdx.x * k + s.begin + thread % 8] = sum;
}

#undef MTL_STEPS

}  // namespace mtl::cuda
