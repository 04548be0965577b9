// Compiled once per instruction set (FS_ISA is its name). The one exported symbol of each object is its kernel table;
// everything else has internal linkage, and no inline code is shared with other objects: a shared inline built for AVX-512
// would kill an older processor. For the same reason nothing here uses the C++ standard library.
#include "../fastseq.h"
#include "activation.h"

// The cells know neither vectors nor threads: what they use comes first.
#include "../cells/gru.h"
#include "../cells/lstm.h"
#include "../cells/rnn.h"

namespace fastseq::FS_ISA {
namespace {

template <class Cell>
constexpr const char* cell_name = nullptr;
#define FASTSEQ_CELL(name, Struct) \
  template <>                      \
  constexpr const char* cell_name<Struct> = #name;
#include "../cells/cells.def"
#undef FASTSEQ_CELL

}  // namespace
}  // namespace fastseq::FS_ISA

#include "attention_backward.h"
#include "attention_forward.h"
#include "linear.h"
#include "norm_backward.h"
#include "norm_forward.h"
#include "peak.h"
#include "rnn_backward.h"
#include "rnn_row_parts.h"

#define FS_JOIN_OF(a, b) a##b
#define FS_JOIN(a, b) FS_JOIN_OF(a, b)

namespace fastseq::FS_ISA {
namespace {

template <class T, class Cell>
size_t rnn_reserve_bytes(int64_t rows, int64_t hidden_size, int64_t projection_size, int64_t directions) {
  return (size_t)(directions * Reserve<T, Cell>::direction_size(rows, hidden_size, projection_size)) * sizeof(T);
}

}  // namespace
}  // namespace fastseq::FS_ISA

using namespace fastseq::FS_ISA;

extern "C" const fastseq_kernel_table FS_JOIN(fastseq_table_, FS_ISA);
const fastseq_kernel_table FS_JOIN(fastseq_table_, FS_ISA) = {
    FS_STRING(FS_ISA),
#define FASTSEQ_CELL(name, Struct) {rnn_forward<float, Struct>, rnn_forward<double, Struct>},
    {
#include "../cells/cells.def"
    },
#undef FASTSEQ_CELL
#define FASTSEQ_CELL(name, Struct) {rnn_backward<float, Struct>, rnn_backward<double, Struct>},
    {
#include "../cells/cells.def"
    },
#undef FASTSEQ_CELL
#define FASTSEQ_CELL(name, Struct) {rnn_reserve_bytes<float, Struct>, rnn_reserve_bytes<double, Struct>},
    {
#include "../cells/cells.def"
    },
#undef FASTSEQ_CELL
    {{unary<float, FASTSEQ_EXP>, unary<double, FASTSEQ_EXP>},
     {unary<float, FASTSEQ_TANH>, unary<double, FASTSEQ_TANH>},
     {unary<float, FASTSEQ_SIGMOID>, unary<double, FASTSEQ_SIGMOID>},
     {unary<float, FASTSEQ_UNARY_GELU>, unary<double, FASTSEQ_UNARY_GELU>},
     {unary<float, FASTSEQ_UNARY_GELU_TANH>, unary<double, FASTSEQ_UNARY_GELU_TANH>},
     {unary<float, FASTSEQ_UNARY_SILU>, unary<double, FASTSEQ_UNARY_SILU>}},
    {attention_forward<float>, attention_forward<double>},
    {attention_backward<float>, attention_backward<double>},
    dropout_mask,
    {linear_forward<float>, linear_forward<double>},
    {linear_backward<float>, linear_backward<double>},
    element_dropout_mask,
    {norm_forward<float>, norm_forward<double>},
    {norm_backward<float>, norm_backward<double>},
    {fma_gflops<float>, fma_gflops<double>},
    memory_gbytes,
};
