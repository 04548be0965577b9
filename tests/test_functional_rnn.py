"""fastseq.functional: values and every gradient of layers and cells, against torch in float64."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from kernels import needs_extension
from oracle import (
    CELLS,
    GATES,
    Case,
    arguments,
    bound,
    check,
    compare,
    every_tier,
    expected,
    largest,
    outputs_of,
    pairwise_cases,
    run,
)
from torch import Tensor

import fastseq
from fastseq import _config, functional

CHOICES: dict[str, Any] = {
    "dtype": ("float32", "float64"),
    "num_layers": (1, 2, 3),
    "bidirectional": (False, True),
    "layout": ("padded", "packed", "packed_unsorted", "lengths", "unbatched"),
    "has_biases": (True, False),
    "batch_first": (False, True),
    "states": (True, False),
    "strides": ("contiguous", "transposed", "expanded", "every_other", "offset"),
    "steps": (1, 2, 33),
    "batch": (1, 2, 3, 17, 80),
    "input_size": (1, 7, 63, 65, 130),
    "hidden_size": (1, 7, 63, 65, 130),
}


@functools.cache
def covering_cases() -> list[Case]:
    cases = []
    for seed, cell in enumerate(CELLS):
        projected = {"projected": (False, True)} if cell == "lstm" else {}
        rows = pairwise_cases({"cell": (cell,), **CHOICES, **projected}, 80_000_000, seed)
        cases += [Case(**row) for row in rows]
    return cases


# What the covering design has no reason to hit: each stands for one branch of the drivers.
BRANCHES = [
    # T * B <= 4 takes the weights as they lie, batch 1 does so for the recurrent ones.
    *(
        Case(cell, steps=steps, batch=batch, input_size=33, hidden_size=70, projected=projected)
        for cell, projected in (*((cell, False) for cell in CELLS), ("lstm", True))
        for steps, batch in ((1, 1), (4, 1), (2, 2), (1, 4), (5, 1))
    ),
    # The same with weights that no cache of a core holds, and up to 24 rows then.
    *(
        Case(
            cell,
            dtype,
            layout=layout,
            bidirectional=bidirectional,
            steps=steps,
            batch=batch,
            input_size=513,
            hidden_size=270,
        )
        for cell in CELLS
        for dtype, layout, bidirectional, steps, batch in (
            ("float32", "padded", False, 1, 1),
            ("float32", "padded", True, 1, 23),
            ("float32", "lengths", False, 5, 3),
            ("float64", "packed", False, 2, 4),
            ("float32", "padded", False, 1, 25),
        )
    ),
    # Batch 1 over several chunks of 256 rows.
    *(
        Case(cell, steps=600, batch=1, input_size=5, hidden_size=33, bidirectional=True)
        for cell in CELLS
    ),
    # Several chunks whose borders fall inside a ragged batch.
    *(
        Case(cell, steps=40, batch=19, input_size=9, hidden_size=34, layout=layout, dtype=dtype)
        for cell in CELLS
        for layout, dtype in (("packed", "float32"), ("lengths", "float64"))
    ),
    # Few sums of many terms: the gradients of biases, where summing row after row shows.
    Case(
        "lstm",
        "float32",
        2,
        True,
        "packed_unsorted",
        batch_first=True,
        states=False,
        steps=33,
        batch=17,
        input_size=130,
        hidden_size=7,
    ),
    *(Case(cell, steps=33, batch=80, input_size=7, hidden_size=7) for cell in CELLS),
    # One step has more rows than a chunk.
    *(Case(cell, steps=3, batch=300, input_size=3, hidden_size=17) for cell in CELLS),
    # Without gradients, small weights: a thread takes a part of the rows through all steps.
    *(
        Case(cell, batch_first=True, steps=9, batch=19, input_size=21, hidden_size=40)
        for cell in CELLS
    ),
    Case("lstm", projected=True, states=False, steps=9, batch=35, input_size=20, hidden_size=50),
    # Columns beyond one block of the product's depth, in either operand.
    *(Case(cell, steps=2, batch=3, input_size=1000, hidden_size=33) for cell in CELLS),
    *(Case(cell, steps=2, batch=3, input_size=33, hidden_size=550) for cell in ("lstm", "gru")),
    Case("lstm", steps=3, batch=9, input_size=20, hidden_size=600, projected=True, num_layers=2),
]


@pytest.mark.parametrize("case", covering_cases(), ids=str)
def test_covering_design(case: Case) -> None:
    check(case)


@pytest.mark.parametrize("case", BRANCHES, ids=str)
def test_branches_of_the_drivers(case: Case) -> None:
    check(case)


@pytest.mark.parametrize("case", covering_cases()[::5], ids=str)
def test_reference_backend(case: Case) -> None:
    truth, bounds = expected(case)
    with fastseq.backend("reference"):
        compare(run(case, "fastseq", getattr(torch, case.dtype)), truth, bounds)


def test_the_covering_design_covers() -> None:
    cases = covering_cases()
    assert 100 <= len(cases) <= 240
    for cell in CELLS:
        met = {(c.dtype, c.layout, c.hidden_size) for c in cases if c.cell == cell}
        assert {(dtype, layout) for dtype, layout, _ in met} >= {
            (dtype, layout) for dtype in CHOICES["dtype"] for layout in CHOICES["layout"]
        }
        assert {size for *_, size in met} == set(CHOICES["hidden_size"])


# --- lengths of zero, which torch's packing refuses


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("projected", [False, True])
def test_lengths_of_zero(
    cell: str, bidirectional: bool, projected: bool, isa: str, threads: int
) -> None:
    if projected and cell != "lstm":
        pytest.skip("only the LSTM has a projection")
    case = Case(cell, "float64", 1, bidirectional, steps=4, batch=5, projected=projected)
    leaves, _, generator = arguments(case, torch.float64)
    lengths = torch.tensor([2, 0, 4, 0, 1])
    lengths_case = Case(cell, "float64", 1, bidirectional, "lengths", projected, steps=4, batch=5)
    outputs = outputs_of(lengths_case, "fastseq", leaves, lengths)
    cotangents = [torch.randn(o.shape, generator=generator, dtype=torch.float64) for o in outputs]
    names = list(leaves)
    grads = dict(
        zip(names, torch.autograd.grad(outputs, list(leaves.values()), cotangents), strict=True)
    )

    ended = lengths == 0
    assert torch.equal(outputs[0][:, ended], torch.zeros_like(outputs[0][:, ended]))
    assert torch.equal(grads["x"][:, ended], torch.zeros_like(grads["x"][:, ended]))
    for state, final, cotangent in zip(("h_0", "c_0"), outputs[1:], cotangents[1:], strict=False):
        assert torch.equal(final[:, ended], leaves[state][:, ended])
        assert torch.equal(grads[state][:, ended], cotangent[:, ended])

    # The other rows are those of the batch without the empty ones, weights' gradients included.
    alive = {
        name: leaf.detach()[:, ~ended].requires_grad_() if name in ("x", "h_0", "c_0") else leaf
        for name, leaf in leaves.items()
    }
    kept_case = Case(cell, "float64", 1, bidirectional, "lengths", projected, steps=4, batch=3)
    kept = outputs_of(kept_case, "torch", alive, lengths[~ended])
    kept_grads = torch.autograd.grad(
        kept, list(alive.values()), [cotangent[:, ~ended] for cotangent in cotangents]
    )
    for ours, theirs in zip(outputs, kept, strict=True):
        torch.testing.assert_close(ours[:, ~ended], theirs, rtol=1e-13, atol=1e-14)
    for name, theirs in zip(names, kept_grads, strict=True):
        ours = grads[name][:, ~ended] if name in ("x", "h_0", "c_0") else grads[name]
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("cell", CELLS)
def test_all_lengths_zero(cell: str, isa: str, threads: int) -> None:
    """No row is alive at any step: gradients of the weights are zeros, not what memory held."""
    case = Case(cell, "float32", 1, True, "lengths", steps=3, batch=2)
    leaves, _, _ = arguments(case, torch.float32)
    output, *final = outputs_of(case, "fastseq", leaves, torch.tensor([0, 0]))
    grads = torch.autograd.grad(
        [output, *final], list(leaves.values()), [torch.ones_like(o) for o in (output, *final)]
    )
    assert not output.any()
    for state, value in zip(("h_0", "c_0"), final, strict=False):
        assert torch.equal(value, leaves[state])
    for name, grad in zip(leaves, grads, strict=True):
        wanted = torch.ones_like(grad) if name in ("h_0", "c_0") else torch.zeros_like(grad)
        assert torch.equal(grad, wanted), name


# --- only what is asked for


def partial_results(
    case: Case, wanted: list[str], used: list[int]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Gradients of ``wanted`` from a loss over the outputs ``used``: ours, then torch's."""
    results = []
    for library in ("fastseq", "torch"):
        leaves, lengths, generator = arguments(case, torch.float64)
        for name, leaf in leaves.items():
            leaf.requires_grad_(name in wanted)
        outputs = outputs_of(case, library, leaves, lengths)
        cotangents = [
            torch.randn(o.shape, generator=generator, dtype=torch.float64) for o in outputs
        ]
        torch.autograd.backward([outputs[i] for i in used], [cotangents[i] for i in used])
        assert all((leaf.grad is not None) == (name in wanted) for name, leaf in leaves.items())
        results.append({name: leaves[name].grad for name in wanted})
    return results[0], results[1]


@pytest.mark.parametrize("layout", ["padded", "packed", "lengths"])
@pytest.mark.parametrize("cell", [*CELLS, "lstm_projected"])
def test_single_gradients(cell: str, layout: str, threads: int) -> None:
    projected = cell == "lstm_projected"
    case = Case(
        cell.removesuffix("_projected"), "float64", 1, True, layout, projected, steps=6, batch=4
    )
    for name in arguments(case, torch.float64)[0]:
        if name.endswith("_0_1"):
            continue
        ours, theirs = partial_results(case, [name], list(range(3 if case.cell == "lstm" else 2)))
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@needs_extension
def test_gradients_that_nobody_asked_for_are_not_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def spy(*given: Any) -> Any:
        seen.append(original(*given))
        return seen[-1]

    from fastseq.backends import cpu

    original = cpu.rnn_backward
    monkeypatch.setattr(cpu, "rnn_backward", spy)
    case = Case("lstm", "float64")
    partial_results(case, ["w_ih_0_0"], [0])
    grad_x, grad_h, grad_c, grad_weights = seen[0]
    assert (grad_x, grad_h, grad_c) == (None, None, None)
    assert [grad is not None for grad in grad_weights] == [True, False, False, False]


@pytest.mark.parametrize("used", [[0], [1], [2], [1, 2], [0, 2]])
@pytest.mark.parametrize("cell", [*CELLS, "lstm_projected"])
def test_unused_outputs(cell: str, used: list[int], isa: str) -> None:
    projected = cell == "lstm_projected"
    name = cell.removesuffix("_projected")
    if 2 in used and name != "lstm":
        pytest.skip("only the LSTM has a third output")
    for layout in ("padded", "lengths"):
        case = Case(name, "float64", 2, True, layout, projected, steps=6, batch=4)
        wanted = list(arguments(case, torch.float64)[0])
        ours, theirs = partial_results(case, wanted, used)
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_no_gradient_when_none_is_wanted() -> None:
    case = Case("lstm")
    leaves, _, _ = arguments(case, torch.float32)
    with torch.no_grad():
        assert not any(o.requires_grad for o in outputs_of(case, "fastseq", leaves, None))
    for leaf in leaves.values():
        leaf.requires_grad_(False)
    assert not any(o.requires_grad for o in outputs_of(case, "fastseq", leaves, None))


@pytest.mark.parametrize("cell", CELLS)
def test_inference_and_training_forward_agree_bit_by_bit(cell: str, isa: str, threads: int) -> None:
    """With a gradient wanted the pre-activations go to other memory, but the sums are the same."""
    for sizes in ({"steps": 20, "batch": 21}, {"steps": 2, "batch": 2}, {"steps": 9, "batch": 1}):
        case = Case(cell, "float32", 1, True, input_size=20, hidden_size=45, **sizes)
        leaves, _, _ = arguments(case, torch.float32)
        trained = outputs_of(case, "fastseq", leaves, None)
        with torch.no_grad():
            inferred = outputs_of(case, "fastseq", leaves, None)
        assert all(torch.equal(a, b) for a, b in zip(trained, inferred, strict=True))


# --- the size that Python allocates is the size that the kernels use


@needs_extension
def test_rnn_reserve_elements() -> None:
    from fastseq.backends import cpu

    kernels = _config.extension()
    for cell, number in kernels.CELLS.items():
        for hidden in (1, 7, 31, 32, 33, 64, 65, 130, 1000):
            for projection in (0, 5) if cell == "lstm" else (0,):
                for rows in (0, 1, 33):
                    for directions in (1, 2):
                        elements = cpu.rnn_reserve_elements(
                            cell, rows, hidden, projection, directions
                        )
                        sizes = (rows, hidden, projection, directions)
                        assert elements * 4 == kernels.rnn_reserve_bytes(number, 0, *sizes)
                        assert elements * 8 == kernels.rnn_reserve_bytes(number, 1, *sizes)


# --- cells


def cell_results(
    library: str,
    cell: str,
    dtype: torch.dtype,
    sizes: tuple[int, int, int],
    biases: bool,
    nudge: int = 0,
) -> dict[str, Tensor]:
    batch, features, hidden = sizes
    generator = torch.Generator().manual_seed(batch * 1000 + hidden)
    moves = torch.Generator().manual_seed(nudge)

    def leaf(*shape: int, scale: float = 1.0) -> Tensor:
        drawn = torch.randn(*shape, generator=generator) * scale
        if nudge:
            signs = torch.randint(0, 2, shape, generator=moves) * 2 - 1
            drawn = drawn * (1 + signs * torch.finfo(torch.float32).eps)
        return drawn.to(dtype).requires_grad_()

    scale = 0.7 * (features + hidden) ** -0.5
    rows = GATES[cell] * hidden
    leaves = {"x": leaf(batch, features), "h": leaf(batch, hidden)}
    if cell == "lstm":
        leaves["c"] = leaf(batch, hidden)
    weights = [leaf(rows, features, scale=scale), leaf(rows, hidden, scale=scale)]
    if biases:
        weights += [leaf(rows, scale=scale), leaf(rows, scale=scale)]
    states: Any = (leaves["h"], leaves["c"]) if cell == "lstm" else leaves["h"]
    module = functional if library == "fastseq" else torch._VF
    name = "rnn_cell" if cell.startswith("rnn") and library == "fastseq" else f"{cell}_cell"
    options = {"nonlinearity": cell.removeprefix("rnn_")} if name == "rnn_cell" else {}
    result = getattr(module, name)(leaves["x"], states, *weights, **options)
    outputs = result if cell == "lstm" else (result,)
    cotangents = [torch.randn(o.shape, generator=generator).to(dtype) for o in outputs]
    named = {**leaves, **{f"weight_{i}": weight for i, weight in enumerate(weights)}}
    grads = torch.autograd.grad(outputs, list(named.values()), cotangents)
    results = dict(zip(("h_next", "c_next"), outputs, strict=False))
    results.update({f"grad_{n}": grad for n, grad in zip(named, grads, strict=True)})
    return {n: tensor.detach().double() for n, tensor in results.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("biases", [True, False], ids=["biases", "no_biases"])
@pytest.mark.parametrize("sizes", [(1, 1, 1), (1, 7, 63), (3, 65, 7), (17, 130, 65), (300, 5, 33)])
@pytest.mark.parametrize("cell", CELLS)
def test_cells(cell: str, sizes: tuple[int, int, int], biases: bool, dtype: torch.dtype) -> None:
    truth = cell_results("torch", cell, torch.float64, sizes, biases)
    errors = dict.fromkeys(truth, 0.0)
    # As many runs as in oracle.py, and for its reason.
    for nudge in range(min(max(48 // (GATES[cell] * sizes[2]), 2), 12)):
        exact = cell_results("torch", cell, torch.float64, sizes, biases, nudge)
        rounded = cell_results("torch", cell, torch.float32, sizes, biases, nudge)
        errors = {n: max(e, largest(rounded[n] - exact[n])) for n, e in errors.items()}
    bounds = {name: bound(dtype, errors[name], largest(value)) for name, value in truth.items()}
    for tier in every_tier():
        compare(cell_results("fastseq", cell, dtype, sizes, biases), truth, bounds, tier)


@pytest.mark.parametrize("cell", CELLS)
def test_cells_without_gradient_take_the_same_step(cell: str, isa: str, threads: int) -> None:
    for batch, features, hidden in ((1, 7, 33), (6, 70, 65)):
        case = Case(cell, steps=1, batch=batch, input_size=features, hidden_size=hidden)
        leaves, _, _ = arguments(case, torch.float32)
        weights = [leaf for name, leaf in leaves.items() if name[:2] in ("w_", "b_")]
        h = leaves["h_0"][0]
        states = (h, leaves["c_0"][0]) if cell == "lstm" else h
        step = getattr(functional, "rnn_cell" if cell.startswith("rnn") else f"{cell}_cell")
        options = {"nonlinearity": cell[4:]} if cell.startswith("rnn") else {}
        trained = step(leaves["x"][0], states, *weights, **options)
        with torch.no_grad():
            inferred = step(leaves["x"][0], states, *weights, **options)
        if cell != "lstm":
            trained, inferred = (trained,), (inferred,)
        assert all(torch.equal(a, b) for a, b in zip(trained, inferred, strict=True))


def test_the_bound_is_able_to_fail() -> None:
    """An error of a hundred units, far below what the eye would see, must not pass."""
    case = Case("lstm", steps=5, batch=3, input_size=7, hidden_size=7)
    truth, bounds = expected(case)
    results = run(case, "fastseq", torch.float32)
    compare(results, truth, bounds)
    for name, value in results.items():
        spoiled = {**results, name: value + 100 * torch.finfo(torch.float32).eps * largest(value)}
        with pytest.raises(AssertionError, match=name):
            compare(spoiled, truth, bounds)
