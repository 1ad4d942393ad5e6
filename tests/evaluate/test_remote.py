"""The commands that read a checkpoint take its URL too."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatrain import storage
from megatrain.__main__ import main
from megatrain.checkpoint import remote as remotes
from megatrain.checkpoint.folders import step_folder
from tests.evaluate.conftest import Run
from tests.s3 import S3Server


@pytest.fixture
def url(trained: Run, s3: S3Server) -> str:
    """A copy of `trained`, as a run makes it."""
    url = f"{s3.new_bucket()}/runs/small"
    remote, folder = storage.root(url, "saving.remote"), step_folder(trained.run_dir, 3)
    remotes.upload_rank(folder, remote, 0)
    remotes.upload_run(trained.run_dir, remote)
    remotes.upload_commit(folder, remote)
    return url


def test_a_checkpoint_in_a_store_is_used_as_one_on_the_disk(
    trained: Run, url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results, texts = [], []
    for number, checkpoint in enumerate([str(trained.run_dir), url, f"{url}/checkpoints/step_00000003"]):
        output = tmp_path / str(number)
        assert main(["eval", f"checkpoint={checkpoint}", f"data.path={trained.data}", f"output={output}.json"]) == 0
        results.append(json.loads(Path(f"{output}.json").read_text()))
        assert main(["export", f"checkpoint={checkpoint}", f"output={output}"]) == 0
        capsys.readouterr()
        assert main(["generate", f"checkpoint={checkpoint}", "prompt=the words", "max_new_tokens=5"]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[1:] == texts[:1] * 2
    assert [result.pop("checkpoint") for result in results[1:]] == [f"{url}/checkpoints/step_00000003"] * 2
    del results[0]["checkpoint"]
    assert results[1:] == results[:1] * 2
    for name in ("model.safetensors", "tokenizer.json", "config.json"):
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "0" / name).read_bytes()


def test_a_tokenizer_that_was_not_copied_is_one_clear_line(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    (storage.root(url, "saving.remote") / "tokenizer.json").unlink()
    assert main(["generate", f"checkpoint={url}", "prompt=the"]) == 2
    said = f"megatrain generate: {url}/tokenizer.json: missing; it is the tokenizer of the checkpoint {url}/checkpoints"
    assert capsys.readouterr().err.startswith(said)
