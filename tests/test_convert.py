"""convert() and revert(): what is swapped, what is not, and what has to stay as it was."""

from __future__ import annotations

import builtins
import copy
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

import fastseq
import fastseq.nn as fast_nn
from fastseq.convert import REGISTRY, Report

PAIRS = list(REGISTRY.items())
IDS = [plain.__name__ for plain, _ in PAIRS]
# What is made of layers, and of which.
STACKED = {
    nn.TransformerEncoder: nn.TransformerEncoderLayer,
    nn.TransformerDecoder: nn.TransformerDecoderLayer,
}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


class Tagger(nn.Module):
    """A small model with three different layers and one layer under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 5)
        self.encoder = nn.ModuleDict({"lstm": nn.LSTM(5, 6, 2), "gru": nn.GRU(6, 6)})
        self.shared = self.encoder["gru"]
        self.head = nn.Linear(6, 3)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x, _ = self.encoder["lstm"](self.embedding(tokens))
        x, _ = self.encoder["gru"](x)
        return self.head(self.shared(x)[0])


def convert(model: nn.Module, **kwargs: Any) -> Report:
    return fastseq.convert(model, **{"verbose": False, **kwargs})


def statuses(report: Report) -> dict[str, str]:
    return {row.fqn: row.status for row in report}


def test_nested_layers_are_swapped_in_place() -> None:
    model = Tagger()
    tokens = torch.randint(11, (4, 3))
    expected = model(tokens)
    report = convert(model)
    assert report.model is model
    names = ["encoder.lstm", "encoder.gru", "shared", "head"]
    assert statuses(report) == dict.fromkeys(names, "converted")
    assert type(model.encoder["lstm"]) is fast_nn.LSTM
    assert type(model.encoder["gru"]) is fast_nn.GRU
    assert model.shared is model.encoder["gru"]
    assert type(model.head) is fast_nn.Linear
    assert type(model.embedding) is nn.Embedding
    assert type(model) is Tagger
    torch.testing.assert_close(model(tokens), expected, rtol=1e-5, atol=1e-6)
    assert next(row for row in report if row.fqn == "shared").reason.endswith("encoder.gru")


@pytest.mark.parametrize(("plain", "fast"), PAIRS, ids=IDS)
def test_root_and_back(plain: type[nn.Module], fast: type[nn.Module]) -> None:
    model = plain(STACKED[plain](4, 4), 2) if plain in STACKED else plain(4, 4)
    report = convert(model)
    assert report.model is model
    assert type(model) is fast
    assert statuses(report)[""] == "converted"
    assert set(statuses(report).values()) == {"converted"}, "parts as well"
    assert not list(convert(model)), "nothing is left to convert"
    fastseq.revert(model)
    assert type(model) is plain


def test_classes_are_not_touched() -> None:
    forward = nn.LSTM.forward
    other = nn.LSTM(3, 4)
    convert(nn.Sequential(nn.LSTM(3, 4)))
    assert nn.LSTM.forward is forward
    assert type(other) is type(nn.LSTM(3, 4)) is nn.LSTM


def test_parameters_optimizer_and_state_dict_stay_valid() -> None:
    model = Tagger()
    twin = copy.deepcopy(model)
    before = dict(model.named_parameters())
    optimizers = [torch.optim.Adam(one.parameters(), lr=0.05) for one in (model, twin)]
    keys = list(model.state_dict())
    convert(model)
    assert list(model.state_dict()) == keys
    after = dict(model.named_parameters())
    assert list(after) == list(before)
    assert all(after[name] is parameter for name, parameter in before.items())
    tokens = torch.randint(11, (4, 3))
    for _ in range(3):
        for one, optimizer in zip((model, twin), optimizers, strict=True):
            optimizer.zero_grad()
            one(tokens).square().sum().backward()
            optimizer.step()
    fastseq.revert(model)
    assert type(model.encoder["lstm"]) is nn.LSTM
    # Three steps of Adam multiply float32 rounding by far less than a hundred.
    torch.testing.assert_close(model.state_dict(), twin.state_dict(), rtol=1e-4, atol=1e-5)
    assert not torch.equal(twin.state_dict()["head.bias"], Tagger().state_dict()["head.bias"])


def test_tied_weights_stay_tied() -> None:
    model = nn.ModuleList([nn.LSTM(4, 4), nn.LSTM(4, 4)])
    model[1].weight_hh_l0 = model[0].weight_hh_l0
    convert(model)
    assert model[1].weight_hh_l0 is model[0].weight_hh_l0
    with torch.no_grad():
        model[0].weight_hh_l0.zero_()
    fresh = nn.LSTM(4, 4)
    fresh.load_state_dict(model[1].state_dict())
    x = torch.randn(3, 2, 4)
    torch.testing.assert_close(model[1](x)[0], fresh(x)[0], rtol=1e-5, atol=1e-6)


def test_training_flag_hooks_buffers_and_attributes() -> None:
    layer = nn.GRU(3, 4).eval()
    layer.note = {"kept": True}
    layer.register_buffer("scale", torch.ones(2))
    calls: list[str] = []
    handles = [
        layer.register_forward_pre_hook(lambda *_: calls.append("pre")),
        layer.register_forward_hook(lambda *_: calls.append("forward")),
        layer.register_full_backward_hook(lambda *_: calls.append("backward")),
        layer.register_state_dict_post_hook(lambda *_: calls.append("state_dict")),
        layer.register_load_state_dict_pre_hook(lambda *_: calls.append("load")),
    ]
    model = nn.Sequential(layer)
    convert(model)
    new = model[0]
    assert type(new) is fast_nn.GRU
    assert new.training is False
    assert new.note == {"kept": True}
    assert new.scale is layer.scale
    x = torch.randn(2, 1, 3, requires_grad=True)
    new(x)[0].sum().backward()
    new.load_state_dict(new.state_dict())
    assert set(calls) == {"pre", "forward", "backward", "state_dict", "load"}
    for handle in handles:
        handle.remove()
    calls.clear()
    new(x)[0].sum().backward()
    assert not calls, "handles from before the conversion still remove their hooks"


class Residual(nn.LSTM):
    def forward(self, input: Any, hx: Any = None) -> Any:
        output, state = super().forward(input, hx)
        return output + input, state


class Renamed(nn.GRUCell):
    pass


def _with_own_forward() -> nn.Module:
    layer = nn.LSTM(3, 3)
    layer.forward = lambda *_: None  # type: ignore[method-assign]
    return layer


def _with_qconfig() -> nn.Module:
    layer = nn.LSTM(3, 3)
    layer.qconfig = object()
    return layer


def _with_mixed_dtypes() -> nn.Module:
    layer = nn.LSTM(3, 3)
    layer.weight_hh_l0 = nn.Parameter(layer.weight_hh_l0.double())
    return layer


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def _unfit() -> dict[str, tuple[Any, str]]:
    return {
        "own forward": (lambda: Residual(3, 3), "subclass of torch.nn.LSTM"),
        "subclass": (lambda: Renamed(3, 3), "subclass of torch.nn.GRUCell"),
        "instance forward": (_with_own_forward, "forward was replaced"),
        "pruned": (
            lambda: prune.random_unstructured(nn.LSTM(3, 3), "weight_hh_l0", 0.5),
            "weight_hh_l0.*pruned",
        ),
        "parametrized": (
            lambda: parametrizations.weight_norm(nn.GRU(3, 3), "weight_hh_l0"),
            "parametrized: weight_hh_l0",
        ),
        "parametrized cell": (
            lambda: parametrizations.spectral_norm(nn.GRUCell(3, 3), "weight_hh"),
            "parametrized: weight_hh",
        ),
        "hooked weight norm": (
            lambda: nn.utils.weight_norm(nn.LSTM(3, 3), "weight_hh_l0"),
            "weight_hh_l0 is not a plain parameter",
        ),
        "hooked spectral norm": (
            lambda: nn.utils.spectral_norm(nn.RNN(3, 3), "weight_ih_l0"),
            "weight_ih_l0 is not a plain parameter",
        ),
        "bfloat16": (lambda: nn.LSTM(3, 3).bfloat16(), "dtype torch.bfloat16"),
        "half": (lambda: nn.RNNCell(3, 3).half(), "dtype torch.float16"),
        "mixed dtypes": (_with_mixed_dtypes, "dtype torch.float32, torch.float64"),
        "meta": (lambda: nn.LSTM(3, 3, device="meta"), "device meta"),
        "scripted": (lambda: torch.jit.script(nn.GRUCell(3, 3)), "TorchScript"),
        "quantizable": (lambda: torch.ao.nn.quantizable.LSTM(3, 3), "quantized"),
        "dynamically quantized": (
            lambda: torch.ao.nn.quantized.dynamic.LSTM(3, 3),
            "quantized",
        ),
        "prepared": (_with_qconfig, "qconfig"),
    }


UNFIT = _unfit()


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("what", UNFIT)
def test_unfit_layers_are_skipped_with_the_reason(what: str) -> None:
    build, reason = UNFIT[what]
    layer = build()
    model = nn.ModuleDict({"good": nn.LSTM(3, 3), "bad": layer})
    kind = type(layer)
    with pytest.raises(ValueError, match=f"bad: .*{reason}"):
        convert(model, strict=True)
    assert type(model["good"]) is nn.LSTM, "strict raises before anything is changed"
    report = convert(model)
    assert type(model["good"]) is fast_nn.LSTM
    assert model["bad"] is layer
    assert type(layer) is kind
    bad = next(row for row in report if row.fqn == "bad")
    assert bad.status == "skipped"
    assert bad.new == ""
    assert bad in report.skipped
    assert bad not in report.converted


def test_strict_passes_where_everything_converts() -> None:
    model = nn.Sequential(nn.LSTM(3, 3), nn.Embedding(3, 3))
    assert len(convert(model, strict=True)) == 1
    unfit = nn.Sequential(Residual(3, 3))
    assert statuses(convert(unfit, strict=True, exclude="0")) == {"0": "excluded"}


@pytest.mark.parametrize(
    ("filters", "expected"),
    [
        ({"include": "a.*"}, {"a.x", "a.y"}),
        ({"include": ["a.x", "b"]}, {"a.x", "b"}),
        ({"include": lambda fqn, module: isinstance(module, nn.GRU)}, {"b"}),
        ({"include": ["b", lambda fqn, module: fqn.endswith("x")]}, {"a.x", "b"}),
        ({"exclude": "a.*"}, {"b"}),
        ({"exclude": lambda fqn, module: module.hidden_size > 4}, {"a.x", "b"}),
        ({"include": "a.*", "exclude": ["*.y"]}, {"a.x"}),
        ({"include": []}, set()),
        ({"exclude": []}, {"a.x", "a.y", "b"}),
    ],
)
def test_filters(filters: dict[str, Any], expected: set[str]) -> None:
    model = nn.ModuleDict(
        {"a": nn.ModuleDict({"x": nn.LSTM(3, 4), "y": nn.LSTM(3, 5)}), "b": nn.GRU(3, 4)}
    )
    report = convert(model, **filters)
    assert {row.fqn for row in report.converted} == expected
    assert {row.fqn for row in report if row.status == "excluded"} == {"a.x", "a.y", "b"} - expected
    fast = {name for name, module in model.named_modules() if type(module) in REGISTRY.values()}
    assert fast == expected


def test_shared_layer_is_left_out_if_one_of_its_names_is_excluded() -> None:
    model = Tagger()
    report = convert(model, exclude="shared")
    assert type(model.encoder["gru"]) is nn.GRU
    assert statuses(report)["encoder.gru"] == "excluded"


def test_wrong_arguments() -> None:
    with pytest.raises(TypeError, match="include and exclude"):
        convert(nn.Sequential(nn.LSTM(3, 4)), include=3)
    for function in (convert, fastseq.revert):
        with pytest.raises(TypeError, match=r"torch\.nn\.Module, got list"):
            function([nn.LSTM(3, 4)])


def test_report_as_plain_text(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real_import = builtins.__import__

    def without_rich(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.split(".")[0] == "rich":
            raise ImportError(name)
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_rich)
    model = nn.ModuleDict({"lstm": nn.LSTM(3, 4), "own": Residual(3, 3)})
    report = fastseq.convert(model)
    lines = capsys.readouterr().out.splitlines()
    assert lines == str(report).splitlines()
    assert [cell.strip() for cell in lines[0].split("|")] == [
        "fqn",
        "old -> new",
        "status",
        "reason",
    ]
    assert [cell.strip() for cell in lines[2].split("|")] == [
        "lstm",
        "torch.nn.LSTM -> fastseq.nn.LSTM",
        "converted",
        "",
    ]
    assert "skipped" in lines[3]
    assert "subclass of torch.nn.LSTM" in lines[3]
    nothing = fastseq.convert(nn.Embedding(2, 2), verbose=False)
    assert str(nothing) == "no layers found that fastseq has"
    fastseq.convert(nn.LSTM(3, 4), verbose=False)
    assert "(root)" not in capsys.readouterr().out


def test_report_with_rich(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("rich")
    fastseq.convert(nn.ModuleDict({"a[0]": nn.LSTM(3, 4)}))
    printed = capsys.readouterr().out
    assert "a[0]" in printed
    assert "converted" in printed


def test_revert_reports_and_spares_subclasses() -> None:
    class Own(fast_nn.LSTM):
        pass

    model = nn.ModuleDict({"gru": fast_nn.GRU(3, 4), "own": Own(3, 4), "head": nn.Linear(4, 2)})
    report = fastseq.revert(model)
    assert statuses(report) == {"gru": "reverted", "own": "skipped"}
    assert type(model["gru"]) is nn.GRU
    assert type(model["own"]) is Own


def test_revert_leaves_no_trace() -> None:
    model = nn.LSTM(3, 4, 2, bidirectional=True)
    before = dict(vars(model))
    convert(model)
    model(torch.randn(2, 2, 3))
    fastseq.revert(model)
    assert vars(model).keys() == before.keys()
    twin = copy.deepcopy(model)
    x = torch.randn(2, 2, 3)
    assert torch.equal(twin(x)[0], model(x)[0])


def run_python(code: str) -> None:
    subprocess.run([sys.executable, "-c", code], check=True)


IMPORT_ORDERS = (
    "import fastseq, fastseq.convert",
    "import fastseq.convert",
    "from fastseq.convert import Report; import fastseq",
    "import fastseq; fastseq.convert; import fastseq.convert",
    "import fastseq; fastseq.Report; fastseq.revert",
    "from fastseq import convert; import fastseq; assert fastseq.convert is convert",
)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_convert_is_the_function_in_any_order() -> None:
    """Every order in a fresh interpreter; forked from one that holds torch, which loads slowly."""
    run_python(
        "import os, sys, types, torch\n"
        f"for order in {IMPORT_ORDERS!r}:\n"
        "    child = os.fork()\n"
        "    if child == 0:\n"
        "        try:\n"
        "            exec(order)\n"
        "            assert isinstance(fastseq.convert, types.FunctionType), order\n"
        "            assert isinstance(sys.modules['fastseq.convert'], types.ModuleType)\n"
        "            from fastseq.convert import Row\n"
        "            assert isinstance(fastseq.convert, types.FunctionType), order\n"
        "        except BaseException as error:\n"
        "            print(order, repr(error), file=sys.stderr, flush=True)\n"
        "            os._exit(1)\n"
        "        os._exit(0)\n"
        "    assert os.waitpid(child, 0)[1] == 0, order\n"
    )


def test_importing_fastseq_does_not_import_torch() -> None:
    run_python(
        "import sys, fastseq\n"
        "assert fastseq.__version__\n"
        "assert 'torch' not in sys.modules and 'numpy' not in sys.modules\n"
        "assert set(fastseq.__all__) <= set(dir(fastseq))\n"
        "assert 'torch' not in sys.modules\n"
        "fastseq.nn.LSTM\n"
        "assert 'torch' in sys.modules\n"
        "try:\n    fastseq.nonsense\n"
        "except AttributeError as error:\n    assert 'nonsense' in str(error)\n"
        "else:\n    raise SystemExit('no AttributeError')\n"
    )
