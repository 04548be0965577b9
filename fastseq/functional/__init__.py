"""Layers and attention as functions: argument checks and layout, no maths.

The functions mirror what :mod:`torch.nn` runs under its modules, with weights passed as torch lays
them out, and :func:`torch.nn.functional.scaled_dot_product_attention`.
"""

from __future__ import annotations

from fastseq.functional.attention import attention, attention_paged, attention_varlen
from fastseq.functional.cells import cell_layers
from fastseq.functional.linear import linear
from fastseq.functional.norm import add_layer_norm, add_rms_norm, layer_norm, rms_norm
from fastseq.functional.recurrent import (
    Lengths,
    States,
    gru,
    gru_cell,
    lstm,
    lstm_cell,
    rnn,
    rnn_cell,
    run_cell,
    run_layers,
)
from fastseq.functional.scaled_dot_product import scaled_dot_product_attention

__all__ = [
    "Lengths",
    "States",
    "add_layer_norm",
    "add_rms_norm",
    "attention",
    "attention_paged",
    "attention_varlen",
    "cell_layers",
    "gru",
    "gru_cell",
    "layer_norm",
    "linear",
    "lstm",
    "lstm_cell",
    "rms_norm",
    "rnn",
    "rnn_cell",
    "run_cell",
    "run_layers",
    "scaled_dot_product_attention",
]
