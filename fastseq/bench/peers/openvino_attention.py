"""The attention function in openvino's operators, in every form that may be its fastest."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastseq.bench.attention import BuiltAttention
from fastseq.bench.peers import masks
from fastseq.bench.peers.openvino_operators import OpenvinoOperators


def models(built: BuiltAttention) -> list[Callable[[OpenvinoOperators], Any]]:
    """Writers of equivalent graphs, to be tried side by side; each returns the output."""
    case = built.case
    if case.Sq == 1 and masks.bias(built) is None:
        # On a 2-core Cascade Lake, one query, 4096 keys, 32 heads of 128: turned 8.5 ms,
        # products 26, openvino's operator 74; torch 10.
        return [lambda make: _turned(make, built), lambda make: _operator(make, built)]
    writers: list[Callable[[OpenvinoOperators], Any]] = [lambda make: _operator(make, built)]
    if masks.scores_fit(built):
        # B4 H8 S512 E64, ms: operator 24.4, products 23.4; causal 25.1 and 19.9.
        writers.append(lambda make: _products(make, built))
    return writers


def _inputs(make: OpenvinoOperators, built: BuiltAttention, *, repeat: bool) -> list[Any]:
    """Query, key and value, and the mask if there is one; keys repeated for groups of heads."""
    case = built.case
    found = [make.input(name, built.leaves[name].detach()) for name in ("query", "key", "value")]
    if repeat and case.Hq != case.Hkv:
        group = case.Hq // case.Hkv
        found[1:] = [_repeated(make, built, value, group) for value in found[1:]]
    added = masks.bias(built)
    if added is not None:
        found.append(make.input("mask", added.contiguous()))
    return found


def _repeated(make: OpenvinoOperators, built: BuiltAttention, value: Any, group: int) -> Any:
    case = built.case
    operators = make.operators
    wide = make.integers(case.B, case.Hkv, group, case.Skv, case.E)
    apart = operators.broadcast(operators.unsqueeze(value, make.integers(2)), wide)
    return operators.reshape(apart, make.integers(case.B, case.Hq, case.Skv, case.E), False)


def _scale(make: OpenvinoOperators, built: BuiltAttention, query: Any) -> Any:
    return make.operators.multiply(query, make.number(built.case.E**-0.5))


def _operator(make: OpenvinoOperators, built: BuiltAttention) -> Any:
    """The operator for it."""
    inputs = _inputs(make, built, repeat=True)
    causal = masks.causal(built)
    return make.operators.scaled_dot_product_attention(*inputs, causal=causal).output(0)


def _products(make: OpenvinoOperators, built: BuiltAttention) -> Any:
    """Two products and a softmax."""
    query, key, value, *added = _inputs(make, built, repeat=True)
    operators = make.operators
    scores = operators.matmul(_scale(make, built, query), key, False, True)
    if masks.causal(built):
        scores = operators.add(scores, make.constant(masks.causal_bias(built)))
    for mask in added:
        scores = operators.add(scores, mask)
    return operators.matmul(operators.softmax(scores, 3), value, False, False).output(0)


def _turned(make: OpenvinoOperators, built: BuiltAttention) -> Any:
    """One query: keys from the left, which openvino multiplies faster; groups as columns."""
    case = built.case
    query, key, value = _inputs(make, built, repeat=False)
    operators = make.operators
    columns = make.integers(case.B, case.Hkv, case.Hq // case.Hkv, case.E)
    query = _scale(make, built, operators.reshape(query, columns, False))
    scores = operators.matmul(key, query, False, True)
    mixed = operators.matmul(operators.softmax(scores, 2), value, True, False)
    return operators.reshape(mixed, make.integers(case.B, case.Hq, 1, case.E), False).output(0)
