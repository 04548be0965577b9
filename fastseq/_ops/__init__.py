"""Every op of fastseq: schema, kernel, fake kernel and autograd formula, all of them here.

There are two ways into a kernel. Plain tensors in eager mode go straight to the backend, inside an
``autograd.Function`` when a gradient is wanted: the dispatcher would add several microseconds to
calls that take as few themselves. Everything else (``torch.compile``, ``torch.export``, fake
tensors, dispatch modes) meets the registered ops ``fastseq::rnn_forward``,
``fastseq::attention_forward``, ``fastseq::norm_forward`` and their ``_backward``. ``torch.func``
transforms, forward-mode AD and double backward are answered by the reference composites, which are
made of differentiable torch operators.
"""

from __future__ import annotations

from fastseq._ops import flops  # noqa: F401  registers the formulas
from fastseq._ops.attention import attention, plain_attention
from fastseq._ops.cell_kernels import runs_compiled
from fastseq._ops.cells import cell_layer
from fastseq._ops.decoding import plain_decoder_step
from fastseq._ops.linear import linear, plain_linear
from fastseq._ops.norm import norm, plain_norm
from fastseq._ops.recurrent import plain_layer, rnn_cell, rnn_layer
from fastseq._ops.shared import library

__all__ = [
    "attention",
    "cell_layer",
    "library",
    "linear",
    "norm",
    "plain_attention",
    "plain_decoder_step",
    "plain_layer",
    "plain_linear",
    "plain_norm",
    "rnn_cell",
    "rnn_layer",
    "runs_compiled",
]
