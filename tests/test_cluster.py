"""conf/cluster: what the ranks are told of the network reaches them, and what no library reads is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatrain.checks import CLUSTER_VARIABLE
from megatrain.compose import CONF, compose
from megatrain.errors import BUG
from megatrain.resilience.outcome import read_outcome
from tests.distributed.command import train, write_small_set

PRESETS = sorted(path.stem for path in (CONF / "cluster").glob("*.yaml"))
NEEDED = ("run_dir=r", "max_steps=1")


def environment(*arguments: str) -> dict[str, str]:
    found: dict[str, str] = compose("train", [*NEEDED, *arguments]).cluster.environment
    return found


def test_there_is_a_preset_for_each_kind_of_network() -> None:
    assert PRESETS == ["a100", "cpu", "generic", "h100_efa", "h100_ib", "h100_roce"]


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_named_as_its_file_and_sets_what_may_be_set(name: str) -> None:
    assert compose("train", [*NEEDED, f"cluster={name}"]).cluster.name == name
    assert all(CLUSTER_VARIABLE.fullmatch(variable) for variable in environment(f"cluster={name}"))


@pytest.mark.parametrize("name", [name for name in PRESETS if name not in ("cpu", "generic")])
def test_a_fabric_is_asked_for_by_name_so_that_its_absence_is_an_error(name: str) -> None:
    assert environment(f"cluster={name}")["NCCL_NET"] in ("IB", "AWS Libfabric")


def test_keys_add_to_a_preset_and_replace() -> None:
    given = ("cluster.environment.NCCL_IB_HCA==mlx5_0,mlx5_3", "cluster.environment.NCCL_IB_TC=41")
    assert environment() == {}
    assert environment("cluster=h100_roce", *given) == {
        "NCCL_NET": "IB",
        "NCCL_IB_TC": "41",
        "NCCL_IB_HCA": "=mlx5_0,mlx5_3",
    }


@pytest.mark.parametrize("name", ["NCLL_DEBUG", "LD_PRELOAD", "RANK", "NCCL_", "nccl_debug"])
def test_what_no_library_reads_is_refused(name: str) -> None:
    assert not CLUSTER_VARIABLE.fullmatch(name)


@pytest.mark.distributed
def test_the_ranks_have_it_when_they_connect(tmp_path: Path) -> None:
    """An interface that isn't there: only gloo, on the ranks, can complain of it."""
    shards = write_small_set(tmp_path / "set")
    with train(shards, tmp_path / "run", "cluster.environment.GLOO_SOCKET_IFNAME=none0") as command:
        assert command.wait().code == BUG
    outcome = read_outcome(tmp_path / "run")
    assert outcome is not None
    assert "none0" in outcome.reason
