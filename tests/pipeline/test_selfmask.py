# SPDX-License-Identifier: MIT
"""The SelfMask network against the authors' code, its detector, and its training on the masks of a run."""

import dataclasses
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from detections import detect
from PIL import Image
from safetensors.torch import load_file, save_file
from scipy.spatial.transform import Rotation
from torchvision.transforms import functional as TF

from golden import GOLDEN, fill_weights
from namedmask import run, training
from namedmask.archive import Archive, Retrieved, write_archive
from namedmask.backbones import untrained
from namedmask.config import DetectorConfig, SaliencyTraining, make_config
from namedmask.demo.scenes import index_photo
from namedmask.distributed import Worker
from namedmask.errors import UserError
from namedmask.masks import MaskRecord, read_errors, read_shard, write_shard
from namedmask.photos import Photo, PhotoSource
from namedmask.presets import preset
from namedmask.progress import Progress
from namedmask.pseudolabel import Labeler
from namedmask.review import write_review
from namedmask.saliency import make_detector, selfmask_training
from namedmask.saliency.selfmask import SelfMask, agreement, certainty
from namedmask.saliency.selfmask_training import (
    batches,
    corner_box,
    cropped,
    initial_network,
    losses,
    random_box,
    ranked_masks,
    relit,
    training_count,
)
from namedmask_kernels import Ragged
from namedmask_kernels.reference.bilateral_solver import bilateral_solver
from small_world import command

TINY = "vit_namedmask_demo"


@pytest.fixture(scope="module")
def authors_network() -> SelfMask:
    return fill_weights(SelfMask(untrained("vit_small_patch8_224")).eval())


@pytest.mark.parametrize("photo", ["even", "odd"])
def test_forward_equals_the_authors_network(authors_network, photo):
    with np.load(GOLDEN / "selfmask_forward.npz") as golden:
        expected = {key.partition("_")[2]: golden[key] for key in golden.files if key.startswith(photo)}
    pixels = torch.from_numpy(expected["input"])
    with torch.inference_mode():
        masks, objectness = authors_network(F.pad(pixels, (0, -pixels.shape[3] % 8, 0, -pixels.shape[2] % 8)))
    soft = masks[-1].sigmoid()
    np.testing.assert_allclose(soft, expected["mask_pred"][:, 0], atol=1e-4)
    np.testing.assert_allclose(objectness[-1].sigmoid(), expected["objectness"][:, 0, :, 0], atol=1e-4)
    best = int(objectness[-1, 0].argmax())
    assert best == int(expected["query"].item())
    full = F.interpolate(soft[:, best][None], scale_factor=4, mode="bilinear")[
        0, 0, : pixels.shape[2], : pixels.shape[3]
    ]
    clear = (full - 0.5).abs() > 1e-3
    assert torch.equal((full > 0.5)[clear], torch.from_numpy(expected["dt"]).bool()[clear])


def small_weights(path: Path, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    save_file(SelfMask(untrained(TINY), queries=3, layers=2).state_dict(), path)
    return path


def make_selfmask(weights: Path, size: int = 64):
    return make_detector(DetectorConfig(name="selfmask", backbone=TINY, weights=str(weights), image_size=size), "cpu")


def test_detection_does_not_depend_on_batch_composition(tmp_path):
    detector = make_selfmask(small_weights(tmp_path / "w.safetensors"))
    rng = np.random.default_rng(0)
    shapes = (96, 128), (70, 50), (96, 128), (96, 128), (1, 1)
    photos = [Photo("", rng.integers(0, 256, (*shape, 3), np.uint8)) for shape in shapes]
    for photo, (mask, confidence) in zip(photos, detect(detector, *photos), strict=True):
        ((alone, own),) = detect(detector, photo)
        assert torch.equal(alone, mask) and own == confidence
        assert mask.shape == photo.size and 0 <= confidence <= 1


def test_detector_equals_the_network(tmp_path):
    detector = make_selfmask(small_weights(tmp_path / "w.safetensors"))
    photo = Photo("", np.random.default_rng(1).integers(0, 256, (64, 88, 3), np.uint8))
    with torch.inference_mode():
        patches = detector.backbone.prepare(Ragged.pack([photo.pixels]), 64).grids()[0]
        whole = patches.unflatten(2, (3, 8, 8)).permute(2, 0, 3, 1, 4).flatten(3).flatten(1, 2)
        masks, objectness = detector.network(whole[None])
        soft = masks[-1, :, objectness[-1, 0].argmax()].sigmoid()
        expected = F.interpolate(soft[None], photo.pixels.shape[:2], mode="bilinear")[0, 0]
    torch.testing.assert_close(detect(detector, photo)[0][0], expected, atol=1e-5, rtol=0)


def test_time_augmentation_averages_views(tmp_path):
    """With horizontal flips, the mask of a flipped photo is the flipped mask."""
    weights = str(small_weights(tmp_path / "w.safetensors"))
    config = DetectorConfig(name="selfmask", backbone=TINY, weights=weights, image_size=64)
    pixels = np.random.default_rng(2).integers(0, 256, (70, 91, 3), np.uint8)
    photo, flipped_photo = Photo("", pixels), Photo("", np.ascontiguousarray(pixels[:, ::-1]))
    singles = [make_detector(config.model_copy(update={"image_size": size}), "cpu") for size in (64, 96)]
    masks = [detect(single, p)[0][0] for single in singles for p in (photo, flipped_photo)]
    masks[1::2] = [mask.flip(1) for mask in masks[1::2]]
    detector = make_detector(config.model_copy(update={"scales": [1.0, 1.5], "horizontal_flip": True}), "cpu")
    (original, confidence), (flipped, _) = detect(detector, photo, flipped_photo)
    torch.testing.assert_close(original, torch.stack(masks).mean(0), atol=1e-5, rtol=0)
    torch.testing.assert_close(flipped.flip(1), original, atol=1e-5, rtol=0)
    expected = certainty(Ragged.pack([original])) * agreement([Ragged.pack([mask]) for mask in masks])
    assert confidence == pytest.approx(expected.item())
    assert detector.tokens(photo.size) == 2 * sum(single.tokens(photo.size) for single in singles)


def published_mask(network: SelfMask, mean: tuple[float, ...], std: tuple[float, ...], photo: np.ndarray) -> np.ndarray:
    """The published inference, step by step; bool [H, W] at the size of the photo."""
    image = TF.resize(Image.fromarray(photo), 512, TF.InterpolationMode.BILINEAR)
    pixels = TF.normalize(TF.to_tensor(image), mean, std)[None]
    h, w = pixels.shape[2:]
    with torch.inference_mode():
        masks, objectness = network(F.pad(pixels, (0, -w % 8, 0, -h % 8)))
    soft = F.interpolate(masks[-1].sigmoid(), scale_factor=4, mode="bilinear")[0, objectness[-1, 0].argmax(), :h, :w]
    binary = (soft > 0.5).double().numpy()
    refined = bilateral_solver(binary, np.asarray(image), 0.999, 16, 16, 8, 256, 25, 1e-5) > 0.5
    return np.asarray(Image.fromarray(refined).resize(photo.shape[1::-1], Image.Resampling.NEAREST))


def photos_of_odd_sizes() -> list[np.ndarray]:
    real = Path("/work/shared/photos/eval/000000000139.jpg")
    photos = [Image.fromarray(index_photo(7, 0).image).resize((97, 131))]
    photos.append(Image.open(real) if real.exists() else Image.fromarray(index_photo(7, 1).image).resize((811, 613)))
    return [np.array(photo.convert("RGB")) for photo in photos]


def test_published_inference():
    """Masks of photos of odd sizes, labeled in one batch, equal those of the published steps."""
    published = preset("selfmask")
    detector = published["detector"] | {"backbone": TINY}
    labeler = Labeler(make_config({"photos": "", **published, "detector": detector}), "cpu")
    photos, backbone = photos_of_odd_sizes(), labeler.detector.backbone
    for photo, (_, labeled) in zip(
        photos, labeler._label_batch([(("", None), Photo("", photo)) for photo in photos]), strict=True
    ):
        expected = published_mask(labeler.detector.network, backbone.mean, backbone.std, photo)
        mask = labeled.mask.decode()
        assert 0.01 < expected.mean() < 0.99 and (mask & expected).sum() >= 0.999 * (mask | expected).sum()


def test_initial_mask_logits_have_a_gradient():
    """Logits far from 0 would leave the Dice loss without one."""
    torch.manual_seed(0)
    network = SelfMask(untrained(TINY).eval(), queries=5, layers=2)
    masks, _ = network(torch.randn(2, 3, 64, 64))
    assert 0.1 < masks.abs().mean() < 3


def test_certainty_is_dice_times_compactness():
    square = torch.zeros(20, 20)
    square[5:15, 5:15] = 1
    line = torch.zeros(20, 20)
    line[10, :16] = 1
    soft = 2 * 80 / (80 + 100)  # outline 0.8 * 40, side sqrt(80)
    values = certainty(Ragged.pack([square, 0.4 * square, 0.8 * square, line])).tolist()
    assert values == pytest.approx([1, 0, soft, 4 * 4 / 34])


def test_agreement_is_the_mean_iou_of_all_pairs():
    a = torch.tensor([[0.9, 0.9, 0.1, 0.1]])
    b = torch.tensor([[0.9, 0.1, 0.1, 0.1]])
    of = lambda *views: agreement([Ragged.pack(view) for view in views]).tolist()  # noqa: E731
    assert of([a, b]) == of([a, b.T], [a, b.T]) == [1, 1] and of([a], [1 - a]) == [0]
    assert of([a, a], [b, a], [b, a]) == pytest.approx([(0.5 + 0.5 + 1) / 3, 1])


def test_invalid_weights_raise_user_error(tmp_path):
    with pytest.raises(UserError, match=r"needs --detector-weights FILE"):
        make_detector(DetectorConfig(name="selfmask"), "cpu")
    with pytest.raises(UserError, match="no such file"):
        make_selfmask(tmp_path / "absent.safetensors")
    (tmp_path / "text.safetensors").write_text("hello")
    with pytest.raises(UserError, match="cannot be read"):
        make_selfmask(tmp_path / "text.safetensors")
    save_file(untrained(TINY).state_dict(), tmp_path / "vit.safetensors")
    with pytest.raises(UserError, match="not a SelfMask network"):
        make_selfmask(tmp_path / "vit.safetensors")
    state = load_file(small_weights(tmp_path / "w.safetensors"))
    save_file({k: v for k, v in state.items() if not k.startswith("ffn.layers.2")}, tmp_path / "part.safetensors")
    with pytest.raises(UserError, match=r"does not fit.*ffn.layers.2"):
        make_selfmask(tmp_path / "part.safetensors")


def disc_photo(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """A disc of one color on a grainy background of another, and its mask."""
    rng = np.random.default_rng(seed)
    h, w = 72 + seed % 9, 80 + seed % 13
    y, x = np.mgrid[:h, :w]
    r, center = rng.uniform(12, 22), (rng.uniform(25, h - 25), rng.uniform(25, w - 25))
    mask = (y - center[0]) ** 2 + (x - center[1]) ** 2 < r * r
    colors = rng.integers(30, 220, (2, 3))
    grain = rng.integers(-25, 26, (h, w, 1)) * ~mask[..., None]
    return (np.where(mask[..., None], *colors) + grain).clip(0, 255).astype(np.uint8), mask


@pytest.fixture
def run_of_discs(tmp_path) -> Path:
    """A run folder with masks of 24 photos: half are true, half are inverted and have low scores."""
    folder = tmp_path / "photos" / "disc"
    folder.mkdir(parents=True)
    records = []
    for seed in range(24):
        pixels, mask = disc_photo(seed)
        Image.fromarray(pixels).save(folder / f"{seed}.png")
        mask, score = (mask, 0.9) if seed % 2 else (~mask, 0.1)
        records.append(MaskRecord.from_mask(f"disc/{seed}.png", mask, "disc", None, score))
    out = tmp_path / "out"
    out.mkdir()
    run.settle(out, {"photos": str(tmp_path / "photos")}, ["pseudolabel"])
    photos = [Retrieved(record.photo, None) for record in records]
    write_archive(out / "archive.json", Archive(["disc"], {"disc": photos}))
    (out / "masks").mkdir()
    write_shard(out / "masks" / "00000.jsonl", records)
    return out


SMALL = {"backbone": TINY, "num_queries": 3, "decoder_layers": 2, "keep_fraction": 0.5, "paste_prob": 0.25,
         "texture_prob": 0.1, "crop_size": 48, "scale": (0.5, 1.0), "batch_size": 6, "lr": 2e-3,
         "encoder_lr": 1e-3}  # fmt: skip
DEMO = {"views": "crop", "loss": "mean", "warmup_steps": 50, "clip_grad_norm": 1.0}  # as the demo's network is trained


def train_saliency(out: Path, workers: int = 1, overwrite: bool = False, **changed) -> Path:
    """Trains a SelfMask network on the masks of a run folder; returns its file."""
    run.start(out, {"saliency": SMALL | changed}, ["train-saliency"], workers, 0, overwrite)
    return out / "saliency" / "model.safetensors"


def last_metrics(out: Path) -> list[float]:
    """The losses in the last line of metrics.jsonl."""
    line = json.loads((out / "saliency" / "metrics.jsonl").read_text().splitlines()[-1])
    return [line["dice"], line["ranking"]]


def test_training_uses_the_masks_with_the_best_scores(run_of_discs):
    records = ranked_masks(run_of_discs)
    trained = records[: training_count(records, SaliencyTraining(**SMALL))]
    assert len(records) == 24 and {int(record.photo[5:-4]) for record in trained} == set(range(1, 24, 2))
    assert [training_count(records[:n], SaliencyTraining(keep_fraction=0.1)) for n in (1, 14, 16, 24)] == [1, 1, 2, 2]
    write_review(run_of_discs, {(records[0].photo, "disc"): "reject"})
    assert ranked_masks(run_of_discs) == records[1:]


def test_training_uses_the_best_mask_of_a_photo(run_of_discs):
    """Names select a mask for each category of a photo."""
    best = ranked_masks(run_of_discs)
    others = [dataclasses.replace(record, category="other", score=record.score / 2) for record in best]
    write_shard(run_of_discs / "masks" / "00001.jsonl", others)
    assert ranked_masks(run_of_discs) == best


@pytest.mark.parametrize("protocol", [{}, DEMO])
def test_training_learns_the_masks(run_of_discs, protocol):
    weights = train_saliency(run_of_discs, steps=120, **protocol)
    detector, ious = make_selfmask(weights, 56), []
    for seed in range(1, 24, 2):  # twelve photos are too few to generalize to others
        pixels, truth = disc_photo(seed)
        mask = (detect(detector, Photo("", pixels))[0][0] > 0.5).numpy()
        ious.append((mask & truth).sum() / (mask | truth).sum())
    assert np.mean(ious) > 0.6
    lines = [json.loads(line) for line in (run_of_discs / "saliency" / "metrics.jsonl").read_text().splitlines()]
    assert lines[0]["settings"]["num_queries"] == 3 and [line["step"] for line in lines[1:]] == [50, 100, 120]
    assert lines[-1]["dice"] < 0.6 * lines[1]["dice"] + 0.1


def test_interrupted_training_resumes_bit_identically(run_of_discs, monkeypatch):
    expected = train_saliency(run_of_discs, steps=9).read_bytes()
    shutil.rmtree(run_of_discs / "saliency")
    steps = iter(range(9))

    def interrupted(*arguments):
        step = next(steps)
        monkeypatch.setattr(training, "SAVE_EVERY", 0 if step < 4 else math.inf)
        if step == 6:
            raise KeyboardInterrupt
        return losses(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(selfmask_training, "losses", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train_saliency(run_of_discs, steps=9)
    assert train_saliency(run_of_discs, steps=9).read_bytes() == expected
    with pytest.raises(UserError, match=r"saliency.lr: 0.002 -> 0.0001"):
        train_saliency(run_of_discs, steps=9, lr=1e-4)
    shard = run_of_discs / "masks" / "00000.jsonl"
    write_shard(shard, list(read_shard(shard))[1:])
    with pytest.raises(UserError, match="trained on other masks"):
        train_saliency(run_of_discs, steps=9)
    assert train_saliency(run_of_discs, overwrite=True, steps=1).read_bytes() != expected


@pytest.mark.parametrize("loss", ["sum", "mean"])
def test_two_workers_and_bfloat16(run_of_discs, one_thread, loss):
    """Two workers train the same network as one, up to rounding; bfloat16 trains another, finite one."""
    # Gradients near 0 may change sign, and Adam takes steps of the same length.
    slow = {"steps": 3, "warmup_steps": 50, "loss": loss}
    single = load_file(train_saliency(run_of_discs, **slow))
    logged = last_metrics(run_of_discs)
    two = load_file(train_saliency(run_of_discs, workers=2, overwrite=True, **slow))
    assert last_metrics(run_of_discs) == pytest.approx(logged, abs=2e-3)
    for name, tensor in single.items():
        torch.testing.assert_close(two[name], tensor, atol=2e-4, rtol=1e-3, msg=name)
    low = load_file(train_saliency(run_of_discs, overwrite=True, **slow, precision="bfloat16"))
    assert all(tensor.isfinite().all() for tensor in low.values()) and any(
        (low[name] != tensor).any() for name, tensor in single.items()
    )


def test_unreadable_photos_are_replaced_and_reported(run_of_discs):
    photos = run_of_discs.parent / "photos" / "disc"
    (photos / "1.png").write_bytes(b"")
    expected = train_saliency(run_of_discs, steps=2).read_bytes()
    [error] = read_errors(run_of_discs / "errors.jsonl")
    assert (error.photo, error.stage) == ("disc/1.png", "train-saliency")
    assert train_saliency(run_of_discs, overwrite=True, steps=2).read_bytes() == expected
    for path in photos.iterdir():
        path.unlink()
    with pytest.raises(UserError, match="none of the photos of 'disc' can be used any more"):
        train_saliency(run_of_discs, overwrite=True, steps=2)


def test_masks_and_training_in_one_call(run_of_discs):
    """The check before the first stage does not ask for masks that the call makes itself."""
    photos, out = run_of_discs.parent / "photos", run_of_discs.parent / "together"
    given = {"photos": str(photos), "detector": {"backbone": TINY, "image_size": 48}, "saliency": SMALL | {"steps": 1}}
    run.start(out, given, ["archive", "pseudolabel", "train-saliency"], gpus=0)
    assert (out / "saliency" / "model.safetensors").exists() and ranked_masks(out)


def test_concurrent_training_in_one_folder_raises(run_of_discs):
    with run.locked(run_of_discs):
        result = command("train-saliency", run_of_discs, "--steps", 1)
    assert result.exit_code == 2 and "is in use by another run" in result.stderr
    missing = run_of_discs / "none"
    assert command("train-saliency", missing).exit_code == 2 and not missing.exists()


def test_wrong_views_or_no_masks_raise_user_error(run_of_discs):
    shard = run_of_discs / "masks" / "00000.jsonl"
    write_shard(shard, [])
    with pytest.raises(UserError, match=f"--crop-size 50: expected a multiple of 8, the patch size of '{TINY}'"):
        train_saliency(run_of_discs, crop_size=50)
    with pytest.raises(UserError, match="there are no masks"):
        train_saliency(run_of_discs)
    shard.unlink()
    with pytest.raises(UserError, match="is not finished"):
        train_saliency(run_of_discs)


def test_published_losses_equal_hand_computed_values():
    """Two layers, one photo, two queries; masks of 1 x 2 cells are compared with a target of 2 x 4 pixels."""
    left, right, empty = torch.tensor([[20.0, -20.0]]), torch.tensor([[-20.0, 20.0]]), torch.tensor([[-20.0, -20.0]])
    masks = torch.stack([torch.stack([left, right]), torch.stack([empty, left])])[:, None]
    objectness = torch.tensor([[[0.0, math.log(3)]], [[-math.log(3), 0.0]]])  # probabilities 1/2, 3/4 and 1/4, 1/2
    targets = torch.tensor([[[1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]]])
    dice, rank, _ = losses(masks, objectness, targets, "sum")
    # `left` becomes two rows of 1, 3/4, 1/4, 0, with a sum of 4 and an overlap of 7/4; that of `right` is 1/4.
    expected = [1 - (3.5 + 1) / (4 + 2 + 1), 1 - (0.5 + 1) / (4 + 2 + 1), 1 - 1 / (2 + 1), 1 - (3.5 + 1) / (4 + 2 + 1)]
    torch.testing.assert_close(dice.flatten(), torch.tensor(expected), atol=1e-6, rtol=0)
    # Layer 1: the worse query is the second one, whose objectness is higher by 1/4. Layer 2: the order is right.
    assert float(rank) == pytest.approx(0.25)


def test_photos_without_an_object_do_not_count(run_of_discs, monkeypatch):
    """In a shrunk view, a small object may vanish. Queries must not learn that it is best to find nothing."""
    masks, objectness = torch.randn(2, 3, 4, 2, 2), torch.randn(2, 3, 4)
    targets = torch.zeros(3, 4, 4)
    targets[::2, 1] = 1
    dice, rank, pairs = losses(masks, objectness, targets, "sum")
    others, rank_of_others, pairs_of_others = losses(masks[:, ::2], objectness[:, ::2], targets[::2], "sum")
    assert torch.equal(dice[:, ::2], others) and not dice[:, 1].any()
    assert torch.equal(rank, rank_of_others) and pairs == pairs_of_others == 2 * 2 * 6
    for shown, scale in ((3, 20 * 6 / 3), (0, 20 * 6)):  # the mean is over the photos that count
        dice = torch.full((6, 4, 20), 0.5)
        dice[:, shown:] = 0
        dice.requires_grad_()
        monkeypatch.setattr(selfmask_training, "losses", lambda *_, dice=dice: (dice, dice.sum() * 0, torch.tensor(0)))
        monkeypatch.setattr(selfmask_training, "shown", lambda targets, shown=shown: torch.arange(4) < shown)
        train_saliency(run_of_discs, overwrite=True, steps=1, batch_size=4)
        assert float(dice.grad.sum()) == pytest.approx(4 * scale)
        assert last_metrics(run_of_discs)[0] == pytest.approx(0.5 if shown else 0)


def test_mean_losses_equal_hand_computed_values():
    targets = torch.zeros(1, 4, 4)
    targets[:, :2, :2] = 1.0  # one cell of 2 x 2
    good, bad = torch.tensor([[20.0, -20], [-20, -20]]), torch.tensor([[-20.0, 20], [-20, -20]])
    masks = torch.stack([good, bad])[None, None]  # one layer, one photo, two queries
    dice, rank, pairs = losses(masks, torch.tensor([[[0.0, 2.0]]]), targets, "mean")
    torch.testing.assert_close(dice, torch.tensor([[[0.0, 2 / 3]]]), atol=1e-6, rtol=0)
    assert pairs == 1 and float(rank) == pytest.approx(
        math.log1p(math.exp(2.0)), rel=1e-5
    )  # the worse query has the higher objectness
    partly = torch.zeros(1, 4, 4)
    partly[:, 0, 1] = 1.0  # a quarter of the cell
    dice, _, _ = losses(masks, torch.zeros(1, 1, 2), partly, "mean")
    torch.testing.assert_close(dice, torch.tensor([[[1 - 1.5 / 2.25, 1 - 1 / 2.25]]]), atol=1e-6, rtol=0)
    _, equal, _ = losses(torch.stack([good, good])[None, None], torch.tensor([[[0.0, 2.0]]]), targets, "mean")
    assert float(equal) == 0


@pytest.mark.parametrize(("kind", "scale"), [("sum", 20 * 6), ("mean", 1)])
def test_loss_of_a_batch(run_of_discs, monkeypatch, kind, scale):
    """The published loss sums over queries and layers and takes the mean over photos; all photos are alike here."""
    layers = torch.linspace(0.1, 0.6, 6)[:, None, None].expand(6, 4, 20)
    for pairs in (16, 0):
        dice, rank = layers.clone().requires_grad_(), torch.tensor(8.0, requires_grad=True)
        values = dice, rank, torch.tensor(pairs)
        monkeypatch.setattr(selfmask_training, "losses", lambda *_, values=values: values)
        train_saliency(run_of_discs, overwrite=True, loss=kind, steps=1, batch_size=4)
        assert float(dice.grad.sum()) == pytest.approx(scale)
        assert float(rank.grad) == (0.25 if kind == "sum" else 1 / max(pairs, 1))
        assert last_metrics(run_of_discs) == pytest.approx([0.6, 8 * float(rank.grad)])  # Dice of the last layer


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_number_of_steps_and_precision(run_of_discs, monkeypatch, precision):
    """One epoch of the 12 best of 24 masks in batches of 5 takes 3 steps."""
    forward, enabled = SelfMask.forward, []
    monkeypatch.setattr(
        SelfMask, "forward", lambda *inputs: enabled.append(torch.is_autocast_enabled("cpu")) or forward(*inputs)
    )
    settings = SaliencyTraining(**SMALL | {"batch_size": 5}, epochs=1, precision=precision)
    with Progress("train-saliency", Worker()) as progress:
        source = PhotoSource(run_of_discs.parent / "photos")
        selfmask_training.train_saliency(run_of_discs, source, settings, Worker(), "cpu", progress)
    assert progress.total == progress.done == 15 and enabled == [precision == "bfloat16"] * 3
    assert {path.name for path in (run_of_discs / "saliency").iterdir()} == {
        "model.safetensors",
        "metrics.jsonl",
        "tensorboard",
    }


def test_training_starts_from_a_backbone_or_a_checkpoint(run_of_discs, tmp_path):
    fresh = initial_network(SaliencyTraining(**SMALL))
    assert all(parameter.requires_grad for parameter in fresh.parameters())
    weights = small_weights(tmp_path / "w.safetensors", seed=5)
    network = initial_network(SaliencyTraining(**SMALL, init_checkpoint=str(weights)))
    assert all(parameter.requires_grad for parameter in network.parameters())
    for name, value in load_file(weights).items():
        assert torch.equal(network.state_dict()[name], value)


def two_photos(folder: Path) -> training.TrainingPhotos:
    """A photo of gray value 200 whose left half is the object, and one of 50 with a lower score."""
    left = np.zeros((40, 40), bool)
    left[:, :20] = True
    records = []
    for value, score in ((200, 1.0), (50, 0.5)):
        Image.fromarray(np.full((40, 40, 3), value, np.uint8)).save(folder / f"{value}.png")
        records.append(MaskRecord.from_mask(f"{value}.png", left, None, None, score))
    return training.TrainingPhotos(PhotoSource(folder), records, folder, Progress("", Worker()))


def gray_views(folder: Path, monkeypatch, **changed) -> tuple[np.ndarray, np.ndarray]:
    """Gray values at the left and right border of 60 views of the photo of 200, and the masks there."""
    monkeypatch.setattr(selfmask_training, "relit", lambda photo, rng: photo / 255)
    monkeypatch.setattr(selfmask_training, "random_box", lambda h, w, scale, rng: [0, 0, h, w])
    settings = SaliencyTraining(backbone=TINY, batch_size=4, crop_size=16, views="crop", keep_fraction=0.5, **changed)
    network = SelfMask(untrained(TINY))
    views, masks = map(
        torch.cat, zip(*batches(two_photos(folder), settings, network, Worker(), range(15)), strict=True)
    )
    config = network.encoder.pretrained_cfg
    values = 255 * (views[:, 1] * config["std"][1] + config["mean"][1])
    return values[:, 8, [1, 14]].numpy(), masks[:, 8, [1, 14]].round().numpy()


def test_objects_are_pasted_onto_corners_of_any_photo(tmp_path, monkeypatch):
    plain, masks = gray_views(tmp_path, monkeypatch)
    assert plain == pytest.approx(200, abs=0.01) and set(map(tuple, masks)) == {(0.0, 1.0), (1.0, 0.0)}
    assert 15 < masks[:, 0].sum() < 45  # half of the views are flipped
    pasted, masks = gray_views(tmp_path, monkeypatch, paste_prob=1.0)
    assert pasted[masks == 1] == pytest.approx(200, abs=0.01)
    background = pasted[masks == 0].round().tolist()
    assert set(background) == {50, 200} and 15 < background.count(50) < 45
    half, _ = gray_views(tmp_path, monkeypatch, paste_prob=0.5)
    assert 5 < (half.round() == 50).sum() < 27  # a quarter


def test_textures_of_any_photo_are_blended_into_objects(tmp_path, monkeypatch):
    blended, masks = gray_views(tmp_path, monkeypatch, texture_prob=1.0)
    assert blended[masks == 0] == pytest.approx(200, abs=0.01)
    weights = (200 - blended[masks == 1]) / 150
    mixed = weights[weights > 1e-3]
    assert 15 < len(mixed) < 45 and 0.3 <= mixed.min() < 0.45 and 0.75 < mixed.max() <= 0.9


def test_views_depend_on_the_seed_and_their_number(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(
        selfmask_training, "random_box", lambda h, w, scale, rng: drawn.append(rng.random()) or [0, 0, h, w]
    )
    monkeypatch.setattr("namedmask.training.map_ahead", lambda function, items, *rest, **more: map(function, items))
    photos = two_photos(tmp_path)
    settings = SaliencyTraining(backbone=TINY, batch_size=4, crop_size=16, views="crop", seed=7)
    names: list[str] = []
    decode = photos.source.decode
    monkeypatch.setattr(photos.source, "decode", lambda name: names.append(name) or decode(name))
    list(batches(photos, settings, SelfMask(untrained(TINY)), Worker(), range(2, 4)))
    assert drawn == [np.random.default_rng((7, 1, place)).random() for place in range(8, 16)]
    orders = [np.random.default_rng((7, 0, epoch)).permutation(2) for epoch in range(4, 8)]
    assert names == [("200.png", "50.png")[number] for number in np.concatenate(orders)]


class Draws:
    """A generator that draws given fractions of its ranges, in order."""

    def __init__(self, *fractions: float):
        self.fractions = iter(fractions)

    def random(self) -> float:
        return next(self.fractions)

    def uniform(self, low: float, high: float) -> float:
        return low + next(self.fractions) * (high - low)


@pytest.mark.parametrize(
    ("fractions", "expected"),
    [
        ((0.25, 0.5, 0.25), [15, 7, 30, 30]),  # a quarter of the area, half of the way down, a quarter to the right
        ((1.0, 1.0, 0.0), [0, 0, 60, 60]),  # at most the shorter side
        ((1e-6, 0.5, 0.5), [29, 29, 1, 1]),  # at least a pixel
    ],
)
def test_random_boxes(fractions, expected):
    assert random_box(60, 60, (0.0, 1.0), Draws(*fractions)) == expected
    assert random_box(20, 90, (0.0, 1.0), Draws(1.0, 0.5, 0.5)) == [0, 35, 20, 20]
    assert random_box(90, 20, (0.0, 1.0), Draws(1.0, 0.5, 0.5)) == [35, 0, 20, 20]


def test_corner_boxes():
    """Squares in each of the four corners, with 30% to 50% of the shorter side."""
    rng, sides, corners = np.random.default_rng(0), [], set()
    for _ in range(200):
        top, left, side, width = corner_box(200, 300, rng)
        assert side == width and top in (0, 200 - side) and left in (0, 300 - side)
        sides.append(side)
        corners.add((top > 0, left > 0))
    assert 60 <= min(sides) < 64 and 96 < max(sides) < 100 and len(corners) == 4
    assert corner_box(1, 2, rng)[2:] == [1, 1]


def test_crops_are_resized_with_antialiasing():
    image = torch.zeros(1, 20, 20, dtype=torch.uint8)
    image[:, 4:12:2, 6:14] = 200  # half of the rows of a box
    assert cropped(image, [4, 6, 8, 8], 2).float().mean() == pytest.approx(100, abs=4)
    assert not cropped(image, [12, 0, 8, 6], 2).any()


@pytest.mark.parametrize("angle", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("saturation", [0.0, 0.5, 1.0, None])
@pytest.mark.parametrize(("contrast", "brightness"), [(0.0, 0.5), (1.0, 0.5), (0.5, 0.0), (0.5, 1.0), (0.3, 0.6)])
def test_light_and_colors(angle, saturation, contrast, brightness):
    """Hue rotates colors by up to 0.6 about the gray axis; the others change by 40%, saturation by 60%."""
    photo = torch.randint(90, 140, (3, 5, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    changed = (0.05,) if saturation is None else (0.11, saturation)
    result = relit(photo, Draws(angle, *changed, contrast, brightness))
    pixels = photo.flatten(1).T.double().numpy() / 255
    gray = pixels.mean(1, keepdims=True)
    turned = Rotation.from_rotvec(np.full(3, 1.2 * (angle - 0.5) / 3**0.5)).apply(pixels - gray)
    pixels = gray + (0 if saturation is None else 0.4 + 1.2 * saturation) * turned
    expected = (pixels - pixels.mean()) * (0.6 + 0.8 * contrast) + pixels.mean() * (0.6 + 0.8 * brightness)
    np.testing.assert_allclose(result.flatten(1).T, expected, atol=1e-6)
    extreme = torch.tensor([0, 255], dtype=torch.uint8).expand(3, 1, 2)
    assert relit(extreme, Draws(0.5, 0.11, 0.5, 1.0, 0.5)).flatten().tolist() == [0, 1] * 3


def test_gradients_are_clipped_and_learning_rates_warm_up_on_request(run_of_discs, monkeypatch):
    rates, norms = [], []

    def step(optimizer, *_, **__):
        assert [group["weight_decay"] for group in optimizer.param_groups] == [0.03, 0.03]
        rates.append([group["lr"] for group in optimizer.param_groups])
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norms.append(float(torch.nn.utils.get_total_norm(gradients)))

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    train_saliency(run_of_discs, steps=4, weight_decay=0.03)
    polynomial = [(1 - i / 4) ** 0.9 for i in range(4)]
    np.testing.assert_allclose(rates, [[1e-3 * p, 2e-3 * p] for p in polynomial])
    highest = max(norms)
    assert highest > 0.1
    rates.clear(), norms.clear()
    train_saliency(run_of_discs, overwrite=True, steps=4, warmup_steps=2, clip_grad_norm=0.1, weight_decay=0.03)
    np.testing.assert_allclose(rates[:2], [[0.5e-3, 1e-3], [1e-3 * polynomial[1], 2e-3 * polynomial[1]]])
    assert max(norms) == pytest.approx(0.1, rel=1e-3)


def shrunk_views(folder: Path, pixels: np.ndarray, mask: np.ndarray, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Views in colors from 0 to 255, [4 * steps, 224, 224, 3], and their targets, of a photo."""
    Image.fromarray(pixels).save(folder / "0.png")
    record = MaskRecord.from_mask("0.png", mask, None, None, 1.0)
    photos = training.TrainingPhotos(PhotoSource(folder), [record], folder, Progress("", Worker()))
    settings, network = SaliencyTraining(backbone=TINY, batch_size=4), SelfMask(untrained(TINY))
    drawn = zip(*batches(photos, settings, network, Worker(), range(steps)), strict=True)
    views, targets = (torch.cat(parts).numpy() for parts in drawn)
    mean, std = (network.encoder.pretrained_cfg[name] for name in ("mean", "std"))
    return 255 * (views.transpose(0, 2, 3, 1) * std + mean), targets


def test_views_are_squeezed_shrunk_and_padded_with_the_mean_color(tmp_path, monkeypatch):
    """The whole photo is in the view at a random position; the rest has its mean color, and is background."""
    monkeypatch.setattr(selfmask_training, "recolored", lambda photo, *_: photo)
    pixels, mask = np.zeros((40, 80, 3), np.uint8), np.zeros((40, 80), bool)
    pixels[:, 40:], mask[:, 40:] = (255, 200, 100), True
    views, targets = shrunk_views(tmp_path, pixels, mask, 40)
    assert views.shape == (160, 224, 224, 3) and targets.shape == (160, 224, 224) and set(np.unique(targets)) == {0, 1}
    corners, sides = [], []
    for view, target in zip(views, targets, strict=True):
        is_photo = (abs(view - (127.5, 100, 50)) > 10).any(2)
        rows, columns = np.nonzero(is_photo)
        top, left, side = int(rows.min()), int(columns.min()), int(rows.max() - rows.min()) + 1
        assert abs(columns.max() - left + 1 - side) <= 1 and not target[~is_photo].sum() > 2 * side
        np.testing.assert_allclose(view[:top].reshape(-1, 3), np.tile((127.5, 100, 50), (top * 224, 1)), atol=3)
        assert int(target.sum()) == pytest.approx(side * side / 2, abs=side)  # all of the photo, as a square
        corners.append((top / max(1, 224 - side), left / max(1, 224 - side)))
        sides.append(side / 224)
    assert 0.1 <= min(sides) < 0.2 and 0.9 < max(sides) <= 1 and np.mean(sides) == pytest.approx(0.55, abs=0.08)
    assert (
        np.mean(corners, axis=0) == pytest.approx([0.5, 0.5], abs=0.1)
        and abs(np.corrcoef(np.array(corners).T)[0, 1]) < 0.3
    )


def test_targets_are_not_shifted_in_shrunk_photos(tmp_path):
    """An object at the left has its share of the columns; rounding down would add half a pixel."""
    mask = np.zeros((40, 80), bool)
    mask[:, :26] = True
    _, targets = shrunk_views(tmp_path, np.zeros((40, 80, 3), np.uint8), mask, 40)
    sides, columns = (targets.any(axis).sum(1) for axis in (2, 1))
    assert abs(np.mean(columns - 26 / 80 * sides)) < 0.1


def test_photos_are_shrunk_with_antialiasing(tmp_path, monkeypatch):
    """Lines of single pixels become gray, of the color of the padding."""
    monkeypatch.setattr(selfmask_training, "recolored", lambda photo, *_: photo)
    pixels = np.zeros((40, 800, 3), np.uint8)
    pixels[:, ::2] = 255
    views, _ = shrunk_views(tmp_path, pixels, np.ones((40, 800), bool), 5)
    assert abs(views - 127.5).max() < 40


def test_shrunk_photos_are_recolored_with_their_padding(tmp_path):
    """A photo of one color leaves no edge in its view."""
    pixels, mask = np.full((40, 80, 3), (200, 100, 40), np.uint8), np.ones((40, 80), bool)
    views, _ = shrunk_views(tmp_path, pixels, mask, 10)
    assert abs(views - views[:, :1, :1]).max() < 0.1
    assert abs(views[:, 0, 0] - (200, 100, 40)).max(1).min() < 0.1 < 20 < np.ptp(views[:, 0, 0], 0).min()


def test_defaults_are_those_of_the_paper():
    published = {"num_queries": 20, "decoder_layers": 6, "keep_fraction": 1.0, "paste_prob": 0.0, "texture_prob": 0.0,
                 "views": "shrink", "crop_size": 224, "scale": (0.1, 1.0), "loss": "sum", "batch_size": 8, "epochs": 12,
                 "lr": 6e-6, "encoder_lr": 6e-6, "warmup_steps": 0, "clip_grad_norm": 0.0,
                 "weight_decay": 0.01}  # fmt: skip
    assert published.items() <= SaliencyTraining().model_dump().items()
    with pytest.raises(
        UserError, match=r"saliency.scale \(--scale\): expected two numbers, low and high, from 0.001 to 1"
    ):
        make_config({"photos": "p", "saliency": {"scale": (0.5, 1.5)}})
