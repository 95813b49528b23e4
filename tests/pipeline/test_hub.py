# SPDX-License-Identifier: MIT
"""Published weights: which ones a run needs, the caches, downloads, and one line in seconds without a network."""

import http.server
import logging
import socket
import sys
import threading
import time
import urllib.error
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import SimpleNamespace

import pytest

from namedmask import hub
from namedmask.config import make_config
from namedmask.doctor import examine
from namedmask.errors import UserError
from namedmask.hub import Published
from namedmask.stages import STAGES
from small_world import command, draw_photo


class Server(http.server.BaseHTTPRequestHandler):
    """Has /good, /cut (which ends before its length), /slow (which never answers), and nothing else."""

    requests: list[str] = []  # noqa: RUF012

    def do_HEAD(self):
        self.answer(b"")

    def do_GET(self):
        self.answer(b"weights")

    def answer(self, body: bytes):
        self.requests.append(f"{self.command} {self.path}")
        if self.path == "/slow":
            time.sleep(1)
            return
        self.send_response(200 if self.path in ("/good", "/cut") else 404)
        self.send_header("Content-Length", "9" if self.path == "/cut" else "7")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def server():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


@pytest.fixture(autouse=True)
def _short(monkeypatch, tmp_path):
    monkeypatch.setattr(hub, "ANSWER_WITHIN", 0.3)
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))  # empty
    Server.requests.clear()


def from_url(url: str, folder: Path) -> Published:
    return Published("backbone x", "--backbone-weights", url=url, folder=folder)


def test_a_file_is_downloaded_once(server, tmp_path, printing, capsys):
    one = from_url(f"{server}/good", tmp_path / "a" / "b")
    assert one.cached() is None
    assert hub.fetch(one).read_bytes() == b"weights" and hub.fetch(one) == one.cached() == tmp_path / "a" / "b" / "good"
    assert Server.requests == ["HEAD /good", "GET /good"]
    assert capsys.readouterr().out == f"downloading backbone x: {server}/good\n"


@pytest.mark.parametrize(
    ("path", "reason"),
    [("/none", "Not Found"), ("/cut", "7 of 9 bytes arrived"), ("/slow", "no answer within 0.3 s|timed out")],
)
def test_what_the_server_does_not_give_is_one_line(server, tmp_path, path, reason):
    one, start = from_url(server + path, tmp_path), time.monotonic()
    with pytest.raises(
        UserError, match=rf"backbone x in the caches.*({reason}).*`namedmask fetch`.*--backbone-weights"
    ) as info:
        hub.fetch(one)
    assert time.monotonic() - start < 0.9 and "\n" not in str(info.value)
    assert list(tmp_path.iterdir()) == []


def test_a_slow_name_resolution_does_not_delay_the_error(tmp_path, monkeypatch):
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: time.sleep(1))
    start = time.monotonic()
    with pytest.raises(UserError, match=r"weights\.example does not give them \(no answer within 0\.3 s\)"):
        hub.fetch(from_url("https://weights.example/a.pth", tmp_path))
    assert time.monotonic() - start < 0.9


def test_names_on_the_hub(server, tmp_path, monkeypatch):
    """safetensors first, then the other format; all missing weights are named."""
    clip = Published("CLIP model c", "--clip-weights", "org/c@v2", "open_clip_pytorch_model.bin")
    vit = Published("backbone v", "--backbone-weights", "org/v", "pytorch_model.bin")
    assert clip.address().endswith("org/c/resolve/v2/open_clip_model.safetensors")
    assert vit.address().endswith("org/v/resolve/main/model.safetensors")
    places = {"model.safetensors": "/none", "pytorch_model.bin": "/good"}
    monkeypatch.setattr(Published, "address", lambda one, name="": server + places.get(name, f"/{one.repository}"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda repository, name, revision: f"{repository}/{name}")
    assert hub.fetch(vit) == Path("org/v/pytorch_model.bin")
    Server.requests.clear()
    with pytest.raises(
        UserError, match=r"CLIP model c and backbone v .*HTTP status 404.*--clip-weights.*--backbone-weights"
    ):
        hub.require([clip, vit])
    assert len(Server.requests) == 2  # both names of the first file
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"\(HF_HUB_OFFLINE is set\)"):
        hub.fetch(clip)


def test_files_of_the_hub_are_looked_for_by_revision(monkeypatch, tmp_path):
    cached = {("org/c", "open_clip_pytorch_model.bin", "v2"): "/cache/bin"}
    monkeypatch.setattr(
        "huggingface_hub.try_to_load_from_cache",
        lambda repo, name, revision: cached.get((repo, name, revision), object()),
    )
    clip = Published("CLIP model c", "--clip-weights", "org/c@v2", "open_clip_pytorch_model.bin")
    assert clip.names == ["open_clip_model.safetensors", "open_clip_pytorch_model.bin"]
    assert clip.cached() == Path("/cache/bin") and clip._replace(repository="org/c").cached() is None
    cached["org/c", "open_clip_model.safetensors", "v2"] = "/cache/safe"
    assert hub.fetch(clip) == clip.cached() == Path("/cache/safe")
    assert Published("", "", "org/v", "a.pth.tar").names == ["a.pth.tar"]
    assert Published("", "", "org/v", "x.bin.pt").names == ["x.bin.safetensors", "x.bin.pt"]
    assert Published("", "", url="https://a.example/b/c.pth?x=1", folder=tmp_path).download == tmp_path / "c.pth"


@pytest.mark.parametrize(("repository", "revision"), [("org/v", None), ("org/v@r1", "r1")])
def test_downloads_from_the_hub_are_quiet(monkeypatch, repository, revision):
    logger = logging.getLogger("huggingface_hub")
    before, seen = logger.level, []

    def download(repository, name, revision):
        seen.append((repository, name, revision, logger.level))
        if name == "bad":
            raise OSError("no space")
        return "/cache/file"

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    one = Published("backbone v", "--backbone-weights", repository, "file.pth")
    assert hub._download(one, "file.pth") == Path("/cache/file")
    with pytest.raises(OSError, match="no space"):
        hub._download(one, "bad")
    assert [call[:3] for call in seen] == [("org/v", "file.pth", revision), ("org/v", "bad", revision)]
    assert all(level == logging.CRITICAL for *_, level in seen) and logger.level == before


@pytest.mark.parametrize(("status", "name"), [(399, "model.safetensors"), (400, None)])
def test_an_answer_below_400_means_that_the_file_is_there(monkeypatch, status, name):
    session = SimpleNamespace(head=lambda *_, **__: SimpleNamespace(status_code=status))
    monkeypatch.setattr("huggingface_hub.utils.get_session", lambda: session)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    one = Published("backbone v", "--backbone-weights", "org/v", "pytorch_model.bin")
    if name:
        assert hub._find(one) == name
    else:
        with pytest.raises(FileNotFoundError, match=r"HTTP status 400 for .*pytorch_model.bin"):
            hub._find(one)


def test_all_missing_weights_are_named_and_the_cached_are_not(monkeypatch):
    asked = []
    monkeypatch.setattr(Published, "cached", lambda one: None if one.what in "acd" else Path())
    monkeypatch.setattr(hub, "fetch", lambda one, others: asked.append((one.what, [other.what for other in others])))
    hub.require([Published(what, "") for what in "abcd"])
    assert asked == [("a", ["c", "d"]), ("c", ["d"]), ("d", [])]


def test_reason_of_a_failure():
    assert hub._reason(urllib.error.URLError(OSError("no route"))) == "no route"
    assert hub._reason(urllib.error.HTTPError("u", 404, "Not Found", None, None)) == "HTTP Error 404: Not Found"
    with pytest.raises(KeyError):
        hub._within(5, lambda: {}["a"])
    assert hub._within(5, lambda: "a") == "a"


@pytest.mark.parametrize(
    ("cfg", "published"),
    [
        ({"hf_hub_id": "org/v"}, ("org/v", "pytorch_model.bin", "")),
        ({"hf_hub_id": "org/v", "hf_hub_filename": "a.bin", "url": "https://a/b"}, ("org/v", "a.bin", "")),
        ({"url": "https://a/b.pth"}, ("", "", "https://a/b.pth")),
        ({"file": "/f", "hf_hub_id": "org/v"}, None),
        ({}, None),
        (None, None),
    ],
)
def test_published_weights_of_timm(monkeypatch, cfg, published):
    empty = {"file": None, "hf_hub_id": None, "hf_hub_filename": None, "url": None}
    monkeypatch.setattr(
        "timm.models.get_pretrained_cfg", lambda _: cfg if cfg is None else SimpleNamespace(**empty | cfg)
    )
    one = hub.timm("vit_tiny_patch16_224", "encoder")
    if published is None:
        assert one is None
    else:
        assert (one.repository, one.file, one.url) == published
        assert (one.what, one.option) == ("encoder vit_tiny_patch16_224", "--encoder-weights")


@pytest.mark.parametrize(
    ("cfg", "published"),
    [
        ({"hf_hub": "org/c/"}, ("org/c", "open_clip_pytorch_model.bin", "")),
        ({"hf_hub": "org/c/a.bin"}, ("org/c", "a.bin", "")),
        ({"url": "https://a/b.pt"}, ("", "", "https://a/b.pt")),
    ],
)
def test_published_weights_of_open_clip(monkeypatch, cfg, published):
    monkeypatch.setattr("open_clip.get_pretrained_cfg", lambda name, tag: cfg)
    one = hub.clip("ViT-B-32:tag")
    assert (one.repository, one.file, one.url) == published
    assert hub.clip("ViT-B-32") is None
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr("pwd.getpwuid", {}.__getitem__)  # a user without a home folder
    assert hub.clip("ViT-B-32:tag") is not None


def needed(stages=STAGES, **values) -> list[str]:
    return [one.what for one in hub.needed(make_config({"photos": "", **values}), stages)]


def test_the_settings_tell_which_weights_are_needed():
    clip, vit, encoder = (
        "CLIP model ViT-L-14-336-quickgelu:openai",
        "backbone vit_small_patch8_224.dino",
        "encoder resnet50.dino",
    )
    assert needed() == [clip, vit, encoder]
    assert needed(["index"]) == needed(["archive"]) == [clip] and needed(["pseudolabel"]) == needed(
        ["train-saliency"]
    ) == [vit]
    assert needed(["experts"]) == needed(["train"]) == [encoder] and needed(["report"]) == []
    assert needed(["index"], index={"embeddings": "/e"}) == needed(["index"], index={"clip_weights": "/w"}) == []
    assert needed(["index"], index={"clip_model": "namedmask-demo"}) == []  # of a plugin
    assert needed(["pseudolabel"], detector={"backbone": "vit_namedmask_demo"}) == []
    assert needed(["pseudolabel"], detector={"backbone_weights": "/w"}) == []
    assert needed(["pseudolabel"], detector={"name": "selfmask"}) == []
    votes = {"name": "cluster-vote", "more_backbones": ["vit_base_patch16_224.dino", "vit_small_patch16_224.dino=/w"]}
    assert needed(["pseudolabel"], detector=votes) == [vit, "backbone vit_base_patch16_224.dino"]
    for name in ("backbone_weights", "init_checkpoint"):
        assert needed(["train-saliency"], saliency={name: "/w"}) == []
    assert (
        needed(["train"], segmenter={"encoder_weights": "/w"})
        == needed(["experts"], experts={"encoder_weights": "/w"})
        == []
    )
    assert needed(["train"], segmenter={"encoder": "resnet18.a1_in1k"}) == ["encoder resnet18.a1_in1k"]
    for values, message in (
        ({"index": {"clip_model": "ViT-B-32:nope"}}, "no weights 'nope' of ViT-B-32, only openai"),
        ({"detector": {"backbone": "vit_nope"}}, "'vit_nope' is no timm model"),
    ):
        with pytest.raises(UserError, match=message):
            needed(**values)


def test_fetch_and_doctor(monkeypatch, tmp_path):
    fetched = []
    monkeypatch.setattr(hub, "fetch", lambda one: fetched.append(one.what) or tmp_path / "file")
    result = command("fetch", "--backbone", "vit_base_patch16_224.dino", "--set", "index.embeddings=/e")
    assert fetched == ["backbone vit_base_patch16_224.dino", "encoder resnet50.dino"]  # SelfMask's backbone is the same
    assert result.stdout == "".join(f"{what}: {tmp_path / 'file'}\n" for what in fetched)
    report = "\n".join(examine())
    assert "CLIP model ViT-L-14-336-quickgelu:openai: not downloaded; `namedmask fetch` does it" in report
    monkeypatch.setattr(Published, "cached", lambda one: tmp_path / one.file)
    assert f"backbone vit_small_patch8_224.dino: {tmp_path / 'pytorch_model.bin'}" in "\n".join(examine())


def test_doctor_with_two_gpus(monkeypatch):
    import torch

    from namedmask import doctor
    from namedmask_kernels import backends

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    memory = {0: 80 << 30, 1: (24 << 30) - (1 << 28)}
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda n: SimpleNamespace(name=f"card {n}", total_memory=memory[n])
    )
    monkeypatch.setattr(
        backends, "obstacle", lambda op, backend, device: None if backend in ("reference", device.type) else "why not"
    )
    monkeypatch.setattr(doctor, "PACKAGES", ("torch", "no_such_package", "xformers"))
    monkeypatch.setattr(
        doctor, "version", lambda name: (_ for _ in ()).throw(PackageNotFoundError) if "such" in name else "1"
    )
    monkeypatch.setitem(sys.modules, "xformers.ops", None)
    lines = list(examine())
    assert "cuda:0: card 0, 80 GiB" in lines and "cuda:1: card 1, 24 GiB" in lines
    assert not any("no device" in line for line in lines)
    assert {
        "  torch 1",
        "  no_such_package: not installed",
        "  xformers 1, cannot be imported: import of xformers.ops halted; None in sys.modules",
    } <= set(lines)
    for device in ("cpu", "cuda"):
        (line,) = [line for line in lines if line.startswith(f"  pamr on {device}: ")]
        available = [b for b in backends.ORDER if b in ("reference", device)]
        assert f": {', '.join(available)} (" in line
        assert line.count("why not") == len(backends.ORDER) - len(available)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(backends, "native", lambda: None)
    lines = list(examine())
    assert not any(" on cuda: " in line or "C++ kernels" in line for line in lines)
    for version, line in ((None, "cuda: no device (this torch is built without CUDA)"), ("12", "cuda: no device")):
        monkeypatch.setattr(torch.version, "cuda", version)
        assert line in list(examine())


def test_a_run_looks_for_all_weights_before_any_work(monkeypatch, tmp_path):
    """In a folder of class folders, no CLIP is needed; a run without weights leaves no results and no settings."""
    for name in ("cat", "dog"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        draw_photo(0, name).save(tmp_path / "photos" / name / "0.jpg")
    monkeypatch.setattr(hub, "_find", lambda one: (_ for _ in ()).throw(OSError("no network")))
    result = command("run", tmp_path / "photos", "--out", tmp_path / "out")
    assert result.exit_code == 2 and result.stderr.count("\n") == 1
    assert "no weights of backbone vit_small_patch8_224.dino in the caches" in result.stderr
    result = command("run", tmp_path / "photos", "--categories", "cat", "--out", tmp_path / "out")
    assert (
        result.exit_code == 2 and "no weights of CLIP model ViT-L-14-336-quickgelu:openai and backbone" in result.stderr
    )
    assert not [path for path in (tmp_path / "out").iterdir() if path.name != ".lock"]
