# SPDX-License-Identifier: MIT
"""Models of an installed plugin are used by name, and a plugin that fails is reported."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from namedmask import backbones, registry
from namedmask.config import IndexConfig
from namedmask.errors import UserError
from namedmask.index import Clip
from namedmask.saliency import selfmask

VIT, CLIP = "vit_of_a_plugin", "clip-of-a-plugin"
SIZES = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
PLUGIN = f"""
import json
from pathlib import Path

import open_clip
import timm
from namedmask import registry
from timm.models.vision_transformer import _cfg, _create_vision_transformer

FOLDER = Path(__file__).parent
default_cfgs = {{"{VIT}": _cfg(input_size=(3, 32, 32), num_classes=0, file=str(FOLDER / "vit.safetensors"))}}


def {VIT}(pretrained=False, **options):
    return _create_vision_transformer("{VIT}", pretrained=pretrained, **({SIZES!r} | options))


def register():
    global default_cfgs
    default_cfgs = timm.models.generate_default_cfgs(default_cfgs)
    timm.models.register_model({VIT})
    open_clip.add_model_config(FOLDER / "{CLIP}.json")
    registry.set_default_weights("clip", "{CLIP}", FOLDER / "clip.safetensors")
    registry.set_default_weights("selfmask", "{VIT}", FOLDER / "selfmask.safetensors")
"""
CLIP_CONFIG = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 1, "layers": 1},
}


def install(folder: Path, name: str, source: str) -> None:
    """Installs a distribution with one module, whose `register` is an entry point of `registry.GROUP`."""
    (folder / f"{name}.py").write_text(source)
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[{registry.GROUP}]\n{name} = {name}:register\n")


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A folder on sys.path to install plugins into; no plugin has been loaded yet."""
    monkeypatch.syspath_prepend(tmp_path)
    registry.load_plugins.cache_clear()
    yield tmp_path
    registry.load_plugins.cache_clear()


def test_models_of_a_plugin_are_found_by_name_with_their_default_weights(site):
    import open_clip

    install(site, "models_of_a_plugin", PLUGIN)
    torch.manual_seed(0)
    (site / f"{CLIP}.json").write_text(json.dumps(CLIP_CONFIG))
    vit = timm.models.VisionTransformer(num_classes=0, **SIZES)
    save_file(vit.state_dict(), site / "vit.safetensors")
    network = selfmask.SelfMask(vit, queries=2, layers=1)
    save_file(network.state_dict(), site / "selfmask.safetensors")
    save_file(open_clip.CLIP(**CLIP_CONFIG).state_dict(), site / "clip.safetensors")

    def same(model: torch.nn.Module, file: str) -> bool:
        saved = load_file(site / file)
        return all(torch.equal(tensor, saved[name]) for name, tensor in model.state_dict().items())

    assert VIT not in timm.list_models() and CLIP not in open_clip.list_models()
    assert same(backbones.load(VIT).model, "vit.safetensors")
    assert same(backbones.load_encoder(VIT).network.vit, "vit.safetensors")
    assert same(selfmask.load(VIT, None), "selfmask.safetensors")
    assert same(Clip(IndexConfig(clip_model=CLIP), "cpu").model, "clip.safetensors")


def test_a_plugin_that_fails_is_named_and_the_others_work(site):
    install(site, "broken_plugin", "raise ImportError('\\nno module named acme\\nsecond line')")
    with pytest.warns(RuntimeWarning, match="plugin 'broken_plugin'"):
        assert registry.default_weights("selfmask", "vit_namedmask_demo").endswith("selfmask.safetensors")
    failure = r"; plugin 'broken_plugin' \(broken_plugin:register\) failed: ImportError: no module named acme$"
    with pytest.raises(UserError, match=r"'vit_of_nobody' is no timm model; .*" + failure):
        backbones.untrained("vit_of_nobody")
    with pytest.raises(UserError, match=r"open_clip has no 'clip-of-nobody'; .*" + failure):
        Clip(IndexConfig(clip_model="clip-of-nobody"), "cpu")


@pytest.mark.parametrize("name", ["timm", "open_clip"])
def test_a_package_that_models_of_this_package_need_is_named_if_it_cannot_be_imported(site, name):
    (site / f"{name}.py").write_text("raise ImportError('cannot import name')")
    paths = os.pathsep.join([str(site), os.environ.get("PYTHONPATH", "")])
    finds = "from namedmask import registry; registry.load_plugins()"
    options = {"capture_output": True, "text": True, "env": os.environ | {"PYTHONPATH": paths}}
    error = subprocess.run([sys.executable, "-c", finds], check=False, **options).stderr
    last = error.splitlines()[-1]
    assert last.startswith("namedmask.errors.UserError: ") and " cannot be imported: cannot import name; " in last
    assert {"open_clip": "open_clip_torch"}.get(name, name) in last


def test_models_that_timm_knows_load_no_plugin(site):
    install(site, "broken_plugin", "raise ImportError('loaded')")
    backbones.untrained("vit_tiny_patch16_224")
    assert registry.load_plugins.cache_info().currsize == 0


def test_help_loads_no_plugin(site):
    install(site, "loud_plugin", "print('loaded')\ndef register(): print('loaded')")
    paths = os.pathsep.join([str(site), os.environ.get("PYTHONPATH", "")])
    options = {"capture_output": True, "text": True, "env": os.environ | {"PYTHONPATH": paths}}
    shown = subprocess.run([sys.executable, "-m", "namedmask", "--help"], check=True, **options).stdout
    assert "Usage" in shown and "loaded" not in shown
    finds = "from namedmask import registry; registry.load_plugins()"
    assert "loaded" in subprocess.run([sys.executable, "-c", finds], check=True, **options).stdout
