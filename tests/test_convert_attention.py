"""convert() and revert() on attention, alone and inside torch's Transformer layers."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

import fastseq
import fastseq.nn as fast_nn
from fastseq.nn import MultiheadAttention, RotaryEmbedding
from fastseq.nn._projected_attention import ProjectedAttention

# Layer norms divide by a standard deviation of about one; the sums are of some tens of terms.
CLOSE = {"rtol": 1e-10, "atol": 1e-10}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The shape of the heads, or of packed rows, in every call of our attention."""
    seen: list[Any] = []

    def record(name: str) -> None:
        original = getattr(ProjectedAttention, name)

        def spy(self: Any, input: Tensor, *args: Any, **kwargs: Any) -> Any:
            seen.append(tuple(input.shape))
            return original(self, input, *args, **kwargs)

        monkeypatch.setattr(ProjectedAttention, name, spy)

    record("_attend")
    record("_attend_packed")
    return seen


def convert(model: nn.Module, **kwargs: Any) -> Any:
    return fastseq.convert(model, **{"verbose": False, **kwargs})


def encoder(**options: Any) -> nn.TransformerEncoder:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of options that rule out its fast path
        layer = nn.TransformerEncoderLayer(
            8, 2, 16, **{"dropout": 0.0, "batch_first": True, "dtype": torch.float64, **options}
        )
        return nn.TransformerEncoder(layer, 2, enable_nested_tensor=options == {})


# --- single layers -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [{}, {"bias": False}, {"kdim": 5, "vdim": 6}, {"add_bias_kv": True, "add_zero_attn": True}],
    ids=str,
)
def test_there_and_back(options: dict[str, Any]) -> None:
    layer = nn.MultiheadAttention(8, 2, dtype=torch.float64, **options)
    before = dict(vars(layer))
    names = list(layer.state_dict())
    q = torch.randn(5, 3, 8, dtype=torch.float64)
    k, v = (torch.randn(7, 3, size, dtype=torch.float64) for size in (layer.kdim, layer.vdim))
    expected = layer(q, k, v)
    convert(layer)
    assert type(layer) is MultiheadAttention
    assert list(layer.state_dict()) == names
    torch.testing.assert_close(layer(q, k, v), expected, **CLOSE)
    assert not list(convert(layer)), "nothing is left to convert"
    twin = copy.deepcopy(layer)
    for one in (layer, twin):
        fastseq.revert(one)
        assert type(one) is nn.MultiheadAttention
        assert vars(one).keys() == before.keys()
        assert one._qkv_same_embed_dim is ("kdim" not in options)
        torch.testing.assert_close(one(q, k, v), expected, **CLOSE)


def test_what_torch_has_not_stays() -> None:
    model = nn.ModuleDict(
        {
            "grouped": MultiheadAttention(8, 2, num_kv_heads=1),
            "rotated": MultiheadAttention(8, 2, rope=RotaryEmbedding(4)),
            "plain": MultiheadAttention(8, 2),
        }
    )
    report = fastseq.revert(model)
    assert {row.fqn: row.status for row in report} == {
        "grouped": "skipped",
        "rotated": "skipped",
        "plain": "reverted",
    }
    assert [row.reason for row in report.skipped] == [
        "torch.nn.MultiheadAttention has no num_kv_heads",
        "torch.nn.MultiheadAttention has no rope",
    ]


class Own(nn.MultiheadAttention):
    pass


def _mixed() -> nn.Module:
    layer = nn.MultiheadAttention(8, 2)
    layer.out_proj.double()
    return layer


def _own_forward() -> nn.Module:
    layer = nn.MultiheadAttention(8, 2)
    layer.forward = lambda *_: None  # type: ignore[method-assign]
    return layer


UNFIT = {
    "subclass": (lambda: Own(8, 2), r"subclass of torch\.nn\.MultiheadAttention"),
    "instance forward": (_own_forward, "forward was replaced"),
    "bfloat16": (lambda: nn.MultiheadAttention(8, 2).bfloat16(), "bfloat16"),
    "mixed dtypes": (_mixed, r"torch\.float32, torch\.float64"),
    "meta": (lambda: nn.MultiheadAttention(8, 2, device="meta"), "device meta"),
    "pruned": (
        lambda: prune.random_unstructured(nn.MultiheadAttention(8, 2), "in_proj_weight", 0.5),
        "in_proj_weight is not a plain parameter: pruned",
    ),
    "parametrized": (
        lambda: parametrizations.weight_norm(nn.MultiheadAttention(8, 2), "in_proj_weight"),
        "parametrized: in_proj_weight",
    ),
    "hooked": (
        lambda: nn.utils.spectral_norm(nn.MultiheadAttention(8, 2, kdim=4), "k_proj_weight"),
        "k_proj_weight is not a plain parameter",
    ),
    "quantizable": (lambda: torch.ao.nn.quantizable.MultiheadAttention(8, 2), "quantized"),
    "scripted": (lambda: torch.jit.script(nn.MultiheadAttention(8, 2)), "TorchScript"),
}


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("what", UNFIT)
def test_unfit_layers_are_skipped_with_the_reason(what: str) -> None:
    build, reason = UNFIT[what]
    model = nn.ModuleDict({"bad": build()})
    kind = type(model["bad"])
    with pytest.raises(ValueError, match=f"bad: .*{reason}"):
        convert(model, strict=True)
    convert(model)
    assert type(model["bad"]) is kind


# --- inside torch's Transformer layers ---------------------------------------------------------


def padding(*lengths: int) -> Tensor:
    return torch.arange(max(lengths)) >= torch.tensor(lengths)[:, None]


@pytest.mark.parametrize("gradients", [False, True], ids=["inference", "gradients"])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("options", [{}, {"norm_first": True}, {"bias": False}], ids=str)
@pytest.mark.parametrize("masks", ["none", "padding", "causal", "both", "ragged"])
def test_encoder(
    masks: str, options: dict[str, Any], training: bool, gradients: bool, calls: list[Any]
) -> None:
    """torch's fast path reads the weights and bypasses forward: it must not be taken."""
    model = encoder(**options).train(training)
    x = torch.randn(3, 6, 8, dtype=torch.float64)
    arguments: dict[str, Any] = {}
    valid = torch.ones(3, 6, dtype=torch.bool)
    if masks in ("padding", "both"):
        hidden = padding(6, 3, 4)
        valid, arguments["src_key_padding_mask"] = ~hidden, hidden
    if masks == "ragged":  # not at the end: no nested tensors
        hidden = padding(6, 3, 4).flip(1)
        valid, arguments["src_key_padding_mask"] = ~hidden, hidden
    if masks in ("causal", "both"):
        arguments["mask"] = torch.ones(6, 6, dtype=torch.bool).triu(1)
    with torch.set_grad_enabled(gradients):
        expected = model(x, **arguments)
        assert {row.status for row in convert(model)} == {"converted"}
        actual = model(x, **arguments)
    assert len(calls) == 2
    torch.testing.assert_close(actual[valid], expected[valid], **CLOSE)
    if gradients:
        weights = list(model.parameters())
        wanted = torch.autograd.grad(expected[valid].square().sum(), weights)
        found = torch.autograd.grad(actual[valid].square().sum(), weights)
        torch.testing.assert_close(found, wanted, **CLOSE)
    fastseq.revert(model)
    with torch.set_grad_enabled(gradients):
        torch.testing.assert_close(model(x, **arguments)[valid], expected[valid], **CLOSE)


def test_encoder_that_makes_nested_tensors(calls: list[Any]) -> None:
    """In inference torch's encoder turns left-aligned batches into nested tensors."""
    model = encoder().eval()
    x, hidden = torch.randn(3, 6, 8, dtype=torch.float64), padding(6, 3, 4)
    with torch.no_grad():
        expected = model(x, src_key_padding_mask=hidden)
        assert not expected[hidden].any(), "this is torch's nested path"
        convert(model)
        actual = model(x, src_key_padding_mask=hidden)
    assert len(calls) == 2
    torch.testing.assert_close(actual, expected, **CLOSE)


def test_nested_tensors_outside_of_the_encoder() -> None:
    theirs = nn.MultiheadAttention(8, 2, batch_first=True).eval()
    ours = copy.deepcopy(theirs)
    convert(ours)
    x = torch.nested.nested_tensor([torch.randn(4, 8), torch.randn(2, 8)])
    with torch.no_grad():
        expected, actual = (one(x, x, x, need_weights=False)[0] for one in (theirs, ours))
    torch.testing.assert_close(actual.to_padded_tensor(0), expected.to_padded_tensor(0))
    with pytest.raises(AssertionError, match="without gradients"):
        ours(x, x, x)
    with torch.no_grad(), pytest.raises(AssertionError, match="without masks"):
        ours(x, x, x, padding(4, 2))


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_whole_transformer(training: bool, calls: list[Any]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = nn.Transformer(8, 2, 2, 2, 16, dropout=0.0, dtype=torch.float64).train(training)
    source = torch.randn(6, 3, 8, dtype=torch.float64)
    target = torch.randn(5, 3, 8, dtype=torch.float64)
    arguments = {
        "tgt_mask": nn.Transformer.generate_square_subsequent_mask(5, dtype=torch.float64),
        "src_key_padding_mask": padding(6, 3, 4),
        "memory_key_padding_mask": padding(6, 3, 4),
        "tgt_is_causal": True,
    }
    expected = model(source, target, **arguments)
    report = convert(model)
    kinds = [row.new.removeprefix("fastseq.nn.") for row in report.converted]
    assert kinds[:3] == ["Transformer", "TransformerEncoder", "TransformerEncoderLayer"]
    assert kinds.count("MultiheadAttention") == 6
    assert kinds.count("TransformerDecoderLayer") == 2
    names = [row.fqn.rpartition(".")[2] for row in report.converted]
    assert sum(name in ("self_attn", "multihead_attn") for name in names) == 6
    assert sum(name in ("linear1", "linear2") for name in names) == 8
    assert "out_proj" not in names, "a part of its attention layer"
    assert not report.skipped
    actual = model(source, target, **arguments)
    assert len(calls) == 6
    torch.testing.assert_close(actual, expected, **CLOSE)


def test_built_from_a_converted_layer() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    convert(layer)
    with pytest.warns(UserWarning, match="_qkv_same_embed_dim was not True"):
        model = nn.TransformerEncoder(layer, 2)
    assert all(type(one.self_attn) is fast_nn.MultiheadAttention for one in model.layers)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_compiled_encoder(training: bool, calls: list[Any]) -> None:
    torch._dynamo.reset()
    model = encoder().train(training)
    x = torch.randn(3, 6, 8, dtype=torch.float64)
    hidden = padding(6, 3, 4).flip(1)
    with torch.set_grad_enabled(training):
        expected = model(x, src_key_padding_mask=hidden)
        convert(model)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        actual = compiled(x, src_key_padding_mask=hidden)
    torch.testing.assert_close(actual[~hidden], expected[~hidden], **CLOSE)
    torch._dynamo.reset()
