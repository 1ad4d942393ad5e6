"""What a checkpoint keeps of the data: n, the segments, and a fingerprint of what the order is a function of. No torch.

Design choices:
- All of it is a few numbers: law 2 makes everything else recomputable. It is JSON as it stands.
- The fingerprint is flat, by configuration key, so what differs can be said in the words of the command line.
- The global batch size is not in it: it only says how far a step moves along the order. A change begins a segment.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypedDict

from megatrain.data.samples import Source, part_of
from megatrain.data.segments import Segment, first_segment, next_segment
from megatrain.errors import InputError

Fingerprint = dict[str, int | float | str | None]


class State(TypedDict):
    """n: the next sample. segments: append-only."""

    n: int
    segments: list[Segment]
    fingerprint: Fingerprint


def fingerprint(sources: Sequence[Source], seed: int, weights: Mapping[str, float]) -> Fingerprint:
    """What the order of samples is a function of, by configuration key."""
    values: Fingerprint = {
        "seed": seed,
        "sequence_length": sources[0].index.sequence_length,
        "data.packing": sources[0].index.packing.value,
        "data.shuffle_block": sources[0].shuffle.block,
        "data.shuffle_blocks": sources[0].shuffle.blocks,
    }
    for source in sources:
        key = f"data.sources.{source.name}"
        values[f"{key}.manifest_sha256"] = source.manifest.sha256
        values[f"{key}.weight"] = weights[source.name]
        values[f"{key}.max_epochs"] = source.config.max_epochs
    return values


def start_state(
    sources: Sequence[Source],
    seed: int,
    global_batch_size: int,
    weights: Mapping[str, float] | None = None,
    reason: str = "start",
) -> State:
    """The state of a run that has trained on nothing yet. weights: by source; None: as its configuration says."""
    weights = weights or {source.name: source.config.weight for source in sources}
    parts = {source.name: part_of(source, weights[source.name]) for source in sources}
    segment = first_segment(
        parts, sources[0].index.sequence_length, sources[0].index.packing.value, global_batch_size, reason
    )
    return State(n=0, segments=[segment], fingerprint=fingerprint(sources, seed, weights))


def check_state(saved: State, current: State) -> None:
    """Refuses to continue on another order of samples.

    saved: a checkpoint's. current: start_state of what is asked for now.
    Raises InputError with each key that differs, its value then and now, in one line.
    """
    if differences := _differences(saved, current):
        legal = "legal: as it was, or data.allow_change=true, which goes on with what is asked for now"
        raise InputError(f"the checkpoint was trained on another order of samples: {', '.join(differences)}; {legal}")


def _differences(saved: State, current: State) -> list[str]:
    then, now = saved["fingerprint"], current["fingerprint"]
    return [
        f"{key}={now.get(key, 'absent')} (saved: {then.get(key, 'absent')})"
        for key in sorted(then.keys() | now.keys())
        if then.get(key, "absent") != now.get(key, "absent")
    ]


def resume_state(saved: State, current: State, allow_change: bool = False) -> State:
    """The state to continue from: `saved`, with a segment more if what is asked for now is something else.

    current: start_state of what is asked for now. Raises InputError like check_state unless another order is allowed,
    which another seed never is; another global batch size always is.
    """
    # Under another seed "where a source is in its permutation" means nothing.
    if not allow_change or saved["fingerprint"]["seed"] != current["fingerprint"]["seed"]:
        check_state(saved, current)
    (wanted,) = current["segments"]
    reasons = _differences(saved, current)
    if wanted["global_batch_size"] != saved["segments"][-1]["global_batch_size"]:
        reasons.append("global_batch_size changed")
    return then(saved, {**current, "segments": [{**wanted, "reason": ", ".join(reasons)}]}) if reasons else saved


def then(state: State, wanted: State, passed_over_until: int | None = None) -> State:
    """`state` with a segment more: that of `wanted`, a run that would begin. passed_over_until: see next_segment."""
    segment = next_segment(state["segments"][-1], state["n"], wanted["segments"][0], passed_over_until)
    return State(n=segment["from_sample"], segments=[*state["segments"], segment], fingerprint=wanted["fingerprint"])
