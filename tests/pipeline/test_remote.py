# SPDX-License-Identifier: MIT
"""Photos at URLs, from servers of the standard library on this machine: with and without ranges, and with failures."""

import gzip
import io
import json
import os
import pickle
import re
import tarfile
import threading
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from PIL import Image

from namedmask import photos, remote, tars
from namedmask.errors import UserError
from namedmask.photos import PhotoError, PhotoSource, decode_ahead
from namedmask.urls import clean_url, without_secrets
from small_world import command, draw_photos, files_of, write_embeddings

pytest.importorskip("aiohttp")

SECRET = "s3cr3t"
SECRETS = ["pwd", "db_pwd", "pass", "passphrase", "Password", "jwt", "id_token", "bearer", "sign", "sas", "hdnea"]
SECRETS += ["hmac", "rlkey", "resourcekey", "AWSAccessKeyId", "PHPSESSID", "session_id", "X-Tos-Signature"]
PUBLIC = ["code=7", "design=7", "page=7", "compass=7", "sign_id=7", "id=monkey", "q=author", "id=token"]
PUBLIC += ["imageKey=7", "objectkey=7", "monkey=7", f"code={32 * '7'}"]


class Server(ThreadingHTTPServer):
    """Serves `files`, by path, to GET.

    Attributes:
        ranges: Obey Range headers.
        requests: (path with query, Range header) of each request.
        marks: Called with the content of a file; returns the headers that tell whether it is still the same.
        trouble: Called with the number of a request; returns a status to send instead, "cut", "slow" or None.
        redirects: Locations by path.
    """

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.ranges, self.requests, self.redirects = {}, True, [], {}
        self.marks = lambda data: {"ETag": f'"{hash(data)}"'}
        self.trouble = lambda number: None
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request, client_address):
        """Clients may go away."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        server, wanted = self.server, self.headers.get("Range", "")
        server.requests.append((self.path, wanted))
        path = self.path.partition("?")[0]
        problem = server.trouble(len(server.requests))
        if problem == "slow":
            threading.Event().wait(1)
        if path in server.redirects:
            return self.answer(302, b"", {"Location": server.redirects[path]})
        if path not in server.files or isinstance(problem, int):
            return self.answer(problem if isinstance(problem, int) else 404, b"no")
        data, headers, status = server.files[path], server.marks(server.files[path]), 200
        if server.ranges and (bounds := re.fullmatch(r"bytes=(\d+)-(\d+)", wanted)):
            headers["Content-Range"] = f"bytes {bounds[1]}-{bounds[2]}/{len(data)}"
            data, status = data[int(bounds[1]) : int(bounds[2]) + 1], 206
        self.answer(status, data, headers, len(data) // 2 if problem == "cut" else None)

    def answer(self, status, data, headers=(), sent=None):
        self.send_response(status)
        for name, value in dict(headers, **{"Content-Length": len(data)}).items():
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(data[:sent])
        self.close_connection = sent is not None

    def log_message(self, *args):
        """Not into the output of the tests."""


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A server, and what is remembered of others forgotten."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(remote, "RETRY_SECONDS", 0.4)
    forget()
    server = Server()
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield server
    for file in remote._shared().files.values():
        file.close()
    server.shutdown()
    server.server_close()
    thread.join()


def forget():
    """As in a new process."""
    remote._forget()
    tars.indexes = tars.TarIndexes(1 << 19)
    photos._read_signed_urls.cache_clear()


def png(value, size=(7, 5)):
    out = io.BytesIO()
    Image.new("RGB", size, (value % 256, 60, 200)).save(out, "png")
    return out.getvalue()


def tar_of(members):
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


def names_and_errors(path):
    errors = []
    return list(PhotoSource(path).names(errors.append)), [(error.photo, error.reason) for error in errors]


def reason(source, name):
    with pytest.raises(PhotoError) as caught:
        source.decode(name)
    return caught.value.reason


# ---- URLs and patterns -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "clean"),
    [
        ("https://h/a.jpg", "https://h/a.jpg"),
        ("https://h/a.jpg?w=600&h=4", "https://h/a.jpg?w=600&h=4"),
        (f"https://u:{SECRET}@h/a.jpg", "https://h/a.jpg"),
        (f"https://h/a.jpg?w=1&X-Amz-Signature={SECRET}&X-Amz-Date=2", "https://h/a.jpg?w=1"),
        (f"https://h/a.jpg?sv=1&se=2&sig={SECRET}", "https://h/a.jpg"),
        (f"https://h/a.jpg#access_token={SECRET}", "https://h/a.jpg"),
        ("https://h?q=a@b", "https://h?q=a@b"),
        ("https://h/a.jpg?sp=1", "https://h/a.jpg?sp=1"),  # Azure's parameters are usual words
        (f"https://h/a?Expires=1&Key-Pair-Id={SECRET}&Signature={SECRET}", "https://h/a"),
        (f"https://h/a?access_token={SECRET}&design=3&key={SECRET}&api_key={SECRET}", "https://h/a?design=3"),
        (f"https://h/0.tar?download=true&tempauth={SECRET}", "https://h/0.tar"),
        *((f"https://h/a?id=7&{name}={SECRET}&w=1", "https://h/a?id=7&w=1") for name in SECRETS),
        (f"https://h/a?id=7&code={SECRET * 6}%3D%3D", "https://h/a?id=7"),
        *((f"https://h/a?{query}", f"https://h/a?{query}") for query in PUBLIC),
        ("abfs://container@account.dfs.core.windows.net/a.jpg", "abfs://container@account.dfs.core.windows.net/a.jpg"),
    ],
)
def test_secrets_are_removed_from_urls(url, clean):
    assert clean_url(url) == clean and SECRET not in clean
    assert SECRET not in str(remote.RemoteError(url, "x"))


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        (f"https://h/a(1).tar?X-Amz-Signature={SECRET}", "https://h/a(1).tar"),
        (f"https://h/a[1]'s.jpg?w=1&sig={SECRET}", "https://h/a[1]'s.jpg"),
        (f"https://h/a?verify={SECRET}, redirected", "https://h/a, redirected"),
        (f"https://u:1)'{SECRET}@h/a.jpg", "https://h/a.jpg"),
        (f"https://[::1]/a.jpg?sig={SECRET}", "https://[::1]/a.jpg"),
        (f"404 (https://h/a.tar?sig={SECRET})", "404 (https://h/a.tar)"),
        (
            f"url=URL('https://h/a(1)?sig={SECRET}'), https://h/b?sig={SECRET}.",
            "url=URL('https://h/a(1)'), https://h/b.",
        ),
        (f'<a href="https://h/a?sig={SECRET}">a</a> [s3://b/c]: no', '<a href="https://h/a">a</a> [s3://b/c]: no'),
        ("no URL: http://) and (a)", "no URL: http://) and (a)"),
    ],
)
def test_secrets_are_removed_from_urls_in_texts(text, clean):
    assert without_secrets(text) == clean


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("{000..002}.tar", ["000.tar", "001.tar", "002.tar"]),
        ("{8..10}.tar", ["8.tar", "9.tar", "10.tar"]),
        ("{a,b}/x{0..1}.tar", ["a/x0.tar", "a/x1.tar", "b/x0.tar", "b/x1.tar"]),
        ("{x}/{1..1}.tar", ["{x}/1.tar"]),
        ("plain.tar", ["plain.tar"]),
    ],
)
def test_braces_are_expanded(pattern, expected):
    assert list(tars.expand_braces(pattern)) == expected
    assert tars.is_pattern(pattern) == (pattern != "plain.tar")


@pytest.mark.parametrize("pattern", ["{2..1}.tar", "{0..1000000}.tar", "{0..9999}{0..9999}.tar"])
def test_patterns_that_cannot_be_meant_are_errors(pattern):
    with pytest.raises(ValueError, match=r"reversed|more than 1,000,000"):
        list(tars.expand_braces(pattern))


def test_tars_of_a_local_pattern(tmp_path):
    for number in (0, 1, 3):
        (tmp_path / f"{number}.tar").write_bytes(tar_of({"a.png": png(number)}))
    path = tmp_path / "{0..3}.tar"
    names, errors = names_and_errors(path)
    assert names == ["0.tar/a.png", "1.tar/a.png", "3.tar/a.png"] == list(PhotoSource(tmp_path))
    assert errors == [("2.tar", "tar cannot be read: No such file or directory")]
    assert PhotoSource(path).decode("3.tar/a.png").pixels[0, 0].tolist() == [3, 60, 200]
    with pytest.raises(ValueError, match="none of these tars exists"):
        PhotoSource(tmp_path / "{4..9}.tar")
    path.write_bytes(tar_of({"b.png": png(9)}))  # a file of this very name
    assert list(PhotoSource(path)) == ["{0..3}.tar/b.png"]


@pytest.mark.parametrize(
    ("url", "message"),
    [
        (f"https://user:{SECRET}@h/0.tar", "holds a user name or password"),
        (f"https://h/0.tar?X-Amz-Signature={SECRET}", "write it into a .txt list"),
        (f"https://h/list.txt?verify={SECRET}", "write it into a .txt list"),
        ("https://h/0.tar.gz", "compressed archives"),
        ("https://h/photos/", "is not that of a .tar, of tars such as {000..146}.tar or of a .txt list"),
        ("file:///etc/list.txt", "write the path alone"),
        ("zip://a::https://h/0.tar", "chained URLs are not read"),
        ("nonsense://h/0.tar", "Protocol not known"),
        ("https://h/{3..1}.tar", "the range is reversed"),
        ("gs://bucket/0.tar", "pip install gcsfs"),
    ],
)
def test_urls_that_are_no_sources_are_errors(url, message):
    if "gcsfs" in message and __import__("importlib").util.find_spec("gcsfs"):
        pytest.skip("gcsfs is installed")
    with pytest.raises(ValueError) as caught:
        PhotoSource(url)
    assert message in str(caught.value) and SECRET not in str(caught.value)


# ---- reading ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranges", [True, False])
def test_photos_of_tars_at_urls_are_those_of_the_local_tars(server, tmp_path, ranges):
    server.ranges = ranges
    for number in range(3):
        data = tar_of({f"{i}.png": png(10 * number + i) for i in range(9)} | {"x.txt": b"no photo"})
        server.files[f"/d/{number}.tar"] = data
        (tmp_path / f"{number}.tar").write_bytes(data)
    local, source = PhotoSource(tmp_path), PhotoSource(f"{server.url}/d/{{0..2}}.tar")
    names = list(local)
    assert list(source) == names and len(names) == 27
    assert list(PhotoSource(f"{server.url}/d/1.tar")) == names[9:18]
    source = pickle.loads(pickle.dumps(source))
    for name, loaded in decode_ahead(source, names[::-1], source.decode):
        np.testing.assert_array_equal(loaded.pixels, local.decode(name).pixels)
    assert source.size("1.tar/3.png") == (5, 7)
    assert source.exists("1.tar/3.png") and not source.exists("1.tar/33.png") and not source.exists("7.tar/3.png")
    assert reason(source, "1.tar/33.png") == "no such photo in the tar"
    for name in ("../0.tar/a.png", "/0.tar/a.png", "a.png", f"{server.url}/d/1.tar/3.png"):
        assert reason(source, name) == "not a path inside the photo source"


def test_index_of_a_tar_is_read_once(server, tmp_path):
    server.files["/0.tar"] = tar_of({f"{i}.png": png(i) for i in range(5)})
    names = list(PhotoSource(f"{server.url}/0.tar"))
    forget()
    server.requests.clear()
    assert list(PhotoSource(f"{server.url}/0.tar")) == names
    assert [wanted for _, wanted in server.requests] == ["bytes=0-0"]  # whether it is still the same
    server.files["/0.tar"] = tar_of({"new.png": png(1)})
    forget()
    assert list(PhotoSource(f"{server.url}/0.tar")) == ["0.tar/new.png"]
    (stored,) = (tmp_path / "cache" / "namedmask" / "tars").iterdir()
    stored.write_bytes(b"damaged")
    forget()
    assert list(PhotoSource(f"{server.url}/0.tar")) == ["0.tar/new.png"]


MARKS = {
    "ETag": lambda data: {"ETag": f'"{hash(data)}"'},
    "time": lambda data: {"Last-Modified": f"Sat, 28 Nov 2026 00:00:{data[0] % 60:02} GMT"},
    "none": lambda data: {},
}


@pytest.mark.parametrize("mark", MARKS)
def test_another_tar_of_the_same_size_is_noticed(server, mark):
    server.marks = MARKS[mark]
    contents = [tar_of({f"{name}.png": png(1)}) for name in "ab"]
    for name, content in zip("ab", contents, strict=True):
        server.files["/0.tar"] = content
        for _ in range(2):
            server.requests.clear()
            forget()
            assert list(PhotoSource(f"{server.url}/0.tar")) == [f"0.tar/{name}.png"]
    assert len(contents[0]) == len(contents[1]) and (len(server.requests) == 1) == (mark != "none")


def test_indexes_on_disk_that_were_used_longest_ago_are_removed(server, tmp_path, monkeypatch):
    cache = tmp_path / "cache" / "namedmask" / "tars"
    for number in range(4):
        server.files[f"/{number}.tar"] = tar_of({f"{number}.png": png(number)})
        list(PhotoSource(f"{server.url}/{number}.tar"))
    files = {json.loads(gzip.decompress(path.read_bytes()))["url"][-5]: path for path in cache.iterdir()}
    assert sorted(files) == ["0", "1", "2", "3"]
    for number, path in files.items():
        os.utime(path, (int(number), int(number)))
    forget()
    list(PhotoSource(f"{server.url}/0.tar"))  # from disk, which is a use
    monkeypatch.setattr(tars, "STORED_BYTES", sum(files[number].stat().st_size for number in "03"))
    tars._tidy(cache)
    assert set(cache.iterdir()) == {files["0"], files["3"]}
    monkeypatch.setattr(tars, "STORED_BYTES", 0)
    monkeypatch.setattr(tars, "TIDY_EVERY", 1)
    forget()
    assert list(PhotoSource(f"{server.url}/1.tar")) == ["1.tar/1.png"] and not list(cache.iterdir())


def test_without_a_home_folder_the_index_of_a_tar_is_not_stored(server, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr("pwd.getpwuid", {}.__getitem__)
    server.files["/0.tar"] = tar_of({"0.png": png(0)})
    assert list(PhotoSource(f"{server.url}/0.tar")) == ["0.tar/0.png"] and not list(tmp_path.iterdir())


def test_only_headers_are_read_of_tars_with_large_members(server, monkeypatch):
    monkeypatch.setattr(remote, "BLOCK", 1 << 16)
    large = {f"{i}.png": bytes([i]) * (1 << 20) for i in range(8)}
    server.files["/0.tar"] = tar_of(large)
    assert len(list(PhotoSource(f"{server.url}/0.tar"))) == 8
    read = sum(int(last) - int(first) + 1 for _, r in server.requests for first, last in re.findall(r"(\d+)-(\d+)", r))
    assert read < 200_000 and len(server.requests) <= 12


def test_sequential_reading_requests_blocks_and_random_reading_photos(server, monkeypatch):
    monkeypatch.setattr(remote, "BLOCK", 1 << 16)
    monkeypatch.setattr(remote, "NEAR", 1 << 12)
    noise = np.random.default_rng(0).integers(0, 256, (400, 4000), np.uint8)
    server.files["/0.tar"] = tar_of({f"{i:03}.png": noise[i].tobytes() for i in range(400)})  # 1.9 MB
    source = PhotoSource(f"{server.url}/0.tar")
    names = list(source)
    forget()
    source.read(names[0])
    server.requests.clear()
    assert b"".join(map(source.read, names)) == noise.tobytes()
    assert len(server.requests) <= 2 + len(server.files["/0.tar"]) // remote.BLOCK
    forget()
    source.read(names[0])
    server.requests.clear()
    for i in (300, 100, 200):
        assert source.read(names[i]) == noise[i].tobytes()
        assert source.read(names[i]) == noise[i].tobytes()  # from the cache, as after `decoding_cost`
    sizes = [int(last) - int(first) + 1 for _, r in server.requests for first, last in re.findall(r"(\d+)-(\d+)", r)]
    assert sizes == [4000] * 3


def test_a_server_without_ranges_sends_each_tar_once(server, monkeypatch):
    monkeypatch.setattr(remote, "BLOCK", 1 << 14)
    server.ranges = False
    noise = np.random.default_rng(0).integers(0, 256, (100, 4000), np.uint8)
    server.files["/0.tar"] = tar_of({f"{i:03}.png": noise[i].tobytes() for i in range(100)})
    source = PhotoSource(f"{server.url}/0.tar")
    names = list(source)
    forget()
    source.exists(names[0])
    server.requests.clear()
    with ThreadPoolExecutor(4) as pool:
        assert b"".join(pool.map(source.read, names)) == noise.tobytes()
    assert len(server.requests) == 1


def test_cache_is_bounded():
    cache, running, most, lock = remote._Cache(100), 0, 0, threading.Lock()

    def fetch(key):
        nonlocal running, most
        with lock:
            running += 30
            most = max(most, running)
        threading.Event().wait(0.0005)
        with lock:
            running -= 30
        return bytes([key]) * 30

    with ThreadPoolExecutor(8) as pool:
        keys = [i // 2 for i in range(100)]
        results = list(pool.map(lambda key: cache.get((key,), 30, lambda: fetch(key)), keys))
    assert results == [bytes([key]) * 30 for key in keys]
    assert most <= 90 and cache.used == sum(len(data) for data in cache.entries.values()) <= 100
    assert cache.get((99,), 500, lambda: bytes(500)) == bytes(500)  # larger than the cache
    assert cache.used <= 100


def test_threads_share_requests_unless_they_fail():
    cache, calls, started = remote._Cache(1000), [], threading.Barrier(4)

    def fetch(key):
        calls.append(key)
        if calls.count(key) == 1 and key == 3:
            raise OSError("first")
        return bytes([key])

    def get(key):
        started.wait()
        try:
            return cache.get((key,), 1, lambda: fetch(key))
        except OSError as error:
            return str(error)

    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(get, [1, 1, 2, 2, 3, 3, 3, 3]))
    assert results[:4] == [b"\1", b"\1", b"\2", b"\2"]
    assert sorted(map(str, results[4:])) == ["b'\\x03'"] * 3 + ["first"]
    assert sorted(calls) == [1, 2, 3, 3] and cache.used == 3


# ---- failures --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranges", [True, False])
@pytest.mark.parametrize("problem", [503, 429, "cut", "slow"])
def test_requests_that_fail_at_times_are_repeated(server, monkeypatch, ranges, problem):
    monkeypatch.setattr(remote, "RETRY_SECONDS", 20)
    monkeypatch.setattr(remote, "REQUEST_SECONDS", 0.3 if problem == "slow" else 600)
    monkeypatch.setattr(remote.time, "sleep", lambda seconds: None)
    server.ranges = ranges
    server.trouble = lambda number: problem if number % 3 == 1 else None
    server.files["/0.tar"] = tar_of({f"{i}.png": png(i) for i in range(5)})
    server.files["/a.png"] = png(77)
    source = PhotoSource(f"{server.url}/0.tar")
    assert [source.read(name) for name in source] == [png(i) for i in range(5)]
    assert remote.read(f"{server.url}/a.png", 1000) == png(77)


def test_a_server_that_stays_down(server, tmp_path):
    server.files["/0.tar"] = tar_of({"a.png": png(1)})
    source = PhotoSource(f"{server.url}/0.tar")
    (name,) = source
    forget()
    source.exists(name)
    server.trouble = lambda number: 503
    text = reason(source, name)
    assert re.fullmatch(
        rf"cannot be read: {server.url}/0.tar: HTTP 503 Service Unavailable \(\d attempts in \d s\)", text
    )
    forget()
    with pytest.raises(UserError, match=r"0\.tar: HTTP 503 .*; run the same command again"):
        list(source)  # photos must not be missing for a moment's trouble
    with pytest.raises(UserError, match="run the same command again"):
        source.exists(name)
    with pytest.raises(UserError, match=r"list\.txt: HTTP 503 .*; run the same command again"):
        list(PhotoSource(f"{server.url}/list.txt"))
    server.trouble = lambda number: 403
    assert names_and_errors(f"{server.url}/0.tar")[1] == [
        ("0.tar", f"tar cannot be read: {server.url}/0.tar: HTTP 403 Forbidden")
    ]
    requests = len(server.requests)
    list(PhotoSource(f"{server.url}/0.tar").names(lambda _: None))
    assert len(server.requests) == requests + 1  # not repeated
    with pytest.raises(UserError, match=r"^photos: .*list\.txt: HTTP 403 Forbidden$"):
        list(PhotoSource(f"{server.url}/list.txt"))


def test_a_run_stops_when_the_server_goes_down(server, monkeypatch):
    monkeypatch.setattr(remote, "RETRY_SECONDS", 0)
    server.files["/0.tar"] = tar_of({f"{i:02}.png": bytes([i]) * 2000 for i in range(20)})
    source = PhotoSource(f"{server.url}/0.tar")
    names = list(source)
    monkeypatch.setattr(remote, "NEAR", -1)
    server.trouble = lambda number: 503
    remote._shared().cache.entries.clear()
    for name in names[: remote.GIVE_UP - 1]:
        assert "503" in reason(source, name)
    server.trouble = lambda number: None
    assert source.read(names[10]) == bytes([10]) * 2000  # counting starts again
    server.trouble = lambda number: 503
    for name in names[: remote.GIVE_UP - 1]:
        assert "503" in reason(source, name)
    with pytest.raises(UserError, match="the last 8 requests have failed: run the same command again"):
        source.decode(names[11])
    with pytest.raises(UserError, match="have failed"):
        source.size(names[12])


def test_tars_that_are_missing_damaged_or_replaced(server):
    whole = tar_of({f"{i}.png": png(i) for i in range(5)})
    server.files |= {"/0.tar": whole[:3000], "/2.tar": b"", "/3.tar": whole}
    names, errors = names_and_errors(f"{server.url}/{{0..3}}.tar")
    assert names[-5:] == [f"3.tar/{i}.png" for i in range(5)] and "0.tar/0.png" in names
    assert [photo for photo, _ in errors] == ["0.tar", "1.tar", "2.tar"]
    assert "damaged tar" in errors[0][1] and errors[1][1].endswith("HTTP 404 Not Found")
    server.files["/3.tar"] = whole + whole
    remote._shared().cache.entries.clear()
    source = PhotoSource(f"{server.url}/{{0..3}}.tar")
    assert "has changed while it is read" in reason(source, "3.tar/4.png")
    assert source.read("3.tar/4.png") == png(4)  # by the index of the new tar


# ---- lists -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["here", "url"])
def test_lists_of_urls(server, tmp_path, where):
    server.files |= {"/a.png": png(1), "/b": png(2), "/0.tar": tar_of({"m.png": png(3)}), "/text.png": b"hello"}
    (tmp_path / "local.png").write_bytes(png(4))
    lines = [
        f"{server.url}/a.png",
        f"{server.url}/b?w=3&X-Amz-Signature={SECRET}",
        f"{server.url}/b?w=3&X-Amz-Signature=other",
        f"{server.url}/0.tar?token={SECRET}",
        f"{server.url}/missing.png?sig={SECRET}",
        f"{server.url}/text.png",
        f"http://user:{SECRET}@127.0.0.1/u.png",
        "file:///etc/passwd.png",
        str(tmp_path / "local.png"),
    ]
    (tmp_path / "list.txt").write_text("\n".join(lines))
    server.files["/list.txt"] = (tmp_path / "list.txt").read_bytes()
    path = str(tmp_path / "list.txt") if where == "here" else f"{server.url}/list.txt"
    names, errors = names_and_errors(path)
    read = [f"{server.url}/{name}" for name in ("a.png", "b?w=3", "0.tar/m.png", "missing.png", "text.png")]
    assert names == read + [lines[-1]] * (where == "here")
    assert [photo for photo, _ in errors] == [
        "http://127.0.0.1/u.png",
        "file:///etc/passwd.png",
        *([] if where == "here" else [lines[-1]]),
        "list.txt",
    ]
    assert "user name or password" in errors[0][1] and "file:// is not read" in errors[1][1]
    repeated = "1 line repeats an earlier one (names leave out parameters of URLs that may be secret), such as "
    assert errors[-1][1].startswith(repeated)
    source = PhotoSource(path)
    assert [int(source.decode(name).pixels[0, 0, 0]) for name in names[:3]] == [1, 2, 3]
    assert (f"/b?w=3&X-Amz-Signature={SECRET}", "") in server.requests or any("other" in p for p, _ in server.requests)
    missing = reason(source, names[3])
    assert missing == f"cannot be read: {server.url}/missing.png: HTTP 404 Not Found"
    assert "not an image" in reason(source, names[4])
    assert source.exists(names[0]) and not source.exists(names[3])
    if where == "url":
        for name in (lines[-1], "local.png", "file:///etc/passwd", "memory://a/b.png"):
            assert "not a URL" in (text := reason(source, name)) or "is not read from a list at a URL" in text
    else:
        assert int(source.decode(lines[-1]).pixels[0, 0, 0]) == 4
    assert SECRET not in json.dumps([names, errors, missing])


def test_redirects_do_not_leave_the_protocol(server, tmp_path):
    server.files["/a.png"] = png(5)
    server.redirects = {"/ok.png": "/a.png", "/file.png": "file:///etc/passwd", "/loop.png": "/loop.png"}
    (tmp_path / "list.txt").write_text("\n".join(f"{server.url}{path}" for path in server.redirects))
    source = PhotoSource(tmp_path / "list.txt")
    ok, file, loop = source
    assert source.decode(ok).pixels[0, 0, 0] == 5
    assert reason(source, file) == f"cannot be read: {server.url}/file.png: redirects to another protocol"
    assert "loop.png" in reason(source, loop)


def test_files_that_are_too_large_are_not_received(server, tmp_path, monkeypatch):
    server.files["/a.png"] = bytes(5000)
    monkeypatch.setattr(photos, "MAX_BYTES", 4000)
    (tmp_path / "list.txt").write_text(f"{server.url}/a.png")
    assert reason(PhotoSource(tmp_path / "list.txt"), f"{server.url}/a.png").endswith(
        "more than the limit of 4000 bytes"
    )


def test_other_file_systems_of_fsspec(tmp_path, monkeypatch):
    import fsspec

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    forget()
    memory = fsspec.filesystem("memory")
    memory.pipe("/test_remote/00.tar", tar_of({"a.png": png(1), "b.png": png(2)}))
    memory.pipe("/test_remote/c.png", png(3))
    memory.pipe("/test_remote/list.txt", b"memory://test_remote/c.png\n")
    source = PhotoSource("memory://test_remote/{00..01}.tar")
    errors = []
    assert list(source.names(errors.append)) == ["00.tar/a.png", "00.tar/b.png"]
    assert [str(error.reason) for error in errors] == ["tar cannot be read: memory://test_remote/01.tar: not found"]
    assert source.read("00.tar/b.png") == png(2)
    (tmp_path / "list.txt").write_text("memory://test_remote/c.png\nmemory://test_remote/d.png")
    source = PhotoSource(tmp_path / "list.txt")
    assert source.read("memory://test_remote/c.png") == png(3)
    assert reason(source, "memory://test_remote/d.png") == "cannot be read: memory://test_remote/d.png: not found"


# ---- runs ------------------------------------------------------------------------------------------------------------


def test_run_over_http_is_that_of_the_local_tars(server, tmp_path, detector_options, one_thread):
    names = draw_photos(tmp_path / "drawn", 8)
    (tmp_path / "local").mkdir()
    for number in range(2):
        data = tar_of({name: (tmp_path / "drawn" / name).read_bytes() for name in names[4 * number : 4 * number + 4]})
        server.files[f"/d/{number:03}.tar"] = data
        (tmp_path / "local" / f"{number:03}.tar").write_bytes(data)
    embeddings = write_embeddings(tmp_path / "e.safetensors", names)
    listed = json.loads(embeddings.with_suffix(".json").read_text())
    listed["image_files"] = [f"{i // 4:03}.tar/{name}" for i, name in enumerate(names)]
    embeddings.with_suffix(".json").write_text(json.dumps(listed))
    options = ["--embeddings", embeddings, "--categories", "cat,dog", "--photos-per-category", 3, *detector_options]

    local = command("run", tmp_path / "local", "--out", tmp_path / "a", *options)
    assert local.exit_code == 0, local.output
    server.trouble = lambda number: 503 if number % 4 == 0 else None
    source = f"{server.url}/d/{{000..001}}.tar"
    result = command("run", source, "--out", tmp_path / "b", *options)
    assert result.exit_code == 0, result.output
    a, b = files_of(tmp_path / "a"), files_of(tmp_path / "b")
    same = [name for name in a if name.split("/")[0] in ("index", "masks", "archive.json", "errors.jsonl")]
    assert len(same) >= 5 and all(a[name] == b[name] for name in same)
    assert source in b["run.toml"].decode() and json.loads(b["stages.json"])["photos"] == source

    refused = command("run", f"http://me:{SECRET}@127.0.0.1/0.tar", "--out", tmp_path / "c", *options)
    assert refused.exit_code == 2 and "user name or password" in refused.output
    assert SECRET not in refused.output and not (tmp_path / "c" / "stages.json").exists()


def test_signatures_in_a_list_are_nowhere_in_a_run(server, tmp_path, detector_options, one_thread):
    names = draw_photos(tmp_path / "drawn", 4)
    server.files |= {f"/{name}": (tmp_path / "drawn" / name).read_bytes() for name in names[:3]}
    lines = [f"{server.url}/{name}?X-Amz-Signature={SECRET}" for name in names]
    (tmp_path / "list.txt").write_text("\n".join(lines))
    embeddings = write_embeddings(tmp_path / "e.safetensors", names)
    listed = json.loads(embeddings.with_suffix(".json").read_text())
    listed["image_files"] = [f"{server.url}/{name}" for name in names]
    embeddings.with_suffix(".json").write_text(json.dumps(listed))
    options = ["--embeddings", embeddings, "--categories", "cat,dog", "--photos-per-category", 2, *detector_options]
    result = command("run", tmp_path / "list.txt", "--out", tmp_path / "run", *options)
    assert result.exit_code == 0, result.output
    files = files_of(tmp_path / "run")
    assert not [name for name, data in files.items() if SECRET.encode() in data] and SECRET not in result.output
    (error,) = map(json.loads, files["errors.jsonl"].splitlines())
    assert error["photo"] == f"{server.url}/{names[3]}" and error["reason"].endswith("HTTP 404 Not Found")
    assert all(f"{server.url}/{name}".encode() in files["masks/00000.jsonl"] for name in names[:3])


def test_s3(tmp_path, monkeypatch):
    """Through s3fs, with credentials and endpoint of the environment."""
    pytest.importorskip("s3fs")
    ThreadedMotoServer = pytest.importorskip("moto.server").ThreadedMotoServer
    import fsspec
    import s3fs

    server = ThreadedMotoServer(port=0, verbose=False)
    server.start()
    try:
        endpoint = "http://{}:{}".format(*server.get_host_and_port())
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.setenv(name, SECRET)
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        monkeypatch.setattr(remote, "RETRY_SECONDS", 0.4)
        forget()
        s3fs.S3FileSystem.clear_instance_cache()
        bucket = fsspec.filesystem("s3")
        bucket.mkdir("bucket")
        for number in range(2):
            bucket.pipe(f"bucket/s/{number:04}.tar", tar_of({f"{i}.png": png(10 * number + i) for i in range(3)}))
        bucket.pipe("bucket/list.txt", b"s3://bucket/s/0001.tar\ns3://bucket/x.png\ns3://bucket/y.png\n/etc/passwd")
        bucket.pipe("bucket/x.png", png(99))
        source, errors = PhotoSource("s3://bucket/s/{0000..0002}.tar"), []
        names = list(source.names(errors.append))
        assert names == [f"{number:04}.tar/{i}.png" for number in range(2) for i in range(3)]
        assert [error.reason for error in errors] == ["tar cannot be read: s3://bucket/s/0002.tar: not found"]
        assert [source.read(name) for name in names] == [png(i) for i in (0, 1, 2, 10, 11, 12)]
        source, errors = PhotoSource("s3://bucket/list.txt"), []
        names = list(source.names(errors.append))
        assert names == [
            *(f"s3://bucket/s/0001.tar/{i}.png" for i in range(3)),
            "s3://bucket/x.png",
            "s3://bucket/y.png",
        ]
        assert [error.photo for error in errors] == ["/etc/passwd"]
        assert source.read("s3://bucket/x.png") == png(99) and source.exists("s3://bucket/x.png")
        assert reason(source, "s3://bucket/y.png") == "cannot be read: s3://bucket/y.png: not found"
        assert not source.exists("s3://bucket/y.png")
    finally:
        server.stop()
        s3fs.S3FileSystem.clear_instance_cache()


def test_fork_forgets_what_belongs_to_the_parent(server):
    server.files["/0.tar"] = tar_of({"a.png": png(1)})
    source = PhotoSource(f"{server.url}/0.tar")
    (name,) = source
    pid = os.fork()
    if pid == 0:
        os._exit(0 if source.read(name) == png(1) else 1)
    assert os.waitpid(pid, 0)[1] == 0
