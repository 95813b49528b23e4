# SPDX-License-Identifier: MIT
"""Safe decoding of photos: bytes to upright RGB pixels. Whatever is wrong with a photo is a `PhotoError`."""

import contextlib
import functools
import io
import os
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image, features

from .files import open_file
from .suffixes import UNREAD_SUFFIXES

MAX_PIXELS = 100_000_000

_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF")
_SIGNATURES = {
    b"\xff\xd8": "JPEG",
    b"\x89PNG": "PNG",
    b"RIFF": "WebP",
    b"BM": "BMP",
    b"II*\0": "TIFF",
    b"MM\0*": "TIFF",
    b"GIF8": "GIF",
}
# The beginning of the brand in a container of HEIC, AVIF or videos.
_BRANDS = {b"avi": ".avif", b"hei": ".heic", b"hev": ".heic", b"mif": ".heic", b"msf": ".heic"}
_CONVERT = "format that is not read: convert it to JPEG or PNG"
_HEIC = "HEIC photo: install pillow-heif (pip install 'namedmask[heif]'), or convert it to JPEG"
_AVIF = "AVIF photo: install pillow 11.3 or later, or convert it to JPEG"

_ARRAYS = {(dtype, 1) for dtype in ("bool", "uint8", "uint16", "int32", "float32")} | {("uint8", c) for c in (2, 3, 4)}
_EXIF_ORIENTATION = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SWAPPING = (
    Image.Transpose.TRANSPOSE,
    Image.Transpose.ROTATE_270,
    Image.Transpose.TRANSVERSE,
    Image.Transpose.ROTATE_90,
)

# The inverse for arrays.
_STORED: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    2: np.fliplr,
    3: lambda pixels: np.rot90(pixels, 2),
    4: np.flipud,
    5: np.transpose,
    6: np.rot90,
    7: lambda pixels: np.rot90(pixels, 2).T,
    8: lambda pixels: np.rot90(pixels, -1),
}


class PhotoError(Exception):
    """A photo, a shard or a folder that cannot be used.

    Attributes:
        photo: Its name.
        reason: Why it cannot be used, in one line.
    """

    def __init__(self, photo: str, reason: str):
        super().__init__(photo, " ".join(reason.split()))
        self.photo, self.reason = self.args

    def __str__(self) -> str:
        # repr: a name may contain newlines or bytes that a terminal cannot show.
        return f"{self.photo!r}: {self.reason}"


@functools.cache
def formats() -> tuple[str, ...]:
    """The formats that Pillow may open here."""
    formats: tuple[str, ...] = _FORMATS
    if features.check("avif"):
        formats += ("AVIF",)
    with contextlib.suppress(ImportError):
        import pillow_heif

        pillow_heif.register_heif_opener(thumbnails=False)
        formats += ("HEIF",)
    return formats


def why_unread(name: str) -> str | None:
    """Why a file with this suffix cannot be read; None if it can."""
    lower = name.lower()
    if lower.endswith(UNREAD_SUFFIXES):
        return _CONVERT
    if lower.endswith((".heic", ".heif", ".hif")) and "HEIF" not in formats():
        return _HEIC
    return _AVIF if lower.endswith(".avif") and "AVIF" not in formats() else None


def open_image(file: Any, name: str, max_pixels: int) -> Image.Image:
    """Reads the header of an image. Raises PhotoError if it has too many pixels."""
    image = Image.open(file, formats=formats())
    width, height = image.size
    if width * height > max_pixels:
        megapixels, limit = width * height / 1e6, max_pixels / 1e6
        raise PhotoError(name, f"{megapixels:.4g} megapixels, more than the limit of {limit:.4g}")
    return image


def decode_bytes(data: bytes, name: str, max_pixels: int, upright: bool) -> np.ndarray:
    with open_image(io.BytesIO(data), name, max_pixels) as image:
        return pixels_of(image, upright)


def pixels_of(image: Image.Image | np.ndarray, upright: bool = True) -> np.ndarray:
    """Converts an image of any kind by the rules of `PhotoSource.decode`: the pixels of a file, of Pillow's image of it
    and of the array of that are the same, except that an array has no EXIF orientation and no palette.

    Args:
        image: Image of any mode of Pillow; or array [H, W], bool, uint8, uint16, int32 or float32, or [H, W, C], uint8,
            with C = 1 (gray), 2 (gray, alpha), 3 (RGB) or 4 (RGBA).
        upright: Apply the EXIF orientation.

    Returns:
        uint8 RGB [H, W, 3], C-contiguous; the array itself if it is that already.

    Raises:
        ValueError: If an array has another shape or dtype, or an image no pixels.
        OSError: If the file of a lazy image is damaged. Pillow may raise other exceptions, too.
    """
    if isinstance(image, np.ndarray):
        kind = (image.dtype.name, image.shape[2] if image.ndim == 3 else 1)
        if not image.size or image.ndim not in (2, 3) or kind not in _ARRAYS:
            shapes = "[H, W] or [H, W, 1 to 4], uint8, or [H, W], bool, uint16, int32 or float32"
            raise ValueError(f"expected an image {shapes}, got {image.dtype} {list(image.shape)}")
        if kind == ("uint8", 3):
            return np.ascontiguousarray(image)
        image = image.reshape(image.shape[:2]) if kind[1] == 1 else image
        image = Image.fromarray(np.ascontiguousarray(image))
    elif not all(image.size):
        raise ValueError(f"expected an image with pixels, got {' x '.join(map(str, image.size))}")
    image.load()
    # After load: the EXIF of a PNG may follow the pixels, and Pillow itself rotates TIFFs while loading.
    transpose = _UPRIGHT.get(_orientation(image)) if upright else None
    rgb = _to_rgb(image if transpose is None else image.transpose(transpose))
    width, height = rgb.size
    # The buffer of a BytesIO is writable, and CPython does not copy the bytes because there is no other reference.
    pixels = np.frombuffer(io.BytesIO(rgb.tobytes()).getbuffer(), np.uint8)
    return pixels.reshape(height, width, 3)


def as_stored(path: str | os.PathLike[str], pixels: np.ndarray) -> np.ndarray:
    """Turns an array of an upright photo, such as its mask, to the orientation in which its file stores the pixels.

    Args:
        path: The photo. Only its header is read.
        pixels: Array [H, W].

    Returns:
        A view of the array, [H, W] or [W, H].

    Raises:
        PhotoError: If the file is not an image.
    """
    try:
        with open_file(path) as file, Image.open(file, formats=formats()) as image:
            orientation = _orientation(image)
    except Exception as error:  # broad on purpose, as in `decode`
        raise PhotoError(os.fsdecode(path), explain(error, b"")) from error
    return _STORED[orientation](pixels) if orientation in _STORED else pixels


def rotation(image: Image.Image) -> tuple[bool, bool]:
    """Whether the EXIF orientation of a photo says to rotate or flip it, and whether that swaps its sides."""
    transpose = _UPRIGHT.get(_orientation(image))
    return transpose is not None, transpose in _SWAPPING


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(_EXIF_ORIENTATION, 1))
    except Exception:
        # Broad on purpose: damaged EXIF raises many exceptions, and must not make the photo unusable.
        return 1


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        image = Image.fromarray(_to_8_bits(np.asarray(image)))
    elif image.has_transparency_data:
        image = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
        white = Image.new("RGB", image.size, "white")
        white.paste(image, mask=image.getchannel("A"))
        return white
    return image if image.mode == "RGB" else image.convert("RGB")


def _to_8_bits(values: np.ndarray) -> np.ndarray:
    """Grayscale [h, w] of uint16, int32 or float32 -> uint8, by the rules of `PhotoSource.decode`."""
    if values.dtype.kind == "f":
        values = np.nan_to_num(values, posinf=0, neginf=0)
    low, high = float(values.min()), float(values.max())
    result = np.empty(values.shape, np.uint8)
    for first in range(0, len(values), 256):  # temporary float64 arrays of a few rows only
        rows = values[first : first + 256]
        if values.dtype.kind == "f" and low >= 0 and high <= 1:
            rows = np.rint(rows.astype(np.float64) * 255)
        elif values.dtype.kind != "f" and low >= 0 and high <= 0xFFFF:
            rows = rows >> 8
        else:
            rows = np.rint((rows.astype(np.float64) - low) * (255 / (high - low or 1)))
        result[first : first + 256] = rows.astype(np.uint8)
    return result


def explain(error: Exception, data: bytes) -> str:
    """The reason of a failure of Pillow, as a message for the user."""
    if isinstance(error, Image.DecompressionBombError):
        return f"too many megapixels: {error}"
    if not isinstance(error, Image.UnidentifiedImageError):
        text = str(error) or type(error).__name__
        return f"truncated: {text}" if "truncated" in text.lower() else f"cannot be decoded: {text}"
    head = data[:40]
    if head[4:8] == b"ftyp" and (suffix := _BRANDS.get(head[8:11])) and (problem := why_unread(suffix)):
        return problem
    if all(32 <= byte < 127 or byte in b"\t\r\n" for byte in head):
        return f"not an image: text begins with {head.decode('ascii')!r}"
    for signature, kind in _SIGNATURES.items():
        if head.startswith(signature):
            return f"cannot be decoded: the header of this {kind} file is damaged"
    return f"not an image in a supported format: begins with bytes {head[:16].hex(' ')}"
