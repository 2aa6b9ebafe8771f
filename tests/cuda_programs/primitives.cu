// What device.cuh promises, one program: `primitives NAME` prints the largest error and ends with 1 if there is one.
// The names that begin with "no_" lack something on purpose: in one of the orders of the emulator they have to fail.
#include <cstdlib>
#include <string>
#include <vector>

#include "cuda/device.cuh"

using namespace mtl::cuda;

namespace {

// Where the fragments of m16n8k16 and m16n8k8 lie, from the PTX ISA: element i of a lane, as (row, column).
__device__ void place_a16(int lane, int i, int& row, int& column) {
  row = lane / 4 + ((i < 2 || (i >= 4 && i < 6)) ? 0 : 8);
  column = lane % 4 * 2 + i % 2 + (i < 4 ? 0 : 8);
}
__device__ void place_b16(int lane, int i, int& row, int& column) {
  row = lane % 4 * 2 + i % 2 + (i < 2 ? 0 : 8);
  column = lane / 4;
}
__device__ void place_d(int lane, int i, int& row, int& column) {
  row = lane / 4 + (i < 2 ? 0 : 8);
  column = lane % 4 * 2 + i % 2;
}

template <class T>
__global__ void product16(const float* a, const float* b, float* d) {  // [16, 16], [16, 8], [16, 8]
  const int lane = static_cast<int>(threadIdx.x);
  uint32_t left[4] = {}, right[2] = {};
  int r, c;
  for (int i = 0; i < 8; ++i) {
    place_a16(lane, i, r, c);
    left[i / 2] |= static_cast<uint32_t>(from_float<T>(a[r * 16 + c]).bits) << 16 * (i % 2);
  }
  for (int i = 0; i < 4; ++i) {
    place_b16(lane, i, r, c);
    right[i / 2] |= static_cast<uint32_t>(from_float<T>(b[r * 8 + c]).bits) << 16 * (i % 2);
  }
  float sum[4];
  for (int i = 0; i < 4; ++i) {
    place_d(lane, i, r, c);
    sum[i] = d[r * 8 + c];
  }
  mma(sum, left, right, T{});
  for (int i = 0; i < 4; ++i) {
    place_d(lane, i, r, c);
    d[r * 8 + c] = sum[i];
  }
}
__global__ void product_tf32(const float* a, const float* b, float* d) {  // [16, 8], [8, 8], [16, 8]
  const int lane = static_cast<int>(threadIdx.x);
  uint32_t left[4], right[2];
  int r, c;
  for (int i = 0; i < 4; ++i) left[i] = to_tf32(a[(lane / 4 + i % 2 * 8) * 8 + lane % 4 + i / 2 * 4]);
  for (int i = 0; i < 2; ++i) right[i] = to_tf32(b[(lane % 4 + i * 4) * 8 + lane / 4]);
  float sum[4];
  for (int i = 0; i < 4; ++i) {
    place_d(lane, i, r, c);
    sum[i] = d[r * 8 + c];
  }
  mma(sum, left, right, Tf32{});
  for (int i = 0; i < 4; ++i) {
    place_d(lane, i, r, c);
    d[r * 8 + c] = sum[i];
  }
}

// Matrix m, row r lies at 16 bytes m * 8 + r. out[lane, m]: the two numbers of a lane.
__global__ void matrices(const uint16_t* in, uint32_t* out, bool transposed) {
  alignas(16) __shared__ uint16_t tile[32 * 8];
  const int lane = static_cast<int>(threadIdx.x);
  for (int i = lane; i < 32 * 8; i += 32) tile[i] = in[i];
  __syncwarp();
  uint32_t r[4];
  if (transposed)
    ldmatrix_x4_trans(r, tile + lane * 8);
  else
    ldmatrix_x4(r, tile + lane * 8);
  for (int m = 0; m < 4; ++m) out[lane * 4 + m] = r[m];
}

// out = in, through two buffers of 64 numbers in turns.
__global__ void copy(const float* in, float* out, int pieces, bool waits, bool meets) {
  MTL_DYNAMIC_SHARED(float, memory);
  const int t = static_cast<int>(threadIdx.x);  // 16 threads bring 64 numbers, 64 threads take them
  const auto bring = [&](int piece) {
    if (t < 16) cp_async_16(memory + piece % 2 * 64 + t * 4, in + piece * 64 + t * 4, piece != 2);
    cp_async_commit();
  };
  bring(0);
  for (int piece = 0; piece < pieces; ++piece) {
    if (piece + 1 < pieces) {
      bring(piece + 1);
      if (waits) cp_async_wait<1>();
    } else if (waits) {
      cp_async_wait<0>();
    }
    if (meets) __syncthreads();
    out[piece * 64 + t] = memory[piece % 2 * 64 + t];
    if (meets) __syncthreads();
  }
}

// out[block] = sum of 96 numbers, by shuffles and shared memory.
__global__ void sums(const float* in, float* out, bool meets) {
  __shared__ float parts[3];
  const int t = static_cast<int>(threadIdx.x), lane = t % 32;
  float v = in[blockIdx.x * 96 + t];
  for (int offset = 16; offset > 0; offset /= 2) v += __shfl_xor_sync(0xffffffffu, v, offset);
  if (lane == 0) parts[t / 32] = v;
  if (meets) __syncthreads();
  if (t == 95) out[blockIdx.x] = parts[0] + parts[1] + parts[2];
  if (meets) __syncthreads();
  if (t == 0) parts[0] = 0;  // a block after this one must not rely on it
}

// Lane i writes, lane 31 - i reads.
__global__ void turned(const int* in, int* out, bool meets) {
  __shared__ int tile[32];
  const int t = static_cast<int>(threadIdx.x);
  tile[t] = in[t];
  if (meets) __syncwarp();
  out[t] = tile[31 - t];
}

// Warps 0 and 1 turn 64 numbers round, and 2 and 3 the next 64, without each other. All of them in the end, if `all`.
__global__ void pairs(const int* in, int* out, bool meets, bool all) {
  __shared__ int tile[128];
  const int t = static_cast<int>(threadIdx.x), pair = t / 64;
  for (int i = 0; i < 3; ++i) {
    tile[t] = i == 0 ? in[t] : out[t];
    if (meets) sync_threads(1 + pair, 64);
    out[t] = tile[pair * 64 + 63 - t % 64];
    if (meets) sync_threads(1 + pair, 64);
  }
  tile[t] = out[t];
  if (all) __syncthreads();
  out[t] = tile[127 - t];
}
// Two warps at a barrier of three, or at one of which they say different things.
__global__ void two_meet(bool agree) { sync_threads(3, agree || threadIdx.x < 32 ? 96 : 64); }

__global__ void votes(int* out) {
  const int t = static_cast<int>(threadIdx.x), lane = t % 32;
  const unsigned odd = __ballot_sync(0xffffffffu, lane & 1);
  const int any = __any_sync(0xffffffffu, lane == 7), all = __all_sync(0xffffffffu, lane < 32);
  const int down = __shfl_down_sync(0xffffffffu, lane, 3), up = __shfl_up_sync(0xffffffffu, lane, 3);
  const int from = __shfl_sync(0xffffffffu, lane, 5), in_eight = __shfl_xor_sync(0xffffffffu, lane, 7, 8);
  int low = -1;
  if (lane < 16) low = __shfl_xor_sync(0x0000ffffu, lane, 1);
  const int after = __shfl_sync(0xffffffffu, 3 * lane, 9);  // half of the lanes have exchanged one value more
  const int count = __syncthreads_count(t % 3 == 0), every = __syncthreads_and(t >= 0),
            some = __syncthreads_or(t == 999);
  const bool good = odd == 0xaaaaaaaau && any == 1 && all == 1 && down == (lane < 29 ? lane + 3 : lane) &&
                    up == (lane < 3 ? lane : lane - 3) && from == 5 && in_eight == (lane ^ 7) &&
                    (lane >= 16 || low == (lane ^ 1)) && after == 27 && count == 22 && every == 1 && some == 0 &&
                    __popc(odd) == 16;
  atomicAdd(out, good ? 1 : 0);
  atomicCAS(out + 1, 0, 1 + t / 64);
}

__global__ void half_of_them_meet() {
  if (threadIdx.x < 32) __syncthreads();
  if (threadIdx.x >= 32) __syncwarp(0x3u);  // of which lanes 2 to 31 are not a part
}
__global__ void beyond(float* out) {
  MTL_DYNAMIC_SHARED(float, memory);
  memory[threadIdx.x] = 1.0f;
  __syncthreads();
  out[threadIdx.x] = memory[threadIdx.x + 8];  // 64 numbers were asked for, and the last eight are read beyond
}

double worst = 0;
void expect(double got, double wanted) {
  const double error = got == wanted ? 0 : got != got ? 1e30 : fabs(got - wanted);
  worst = error > worst ? error : worst;
}
void check(cudaError_t error, const char* what = "a launch") {
  if (error == cudaSuccess) return;
  printf("%s: %s\n", what, cudaGetErrorString(error));
  exit(2);
}

template <class T>
void run_product16() {
  std::vector<float> a(256), b(128), d(128);
  for (float& v : a) v = static_cast<float>(rand() % 17 - 8);
  for (float& v : b) v = static_cast<float>(rand() % 9 - 4);
  for (float& v : d) v = static_cast<float>(rand() % 5);
  std::vector<float> got = d;
  check(launch(product16<T>, dim3(1), dim3(32), 0, nullptr, a.data(), b.data(), got.data()));
  for (int r = 0; r < 16; ++r)
    for (int c = 0; c < 8; ++c) {
      double sum = d[r * 8 + c];
      for (int k = 0; k < 16; ++k) sum += a[r * 16 + k] * b[k * 8 + c];
      expect(got[r * 8 + c], sum);
    }
}

void run(const std::string& name) {
  if (name == "mma_bfloat16") run_product16<BFloat16>();
  if (name == "mma_float16") run_product16<Float16>();
  if (name == "mma_tf32") {
    std::vector<float> a(128), b(64), d(128, 0.5f);
    for (float& v : a) v = static_cast<float>(rand() % 2000 - 1000);
    for (float& v : b) v = static_cast<float>(rand() % 9 - 4);
    std::vector<float> got = d;
    check(launch(product_tf32, dim3(1), dim3(32), 0, nullptr, a.data(), b.data(), got.data()));
    for (int r = 0; r < 16; ++r)
      for (int c = 0; c < 8; ++c) {
        double sum = 0.5;
        for (int k = 0; k < 8; ++k) sum += a[r * 8 + k] * b[k * 8 + c];
        expect(got[r * 8 + c], sum);
      }
    expect(__uint_as_float(to_tf32(1.0f + 0x1p-11f)), 1.0f + 0x1p-10f);  // ties away from zero
    expect(__uint_as_float(to_tf32(1.0f + 0x1p-12f)), 1.0f);
  }
  if (name == "ldmatrix" || name == "ldmatrix_trans") {
    const bool transposed = name == "ldmatrix_trans";
    std::vector<uint16_t> in(256);
    std::vector<uint32_t> out(128);
    for (int i = 0; i < 256; ++i) in[i] = static_cast<uint16_t>(i * 37 + 5);
    check(launch(matrices, dim3(1), dim3(32), 0, nullptr, in.data(), out.data(), transposed));
    for (int lane = 0; lane < 32; ++lane)
      for (int m = 0; m < 4; ++m)
        for (int i = 0; i < 2; ++i) {
          const int r = lane / 4, c = lane % 4 * 2 + i;
          expect(out[lane * 4 + m] >> 16 * i & 0xffff, in[m * 64 + (transposed ? c * 8 + r : r * 8 + c)]);
        }
  }
  if (name == "cp_async" || name == "no_wait" || name == "no_barrier_behind_a_wait") {
    std::vector<float> in(320), out(320, -1.0f);
    for (int i = 0; i < 320; ++i) in[i] = static_cast<float>(i);
    check(launch(copy, dim3(1), dim3(64), 512, nullptr, in.data(), out.data(), 5, name != "no_wait",
                 name != "no_barrier_behind_a_wait"));
    for (int i = 0; i < 320; ++i) expect(out[i], i / 64 == 2 ? 0 : i);  // the third piece was not to be copied
  }
  if (name == "sums" || name == "no_barrier") {
    std::vector<float> in(96 * 7), out(7);
    for (size_t i = 0; i < in.size(); ++i) in[i] = static_cast<float>(i % 11);
    check(launch(sums, dim3(7), dim3(96), 0, nullptr, in.data(), out.data(), name == "sums"));
    for (int b = 0; b < 7; ++b) {
      double sum = 0;
      for (int i = 0; i < 96; ++i) sum += in[b * 96 + i];
      expect(out[b], sum);
    }
  }
  if (name == "turned" || name == "no_warp_barrier") {
    std::vector<int> in(32), out(32);
    for (int i = 0; i < 32; ++i) in[i] = i + 100;
    check(launch(turned, dim3(1), dim3(32), 0, nullptr, in.data(), out.data(), name == "turned"));
    for (int i = 0; i < 32; ++i) expect(out[i], 131 - i);
  }
  if (name == "pairs" || name == "no_barrier_of_a_pair" || name == "no_barrier_behind_pairs") {
    std::vector<int> in(128), out(128);
    for (int i = 0; i < 128; ++i) in[i] = i * 3;
    check(launch(pairs, dim3(1), dim3(128), 0, nullptr, in.data(), out.data(), name != "no_barrier_of_a_pair",
                 name != "no_barrier_behind_pairs"));
    for (int i = 0; i < 128; ++i) {
      const int from = 127 - i, pair = from / 64;
      expect(out[i], in[pair * 64 + 63 - from % 64]);
    }
  }
  if (name == "too_few_at_a_barrier" || name == "a_barrier_of_two_sizes")
    check(launch(two_meet, dim3(1), dim3(64), 0, nullptr, name == "too_few_at_a_barrier"));
  if (name == "votes") {
    int out[2] = {0, 0};
    check(launch(votes, dim3(1), dim3(64), 0, nullptr, out));
    expect(out[0], 64);
    expect(out[1], 1);
  }
  if (name == "conversions") {
    for (uint32_t bits = 0; bits < 65536; ++bits) {
      const Float16 h{static_cast<uint16_t>(bits)};
      const BFloat16 b{static_cast<uint16_t>(bits)};
      const float vh = to_float(h), vb = to_float(b);
      if (vh == vh) expect(from_float<Float16>(vh).bits, bits);
      if (vb == vb) expect(from_float<BFloat16>(vb).bits, bits);
    }
    // Halfway to the next number: to the even one; a little more: up.
    for (uint32_t bits = 0; bits < 0x7bff; bits += 7) {
      const float low = to_float(Float16{static_cast<uint16_t>(bits)});
      const float middle = (low + to_float(Float16{static_cast<uint16_t>(bits + 1)})) / 2;
      expect(from_float<Float16>(middle).bits, bits + (bits & 1));
      expect(from_float<Float16>(middle * 1.0001f).bits, bits + 1);
    }
    expect(from_float<Float16>(65519.0f).bits, 0x7bff);
    expect(from_float<Float16>(65520.0f).bits, 0x7c00);
    expect(to_float(from_float<Float16>(INFINITY)), INFINITY);
    expect(to_float(from_float<Float16>(NAN)) != to_float(from_float<Float16>(NAN)), 1);
    expect(to_float(from_float<BFloat16>(NAN)) != to_float(from_float<BFloat16>(NAN)), 1);
    expect(from_float<BFloat16>(__uint_as_float(0x3f808000)).bits, 0x3f80);
    expect(from_float<BFloat16>(__uint_as_float(0x3f818000)).bits, 0x3f82);
  }
  if (name == "limits") {
    float out[64];
    expect(launch(beyond, dim3(1), dim3(2000), 0, nullptr, out), cudaErrorInvalidConfiguration);
    expect(launch(beyond, dim3(1, 70000), dim3(32), 0, nullptr, out), cudaErrorInvalidConfiguration);
    expect(launch(beyond, dim3(1), dim3(32), 60 << 10, nullptr, out), cudaErrorInvalidConfiguration);
    expect(allow_shared(beyond, 300 << 10), cudaErrorInvalidValue);
    check(allow_shared(beyond, 60 << 10));
    check(launch(beyond, dim3(1), dim3(32), 60 << 10, nullptr, out));
    check(launch(beyond, dim3(0), dim3(32), 0, nullptr, out));
  }
  if (name == "no_meeting") check(launch(half_of_them_meet, dim3(1), dim3(64), 0, nullptr));
  if (name == "no_memory_there") {
    float out[64];
    check(launch(beyond, dim3(1), dim3(64), 256, nullptr, out));
    for (float v : out) expect(v, 1);
  }
}

}  // namespace

int main(int, char** names) {
  run(names[1]);
  printf("%g\n", worst);
  return worst == 0 ? 0 : 1;
}
