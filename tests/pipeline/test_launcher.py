# SPDX-License-Identifier: MIT
import logging
import os
import signal
import sys
from types import SimpleNamespace

import pytest

from namedmask import launcher, process
from namedmask.errors import NothingUsable, UserError


@pytest.fixture
def launched(monkeypatch):
    """What torch's launcher is called with. Its workers write the text of `failure`, and it raises `fail`, if set."""
    from torch.distributed.launcher import api

    call = SimpleNamespace(fail=None, failure=None)

    def elastic_launch(config, entrypoint):
        def start(*arguments):
            call.config, call.arguments = config, (entrypoint, *arguments)
            call.threads = os.environ["OMP_NUM_THREADS"]
            call.level = logging.getLogger("torch.distributed.elastic").level
            call.other_level = logging.getLogger("torch").level
            os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = "SIGTERM"  # as torch does
            signal.signal(signal.SIGTERM, lambda *_: None)
            if call.failure:
                path, text = call.failure
                path.write_text(text)
            if call.fail:
                raise call.fail

        return start

    monkeypatch.setattr(api, "elastic_launch", elastic_launch)
    monkeypatch.setattr("namedmask_kernels.threads.usable_cores", lambda: 5)
    monkeypatch.setenv("OMP_NUM_THREADS", "")
    monkeypatch.delenv("OMP_NUM_THREADS")
    return call


@pytest.mark.parametrize(("workers", "threads"), [(2, "2"), (5, "1"), (8, "1")])
def test_launcher_starts_workers_on_their_cores(launched, tmp_path, workers, threads):
    logging.getLogger("torch.distributed.elastic").setLevel(logging.DEBUG)
    before = signal.getsignal(signal.SIGTERM)
    launcher.launch("namedmask.run", tmp_path, "cpu", workers, "", "index")
    assert launched.arguments[:4] == (sys.executable, "-m", "namedmask.run", str(os.getpid()))
    assert launched.arguments[5:] == (str(tmp_path), "cpu", "", "index")
    config = launched.config
    assert (config.min_nodes, config.max_nodes, config.nproc_per_node, config.max_restarts) == (1, 1, workers, 3)
    assert (config.rdzv_endpoint, config.signals_to_handle, config.start_method) == ("localhost:0", "SIGTERM", "spawn")
    assert launched.threads == threads
    assert launched.level == logging.ERROR != launched.other_level
    # Nothing of it is left in the process that has started the workers.
    assert "OMP_NUM_THREADS" not in os.environ and "TORCHELASTIC_SIGNALS_TO_HANDLE" not in os.environ
    assert logging.getLogger("torch.distributed.elastic").level == logging.DEBUG
    assert signal.getsignal(signal.SIGTERM) is before


def died(code):
    """torch's error for workers 3 and 4 that have ended with this exit code."""
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    error = ChildFailedError.__new__(ChildFailedError)
    error.failures = {r: SimpleNamespace(timestamp=r, exitcode=code, local_rank=r, pid=1) for r in (3, 4)}
    return error


@pytest.mark.parametrize(("code", "how"), [(-9, "signal 9"), (1, "exit code 1"), (0, "exit code 0")])
def test_dead_worker_is_named(launched, tmp_path, code, how):
    launched.fail = died(code)
    (tmp_path / ".failed").write_text("2 reason of an earlier command")
    with pytest.raises(UserError, match=rf"^worker 3 died \({how}\) again after 3 restarts; finished shards are kept"):
        launcher.launch("namedmask.run", tmp_path, "cpu", 2)


@pytest.mark.parametrize(
    ("text", "kind", "message"),
    [
        ("2 no weights", UserError, "no weights"),
        ("3 no photo", NothingUsable, "no photo"),
        ("", UserError, "a worker failed, see above"),
    ],
)
def test_reason_of_a_failed_worker(launched, tmp_path, text, kind, message):
    launched.fail, launched.failure = died(2), (tmp_path / ".failed", text)
    with pytest.raises(kind, match=f"^{message}$") as caught:
        launcher.launch("namedmask.run", tmp_path, "cpu", 2)
    assert type(caught.value) is kind and not (tmp_path / ".failed").exists()


def test_sigterm_of_the_launcher_is_an_interruption(launched, tmp_path):
    from torch.distributed.elastic.multiprocessing.api import SignalException

    launched.fail = SignalException("", signal.SIGTERM)
    before, seen = signal.getsignal(signal.SIGTERM), []
    signal.signal(signal.SIGTERM, lambda signum, _: seen.append(signum))
    try:
        with pytest.raises(process.Interrupted) as caught:
            launcher.launch("namedmask.run", tmp_path, "cpu", 2)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert caught.value.exit_code == 143 and seen == [signal.SIGTERM]
