# SPDX-License-Identifier: MIT
"""Progress of a stage: the lines it prints, and the bar in a terminal."""

from __future__ import annotations

import io
import logging
import sys
from collections import Counter
from types import SimpleNamespace

import pytest

from namedmask import console, progress
from namedmask.distributed import Worker
from namedmask.progress import Progress


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still until the test moves it."""
    now = SimpleNamespace(time=100.0)
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: now.time))
    return now


def test_a_line_every_ten_seconds_and_one_at_the_end(clock, printing, capsys):
    with Progress("index", Worker()) as shown:
        shown.total = 50
        for time, photos in ((100.0, 5), (110.0, 5), (110.5, 11), (111.0, 1), (120.0, 1), (120.6, 18)):
            clock.time = time
            shown.advance(photos)
        shown.note = "a note"
        clock.time = 131.0
        shown.advance(4)
        clock.time = 140.0
    assert capsys.readouterr().out.splitlines() == [
        "index: 21 of 50 photos, 2.0/s, 14 s left",
        "index: 41 of 50 photos, 2.0/s, 5 s left",
        "index: 45 of 50 photos, 1.5/s, 3 s left (a note)",
        "index: 45 photos, 1.1/s, 40.0 s (a note)",
    ]


def test_existing_photos_do_not_count_toward_the_rate(clock, printing, capsys):
    with Progress("index", Worker()) as shown:
        assert (shown.done, shown.skipped) == (0, 0)
        shown.total = 40
        shown.advance(20, existing=True)
        clock.time = 111.0
        shown.advance(0)
        shown.advance(11)
        assert (shown.done, shown.skipped) == (31, 20)
    with Progress("masks", Worker()) as shown:
        shown.advance(20, existing=True)
    with Progress("report", Worker()):
        pass
    assert capsys.readouterr().out.splitlines() == [
        "index: 20 of 40 photos, 0.0/s",
        "index: 31 photos, 1.0/s, 20 done before, 11.0 s",
        "masks: 20 done before, 0.0 s",
        "report: 0.0 s",
    ]


def test_only_the_main_worker_prints_and_only_without_an_error(clock, printing, capsys):
    counters: Counter[str] = Counter()
    with Progress("index", Worker(1, 2, counters=counters)) as shown:
        clock.time = 120.0
        shown.advance(3)
    with pytest.raises(RuntimeError), Progress("index", Worker(0, 2, counters=counters)) as shown:
        shown.advance(2)
        raise RuntimeError
    assert shown.done == 5 and capsys.readouterr().out == ""


def test_lines_are_flushed(monkeypatch, clock, printing):
    """Output that goes to a file is read while a stage runs."""
    flushed = []
    monkeypatch.setattr(sys, "stdout", stream := io.StringIO())
    monkeypatch.setattr(stream, "flush", lambda: flushed.append(stream.getvalue().count("\n")), raising=False)
    with Progress("index", Worker()) as shown:
        clock.time = 120.0
        shown.advance(1)
        assert flushed == [1]
    assert flushed[-1] == 2


def test_bar_in_a_terminal(monkeypatch, clock, printing):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stdout", terminal := Terminal())
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("TERM", "xterm")
    with Progress("[b]", Worker()) as shown:
        shown.total, shown.note = 8, "[red]"
        clock.time = 102.0
        shown.advance(3)
        bar = printing.bar
        assert bar is not None and bar.live.is_started
        shown.total = 9
        shown.advance(4)
        assert printing.bar is bar and len(bar.tasks) == 1
        task = bar.tasks[0]
        assert (task.completed, task.total, task.description) == (7, 9, "[b]")
        assert task.fields == {"rate": "3.5/s", "note": "[red]"}
    assert not bar.live.is_started
    drawn, _, last = terminal.getvalue().rpartition("[b]: ")
    assert all(text in drawn for text in ("[b]", "[red]", "7/9")) and last == "7 photos, 3.5/s, 2.0 s ([red])\n"


def test_names_are_printed_without_markup(printing, capsys):
    console.plain_console().print("[red]:smile: 12 'a'")
    progress.warn("no photo")
    assert capsys.readouterr() == ("[red]:smile: 12 'a'\n", "namedmask: warning: no photo\n")


def test_messages_are_printed_once_if_a_library_configures_logging(capsys):
    handler = logging.StreamHandler(sys.stderr)
    logging.getLogger().addHandler(handler)
    try:
        with console.printing():
            progress.warn("few masks")
    finally:
        logging.getLogger().removeHandler(handler)
    assert capsys.readouterr().err == "namedmask: warning: few masks\n"
    assert progress.logger.propagate
