"""`megatrain export checkpoint=C output=DIR`: a checkpoint as a Hugging Face folder."""

from __future__ import annotations

from pathlib import Path

from megatrain.checkpoint.huggingface.export import export
from megatrain.command_config import ExportConfig
from megatrain.errors import DONE
from megatrain.evaluate.loading import Checkpoint, attempt


def run(config: ExportConfig) -> int:
    """Writes the folder and prints where it is; the exit code."""
    output = Path(config.output)

    def write(checkpoint: Checkpoint) -> None:
        export(
            checkpoint.reader,
            checkpoint.model,
            checkpoint.tokenizer_path,
            output,
            config.precision,
            checkpoint.sequence_length,
            checkpoint.eos_id,
        )

    attempt(config.checkpoint, write)
    print(output)
    return DONE
