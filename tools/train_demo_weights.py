# SPDX-License-Identifier: MIT
"""Trains the networks of the demo on rendered scenes alone (see tools/README.md).

    python tools/train_demo_weights.py pool --out WORK --photos 24000 --workers 2
    python tools/train_demo_weights.py clip --out WORK
    python tools/train_demo_weights.py vit  --out WORK
    python tools/train_demo_weights.py export --out WORK
    python tools/train_demo_weights.py selfmask --out WORK

``clip`` reads photos and their captions, ``vit`` reads photos, ``selfmask`` reads photos and the masks that the cut
computes from the features of the exported ViT. The pool holds nothing else: true masks are discarded when a scene is
rendered, and the kind appears only as a word in captions. All trainings write checkpoints and resume from them.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

POOL_SEED = 20_000  # not a seed of the demo: the training photos differ from the photos of its run
DESCRIPTIONS = 4


# The pool of photos -------------------------------------------------------------------------------------------------


def render_shard(job: tuple[str, int, int, int]) -> int:
    """Renders photos [start, stop) into one shard with pixels (flat uint8), shapes and caption phrases."""
    from demo_captions import describe, subject

    from namedmask.demo.dice import Dice
    from namedmask.demo.scenes import evaluation_scene, index_photo

    folder, seed, start, stop = job
    target = Path(folder) / f"{start:06d}.npz"
    if target.exists():
        return stop - start
    pixels, shapes, phrases = [], [], []
    for number in range(start, stop):
        # One photo in eight shows several objects, like the demo's evaluation scenes.
        scene = evaluation_scene(seed, number) if number % 8 == 7 else index_photo(seed, number)
        pixels.append(scene.image.reshape(-1))
        shapes.append(scene.image.shape[:2])
        rng = Dice(seed, 9, number)
        phrases.append([subject(scene), *(describe(scene, rng) for _ in range(DESCRIPTIONS))])
    part = target.with_suffix(".part.npz")
    np.savez(part, pixels=np.concatenate(pixels), shapes=np.array(shapes, np.int32), phrases=np.array(phrases))
    part.rename(target)
    return stop - start


def make_pool(arguments: argparse.Namespace) -> None:
    folder = arguments.out / "pool"
    folder.mkdir(parents=True, exist_ok=True)
    step = 500
    jobs = [(str(folder), POOL_SEED, start, start + step) for start in range(0, arguments.photos, step)]
    start_time, done = time.time(), 0
    with multiprocessing.Pool(arguments.workers) as workers:
        for count in workers.imap_unordered(render_shard, jobs):
            done += count
            print(f"{done} photos, {done / (time.time() - start_time):.0f} per second", flush=True)


class Pool:
    """The rendered photos in memory: ``pool[i]`` is uint8 [H, W, 3], ``pool.phrases[i]`` its caption phrases."""

    def __init__(self, folder: Path) -> None:
        self.shards, self.where, self.phrases = [], [], []
        for path in sorted(folder.glob("[0-9]*[0-9].npz")):
            with np.load(path) as shard:
                pixels, shapes = shard["pixels"], shard["shapes"]
                self.phrases.extend(shard["phrases"].tolist())
            offset = 0
            for height, width in shapes.tolist():
                self.where.append((len(self.shards), offset, height, width))
                offset += height * width * 3
            self.shards.append(pixels)
        if not self.where:
            raise SystemExit(f"there are no photos in {folder}: run the subcommand pool first")

    def __len__(self) -> int:
        return len(self.where)

    def __getitem__(self, index: int) -> np.ndarray:
        shard, offset, height, width = self.where[index]
        return self.shards[shard][offset : offset + height * width * 3].reshape(height, width, 3)


# What both trainings share ------------------------------------------------------------------------------------------


class Run:
    """The clock, loss curve and checkpoint of a training, so that it can be resumed."""

    def __init__(self, folder: Path, steps: int, parts: dict) -> None:
        """``parts``: name -> object with state_dict and load_state_dict, restored if there is a checkpoint."""
        import torch

        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.steps, self.parts = folder, steps, parts
        self.rng = np.random.default_rng(0)
        self.step, self.spent, self.photos, self._sums, self._count = 0, 0.0, 0, {}, 0
        self.file = folder / "checkpoint.pt"
        if self.file.exists():
            state = torch.load(self.file, weights_only=True)
            for name, part in parts.items():
                part.load_state_dict(state[name])
            self.step, self.spent, self.photos = state["step"], state["spent"], state["photos"]
            self.rng.bit_generator.state = json.loads(state["rng"])
            torch.set_rng_state(state["torch_rng"])
            print(f"resumed at step {self.step}", flush=True)
        self._last = time.time()
        self._saved = self.spent

    @property
    def progress(self) -> float:
        """The fraction of the steps that is done, in [0, 1]."""
        return self.step / self.steps

    def advance(self, photos: int, **values: float) -> None:
        """Counts a step; logs the mean of the values every 50 steps and saves every two minutes."""
        now = time.time()
        self.spent += now - self._last
        self._last = now
        self.step += 1
        self.photos += photos
        self._count += 1
        for name, value in values.items():
            self._sums[name] = self._sums.get(name, 0.0) + float(value)
        if self.step % 50 == 0:
            line = {"step": self.step, "minutes": round(self.spent / 60.0, 2), "photos": self.photos}
            line |= {name: round(value / self._count, 4) for name, value in self._sums.items()}
            with (self.folder / "curve.jsonl").open("a") as file:
                file.write(json.dumps(line) + "\n")
            print(line, flush=True)
            self._sums, self._count = {}, 0
        if self.spent - self._saved > 120.0 or self.progress >= 1.0:
            self.save()

    def save(self) -> None:
        import torch

        state = {name: part.state_dict() for name, part in self.parts.items()}
        state |= {"step": self.step, "spent": self.spent, "photos": self.photos}
        state |= {"rng": json.dumps(self.rng.bit_generator.state), "torch_rng": torch.get_rng_state()}
        part = self.file.with_suffix(".part")
        torch.save(state, part)
        part.rename(self.file)
        self._saved = self.spent


def set_rate(optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate


def cosine(progress: float, high: float, low: float, warmup: float = 0.02) -> float:
    """A learning rate: linear warm-up, then half a cosine from high to low."""
    if progress < warmup:
        return high * (progress / warmup) + low
    return low + (high - low) * 0.5 * (1.0 + float(np.cos(np.pi * (progress - warmup) / (1.0 - warmup))))


def decayed_groups(models: list, weight_decay: float) -> list[dict]:
    """Parameter groups: matrices with weight decay; biases, norms and embedding tables without."""
    decay, plain = [], []
    for model in models:
        for name, parameter in model.named_parameters():
            matrix = parameter.ndim >= 2 and "embed" not in name and "token" not in name
            (decay if matrix else plain).append(parameter)
    return [{"params": decay, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]


def average(target, source, keep: float) -> None:
    """Sets target = keep * target + (1 - keep) * source for all weights and floating-point buffers."""
    import torch

    with torch.no_grad():
        source_state = source.state_dict()
        for name, value in target.state_dict().items():
            if value.is_floating_point():
                value.lerp_(source_state[name], 1.0 - keep)
            else:
                value.copy_(source_state[name])


# CLIP: photos and their captions ------------------------------------------------------------------------------------


def square(photo: np.ndarray, rng: np.random.Generator, side: int, smallest: float) -> np.ndarray:
    """A random square crop of at least ``smallest`` of the short side, uint8 [side, side, 3], randomly flipped."""
    from PIL import Image

    height, width = photo.shape[:2]
    crop = min(height, width) * rng.uniform(smallest, 1.0)
    left, top = rng.uniform(0.0, width - crop), rng.uniform(0.0, height - crop)
    image = Image.fromarray(photo).resize((side, side), Image.BICUBIC, (left, top, left + crop, top + crop))
    pixels = np.asarray(image)
    return pixels[:, ::-1] if rng.random() < 0.5 else pixels


def all_templates() -> list[str]:
    """The templates of `demo_captions` twice and open_clip's 80, as sentences with one {}."""
    from demo_captions import TEMPLATES
    from open_clip import OPENAI_IMAGENET_TEMPLATES

    return list(TEMPLATES) * 2 + [template("{}") for template in OPENAI_IMAGENET_TEMPLATES]


def untrained_clip() -> tuple:
    """The CLIP model of the demo with random weights, in float32 and train mode, and its tokenizer."""
    import open_clip

    from namedmask.demo.models import CLIP_NAME, register

    register()
    return open_clip.create_model(CLIP_NAME, pretrained=None).train(), open_clip.get_tokenizer(CLIP_NAME)


def train_clip(arguments: argparse.Namespace) -> None:
    """Trains with CLIP's contrastive loss; photos with equal captions are all positives of that caption.

    In most batches all captions are plain and follow one template, so they differ only in the names of the objects. In
    the others each photo has its own template and words about color, pattern and background.
    """
    import copy

    import torch
    import torch.nn.functional as F

    torch.set_num_threads(arguments.threads)
    torch.manual_seed(1)
    pool = Pool(arguments.out / "pool")
    model, tokenizer = untrained_clip()
    side = model.visual.image_size
    side = side[0] if isinstance(side, tuple) else side
    model = model.to(memory_format=torch.channels_last)
    smooth = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(decayed_groups([model], 0.05), betas=(0.9, 0.98), eps=1e-6)
    run = Run(arguments.out / "clip", arguments.steps, {"model": model, "smooth": smooth, "optimizer": optimizer})
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)
    templates, tokens = all_templates(), {}
    while run.progress < 1.0:
        rng = run.rng
        set_rate(optimizer, cosine(run.progress, arguments.rate, 1e-5))
        chosen = rng.integers(0, len(pool), arguments.batch)
        photos = np.stack([square(pool[i], rng, side, 0.72) for i in chosen])
        photos = torch.from_numpy(photos).permute(0, 3, 1, 2).float() / 255.0
        tint = torch.from_numpy(rng.uniform(0.75, 1.25, (len(chosen), 3, 1, 1)).astype(np.float32))
        shift = torch.from_numpy(rng.uniform(-0.1, 0.1, (len(chosen), 1, 1, 1)).astype(np.float32))
        photos = (((photos * tint + shift).clamp(0.0, 1.0) - mean) / std).to(memory_format=torch.channels_last)
        if rng.random() < 0.85:
            template = templates[rng.integers(len(templates))]
            texts = [template.format(pool.phrases[i][0]) for i in chosen]
        else:
            texts = [
                templates[rng.integers(len(templates))].format(pool.phrases[i][rng.integers(1, 1 + DESCRIPTIONS)])
                for i in chosen
            ]
        unique = sorted(set(texts))
        place = {text: index for index, text in enumerate(unique)}
        own = torch.tensor([place[text] for text in texts])
        for text in unique:
            if text not in tokens:
                tokens[text] = tokenizer([text])[0]
        image_features = model.encode_image(photos, normalize=True)
        text_features = model.encode_text(torch.stack([tokens[text] for text in unique]), normalize=True)
        logits = model.logit_scale.exp() * image_features @ text_features.T  # [photos, different captions]
        same = F.one_hot(own, len(unique)).float()
        # A caption of several photos counts as often as it occurs.
        from_photo = F.cross_entropy(logits + same.sum(0).log(), own)
        from_text = -(logits.log_softmax(0) * same / same.sum(0)).sum(0)
        from_text = (from_text * same.sum(0)).sum() / len(texts)
        loss = 0.5 * (from_photo + from_text)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0.0, 4.6)
        average(smooth, model, min(0.99, 1.0 - 1.0 / (run.step + 2)))
        hit = (logits.argmax(1) == own).float().mean()
        run.advance(len(chosen), loss=loss.item(), hit=hit.item(), scale=model.logit_scale.exp().item())


# ViT: photos alone --------------------------------------------------------------------------------------------------


class View(NamedTuple):
    """A crop of a photo: its box in pixels of the photo, resized to a square, in one of the 8 orientations."""

    pixels: np.ndarray
    left: float
    top: float
    side: float
    swapped: bool
    mirrored: bool
    inverted: bool

    def to_crop(self, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Maps positions in the view to positions in the unflipped crop, both from 0 to 1."""
        x, y = (1.0 - x if self.mirrored else x), (1.0 - y if self.inverted else y)
        return (y, x) if self.swapped else (x, y)

    def from_crop(self, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The inverse of `to_crop`."""
        x, y = (y, x) if self.swapped else (x, y)
        return (1.0 - x if self.mirrored else x), (1.0 - y if self.inverted else y)


def crop(photo: np.ndarray, rng: np.random.Generator, low: float, high: float, pixels: int) -> View:
    """A random square crop whose side is between `low` and `high` of the photo's short side."""
    from PIL import Image

    height, width = photo.shape[:2]
    side = min(height, width) * rng.uniform(low, high)
    left, top = rng.uniform(0.0, width - side), rng.uniform(0.0, height - side)
    image = Image.fromarray(photo).resize((pixels, pixels), Image.BICUBIC, (left, top, left + side, top + side))
    # All 8 orientations of a square: otherwise vertical position is the easiest thing for two views to agree on.
    swapped, mirrored, inverted = (bool(bit) for bit in rng.integers(0, 2, 3))
    array = np.asarray(image)
    array = array.transpose(1, 0, 2) if swapped else array
    array = array[:, ::-1] if mirrored else array
    array = array[::-1] if inverted else array
    return View(array, left, top, side, swapped, mirrored, inverted)


def recolor(views, rng: np.random.Generator, strength: float):
    """Random colors and light for each view: float [n, 3, h, w] in [0, 1] -> the same shape and range.

    A random matrix rotates the hue and scales the saturation, some views become gray, and uneven light is multiplied
    in: without it, brightness is most of what tokens encode. ``strength`` is the fraction of views whose hue is rotated
    by any angle; half as many become negatives. A larger value leaves less of the colors and more of the contrast with
    the surroundings in common between two views, and slows the training down.
    """
    import torch
    from torch import nn

    count, (height, width) = len(views), views.shape[-2:]
    gray = np.full((3, 3), 1.0 / 3.0)
    matrices = []
    for _ in range(count):
        angle = rng.uniform(-np.pi, np.pi) if rng.random() < strength else rng.uniform(-0.5, 0.5)
        saturation = 0.0 if rng.random() < 0.12 else rng.uniform(0.5, 1.6)
        sign = -1.0 if rng.random() < 0.5 * strength else 1.0
        c, s = np.cos(angle), np.sin(angle) / np.sqrt(3.0)
        turn = np.array([[0, -s, s], [s, 0, -s], [-s, s, 0]])
        matrices.append(sign * (gray + saturation * (c * (np.eye(3) - gray) + turn)))
    rotated = torch.einsum("nij,njhw->nihw", torch.tensor(np.array(matrices), dtype=torch.float32), views)

    def draw(low: float, high: float) -> torch.Tensor:
        return torch.from_numpy(rng.uniform(low, high, (count, 1, 1, 1)).astype(np.float32))

    middle = rotated.mean((1, 2, 3), keepdim=True)
    light = torch.from_numpy(rng.uniform(0.55, 1.45, (count, 1, 3, 3)).astype(np.float32))
    light = nn.functional.interpolate(light, (height, width), mode="bilinear", align_corners=True)
    result = ((rotated - middle) * draw(0.7, 1.4) + draw(0.3, 0.65)) * light
    return (result + torch.randn_like(result) * draw(0.0, 0.03)).clamp(0.0, 1.0)


def block_mask(rng: np.random.Generator, count: int, grid: int, low: float, high: float) -> np.ndarray:
    """Masks for the student, bool [count, grid * grid], of 2 x 2 blocks that cover `low` to `high` of a view."""
    half = (grid + 1) // 2
    fraction = rng.uniform(low, high, (count, 1, 1)) * (rng.random((count, 1, 1)) < 0.7)
    coarse = rng.random((count, half, half)) < fraction
    return coarse.repeat(2, 1).repeat(2, 2)[:, :grid, :grid].reshape(count, -1)


def positions_in(target: View, source: View, grid: int) -> np.ndarray:
    """Positions (x, y) of the patch centers of ``target`` in ``source``, float32 [grid, grid, 2]; inside in [-1, 1]."""
    at = ((np.arange(grid) + 0.5) / grid).astype(np.float64)
    x, y = target.to_crop(*np.meshgrid(at, at))
    x, y = target.left + target.side * x, target.top + target.side * y
    x, y = source.from_crop((x - source.left) / source.side, (y - source.top) / source.side)
    return np.stack([x * 2.0 - 1.0, y * 2.0 - 1.0], -1).astype(np.float32)


def make_head(width: int, out: int, hidden: int | None = None):
    """A small DINO head: tokens [..., width] -> a normalized code -> its cosines with ``out`` unit prototypes.

    Without ``hidden`` the code is the token itself, so that the loss acts on the very features that the cut compares.
    """
    import torch
    from torch import nn
    from torch.nn.utils.parametrizations import weight_norm

    class Unit(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.normalize(x, dim=-1)

    code = [] if hidden is None else [nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, 64)]
    last = weight_norm(nn.Linear(width if hidden is None else 64, out, bias=False))
    last.parametrizations.weight.original0.data.fill_(1.0)
    last.parametrizations.weight.original0.requires_grad_(False)
    return nn.Sequential(*code, Unit(), last)


class SelfDistillation:
    """Student, teacher and their heads. The teacher is the moving average of the student and provides the targets."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        import copy

        import torch
        from torch import nn

        from namedmask.demo.models import untrained_vit

        vit = untrained_vit().train()
        self.student = nn.ModuleDict(
            {
                "vit": vit,
                "whole": make_head(vit.embed_dim, arguments.whole, 256),
                "place": make_head(vit.embed_dim, arguments.place),
            }
        )
        self.student.mask_token = nn.Parameter(torch.zeros(vit.embed_dim))
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)
        self.centers = nn.ParameterDict({"place": torch.zeros(arguments.place)}).requires_grad_(False)
        self.own_mean, self.blur = arguments.own_mean, arguments.blur

    def encode(self, side, views, hidden=None):
        """Views [n, 3, h, w] -> tokens after the final norm [n, 1 + h' * w', C]; hidden patches get the mask token."""
        vit = side["vit"]
        patches = vit.patch_embed(views)  # [n, h', w', C]
        if hidden is not None:
            patches = patches.where(~hidden.view(*patches.shape[:3], 1), side.mask_token)
        tokens = vit.norm_pre(vit.patch_drop(vit._pos_embed(patches)))
        return vit.norm(vit.blocks(tokens))

    def soften(self, places):
        """Mixes patches [n, P, C] with their neighborhood, so that a tile and its joint become one floor."""
        from torch import nn

        side = round(places.shape[1] ** 0.5)
        maps = places.transpose(1, 2).unflatten(2, (side, side))
        around = nn.functional.avg_pool2d(nn.functional.pad(maps, (1, 1, 1, 1), mode="replicate"), 3, 1)
        return maps.lerp(around, self.blur).flatten(2).transpose(1, 2)

    def targets(self, views, temperature: float):
        """The teacher's probabilities for whole views [n, K] and for patches [n, P, K'], and its tokens [n, P, C]."""
        import torch

        with torch.no_grad():
            tokens = self.encode(self.teacher, views)
            whole = self.teacher["whole"](tokens[:, 0])
            place = self.teacher["place"](tokens[:, 1:])
            # The difference of a patch from the rest of its photo, not what all patches of the photo share.
            place = place - self.own_mean * place.mean(1, keepdim=True)
            place = self.soften(place)
            # DINO's temperature is constant because its logits grow in the first epochs, which a run of minutes does
            # not have. Dividing by the standard deviation of the logits makes the targets equally sharp from the first
            # step on. Whole views are centered on their batch: a slow average lags behind at the start, and all views
            # collapse into one prototype.
            self.centers["place"].lerp_(place.mean((0, 1)), 0.05)
            whole_off, place_off = whole - whole.mean(0), place - self.centers["place"]
            sharp = (
                (whole_off / (whole_off.std() * temperature + 1e-6)).softmax(-1),
                (place_off / (place_off.std() * temperature + 1e-6)).softmax(-1),
            )
            return *sharp, self.soften(tokens[:, 1:] - tokens[:, 1:].mean(1, keepdim=True))


def train_vit(arguments: argparse.Namespace) -> None:
    """Trains by self-distillation: DINO's with multi-crop for whole views, iBOT's for patches.

    The teacher gets one crop of each photo. The student gets another crop with hidden 2 x 2 blocks of patches, and
    small crops, each with other colors. The student's prediction for the whole view must agree with the teacher's
    (DINO), and so must its prediction for each patch that both views show (as in iBOT, but between two crops: the
    position in the view differs, so only content can agree).
    """
    import torch
    import torch.nn.functional as F

    torch.set_num_threads(arguments.threads)
    torch.manual_seed(2)
    pool = Pool(arguments.out / "pool")
    model = SelfDistillation(arguments)
    student, teacher = model.student, model.teacher
    optimizer = torch.optim.AdamW(decayed_groups([student], 0.04))
    parts = {"student": student, "teacher": teacher, "centers": model.centers, "optimizer": optimizer}
    run = Run(arguments.out / arguments.name, arguments.steps, parts)
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    big, small = arguments.big, arguments.small
    grid, small_grid = big // 8, small // 8

    def tensor(views: list[View], rng: np.random.Generator) -> torch.Tensor:
        pixels = np.stack([view.pixels for view in views])
        pixels = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255.0
        return (recolor(pixels, rng, arguments.colors) - mean) / std

    def seen_by_both(at, target):
        """Which positions [n, p, 2] are in the teacher's view [n, p], and its targets there [n, p, C]."""
        size = round(target.shape[1] ** 0.5)
        maps = target.transpose(1, 2).unflatten(2, (size, size))
        sampled = F.grid_sample(maps, at[:, None], align_corners=False, padding_mode="border")[:, :, 0].transpose(1, 2)
        return (at.abs() < 1.0).all(-1), sampled

    def spread_loss(tokens, at, target):
        """Barlow Twins' loss on centered tokens: channels agree between views and are decorrelated from each other.

        Without it, one easy channel, brightness relative to the photo's mean, dominates the tokens and the cut.
        """
        inside, sampled = seen_by_both(at, target)
        ours, theirs = (tokens - tokens.mean(1, keepdim=True))[inside], sampled[inside]
        ours = (ours - ours.mean(0)) / (ours.std(0) + 1e-4)
        theirs = (theirs - theirs.mean(0)) / (theirs.std(0) + 1e-4)
        cross = ours.T @ theirs / len(ours)
        diagonal = cross.diagonal()
        return ((1.0 - diagonal) ** 2).mean() + 0.03 * (cross.pow(2).sum() - diagonal.pow(2).sum()) / len(cross)

    def place_loss(tokens, at, target):
        """Cross-entropy at the positions [n, p, 2] that are inside the teacher's square view [n, P, K]."""
        inside, sampled = seen_by_both(at, target)
        logits = student["place"](tokens[inside]) / 0.1
        return -(sampled[inside] * logits.log_softmax(-1)).sum(-1).mean()

    while run.progress < 1.0:
        rng = run.rng
        set_rate(optimizer, cosine(run.progress, arguments.rate, 1e-5, 0.04))
        chosen = [pool[i] for i in rng.integers(0, len(pool), arguments.batch)]
        first = [crop(photo, rng, 0.4, 1.0, big) for photo in chosen]
        second = [crop(photo, rng, 0.4, 1.0, big) for photo in chosen]
        locals_ = [[crop(photo, rng, 0.2, 0.45, small) for photo in chosen] for _ in range(arguments.locals)]
        target_whole, target_place, target_tokens = model.targets(tensor(first, rng), arguments.temperature)
        hidden = torch.from_numpy(block_mask(rng, len(chosen), grid, 0.15, 0.5))
        tokens = model.encode(student, tensor(second, rng), hidden)
        at = np.stack([positions_in(b, a, grid).reshape(-1, 2) for a, b in zip(first, second, strict=True)])
        place = place_loss(tokens[:, 1:], torch.from_numpy(at), target_place)
        spread = spread_loss(tokens[:, 1:], torch.from_numpy(at), target_tokens)
        whole = -(target_whole * (student["whole"](tokens[:, 0]) / 0.1).log_softmax(-1)).sum(-1).mean()
        wholes, places = [whole], [place]
        if locals_:
            tokens = model.encode(student, tensor([view for views in locals_ for view in views], rng))
            for index, views in enumerate(locals_):
                part = tokens[index * len(chosen) : (index + 1) * len(chosen)]
                at = np.stack(
                    [positions_in(b, a, small_grid).reshape(-1, 2) for a, b in zip(first, views, strict=True)]
                )
                places.append(place_loss(part[:, 1:], torch.from_numpy(at), target_place))
                log = (student["whole"](part[:, 0]) / 0.1).log_softmax(-1)
                wholes.append(-(target_whole * log).sum(-1).mean())
        whole, place = torch.stack(wholes).mean(), torch.stack(places).mean()
        loss = arguments.whole_weight * whole + place + arguments.spread_weight * spread
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        keep = 1.0 - (1.0 - arguments.keep) * 0.5 * (1.0 + float(np.cos(np.pi * run.progress)))
        average(teacher, student, min(keep, 1.0 - 1.0 / (run.step + 2)))
        mean_place = target_place.mean((0, 1))
        sure = -(target_place * (target_place + 1e-9).log()).sum(-1).mean()
        run.advance(
            len(chosen), loss=loss.item(), whole=whole.item(), place=place.item(),
            spread=spread.item(),
            used=(-(mean_place * (mean_place + 1e-9).log()).sum()).exp().item(), entropy=sure.item(),
        )  # fmt: skip


# The files in the package -------------------------------------------------------------------------------------------


def export(arguments: argparse.Namespace) -> None:
    """Writes the averaged CLIP and the ViT teacher of the newest checkpoints to namedmask/demo/weights, as fp16."""
    import torch
    from safetensors.torch import save_file

    from namedmask.demo.models import CLIP_WEIGHTS, VIT_WEIGHTS

    CLIP_WEIGHTS.parent.mkdir(parents=True, exist_ok=True)
    half = lambda tensor: (tensor.half() if tensor.is_floating_point() else tensor).contiguous()  # noqa: E731
    checkpoint = arguments.out / "clip" / "checkpoint.pt"
    if checkpoint.exists():
        weights = {name: half(value) for name, value in torch.load(checkpoint, weights_only=True)["smooth"].items()}
        # Most of the token table is never used in training: zeros there cost nothing in a compressed wheel.
        tokenizer, seen = untrained_clip()[1], set()
        for phrase in {phrase for phrases in Pool(arguments.out / "pool").phrases for phrase in phrases}:
            seen.update(tokenizer([phrase])[0].tolist())
        for template in all_templates():
            seen.update(tokenizer([template.format("x")])[0].tolist())
        table = weights["token_embedding.weight"]
        table[[token for token in range(len(table)) if token not in seen]] = 0.0
        save_file(weights, CLIP_WEIGHTS)
        print(f"{CLIP_WEIGHTS}: {CLIP_WEIGHTS.stat().st_size / 1e6:.1f} MB")
    checkpoint = arguments.out / arguments.name / "checkpoint.pt"
    if checkpoint.exists():
        weights = torch.load(checkpoint, weights_only=True)["teacher"]
        save_file({name[4:]: half(value) for name, value in weights.items() if name.startswith("vit.")}, VIT_WEIGHTS)
        print(f"{VIT_WEIGHTS}: {VIT_WEIGHTS.stat().st_size / 1e6:.1f} MB")


# SelfMask: photos and their detected masks ----------------------------------------------------------------------------


def train_selfmask(arguments: argparse.Namespace) -> None:
    """Trains on the best masks of the cut on photos of the pool; then repeatedly on the network's own masks."""
    import torch
    from PIL import Image
    from safetensors.torch import load_file, save_file

    from namedmask import run
    from namedmask.demo.models import SELFMASK_WEIGHTS, VIT_NAME
    from namedmask.demo.run import DETECTOR, REFINE, SPECTRAL

    torch.set_num_threads(arguments.threads)
    photos = arguments.out / "photos" / "pool"
    photos.mkdir(parents=True, exist_ok=True)
    pool = Pool(arguments.out / "pool")
    for number in range(min(len(pool), arguments.photos)):
        if not (path := photos / f"{number:05}.png").exists():
            Image.fromarray(pool[number]).save(path.with_suffix(".part"), "png", compress_level=1)
            path.with_suffix(".part").rename(path)
    weights = arguments.start and str(arguments.start.absolute())
    detector = (DETECTOR | {"weights": weights} if weights else SPECTRAL) | {"select": arguments.select}
    for turn, (keep, steps) in enumerate(zip(arguments.keep, arguments.steps, strict=True)):
        out = arguments.out / f"{arguments.name}{turn}"
        training = {
            "backbone": VIT_NAME, "init_checkpoint": weights, "num_queries": 10, "decoder_layers": 3,
            "keep_fraction": keep, "paste_prob": arguments.paste, "texture_prob": arguments.texture, "steps": steps,
            "views": "crop", "crop_size": 112, "scale": (0.25, 1.0), "loss": "mean", "batch_size": 20, "lr": 8e-4,
            "encoder_lr": 3e-4, "warmup_steps": 50, "clip_grad_norm": 1.0, "weight_decay": 0.02,
        }  # fmt: skip
        given = {"photos": str(photos.parent.absolute()), "detector": detector, "refine": REFINE, "saliency": training}
        run.start(out, given, ["archive", "pseudolabel"], workers=arguments.workers, gpus=0)
        run.start(out, given, ["train-saliency"], gpus=0)
        weights = str((out / "saliency" / "model.safetensors").absolute())
        detector = DETECTOR | {"weights": weights, "select": arguments.select}
    save_file({name: value.half() for name, value in load_file(weights).items()}, SELFMASK_WEIGHTS)
    print(f"{SELFMASK_WEIGHTS}: {SELFMASK_WEIGHTS.stat().st_size / 1e6:.1f} MB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    pool = commands.add_parser("pool", help="render the photos once")
    pool.add_argument("--photos", type=int, default=24000)
    pool.add_argument("--workers", type=int, default=2)
    pool.set_defaults(run=make_pool)
    clip = commands.add_parser("clip", help="train the CLIP on photos and captions")
    clip.add_argument("--batch", type=int, default=128)
    clip.add_argument("--rate", type=float, default=2e-3)
    clip.set_defaults(run=train_clip, steps=3000)
    vit = commands.add_parser("vit", help="train the ViT on photos alone")
    vit.add_argument("--name", default="vit", help="folder of this training in the work folder")
    vit.add_argument("--batch", type=int, default=24)
    vit.add_argument("--rate", type=float, default=2e-3)
    vit.add_argument("--big", type=int, default=80, help="side of the large crops in pixels")
    vit.add_argument("--small", type=int, default=40, help="side of the small crops in pixels")
    vit.add_argument("--locals", type=int, default=1, help="small crops per photo")
    vit.add_argument("--whole", type=int, default=256, help="prototypes for whole views")
    vit.add_argument("--place", type=int, default=64, help="prototypes for patches")
    vit.add_argument("--own-mean", type=float, default=1.0, help="fraction of the mean logits of a photo to subtract")
    vit.add_argument("--colors", type=float, default=0.1, help="how strongly views are recolored, from 0 to 1")
    vit.add_argument("--blur", type=float, default=0.75, help="weight of the 3 x 3 neighborhood in a patch's target")
    vit.add_argument("--whole-weight", type=float, default=0.5)
    vit.add_argument("--spread-weight", type=float, default=2.0)
    vit.add_argument(
        "--temperature", type=float, default=0.35, help="of the teacher, in standard deviations of its logits"
    )
    vit.add_argument("--keep", type=float, default=0.99, help="the teacher's momentum at the start; rises to 1")
    vit.set_defaults(run=train_vit, steps=12000)
    files = commands.add_parser("export", help="write the package's weights from the newest checkpoints")
    files.add_argument("--name", default="vit", help="folder of the ViT's training in the work folder")
    files.set_defaults(run=export)
    mask = commands.add_parser("selfmask", help="train the SelfMask on masks detected in the pool")
    mask.add_argument("--photos", type=int, default=8000, help="number of photos of the pool")
    mask.add_argument("--name", default="selfmask", help="prefix of the folder of each turn")
    mask.add_argument("--start", type=Path, help="a network that makes the masks of the first turn, instead of the cut")
    mask.add_argument("--select", choices=("none", "prior"), default="none", help="how masks are selected")
    mask.add_argument(
        "--keep",
        type=float,
        nargs="+",
        default=[0.25, 0.5, 0.6, 0.7, 0.8],
        help="fraction of the masks used in each turn",
    )
    mask.add_argument("--paste", type=float, default=0.5, help="fraction of objects pasted on another background")
    mask.add_argument("--texture", type=float, default=0.0, help="fraction of objects with a texture of another photo")
    mask.add_argument("--steps", type=int, nargs="+", default=[400, 500, 700, 2000, 1400], help="steps of each turn")
    mask.add_argument("--threads", type=int, default=1)
    mask.add_argument("--workers", type=int, default=1, help="number of processes that detect masks")
    mask.set_defaults(run=train_selfmask)
    for command in (clip, vit):
        command.add_argument("--steps", type=int, help="length of the learning-rate schedule, resumed steps included")
        command.add_argument("--threads", type=int, default=1)
    for command in commands.choices.values():
        command.add_argument("--out", type=Path, required=True, help="work folder, outside the repository")
    arguments = parser.parse_args()
    arguments.run(arguments)


if __name__ == "__main__":
    from namedmask.console import printing

    with printing():
        main()
