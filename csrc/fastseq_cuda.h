// The C ABI of libfastseq_cuda, in addition to fastseq.h: plain structs of device pointers and sizes. No torch, no Python. The
// library allocates nothing and never waits for the device: memory and stream come from the caller.
//
// Words as in fastseq.h. Recurrent layers: sequences lie in rows, step after step; step t has rows first_row[t] ...
// first_row[t + 1] - 1, never more than the step before. The products W_ih x + b_ih of all rows are made by the caller, as are
// the gradients of weights and input, which are products of what forward and backward leave behind.
#ifndef FASTSEQ_CUDA_H
#define FASTSEQ_CUDA_H

#include "fastseq.h"

#ifdef __cplusplus
extern "C" {
#endif

// Storage types; sums are float32, of float64 values float64 ("sum type" below).
enum fastseq_cuda_dtype {
  FASTSEQ_CUDA_FLOAT32 = 0,
  FASTSEQ_CUDA_FLOAT64 = 1,
  FASTSEQ_CUDA_BFLOAT16 = 2,
  FASTSEQ_CUDA_FLOAT16 = 3,
  FASTSEQ_CUDA_DTYPE_COUNT = 4
};

// Slots of a cell (csrc/cells) lie so that those of the input product come first and in the order of the gates:
// gate g of W_ih x in columns g*H ... (g+1)*H - 1 of a row of slots; fastseq_cuda_hidden_column says where W_hh h goes.

struct fastseq_cuda_rnn_shape {
  int64_t steps;             // T
  int64_t batch;             // B
  int64_t hidden_size;       // H
  int64_t directions;        // D
  int64_t rows;              // of all steps together
  const int64_t* first_row;  // [T + 1] on the device, or NULL: B rows at every step
};

struct fastseq_cuda_rnn_forward {
  struct fastseq_cuda_rnn_shape shape;
  void* slots[FASTSEQ_MAX_DIRECTIONS];                 // [rows, slots*H]; in: W_ih x + b_ih, out with save: what backward needs
  void* cells[FASTSEQ_MAX_DIRECTIONS];                 // cell states in the sum type, [rows, H]; without save [B, H]; or NULL
  const void* hidden_weights[FASTSEQ_MAX_DIRECTIONS];  // w_hh [G*H, H]
  const void* hidden_bias[FASTSEQ_MAX_DIRECTIONS];     // b_hh [G*H] or NULL
  const void* initial_hidden;                          // [D, B, H] or NULL: zeros
  const void* initial_cell;                            // [D, B, H] or NULL: zeros
  void* final_hidden;                                  // [D, B, H]; rows that are never alive are left alone
  void* final_cell;                                    // [D, B, H] or NULL
  void* output;                                        // [rows, D*H]
  int32_t save;
};

struct fastseq_cuda_rnn_backward {
  struct fastseq_cuda_rnn_shape shape;
  const void* slots[FASTSEQ_MAX_DIRECTIONS];               // forward's
  const void* cells[FASTSEQ_MAX_DIRECTIONS];               // forward's or NULL
  const void* transposed_weights[FASTSEQ_MAX_DIRECTIONS];  // w_hh transposed [H, G*H]
  const void* initial_hidden;                              // as in forward
  const void* initial_cell;                                // as in forward
  const void* output;                                      // forward's
  const void* grad_output;                                 // [rows, D*H] or NULL: zero
  const void* grad_final_hidden;                           // [D, B, H] or NULL: zero
  const void* grad_final_cell;                             // [D, B, H] or NULL: zero
  void* slot_gradients[FASTSEQ_MAX_DIRECTIONS];            // [rows, slots*H]: gradients of the pre-activations
  // Sum type, [D, B, H]. Out: what of the gradient of the initial states does not pass through W_hh.
  void* direct;
  void* grad_cell;  // or NULL
};

// How a recurrent kernel is cut up: blocks own hidden units of one direction, with their weights in shared memory.
enum fastseq_cuda_mode {
  FASTSEQ_CUDA_AUTO = 0,
  FASTSEQ_CUDA_STEPWISE = 1,    // one launch per step
  FASTSEQ_CUDA_PERSISTENT = 2,  // one launch for all steps; blocks that share sequences wait for each other after each
  FASTSEQ_CUDA_DIRECT = 3       // stepwise with weights read where they lie: any size
};

struct fastseq_cuda_plan {
  int32_t mode;
  int32_t units_per_block;
  int32_t rows_per_block;  // of the batch
  int32_t tile_rows;       // staged in shared memory at a time, a multiple of 4
  int32_t grid[3];         // unit blocks, row blocks, directions
  int32_t shared_bytes;    // per block
  int32_t barriers;        // uint32 that the caller hands over as zeros; 0: none are needed
};

// Every function returns 0 or an error, which fastseq_cuda_error() puts in words: kernel, shape and CUDA's own message.
const char* fastseq_cuda_error(void);
int fastseq_cuda_device_count(int32_t* count);
// The calling thread's device from now on: the library has a CUDA runtime of its own, which does not know what torch's was told.
int fastseq_cuda_use_device(int32_t device);
// Bytes of the structs above as the library sees them, for bindings written by hand: see struct_bytes in dispatch.cu.
int64_t fastseq_cuda_struct_bytes(int32_t index);
const char* fastseq_cuda_architectures(void);  // what the library was compiled for

// First column, divided by H, of the gate's W_hh h in a row of slots; -1: the cell has no such gate.
int32_t fastseq_cuda_hidden_column(int32_t cell, int32_t gate);
int32_t fastseq_cuda_slot_count(int32_t cell);

// mode is fastseq_cuda_mode; an error where it is not possible on the current device.
int fastseq_cuda_rnn_plan(int32_t cell, int32_t dtype, int32_t backward, int32_t mode,
                          const struct fastseq_cuda_rnn_shape* shape, struct fastseq_cuda_plan* plan);
int fastseq_cuda_run_rnn_forward(int32_t cell, int32_t dtype, const struct fastseq_cuda_rnn_forward* call,
                                 const struct fastseq_cuda_plan* plan, uint32_t* barriers, void* stream);
int fastseq_cuda_run_rnn_backward(int32_t cell, int32_t dtype, const struct fastseq_cuda_rnn_backward* call,
                                  const struct fastseq_cuda_plan* plan, uint32_t* barriers, void* stream);

// Attention takes the structs of fastseq.h with device pointers, those of lengths, starts and tables too. Log-sum-exp, row
// maxima and scales are in the sum type. threads and grad_bias_elements are not looked at.
// row_maximum and row_scale must be given where weights are.
int fastseq_cuda_run_attention_forward(int32_t dtype, const struct fastseq_attention_forward* call, void* stream);
// delta: memory for one value of the sum type per query row, addressed as row_maximum is.
int fastseq_cuda_run_attention_backward(int32_t dtype, const struct fastseq_attention_backward* call,
                                        const struct fastseq_rows* delta, void* stream);

#ifdef __cplusplus
}
#endif
#endif
