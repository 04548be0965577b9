"""Work and compulsory traffic of every layer, as pure numbers.

The one place of these formulas: benchmark cases, the profiler and the ops' flop counts read them.
No torch here.

Work is that of the matrix products, a multiply-add counted as two operations; the element-wise part
is left out, as is customary. Traffic is in elements and *compulsory*: every array is moved once per
use, as if caches were perfect in between. Backward counts only the gradients that are asked for.
"""

from __future__ import annotations

from typing import NamedTuple

from fastseq._cells import CELLS

__all__ = [
    "ELEMENT_BYTES",
    "AttentionSizes",
    "LinearSizes",
    "NormSizes",
    "OwnCell",
    "RecurrentSizes",
    "Traffic",
]

ELEMENT_BYTES: dict[str, int] = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}


class Traffic(NamedTuple):
    """Elements (or bytes) that a call has to move."""

    read: int
    written: int

    @property
    def total(self) -> int:
        """Read and written together."""
        return self.read + self.written

    def plus(self, other: Traffic) -> Traffic:
        """The traffic of both."""
        return Traffic(self.read + other.read, self.written + other.written)

    def times(self, factor: int) -> Traffic:
        """So many of them; with an element's size: elements to bytes."""
        return Traffic(self.read * factor, self.written * factor)


class OwnCell(NamedTuple):
    """A user's cell in numbers.

    Attributes:
        input_gates: Row blocks of the input weights.
        hidden_gates: Row blocks of the recurrent weights.
        states: States per unit.
        saved: Values per unit and row that forward keeps.
        parameters: Learned values per unit.
    """

    input_gates: int
    hidden_gates: int
    states: int
    saved: int
    parameters: int


class RecurrentSizes(NamedTuple):
    """One recurrent layer.

    Attributes:
        cell: A name of ``fastseq._cells.CELLS``, or any name with ``own``.
        rows: (step, sequence) pairs that exist: T*B when nothing is padded.
        batch: Sequences, B.
        input_size: I.
        hidden_size: H.
        projection_size: P, or 0 without a projection.
        directions: D, 1 or 2.
        bias: Whether there are bias vectors.
        own: What ``CELLS`` says of other cells.
    """

    cell: str
    rows: int
    batch: int
    input_size: int
    hidden_size: int
    projection_size: int = 0
    directions: int = 1
    bias: bool = True
    own: OwnCell | None = None

    @property
    def output_size(self) -> int:
        """Width of one direction's hidden state: the projection's, if there is one."""
        return self.projection_size or self.hidden_size

    @property
    def gate_rows(self) -> int:
        """Rows of the input weight matrix, G*H."""
        gates = self.own.input_gates if self.own is not None else CELLS[self.cell].gates
        return gates * self.hidden_size

    @property
    def recurrent_rows(self) -> int:
        """Rows of the recurrent weight matrix."""
        return self.gate_rows if self.own is None else self.own.hidden_gates * self.hidden_size

    @property
    def states(self) -> int:
        """States per unit."""
        if self.own is not None:
            return self.own.states
        return 2 if CELLS[self.cell].has_cell_state else 1

    @property
    def saved(self) -> int:
        """Values per unit and row that backward reads: gates, and states but the output."""
        if self.own is not None:
            return self.own.saved
        return CELLS[self.cell].gates + self.states - 1

    def input_product(self) -> int:
        """Operations of one product of all rows with the input weights, in all directions."""
        return 2 * self.rows * self.directions * self.gate_rows * self.input_size

    def recurrent_product(self) -> int:
        """Operations of one product of all rows with the recurrent weights."""
        return 2 * self.rows * self.directions * self.recurrent_rows * self.output_size

    def projection(self) -> int:
        """Operations of one product of all rows with the projection."""
        return 2 * self.rows * self.directions * self.hidden_size * self.projection_size

    def forward_flops(self) -> int:
        """``2*rows*G*H*(I+H)`` per direction; projected ``2*rows*(G*H*(I+P) + H*P)``."""
        return self.input_product() + self.recurrent_product() + self.projection()

    def weight_gradient(self) -> int:
        """Operations of the gradients of all weights: as many as forward."""
        return self.forward_flops()

    def handed_back(self, rows: int | None = None) -> int:
        """Operations of the way back through time.

        Args:
            rows: Those of all directions that hand a gradient on to the step before; all of them
                unless given. The step that a direction begins with hands nothing on where the
                initial state has no gradient.
        """
        if rows is None:
            return self.recurrent_product()
        return 2 * rows * self.recurrent_rows * self.output_size

    def backward_flops(
        self, needs_x: bool = True, needs_w: bool = True, handed_on: int | None = None
    ) -> int:
        """The way back through time, and the gradients of input and weights where asked for."""
        flops = self.handed_back(handed_on) + self.projection()
        if needs_x:
            flops += self.input_product()
        if needs_w:
            flops += self.weight_gradient()
        return flops

    def recurrent_weights(self) -> int:
        """Weights that every step reads, in all directions."""
        projection = self.hidden_size * self.projection_size
        return self.directions * (self.recurrent_rows * self.output_size + projection)

    def weights(self) -> int:
        """Weights and biases."""
        biases = self.gate_rows + self.recurrent_rows if self.bias else 0
        learned = self.own.parameters * self.hidden_size if self.own is not None else 0
        return self.recurrent_weights() + self.directions * (
            self.gate_rows * self.input_size + biases + learned
        )

    def _saved(self) -> int:
        return self.directions * self.rows * self.saved * self.hidden_size

    def forward_traffic(self, training: bool = False) -> Traffic:
        """Weights, input and states read; output and states written; in training the gates too."""
        state = self.directions * self.batch * self.hidden_size * self.states
        outputs = self.rows * self.output_size * self.directions
        return Traffic(
            self.weights() + self.rows * self.input_size + state,
            outputs + state + (self._saved() if training else 0),
        )

    def backward_traffic(self, needs_x: bool = True, needs_w: bool = True) -> Traffic:
        """Gates, weights, output and its gradient read, the input for the weights' gradient.

        Written are the gradients of input and weights.
        """
        inputs = self.rows * self.input_size
        outputs = self.rows * self.output_size * self.directions
        return Traffic(
            self._saved() + self.weights() + 2 * outputs + (inputs if needs_w else 0),
            (inputs if needs_x else 0) + (self.weights() if needs_w else 0),
        )


class AttentionSizes(NamedTuple):
    """One call of attention.

    Attributes:
        heads: Query heads, Hq.
        kv_heads: Key and value heads, Hkv.
        query_rows: Queries of one head over all sequences: B*Sq when nothing is padded.
        key_rows: Keys of one head over all sequences.
        key_size: Size of a query or key, E.
        value_size: Size of a value, Ev.
        pairs: (query, key) pairs of one head over all sequences that take part.
    """

    heads: int
    kv_heads: int
    query_rows: int
    key_rows: int
    key_size: int
    value_size: int
    pairs: int

    def scores(self) -> int:
        """Operations of one product of queries with keys (or of their gradients)."""
        return 2 * self.pairs * self.heads * self.key_size

    def values(self) -> int:
        """Operations of one product of weights with values (or of their gradients)."""
        return 2 * self.pairs * self.heads * self.value_size

    def forward_flops(self) -> int:
        """``2*pairs*(E + Ev)`` per head."""
        return self.scores() + self.values()

    def backward_flops(
        self, needs_query: bool = True, needs_key: bool = True, needs_value: bool = True
    ) -> int:
        """``2*pairs*(3*E + 2*Ev)`` per head: scores again, gradients of weights, q, k and v."""
        flops = self.scores() * (1 + needs_query + needs_key) + self.values() * needs_value
        return flops + self.values()

    def _values(self) -> int:
        return self.kv_heads * self.key_rows * self.value_size

    def _outputs(self) -> int:
        return self.heads * self.query_rows * self.value_size

    def forward_traffic(self, bias: int = 0) -> Traffic:
        """Query, key, value and ``bias`` elements of an additive bias read, the output written."""
        rows = self.heads * self.query_rows + self.kv_heads * self.key_rows
        return Traffic(rows * self.key_size + self._values() + bias, self._outputs())

    def backward_traffic(
        self,
        bias: int = 0,
        needs_query: bool = True,
        needs_key: bool = True,
        needs_value: bool = True,
    ) -> Traffic:
        """What forward read and wrote, and the output's gradient, read; gradients written.

        ``bias``: elements of an additive bias that has a gradient.
        """
        queries = self.heads * self.query_rows * self.key_size
        keys = self.kv_heads * self.key_rows * self.key_size
        read = queries + keys + self._values() + 2 * self._outputs() + bias
        written = queries * needs_query + keys * needs_key + self._values() * needs_value
        return Traffic(read, written + bias)


class LinearSizes(NamedTuple):
    """A linear layer: M rows, K features in, N out."""

    M: int
    K: int
    N: int

    def product(self) -> int:
        """Operations of one of its products, ``2*M*K*N``."""
        return 2 * self.M * self.K * self.N

    def backward_flops(self, needs_input: bool = True, needs_weight: bool = True) -> int:
        """A product for each gradient that is asked for."""
        return self.product() * (needs_input + needs_weight)

    def weights(self) -> int:
        """Weights and biases."""
        return self.N * self.K + self.N

    def forward_traffic(self, residual: bool = False, saves: bool = False) -> Traffic:
        """Weights, input and residual read, output written, and what an activation saves."""
        outputs = self.M * self.N
        read = self.weights() + self.M * self.K + outputs * residual
        return Traffic(read, outputs * (1 + saves))

    def backward_traffic(self, needs_input: bool = True, needs_weight: bool = True) -> Traffic:
        """The output's gradient read; weights for the input's gradient, input for the weights'."""
        inputs = self.M * self.K
        read = written = 0
        if needs_input:
            read, written = self.weights(), inputs
        if needs_weight:
            read, written = read + inputs, written + self.weights()
        return Traffic(self.M * self.N + read, written)


class NormSizes(NamedTuple):
    """A norm of M rows of F features; ``parameters``: 2 with weight and bias, 1 with a weight."""

    M: int
    F: int
    parameters: int

    def forward_traffic(self, residual: bool = False, keeps_sum: bool = False) -> Traffic:
        """Input, residual and parameters read; output written, and the sum where it is kept."""
        elements = self.M * self.F
        return Traffic(
            elements * (1 + residual) + self.F * self.parameters, elements * (1 + keeps_sum)
        )

    def backward_traffic(
        self,
        needs_x: bool = True,
        needs_parameters: bool = True,
        grad_sum: bool = False,
        two_gradients: bool = False,
    ) -> Traffic:
        """The sum, the output's gradient and parameters read; one gradient for both inputs.

        With dropout the input's is another (``two_gradients``). ``grad_sum``: the sum is a result
        too, and its gradient read.
        """
        elements, parameters = self.M * self.F, self.F * self.parameters
        return Traffic(
            elements * (2 + grad_sum) + parameters,
            elements * (needs_x + two_gradients) + parameters * needs_parameters,
        )
