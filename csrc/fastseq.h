// The C ABI between the kernels and everything above them: plain structs of pointers, sizes and strides, and one table of
// entry points per instruction set. No torch, no Python, no exceptions cross this line.
//
// Words: T steps, B batch rows, I input size, H hidden size, P projection size, R = P or H (what a layer puts out),
// D directions, G gates (rows of a weight matrix / H). Strides count elements, not bytes. All weights are row-major.
// Linear: M rows, K inputs, O outputs.
// Attention: Hq query heads, Hkv key/value heads (Hq a multiple), Sq queries, Skv keys, E size of a query or key, Ev of a value.
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
enum fastseq_unary {
  FASTSEQ_EXP = 0,
  FASTSEQ_TANH = 1,
  FASTSEQ_SIGMOID = 2,
  FASTSEQ_UNARY_GELU = 3,
  FASTSEQ_UNARY_GELU_TANH = 4,
  FASTSEQ_UNARY_SILU = 5,
  FASTSEQ_UNARY_COUNT = 6
};

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

// --- Attention

// A tensor [B, heads, rows, size] with unit stride along size. Row i of sequence b and head h begins at
//   data + b * batch_stride + h * head_stride + (starts[b] + i) * row_stride
// where starts is the shape's query_starts or key_starts, zero without one.
struct fastseq_heads {
  void* data;
  int64_t batch_stride;
  int64_t head_stride;
  int64_t row_stride;
};

// A table [B, Hq, Sq, Skv]; a dimension it is broadcast over has stride 0.
struct fastseq_scores {
  void* data;
  int64_t batch_stride;
  int64_t head_stride;
  int64_t query_stride;
  int64_t key_stride;
};

// One value per query row, [B, Hq, Sq] with unit stride along the rows; addressed with query_starts as fastseq_heads is.
struct fastseq_rows {
  void* data;
  int64_t batch_stride;
  int64_t head_stride;
};

// What attention computes, shared by forward and backward:
//   score(i, j) = cap(scale * query_i . key_j) + bias(i, j) - alibi_slope * |i + shift - j|,  cap(s) = softcap * tanh(s / softcap)
// over the visible pairs: j < keys of the sequence, mask(i, j) != 0, padding(j) == 0, bias(i, j) != -Inf and
//   -window_left <= j - (i + shift) <= window_right,  shift = bottom_right ? keys - queries of the sequence : 0.
// Softmax along j (a sink adds exp(sink) to the denominator), dropout, product with the values. A row that sees no key is zero.
struct fastseq_attention_shape {
  int64_t batch;                 // B
  int64_t heads;                 // Hq
  int64_t kv_heads;              // Hkv
  int64_t queries;               // Sq; with query_starts or query_lengths the most that any sequence has
  int64_t keys;                  // Skv; likewise
  int64_t key_size;              // E
  int64_t value_size;            // Ev
  const int64_t* query_starts;   // [B + 1] first row of each sequence in tensors without a batch dimension, or NULL
  const int64_t* key_starts;     // [B + 1] likewise
  const int64_t* query_lengths;  // [B] rows in use of each sequence, or NULL: all; outputs of the others are zero
  const int64_t* key_lengths;    // [B] likewise
  const int64_t* block_table;    // [B, blocks_per_sequence]: key j lies in block table[b][j / block_size], which takes the
                                 // place of b in the address, at row j % block_size; NULL: not paged
  int64_t blocks_per_sequence;
  int64_t block_size;
  int64_t window_left;   // -1: unbounded
  int64_t window_right;  // -1: unbounded; causal is 0
  int32_t bottom_right;
  int32_t threads;  // upper bound on the threads to use
  double scale;
  double softcap;  // 0: none
  double dropout;  // probability of zeroing a weight; the others are divided by 1 - dropout
  uint64_t dropout_seed;
  uint64_t dropout_offset;
  struct fastseq_scores bias;  // same dtype as query; data NULL: none
  struct fastseq_scores mask;  // uint8, 0: pair does not take part; data NULL: none
  const uint8_t* key_padding;  // [B, Skv], not 0: nobody sees the key; or NULL
  int64_t key_padding_stride;  // from one sequence to the next
  const void* alibi_slopes;    // [Hq] or [B, Hq] or NULL
  int64_t alibi_batch_stride;  // Hq or 0
  const void* sinks;           // [Hq] or NULL
};

struct fastseq_attention_forward {
  struct fastseq_attention_shape shape;
  struct fastseq_heads query;   // [B, Hq, Sq, E]
  struct fastseq_heads key;     // [B, Hkv, Skv, E]
  struct fastseq_heads value;   // [B, Hkv, Skv, Ev]
  struct fastseq_heads output;  // [B, Hq, Sq, Ev]
  struct fastseq_rows lse;      // log-sum-exp of the scores, -Inf for a row that sees nothing; data NULL: not asked for
  struct fastseq_rows
      row_maximum;  // for backward: the maximum that was subtracted, in the kernels' units; data NULL: not asked for
  struct fastseq_rows row_scale;  // for backward: 1 / sum, 0 for a row that sees nothing; both or neither
  struct fastseq_scores weights;  // [B, Hq, Sq, Skv] after softmax and dropout; data NULL: not asked for
  int32_t average_weights;        // 1: weights is [B, Sq, Skv] (head_stride 0), the mean over heads
};

struct fastseq_attention_backward {
  struct fastseq_attention_shape shape;
  struct fastseq_heads query, key, value;  // as in forward
  struct fastseq_heads output;             // forward's
  struct fastseq_rows row_maximum;         // forward's
  struct fastseq_rows row_scale;           // forward's
  struct fastseq_heads grad_output;        // [B, Hq, Sq, Ev], always given
  struct fastseq_rows grad_lse;            // data NULL: zero
  struct fastseq_heads grad_query;         // data NULL: not asked for, as for the others
  struct fastseq_heads grad_key;           // paged keys have no gradient
  struct fastseq_heads grad_value;
  struct fastseq_scores grad_bias;  // strides 0 where bias is broadcast: summed there
  int64_t grad_bias_elements;       // of the dense tensor behind grad_bias
  void* grad_sinks;                 // [Hq]
};

typedef int (*fastseq_attention_forward_function)(const struct fastseq_attention_forward*);
typedef int (*fastseq_attention_backward_function)(const struct fastseq_attention_backward*);
// keep[B, Hq, Sq, Skv] = 1 where dropout keeps the weight: what the kernels decide, written out.
typedef void (*fastseq_dropout_mask_function)(const struct fastseq_attention_shape*, uint8_t* keep);

// --- Linear

enum fastseq_activation {
  FASTSEQ_IDENTITY = 0,
  FASTSEQ_RELU = 1,
  FASTSEQ_GELU = 2,
  FASTSEQ_GELU_TANH = 3,
  FASTSEQ_SILU = 4,
  FASTSEQ_ACTIVATION_COUNT = 5
};

// A matrix with unit stride along its columns.
struct fastseq_matrix {
  void* data;
  int64_t row_stride;
};

// M rows, K inputs, O outputs; pre-activation z = x weight^T + bias.
struct fastseq_linear_shape {
  int64_t rows;        // M
  int64_t inputs;      // K
  int64_t outputs;     // O
  int32_t activation;  // fastseq_activation
  int32_t threads;     // upper bound on the threads to use
  double dropout;      // probability of zeroing an element of activation(z); the others are divided by 1 - dropout
  uint64_t dropout_seed;
  uint64_t dropout_offset;
};

// output = dropout(activation(z)) + residual
struct fastseq_linear_forward {
  struct fastseq_linear_shape shape;
  struct fastseq_matrix x;         // [M, K]
  const void* weight;              // [O, K], dense
  const void* bias;                // [O] or NULL
  struct fastseq_matrix residual;  // [M, O]; data NULL: none
  struct fastseq_matrix output;    // [M, O]
  void* pre_activation;            // z [M, O], dense, for backward; NULL: not asked for
};

struct fastseq_linear_backward {
  struct fastseq_linear_shape shape;
  struct fastseq_matrix grad_output;  // [M, O]
  struct fastseq_matrix x;            // [M, K]; data NULL when grad_weight is
  const void* weight;                 // [O, K], dense; NULL when grad_x is not asked for
  const void* pre_activation;         // forward's z; NULL without an activation
  struct fastseq_matrix grad_x;       // [M, K]; data NULL: not asked for, as for the others
  void* grad_weight;                  // [O, K], dense
  void* grad_bias;                    // [O]
};

typedef int (*fastseq_linear_forward_function)(const struct fastseq_linear_forward*);
typedef int (*fastseq_linear_backward_function)(const struct fastseq_linear_backward*);
// keep[rows, columns] = 1 where dropout keeps an element of a matrix (linear layers and norms).
typedef void (*fastseq_element_dropout_mask_function)(int64_t rows, int64_t columns, double probability, uint64_t seed,
                                                      uint64_t offset, uint8_t* keep);

// --- Norms

// Of every row of F elements, with x = residual + dropout(input):
//   layer norm  y = (x - mean(x)) / sqrt(variance(x) + eps) * weight + bias,  the variance being the biased one
//   RMS norm    y = x / sqrt(mean(x^2) + eps) * weight
struct fastseq_norm_shape {
  int64_t rows;      // M
  int64_t features;  // F
  int32_t rms;       // 1: RMS norm
  int32_t threads;   // upper bound on the threads to use
  double eps;
  double dropout;  // probability of zeroing an element of the input; the others are divided by 1 - dropout
  uint64_t dropout_seed;
  uint64_t dropout_offset;
};

// What backward needs to know of a row, each [M]. The mean is kept in two parts: where it is large, half a unit of it may be
// more than the rounding error of everything else together.
struct fastseq_norm_statistics {
  void* inverse_deviation;  // 1 / sqrt(... + eps)
  void* mean;               // layer norm only, as is the next: NULL otherwise
  void* mean_correction;    // mean + mean_correction is the mean
};

struct fastseq_norm_forward {
  struct fastseq_norm_shape shape;
  struct fastseq_matrix input;                // [M, F]
  struct fastseq_matrix residual;             // [M, F], data NULL: none
  const void* weight;                         // [F] or NULL: ones
  const void* bias;                           // [F] or NULL: zeros
  struct fastseq_matrix output;               // [M, F]
  struct fastseq_matrix sum;                  // x [M, F], data NULL: not asked for
  struct fastseq_norm_statistics statistics;  // inverse_deviation NULL: not asked for
};

struct fastseq_norm_backward {
  struct fastseq_norm_shape shape;
  struct fastseq_matrix grad_output;          // [M, F], always given
  struct fastseq_matrix grad_sum;             // of x as a result of its own, [M, F], data NULL: zero
  struct fastseq_matrix x;                    // [M, F]
  const void* weight;                         // [F] or NULL: ones
  struct fastseq_norm_statistics statistics;  // forward's
  struct fastseq_matrix grad_x;               // which is the residual's gradient; data NULL: not asked for
  struct fastseq_matrix grad_input;           // through the dropout; data NULL: not asked for, or the same as grad_x
  void* grad_weight;                          // [F] or NULL: not asked for
  void* grad_bias;                            // [F] or NULL: not asked for
};

typedef int (*fastseq_norm_forward_function)(const struct fastseq_norm_forward*);
typedef int (*fastseq_norm_backward_function)(const struct fastseq_norm_backward*);

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
  fastseq_attention_forward_function attention_forward[FASTSEQ_DTYPE_COUNT];
  fastseq_attention_backward_function attention_backward[FASTSEQ_DTYPE_COUNT];
  fastseq_dropout_mask_function dropout_mask;
  fastseq_linear_forward_function linear_forward[FASTSEQ_DTYPE_COUNT];
  fastseq_linear_backward_function linear_backward[FASTSEQ_DTYPE_COUNT];
  fastseq_element_dropout_mask_function element_dropout_mask;
  fastseq_norm_forward_function norm_forward[FASTSEQ_DTYPE_COUNT];
  fastseq_norm_backward_function norm_backward[FASTSEQ_DTYPE_COUNT];
  double (*fma_gflops[FASTSEQ_DTYPE_COUNT])(int threads, double seconds);
  // GB/s of all threads together, each going over an array of its own again and again: reading it (the faster of
  // one stream and four), or copying one half onto the other (bytes read and written count). Negative: no memory.
  double (*memory_gbytes)(int copies, int64_t bytes_per_thread, int threads, double seconds);
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
