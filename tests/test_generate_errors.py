"""What fastseq.generate refuses, and what importing its names costs."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from generation_models import (
    SIZE,
    Parts,
    Table,
    chain,
    language_model,
    translator,
)
from torch import Tensor, nn

import fastseq
from fastseq import Beam, Sample

PROMPT = torch.tensor([[1, 2]])


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        (([[1]], 2), {}, TypeError, "prompt must be a tensor, got list"),
        ((PROMPT.float(), 2), {}, TypeError, "prompt must be of dtype int64 or int32, got torch.f"),
        ((PROMPT[:, :0], 2), {}, ValueError, r"prompt must have shape .* got \(1, 0\)"),
        ((PROMPT[None], 2), {}, ValueError, r"prompt must have shape .* got \(1, 1, 2\)"),
        ((PROMPT, 2.0), {}, TypeError, "max_new_tokens must be an integer, got float"),
        ((PROMPT, -1), {}, ValueError, "max_new_tokens must be at least 0, got -1"),
        ((PROMPT, 2), {"strategy": "best"}, ValueError, "strategy must be one of 'greedy', 'sam"),
        ((PROMPT, 2), {"strategy": 3}, TypeError, "strategy must be a name, Greedy, Sample or"),
        ((PROMPT, 2), {"strategy": Beam}, TypeError, "strategy must be a name, Greedy, Sample or"),
        ((PROMPT, 2), {"eos": 2.0}, TypeError, "eos must be an integer or integers, got float"),
        ((PROMPT, 2), {"eos": -1}, ValueError, "eos must be at least 0, got -1"),
        ((PROMPT, 2), {"eos": [1, 2.0]}, TypeError, "eos must be an integer, got float"),
        ((PROMPT, 2), {"eos": 6}, ValueError, "eos must be below 6, the tokens of the model, got"),
        ((PROMPT, 2), {"pad": -3}, ValueError, "pad must be at least 0, got -3"),
        (
            (PROMPT, 2),
            {"generator": torch.Generator()},
            TypeError,
            "generator must be None for Greedy",
        ),
        ((PROMPT, 2), {"prompt_lengths": [1, 2]}, ValueError, r"prompt_lengths .* \(1,\), got"),
        ((PROMPT, 2), {"prompt_lengths": [3]}, ValueError, "between 1 and 2, got 3"),
        ((PROMPT, 2), {"prompt_lengths": [0]}, ValueError, "between 1 and 2, got 0"),
        ((PROMPT, 2), {"prompt_lengths": [1.5]}, TypeError, "prompt_lengths must be integers"),
        ((PROMPT, 2), {"source": PROMPT}, TypeError, "source must be None for Table"),
        ((PROMPT, 2), {"memory": torch.ones(2, 3)}, ValueError, r"memory .* expected \(1, ...\)"),
        ((PROMPT, 2), {"memory": [1]}, TypeError, "memory must be a tensor, got list"),
        (
            (PROMPT, 2),
            {"memory": torch.ones(1, 3), "source": PROMPT},
            ValueError,
            "memory must be None where source is given",
        ),
        (
            (PROMPT, 2),
            {"source_key_padding_mask": PROMPT > 3},
            ValueError,
            "must be None without source and memory",
        ),
        (
            (PROMPT, 2),
            {"memory": torch.ones(1, 3, 4), "source_key_padding_mask": PROMPT > 3},
            ValueError,
            r"source_key_padding_mask must have shape \(1, 3\), got \(1, 2\)",
        ),
        (
            (PROMPT, 2),
            {"memory": torch.ones(1, 2, 4), "source_key_padding_mask": PROMPT},
            TypeError,
            "source_key_padding_mask must be of dtype bool, got torch.int64",
        ),
        ((PROMPT, 2), {"embed": len}, TypeError, "embed must be None for a model with a method"),
        ((PROMPT, 2), {"project": 3}, TypeError, "project must be callable, got int"),
        ((PROMPT, 2), {"use_cache": True}, TypeError, "use_cache must not be True for Table"),
    ],
)
def test_bad_arguments(
    arguments: Any, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        fastseq.generate(chain(), *arguments, **options)


@pytest.mark.parametrize(
    ("model", "options", "error", "message"),
    [
        (nn.Linear(2, 2), {}, TypeError, "model must be a Transformer, .* got Linear"),
        (language_model, {}, TypeError, "model must be a Transformer, .* got function"),
        (language_model(), {}, TypeError, "embed must be given for a bare TransformerDecoder"),
        (language_model(), {"embed": len}, TypeError, "project must be given for a bare"),
        (
            language_model(),
            {"embed": len, "project": len, "source_embed": len},
            TypeError,
            "source_embed must be None for a TransformerDecoder",
        ),
        (
            translator(nn),
            {"use_cache": True, **Parts().callables},
            TypeError,
            "use_cache must not be True for Transformer",
        ),
        (
            translator().encoder,
            {"memory": torch.ones(1, 3, SIZE), **Parts().callables},
            ValueError,
            "memory must be None for a TransformerEncoder",
        ),
        (translator(), Parts().callables, TypeError, "source or memory must be given"),
        (translator(nn).decoder, Parts().callables, TypeError, "memory must be given"),
    ],
)
def test_bad_models(
    model: Any, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        fastseq.generate(model, PROMPT, 2, **options)


def test_bad_logits() -> None:
    class All(Table):
        def decode(self, tokens: Tensor, memory: Any, mask: Any, cache: Any) -> Tensor:
            return self.logits[tokens]

    with pytest.raises(ValueError, match=r"logits of shape \(1, V\), got \(1, 2, 6\)"):
        fastseq.generate(All(chain().logits), PROMPT, 2)


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: Sample(temperature=0), ValueError, "temperature must be positive and finite"),
        (lambda: Sample(temperature=float("nan")), ValueError, "temperature must be positive"),
        (lambda: Sample(temperature="1"), TypeError, "temperature must be a number, got str"),
        (lambda: Sample(top_k=0), ValueError, "top_k must be at least 1, got 0"),
        (lambda: Sample(top_k=1.0), TypeError, "top_k must be an integer, got float"),
        (lambda: Sample(top_p=0.0), ValueError, r"top_p must lie in \(0, 1\], got 0.0"),
        (lambda: Sample(top_p=1.1), ValueError, r"top_p must lie in \(0, 1\], got 1.1"),
        (lambda: Beam(0), ValueError, "n must be at least 1, got 0"),
        (lambda: Beam(True), TypeError, "n must be an integer, got bool"),
        (lambda: Beam(2, float("inf")), ValueError, "length_penalty must be finite"),
        (lambda: Beam(2, None), TypeError, "length_penalty must be a number, got NoneType"),
    ],
)
def test_bad_strategies(build: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        build()


def test_names_do_not_load_torch() -> None:
    code = (
        "import sys, fastseq; assert 'torch' not in sys.modules; "
        "from fastseq import Beam, Greedy, Sample, generate; assert callable(generate); "
        "import fastseq.generation; assert callable(fastseq.generate)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
