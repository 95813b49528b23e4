# SPDX-License-Identifier: MIT
"""Selection among candidate masks, by masks alone and by the name of the category."""

import json

import numpy as np
import pytest
import torch
from detections import packed
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from namedmask.archive import Archive, Retrieved
from namedmask.backbones import untrained_encoder
from namedmask.config import make_config
from namedmask.demo.models import CLIP_NAME, VIT_NAME
from namedmask.demo.scenes import KINDS, index_photo
from namedmask.distributed import Worker
from namedmask.errors import UserError
from namedmask.experts import relabel
from namedmask.masks import MaskRecord, mask_score, read_masks
from namedmask.names import NameScorer, _crop, expect_clip
from namedmask.photos import Photo, PhotoSource
from namedmask.pseudolabel import Labeler, known_labels, pseudolabel, units_of
from namedmask.saliency import make_detector
from namedmask.saliency.candidates import (
    COUNTS,
    Choice,
    Prior,
    chosen,
    clearness,
    groups,
    prior,
    quality,
    shortlist,
    support,
)
from namedmask.segmenter.deeplab import DeepLab
from namedmask.segmenter.predict import Segmenter
from namedmask_kernels import Ragged
from small_world import ENCODER

pytestmark = pytest.mark.usefixtures("one_thread_in_module")
SEED = 8
SPECTRAL = {"backbone": VIT_NAME, "features": "tokens", "center_features": True, "tau": 0.0, "image_size": 128}
SELFMASK = {"name": "selfmask", "backbone": VIT_NAME, "image_size": 96}
NUMBERS = {"spectral": 2 + sum(COUNTS), "cluster-vote": 2 * sum(COUNTS), "selfmask": 1 + 2 + 2 + sum(COUNTS)}


def iou(a, b):
    return (a & b).sum() / max(1, (a | b).sum())


@pytest.fixture(scope="module")
def scenes():
    return [scene for number in range(8) if (scene := index_photo(SEED, number)).kinds][:6]


@pytest.fixture(scope="module")
def scorer():
    return NameScorer(make_config({"photos": "", "index": {"clip_model": CLIP_NAME}}).index, KINDS, "cpu")


@given(st.lists(st.tuples(st.integers(1, 7), st.integers(1, 7)), max_size=4), st.integers(1, 5), st.integers(0, 99))
def test_prior_equals_its_definition(sizes, count, seed):
    rng = np.random.default_rng(seed)
    grids = [torch.from_numpy(rng.random((h, w, count), np.float32) * (rng.random(count) < 0.8)) for h, w in sizes]
    batch = Ragged.pack(grids) if grids else Ragged.of_shapes(torch.zeros(0, count), [])
    found = prior(batch)
    assert found.agreement.shape == found.border.shape == (len(sizes), count)
    for photo, grid in enumerate(grids):
        masks = (grid > 0.5).numpy()
        rim = np.ones(masks.shape[:2], bool)
        rim[1:-1, 1:-1] = False
        for k in range(count):
            others = [iou(masks[..., k], masks[..., j]) for j in range(count) if j != k]
            assert found.agreement[photo, k].item() == pytest.approx(np.mean(others) if others else 0.0, abs=1e-6)
            assert found.border[photo, k].item() == pytest.approx(masks[rim, k].mean(), abs=1e-6)


def test_groups_are_both_sides_of_the_cut_and_all_clusters():
    features = Ragged.pack([torch.randn(5, 6, 8), torch.randn(3, 9, 8)])
    rows = groups(features, tau=0.0).rows
    assert rows.shape == (len(features.rows), 2 + sum(COUNTS)) and rows.dtype == torch.bool
    assert torch.equal(rows[:, 0], ~rows[:, 1])
    for part in rows[:, 2:].split(COUNTS, dim=1):
        assert (part.sum(1) == 1).all()


@pytest.mark.parametrize("settings", [SPECTRAL, SPECTRAL | {"name": "cluster-vote"}, SELFMASK], ids=list(NUMBERS))
def test_candidates_cover_the_photo_and_hold_the_object(settings, scenes):
    """For padded photos as well. One is the object in most photos; the first ones are not."""
    if settings.get("name") == "cluster-vote":
        settings = settings | {"more_backbones": [VIT_NAME]}
    detector = make_detector(make_config({"photos": "", "detector": settings | {"patch_fit": "pad"}}).detector, "cpu")
    photos = [Photo("", scene.image[: 100 + 3 * number, :90]) for number, scene in enumerate(scenes)]
    images = packed(*photos)
    found = detector.candidates(images)
    assert found.rows.shape[1] == NUMBERS[settings.get("name", "spectral")] and found.rows.dtype == torch.float32
    per_patch = 2 if settings.get("name") == "selfmask" else 1
    sides = torch.tensor([detector.fit(photo.size).size for photo in photos]) * per_patch / detector.backbone.patch
    assert ((found.shapes - sides).abs() <= 0.5).all()
    alone = torch.cat([detector.candidates(packed(photo)).rows for photo in photos])
    assert torch.equal(alone, found.rows)
    best = []
    for scene, photo, grid in zip(scenes, photos, found.grids(), strict=True):
        truth = scene.masks[0][: photo.size[0], : photo.size[1]]
        small = np.asarray(Image.fromarray(truth).resize(grid.shape[1::-1], Image.Resampling.NEAREST))
        best.append(max(iou((grid[..., k] > 0.5).numpy(), small) for k in range(grid.shape[2])))
    assert np.median(best) > 0.5


def test_the_prior_prefers_the_object_to_its_background():
    """The background is the larger and agrees with more, but covers the border."""
    inside = torch.zeros(8, 8)
    inside[2:6, 2:7] = 1
    part = inside.clone()
    part[2] = 0
    batch = Ragged.pack([torch.stack([1 - inside, inside, part, 1 - part], -1)])
    found = prior(batch)
    choice = chosen(batch, found, [(16, 24)], None)
    assert found.score.argmax(1).item() == 1 and choice.masks.shapes.tolist() == [[16, 24]]
    assert iou(choice.masks.grids()[0] > 0.5, inside.repeat_interleave(2, 0).repeat_interleave(3, 1) > 0.5) > 0.8
    order = shortlist(found)[0]
    assert torch.equal(choice.witnesses.rows, batch.rows[:, order])
    assert choice.weights.tolist() == [[0.0 if k in (0, 3) else 1.0 for k in order]]  # backgrounds do not count


def test_a_name_decides_among_the_shortlist_only():
    batch = Ragged.pack([torch.eye(8).view(2, 4, 8)])  # candidate k is pixel k
    found = Prior(torch.linspace(0.5, 0.4, 8)[None], torch.full((1, 8), 0.25))
    numbers = shortlist(found)
    assert numbers.tolist() == [[0, 1, 2, 3, 4, 5]]
    names = torch.zeros(1, 6)
    names[0, 4] = 1.0
    choice = chosen(batch, found, [(2, 4)], (numbers, names))
    assert choice.masks.rows.tolist() == [0, 0, 0, 0, 1, 0, 0, 0]
    assert torch.equal(choice.witnesses.rows, batch.rows[:, :6])
    assert choice.weights.tolist() == [[0.5, 0.5, 0.5, 0.5, 1.0, 0.5]]


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), max_size=3), st.integers(1, 4), st.integers(0, 99))
def test_support_is_the_mean_iou_with_the_witnesses(sizes, count, seed):
    rng = np.random.default_rng(seed)
    grids = [torch.from_numpy(rng.random((h, w, count), np.float32)) for h, w in sizes]
    batch = Ragged.pack(grids) if grids else Ragged.of_shapes(torch.zeros(0, count), [])
    weights = torch.from_numpy(rng.random((len(sizes), count), np.float32) * (rng.random((len(sizes), count)) < 0.7))
    refined = batch.with_rows(torch.from_numpy(rng.random(len(batch.rows), np.float32)))
    found = support(Choice(refined, batch, weights), refined)
    assert found.dtype == torch.float64 and found.shape == (len(sizes),)
    for photo, grid in enumerate(grids):
        mask = (refined.grids()[photo] > 0.5).numpy()
        ious = [iou(mask, (grid[..., k] > 0.5).numpy()) for k in range(count)]
        own = weights[photo].double().numpy()
        assert found[photo].item() == pytest.approx(np.average(ious, weights=own) if own.any() else 0.0, abs=1e-6)


def test_support_is_that_at_the_size_of_the_mask():
    small = torch.zeros(4, 4, 1)
    small[1:3, 1:3] = 1
    large = torch.zeros(32, 64)
    large[8:24, 16:48] = 1
    choice = Choice(Ragged.pack([large]), Ragged.pack([small]), torch.ones(1, 1))
    assert support(choice, choice.masks).item() > 0.85  # bilinear interpolation rounds the corners


def test_clearness_of_an_outline():
    square = torch.zeros(130, 200)  # strips of two pixels
    square[40:80, :70] = 1
    soft = square.clone()
    soft[42:78, :68] = 0.7  # the outer pixels of the mask are 1, those below them 0.7
    blurred = 0.2 + 0.5 * square
    values = clearness(Ragged.pack([square, blurred, 0 * square, 0 * square + 1])).tolist()
    assert values == pytest.approx([1.0, 0.5, 0.0, 0.0])
    assert clearness(Ragged.pack([soft])).item() == pytest.approx(1.0)
    soft[41, :69] = soft[78, :69] = soft[41:79, 68] = 0.6
    inner, first = 40 * 70 - 36 * 68, 2 * 69 + 36
    assert clearness(Ragged.pack([soft])).item() == pytest.approx(1 - 0.4 * first / inner)
    outside = square.clone()
    outside[37:83, :73] = 0.4  # three pixels around, and the third does not count
    outside[40:80, :70] = 1
    assert clearness(Ragged.pack([outside])).item() == pytest.approx(0.6)


def test_quality_of_masks():
    mask = torch.zeros(20, 20)
    mask[5:15, 5:15] = 1
    photo, witness, weights = Ragged.pack([mask]), Ragged.pack([mask[..., None]]), torch.ones(1, 1)
    assert quality(Choice(photo, witness, weights), photo).tolist() == [1.0]
    part = photo.with_rows(torch.where((mask > 0) & (mask.cumsum(0) > 5), 0.7, 0.2).flatten())
    choice = Choice(photo, witness, weights)
    expected = (2 * support(choice, part) + clearness(part)) / 3
    assert quality(choice, part).tolist() == expected.tolist() and expected.item() == pytest.approx(0.5)
    assert quality(choice._replace(weights=0 * weights), photo).tolist() == [pytest.approx(1 / 3)]


def test_the_name_is_found_inside_of_the_object(scenes, scorer):
    """Its probability is higher for the true mask than for the rest of the photo and for an empty mask."""
    images = packed(*(Photo("", scene.image) for scene in scenes))
    grids = [torch.from_numpy(np.stack([s.masks[0], ~s.masks[0], 0 * s.masks[0]], -1)).float() for s in scenes]
    masks, numbers = Ragged.pack(grids), torch.tensor([[0, 1, 2]] * len(scenes))
    kinds = [scene.kinds[0] for scene in scenes]
    found = scorer.score(images, masks, numbers, kinds)
    assert found.shape == (len(scenes), 3) and (found[:, 2] == 0).all() and (found >= 0).all() and (found <= 1).all()
    assert (found[:, 0] > found[:, 1]).float().mean() > 0.7 and found[:, 0].mean() > 0.5
    other = scorer.score(images, masks, numbers, [KINDS[(KINDS.index(kind) + 1) % len(KINDS)] for kind in kinds])
    assert other[:, 0].mean() < 0.2
    swapped = scorer.score(images, masks, numbers.flip(1), kinds)
    torch.testing.assert_close(swapped.flip(1), found)
    for number, scene in enumerate(scenes):
        alone = scorer.score(packed(Photo("", scene.image)), Ragged.pack(grids[number : number + 1]), numbers[:1],
                             kinds[number : number + 1])  # fmt: skip
        assert torch.equal(alone[0], found[number])


@pytest.mark.parametrize("settings", [SPECTRAL, SELFMASK], ids=["spectral", "selfmask"])
def test_names_are_looked_up_where_they_can_decide(settings, scenes, scorer, monkeypatch):
    """With fewer crops, the same candidates are selected as with the names in the whole shortlist."""
    given = {"detector": settings | {"select": "name"}, "index": {"clip_model": CLIP_NAME}}
    labeler = Labeler(make_config({"photos": "", **given}), "cpu", KINDS)
    images, sizes = packed(*(Photo("", scene.image) for scene in scenes)), [scene.image.shape[:2] for scene in scenes]
    kinds = [scene.kinds[0] for scene in scenes]
    masks = labeler.detector.candidates(images)
    numbers = shortlist(prior(masks))
    expected = chosen(masks, prior(masks), sizes, (numbers, scorer.score(images, masks, numbers, kinds)))
    crops, encode = [], labeler.names.clip.model.encode_image

    def counted(pixels):
        crops.append(len(pixels))
        return encode(pixels)

    monkeypatch.setattr(labeler.names.clip.model, "encode_image", counted)
    found = labeler._detect(images, sizes, kinds)
    assert torch.equal(found.masks.rows, expected.masks.rows)
    assert len(scenes) < sum(crops) < numbers.numel()


def test_a_name_is_not_looked_up_in_no_candidate(scenes, scorer):
    """-1 has the probability 0, and what the others have does not depend on it but for rounding."""
    images = packed(*(Photo("", scene.image) for scene in scenes))
    masks = Ragged.pack([torch.from_numpy(np.stack([s.masks[0], ~s.masks[0]], -1)).float() for s in scenes])
    kinds = [scene.kinds[0] for scene in scenes]
    numbers = torch.tensor([[0, 1]] * len(scenes))
    everything = scorer.score(images, masks, numbers, kinds)
    kept = torch.arange(2 * len(scenes)).view(-1, 2) % 3 > 0
    some = scorer.score(images, masks, numbers.where(kept, -1), kinds)
    torch.testing.assert_close(some, everything * kept)
    assert torch.equal(scorer.score(images, masks, numbers * 0 - 1, kinds), torch.zeros(len(scenes), 2))
    assert scorer.score(images, masks, numbers[:, :0], kinds).shape == (len(scenes), 0)


@given(st.integers(1, 90), st.integers(1, 90), st.integers(1, 9), st.integers(1, 9), st.integers(0, 99))
def test_a_crop_holds_the_mask(h, w, rows, columns, seed):
    rng = np.random.default_rng(seed)
    mask = rng.random((rows, columns)) < 0.3
    y, x = np.mgrid[:h, :w]
    inside = mask[y * rows // h, x * columns // w]
    crop = _crop(torch.from_numpy(np.stack([y, x, inside], -1)), mask)
    assert min(crop.shape[:2]) >= 1 and max(crop.shape[:2]) <= 16 * min(crop.shape[:2])
    if max(h, w) <= 16 * min(h, w):
        assert crop[..., 2].sum() == inside.sum()
        side = max(crop.shape[:2])
        assert crop.shape[0] in (side, h) and crop.shape[1] in (side, w)


def test_auto_is_none_for_selfmask_only():
    for name, select in (("spectral", "prior"), ("cluster-vote", "prior"), ("selfmask", "none")):
        detector = make_config({"photos": "", "detector": {"name": name}}).detector
        assert (detector.select, detector.selection) == ("auto", select)


def test_a_photo_of_two_categories_has_a_mask_for_each_name(scenes, tmp_path):
    """The same bytes with any shards; labels from before an update do not count."""
    for number, scene in enumerate(scenes):
        Image.fromarray(scene.image).save(tmp_path / f"{number}.png")
    archive = Archive(KINDS[:2], {kind: [Retrieved(f"{number}.png", 0.5) for number in range(6)] for kind in KINDS[:2]})
    lines = []
    for size in (2, 64):
        given = {"detector": SPECTRAL | {"select": "name"}, "index": {"clip_model": CLIP_NAME}}
        config = make_config({"photos": str(tmp_path), **given, "pseudolabel": {"shard_size": size}})
        units = units_of([("0.png", [(KINDS[0], 0.5), (KINDS[1], 0.5)])], config)
        assert units == [("0.png", KINDS[0]), ("0.png", KINDS[1])]
        folder, done = tmp_path / str(size), []
        folder.mkdir()
        pseudolabel(PhotoSource(tmp_path), archive, folder, config, Worker(), "cpu", done.append)
        records = list(read_masks(folder))
        assert sum(done) == len(records) == 12
        assert [record.key for record in records] == [(f"{n}.png", kind) for n in range(6) for kind in KINDS[:2]]
        lines.append([record.to_json() for record in records])
        assert not known_labels([folder], config)
    assert lines[0] == lines[1]
    scores = [json.loads(line)["score"] for line in lines[0]]
    assert len(set(scores)) > 6  # they depend on the name


def test_a_name_needs_a_clip_model():
    given = {"detector": {"select": "name"}, "index": {"embeddings": "file.safetensors"}}
    with pytest.raises(UserError, match="--select name embeds parts of photos, so it needs a CLIP model"):
        expect_clip(make_config({"photos": "", **given}))


def test_an_expert_replaces_masks_in_which_its_category_is_less_likely(scenes, scorer, tmp_path):
    """The others keep their records. The expert here predicts the same pixels for all photos."""
    by_photo = {}
    for number, scene in enumerate(scenes):
        Image.fromarray(scene.image).save(tmp_path / f"{number}.png")
        truth = scene.masks[0]
        mask = truth if number % 2 else ~truth
        record = MaskRecord.from_mask(f"{number}.png", mask, scene.kinds[0], 0.5, 0.25)
        by_photo[record.photo] = [record]
    truths = iter([scene.masks[0] for scene in scenes])
    network = DeepLab(untrained_encoder(ENCODER), 2, 16)
    segmenter = Segmenter(network.eval(), ["category"], "cpu")

    def logits(output, category):
        small = Image.fromarray(next(truths)).resize(output.shape[:0:-1])
        return torch.from_numpy(np.where(small, 9.0, -9.0)).float()

    found = dict(relabel(PhotoSource(tmp_path), by_photo, segmenter, logits, scorer))
    kept = [found[photo][0] is records[0] for photo, records in by_photo.items()]
    assert all(kept[1::2])  # true masks
    assert not any(kept[::2])  # backgrounds: the true masks of the expert are better
    for photo, (record,) in found.items():
        scene = scenes[int(photo.partition(".")[0])]
        assert record.key == by_photo[photo][0].key
        before = by_photo[photo][0]
        assert before is record or iou(record.mask(), scene.masks[0]) > 0.8
        if before is not record:
            terms = 0.25, iou(record.mask(), before.mask()), mask_score(record.mask(), 1.0)
            assert record.score == pytest.approx(sum(terms) / 3, abs=0.002)  # the expert is nearly certain
