"""The shipped cells as plain torch loops, written from the papers, and what tests do with both."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

T, B, IN, H = 6, 4, 5, 7
EXACT = {"rtol": 1e-12, "atol": 1e-12}
States = tuple[Tensor, ...]


def peephole_lstm(x: Tensor, h: Tensor | None, s: States, p: dict[str, Tensor]) -> States:
    i, f, g, o = (x + h).chunk(4, -1)
    i = torch.sigmoid(i + p["peephole_i"] * s[1])
    f = torch.sigmoid(f + p["peephole_f"] * s[1])
    c = f * s[1] + i * torch.tanh(g)
    return torch.sigmoid(o + p["peephole_o"] * c) * torch.tanh(c), c


def coupled_lstm(x: Tensor, h: Tensor | None, s: States, p: dict[str, Tensor]) -> States:
    i, g, o = (x + h).chunk(3, -1)
    i = torch.sigmoid(i)
    c = (1 - i) * s[1] + i * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


def minimal_gated_unit(x: Tensor, h: Tensor, s: States, p: dict[str, Tensor]) -> States:
    (f_x, n_x), (f_h, n_h) = x.chunk(2, -1), h.chunk(2, -1)
    f = torch.sigmoid(f_x + f_h)
    return ((1 - f) * s[0] + f * torch.tanh(n_x + f * n_h),)


def ind_rnn(x: Tensor, h: Tensor | None, s: States, p: dict[str, Tensor]) -> States:
    return (torch.relu(x + p["recurrent"] * s[0]),)


def s_lstm(x: Tensor, h: Tensor | None, s: States, p: dict[str, Tensor]) -> States:
    i, f, z, o = (x + h).chunk(4, -1)
    log_f = torch.nn.functional.logsigmoid(f)
    m = torch.maximum(log_f + s[3], i)
    i, f = torch.exp(i - m), torch.exp(log_f + s[3] - m)
    c, n = f * s[1] + i * torch.tanh(z), f * s[2] + i
    return torch.sigmoid(o) * c / n, c, n, m


def janet(x: Tensor, h: Tensor | None, s: States, p: dict[str, Tensor]) -> States:
    f, c = (x + h).chunk(2, -1)
    return (torch.sigmoid(f) * s[0] + (1 - torch.sigmoid(f - 1)) * torch.tanh(c),)


LOOPS: dict[str, Callable[..., States]] = {
    "peephole_lstm": peephole_lstm,
    "coupled_lstm": coupled_lstm,
    "minimal_gated_unit": minimal_gated_unit,
    "ind_rnn": ind_rnn,
    "s_lstm": s_lstm,
    "janet": janet,
}
each_cell = pytest.mark.parametrize("name", LOOPS)


def loop(layer: Any, x: Tensor, states: States) -> tuple[Tensor, States]:
    """One layer, one direction, time first."""
    p = {name: getattr(layer, f"{name}_l0") for name in layer.cell.parameters}
    outputs = []
    for step in torch.nn.functional.linear(x, layer.weight_ih_l0, layer.bias_ih_l0):
        from_hidden = None
        if layer.cell.recurrent:
            from_hidden = torch.nn.functional.linear(
                states[0], layer.weight_hh_l0, layer.bias_hh_l0
            )
        states = LOOPS[layer.cell.name](step, from_hidden, states, p)
        outputs.append(states[0])
    return torch.stack(outputs), states


def as_tuple(states: Any) -> States:
    return states if isinstance(states, tuple) else (states,)


def draw_states(layer: Any, batch: int = B) -> States:
    rows = layer.num_layers * (2 if layer.bidirectional else 1)
    dtype = next(layer.parameters()).dtype
    # Positive, as the sLSTM's normaliser is.
    return tuple(
        (torch.rand(rows, batch, layer.hidden_size, dtype=dtype) + 0.1).requires_grad_()
        for _ in range(layer.cell.states)
    )


def given(layer: Any, states: States) -> Any:
    return states if layer.cell.states > 1 else states[0]


def leaves_and_grads(output: Tensor, states: States, wanted: list[Tensor]) -> list[Tensor]:
    results = [output, *states]
    loss = sum(
        (r * torch.linspace(0.5, 1.5, r.numel(), dtype=r.dtype).view_as(r)).sum() for r in results
    )
    return [*(r.detach() for r in results), *torch.autograd.grad(loss, wanted)]


def run(layer: Any, x: Any, hx: Any, wanted: list[Tensor], **options: Any) -> list[Tensor]:
    torch.manual_seed(3)
    output, final = layer(x, hx, **options)
    output = output.data if not isinstance(output, Tensor) else output
    return leaves_and_grads(output, as_tuple(final), wanted)


def raises(kind: type[Exception], message: str, call: Callable[[], Any]) -> None:
    with pytest.raises(kind, match=message):
        call()
