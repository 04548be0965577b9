// What lies between this library and a user's cell, which is compiled into a shared library of its own (cell_library.cpp) the
// first time it is used. The library brings the drivers; threads, scratch memory and the profiler stay the process's: it gets
// them in a table.
#pragma once

#include "../fastseq.h"

#ifdef __cplusplus
extern "C" {
#endif

// Goes up with every change of a struct that crosses the line. The headers are installed with the extension, so that the two
// differ only in a damaged installation.
#define FASTSEQ_CELL_ABI 1

// The functions of runtime.h and profile.cpp under their own names without the prefix.
struct fastseq_cell_runtime {
  void (*run_parallel)(int threads, void (*body)(void* context, int rank, int size), void* context);
  void* (*workspace)(size_t bytes);
  void (*prefer_huge_pages)(void* block, size_t bytes);
  void (*wait_turn)(int turn);
  const int* profiling;
  int (*profile_enter)(int phase);
  int (*profile_begin_call)(const char* kernel, const char* variant, const char* isa, int dtype);
  void (*profile_add_size)(const char* name, int64_t value);
  void (*profile_end_call)(void);
};

// One cell's kernels for one dtype and instruction set.
struct fastseq_cell_library {
  int32_t abi;  // FASTSEQ_CELL_ABI
  int32_t dtype;
  const char* isa;
  fastseq_rnn_forward_function forward;
  fastseq_rnn_backward_function backward;
  fastseq_rnn_reserve_function reserve_bytes;
};

// The library's one exported function, "fastseq_cell_start": keeps the table, which must last, and returns its own.
typedef const struct fastseq_cell_library* (*fastseq_cell_start_function)(const struct fastseq_cell_runtime*);

// --- cell_runtime.cpp
const struct fastseq_cell_runtime* fastseq_cell_runtime_table(void);
// Loads such a library for good; NULL with a message in `reason` where that fails.
const struct fastseq_cell_library* fastseq_cell_open(const char* path, char* reason, size_t reason_bytes);

#ifdef __cplusplus
}
#endif
