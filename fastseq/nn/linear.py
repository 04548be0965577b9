"""The linear layer with the API of :class:`torch.nn.Linear`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastseq.functional.linear import linear

__all__ = ["Linear"]


class Linear(torch.nn.Linear):
    """``input @ weight.T + bias``; constructor, parameters and results of :class:`torch.nn.Linear`.

    Formula: https://docs.pytorch.org/docs/stable/generated/torch.nn.Linear.html. What may follow
    it (an activation, dropout, a residual) is an argument of :func:`fastseq.functional.linear`.

    Args:
        in_features, out_features: sizes of the last dimension of input and output.
        bias: whether there is a ``bias``.
        device, dtype: of the parameters.
    """

    def forward(self, input: Tensor) -> Tensor:
        """``input`` ``(..., in_features)``; returns ``(..., out_features)``.

        Raises:
            RuntimeError: sizes, dtypes or devices do not fit together.
        """
        weight: Any
        bias: Any
        try:
            # Past the slow attribute look-up of modules.
            weight, bias = self._parameters["weight"], self._parameters["bias"]
        except KeyError:  # parametrized, pruned or replicated
            weight, bias = self.weight, self.bias
        return linear(input, weight, bias)

    def __prepare_scriptable__(self) -> torch.nn.Module:
        """torch.jit.script compiles source, not kernels: give it torch's layer, same parameters."""
        twin = torch.nn.Linear.__new__(torch.nn.Linear)
        twin.__dict__.update(self.__dict__)
        return twin
