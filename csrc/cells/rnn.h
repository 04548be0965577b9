// Elman cell: h_t = act(W_ih x_t + b_ih + W_hh h_{t-1} + b_hh).
//
// What a cell struct tells the drivers (every cell has the same members):
//   gates                     row blocks of the weight matrices
//   slots                     values per unit and step that pass through the driver: pre-activations into forward(),
//                             what backward() needs out of it, gradients of the pre-activations out of backward()
//   input_first, input_count  the slots that take part in W_ih x; hidden_* those in W_hh h. A slot in both gets the sum.
//   gate_of_input(i)          which row block of W_ih feeds slot input_first + i; gate_of_hidden likewise
//   has_cell                  a second state next to h
// Math is the value type's function set (csrc/cpu/math.h), so that the same text serves every vector width and CUDA.
#pragma once

namespace fastseq::FS_ISA {
namespace {

struct Tanh {
  template <class Math>
  static FS_INLINE typename Math::Value forward(typename Math::Value a) {
    return Math::tanh(a);
  }
  // From the output, so that the pre-activation need not be kept.
  template <class Math>
  static FS_INLINE typename Math::Value backward(typename Math::Value h, typename Math::Value grad_h) {
    return grad_h * Math::fused_negate_multiply_add(h, h, Math::constant(1));
  }
};

struct Relu {
  template <class Math>
  static FS_INLINE typename Math::Value forward(typename Math::Value a) {
    return Math::relu(a);
  }
  template <class Math>
  static FS_INLINE typename Math::Value backward(typename Math::Value h, typename Math::Value grad_h) {
    return Math::relu_gradient(h, grad_h);
  }
};

template <class Activation>
struct ElmanCell {
  static constexpr int gates = 1, slots = 1;
  static constexpr int input_first = 0, input_count = 1, hidden_first = 0, hidden_count = 1;
  static constexpr bool has_cell = false;
  static constexpr int gate_of_input(int) { return 0; }
  static constexpr int gate_of_hidden(int) { return 0; }

  // Saved: h_t.
  template <class Math, class V = typename Math::Value>
  static FS_INLINE void forward(V (&slot)[slots], V /*h_previous*/, V& /*c*/, V& h) {
    h = slot[0] = Activation::template forward<Math>(slot[0]);
  }

  template <class Math, class V = typename Math::Value>
  static FS_INLINE void backward(V (&slot)[slots], V /*h_previous*/, V /*c_previous*/, V /*c*/, V grad_h, V& /*grad_c*/,
                                 V& grad_h_direct) {
    slot[0] = Activation::template backward<Math>(slot[0], grad_h);
    grad_h_direct = Math::constant(0);
  }
};

using RnnTanh = ElmanCell<Tanh>;
using RnnRelu = ElmanCell<Relu>;

}  // namespace
}  // namespace fastseq::FS_ISA
