"""Journals: whatever is cut short or read half, whole records are read once and in order."""

import tempfile
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from megatrain.data_prep.execute.journal import Journal, Tail


@settings(max_examples=30, deadline=None)
@given(st.lists(st.binary(max_size=40), max_size=4), st.integers(0))
def test_what_is_cut_short_isnt_read_and_the_next_start_writes_on(outcomes: list[bytes], cut: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "journal"
        path.touch()
        assert Tail(path).new() == []
        journal = Journal(path, "node1")
        ends = []
        for task, outcome in enumerate(outcomes):
            journal.add(task, outcome)
            ends.append(path.stat().st_size - 1)  # without the end of the line
        cut %= path.stat().st_size + 1
        with path.open("r+b") as file:
            file.truncate(cut)
        Journal(path, "node2").add(None, b"ended")
        whole = sum(end <= cut for end in ends)
        assert Tail(path).new() == [*enumerate(outcomes[:whole]), (None, b"ended")]


def test_each_record_is_read_once_and_half_a_line_later(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    path.touch()
    tail = Tail(path)
    assert not tail.started
    journal = Journal(path, "node1")
    assert (tail.new(), tail.started) == ([], True)
    journal.add(3, b"three")
    whole = path.read_bytes()
    with path.open("ab") as file:
        file.write(whole[:20])
    assert tail.new() == [(3, b"three")]
    assert tail.new() == []
    with path.open("ab") as file:
        file.write(whole[20:])
    assert tail.new() == [(3, b"three")]
