from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, Literal

import torch
from torch import Tensor

CELLS: dict[str, int]
UNARY: dict[str, int]

def isa_built() -> list[str]: ...
def isa_usable() -> list[str]: ...
def isa() -> str: ...
def set_isa(name: str) -> None: ...
def openmp_library() -> str | None: ...
def max_threads() -> int: ...
def fma_gflops(dtype: int, threads: int, seconds: float) -> float: ...
def memory_gbytes(kind: str, bytes_per_thread: int, threads: int, seconds: float) -> float: ...
def profile_start(max_calls: int, max_slices: int) -> None: ...
def profile_stop() -> dict[str, Any]: ...
def unary(function: int, dtype: int, input: Tensor, output: Tensor) -> None: ...
def connect(
    capsule: object,
    tensor_type: type,
    parameter_type: type,
    empty_like_function: Callable[[Tensor], Tensor],
    float64_type: torch.dtype,
    is_grad_enabled_function: Callable[[], bool],
    thread_count_function: Callable[[], int],
    cells: dict[str, tuple[int, int, bool]],
) -> None: ...
def connect_observers(
    dispatch_modes_function: Callable[[], int],
    profiler_module: ModuleType,
    is_any_autocast_enabled_function: Callable[[], bool],
    tracing_state_function: Callable[[], Any],
    are_transforms_active_function: Callable[[], bool],
    forward_ad_module: ModuleType,
) -> None: ...
def is_observed() -> bool: ...
def plain_layer(
    cell: str,
    input: Tensor,
    hx: Tensor | None,
    cx: Tensor | None,
    weights: Sequence[Tensor],
    batch_first: bool,
) -> tuple[Tensor, Tensor, Tensor | None] | None: ...
def load_cell(path: str, isa: str, dtype: int) -> int: ...
def rnn_reserve_bytes(
    cell: int, dtype: int, rows: int, hidden_size: int, projection_size: int, directions: int
) -> int: ...
def rnn_forward(
    cell: int,
    dtype: int,
    threads: int,
    sizes: tuple[int, int, int, int, int, int],
    x: Tensor,
    x_strides: tuple[int, int],
    y: Tensor,
    y_strides: tuple[int, int],
    h0: Tensor | None,
    c0: Tensor | None,
    h_n: Tensor,
    c_n: Tensor | None,
    weights: list[Tensor] | tuple[Tensor, ...],
    biases: bool,
    reserve: Tensor | None,
    batch_sizes: Tensor | None,
    row_order: Tensor | None,
    packed: bool,
) -> None: ...
def rnn_backward(
    cell: int,
    dtype: int,
    threads: int,
    sizes: tuple[int, int, int, int, int, int],
    x: Tensor,
    x_strides: tuple[int, int],
    grad_y: Tensor | None,
    grad_y_strides: tuple[int, int],
    grad_x: Tensor | None,
    grad_x_strides: tuple[int, int],
    h0: Tensor | None,
    c0: Tensor | None,
    grad_h_n: Tensor | None,
    grad_c_n: Tensor | None,
    grad_h0: Tensor | None,
    grad_c0: Tensor | None,
    weights: list[Tensor] | tuple[Tensor, ...],
    grad_weights: list[Tensor | None],
    biases: bool,
    reserve: Tensor,
    batch_sizes: Tensor | None,
    row_order: Tensor | None,
    packed: bool,
) -> None: ...

Sizes = tuple[int, int, int, int, int, int, int]
Terms = tuple[Tensor | None, ...]
Options = tuple[int, int, bool, float, float, float]

def attention_forward(
    dtype: int,
    threads: int,
    sizes: Sizes,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    terms: Terms,
    options: Options,
    output: Tensor,
    lse: Tensor | None,
    row_maximum: Tensor | None,
    row_scale: Tensor | None,
    weights: Tensor | None,
    average_weights: bool,
) -> None: ...
def attention_backward(
    dtype: int,
    threads: int,
    sizes: Sizes,
    grad_output: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    terms: Terms,
    options: Options,
    output: Tensor,
    row_maximum: Tensor,
    row_scale: Tensor,
    grad_query: Tensor | None,
    grad_key: Tensor | None,
    grad_value: Tensor | None,
    grad_bias: Tensor | None,
    grad_sinks: Tensor | None,
) -> None: ...
def dropout_mask(sizes: Sizes, probability: float, seed: Tensor, keep: Tensor) -> None: ...
def plain_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    causal: bool,
    grouped: bool,
    scale: float | None,
) -> Tensor | None: ...
def linear_forward(
    dtype: int,
    threads: int,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    output: Tensor,
    pre_activation: Tensor | None,
    activation: int,
    dropout: float,
    seed: Tensor | None,
) -> None: ...
def linear_backward(
    dtype: int,
    threads: int,
    grad_output: Tensor,
    input: Tensor | None,
    weight: Tensor | None,
    pre_activation: Tensor | None,
    activation: int,
    dropout: float,
    seed: Tensor | None,
    grad_input: Tensor | None,
    grad_weight: Tensor | None,
    grad_bias: Tensor | None,
) -> None: ...
def element_dropout_mask(
    rows: int, columns: int, probability: float, seed: Tensor, keep: Tensor
) -> None: ...
def plain_linear(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: int,
    residual: Tensor | None,
) -> Tensor | Literal[False] | None: ...
def dense_linear_forward(
    threads: int,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: int,
    dropout_p: float,
    seed: Tensor | None,
    save: bool,
) -> tuple[Tensor, Tensor | None] | None: ...
def dense_linear_backward(
    threads: int,
    grad_output: Tensor,
    input: Tensor | None,
    weight: Tensor | None,
    saved: Tensor | None,
    activation: int,
    dropout_p: float,
    seed: Tensor | None,
    needs: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None] | None: ...
def norm_forward(
    dtype: int,
    threads: int,
    rms: bool,
    eps: float,
    dropout_p: float,
    seed: Tensor | None,
    input: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    output: Tensor,
    sum: Tensor | None,
    statistics: Tensor | None,
) -> None: ...
def norm_backward(
    dtype: int,
    threads: int,
    rms: bool,
    dropout_p: float,
    seed: Tensor | None,
    grad_output: Tensor,
    grad_sum: Tensor | None,
    x: Tensor,
    weight: Tensor | None,
    statistics: Tensor,
    grad_x: Tensor | None,
    grad_input: Tensor | None,
    grad_weight: Tensor | None,
    grad_bias: Tensor | None,
) -> None: ...
def plain_norm(
    input: Tensor,
    residual: Tensor | None,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float | None,
    rms: bool,
    want_sum: bool,
) -> Tensor | tuple[Tensor, Tensor] | bool | None: ...
def dense_norm_forward(
    threads: int,
    input: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    dims: int,
    eps: float,
    rms: bool,
    dropout_p: float,
    seed: Tensor | None,
    want_sum: bool,
    save: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None] | None: ...
def dense_norm_backward(
    threads: int,
    grad_output: Tensor,
    grad_sum: Tensor | None,
    x: Tensor,
    weight: Tensor | None,
    seed: Tensor | None,
    statistics: Tensor,
    dims: int,
    rms: bool,
    dropout_p: float,
    needs: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None] | None: ...
def plain_decoder_step(
    x: Tensor,
    batch: int,
    heads: int,
    norm_first: bool,
    activation: int,
    self_attention: tuple[Tensor | None, ...],
    feed_forward: tuple[Tensor | None, ...],
    norms: tuple[tuple[Tensor, Tensor | None, float], ...],
    keys: Tensor,
    values: Tensor,
    length: int,
    cross_attention: tuple[Tensor | None, ...] | None,
    memory_keys: Tensor | None,
    memory_values: Tensor | None,
) -> Tensor | None: ...
