"""Drop-in modules: the constructor, ``state_dict`` and results of :mod:`torch.nn`'s."""

from fastseq.nn.cells import GRUCell, LSTMCell, RNNCell
from fastseq.nn.rnn import GRU, LSTM, RNN

__all__ = ["GRU", "LSTM", "RNN", "GRUCell", "LSTMCell", "RNNCell"]
