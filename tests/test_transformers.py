"""attn_implementation="fastseq" in Hugging Face transformers, on small random models."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

import fastseq

os.environ.setdefault("HF_HUB_OFFLINE", "1")
transformers = pytest.importorskip(
    "transformers", reason="transformers is not installed (pip install 'fastseq[hf]')"
)

# Two layers of float64; what differs is the order of some hundred additions.
CLOSE = {"rtol": 1e-9, "atol": 1e-9}
# The library's own eager softmax is in float32, whatever the model is in, and it turns float64's
# lowest number, with which it masks, into -inf and rows of padding into NaN.
CLOSE_FLOAT32 = {"rtol": 1e-4, "atol": 2e-5}
TINY = {
    "vocab_size": 50,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 32,
    "max_position_embeddings": 32,
}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
MODELS: dict[str, Any] = {
    "bert": lambda: transformers.BertForMaskedLM(transformers.BertConfig(**TINY, **NO_DROPOUT)),
    "gpt2": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=50,
            n_embd=24,
            n_layer=2,
            n_head=4,
            n_positions=32,
            attn_pdrop=0.0,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            bos_token_id=0,
            eos_token_id=1,
        )
    ),
    "llama": lambda: transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**TINY, num_key_value_heads=2)
    ),
}
CAUSAL = ("gpt2", "llama")


@pytest.fixture(autouse=True)
def _registered() -> None:
    torch.manual_seed(0)
    fastseq.integrations.register_transformers()


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Shapes and options of every call that reaches fastseq."""
    seen: list[dict[str, Any]] = []
    original = fastseq.functional.attention

    def record(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Any:
        seen.append({"query": query.shape, "key": key.shape, **options})
        return original(query, key, value, **options)

    monkeypatch.setattr(fastseq.functional, "attention", record)
    return seen


def build(name: str) -> Any:
    return MODELS[name]().double()


def tokens(padding: str) -> tuple[Tensor, Tensor]:
    """Three sequences and their attention mask."""
    mask = torch.ones(3, 7, dtype=torch.int64)
    lengths = torch.tensor([7, 4, 5])[:, None]
    if padding == "right":
        mask = (torch.arange(7) < lengths).long()
    elif padding == "left":
        mask = (torch.arange(7) >= 7 - lengths).long()
    return torch.randint(2, 50, (3, 7)), mask


def outcome(model: Any, implementation: str, ids: Tensor, mask: Tensor) -> list[Tensor]:
    """Logits of the tokens that are none of padding, and all gradients of a loss on them."""
    model.set_attn_implementation(implementation)
    logits = model(input_ids=ids, attention_mask=mask).logits[mask.bool()]
    weights = torch.linspace(0.5, 1.5, logits.numel(), dtype=logits.dtype).view_as(logits)
    gradients = torch.autograd.grad((logits * weights).sum(), list(model.parameters()))
    return [logits.detach(), *gradients]


@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", MODELS)
def test_logits_and_gradients(
    name: str, training: bool, padding: str, calls: list[dict[str, Any]]
) -> None:
    model = build(name).train(training)
    ids, mask = tokens(padding)
    actual = outcome(model, "fastseq", ids, mask)
    assert len(calls) == 2, "once per layer"
    if name == "llama":
        assert calls[0]["key"][1] == 2, "key heads are not repeated"
    if name in CAUSAL and padding == "none":
        assert calls[0]["causal"]
        assert calls[0]["mask"] is None
    if name == "bert" and padding != "none":
        assert calls[0]["key_padding_mask"].shape == (3, 7)
        assert calls[0]["mask"] is None
    torch.testing.assert_close(actual, outcome(model, "sdpa", ids, mask), **CLOSE)
    model.float()
    actual, expected = (outcome(model, one, ids, mask) for one in ("fastseq", "eager"))
    torch.testing.assert_close(actual, expected, **CLOSE_FLOAT32)


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_attention_weights(name: str) -> None:
    """GPT-2 does not tell the attention function that they are wanted."""
    model = build(name).eval()
    ids, mask = tokens("none")
    model.set_attn_implementation("eager")
    expected = model(input_ids=ids, attention_mask=mask, output_attentions=True).attentions
    model.set_attn_implementation("fastseq")
    actual = model(input_ids=ids, attention_mask=mask, output_attentions=True).attentions
    assert len(actual) == 2
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("padding", ["none", "left"])
@pytest.mark.parametrize("name", CAUSAL)
def test_generation(name: str, padding: str, cache: str, calls: list[dict[str, Any]]) -> None:
    model = build(name).eval()
    ids, mask = tokens(padding)
    options = {
        "attention_mask": mask,
        "max_new_tokens": 6,
        "do_sample": False,
        "pad_token_id": 0,
        "cache_implementation": None if cache == "dynamic" else "static",
        "disable_compile": True,
    }
    model.set_attn_implementation("fastseq")
    actual = model.generate(ids, **options)
    assert calls[-1]["query"][2] == 1, "the last steps are single queries"
    model.set_attn_implementation("sdpa")
    assert torch.equal(actual, model.generate(ids, **options))


def test_dropout_is_applied_in_training_only(calls: list[dict[str, Any]]) -> None:
    config = transformers.BertConfig(**TINY, attention_probs_dropout_prob=0.3)
    model = transformers.BertModel(config)
    model.set_attn_implementation("fastseq")
    ids, _ = tokens("none")
    for training, expected in ((True, 0.3), (False, 0.0)):
        model.train(training)(ids)
        assert calls[-1]["dropout_p"] == expected


def test_soft_capping_sinks_and_windows(calls: list[dict[str, Any]]) -> None:
    gemma = transformers.Gemma2ForCausalLM(
        transformers.Gemma2Config(
            **TINY,
            num_key_value_heads=2,
            head_dim=6,
            sliding_window=3,
            attn_logit_softcapping=2.0,
            query_pre_attn_scalar=6,
        )
    )
    oss = transformers.GptOssForCausalLM(
        transformers.GptOssConfig(
            **TINY,
            num_key_value_heads=2,
            head_dim=6,
            sliding_window=3,
            num_local_experts=2,
            num_experts_per_tok=1,
            experts_implementation="eager",
        )
    )
    for name, parameter in oss.named_parameters():
        if name.endswith("sinks"):
            torch.nn.init.normal_(parameter)
    ids, mask = tokens("right")
    for model, option in ((gemma, "softcap"), (oss, "sinks")):
        calls.clear()
        actual = outcome(model.eval(), "fastseq", ids, mask)
        assert all(call[option] is not None for call in calls)
        torch.testing.assert_close(actual, outcome(model, "eager", ids, mask), **CLOSE_FLOAT32)


def test_custom_float_masks() -> None:
    model = build("llama").eval().float()
    ids, _ = tokens("none")
    mask = torch.randn(3, 1, 7, 7)
    mask.masked_fill_(torch.ones(7, 7, dtype=torch.bool).triu(1), torch.finfo(mask.dtype).min)
    results = []
    for implementation in ("fastseq", "eager"):
        model.set_attn_implementation(implementation)
        results.append(model(input_ids=ids, attention_mask=mask).logits)
    torch.testing.assert_close(*results, **CLOSE_FLOAT32)


def test_chosen_at_construction_and_saved(tmp_path: Any) -> None:
    build("bert").save_pretrained(tmp_path)
    model = transformers.BertForMaskedLM.from_pretrained(tmp_path, attn_implementation="fastseq")
    assert model.config._attn_implementation == "fastseq"


def test_what_would_change_the_result_is_refused() -> None:
    forward = transformers.AttentionInterface()["fastseq"]
    x = torch.randn(1, 2, 3, 4)
    for name in ("cache", "head_mask"):
        with pytest.raises(ValueError, match=f"{name} must be None"):
            forward(torch.nn.Module(), x, x, x, None, **{name: x})


def test_position_bias() -> None:
    """Models with relative positions hand their bias to the attention function."""
    forward = transformers.AttentionInterface()["fastseq"]
    q, k, v = (torch.randn(2, 3, 5, 4, dtype=torch.float64) for _ in range(3))
    bias = torch.randn(1, 3, 5, 5, dtype=torch.float64)
    mask = torch.rand(2, 1, 5, 5) < 0.6
    mask[..., 0] = True
    output, weights = forward(torch.nn.Module(), q, k, v, mask, position_bias=bias, scaling=1.0)
    logits = (q @ k.mT + bias).masked_fill(~mask, -torch.inf)
    torch.testing.assert_close(output, (logits.softmax(-1) @ v).transpose(1, 2), **CLOSE)
    assert weights is None


@pytest.mark.parametrize("name", MODELS)
def test_compile(name: str) -> None:
    torch._dynamo.reset()
    model = build(name).eval()
    ids, mask = tokens("none")
    model.set_attn_implementation("fastseq")
    expected = model(input_ids=ids, attention_mask=mask).logits
    compiled = torch.compile(model, backend="aot_eager")
    found = compiled(input_ids=ids, attention_mask=mask).logits
    torch.testing.assert_close(found, expected, **CLOSE)
    torch._dynamo.reset()


def test_missing_package_is_named() -> None:
    code = (
        "import sys, fastseq\n"
        "sys.modules['transformers'] = None\n"
        "try:\n    fastseq.integrations.register_transformers()\n"
        "except ImportError as error:\n    assert 'transformers>=4.53' in str(error)\n"
        "else:\n    raise SystemExit('no ImportError')\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
