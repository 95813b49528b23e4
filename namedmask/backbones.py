# SPDX-License-Identifier: MIT
"""Networks of timm: a ViT run on ragged batches for its features, and encoders for dense prediction.

Photos of any shapes go through the ViT side by side, nothing padded, features at the end. The tokens of all photos lie
packed in one matrix [T, C]; only attention looks at one photo at a time. All else goes through the rows in chunks, so
that what a block computes in between stays in the cache. timm's own modules and its own interpolation of position
embeddings are used throughout, so features are timm's to rounding.

An encoder (`load_encoder`) is a convolutional network dilated to output stride 8, or a ViT, to be trained on.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from namedmask_kernels import Ragged

from . import attention, registry
from .errors import UserError

# A photo whose long side is more than this many times the short one is resized by its long side: a strip of
# 1 x 10,000 patches would otherwise cost as much as twenty photos.
MAX_ASPECT = 4.0

TAPS = ("tokens", "keys", "queries", "values", "cls_attention")

# Rows that a linear layer is given at a time on a CPU, always exactly so many: a BLAS adds up in another order where
# there are few rows, and a photo's features would depend on its company. A ViT-S's widest layer makes 1.5 MB of them.
CHUNK = 256

_NOT_DENSE = "cannot be dilated to output stride 8 with features of stride 4; choose a ResNet, ConvNeXt or ViT of timm"
_NO_VIT = "is not a ViT with fused QKV projections for photos of any shape; choose a DINO, DINOv2 or DINOv3 of timm"


class Backbone:
    """A ViT ready to run; made by `load`."""

    def __init__(self, model: nn.Module, device: torch.device, dtype: torch.dtype):
        self.device, self.attention_dtype, self.dtype = device, dtype, linear_dtype(device, dtype)
        self.model = model.eval().requires_grad_(False).to(device, self.dtype)
        self.library = attention.choose(device, dtype)
        self.patch: int = model.patch_embed.patch_size[0]
        self.prefix: int = model.num_prefix_tokens
        cfg = model.pretrained_cfg
        self.mean = torch.tensor(cfg["mean"], device=device).view(3, 1, 1)
        self.std = torch.tensor(cfg["std"], device=device).view(3, 1, 1)
        self.places = functools.lru_cache(maxsize=64)(self._places)

    def grid(self, pixels: np.ndarray, image_size: int) -> tuple[int, int]:
        """Rows and columns of patches for a photo [H, W, 3] whose short side becomes `image_size`, aspect kept."""
        sides = pixels.shape[:2]
        scale = min(image_size / min(sides), MAX_ASPECT * image_size / max(sides)) / self.patch
        h, w = (max(1, round(side * scale)) for side in sides)
        return h, w

    def prepare(self, pixels: np.ndarray, image_size: int) -> Tensor:
        """pixels uint8 [H, W, 3] -> normalized [3, h, w], h and w whole patches (bicubic, antialiased)."""
        from torchvision.transforms.v2 import functional as TF

        h, w = self.grid(pixels, image_size)
        photo = torch.from_numpy(pixels).to(self.device).permute(2, 0, 1)
        photo = TF.resize(photo, [h * self.patch, w * self.patch], TF.InterpolationMode.BICUBIC, antialias=True)
        return ((photo.float() / 255 - self.mean) / self.std).to(self.dtype)

    @torch.inference_mode()
    def extract(self, photos: Sequence[Tensor], taps: Sequence[str]) -> dict[str, Ragged]:
        """Features of any blocks in one pass over photos of any shapes, CLS and register tokens left out.

        photos:  normalized [3, h, w] each, sides whole multiples of the patch, as `prepare` gives them
        taps:    names of `TAPS`, each alone for the last block or with a block's number (from 0), as in "keys.8":
                 tokens         [T, C] after the block; after the last block and the norm that ends the network
                 queries, keys, values  [T, H * D] as projected, all heads side by side, before any rotary embedding
                 cls_attention  [T, H] the softmax weights that CLS gives to the patches in each head. They add up to 1
                                with those of CLS and the registers.
        Returns: a Ragged with float32 rows on the patch grids for each tap, under its name. A photo's rows are the same
                 in any batch. Blocks after the last tapped one are not run, and of that one only what is asked for.
        Errors:  ValueError for an unknown tap; UserError for CLS attention where there is no CLS token; RuntimeError
                 for a photo that wants a gradient, since there is none.
        """
        if any(photo.requires_grad for photo in photos):
            raise RuntimeError("extract has no gradient; give it detached photos")
        wanted = {tap: self._parse(tap) for tap in taps}
        last = max((number for number, _ in wanted.values()), default=-1)
        batch, found = self._embed(photos), {}
        for number in range(last + 1):
            names = {name for at, name in wanted.values() if at == number}
            tapped = self._block(number, batch, names, whole=number < last or "tokens" in names)
            found |= {(number, name): rows.float() for name, rows in tapped.items()}
        return {tap: Ragged.of_shapes(found[place], batch.shapes) for tap, place in wanted.items()}

    def explain(self) -> str:
        """Which library computes attention and how that is known, and where linear layers have another dtype."""
        text = attention.explain(self.device, self.attention_dtype)
        if self.dtype != self.attention_dtype:
            text += "\nlinear layers in float32: twice as fast as bfloat16 on a CPU without AMX"
        return text

    def _parse(self, tap: str) -> tuple[int, str]:
        """Block and name in TAPS: (8, "keys") for "keys.8"."""
        name, _, number = tap.partition(".")
        depth = len(self.model.blocks)
        if name not in TAPS or not (number or "0").isdecimal() or int(number or 0) >= depth:
            raise ValueError(
                f"extract: taps must be of {', '.join(TAPS)}, alone or with a block from 0 to {depth - 1} as in "
                f"'keys.{depth - 1}', but one is {tap!r}"
            )
        if name == "cls_attention" and getattr(self.model, "cls_token", None) is None:
            raise UserError("this backbone has no CLS token, so there is no cls_attention; choose another tap")
        return int(number or depth - 1), name

    def _places(self, h: int, w: int) -> tuple[Tensor, Tensor | None]:
        """What timm adds to a grid's patches, prefix tokens included: [prefix + h * w, C], and its rotary table."""
        nothing = torch.zeros(1, h, w, self.model.embed_dim, device=self.device, dtype=self.dtype)
        placed = self.model._pos_embed(nothing)
        tokens, rotary = placed if isinstance(placed, tuple) else (placed, None)
        return tokens[0], rotary

    def _embed(self, photos: Sequence[Tensor]) -> _Batch:
        width, ends, grids, shapes = self.model.embed_dim, [0], [], []
        for photo in photos:
            patches = self.model.patch_embed(photo[None].to(self.dtype))[0]  # [h, w, C]
            shapes.append(tuple(patches.shape[:2]))
            grids.append(patches.flatten(0, 1))
            ends.append(ends[-1] + self.prefix + len(grids[-1]))
        chunk = CHUNK if self.device.type == "cpu" else max(1, ends[-1])
        x = torch.zeros(-(-ends[-1] // chunk) * chunk, width, device=self.device, dtype=self.dtype)
        is_patch, rotary = torch.zeros(len(x), dtype=torch.bool), None
        for begin, end, patches, shape in zip(ends[:-1], ends[1:], grids, shapes, strict=True):
            places, table = self.places(*shape)
            x[begin:end] = places
            x[begin + self.prefix : end] += patches
            is_patch[begin + self.prefix : end] = True
            if table is not None:  # sines and cosines; CLS and registers are turned by nothing
                if rotary is None:
                    rotary = table.new_zeros(len(x), 1, 1, table.shape[1])
                    rotary[..., table.shape[1] // 2 :] = 1
                rotary[begin + self.prefix : end, 0, 0] = table
        for rows in x.split(chunk):
            rows.copy_(self.model.norm_pre(rows))
        attn = self.model.blocks[0].attn
        shape = len(x), 3, attn.num_heads, len(attn.qkv.weight) // (3 * attn.num_heads)
        qkv = torch.empty(shape, device=self.device, dtype=self.attention_dtype)
        return _Batch(x, qkv, rotary, is_patch.nonzero()[:, 0].to(self.device), chunk, ends, shapes)

    def _block(self, number: int, batch: _Batch, names: set[str], whole: bool) -> dict[str, Tensor]:
        """The rows of patches of what `names` asks for. Runs the block on batch.tokens, in place, if `whole`."""
        block, x, qkv, chunk = self.model.blocks[number], batch.tokens, batch.qkv, batch.chunk
        attn, found = block.attn, {}
        asked = {"q": "queries" in names, "k": bool({"keys", "cls_attention"} & names), "v": "values" in names}
        parts = [part for part in "qkv" if whole or asked[part]]
        for rows, into in zip(x.split(chunk), qkv.split(chunk), strict=True):
            y = block.norm1(rows) if parts else None
            for part, projected in _project(attn, y, parts).items():
                into[:, "qkv".index(part)] = projected
        for third, name in enumerate(("queries", "keys", "values")):
            if name in names:
                found[name] = qkv[batch.patches, third].flatten(1)
        if whole or "cls_attention" in names:
            turned = slice(0 if whole else 1, 2)
            self._rotate(attn, qkv[:, turned], batch)
        if "cls_attention" in names:
            found["cls_attention"] = self._cls_attention(block, batch, projected="q" in parts)
        if whole:
            out = attention.LIBRARIES[self.library](qkv[: batch.ends[-1]], batch.ends, attn.scale).flatten(1)
            for rows, y in zip(x.split(chunk), out.split(chunk), strict=True):
                y = F.pad(y.to(self.dtype), (0, 0, 0, len(rows) - len(y)))
                rows += _scaled(block, 1, attn.proj(attn.norm(y)))
                rows += _scaled(block, 2, block.mlp(block.norm2(rows)))
        if "tokens" in names:
            found["tokens"] = x[batch.patches]
            if number == len(self.model.blocks) - 1:
                found["tokens"] = self.model.norm(found["tokens"])
        return found

    def _rotate(self, attn: nn.Module, x: Tensor, batch: _Batch) -> None:
        """Rotary embedding of queries or keys [rows, ., H, D] in place, where the network has one."""
        from timm.layers import apply_rot_embed_cat

        if batch.rotary is None:
            return
        half = getattr(attn, "rotate_half", False)
        for rows, table in zip(x.split(batch.chunk), batch.rotary.split(batch.chunk), strict=True):
            rows.copy_(apply_rot_embed_cat(rows, table, half=half))

    def _cls_attention(self, block: nn.Module, batch: _Batch, projected: bool) -> Tensor:
        """Softmax weights [patches, H] that CLS gives, from keys (and queries, if `projected`) in batch.qkv."""
        attn, starts = block.attn, batch.ends[:-1]
        cls = batch.qkv[starts, 0]  # CLS stands first and is never rotated
        if not projected:
            for some, at in zip(cls.split(batch.chunk), torch.tensor(starts).split(batch.chunk), strict=True):
                y = F.pad(batch.tokens[at], (0, 0, 0, batch.chunk - len(at)))
                some.copy_(_project(attn, block.norm1(y), "q")["q"][: len(at)])
        weights = [cls.new_empty(0, attn.num_heads, dtype=torch.float32)]
        for query, begin, end in zip(cls, starts, batch.ends[1:], strict=True):
            scores = torch.einsum("hd,nhd->nh", attn.scale * query.float(), batch.qkv[begin:end, 1].float())
            weights.append(scores.softmax(0)[self.prefix :])
        return torch.cat(weights)


class _Batch(NamedTuple):
    """Photos with their tokens packed, followed by rows that only fill the last chunk: `rows` of them in all."""

    tokens: Tensor  # [rows, C], after the blocks that have run
    qkv: Tensor  # [rows, 3, H, D], of the block that runs
    rotary: Tensor | None  # [rows, 1, 1, 2 * D]
    patches: Tensor  # the rows that are patches
    chunk: int
    ends: list[int]  # photo b owns tokens ends[b] to ends[b + 1]
    shapes: list[tuple[int, int]]  # of the patch grids


def linear_dtype(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """What linear layers and the tokens between blocks are computed in where `dtype` is asked for.

    float32 in place of bfloat16 on a CPU without AMX: its bfloat16 products reach half of float32's rate (with
    AVX512-BF16 on a Sapphire Rapids without AMX: 83 and 152 GFLOP/s a core).
    """
    slow = device.type == "cpu" and dtype == torch.bfloat16 and not torch.cpu._is_amx_tile_supported()
    return torch.float32 if slow else dtype


def _scaled(block: nn.Module, branch: int, x: Tensor) -> Tensor:
    """LayerScale under either of timm's names."""
    if (gamma := getattr(block, f"gamma_{branch}", None)) is not None:
        return x * gamma
    return scale(x) if (scale := getattr(block, f"ls{branch}", None)) is not None else x


def _qkv(attn: nn.Module) -> tuple[Tensor, Tensor | None]:
    """The fused projection: weight [3 * H * D, C] and bias."""
    if attn.qkv.bias is not None or getattr(attn, "q_bias", None) is None:
        return attn.qkv.weight, attn.qkv.bias
    return attn.qkv.weight, torch.cat([attn.q_bias, attn.k_bias, attn.v_bias])


def _project(attn: nn.Module, x: Tensor, parts: Sequence[str]) -> dict[str, Tensor]:
    """x [n, C] -> what `parts` names of "q", "k" and "v", [n, H, D] each."""
    weight, bias = _qkv(attn)
    if len(parts) == 3:
        found = dict(zip("qkv", F.linear(x, weight, bias).chunk(3, 1), strict=True))
    else:
        biases = (None,) * 3 if bias is None else bias.chunk(3)
        thirds = dict(zip("qkv", zip(weight.chunk(3), biases, strict=True), strict=True))
        found = {part: F.linear(x, *thirds[part]) for part in parts}
    norms = {"q": attn.q_norm, "k": attn.k_norm}
    found = {part: y.unflatten(1, (attn.num_heads, -1)) for part, y in found.items()}
    return {part: norms[part](y) if part in norms else y for part, y in found.items()}


def load(name: str, weights: str | None = None, *, device: str = "cpu", precision: str = "float32") -> Backbone:
    """A timm ViT by name, with its published weights or those of a local file.

    name:      any of timm's VisionTransformer or Eva models with fused QKV: DINO, DINOv2 (registers too), DINOv3, ...;
               or one of a plugin (see `registry`)
    weights:   a .safetensors file, or a .pth file that torch opens with weights_only=True; keys as timm names them, or
               as the model's authors do where timm converts them. None: timm's hub, which needs a network.
    precision: "float32", or "bfloat16" for attention and, but for CPUs without AMX, all else too (`linear_dtype`)
    Errors:    UserError naming the model and what to bring.
    """
    import timm

    _expect_model(name)
    overlay = {}
    if weights is not None:
        if not Path(weights).is_file():
            raise UserError(f"--backbone-weights {weights}: there is no such file")
        overlay = {"pretrained_cfg_overlay": {"file": weights, "hf_hub_id": None, "url": None, "custom_load": False}}
    try:
        model = timm.create_model(name, pretrained=True, num_classes=0, dynamic_img_size=True, **overlay)
    except TypeError:
        raise UserError(f"backbone {name!r} {_NO_VIT}") from None
    except Exception as error:  # hub, network, file format and key mismatches each have their own exception
        raise UserError(f"backbone {name!r}: {_why_no_weights(name, weights, error)}") from error
    attentions = [getattr(block, "attn", None) for block in getattr(model, "blocks", [])]
    fused = all(getattr(a, "qkv", None) is not None and getattr(a, "gate", None) is None for a in attentions)
    if not attentions or not fused or getattr(model, "rope_mixed", False):
        raise UserError(f"backbone {name!r} {_NO_VIT}")
    return Backbone(model, torch.device(device), getattr(torch, precision))


def _expect_model(name: str) -> None:
    """UserError, with similar names, where there is no such model."""
    import timm

    if not timm.is_model(name):
        registry.load_plugins()
    if not timm.is_model(name):
        close = ", ".join(timm.list_models(f"{name.split('.')[0][:12]}*")[:5]) or "see timm.list_models()"
        raise UserError(f"backbone {name!r} is no timm model; similar: {close}{registry.failure_note()}")


def untrained(name: str) -> nn.Module:
    """A timm ViT by name with random weights, for photos of any shape; UserError where there is no such model."""
    import timm

    _expect_model(name)
    try:
        return timm.create_model(name, pretrained=False, num_classes=0, dynamic_img_size=True)
    except TypeError:
        raise UserError(f"backbone {name!r} {_NO_VIT}") from None


class Encoder(NamedTuple):
    """A timm network dilated to output stride 8, or a ViT; made by `load_encoder` or `untrained_encoder`.

    network:   photos normalized [n, 3, H, W] -> a list of features [n, C, ceil(H / stride), ceil(W / stride)]
    taken:     places in that list of the last features of stride 4 and of the very last, of stride 8; of a ViT those of
               half its patch's side and of its side
    channels:  their C
    mean, std: of the colors that it wants, [3] each, of 1
    """

    name: str
    network: nn.Module
    taken: tuple[int, int]
    channels: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]


class TokenPyramid(nn.Module):
    """A ViT as an encoder: the tokens of its middle, upsampled to half the patch's stride, and of its end."""

    def __init__(self, vit: nn.Module):
        super().__init__()
        self.vit = vit
        self.patch: int = vit.patch_embed.patch_size[0]
        self.taken = [len(vit.blocks) // 2 - 1, len(vit.blocks) - 1]

    def forward(self, photos: Tensor) -> list[Tensor]:
        sides = photos.shape[2:]
        height, width = (-side % self.patch for side in sides)
        whole = F.pad(photos, (0, width, 0, height))  # the last patches see a margin of the mean color
        middle, end = self.vit.forward_intermediates(whole, self.taken, norm=True, intermediates_only=True)
        h, w = (-(-2 * side // self.patch) for side in sides)
        return [F.interpolate(middle, scale_factor=2, mode="bilinear")[:, :, :h, :w], end]


# Encoders whose published weights timm does not carry.
PUBLISHED = {
    "resnet50.dino": "https://dl.fbaipublicfiles.com/dino/dino_resnet50_pretrain/dino_resnet50_pretrain.pth",
}
_DENSE = {"features_only": True, "output_stride": 8}


def untrained_encoder(name: str) -> Encoder:
    """An encoder by timm's name, or of PUBLISHED, with random weights.

    Raises UserError where there is no such model, or where timm cannot dilate it to output stride 8.
    """
    import timm

    architecture = name.partition(".")[0] if name in PUBLISHED else name
    _expect_model(architecture)
    if architecture.startswith("vit_"):
        vit = untrained(architecture)
        colors = (tuple(vit.pretrained_cfg[key]) for key in ("mean", "std"))
        return Encoder(name, TokenPyramid(vit), (0, 1), (vit.embed_dim, vit.embed_dim), *colors)
    try:
        network = timm.create_model(architecture, pretrained=False, **_DENSE)
        strides, channels = network.feature_info.reduction(), network.feature_info.channels()
    except Exception as error:  # every architecture says in its own way that it cannot be dilated
        raise UserError(f"encoder {name!r} {_NOT_DENSE} ({_first_line(error)})") from error
    if 4 not in strides or strides[-1] != 8:
        raise UserError(f"encoder {name!r} {_NOT_DENSE} (its features have strides {strides})")
    taken = len(strides) - 1 - strides[::-1].index(4), len(strides) - 1
    colors = (tuple(network.pretrained_cfg[key]) for key in ("mean", "std"))
    return Encoder(name, network, taken, tuple(channels[place] for place in taken), *colors)


def load_encoder(name: str, weights: str | None = None) -> Encoder:
    """An encoder with its published weights, or with those of a local file.

    name:    as in `untrained_encoder`; "resnet50.dino" is DINO's ResNet-50
    weights: a .safetensors or .pth file with timm's names of tensors, which for ResNets are torchvision's and DINO's.
             A classifier's tensors are passed over, all others must be there; of a SelfMask network its encoder is
             taken. None: the network, once.
    Errors:  UserError naming the encoder and what to bring.
    """
    import timm

    encoder = untrained_encoder(name)
    is_vit = isinstance(encoder.network, TokenPyramid)
    network = encoder.network.vit if is_vit else encoder.network
    try:
        if weights is not None:
            state = read_weights(weights, "--encoder-weights")
            if "query_embed" in state:
                state = {key.removeprefix("encoder."): tensor for key, tensor in state.items()}
        elif name in PUBLISHED:
            state = torch.hub.load_state_dict_from_url(PUBLISHED[name], map_location="cpu", weights_only=True)
        else:
            options = {"num_classes": 0, "dynamic_img_size": True} if is_vit else _DENSE
            state = timm.create_model(name, pretrained=True, **options).state_dict()
    except UserError:
        raise
    except Exception as error:  # hub, network and file format have exceptions of their own
        raise UserError(f"encoder {name!r}: {_why_no_weights(name, None, error, 'encoder')}") from error
    try:
        network.load_state_dict(_fitting(state, network))
    except RuntimeError as error:
        reason = str(error).splitlines()[1].strip()
        raise UserError(f"--encoder-weights {weights} does not fit encoder {name!r}: {reason}") from None
    return encoder


def _fitting(state: dict[str, Tensor], network: nn.Module) -> dict[str, Tensor]:
    """Of the tensors of a whole model those that `network` has, under its names: timm writes "stages_0" for "stages.0".

    The counters of batches of BatchNorm, which old files lack, are added.
    """
    names = {name.replace(".", "_"): name for name in network.state_dict()}
    counters = {name: tensor for name, tensor in network.state_dict().items() if name.endswith("num_batches_tracked")}
    found = {flat: tensor for name, tensor in state.items() if (flat := name.replace(".", "_")) in names}
    return counters | {names[flat]: tensor for flat, tensor in found.items()}


def read_weights(path: str, option: str) -> dict[str, Tensor]:
    """The tensors of a .safetensors file, or of a file that torch opens with weights_only=True.

    option: the command's option that gave the path, for the UserError that says what is wrong with it.
    """
    from safetensors.torch import load_file

    if not Path(path).is_file():
        raise UserError(f"{option} {path}: there is no such file")
    try:
        if path.endswith(".safetensors"):
            return {name: tensor.float() for name, tensor in load_file(path).items()}
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # each format has exceptions of its own
        raise UserError(f"{option} {path} cannot be read: {str(error).splitlines()[0]}") from error


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _why_no_weights(name: str, weights: str | None, error: Exception, kind: str = "backbone") -> str:
    """kind: the option, `--KIND-weights`, that takes a file."""
    if weights is not None:
        return f"{weights} does not fit ({_first_line(error)})"
    if name in PUBLISHED:
        source = PUBLISHED[name]
    else:
        import timm

        hub = timm.models.get_pretrained_cfg(name).hf_hub_id or "its authors' page"
        source = f"model.safetensors from huggingface.co/{hub}.{name.partition('.')[2]}"
    return (
        f"its weights could not be fetched ({_first_line(error)}); on a machine with a network download {source} and "
        f"give it as --{kind}-weights FILE"
    )
