// Heads of 16-bit numbers with cross-entropy losses and all gradients in one launch. A warp computes 16 rows of logits
// and keeps them in registers until they are gradients, which are the left operand of dx as they lie; only dW needs the
// rows of all warps, and gets them through shared memory. The limits are worked out in csrc/README.md.
//
// Columns: each task begins at a multiple of eight, a fragment's width; its last fragment is filled up with weights of
// zero. Tasks: cross-entropy without class weights and label smoothing, and those without labels.
#pragma once

#include "loss_kernels.cuh"

namespace mtl::cuda {

// Eight columns of the padded logits, all of one task.
struct alignas(16) Slot {
  int borders, label_row;  // kStarts, kEnds; -1: no labels
  int first;               // which of the task's columns come here: eight from this one on
  float scale;
  int task, begin, count;  // `count` columns from `begin` of the packed logits
  int unused;
};
constexpr int kStarts = 1, kEnds = 2;
constexpr int kMostSlots = 16;
constexpr int kMissingClass = 1024;  // more than there are columns

template <class Element>
struct WarpLossJob {
  LossJob<Element, float> loss;
  const Slot* slots;
  int slot_count, label_rows;
};

template <class Engine, int K, int D>
struct WarpLossShape {
  using Element = typename Engine::Element;
  static constexpr int kRows = 16 * kWarps, kSlots = K / 8;
  static constexpr int kRow = row_of<Element>(D), kGradientRow = row_of<Element>(K);
  static constexpr int kWeights = K * kRow, kTile = kRows * kRow, kGradients = kRows * kGradientRow;
  static constexpr size_t kElements = sizeof(Element) * (kWeights + 2 * kTile + kGradients);
  static constexpr size_t kLosses = sizeof(double) * kWarps * kSlots, kSlotBytes = sizeof(Slot) * kSlots;
  static constexpr size_t kKnown = sizeof(float) * kWarps * kSlots * 32;
  static size_t shared(int64_t label_rows) {
    return kElements + kLosses + kSlotBytes + sizeof(float) * K + kKnown + 2 * sizeof(float) * kRows * label_rows;
  }
};

__device__ inline float quad_sum(float v) {
  v += __shfl_xor_sync(0xffffffffu, v, 1);
  return v + __shfl_xor_sync(0xffffffffu, v, 2);
}
__device__ inline float quad_max(float v) {
  v = fmaxf(v, __shfl_xor_sync(0xffffffffu, v, 1));
  return fmaxf(v, __shfl_xor_sync(0xffffffffu, v, 2));
}

// The logits of a warp's 16 rows as fragments: v[j][q] is row lane / 4 + q / 2 * 8, column j * 8 + lane % 4 * 2 + q
// % 2.
template <int kSlots>
struct RowsOfWarp {
  float v[kSlots][4];
};

// Logits of 16 rows x [16, depth] and weights [K, depth].
template <class Element, int K>
__device__ void warp_logits(const Element* x, const Element* weight, int row, int depth, const float* bias,
                            RowsOfWarp<K / 8>& z) {
  const int lane = static_cast<int>(threadIdx.x) % 32, quarter = lane / 8, in_quarter = lane % 8;
#pragma unroll
  for (int j = 0; j < K / 8; ++j)
#pragma unroll
    for (int q = 0; q < 4; ++q) z.v[j][q] = 0.0f;
#pragma unroll 1
  for (int k = 0; k < depth; k += 16) {
    uint32_t left[4];
    ldmatrix_x4(left, x + lane % 16 * row + k + lane / 16 * 8);
#pragma unroll
    for (int j = 0; j < K / 8; j += 2) {
      uint32_t right[4];
      ldmatrix_x4(right, weight + (j * 8 + in_quarter + quarter / 2 * 8) * row + k + quarter % 2 * 8);
      const uint32_t first[2] = {right[0], right[1]}, second[2] = {right[2], right[3]};
      mma(z.v[j], left, first, Element{});
      mma(z.v[j + 1], left, second, Element{});
    }
  }
#pragma unroll
  for (int j = 0; j < K / 8; ++j)
#pragma unroll
    for (int q = 0; q < 4; ++q) z.v[j][q] += bias[j * 8 + lane % 4 * 2 + q % 2];
}

// log(1 + x) for x >= 0, also where it is small.
__device__ inline float fast_log1p(float x) {
  const float series = x * (1.0f + x * (-0.5f + x * (0.33333333f + x * (-0.25f + x * 0.2f))));
  return x < 0.03125f ? series : fast_log(1.0f + x);
}

// Losses of the warp's rows, added to losses[slot]; z becomes the gradients at the logits. Maths as in losses.cuh, with
// three passes over the fragments, since a task's largest logit and its sum of exponentials are known where it ends:
// `known` keeps both, two times 16 numbers a slot. What is as large as the largest logit is counted, not added, so that
// the rest keeps its digits. Columns that fill up a fragment have logits of -inf, which add nothing.
template <int kSlots>
__device__ void warp_losses(const Slot* slots, const float* labels, int rows, int64_t live_rows, RowsOfWarp<kSlots>& z,
                            float* known, double* losses) {
  const int lane = static_cast<int>(threadIdx.x) % 32, column = lane % 4 * 2, row = lane / 4;
  const bool live[2] = {row < live_rows, row + 8 < live_rows}, first_of_quad = lane % 4 == 0;
  float* const factors = known + kSlots * 16;
  // The class of row `row + h * 8`, counted from this thread's first column of the task on; -128 for a missing label.
  const auto class_of = [&](const Slot& s, int h) {
    const float y = s.label_row >= 0 ? labels[s.label_row * rows + row + h * 8] : __uint_as_float(0x7fc00000u);
    return live[h] && y == y ? static_cast<int>(y) - column : -kMissingClass;
  };
  {
    float largest[2];
#pragma unroll
    for (int j = 0; j < kSlots; ++j) {
      const int borders = slots[j].borders;
      if (j == 0 || borders & kStarts) largest[0] = largest[1] = __uint_as_float(0xff800000u);
#pragma unroll
      for (int h = 0; h < 2; ++h) largest[h] = fmaxf(largest[h], fmaxf(z.v[j][h * 2], z.v[j][h * 2 + 1]));
      if (borders & kEnds) {
        largest[0] = quad_max(largest[0]);
        largest[1] = quad_max(largest[1]);
        if (first_of_quad) {
          known[j * 16 + row] = largest[0];
          known[j * 16 + row + 8] = largest[1];
        }
      }
    }
  }
  __syncwarp();
  float largest[2] = {}, all[2] = {}, rest[2] = {}, at_class[2] = {};
  int own[2] = {};
#pragma unroll
  for (int j = kSlots - 1; j >= 0; --j) {
    const Slot& s = slots[j];
    const int borders = s.borders;
    if (borders & kEnds) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        largest[h] = known[j * 16 + row + h * 8];
        own[h] = class_of(s, h) - s.first;
        all[h] = rest[h] = at_class[h] = 0.0f;
      }
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) {
#pragma unroll
      for (int q = 0; q < 2; ++q) {
        const float v = z.v[j][h * 2 + q] - largest[h], e = fast_exp(v);
        z.v[j][h * 2 + q] = e;
        all[h] += e;
        if (!(e >= 1.0f)) rest[h] += e;
        if (own[h] == q) at_class[h] += v;
      }
      own[h] += 8;
    }
    if (borders & kStarts) {
      float loss = 0.0f;
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const float others = quad_sum(rest[h]), equal = rintf(quad_sum(all[h]) - others);
        const float beside = others + (equal - 1.0f), v = quad_sum(at_class[h]);
        const bool missing = class_of(s, h) <= -kMissingClass;
        if (first_of_quad) {
          if (!missing) loss += fast_log1p(beside) - v;
          factors[j * 16 + row + h * 8] = missing ? 0.0f : fast_divide(s.scale, 1.0f + beside);
        }
      }
      for (int offset = 4; offset < 32; offset *= 2) loss += __shfl_xor_sync(0xffffffffu, loss, offset);
      if (lane == 0) losses[j] += static_cast<double>(loss);
    }
  }
  __syncwarp();
  float factor[2] = {};
  bool missing[2] = {};
#pragma unroll
  for (int j = 0; j < kSlots; ++j) {
    const Slot& s = slots[j];
    if (s.borders & kStarts) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        factor[h] = factors[j * 16 + row + h * 8];
        own[h] = class_of(s, h);
        missing[h] = own[h] <= -kMissingClass;
      }
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) {
#pragma unroll
      for (int q = 0; q < 2; ++q) {
        float g = z.v[j][h * 2 + q] * factor[h];
        if (own[h] == q) g -= s.scale;
        z.v[j][h * 2 + q] = missing[h] ? 0.0f : g;
      }
      own[h] -= 8;
    }
  }
}

template <class Engine, int K, int D>
__global__ void __launch_bounds__(kThreads, K <= 32 ? 2 : 1)
    warp_loss_kernel(WarpLossJob<typename Engine::Element> warp_job) {
  using Shape = WarpLossShape<Engine, K, D>;
  using Element = typename Engine::Element;
  constexpr int kRows = Shape::kRows, kRow = Shape::kRow, kGradientRow = Shape::kGradientRow, kSlots = Shape::kSlots;
  const LossJob<Element, float>& job = warp_job.loss;
  MTL_DYNAMIC_SHARED(unsigned char, memory);
  Element* const weight = reinterpret_cast<Element*>(memory);
  Element* const tiles = weight + Shape::kWeights;
  Element* const gradients = tiles + 2 * Shape::kTile;
  double* const losses = reinterpret_cast<double*>(memory + Shape::kElements);
  Slot* const slots = reinterpret_cast<Slot*>(losses + kWarps * kSlots);
  float* const bias = reinterpret_cast<float*>(slots + kSlots);
  float* const known = bias + K;
  float* const label_tiles = known + kWarps * kSlots * 32;

  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32, lane = thread % 32;
  const int quarter = lane / 8, in_quarter = lane % 8;
  const int64_t n = job.x.rows;
  const int d = static_cast<int>(job.x.cols), tile_count = static_cast<int>((n + kRows - 1) / kRows);
  const bool gradient = job.dx || job.need_sums;
  const int label_size = warp_job.label_rows * kRows;
  const auto load = [&](int tile, int at) {
    load_tile(tiles + at * Shape::kTile, kRow, job.x, static_cast<int64_t>(tile) * kRows, kRows, 0, D);
#pragma unroll 1  // registers are short
    for (int i = thread; i < label_size / 4; i += kThreads) {
      const int64_t row = static_cast<int64_t>(tile) * kRows + i % (kRows / 4) * 4;
      const float* const from = job.labels + i / (kRows / 4) * job.label_step + row;
      cp_async_16(label_tiles + at * label_size + i * 4, row < n ? from : job.labels, row < n);
    }
    cp_async_commit();
  };
  int tile = static_cast<int>(blockIdx.x);
  load(tile, 0);
  if (thread < kSlots) {
    Slot s{kStarts | kEnds, -1, 0, 0.0f, -1, 0, 0, 0};
    if (thread < warp_job.slot_count) {
      s = warp_job.slots[thread];
      s.scale = job.scale[s.task];
    }
    slots[thread] = s;
  }
  for (int i = thread; i < kWarps * kSlots; i += kThreads) losses[i] = 0;
  __syncthreads();
  for (int j = 0; j < kSlots; ++j) {
    View<Element> own = job.weight;
    own.rows = slots[j].begin + slots[j].count;
    load_tile(weight + j * 8 * kRow, kRow, own, slots[j].begin, 8, 0, D);
  }
  cp_async_commit();
  for (int i = thread; i < K; i += kThreads) {
    const Slot& s = slots[i / 8];
    const float own = job.bias && i % 8 < s.count ? to_float(job.bias[(s.begin + i % 8) * job.bias_stride]) : 0.0f;
    bias[i] = i % 8 < s.count ? own : __uint_as_float(0xff800000u);
  }

  Product<Engine, K, D, true, true> weight_sum;
  weight_sum.clear();
  float bias_sum = 0.0f;  // of one column, every kParts-th row
  constexpr int kParts = kThreads / K;
  const int depth = round_up(d, kStep);
  for (int at = 0; tile < tile_count; tile += static_cast<int>(gridDim.x), at ^= 1) {
    Element* const x = tiles + at * Shape::kTile;
    Element* const own_x = x + warp * 16 * kRow;
    cp_async_wait<0>();
    __syncthreads();  // this tile is here, and nobody reads the one before any more
    load(tile + static_cast<int>(gridDim.x), at ^ 1);
    RowsOfWarp<kSlots> z;
    warp_logits<Element, K>(own_x, weight, kRow, depth, bias, z);
    warp_losses<kSlots>(slots, label_tiles + at * label_size + warp * 16, kRows,
                        n - static_cast<int64_t>(tile) * kRows - warp * 16, z, known + warp * kSlots * 32,
                        losses + warp * kSlots);
    if (!gradient) continue;
    uint32_t g[kSlots][2];
#pragma unroll
    for (int j = 0; j < kSlots; ++j) {
      g[j][0] = pack<Element>(z.v[j][0], z.v[j][1]);
      g[j][1] = pack<Element>(z.v[j][2], z.v[j][3]);
#pragma unroll
      for (int h = 0; h < 2; ++h)
        *reinterpret_cast<uint32_t*>(gradients + (warp * 16 + h * 8 + lane / 4) * kGradientRow + j * 8 + lane % 4 * 2) =
            g[j][h];
    }
    __syncthreads();
    if (job.need_sums) {
      weight_sum.add(gradients, kGradientRow, x, kRow, kRows);
#pragma unroll 4
      for (int r = thread / K; r < kRows; r += kParts) bias_sum += to_float(gradients[r * kGradientRow + thread % K]);
    }
    if (!job.dx) continue;
    __syncthreads();  // x has been read: its place takes dx on its way out
    constexpr int kWide = 64;
#pragma unroll
    for (int first = 0; first < D; first += kWide) {
      float sum[kWide / 8][4];
#pragma unroll
      for (int j = 0; j < kWide / 8; ++j)
#pragma unroll
        for (int q = 0; q < 4; ++q) sum[j][q] = 0.0f;
#pragma unroll
      for (int s = 0; s < kSlots; s += 2) {
        const uint32_t left[4] = {g[s][0], g[s][1], g[s + 1][0], g[s + 1][1]};
#pragma unroll
        for (int j = 0; j < kWide / 8; j += 2) {
          uint32_t right[4];
          ldmatrix_x4_trans(right,
                            weight + (s * 8 + in_quarter + quarter % 2 * 8) * kRow + first + j * 8 + quarter / 2 * 8);
          const uint32_t one[2] = {right[0], right[1]}, two[2] = {right[2], right[3]};
          mma(sum[j], left, one, Element{});
          mma(sum[j + 1], left, two, Element{});
        }
      }
#pragma unroll
      for (int j = 0; j < kWide / 8; ++j)
#pragma unroll
        for (int h = 0; h < 2; ++h)
          *reinterpret_cast<uint32_t*>(own_x + (h * 8 + lane / 4) * kRow + first + j * 8 + lane % 4 * 2) =
              pack<Element>(sum[j][h * 2], sum[j][h * 2 + 1]);
    }
    __syncwarp();
    const int64_t row = static_cast<int64_t>(tile) * kRows + warp * 16;
    if (row < n) store_tile(own_x, kRow, job.dx, d, row, n - row < 16 ? static_cast<int>(n - row) : 16, 0, d, lane, 32);
  }
  cp_async_wait<0>();
  __syncthreads();
  for (int64_t t = thread; t < job.task_count; t += kThreads) {
    double sum = 0;
    for (int j = 0; j < warp_job.slot_count; ++j)
      if (slots[j].task == t)
        for (int w = 0; w < kWarps; ++w) sum += losses[w * kSlots + j];
    job.loss_parts[blockIdx.x * job.task_count + t] = sum;
  }
  if (!job.need_sums) return;
  const int64_t k = job.weight.rows;
  float* const own = job.weight_parts + blockIdx.x * k * d;
  weight_sum.each([&](int r, int c, float v) {
    const Slot& s = slots[r / 8];
    if (r % 8 < s.count && c < d) own[(s.begin + r % 8) * d + c] = v;
  });
  __syncthreads();
  float* const places = reinterpret_cast<float*>(gradients);
  places[thread] = bias_sum;
  __syncthreads();
  for (int i = thread; i < K; i += kThreads) {
    float sum = places[i];
    for (int part = 1; part < kParts; ++part) sum += places[part * K + i];
    const Slot& s = slots[i / 8];
    if (i % 8 < s.count) job.bias_parts[blockIdx.x * k + s.begin + i % 8] = sum;
  }
}

}  // namespace mtl::cuda
