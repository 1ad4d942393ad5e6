"""Kernels, one folder each: reference.py (plain torch, obviously right) beside what is faster.

Import it as megatrain.kernels. Where the repository's root is on sys.path this folder is also found as `kernels`, the
name of a PyPI package that transformers probes for: as that it says that it is version 0, which transformers takes for
"not installed", and refuses everything else.
"""

if __name__ != "megatrain.kernels":
    __version__ = "0"
    __path__.clear()  # no submodules

    def __getattr__(name: str) -> object:
        raise ImportError(
            f"{__name__}.{name}: this is megatrain's folder, import it as megatrain.kernels; for PyPI's package "
            "`kernels`, keep the repository's root off sys.path"
        )
