"""Other libraries beside torch: the same case, each in its own fastest way.

``prepare`` builds a case for one of ``PEERS``, or says why that library does not run it;
``agrees`` holds what it computes against torch's results. torch itself, as it is and compiled, is
the runner's.
"""

from __future__ import annotations

from collections.abc import Callable

from fastseq.bench.generation import BuiltGeneration
from fastseq.bench.peers.expected import agrees
from fastseq.bench.peers.prepared import AnyBuilt, PeerSkippedError, PreparedPeer

__all__ = ["PEERS", "PeerSkippedError", "PreparedPeer", "agrees", "prepare"]

PEERS = ("onnxruntime", "openvino")


def prepare(name: str, built: AnyBuilt, threads: int) -> PreparedPeer:
    """Load a case into a library and find the fastest way of calling it.

    Args:
        name: One of ``PEERS``.
        built: The case; gradients are not needed.
        threads: Threads that the library may use.

    Raises:
        PeerSkippedError: The library is not installed or does not run this case; the message is
            the reason.
        ValueError: There is no such peer.
    """
    if name not in PEERS:
        raise ValueError(f"peer must be one of {', '.join(PEERS)}, got {name!r}")
    if isinstance(built, BuiltGeneration):
        raise PeerSkippedError("generation is a loop around a model, not one graph")
    if built.case.direction == "training":
        raise PeerSkippedError("inference only")
    try:
        return _LIBRARIES[name](built, threads)
    except ModuleNotFoundError as error:
        raise PeerSkippedError(f"not installed ({error.name})") from error


def _onnxruntime(built: AnyBuilt, threads: int) -> PreparedPeer:
    from fastseq.bench.peers import onnxruntime_peer

    return onnxruntime_peer.prepare(built, threads)


def _openvino(built: AnyBuilt, threads: int) -> PreparedPeer:
    from fastseq.bench.peers import openvino_peer

    return openvino_peer.prepare(built, threads)


_LIBRARIES: dict[str, Callable[[AnyBuilt, int], PreparedPeer]] = {
    "onnxruntime": _onnxruntime,
    "openvino": _openvino,
}
