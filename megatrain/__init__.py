"""megatrain: a pretraining system for multi-node GPU clusters. See docs/design.md for the house and its laws."""

from pathlib import Path

for _link in ("kernels", "data_prep", "conf"):
    if not (Path(__file__).parent / _link).is_dir():
        raise ImportError(
            f"megatrain/{_link} should be a link to ../{_link}: check out the repository with symbolic links "
            "(git config core.symlinks true), or install the package with pip"
        )

__version__ = "0.1.0"
