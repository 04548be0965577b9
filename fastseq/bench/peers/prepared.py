"""What a peer library hands to the runner, and how it says that it cannot run a case."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from fastseq.bench.attention import BuiltAttention
from fastseq.bench.build import BuiltCase
from fastseq.bench.generation import BuiltGeneration
from fastseq.bench.transformer import BuiltTransformer

AnyBuilt = BuiltCase | BuiltAttention | BuiltTransformer | BuiltGeneration


class PeerSkippedError(Exception):
    """A peer does not run a case; the message says why, in a few words."""


@dataclass
class PreparedPeer:
    """A case loaded into a peer library.

    Attributes:
        call: What is timed: inputs bound beforehand, outputs allocated beforehand.
        output: Runs once more and gives the results by name ("output", "hidden", "cell",
            "weights"): fresh tensors, padded and laid out as torch's.
        setup_seconds: Time it took to build and load the model.
    """

    call: Callable[[], object]
    output: Callable[[], dict[str, Tensor]]
    setup_seconds: float
