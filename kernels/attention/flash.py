"""Attention by the flash-attn that is installed: 2.8 on Ampere, Ada and Hopper, 4 on Hopper and Blackwell.

Design choices:
- What it can't do is known at start, from the configuration and the GPU (out_of_reach); nothing is decided for a batch.
- Documents go through flash-attn's form for sequences of several lengths, whose boundaries come with the batch
  (megatrain/batch.py): to find them in `start` here would take a host read. What fills a sample's boundaries up are
  documents without tokens, and `max_seqlen` is the sequence length: an upper bound is enough.
- Both versions are called by the same keywords, of which tests ask the signatures of the released packages.
- A library is known by its package's metadata, for 2.8 ships an old flash_attn.cute too. But that it is installed
  isn't enough: one that was built for another PyTorch can't be imported.

B is the number of samples, S the sequence length, H the key-value heads, G the query heads of each, D the head
dimension, C the most documents of a sample.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Library:
    """A package of flash-attn: how its legal versions begin, its module, and the GPUs that it is used on.

    head_dims: the largest head dimension on each of them ("sm_90").
    """

    package: str
    series: str
    module: str
    head_dims: dict[str, int]

    def installed(self) -> str | None:
        """The version that is installed, of whatever series. Imports nothing."""
        try:
            return metadata.version(self.package)
        except metadata.PackageNotFoundError:
            return None

    def usable(self) -> bool:
        """Whether a legal version is installed."""
        return (self.installed() or "").startswith(self.series)


AMPERE_TO_HOPPER = ("sm_80", "sm_86", "sm_87", "sm_89", "sm_90")
FLASH_2 = Library("flash-attn", "2.8.", "flash_attn", dict.fromkeys(AMPERE_TO_HOPPER, 256))
# On Blackwell it has kernels for 256 too, but no backward pass of windows in them.
FLASH_4 = Library("flash-attn-4", "4.", "flash_attn.cute", {"sm_90": 256, "sm_100": 128, "sm_103": 128})
LIBRARIES = (FLASH_4, FLASH_2)
"""On Hopper the first that is installed: version 4 was made for it."""


def version() -> str | None:
    """What is installed ("flash-attn-4 4.0.0b36, flash-attn 2.8.3"), or None. Imports nothing."""
    found = [f"{library.package} {library.installed()}" for library in LIBRARIES if library.installed()]
    return ", ".join(found) or None


def for_architecture(architecture: str | None) -> Library | None:
    """The installed library that is used on an architecture ("sm_90")."""
    return next((library for library in LIBRARIES if architecture in library.head_dims and library.usable()), None)


def out_of_reach(architecture: str | None, dtype: torch.dtype, head_dim: int) -> str | None:
    """Why flash-attn can't be used, in one sentence; None where it can, which then is imported.

    architecture: of the GPU ("sm_90"), None where there is none.
    """
    if architecture is None:
        return "flash-attn needs a GPU"
    if dtype != torch.bfloat16:
        return f"precision: flash-attn computes in bf16, not in {dtype}".replace("torch.", "")
    library = for_architecture(architecture)
    if library is None:
        legal = " or ".join(f"{each.package} {each.series}*" for each in LIBRARIES if architecture in each.head_dims)
        return f"on {architecture} flash-attn is taken from {legal or 'no package'}; installed: {version() or 'none'}"
    most = library.head_dims[architecture]
    if head_dim % 8 or head_dim > most:
        return f"model.head_dim={head_dim}: on {architecture} {library.package} takes multiples of 8 up to {most}"
    try:
        importlib.import_module(library.module)
    except Exception as error:  # An ImportError of the linker's, and whatever else its dependencies raise.
        (why, *_) = str(error).splitlines() or [type(error).__name__]
        return f"{library.package} {library.installed()} can't be imported: {why}"
    return None


@dataclass(frozen=True)
class Mask:
    """What attention is computed over, and how: causal in every document, prepared once for all layers.

    boundaries: int32[B * C + 1], where the documents begin in the tokens of all samples, and the end of the last one.
        None: every sample is one document.
    length: S. window: a query sees itself and the window - 1 keys before it, at most; None: all of its document.
    """

    library: Library
    boundaries: Tensor | None
    length: int
    window: int | None


def prepare(library: Library, documents: Tensor | None, length: int, window: int | None = None) -> Mask:
    """The mask for samples of `length` tokens with int32[B, C] documents as in Batch. Costs no host read.

    Raises ValueError where the batch has no documents: what it masks would be unknown.
    """
    if documents is None:
        raise ValueError("attention: flash-attn needs Batch.documents, which the objective was not asked for")
    if window is not None and window >= length:
        window = None
    samples, most = documents.shape
    if most == 1:
        return Mask(library, None, length, window)
    first = torch.arange(0, samples * length, length, dtype=torch.int32, device=documents.device)
    boundaries = F.pad((first[:, None] + documents).flatten(), (0, 1), value=samples * length)
    return Mask(library, boundaries, length, window)


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Tensor:
    """Attention of q [B, S, H, G, D] over k and v [B, S, H, D]. Returns [B, S, H, G, D].

    bf16. Any strides, views of one projection among them: keys and values, and where H or G is 1 queries, aren't
    copied. The backward pass gives the same bits each time where PyTorch was told so (device.set_deterministic).
    """
    module = importlib.import_module(mask.library.module)
    settings: dict[str, Any] = {
        "softmax_scale": q.shape[-1] ** -0.5,
        "causal": True,
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }
    if mask.window is not None:
        settings["window_size"] = (mask.window - 1, 0)
    heads = q.flatten(2, 3)
    if mask.boundaries is None:
        output = module.flash_attn_func(heads, k, v, **settings)
    else:
        settings |= {"cu_seqlens_q": mask.boundaries, "cu_seqlens_k": mask.boundaries}
        settings |= {"max_seqlen_q": mask.length, "max_seqlen_k": mask.length}
        output = module.flash_attn_varlen_func(*(x.flatten(0, 1) for x in (heads, k, v)), **settings)
    # Version 4 returns the log-sum-exp too, whatever it is asked.
    attended: Tensor = output[0] if isinstance(output, tuple) else output
    return attended.view(q.shape)
