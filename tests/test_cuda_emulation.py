"""The emulator finds the faults it is there to find (``cuda_emulation/faults.cu``)."""

import ctypes

import pytest
import torch
from emulated_cuda import library_path


@pytest.fixture
def faults() -> ctypes.CDLL:
    loaded = ctypes.CDLL(str(library_path()))
    loaded.last_failure.restype = ctypes.c_char_p
    return loaded


def test_missing_barrier_shows(faults: ctypes.CDLL) -> None:
    result = torch.zeros(64)
    neighbours = (torch.arange(64.0) + 1) % 64
    address = ctypes.c_void_p(result.data_ptr())
    assert faults.run_read_neighbour(address, 1) == 0
    assert torch.equal(result, neighbours)
    assert faults.run_read_neighbour(address, 0) == 0
    assert not torch.equal(result, neighbours)
    assert result[0].isnan()  # shared memory that nobody has written yet


def test_barrier_left_out_by_some(faults: ctypes.CDLL) -> None:
    assert faults.run_leave_out_barrier() == 719
    assert b"barrier" in faults.last_failure()


def test_endless_wait(faults: ctypes.CDLL) -> None:
    assert faults.run_wait_for_ever() == 719
    assert b"wait for each other" in faults.last_failure()


def test_launch_out_of_limits(faults: ctypes.CDLL) -> None:
    assert faults.run_too_many_threads() == 9
