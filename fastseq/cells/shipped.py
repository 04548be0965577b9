"""Cells that ship, each a function as a user would write it.

None of them has a module of its own: ``fastseq.nn.CellLayer(fastseq.cells.janet, 128, 256)``.
"""

from __future__ import annotations

from typing import Any

from fastseq.cells.definition import Cell, cell
from fastseq.cells.vocabulary import exp, maximum, relu, sigmoid, softplus, tanh

__all__ = [
    "SHIPPED",
    "coupled_lstm",
    "ind_rnn",
    "janet",
    "minimal_gated_unit",
    "peephole_lstm",
    "s_lstm",
]


@cell(gates=4, states=2, parameters=("peephole_i", "peephole_f", "peephole_o"))
def peephole_lstm(x: Any, h: Any, s: Any, p: Any) -> Any:
    """LSTM whose gates see the cell state; states h, c; gates i f g o.

    F. Gers, N. Schraudolph, J. Schmidhuber: Learning Precise Timing with LSTM Recurrent Networks.
    Journal of Machine Learning Research 3, 2002.
    """
    i = sigmoid(x[0] + h[0] + p.peephole_i * s[1])
    f = sigmoid(x[1] + h[1] + p.peephole_f * s[1])
    g = tanh(x[2] + h[2])
    c = f * s[1] + i * g
    o = sigmoid(x[3] + h[3] + p.peephole_o * c)
    return o * tanh(c), c


@cell(gates=3, states=2)
def coupled_lstm(x: Any, h: Any, s: Any) -> Any:
    """LSTM that forgets as much as it lets in (CIFG); states h, c; gates i g o.

    K. Greff, R. Srivastava, J. Koutník, B. Steunebrink, J. Schmidhuber: LSTM: A Search Space
    Odyssey. IEEE Transactions on Neural Networks and Learning Systems 28, 2017.
    https://arxiv.org/abs/1503.04069
    """
    i, g, o = sigmoid(x[0] + h[0]), tanh(x[1] + h[1]), sigmoid(x[2] + h[2])
    c = s[1] + i * (g - s[1])
    return o * tanh(c), c


@cell(gates=2)
def minimal_gated_unit(x: Any, h: Any, s: Any) -> Any:
    """One gate in place of the GRU's two; gates f n.

    The gate multiplies the recurrent product after its bias was added, as torch's GRU does, where
    the paper multiplies the state before the product.

    G. Zhou, J. Wu, C. Zhang, Z. Zhou: Minimal Gated Unit for Recurrent Neural Networks.
    International Journal of Automation and Computing 13, 2016. https://arxiv.org/abs/1603.09420
    """
    f = sigmoid(x[0] + h[0])
    n = tanh(x[1] + f * h[1])
    return s[0] + f * (n - s[0])


@cell(gates=1, parameters=("recurrent",))
def ind_rnn(x: Any, h: Any, s: Any, p: Any) -> Any:
    """Units that remember only themselves: a vector in place of the recurrent matrix.

    S. Li, W. Li, C. Cook, C. Zhu, Y. Gao: Independently Recurrent Neural Network (IndRNN): Building
    a Longer and Deeper RNN. CVPR 2018. https://arxiv.org/abs/1803.04831
    """
    return relu(x[0] + p.recurrent * s[0])


@cell(gates=4, states=4)
def s_lstm(x: Any, h: Any, s: Any) -> Any:
    """LSTM with an exponential input gate; states h, c, n (normaliser), m (stabiliser).

    Gates i f z o; the forget gate is the paper's sigmoid, and the recurrent matrix a full one (one
    head). ``m`` keeps the exponentials in range and cancels out of h.

    M. Beck, K. Pöppel, M. Spanring, A. Auer, O. Prudnikova, M. Kopp, G. Klambauer, J. Brandstetter,
    S. Hochreiter: xLSTM: Extended Long Short-Term Memory. NeurIPS 2024.
    https://arxiv.org/abs/2405.04517
    """
    log_i = x[0] + h[0]
    log_f = -softplus(-(x[1] + h[1]))
    z, o = tanh(x[2] + h[2]), sigmoid(x[3] + h[3])
    m = maximum(log_f + s[3], log_i)
    i, f = exp(log_i - m), exp(log_f + s[3] - m)
    c = f * s[1] + i * z
    n = f * s[2] + i
    return o * c / n, c, n, m


@cell(gates=2)
def janet(x: Any, h: Any, s: Any) -> Any:
    """An LSTM with nothing but its forget gate, with an input gate that follows from it; gates f c.

    ``h' = f h + (1 - sigmoid(pre_f - 1)) tanh(pre_c)``. The paper draws the forget gate's bias as
    ``log(uniform(1, T_max - 1))`` and sets the other to zero; the layer leaves that to you.

    J. van der Westhuizen, J. Lasenby: The unreasonable effectiveness of the forget gate. 2018.
    https://arxiv.org/abs/1804.04849
    """
    forget = x[0] + h[0]
    candidate = tanh(x[1] + h[1])
    return sigmoid(forget) * s[0] + (1 - sigmoid(forget - 1)) * candidate


SHIPPED: dict[str, Cell] = {
    found.name: found
    for found in (peephole_lstm, coupled_lstm, minimal_gated_unit, ind_rnn, s_lstm, janet)
}
