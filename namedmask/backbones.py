# SPDX-License-Identifier: MIT
"""A timm ViT run on ragged batches: photos of any shapes side by side, nothing padded, features at the end.

The tokens of all photos lie packed in one matrix [T, C], so every linear layer is one matrix product; only attention
looks at one photo at a time. timm's own modules and its own interpolation of position embeddings are used throughout,
so features are timm's to rounding.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from namedmask_kernels import Ragged

from .errors import UserError

# A photo whose long side is more than this many times the short one is resized by its long side: a strip of
# 1 x 10,000 patches would otherwise cost as much as twenty photos.
MAX_ASPECT = 4.0

_NO_VIT = "is not a ViT with fused QKV projections for photos of any shape; choose a DINO, DINOv2 or DINOv3 of timm"


class Backbone:
    """A ViT ready to run; made by `load`."""

    def __init__(self, model: nn.Module, device: torch.device, dtype: torch.dtype):
        self.model = model.eval().requires_grad_(False).to(device, dtype)
        self.device, self.dtype = device, dtype
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
        """pixels uint8 [H, W, 3] -> normalised [3, h, w], h and w whole patches (bicubic, antialiased)."""
        from torchvision.transforms.v2 import functional as TF

        h, w = self.grid(pixels, image_size)
        photo = torch.from_numpy(pixels).to(self.device).permute(2, 0, 1)
        photo = TF.resize(photo, [h * self.patch, w * self.patch], TF.InterpolationMode.BICUBIC, antialias=True)
        return ((photo.float() / 255 - self.mean) / self.std).to(self.dtype)

    @torch.inference_mode()
    def extract(self, photos: Sequence[Tensor], features: str) -> Ragged:
        """Features of the last block.

        photos:   normalised [3, h, w] each, sides whole multiples of the patch, as `prepare` gives them
        features: "tokens", after the last block and norm; or "keys", the last block's key projections (all heads side
                  by side, before any rotary embedding), for which the rest of the last block is not computed
        Returns:  Ragged rows float32 [T, C] on the patch grids, without CLS and register tokens
        """
        x, sequences, rotary, shapes = self._embed(photos)
        blocks = list(self.model.blocks)
        for block in blocks if features == "tokens" else blocks[:-1]:
            x = x + _scaled(block, 1, self._attention(block.attn, block.norm1(x), sequences, rotary))
            x = x + _scaled(block, 2, block.mlp(block.norm2(x)))
        if features == "tokens":
            x = self.model.norm(x)
        else:
            x = _keys(blocks[-1].attn, blocks[-1].norm1(x))
        patches = torch.cat([rows[self.prefix :] for rows in x.split(sequences)])
        return Ragged.of_shapes(patches.float(), shapes)

    def _places(self, h: int, w: int) -> tuple[Tensor, Tensor | None]:
        """What timm adds to a grid's patches, prefix tokens included: [prefix + h * w, C], and its rotary table."""
        nothing = torch.zeros(1, h, w, self.model.embed_dim, device=self.device, dtype=self.dtype)
        placed = self.model._pos_embed(nothing)
        tokens, rotary = placed if isinstance(placed, tuple) else (placed, None)
        return tokens[0], rotary

    def _embed(self, photos: Sequence[Tensor]):
        """-> packed tokens [T, C], their number per photo, rotary tables per photo, patch grids."""
        tokens, rotary, shapes = [], [], []
        for photo in photos:
            patches = self.model.patch_embed(photo[None])[0]  # [h, w, C]
            h, w = patches.shape[:2]
            places, table = self.places(h, w)
            tokens.append(torch.cat([places[: self.prefix], places[self.prefix :] + patches.flatten(0, 1)]))
            rotary.append(table)
            shapes.append((h, w))
        return self.model.norm_pre(torch.cat(tokens)), [len(t) for t in tokens], rotary, shapes

    def _attention(self, attn: nn.Module, x: Tensor, sequences: list[int], rotary: list[Tensor | None]) -> Tensor:
        from timm.layers import apply_rot_embed_cat

        weight, bias = _qkv(attn)
        qkv = F.linear(x, weight, bias).unflatten(1, (3, attn.num_heads, -1))  # [T, 3, H, D]
        out = torch.empty_like(qkv[:, 0])
        begin = 0
        for length, table in zip(sequences, rotary, strict=True):
            rows = slice(begin, begin + length)
            q, k, v = qkv[rows].permute(1, 2, 0, 3)  # [H, N, D] each
            q, k = attn.q_norm(q), attn.k_norm(k)
            if table is not None:
                half = getattr(attn, "rotate_half", False)
                q, k = (
                    torch.cat([t[:, : self.prefix], apply_rot_embed_cat(t[:, self.prefix :], table, half=half)], 1)
                    for t in (q, k)
                )
            y = F.scaled_dot_product_attention(q[None], k[None].type_as(v), v[None], scale=attn.scale)[0]
            out[rows] = y.transpose(0, 1)
            begin += length
        return attn.proj(attn.norm(out.flatten(1)))


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


def _keys(attn: nn.Module, x: Tensor) -> Tensor:
    """The K third of the projection alone: [T, C] -> [T, H * D]."""
    weight, bias = _qkv(attn)
    keys = F.linear(x, weight.chunk(3)[1], None if bias is None else bias.chunk(3)[1])
    return attn.k_norm(keys.unflatten(1, (attn.num_heads, -1))).flatten(1)


def load(name: str, weights: str | None = None, *, device: str = "cpu", precision: str = "float32") -> Backbone:
    """A timm ViT by name, with its published weights or those of a local file.

    name:      any of timm's VisionTransformer or Eva models with fused QKV: DINO, DINOv2 (registers too), DINOv3, ...;
               or "vit_namedmask_demo", whose weights are in the package
    weights:   a .safetensors file, or a .pth file that torch opens with weights_only=True; keys as timm names them, or
               as the model's authors do where timm converts them. None: timm's hub, which needs a network.
    precision: "float32" or "bfloat16"
    Errors:    UserError naming the model and what to bring.
    """
    import timm

    if name == "vit_namedmask_demo":  # the demo's own, not timm's: made known here, where every process comes by
        from .demo.models import VIT_WEIGHTS, register

        register()
        weights = weights or str(VIT_WEIGHTS)
    if not timm.is_model(name):
        close = ", ".join(timm.list_models(f"{name.split('.')[0][:12]}*")[:5]) or "see timm.list_models()"
        raise UserError(f"backbone {name!r} is no timm model; similar: {close}")
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
    if not attentions or not all(
        getattr(a, "qkv", None) is not None and getattr(a, "gate", None) is None for a in attentions
    ):
        raise UserError(f"backbone {name!r} {_NO_VIT}")
    return Backbone(model, torch.device(device), getattr(torch, precision))


def untrained(name: str) -> nn.Module:
    """A timm ViT by name with random weights, for photos of any shape; UserError where there is no such model."""
    import timm

    if name == "vit_namedmask_demo":
        from .demo.models import register

        register()
    if not timm.is_model(name):
        raise UserError(f"backbone {name!r} is no timm model")
    try:
        return timm.create_model(name, pretrained=False, num_classes=0, dynamic_img_size=True)
    except TypeError:
        raise UserError(f"backbone {name!r} {_NO_VIT}") from None


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


def _why_no_weights(name: str, weights: str | None, error: Exception) -> str:
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    if weights is not None:
        return f"{weights} does not fit ({reason})"
    import timm

    source = timm.models.get_pretrained_cfg(name).hf_hub_id or "its authors' page"
    return (
        f"its weights could not be fetched ({reason}); on a machine with a network download model.safetensors from "
        f"huggingface.co/{source}.{name.partition('.')[2]} and give it as --backbone-weights FILE"
    )
