"""The activations that a linear layer can have inside, by the number the ops and kernels take."""

from __future__ import annotations

__all__ = ["ACTIVATIONS", "GELU", "GELU_TANH", "NONE", "RELU", "SILU"]

NONE, RELU, GELU, GELU_TANH, SILU = range(5)

ACTIVATIONS: dict[str | None, int] = {
    None: NONE,
    "relu": RELU,
    "gelu": GELU,
    "gelu_tanh": GELU_TANH,
    "silu": SILU,
}
