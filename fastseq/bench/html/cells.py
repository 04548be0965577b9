"""What the page says about one case and one peer."""

from __future__ import annotations

from dataclasses import dataclass

from fastseq.bench.attention_cases import AttentionCase
from fastseq.bench.cases import GATES, AnyCase, Case
from fastseq.bench.html import colour
from fastseq.bench.ratios import within_noise
from fastseq.bench.report import NOTHING, format_ratio, format_seconds
from fastseq.bench.results import ONNX, OPENVINO, OURS, OURS_FUNCTIONAL, CaseResult
from fastseq.bench.timing import Timing
from fastseq.bench.transformer_cases import TransformerCase

FAMILIES = {
    "recurrent": "Recurrent layers",
    "attention": "Attention",
    "transformer": "The Transformer and its parts",
}


# Where capital letters are not at the beginning of the first word alone.
_TITLES = {
    "mha": "MultiheadAttention",
    "rms_norm": "RMS norm",
    "peephole_lstm": "Peephole LSTM",
    "coupled_lstm": "Coupled LSTM",
    "ind_rnn": "IndRNN",
    "s_lstm": "sLSTM",
    "janet": "JANET",
}


def family(case: AnyCase) -> str:
    """The key in ``FAMILIES``."""
    if isinstance(case, Case):
        return "recurrent"
    return "attention" if isinstance(case, AttentionCase) else "transformer"


def options_text(case: AnyCase) -> str:
    """What sets a case apart from others of its layer and shape, but for the direction."""
    if isinstance(case, TransformerCase):
        text = case.words
    else:
        text = case.options.suffix().strip("-").replace("-", ", ")
    words = [word for word in (text, "" if case.dtype == "float32" else case.dtype) if word]
    return ", ".join(words)


def layer_title(layer: str) -> str:
    """A layer's name as people write it."""
    if layer in GATES:
        return layer.upper()
    return _TITLES.get(layer, layer.replace("_", " ").capitalize())


def case_label(case: AnyCase) -> str:
    """Layer, shape and options in words, without the direction."""
    words = [f"{layer_title(case.layer)} {case.shape_label}", options_text(case)]
    if isinstance(case, Case) and case.I != case.H:
        words[0] += f" I{case.I}"
    return ", ".join(word for word in words if word)


def failure(result: CaseResult) -> str | None:
    """Why a case has no numbers: it raised, or its results are wrong."""
    if result.gate.passed and OURS in result.timings:
        return None
    return f"raised: {result.raised}" if result.raised else result.gate.summary()


def our_entry(result: CaseResult, peer: str) -> str:
    """The name of our timing that a peer is held against, as ``CaseResult.peer_speedup`` does."""
    functional = peer in (ONNX, OPENVINO) and OURS_FUNCTIONAL in result.timings
    return OURS_FUNCTIONAL if functional else OURS


def threads_text(threads: int) -> str:
    """A thread count in words."""
    return f"{threads} thread{'' if threads == 1 else 's'}"


def spread_text(timing: Timing) -> str:
    """Median and quartiles."""
    low, high = format_seconds(timing.lower_quartile_s), format_seconds(timing.upper_quartile_s)
    return f"{format_seconds(timing.median_s)} ({low} to {high})"


@dataclass(frozen=True)
class Cell:
    """One speed-up.

    Attributes:
        case: Name of the case.
        peer: The peer it is against.
        threads: Threads of both.
        text: What the cell shows.
        tip: The whole story, for whoever points at the cell.
        ratio: The speed-up; None if there is none.
        step: The colour.
        failed: The case has no numbers because it is wrong or did not run.
        noise: The ratio may as well be 1.
    """

    case: str
    peer: str
    threads: int
    text: str
    tip: str
    ratio: float | None = None
    step: int = 0
    failed: bool = False
    noise: bool = False

    @property
    def loss(self) -> bool:
        """The peer's median is lower."""
        return self.ratio is not None and self.ratio < 1


def cell(result: CaseResult, peer: str) -> Cell:
    """The speed-up of a case over a peer, or why there is none."""
    name, threads = result.case.name, result.threads
    failed = failure(result)
    if failed is not None:
        return Cell(name, peer, threads, "failed", failed, failed=True)
    ratio = result.peer_speedup(peer)
    if ratio is None:
        reason = result.skipped.get(peer, "not measured")
        return Cell(name, peer, threads, NOTHING, f"{peer}: {reason}")
    entry = our_entry(result, peer)
    ours, theirs = result.timings[entry], result.timings[peer]
    noise = within_noise(theirs, ours)
    tip = f"{entry} {spread_text(ours)}, {peer} {spread_text(theirs)}"
    if noise:
        tip += "; the quartiles overlap, so this may be noise"
    text = format_ratio(ratio)
    return Cell(name, peer, threads, text, tip, ratio, colour.step(ratio), noise=noise)
