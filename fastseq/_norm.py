"""What the layers of a call of a norm hand to one another besides tensors."""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import Tensor

__all__ = ["NormOptions"]


class NormOptions(NamedTuple):
    """The numbers of a call, in the order of the ops' schema."""

    dims: int = 1  # how many of the last dimensions are normalized together
    rms: bool = False
    eps: float = 1e-5
    dropout_p: float = 0.0

    def features(self, input: Tensor) -> int:
        """How many elements of ``input`` are normalized together."""
        return math.prod(input.shape[input.dim() - self.dims :])
