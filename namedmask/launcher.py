# SPDX-License-Identifier: MIT
"""The worker processes of a command: their start, and what each of them does."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from . import distributed, process, relay
from .errors import NothingUsable, UserError, explained

MAX_RESTARTS = 3
FAILURE = ".failed"  # in OUT: why a worker stopped, where a restart would not help


def launch(module: str, out: Path, device: str, workers: int, *arguments: str) -> None:
    """Runs `python -m MODULE LAUNCHER ADDRESS OUT DEVICE ARGUMENT...` in several processes until all have finished.

    If one dies, all are restarted, up to MAX_RESTARTS times. Their messages and progress come out here (`relay`).

    Args:
        module: The module, which calls `as_worker`.
        out: Output folder of the command.
        device: "cpu" or "cuda".
        workers: Number of processes.
        arguments: What else the module needs.

    Raises:
        UserError: If a worker raised one, or died again after the last restart.
        Interrupted: On SIGTERM, after all workers have ended, unless this process has a handler that ends it.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    from namedmask_kernels.threads import usable_cores

    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=workers,
        run_id=f"namedmask-{os.getpid()}",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=MAX_RESTARTS,
        monitor_interval=0.1,
        start_method="spawn",
        # Not SIGINT, on which it would send workers a SIGINT, too, and they would print tracebacks. Not SIGHUP, which
        # nohup ignores.
        signals_to_handle="SIGTERM",
    )
    failure = out / FAILURE
    failure.unlink(missing_ok=True)
    threads = max(1, usable_cores() // workers)  # decode photos, write results and, without a GPU, process batches
    try:
        with relay.receiving() as address, _prepared_for_launch(threads):
            start = elastic_launch(config, sys.executable)
            start("-m", module, str(os.getpid()), address, str(out), device, *arguments)
    except SignalException as error:  # how the launcher reports SIGTERM; it has stopped the workers
        signal.raise_signal(error.sigval)  # for the handler that this process had before
        raise process.Interrupted(error.sigval) from None
    except ChildFailedError as error:
        if failure.exists():
            code, _, reason = failure.read_text(encoding="utf-8").partition(" ")
            raise (NothingUsable if code == "3" else UserError)(reason or "a worker failed, see above") from None
        rank, died = error.get_first_failure()
        how = f"signal {-died.exitcode}" if died.exitcode < 0 else f"exit code {died.exitcode}"
        raise UserError(
            f"worker {rank} died ({how}) again after {MAX_RESTARTS} restarts; finished shards are kept: run the same "
            "command again to continue, or with --workers 1 to see where it fails"
        ) from None
    finally:
        failure.unlink(missing_ok=True)


@contextlib.contextmanager
def _prepared_for_launch(threads: int) -> Iterator[None]:
    """Sets the environment of workers and silences the launcher; restores both, and the signal handlers, at the end."""
    names = [name for name in logging.root.manager.loggerDict if name.startswith("torch.distributed")]
    levels = {name: logging.getLogger(name).level for name in names}  # each has its own
    variables = ("OMP_NUM_THREADS", "TORCHELASTIC_SIGNALS_TO_HANDLE", "TORCH_CPP_LOG_LEVEL")
    environment = {name: os.environ.get(name) for name in variables}
    handler = signal.getsignal(signal.SIGTERM)
    try:
        for name in names:
            logging.getLogger(name).setLevel(logging.ERROR)
        os.environ.setdefault("OMP_NUM_THREADS", str(threads))
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
        yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
        for name, value in environment.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
        if signal.getsignal(signal.SIGTERM) != handler:
            signal.signal(signal.SIGTERM, handler)


def as_worker(function: Callable[..., None]) -> None:
    """Runs a worker that `launch` has started: python -m MODULE LAUNCHER ADDRESS OUT DEVICE ARGUMENT...

    Args:
        function: Called with OUT, the worker, DEVICE ("cpu" or "cuda") and the other arguments.
    """
    launcher, address, out, device, *arguments = sys.argv[1:]
    process.die_with(int(launcher))
    process.prepare()
    failure = Path(out) / FAILURE
    if failure.exists():  # what stopped one worker would stop this one too
        sys.exit(2)
    try:
        worker = distributed.current()
        if device != "cpu":
            distributed.warm_up(worker.device(device))
        with relay.sending(address):
            function(Path(out), worker, device, *arguments)
    except Exception as error:
        if not isinstance(why := explained(error), UserError):
            raise
        try:
            code = 3 if isinstance(why, NothingUsable) else 2
            failure.write_text(f"{code} {why}", encoding="utf-8", errors="backslashreplace")
        except OSError:  # the disk is full
            process.complain(why)
        sys.exit(2)
