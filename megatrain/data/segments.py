"""The segments of a run: what each stretch of its samples is a function of besides sets and seed. No torch.

Design choices:
- A segment says all of it, each source's place in its own stream included: the last one is enough to go on, however
  many came before.
- A source goes on in its stream where the segment before left it, unless its samples are others now (sequence length,
  packing, blocks, set): then it begins a permutation of its own, and what it had given of the epoch may come again.
- All of it is JSON as it stands.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypedDict

from megatrain.data.mixture import Mixture, Share


class Part(TypedDict):
    """A source in a segment.

    samples: of one epoch. shuffle_block, shuffle_blocks: those of the configuration. permutation: which of its
    permutations. first: its place in that permutation's stream at mixture_from. epochs: seen under the permutations
    before it.
    """

    weight: float
    max_epochs: float | None
    manifest_sha256: str
    samples: int
    shuffle_block: int | None
    shuffle_blocks: int
    permutation: int
    first: int
    epochs: float


class Segment(TypedDict):
    """What was trained on from sample `from_sample` on.

    tokens: trained before it. mixture_from: the sample since which the mixture deals; before from_sample where the
    segment changed something else. passed_over: first and last of the samples left out before it. repeat_share: of its
    tokens, in its sources' first epochs, those that an epoch which it broke off may have had.
    """

    from_sample: int
    mixture_from: int
    tokens: int
    sequence_length: int
    packing: str
    global_batch_size: int
    mixture: dict[str, Part]
    passed_over: list[int] | None
    repeat_share: float
    reason: str


def first_segment(
    parts: Mapping[str, Part], sequence_length: int, packing: str, global_batch_size: int, reason: str = "start"
) -> Segment:
    """The segment that begins with sample 0. parts: of sources that have given nothing yet, by name."""
    return Segment(
        from_sample=0,
        mixture_from=0,
        tokens=0,
        sequence_length=sequence_length,
        packing=packing,
        global_batch_size=global_batch_size,
        mixture=dict(parts),
        passed_over=None,
        repeat_share=0.0,
        reason=reason,
    )


def next_segment(last: Segment, n: int, wanted: Segment, passed_over_until: int | None = None) -> Segment:
    """The segment after `last`, which was trained on until sample `n`.

    wanted: as a first segment of a new run would be. passed_over_until: the last of samples to leave out from n on.
    """
    first = n if passed_over_until is None else passed_over_until + 1
    cut_alike = last["sequence_length"] == wanted["sequence_length"] and last["packing"] == wanted["packing"]
    mixture, mixture_from = last["mixture"], last["mixture_from"]
    if not (cut_alike and _asks(mixture) == _asks(wanted["mixture"])):
        given = dict(zip(sorted(mixture), mixture_of(last).given(first - mixture_from), strict=True))
        mixture_from = first
        mixture = {
            name: _continued(mixture[name], given[name], part, cut_alike) if name in mixture else part
            for name, part in wanted["mixture"].items()
        }
    return {
        **wanted,
        "from_sample": first,
        "mixture_from": mixture_from,
        "tokens": last["tokens"] + (n - last["from_sample"]) * last["sequence_length"],
        "mixture": mixture,
        "passed_over": None if passed_over_until is None else [n, passed_over_until],
        "repeat_share": _repeat_share(last["mixture"], mixture),
    }


def _asks(mixture: Mapping[str, Part]) -> list[tuple[object, ...]]:
    """What of a mixture is asked for, not history."""
    return sorted((name, part["weight"], part["max_epochs"], *_stream(part)) for name, part in mixture.items())


def _stream(part: Part) -> tuple[str, int | None, int]:
    """What the permutations of a source are of, besides how its samples are cut."""
    return part["manifest_sha256"], part["shuffle_block"], part["shuffle_blocks"]


def _continued(before: Part, given: int, wanted: Part, cut_alike: bool) -> Part:
    """A source that has given so many samples of `before`, as `wanted` asks for it."""
    place = before["first"] + given
    if cut_alike and _stream(before) == _stream(wanted):
        return {**wanted, "permutation": before["permutation"], "first": place, "epochs": before["epochs"]}
    epochs = before["epochs"] + place / before["samples"]
    return {**wanted, "permutation": before["permutation"] + 1, "first": 0, "epochs": epochs}


def mixture_of(segment: Segment) -> Mixture:
    """Who gives the samples from mixture_from on, by source in order of names."""
    return Mixture(
        {
            name: Share(part["weight"], part["samples"], part["max_epochs"], _used(part))
            for name, part in sorted(segment["mixture"].items())
        }
    )


def _used(part: Part) -> int:
    return part["first"] + round(part["epochs"] * part["samples"])


def _repeat_share(before: Mapping[str, Part], mixture: Mapping[str, Part]) -> float:
    total = sum(part["weight"] for part in mixture.values())
    return sum(
        part["weight"] / total * (part["epochs"] % 1)
        for name, part in mixture.items()
        if name in before and part["permutation"] > before[name]["permutation"]
    )
