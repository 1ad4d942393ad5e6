"""A run directory with a checkpoint, and shards with a held-out split, made by the real writers."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from megatrain.checkpoint.format import TrainerState
from megatrain.checkpoint.manager import CheckpointManager
from megatrain.config import ModelConfig, ObjectiveConfig
from megatrain.data.format import HELD_OUT, Manifest, ShardList, shard_name
from megatrain.data_prep.shards.manifest import write_manifest
from megatrain.data_prep.shards.writer import ShardWriter
from megatrain.engines.ranges import Shard
from megatrain.model.initialization import InitialWeights
from megatrain.model.spec import parameters
from tests.tokenizer import load, make_tokenizer

MODEL = ModelConfig(
    name="small",
    vocab_size=300,
    hidden_size=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    intermediate_size=48,
    tie_embeddings=True,
    initializer_std=0.2,
)
LENGTH = 16
DOCUMENTS = ["the words of the text", "that the tokenizer of these tests is trained on", "and the ends of them " * 10]


@dataclass(frozen=True)
class Run:
    """run_dir and data are folders; `reader` has the weights that were saved."""

    run_dir: Path
    data: Path
    reader: InitialWeights


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("evaluate")
    (folder / "run").mkdir()
    tokenizer = make_tokenizer(folder / "run" / "tokenizer.json")
    sha256 = hashlib.sha256(tokenizer.read_bytes()).hexdigest()
    write_held_out(folder / "data", tokenizer, sha256)
    reader = InitialWeights(MODEL, seed=1)
    shards = [
        Shard(spec.name, spec.shape, ((0, spec.size),), {"master": reader.read("master", spec.name, 0, spec.size)})
        for spec in parameters(MODEL)
    ]
    model = OmegaConf.to_container(OmegaConf.structured(MODEL), enum_to_str=True)
    objective = OmegaConf.to_container(OmegaConf.structured(ObjectiveConfig()))
    state = TrainerState(
        step=3,
        optimizer_step=3,
        samples=24,
        data={},
        config={
            "model": model,
            "objective": objective,
            "sequence_length": LENGTH,
            "data": {"document_mask": True},
        },
        tokenizer={"sha256": sha256, "eos_id": 0},
        wandb_run_id=None,
    )
    CheckpointManager(folder / "run").save(3, shards, state)
    return Run(folder / "run", folder / "data", reader)


def write_held_out(folder: Path, tokenizer: Path, sha256: str) -> None:
    """The documents as a held-out split of one shard."""
    (folder / HELD_OUT).mkdir(parents=True)
    (folder / "tokenizer.json").write_bytes(tokenizer.read_bytes())
    documents = [[*load(tokenizer).encode(text).ids, 0] for text in DOCUMENTS]
    writer = ShardWriter(folder / HELD_OUT / shard_name(0))
    ids = np.concatenate([np.array(document, np.uint16) for document in documents])
    writer.add(ids, np.array([len(document) for document in documents], np.uint32))
    entry = writer.commit(None, None, "0" * 32)
    manifest = Manifest(
        split=HELD_OUT,
        id_dtype="uint16",
        vocab_size=MODEL.vocab_size,
        eos_id=0,
        tokenizer_sha256=sha256,
        tokens=entry.tokens,
        documents=len(documents),
        shards=ShardList.of([entry]),
    )
    write_manifest(folder / HELD_OUT, manifest)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)
