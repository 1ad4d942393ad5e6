"""The scripts of launch/: they parse, and what they are given reaches megatrain."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatrain.resilience.outcome import write_outcome

LAUNCH = Path(__file__).parents[1] / "launch"
BIN = Path(sys.executable).parent
SCRIPTS = [*sorted(LAUNCH.rglob("*.sh")), *sorted(LAUNCH.rglob("*.sbatch"))]


SCONTROL = """
case "$*" in
    "show hostnames "*) printf "%s\\n" node7 node8 ;;
    "show job "*) echo "   ReqNodeList=(null) ExcNodeList=${EXCLUDED:-(null)}" ;;
    *) echo "scontrol $*" ;;
esac
"""
SBATCH = """
if [[ "$*" == *"$REFUSED"* ]]; then exit 1; fi
echo "$*" >> "$LOG"
wc -l < "$LOG"
"""
"""The number of a job is that of its line in $LOG. Refuses what has $REFUSED in it."""


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """One in which `megatrain` and `srun` print their arguments, a line each, and end with $CODE; scontrol its own."""
    programs = {
        "megatrain": 'printf "%s\\n" "$@"; exit "${CODE:-0}"',
        "apptainer": 'printf "%s\\n" apptainer "$@"; exit "${CODE:-0}"',
        "srun": 'printf "%s\\n" "$@"; if [[ -v SAYS ]]; then eval "$SAYS"; fi; exit "${CODE:-0}"',
        "scontrol": SCONTROL,
        "sbatch": SBATCH,
        "scancel": 'echo "scancel $*"',
        "sleep": ":",
    }
    for name, body in programs.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    return {"PATH": f"{tmp_path}:{os.environ['PATH']}"}


def run(script: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([LAUNCH / script, *arguments], env=environment, capture_output=True, text=True, timeout=30)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: str(script.relative_to(LAUNCH)))
def test_shellcheck_has_nothing_to_say_and_a_script_fails_on_errors(script: Path) -> None:
    subprocess.run([BIN / "shellcheck", "--enable=quote-safe-variables", script], check=True)
    assert os.access(script, os.X_OK)
    assert "\nset -euo pipefail\n" in script.read_text()


def test_single_node_is_megatrain_train() -> None:
    ended = run("torchrun/single_node.sh", "--help", **{**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}"})
    assert ended.returncode == 0, ended.stderr
    assert "max_steps" in ended.stdout


def test_arguments_and_the_exit_code_pass_through(environment: dict[str, str]) -> None:
    ended = run("torchrun/single_node.sh", "run_dir=a b", "data.path=x=*", CODE="75", **environment)
    assert ended.stdout.splitlines() == ["train", "run_dir=a b", "data.path=x=*"]
    assert ended.returncode == 75


def test_multi_node_says_where_to_meet(environment: dict[str, str]) -> None:
    ended = run("torchrun/multi_node.sh", "run_dir=r", NODES="4", RENDEZVOUS="node1:29500", **environment)
    assert ended.stdout.splitlines() == ["train", "launch.nodes=4", "launch.rendezvous=node1:29500", "run_dir=r"]
    for missing in ("NODES", "RENDEZVOUS"):
        given = {"NODES": "4", "RENDEZVOUS": "node1:29500"}
        del given[missing]
        ended = run("torchrun/multi_node.sh", "run_dir=r", **given, **environment)
        assert ended.returncode != 0
        assert f"{missing}: is needed" in ended.stderr


JOB = {"SLURM_JOB_ID": "12345", "SLURM_JOB_NODELIST": "node[7-8]"}


def crash(run_dir: Path, reason: str) -> str:
    """The line of bash that does what a launcher does whose run has failed."""
    found = run_dir.parent / "outcome"
    found.mkdir(exist_ok=True)
    (found / "outcome.json").unlink(missing_ok=True)
    write_outcome(found, 1, reason, step=None, rank=None)
    return f"mkdir -p {run_dir} && cp {found}/outcome.json {run_dir}"


@pytest.mark.parametrize("code", [0, 2, 3, 75])
def test_a_job_is_requeued_when_it_was_stopped_but_not_when_it_has_ended(
    environment: dict[str, str], code: int
) -> None:
    """What a cluster does with it is Slurm's; here are the step's command line and the decision."""
    ended = run("slurm/pretrain.sbatch", "run_dir=r", CODE=str(code), **JOB, **environment)
    lines = ended.stdout.splitlines()
    step = lines[lines.index("megatrain") :]
    assert step[:5] == ["megatrain", "train", "launch.nodes=2", "launch.rendezvous=node7:22345", "run_dir=r"]
    assert ("scontrol requeue 12345" in lines) == (code == 75)
    assert ended.returncode == code


def test_a_crash_is_requeued_unless_megatrain_never_began(environment: dict[str, str], tmp_path: Path) -> None:
    run_dir = tmp_path / "run"

    def requeued(code: int, says: str) -> bool:
        ended = run("slurm/pretrain.sbatch", f"run_dir={run_dir}", CODE=str(code), SAYS=says, **JOB, **environment)
        assert ended.returncode == code, ended.stderr
        assert "ExcNodeList" not in ended.stdout
        return "scontrol requeue 12345" in ended.stdout

    assert not requeued(127, ":")  # no such command
    assert requeued(1, crash(run_dir, "rank 3 (node8) was killed by signal 9"))
    assert not requeued(1, ":")  # That outcome is the earlier start's.
    assert requeued(137, ":")  # The launcher itself was killed.


@pytest.mark.parametrize(
    ("reason", "blamed"),
    [
        ("rank 3 (node8) was killed by signal 9", ["node8"]),
        ("ranks 8, 9 and 4 more (node7, node8) gave no sign of life for 60 s, last seen computing", ["node7", "node8"]),
        ("rank 3 (node8.cluster.example.org) died, last seen saving step 7", ["node8"]),
        ("rank 3 (login) was killed by signal 9", []),
        ('rank 5 (node7): RuntimeError: CUDA error: "uncorrectable ECC error" (rank 2)', ["node7"]),
        (
            "rank 3 (node8) hung computing step 7 for 60 s; the others waited, in recv between ranks 2, 3 (node7)",
            ["node8"],
        ),
        ("all 16 ranks have been computing step 7 (forward) for 60 s, none is behind the others", []),
        ("all_reduce 9 of data-parallel ranks 1, 3 (node7, node8), which all of them have entered, hung for 60 s", []),
        ("ranks wait in different collectives for 60 s, computing step 7: rank 0 (node7) in all_reduce 9 of", []),
        ("rank 3 (node7) lost the store on node8 while computing step 7: no answer", []),
    ],
)
def test_a_node_with_two_crashes_is_left_out(
    environment: dict[str, str], tmp_path: Path, reason: str, blamed: list[str]
) -> None:
    run_dir, last = tmp_path / "run", ""
    for _ in range(2):
        assert "ExcNodeList" not in last
        says = crash(run_dir, reason)
        job = {**JOB, "EXCLUDED": "a1", "CODE": "1", "SAYS": says}
        last = run("slurm/pretrain.sbatch", f"run_dir={run_dir}", **job, **environment).stdout
    lines = last.splitlines()
    assert "scontrol requeue 12345" in lines
    noted = [line.split()[1] for line in (run_dir / "failed_nodes.txt").read_text().splitlines()]
    assert noted == blamed * 2
    if blamed:
        assert f"scontrol update JobId=12345 ExcNodeList=a1,{','.join(blamed)}" in lines
    else:
        assert "ExcNodeList" not in last


CONTAINERS = {
    "/images/m.sif": ["apptainer", "exec", "--nv", "--bind", "/data:/data", "/images/m.sif", "megatrain"],
    "org/m:1": [
        "--no-container-entrypoint",
        "--container-image=org/m:1",
        "--container-mounts=/data:/data",
        "megatrain",
    ],
}


@pytest.mark.parametrize("image", CONTAINERS)
def test_what_runs_in_a_container(environment: dict[str, str], tmp_path: Path, image: str) -> None:
    container = {"CONTAINER_IMAGE": image, "CONTAINER_MOUNTS": "/data:/data"}
    scripts = {
        "pretrain": [f"run_dir={tmp_path}", "max_steps=3"],
        "eval": ["checkpoint=r", "text=a b"],
        "prep": ["input=a b", "output=o"],
    }
    for script, arguments in scripts.items():
        ended = run(f"slurm/{script}.sbatch", *arguments, **JOB, **container, **environment)
        assert ended.returncode == 0, ended.stderr
        lines = [line for line in ended.stdout.splitlines() if "job 12345" not in line and "exit code" not in line]
        expected = [word for word in CONTAINERS[image] if word != "--nv" or script != "prep"]
        begin = lines.index(expected[0])
        assert lines[begin : begin + len(expected)] == expected
        assert lines[-len(arguments) :] == arguments
    relative = run("slurm/pretrain.sbatch", "run_dir=r", **JOB, **container, **environment)
    assert relative.returncode == 2
    assert "run_dir=r: has to be an absolute path" in relative.stderr


def test_prep_without_a_container_is_an_array_unless_told_otherwise(environment: dict[str, str]) -> None:
    ended = run("slurm/prep.sbatch", "input=i", "executor=pool", CODE="3", **JOB, **environment)
    assert ended.stdout.splitlines() == ["prep", "executor=slurm", "input=i", "executor=pool"]
    assert ended.returncode == 3


def pipeline(
    environment: dict[str, str], tmp_path: Path, *words: str, refused: str = "nothing"
) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    """Its end, and what it has submitted."""
    log = tmp_path / "submitted"
    log.write_text("")
    ended = run("slurm/pipeline.sh", *words, LOG=str(log), REFUSED=refused, **environment)
    return ended, [line.replace(f"{LAUNCH}/slurm/", "") for line in log.read_text().splitlines()]


def test_each_job_of_a_pipeline_waits_for_the_one_before(environment: dict[str, str], tmp_path: Path) -> None:
    words = ["prep", "input=a=b", "train", "--nodes=2", "--exclusive", "run_dir=r", "eval", "checkpoint=r"]
    ended, submitted = pipeline(environment, tmp_path, *words)
    assert ended.returncode == 0, ended.stderr
    assert submitted == [
        "--parsable prep.sbatch input=a=b",
        "--parsable --nodes=2 --exclusive --dependency=afterok:1 --kill-on-invalid-dep=yes pretrain.sbatch run_dir=r",
        "--parsable --dependency=afterok:2 --kill-on-invalid-dep=yes eval.sbatch checkpoint=r",
    ]
    assert ended.stdout.splitlines() == ["prep: job 1", "train: job 2", "eval: job 3"]


@pytest.mark.parametrize(
    ("words", "wrong"),
    [([], "nothing given"), (["input=i"], "input=i"), (["prep", "input"], "input"), (["prep", "-N2"], "-N2")],
)
def test_a_pipeline_that_cannot_be_read_submits_nothing(
    environment: dict[str, str], tmp_path: Path, words: list[str], wrong: str
) -> None:
    ended, submitted = pipeline(environment, tmp_path, *words)
    assert (ended.returncode, submitted) == (2, [])
    assert ended.stderr.startswith(f"pipeline.sh: {wrong}: ")


def test_a_job_that_is_refused_takes_back_those_before_it(environment: dict[str, str], tmp_path: Path) -> None:
    words = ["prep", "input=i", "train", "--partition=none", "run_dir=r", "eval", "checkpoint=r"]
    ended, submitted = pipeline(environment, tmp_path, *words, refused="--partition=none")
    assert (ended.returncode, len(submitted)) == (2, 1)
    assert "scancel 1" in ended.stdout
    assert ended.stderr == "pipeline.sh: train: sbatch refuses it; nothing is left in the queue\n"
