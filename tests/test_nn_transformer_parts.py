"""Transformer layers whose parts were replaced, hooked or mixed with torch's; errors."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils import parametrizations, prune
from transformers_pair import EMBED, FEED, HEADS, Case, arguments, build, pair, sequence, train

import fastseq
import fastseq.nn as fast_nn
from fastseq import backends
from fastseq.nn import _transformer_parts

LAYERS = ("TransformerEncoderLayer", "TransformerDecoderLayer")
STACKS = ("TransformerEncoder", "TransformerDecoder")
CLOSE = {"rtol": 1e-9, "atol": 1e-9}


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The layers whose feed-forward half ran in two fused products."""
    seen: list[Any] = []
    original = _transformer_parts.feed_forward

    def spy(layer: Any, *args: Any) -> Tensor:
        seen.append(layer)
        return original(layer, *args)

    monkeypatch.setattr(_transformer_parts, "feed_forward", spy)
    return seen


def parts_of(kind: str) -> list[str]:
    names = ["self_attn", "linear1", "linear2", "norm1", "norm2", "dropout", "dropout1", "dropout2"]
    return [*names, "multihead_attn", "norm3", "dropout3"] if "Decoder" in kind else names


# --- hooks -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", LAYERS)
def test_hooks_of_every_part_fire(kind: str) -> None:
    case = Case(kind)
    inputs, _ = arguments(case)
    theirs, plain = build(torch.nn, case), build(fast_nn, case)
    expected = train(theirs, inputs, {})
    torch.testing.assert_close(train(plain, inputs, {}), expected, **CLOSE)
    for name in parts_of(kind):
        for register in (
            "register_forward_hook",
            "register_forward_pre_hook",
            "register_full_backward_hook",
            "register_full_backward_pre_hook",
        ):
            ours = build(fast_nn, case)
            calls: list[str] = []

            def note(module: Any, *_: Any, calls: list[str] = calls) -> None:
                calls.append(type(module).__name__)

            handle = getattr(getattr(ours, name), register)(note)
            torch.testing.assert_close(train(ours, inputs, {}), expected, **CLOSE)
            assert len(calls) == 1, (name, register)
            handle.remove()
            train(ours, inputs, {})
            assert len(calls) == 1


@pytest.mark.parametrize("kind", STACKS)
def test_hooks_of_layers_in_a_stack_fire(kind: str) -> None:
    case = Case(kind, training=False, padding="end")
    ours = build(fast_nn, case)
    inputs, masks = arguments(case)
    expected = ours(*inputs, **masks)
    calls: list[Tensor] = []
    ours.layers[1].register_forward_hook(lambda *given: calls.append(given[2]))
    torch.testing.assert_close(ours(*inputs, **masks), expected, **CLOSE)
    assert len(calls) == 1
    with torch.no_grad():
        ours(*inputs, **masks)
    assert calls[1].shape == inputs[0].shape


def test_a_hook_that_changes_the_output() -> None:
    theirs, ours = pair("TransformerEncoderLayer")
    for module in (theirs, ours):
        module.linear1.register_forward_hook(lambda _module, _given, output: 2 * output)
    x = sequence(2, 3)
    torch.testing.assert_close(train(ours, [x], {}), train(theirs, [x], {}), **CLOSE)


def test_global_hooks() -> None:
    _, ours = pair("TransformerEncoderLayer")
    seen: list[str] = []
    handle = torch.nn.modules.module.register_module_forward_hook(
        lambda module, *_: seen.append(type(module).__name__)
    )
    try:
        ours(sequence(2, 3))
    finally:
        handle.remove()
    assert seen.count("Linear") == 2
    assert "MultiheadAttention" in seen


# --- parts of other kinds ----------------------------------------------------------------------


class LowRank(torch.nn.Module):
    """A linear layer with a low-rank term; it has a ``weight``, which is not all of it."""

    def __init__(self, base: torch.nn.Linear) -> None:
        super().__init__()
        self.base = base
        options = {"dtype": base.weight.dtype}
        self.down = torch.nn.Parameter(torch.randn(2, base.in_features, **options))
        self.up = torch.nn.Parameter(torch.randn(base.out_features, 2, **options))

    @property
    def weight(self) -> Tensor:
        return self.base.weight

    @property
    def bias(self) -> Tensor:
        return self.base.bias

    def forward(self, input: Tensor) -> Tensor:
        return self.base(input) + input @ self.down.T @ self.up.T


def adapted(module: torch.nn.Module) -> torch.nn.Module:
    torch.manual_seed(4)
    for part in list(module.modules()):
        for name in ("linear1", "linear2"):
            if isinstance(getattr(part, name, None), torch.nn.Linear):
                setattr(part, name, LowRank(getattr(part, name)))
    return module


@pytest.mark.parametrize("kind", [*LAYERS, *STACKS])
def test_replaced_linear_layers(kind: str, fused: list[Any]) -> None:
    case = Case(kind)
    inputs, _ = arguments(case)
    theirs, ours = (adapted(build(library, case)) for library in (torch.nn, fast_nn))
    torch.testing.assert_close(train(ours, inputs, {}), train(theirs, inputs, {}), **CLOSE)
    with torch.no_grad():
        expected = theirs(*inputs)
        torch.testing.assert_close(ours.eval()(*inputs), expected, **CLOSE)
    assert not fused


def test_recomputed_weights() -> None:
    theirs, ours = pair("TransformerEncoderLayer")
    for module in (theirs, ours):
        torch.manual_seed(0)
        parametrizations.weight_norm(module.linear1)
        prune.random_unstructured(module.linear2, "weight", 0.5)
    x = sequence(2, 3)
    torch.testing.assert_close(train(ours, [x], {}), train(theirs, [x], {}), **CLOSE)


def test_a_replaced_norm_needs_no_detour(fused: list[Any]) -> None:
    theirs, ours = pair("TransformerEncoderLayer")
    for module in (theirs, ours):
        module.norm1 = torch.nn.RMSNorm(EMBED, dtype=torch.float64)
        module.norm2 = torch.nn.Identity()
    x = sequence(2, 3)
    torch.testing.assert_close(train(ours, [x], {}), train(theirs, [x], {}), **CLOSE)
    assert fused


class Doubled:
    """For a subclass: twice the feed-forward half."""

    def _ff_block(self, x: Tensor) -> Tensor:
        return 2 * super()._ff_block(x)  # type: ignore[misc]


@pytest.mark.parametrize("kind", LAYERS)
def test_methods_of_a_subclass_are_called(kind: str, fused: list[Any]) -> None:
    case = Case(kind)
    theirs, ours = build(torch.nn, case), build(fast_nn, case)
    inputs, _ = arguments(case)
    for module, library in ((theirs, torch.nn), (ours, fast_nn)):
        module.__class__ = type("Own", (Doubled, getattr(library, kind)), {})
    torch.testing.assert_close(train(ours, inputs, {}), train(theirs, inputs, {}), **CLOSE)
    assert not fused
    stack = getattr(fast_nn, kind.removesuffix("Layer"))(ours, 1)
    torch.testing.assert_close(stack(*inputs), theirs(*inputs), **CLOSE)


def test_a_replaced_forward_is_called() -> None:
    _, ours = pair("TransformerEncoder")
    ours.layers[0].forward = lambda src, **_: src
    expected = ours.norm(ours.layers[1](sequence(2, 3)))
    torch.testing.assert_close(ours(sequence(2, 3)), expected, **CLOSE)
    _, layer = pair("TransformerEncoderLayer")
    layer.linear1.forward = lambda x: x.new_zeros(*x.shape[:-1], FEED)
    x = sequence(2, 3)
    without = layer(x)
    layer.linear1.weight.data.zero_()
    layer.linear1.bias.data.zero_()
    del layer.linear1.forward
    torch.testing.assert_close(layer(x), without, **CLOSE)


@pytest.mark.parametrize("method", ["_sa_block", "_mha_block", "_ff_block"])
@pytest.mark.parametrize("kind", LAYERS)
def test_a_replaced_method_is_called(kind: str, method: str, fused: list[Any]) -> None:
    theirs, ours = pair(kind)
    if not hasattr(theirs, method):
        pytest.skip(f"{kind} has no {method}")
    inputs, _ = arguments(Case(kind))
    for module in (theirs, ours):
        setattr(module, method, lambda x, *_, **__: 0.5 * x)
    torch.testing.assert_close(train(ours, inputs, {}), train(theirs, inputs, {}), **CLOSE)
    assert not fused


@pytest.mark.parametrize("name", ["dropout", "dropout1", "dropout2"])
def test_a_replaced_dropout_is_called(name: str) -> None:
    theirs, ours = pair("TransformerEncoderLayer")
    for module in (theirs, ours):
        getattr(module, name).forward = lambda x: 0.5 * x
    x = sequence(2, 3)
    torch.testing.assert_close(train(ours, [x], {}), train(theirs, [x], {}), **CLOSE)


# --- mixed with torch's ------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:enable_nested_tensor", "ignore:The PyTorch API of nested")
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("kind", STACKS)
def test_stacks_of_the_other_library(kind: str, training: bool) -> None:
    case = Case(kind, training=training, padding="end", mask="none")
    inputs, masks = arguments(case)
    theirs, ours = build(torch.nn, case), build(fast_nn, case)
    mixed = []
    for stack, layers in ((torch.nn, ours), (fast_nn, theirs)):
        made = getattr(stack, kind)(layers.layers[0], 2, layers.norm)
        made.load_state_dict(theirs.state_dict())
        mixed.append(made.train(training))
    mixed[1].layers[1] = ours.layers[1]  # and both in one stack
    expected = train(theirs, inputs, masks)
    valid = ~masks.get("src_key_padding_mask", torch.zeros(3, 5, dtype=torch.bool))
    for one in mixed:
        torch.testing.assert_close(train(one, inputs, masks)[0], expected[0], **CLOSE)
        with torch.no_grad():
            found = one(*inputs, **masks)
        torch.testing.assert_close(found[valid], expected[0][valid], **CLOSE)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("include", ["*self_attn", "*linear?", "*layers.0", "encoder", "*norm?"])
def test_partly_converted(include: str, training: bool) -> None:
    """Whatever part of a model is ours, torch's fast path never reads around it."""
    case = Case("Transformer", training=training, padding="end", memory_padding="end")
    model = build(torch.nn, case)
    inputs, masks = arguments(case)
    expected = train(model, inputs, masks)
    report = fastseq.convert(model, include=include, verbose=False)
    assert report.converted
    torch.testing.assert_close(train(model, inputs, masks), expected, **CLOSE)
    with torch.no_grad():
        torch.testing.assert_close(model(*inputs, **masks), expected[0], **CLOSE)
    fastseq.revert(model)
    assert all(type(one).__module__.startswith("torch.") for one in model.modules())
    torch.testing.assert_close(train(model, inputs, masks), expected, **CLOSE)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("kind", [*LAYERS, *STACKS, "Transformer"])
def test_scripting_takes_torchs_layers(kind: str) -> None:
    case = Case(kind, training=False)
    ours = build(fast_nn, case)
    inputs, _ = arguments(case)
    scripted = torch.jit.script(ours)
    torch.testing.assert_close(scripted(*inputs), ours(*inputs), **CLOSE)


def test_custom_encoder_and_decoder() -> None:
    encoder, decoder = torch.nn.Identity(), torch.nn.ModuleList()
    model = fast_nn.Transformer(EMBED, HEADS, custom_encoder=encoder, custom_decoder=decoder)
    assert model.encoder is encoder
    assert model.decoder is decoder


# --- what falls back ---------------------------------------------------------------------------


@pytest.fixture
def _forget_warnings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_warned_reasons", set())


@pytest.mark.usefixtures("_forget_warnings")
@pytest.mark.parametrize("kind", ["TransformerEncoder", "TransformerDecoder", "Transformer"])
def test_half_precision(kind: str) -> None:
    case = Case(kind, training=False)
    inputs, _ = arguments(case)
    theirs, ours = (build(library, case).bfloat16() for library in (torch.nn, fast_nn))
    inputs = [one.bfloat16() for one in inputs]
    with pytest.warns(fastseq.FastseqFallbackWarning, match="bfloat16"):
        actual = ours(*inputs)
    torch.testing.assert_close(actual, theirs(*inputs))


@pytest.mark.usefixtures("_forget_warnings")
@pytest.mark.filterwarnings("ignore::fastseq.FastseqFallbackWarning")
def test_autocast() -> None:
    theirs, ours = (one.float() for one in pair("TransformerEncoderLayer"))
    x = sequence(2, 3).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected, actual = theirs(x), ours(x)
    assert actual.dtype is expected.dtype
    torch.testing.assert_close(actual, expected)


# --- errors ------------------------------------------------------------------------------------


def message_of(kind: type[BaseException], call: Any) -> str:
    with pytest.raises(kind) as raised:
        call()
    return str(raised.value)


def test_constructor_errors() -> None:
    for kind in LAYERS:
        build_layer = getattr(fast_nn, kind)
        with pytest.raises(RuntimeError, match="relu/gelu"):
            build_layer(EMBED, HEADS, activation="tanh")
        with pytest.raises(AssertionError, match="divisible"):
            build_layer(EMBED, 3)


CALLS: dict[str, tuple[str, dict[str, Any], type[BaseException], str]] = {
    "rank": ("TransformerEncoderLayer", {"shape": (2, 3, 4, EMBED)}, AssertionError, "query"),
    "features": ("TransformerEncoderLayer", {"shape": (2, 3, 5)}, AssertionError, "features"),
    "mask shape": (
        "TransformerEncoder",
        {"mask": torch.zeros(2, 3)},
        RuntimeError,
        r"attn_mask must have shape \(3, 3\)",
    ),
    "mask dtype": (
        "TransformerEncoder",
        {"mask": torch.zeros(3, 3, dtype=torch.int64)},
        AssertionError,
        "attn_mask must be bool or floating",
    ),
    "padding shape": (
        "TransformerEncoder",
        {"src_key_padding_mask": torch.zeros(2, 4, dtype=torch.bool)},
        AssertionError,
        r"key_padding_mask must have shape \(2, 3\)",
    ),
    "hint": ("TransformerEncoder", {"is_causal": True}, RuntimeError, "attn_mask must be given"),
}


@pytest.mark.filterwarnings("ignore:Support for mismatched")
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("what", CALLS)
def test_call_errors(what: str, training: bool) -> None:
    kind, options, error, match = CALLS[what]
    options = dict(options)
    shape = options.pop("shape", (2, 3, EMBED))
    theirs, ours = pair(kind, training=training)
    x = torch.zeros(shape, dtype=torch.float64)
    with pytest.raises(error, match=match):
        ours(x, **options)
    if training:
        with pytest.raises(error):
            theirs(x, **options)


def test_memory_errors() -> None:
    _, ours = pair("TransformerDecoder")
    x = sequence(2, 3)
    with pytest.raises(ValueError, match="memory must be given"):
        ours(x)
    with pytest.raises(RuntimeError, match="same batch size, got 2 and 3"):
        ours(x, sequence(3, 4))
    alone = fast_nn.TransformerDecoderLayer(EMBED, HEADS, FEED, cross_attention=False)
    with pytest.raises(ValueError, match="memory must be None"):
        alone(torch.zeros(3, EMBED), torch.zeros(3, EMBED))


def test_transformer_errors_are_torchs() -> None:
    theirs, ours = pair("Transformer")
    for source, target in (
        (sequence(2, 3), sequence(3, 3)),
        (sequence(2, 3)[..., :4], sequence(2, 3)),
    ):
        expected = message_of(RuntimeError, lambda s=source, t=target: theirs(s, t))
        assert message_of(RuntimeError, lambda s=source, t=target: ours(s, t)) == expected


# --- a decoder without cross-attention ---------------------------------------------------------


@pytest.mark.parametrize("norm_first", [False, True])
def test_decoder_only(norm_first: bool) -> None:
    """The same as an encoder with the causal mask."""
    encoder = fast_nn.TransformerEncoderLayer(
        EMBED, HEADS, FEED, 0.0, "gelu", batch_first=True, norm_first=norm_first
    ).double()
    layer = fast_nn.TransformerDecoderLayer(
        EMBED,
        HEADS,
        FEED,
        0.0,
        "gelu",
        batch_first=True,
        norm_first=norm_first,
        cross_attention=False,
    ).double()
    state = encoder.state_dict()
    renamed = {name.replace("norm2", "norm3"): value for name, value in state.items()}
    layer.load_state_dict(renamed)
    mask = torch.ones(4, 4, dtype=torch.bool).triu(1)
    x = sequence(2, 4)
    expected = encoder(x, mask)
    torch.testing.assert_close(layer(x, tgt_mask=mask), expected, **CLOSE)
    layer.linear1.register_forward_hook(lambda *_: None)  # module by module
    torch.testing.assert_close(layer(x, tgt_mask=mask), expected, **CLOSE)
    stack = fast_nn.TransformerDecoder(copy.deepcopy(layer), 2)
    torch.testing.assert_close(stack(x, tgt_mask=mask), layer(expected, tgt_mask=mask), **CLOSE)
    rows = fastseq.revert(stack).skipped
    assert [row.reason for row in rows] == [
        "torch.nn.TransformerDecoderLayer has no cross_attention=False"
    ] * 2
