"""Watchdogs over a real store and a clock of the test: who ends when, with which words, and what they leave."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from megatrain.errors import BUG, GAVE_UP
from megatrain.resilience import watchdog
from megatrain.resilience.collectives import GroupRecord, Operation, Recorder
from megatrain.resilience.outcome import read_outcome
from megatrain.resilience.progress import Progress
from megatrain.resilience.watchdog import Watchdog
from tests.resilience.stores import tcp_stores

RANKS = 3
HEARTBEAT, TIMEOUT = 0.1, 5.0
SAID = "megatrain train: "


class Ranks:
    """RANKS watchdogs whose threads aren't started: they look when `beat` says so, HEARTBEAT later each time."""

    def __init__(
        self,
        run_dir: Path,
        attempt: str = "1",
        stores: list[Any] | None = None,
        timeout: float = TIMEOUT,
        recorders: Sequence[Recorder | None] = (None,) * RANKS,
    ) -> None:
        self.now = 0.0
        self.ended: dict[int, int] = {}
        self.progress = [Progress() for _ in range(RANKS)]
        for each in self.progress:
            each.at(1, "data")
        self.stores = stores or tcp_stores(RANKS)
        self.watchdogs = [
            Watchdog(
                self.progress[rank],
                self.stores[rank],
                attempt,
                run_dir,
                rank,
                RANKS,
                HEARTBEAT,
                timeout,
                clock=lambda: self.now,
                end_process=lambda code, rank=rank: self.ended.update({rank: code}),  # type: ignore[misc]
                recorder=recorders[rank],
            )
            for rank in range(RANKS)
        ]

    def beat(self, times: int, moving: tuple[int, ...] = (), silent: tuple[int, ...] = ()) -> None:
        """All but `silent` look so many times, until they end; before each the main threads of `moving` move on."""
        for _ in range(times):
            self.now += HEARTBEAT
            for rank in moving:
                self.progress[rank].at(self.progress[rank].place.step + 1, "data")
            for rank in range(RANKS):
                if rank not in self.ended and rank not in silent:
                    self.watchdogs[rank].look()


ALL = tuple(range(RANKS))
BEATS_OF_TIMEOUT = round(TIMEOUT / HEARTBEAT)


@pytest.fixture
def ranks(tmp_path: Path) -> Ranks:
    return Ranks(tmp_path)


def reason_of(run_dir: Path, exit_code: int = BUG) -> str:
    outcome = read_outcome(run_dir)
    assert outcome is not None
    assert outcome.exit_code == exit_code
    return outcome.reason


def stacks(run_dir: Path) -> list[str]:
    return sorted(path.name for path in run_dir.glob("stacks/*"))


def test_a_run_that_moves_goes_on(ranks: Ranks, tmp_path: Path) -> None:
    ranks.beat(5 * BEATS_OF_TIMEOUT, moving=ALL)
    assert ranks.ended == {}
    assert list(tmp_path.iterdir()) == []


def test_a_hang_ends_all_with_one_line(ranks: Ranks, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ranks.beat(10, moving=ALL)
    for rank in (0, 2):
        ranks.progress[rank].at(11, "accumulate")
    ranks.beat(BEATS_OF_TIMEOUT)
    assert ranks.ended == {}
    ranks.beat(3)
    assert ranks.ended == dict.fromkeys(ALL, BUG)
    reason = reason_of(tmp_path)
    assert reason.startswith("rank 1 (")
    assert reason.endswith(
        ") hung reading data for step 11 for 5 s; the others waited, up to computing step 11; likely storage"
    )
    assert capsys.readouterr().err == f"{SAID}{reason}\n"
    assert stacks(tmp_path) == [f"rank_0000{rank}.txt" for rank in ALL]
    text = (tmp_path / "stacks" / "rank_00001.txt").read_text()
    assert text.startswith(f"{reason}\n\n")
    assert " in test_a_hang_ends_all_with_one_line\n" in text


class Recording:
    """A flight recorder that says that its rank has entered so many collectives of all ranks, and waits in the last."""

    def __init__(self, entered: int, waits: bool) -> None:
        self.said = GroupRecord("0", 0, "", RANKS, entered, Operation("all_reduce", entered, 8) if waits else None)
        self.asked = 0

    def records(self) -> tuple[GroupRecord, ...]:
        self.asked += 1
        return (self.said,)

    def trace(self) -> bytes:
        return f"{self.said.entered} entered".encode()


class Blocked(Recording):
    """One on a device that doesn't answer."""

    def __init__(self) -> None:
        super().__init__(1, waits=False)
        self.over = threading.Event()

    def records(self) -> tuple[GroupRecord, ...]:
        super().records()
        self.over.wait(20)
        return (self.said,)

    def trace(self) -> bytes:
        self.over.wait(20)
        return b""


def traces(run_dir: Path) -> dict[str, str]:
    """What flight recorders left of the only hang."""
    (hang,) = run_dir.glob("flight_recorder/*")
    return {path.name: path.read_text() for path in sorted(hang.iterdir())}


def test_the_collective_that_the_others_wait_in_is_named(tmp_path: Path) -> None:
    recorders = [Recording(7, waits=True), Recording(6, waits=False), Recording(7, waits=True)]
    ranks = Ranks(tmp_path, recorders=recorders)
    ranks.beat(10, moving=ALL)
    ranks.beat(BEATS_OF_TIMEOUT // 2 - 1)
    assert [each.asked for each in recorders] == [0, 0, 0], "while nothing has stood still for long"
    ranks.beat(BEATS_OF_TIMEOUT)
    assert ranks.ended == dict.fromkeys(ALL, BUG)
    assert re.fullmatch(
        r"rank 1 \(.+\) hung reading data for step 11 for 5 s; the others waited, in all_reduce 7 of all ranks; "
        "likely storage",
        reason_of(tmp_path),
    )
    assert traces(tmp_path) == {"rank_00000": "7 entered", "rank_00001": "6 entered", "rank_00002": "7 entered"}


def test_a_device_that_does_not_answer_hinders_neither_beats_nor_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(watchdog, "WRITE_SECONDS", 0.1)
    blocked = Blocked()
    ranks = Ranks(tmp_path, recorders=[Recording(7, waits=True), blocked, Recording(7, waits=True)])
    began = time.monotonic()
    ranks.beat(4 * BEATS_OF_TIMEOUT)
    assert time.monotonic() - began < 10
    assert ranks.ended == dict.fromkeys(ALL, BUG)
    assert blocked.asked == 1
    reason = reason_of(tmp_path)
    assert re.fullmatch(
        r"all 3 ranks have been reading data for step 1 for 15 s, none is behind the others; "
        r"no answer from the flight recorder of rank 1 \(.+\), likely a device that hangs",
        reason,
    )
    assert capsys.readouterr().err == f"{SAID}{reason}\n"
    assert sorted(traces(tmp_path)) == ["rank_00000", "rank_00002"]
    assert len(stacks(tmp_path)) == RANKS
    blocked.over.set()


def test_a_recorder_that_fails_does_not_hinder_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: Recording) -> Any:
        raise RuntimeError("CUDA error: unspecified launch failure")

    monkeypatch.setattr(Recording, "records", fail)
    monkeypatch.setattr(Recording, "trace", fail)
    ranks = Ranks(tmp_path, recorders=[Recording(7, waits=True) for _ in ALL])
    ranks.beat(4 * BEATS_OF_TIMEOUT)
    assert ranks.ended == dict.fromkeys(ALL, BUG)
    assert reason_of(tmp_path).startswith("all 3 ranks have been reading data for step 1 for 15 s")
    assert traces(tmp_path) == {}


def test_a_silent_rank_ends_the_others(ranks: Ranks, tmp_path: Path) -> None:
    ranks.beat(10, moving=ALL)
    ranks.beat(BEATS_OF_TIMEOUT - 2, moving=(0, 1), silent=(2,))
    assert ranks.ended == {}
    ranks.beat(4, moving=(0, 1), silent=(2,))
    assert ranks.ended == {0: BUG, 1: BUG}
    assert "rank 2 (" in reason_of(tmp_path)
    assert ") gave no sign of life for 5 s, last seen reading data for step 11: " in reason_of(tmp_path)
    ranks.beat(1)
    assert ranks.ended == dict.fromkeys(ALL, BUG), "who comes back finds the verdict"


def test_a_suspended_job_goes_on(ranks: Ranks) -> None:
    ranks.beat(10, moving=ALL)
    ranks.now += 3600
    ranks.beat(10)
    ranks.beat(3 * BEATS_OF_TIMEOUT, moving=ALL)
    assert ranks.ended == {}


def test_what_a_rank_tells_ends_the_others_without_stacks(
    ranks: Ranks, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ranks.watchdogs[1].start()
    ranks.watchdogs[1].tell(GAVE_UP, "rank 1: disk full")
    ranks.beat(1, silent=(1,))
    assert ranks.ended == {0: GAVE_UP, 2: GAVE_UP}
    assert reason_of(tmp_path, GAVE_UP) == "rank 1: disk full"
    assert stacks(tmp_path) == []
    assert capsys.readouterr().err == f"{SAID}rank 1: disk full\n"


def test_the_next_start_on_the_same_store_begins_well(ranks: Ranks, tmp_path: Path) -> None:
    ranks.beat(4 * BEATS_OF_TIMEOUT)
    assert ranks.ended == dict.fromkeys(ALL, BUG)
    again = Ranks(tmp_path, attempt="2", stores=ranks.stores)
    again.beat(10, moving=ALL)
    assert again.ended == {}


def test_a_watch_that_was_stopped_misses_nobody_and_is_not_missed(tmp_path: Path) -> None:
    ranks = Ranks(tmp_path, timeout=1.0)
    for each in ranks.watchdogs:
        each.start()
    ranks.watchdogs[2].stop()
    for _ in range(20):
        time.sleep(HEARTBEAT / 2)
        ranks.now += HEARTBEAT
        for rank in (0, 1):
            ranks.progress[rank].at(2, "data")
    for each in ranks.watchdogs:
        each.stop()
    assert ranks.ended == {}


def test_a_broken_communication_asks_who_is_gone(ranks: Ranks, tmp_path: Path) -> None:
    ranks.beat(10, moving=ALL)
    ranks.watchdogs[0].start()
    threading.Thread(target=ranks.watchdogs[0].ask_who_is_gone, daemon=True).start()
    deadline = time.monotonic() + 20
    while 0 not in ranks.ended and time.monotonic() < deadline:
        ranks.beat(1, moving=(0, 1), silent=(0, 2))
        time.sleep(HEARTBEAT / 2)
    ranks.watchdogs[0].stop()
    assert ranks.ended[0] == BUG
    assert re.match(
        r"rank 2 \(.+\) gave no sign of life for 0 s, last seen reading data for step 11", reason_of(tmp_path)
    )


def test_a_store_that_is_gone_is_said(tmp_path: Path) -> None:
    ranks = Ranks(tmp_path)
    ranks.beat(2, moving=ALL)
    # The server is rank 0's store, and ends with the last reference to it.
    del ranks.stores[0]
    ranks.watchdogs[0].store = ranks.stores[0]
    ranks.beat(1, silent=(0,))
    assert ranks.ended == {1: BUG, 2: BUG}
    reason = reason_of(tmp_path)
    assert reason.startswith("rank 1 (")
    assert ") lost the store on " in reason


class Deaf:
    """A store whose node lost its power: no request is ever answered."""

    def __init__(self) -> None:
        self.over = threading.Event()

    def set(self, *_: object) -> None:
        self.over.wait(20)


def test_a_store_that_does_not_answer_is_said(tmp_path: Path) -> None:
    ranks = Ranks(tmp_path, timeout=1.0)
    ranks.beat(2, moving=ALL)
    deaf: Any = Deaf()
    ranks.watchdogs[1].store = deaf
    ranks.beat(1, silent=(0, 2))
    deaf.over.set()
    assert ranks.ended == {1: BUG}
    assert reason_of(tmp_path).endswith("while reading data for step 3: no answer for 1 s")


def test_a_run_directory_that_cannot_be_written_does_not_hinder_the_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ranks = Ranks(tmp_path / "gone")
    ranks.beat(4 * BEATS_OF_TIMEOUT)
    assert ranks.ended == dict.fromkeys(ALL, BUG)
    assert "all 3 ranks have been reading data for step 1 for 15 s" in capsys.readouterr().err


def test_a_file_system_that_hangs_does_not_hinder_the_end(
    ranks: Ranks, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(watchdog, "WRITE_SECONDS", 0.1)
    monkeypatch.setattr(watchdog, "write_outcome", lambda *_: time.sleep(20))
    ranks.beat(4 * BEATS_OF_TIMEOUT)
    assert ranks.ended == dict.fromkeys(ALL, BUG)
    assert "none is behind the others; " in capsys.readouterr().err
