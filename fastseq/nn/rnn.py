"""Recurrent layers with the API of :class:`torch.nn.RNN`, ``LSTM`` and ``GRU``.

They subclass :class:`torch.nn.RNNBase`, from which come the parameters, their names and
initialisation, ``state_dict``, ``repr``, pickling and ``flatten_parameters`` (which matters only
where torch's cuDNN path answers; the CPU kernels read the parameters where they lie). They do not
subclass ``torch.nn.LSTM`` and its siblings, because ``torch.compile`` breaks the graph at every
instance of those: ``isinstance(layer, torch.nn.LSTM)`` is False.
"""

from __future__ import annotations

from typing import Any, overload

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from fastseq import functional
from fastseq._checks import recurrent as _checks
from fastseq.functional import Lengths, States

__all__ = ["GRU", "LSTM", "RNN"]

_MODES = {"LSTM": "lstm", "GRU": "gru", "RNN_TANH": "rnn_tanh", "RNN_RELU": "rnn_relu"}


class _RecurrentLayers(torch.nn.RNNBase):
    """What the three modules share: finding the weights and handing all arguments on."""

    # The torch.nn class with the same parameters, for what only torch itself can run.
    _torch_type: type[torch.nn.RNNBase]

    def _current_weights(self) -> list[Tensor]:
        """The flat weight list, read anew at each call so that no replaced weight is missed.

        Weights that are not plain parameters (parametrized, pruned, replicated) are found as
        attributes by torch's own code.
        """
        parameters = self._parameters
        try:
            return [parameters[name] for name in self._flat_weights_names]  # type: ignore[misc]
        except KeyError:
            self._update_flat_weights()
            return self._flat_weights  # type: ignore[return-value]

    def _run(
        self,
        input: Tensor,
        h_0: Tensor | None,
        c_0: Tensor | None,
        batch_sizes: Tensor | None,
        lengths: Lengths | None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        return functional.run_layers(
            _MODES[self.mode],
            input,
            h_0,
            c_0,
            self._current_weights(),
            self.num_layers,
            self.bidirectional,
            self.batch_first,
            self.bias,
            self.dropout,
            self.training,
            self.proj_size,
            batch_sizes,
            lengths,
        )

    def __prepare_scriptable__(self) -> torch.nn.Module:
        """torch.jit.script compiles source, not kernels: give it torch's layer, same parameters."""
        twin = self._torch_type.__new__(self._torch_type)
        twin.__dict__.update(self.__dict__)
        return twin


def _permute(state: Tensor, permutation: Tensor | None) -> Tensor:
    """Put the batch entries of ``state`` (L*D, B, ·) into another order."""
    return state if permutation is None else state.index_select(1, permutation)


class _HiddenStateLayers(_RecurrentLayers):
    """Layers whose only state is the hidden state."""

    @overload
    def forward(
        self, input: Tensor, hx: Tensor | None = None, *, lengths: Lengths | None = None
    ) -> tuple[Tensor, Tensor]: ...

    @overload
    def forward(
        self, input: PackedSequence, hx: Tensor | None = None
    ) -> tuple[PackedSequence, Tensor]: ...

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: Tensor | None = None,
        *,
        lengths: Lengths | None = None,
    ) -> tuple[Tensor | PackedSequence, Tensor]:
        """Run all layers over a sequence.

        Args:
            input: ``(T, B, I)``, ``(B, T, I)`` with ``batch_first``, ``(T, I)``, or a
                :class:`~torch.nn.utils.rnn.PackedSequence`.
            hx: ``h_0`` ``(L*D, B, H)``, or ``(L*D, H)`` with ``(T, I)`` input. Default: zeros.
            lengths: ``(B,)`` integers for padded input: outputs past a sequence's length are
                zero, its final state is that at its length. Not in :mod:`torch.nn`.

        Returns:
            ``output``, of the kind of ``input``, and ``h_n``, shaped as ``hx``.

        Raises:
            ValueError, RuntimeError: as :func:`fastseq.functional.lstm` does.
        """
        if isinstance(input, PackedSequence):
            data, batch_sizes, sorted_indices, unsorted_indices = input
            if hx is not None:
                hx = _permute(hx, sorted_indices)
            output, h_n, _ = self._run(data, hx, None, batch_sizes, lengths)
            packed = PackedSequence(output, batch_sizes, sorted_indices, unsorted_indices)
            return packed, _permute(h_n, unsorted_indices)
        output, h_n, _ = self._run(input, hx, None, None, lengths)
        return output, h_n


class RNN(_HiddenStateLayers):
    """Elman layers; constructor, parameters and results of :class:`torch.nn.RNN`.

    ``h' = act(W_ih x + b_ih + W_hh h + b_hh)`` with ``act`` tanh or ReLU
    (https://docs.pytorch.org/docs/stable/generated/torch.nn.RNN.html).

    Args:
        input_size, hidden_size: features of the input and of the hidden state.
        num_layers: stacked layers.
        nonlinearity: ``"tanh"`` or ``"relu"``; another raises ``ValueError``.
        bias: whether there are ``b_ih`` and ``b_hh``.
        batch_first: input and output are ``(B, T, ...)``.
        dropout: probability of zeroing an element between two layers while training.
        bidirectional: run a second direction from the end.
        device, dtype: of the parameters.
    """

    _torch_type = torch.nn.RNN

    @overload
    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        nonlinearity: str = "tanh",
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None: ...

    @overload
    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        _refuse_projection(kwargs)
        if len(args) > 3:
            nonlinearity = args[3]
            args = args[:3] + args[4:]
        else:
            nonlinearity = kwargs.pop("nonlinearity", "tanh")
        if nonlinearity not in ("tanh", "relu"):
            raise ValueError(f"nonlinearity must be 'tanh' or 'relu', got {nonlinearity!r}")
        self.nonlinearity = nonlinearity
        super().__init__(f"RNN_{nonlinearity.upper()}", *args, **kwargs)


class GRU(_HiddenStateLayers):
    """Gated recurrent units; constructor, parameters and results of :class:`torch.nn.GRU`.

    The reset gate is applied after the recurrent product
    (https://docs.pytorch.org/docs/stable/generated/torch.nn.GRU.html).

    Args:
        input_size, hidden_size: features of the input and of the hidden state.
        num_layers: stacked layers.
        bias: whether there are ``b_ih`` and ``b_hh``.
        batch_first: input and output are ``(B, T, ...)``.
        dropout: probability of zeroing an element between two layers while training.
        bidirectional: run a second direction from the end.
        device, dtype: of the parameters.
    """

    _torch_type = torch.nn.GRU

    @overload
    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None: ...

    @overload
    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        _refuse_projection(kwargs)
        super().__init__("GRU", *args, **kwargs)


class LSTM(_RecurrentLayers):
    """Long short-term memory; constructor, parameters and results of :class:`torch.nn.LSTM`.

    (https://docs.pytorch.org/docs/stable/generated/torch.nn.LSTM.html)

    Args:
        input_size, hidden_size: features of the input and of the cell state.
        num_layers: stacked layers.
        bias: whether there are ``b_ih`` and ``b_hh``.
        batch_first: input and output are ``(B, T, ...)``.
        dropout: probability of zeroing an element between two layers while training.
        bidirectional: run a second direction from the end.
        proj_size: features of the projected hidden state, less than ``hidden_size``; 0 for none.
        device, dtype: of the parameters.
    """

    _torch_type = torch.nn.LSTM

    # Methods by which torch.nn.LSTM's checks differ from RNNBase's, for code that calls them.
    get_expected_cell_size = torch.nn.LSTM.get_expected_cell_size
    check_forward_args = torch.nn.LSTM.check_forward_args  # type: ignore[assignment]
    permute_hidden = torch.nn.LSTM.permute_hidden  # type: ignore[assignment]

    @overload
    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None: ...

    @overload
    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__("LSTM", *args, **kwargs)

    @overload
    def forward(
        self, input: Tensor, hx: States | None = None, *, lengths: Lengths | None = None
    ) -> tuple[Tensor, States]: ...

    @overload
    def forward(
        self, input: PackedSequence, hx: States | None = None
    ) -> tuple[PackedSequence, States]: ...

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: States | None = None,
        *,
        lengths: Lengths | None = None,
    ) -> tuple[Tensor | PackedSequence, States]:
        """Run all layers over a sequence.

        Args:
            input: ``(T, B, I)``, ``(B, T, I)`` with ``batch_first``, ``(T, I)``, or a
                :class:`~torch.nn.utils.rnn.PackedSequence`.
            hx: ``(h_0, c_0)`` of shapes ``(L*D, B, R)`` and ``(L*D, B, H)``, without ``B`` with
                ``(T, I)`` input. Default: zeros.
            lengths: ``(B,)`` integers for padded input: outputs past a sequence's length are
                zero, its final states are those at its length. Not in :mod:`torch.nn`.

        Returns:
            ``output``, of the kind of ``input``, and ``(h_n, c_n)``, shaped as ``hx``.

        Raises:
            ValueError, RuntimeError, TypeError: as :func:`fastseq.functional.lstm` does.
        """
        h_0, c_0 = (None, None) if hx is None else _checks.pair(hx)
        if isinstance(input, PackedSequence):
            data, batch_sizes, sorted_indices, unsorted_indices = input
            if h_0 is not None and c_0 is not None:
                h_0, c_0 = _permute(h_0, sorted_indices), _permute(c_0, sorted_indices)
            output, h_n, c_n = self._run(data, h_0, c_0, batch_sizes, lengths)
            assert c_n is not None
            packed = PackedSequence(output, batch_sizes, sorted_indices, unsorted_indices)
            return packed, (_permute(h_n, unsorted_indices), _permute(c_n, unsorted_indices))
        output, h_n, c_n = self._run(input, h_0, c_0, None, lengths)
        assert c_n is not None
        return output, (h_n, c_n)


def _refuse_projection(kwargs: dict[str, Any]) -> None:
    if "proj_size" in kwargs:
        raise ValueError("proj_size is an option of LSTM, not of RNN or GRU")
