"""``libfastseq_cuda``: where it is, why it is not used, its C ABI in ctypes. No torch here.

The structs below are those of ``csrc/fastseq_cuda.h`` and, for attention, ``csrc/fastseq.h``, field
by field; the library tells their sizes, and :class:`Library` refuses one that has others.

ctypes and not Cython, as for the CPU: the library is optional and comes without a build of anything
else, and a kernel launch takes longer than filling a struct does.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
from ctypes import c_char_p, c_double, c_int32, c_int64, c_uint64, c_void_p
from pathlib import Path
from typing import Any

from fastseq._cells import CELLS

__all__ = [
    "DTYPES",
    "MODES",
    "SWITCH",
    "AttentionBackward",
    "AttentionForward",
    "AttentionShape",
    "Heads",
    "Library",
    "Plan",
    "RnnBackward",
    "RnnForward",
    "RnnShape",
    "Rows",
    "Scores",
    "decide_early",
    "describe",
    "library",
    "off_reason",
]

SWITCH = "FASTSEQ_CUDA_UNTESTED"
FILE_NAME = "libfastseq_cuda.so"
MAX_DIRECTIONS = 2

# Numbers of the storage types and of the ways to launch a recurrent layer.
DTYPES = {"float32": 0, "float64": 1, "bfloat16": 2, "float16": 3}
MODES = {"auto": 0, "stepwise": 1, "persistent": 2, "direct": 3}

_Pair = c_void_p * MAX_DIRECTIONS


class RnnShape(ctypes.Structure):
    """``fastseq_cuda_rnn_shape``."""

    _fields_ = (
        ("steps", c_int64),
        ("batch", c_int64),
        ("hidden_size", c_int64),
        ("directions", c_int64),
        ("rows", c_int64),
        ("first_row", c_void_p),
    )


class RnnForward(ctypes.Structure):
    """``fastseq_cuda_rnn_forward``."""

    _fields_ = (
        ("shape", RnnShape),
        ("slots", _Pair),
        ("cells", _Pair),
        ("hidden_weights", _Pair),
        ("hidden_bias", _Pair),
        ("initial_hidden", c_void_p),
        ("initial_cell", c_void_p),
        ("final_hidden", c_void_p),
        ("final_cell", c_void_p),
        ("output", c_void_p),
        ("save", c_int32),
    )


class RnnBackward(ctypes.Structure):
    """``fastseq_cuda_rnn_backward``."""

    _fields_ = (
        ("shape", RnnShape),
        ("slots", _Pair),
        ("cells", _Pair),
        ("transposed_weights", _Pair),
        ("initial_hidden", c_void_p),
        ("initial_cell", c_void_p),
        ("output", c_void_p),
        ("grad_output", c_void_p),
        ("grad_final_hidden", c_void_p),
        ("grad_final_cell", c_void_p),
        ("slot_gradients", _Pair),
        ("direct", c_void_p),
        ("grad_cell", c_void_p),
    )


class Plan(ctypes.Structure):
    """``fastseq_cuda_plan``."""

    _fields_ = (
        ("mode", c_int32),
        ("units_per_block", c_int32),
        ("rows_per_block", c_int32),
        ("tile_rows", c_int32),
        ("grid", c_int32 * 3),
        ("shared_bytes", c_int32),
        ("barriers", c_int32),
    )


class Heads(ctypes.Structure):
    """``fastseq_heads``."""

    _fields_ = (
        ("data", c_void_p),
        ("batch_stride", c_int64),
        ("head_stride", c_int64),
        ("row_stride", c_int64),
    )


class Scores(ctypes.Structure):
    """``fastseq_scores``."""

    _fields_ = (
        ("data", c_void_p),
        ("batch_stride", c_int64),
        ("head_stride", c_int64),
        ("query_stride", c_int64),
        ("key_stride", c_int64),
    )


class Rows(ctypes.Structure):
    """``fastseq_rows``."""

    _fields_ = (("data", c_void_p), ("batch_stride", c_int64), ("head_stride", c_int64))


class AttentionShape(ctypes.Structure):
    """``fastseq_attention_shape``."""

    _fields_ = (
        ("batch", c_int64),
        ("heads", c_int64),
        ("kv_heads", c_int64),
        ("queries", c_int64),
        ("keys", c_int64),
        ("key_size", c_int64),
        ("value_size", c_int64),
        ("query_starts", c_void_p),
        ("key_starts", c_void_p),
        ("query_lengths", c_void_p),
        ("key_lengths", c_void_p),
        ("block_table", c_void_p),
        ("blocks_per_sequence", c_int64),
        ("block_size", c_int64),
        ("window_left", c_int64),
        ("window_right", c_int64),
        ("bottom_right", c_int32),
        ("threads", c_int32),
        ("scale", c_double),
        ("softcap", c_double),
        ("dropout", c_double),
        ("dropout_seed", c_uint64),
        ("dropout_offset", c_uint64),
        ("bias", Scores),
        ("mask", Scores),
        ("key_padding", c_void_p),
        ("key_padding_stride", c_int64),
        ("alibi_slopes", c_void_p),
        ("alibi_batch_stride", c_int64),
        ("sinks", c_void_p),
    )


class AttentionForward(ctypes.Structure):
    """``fastseq_attention_forward``."""

    _fields_ = (
        ("shape", AttentionShape),
        ("query", Heads),
        ("key", Heads),
        ("value", Heads),
        ("output", Heads),
        ("lse", Rows),
        ("row_maximum", Rows),
        ("row_scale", Rows),
        ("weights", Scores),
        ("average_weights", c_int32),
    )


class AttentionBackward(ctypes.Structure):
    """``fastseq_attention_backward``."""

    _fields_ = (
        ("shape", AttentionShape),
        ("query", Heads),
        ("key", Heads),
        ("value", Heads),
        ("output", Heads),
        ("row_maximum", Rows),
        ("row_scale", Rows),
        ("grad_output", Heads),
        ("grad_lse", Rows),
        ("grad_query", Heads),
        ("grad_key", Heads),
        ("grad_value", Heads),
        ("grad_bias", Scores),
        ("grad_bias_elements", c_int64),
        ("grad_sinks", c_void_p),
    )


# In the order of fastseq_cuda_struct_bytes.
_STRUCTS = (RnnForward, RnnBackward, Plan, AttentionForward, AttentionBackward)


class Library:
    """A loaded ``libfastseq_cuda``.

    Args:
        path: of the shared object.

    Raises:
        OSError: it cannot be loaded.
        ImportError: it was built from other sources than this file belongs to.
    """

    def __init__(self, path: str | Path) -> None:
        self._functions = functions = ctypes.CDLL(str(path))
        functions.fastseq_cuda_error.restype = c_char_p
        functions.fastseq_cuda_architectures.restype = c_char_p
        functions.fastseq_cuda_struct_bytes.restype = c_int64
        for index, struct in enumerate(_STRUCTS):
            found = functions.fastseq_cuda_struct_bytes(index)
            if found != ctypes.sizeof(struct):
                raise ImportError(
                    f"{path} has a {struct.__name__} of {found} bytes, expected "
                    f"{ctypes.sizeof(struct)}: it belongs to another version of fastseq"
                )
        self.cells = {name: index for index, name in enumerate(CELLS)}

    def _check(self, status: int) -> None:
        if status:
            text = self._functions.fastseq_cuda_error().decode()
            raise RuntimeError(f"CUDA error {status}: {text}")

    @property
    def architectures(self) -> str:
        """What it was compiled for."""
        return str(self._functions.fastseq_cuda_architectures().decode())

    def device_count(self) -> int:
        """Devices that the driver shows. RuntimeError where there is no driver."""
        count = c_int32()
        self._check(self._functions.fastseq_cuda_device_count(ctypes.byref(count)))
        return count.value

    def use_device(self, index: int) -> None:
        """Launch on this device from now on, in the calling thread."""
        self._check(self._functions.fastseq_cuda_use_device(c_int32(index)))

    def slot_count(self, cell: str) -> int:
        """Values per unit and step that pass through the recurrent kernels."""
        return int(self._functions.fastseq_cuda_slot_count(self.cells[cell]))

    def hidden_columns(self, cell: str, gates: int) -> list[int]:
        """By gate: where its recurrent product goes in a row of slots, in multiples of H."""
        column = self._functions.fastseq_cuda_hidden_column
        return [int(column(self.cells[cell], gate)) for gate in range(gates)]

    def rnn_plan(self, cell: str, dtype: str, backward: bool, mode: str, shape: RnnShape) -> Plan:
        """How the layer would be launched on the current device."""
        plan = Plan()
        self._check(
            self._functions.fastseq_cuda_rnn_plan(
                self.cells[cell],
                DTYPES[dtype],
                int(backward),
                MODES[mode],
                ctypes.byref(shape),
                ctypes.byref(plan),
            )
        )
        return plan

    def run_rnn(
        self,
        cell: str,
        dtype: str,
        call: RnnForward | RnnBackward,
        plan: Plan,
        barriers: int | None,
        stream: int,
    ) -> None:
        """Launch forward or backward; ``barriers`` is the address of ``plan.barriers`` zeros."""
        backward = isinstance(call, RnnBackward)
        name = "fastseq_cuda_run_rnn_backward" if backward else "fastseq_cuda_run_rnn_forward"
        self._check(
            self._functions[name](
                self.cells[cell],
                DTYPES[dtype],
                ctypes.byref(call),
                ctypes.byref(plan),
                c_void_p(barriers),
                c_void_p(stream),
            )
        )

    def run_attention_forward(self, dtype: str, call: AttentionForward, stream: int) -> None:
        """Launch attention forward."""
        self._check(
            self._functions.fastseq_cuda_run_attention_forward(
                DTYPES[dtype], ctypes.byref(call), c_void_p(stream)
            )
        )

    def run_attention_backward(
        self, dtype: str, call: AttentionBackward, delta: Rows, stream: int
    ) -> None:
        """Launch attention backward; ``delta`` is workspace shaped as the row maxima are."""
        self._check(
            self._functions.fastseq_cuda_run_attention_backward(
                DTYPES[dtype], ctypes.byref(call), ctypes.byref(delta), c_void_p(stream)
            )
        )


def _path() -> Path | None:
    """Beside the compiled extension, wherever the installation put that."""
    spec = importlib.util.find_spec("fastseq._cpu")
    if spec is None or spec.origin is None:
        return None
    path = Path(spec.origin).with_name(FILE_NAME)
    return path if path.exists() else None


# The library, or why there is none.
_found: tuple[Library | None, str | None] | None = None


def _reason_of_installation() -> str | None:
    """What speaks against the library before anything is loaded."""
    if _path() is None:
        return "not built (build with FASTSEQ_CUDA=ON where there is nvcc)"
    if os.environ.get(SWITCH, "0") in ("", "0"):
        return (
            "built, but its kernels have been compiled and tested under emulation only and have "
            f"never run on a device; {SWITCH}=1 uses them all the same"
        )
    return None


def decide_early() -> None:
    """Settle the usual answer, "off", at import.

    A compiler that records a call then finds a constant instead of a search for files. Where the
    library may be used nothing happens: to ask for devices starts the driver, after which a process
    can no longer be forked.
    """
    global _found
    reason = _reason_of_installation()
    if _found is None and reason is not None:
        _found = None, reason


def _find() -> tuple[Library | None, str | None]:
    reason, path = _reason_of_installation(), _path()
    if reason is not None or path is None:
        return None, reason
    try:
        found = Library(path)
        count = found.device_count()
    except (OSError, ImportError, RuntimeError) as error:
        return None, str(error)
    return (found, None) if count else (None, "the driver shows no device")


def library() -> Library:
    """The library.

    Raises:
        RuntimeError: it is not to be had, with the reason.
    """
    global _found
    if _found is None:
        _found = _find()
    if _found[0] is None:
        raise RuntimeError(f"the CUDA kernels are off: {_found[1]}")
    return _found[0]


def off_reason() -> str | None:
    """Why the CUDA kernels are not used, ``None`` where they are. Found out once per process."""
    global _found
    if _found is None:
        _found = _find()
    return _found[1]


def describe() -> dict[str, Any]:
    """For :func:`fastseq.capabilities`."""
    reason = off_reason()
    if reason is not None:
        return {"available": False, "reason": reason}
    return {"available": True, "reason": None, "architectures": library().architectures}
