"""The Transformer part of the case registry: shapes, options, models of work and traffic.

Like ``cases.py``, which puts it into a suite, this needs neither torch nor the extension.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Literal

from fastseq._work import ELEMENT_BYTES, LinearSizes, NormSizes

Direction = Literal["inference", "training"]

NORMS = ("layer_norm", "rms_norm")
STACKS = ("encoder", "decoder", "transformer", "generation")
TRANSFORMER_LAYERS = ("linear", *NORMS, *STACKS)

# Entries of the vocabulary that generation chooses from.
VOCABULARY = 1000


@dataclass(frozen=True)
class TransformerOptions:
    """What a case has beyond its shape.

    Attributes:
        activation: Of a linear case: ``fastseq.functional.linear``'s name for it, or None.
        residual: A linear case adds a residual at the end.
        dropout: Probability, in training: of a linear case behind the activation, of a layer
            wherever ``torch.nn`` has it.
        ragged: An encoder's sequences have lengths uniform from an eighth of S to S, given as a
            key padding mask.
        memory: Generation attends to a memory of S rows, through cross-attention.
        probes: Names of extra measurements, see ``fastseq.bench.probes``.
    """

    activation: str | None = None
    residual: bool = False
    dropout: float = 0.0
    ragged: bool = False
    memory: bool = False
    probes: tuple[str, ...] = ()

    # No case here is about denormal numbers; the picture asks every case.
    denormal = False

    def words(self) -> list[str]:
        """The options in names and tables."""
        words = []
        if self.activation is not None:
            words.append(self.activation)
        if self.residual:
            words.append("residual")
        if self.dropout:
            words.append(f"dropout{self.dropout:g}")
        if self.ragged:
            words.append("ragged")
        if self.memory:
            words.append("memory")
        return words

    def suffix(self) -> str:
        """The part of a case's name that these options add."""
        return "".join(f"-{word}" for word in self.words())


@dataclass(frozen=True)
class TransformerCase:
    """A layer, a part of one, or a whole model at one shape, in one direction of use.

    Attributes:
        name: Unique name; globs on the command line match against it.
        layer: "linear", "layer_norm", "rms_norm" (these with a residual), "encoder", "decoder"
            (one layer each; the decoder's with the causal mask and a memory of the same shape),
            "transformer" (``depth`` encoder and decoder layers) or "generation" (greedy, S tokens
            by ``depth`` decoder layers).
        B: Batch size; 1 for linear layers and norms, whose rows are S.
        S: Rows of a sequence.
        E: Features.
        F: Features out of a linear layer, or between the two of a feed-forward part; 0 for norms.
        heads: Heads of attention.
        depth: Layers of a stack.
        dtype: Name of the torch dtype.
        direction: "inference" (forward without gradients) or "training" (forward and backward,
            gradients for all inputs and parameters).
        options: Everything else.
        tags: Suites and figures that the case belongs to.
    """

    name: str
    layer: str
    B: int
    S: int
    E: int
    F: int = 0
    heads: int = 1
    depth: int = 1
    dtype: str = "float32"
    direction: Direction = "inference"
    options: TransformerOptions = field(default_factory=TransformerOptions)
    tags: tuple[str, ...] = ()

    @property
    def plain(self) -> bool:
        """A shape and nothing else, but for the dropout that layers have by default."""
        return not self.words

    @property
    def streaming(self) -> bool:
        """No case here is one step of a recurrence."""
        return False

    @property
    def shape_label(self) -> str:
        """The shape in a few characters, for pictures and tables."""
        if self.layer == "linear":
            return f"{self.S}x{self.E} to {self.F}"
        if self.layer in NORMS:
            return f"{self.S}x{self.E}"
        depth = f" {self.depth} layers" if self.depth > 1 else ""
        return f"B{self.B} S{self.S} E{self.E} F{self.F}{depth}"

    @property
    def words(self) -> str:
        """The options that set a row of a table apart.

        A layer's dropout is not among them: inference has none and belongs into the same row.
        """
        dropout = f"dropout{self.options.dropout:g}"
        hidden = {dropout} if self.layer != "linear" else set()
        return ", ".join(word for word in self.options.words() if word not in hidden)

    def lengths(self) -> list[int]:
        """Valid rows of each sequence, in batch order; the longest is always S."""
        if not self.options.ragged:
            return [self.S] * self.B
        generator = random.Random(f"{self.S}x{self.B}")
        lengths = [generator.randint(self.S // 8, self.S) for _ in range(self.B)]
        lengths[generator.randrange(self.B)] = self.S
        return lengths

    def rows(self) -> int:
        """Terms that the longest sum of a result has beside those over features."""
        return self.B * self.S

    def layer_weights(self, *, cross: bool) -> int:
        """Weights and biases of an encoder or (with cross-attention) a decoder layer."""
        attention = 4 * self.E * self.E + 4 * self.E
        feed_forward = 2 * self.E * self.F + self.F + self.E
        blocks = 2 if cross else 1
        return blocks * attention + feed_forward + (blocks + 1) * 2 * self.E

    def weight_elements(self) -> int:
        """Number of weights and biases that one use reads."""
        if self.layer == "linear":
            return self.F * self.E + self.F
        if self.layer in NORMS:
            return self.E * (2 if self.layer == "layer_norm" else 1)
        if self.layer == "encoder":
            return self.layer_weights(cross=False)
        if self.layer == "decoder":
            return self.layer_weights(cross=True)
        if self.layer == "transformer":
            # Both stacks end in a norm of their own.
            both = self.layer_weights(cross=False) + self.layer_weights(cross=True)
            return self.depth * both + 4 * self.E
        return self.depth * self.layer_weights(cross=self.options.memory) + self._output_weights()

    def _output_weights(self) -> int:
        return VOCABULARY * self.E + VOCABULARY

    def _pairs(self, *, causal: bool) -> int:
        """(query, key) pairs of one head, over all sequences, that no mask rules out."""
        if causal:
            return self.B * self.S * (self.S + 1) // 2
        return self.S * sum(self.lengths())  # padded queries have results too

    def _multiply_adds(self) -> tuple[int, int]:
        """Of the products with weights, and of attention's two products."""
        rows, width = self.B * self.S, self.E * self.E
        feed_forward = 2 * self.E * self.F
        encoder = (rows * (4 * width + feed_forward), 2 * self.E * self._pairs(causal=False))
        crossed = self.layer == "decoder" or self.layer == "transformer" or self.options.memory
        decoder = (
            rows * ((8 if crossed else 4) * width + feed_forward),
            2 * self.E * (self._pairs(causal=True) + (self._pairs(causal=False) * crossed)),
        )
        if self.layer == "encoder":
            return encoder
        if self.layer == "decoder":
            return decoder
        if self.layer == "transformer":
            return self.depth * (encoder[0] + decoder[0]), self.depth * (encoder[1] + decoder[1])
        return self.depth * decoder[0] + rows * VOCABULARY * self.E, self.depth * decoder[1]

    def flops(self) -> int:
        """Floating-point operations of the matrix products, a multiply-add counted as two.

        ``2*S*E*F`` for a linear layer; per row ``2*(4*E*E + 2*E*F)`` for an encoder layer and
        ``2*(8*E*E + 2*E*F)`` for a decoder layer, plus ``4*E`` per visible pair of query and key.
        Training is three times that, for attention's products seven halves, the scores being
        computed again. Generation counts every position once, as a cache permits; the memory's
        projection is part of it. Norms have no matrix product: 0.
        """
        if self.layer in NORMS:
            return 0
        training = self.direction == "training"
        if self.layer == "linear":
            linear = LinearSizes(self.S, self.E, self.F)
            return linear.product() + (linear.backward_flops() if training else 0)
        products, attention = self._multiply_adds()
        if training:
            return 2 * 3 * products + 7 * attention
        return 2 * (products + attention)

    def bytes(self) -> int:
        """Compulsory memory traffic: every array moved once per use, caches otherwise perfect.

        A use reads weights and inputs and writes the output. Training reads the weights once more
        and writes their gradients, reads the output's gradient and writes the inputs'. Of what
        lies between, only what backward needs of a norm counts: the sum of input and residual,
        written and read. Generation reads all weights for every token, and the keys and values
        of all earlier positions (and of the memory).
        """
        training = self.direction == "training"
        size = ELEMENT_BYTES[self.dtype]
        weights, rows = self.weight_elements(), self.B * self.S
        if self.layer == "generation":
            held = self._pairs(causal=True) + (self.S * self.S * self.B * self.options.memory)
            # The weights that project the memory are read once.
            memory = self.depth * 2 * (self.E * self.E + self.E) * self.options.memory
            weights = self.S * (weights - memory) + memory
            return size * (weights + self.depth * 2 * self.E * held)
        if self.layer in NORMS:
            # One gradient serves input and residual.
            norm = NormSizes(rows, self.E, 2 if self.layer == "layer_norm" else 1)
            elements = norm.forward_traffic(residual=True, keeps_sum=training).total
            return size * (elements + (norm.backward_traffic().total if training else 0))
        if self.layer == "linear":
            linear = LinearSizes(rows, self.E, self.F)
            elements = linear.forward_traffic(self.options.residual).total
            return size * (elements + (linear.backward_traffic().total if training else 0))
        outputs = rows * self.E
        inputs = 2 * outputs if self.layer in ("decoder", "transformer") else outputs
        elements = weights + inputs + outputs
        if training:
            elements += 2 * weights + 2 * inputs + outputs
        return size * elements


def make_transformer_case(
    layer: str,
    direction: Direction,
    *,
    S: int,
    E: int,
    B: int = 1,
    F: int = 0,
    heads: int = 1,
    depth: int = 1,
    dtype: str = "float32",
    options: TransformerOptions | None = None,
) -> TransformerCase:
    """Build a case named after its contents."""
    options = options or TransformerOptions()
    if layer not in TRANSFORMER_LAYERS:
        raise ValueError(f"layer must be one of {', '.join(TRANSFORMER_LAYERS)}, got {layer!r}")
    if layer == "generation" and direction == "training":
        raise ValueError("direction must be 'inference' for generation, got 'training'")
    if options.dropout and direction == "inference":
        raise ValueError(f"dropout must be 0 in inference, got {options.dropout}")
    if layer == "linear":
        shape = f"{S}x{E}-{F}"
    elif layer in NORMS:
        shape = f"{S}x{E}"
    else:
        shape = f"B{B}-S{S}-E{E}-F{F}-H{heads}" + (f"-layers{depth}" if depth > 1 else "")
    precision = "" if dtype == "float32" else f"-{dtype}"
    name = f"{layer}-{direction}-{shape}{options.suffix()}{precision}"
    return TransformerCase(name, layer, B, S, E, F, heads, depth, dtype, direction, options)


_DIRECTIONS: tuple[Direction, ...] = ("inference", "training")
_LINEAR_ROWS = (2048, 64, 1)
# A norm's arrays within the caches of one core, within the last cache, and beyond it.
_NORM_ROWS = (256, 4096, 65536)
_DROPOUT = 0.1


def transformer_suite() -> list[TransformerCase]:
    """The cases of the table of figures."""
    cases = []
    for direction in _DIRECTIONS:
        for rows in _LINEAR_ROWS:
            cases.append(make_transformer_case("linear", direction, S=rows, E=512, F=2048))
        training = direction == "training"
        dropout = _DROPOUT if training else 0.0
        for options in (
            TransformerOptions(activation="gelu"),
            TransformerOptions(residual=True, dropout=dropout),
        ):
            cases.append(
                make_transformer_case("linear", direction, S=2048, E=512, F=2048, options=options)
            )
        copied = TransformerOptions(probes=("copy_bandwidth",))
        for layer in NORMS:
            for rows in _NORM_ROWS:
                cases.append(make_transformer_case(layer, direction, S=rows, E=512, options=copied))
        probes = ("peak_memory",) if training else ()
        for layer, ragged in (("encoder", False), ("encoder", True), ("decoder", False)):
            options = TransformerOptions(dropout=dropout, ragged=ragged, probes=probes)
            cases.append(
                make_transformer_case(
                    layer, direction, B=8, S=256, E=512, F=2048, heads=8, options=options
                )
            )
        options = TransformerOptions(dropout=dropout, probes=probes)
        cases.append(
            make_transformer_case(
                "transformer",
                direction,
                B=16,
                S=64,
                E=256,
                F=1024,
                heads=8,
                depth=6,
                options=options,
            )
        )
    for memory in (False, True):
        options = TransformerOptions(memory=memory, probes=("read_bandwidth",))
        cases.append(
            make_transformer_case(
                "generation", "inference", S=256, E=512, F=2048, heads=8, depth=6, options=options
            )
        )
    return cases
