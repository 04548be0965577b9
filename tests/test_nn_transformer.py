"""fastseq.nn's Transformer modules against torch.nn's: results, gradients, state, training."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from oracle import FREE_UNITS
from transformers_pair import (
    EMBED,
    FEED,
    HEADS,
    MASKS,
    PADDINGS,
    Case,
    arguments,
    build,
    cases,
    check,
    pair,
    sequence,
    train,
)

import fastseq
import fastseq.nn as fast_nn

KINDS = (
    "TransformerEncoderLayer",
    "TransformerDecoderLayer",
    "TransformerEncoder",
    "TransformerDecoder",
    "Transformer",
)
CLOSE = {"rtol": 1e-9, "atol": 1e-9}
RANDOM = settings(
    max_examples=25,
    derandomize=True,
    deadline=None,
    database=None,
    phases=[Phase.generate],  # a smaller example of the same says no more
)


# --- results and gradients ---------------------------------------------------------------------


@RANDOM
@given(cases("TransformerEncoderLayer"))
def test_encoder_layer(case: Case) -> None:
    check(case)


@RANDOM
@given(cases("TransformerDecoderLayer"))
def test_decoder_layer(case: Case) -> None:
    check(case)


@RANDOM
@given(cases("TransformerEncoder"))
def test_encoder(case: Case) -> None:
    check(case)


@RANDOM
@given(cases("TransformerDecoder"))
def test_decoder(case: Case) -> None:
    check(case)


@RANDOM
@given(cases("Transformer"))
def test_transformer(case: Case) -> None:
    check(case)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("padding", PADDINGS)
def test_masks_of_an_encoder(mask: str, padding: str, training: bool) -> None:
    for norm_first in (False, True):
        check(
            Case(
                "TransformerEncoder",
                norm_first=norm_first,
                training=training,
                mask=mask,
                padding=padding,
            )
        )


@pytest.mark.parametrize("kind", KINDS)
def test_causal_hints(kind: str) -> None:
    """A right hint, no hint, and none where torch would find out by itself."""
    case = Case(kind, mask="causal_float")
    theirs, ours = build(torch.nn, case), build(fast_nn, case)
    inputs, masks = arguments(case)
    name = {"TransformerEncoder": "is_causal", "TransformerEncoderLayer": "is_causal"}.get(
        kind, "tgt_is_causal"
    )
    for hint in (True, False, *([] if kind.endswith("Layer") else [None])):
        options = {**masks, name: hint}
        torch.testing.assert_close(
            train(ours, inputs, options), train(theirs, inputs, options), **CLOSE
        )


@pytest.mark.parametrize("kind", KINDS[2:])
def test_a_stack_finds_the_causal_mask(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever kind it is of: half of the scores are then never computed."""
    seen: list[bool] = []
    original = fastseq.functional.attention

    def spy(*args: Any, **kwargs: Any) -> Any:
        seen.append(kwargs["causal"] and kwargs["mask"] is None and kwargs["bias"] is None)
        return original(*args, **kwargs)

    monkeypatch.setattr(fastseq.functional, "attention", spy)
    for mask in ("causal", "causal_float"):
        case = Case(kind, mask=mask)
        inputs, masks = arguments(case)
        build(fast_nn, case)(*inputs, **masks)
        # Encoders are called without a mask by the whole, as is the memory.
        assert sum(seen) == 2
        seen.clear()


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("kind", KINDS[:2])
def test_float32_is_as_exact_as_torch(kind: str, norm_first: bool) -> None:
    case = Case(kind, norm_first=norm_first, activation="gelu", mask="causal", padding="end")
    inputs, masks = arguments(case)
    inputs = [one.float().double() for one in inputs]
    reference = build(torch.nn, case).float().double()
    exact = train(reference, inputs, masks)
    single = [one.float() for one in inputs]
    errors = []
    for library in (torch.nn, fast_nn):
        module = build(library, case).float()
        found = train(module, single, masks)
        errors.append(
            [float((f - e).detach().abs().max()) for f, e in zip(found, exact, strict=True)]
        )
    units = [FREE_UNITS * 2**-23 * float(e.abs().max()) for e in exact]
    for theirs, ours, unit in zip(*errors, units, strict=True):
        assert ours <= 1.5 * theirs + unit


@pytest.mark.parametrize("library", [torch.nn, fast_nn])
def test_copies_of_a_decoder_layer_forget_a_module_as_activation(library: Any) -> None:
    """torch's __setstate__ looks for it among the attributes only; results stay torch's."""
    layer = library.TransformerDecoderLayer(EMBED, HEADS, FEED, activation=torch.nn.GELU())
    assert copy.deepcopy(layer).activation is torch.nn.functional.relu
    if library is fast_nn:
        with pytest.warns(UserWarning, match=r"GELU.*is replaced by ReLU"):
            library.TransformerDecoder(layer, 1)


# --- state -------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_state_and_initialisation(kind: str, bias: bool) -> None:
    modules = []
    for library in (torch.nn, fast_nn):
        torch.manual_seed(3)
        if kind == "Transformer":
            modules.append(library.Transformer(EMBED, HEADS, 2, 3, FEED, bias=bias))
            continue
        layer = getattr(library, kind.removesuffix("Layer") + "Layer")(
            EMBED, HEADS, FEED, bias=bias, batch_first=True
        )
        modules.append(layer if kind.endswith("Layer") else getattr(library, kind)(layer, 2))
    theirs, ours = modules
    assert isinstance(ours, getattr(torch.nn, kind))
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for name, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value), name
    assert repr(ours) == repr(theirs)
    # Both ways.
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.normal_()
    theirs.load_state_dict(ours.state_dict())
    twin = copy.deepcopy(ours)
    twin.load_state_dict(theirs.state_dict())
    assert all(map(torch.equal, twin.parameters(), ours.parameters()))


@pytest.mark.parametrize("kind", KINDS)
def test_copies(kind: str) -> None:
    case = Case(kind, training=False)
    ours = build(fast_nn, case)
    inputs, _ = arguments(case)
    expected = ours(*inputs)
    for twin in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert type(twin) is type(ours)
        assert torch.equal(twin(*inputs), expected)


def test_the_generator_is_left_where_torch_leaves_it() -> None:
    states = []
    for library in (torch.nn, fast_nn):
        torch.manual_seed(0)
        library.Transformer(EMBED, HEADS, 1, 1, FEED, batch_first=True)
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


# --- training ----------------------------------------------------------------------------------


def losses(model: torch.nn.Module, steps: int = 12) -> list[float]:
    made = torch.Generator().manual_seed(5)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    mask = torch.nn.Transformer.generate_square_subsequent_mask(5)
    found = []
    for _ in range(steps):
        source, target = (torch.randn(4, s, EMBED, generator=made) for s in (7, 5))
        hidden = torch.arange(7) >= torch.tensor([7, 4, 2, 6])[:, None]
        output = model(
            source,
            target,
            tgt_mask=mask,
            tgt_is_causal=True,
            src_key_padding_mask=hidden,
            memory_key_padding_mask=hidden,
        )
        loss = (output - target.cumsum(1).tanh()).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(float(loss.detach()))
    return found


def test_loss_curves() -> None:
    """The same from the same seed: torch's, ours, and torch's converted."""

    def made(library: Any) -> torch.nn.Module:
        torch.manual_seed(2)
        return library.Transformer(EMBED, HEADS, 2, 2, FEED, dropout=0.0, batch_first=True)

    expected = losses(made(torch.nn))
    assert expected[-1] < 0.9 * expected[0]
    converted = made(torch.nn)
    fastseq.convert(converted, verbose=False)
    for model in (made(fast_nn), converted):
        assert losses(model) == pytest.approx(expected, rel=2e-4)


def test_training_with_dropout_learns_as_fast() -> None:
    def last(library: Any) -> float:
        total = 0.0
        for seed in range(4):
            torch.manual_seed(seed)
            model = library.Transformer(EMBED, HEADS, 1, 1, FEED, dropout=0.2, batch_first=True)
            total += sum(losses(model, 20)[-8:]) / 8
        return total / 4

    assert last(fast_nn) == pytest.approx(last(torch.nn), rel=0.1)


# --- dropout -----------------------------------------------------------------------------------

DROPOUTS = {
    "TransformerEncoderLayer": ("dropout", "dropout1", "dropout2"),
    "TransformerDecoderLayer": ("dropout", "dropout1", "dropout2", "dropout3"),
}


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("activation", ["relu", "tanh"])
@pytest.mark.parametrize("kind", DROPOUTS)
def test_each_dropout_is_where_it_belongs(kind: str, activation: str, norm_first: bool) -> None:
    """With a probability of 1 there is nothing random about it."""
    case = Case(kind, activation=activation, norm_first=norm_first)
    inputs, _ = arguments(case)
    for name in DROPOUTS[kind]:
        results = []
        for library in (torch.nn, fast_nn):
            module = build(library, case)
            getattr(module, name).p = 1.0
            results.append(train(module, inputs, {}))
            getattr(module, name).eval()
            results.append(train(module, inputs, {}))
        torch.testing.assert_close(results[2], results[0], **CLOSE)
        torch.testing.assert_close(results[3], results[1], **CLOSE)
        assert not torch.allclose(results[0][0], results[1][0])


@pytest.mark.parametrize("kind", DROPOUTS)
def test_dropout_statistics(kind: str) -> None:
    """Mean and spread over many equal rows are torch's."""
    rows = 4000
    found = []
    for library in (torch.nn, fast_nn):
        module = build(library, Case(kind)).float()
        for name in DROPOUTS[kind]:
            getattr(module, name).p = 0.3
        module.self_attn.dropout = 0.3
        torch.manual_seed(11)
        inputs, _ = arguments(Case(kind))
        output = module(*(one[:1].float().expand(rows, -1, -1) for one in inputs)).detach()
        assert len(output[:, 0, 0].unique()) > rows / 4, "rows must not share their masks"
        found.append((output.mean(0), output.std(0)))
    (mean, spread), (our_mean, our_spread) = found
    # Five standard errors of the difference of two means. That of two spreads has
    # sqrt((kurtosis - 1) / 4) times these, which is less than 1 up to a kurtosis of 5.
    error = 5 * spread / rows**0.5 * 2**0.5
    assert bool(((our_mean - mean).abs() < error).all())
    assert bool(((our_spread - spread).abs() < error).all())


def test_dropout_follows_the_seed() -> None:
    module = fast_nn.TransformerEncoderLayer(EMBED, HEADS, FEED, 0.5)
    x = torch.randn(4, 2, EMBED)
    outputs = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        outputs.append(module(x))
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])
    module.eval()
    assert torch.equal(module(x), module(x))


# --- padding in a stack ------------------------------------------------------------------------


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_padded_rows_are_left_out_in_inference(
    batch_first: bool, norm_first: bool, causal: bool
) -> None:
    theirs, ours = pair(
        "TransformerEncoder", batch_first=batch_first, norm_first=norm_first, training=False
    )
    hidden = torch.tensor([[0, 0, 0, 1, 1], [0, 1, 0, 1, 0], [1, 1, 1, 1, 1]], dtype=torch.bool)
    x = sequence(3, 5)
    mask = torch.ones(5, 5, dtype=torch.bool).triu(1) if causal else None
    with torch.no_grad():
        full = ours(x if batch_first else x.transpose(0, 1), mask, hidden)
        full = full if batch_first else full.transpose(0, 1)
        for row, positions in enumerate(~hidden):
            if positions.any():
                alone = x[row][positions]
                alone_mask = None if mask is None else mask[: len(alone), : len(alone)]
                expected = theirs(alone, alone_mask)
                torch.testing.assert_close(full[row][positions], expected, **CLOSE)
        zeros = theirs.norm(torch.zeros(EMBED, dtype=torch.float64))
        assert torch.equal(full[hidden], zeros.expand(int(hidden.sum()), -1))


def _over_positions(x: torch.Tensor) -> torch.Tensor:
    """An activation that is none of an element alone, and takes a batch of sequences only."""
    return x * torch.sigmoid(x.permute(0, 2, 1).mean(-1)).unsqueeze(1)


class _SequenceNorm(torch.nn.Module):
    eps = 1.0  # torch reads it, and then calls the module

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, steps, _ = x.shape
        return x / (batch + steps)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested")
@pytest.mark.parametrize("what", ["activation", "norm", "hook"])
def test_who_may_ask_for_the_shape_gets_the_whole_batch(what: str) -> None:
    theirs, ours = pair("TransformerEncoder", training=False)
    hidden = torch.arange(5) >= torch.tensor([5, 2, 3])[:, None]
    seen = []
    for stack in (theirs, ours):
        stack.use_nested_tensor = False  # torch's own way of leaving rows out
        for layer in stack.layers:
            if what == "activation":
                layer.activation = _over_positions
                layer.activation_relu_or_gelu = 0
            elif what == "norm":
                layer.norm2 = _SequenceNorm()
            else:
                layer.norm1.register_forward_hook(lambda *call: seen.append(call[1][0].shape))
    x = sequence(3, 5)
    with torch.no_grad():
        expected, found = (stack(x, src_key_padding_mask=hidden) for stack in (theirs, ours))
    torch.testing.assert_close(found[~hidden], expected[~hidden], **CLOSE)
    assert set(seen) == ({x.shape} if what == "hook" else set())


def test_padded_rows_have_results_where_torch_has_them() -> None:
    hidden = torch.arange(5) >= torch.tensor([5, 2, 3])[:, None]
    x = sequence(3, 5)
    theirs, ours = pair("TransformerEncoder", training=False)
    # With gradients wanted, in training, and where the caller turned it off.
    torch.testing.assert_close(
        ours(x, None, hidden), theirs(x, None, hidden), msg="with gradients", **CLOSE
    )
    with torch.no_grad():
        theirs.train()
        expected = theirs(x, None, hidden)
        ours.enable_nested_tensor = False
        torch.testing.assert_close(ours(x, None, hidden), expected, **CLOSE)
        ours.enable_nested_tensor = True
        ours.train()
        torch.testing.assert_close(ours(x, None, hidden), expected, **CLOSE)
        # A layer alone keeps them, too.
        layers = theirs.layers[0].eval(), ours.layers[0].eval()
        expected, actual = (one(x, None, hidden) for one in layers)
        torch.testing.assert_close(actual, expected, **CLOSE)


def test_padding_that_hides_nothing() -> None:
    _, ours = pair("TransformerEncoder", training=False)
    x = sequence(3, 5)
    with torch.no_grad():
        expected = ours(x)
        torch.testing.assert_close(ours(x, None, torch.zeros(3, 5, dtype=torch.bool)), expected)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors() -> None:
    theirs, ours = pair("TransformerEncoderLayer", training=False)
    x = torch.nested.nested_tensor([sequence(4), sequence(2)])
    with torch.no_grad():
        expected, actual = (one(x).to_padded_tensor(0.0) for one in (theirs, ours))
        torch.testing.assert_close(actual, expected, **CLOSE)
        stack = fast_nn.TransformerEncoder(ours, 1)
        torch.testing.assert_close(stack(x).to_padded_tensor(0.0), expected, **CLOSE)
        with pytest.raises(AssertionError, match="without masks"):
            ours(x, src_key_padding_mask=torch.zeros(2, 4, dtype=torch.bool))


def test_no_key_at_all() -> None:
    """torch: NaN. Here attention adds its bias and nothing else."""
    _, ours = pair("TransformerEncoderLayer")
    hidden = torch.tensor([[False] * 3, [True] * 3])
    x = sequence(2, 3).requires_grad_()
    output = ours(x, None, hidden)
    gradients = torch.autograd.grad(output.square().sum(), [x, *ours.parameters()])
    assert all(tensor.isfinite().all() for tensor in (output, *gradients))


def test_nothing_leaks_out_of_padded_rows() -> None:
    _, ours = pair("TransformerEncoder", training=False)
    hidden = torch.arange(5) >= torch.tensor([5, 2, 3])[:, None]
    x = sequence(3, 5)
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            expected = ours(x, None, hidden)[~hidden]
            spoilt = x.masked_fill(hidden.unsqueeze(-1), torch.nan)
            assert torch.equal(ours(spoilt, None, hidden)[~hidden], expected)
