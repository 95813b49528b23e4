# SPDX-License-Identifier: MIT
"""The names of the masks of photos."""

from __future__ import annotations

from ..files import MAX_NAME, fitted, name_digest

MAX_PATH = 3000  # bytes of a name; Linux allows 4096 for the whole path


def stem(name: str) -> str:
    """Name of the mask of a photo: "sub/photo.jpg" -> "sub/photo". The result never leads out of its folder.

    Names that no file can have are shortened and end with a digest.
    """
    parts = ["up" if part == ".." else part for part in name.split("/") if part not in ("", ".")]
    last, _, suffix = parts[-1].rpartition(".") if parts else ("", "", "")
    if last.strip(".") and suffix:
        parts[-1] = last
    fit = [fitted(part) for part in parts[:-1]] + [fitted(part, MAX_NAME - len(".png")) for part in parts[-1:]]
    result = "/".join(fit)
    if not result or "\0" in result or len(result.encode("utf-8", "surrogatepass")) > MAX_PATH:
        return f"photo~{name_digest(name)}"
    return result


class MaskNames:
    """Assigns each photo a mask of its own.

    Args:
        recorded: Names of masks by photo that are assigned already.
    """

    def __init__(self, recorded: dict[str, str]):
        self.files: set[str] = set()
        self.folders: set[str] = set()
        for mask in recorded.values():
            self._claim(mask)

    def assign(self, name: str) -> str:
        """The name of the mask of a further photo: its `stem`, with a digest if another mask is in the way."""
        mask = stem(name)
        if self._is_taken(mask):
            folder, slash, last = mask.rpartition("/")
            last = f"{fitted(last, 200)}~{name_digest(name)}"
            mask = folder + slash + last
            if self._is_taken(mask):  # "a.png/b" beside "a": a folder that has the name of a mask
                mask = last
        self._claim(mask)
        return mask

    def _claim(self, mask: str) -> None:
        self.files.add(mask)
        while mask := mask.rpartition("/")[0]:
            self.folders.add(mask)

    def _is_taken(self, mask: str) -> bool:
        if mask in self.files or not self.folders.isdisjoint((f"{mask}.png", f"{mask}.jpg")):
            return True
        while mask := mask.rpartition("/")[0]:
            if mask.endswith((".png", ".jpg")) and mask[:-4] in self.files:
                return True
        return False
