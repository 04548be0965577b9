"""Kernels that Numba compiles on first use: no compiled extension, no compiler."""
