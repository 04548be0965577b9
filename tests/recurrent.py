"""What the tests of the recurrent layers share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn.utils.rnn import PackedSequence
from torch.utils._pytree import tree_leaves

import fastseq.nn as fast_nn

NAMES = ("RNN", "LSTM", "GRU")
T, B, IN, H = 6, 4, 5, 7
# float64 sums of a few tens of terms of size one, in another order.
EXACT = {"rtol": 1e-12, "atol": 1e-12}


def build_pair(name: str, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
    kwargs.setdefault("dtype", torch.float64)
    theirs = getattr(torch.nn, name)(*args, **kwargs)
    ours = getattr(fast_nn, name)(*args, **kwargs)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def states(module: Any, batch: int | None = B) -> Any:
    """Random initial states; without a batch dimension for ``batch=None``."""
    count = module.num_layers * (2 if module.bidirectional else 1)
    middle = () if batch is None else (batch,)
    factory = {"dtype": module.weight_ih_l0.dtype, "requires_grad": True}
    hx = torch.randn(count, *middle, module.proj_size or module.hidden_size, **factory)
    if not isinstance(module, (torch.nn.LSTM, fast_nn.LSTM)):
        return hx
    return hx, torch.randn(count, *middle, module.hidden_size, **factory)


def leaves(result: Any) -> list[torch.Tensor]:
    """All floating tensors of a result, a PackedSequence giving its data."""
    found = tree_leaves(result, is_leaf=lambda node: isinstance(node, PackedSequence))
    return [leaf.data if isinstance(leaf, PackedSequence) else leaf for leaf in found]


def run(module: Any, wanted: list[torch.Tensor], *args: Any, **kwargs: Any) -> Any:
    """Outputs and the gradients of a sum in which every element has a different weight."""
    outputs = leaves(module(*args, **kwargs))
    loss = sum(
        (out * torch.linspace(0.5, 1.5, out.numel(), dtype=out.dtype).view_as(out)).sum()
        for out in outputs
    )
    grads = torch.autograd.grad(loss, [*wanted, *module.parameters()])
    return outputs, grads


def assert_same(theirs: Any, ours: Any, wanted: list[torch.Tensor], *args: Any) -> None:
    expected, actual = run(theirs, wanted, *args), run(ours, wanted, *args)
    torch.testing.assert_close(actual, expected, **EXACT)


each_name = pytest.mark.parametrize("name", NAMES)


def raised(call: Callable[[], Any]) -> type[BaseException] | None:
    try:
        call()
    except Exception as error:
        return type(error)
    return None
