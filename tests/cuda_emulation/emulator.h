// The threads of a launch as fibers: each runs until it waits for others, and then the next one does.
#pragma once

#include <setjmp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

#include <algorithm>
#include <functional>
#include <memory>
#include <tuple>
#include <vector>

namespace fastseq_emulation {

// The device that is played; tests change it.
struct Limits {
  int multiprocessors = 4;
  int shared_bytes = 227 << 10;
  int descending = 0;  // 1: blocks and threads run from the last to the first
};
inline Limits limits;

struct Launch {
  int64_t grid[3] = {1, 1, 1};
  int threads = 1;
  size_t shared_bytes = 0;
  bool cooperative = false;                            // all blocks live at once
  std::function<void()> body;                          // one thread
  void (*enter)(int64_t block, int thread) = nullptr;  // called before a thread runs or goes on
  int64_t blocks() const { return grid[0] * grid[1] * grid[2]; }
};

constexpr int warp_size = 32;
constexpr size_t stack_bytes = 64 << 10, static_shared_bytes = 48 << 10;

struct Barrier {
  int arrived = 0, members = 0;  // members: all threads, those that have ended as well: they may not leave a barrier out
  unsigned passed = 0;           // how often all have arrived
};

struct Warp {
  Barrier barrier;
  unsigned char exchanged[warp_size][8];
};

struct Block {
  int64_t index;
  Barrier barrier;
  std::vector<Warp> warps;
  std::vector<unsigned char> static_shared, dynamic_shared;
};

struct Fiber {
  Block* block;
  int thread;
  Barrier* waits_for = nullptr;
  unsigned seen = 0;  // how often that had been passed when the wait began
  bool started = false, ended = false, idle = false;
  jmp_buf context;
  ucontext_t entry;
  unsigned char* stack;
};

inline jmp_buf scheduler;
inline Fiber* current = nullptr;
inline const Launch* launched = nullptr;
inline char failure_text[200] = "unspecified launch failure";
inline bool failed = false;

inline const char* failure() { return failure_text; }
inline int lane() { return current->thread % warp_size; }
inline unsigned char* static_shared_memory(size_t bytes) {
  if (bytes > static_shared_bytes) abort();  // more than a kernel may declare
  return current->block->static_shared.data();
}
inline unsigned char* dynamic_shared_memory() { return current->block->dynamic_shared.data(); }

inline void back_to_scheduler() {
  if (_setjmp(current->context) == 0) _longjmp(scheduler, 1);
}

inline void wait_at(Barrier& barrier) {
  current->waits_for = &barrier;
  current->seen = barrier.passed;
  if (++barrier.arrived == barrier.members) {
    barrier.arrived = 0;
    ++barrier.passed;
  }
  back_to_scheduler();
}

inline void wait_for_block() { wait_at(current->block->barrier); }
inline void wait_for_warp() { wait_at(current->block->warps[(size_t)(current->thread / warp_size)].barrier); }
inline void let_others_run() {
  current->idle = true;
  back_to_scheduler();
}

template <class T>
T shuffle(T value, int from) {
  Warp& warp = current->block->warps[(size_t)(current->thread / warp_size)];
  memcpy(warp.exchanged[lane()], &value, sizeof(T));
  wait_at(warp.barrier);
  memcpy(&value, warp.exchanged[from % warp_size], sizeof(T));
  wait_at(warp.barrier);
  return value;
}

inline void fiber_main() {
  launched->body();
  current->ended = true;
  _longjmp(scheduler, 1);
}

inline void resume(Fiber& fiber) {
  current = &fiber;
  fiber.waits_for = nullptr;
  fiber.idle = false;
  launched->enter(fiber.block->index, fiber.thread);
  if (_setjmp(scheduler)) return;
  if (fiber.started) _longjmp(fiber.context, 1);
  fiber.started = true;
  getcontext(&fiber.entry);
  fiber.entry.uc_stack.ss_sp = fiber.stack;
  fiber.entry.uc_stack.ss_size = stack_bytes;
  fiber.entry.uc_link = nullptr;
  makecontext(&fiber.entry, fiber_main, 0);
  setcontext(&fiber.entry);
}

inline bool fail(const char* text) {
  snprintf(failure_text, sizeof failure_text, "%s", text);
  return false;
}

// Stacks are kept for the next launch.
inline unsigned char* stack_of(size_t index) {
  static std::vector<std::unique_ptr<unsigned char[]>> stacks;
  while (stacks.size() <= index) stacks.emplace_back(new unsigned char[stack_bytes]);
  return stacks[index].get();
}

inline bool run_together(const Launch& launch, const std::vector<int64_t>& indices) {
  std::vector<std::unique_ptr<Block>> blocks;
  std::vector<Fiber> fibers(indices.size() * (size_t)launch.threads);
  size_t next = 0;
  for (int64_t index : indices) {
    blocks.emplace_back(new Block{});
    Block& block = *blocks.back();
    block.index = index;
    block.barrier.members = launch.threads;
    block.warps.resize((size_t)(launch.threads + warp_size - 1) / warp_size);
    block.static_shared.assign(static_shared_bytes, 0xff);  // all bits set is a NaN in every type
    block.dynamic_shared.assign(launch.shared_bytes, 0xff);
    for (int thread = 0; thread < launch.threads; ++thread, ++next) {
      Fiber& fiber = fibers[next];
      fiber.block = &block;
      fiber.thread = thread;
      fiber.stack = stack_of(next);
      ++block.warps[(size_t)(thread / warp_size)].barrier.members;
    }
  }
  size_t alive = fibers.size();
  for (int64_t idle_rounds = 0; alive;) {
    bool ran = false, idle_only = true;
    for (size_t i = 0; i < fibers.size(); ++i) {
      Fiber& fiber = fibers[limits.descending ? fibers.size() - 1 - i : i];
      if (fiber.ended || (fiber.waits_for && fiber.waits_for->passed == fiber.seen)) continue;
      resume(fiber);
      ran = true;
      idle_only &= fiber.idle;
      if (fiber.ended) --alive;
    }
    if (!ran) return fail("emulator: threads wait at a barrier that others have left behind");
    idle_rounds = idle_only ? idle_rounds + 1 : 0;
    if (idle_rounds > 1000) return fail("emulator: threads wait for each other");
  }
  return true;
}

inline bool run(const Launch& launch) {
  launched = &launch;
  std::vector<int64_t> order((size_t)launch.blocks());
  for (size_t i = 0; i < order.size(); ++i) order[i] = (int64_t)i;
  if (launch.cooperative) return run_together(launch, order);
  if (limits.descending) std::reverse(order.begin(), order.end());
  for (int64_t block : order)
    if (!run_together(launch, {block})) return false;
  return true;
}

}  // namespace fastseq_emulation
