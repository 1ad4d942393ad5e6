"""The engine that a configuration asks for."""

from __future__ import annotations

from megatrain.config import DeepSpeedConfig, EngineConfig, FsdpConfig, Precision
from megatrain.engines.engine import Engine


def make(
    config: EngineConfig, precision: Precision, micro_batch_size: int, gradient_clip: float, sources: int
) -> Engine:
    """The engine, before it is built. Only the one that is asked for is imported: DeepSpeed alone takes seconds.

    micro_batch_size: in samples. gradient_clip: largest global norm, 0 for none. sources: how many data sources Stats
    tell apart.
    """
    match config:
        case DeepSpeedConfig():
            from megatrain.engines.deepspeed import DeepSpeedEngine

            return DeepSpeedEngine(config, precision, micro_batch_size, gradient_clip, sources)
        case FsdpConfig():
            from megatrain.engines.fsdp import FsdpEngine

            return FsdpEngine(config, precision, gradient_clip, sources)
    raise TypeError(f"no engine for {type(config).__name__}")
