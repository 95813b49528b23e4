# SPDX-License-Identifier: MIT
"""Which files are photos, by their names."""

JPEG_SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif")
# HEIC and AVIF are read if Pillow can, see `photos`.
PHOTO_SUFFIXES = (
    *(*JPEG_SUFFIXES, ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif"),
    *(".heic", ".heif", ".hif", ".avif"),
)
# By the format as Pillow names it. Readers of data sets choose files, and how to read them, by their suffixes.
SUFFIXES = {
    **{"JPEG": ".jpg", "MPO": ".jpg", "PNG": ".png", "WEBP": ".webp", "BMP": ".bmp"},
    **{"TIFF": ".tif", "GIF": ".gif", "AVIF": ".avif", "HEIF": ".heic"},
}
# Photos that are listed as errors, so that nobody believes that they were used.
UNREAD_SUFFIXES = (
    *(".jxl", ".jp2", ".j2k", ".jpf", ".jpx", ".psd", ".exr", ".hdr", ".tga"),
    *(".dng", ".cr2", ".cr3", ".nef", ".nrw", ".arw", ".sr2", ".orf", ".rw2", ".raf", ".pef", ".srw", ".x3f", ".3fr"),
)
COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst", ".zip")
LISTED = (*PHOTO_SUFFIXES, *UNREAD_SUFFIXES, ".tar", *COMPRESSED)  # photos and archives


def is_hidden(name: str) -> bool:
    """Whether a file or folder of this name is skipped."""
    return name == "__MACOSX" or (name.startswith(".") and name not in (".", ".."))
