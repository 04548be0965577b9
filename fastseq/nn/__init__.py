"""Drop-in modules: the constructor, ``state_dict`` and results of :mod:`torch.nn`'s."""

from fastseq.nn.attention import MultiheadAttention
from fastseq.nn.cache import KeyValueCache
from fastseq.nn.cell_layer import CellLayer
from fastseq.nn.cells import GRUCell, LSTMCell, RNNCell
from fastseq.nn.decoder_cache import DecoderCache, DecoderLayerCache
from fastseq.nn.linear import Linear
from fastseq.nn.norm import LayerNorm, RMSNorm
from fastseq.nn.positional import PositionalEncoding
from fastseq.nn.rnn import GRU, LSTM, RNN
from fastseq.nn.rotary import RotaryEmbedding
from fastseq.nn.transformer import Transformer
from fastseq.nn.transformer_decoder import TransformerDecoder, TransformerDecoderLayer
from fastseq.nn.transformer_encoder import TransformerEncoder, TransformerEncoderLayer

__all__ = [
    "GRU",
    "LSTM",
    "RNN",
    "CellLayer",
    "DecoderCache",
    "DecoderLayerCache",
    "GRUCell",
    "KeyValueCache",
    "LSTMCell",
    "LayerNorm",
    "Linear",
    "MultiheadAttention",
    "PositionalEncoding",
    "RMSNorm",
    "RNNCell",
    "RotaryEmbedding",
    "Transformer",
    "TransformerDecoder",
    "TransformerDecoderLayer",
    "TransformerEncoder",
    "TransformerEncoderLayer",
]
