"""What a checkpoint keeps of the data: n, the segments, and a fingerprint of what the order is a function of. No torch.

Design choices:
- All of it is a few numbers: law 2 makes everything else recomputable. It is JSON as it stands.
- The fingerprint is flat, by configuration key, so what differs can be said in the words of the command line.
- The global batch size is not in it: it only says how far a step moves along the order. A change begins a segment.
"""

from __future__ import annotations

from typing import TypedDict

from megatrain.data.samples import PACKING, Source
from megatrain.errors import InputError

Fingerprint = dict[str, int | float | str | None]


class Segment(TypedDict):
    """From sample `from_sample` on, this was trained on. passed_over: first and last sample of those left out."""

    from_sample: int
    sequence_length: int
    global_batch_size: int
    mixture: dict[str, float]
    passed_over: list[int] | None
    reason: str


class State(TypedDict):
    """n: the next sample. segments: append-only."""

    n: int
    segments: list[Segment]
    fingerprint: Fingerprint


def fingerprint(sources: list[Source], seed: int) -> Fingerprint:
    """What the order of samples is a function of, by configuration key."""
    values: Fingerprint = {
        "seed": seed,
        "sequence_length": sources[0].index.sequence_length,
        "data.packing": PACKING,
        "data.shuffle_block": sources[0].shuffle.block,
        "data.shuffle_blocks": sources[0].shuffle.blocks,
    }
    for source in sources:
        key = f"data.sources.{source.name}"
        values[f"{key}.manifest_sha256"] = source.manifest.sha256
        values[f"{key}.weight"] = source.config.weight
        values[f"{key}.max_epochs"] = source.config.max_epochs
    return values


def start_state(sources: list[Source], seed: int, global_batch_size: int) -> State:
    """The state of a run that has trained on nothing yet."""
    segment = Segment(
        from_sample=0,
        sequence_length=sources[0].index.sequence_length,
        global_batch_size=global_batch_size,
        mixture={source.name: source.config.weight for source in sources},
        passed_over=None,
        reason="start",
    )
    return State(n=0, segments=[segment], fingerprint=fingerprint(sources, seed))


def check_state(saved: State, current: State) -> None:
    """Refuses to continue on another order of samples.

    saved: a checkpoint's. current: start_state of what is asked for now.
    Raises InputError with each key that differs, its value then and now, in one line.
    """
    then, now = saved["fingerprint"], current["fingerprint"]
    differences = [
        f"{key}={now.get(key, 'absent')} (saved: {then.get(key, 'absent')})"
        for key in sorted(then.keys() | now.keys())
        if then.get(key, "absent") != now.get(key, "absent")
    ]
    if differences:
        raise InputError(f"the checkpoint was trained on another order of samples: {', '.join(differences)}")


def resume_state(saved: State, current: State) -> State:
    """The state to continue from: `saved`, with a segment more if the global batch size is another now.

    Raises InputError like check_state.
    """
    check_state(saved, current)
    segments = saved["segments"]
    size = current["segments"][0]["global_batch_size"]
    if size != segments[-1]["global_batch_size"]:
        changed: Segment = {
            **segments[-1],
            "from_sample": saved["n"],
            "global_batch_size": size,
            "reason": "global_batch_size changed",
        }
        segments = [*segments, changed]
    return {**saved, "segments": segments}
