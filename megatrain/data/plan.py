"""What changes while a run goes on: the phases of a configuration, and the samples it passes over. No torch.

Design choices:
- A phase begins after a number of steps, and says only what is other from then on; phases add up in that order.
- What each step trains on is a function of the configuration and the segments so far: a run that is continued finds
  itself in the phase that it was in.
- Windows to pass over are samples, which is what a log of a run names. A step that would touch one moves behind it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from megatrain.config import TrainConfig
from megatrain.data.samples import Source, with_sequence_length
from megatrain.data.segments import Segment
from megatrain.data.state import State, resume_state, start_state, then
from megatrain.errors import bad_value

SIZES = ("sequence_length", "global_batch_size", "micro_batch_size")


@dataclass(frozen=True)
class Settings:
    """What a step trains on.

    weights: by source. phases: names of those that have begun. keys: what gave each of SIZES its value.
    """

    sequence_length: int
    global_batch_size: int
    micro_batch_size: int
    weights: dict[str, float]
    phases: tuple[str, ...] = ()
    keys: Mapping[str, str] = field(default_factory=lambda: {size: size for size in SIZES})


def settings(config: TrainConfig, step: int) -> Settings:
    """Those of the step that follows `step` steps. Raises InputError naming the key of a phase that can't be."""
    found = Settings(
        config.sequence_length,
        config.global_batch_size,
        config.micro_batch_size,
        {name: source.weight for name, source in config.data.named().items()},
    )
    for name, phase in sorted(config.phases.items(), key=lambda item: (item[1].after_step, item[0])):
        for key, value in vars(phase).items():
            if isinstance(value, int) and value < 1:
                raise bad_value(f"phases.{name}.{key}", value, "legal: 1 or more")
        for source in phase.weights:
            if source not in found.weights:
                raise bad_value(
                    f"phases.{name}.weights.{source}", phase.weights[source], f"legal: {list(found.weights)}"
                )
        if phase.after_step <= step:
            found = replace(
                found,
                sequence_length=phase.sequence_length or found.sequence_length,
                global_batch_size=phase.global_batch_size or found.global_batch_size,
                micro_batch_size=phase.micro_batch_size or found.micro_batch_size,
                weights={**found.weights, **phase.weights},
                phases=(*found.phases, name),
                keys={
                    size: f"phases.{name}.{size}" if getattr(phase, size) else key for size, key in found.keys.items()
                },
            )
    return found


def every(config: TrainConfig) -> list[Settings]:
    """Those of each phase, in the order in which they begin."""
    return [settings(config, step) for step in sorted({0, *(phase.after_step for phase in config.phases.values())})]


class Plan:
    """The segments of a run, as it comes to them. sources: opened at config.sequence_length."""

    def __init__(self, config: TrainConfig, sources: list[Source]) -> None:
        self.config = config
        self._sources = {config.sequence_length: sources}

    def sources(self, sequence_length: int) -> list[Source]:
        """The sources, cut into samples of that length."""
        if sequence_length not in self._sources:
            opened = self._sources[self.config.sequence_length]
            self._sources[sequence_length] = [with_sequence_length(source, sequence_length) for source in opened]
        return self._sources[sequence_length]

    def state(self, step: int, reason: str = "start") -> State:
        """The state of a run that would begin with the step after `step` steps."""
        now = settings(self.config, step)
        sources = self.sources(now.sequence_length)
        return start_state(sources, self.config.seed, now.global_batch_size, now.weights, reason)

    def resume(self, saved: State, step: int) -> State:
        """The state to go on from after `step` steps: `saved`, with a segment more if something else is asked for now.

        Raises InputError where that is another order of samples, unless data.allow_change.
        """
        # What the last step was trained on; a phase that begins with the next one isn't a change.
        return resume_state(saved, self.state(max(0, step - 1)), self.config.data.allow_change)

    def advance(self, state: State, step: int) -> State:
        """The state in which the step that follows `step` steps is trained: with segments more where they begin."""
        now, n = settings(self.config, step), state["n"]
        if not _same(state["segments"][-1], now):
            state = then(state, self.state(step, f"phase {now.phases[-1]}" if now.phases else "no phase"))
        while (until := self._window(n, n + now.global_batch_size)) is not None:
            state = then(state, self.state(step, "data.pass_over"), until)
            n = state["n"]
        return state

    def pass_over(self, state: State, step: int, until: int, reason: str) -> State:
        """`state`, of `step` steps, with a segment more that begins behind sample `until`, which is still to come."""
        return then(self.advance(state, step), self.state(step, reason), until)

    def _window(self, first: int, end: int) -> int | None:
        """The last sample of a window that samples [first, end) touch."""
        touched = [last for begin, last in self.config.data.pass_over if begin < end and last >= first]
        return max(touched, default=None)


def _same(segment: Segment, now: Settings) -> bool:
    weights = {name: part["weight"] for name, part in segment["mixture"].items()}
    return (segment["sequence_length"], segment["global_batch_size"], weights) == (
        now.sequence_length,
        now.global_batch_size,
        now.weights,
    )
