# SPDX-License-Identifier: MIT
"""Messages and progress of worker processes, in the process that has started them.

Each message is a datagram of JSON to a socket in a temporary folder.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict

from .errors import UserError
from .progress import ProgressEvent, current_listener, handling, listening, logger

MAX_MESSAGE = 1 << 20  # bytes; Linux sends less


@contextmanager
def receiving() -> Iterator[str]:
    """Passes on what workers send: messages to the logger, progress to the listener of the context, from a thread.

    An exception of the listener stops the workers and is raised at the end.

    Yields:
        The address that workers pass to `sending`.
    """
    listener = current_listener()

    def receive(receiver: socket.socket) -> None:
        with receiver:  # once it is closed, senders get an error
            while data := receiver.recv(MAX_MESSAGE):
                message = json.loads(data)
                if "level" in message:
                    logger.log(message["level"], "%s", message["text"])
                elif listener is not None:
                    listener(ProgressEvent(**message))

    # The path of a socket has at most 107 bytes.
    place = tempfile.gettempdir() if len(os.fsencode(tempfile.gettempdir())) < 80 else "/tmp"
    with tempfile.TemporaryDirectory(prefix="namedmask-", dir=place) as folder, ThreadPoolExecutor(1) as pool:
        address = f"{folder}/messages"
        receiver = _socket()
        receiver.bind(address)
        received = pool.submit(receive, receiver)
        try:
            yield address
        finally:
            with _socket() as end, contextlib.suppress(OSError):  # closed: the listener has failed
                end.sendto(b"", address)
            received.result()


@contextmanager
def sending(address: str) -> Iterator[None]:
    """Within the context, messages and progress of this process go to the process that receives at `address`."""
    with _socket() as sender:

        def send(message: dict) -> None:
            sender.sendto(json.dumps(message).encode(), address)

        def show(event: ProgressEvent) -> None:
            try:
                send(asdict(event))
            except OSError:
                raise UserError("the process that has started the workers has stopped listening") from None

        with handling(_Handler(send)), listening(show):
            yield


class _Handler(logging.Handler):
    def __init__(self, send):
        super().__init__()
        self.send = send

    def emit(self, record: logging.LogRecord) -> None:
        with contextlib.suppress(OSError):
            self.send({"level": record.levelno, "text": record.getMessage()})


def _socket() -> socket.socket:
    return socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
