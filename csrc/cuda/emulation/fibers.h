// A block of CUDA threads on one thread of the system: a fiber each, which runs until it meets the others. Between two
// such points the fibers run one after the other, in an order that can be chosen: a kernel that lacks a barrier then
// gives a wrong result in one of the orders. Warps that meet at a barrier of their own go on at once, the others later.
#pragma once

#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>

#include <functional>
#include <vector>

#include "types.h"

#if defined(__SANITIZE_ADDRESS__)
#define MTL_FIBERS_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define MTL_FIBERS_ASAN 1
#endif
#endif
#ifdef MTL_FIBERS_ASAN
#include <sanitizer/common_interface_defs.h>
#endif
#ifndef __x86_64__
#include <ucontext.h>
#endif

namespace mtl::cuda::emulated {

constexpr int kWarp = 32, kMostThreads = 1024;
constexpr int kBarriers = 16;              // of a block; 0 is that of __syncthreads
constexpr size_t kStackBytes = 256 << 10;  // the registers of a thread lie there too

enum class State : uint8_t { kReady, kAtWarp, kAtBarrier, kAtBlock, kDone };

// A copy of cp.async that is still on its way.
struct Copy {
  void* to;
  unsigned char bytes[16];
  int group;
};

struct Fiber {
  State state = State::kReady;
  int index = 0;
  uint3 thread{};
  uint32_t mask = 0;       // whom it waits for in its warp
  unsigned exchanges = 0;  // how many values it has exchanged with its warp
  int predicate = 0;       // of __syncthreads_count and its like
  int barrier = 0;         // at which it waits, and for how many threads
  int barrier_threads = 0;
  int group = 0;
  std::vector<Copy> copies;
  char* stack = nullptr;
#ifdef __x86_64__
  void* pointer = nullptr;
#else
  ucontext_t context;
#endif
  void* sanitizer = nullptr;
};

// What the lanes of a warp hand each other: two sets in turns, since a fast lane may be one exchange ahead.
struct Warp {
  alignas(16) unsigned char values[2][kWarp][64];
};

struct Block {
  dim3 grid, size;
  uint3 index{};
  std::function<void()> body;
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  std::vector<char> shared;  // with 16 bytes to align it
  int votes[3] = {};         // count, and, or of the last barrier
  int at_barriers[kBarriers] = {};
  std::vector<char*> stacks;
#ifdef __x86_64__
  void* pointer = nullptr;
#else
  ucontext_t context;
#endif
  void* sanitizer = nullptr;
  const void* stack_bottom = nullptr;
  size_t stack_bytes = 0;

  unsigned char* dynamic() {
    const auto address = reinterpret_cast<uintptr_t>(shared.data());
    return reinterpret_cast<unsigned char*>((address + 15) / 16 * 16);
  }
  ~Block() {
    for (char* stack : stacks) munmap(stack, kStackBytes);
  }
};

inline thread_local Block* block = nullptr;
inline thread_local Fiber* fiber = nullptr;

[[noreturn]] inline void stop(const char* what) {
  fprintf(stderr, "Emulated CUDA kernel: %s", what);
  if (block) fprintf(stderr, ", block (%u, %u, %u)", block->index.x, block->index.y, block->index.z);
  if (fiber) fprintf(stderr, ", thread %d", fiber->index);
  fprintf(stderr, ".\n");
  abort();
}

// 0: forward, 1: backward, above: shuffled by this seed.
inline int order() {
  const char* text = getenv("TORCH_MTL_PYG_EMULATE_ORDER");
  return text ? atoi(text) : 0;
}

// ---- Changing from one stack to another.
#ifdef __x86_64__
// Saves what a function must keep, and goes on where the other stack was left.
__attribute__((naked, noinline)) inline void change_stack(void** /*save*/, void* /*to*/) {
  asm volatile(
      "pushq %rbp\n pushq %rbx\n pushq %r12\n pushq %r13\n pushq %r14\n pushq %r15\n"
      "movq %rsp, (%rdi)\n movq %rsi, %rsp\n"
      "popq %r15\n popq %r14\n popq %r13\n popq %r12\n popq %rbx\n popq %rbp\n ret\n");
}
#endif

// From a fiber to the block's loop.
inline void leave() {
#ifdef MTL_FIBERS_ASAN
  __sanitizer_start_switch_fiber(fiber->state == State::kDone ? nullptr : &fiber->sanitizer, block->stack_bottom,
                                 block->stack_bytes);
#endif
#ifdef __x86_64__
  change_stack(&fiber->pointer, block->pointer);
#else
  swapcontext(&fiber->context, &block->context);
#endif
#ifdef MTL_FIBERS_ASAN
  __sanitizer_finish_switch_fiber(fiber->sanitizer, &block->stack_bottom, &block->stack_bytes);
#endif
}

inline void enter(Fiber& next) {
  fiber = &next;
#ifdef MTL_FIBERS_ASAN
  __sanitizer_start_switch_fiber(&block->sanitizer, next.stack, kStackBytes);
#endif
#ifdef __x86_64__
  change_stack(&block->pointer, next.pointer);
#else
  swapcontext(&block->context, &next.context);
#endif
#ifdef MTL_FIBERS_ASAN
  __sanitizer_finish_switch_fiber(block->sanitizer, nullptr, nullptr);
#endif
}

inline void first_step() {
#ifdef MTL_FIBERS_ASAN
  __sanitizer_finish_switch_fiber(nullptr, &block->stack_bottom, &block->stack_bytes);
#endif
  block->body();
  fiber->state = State::kDone;
  leave();
  stop("a finished thread was resumed");
}

inline void prepare(Fiber& f) {
  f.state = State::kReady;
  f.exchanges = 0;
  f.group = 0;
  f.copies.clear();
#ifdef __x86_64__
  // Six registers, the address to return to, and one word so that the stack is aligned as behind a call.
  void** top = reinterpret_cast<void**>(f.stack + kStackBytes) - 8;
  for (int i = 0; i < 6; ++i) top[i] = nullptr;
  top[6] = reinterpret_cast<void*>(&first_step);
  top[7] = nullptr;
  f.pointer = top;
#else
  getcontext(&f.context);
  f.context.uc_stack.ss_sp = f.stack;
  f.context.uc_stack.ss_size = kStackBytes;
  f.context.uc_link = nullptr;
  makecontext(&f.context, first_step, 0);
#endif
}

// ---- Meeting points.
inline void meet_block(int predicate) {
  fiber->predicate = predicate;
  fiber->state = State::kAtBlock;
  leave();
}
inline void meet_warp(uint32_t mask) {
  if (!(mask >> (fiber->index % kWarp) & 1)) stop("a lane is not in its own mask");
  fiber->mask = mask;
  fiber->state = State::kAtWarp;
  leave();
}

inline void meet_barrier(int barrier, int threads) {
  if (barrier < 1 || barrier >= kBarriers || threads < kWarp || threads % kWarp) stop("a barrier that cannot be");
  for (const Fiber& f : block->fibers)
    if (f.state == State::kAtBarrier && f.barrier == barrier && f.barrier_threads != threads)
      stop("threads at a barrier wait for different numbers of them");
  fiber->barrier = barrier;
  fiber->barrier_threads = threads;
  fiber->state = State::kAtBarrier;
  ++block->at_barriers[barrier];
  leave();
}

// Lanes that met others before may have exchanged more values, and show this one in the other of the two places: all of
// those that meet get it in the same.
inline void agree_on_exchanges(Fiber* lanes, uint32_t mask) {
  unsigned most = 0;
  for (int q = 0; q < kWarp; ++q)
    if (mask >> q & 1 && lanes[q].exchanges > most) most = lanes[q].exchanges;
  auto& values = block->warps[lanes[0].index / kWarp].values;
  for (int q = 0; q < kWarp; ++q) {
    if (!(mask >> q & 1) || lanes[q].exchanges == most) continue;
    if ((most - lanes[q].exchanges) % 2)
      std::memcpy(values[(most + 1) % 2][q], values[most % 2][q], sizeof(values[0][0]));
    lanes[q].exchanges = most;
  }
}

// Lets go the lanes of a warp of which all that are in the mask have come. Returns whether there were any.
inline bool release_warp(Fiber* lanes, int count) {
  bool any = false;
  for (int l = 0; l < count; ++l) {
    if (lanes[l].state != State::kAtWarp) continue;
    const uint32_t mask = lanes[l].mask;
    bool all = true;
    for (int q = 0; q < kWarp; ++q) {
      if (!(mask >> q & 1)) continue;
      if (q >= count || lanes[q].state == State::kDone) {
        fiber = &lanes[l];
        stop("a mask names a lane that has ended or never was");
      }
      all = all && lanes[q].state == State::kAtWarp && lanes[q].mask == mask;
    }
    if (!all) continue;
    agree_on_exchanges(lanes, mask);
    for (int q = 0; q < count; ++q)
      if (mask >> q & 1) lanes[q].state = State::kReady;
    any = true;
  }
  return any;
}

// Lets go those at a barrier to which as many have come as each of them waits for. Returns whether there were any.
inline bool release_barriers(Block& b) {
  bool any = false;
  for (Fiber& f : b.fibers) {
    if (f.state != State::kAtBarrier || b.at_barriers[f.barrier] != f.barrier_threads) continue;
    const int barrier = f.barrier;
    for (Fiber& other : b.fibers)
      if (other.state == State::kAtBarrier && other.barrier == barrier) other.state = State::kReady;
    b.at_barriers[barrier] = 0;
    any = true;
  }
  return any;
}
inline bool someone_at_barriers(const Block& b) {
  for (int waiting : b.at_barriers)
    if (waiting > 0) return true;
  return false;
}

// Runs one block to its end.
inline void run_block(Block& b, int how) {
  const int count = static_cast<int>(b.fibers.size()), warps = (count + kWarp - 1) / kWarp;
  for (Fiber& f : b.fibers) prepare(f);
  uint32_t random = static_cast<uint32_t>(how) * 2654435761u + b.index.x;
  for (int live = count; live > 0;) {
    bool moved = false;
    for (int i = 0; i < warps; ++i) {
      const int warp = how == 1 ? warps - 1 - i : i;
      Fiber* const lanes = &b.fibers[static_cast<size_t>(warp) * kWarp];
      const int lane_count = count - warp * kWarp < kWarp ? count - warp * kWarp : kWarp;
      do {
        if (how > 1) random = random * 1664525u + 1013904223u;
        for (int l = 0; l < kWarp; ++l) {
          const int lane = how == 0 ? l : how == 1 ? kWarp - 1 - l : (l * 7 + static_cast<int>(random >> 16)) % kWarp;
          if (lane >= lane_count || lanes[lane].state != State::kReady) continue;
          enter(lanes[lane]);
          moved = true;
          if (lanes[lane].state == State::kDone) --live;
        }
      } while (release_warp(lanes, lane_count));
      // Those let go run on before others begin, so that some warps are as far ahead of the rest as barriers allow.
      if (someone_at_barriers(b) && release_barriers(b)) i = -1;
    }
    int waiting = 0, yes = 0;
    for (const Fiber& f : b.fibers) {
      waiting += f.state == State::kAtBlock;
      yes += f.state == State::kAtBlock && f.predicate;
    }
    // Threads that have ended count as having come, as on a GPU.
    if (waiting > 0 && waiting == live) {
      b.votes[0] = yes;
      b.votes[1] = yes == waiting;
      b.votes[2] = yes > 0;
      for (Fiber& f : b.fibers)
        if (f.state == State::kAtBlock) f.state = State::kReady;
      moved = true;
    }
    if (!moved && live > 0) stop("its threads wait for each other: a barrier that not all of them reach");
  }
}

}  // namespace mtl::cuda::emulated
