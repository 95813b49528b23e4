# SPDX-License-Identifier: MIT
"""Segmenters on the Hugging Face Hub: folders, model cards, uploads and downloads, with and without a network."""

import json
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

import hub_server
import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from namedmask import hub
from namedmask.archive import Archive, Retrieved, write_archive
from namedmask.backbones import untrained_encoder
from namedmask.config import SegmenterTraining
from namedmask.errors import UserError
from namedmask.masks import MaskRecord, write_errors, write_shard
from namedmask.record import RunRecord, StageRecord
from namedmask.segmenter.deeplab import DeepLab, save_segmenter
from namedmask.segmenter.predict import Segmenter
from small_world import ENCODER, command, draw_photo, draw_photos

pytestmark = pytest.mark.usefixtures("one_thread")

NAMES = ["cat", "traffic_light *"]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run folder with four masks, one of them empty, and a segmenter with metrics."""
    out = tmp_path_factory.mktemp("secret") / "run"
    masks, folder = out / "masks", out / "segmenter"
    for path in (masks, folder):
        path.mkdir(parents=True)
    box = np.zeros((8, 8), bool)
    box[2:5, 2:5] = True
    photos = [("a.jpg", "cat", box), ("b.jpg", "cat", box & False), ("b.jpg", NAMES[1], box), ("c.jpg", NAMES[1], box)]
    write_shard(masks / "00000.jsonl", [MaskRecord.from_mask(n, mask, c, 0.3, 0.5) for n, c, mask in photos])
    write_errors(masks / "00000.errors.jsonl", [])
    write_archive(
        out / "archive.json", Archive(NAMES, {c: [Retrieved(n, 0.3) for n, k, _ in photos if k == c] for c in NAMES})
    )
    record = RunRecord("/home/me/secret/photos")
    record.stages["pseudolabel"] = StageRecord({"detector.name": "cluster-vote", "refine.name": "crf"})
    record.write(out)
    torch.manual_seed(0)
    save_segmenter(folder, DeepLab(untrained_encoder(ENCODER), 3, 16), NAMES, "digest")
    about = {"settings": SegmenterTraining(encoder_weights="/home/me/secret.pth", steps=70).without_files()}
    lines = [about, {"step": 50, "loss": 1.5}, {"step": 50, "agreement_with_held_out_masks": 0.8125}]
    lines += [{"step": 70, "agreement_with_held_out_masks": 0.75}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"st')
    return out


def parts(card: str) -> tuple[dict, str]:
    _, front, body = card.split("---\n", 2)
    return yaml.safe_load(front), body


def test_a_folder_has_weights_names_and_a_card(run, tmp_path):
    original = Segmenter.load(run / "segmenter")
    original.save_pretrained(tmp_path / "copy", license="cc-by-4.0")
    assert sorted(path.name for path in (tmp_path / "copy").iterdir()) == [
        "README.md", "categories.json", "model.safetensors",
    ]  # fmt: skip
    before, after = (load_file(folder / "model.safetensors") for folder in (run / "segmenter", tmp_path / "copy"))
    assert list(before) == list(after) and all(torch.equal(before[name], after[name]) for name in before)
    copy = Segmenter.from_pretrained(tmp_path / "copy")
    photo = np.array(draw_photo(3, "cat"))
    assert copy.names == ["background", *NAMES] and (copy(photo).mask == original(photo).mask).all()


def test_the_card(run, tmp_path):
    segmenter = Segmenter.load(run / "segmenter")
    segmenter.save_pretrained(tmp_path / "copy", license="cc-by-4.0", name="user/name")
    text = (tmp_path / "copy" / "README.md").read_text()
    front, body = parts(text)
    assert front["license"] == "cc-by-4.0" and front["library_name"] == "namedmask"
    assert front["pipeline_tag"] == "image-segmentation" and front["categories"] == NAMES
    assert "1. cat\n2. traffic\\_light \\*\n" in body
    assert "4 masks (3 not empty) of 3 photos, retrieved by CLIP" in body
    assert "detector `cluster-vote` and the refiner `crf`. No person" in body
    assert "| steps | 70 |" in body and "held out of the training: 0.750 after 70 steps" in body
    assert 'Segmenter.from_pretrained("user/name")' in body and "## Limits" in body
    assert "secret" not in text and str(tmp_path) not in text and "/home" not in text


def test_the_example_of_the_card_runs(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Segmenter.load(run / "segmenter").save_pretrained("copy")
    draw_photo(3, "cat").save("photo.jpg")
    names: dict = {}
    exec(Path("copy/README.md").read_text().split("```python\n")[1].split("```")[0], names)
    assert names["names"] == ["background", *NAMES] and names["mask"].dtype == np.uint16


def test_an_own_card_is_kept(run, tmp_path):
    Segmenter.load(run / "segmenter").save_pretrained(tmp_path / "a")
    assert "license" not in parts((tmp_path / "a" / "README.md").read_text())[0]
    (tmp_path / "a" / "README.md").write_text("mine")
    Segmenter.load(tmp_path / "a").save_pretrained(tmp_path / "b")
    assert (tmp_path / "b" / "README.md").read_text() == "mine"
    Segmenter.load(tmp_path / "b" / "model.safetensors").save_pretrained(tmp_path / "c", license="mit")
    text = (tmp_path / "c" / "README.md").read_text()
    assert parts(text)[0]["license"] == "mit" and "## Data" not in text  # nothing is known of it
    with pytest.raises(ValueError, match="was not loaded from a file"):
        Segmenter(DeepLab(untrained_encoder(ENCODER), 2, 16), ["cat"]).save_pretrained(tmp_path / "d")


CLIENT = """
import sys
from namedmask.errors import UserError
from namedmask.segmenter.predict import Segmenter

folder, token, cache = sys.argv[1:]
segmenter = Segmenter.load(folder)
for access in ("wrong", token):
    try:
        print(segmenter.push_to_hub("user/name", private=True, token=access, license="mit", commit_message="First"))
        print(segmenter.push_to_hub("user/name", token=access, commit_message="Second"))
    except UserError as error:
        print(error)
for access in ("wrong", token):
    try:
        print(Segmenter.from_pretrained("user/name", token=access, cache_dir=cache).names)
    except UserError as error:
        print(error)
"""


@pytest.fixture(scope="module")
def hub_and_cache(run, tmp_path_factory):
    """The stand-in after two uploads and a download into a cache, and the lines that the client has printed."""
    cache = tmp_path_factory.mktemp("hub") / "cache"
    with hub_server.running() as server:
        environment = {**os.environ, "HF_ENDPOINT": server.url, "HF_HUB_DISABLE_XET": "1", "no_proxy": "*"}
        environment |= {
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HOME": str(cache.parent / "home"),
        }
        words = [sys.executable, "-c", CLIENT, str(run / "segmenter"), hub_server.TOKEN, str(cache)]
        result = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=120)
        assert result.returncode == 0, result.stderr
    return server, cache, result.stdout.splitlines()


def test_upload_and_download(hub_and_cache, run):
    server, _, lines = hub_and_cache
    assert "user/name cannot be written on the Hub (" in lines[0] and "401" in lines[0] and "hf auth login" in lines[0]
    assert lines[1:3] == [f"{server.url}/user/name"] * 2
    assert "user/name cannot be loaded from the Hub (HTTP status 401" in lines[3]
    assert lines[4:] == [str(["background", *NAMES])]
    repository = server.repositories["user/name"]
    assert repository.private and repository.messages == ["First", "Second"]
    first, second = repository.commits.values()
    assert sorted(second) == ["README.md", "categories.json", "model.safetensors"]
    assert parts(first["README.md"].decode())[0]["license"] == "mit"
    assert second["model.safetensors"] == (run / "segmenter" / "model.safetensors").read_bytes()


def test_the_cache_needs_no_network(hub_and_cache, monkeypatch, tmp_path):
    _, cache, _ = hub_and_cache  # the server has stopped

    def refuse(*_, **__):
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    folder = hub.segmenter("user/name", cache_dir=cache)
    segmenter = Segmenter.from_pretrained("user/name", cache_dir=cache, revision=folder.name)
    assert segmenter.names == ["background", *NAMES]
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    draw_photos(tmp_path / "photos", 1)
    result = command("segment", "hf-hub:user/name", tmp_path / "photos", "--out", tmp_path / "out")
    assert result.exit_code == 0, result.stderr
    assert len(list((tmp_path / "out" / "masks").iterdir())) == 1


def test_what_is_missing_is_one_line(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match=r"user/name at v1 cannot be loaded from the Hub \(HF_HUB_OFFLINE is set\): "):
        Segmenter.from_pretrained("user/name", revision="v1")
    with pytest.raises(UserError, match=r"categories\.json is not in the cache, and the network is not to be used"):
        Segmenter.from_pretrained("user/name", local_files_only=True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "ANSWER_WITHIN", 0.1)
    reported = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: reported.wait(20))
    with pytest.raises(UserError, match=r"no answer within 0\.1 s") as info:
        Segmenter.from_pretrained("user/name")
    assert "\n" not in str(info.value)
    reported.set()  # the error did not wait for the answer, which comes only now
    for name in ("no/such/folder", "/no/folder"):
        with pytest.raises(UserError, match=r"[Rr]epo id"):
            Segmenter.from_pretrained(name)


def test_pushing_offline_is_one_line(run):
    with pytest.raises(UserError, match=r"user/name cannot be written on the Hub \(HF_HUB_OFFLINE is set\)"):
        Segmenter.load(run / "segmenter").push_to_hub("user/name")
