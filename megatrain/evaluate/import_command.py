"""`megatrain import source=DIR output=DIR`: a Hugging Face folder as a run directory that holds its weights."""

from __future__ import annotations

from pathlib import Path

from megatrain.checkpoint.format import TrainerState
from megatrain.checkpoint.huggingface.tokenizer import check_tokenizer
from megatrain.checkpoint.weights import write_run
from megatrain.command_config import ImportConfig
from megatrain.compose import plain
from megatrain.errors import DONE
from megatrain.evaluate.loading import open_hugging_face


def run(config: ImportConfig) -> int:
    """Writes the run directory and prints where the checkpoint is; the exit code."""
    source = open_hugging_face(Path(config.source), "source")
    check_tokenizer(source.tokenizer_path, source.model, source.eos_id)
    state = TrainerState(
        step=source.step,
        optimizer_step=0,
        samples=0,
        data={},
        config={
            "model": plain(source.model),
            "objective": plain(source.objective),
            "sequence_length": source.sequence_length,
            "data": {"document_mask": source.document_mask},
        },
        tokenizer={"sha256": source.tokenizer_sha256, "eos_id": source.eos_id},
        wandb_run_id=None,
    )
    print(write_run(Path(config.output), source.model, source.reader, state, source.tokenizer_path))
    return DONE
