"""Norms with the API of :class:`torch.nn.LayerNorm` and :class:`torch.nn.RMSNorm`.

They subclass torch's classes, from which come the constructor, the parameters and their
initialisation, ``state_dict``, ``repr`` and pickling.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastseq import functional

__all__ = ["LayerNorm", "RMSNorm"]


class LayerNorm(torch.nn.LayerNorm):
    """Layer normalization; constructor, parameters and results of :class:`torch.nn.LayerNorm`.

    Formula: https://arxiv.org/abs/1607.06450

    Args:
        normalized_shape: size or sizes of the last dimensions, which are normalized together.
        eps: added to the variance.
        elementwise_affine: whether there is a ``weight``.
        bias: whether there is a ``bias`` beside the weight.
        device, dtype: of the parameters.
    """

    def forward(self, input: Tensor) -> Tensor:
        """``input`` ``(..., *normalized_shape)``; returns a dense tensor of the same shape.

        Raises:
            RuntimeError: shapes, dtypes or devices do not fit together.
        """
        parameters = self._parameters
        try:  # past the slow attribute look-up of modules where they are plain parameters
            weight, bias = parameters["weight"], parameters["bias"]
        except KeyError:
            weight, bias = self.weight, self.bias
        return functional.layer_norm(input, self.normalized_shape, weight, bias, self.eps)

    def __prepare_scriptable__(self) -> torch.nn.Module:
        """torch.jit.script compiles source, not kernels: give it torch's norm, same parameters."""
        twin = torch.nn.LayerNorm.__new__(torch.nn.LayerNorm)
        twin.__dict__.update(self.__dict__)
        return twin


class RMSNorm(torch.nn.RMSNorm):
    """Root mean square normalization; as :class:`torch.nn.RMSNorm`.

    Formula: https://arxiv.org/abs/1910.07467

    Args:
        normalized_shape: size or sizes of the last dimensions, which are normalized together.
        eps: added to the mean of squares; default: the machine epsilon of the arithmetic's dtype.
        elementwise_affine: whether there is a ``weight``.
        device, dtype: of the parameters.
    """

    def forward(self, x: Tensor) -> Tensor:
        """``x`` ``(..., *normalized_shape)``; returns a dense tensor of the same shape.

        Raises:
            RuntimeError: shapes or devices do not fit together.
            ValueError: ``x`` has fewer dimensions than ``normalized_shape``.
        """
        try:
            weight = self._parameters["weight"]
        except KeyError:
            weight = self.weight
        return functional.rms_norm(x, self.normalized_shape, weight, self.eps)

    def __prepare_scriptable__(self) -> torch.nn.Module:
        """torch.jit.script compiles source, not kernels: give it torch's norm, same parameters."""
        twin = torch.nn.RMSNorm.__new__(torch.nn.RMSNorm)
        twin.__dict__.update(self.__dict__)
        return twin
