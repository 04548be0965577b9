// LSTM with input, forget and output gates (Hochreiter & Schmidhuber 1997; Gers et al. 2000), torch's gate order i f g o:
//   c_t = f * c_{t-1} + i * g,   h_t = o * tanh(c_t)
#pragma once

namespace fastseq::FS_ISA {
namespace {

struct Lstm {
  static constexpr int gates = 4, slots = 4;
  static constexpr int input_first = 0, input_count = 4, hidden_first = 0, hidden_count = 4;
  static constexpr bool has_cell = true;
  static constexpr int gate_of_input(int i) { return i; }
  static constexpr int gate_of_hidden(int i) { return i; }

  // Saved: i, f, g, o after their activations. c: in c_{t-1}, out c_t.
  template <class Math, class V = typename Math::Value>
  static FS_INLINE void forward(V (&slot)[slots], V /*h_previous*/, V& c, V& h) {
    V i = slot[0] = Math::sigmoid(slot[0]);
    V f = slot[1] = Math::sigmoid(slot[1]);
    V g = slot[2] = Math::tanh(slot[2]);
    V o = slot[3] = Math::sigmoid(slot[3]);
    c = Math::fused_multiply_add(f, c, i * g);
    h = o * Math::tanh(c);
  }

  // slot: in what forward saved, out the gradients of the pre-activations. grad_c: in dL/dc_t without the path through
  // h_t, out dL/dc_{t-1}. tanh(c_t) is computed again: cheaper than keeping it.
  template <class Math, class V = typename Math::Value>
  static FS_INLINE void backward(V (&slot)[slots], V /*h_previous*/, V c_previous, V c, V grad_h, V& grad_c, V& grad_h_direct) {
    V one = Math::constant(1);
    V i = slot[0], f = slot[1], g = slot[2], o = slot[3];
    V tanh_c = Math::tanh(c);
    V total = Math::fused_multiply_add(grad_h * o, Math::fused_negate_multiply_add(tanh_c, tanh_c, one), grad_c);
    slot[0] = total * g * (i * (one - i));
    slot[1] = total * c_previous * (f * (one - f));
    slot[2] = total * i * Math::fused_negate_multiply_add(g, g, one);
    slot[3] = grad_h * tanh_c * (o * (one - o));
    grad_c = total * f;
    grad_h_direct = Math::constant(0);
  }
};

}  // namespace
}  // namespace fastseq::FS_ISA
