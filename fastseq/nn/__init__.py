"""Drop-in modules: the constructor, ``state_dict`` and results of :mod:`torch.nn`'s."""

from fastseq.nn.attention import MultiheadAttention
from fastseq.nn.cache import KeyValueCache
from fastseq.nn.cells import GRUCell, LSTMCell, RNNCell
from fastseq.nn.linear import Linear
from fastseq.nn.norm import LayerNorm, RMSNorm
from fastseq.nn.rnn import GRU, LSTM, RNN
from fastseq.nn.rotary import RotaryEmbedding

__all__ = [
    "GRU",
    "LSTM",
    "RNN",
    "GRUCell",
    "KeyValueCache",
    "LSTMCell",
    "LayerNorm",
    "Linear",
    "MultiheadAttention",
    "RMSNorm",
    "RNNCell",
    "RotaryEmbedding",
]
