# SPDX-License-Identifier: MIT
"""The process of a command: its signals, its output streams and OMP_NUM_THREADS. Imports only the standard library."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import io
import logging
import os
import signal
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any, TextIO

from .errors import UserError

PARENT = os.getppid()  # as early as possible: a parent that dies during the imports is noticed
MAX_THREADS = 1024
SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(BaseException):
    """Ctrl-C or SIGTERM. No KeyboardInterrupt, which other packages catch."""

    def __init__(self, signum: int = signal.SIGINT):
        super().__init__(signum)
        self.exit_code = 128 + signum
        self.reason = "interrupted" if signum == signal.SIGINT else f"ended by {signal.Signals(signum).name}"


_received: Interrupted | None = None  # what `_interrupt` has raised in this process


def prepare() -> None:
    """Prepares the process of a command or of a worker, before anything else is imported.

    - Output that nobody reads any more (`| head`) is dropped and does not end a run.
    - Characters that the terminal cannot show are printed as escapes such as \\xe9.
    - torch's C++ code logs errors only: its warnings about sockets say nothing to the user of a command.
    - Threads of OpenMP sleep where they wait for each other. They would spin, and a training on a CPU, whose photos are
      loaded by other threads, would lose cores to that.
    - Pillow does not warn of unusual photos. (The line that libtiff itself prints for a damaged TIFF stays.) torch does
      not warn of unusual weights: `weights.read` says what is wrong with them.

    Raises:
        UserError: If OMP_NUM_THREADS is malformed, or if the current folder has been removed.
    """
    sys.stdout, sys.stderr = (_robust(stream) for stream in (sys.stdout, sys.stderr))
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # libgomp reads it when torch is imported
    warnings.filterwarnings("ignore", module=r"PIL\.|torch\.(serialization|_utils|_weights_only_unpickler)$")
    logging.getLogger("PIL").addHandler(logging.NullHandler())  # else Python prints its warnings
    if not os.environ.get("OMP_NUM_THREADS", "").strip():
        os.environ.pop("OMP_NUM_THREADS", None)  # libgomp complains about an empty value
    omp_num_threads()
    try:
        Path.cwd()
    except OSError:
        raise UserError("the current folder has been removed; change to another one") from None


def handle_signals() -> None:
    """Makes Ctrl-C and SIGTERM raise `Interrupted`; a second one ends the process at once.

    During an import, where the exception could be lost or leave modules half-initialized, they print a line and end the
    process. Signals that the parent ignores, as for background jobs, stay ignored.
    """
    for signum in SIGNALS:
        if signal.getsignal(signum) != signal.SIG_IGN:
            signal.signal(signum, _interrupt)


@contextlib.contextmanager
def keeping_interruption() -> Iterator[None]:
    """Raises `Interrupted` again if another exception has taken its place, as C code of other packages may do."""
    global _received
    _received = None
    try:
        yield
    except Exception as error:
        if _received is not None:
            raise _received from error
        raise


def end_handling(action: signal.Handlers = signal.SIG_IGN) -> None:
    """Ends what `handle_signals` has begun. A finished command ignores signals while the interpreter exits."""
    for signum in SIGNALS:
        if signal.getsignal(signum) == _interrupt:
            signal.signal(signum, action)


def _interrupt(signum: int, frame: FrameType | None) -> None:
    global _received
    end_handling(signal.SIG_DFL)
    interrupted = Interrupted(signum)
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            os.write(2, f"namedmask: {interrupted.reason}\n".encode())
            os._exit(interrupted.exit_code)
        frame = frame.f_back
    _received = interrupted
    raise interrupted


def die_with(parent: int) -> None:
    """Makes Linux kill this process when its parent dies, so that no worker outlives a launcher killed with kill -9.

    Args:
        parent: Process id of the launcher. If it is not the parent any more, it is dead already, and this process ends.
    """
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def complain(message: object) -> None:
    """Prints an error as one line on stderr. Control characters, such as of file names, are printed as escapes."""
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(message))
    print(f"namedmask: {text}", file=sys.stderr)


class _Output(io.FileIO):
    """A file descriptor that drops its output from the first failed write on, so that no run ends because of it."""

    lost = ""  # why output of stdout was lost, unless its reader has gone

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except OSError as error:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.fileno())
            os.close(nowhere)
            if error.errno not in (errno.EPIPE, errno.EIO) and self.fileno() == 1:
                _Output.lost = os.strerror(error.errno or 0)
            return super().write(data)


def expect_output() -> None:
    """Raises UserError if a part of the output of the process could not be written."""
    sys.stdout.flush()
    if _Output.lost:
        raise UserError(f"the output of the command could not be written: {_Output.lost}")


def _robust(stream: TextIO | None) -> TextIO:
    if stream is None:  # closed by the parent
        return open(os.devnull, "w", encoding="utf-8", errors="backslashreplace")  # noqa: PTH123
    if not isinstance(stream, io.TextIOWrapper):
        return stream
    stream.flush()
    return io.TextIOWrapper(
        io.BufferedWriter(_Output(stream.fileno(), "w", closefd=False)),
        encoding=stream.encoding,
        errors="backslashreplace",
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )


def omp_num_threads() -> int | None:
    """OMP_NUM_THREADS, the first number of a list such as "4,2"; None if it is not set.

    Raises:
        UserError: If it is not a list of positive integers, or above MAX_THREADS.
    """
    text = os.environ.get("OMP_NUM_THREADS", "").strip()
    if not text:
        return None
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdigit() and 0 < int(part) <= MAX_THREADS for part in parts):
        raise UserError(f"OMP_NUM_THREADS={text!r}: expected a number of threads from 1 to {MAX_THREADS}, or no value")
    return int(parts[0])
