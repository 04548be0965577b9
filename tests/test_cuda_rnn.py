"""The recurrent CUDA kernels, emulated on the host, against torch in float64: ``emulated_cuda.py``.

Outputs and every gradient; the functional API, the ops' autograd formula and the C ABI are on the
way. Bounds are those of ``oracle.py``; for half precision see ``emulated_cuda.half_bound``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import oracle
import pytest
import torch
from emulated_cuda import device, half_bound, kernels
from kernels import KERNELS
from oracle import Case

import fastseq
from fastseq import functional
from fastseq._cuda_library import MODES, Library, RnnShape
from fastseq.backends import cuda


@pytest.fixture(autouse=True, scope="module")
def library() -> Iterator[Library]:
    with kernels() as found:
        yield found


CHOICES = {
    "cell": oracle.CELLS,
    "dtype": ("float32", "float64"),
    "bidirectional": (False, True),
    "layout": ("padded", "packed", "packed_unsorted", "lengths", "unbatched"),
    "has_biases": (True, False),
    "batch_first": (False, True),
    "states": (True, False),
    "strides": ("contiguous", "transposed", "every_other"),
    "num_layers": (1, 2),
    "steps": (1, 5),
    "batch": (1, 3, 9),
    "input_size": (1, 7),
    "hidden_size": (1, 13, 35),
}
CASES = [Case(**picks) for picks in oracle.pairwise_cases(CHOICES, largest_flops=150_000, seed=5)]


@pytest.mark.parametrize("index", range(len(CASES)), ids=lambda index: str(CASES[index]))
def test_run_layers(index: int) -> None:
    case = CASES[index]
    truth, bounds = oracle.expected(case)
    for mode in ("persistent", ("auto", "stepwise", "direct")[index % 3]):
        with cuda.launch_mode(mode), device(multiprocessors=(4, 7, 2)[index % 3]):
            results = oracle.run(case, "fastseq", getattr(torch, case.dtype))
        oracle.compare(results, truth, bounds, mode)


def test_blocks_share_sequences(library: Library) -> None:
    """Little shared memory: units are cut over blocks that wait for each other after each step."""
    for cell in oracle.CELLS:
        case = Case(cell, hidden_size=35, batch=6, steps=4, bidirectional=True, layout="packed")
        truth, bounds = oracle.expected(case)
        with device(multiprocessors=8, shared_bytes=8 << 10), cuda.launch_mode("persistent"):
            shape = RnnShape(4, 6, 35, 2, 24, None)
            for backward in (False, True):
                plan = library.rnn_plan(cell, "float32", backward, "persistent", shape)
                assert (plan.barriers > 0) == (plan.grid[0] > 1) == (GATES[cell] > 1)
            results = oracle.run(case, "fastseq", torch.float32)
        oracle.compare(results, truth, bounds, cell)


GATES = oracle.GATES


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("cell", oracle.CELLS)
def test_half_precision(cell: str, dtype: torch.dtype) -> None:
    for layout in ("lengths", "padded"):
        case = Case(cell, batch=5, hidden_size=13, bidirectional=True, layout=layout)
        values, lengths, _ = oracle.arguments(case, torch.float64)
        rounded = {name: leaf.detach().to(dtype) for name, leaf in values.items()}
        ours, theirs, truth = (
            outputs_and_gradients(case, rounded, lengths, backend, dtype_of_run)
            for backend, dtype_of_run in (
                (KERNELS, dtype),
                ("reference", dtype),
                ("reference", torch.float64),
            )
        )
        for name, value in truth.items():
            # A ReLU that rounding moves across its kink has another gradient altogether.
            if cell == "rnn_relu" and name.startswith("grad"):
                continue
            bound = half_bound(dtype, oracle.largest(theirs[name] - value), oracle.largest(value))
            assert oracle.largest(ours[name] - value) <= bound, f"{name} {case}"


def outputs_and_gradients(
    case: Case,
    values: dict[str, torch.Tensor],
    lengths: torch.Tensor | None,
    backend: str,
    dtype: torch.dtype,
) -> dict[str, torch.Tensor]:
    leaves = {name: value.to(dtype).requires_grad_() for name, value in values.items()}
    with fastseq.backend(backend):
        outputs = oracle.outputs_of(case, "fastseq", leaves, lengths)
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(out.shape, generator=generator).to(dtype) for out in outputs]
    gradients = torch.autograd.grad(outputs, list(leaves.values()), weights)
    assert all(tensor.dtype is dtype for tensor in (*outputs, *gradients))
    results = dict(zip(("output", "h_n", "c_n"), outputs, strict=False))
    results |= {f"grad_{name}": g for name, g in zip(leaves, gradients, strict=True)}
    return {name: tensor.detach().double() for name, tensor in results.items()}


def run_once(case: Case, **how: Any) -> dict[str, torch.Tensor]:
    mode = how.pop("mode", "auto")
    with device(**how), cuda.launch_mode(mode):
        return oracle.run(case, "fastseq", torch.float32)


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_bits_do_not_depend_on_launch_or_order(cell: str) -> None:
    """Nor on the order of threads, which a missing barrier would show in."""
    case = Case(cell, hidden_size=17, batch=5, steps=3, bidirectional=True, layout="packed")
    first = run_once(case)
    others: list[dict[str, Any]] = [
        {},
        {"descending": True},
        {"descending": True, "mode": "direct"},
        {"descending": True, "shared_bytes": 3 << 10, "multiprocessors": 12, "mode": "persistent"},
        {"mode": "stepwise", "descending": True},
        {"multiprocessors": 40},
    ]
    direct = run_once(case, mode="direct")
    for how in others:
        expected = direct if how.get("mode") == "direct" else first
        for name, value in run_once(case, **how).items():
            assert torch.equal(value, expected[name]), f"{name} {how}"


def test_no_grad_gives_the_same_bits() -> None:
    for cell in oracle.CELLS:
        case = Case(cell, hidden_size=13, batch=5, layout="lengths", bidirectional=True)
        leaves, lengths, _ = oracle.arguments(case, torch.float32)
        recorded = oracle.outputs_of(case, "fastseq", leaves, lengths)
        with torch.no_grad():
            for one, other in zip(
                oracle.outputs_of(case, "fastseq", leaves, lengths), recorded, strict=True
            ):
                assert torch.equal(one, other)


@pytest.mark.parametrize("lengths", [[0, 3, 2, 0], [0, 0, 0, 0]])
def test_sequences_without_steps(lengths: list[int]) -> None:
    x = torch.randn(4, 3, 2, dtype=torch.float64, requires_grad=True)
    shapes = [(20, 2), (20, 5), (20,), (20,)] * 2
    weights = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]
    h = [torch.randn(2, 4, 5, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    options: dict[str, Any] = {"batch_first": True, "bidirectional": True, "lengths": lengths}
    results = []
    for backend in (KERNELS, "reference"):
        with fastseq.backend(backend):
            output, (h_n, c_n) = functional.lstm(x, (h[0], h[1]), weights, **options)
        loss = output.sin().sum() + h_n.sin().sum() + c_n.cos().sum()
        results.append([output, h_n, c_n, *torch.autograd.grad(loss, [x, *h, *weights])])
    for ours, truth in zip(*results, strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-12, atol=1e-12)


def test_wanted_gradients_only() -> None:
    """Whatever is left out, the others stay what they are."""
    x, w_ih, w_hh = torch.randn(3, 2, 4), torch.randn(15, 4), torch.randn(15, 5)
    h = torch.randn(1, 2, 5)
    leaves = [x, h, w_ih, w_hh]

    def gradients(wanted: list[int]) -> list[torch.Tensor]:
        copies = [leaf.clone().requires_grad_(i in wanted) for i, leaf in enumerate(leaves)]
        output, _ = functional.gru(copies[0], copies[1], copies[2:], has_biases=False)
        return list(torch.autograd.grad(output.square().sum(), [copies[i] for i in wanted]))

    everything = gradients([0, 1, 2, 3])
    for index in range(4):
        assert torch.equal(gradients([index])[0], everything[index])


@pytest.mark.parametrize("cell", oracle.CELLS)
def test_rnn_cell(cell: str) -> None:
    torch.manual_seed(0)
    rows = GATES[cell] * 7
    x, h, c = torch.randn(3, 5), torch.randn(3, 7), torch.randn(3, 7)
    tensors = [torch.randn(s) for s in ((rows, 5), (rows, 7), (rows,), (rows,))]
    state = (h, c) if cell == "lstm" else h
    name = "rnn" if cell.startswith("rnn") else cell
    extra = {"nonlinearity": cell.removeprefix("rnn_")} if name == "rnn" else {}
    results = []
    for backend in (KERNELS, "reference"):
        with fastseq.backend(backend), torch.no_grad():
            results.append(getattr(functional, f"{name}_cell")(x, state, *tensors, **extra))
    torch.testing.assert_close(*results)


def test_double_backward_is_the_composite() -> None:
    case = Case("gru", dtype="float64", steps=2, batch=2, hidden_size=3, input_size=2)
    leaves, _, _ = oracle.arguments(case, torch.float64)

    def function(x: torch.Tensor) -> torch.Tensor:
        values = {**leaves, "x": x}
        return oracle.outputs_of(case, "fastseq", values, None)[0]

    assert torch.autograd.gradgradcheck(function, (leaves["x"],))


def test_registered_op() -> None:
    """What a compiler calls: the op on the kernels, its fake kernel, its autograd formula."""
    case = Case("lstm", dtype="float64", layout="lengths", batch_first=True, bidirectional=True)
    leaves, lengths, _ = oracle.arguments(case, torch.float64)
    weights = [leaf for name, leaf in leaves.items() if name[:2] in ("w_", "b_")]
    arguments = (leaves["x"], leaves["h_0"], leaves["c_0"], weights, None, lengths)
    options = ("lstm", True, 0, True, True, True, 1)
    output, hy, cy, reserve = torch.ops.fastseq.rnn_forward(*arguments, *options)
    expected = oracle.outputs_of(case, "fastseq", leaves, lengths)
    for one, other in zip((output, hy, cy), expected, strict=True):
        assert torch.equal(one, other)
    # The fake kernel, which does not know lengths, has to come to the same size.
    assert reserve.numel() == cuda.rnn_reserve_elements("lstm", 15, 7, 2, torch.float64)


# --- plans and errors


def plan_of(library: Library, mode: str = "auto", **sizes: Any) -> Any:
    values = {"steps": 10, "batch": 8, "hidden": 64, "directions": 1, "dtype": "float32"} | sizes
    shape = RnnShape(values["steps"], values["batch"], values["hidden"], values["directions"], 80)
    return library.rnn_plan("lstm", values["dtype"], False, mode, shape)


def test_plan_prefers_one_multiprocessor(library: Library) -> None:
    with device(multiprocessors=132):
        small = plan_of(library)
        assert (small.mode, small.grid[0], small.barriers) == (MODES["persistent"], 1, 0)
        assert small.grid[1] == 8  # a sequence each
        medium = plan_of(library, hidden=512, dtype="bfloat16")
        assert medium.mode == MODES["persistent"]
        assert medium.grid[0] == 128
        assert medium.barriers > 0
        both = plan_of(library, hidden=512, directions=2)
        assert both.grid[0] * both.grid[2] <= 132
        large = plan_of(library, hidden=4096)
        assert (large.mode, large.barriers) == (MODES["stepwise"], 0)
        assert plan_of(library, hidden=20000).mode == MODES["direct"]


def test_impossible_plan_names_kernel_and_shape(library: Library) -> None:
    with pytest.raises(RuntimeError, match=r"rnn_forward<lstm, float32>\(T 10, B 8, H 4096"):
        plan_of(library, "persistent", hidden=4096)
    with pytest.raises(RuntimeError, match="one unit do not fit"):
        plan_of(library, "stepwise", hidden=20000)


def test_launch_error_names_kernel_and_shape() -> None:
    """A plan made for another device: the launch itself is refused."""
    case = Case("gru", hidden_size=35, batch=6, steps=4)
    leaves, _, _ = oracle.arguments(case, torch.float32)
    make_plan = Library.rnn_plan

    def outdated(self: Library, *arguments: Any) -> Any:
        with device(multiprocessors=4, shared_bytes=227 << 10):
            return make_plan(self, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Library, "rnn_plan", outdated)
        # The device's limits are back at their defaults after `outdated`, so shrink them last.
        patch.setattr(cuda, "stream_of", lambda _: shrink())
        match = r"rnn_forward<gru, float32>\(T 4, B 6, H 35, D 1, rows 24\): launch of .* invalid"
        with device(), pytest.raises(RuntimeError, match=match):
            oracle.outputs_of(case, "fastseq", leaves, None)


def shrink() -> int:
    import ctypes

    from emulated_cuda import library_path

    ctypes.CDLL(str(library_path())).fastseq_emulation_device(4, 1 << 10, 0)
    return 0


def test_unknown_device_is_refused(library: Library) -> None:
    with pytest.raises(RuntimeError, match="device 7: invalid device ordinal"):
        library.use_device(7)


def test_launch_mode_rejects_unknown_names() -> None:
    with pytest.raises(ValueError, match=r"launch_mode must be one of .* got 'fast'"):
        cuda.launch_mode("fast").__enter__()


def test_projection_is_refused() -> None:
    x, weights = torch.randn(2, 3, 4), [torch.randn(20, 4), torch.randn(20, 2), torch.randn(2, 5)]
    with pytest.raises(RuntimeError, match="proj_size has no CUDA kernels"):
        functional.lstm(x, None, weights, has_biases=False, proj_size=2)


def test_cells_are_those_of_the_library(library: Library) -> None:
    for cell, gates in GATES.items():
        assert library.slot_count(cell) == cuda._slots(cell)
        columns = library.hidden_columns(cell, gates)
        assert sorted(columns) == sorted(set(columns))
        assert max(columns) < library.slot_count(cell)
    assert library.hidden_columns("gru", 3) == [0, 1, 3]


def test_every_pair_of_options_is_met() -> None:
    assert {dataclasses.astuple(case)[0] for case in CASES} == set(oracle.CELLS)
    assert len(CASES) > 15
