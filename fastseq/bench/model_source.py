"""The user's file: finding the factory and the example input in it, with errors of one line."""

from __future__ import annotations

import importlib.util
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence

__all__ = ["MODULE_PREFIX", "Example", "Source", "UserCodeError", "user_code"]

# Keeps the file apart from a module of its name that is already there.
MODULE_PREFIX = "fastseq_user_"
_DEFAULT_INPUT = "example_input"


class UserCodeError(ValueError):
    """Something raised in the user's file; the message is one line with the place."""


@dataclass(frozen=True)
class Example:
    """What the model is called with."""

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, value: Any) -> Example:
        """A tensor, a tuple of arguments, a dict of keyword arguments, or a pair of both."""
        if isinstance(value, Mapping):
            return cls((), dict(value))
        if isinstance(value, (tuple, list)) and not isinstance(value, PackedSequence):
            both = len(value) == 2 and isinstance(value[0], tuple) and isinstance(value[1], dict)
            return cls(value[0], value[1]) if both else cls(tuple(value))
        return cls((value,))


@contextmanager
def user_code(path: Path, what: str) -> Iterator[None]:
    """Turn whatever the user's code raises into one line.

    Args:
        path: The user's file; the line named is the deepest one in it.
        what: What was being done, for the message.

    Raises:
        UserCodeError: the code raised, or called ``sys.exit``.
    """
    try:
        yield
    except UserCodeError:
        raise
    except (Exception, SystemExit) as error:
        raise UserCodeError(f"{_place(error, path)}: {what}: {_one_line(error)}") from error


def _place(error: BaseException, path: Path) -> str:
    if isinstance(error, SyntaxError) and error.filename == str(path):
        return f"{path}:{error.lineno}"
    lines = [
        frame.lineno
        for frame in traceback.extract_tb(error.__traceback__)
        if frame.filename == str(path)
    ]
    return f"{path}:{lines[-1]}" if lines else str(path)


def _one_line(error: BaseException) -> str:
    text = error.msg if isinstance(error, SyntaxError) else str(error)
    return f"{type(error).__name__}: {' '.join(text.split())}".rstrip(": ")


class Source:
    """A user's file with a factory of models and, somewhere, an example input.

    Args:
        target: ``path.py:factory``.
        input_target: the name of a function in the same file, or ``other.py:function``; default:
            the second thing the factory returns, otherwise ``example_input``.

    Raises:
        ValueError: the target is not of that form, or a file has no such name.
        FileNotFoundError: there is no such file.
        UserCodeError: the file raised when it was imported.
    """

    def __init__(self, target: str, input_target: str | None = None) -> None:
        path, name = _split(target)
        module = _import(path)
        self.path = path
        self._factory = _function(module, path, name)
        self._input: Callable[[], Any] | None = None
        self._input_path = path
        if input_target is not None:
            if ":" in input_target:
                self._input_path, input_name = _split(input_target)
                same = self._input_path.resolve() == path.resolve()
                other = module if same else _import(self._input_path)
            else:
                other, input_name = module, input_target
            self._input = _function(other, self._input_path, input_name)
        elif hasattr(module, _DEFAULT_INPUT):
            self._input = _function(module, path, _DEFAULT_INPUT)
        self._prefers_function = input_target is not None

    def build(self, seed: int) -> tuple[nn.Module, Any]:
        """A model from ``seed``, and the example that the factory gave with it, or ``None``."""
        torch.manual_seed(seed)
        with user_code(self.path, "building the model"):
            built = self._factory()
        model, example = built if isinstance(built, tuple) and len(built) == 2 else (built, None)
        if not isinstance(model, nn.Module):
            raise ValueError(
                f"{self.path}: {self._factory.__name__} must return a torch.nn.Module or "
                f"(module, example input), got {type(model).__name__}"
            )
        return model, example

    def example(self, from_factory: Any, seed: int) -> Example:
        """The example input: of ``--input``, of the factory, of ``example_input``, in this order.

        Raises:
            ValueError: there is none.
        """
        if from_factory is not None and not self._prefers_function:
            return Example.of(from_factory)
        if self._input is None:
            raise ValueError(
                f"{self.path}: no example input: name a function with --input, define "
                f"{_DEFAULT_INPUT}(), or let the factory return (module, example input)"
            )
        torch.manual_seed(seed)
        with user_code(self._input_path, "making the example input"):
            value = self._input() if callable(self._input) else self._input
        if value is None:
            raise ValueError(f"{self._input_path}: the example input is None")
        return Example.of(value)


def _split(target: str) -> tuple[Path, str]:
    file, colon, name = target.rpartition(":")
    if not colon or not file or not name.isidentifier():
        raise ValueError(f"expected path.py:function, got {target!r}")
    path = Path(file)
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {file}")
    return path.resolve(), name


def _import(path: Path) -> ModuleType:
    name = f"{MODULE_PREFIX}{path.stem}"
    specification = importlib.util.spec_from_file_location(name, path)
    if specification is None or specification.loader is None:
        raise ValueError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(specification)
    # Its neighbours can be imported, as when it is run; classes in it can be found by name.
    if str(path.parent) not in sys.path:
        sys.path.insert(0, str(path.parent))
    sys.modules[name] = module
    with user_code(path, "importing it"):
        specification.loader.exec_module(module)
    return module


def _function(module: ModuleType, path: Path, name: str) -> Any:
    found = getattr(module, name, None)
    if found is None:
        raise ValueError(f"{path} has no {name!r}")
    if name != _DEFAULT_INPUT and not callable(found):
        raise ValueError(f"{path}: {name!r} is not a function")
    return found
