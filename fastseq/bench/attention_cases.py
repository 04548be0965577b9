"""The attention part of the case registry: shapes, masks, and their models of work and traffic.

Like ``cases.py``, which puts it into a suite, this needs neither torch nor the extension.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Literal

from fastseq._work import ELEMENT_BYTES, AttentionSizes, LinearSizes

Direction = Literal["inference", "training"]


@dataclass(frozen=True)
class AttentionOptions:
    """What an attention case has beyond its shape.

    Attributes:
        causal: Query i sees keys up to i; aligned at the last query and key where there are fewer
            queries than keys, as in decoding.
        window: (left, right) of a sliding window; None for none.
        bias: An additive bias (1, Hq, Sq, Skv) that requires a gradient in training.
        dropout: Probability of dropping a weight.
        ragged: Key lengths uniform from an eighth of Skv to Skv, given as a key padding mask.
        need_weights: The module also returns the weights' mean over heads.
        probes: Names of extra measurements, see ``fastseq.bench.probes``.
    """

    causal: bool = False
    window: tuple[int, int] | None = None
    bias: bool = False
    dropout: float = 0.0
    ragged: bool = False
    need_weights: bool = False
    probes: tuple[str, ...] = ()

    # Attention has no case about denormal numbers; the picture asks every case.
    denormal = False

    def suffix(self) -> str:
        """The part of a case's name that these options add."""
        words = []
        if self.causal:
            words.append("causal")
        if self.window is not None:
            words.append("window" + "_".join(map(str, self.window)))
        if self.bias:
            words.append("bias")
        if self.dropout:
            words.append(f"dropout{self.dropout:g}")
        if self.ragged:
            words.append("ragged")
        if self.need_weights:
            words.append("weights")
        return "".join(f"-{word}" for word in words)


@dataclass(frozen=True)
class AttentionCase:
    """Attention at one shape, in one direction of use.

    Attributes:
        name: Unique name; globs on the command line match against it.
        layer: "attention" for the function, "mha" for the module around it.
        B: Batch size.
        Hq: Query heads.
        Hkv: Key and value heads.
        Sq: Queries.
        Skv: Keys.
        E: Size of a head.
        dtype: Name of the torch dtype.
        direction: "inference" (forward without gradients) or "training" (forward and backward,
            gradients for query, key, value and a bias).
        options: Everything else.
        tags: Suites and figures that the case belongs to.
    """

    name: str
    layer: str
    B: int
    Hq: int
    Hkv: int
    Sq: int
    Skv: int
    E: int
    dtype: str = "float32"
    direction: Direction = "inference"
    options: AttentionOptions = field(default_factory=AttentionOptions)
    tags: tuple[str, ...] = ()

    @property
    def plain(self) -> bool:
        """A shape and nothing else; means over cases are taken over these."""
        return not self.options.suffix() and self.layer == "attention"

    @property
    def streaming(self) -> bool:
        """One query at a time."""
        return self.Sq == 1 and self.direction == "inference"

    @property
    def shape_label(self) -> str:
        """The shape in a few characters, for pictures and tables."""
        heads = f"H{self.Hq}" if self.Hq == self.Hkv else f"H{self.Hq}/{self.Hkv}"
        rows = f"S{self.Sq}" if self.Sq == self.Skv else f"S{self.Sq}/{self.Skv}"
        return f"B{self.B} {heads} {rows} E{self.E}"

    def lengths(self) -> list[int]:
        """Keys of each sequence in use, in batch order; the longest is always Skv."""
        if not self.options.ragged:
            return [self.Skv] * self.B
        generator = random.Random(f"{self.Skv}x{self.B}")
        lengths = [generator.randint(self.Skv // 8, self.Skv) for _ in range(self.B)]
        lengths[generator.randrange(self.B)] = self.Skv
        return lengths

    def rows(self) -> int:
        """Terms that the longest sum of a result has."""
        return max(self.Sq * self.Hq // self.Hkv, self.Skv)

    def visible_pairs(self) -> int:
        """(query, key) pairs of one head, over all sequences, that no mask rules out."""
        left, right = self.options.window or (-1, -1)
        if self.options.causal:
            right = 0
        pairs = 0
        shift = self.Skv - self.Sq if self.options.causal and self.Sq < self.Skv else 0
        for length in self.lengths():
            for i in range(self.Sq):
                first = max(0, i + shift - left) if left >= 0 else 0
                last = min(length - 1, i + shift + right) if right >= 0 else length - 1
                pairs += max(0, last - first + 1)
        return pairs

    def _sizes(self) -> AttentionSizes:
        queries, keys = self.B * self.Sq, sum(self.lengths())
        pairs = self.visible_pairs()
        return AttentionSizes(self.Hq, self.Hkv, queries, keys, self.E, self.E, pairs)

    def flops(self) -> int:
        """Floating-point operations of the matrix products, a multiply-add counted as two.

        Two products of E multiply-adds per visible pair and head, forward; five more in training,
        the scores being computed again. Pairs that a mask rules out are not counted: skipping
        them is the kernel's business. The module adds its four projections.
        """
        training = self.direction == "training"
        sizes = self._sizes()
        work = sizes.forward_flops() + (sizes.backward_flops() if training else 0)
        if self.layer == "mha":
            width = self.Hq * self.E
            projections = 4 * LinearSizes(self.B * self.Sq, width, width).product()
            work += projections * (3 if training else 1)
        return work

    def bytes(self) -> int:
        """Compulsory memory traffic: every array moved once per use, caches otherwise perfect.

        Inference reads query, key and value and writes the output; training reads all four and
        the output's gradient once more and writes three gradients. A bias is read in either
        direction and its gradient written. The module also reads its weights, and writes their
        gradients.
        """
        sizes = self._sizes()
        bias = self.Hq * self.Sq * self.Skv if self.options.bias else 0
        elements = sizes.forward_traffic(bias).total
        if self.direction == "training":
            elements += sizes.backward_traffic(bias).total
        if self.layer == "mha":
            weights = 4 * (self.Hq * self.E) ** 2
            elements += weights * (3 if self.direction == "training" else 1)
            if self.options.need_weights:
                elements += self.B * self.Sq * self.Skv
        return elements * ELEMENT_BYTES[self.dtype]


def make_attention_case(
    direction: Direction,
    *,
    B: int,
    H: int,
    S: int,
    E: int,
    Hkv: int | None = None,
    Skv: int | None = None,
    layer: str = "attention",
    dtype: str = "float32",
    options: AttentionOptions | None = None,
) -> AttentionCase:
    """Build a case named after its contents; ``Hkv`` is ``H`` and ``Skv`` is ``S`` unless given."""
    options = options or AttentionOptions()
    if layer not in ("attention", "mha"):
        raise ValueError(f"layer must be 'attention' or 'mha', got {layer!r}")
    if options.need_weights and layer != "mha":
        raise ValueError("need_weights needs layer 'mha', got 'attention'")
    Hkv, Skv = Hkv or H, Skv or S
    heads = f"H{H}" if Hkv == H else f"H{H}_{Hkv}"
    rows = f"S{S}" if Skv == S else f"S{S}_{Skv}"
    precision = "" if dtype == "float32" else f"-{dtype}"
    name = f"{layer}-{direction}-B{B}-{heads}-{rows}-E{E}{options.suffix()}{precision}"
    return AttentionCase(name, layer, B, H, Hkv, S, Skv, E, dtype, direction, options)


# (B, H, S, E): one that fits the caches, two that do not.
GRID: tuple[tuple[int, int, int, int], ...] = (
    (4, 8, 512, 64),
    (1, 16, 2048, 64),
    (1, 8, 4096, 128),
)
_VARIED = (
    AttentionOptions(dropout=0.1),
    AttentionOptions(window=(64, 0)),
    AttentionOptions(bias=True),
)
# Work must grow with the visible pairs only. torch's equivalent of a window is a mask of Sq x Skv.
_CAUSAL_LENGTHS = (256, 1024, 4096, 16384)
_WINDOW_LENGTHS = (256, 1024, 4096, 8192)


def attention_suite() -> list[AttentionCase]:
    """The cases of the table of figures."""
    cases = []
    directions: tuple[Direction, ...] = ("inference", "training")
    for direction in directions:
        for B, H, S, E in GRID:
            for causal in (False, True):
                options = AttentionOptions(causal=causal)
                cases.append(make_attention_case(direction, B=B, H=H, S=S, E=E, options=options))
        for options in _VARIED:
            cases.append(make_attention_case(direction, B=4, H=8, S=512, E=64, options=options))
        ragged = AttentionOptions(ragged=True)
        cases.append(make_attention_case(direction, B=8, H=8, S=512, E=64, options=ragged))
        for need_weights in (False, True):
            options = AttentionOptions(need_weights=need_weights)
            cases.append(
                make_attention_case(direction, B=8, H=8, S=256, E=64, layer="mha", options=options)
            )
    cases.append(make_attention_case("inference", B=1, H=8, S=1, E=64))
    options = AttentionOptions(probes=("read_bandwidth",))
    for Hkv in (32, 8):
        cases.append(
            make_attention_case(
                "inference", B=1, H=32, Hkv=Hkv, S=1, Skv=4096, E=128, options=options
            )
        )
    for options, lengths in (
        (AttentionOptions(causal=True), _CAUSAL_LENGTHS),
        (AttentionOptions(window=(256, 0)), _WINDOW_LENGTHS),
    ):
        for S in lengths:
            cases.append(make_attention_case("inference", B=1, H=4, S=S, E=64, options=options))
    return cases


# Rows of one sequence in training, over which memory is followed.
MEMORY_LENGTHS = (256, 512, 1024, 2048, 4096)


def memory_cases() -> list[AttentionCase]:
    """Training on one sequence that gets longer and longer."""
    options = AttentionOptions(probes=("peak_memory",))
    return [
        make_attention_case("training", B=1, H=8, S=S, E=64, options=options)
        for S in MEMORY_LENGTHS
    ]
