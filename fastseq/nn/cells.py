"""Single steps with the API of :class:`torch.nn.RNNCell`, ``LSTMCell`` and ``GRUCell``.

They subclass :class:`torch.nn.RNNCellBase`, from which come the parameters, their names and
initialisation, ``state_dict``, ``repr`` and pickling.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastseq import functional
from fastseq.functional import States

__all__ = ["GRUCell", "LSTMCell", "RNNCell"]


class _Cell(torch.nn.RNNCellBase):
    # The torch.nn class with the same parameters, for what only torch itself can run.
    _torch_type: type[torch.nn.RNNCellBase]

    def __prepare_scriptable__(self) -> torch.nn.Module:
        """torch.jit.script compiles source, not kernels: give it torch's cell, same parameters."""
        twin = self._torch_type.__new__(self._torch_type)
        twin.__dict__.update(self.__dict__)
        return twin

    def _weights(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """The four weights, past the slow attribute look-up of modules where they are parameters.

        Weights that are not plain parameters (parametrized, pruned, replicated) are attributes.
        """
        parameters = self._parameters
        try:
            return (
                parameters["weight_ih"],
                parameters["weight_hh"],
                parameters["bias_ih"],
                parameters["bias_hh"],
            )  # type: ignore[return-value]
        except KeyError:
            return self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh


class RNNCell(_Cell):
    """One Elman step; constructor, parameters and results of :class:`torch.nn.RNNCell`.

    Formula: https://docs.pytorch.org/docs/stable/generated/torch.nn.RNNCell.html

    Args:
        input_size, hidden_size: features of the input and of the hidden state.
        bias: whether there are ``bias_ih`` and ``bias_hh``.
        nonlinearity: ``"tanh"`` or ``"relu"``; another raises ``RuntimeError`` at the first call,
            as in torch.
        device, dtype: of the parameters.
    """

    _torch_type = torch.nn.RNNCell
    nonlinearity: str

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        nonlinearity: str = "tanh",
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(input_size, hidden_size, bias, num_chunks=1, device=device, dtype=dtype)
        self.nonlinearity = nonlinearity

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        """``input`` (B, I) or (I), ``hx`` (B, H) or (H), default zeros; returns ``h'`` as ``hx``.

        Raises:
            ValueError: ``input`` or ``hx`` is neither 1-D nor 2-D.
            RuntimeError: sizes, dtypes or devices do not fit together.
        """
        if self.nonlinearity not in ("tanh", "relu"):
            raise RuntimeError(f"nonlinearity must be 'tanh' or 'relu', got {self.nonlinearity!r}")
        return functional.run_cell(
            f"rnn_{self.nonlinearity}",
            input,
            hx,
            None,
            *self._weights(),
        )[0]


class LSTMCell(_Cell):
    """One LSTM step; constructor, parameters and results of :class:`torch.nn.LSTMCell`.

    Formula: https://docs.pytorch.org/docs/stable/generated/torch.nn.LSTMCell.html

    Args:
        input_size, hidden_size: features of the input and of the states.
        bias: whether there are ``bias_ih`` and ``bias_hh``.
        device, dtype: of the parameters.
    """

    _torch_type = torch.nn.LSTMCell

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(input_size, hidden_size, bias, num_chunks=4, device=device, dtype=dtype)

    def forward(self, input: Tensor, hx: States | None = None) -> States:
        """``input`` (B, I) or (I), ``hx = (h, c)`` each (B, H) or (H), default zeros.

        Returns ``(h', c')``, shaped as ``hx``.

        Raises:
            ValueError: ``input`` or a state is neither 1-D nor 2-D.
            RuntimeError: sizes, dtypes or devices do not fit together.
            TypeError: ``hx`` is not a pair of tensors.
        """
        return functional.lstm_cell(input, hx, *self._weights())


class GRUCell(_Cell):
    """One GRU step; constructor, parameters and results of :class:`torch.nn.GRUCell`.

    Formula: https://docs.pytorch.org/docs/stable/generated/torch.nn.GRUCell.html

    Args:
        input_size, hidden_size: features of the input and of the hidden state.
        bias: whether there are ``bias_ih`` and ``bias_hh``.
        device, dtype: of the parameters.
    """

    _torch_type = torch.nn.GRUCell

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(input_size, hidden_size, bias, num_chunks=3, device=device, dtype=dtype)

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        """``input`` (B, I) or (I), ``hx`` (B, H) or (H), default zeros; returns ``h'`` as ``hx``.

        Raises:
            ValueError: ``input`` or ``hx`` is neither 1-D nor 2-D.
            RuntimeError: sizes, dtypes or devices do not fit together.
        """
        return functional.gru_cell(input, hx, *self._weights())
