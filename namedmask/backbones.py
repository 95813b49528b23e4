# SPDX-License-Identifier: MIT
"""Networks of timm: ViTs that extract features from ragged batches, and encoders for dense prediction.

`load` returns a `Backbone`, a ViT for photos of any shapes without padding. The tokens of all photos are packed in one
matrix [T, C]. Only attention treats the photos separately; all other layers process the rows in chunks, so that their
intermediate results stay in the cache. The modules and the interpolation of position embeddings are timm's own, so the
features equal timm's up to rounding.

`load_encoder` returns an `Encoder`, a convolutional network dilated to output stride 8 or a ViT, as the start of a
training.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from namedmask_kernels import Ragged, backends, resize

from . import attention, hub, linear, registry
from . import weights as stored
from .errors import UserError, first_line

# If the aspect ratio is larger, the photo is resized by its long side: otherwise, a strip of 1 x 10,000 patches would
# cost as much as twenty photos.
MAX_ASPECT = 4

Interpolation = Literal["bicubic", "bilinear"]
PatchFit = Literal["stretch", "pad"]

TAPS = ("tokens", "keys", "queries", "values", "cls_attention")

_NOT_DENSE = "cannot be dilated to output stride 8 with features of stride 4; choose a ResNet, ConvNeXt or ViT of timm"
_NO_VIT = "is not a ViT with fused QKV projections for photos of any shape; choose a DINO, DINOv2 or DINOv3 of timm"

Vit = Any  # a VisionTransformer or Eva of timm, or one of its modules, whose attributes nn.Module does not declare


class Backbone:
    """A ViT for photos of any shapes; created by `load`."""

    def __init__(
        self,
        model: Vit,
        device: torch.device,
        dtype: torch.dtype,
        interpolation: Interpolation = "bicubic",
        patch_fit: PatchFit = "stretch",
    ):
        self.interpolation, self.patch_fit = interpolation, patch_fit
        self.device, self.attention_dtype, self.dtype = device, dtype, linear.choose(device, dtype)
        self.model: Vit = model.eval().requires_grad_(False).to(device, self.dtype)
        self.attention, self.linear = attention.choose(device, dtype), linear.Layers(device)
        self.fused = backends.obstacle("attention_features", "triton", device) is None  # kernels of block_layers
        self.patch: int = model.patch_embed.patch_size[0]
        self.prefix: int = model.num_prefix_tokens
        cfg = model.pretrained_cfg
        self.mean, self.std = tuple(cfg["mean"]), tuple(cfg["std"])
        # Each stream has position embeddings of its own, since another stream's may not be computed yet.
        self.position_tokens = functools.lru_cache(maxsize=64)(lambda h, w, stream: self._position_tokens(h, w))

    def fit(self, size: tuple[int, int], image_size: int) -> Fit:
        """How a photo of this height and width fits into patches if its short side becomes `image_size` pixels."""
        if self.patch_fit == "stretch":
            scale = min(image_size / min(size), MAX_ASPECT * image_size / max(size)) / self.patch
            h, w = (max(1, round(side * scale)) for side in size)
            return Fit((h * self.patch, w * self.patch), (h, w), self.patch)
        # Rounded down, as torchvision does; in integers, so that the short side is exact.
        new, old = min((image_size, min(size)), (MAX_ASPECT * image_size, max(size)), key=lambda x: x[0] / x[1])
        h, w = (max(1, side * new // old) for side in size)
        return Fit((h, w), (-(-h // self.patch), -(-w // self.patch)), self.patch)

    def resize(self, images: Ragged, image_size: int) -> Ragged:
        """Resizes photos, with uint8 rows [P, 3], to the sizes of `fit`, with an antialiasing filter."""
        return resize(images, self._sizes(images, image_size), interpolation=self.interpolation)

    def prepare(self, images: Ragged, image_size: int) -> Ragged:
        """Resizes and normalizes photos and cuts them into patches.

        Args:
            images: uint8 rows [P, 3] on the device.
            image_size: Short side in pixels. The aspect ratio is kept, up to a patch if `patch_fit` is "stretch".

        Returns:
            The patches, rows [T, 3 * patch * patch] on the patch grids: the pixels of each channel in raster order.
            With `patch_fit` "pad" the last patches reach beyond the photo; there they are 0, the mean color.
        """
        sizes = self._sizes(images, image_size)
        return resize(
            images, sizes, interpolation=self.interpolation, mean=self.mean, std=self.std, patch=self.patch,
            dtype=self.dtype,
        )  # fmt: skip

    def _sizes(self, images: Ragged, image_size: int) -> list[tuple[int, int]]:
        return [self.fit((h, w), image_size).size for h, w in images.shapes.tolist()]

    @torch.inference_mode()
    def extract(self, patches: Ragged, taps: Sequence[str]) -> dict[str, Ragged]:
        """Extracts features of any blocks in one pass over photos of any shapes.

        On a CPU the results do not depend on batch composition; on a GPU they differ by rounding. Blocks after the last
        tapped one do not run, and the last tapped block computes only the requested features. Photos of equal shape are
        fastest if they stand together.

        Args:
            patches: Normalized patches of photos of any shapes, from `prepare`.
            taps: Names of `TAPS`. A name alone means the last block; "keys.8" means block 8, counted from 0.

                - ``tokens`` [T, C]: output of the block; for the last block after the final norm.
                - ``queries``, ``keys``, ``values`` [T, H * D]: the projections, heads concatenated, before any rotary
                  embedding.
                - ``cls_attention`` [T, H]: softmax weights of the CLS query on the patches in each head. Together with
                  the weights on CLS and register tokens they sum to 1.

        Returns:
            For each tap a Ragged of float32 rows on the patch grids, without CLS and register tokens.

        Raises:
            ValueError: If a tap is unknown.
            UserError: If CLS attention is requested and the ViT has no CLS token.
            RuntimeError: If `patches` require a gradient.
            FloatingPointError: If a feature of any photo is NaN or infinite.
        """
        if patches.rows.requires_grad:
            raise RuntimeError("extract has no gradient; pass detached patches")
        requested = {tap: self._parse(tap) for tap in taps}
        last = max((number for number, _ in requested.values()), default=-1)
        steps = []
        for number in range(last + 1):
            names = {name for block, name in requested.values() if block == number}
            steps.append(_Step(self.model.blocks[number], names, whole=number < last or "tokens" in names))
        batch = self._embed(patches, steps[0] if steps else None)
        features: dict[tuple[int, str], Tensor] = {}
        for number, step in enumerate(steps):
            following = steps[number + 1] if number < last else None
            features |= {(number, name): rows for name, rows in self._run(step, following, batch).items()}
        extremes = [x for rows in features.values() if rows.numel() for x in rows.aminmax()]  # NaN if any value is NaN
        if extremes and not torch.stack(extremes).isfinite().all():
            raise FloatingPointError("the backbone's features are NaN or infinite")
        return {tap: patches.with_rows(features[key]) for tap, key in requested.items()}

    def explain(self) -> str:
        """Says which libraries compute attention and, on a CPU, linear layers, in which dtype, and why."""
        text = attention.explain(self.device, self.attention_dtype)
        if self.device.type == "cpu":
            text += "\n" + linear.explain(self.device, self.attention_dtype)
        return text

    def _parse(self, tap: str) -> tuple[int, str]:
        """Block and name in TAPS: (8, "keys") for "keys.8"."""
        name, _, number = tap.partition(".")
        depth = len(self.model.blocks)
        if name not in TAPS or not (number or "0").isdecimal() or int(number or 0) >= depth:
            raise ValueError(
                f"extract: expected a tap of {', '.join(TAPS)}, alone or with a block from 0 to {depth - 1} as in "
                f"'keys.{depth - 1}', got {tap!r}"
            )
        if name == "cls_attention" and getattr(self.model, "cls_token", None) is None:
            raise UserError("this backbone has no CLS token, so there is no cls_attention; choose another tap")
        return int(number or depth - 1), name

    def _position_tokens(self, h: int, w: int) -> tuple[Tensor, Tensor | None]:
        """Prefix tokens and position embeddings of a grid of patches, [prefix + h * w, C], and the rotary table."""
        zeros = torch.zeros(1, h, w, self.model.embed_dim, device=self.device, dtype=self.dtype)
        embedded = self.model._pos_embed(zeros)
        tokens, rotary = embedded if isinstance(embedded, tuple) else (embedded, None)
        return tokens[0], rotary

    def _embed(self, patches: Ragged, first: _Step | None) -> _Batch:
        """The tokens of a batch, and the projections that the first step takes."""
        model, attn = self.model, self.model.blocks[0].attn
        runs, ends, end = [], [0], 0
        for (h, w), photos in itertools.groupby(patches.shapes.tolist()):
            count = len(list(photos))
            begin, tokens = ends[-1], self.prefix + h * w
            ends += range(begin + tokens, begin + count * tokens + 1, tokens)
            runs.append(_Run((h, w), count, slice(begin, ends[-1]), slice(end, end := end + count * h * w)))
        chunk = self._chunk(ends[-1])
        rows = -(-ends[-1] // chunk) * chunk
        x = torch.empty(rows, model.embed_dim, device=self.device, dtype=self.dtype)
        x[ends[-1] :] = 0
        qkv = torch.empty(
            (rows, 3, attn.num_heads, len(attn.qkv.weight) // (3 * attn.num_heads)),
            device=self.device,
            dtype=self.attention_dtype,
        )
        rotary, embedded = None, self._embed_patches(patches.rows.to(self.dtype))
        stream = torch.cuda.current_stream(self.device).cuda_stream if self.device.type == "cuda" else 0
        for run in runs:
            tokens, table = self.position_tokens(*run.grid, stream)
            grid = x[run.tokens].unflatten(0, (run.photos, -1))
            grid[:, : self.prefix] = tokens[: self.prefix]
            own = embedded[run.patches].unflatten(0, (run.photos, -1))
            torch.add(own, tokens[self.prefix :], out=grid[:, self.prefix :])
            if table is not None:  # sines and cosines; CLS and registers are rotated by an angle of 0
                if rotary is None:
                    rotary = table.new_zeros(rows, 1, 1, table.shape[1])
                    rotary[..., table.shape[1] // 2 :] = 1
                rotary[run.tokens].unflatten(0, (run.photos, -1))[:, self.prefix :, 0, 0] = table
        batch = _Batch(x, qkv, rotary, runs, chunk, ends, self.prefix)
        for chunk_x, target in zip(x.split(chunk), qkv.split(chunk), strict=True):
            if not isinstance(model.norm_pre, nn.Identity):
                chunk_x.copy_(model.norm_pre(chunk_x))
            if first is not None:
                self._project(attn, self._norm(first.block.norm1, chunk_x), first.parts, target)
        return batch

    def _chunk(self, rows: int) -> int:
        """Rows per call of a layer if a batch has `rows` rows.

        On a CPU always the same number: with few rows a BLAS sums in another order, so the features of a photo would
        depend on batch composition.
        """
        return self.linear.rows if self.device.type == "cpu" else max(1, rows)

    def _embed_patches(self, patches: Tensor) -> Tensor:
        """The patch embedding [T, C] of patches [T, 3 * patch * patch]: one matrix product for all photos."""
        embed, chunk = self.model.patch_embed, self._chunk(len(patches))
        embedded = [
            embed.norm(self._layer(embed.proj, _filled(rows, chunk)))[: len(rows)] for rows in patches.split(chunk)
        ]
        return embedded[0] if len(embedded) == 1 else torch.cat(embedded)

    def _run(self, step: _Step, following: _Step | None, batch: _Batch) -> dict[str, Tensor]:
        """The features that a step taps, from the projections in batch.qkv.

        If the block runs as a whole, updates batch.tokens in place and projects them for the following step.
        """
        attn, qkv = step.block.attn, batch.qkv
        features: dict[str, Tensor] = {}
        for index, name in enumerate(("queries", "keys", "values")):
            if name in step.names:
                features[name] = batch.on_patches(qkv[:, index].flatten(1))
        if step.fields:
            self._rotate(attn, qkv[:, slice(0 if step.whole else 1, 2)], batch)
            if "q" not in step.parts:
                self._project_cls(step.block, batch)
            output, rows = attention.attend(self.attention, qkv[: batch.ends[-1]], batch.ends, attn.scale, step.fields)
            if rows is not None:
                features["cls_attention"] = batch.on_patches(rows)
            if output is not None:
                self._finish(step, following, output.flatten(1), batch)
        if "tokens" in step.names:
            features["tokens"] = batch.on_patches(batch.tokens)
        return features

    def _finish(self, step: _Step, following: _Step | None, output: Tensor, batch: _Batch) -> None:
        """Runs a block after its attention, whose output is [T, H * D], up to the projections of the following step."""
        block, last = step.block, step.block is self.model.blocks[-1]
        norm = self.model.norm if last else None if following is None else following.block.norm1
        for x, y, target in zip(*(rows.split(batch.chunk) for rows in (batch.tokens, output, batch.qkv)), strict=True):
            y = self._layer(block.attn.proj, block.attn.norm(_filled(y.to(self.dtype), len(x))))
            normed = self._norm(block.norm2, x, y, _layer_scale(block, 1))
            y, scale = self._mlp(block.mlp, normed), _layer_scale(block, 2)
            if norm is None:
                _add(x, y, scale)
            elif last:
                x.copy_(self._norm(norm, x, y, scale))
            elif following is not None:
                self._project(following.block.attn, self._norm(norm, x, y, scale), following.parts, target)

    def _norm(self, norm: Vit, x: Tensor, y: Tensor | None = None, scale: Tensor | None = None) -> Tensor:
        """Adds scale * y to x in place and returns its norm; one kernel on a GPU."""
        if self.fused and isinstance(norm, nn.LayerNorm) and norm.weight is not None and norm.bias is not None:
            from namedmask_kernels.triton.block_layers import residual_norm

            return residual_norm(x, y, scale, norm.weight, norm.bias, norm.eps)
        if y is not None:
            _add(x, y, scale)
        return norm(x)

    def _mlp(self, mlp: Vit, x: Tensor) -> Tensor:
        from timm.layers import Mlp

        if type(mlp) is not Mlp:
            return mlp(x)
        activate: Callable[[Tensor], Tensor] = mlp.act
        in_product = type(mlp.act) is nn.GELU and mlp.act.approximate == "none" and self.linear.onednn
        if in_product:
            activate = nn.Identity()
        elif self.fused and type(mlp.act).__name__ == "GELU":
            from namedmask_kernels.triton.block_layers import gelu as activate
        return self._layer(mlp.fc2, mlp.norm(activate(self._layer(mlp.fc1, x, in_product))))

    def _layer(self, layer: Vit, x: Tensor, gelu: bool = False) -> Tensor:
        """The layer's product with x [n, C], plus its bias, and the GELU of that if requested."""
        return self.linear(x, layer.weight, layer.bias, gelu)

    def _project(self, attn: Vit, x: Tensor, parts: Sequence[str], out: Tensor) -> None:
        """Writes the projections `parts`, of "q", "k" and "v", of x [n, C] to out [n, 3, H, D]."""
        bias = _qkv_bias(attn)
        norms: tuple[Vit, ...] = attn.q_norm, attn.k_norm, nn.Identity()
        plain = all(isinstance(norm, nn.Identity) for norm in norms)
        straight = plain and x.dtype == out.dtype and not self.linear.onednn  # which has no output argument
        for part in [slice(3)] if len(parts) == 3 else [slice(i, i + 1) for i in map("qkv".index, parts)]:
            w = attn.qkv.weight if len(parts) == 3 else attn.qkv.weight.unflatten(0, (3, -1))[part].flatten(0, 1)
            b, target = None if bias is None else bias[part].flatten(), out[:, part]
            if straight and b is not None:
                torch.addmm(b, x, w.T, out=target.flatten(1))
            elif straight:
                torch.mm(x, w.T, out=target.flatten(1))
            else:
                projected = self.linear(x, w, b).view(target.shape)
                if plain:
                    target.copy_(projected)
                    continue
                for y, norm, own in zip(projected.unbind(1), norms[part], target.unbind(1), strict=True):
                    own.copy_(norm(y))

    def _rotate(self, attn: Vit, x: Tensor, batch: _Batch) -> None:
        """Applies the rotary embedding, if the network has one, to queries or keys [rows, ., H, D] in place."""
        from timm.layers import apply_rot_embed_cat

        if batch.rotary is None:
            return
        half = getattr(attn, "rotate_half", False)
        for rows, table in zip(x.split(batch.chunk), batch.rotary.split(batch.chunk), strict=True):
            rows.copy_(apply_rot_embed_cat(rows, table, half=half))

    def _project_cls(self, block: Vit, batch: _Batch) -> None:
        """Projects the queries of CLS alone, the first token of each photo, which is never rotated."""
        rows = self.linear.rows
        for starts in torch.tensor(batch.ends[:-1], dtype=torch.int64).split(rows):
            x = _filled(batch.tokens[starts], rows)
            target = batch.qkv.new_empty(rows, *batch.qkv.shape[1:])
            self._project(block.attn, block.norm1(x), "q", target)
            batch.qkv[starts, 0] = target[: len(starts), 0]


class Fit(NamedTuple):
    """How a resized photo lies on the patches of a backbone.

    Attributes:
        size: Height and width of the resized photo, in pixels.
        grid: Rows and columns of patches. The last ones may reach beyond the photo, into its padding.
        patch: Side of a patch, in pixels.
    """

    size: tuple[int, int]
    grid: tuple[int, int]
    patch: int

    @property
    def whole(self) -> tuple[int, int]:
        """Height and width of all patches, in pixels."""
        return self.grid[0] * self.patch, self.grid[1] * self.patch


class _Step:
    """A block and what it computes.

    Attributes:
        block: The block.
        names: Names in TAPS of the features that it is tapped for.
        whole: Whether it runs as a whole.
        parts: The projections that it takes, of "q", "k" and "v".
        fields: What its attention computes, of "output" and "rows".
    """

    def __init__(self, block: Vit, names: set[str], whole: bool):
        self.block, self.names, self.whole = block, names, whole
        needed = {"q": "queries" in names, "k": bool({"keys", "cls_attention"} & names), "v": "values" in names}
        self.parts = [part for part in "qkv" if whole or needed[part]]
        self.fields = ("output",) * whole + ("rows",) * ("cls_attention" in names)


class _Run(NamedTuple):
    """Photos of equal shape that stand together in a batch."""

    grid: tuple[int, int]  # rows and columns of patches
    photos: int
    tokens: slice  # of the batch
    patches: slice  # of the batch's patches


class _Batch(NamedTuple):
    """The packed tokens of several photos; `rows` includes the padding of the last chunk."""

    tokens: Tensor  # [rows, C], output of the latest block
    qkv: Tensor  # [rows, 3, H, D], projections of the current block
    rotary: Tensor | None  # [rows, 1, 1, 2 * D]
    runs: list[_Run]
    chunk: int
    ends: list[int]  # photo b has the tokens ends[b] to ends[b + 1]
    prefix: int  # CLS and register tokens of a photo

    def on_patches(self, values: Tensor) -> Tensor:
        """The values [rows, ...] of the tokens that are patches, float32 [patches, ...]."""
        size = self.runs[-1].patches.stop if self.runs else 0
        out = torch.empty(size, *values.shape[1:], device=values.device, dtype=torch.float32)
        for run in self.runs:
            tokens = values[run.tokens].unflatten(0, (run.photos, -1))
            out[run.patches].unflatten(0, (run.photos, -1)).copy_(tokens[:, self.prefix :])
        return out


def _filled(x: Tensor, rows: int) -> Tensor:
    """x [n, C] with rows of zeros appended, up to `rows`."""
    return F.pad(x, (0, 0, 0, rows - len(x))) if len(x) < rows else x


def _layer_scale(block: Vit, branch: int) -> Tensor | None:
    """The LayerScale of a branch, for which timm has two names; None if it has none."""
    return getattr(block, f"gamma_{branch}", getattr(getattr(block, f"ls{branch}", None), "gamma", None))


def _add(x: Tensor, y: Tensor, scale: Tensor | None) -> None:
    """Adds scale * y to x in place."""
    if scale is None:
        x.add_(y)
    else:
        x.addcmul_(y, scale)


def _qkv_bias(attn: Vit) -> Tensor | None:
    """The bias of the fused projection, [3, H * D]."""
    bias = attn.qkv.bias
    if bias is None and getattr(attn, "q_bias", None) is not None:
        return torch.stack([attn.q_bias, attn.k_bias, attn.v_bias])
    return None if bias is None else bias.unflatten(0, (3, -1))


def load(
    name: str,
    weights: str | None = None,
    *,
    device: str = "cpu",
    precision: str = "float32",
    interpolation: Interpolation = "bicubic",
    patch_fit: PatchFit = "stretch",
) -> Backbone:
    """Loads a timm ViT by name.

    Args:
        name: A VisionTransformer or Eva of timm with fused QKV projections (DINO, DINOv2 with and without registers,
            DINOv3, ...), or a model of a plugin (see `registry`).
        weights: A .safetensors or .pth file (see `weights.read`). The tensors have timm's names, or the authors' names
            if timm converts them, and may be nested as training codes write them (see `weights.load`). None: the
            published weights, which are downloaded once.
        device: Device as torch names it.
        precision: "float32", or "bfloat16" for attention and, except on CPUs where it is slow (see `linear.choose`),
            for all other layers too.
        interpolation: "bicubic" or "bilinear": how `Backbone.prepare` resizes photos.
        patch_fit: How resized photos fit into whole patches: "stretch" changes their sides to multiples of the patch
            size, "pad" keeps the aspect ratio and pads them with zeros.

    Raises:
        UserError: If the model is unknown or not supported, or if its weights cannot be loaded; says what to do.
    """
    registry.expect_model(name)
    try:
        model: Vit = _with_weights("backbone", name, weights, num_classes=0, dynamic_img_size=True)
    except TypeError:
        raise UserError(f"backbone {name!r} {_NO_VIT}") from None
    if not is_supported(model):
        raise UserError(f"backbone {name!r} {_NO_VIT}")
    return Backbone(model, torch.device(device), getattr(torch, precision), interpolation, patch_fit)


def is_supported(model: nn.Module) -> bool:
    """Whether a network of timm is made of the layers that `Backbone` computes, in their order."""
    from timm.layers import Attention, AttentionRope, PatchEmbed
    from timm.models.eva import EvaAttention, EvaBlock
    from timm.models.vision_transformer import Block

    blocks: Sequence[Vit] = getattr(model, "blocks", ())
    return (
        type(getattr(model, "patch_embed", None)) is PatchEmbed
        and len(blocks) > 0
        and all(type(block) in (Block, EvaBlock) for block in blocks)  # others apply norms elsewhere
        and all(type(block.attn) in (Attention, AttentionRope, EvaAttention) for block in blocks)
        and all(block.attn.qkv is not None and getattr(block.attn, "gate", None) is None for block in blocks)
        and not getattr(model, "rope_mixed", False)
    )


def untrained(name: str) -> Vit:
    """Creates a timm ViT with random weights, for photos of any shape.

    Raises:
        UserError: If there is no such ViT.
    """
    import timm

    registry.expect_model(name)
    try:
        return timm.create_model(name, pretrained=False, num_classes=0, dynamic_img_size=True)
    except TypeError:
        raise UserError(f"backbone {name!r} {_NO_VIT}") from None


class Encoder(NamedTuple):
    """A timm network dilated to output stride 8, or a ViT; created by `load_encoder` or `untrained_encoder`.

    Attributes:
        name: Name of the encoder.
        network: Maps normalized photos [n, 3, H, W] to a list of features [n, C, ceil(H / stride), ceil(W / stride)].
        taken: Indices in that list: the last features of stride 4 and the last of all, of stride 8. For a ViT the
            strides are half its patch size and its patch size.
        channels: Channels C of the two.
        multiple: The shapes of the features hold for sides that are multiples of it; `DeepLab` pads others.
        mean: Mean color that the network expects, for colors in [0, 1].
        std: Standard deviation of the colors that the network expects.
    """

    name: str
    network: nn.Module
    taken: tuple[int, int]
    channels: tuple[int, int]
    multiple: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


def padded(photos: Tensor, multiple: int) -> Tensor:
    """Pads normalized photos [n, 3, H, W] at the bottom and right, to sides that are multiples of `multiple`.

    The new pixels have the mean color. torch.export can trace it for unknown sizes.
    """
    if multiple == 1:
        return photos
    height, width = ((side + multiple - 1) // multiple * multiple for side in photos.shape[2:])
    return F.pad(photos, (0, width - photos.shape[3], 0, height - photos.shape[2]))


class TokenPyramid(nn.Module):
    """A ViT as an encoder: the tokens of its middle block, upsampled twofold, and those of its last block."""

    def __init__(self, vit: Vit):
        super().__init__()
        self.vit: Vit = vit
        self.patch: int = vit.patch_embed.patch_size[0]
        self.taken = [len(vit.blocks) // 2 - 1, len(vit.blocks) - 1]

    def forward(self, photos: Tensor) -> list[Tensor]:
        whole = padded(photos, self.patch)
        middle, end = self.vit.forward_intermediates(whole, self.taken, norm=True, intermediates_only=True)
        h, w = ((2 * side + self.patch - 1) // self.patch for side in photos.shape[2:])
        return [F.interpolate(middle, scale_factor=2, mode="bilinear")[:, :, :h, :w], end]


_DENSE: dict[str, Any] = {"features_only": True, "output_stride": 8}


def untrained_encoder(name: str) -> Encoder:
    """Creates an encoder with random weights.

    Args:
        name: A model of timm or of a plugin, or a name of `hub.PUBLISHED`.

    Raises:
        UserError: If there is no such model, or if timm cannot dilate it to output stride 8.
    """
    import timm

    architecture = name.partition(".")[0] if name in hub.PUBLISHED else name
    registry.expect_model(architecture)
    if architecture.startswith("vit_"):
        vit = untrained(architecture)
        cfg = vit.pretrained_cfg
        channels, pyramid = (vit.embed_dim, vit.embed_dim), TokenPyramid(vit)
        multiple = _multiple(name, pyramid, (0, 1), (pyramid.patch / 2, pyramid.patch))
        return Encoder(name, pyramid, (0, 1), channels, multiple, tuple(cfg["mean"]), tuple(cfg["std"]))
    try:
        network: Any = timm.create_model(architecture, pretrained=False, **_DENSE)
        strides, widths = network.feature_info.reduction(), network.feature_info.channels()
    except Exception as error:  # architectures that cannot be dilated raise different exceptions
        raise UserError(f"encoder {name!r} {_NOT_DENSE} ({first_line(error)})") from error
    if 4 not in strides or strides[-1] != 8:
        raise UserError(f"encoder {name!r} {_NOT_DENSE} (its features have strides {strides})")
    taken = len(strides) - 1 - strides[::-1].index(4), len(strides) - 1
    channels, cfg = (widths[taken[0]], widths[taken[1]]), network.pretrained_cfg
    multiple = _multiple(name, network, taken, (4, 8))
    return Encoder(name, network, taken, channels, multiple, tuple(cfg["mean"]), tuple(cfg["std"]))


@torch.inference_mode()
def _multiple(name: str, network: nn.Module, taken: tuple[int, int], strides: tuple[float, float]) -> int:
    """The `multiple` of an encoder, found on small photos of odd sizes, before a training is paid for.

    Networks that round sizes down lose the last pixels of odd sizes, or fail where two branches meet.

    Raises:
        UserError: If the encoder cannot process photos of any size.
    """
    training, reason = network.training, ""
    network.eval()
    for multiple in (1, int(strides[1])):
        try:
            for sides in ((1, 1), (41, 45), (23, 70)):
                padded = [-(-side // multiple) * multiple for side in sides]
                features = network(torch.zeros(1, 3, *padded))
                for index, stride in zip(taken, strides, strict=True):
                    shape, expected = tuple(features[index].shape[2:]), tuple(math.ceil(x / stride) for x in padded)
                    if shape != expected:
                        raise ValueError(f"features {shape} of a photo {tuple(padded)}, expected {expected}")
            network.train(training)
            return multiple
        except Exception as error:  # each architecture fails in its own way
            reason = first_line(error)
    raise UserError(f"encoder {name!r} cannot process photos of any size ({reason}); choose a ResNet, ConvNeXt or ViT")


def load_encoder(name: str, weights: str | None = None) -> Encoder:
    """Loads an encoder with its published weights or with those of a local file.

    Args:
        name: As in `untrained_encoder`; "resnet50.dino" is DINO's ResNet-50.
        weights: A .safetensors or .pth file with timm's names of tensors, which torchvision's and DINO's ResNets share,
            or the authors' if timm converts them. All tensors but those of a classifier must be in the file; other
            parts of a checkpoint are ignored, so the file may hold a SelfMask network or a segmenter. None: the
            published weights, which are downloaded once.

    Raises:
        UserError: If the encoder is unknown or its weights cannot be loaded; says what to do.
    """
    encoder = untrained_encoder(name)
    pyramid = encoder.network if isinstance(encoder.network, TokenPyramid) else None
    network: nn.Module = encoder.network if pyramid is None else pyramid.vit
    options = _DENSE if pyramid is None else {"num_classes": 0, "dynamic_img_size": True}
    local = weights is not None or name in hub.PUBLISHED
    with torch.random.fork_rng(devices=[], enabled=local):  # what is drawn next does not depend on the second network
        model = _with_weights("encoder", name, weights, stored.parameters_and_statistics(network), **options)
    network.load_state_dict(model.state_dict())
    return encoder


def _with_weights(kind: str, name: str, file: str | None, needed: Sequence[str] | None = None, **options: Any) -> Any:
    """A timm model with the weights of a file or, if it is None, with its published weights.

    Args:
        kind: "backbone" or "encoder"; `--KIND-weights` is the option that takes a file.
        name: Name of the model.
        file: The file.
        needed: See `weights.load`.
        options: Passed on to timm.
    """

    def source(cfg: dict[str, Any]) -> stored.Weights:
        if file is not None:
            return stored.read(file, f"--{kind}-weights")
        if cfg.get("file"):  # of a plugin
            return stored.read(cfg["file"])
        if (published := hub.timm(name, kind)) is None:
            raise UserError(f"{kind} {name!r} has no published weights; pass --{kind}-weights FILE")
        return stored.read(hub.fetch(published), "the published weights")

    architecture = name.partition(".")[0] if name in hub.PUBLISHED else name
    return stored.timm_model(architecture, f"{kind} {name!r}", source, needed, **options)
