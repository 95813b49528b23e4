# SPDX-License-Identifier: MIT
"""`namedmask review`: who may ask the server, and what it answers."""

from __future__ import annotations

import http.client
import io
import json
import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import quote

import numpy as np
import pytest
from PIL import Image

from namedmask import formats
from namedmask import run as runs
from namedmask.errors import UserError
from namedmask.review import read_review, reviewed_masks, write_review
from namedmask.review_server import TILES, Review, ReviewServer
from small_world import SIZE, disc, reviewable_run

NOT_UTF8 = os.fsdecode(b"caf\xe9.png")
LONG = "a folder with a long name/and a photo with a name that no caption of a phone can show in one line.png"
NAMES = {
    "disc": [f"{n:02}.png" for n in range(30)],
    "<i>round</i> & more": [NOT_UTF8, LONG, "00.png"],
}


@pytest.fixture
def out(tmp_path) -> Path:
    return reviewable_run(tmp_path / "run", NAMES)


class Client:
    """Asks a server as a browser does."""

    def __init__(self, server: ReviewServer):
        self.server = server

    def __call__(self, path: str, body: object = None, **headers: str) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.server.server_port, timeout=30)
        data = None if body is None else json.dumps(body).encode()
        headers = {name.replace("_", "-"): value for name, value in headers.items()}
        connection.request("GET" if body is None else "POST", path, data, headers)
        answer = connection.getresponse()
        self.headers = answer.headers
        content = answer.read()
        connection.close()
        return answer.status, content


@pytest.fixture
def ask(out) -> Iterator[Client]:
    with ReviewServer(Review(out)) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield Client(server)
        server.shutdown()


def test_only_the_page_itself_is_answered(ask, out):
    token, port = ask.server.token, ask.server.server_port
    assert len(token) >= 32 and ask.server.server_address[0] == "127.0.0.1"
    assert ask(f"/{token}/")[0] == 200
    assert "Access-Control-Allow-Origin" not in ask.headers and ask.headers["X-Frame-Options"] == "DENY"
    for path in ("/", "/favicon.ico", f"/{token[:-1]}/", f"/{token}x/", f"/{quote('é')}/", f"/{token}"):
        assert ask(path)[0] == 404, path
    for host in ("evil.example", f"evil.example:{port}", "127.0.0.1", f"127.0.0.1:{port + 1}"):  # DNS rebinding
        assert ask(f"/{token}/", Host=host)[0] == 403, host
    assert ask(f"/{token}/", Host=f"localhost:{port}")[0] == 200
    verdicts = [{"photo": "00.png", "category": "disc", "verdict": "accept"}]
    assert ask("/wrong/review", verdicts)[0] == 404
    assert ask(f"/{token}/review", verdicts, Host="evil.example")[0] == 403
    assert ask(f"/{token}/review", verdicts, Origin="https://evil.example")[0] == 403
    assert not (out / "review.jsonl").exists()
    assert ask(f"/{token}/review", verdicts, Origin=f"http://127.0.0.1:{port}")[0] == 204
    assert read_review(out) == {("00.png", "disc"): "accept"}
    for path in (
        "../run.toml",
        "0/0/..%2f..",
        "0/99/photo",
        "9/0/photo",
        "0/0/run.toml",
        "0/0/masks-large",
        "0/-1/photo",
    ):
        assert ask(f"/{token}/{path}")[0] == 404, path


def test_verdicts_are_saved_at_once_and_obeyed(ask, out):
    path = f"/{ask.server.token}/review"
    write_review(out, {("kept.png", "of another run"): "reject"})
    for photo, category, verdict in (
        ("03.png", "disc", "reject"), ("04.png", "disc", "accept"), ("05.png", "disc", "reject"),
        ("05.png", "disc", None),
        (NOT_UTF8, list(NAMES)[1], "detector"),
    ):  # fmt: skip
        assert ask(path, [{"photo": photo, "category": category, "verdict": verdict}]) == (204, b"")
    assert read_review(out) == {
        ("kept.png", "of another run"): "reject", ("03.png", "disc"): "reject", ("04.png", "disc"): "accept",
        (NOT_UTF8, list(NAMES)[1]): "detector",
    }  # fmt: skip
    masks = {(one.photo, one.category): one.bbox for one in reviewed_masks(out)}
    assert len(masks) == 32 and ("03.png", "disc") not in masks
    assert masks[NOT_UTF8, list(NAMES)[1]][0] == masks["00.png", "disc"][0] - 10
    before = (out / "review.jsonl").read_bytes()
    wrong = [
        {"photo": "03.png"}, {"photo": "03.png", "category": "disc", "verdict": "maybe"}, 3,
        {"photo": "gone.png", "category": "disc", "verdict": "reject"},
    ]  # fmt: skip
    for one in wrong:
        assert ask(path, [one])[0] == 400
    assert ask(path, 7)[0] == 400
    with runs.locked(out):
        status, reason = ask(path, [{"photo": "06.png", "category": "disc", "verdict": "reject"}])
        assert status == 409 and reason.endswith(b"in use by another run")
        assert b"Verdicts cannot be saved now: " in ask(f"/{ask.server.token}/")[1]
    assert (out / "review.jsonl").read_bytes() == before


def test_malformed_requests_are_answered_or_dropped_without_a_word(ask, out, capsys):
    token, port = ask.server.token, ask.server.server_port

    def send(*lines: str, body: bytes = b"") -> bytes:
        with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
            connection.sendall("\r\n".join((*lines, f"Host: 127.0.0.1:{port}", "", "")).encode() + body)
            connection.shutdown(socket.SHUT_WR)
            return connection.makefile("rb").readline()

    post = f"POST /{token}/review HTTP/1.1"
    assert b" 404 " in send("GET http://[/ HTTP/1.1")
    assert b" 404 " in send(post, "Content-Length: " + "9" * 5000)
    for body in (b"[" * 200_000, b'{"a":' * 150_000, b"9" * 5000, b"\xff\xfe"):
        assert b" 400 " in send(post, f"Content-Length: {len(body)}", body=body), body[:9]
    for _ in range(5):  # the browser does not wait for the answer
        with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            connection.sendall(f"GET /{token}/ HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n\r\n".encode())
    assert ask(f"/{token}/")[0] == 200 and capsys.readouterr() == ("", "")


def test_requests_at_the_same_time_are_all_saved(ask, out):
    with ReviewServer(Review(out)) as second:
        threading.Thread(target=second.serve_forever, args=(0.01,), daemon=True).start()

        def decide(number: int) -> int:
            client = ask if number % 2 else Client(second)
            verdict = {"photo": f"{number:02}.png", "category": "disc", "verdict": "reject"}
            client(f"/{client.server.token}/")
            return client(f"/{client.server.token}/review", [verdict])[0]

        with ThreadPoolExecutor(4) as pool:
            assert set(pool.map(decide, range(16))) == {204}
        second.shutdown()
    assert len(read_review(out)) == 16


def test_tiles_come_in_parts(ask, out):
    def photos(**query: object) -> tuple[list[str], str | None]:
        words = "&".join(
            f"{name}={value}" for name, value in {"category": 0, "from": 0, "show": "best", **query}.items()
        )
        status, page = ask(f"/{ask.server.token}/tiles?{words}")
        assert status == 200
        keys = re.findall(r'data-key="(.*?)"', page.decode())
        more = re.search(r'data-from="(\d+)"', page.decode())
        return [json.loads(key.replace("&#34;", '"'))[0] for key in keys], more and more[1]

    assert photos() == (NAMES["disc"][:TILES], str(TILES))
    assert photos(**{"from": TILES}) == (NAMES["disc"][TILES:], None)
    assert photos(show="lowest")[0] == NAMES["disc"][: -TILES - 1 : -1]
    write_review(out, {("01.png", "disc"): "reject", ("02.png", "disc"): "detector"})
    assert photos(show="reject") == (["01.png"], None) and photos(show="accept") == ([], None)
    first, more = photos(show="open")
    assert first == ["00.png", *NAMES["disc"][3:26]]
    write_review(out, {(photo, "disc"): "accept" for photo in NAMES["disc"][:10]})  # before the next ones are asked for
    assert photos(show="open", **{"from": more}) == (NAMES["disc"][26:], None)
    assert photos(show="lowest", **{"from": photos(show="lowest")[1]}) == (NAMES["disc"][:-TILES][::-1], None)
    write_review(out, {(photo, "disc"): "accept" for photo in NAMES["disc"]})
    none = f"/{ask.server.token}/tiles?category=0&show=open&from="
    assert b"no mask" in ask(f"{none}0")[1] and b"no mask" not in ask(f"{none}{more}")[1]
    linked = ask(f"/{ask.server.token}/linked?mask={quote('mask/%3Ci%3Eround%3C%2Fi%3E%20%26%20more/caf%E9.png')}")
    assert linked[0] == 200 and b"caf\\udce9.png" in linked[1] and b"<i>" not in linked[1]
    assert ask(f"/{ask.server.token}/linked?mask=mask/disc/gone.png")[0] == 404
    for query in ("category=7&from=0&show=best", "category=0&from=x&show=best", "category=0", ""):
        assert ask(f"/{ask.server.token}/tiles?{query}")[0] == 404


def test_pictures_have_the_size_of_the_photo(ask, out):
    sizes = {
        "photo": SIZE[::-1],
        "masks": SIZE[::-1],
        "thumbnail": (224, 168),
        "refined-thumbnail": (224, 168),
    }
    for kind, size in sizes.items():
        status, data = ask(f"/{ask.server.token}/0/0/{kind}")
        assert status == 200 and Image.open(io.BytesIO(data)).size == size, kind
    inside = np.asarray(Image.open(io.BytesIO(ask(f"/{ask.server.token}/0/0/masks")[1]))) == 1
    assert inside.sum() > 800 and not (inside & ~disc(50)).any()  # without its outline
    (out.parent / "photos" / "01.png").unlink()
    Image.new("RGB", (5, 5)).save(out.parent / "photos" / "02.png")
    assert ask(f"/{ask.server.token}/0/1/photo")[0] == 409
    assert b"the photo has changed" in ask(f"/{ask.server.token}/0/2/thumbnail")[1]
    shard = out / "refined" / "00000.jsonl"
    shard.write_bytes(shard.read_bytes()[100:])
    assert b"has changed: run `namedmask review` again" in ask(f"/{ask.server.token}/0/3/refined")[1]


def test_photos_that_no_jpeg_can_hold_are_shrunk(ask, monkeypatch):
    pixels = np.zeros((1, formats.JPEG_SIDE + 1, 3), np.uint8)
    assert Image.open(io.BytesIO(formats.encode_jpeg(pixels, 92))).size == (formats.JPEG_SIDE, 1)
    monkeypatch.setattr(formats, "JPEG_SIDE", 20)
    assert max(Image.open(io.BytesIO(ask(f"/{ask.server.token}/0/0/photo")[1])).size) == 20


def test_what_cannot_be_reviewed_is_said(tmp_path, out):
    with pytest.raises(UserError, match=r"stages\.json is missing"):
        Review(tmp_path)
    for folder in ("masks", "refined", "detected"):
        shutil.rmtree(out / folder)
    with pytest.raises(UserError, match="has no masks yet; run `namedmask pseudolabel"):
        Review(out)


def test_interrupt_ends_the_command(out):
    words = [sys.executable, "-m", "namedmask", "review", str(out), "--no-browser"]
    restore = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # noqa: E731  ignored in background processes
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True, preexec_fn=restore) as process:
        url = process.stdout.readline().strip()
        with urllib.request.urlopen(url, timeout=30) as answer:
            assert b"20.png" not in answer.read()  # tiles come later
        process.send_signal(signal.SIGINT)
        assert "verdicts are in" in process.stdout.read()
    assert process.returncode == 0


def test_taken_port_is_said(ask):
    with pytest.raises(UserError, match=f"--port {ask.server.server_port}: .*in use; leave it out"):
        ReviewServer(ask.server.review, ask.server.server_port)
