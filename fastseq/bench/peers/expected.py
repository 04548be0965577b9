"""torch's results of a case, which a peer's have to agree with before it is timed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence

from fastseq.bench import attention
from fastseq.bench.attention import BuiltAttention
from fastseq.bench.build import BuiltCase
from fastseq.bench.peers.prepared import AnyBuilt
from fastseq.bench.transformer import BuiltTransformer

_RELATIVE, _ABSOLUTE = 1e-4, 1e-5


def expected(built: AnyBuilt) -> dict[str, Tensor]:
    """What torch computes in one forward, by name.

    Raises:
        TypeError: The case is one of generation, which has no single output.
    """
    with torch.no_grad():
        if isinstance(built, BuiltCase):
            return _recurrent(built)
        if isinstance(built, BuiltAttention):
            results = attention.outputs(built, "torch", built.leaves, built.modules.get("torch"))
            return dict(zip(("output", "weights"), results, strict=False))
        if isinstance(built, BuiltTransformer):
            callee: Any = built.callees["torch"]
            if isinstance(callee, torch.nn.Module):
                return {"output": callee(*built.leaves.values(), **built.masks)}
            return {"output": callee(**built.leaves)}
    raise TypeError(f"no single output: {type(built).__name__}")


def _recurrent(built: BuiltCase) -> dict[str, Tensor]:
    output, final = built.torch_layer(built.input, built.state)
    if isinstance(output, PackedSequence):
        output = pad_packed_sequence(output)[0]
    states = final if isinstance(final, tuple) else (final,)
    return {"output": output} | dict(zip(("hidden", "cell"), states, strict=False))


def agrees(built: AnyBuilt, output: dict[str, Tensor]) -> bool:
    """Whether a peer's results are torch's, up to ordinary float32 rounding.

    Every result of torch has to be there, in its shape and dtype. Rows that are padding may hold
    anything.
    """
    return matches(built, output, expected(built))


def matches(built: AnyBuilt, output: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    """The same with torch's results at hand."""
    for name, exact in theirs.items():
        found = output.get(name)
        if found is None or found.shape != exact.shape or found.dtype != exact.dtype:
            return False
        if isinstance(built, BuiltTransformer) and built.valid is not None:
            found, exact = found[built.valid], exact[built.valid]
        if not torch.allclose(found, exact, rtol=_RELATIVE, atol=_ABSOLUTE):
            return False
    return True
