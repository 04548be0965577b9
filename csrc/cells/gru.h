// GRU (Cho et al. 2014) in torch's form: the reset gate multiplies the recurrent product after the matrix ("linear before reset").
//   n = tanh(W_in x + b_in + r * (W_hn h + b_hn)),   h_t = (1 - z) * n + z * h_{t-1}
#pragma once

namespace fastseq::FS_ISA {
namespace {

struct Gru {
  static constexpr int gates = 3, slots = 4;
  // Slots n_x, r, z, n_h: those of the input product and those of the recurrent one are each a contiguous window.
  static constexpr int input_first = 0, input_count = 3, hidden_first = 1, hidden_count = 3;
  static constexpr bool has_cell = false;
  static constexpr int gate_of_input(int i) { return i == 0 ? 2 : i - 1; }
  static constexpr int gate_of_hidden(int i) { return i; }

  // Saved: n, r, z, and W_hn h + b_hn.
  template <class Math, class V = typename Math::Value>
  static FS_INLINE void forward(V (&slot)[slots], V h_previous, V& /*c*/, V& h) {
    V r = slot[1] = Math::sigmoid(slot[1]);
    V z = slot[2] = Math::sigmoid(slot[2]);
    V n = slot[0] = Math::tanh(Math::fused_multiply_add(r, slot[3], slot[0]));
    h = Math::fused_multiply_add(z, h_previous - n, n);
  }

  template <class Math, class V = typename Math::Value>
  static FS_INLINE void backward(V (&slot)[slots], V h_previous, V /*c_previous*/, V /*c*/, V grad_h, V& /*grad_c*/,
                                 V& grad_h_direct) {
    V one = Math::constant(1);
    V n = slot[0], r = slot[1], z = slot[2], n_hidden = slot[3];
    V grad_n = grad_h * (one - z) * Math::fused_negate_multiply_add(n, n, one);
    slot[0] = grad_n;
    slot[1] = grad_n * n_hidden * (r * (one - r));
    slot[2] = grad_h * (h_previous - n) * (z * (one - z));
    slot[3] = grad_n * r;
    grad_h_direct = grad_h * z;
  }
};

}  // namespace
}  // namespace fastseq::FS_ISA
