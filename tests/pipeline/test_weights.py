# SPDX-License-Identifier: MIT
"""Files of weights: checkpoints are unwrapped, what does not fit or is not plausible is named, nothing is executed."""

from __future__ import annotations

import argparse
import json
import os
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from namedmask import hub, weights
from namedmask.backbones import load, load_encoder, untrained, untrained_encoder
from namedmask.config import IndexConfig
from namedmask.distributed import Worker
from namedmask.errors import UserError
from namedmask.index import Clip, PrecomputedEmbeddings
from namedmask.saliency import selfmask
from namedmask.segmenter.deeplab import DeepLab, load_segmenter
from namedmask.training import TrainingState

VIT, CNN = "vit_namedmask_demo", "test_resnet"


@pytest.fixture(scope="module")
def state() -> weights.State:
    torch.manual_seed(0)
    return untrained(VIT).state_dict()


@pytest.fixture(scope="module")
def network() -> selfmask.SelfMask:
    torch.manual_seed(0)
    return selfmask.SelfMask(untrained(VIT), queries=2, layers=2)


def prefixed(prefix: str, state: weights.State) -> weights.State:
    return {prefix + name: tensor for name, tensor in state.items()}


def zeros(state: weights.State) -> weights.State:
    return {name: torch.zeros_like(tensor) for name, tensor in state.items()}


HEAD = {"head.mlp.0.weight": torch.zeros(3, 3)}
WRITTEN = {
    "plain": lambda s: s,
    "with a classifier": lambda s: {**s, "head.weight": torch.zeros(5, 96), "head.bias": torch.zeros(5)},
    "timm": lambda s: {"state_dict": zeros(s), "state_dict_ema": s, "args": argparse.Namespace(lr=1), "epoch": 3},
    "MAE": lambda s: {"model": s, "optimizer": {"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": [{}]}},
    "DINO": lambda s: {
        "student": prefixed("module.backbone.", zeros(s)) | prefixed("module.", HEAD),
        "teacher": prefixed("backbone.", s) | HEAD,
        "args": argparse.Namespace(arch="vit"),
    },
    "DINOv2": lambda s: prefixed("student.backbone.", zeros(s)) | prefixed("teacher.backbone.", s),
    "torch.compile and DDP": lambda s: {"state_dict": prefixed("_orig_mod.module.", s)},
    "MoCo": lambda s: {"state_dict": prefixed("module.encoder_q.", s) | prefixed("module.encoder_k.", zeros(s))},
    "Lightning": lambda s: {"state_dict": prefixed("model.encoder.", s), "hyper_parameters": {"lr": 0.1}},
}


@pytest.mark.parametrize("code", WRITTEN)
def test_checkpoints_of_training_codes_are_unwrapped(code, state, tmp_path):
    torch.save(WRITTEN[code](state), tmp_path / "checkpoint.pth")
    loaded = load(VIT, str(tmp_path / "checkpoint.pth")).model.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in loaded.items())
    encoder = load_encoder(VIT, str(tmp_path / "checkpoint.pth")).network.vit.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in encoder.items())


def renamed(state: weights.State, old: str, new: str) -> weights.State:
    return {name.replace(old, new): tensor for name, tensor in state.items() if old in name}


MISFITS = {
    "half of the blocks": (
        lambda s: {name: tensor for name, tensor in s.items() if not name.startswith(("blocks.2.", "blocks.3."))},
        r"it has 30 of 54 tensors; missing blocks\.2\.norm1\.weight, blocks\.2\.norm1\.bias, .* and 21 more$",
    ),
    "more blocks": (
        lambda s: s | renamed(s, "blocks.3.", "blocks.4."),
        r"54 of 54 .*unexpected blocks\.4\..* and 9 more$",
    ),
    "another width": (
        lambda s: s | {"norm.bias": torch.zeros(5)},
        r"norm\.bias is float32 \[5\], expected float32 \[96\]",
    ),
    "integers": (lambda s: s | {"norm.bias": torch.zeros(96, dtype=torch.int8)}, r"norm\.bias is int8 \[96\]"),
    "other names": (
        lambda s: {"a.b": torch.zeros(3)},
        r"it has 0 of 54 tensors; missing .* and 51 more; unexpected a\.b$",
    ),
    "NaN": (
        lambda s: s | {"norm.bias": torch.full((96,), torch.nan)},
        r"is damaged: norm\.bias has values that are NaN",
    ),
    "infinity": (lambda s: s | {"norm.bias": torch.full((96,), 1e300, dtype=torch.float64)}, "norm.bias has values"),
    "no tensors": (lambda s: [1, 2], "holds no named tensors"),
    "strides of 0": (lambda s: s | {"x": torch.zeros(1).expand(10**6, 10**6)}, "its tensors claim .* far more than"),
    "sparse": (
        lambda s: s | {"norm.bias": torch.zeros(96).to_sparse()},
        r"norm\.bias is sparse float32 \[96\], expected float32",
    ),
}


@pytest.mark.parametrize("what", MISFITS)
def test_weights_that_do_not_fit_are_named_in_one_line(what, state, tmp_path):
    make, message = MISFITS[what]
    path = tmp_path / "weights.pth"
    torch.save(make(state), path)
    for option, function in (("--backbone-weights", load), ("--encoder-weights", load_encoder)):
        with pytest.raises(UserError, match=message) as error:
            function(VIT, str(path))
        text = str(error.value)
        assert text.startswith(f"{option} {path} ") and "\n" not in text and len(text) < 500


def test_published_weights_are_checked_like_files(state, tmp_path, monkeypatch):
    path = tmp_path / "model.safetensors"
    monkeypatch.setattr(hub, "fetch", lambda _: path)
    save_file(timm_state := untrained("vit_tiny_patch16_224").state_dict(), path)
    loaded = load("vit_tiny_patch16_224.augreg_in21k").model.state_dict()
    assert all(torch.equal(tensor, timm_state[name]) for name, tensor in loaded.items())
    save_file(state, path)
    for function in (load, load_encoder):
        with pytest.raises(UserError, match=r"the published weights .*model\.safetensors does not fit .*missing"):
            function("vit_tiny_patch16_224.augreg_in21k")


def test_names_of_the_authors_are_converted(tmp_path):
    """ConvNeXt with the names of its authors, and position embeddings of another grid."""
    network = untrained_encoder("convnext_atto").network
    convnext = {
        name.replace("stages_0.blocks.0.conv_dw", "stages.0.0.dwconv"): tensor
        for name, tensor in network.state_dict().items()
    }
    torch.save({"model": convnext}, tmp_path / "a.pth")
    loaded = load_encoder("convnext_atto", str(tmp_path / "a.pth")).network.state_dict()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in network.state_dict().items())
    vit = untrained("vit_tiny_patch16_224").state_dict()
    vit["pos_embed"] = torch.randn(1, 1 + 7 * 7, 192)
    torch.save(vit, tmp_path / "b.pth")
    assert load("vit_tiny_patch16_224", str(tmp_path / "b.pth")).model.pos_embed.shape == (1, 1 + 14 * 14, 192)


class Payload:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def training_state(path: Path) -> TrainingState:
    layer = torch.nn.Linear(2, 2)
    return TrainingState(path.parent, {}, layer, torch.optim.Adam(layer.parameters()), 1, Worker())


READERS = {
    "--backbone-weights": lambda path: load(VIT, str(path)),
    "--encoder-weights": lambda path: load_encoder(CNN, str(path)),
    "--detector-weights": lambda path: selfmask.load(VIT, str(path)),
    "--clip-weights": lambda path: Clip(IndexConfig(clip_model="namedmask-demo", clip_weights=str(path)), "cpu"),
    "--embeddings": lambda path: PrecomputedEmbeddings(str(path)),
    "a segmenter": lambda path: load_segmenter(path, ["a"], CNN),
    "a checkpoint": training_state,
}


@pytest.mark.parametrize("reader", READERS)
def test_no_file_is_executed(reader, tmp_path, state, network):
    path, executed = tmp_path / "checkpoint.pt", tmp_path / "executed"
    holder = {**state, **network.state_dict(), "network": state, "payload": Payload(executed)}
    torch.save(holder, path)
    zipped = path.read_bytes()
    torch.save(holder, path, _use_new_zipfile_serialization=False)
    legacy = path.read_bytes()
    for data in (zipped, legacy, pickle.dumps(Payload(executed)), b"", b"version https://git-lfs.github.com/spec/v1\n"):
        for file in (path, path.with_suffix(".safetensors") if reader != "a checkpoint" else path):
            file.write_bytes(data)
            with pytest.raises(UserError, match=r"checkpoint\.\w+:? cannot be read: ") as error:
                READERS[reader](file)
            assert "weights_only" not in str(error.value) and not executed.exists()


@pytest.mark.filterwarnings("ignore:.*deprecated.*")
@pytest.mark.parametrize("reader", [reader for reader in READERS if reader != "a checkpoint"])
def test_torchscript_is_named_with_the_way_out(reader, tmp_path):
    layer = torch.jit.script(torch.nn.Linear(2, 2))
    torch.jit.save(layer, tmp_path / "clip.pt")
    with pytest.raises(UserError, match=r"clip\.pt is a TorchScript program, .* torch.save\(torch.jit.load"):
        READERS[reader](tmp_path / "clip.pt")


def test_python_objects_are_told_from_damage(tmp_path, state):
    path = tmp_path / "a.pt"
    torch.save({"payload": Payload(tmp_path / "executed"), **state}, path)
    with pytest.raises(UserError, match=r"holds Python objects \(posix.mkdir\), which could execute code; save only"):
        weights.read(path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"a\.pt cannot be read: it is damaged, or a zip file that"):
        weights.read(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.safetensors", b"")
    with pytest.raises(UserError, match="a zip file that torch has not written"):
        weights.read(path)


def test_damaged_checkpoint_is_named(tmp_path):
    path = tmp_path / "checkpoint.pt"
    layer = torch.nn.Linear(3, 3).state_dict()
    for state in ({"about": {}}, {"about": {}, "network": layer}, {"about": {}, "network": 3}, {"network": layer}):
        torch.save({"step": 1, "sums": {"loss": torch.zeros(1)}} | state, path)
        with pytest.raises(UserError, match=r"checkpoint\.pt: .*the file is damaged: delete it and run"):
            training_state(path)


NOISY = """
import sys
from namedmask import process
process.prepare()
from namedmask import weights
for path in sys.argv[1:]:
    try:
        weights.read(path)
    except Exception as error:
        print(error)
"""


@pytest.mark.filterwarnings("ignore")
def test_torch_prints_nothing_in_a_command(tmp_path):
    """It warns of sparse and of quantized tensors, and of pickles that it has not written."""
    unusual = {"a": torch.eye(3).to_sparse(), "b": torch.quantize_per_tensor(torch.zeros(3), 1.0, 0, torch.qint8)}
    torch.save(unusual, tmp_path / "a.pt")
    (tmp_path / "b.pt").write_bytes(pickle.dumps({"payload": Payload(tmp_path / "executed")}, 4))
    files = [str(tmp_path / name) for name in ("a.pt", "b.pt")]
    got = subprocess.run([sys.executable, "-c", NOISY, *files], capture_output=True, text=True, check=True)
    assert got.stderr == "" and got.stdout.startswith(f"{files[1]} cannot be read: ")


def test_timm_and_open_clip_get_tensors_alone(monkeypatch, state, tmp_path):
    """Their own readers, some versions of which execute pickles, are never called."""
    import open_clip
    import timm

    def fail(*_, **__):
        pytest.fail("reads a file")

    for module in (timm.models._builder, timm.models._helpers, open_clip.factory):
        monkeypatch.setattr(module, "load_state_dict", fail)
    save_file(state, tmp_path / "vit.safetensors")
    load(VIT, str(tmp_path / "vit.safetensors"))
    load(VIT)
    load_encoder("resnet_namedmask_demo")
    Clip(IndexConfig(clip_model="namedmask-demo"), "cpu")


def test_selfmask_counts_are_compared_before_anything_is_built(network, tmp_path, monkeypatch):
    monkeypatch.setattr(selfmask, "SelfMask", lambda *_: pytest.fail("built"))
    state, path = network.state_dict(), tmp_path / "selfmask.pth"
    cases = {
        "missing decoder.layers.2": state | {"decoder.layers.100000.x": torch.zeros(1)},
        "missing decoder.layers.2.self_attn": state | {f"decoder.layers.{n}.x": torch.zeros(1) for n in range(2, 5000)},
        "query_embed is": state | {"query_embed": torch.zeros(100_000, 96)},
        "query_embed is .*of 96 channels": state | {"query_embed": torch.zeros(2, 64)},
        "not a SelfMask network": {f"decoder.layers.{'9' * 5000}.x": torch.zeros(1), "query_embed": torch.zeros(2, 96)},
    }
    for message, case in cases.items():
        torch.save(case, path)
        with pytest.raises(UserError, match=message) as error:
            selfmask.load(VIT, str(path), "--init-checkpoint")
        assert str(error.value).startswith(f"--init-checkpoint {path}") and len(str(error.value)) < 500


def test_segmenter_counts_are_compared_before_anything_is_built(tmp_path, monkeypatch):
    state, path = DeepLab(untrained_encoder(CNN), 3, 16).state_dict(), tmp_path / "model.safetensors"
    last = "classifier.classifier.3.weight"

    def given(changed: weights.State, **about) -> None:
        save_file(state | changed, path)
        about = {"categories": ["a", "b"], "encoder": CNN} | about
        (tmp_path / "categories.json").write_text(json.dumps(about))

    given({})
    assert load_segmenter(tmp_path)[1] == ["a", "b"]
    monkeypatch.setattr("namedmask.segmenter.deeplab.DeepLab", lambda *_: pytest.fail("built"))
    for message, changed, about in (
        (r"does not fit encoder .*classifier\.project", {last: torch.zeros(3, 1_000_000, 1, 1)}, {}),
        (r"does not fit encoder .*classifier\.classifier\.3\.weight", {last: torch.zeros(3, 1, 1, 1)}, {}),
        ("has 100000 classes, but 2 categories", {last: torch.zeros(100_000, 16, 1, 1)}, {}),
        ("not a DeepLabv3", {last: torch.zeros(3)}, {}),
        ("categories.json: .* the file is damaged", {}, {"categories": 3}),
        ("categories.json: .* the file is damaged", {}, {"encoder": None}),
        ("is no timm model", {}, {"encoder": "hf-hub:a/b"}),
    ):
        given(changed, **about)
        with pytest.raises(UserError, match=message):
            load_segmenter(tmp_path)


@pytest.mark.parametrize("reader", ["--detector-weights", "--clip-weights", "a segmenter", "--encoder-weights"])
def test_damaged_values_are_named_with_the_file(reader, network, tmp_path):
    networks = {
        "--detector-weights": lambda: network,
        "--clip-weights": lambda: Clip(IndexConfig(clip_model="namedmask-demo"), "cpu").model,
        "a segmenter": lambda: DeepLab(untrained_encoder(CNN), 2, 16),
        "--encoder-weights": lambda: untrained_encoder(CNN).network,
    }
    state = {name: tensor.clone() for name, tensor in networks[reader]().state_dict().items()}
    name = next(name for name, tensor in state.items() if tensor.ndim > 1)
    state[name].flatten()[-1] = torch.inf
    torch.save(state, tmp_path / "a.pth")
    with pytest.raises(UserError, match=rf"a\.pth is damaged: {name} has values that are NaN or infinite$"):
        READERS[reader](tmp_path / "a.pth")


def test_published_preprocessing_is_kept_for_a_local_file(monkeypatch, tmp_path):
    from open_clip import pretrained

    model = Clip(IndexConfig(clip_model="namedmask-demo"), "cpu").model
    file = str(tmp_path / "clip.pt")
    torch.save({"epoch": 1, "state_dict": prefixed("module.", model.state_dict())}, file)
    sig = {"url": "", "mean": (0.5,) * 3, "std": (0.25,) * 3, "interpolation": "bilinear", "resize_mode": "squash"}
    tags = {"sig": sig | {"quick_gelu": True}, "other": {"url": ""}}
    monkeypatch.setitem(pretrained._PRETRAINED, "namedmask-demo", tags)

    def clip(name: str) -> Clip:
        return Clip(IndexConfig(clip_model=name, clip_weights=file), "cpu")

    named = clip("namedmask-demo:sig")
    cfg = named.model.visual.preprocess_cfg
    assert all(tuple(cfg[key]) == sig[key] for key in ("mean", "std")) and cfg["resize_mode"] == "squash"
    assert cfg["interpolation"] == "bilinear"
    assert f"weights of {file}, preprocessing of sig (QuickGELU, bilinear, squash, mean [0.5, 0.5, 0.5]" in named.about
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in named.model.state_dict().items())
    with pytest.raises(UserError, match=r"differ in activation or preprocessing; .* namedmask-demo:sig, namedmask-d"):
        clip("namedmask-demo")
    del tags["other"]
    assert clip("namedmask-demo").model.visual.preprocess_cfg == cfg  # all published weights agree
    with pytest.raises(UserError, match="open_clip has no weights 'laion' of namedmask-demo, only sig"):
        clip("namedmask-demo:laion")


@pytest.mark.parametrize("quick_gelu", [True, False])
@pytest.mark.parametrize("way", ["tag", "tag and file", "file"])
def test_the_activation_of_the_published_weights_runs(monkeypatch, tmp_path, way, quick_gelu):
    from open_clip import pretrained

    model = Clip(IndexConfig(clip_model="namedmask-demo"), "cpu").model
    file = tmp_path / "clip.pt"
    torch.save(model.state_dict(), file)
    tags = {"openai": {"hf_hub": "some/where/clip.pt", "quick_gelu": quick_gelu}}
    monkeypatch.setitem(pretrained._PRETRAINED, "namedmask-demo", tags)
    monkeypatch.setattr("namedmask.hub.fetch", lambda published: file)
    name = "namedmask-demo" if way == "file" else "namedmask-demo:openai"
    clip = Clip(IndexConfig(clip_model=name, clip_weights=None if way == "tag" else str(file)), "cpu")
    seen = {}
    for part, module in clip.model.named_modules():
        if part.endswith("gelu"):
            module.register_forward_hook(lambda _, x, y, part=part: seen.update({part: (x[0], y)}))
    clip.texts(["cat"], ["a {}"])
    assert seen
    for x, y in seen.values():
        expected = x * torch.sigmoid(1.702 * x) if quick_gelu else torch.nn.functional.gelu(x)
        torch.testing.assert_close(y, expected)
    assert ("QuickGELU" in clip.protocol) == quick_gelu


def test_the_default_clip_has_the_activation_of_its_weights():
    import open_clip

    name, _, tag = IndexConfig().clip_model.partition(":")
    assert open_clip.get_pretrained_cfg(name, tag)["quick_gelu"] and open_clip.get_model_config(name)["quick_gelu"]


def test_paths_that_are_not_utf8_are_read(tmp_path):
    path = tmp_path / os.fsdecode(b"caf\xe9.safetensors")
    save_file({"a": torch.ones(2)}, tmp_path / "plain")
    (tmp_path / "plain").rename(path)
    assert weights.read(path).tree["a"].tolist() == [1, 1]


# -- parts, with networks of a few numbers ---------------------------------------------------------------------------


class Small(torch.nn.Module):
    """Two linear layers, a BatchNorm and a buffer that is computed."""

    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList([torch.nn.Linear(2, 3), torch.nn.Linear(3, 3)])
        self.norm = torch.nn.BatchNorm1d(3)
        self.register_buffer("table", torch.arange(4))


def small_state(value: float) -> weights.State:
    state = {name: torch.full_like(tensor, value) for name, tensor in Small().state_dict().items()}
    return {name: tensor for name, tensor in state.items() if tensor.is_floating_point()}


def load_small(tree: dict, **options) -> Small:
    network = Small()
    weights.load(network, weights.Weights(tree, "FILE"), "a network", **options)
    return network


def test_parameters_and_statistics_are_needed():
    names = weights.parameters_and_statistics(Small())
    layers = [f"layers.{n}.{kind}" for n in (0, 1) for kind in ("weight", "bias")]
    assert names == [*layers, "norm.weight", "norm.bias", "norm.running_mean", "norm.running_var"]
    state = small_state(2.0)
    assert (
        load_small(state).table.tolist() == [0, 1, 2, 3]
        and load_small(state | {"table": torch.ones(4).long()}).table[0] == 1
    )
    for name in names:
        with pytest.raises(UserError, match=rf"^FILE does not fit a network: it has 7 of 8 tensors; missing {name}$"):
            load_small({key: tensor for key, tensor in state.items() if key != name})
    network = load_small({"layers.1.bias": torch.full((3,), 2.0), "odd": torch.ones(1)}, needed=["layers.1.bias"])
    assert network.layers[1].bias.tolist() == [2] * 3


@pytest.mark.parametrize(
    ("tree", "value"),
    [
        ({"a": small_state(1.0), "teacher": small_state(2.0)}, 2.0),
        ({"teacher": small_state(2.0), "a": small_state(1.0)}, 2.0),
        ({"ema": {"norm.bias": torch.ones(3)}, "a": small_state(2.0)}, 2.0),  # more tensors that fit
        ({"a": small_state(1.0) | {"x": torch.ones(1)}, "teachers": small_state(2.0)}, 1.0),  # more tensors of equals
        (
            {"a": {name: torch.ones(7) for name in [*small_state(0), "x"]}, "b": small_state(2.0)},
            2.0,
        ),  # of other shapes
        ({"schema": small_state(1.0), "b_ema": small_state(2.0)}, 2.0),  # whole words alone
        ({name.replace(".", "_"): tensor for name, tensor in small_state(2.0).items()}, 2.0),
        (prefixed("module.", small_state(2.0)), 2.0),
        ({"w": {"x": {"y": {"z": small_state(2.0)}}}}, 2.0),
    ],
)
def test_best_part_of_a_checkpoint_is_loaded(tree, value):
    network = load_small(tree)
    assert all((tensor == value).all() for name, tensor in network.state_dict().items() if name in small_state(0))


def test_parts_that_are_nested_too_deeply_are_not_read():
    tree = {"v": {"w": {"x": {"y": {"z": small_state(2.0)}}}}}
    assert list(weights._states(tree)) == [] and list(weights._states([tree])) == []
    assert [label for label, _ in weights._states({"a": torch.ones(1), "b": tree["v"], 3: torch.ones(1)})] == [""]
    assert [label for label, _ in weights._states(tree["v"])] == [".w.x.y.z"]


def test_candidates_are_the_likeliest_parts_first():
    names = {"a_b", "c"}
    tree = {"s": {"m.a.b": 1, "m.c": 2, "n.c": 3}, "ema": {"k.a.b": 4, "k.c": 5}, "other": {"q": 6}}
    tree = {key: {name: torch.tensor(number) for name, number in part.items()} for key, part in tree.items()}
    found = [{name: int(t) for name, t in part.items()} for part in weights.candidates(tree, names)]
    assert found[:3] == [{"a.b": 4, "c": 5}, {"a.b": 1, "c": 2}, {"c": 3}] and {"q": 6} in found
    many = {str(n): {"c": torch.tensor(n)} for n in range(20)}
    assert len(weights.candidates(many, names)) == 16
    prefixes = {f"p{n}.{name}": torch.ones(1) for n in range(9) for name in "xyz"[: 1 + n % 3]}
    assert len(weights.candidates({"a": prefixes}, {"x", "y", "z"})) == 5  # one of them the whole
    assert list(weights._prefixes("a.b.c")) == ["", "a.", "a.b."]


def test_more_layers_are_told_from_other_names():
    own = {"a.0.w": torch.zeros(2), "a.1.w": torch.zeros(2)}
    weights.expect(own, own | {"head": torch.zeros(1)}, "FILE", "x")
    with pytest.raises(UserError, match=r"^FILE does not fit x: it has 2 of 2 tensors; unexpected a\.2\.w$"):
        weights.expect(own, own | {"a.2.w": torch.zeros(2), "head": torch.zeros(1)}, "FILE", "x")
    with pytest.raises(
        UserError, match=r"it has 0 of 2 tensors; missing a\.1\.w; a\.0\.w is int64 \[2\], expected float32 \[2\]$"
    ):
        weights.expect(own, {"a.0.w": torch.zeros(2).long()}, "FILE", "x")
    with pytest.raises(UserError, match=r"a\.0\.w is without values \(meta\) float32 \[2\], expected float32 \[2\]"):
        weights.expect(own, own | {"a.0.w": torch.zeros(2, device="meta")}, "FILE", "x")
    weights.expect(own, {"a.0.w": torch.zeros(2)}, "FILE", "x", ["a.0.w"])
    weights.expect(own, {}, "FILE", "x", [])


@pytest.mark.parametrize(
    ("name", "tensor", "is_used"),
    [
        ("blocks.0.ls1.gamma", torch.ones(1), True),  # LayerScale
        ("blocks.0.attn.qkv.weight_scale", torch.ones(1).half(), True),  # quantized
        ("blocks.0.attn.qkv.lora_A.weight", torch.ones(1), True),
        ("blocks.0.bn.num_batches_tracked", torch.tensor(1), False),
        ("blocks.head.weight", torch.ones(1), False),
        ("decoder.0.weight", torch.ones(1), False),  # of a pretraining task
        ("mask_token", torch.ones(1), False),
        ("blocks.0.attn.attn_mask", torch.ones(1), False),
        ("blocks.0.attn.qkv.total_ops", torch.ones(1).double(), False),  # of a profiler
    ],
)
def test_more_tensors_in_the_layers_of_a_network_do_not_fit(name, tensor, is_used):
    own = {"cls_token": torch.ones(1), "blocks.0.attn.qkv.weight": torch.ones(1)}
    if is_used:
        with pytest.raises(UserError, match=f"^FILE does not fit x: it has 2 of 2 tensors; unexpected {name}$"):
            weights.expect(own, own | {name: tensor}, "FILE", "x")
    else:
        weights.expect(own, own | {name: tensor}, "FILE", "x")


@pytest.mark.parametrize(
    ("tensor", "fits"),
    [
        (torch.zeros(2, 3), True),
        (torch.zeros(2, 3, dtype=torch.float16), True),
        (torch.zeros(3, 2), False),
        (torch.zeros(2, 3).long(), False),
        (torch.zeros(2, 3, device="meta"), False),
        (torch.zeros(2, 3).to_sparse(), False),
        (torch.quantize_per_tensor(torch.zeros(2, 3), 1.0, 0, torch.qint8), False),
    ],
    ids=str,
)
def test_only_plain_tensors_fit(tensor, fits):
    assert weights._fits(tensor, torch.ones(2, 3)) == fits
    assert weights._fits(torch.zeros(1).long(), torch.zeros(1).int())


def test_converters_of_other_codes():
    state = {"a": torch.ones(1)}
    seen = []

    def alone(given):
        seen.append(given)
        return {"b": given["a"]}

    def both(given, network):
        return {"c": given.pop("a"), "network": network}

    def fail(given, network):
        raise KeyError("a")

    assert list(weights._converted(state, "net", both)) == ["c", "network"] and list(state) == ["a"]
    assert list(weights._converted(state, None, alone)) == ["b"] and seen[0] is not state
    assert weights._converted(state, None, fail) is weights._converted(state, None, None) is state


@pytest.mark.parametrize(
    ("line", "shown"),
    [
        ("Weights only load failed", "it is damaged, or holds Python objects, not only tensors"),
        ("pass weights_only=False", "it is damaged, or holds Python objects, not only tensors"),
        ("odd file\nWeights only", "odd file"),
    ],
)
def test_advice_to_switch_the_protection_off_is_not_repeated(tmp_path, line, shown):
    assert weights._why_unreadable(tmp_path / "none", RuntimeError(line)) == shown


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_shared_memory_has_a_limit(tmp_path):
    base = torch.zeros(100_000)
    for count, fits in ((4, True), (5, False)):
        torch.save({f"tensor{n}": base for n in range(count)}, tmp_path / "a.pth")
        if fits:
            assert len(weights.read(tmp_path / "a.pth", "--x").tree) == count
            continue
        with pytest.raises(UserError, match=r"^--x .*a\.pth cannot be read: its tensors claim 2,000,000 bytes"):
            weights.read(tmp_path / "a.pth", "--x")


def test_replaced_function_is_restored_after_an_error():
    before = os.getcwd
    with pytest.raises(RuntimeError), weights.replaced(os, "getcwd", lambda: "there"):
        assert os.getcwd() == "there"  # noqa: PTH109
        raise RuntimeError
    assert os.getcwd is before


def test_models_that_timm_loads_in_another_way_are_an_error(monkeypatch):
    import timm

    monkeypatch.setattr(timm, "create_model", lambda *_, **__: Small())
    with pytest.raises(UserError, match=r"^encoder x: timm cannot load weights into it; choose another model$"):
        weights.timm_model("x", "encoder x", lambda _: None)
