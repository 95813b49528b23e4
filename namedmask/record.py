# SPDX-License-Identifier: MIT
"""OUT/stages.json: with which settings each stage of a run has made its output.

    {"photos": "/data/photos",
     "stages": {"archive": {"settings": {"categories": ..., ...}, "upstream": {...}, "files": {...},
                            "made_with": {"torch": "2.10.0", "device": ..., ...}}, ...},
     "digests": {"/weights/clip.safetensors": [size, mtime_ns, sha256], ...},
     "replaced": {"photos": ..., "stages": {...}},
     "outdating": ["archive", ...]}

photos:   where the photos were when the run was last used; stages know them by their names below that
settings: those of the stage itself, by their dotted names
upstream: those of earlier stages whose results it was made from
files:    SHA-256 digests of the local files among them, which are compared instead of their paths
replaced: photos and stages of the results in OUT/.replaced, while a command with --overwrite has not finished
outdating: stages whose results --update is moving to OUT/.outdated

Only commands write it. run.toml shows the same settings to people and is never read back. The output folder of
`namedmask segment` has a record of the same form, segment.json.
"""

from __future__ import annotations

import itertools
import json
import platform
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from . import __version__
from .config import RunConfig, Setting, make_config, nest, settings
from .errors import DamagedFile, UserError
from .files import expect_target, read_bytes, sha256, write_json

FILE = "stages.json"
# Keys of made_with
UPDATED = "updated"  # which settings the last --update has changed
LEFT_BEHIND = "outdated"  # the update of earlier stages since
IMPORTED = "imported"  # the file or folder that the results of a stage were imported from
UNFINISHED = "unfinished"  # while they are being imported, or after that was killed
REMEDY = "choose another --out, or restore the file from a copy"


@dataclass
class StageRecord:
    """What one stage's output was made with."""

    settings: dict[str, Any] = field(default_factory=dict)
    upstream: dict[str, Any] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    made_with: dict[str, str] = field(default_factory=dict)

    def differences(self, other: StageRecord) -> list[str]:
        """One line per setting that differs from `other`, such as "detector.tau: 0.2 -> 0.3".

        A setting that is not recorded, as by an earlier version, had its default.
        """
        lines, before = [], {one.name: one.default for one in settings()} | self.upstream | self.settings
        for name, new in (other.upstream | other.settings).items():
            old = before.get(name)
            if name in self.files and name in other.files:
                if self.files[name] != other.files[name]:
                    lines.append(f"{name}: {_change(old, new)} (different content)")
            elif old != new:
                lines.append(f"{name}: {_change(old, new)}")
        return lines


class Digests(dict[str, tuple[int, int, str]]):
    """SHA-256 digests of files by path, with the size and mtime for which they were computed."""

    def of(self, one: Setting, path: str) -> Iterator[str]:
        """The digests of a setting's file and its companions. A recorded one serves while the file looks the same,
        and when it is gone: a stage that has finished does not need it any more."""
        assert one.files
        for file in (Path(path), *(Path(path).with_suffix(suffix) for suffix in one.files.companions)):
            key = str(file)
            if file.is_file():
                status = file.stat()
                stamp = status.st_size, status.st_mtime_ns
                if key not in self or self[key][:2] != stamp:
                    self[key] = (*stamp, sha256(file))
            elif key not in self:
                reason = "not a regular file" if file.exists() else "there is no such file"
                raise UserError(f"{one.flag or one.name} {file}: {reason}")
            yield self[key][2]


@dataclass
class RunRecord:
    """The record of a run folder."""

    photos: str | None = None
    stages: dict[str, StageRecord] = field(default_factory=dict)
    digests: Digests = field(default_factory=Digests)
    replaced: RunRecord | None = None
    outdating: list[str] = field(default_factory=list)

    def settings(self) -> dict[str, Any]:
        """The settings of all stages, by dotted names. Each stage's own ones count, not what later stages recorded."""
        merged: dict[str, Any] = {}
        for part in ("upstream", "settings"):
            for stage in self.stages.values():
                merged |= getattr(stage, part)
        return merged

    def write(self, out: Path, file: str = FILE) -> None:
        write_json(out / file, asdict(self))


def read_record(out: Path, file: str = FILE) -> RunRecord:
    """The record of a folder, an empty one where there is none yet. Raises DamagedFile if it is damaged."""
    path = out / file
    try:
        data = json.loads(read_bytes(path), parse_constant=_no_constant)
        replaced = data["replaced"]
        record = _parse(data)
        nest(record.settings())  # an error if names collide
        record.replaced = _parse({"digests": {}, "outdating": [], **replaced}) if replaced else None
        return record
    except FileNotFoundError:
        return RunRecord()
    except NotADirectoryError:
        raise UserError(f"{out} is not a folder; choose another --out") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DamagedFile(path, error, remedy=REMEDY) from None


def _parse(data: dict[str, Any]) -> RunRecord:
    stages = {name: StageRecord(**stage) for name, stage in data["stages"].items()}
    digests = Digests({path: tuple(digest) for path, digest in data["digests"].items()})
    parts = [part for stage in stages.values() for part in vars(stage).values()]
    texts = [text for stage in stages.values() for part in (stage.files, stage.made_with) for text in part.values()]
    if not all(isinstance(part, dict) for part in parts) or not all(isinstance(text, str) for text in texts):
        raise ValueError("settings, upstream, files or made_with of a stage is of another type")
    if not all(list(map(type, digest)) == [int, int, str] for digest in digests.values()):
        raise ValueError("digests: expected [size, mtime_ns, sha256]")
    if data["photos"] is not None and not isinstance(data["photos"], str):
        raise ValueError("photos: expected a path")
    outdating = data["outdating"]
    if not isinstance(outdating, list) or not all(name in stages for name in outdating):
        raise ValueError("outdating: expected names of stages")
    return RunRecord(data["photos"], stages, digests, outdating=outdating)


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def read_config(out: Path) -> RunConfig:
    """The settings of a run folder: those recorded, and defaults for stages that have not run.

    Raises UserError where no run has been started or the record is damaged.
    """
    record = read_record(out)
    if record.photos is None:
        raise UserError(f"{out} is not a run folder ({FILE} is missing); `namedmask run PHOTOS --out {out}` starts one")
    return recorded_config(out, record)


def recorded_config(out: Path, record: RunRecord) -> RunConfig:
    """The settings of a record, with defaults for the others. Raises DamagedFile if one does not fit."""
    try:
        return make_config(nest({**record.settings(), "photos": record.photos or ""}))
    except UserError as error:
        raise DamagedFile(out / FILE, str(error), remedy=REMEDY) from None


def stage_record(config: RunConfig, sections: Sequence[str], digests: Digests) -> StageRecord:
    """The record of a stage that reads these sections, its upstream excepted.

    Raises UserError if a file is missing.
    """
    result = StageRecord()
    for one in settings():
        if one.name.split(".")[0] not in sections:
            continue
        value: Any = config
        for part in one.name.split("."):
            value = getattr(value, part)
        result.settings[one.name] = list(value) if isinstance(value, tuple) else value
        if one.files and value:
            entries = [entry.partition("=") for entry in value] if one.is_list else [("", "=", value)]
            names_and_digests = [[name, *(digests.of(one, path) if path else ())] for name, _, path in entries]
            result.files[one.name] = " ".join(itertools.chain(*names_and_digests)).strip()
    return result


def expect_no_files(out: Path, names: Sequence[str], file: str = FILE) -> None:
    """Raises UserError if one of the files or folders `names` exists, since the record `file` does not list it."""
    for path in (out / name for name in names):
        expect_target(path)
        if path.is_file() or (path.is_dir() and any(path.iterdir())):
            raise UserError(
                f"{path} exists and was not made by a run ({out / file} does not list it); move it away or choose "
                "another --out"
            )


def made_with() -> dict[str, str]:
    """Versions and device, for the record."""
    import numpy
    import PIL
    import torch

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"cpu ({platform.machine()})"
    return {
        "namedmask": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "timm": version("timm"),
        "numpy": numpy.__version__,
        "pillow": PIL.__version__,
        "device": device,
    }


def _change(old: Any, new: Any) -> str:
    """The two values, long ones around their first difference."""
    texts = repr(old), repr(new)
    same = next((i for i, (a, b) in enumerate(zip(*texts, strict=False)) if a != b), min(map(len, texts)))
    if same > 40 and max(map(len, texts)) > 60:
        texts = (f"...{texts[0][same - 17 :]}", f"...{texts[1][same - 17 :]}")
    before, after = (text if len(text) <= 60 else text[:57] + "..." for text in texts)
    return f"{before} -> {after}"
