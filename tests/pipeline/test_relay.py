# SPDX-License-Identifier: MIT
"""Messages and progress of worker processes arrive where the workers were started."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from namedmask import relay
from namedmask.errors import UserError
from namedmask.progress import ProgressEvent, current_listener, listening, logger

WORKER = """
import sys
from namedmask.distributed import Worker
from namedmask.progress import Progress, logger, warn
from namedmask.relay import sending

with sending(sys.argv[1]):
    logger.info("100% \\udce9")
    warn("few")
    with Progress("index", Worker()) as progress:
        progress.total, progress.note = 3, "a note"
        progress.advance(2)
"""


def test_messages_and_progress_of_a_process_arrive_in_order(printing, monkeypatch):
    events, messages = [], []
    monkeypatch.setattr(printing, "emit", lambda record: messages.append((record.levelname, record.getMessage())))
    with listening(events.append), relay.receiving() as address:
        subprocess.run([sys.executable, "-c", WORKER, address], check=True)
    assert [(event.done, event.total, event.note, event.finished) for event in events] == [
        (2, 3, "a note", False),
        (2, 3, "a note", True),
    ]
    assert messages == [("INFO", "100% \udce9"), ("WARNING", "few")]
    assert not Path(address).exists()


def test_an_exception_of_the_listener_stops_the_senders_and_is_raised():
    def fail(event):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), listening(fail), relay.receiving() as address, relay.sending(address):
        show = current_listener()
        with pytest.raises(UserError, match="has stopped listening"):
            for _ in range(100_000):
                show(ProgressEvent("index", 1, 2))
        logger.warning("nobody receives it")


def test_an_error_of_the_launcher_is_raised_after_all_messages():
    events = []
    event = ProgressEvent("index", 1, 2)
    with pytest.raises(UserError, match=r"^died$"), listening(events.append), relay.receiving() as address:
        with relay.sending(address):
            for _ in range(50):
                current_listener()(event)
        raise UserError("died")
    assert events == [event] * 50


@pytest.mark.parametrize("name", ["x" * 100, "é" * 60])  # 120 bytes
def test_long_paths_of_temporary_folders(monkeypatch, name):
    with tempfile.TemporaryDirectory(dir="/tmp") as short:
        folder = Path(short, name)
        folder.mkdir()
        monkeypatch.setattr(relay.tempfile, "tempdir", str(folder))
        with relay.receiving() as address:
            assert len(os.fsencode(address)) <= 107
