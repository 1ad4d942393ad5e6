"""Kernels, one folder each: reference.py (plain torch, obviously right) beside what is faster."""

if __name__ != "megatrain.kernels":
    raise ImportError(
        f"import megatrain.kernels, not {__name__}: at the top level the name belongs to the PyPI package `kernels`"
    )
