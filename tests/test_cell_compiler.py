"""Where users' cells run: the setting, the compiler, what is kept on disk, what fails."""

from __future__ import annotations

import logging
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from cell_loops import EXACT, IN, B, H, T
from compiled_cells import FOLDER, compiled_cells, needs_compiler, uneven
from kernels import needs_extension

import fastseq
import fastseq.nn as fast_nn
from fastseq import _cell_compiler, _config, cells
from fastseq._cell_compiler import CellCompilerError
from fastseq.backends import FastseqFallbackWarning
from fastseq.backends.compiled_cells import choice
from fastseq.cells.expression import topological
from fastseq.cells.plan import Plan
from fastseq.functional import cells as functional_cells

F64 = torch.float64


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As in a process that has compiled and said nothing yet."""
    monkeypatch.setattr(choice, "_known", {})
    choice._say.cache_clear()
    monkeypatch.setattr("fastseq.backends._warned_reasons", set())
    with compiled_cells():
        yield
    choice._say.cache_clear()


def layer_and_input() -> tuple[Any, Any]:
    torch.manual_seed(0)
    return fast_nn.CellLayer(uneven, IN, H, dtype=F64), torch.randn(T, B, IN, dtype=F64)


def expected_of(layer: Any, x: Any) -> Any:
    with fastseq.backend("reference"):
        return layer(x)[0]


# --- the setting


def test_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_config, "_cell_compiler", None)
    monkeypatch.setenv("FASTSEQ_CELL_COMPILER", "sometimes")
    with pytest.raises(ValueError, match=r"FASTSEQ_CELL_COMPILER must be one of .*'sometimes'"):
        _config.cell_compiler_name()
    monkeypatch.delenv("FASTSEQ_CELL_COMPILER")
    assert _config.cell_compiler_name() == "auto"
    with pytest.raises(ValueError, match="cell_compiler must be"), fastseq.cell_compiler("no"):
        pass
    with fastseq.cell_compiler("off"):
        assert choice.why_not_chosen(uneven.plan, F64) == "FASTSEQ_CELL_COMPILER is off"
        assert not choice.is_chosen(uneven.plan, F64)
    with fastseq.backend("reference"):
        assert choice.why_not_chosen(uneven.plan, F64) == "the backend is 'reference'"


@needs_extension
def test_cells_that_cannot_be(fresh: None, caplog: pytest.LogCaptureFixture) -> None:
    """Told to compile them it is an error; left to itself it is a line for who wants to know."""
    with pytest.raises(CellCompilerError, match="'s_lstm': it has 4 states, the driver holds 2"):
        fast_nn.CellLayer(cells.s_lstm, IN, H)(torch.randn(T, B, IN))
    with fastseq.cell_compiler("auto"), warnings.catch_warnings():
        warnings.simplefilter("error")
        caplog.set_level(logging.INFO, "fastseq")
        for _ in range(2):
            assert not choice.is_chosen(cells.ind_rnn.plan, F64)
    (line,) = caplog.messages
    assert line.endswith("cell ind_rnn is not compiled as C++: it has learned values (parameters)")


@needs_compiler
@needs_extension
def test_without_numba(fresh: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """What can be compiled needs nothing else; what cannot runs on torch's operators."""
    monkeypatch.setattr(functional_cells, "_NO_NUMBA", "Numba is not installed")
    monkeypatch.setattr("fastseq._ops.cell_kernels._numba", None)
    layer, x = layer_and_input()
    with fastseq.cell_compiler("auto"), warnings.catch_warnings():
        warnings.simplefilter("error")
        output = layer(x)[0]
    torch.testing.assert_close(output, expected_of(layer, x), **EXACT)
    layer = fast_nn.CellLayer(uneven, IN, H, dtype=F64, zoneout=0.1).eval()
    with fastseq.cell_compiler("auto"), pytest.warns(FastseqFallbackWarning, match="Numba"):
        output = layer(x)[0]
    torch.testing.assert_close(output, expected_of(layer, x), **EXACT)


# --- the compiler


def script(path: Path, text: str) -> str:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


@needs_extension
def test_a_compiler_that_fails(
    fresh: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Numba answers, and one warning has the compiler's last word."""
    pytest.importorskip("numba")
    fails = '[ "$1" = --version ] && echo broken 1.0 && exit 0; echo "error: boom" >&2; exit 1'
    monkeypatch.setenv("CXX", script(tmp_path / "cxx", fails))
    layer, x = layer_and_input()
    expected = expected_of(layer, x)
    with fastseq.cell_compiler("auto"):
        with pytest.warns(RuntimeWarning, match=r"'uneven' .* error: boom"):
            torch.testing.assert_close(layer(x)[0], expected, **EXACT)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            torch.testing.assert_close(layer(x)[0], expected, **EXACT)
    with pytest.raises(CellCompilerError, match="error: boom"):
        layer(x)


@needs_extension
def test_no_compiler(
    fresh: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Nothing to be warned of."""
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with fastseq.cell_compiler("auto"), warnings.catch_warnings():
        warnings.simplefilter("error")
        caplog.set_level(logging.INFO, "fastseq")
        assert not choice.is_chosen(uneven.plan, F64)
        assert "no C++ compiler" in str(choice.why_not_chosen(uneven.plan, F64))
    assert "no C++ compiler: none of g++, c++, clang++" in caplog.text
    described = _cell_compiler.describe()
    assert not described["available"]
    assert "no C++ compiler" in str(described["reason"])
    monkeypatch.setenv("CXX", str(tmp_path / "nothing"))
    with pytest.raises(CellCompilerError, match="does not run"):
        _cell_compiler.compiler()


def test_info(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastseq.info import collect, lines

    with fastseq.cell_compiler("off"):
        (line,) = (line for line in lines(collect()) if line.startswith("cell compiler"))
        assert line.endswith("not available: FASTSEQ_CELL_COMPILER is off")


# --- what is kept


@needs_compiler
@needs_extension
def test_kept_libraries(
    fresh: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A second process only loads; another formula, dtype, tier or header is another file."""
    isa = _config.extension().isa()
    number = choice.kernels(uneven.plan, F64)
    caplog.clear()
    monkeypatch.setattr(choice, "_known", {})

    def compiles(*_: Any) -> None:
        raise CellCompilerError("it compiles again")

    monkeypatch.setattr(_cell_compiler, "_compile", compiles)
    assert choice.kernels(uneven.plan, F64) == number + 1
    assert not caplog.messages
    kept = list((FOLDER / "cells").glob(f"uneven-float64-{isa}-*"))
    assert {path.suffix for path in kept} == {".so", ".h"}
    source = choice.struct(uneven.plan)
    for changed in (
        (source + "\n", "float64", isa, "g++"),
        (source, "float64", isa, "ccache g++"),
        (source, "float64", isa, "-changed-headers"),
    ):
        text, dtype, tier, how = changed
        if how == "-changed-headers":
            monkeypatch.setattr(_cell_compiler, "_digest", lambda folder: "another")
        else:
            found = _cell_compiler.compiler()._replace(command=tuple(how.split()))
            if how != "g++":
                monkeypatch.setattr(_cell_compiler, "compiler", lambda found=found: found)
        with pytest.raises(CellCompilerError, match="it compiles again"):
            _cell_compiler.library(text, "uneven", dtype, tier)


@needs_compiler
@needs_extension
def test_two_processes_at_once(
    fresh: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The other one has finished when this one has: both files are whole, and the same."""
    isa = _config.extension().isa()
    source = choice.struct(uneven.plan)
    made = _cell_compiler.library(source, "uneven", "float64", isa)
    monkeypatch.setattr(_config, "cache_folder", lambda: tmp_path)

    def compile_late(*given: Any) -> None:
        shutil.copy(made, tmp_path / "cells" / made.name)
        shutil.copy(made, given[-1])

    monkeypatch.setattr(_cell_compiler, "_compile", compile_late)
    path = _cell_compiler.library(source, "uneven", "float64", isa)
    assert path == tmp_path / "cells" / made.name
    assert _config.extension().load_cell(str(path), isa, 1)
    assert sorted(p.suffix for p in path.parent.iterdir()) == [".h", ".so"]
    (line,) = caplog.messages
    assert "compiling cell uneven" in line
    assert "FASTSEQ_CELL_COMPILER=off" in line


@needs_compiler
@needs_extension
def test_files_that_are_no_library(
    fresh: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    isa = _config.extension().isa()
    load = _config.extension().load_cell
    (tmp_path / "text.so").write_text("no library")
    with pytest.raises(ImportError, match=r"text\.so"):
        load(str(tmp_path / "text.so"), isa, 1)
    with pytest.raises(ImportError, match="is no library of a cell"):
        load(_config.extension().__file__, isa, 1)
    made = _cell_compiler.library(choice.struct(uneven.plan), "uneven", "float64", isa)
    with pytest.raises(ImportError, match="not base and 0"):
        load(str(made), "base", 0)
    # Where there can be no folder, the library stays with this process.
    monkeypatch.setattr(_config, "cache_folder", lambda: tmp_path / "text.so")
    assert Path(_cell_compiler._kept_in()).is_dir()


def test_folder_that_others_may_write_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_config, "cache_folder", lambda: tmp_path)
    assert _cell_compiler._kept_in() == tmp_path / "cells"
    (tmp_path / "cells").chmod(0o777)
    assert _cell_compiler._kept_in() != tmp_path / "cells"


# --- what backward finds


@pytest.mark.parametrize(
    "cell", [cells.minimal_gated_unit, cells.janet, cells.coupled_lstm, cells.lstm, cells.gru]
)
def test_saved_values(cell: Any) -> None:
    """As many as there are slots, and no function computed twice that could have been kept."""
    from fastseq.backends.compiled_cells.saved import saved_values

    plan: Plan = cell.plan
    saved = saved_values(plan)
    assert len(saved) == len(plan.slots)
    known = {*saved, *plan.new_states[1:]}
    again = set()
    todo = [*plan.slot_gradients, *plan.state_gradients]
    while todo:
        node = todo.pop()
        if node in known:
            continue
        assert node.operation != "leaf" or node.value[0] in "sg"
        again |= {node} if node.operation in ("sigmoid", "tanh") else set()
        todo += node.arguments
    # LSTM's tanh(c) and JANET's two sigmoids of one value have no slot of their own.
    assert len(again) == {"janet": 2, "coupled_lstm": 1, "lstm": 1}.get(cell.name, 0)
    assert set(saved) <= set(topological(plan.new_states))
