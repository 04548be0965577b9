// The C ABI between the kernels and everything above them: plain structs of pointers, sizes and strides, and one table of
// entry points per instruction set. No torch, no Python, no exceptions cross this line.
//
// Words: T steps, B batch rows, I input size, H hidden size, P projection size, R = P or H (what a layer puts out),
// D directions, G gates (rows of a weight matrix / H). Strides count elements, not bytes. All weights are row-major.
#ifndef FASTSEQ_H
#define FASTSEQ_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define FASTSEQ_MAX_DIRECTIONS 2

enum fastseq_dtype { FASTSEQ_FLOAT32 = 0, FASTSEQ_FLOAT64 = 1, FASTSEQ_DTYPE_COUNT = 2 };

enum fastseq_cell {
#define FASTSEQ_CELL(name, Struct) FASTSEQ_CELL_##name,
#include "cells/cells.def"
#undef FASTSEQ_CELL
  FASTSEQ_CELL_COUNT
};

// Elementwise functions, exported so that tests can hold them against a correctly rounded reference.
enum fastseq_unary { FASTSEQ_EXP = 0, FASTSEQ_TANH = 1, FASTSEQ_SIGMOID = 2, FASTSEQ_UNARY_COUNT = 3 };

// Sizes and addressing of one recurrent layer, shared by forward and backward.
//
// Row r of step t is found at
//   packed  (batch_sizes != NULL, batch_sizes_are_packed):  base + (batch_sizes[0] + ... + batch_sizes[t-1] + r) * row_stride
//   padded                                               :  base + t * step_stride + row_order[r] * row_stride
// batch_sizes[t] rows are alive at step t; they never grow with t. row_order sorts a padded batch by falling length and
// NULL means the identity; it applies to the states as well.
struct fastseq_rnn_shape {
  int64_t steps;               // T
  int64_t batch;               // B
  int64_t input_size;          // I
  int64_t hidden_size;         // H
  int64_t projection_size;     // P, or 0 without projection
  int64_t directions;          // D, 1 or 2
  const int64_t* batch_sizes;  // [T] rows alive at each step, or NULL: B at every step
  const int64_t* row_order;    // [B] batch index of sorted row r, or NULL
  int32_t packed;              // 1: x and y hold only the rows that are alive, step after step
  int32_t threads;             // upper bound on the threads to use
};

// A matrix of rows addressed by (step, row) as described above; the last dimension has unit stride.
struct fastseq_sequence {
  void* data;
  int64_t step_stride;
  int64_t row_stride;
};

struct fastseq_rnn_weights {
  const void* input;        // w_ih [G*H, I]
  const void* hidden;       // w_hh [G*H, R]
  const void* input_bias;   // b_ih [G*H] or NULL
  const void* hidden_bias;  // b_hh [G*H] or NULL
  const void* projection;   // w_hr [P, H] or NULL
};

struct fastseq_rnn_forward {
  struct fastseq_rnn_shape shape;
  struct fastseq_sequence x;   // [T, B, I]
  struct fastseq_sequence y;   // [T, B, D*R]; direction d writes columns d*R ... (d+1)*R
  const void* initial_hidden;  // h0 [D, B, R] or NULL for zeros
  const void* initial_cell;    // c0 [D, B, H] or NULL for zeros
  void* final_hidden;          // h_n [D, B, R]
  void* final_cell;            // c_n [D, B, H], NULL for cells without a cell state
  void* reserve;               // what backward needs, fastseq_rnn_reserve_bytes() bytes, 64-byte aligned; NULL in inference
  struct fastseq_rnn_weights weights[FASTSEQ_MAX_DIRECTIONS];
};

struct fastseq_rnn_weight_gradients {
  void* input;        // [G*H, I] or NULL when not asked for; the same for the others
  void* hidden;       // [G*H, R]
  void* input_bias;   // [G*H]
  void* hidden_bias;  // [G*H]
  void* projection;   // [P, H]
};

struct fastseq_rnn_backward {
  struct fastseq_rnn_shape shape;
  struct fastseq_sequence x;       // as in forward
  struct fastseq_sequence y;       // forward's output
  struct fastseq_sequence grad_y;  // [T, B, D*R], data may be NULL: zero
  struct fastseq_sequence grad_x;  // [T, B, I], data NULL: not asked for
  const void* initial_hidden;      // as in forward
  const void* initial_cell;        // as in forward
  const void* grad_final_hidden;   // [D, B, R] or NULL: zero
  const void* grad_final_cell;     // [D, B, H] or NULL: zero
  void* grad_initial_hidden;       // [D, B, R] or NULL: not asked for
  void* grad_initial_cell;         // [D, B, H] or NULL: not asked for
  const void* reserve;             // written by forward
  struct fastseq_rnn_weights weights[FASTSEQ_MAX_DIRECTIONS];
  struct fastseq_rnn_weight_gradients grad_weights[FASTSEQ_MAX_DIRECTIONS];
};

typedef int (*fastseq_rnn_forward_function)(const struct fastseq_rnn_forward*);
typedef int (*fastseq_rnn_backward_function)(const struct fastseq_rnn_backward*);
// rows: rows alive over all steps, i.e. T*B for a rectangle.
typedef size_t (*fastseq_rnn_reserve_function)(int64_t rows, int64_t hidden_size, int64_t projection_size, int64_t directions);
typedef void (*fastseq_unary_function)(const void* input, void* output, int64_t count);

struct fastseq_kernel_table {
  const char* isa;
  fastseq_rnn_forward_function rnn_forward[FASTSEQ_CELL_COUNT][FASTSEQ_DTYPE_COUNT];
  fastseq_rnn_backward_function rnn_backward[FASTSEQ_CELL_COUNT][FASTSEQ_DTYPE_COUNT];
  fastseq_rnn_reserve_function rnn_reserve_bytes[FASTSEQ_CELL_COUNT][FASTSEQ_DTYPE_COUNT];
  fastseq_unary_function unary[FASTSEQ_UNARY_COUNT][FASTSEQ_DTYPE_COUNT];
  double (*fma_gflops[FASTSEQ_DTYPE_COUNT])(int threads, double seconds);
};

// Return codes of the kernels.
enum fastseq_status { FASTSEQ_OK = 0, FASTSEQ_OUT_OF_MEMORY = 1 };

// --- dispatch.cpp
int fastseq_isa_count(void);  // tiers compiled into this library, from the plainest up
const char* fastseq_isa_name(int index);
int fastseq_isa_usable(int index);  // does this processor run it
const struct fastseq_kernel_table* fastseq_table(int index);
const char* fastseq_cell_name(int cell);

// --- runtime.cpp
const char* fastseq_openmp_library(void);  // path of the OpenMP runtime in use, or NULL: single-threaded
int fastseq_max_threads(void);

#ifdef __cplusplus
}
#endif
#endif
