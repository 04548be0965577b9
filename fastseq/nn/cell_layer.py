"""A layer around a cell that the user wrote."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, overload

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from fastseq._checks import cells as _checks
from fastseq.cells import Cell
from fastseq.functional.cells import cell_layers
from fastseq.functional.recurrent import Lengths

__all__ = ["CellLayer"]

CellStates = Tensor | tuple[Tensor, ...]


class CellLayer(torch.nn.Module):
    """Recurrent layers of a cell made by :func:`fastseq.cell`.

    Everything but the cell is as for :class:`fastseq.nn.LSTM`: layouts, layers, directions, packed
    input, lengths, states. Parameters have torch's names and are drawn as torch draws them,
    uniformly from ``-1/sqrt(H)`` to ``1/sqrt(H)``; per layer and direction

    - ``weight_ih_l0`` ``(G*H, I)`` and ``weight_hh_l0`` ``(G*H, H)``, G counting the gates whose
      ``x`` or ``h`` the cell uses; none where it uses none,
    - ``bias_ih_l0``, ``bias_hh_l0`` ``(G*H)`` likewise, with ``bias``,
    - one ``(H)`` for each of the cell's ``parameters``, ``p_l0`` for ``p``,
    - ``weight_hr_l0`` ``(P, H)`` with ``proj_size``; ``weight_hh_l0`` is ``(G*H, P)`` then.

    Args:
        cell: the cell.
        input_size, hidden_size: features I of the input and H of each state.
        num_layers: stacked layers.
        bias: whether there are biases.
        batch_first: input and output are ``(B, T, ...)``.
        dropout: probability of zeroing an element between two layers while training.
        bidirectional: run a second direction from the end.
        device, dtype: of the parameters.
        recurrent_dropout: while training, probability of zeroing a unit of the hidden state where
            it enters the recurrent product (the rest is divided by ``1 - p``), drawn once per
            sequence, layer and direction and the same at all steps ("variational dropout", Gal and
            Ghahramani 2016, https://arxiv.org/abs/1512.05287). What a formula reads as ``s[0]`` is
            not dropped. Nothing happens in a cell without a recurrent product.
        zoneout: probability, for all states or one for each, that a unit of a state keeps its
            value from before the step, drawn anew at every step for every sequence (Krueger et
            al. 2017, https://arxiv.org/abs/1606.01305). In evaluation nothing is random: as in the
            paper a state is then ``p * old + (1 - p) * new``.
        weight_dropout: while training, probability of zeroing an element of ``weight_hh``, drawn
            once per call for all steps and sequences, the rest divided by ``1 - p``
            ("DropConnect", Wan et al. 2013; for LSTMs Merity et al. 2018,
            https://arxiv.org/abs/1708.02182).
        proj_size: P > 0 multiplies the hidden state by ``weight_hr`` after every step, as
            :class:`torch.nn.LSTM` does: output and first state have P features (Sak et al. 2014,
            https://arxiv.org/abs/1402.1128). For cells that do not read ``s[0]`` themselves, and
            without ``recurrent_dropout`` and ``zoneout``, which do.

    All random numbers come from torch's default generator: the same ``torch.manual_seed`` gives
    the same masks, whatever the number of threads.

    Raises:
        TypeError: ``cell`` was not made by :func:`fastseq.cell`.
        ValueError: a size is below 1, a probability not between 0 and 1, or ``proj_size`` not
            smaller than ``hidden_size`` or not possible for the cell.
    """

    def __init__(
        self,
        cell: Cell,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        recurrent_dropout: float = 0.0,
        zoneout: float | Sequence[float] = 0.0,
        weight_dropout: float = 0.0,
        proj_size: int = 0,
    ) -> None:
        super().__init__()
        if not isinstance(cell, Cell):
            raise TypeError(
                f"cell must be made by fastseq.cell, got {type(cell).__name__}: decorate the "
                "function with @fastseq.cell(gates=..., states=...)"
            )
        for name, size in (
            ("input_size", input_size),
            ("hidden_size", hidden_size),
            ("num_layers", num_layers),
        ):
            if isinstance(size, bool) or not isinstance(size, int):
                raise TypeError(f"{name} must be an int, got {type(size).__name__}")
            if size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")
        self.cell = cell
        self.input_size, self.hidden_size, self.num_layers = input_size, hidden_size, num_layers
        self.bias, self.batch_first, self.bidirectional = bias, batch_first, bidirectional
        self.dropout = _checks.probability("dropout", dropout)
        self.recurrent_dropout = _checks.probability("recurrent_dropout", recurrent_dropout)
        self.weight_dropout = _checks.probability("weight_dropout", weight_dropout)
        if isinstance(zoneout, (int, float)):
            self.zoneout: float | tuple[float, ...] = _checks.probability("zoneout", zoneout)
        else:
            self.zoneout = tuple(_checks.probability("zoneout", rate) for rate in zoneout)
            if len(self.zoneout) != cell.states:
                raise ValueError(
                    f"zoneout must be a number or one for each of {cell.states} state(s), "
                    f"got {len(self.zoneout)}"
                )
        self.proj_size = _checks.projection(
            cell, hidden_size, proj_size, self.recurrent_dropout, self.zoneout
        )
        self._names: list[str] = []
        features = input_size
        for layer in range(num_layers):
            for suffix in ("", "_reverse") if bidirectional else ("",):
                shapes = _checks.weight_shapes(cell, features, hidden_size, bias, proj_size)
                for name, shape in shapes:
                    full = f"{name}_l{layer}{suffix}"
                    parameter = torch.nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
                    self.register_parameter(full, parameter)
                    self._names.append(full)
            features = (proj_size or hidden_size) * (2 if bidirectional else 1)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw all parameters anew, uniformly from ``-1/sqrt(H)`` to ``1/sqrt(H)``."""
        bound = 1 / math.sqrt(self.hidden_size)
        for parameter in self.parameters():
            torch.nn.init.uniform_(parameter, -bound, bound)

    def extra_repr(self) -> str:
        """The arguments that are not defaults."""
        words = [self.cell.name, str(self.input_size), str(self.hidden_size)]
        defaults = {
            "num_layers": 1,
            "bias": True,
            "batch_first": False,
            "dropout": 0.0,
            "bidirectional": False,
            "recurrent_dropout": 0.0,
            "zoneout": 0.0,
            "weight_dropout": 0.0,
            "proj_size": 0,
        }
        for name, default in defaults.items():
            value = getattr(self, name)
            if value != default:
                words.append(f"{name}={value}")
        return ", ".join(words)

    @overload
    def forward(
        self, input: Tensor, hx: CellStates | None = None, *, lengths: Lengths | None = None
    ) -> tuple[Tensor, CellStates]: ...

    @overload
    def forward(
        self, input: PackedSequence, hx: CellStates | None = None
    ) -> tuple[PackedSequence, CellStates]: ...

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: CellStates | None = None,
        *,
        lengths: Lengths | None = None,
    ) -> tuple[Tensor | PackedSequence, CellStates]:
        """Run all layers over a sequence.

        Args:
            input: ``(T, B, I)``, ``(B, T, I)`` with ``batch_first``, ``(T, I)``, or a
                :class:`~torch.nn.utils.rnn.PackedSequence`.
            hx: the initial state ``(L*D, B, H)``, a tuple of them for a cell with several, without
                ``B`` with ``(T, I)`` input; the first has P features with ``proj_size``. Default:
                zeros.
            lengths: ``(B,)`` integers for padded input: outputs past a sequence's length are
                zero, its final states are those at its length.

        Returns:
            ``output``, of the kind of ``input`` with ``D*H`` (or ``D*P``) features, and the final
            states, shaped as ``hx``.

        Raises:
            ValueError, RuntimeError, TypeError: as :func:`fastseq.functional.cell_layers` does.
        """
        states = self._states(hx)
        data, batch_sizes, order, back = (
            input if isinstance(input, PackedSequence) else (input, None, None, None)
        )
        if order is not None:
            states = [state.index_select(1, order) for state in states]
        output, final = cell_layers(
            self.cell,
            data,
            states,
            [getattr(self, name) for name in self._names],
            hidden_size=self.hidden_size,
            num_layers=self.num_layers,
            bidirectional=self.bidirectional,
            batch_first=self.batch_first,
            has_biases=self.bias,
            dropout=self.dropout,
            recurrent_dropout=self.recurrent_dropout,
            zoneout=self.zoneout,
            weight_dropout=self.weight_dropout,
            proj_size=self.proj_size,
            training=self.training,
            batch_sizes=batch_sizes,
            lengths=lengths,
        )
        if back is not None:
            final = tuple(state.index_select(1, back) for state in final)
        result: CellStates = final if self.cell.states > 1 else final[0]
        if isinstance(input, PackedSequence):
            return PackedSequence(output, batch_sizes, order, back), result
        return output, result

    def _states(self, hx: CellStates | None) -> list[Tensor]:
        if hx is None:
            return []
        count = self.cell.states
        if count == 1 and isinstance(hx, Tensor):
            return [hx]
        if isinstance(hx, Tensor) or len(hx) != count:
            got = "one tensor" if isinstance(hx, Tensor) else f"{len(hx)}"
            raise TypeError(
                f"hx must be {'a tensor' if count == 1 else f'a tuple of {count} tensors'}, "
                f"got {got}"
            )
        return list(hx)
