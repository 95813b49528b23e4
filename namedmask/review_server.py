# SPDX-License-Identifier: MIT
"""The server of `namedmask review`: the page of a run with all of its masks, and verdicts that are saved at once.

It listens on the loopback interface only. Every address begins with a random token, so neither other users of the
machine nor other pages in the browser can read the photos or change the review: a request with another token, or with a
Host header that is not this server's (DNS rebinding), is answered with 404 or 403.

    /TOKEN/                          the page
    /TOKEN/tiles?category&photo&from&show  the next tiles of a category, of photos with this in their names, as HTML
    /TOKEN/search?photo              the categories of such photos, as JSON
    /TOKEN/linked?mask               the tile that a link names
    /TOKEN/CATEGORY/NUMBER/KIND      a picture: thumbnail, photo, or FOLDER or FOLDER-thumbnail, the mask of that stage
    /TOKEN/review                    POST [{"photo", "category", "verdict"}, ...]; the verdict null removes one

Of each mask, its photo, its score and its place in the shard are held in memory, about 300 bytes; the rest is read when
it is shown. http.server is enough for that: there is one user, and no framework to install.
"""

from __future__ import annotations

import hmac
import json
import secrets
import sys
import threading
import time
from array import array
from bisect import bisect_left
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, get_args
from urllib.parse import parse_qsl, urlsplit

from .errors import UserError
from .files import locked, open_file
from .formats import encode_jpeg
from .masks import Key, MaskRecord, mask_shards, read_lines
from .memory import MemoryBudget
from .pages import anchor, printable, template
from .pages.pictures import BYTES_PER_PIXEL, Picture, draw_overlay, draw_thumbnail, thumbnail_size
from .photos import PhotoError, open_source
from .report import Contents, Tile, View, changed, iou
from .review import Verdict, read_review, write_review

HOST = "127.0.0.1"
TILES = 24  # per request
MAX_BODY = 1 << 20  # bytes of a request
LOCK_SECONDS = 0.5  # to wait for the lock of the run, which other servers hold for milliseconds


class _Places:
    """Where the masks of a folder are: shard and offset of each, by photo and category."""

    def __init__(self, folder: Path):
        self.shards = mask_shards(folder)
        self.places: dict[Key, tuple[int, int]] = {}

    def read(self) -> Iterator[MaskRecord]:
        """Yields all masks and notes their places."""
        for number, shard in enumerate(self.shards):
            offset = 0
            for record, length in read_lines(shard, lambda line: (MaskRecord.from_json(line), len(line))):
                self.places[record.key] = number, offset
                offset += length
                yield record

    def get(self, key: Key) -> MaskRecord | None:
        """Reads a mask. Raises UserError if it is not where it was."""
        if key not in self.places:
            return None
        number, offset = self.places[key]
        try:
            with open_file(self.shards[number]) as file:
                file.seek(offset)
                record = MaskRecord.from_json(file.readline())
            if record.key == key:
                return record
        except (OSError, ValueError):
            pass
        raise UserError(f"{self.shards[number].parent} has changed: run `namedmask review` again")


class Review:
    """A run that is reviewed.

    Args:
        out: Run folder.

    Attributes:
        contents: What its page shows.
        photos: The photos of the masks of each category, best first.

    Raises:
        UserError: If it has no masks, or if its files are damaged.
    """

    def __init__(self, out: Path):
        self.out = out
        self.places: list[_Places] = []  # of `contents.folders`
        ranks: dict[str, tuple[list[str], array[float], array[float]]] = {}  # photos, and the parts of `rank`

        def read(folder: Path) -> Iterator[MaskRecord]:
            self.places.append(_Places(folder))
            for record in self.places[0].read():
                photos, scores, similarities = ranks.setdefault(record.category, ([], array("d"), array("d")))
                photos.append(record.photo)
                scores.append(record.score)
                similarities.append(record.rank[1])
                yield record

        self.contents = Contents(out, read)
        if not self.contents.folders:
            raise UserError(f"{out} has no masks yet; run `namedmask pseudolabel {out}` first")
        for folder in self.contents.folders[1:]:
            self.places.append(_Places(folder))
            deque(self.places[-1].read(), maxlen=0)
        self.categories = list(self.contents.categories)
        self.photos: list[list[str]] = []
        for name in self.categories:
            photos, scores, similarities = ranks.get(name, ([], array("d"), array("d")))
            order = sorted(zip(scores, similarities, range(0, -len(photos), -1), strict=True), reverse=True)
            self.photos.append([photos[-n] for _, _, n in order])
        self.source = open_source(self.contents.config.photos)
        self.budget = MemoryBudget()
        self._saving = threading.Lock()

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Holds the lock of the run. Raises UserError if another command is working on it."""
        end = time.monotonic() + LOCK_SECONDS
        with self._saving, ExitStack() as stack:
            while True:
                try:
                    stack.enter_context(locked(self.out))
                    break
                except UserError:
                    if time.monotonic() > end:
                        raise
                    time.sleep(0.02)
            yield

    def page(self) -> Iterator[str]:
        """The page; it fetches the tiles that come into view."""
        note = ""
        try:
            with self._locked():
                pass
        except UserError as error:
            note = f"Verdicts cannot be saved now: {_reason(error)}."
        review = read_review(self.out)
        self.contents.review = review
        self.contents.scores = {key: record.score for key in review if (record := self.places[0].get(key))}
        return self.contents.page(note=note)

    def matching(self, category: int, photo: str) -> list[int]:
        """The numbers of the masks of a category whose photos have this in their names, in upper or lower case."""
        names = self.photos[category]
        return [n for n, name in enumerate(names) if not photo or photo.lower() in printable(name).lower()]

    def search(self, photo: str) -> list[int]:
        """The numbers of the categories that have such a mask."""
        return [category for category in range(len(self.photos)) if self.matching(category, photo)]

    def shown(self, category: int, photo: str, show: str) -> list[int]:
        """The numbers of the masks of a category to show, in order."""
        numbers = self.matching(category, photo)
        if show in ("best", "lowest"):
            return numbers if show == "best" else numbers[::-1]
        review, name, photos = read_review(self.out), self.categories[category], self.photos[category]
        wanted = None if show == "open" else show
        return [n for n in numbers if review.get((photos[n], name)) == wanted]

    def tiles(self, category: int, photo: str, first: int, show: str) -> str:
        """The tiles from place `first` of the category's whole order on, and the place where the next ones begin.

        Places in the list that is shown would not do: verdicts shorten it between the requests.
        """
        last = len(self.photos[category]) - 1
        numbers = self.shown(category, photo, show)
        places = [last - number if show == "lowest" else number for number in numbers]
        begin = bisect_left(places, first)
        end = begin + TILES
        more = places[end - 1] + 1 if end < len(numbers) else None
        tiles = [self.tile(category, number) for number in numbers[begin:end]]
        return self._render(tiles, more, empty=not tiles and first == 0)

    def linked(self, mask: str) -> str:
        """The tile with this id, or ""."""
        for category, name in enumerate(self.categories):
            if mask.startswith(anchor(name, "")):
                for number, photo in enumerate(self.photos[category]):
                    if anchor(name, photo) == mask:
                        return self._render([self.tile(category, number)], None, empty=False)
        return ""

    def _render(self, tiles: list[Tile], more: int | None, empty: bool) -> str:
        return template("more.html.j2").render(tiles=tiles, more=more, empty=empty, hint=self.contents.hint)

    def tile(self, category: int, number: int) -> Tile:
        """A tile whose pictures are addresses of this server."""
        key = self.photos[category][number], self.categories[category]
        record = self.places[0].get(key)
        assert record is not None
        at = f"{category}/{number}"
        views: list[View] = []
        for folder, label, places in zip(self.contents.folders, self.contents.labels, self.places, strict=True):
            one = places.get(key)
            if one is None or one.size != record.size:
                continue
            overlays = (f"{at}/{folder.name}-thumbnail", f"{at}/{folder.name}") if one.area else ("", "")
            views.append(View(label, one.score, iou(record, one) if views else None, *overlays))
        height, width = record.size
        thumbnail = Picture(f"{at}/thumbnail", *thumbnail_size(record.size))
        return Tile(record, thumbnail, views, Picture(f"{at}/photo", width, height))

    def picture(self, category: int, number: int, kind: str) -> tuple[bytes, str]:
        """A picture and its type. Raises PhotoError or UserError if it cannot be shown, LookupError for other names."""
        key = self.photos[category][number], self.categories[category]
        name, _, small = kind.partition("-")
        if kind in ("thumbnail", "photo"):
            record = self.places[0].get(key)
            assert record is not None
            height, width = record.size
            with self.budget.hold(height * width * BYTES_PER_PIXEL):
                pixels = self.source.decode(key[0]).pixels
                if problem := changed(record, pixels):
                    raise PhotoError(key[0], problem)
                if kind == "photo":
                    return encode_jpeg(pixels, quality=92), "image/jpeg"
                return draw_thumbnail(pixels), "image/jpeg"
        place = [folder.name for folder in self.contents.folders].index(name)
        record = self.places[place].get(key)
        if record is None or small not in ("", "thumbnail"):
            raise LookupError(kind)
        height, width = record.size
        with self.budget.hold(height * width * BYTES_PER_PIXEL):
            return draw_overlay(record.mask(), thumbnail_size(record.size) if small else (width, height)), "image/png"

    def save(self, verdicts: list[tuple[Key, Verdict | None]]) -> None:
        """Adds verdicts to OUT/review.jsonl. Raises UserError if another command is working on the run."""
        with self._locked():  # read again: another server may have written, too
            review = read_review(self.out)
            for key, verdict in verdicts:
                review.pop(key, None)
                if verdict is not None:
                    review[key] = verdict
            write_review(self.out, review)

    def parse(self, body: bytes) -> list[tuple[Key, Verdict | None]]:
        """The verdicts in a request. Raises ValueError."""
        verdicts = []
        for one in json.loads(body):
            key, verdict = (one["photo"], one["category"]), one["verdict"]
            if key not in self.places[0].places:
                raise ValueError(f"there is no mask of {key[0]!r} for {key[1]!r}")
            if verdict not in (None, *get_args(Verdict)):
                raise ValueError(f"unknown verdict {verdict!r}")
            if verdict == "detector" and not any(
                folder.name == "masks" and key in places.places
                for folder, places in zip(self.contents.folders, self.places, strict=True)
            ):
                raise ValueError(f"there is no mask of the detector for {key[0]!r}")
            verdicts.append((key, verdict))
        return verdicts


class ReviewServer(ThreadingHTTPServer):
    """Serves a review on the loopback interface.

    Args:
        review: The run.
        port: Port; 0 for a free one.

    Attributes:
        url: Address of the page, with the token.

    Raises:
        UserError: If the port is taken.
    """

    daemon_threads = True

    def __init__(self, review: Review, port: int = 0):
        self.review, self.token = review, secrets.token_urlsafe(24)
        try:
            super().__init__((HOST, port), _Handler)
        except OSError as error:
            raise UserError(f"--port {port}: {error.strerror}; leave it out to use a free port") from None
        self.url = f"http://{HOST}:{self.server_port}/{self.token}/"

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exc_info()[1], ConnectionError):  # browsers close connections that they need no longer
            super().handle_error(request, client_address)

    @property
    def origins(self) -> set[str]:
        return {f"{host}:{self.server_port}" for host in (HOST, "localhost")}


class _Handler(BaseHTTPRequestHandler):
    server: ReviewServer
    server_version, sys_version = "namedmask", ""
    protocol_version = "HTTP/1.1"
    timeout = 60  # of an idle connection

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def _path(self) -> str | None:
        """The path below the token; None after an answer to a request that is not from our page."""
        try:
            self.address = urlsplit(self.path)
        except ValueError:
            self._send(404, "not found")
            return None
        token, slash, path = self.address.path.removeprefix("/").partition("/")
        if self.headers.get("Host") not in self.server.origins:
            self._send(403, "unknown host")
        elif not hmac.compare_digest(token.encode(errors="replace"), self.server.token.encode()) or not slash:
            self._send(404, "not found")
        else:
            return path
        return None

    def do_GET(self) -> None:
        if (path := self._path()) is None:
            return
        query = dict(parse_qsl(self.address.query, keep_blank_values=True))
        review = self.server.review
        try:
            if path == "":
                self._send(200, "".join(review.page()), "text/html")
            elif path == "tiles":
                category, first = _index(query["category"]), _index(query["from"])
                self._send(200, review.tiles(category, query.get("photo", ""), first, query["show"]), "text/html")
            elif path == "search":
                self._send(200, json.dumps(review.search(query["photo"])), "application/json")
            elif path == "linked" and (tile := review.linked(query["mask"])):
                self._send(200, tile, "text/html")
            else:
                place, number, kind = path.split("/")
                self._send(200, *review.picture(_index(place), _index(number), kind), cache="private, max-age=3600")
        except (UserError, PhotoError) as error:  # before ValueError, which a DamagedFile is too
            self._send(409, str(error))
        except (LookupError, ValueError):
            self._send(404, "not found")

    def do_POST(self) -> None:
        path, length = self._path(), self.headers.get("Content-Length", "")
        if path is None:
            return
        origin = self.headers.get("Origin")
        if path != "review" or not length.isdecimal() or len(length) > 9 or int(length) > MAX_BODY:
            self._send(404, "not found")
        elif origin is not None and origin.removeprefix("http://") not in self.server.origins:
            self._send(403, "another page")
        else:
            try:
                verdicts = self.server.review.parse(self.rfile.read(int(length)))
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                self._send(400, f"not a list of verdicts: {error}")
                return
            try:
                self.server.review.save(verdicts)
            except UserError as error:
                self._send(409, _reason(error))
            else:
                self._send(204, b"")

    def _send(self, status: int, body: str | bytes, kind: str = "text/plain", cache: str = "no-store") -> None:
        data = body.encode(errors="backslashreplace") if isinstance(body, str) else body
        self.send_response(status)
        if isinstance(body, str):
            kind += "; charset=utf-8"
        headers = {"Content-Type": kind, "Cache-Control": cache, "X-Content-Type-Options": "nosniff"}
        headers |= {"Referrer-Policy": "no-referrer", "Cross-Origin-Resource-Policy": "same-origin"}
        headers |= {"X-Frame-Options": "DENY"}
        if status >= 400:
            headers["Connection"] = "close"  # the body of the request may be unread
        for name, value in headers.items():
            self.send_header(name, value)
        if status != 204:
            self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


def _reason(error: UserError) -> str:
    """What is wrong, without the remedy, which is for the command line."""
    return str(error).partition(";")[0]


def _index(text: str) -> int:
    if not text.isdecimal():
        raise ValueError(text)
    return int(text)
