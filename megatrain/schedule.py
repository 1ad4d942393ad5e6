"""The learning rate of each step. No torch.

Design choices:
- It is a pure function of the step: there is no scheduler with a state to save.
"""

from __future__ import annotations

import math

from megatrain.config import OptimConfig, Schedule


def warmup_steps(config: OptimConfig, max_steps: int) -> int:
    """Steps of linear warm-up at the start."""
    return -(-max_steps // 100) if config.warmup_steps is None else config.warmup_steps


def decay_steps(config: OptimConfig, max_steps: int) -> int:
    """Steps over which the rate decays at the end."""
    if config.schedule is Schedule.constant:
        return 0
    if config.decay_steps is not None:
        return config.decay_steps
    if config.schedule is Schedule.cosine:
        return max_steps - warmup_steps(config, max_steps)
    return max_steps // 5


def learning_rate(config: OptimConfig, step: int, max_steps: int) -> float:
    """The learning rate of optimizer step `step`, counted from 0; the last step has final_ratio of the peak.

    Cosine: Loshchilov & Hutter 2017, section 3 (one period). Warm-up-stable-decay: Hu et al. 2024, section 4.2, with a
    linear decay (Hägele et al. 2024, section 4).
    """
    warmup = warmup_steps(config, max_steps)
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    decay = decay_steps(config, max_steps)
    since = step - (max_steps - decay)
    if since < 0 or decay == 0:
        return config.learning_rate
    progress = min(1.0, (since + 1) / decay)
    falling = (
        1 - progress if config.schedule is Schedule.warmup_stable_decay else (1 + math.cos(math.pi * progress)) / 2
    )
    return config.learning_rate * (config.final_ratio + (1 - config.final_ratio) * falling)
