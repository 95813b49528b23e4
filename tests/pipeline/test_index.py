# SPDX-License-Identifier: MIT
"""The index with the demo's CLIP on rendered photos: rows, texts, errors, and resuming."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file
from safetensors.torch import save_file

from namedmask.archive import prompts, read_archive
from namedmask.config import IndexConfig
from namedmask.demo.run import render
from namedmask.distributed import Worker
from namedmask.errors import DamagedFile, UserError
from namedmask.index import (
    TEXT_BATCH,
    Clip,
    KnownEmbeddings,
    PrecomputedEmbeddings,
    _normalized,
    build_index,
    expect_protocol,
    is_direction,
    list_photos,
    middle,
    missing_shards,
    read_photos,
    read_shard,
    shard_path,
)
from namedmask.masks import read_errors
from namedmask.photos import PhotoError, PhotoSource
from namedmask.run import start

PHOTOS, BROKEN = 40, "00020-broken.png"
CATEGORIES = ["fish", "umbrella"]


def run(folder, out, *stages):
    given = {
        "photos": str(folder),
        "categories": CATEGORIES,
        "index": {"clip_model": "namedmask-demo", "shard_size": 16},
        "archive": {"photos_per_category": 5},
    }
    assert start(out, given, stages, 1, 0, False)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Folder of photos, one of them damaged, and run folder with index and archive."""
    root = tmp_path_factory.mktemp("index")
    render(root / "photos", 31, PHOTOS, False)
    (root / "photos" / BROKEN).write_text("no photo")
    run(root / "photos", root / "out", "index", "archive")
    return root / "photos", root / "out"


@pytest.fixture(scope="module")
def clip():
    return Clip(IndexConfig(clip_model="namedmask-demo"), "cpu")


def shards(out):
    return sorted((out / "index").glob("*.safetensors"))


def rows(out):
    """(image [n, d], photo [n]) of the whole index."""
    loaded = [load_file(path) for path in shards(out)]
    return np.concatenate([s["image"] for s in loaded]), np.concatenate([s["photo"] for s in loaded])


def test_rows_are_normalized_and_in_the_order_of_photos_jsonl(world):
    folder, out = world
    names = list(read_photos(out / "index"))
    assert names == sorted(path.name for path in folder.iterdir()) and len(names) == PHOTOS + 1
    image, photo = rows(out)
    assert len(shards(out)) == 3 and image.dtype == np.float16 and image.shape == (PHOTOS, 64)
    assert [names[number] for number in photo] == [name for name in names if name != BROKEN]
    np.testing.assert_allclose(np.linalg.norm(image.astype(np.float64), axis=1), 1, atol=2e-3)


def preprocessing(**cfg):
    """open_clip's own preprocessing of a PIL image."""
    from open_clip.transform import PreprocessCfg, image_transform_v2

    return image_transform_v2(PreprocessCfg(**cfg), is_train=False)


def test_rows_equal_open_clip(world, clip):
    folder, out = world
    image, photo = rows(out)
    names = list(read_photos(out / "index"))
    preprocess = preprocessing(**clip.model.visual.preprocess_cfg)
    for row in (0, 17, PHOTOS - 1):
        with torch.inference_mode(), Image.open(folder / names[photo[row]]) as picture:
            expected = clip.model.encode_image(preprocess(picture)[None], normalize=True)[0]
        np.testing.assert_allclose(image[row].astype(np.float32), expected.numpy(), atol=5e-3)


@pytest.mark.parametrize("size", [64, (48, 64), (64, 40)], ids=str)
@pytest.mark.parametrize("mode", ["shortest", "longest", "squash"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_prepared_photos_are_those_of_open_clip(clip, monkeypatch, size, mode, interpolation):
    cfg = {**clip.model.visual.preprocess_cfg, "size": size, "resize_mode": mode, "interpolation": interpolation}
    cfg["fill_color"] = 30
    monkeypatch.setattr(clip.model.visual, "preprocess_cfg", cfg)
    preprocess = preprocessing(**cfg)
    shapes = [(64, 64), (97, 70), (40, 33), (66, 201), (300, 64), (65, 64)]
    coarse = [np.random.default_rng(0).integers(0, 256, (h // 8, w // 8, 3), np.uint8) for h, w in shapes]
    photos = [np.array(Image.fromarray(c).resize(s[::-1])) for c, s in zip(coarse, shapes, strict=True)]
    result = clip.prepare(photos)
    level = 1 / 255 / torch.tensor(cfg["std"])[:, None, None]
    for prepared, photo in zip(result, photos, strict=True):
        expected = preprocess(Image.fromarray(photo))
        assert prepared.shape == expected.shape
        difference = (prepared - expected).abs() / level  # from Pillow, torchvision on tensors differs as much
        assert difference.max() <= 3.01 and (difference > 1.01).float().mean() < 0.01


def test_bfloat16_embeddings_are_those_of_float32(world, clip):
    folder, out = world
    image, photo = rows(out)
    names = list(read_photos(out / "index"))
    half = Clip(IndexConfig(clip_model="namedmask-demo"), "cpu")
    half.use(torch.bfloat16)
    found = dict(half.images(PhotoSource(folder), [[names[number] for number in photo]]))
    embeddings = np.stack(list(found.values()))
    assert embeddings.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(embeddings, axis=1), 1, atol=1e-6)
    assert np.abs(embeddings - image.astype(np.float32)).max() < 1e-2
    np.testing.assert_allclose(half.texts(CATEGORIES, prompts()), clip.texts(CATEGORIES, prompts()), atol=1e-6)


def test_batches_are_bounded_by_photos_and_bytes(world, clip, monkeypatch):
    folder, out = world
    names = list(read_photos(out / "index"))[:24]
    sizes = []
    prepare = clip.prepare
    monkeypatch.setattr(clip, "prepare", lambda photos: sizes.append([p.nbytes for p in photos]) or prepare(photos))
    expected = dict(clip.images(PhotoSource(folder), [names]))
    assert [len(batch) for batch in sorted(sizes, key=len)] == [7, 16]
    sizes.clear()
    clip_of_shards = dict(clip.images(PhotoSource(folder), [names[:10], names[10:20], names[20:]]))
    assert [len(batch) for batch in sorted(sizes, key=len)] == [3, 10, 10]
    np.testing.assert_allclose(clip_of_shards[names[-1]], expected[names[-1]], atol=1e-5)
    sizes.clear()
    monkeypatch.setattr("namedmask.index.BATCH_BYTES", 150_000)
    result = dict(clip.images(PhotoSource(folder), [names]))
    assert len(sizes) > 2 and all(sum(batch) <= 150_000 or len(batch) == 1 for batch in sizes)
    for name in names:
        if name != BROKEN:
            np.testing.assert_allclose(result[name], expected[name], atol=1e-5)


def test_texts_do_not_depend_on_their_batches(clip, monkeypatch):
    names, templates = ["cat", "dog", "bird", "fish", "tree"], prompts()[:7]
    expected = clip.texts(names, templates)
    monkeypatch.setitem(TEXT_BATCH, "cpu", 14)
    calls = []
    encode = clip.model.encode_text
    monkeypatch.setattr(clip.model, "encode_text", lambda t, **k: calls.append(len(t)) or encode(t, **k))
    np.testing.assert_allclose(clip.texts(names, templates), expected, atol=1e-6)
    assert calls == [14, 14, 7]


def test_damaged_photo_is_in_the_errors(world):
    errors = [e for path in sorted((world[1] / "index").glob("*.errors.jsonl")) for e in read_errors(path)]
    assert [(e.photo, e.stage) for e in errors] == [(BROKEN, "index")] and "not an image" in errors[0].reason


def test_text_embedding_is_the_mean_of_85_prompts(clip):
    templates = prompts()
    assert len(templates) == 85
    texts = clip.texts(CATEGORIES, templates)
    assert texts.dtype == np.float32 and texts.shape == (2, 64)
    for name, text in zip(CATEGORIES, texts, strict=True):
        with torch.inference_mode():
            each = [clip.model.encode_text(clip.tokenizer([t.format(name)]))[0].double().numpy() for t in templates]
        mean = np.mean([e / np.linalg.norm(e) for e in each], axis=0)
        np.testing.assert_allclose(text, mean / np.linalg.norm(mean), atol=1e-5)


def test_archive_scores_are_cosines(world, clip):
    image, photo = rows(world[1])
    names = list(read_photos(world[1] / "index"))
    scores = image.astype(np.float64) @ clip.texts(CATEGORIES, prompts()).astype(np.float64).T
    archive = read_archive(world[1] / "archive.json")
    for k, category in enumerate(CATEGORIES):
        best = np.argsort(-scores[:, k], kind="stable")[:5]
        assert [entry.photo for entry in archive.photos[category]] == [names[photo[row]] for row in best]
        np.testing.assert_allclose([e.score for e in archive.photos[category]], scores[best, k], atol=2e-6)


def test_index_with_another_activation_is_rejected(world, tmp_path, clip, monkeypatch):
    folder, out = world
    copy = tmp_path / "run"
    shutil.copytree(out, copy)
    monkeypatch.setattr("namedmask.index._activation", lambda model: "QuickGELU")
    message = r"00000.safetensors was computed with GELU, .*, but the model has QuickGELU, .*--overwrite"
    (copy / "archive.json").unlink()
    with pytest.raises(UserError, match=message):
        run(folder, copy, "archive")
    shards(copy)[1].unlink()
    with pytest.raises(UserError, match=message):
        run(folder, copy, "index")


def test_only_a_missing_shard_is_computed_again(world):
    folder, out = world
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in shards(out)}
    lost = shards(out)[1]
    lost.unlink()
    run(folder, out, "index")
    for path, (data, time) in before.items():
        assert path.read_bytes() == data and (path == lost or path.stat().st_mtime_ns == time)


def test_index_does_not_depend_on_the_number_of_threads(world, clip, monkeypatch, tmp_path):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    run(world[0], tmp_path, "index")
    assert [path.read_bytes() for path in shards(tmp_path)] == [path.read_bytes() for path in shards(world[1])]
    assert json.loads((tmp_path / "index" / "photos.jsonl").read_text().splitlines()[0]) == {"photo": "00000.png"}


def test_clip_without_weights_raises_before_it_is_built(monkeypatch):
    import open_clip

    monkeypatch.setattr(open_clip, "create_model_and_transforms", lambda *a, **k: pytest.fail("built"))
    with pytest.raises(UserError, match="ViT-B-32 names no weights; pass MODEL:PRETRAINED or --clip-weights"):
        Clip(IndexConfig(clip_model="ViT-B-32"), "cpu")
    with pytest.raises(UserError, match="open_clip has no 'ViT-B-33'"):
        Clip(IndexConfig(clip_model="ViT-B-33:openai"), "cpu")


def test_long_photos_are_cropped_before_they_are_resized():
    line = np.arange(1000 * 3, dtype=np.uint16).reshape(1, 1000, 3)
    np.testing.assert_array_equal(middle(line), line[:, 492:508])
    np.testing.assert_array_equal(middle(line.transpose(1, 0, 2)), line.transpose(1, 0, 2)[492:508])
    photo = np.zeros((10, 160, 3), np.uint8)
    assert middle(photo).shape == photo.shape


def test_progress_counts_every_photo_once(world, tmp_path):
    folder, out = world
    config = IndexConfig(clip_model="namedmask-demo", shard_size=16)
    advanced = []
    build_index(
        PhotoSource(folder), out / "index", config, Worker(), "cpu", lambda n, existing: advanced.append((n, existing))
    )
    assert advanced == [(16, True), (16, True), (PHOTOS + 1 - 32, True)]


@pytest.mark.parametrize("step", [2, 12])
def test_new_photos_are_added_to_known_embeddings(world, tmp_path, monkeypatch, step):
    """New rows may differ in the last bit, since a network as small as this one rounds by the size of the batch."""
    folder, out = world
    config, names = IndexConfig(clip_model="namedmask-demo", shard_size=16), list(read_photos(out / "index"))
    list_of(tmp_path / "before", [name for number, name in enumerate(names) if number % step])
    advanced: list[tuple[int, bool]] = []
    build = lambda index, *known: build_index(  # noqa: E731
        PhotoSource(folder), index, config, Worker(), "cpu", lambda n, existing: advanced.append((n, existing)), *known
    )
    build(tmp_path / "before")
    known = KnownEmbeddings([tmp_path / "none", tmp_path / "before"], config)
    list_of(tmp_path / "index", names)
    advanced.clear()
    build(tmp_path / "index", known)
    image, photo = rows(tmp_path)
    expected, numbers = rows(out)
    np.testing.assert_array_equal(photo, numbers)
    np.testing.assert_allclose(image.astype(np.float32), expected.astype(np.float32), atol=2e-4)
    for row, number in zip(image, photo, strict=True):
        assert names[number] not in known or (row == known[names[number]]).all()
    new = [name for name in names if name not in known]
    assert sum(n for n, existing in advanced if not existing) == len(new) and len(known.places) > PHOTOS // 3
    monkeypatch.setattr("namedmask.index.make_embedder", lambda *_: pytest.fail("needed"))
    list_of(tmp_path / "fewer" / "index", [name for name in names if name in known])
    assert build(tmp_path / "fewer" / "index", known) is None  # nothing is new
    kept, _ = rows(tmp_path / "fewer")
    np.testing.assert_array_equal(kept, image[[name in known for name in names if name != BROKEN]])


class Rows:
    """An embedder whose rows are numbered; photos named "bad" have none."""

    about, protocol = "rows", ""

    def images(self, source, shards):
        for name in itertools.chain.from_iterable(shards):
            yield name, PhotoError(name, "no photo") if name == "bad" else np.full(4, float(name[1:]), np.float32)

    def texts(self, names, prompts):
        return np.zeros((len(names), 4), np.float32)


def list_of(folder: Path, names: list[str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "photos.jsonl").write_text("".join(json.dumps({"photo": name}) + "\n" for name in names))


@pytest.mark.parametrize("done", [[], [0], [1], [0, 2], [0, 1, 2]])
def test_missing_shards_are_computed_with_their_own_photos(tmp_path, monkeypatch, done):
    """Five photos in shards of two: the last one is short."""
    monkeypatch.setattr("namedmask.index.make_embedder", lambda *_: Rows())
    folder, config, advanced = tmp_path / "index", IndexConfig(shard_size=2), []
    list_of(folder, ["p0", "p1", "bad", "p3", "p4"])
    assert missing_shards(folder, config) == [0, 1, 2]
    build = lambda worker: build_index(  # noqa: E731
        None, folder, config, worker, "cpu", lambda n, existing: advanced.append((n, existing))
    )
    build(Worker())
    assert advanced == [(2, False), (2, False), (1, False)]
    expected = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert [list(read_shard(shard_path(folder, n))[1]) for n in range(3)] == [[0, 1], [3], [4]]
    assert [list(read_shard(shard_path(folder, n))[0][:, 0]) for n in range(3)] == [[0, 1], [3], [4]]
    for shard in {0, 1, 2} - set(done):
        shard_path(folder, shard).unlink()
    assert missing_shards(folder, config) == sorted({0, 1, 2} - set(done))
    advanced.clear()
    assert (build(Worker()) is None) == (len(done) == 3)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == expected
    assert [existing for _, existing in advanced] == [n in done for n in range(3)]


def test_list_that_is_shorter_than_the_index_is_damaged(tmp_path, monkeypatch):
    monkeypatch.setattr("namedmask.index.make_embedder", lambda *_: Rows())
    folder, config = tmp_path / "index", IndexConfig(shard_size=2)
    list_of(folder, ["p0", "p1", "p2", "p3"])
    build_index(None, folder, config, Worker(), "cpu", lambda n, existing: None)
    assert missing_shards(folder, config) == []
    for names in (["p0", "p1", "p2"], ["p0", "p1"], ["p0"]):
        list_of(folder, names)
        with pytest.raises(
            DamagedFile, match=r"photos.jsonl: it has fewer lines than the index has photos; .*namedmask index"
        ):
            missing_shards(folder, config)
    list_of(folder, ["p0", "p1", "bad", "bad", "p4"])
    shard_path(folder, 1).unlink()
    assert missing_shards(folder, config) == [1, 2]
    for content, reason in ((None, "it is missing"), ("", "it is empty")):
        (folder / "photos.jsonl").unlink(missing_ok=True)
        if content is not None:
            (folder / "photos.jsonl").write_text(content)
        with pytest.raises(DamagedFile, match=reason):
            read_photos(folder)


def test_shard_without_a_photo_is_empty(tmp_path, monkeypatch):
    monkeypatch.setattr("namedmask.index.make_embedder", lambda *_: Rows())
    list_of(tmp_path / "index", ["bad"])
    build_index(None, tmp_path / "index", IndexConfig(), Worker(), "cpu", lambda n, existing: None)
    image, photo = read_shard(shard_path(tmp_path / "index", 0))
    assert image.shape == (0, 0) and photo.shape == (0,)
    assert missing_shards(tmp_path / "index", IndexConfig()) == []


@pytest.mark.parametrize(
    "change",
    [
        {"image": torch.ones(2, 3)},
        {"photo": torch.ones(2)},
        {"image": torch.ones(2, dtype=torch.float16)},
        {"photo": torch.ones(3, dtype=torch.int64)},
        {"image": torch.tensor([[1, 2], [3, torch.nan]], dtype=torch.float16)},
        {"image": None},
    ],
    ids=str,
)
def test_shards_with_something_else_are_damaged(tmp_path, change):
    good = {"image": torch.ones(2, 2, dtype=torch.float16), "photo": torch.arange(2)}
    save_file(good, tmp_path / "0")
    assert read_shard(tmp_path / "0")[1].tolist() == [0, 1]
    save_file({name: tensor for name, tensor in (good | change).items() if tensor is not None}, tmp_path / "0")
    with pytest.raises(DamagedFile, match=r"expected finite image float16|KeyError"):
        read_shard(tmp_path / "0")


def test_photos_are_listed_with_errors(tmp_path):
    source = PhotoSource(tmp_path)
    with pytest.raises(UserError, match="there are no photos in "):
        list_photos(source, tmp_path)
    assert not (tmp_path / "photos.jsonl").exists()
    for name in ("a.jpg", "b.jxl"):
        (tmp_path / name).touch()
    list_photos(source, tmp_path)
    assert list(read_photos(tmp_path)) == ["a.jpg"]
    assert [(e.photo, e.stage) for e in read_errors(tmp_path / "photos.errors.jsonl")] == [("b.jxl", "list")]


@pytest.mark.parametrize(
    ("recorded", "own", "fits"), [("", "", True), ("a", "a", True), ("", "a", False), ("a", "", False)]
)
def test_protocol_of_an_index_is_that_of_its_embedder(tmp_path, recorded, own, fits):
    tensors = {"image": torch.ones(1, 2, dtype=torch.float16), "photo": torch.zeros(1).long()}
    save_file(tensors, tmp_path / "00000.safetensors", {"protocol": recorded} if recorded else None)
    embedder = Rows()
    embedder.protocol = own
    if fits:
        expect_protocol(tmp_path, embedder)
    else:
        given, has = recorded or "an unknown activation and preprocessing", own or "none"
        with pytest.raises(UserError, match=f"was computed with {given}, but the model has {has}: "):
            expect_protocol(tmp_path, embedder)
    (tmp_path / "00000.safetensors").write_bytes(b"cut")
    with pytest.raises(DamagedFile):
        expect_protocol(tmp_path, embedder)


def test_unknown_photos_and_names_of_embeddings_are_named(tmp_path):
    embeddings = write_embeddings(tmp_path / "e.safetensors", torch.randn(2, 8), torch.randn(2, 8))
    assert (embeddings.protocol, embeddings.about) == ("", f"embeddings of {tmp_path / 'e.safetensors'}")
    (name, error), (_, row) = embeddings.images(None, [["x.jpg", "0.jpg"]])
    assert (name, error.reason) == ("x.jpg", "e.safetensors has no embedding of this photo") and row.shape == (8,)
    with pytest.raises(UserError, match=r"e.safetensors has no text embedding of fish$"):
        embeddings.texts(["cat", "fish"], [])
    for text, message in (
        ("3", "e.safetensors: "),
        ("{", "e.safetensors: "),
        ("{}", "'image_files' is missing in it or in e.json"),
    ):
        (tmp_path / "e.json").write_text(text)
        with pytest.raises(UserError, match=f"--embeddings .*{message}"):
            PrecomputedEmbeddings(str(tmp_path / "e.safetensors"))


def test_rows_with_a_direction():
    for row, usable in (
        ([0, 1e-30], True),
        ([0, 0], False),
        ([1, np.nan], False),
        ([np.inf, 1], False),
        ([-1, 0], True),
    ):
        assert is_direction(np.array(row)) == usable
    for scale in (1e-20, 1, 1e30):
        np.testing.assert_allclose(_normalized(torch.tensor([3.0, 4.0]) * scale), [0.6, 0.8], rtol=1e-6)
    assert not _normalized(torch.zeros(2)).any()


@pytest.mark.parametrize(
    ("shape", "rows", "columns"),
    [
        ((10, 161), (0, 10), (0, 160)),
        ((10, 163), (0, 10), (1, 161)),
        ((162, 10), (1, 161), (0, 10)),
        ((5, 5), (0, 5), (0, 5)),
    ],
)
def test_middle_of_a_long_photo(shape, rows, columns):
    photo = np.arange(np.prod(shape) * 3).reshape(*shape, 3)
    np.testing.assert_array_equal(middle(photo), photo[slice(*rows), slice(*columns)])


@pytest.mark.parametrize(
    ("image", "text", "files", "names", "message"),
    [
        ((8,), (2, 4), 8, 2, r"expected image \[n, d\] and text \[k, d\], got \[8\] and \[2, 4\]"),
        ((2, 2, 4), (2, 4), 2, 2, "expected image"),
        ((3, 4), (4,), 3, 4, "expected image"),
        ((3, 4), (2, 5), 3, 2, "expected image"),
        ((3, 4), (2, 4), 2, 2, "image has 3 rows and text 2, but .* lists 2 in image_files and 2 in names"),
        ((3, 4), (2, 4), 3, 3, "lists 3 in image_files and 3 in names"),
    ],
)
def test_embeddings_must_fit_their_lists(tmp_path, image, text, files, names, message):
    path = tmp_path / "e.safetensors"
    save_file({"image": torch.ones(image), "text": torch.ones(text)}, path)
    lists = {"image_files": [f"{n}.jpg" for n in range(files)], "names": [f"name {n}" for n in range(names)]}
    path.with_suffix(".json").write_text(json.dumps(lists))
    with pytest.raises(UserError, match=message):
        PrecomputedEmbeddings(str(path))


@pytest.mark.parametrize("one", [None, 2, "ab", {"a": 0, "b": 1}, [1, 2], [None, "a"], [["a"], ["b"]]], ids=str)
@pytest.mark.parametrize("key", ["image_files", "names"])
def test_lists_of_embeddings_hold_names(tmp_path, key, one):
    path = tmp_path / "e.safetensors"
    write_embeddings(path, torch.ones(2, 8), torch.ones(2, 8))
    lists = json.loads(path.with_suffix(".json").read_text())
    path.with_suffix(".json").write_text(json.dumps(lists | {key: one}))
    with pytest.raises(UserError, match=r"expected lists of names as image_files and names in e\.json"):
        PrecomputedEmbeddings(str(path))


def test_embeddings_are_tensors_and_their_lists_json(tmp_path):
    path = tmp_path / "e.pt"
    write_embeddings(path, torch.ones(2, 8), torch.ones(2, 8))
    for wrong in ({"a": torch.ones(2, 8)}, 2, [torch.ones(8)] * 2):
        for key in ("image", "text"):
            torch.save({"image": torch.ones(2, 8), "text": torch.ones(2, 8), key: wrong}, path)
            with pytest.raises(UserError, match="expected image and text to be tensors"):
                PrecomputedEmbeddings(str(path))
    for text in ("null", "[" * 100_000):
        path.with_suffix(".json").write_text(text)
        with pytest.raises(UserError, match=f"--embeddings {path}: "):
            PrecomputedEmbeddings(str(path))


def write_embeddings(path: Path, image: torch.Tensor, text: torch.Tensor) -> PrecomputedEmbeddings:
    save_file({"image": image, "text": text}, path)
    files = [f"{number}.jpg" for number in range(len(image))]
    path.with_suffix(".json").write_text(json.dumps({"image_files": files, "names": ["cat", "dog"][: len(text)]}))
    return PrecomputedEmbeddings(str(path))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_embeddings_of_any_floating_point_format(dtype, tmp_path):
    image, text = torch.randn(3, 8).to(dtype), torch.randn(2, 8).to(dtype)
    embeddings = write_embeddings(tmp_path / "e.safetensors", image, text)
    rows = [row for _, row in embeddings.images(None, [["2.jpg", "0.jpg"]])]
    expected = torch.nn.functional.normalize(image[[2, 0]].float(), dim=1)
    np.testing.assert_allclose(np.stack(rows), expected, atol=1e-6)
    expected = torch.nn.functional.normalize(text.float(), dim=1)
    np.testing.assert_allclose(embeddings.texts(["cat", "dog"], []), expected, atol=1e-6)


@pytest.mark.parametrize("scale", [1e-40, 1e-30, 1e30, 1e38])
def test_embeddings_of_any_length_are_normalized(scale, tmp_path):
    """Also where the squares of float32 would underflow or overflow."""
    image, text = torch.randint(1, 4, (3, 8)).float(), torch.randint(1, 4, (2, 8)).float()
    embeddings = write_embeddings(tmp_path / "e.safetensors", image * (scale / 4), text * (scale / 4))
    rows = [row for _, row in embeddings.images(None, [["0.jpg", "1.jpg", "2.jpg"]])]
    np.testing.assert_allclose(np.stack(rows), torch.nn.functional.normalize(image, dim=1), rtol=1e-4)
    expected = torch.nn.functional.normalize(text, dim=1)
    np.testing.assert_allclose(embeddings.texts(["cat", "dog"], []), expected, rtol=1e-4)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 0.0])
def test_embeddings_without_a_direction_are_named(value, tmp_path):
    image, text = torch.randn(3, 8), torch.randn(2, 8)
    image[1], text[1] = value, value
    embeddings = write_embeddings(tmp_path / "e.safetensors", image, text)
    results = dict(embeddings.images(None, [["0.jpg", "1.jpg", "2.jpg"]]))
    assert results["1.jpg"].reason == "its embedding in e.safetensors is NaN, infinite or zero"
    assert all(isinstance(results[name], np.ndarray) for name in ("0.jpg", "2.jpg"))
    assert embeddings.texts(["cat"], []).shape == (1, 8)
    with pytest.raises(UserError, match=r"e\.safetensors: the text embedding of dog is NaN, infinite or zero"):
        embeddings.texts(["cat", "dog"], [])
