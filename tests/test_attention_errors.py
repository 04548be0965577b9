"""Bad arguments of attention: torch's exception classes; argument, expected and actual in words."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch

from fastseq import functional

q, k, v = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 7, 8), torch.randn(2, 2, 7, 6)
BAD: dict[str, tuple[tuple[Any, ...], dict[str, Any], type[Exception], str]] = {
    "no_tensor": ((q, None, v), {}, TypeError, "key must be a tensor, got NoneType"),
    "dimensions": ((q[0, 0], k, v), {}, RuntimeError, "query must be 4-D or 3-D, got 2-D"),
    "mixed_dimensions": ((q, k[0], v), {}, RuntimeError, "key.*expected 4, got 3"),
    "dtype": ((q, k, v.double()), {}, RuntimeError, "value.*float32.*float64"),
    "device": ((q, k.to("meta"), v), {}, RuntimeError, "key.*cpu.*meta"),
    "batch": ((q, k[:1], v), {}, RuntimeError, "key.*expected 2, got 1"),
    "value_rows": ((q, k, v[:, :, :6]), {}, RuntimeError, r"value.*7\), got \(2, 2, 6\)"),
    "head_size": ((q[..., :7], k, v), {}, RuntimeError, "key.*head size.*expected 7, got 8"),
    "groups": ((q[:, :3], k, v), {}, RuntimeError, "divide.*divisor of 3, got 2"),
    "no_groups": ((q, k[:, :0], v[:, :0]), {}, RuntimeError, "divisor of 4, got 0"),
    "mask_dtype": ((q, k, v), {"mask": torch.zeros(5, 7)}, RuntimeError, "mask.*bool.*float32"),
    "mask_shape": (
        (q, k, v),
        {"mask": torch.ones(5, 6).bool()},
        RuntimeError,
        r"mask.*\(2, 4, 5, 7\), got \(5, 6\)",
    ),
    "bias_dtype": ((q, k, v), {"bias": torch.zeros(7).int()}, RuntimeError, "bias.*int32"),
    "bias_shape": ((q, k, v), {"bias": torch.zeros(3, 5, 7)}, RuntimeError, r"bias.*\(3, 5, 7\)"),
    "bias_device": ((q, k, v), {"bias": torch.zeros(7, device="meta")}, RuntimeError, "bias.*meta"),
    "padding_shape": (
        (q, k, v),
        {"key_padding_mask": torch.ones(7).bool()},
        RuntimeError,
        r"key_padding_mask.*\(2, 7\), got \(7,\)",
    ),
    "padding_dtype": (
        (q, k, v),
        {"key_padding_mask": torch.ones(2, 7)},
        RuntimeError,
        "key_padding_mask.*bool.*float32",
    ),
    "lengths_range": ((q, k, v), {"key_lengths": [3, 8]}, ValueError, "between 0 and 7, got 8"),
    "lengths_negative": ((q, k, v), {"query_lengths": [-1, 5]}, ValueError, "0 and 5, got -1"),
    "lengths_count": ((q, k, v), {"key_lengths": [3]}, ValueError, r"\(2,\), got \(1,\)"),
    "lengths_dtype": ((q, k, v), {"key_lengths": torch.ones(2)}, TypeError, "integers.*float32"),
    "lengths_fraction": ((q, k, v), {"key_lengths": [1.5, 2]}, TypeError, "integers.*float32"),
    "lengths_text": ((q, k, v), {"key_lengths": "ab"}, TypeError, "key_lengths"),
    "window_pair": ((q, k, v), {"window": 3}, TypeError, r"window.*\(left, right\), got 3"),
    "window_range": ((q, k, v), {"window": (-2, 0)}, ValueError, "window left.*-2"),
    "window_type": ((q, k, v), {"window": (1.5, 0)}, TypeError, "window left.*float"),
    "slopes": ((q, k, v), {"alibi_slopes": torch.ones(3)}, RuntimeError, r"\(4,\).*got \(3,\)"),
    "sinks": ((q, k, v), {"sinks": torch.ones(2)}, RuntimeError, r"sinks.*\(4,\), got \(2,\)"),
    "softcap": ((q, k, v), {"softcap": -1.0}, ValueError, "softcap.*-1.0"),
    "softcap_type": ((q, k, v), {"softcap": "a"}, TypeError, "softcap must be a float, got str"),
    "dropout": ((q, k, v), {"dropout_p": 1.5}, RuntimeError, "dropout_p.*1.5"),
    "dropout_type": ((q, k, v), {"dropout_p": "a"}, TypeError, "dropout_p must be a float"),
    "scale_type": ((q, k, v), {"scale": "a"}, TypeError, "scale must be a float, got str"),
}


@pytest.mark.parametrize("name", BAD)
def test_attention(name: str) -> None:
    arguments, options, kind, message = BAD[name]
    with pytest.raises(kind, match=message):
        functional.attention(*arguments, **options)


def test_extreme_numbers() -> None:
    """What no tensor reaches is no limit; a cap out of float32's range acts like the nearest."""
    every = functional.attention(q, k, v)
    for size in (sys.maxsize, 2**64, torch.tensor(9).numpy()[()]):
        assert torch.equal(functional.attention(q, k, v, window=(size, size)), every)
        aligned = functional.attention(q, k, v, window=(size, -1), bottom_right=True)
        assert torch.equal(aligned, every)
    for cap in (1e30, 1e36, 1e300):
        torch.testing.assert_close(functional.attention(q, k, v, softcap=cap), every)
    equal = v.repeat_interleave(2, 1).mean(2, keepdim=True).expand_as(every)
    for cap in (1e-30, 1e-39, 1e-300):
        torch.testing.assert_close(functional.attention(q, k, v, softcap=cap), equal)


rows = torch.randn(6, 2, 8)
BAD_ROWS: dict[str, tuple[tuple[Any, ...], type[Exception], str]] = {
    "dimensions": ((q, k, v, [0, 2], [0, 2]), RuntimeError, "query must be 3-D, got 4-D"),
    "end": ((rows, rows, rows, [0, 5], [0, 6]), ValueError, r"query_starts.*0 to 6.*\[0, 5\]"),
    "begin": ((rows, rows, rows, [1, 6], [0, 6]), ValueError, "query_starts"),
    "falling": ((rows, rows, rows, [0, 6], [0, 4, 3, 6]), ValueError, "key_starts"),
    "count": ((rows, rows, rows, [0, 6], [0, 3, 6]), ValueError, "key_starts.*2 entries, got 3"),
    "none": ((rows, rows, rows, None, [0, 6]), TypeError, "query_starts.*NoneType"),
    "empty": ((rows, rows, rows, [], []), ValueError, "query_starts.*none"),
    "value": ((rows, rows, rows[:5], [0, 6], [0, 6]), RuntimeError, "value.*rows and heads"),
    "groups": ((rows, rows[:, :0], rows[:, :0], [0, 6], [0, 6]), RuntimeError, "divisor of 2"),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_attention_varlen(name: str) -> None:
    arguments, kind, message = BAD_ROWS[name]
    with pytest.raises(kind, match=message):
        functional.attention_varlen(*arguments)


cache = torch.randn(4, 2, 3, 8)
table = torch.tensor([[0, 1], [3, -1]])
BAD_PAGES: dict[str, tuple[tuple[Any, ...], type[Exception], str]] = {
    "block": ((q, cache, cache, table, [6, 4]), ValueError, "0 to 3, got -1"),
    "too_long": ((q, cache, cache, table, [7, 3]), ValueError, "key_lengths.*6, got 7"),
    "table_rows": ((q, cache, cache, table[:1], [3, 3]), RuntimeError, r"\(2, blocks\)"),
    "table_rank": ((q, cache, cache, table[0], [3, 3]), RuntimeError, r"block_table.*\(2,\)"),
    "table_dtype": ((q, cache, cache, table.float(), [3, 3]), TypeError, "float32"),
    "table_type": ((q, cache, cache, None, [3, 3]), TypeError, "block_table"),
    "no_lengths": ((q, cache, cache, table, None), TypeError, "key_lengths"),
    "values": ((q, cache, cache[:3], table, [3, 3]), RuntimeError, "value_cache.*4.*3"),
    "head_size": ((q, cache[..., :4], cache, table, [3, 3]), RuntimeError, "expected 8, got 4"),
}


@pytest.mark.parametrize("name", BAD_PAGES)
def test_attention_paged(name: str) -> None:
    arguments, kind, message = BAD_PAGES[name]
    with pytest.raises(kind, match=message):
        functional.attention_paged(*arguments)
