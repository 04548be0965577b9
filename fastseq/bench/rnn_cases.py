"""The recurrent part of the case registry: shapes, options, models of work and traffic.

Like ``cases.py``, which puts it into suites, this needs neither torch nor the extension.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Literal

from fastseq import _cells
from fastseq._work import ELEMENT_BYTES, RecurrentSizes, Traffic

Direction = Literal["inference", "training"]

# Gates per layer kind: how many rows of length H each weight matrix stacks.
GATES = {"lstm": _cells.GATES["lstm"], "gru": _cells.GATES["gru"], "rnn": _cells.GATES["rnn_tanh"]}


@dataclass(frozen=True)
class CaseOptions:
    """What a case has beyond its shape.

    Attributes:
        num_layers: Stacked layers.
        bidirectional: Run a second direction from the end to the start.
        proj_size: Size of the LSTM's output projection; 0 for none.
        bias: Whether the layer has bias vectors.
        ragged: The input is a ``PackedSequence`` with lengths uniform over 1..T.
        denormal: Inputs and initial states hold denormal numbers only.
        probes: Names of extra measurements, see ``fastseq.bench.probes``.
    """

    num_layers: int = 1
    bidirectional: bool = False
    proj_size: int = 0
    bias: bool = True
    ragged: bool = False
    denormal: bool = False
    probes: tuple[str, ...] = ()

    def suffix(self) -> str:
        """The part of a case's name that these options add."""
        words = []
        if self.num_layers > 1:
            words.append(f"layers{self.num_layers}")
        if self.bidirectional:
            words.append("bidirectional")
        if self.proj_size:
            words.append(f"proj{self.proj_size}")
        if not self.bias:
            words.append("nobias")
        if self.ragged:
            words.append("ragged")
        if self.denormal:
            words.append("denormal")
        return "".join(f"-{word}" for word in words)


@dataclass(frozen=True)
class Case:
    """One layer at one shape, in one direction of use.

    Attributes:
        name: Unique name; globs on the command line match against it.
        layer: "lstm", "gru" or "rnn".
        T: Time steps.
        B: Batch size.
        I: Input size.
        H: Hidden size.
        dtype: Name of the torch dtype.
        direction: "inference" (forward without gradients) or "training" (forward and backward,
            gradients for the input and every weight).
        options: Everything else.
        tags: Suites and figures that the case belongs to.
    """

    name: str
    layer: str
    T: int
    B: int
    I: int  # noqa: E741  the field's name for the input size
    H: int
    dtype: str = "float32"
    direction: Direction = "inference"
    options: CaseOptions = field(default_factory=CaseOptions)
    tags: tuple[str, ...] = ()

    @property
    def streaming(self) -> bool:
        """One step at a time, with the state carried by the caller."""
        return self.T == 1 and self.direction == "inference"

    @property
    def plain(self) -> bool:
        """A shape and nothing else; means over cases are taken over these."""
        return not self.options.suffix()

    @property
    def shape_label(self) -> str:
        """The shape in a few characters, for pictures and tables."""
        return f"T{self.T} B{self.B} H{self.H}"

    @property
    def output_size(self) -> int:
        """Width of one direction's hidden state: the projection's, if there is one."""
        return self.options.proj_size or self.H

    def lengths(self) -> list[int]:
        """Valid steps of each sequence, in batch order; the longest is always T."""
        if not self.options.ragged:
            return [self.T] * self.B
        generator = random.Random(f"{self.T}x{self.B}")
        lengths = [generator.randint(1, self.T) for _ in range(self.B)]
        lengths[generator.randrange(self.B)] = self.T
        return lengths

    def rows(self) -> int:
        """(step, sequence) pairs that have to be computed: T*B when nothing is padded."""
        return sum(self.lengths())

    def _layers(self) -> list[RecurrentSizes]:
        """The stacked layers, from the input up."""
        directions = 2 if self.options.bidirectional else 1
        cell, rows = "rnn_tanh" if self.layer == "rnn" else self.layer, self.rows()
        inputs = [self.I] + [self.output_size * directions] * (self.options.num_layers - 1)
        return [
            RecurrentSizes(
                cell,
                rows,
                self.B,
                size,
                self.H,
                self.options.proj_size,
                directions,
                self.options.bias,
            )
            for size in inputs
        ]

    def flops(self) -> int:
        """Floating-point operations of the matrix products, a multiply-add counted as two.

        One layer and direction takes ``2*T*B*G*H*(I+H)``; with a projection to R,
        ``2*T*B*(G*H*(I+R) + H*R)``. Training is three times that: forward, gradient of the
        data, gradient of the weights. The element-wise part is left out, as is customary.
        """
        training = self.direction == "training"
        return sum(
            layer.forward_flops() + (layer.backward_flops() if training else 0)
            for layer in self._layers()
        )

    def weight_elements(self) -> int:
        """Number of weights and biases."""
        return sum(layer.weights() for layer in self._layers())

    def bytes(self) -> int:
        """Compulsory memory traffic: every array moved once per use, caches otherwise perfect.

        Inference reads weights, input and initial states and writes output and final states;
        the sequence between stacked layers is written and read. Training also writes and reads
        the gates (and the LSTM's cell states) that backward needs, reads weights, input and
        output once more, and writes the gradients of weights and input; that of a stacked layer's
        input is read again by the layer below.
        """
        training = self.direction == "training"
        traffic = Traffic(0, 0)
        for layer in self._layers():
            traffic = traffic.plus(layer.forward_traffic(training))
            if training:
                traffic = traffic.plus(layer.backward_traffic())
        return traffic.total * ELEMENT_BYTES[self.dtype]


def make_case(
    layer: str,
    direction: Direction,
    *,
    T: int,
    B: int,
    H: int,
    I: int | None = None,  # noqa: E741
    dtype: str = "float32",
    options: CaseOptions | None = None,
) -> Case:
    """Build a case named after its contents; ``I`` is ``H`` unless given."""
    options = options or CaseOptions()
    if layer not in GATES:
        raise ValueError(f"layer must be one of {', '.join(GATES)}, got {layer!r}")
    if options.proj_size and layer != "lstm":
        raise ValueError(f"proj_size needs layer 'lstm', got {layer!r}")
    input_size = H if I is None else I
    shape = f"T{T}-B{B}-H{H}" if input_size == H else f"T{T}-B{B}-I{input_size}-H{H}"
    precision = "" if dtype == "float32" else f"-{dtype}"
    name = f"{layer}-{direction}-{shape}{options.suffix()}{precision}"
    return Case(name, layer, T, B, input_size, H, dtype, direction, options)


# (B, I=H) at T=100; small to beyond the last cache of one core.
RNN_GRID: tuple[tuple[int, int], ...] = ((1, 128), (1, 512), (16, 256), (32, 512), (64, 1024))
DIRECTIONS: tuple[Direction, ...] = ("inference", "training")

# The shape at which the extra questions are asked once per layer: big enough to be about the
# kernels, small enough to repeat.
_PROBED_SHAPE = (16, 256)
_PROBES: dict[str, tuple[str, ...]] = {
    "inference": ("first_call", "shape_sweep"),
    "training": ("peak_memory", "evaluation_mode"),
}


def rnn_suite() -> list[Case]:
    """The cases of the table of figures."""
    cases = []
    for layer in GATES:
        cases.append(make_case(layer, "inference", T=1, B=1, H=128))
        for direction in DIRECTIONS:
            for B, H in RNN_GRID:
                probes = _PROBES[direction] if (B, H) == _PROBED_SHAPE else ()
                options = CaseOptions(probes=probes)
                cases.append(make_case(layer, direction, T=100, B=B, H=H, options=options))
            denormal = CaseOptions(bias=False, denormal=True, probes=("denormal",))
            cases.append(make_case(layer, direction, T=100, B=16, H=256, options=denormal))
    for direction in DIRECTIONS:
        for B, H in ((16, 256), (32, 512)):
            for options in (CaseOptions(ragged=True), CaseOptions(proj_size=H // 4)):
                cases.append(make_case("lstm", direction, T=100, B=B, H=H, options=options))
        for layer in ("lstm", "gru"):
            options = CaseOptions(bidirectional=True)
            cases.append(make_case(layer, direction, T=100, B=16, H=256, options=options))
    return cases


# Batch by hidden size at T=100, the two axes of a heat map.
HEAT_MAP_BATCHES = (1, 4, 16, 64)
HEAT_MAP_HIDDEN = (64, 128, 256, 512, 1024)
# Layers and (B, H) whose latency is followed over the number of steps.
STEPS = (1, 3, 10, 30, 100, 300, 1000)
_STEPS_LAYERS = ("lstm", "gru")
_STEPS_SHAPES = ((1, 128), (16, 256))


def heat_map_cases() -> list[Case]:
    """Every layer and direction over a grid of batch and hidden size."""
    return [
        make_case(layer, direction, T=100, B=B, H=H)
        for layer in GATES
        for direction in DIRECTIONS
        for B in HEAT_MAP_BATCHES
        for H in HEAT_MAP_HIDDEN
    ]


def steps_cases() -> list[Case]:
    """Inference at one shape over more and more steps."""
    return [
        make_case(layer, "inference", T=T, B=B, H=H)
        for layer in _STEPS_LAYERS
        for B, H in _STEPS_SHAPES
        for T in STEPS
    ]
