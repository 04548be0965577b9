"""What a recurrent layer must compute: torch's own layers, run in float64 on the same values.

A :class:`Case` describes one call. ``run(case, library, dtype)`` makes that call with either
library and returns every output and every gradient by name, as float64 tensors; the two libraries
meet the same arguments, down to strides, and the same weights for the loss.

The bound, for float32: our distance from the float64 result is at most 1.5 times that of torch's
own float32 layer plus 4 units in the last place of the tensor's largest magnitude. In a tensor of
few elements torch may be exact by luck. Its error is therefore the largest of several runs, whose
inputs and weights differ by one unit each: the same problem, rounded in other places.

For float64 there is no better arithmetic to compare with. Rounding errors of one algorithm scale
with the unit of the dtype, so that torch's measured float32 error times 2^-29 stands for its
float64 error; ours may be 1.5 times that, and the distance between two results that both err is at
most the sum, 2.5 times, plus the four units twice.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from kernels import TIERS, on_tier
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from fastseq import functional

CELLS = ("rnn_tanh", "rnn_relu", "lstm", "gru")
GATES = {"rnn_tanh": 1, "rnn_relu": 1, "lstm": 4, "gru": 3}

RATIO = 1.5
FREE_UNITS = 4
FLOAT32_TO_FLOAT64 = torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps

_TORCH_LAYERS = {
    "lstm": torch._VF.lstm,
    "gru": torch._VF.gru,
    "rnn_tanh": torch._VF.rnn_tanh,
    "rnn_relu": torch._VF.rnn_relu,
}


@dataclasses.dataclass(frozen=True)
class Case:
    """One call of a layer and of its backward."""

    cell: str
    dtype: str = "float32"
    num_layers: int = 1
    bidirectional: bool = False
    layout: str = "padded"  # or packed, packed_unsorted, lengths, unbatched
    projected: bool = False  # LSTM only
    has_biases: bool = True
    batch_first: bool = False
    states: bool = True  # initial states given
    strides: str = "contiguous"  # or transposed, expanded, every_other, offset
    steps: int = 5
    batch: int = 3
    input_size: int = 7
    hidden_size: int = 7

    @property
    def proj_size(self) -> int:
        return (self.hidden_size + 1) // 2 if self.projected else 0

    @property
    def directions(self) -> int:
        return 2 if self.bidirectional else 1

    @property
    def allowed(self) -> bool:
        """A projection must be narrower than what it projects."""
        return not self.projected or self.proj_size < self.hidden_size

    @property
    def flops(self) -> int:
        """Multiplications and additions of one forward."""
        width = self.proj_size or self.hidden_size
        deeper = (self.num_layers - 1) * (self.directions * width + width)
        columns = self.input_size + width + deeper
        rows = self.steps * self.batch * self.directions
        return 2 * rows * GATES[self.cell] * self.hidden_size * columns

    def __str__(self) -> str:
        flags = [
            self.layout,
            self.strides,
            *(n for n in ("bidirectional", "projected", "batch_first") if getattr(self, n)),
            *(f"no_{n}" for n in ("has_biases", "states") if not getattr(self, n)),
        ]
        sizes = f"T{self.steps}-B{self.batch}-I{self.input_size}-H{self.hidden_size}"
        return f"{self.cell}-{self.dtype}-L{self.num_layers}-{sizes}-" + "-".join(flags)


def strided(values: Tensor, strides: str, dtype: torch.dtype) -> Tensor:
    """A leaf with these values (``expanded``: with those of the first slice of dim -2)."""
    values = values.to(dtype)
    if strides == "transposed" and values.dim() >= 2:
        leaf = values.transpose(0, 1).contiguous().transpose(0, 1)
    elif strides == "every_other":
        leaf = values.repeat_interleave(2, dim=-1)[..., ::2]
    elif strides == "offset":
        # One element off: no vector load of the kernels is aligned any more.
        leaf = torch.cat([values.new_zeros(1), values.flatten()])[1:].view(values.shape)
    elif strides == "expanded" and values.dim() == 3:
        leaf = values[:, :1].expand(values.shape)
    else:
        leaf = values.clone()
    return leaf.detach().requires_grad_()


def case_lengths(case: Case, generator: torch.Generator) -> Tensor | None:
    if case.layout not in ("packed", "packed_unsorted", "lengths"):
        return None
    lengths = torch.randint(1, case.steps + 1, (case.batch,), generator=generator)
    return lengths.sort(descending=True).values if case.layout == "packed" else lengths


def arguments(
    case: Case, dtype: torch.dtype, nudge: int = 0
) -> tuple[dict[str, Tensor], Tensor | None, torch.Generator]:
    """Leaves by name, lengths, and the generator from which the loss draws its weights.

    A ``nudge`` other than 0 moves every value by one float32 unit, up or down.
    """
    generator = torch.Generator().manual_seed(zlib.crc32(str(case).encode()))

    moves = torch.Generator().manual_seed(nudge)

    def values(*shape: int, scale: float = 1.0) -> Tensor:
        drawn = torch.randn(*shape, generator=generator, dtype=torch.float64) * scale
        if nudge:
            signs = torch.randint(0, 2, shape, generator=moves) * 2 - 1
            drawn = drawn * (1 + signs * torch.finfo(torch.float32).eps)
        # What float32 cannot hold would be an error of the input, not of the layer.
        return drawn.float().double() if case.dtype == "float32" else drawn

    shape = (case.steps, case.input_size)
    if case.layout != "unbatched":
        batched = (case.batch, case.steps) if case.batch_first else (case.steps, case.batch)
        shape = (*batched, case.input_size)
    leaves = {"x": strided(values(*shape), case.strides, dtype)}
    width = case.proj_size or case.hidden_size
    if case.states:
        middle = () if case.layout == "unbatched" else (case.batch,)
        rows = case.num_layers * case.directions
        leaves["h_0"] = strided(values(rows, *middle, width), case.strides, dtype)
        if case.cell == "lstm":
            leaves["c_0"] = strided(values(rows, *middle, case.hidden_size), case.strides, dtype)
    gate_rows = GATES[case.cell] * case.hidden_size
    for layer in range(case.num_layers):
        features = case.directions * width if layer else case.input_size
        # Pre-activations of size one: where the gates saturate, 1 - tanh^2 loses all its digits
        # and the result says nothing about the layer.
        scale = 0.7 * (features + width) ** -0.5
        for direction in range(case.directions):
            shapes = {"w_ih": (gate_rows, features), "w_hh": (gate_rows, width)}
            if case.has_biases:
                shapes.update(b_ih=(gate_rows,), b_hh=(gate_rows,))
            if case.projected:
                shapes["w_hr"] = (width, case.hidden_size)
            for name, weight_shape in shapes.items():
                scaled = values(*weight_shape, scale=scale)
                kind = "contiguous" if case.strides == "expanded" else case.strides
                leaves[f"{name}_{layer}_{direction}"] = strided(scaled, kind, dtype)
    return leaves, case_lengths(case, generator), generator


def _fastseq_layers(case: Case, input: Tensor, states: Any, weights: Any, **rows: Any) -> Any:
    options: dict[str, Any] = {
        "num_layers": case.num_layers,
        "bidirectional": case.bidirectional,
        "batch_first": case.batch_first,
        "has_biases": case.has_biases,
        **rows,
    }
    if case.cell == "lstm":
        return functional.lstm(input, states, weights, proj_size=case.proj_size, **options)
    if case.cell == "gru":
        return functional.gru(input, states, weights, **options)
    nonlinearity = case.cell.removeprefix("rnn_")
    return functional.rnn(input, states, weights, nonlinearity=nonlinearity, **options)


def _torch_layers(
    case: Case, input: Tensor, states: Any, weights: Any, batch_sizes: Tensor | None = None
) -> Any:
    lift = case.layout == "unbatched"
    if lift:
        input = input.unsqueeze(1)
    if states is None:
        batch = int(batch_sizes[0]) if batch_sizes is not None else case.batch
        shape = (case.num_layers * case.directions, 1 if lift else batch)
        states = input.new_zeros(*shape, case.proj_size or case.hidden_size)
        if case.cell == "lstm":
            states = (states, input.new_zeros(*shape, case.hidden_size))
    elif lift:
        states = (
            tuple(state.unsqueeze(1) for state in states)
            if case.cell == "lstm"
            else states.unsqueeze(1)
        )
    flags = (case.has_biases, case.num_layers, 0.0, True, case.bidirectional)
    layer = _TORCH_LAYERS[case.cell]
    if batch_sizes is not None:
        output, *final = layer(input, batch_sizes, states, list(weights), *flags)
    else:
        first = case.batch_first and not lift
        output, *final = layer(input, states, list(weights), *flags, first)
    if lift:
        output, *final = (tensor.squeeze(1) for tensor in (output, *final))
    return output, tuple(final) if case.cell == "lstm" else final[0]


def outputs_of(
    case: Case, library: str, leaves: dict[str, Tensor], lengths: Tensor | None
) -> list[Tensor]:
    """``[output, h_n]`` or ``[output, h_n, c_n]`` of one forward."""
    states: Any = None
    if "h_0" in leaves:
        states = (leaves["h_0"], leaves["c_0"]) if case.cell == "lstm" else leaves["h_0"]
    weights = [leaf for name, leaf in leaves.items() if name[:2] in ("w_", "b_")]
    run_layers = _fastseq_layers if library == "fastseq" else _torch_layers
    x = leaves["x"]
    if lengths is None:
        output, final = run_layers(case, x, states, weights)
    elif case.layout == "lengths" and library == "fastseq":
        output, final = run_layers(case, x, states, weights, lengths=lengths)
    else:
        packed = pack_padded_sequence(
            x, lengths, case.batch_first, enforce_sorted=case.layout == "packed"
        )
        if states is not None and packed.sorted_indices is not None:
            states = _permuted(states, packed.sorted_indices)
        data, final = run_layers(case, packed.data, states, weights, batch_sizes=packed.batch_sizes)
        if packed.unsorted_indices is not None:
            final = _permuted(final, packed.unsorted_indices)
        output, _ = pad_packed_sequence(
            PackedSequence(data, *packed[1:]), case.batch_first, total_length=case.steps
        )
    return [output, *(final if case.cell == "lstm" else (final,))]


def _permuted(states: Any, order: Tensor) -> Any:
    if isinstance(states, tuple):
        return tuple(state.index_select(1, order) for state in states)
    return states.index_select(1, order)


def run(
    case: Case, library: str, dtype: torch.dtype, nudge: int = 0, *, drawn: Any = None
) -> dict[str, Tensor]:
    """Every output and gradient of the case by name, in float64.

    ``drawn`` is what ``arguments`` returned, where it is needed more than once.
    """
    leaves, lengths, generator = drawn or arguments(case, dtype, nudge)
    state = generator.get_state()
    outputs = outputs_of(case, library, leaves, lengths)
    cotangents = [
        torch.randn(output.shape, generator=generator, dtype=torch.float64).to(dtype)
        for output in outputs
    ]
    generator.set_state(state)  # another run with these arguments has the same loss
    gradients = torch.autograd.grad(outputs, list(leaves.values()), cotangents)
    assert all(tensor.dtype is dtype for tensor in (*outputs, *gradients))
    results = dict(zip(("output", "h_n", "c_n"), outputs, strict=False))
    results.update({f"grad_{name}": g for name, g in zip(leaves, gradients, strict=True)})
    return {name: tensor.detach().double() for name, tensor in results.items()}


def expected(case: Case) -> tuple[dict[str, Tensor], dict[str, float]]:
    """torch's float64 result and, by name, how far from it ours may be."""
    truth = run(case, "torch", torch.float64)
    # The float32 sister of a float64 case: the same values, rounded.
    sister = dataclasses.replace(case, dtype="float32")
    errors = dict.fromkeys(truth, 0.0)
    # Until about 48 elements were seen of the smallest tensor, a bias: the fewer there are, the
    # more runs it takes to meet torch's usual error instead of its luck.
    runs = min(max(48 // (GATES[case.cell] * case.hidden_size), 2), 12)
    for nudge in range(runs):
        exact = truth
        if nudge or case.dtype == "float64":
            exact = run(sister, "torch", torch.float64, nudge)
        rounded = run(sister, "torch", torch.float32, nudge)
        for name in errors:
            errors[name] = max(errors[name], largest(rounded[name] - exact[name]))
    return truth, {
        name: bound(getattr(torch, case.dtype), errors[name], largest(value))
        for name, value in truth.items()
    }


def bound(dtype: torch.dtype, torch_float32_error: float, magnitude: float) -> float:
    """How far from the truth we may be; see the top of this file."""
    unit = torch.finfo(dtype).eps * magnitude
    if dtype is torch.float32:
        return RATIO * torch_float32_error + FREE_UNITS * unit
    return (RATIO + 1) * torch_float32_error * FLOAT32_TO_FLOAT64 + 2 * FREE_UNITS * unit


def every_tier() -> Iterator[str]:
    """Set every instruction-set tier with 1 and with 2 threads in turn, and say which.

    A loop, where the fixtures ``isa`` and ``threads`` would compute the truth six times over.
    """
    threads = torch.get_num_threads()
    try:
        for name in TIERS:
            for count in (1, 2):
                torch.set_num_threads(count)
                with on_tier(name):
                    yield f"{name}, {count} thread(s)"
    finally:
        torch.set_num_threads(threads)


def largest(tensor: Tensor) -> float:
    return float(tensor.abs().max()) if tensor.numel() else 0.0


def check(case: Case) -> None:
    """Run the case on every tier and hold it against :func:`expected`.

    Without gradients calls take other ways through the library, to the same bits.
    """
    truth, bounds = expected(case)
    dtype = getattr(torch, case.dtype)
    leaves, lengths, _ = drawn = arguments(case, dtype)
    for tier in every_tier():
        results = run(case, "fastseq", dtype, drawn=drawn)
        compare(results, truth, bounds, tier)
        with torch.no_grad():
            inferred = outputs_of(case, "fastseq", leaves, lengths)
        for name, output in zip(("output", "h_n", "c_n"), inferred, strict=False):
            assert torch.equal(output.double(), results[name]), f"{name} {tier}: no_grad differs"


def compare(
    actual: dict[str, Tensor], truth: dict[str, Tensor], bounds: dict[str, float], tier: str = ""
) -> None:
    assert actual.keys() == truth.keys()
    for name, value in truth.items():
        assert actual[name].shape == value.shape, name
        error = largest(actual[name] - value)
        # NaN fails here, too.
        assert error <= bounds[name], f"{name} {tier}: error {error:.3e}, bound {bounds[name]:.3e}"


def pairwise_cases(
    choices: dict[str, Sequence[Any]], largest_flops: int, seed: int
) -> list[dict[str, Any]]:
    """Few combinations of ``choices`` in which every two values of two options meet.

    Greedy: of 30 random combinations that are allowed, the one with the most new pairs is taken,
    until nothing new has come for a while. A product of all options would be a million cases.
    """
    generator = torch.Generator().manual_seed(seed)
    names = list(choices)
    seen: set[tuple[str, Any, str, Any]] = set()
    chosen: list[dict[str, Any]] = []
    misses = 0
    while misses < 8:
        best, best_new = None, set()
        for _ in range(30):
            picks = {
                name: options[int(torch.randint(len(options), (), generator=generator))]
                for name, options in choices.items()
            }
            if Case(**picks).flops > largest_flops or not Case(**picks).allowed:
                continue
            pairs = {
                (a, picks[a], b, picks[b]) for i, a in enumerate(names) for b in names[i + 1 :]
            }
            if len(pairs - seen) > len(best_new):
                best, best_new = picks, pairs - seen
        if best is None:
            misses += 1
        else:
            chosen.append(best)
            seen |= best_new
            misses = 0
    return chosen
