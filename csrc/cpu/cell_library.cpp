// A user's cell as a shared library: compiled on the user's machine from a generated file that defines
//   FASTSEQ_CELL_SOURCE   a header with the struct fastseq::FS_ISA::UserCell, as in csrc/cells, with more of its numbers
//   FASTSEQ_CELL_ELEMENT  float or double
//   FS_ISA                the tier whose flags it is compiled with
// Like kernels.cpp it uses nothing of the C++ standard library. What it needs of the process comes in a table.
#include "cell_library.h"
#include "runtime.h"

namespace {
const fastseq_cell_runtime* runtime_table;
}

// Functions of these names are what the headers call; here they hand over to the process's own.
extern "C" {
void fastseq_run_parallel(int threads, void (*body)(void*, int, int), void* context) {
  runtime_table->run_parallel(threads, body, context);
}
void* fastseq_workspace(size_t bytes) { return runtime_table->workspace(bytes); }
void fastseq_prefer_huge_pages(void* block, size_t bytes) { runtime_table->prefer_huge_pages(block, bytes); }
void fastseq_wait_turn(int turn) { runtime_table->wait_turn(turn); }
int fastseq_profile_enter(int phase) { return runtime_table->profile_enter(phase); }
int fastseq_profile_begin_call(const char* kernel, const char* variant, const char* isa, int dtype) {
  return runtime_table->profile_begin_call(kernel, variant, isa, dtype);
}
void fastseq_profile_add_size(const char* name, int64_t value) { runtime_table->profile_add_size(name, value); }
void fastseq_profile_end_call(void) { runtime_table->profile_end_call(); }
}

// A variable cannot hand over: the headers' looks at it become looks through the table.
#define fastseq_profiling (*runtime_table->profiling)

// The cell knows neither vectors nor threads: what it uses comes first.
#include "cell_math.h"
#include FASTSEQ_CELL_SOURCE

namespace fastseq::FS_ISA {
namespace {

// For the drivers' own entry points, which nobody calls here: a user's cell goes by other names in a profile.
template <class Cell>
constexpr const char* cell_name = nullptr;

}  // namespace
}  // namespace fastseq::FS_ISA

#include "rnn_backward.h"
#include "rnn_row_parts.h"

namespace fastseq::FS_ISA {
namespace {

template <>
inline constexpr bool clears_pads<UserCell> = true;

using Element = FASTSEQ_CELL_ELEMENT;

// The numbers that the profiler's model of such a call needs, in the order of `OwnCell` in fastseq/_work.py.
void profile_own_cell() {
  profile_size("input_gates", UserCell::input_count);
  profile_size("hidden_gates", UserCell::hidden_count);
  profile_size("states", UserCell::has_cell ? 2 : 1);
  profile_size("saved", UserCell::slots + (UserCell::has_cell ? 1 : 0));
  profile_size("parameters", 0);
}

int forward(const fastseq_rnn_forward* call) {
  ProfiledCall profiled;
  if (profiled.begins<Element>("cell_forward", UserCell::name)) {
    profile_sizes(call->shape);
    profile_size("bias", call->weights[0].input_bias != nullptr);
    profile_own_cell();
    profile_size("training", call->reserve != nullptr);
  }
  RnnRowParts<Element, UserCell> row_parts(*call);
  return row_parts.parts > 1 ? row_parts.run() : RnnForward<Element, UserCell>(*call).run();
}

int backward(const fastseq_rnn_backward* call) {
  ProfiledCall profiled;
  if (profiled.begins<Element>("cell_backward", UserCell::name)) {
    profile_sizes(call->shape);
    const fastseq_rnn_weight_gradients& wanted = call->grad_weights[0];
    profile_size("bias", call->weights[0].input_bias != nullptr);
    profile_own_cell();
    profile_size("needs_x", call->grad_x.data != nullptr);
    profile_size("needs_w", wanted.input || wanted.hidden || wanted.projection);
    profile_size("rows_handed_on", rows_handed_on(*call));
  }
  return RnnBackward<Element, UserCell>(*call).run();
}

size_t reserve_bytes(int64_t rows, int64_t hidden_size, int64_t projection_size, int64_t directions) {
  return (size_t)(directions * Reserve<Element, UserCell>::direction_size(rows, hidden_size, projection_size)) *
         sizeof(Element);
}

const fastseq_cell_library library = {
    FASTSEQ_CELL_ABI,  sizeof(Element) == sizeof(double) ? FASTSEQ_FLOAT64 : FASTSEQ_FLOAT32,
    FS_STRING(FS_ISA), forward,
    backward,          reserve_bytes,
};

}  // namespace
}  // namespace fastseq::FS_ISA

extern "C" __attribute__((visibility("default"))) const fastseq_cell_library* fastseq_cell_start(
    const fastseq_cell_runtime* table) {
  runtime_table = table;
  return &fastseq::FS_ISA::library;
}
