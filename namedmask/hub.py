# SPDX-License-Identifier: MIT
"""Published weights: which ones a run needs, where they are in the caches, and their download.

Weights are looked for in the caches of huggingface_hub, torch.hub and open_clip first. Before a download, the server is
asked for the file with a short time limit, so that without a network a command ends with one line in seconds.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import re
import shutil
import threading
import urllib.parse
import urllib.request
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from . import registry
from .config import RunConfig
from .errors import UserError, first_line
from .files import atomic_write
from .progress import logger

ANSWER_WITHIN = 4.0  # seconds for all the server's answers together, name resolution included
READ_TIMEOUT = 30.0  # seconds without data after which a download from a URL fails

SEGMENTER = "hf-hub:"  # before the name of a segmenter's repository on the Hub, where commands take a path
SEGMENTER_FILES = ("categories.json", "model.safetensors")

# Encoders whose published weights are not in timm.
PUBLISHED = {
    "resnet50.dino": "https://dl.fbaipublicfiles.com/dino/dino_resnet50_pretrain/dino_resnet50_pretrain.pth",
}

_Result = TypeVar("_Result")

# Weights that huggingface_hub has in two formats: safetensors is preferred.
SAFE_NAMES = {
    "pytorch_model.bin": "model.safetensors",
    "open_clip_pytorch_model.bin": "open_clip_model.safetensors",
}


class Published(NamedTuple):
    """A published file of weights.

    Attributes:
        what: The model, for messages.
        option: Option of the commands that takes a local file instead.
        repository: Repository on the Hugging Face Hub, perhaps with @revision; "" for a file that has only a URL.
        file: Its name in the repository.
        url: Its address if it is in no repository.
        folder: Cache of files from URLs.
        token: Token for the repository; None: that of the login.
        cache: Cache of the repository; None: that of huggingface_hub.
    """

    what: str
    option: str
    repository: str = ""
    file: str = ""
    url: str = ""
    folder: Path = Path()
    token: str | bool | None = None
    cache: str | Path | None = None

    @property
    def names(self) -> list[str]:
        """Names of the file in the repository, the preferred one first."""
        safe = SAFE_NAMES.get(self.file, re.sub(r"\.(bin|pth|pt)$", ".safetensors", self.file))
        return list(dict.fromkeys([safe, self.file]))

    def address(self, name: str = "") -> str:
        """The URL of the file, or of the one of `names`."""
        if not self.repository:
            return self.url
        from huggingface_hub import hf_hub_url

        repository, _, revision = self.repository.partition("@")
        return hf_hub_url(repository, name or self.names[0], revision=revision or None)

    @property
    def download(self) -> Path:
        """Where a file from a URL is stored."""
        return self.folder / Path(urllib.parse.urlparse(self.url).path).name

    def cached(self) -> Path | None:
        """The file in the cache; None if it is not there."""
        if not self.repository:
            return self.download if self.download.is_file() else None
        from huggingface_hub import try_to_load_from_cache

        repository, _, revision = self.repository.partition("@")
        options: dict[str, Any] = {"cache_dir": self.cache} if self.cache else {}
        for name in self.names:
            if isinstance(found := try_to_load_from_cache(repository, name, revision=revision or None, **options), str):
                return Path(found)
        return None


def clip(model: str) -> Published | None:
    """The published weights of a CLIP model, MODEL:PRETRAINED; None without PRETRAINED, as for models of plugins.

    Raises:
        UserError: If there are none of this name.
    """
    import open_clip

    name, _, tag = model.partition(":")
    if not tag:
        return None
    if not (cfg := open_clip.get_pretrained_cfg(name, tag)):
        known = ", ".join(open_clip.list_pretrained_tags_by_model(name)) or "none"
        raise UserError(
            f"--clip-model {model}: open_clip has no weights {tag!r} of {name}, only {known}; files are passed as "
            "--clip-weights FILE"
        )
    repository, _, file = cfg.get("hf_hub", "").rpartition("/")
    # open_clip's folder, also without a home folder, where Path.expanduser raises an error
    what, folder = f"CLIP model {model}", Path(os.path.expanduser("~/.cache/clip"))  # noqa: PTH111
    if repository:
        return Published(what, "--clip-weights", repository, file or "open_clip_pytorch_model.bin")
    return Published(what, "--clip-weights", url=cfg["url"], folder=folder)


def timm(name: str, kind: str) -> Published | None:
    """The published weights of a timm model or of a name of `PUBLISHED`; None if it has none of the network.

    Args:
        name: Name of the model.
        kind: "backbone" or "encoder"; `--KIND-weights` is the option that takes a file.

    Raises:
        UserError: If there is no such model.
    """
    import torch
    from timm.models import get_pretrained_cfg

    what, option, folder = f"{kind} {name}", f"--{kind}-weights", Path(torch.hub.get_dir()) / "checkpoints"
    if name in PUBLISHED:
        return Published(what, option, url=PUBLISHED[name], folder=folder)
    registry.expect_model(name)
    cfg = get_pretrained_cfg(name)
    if cfg is None or cfg.file or not (cfg.hf_hub_id or cfg.url):
        return None
    if cfg.hf_hub_id:
        return Published(what, option, cfg.hf_hub_id, cfg.hf_hub_filename or "pytorch_model.bin")
    return Published(what, option, url=str(cfg.url), folder=folder)


def needed(config: RunConfig, stages: Collection[str], select_experts: bool | None = None) -> list[Published]:
    """The published weights that stages load, but for those that are given as local files.

    Args:
        config: Settings of the stages.
        stages: Names of the stages.
        select_experts: Whether names select the masks of the experts; None: if the settings say so.

    Raises:
        UserError: If there is no such model.
    """
    found: list[Published | None] = []
    index, detector, saliency = config.index, config.detector, config.saliency
    with_clip = {"index", "archive"}
    with_clip |= {"pseudolabel"} if detector.selection == "name" else set()
    if select_experts is None:
        select_experts = config.experts.select == "name"
    with_clip |= {"experts"} if select_experts else set()
    if with_clip & set(stages) and not (index.embeddings or index.clip_weights):
        found.append(clip(index.clip_model))
    if "pseudolabel" in stages and detector.name != "selfmask":
        entries = [(detector.backbone, detector.backbone_weights)]
        entries += [(name, file) for name, _, file in (entry.partition("=") for entry in detector.more_backbones)]
        found += [timm(name, "backbone") for name, file in entries if not file]
    if "train-saliency" in stages and not (saliency.backbone_weights or saliency.init_checkpoint):
        found.append(timm(saliency.backbone, "backbone"))
    for stage, settings in (("experts", config.experts), ("train", config.segmenter)):
        if stage in stages and not settings.encoder_weights:
            found.append(timm(settings.encoder, "encoder"))
    return list(dict.fromkeys(one for one in found if one is not None))


def require(weights: Sequence[Published]) -> None:
    """Downloads those of the weights that are not in the caches.

    Raises:
        UserError: If one cannot be downloaded. Names all that are missing, the address and what to do.
    """
    missing = [one for one in weights if one.cached() is None]
    for number, one in enumerate(missing):
        fetch(one, missing[number + 1 :])


def fetch(one: Published, others: Sequence[Published] = ()) -> Path:
    """The file of published weights, from the cache or downloaded into it.

    Args:
        one: The weights.
        others: Further weights that are missing, for the error message.

    Raises:
        UserError: If it cannot be downloaded. Names the weights, the address and what to do.
    """
    if (path := one.cached()) is not None:
        return path
    try:
        name = _within(ANSWER_WITHIN, lambda: _find(one))
        logger.info(f"downloading {one.what}: {one.address(name)}")
        return _download(one, name)
    except Exception as error:  # hub, network and disk each have their own exceptions
        missing = (one, *others)
        models = " and ".join(other.what for other in missing)
        server = urllib.parse.urlparse(one.address()).netloc or "the server"
        files = " and ".join(f"{other.address()} for {other.option} FILE" for other in missing)
        raise UserError(
            f"no weights of {models} in the caches, and {server} does not give them ({_reason(error)}); where there is "
            f"a network, run `namedmask fetch` and copy its caches, or download {files}"
        ) from None


def segmenter(
    repository: str, token: str | bool | None = None, cache_dir: str | Path | None = None, local_only: bool = False
) -> Path:
    """The folder of a segmenter on the Hub, in the cache or downloaded into it. The cache comes first.

    Args:
        repository: USER/NAME, perhaps with @revision.
        token: Token for the Hub, see huggingface_hub; None: that of the login.
        cache_dir: The cache; None: that of huggingface_hub.
        local_only: Do not use the network.

    Raises:
        UserError: If it is not in the cache and cannot be downloaded.
    """
    name, _, revision = repository.partition("@")
    try:
        folder, at = None, repository
        for file in SEGMENTER_FILES:
            one = Published(f"segmenter {name}", "", at, file, token=token, cache=cache_dir)
            if (path := one.cached()) is None:
                if local_only:
                    raise FileNotFoundError(f"{file} is not in the cache, and the network is not to be used")
                _within(ANSWER_WITHIN, functools.partial(_find, one))
                logger.info(f"downloading {one.what}: {one.address()}")
                path = _download(one, file)
            folder, at = path.parent, f"{name}@{path.parent.name}"  # of the same commit
    except Exception as error:  # hub, network and disk each have their own exceptions
        raise UserError(
            f"the segmenter {name}{f' at {revision}' if revision else ''} cannot be loaded from the Hub "
            f"({_reason(error)}): check its name, log in with `hf auth login` if it is private, and without a network "
            "copy the cache of a machine that has it, or pass a folder"
        ) from None
    assert folder is not None
    return folder


def local_weights(path: Path) -> Path:
    """What commands take as WEIGHTS, as a local path: hf-hub:USER/NAME[@REVISION] is downloaded once."""
    text = str(path)
    return segmenter(text.removeprefix(SEGMENTER)) if text.startswith(SEGMENTER) else path


def push(folder: Path, repository: str, message: str, private: bool = False, token: str | bool | None = None) -> str:
    """Uploads a folder to a repository of the Hub, which is created if it does not exist.

    Returns:
        The address of the repository.

    Raises:
        UserError: If the Hub does not answer or refuses.
    """
    from huggingface_hub import HfApi, constants

    try:
        if constants.HF_HUB_OFFLINE:
            raise ConnectionError("HF_HUB_OFFLINE is set")
        api = HfApi(token=token)
        create = functools.partial(api.create_repo, repository, private=private, exist_ok=True)
        with _quiet():
            url = _within(2 * ANSWER_WITHIN, create)
            api.upload_folder(repo_id=url.repo_id, folder_path=folder, commit_message=message)
    except Exception as error:  # hub and network each have their own exceptions
        raise UserError(
            f"{repository} cannot be written on the Hub ({_reason(error)}): log in with `hf auth login` or pass a "
            "token that may write"
        ) from None
    return str(url)


def _within(seconds: float, function: Callable[[], _Result]) -> _Result:
    """Calls a function that may take longer than the time limits of sockets, as name resolution does."""
    results: list[_Result | Exception] = []

    def run() -> None:
        try:
            results.append(function())
        except Exception as error:
            results.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    result = results[0] if results else TimeoutError(f"no answer within {seconds:g} s")
    if isinstance(result, Exception):
        raise result
    return result


def _find(one: Published) -> str:
    """Asks the server for the file; returns which of its names exists. Raises the network's exceptions."""
    if not one.repository:
        request = urllib.request.Request(one.url, method="HEAD")
        with urllib.request.urlopen(request, timeout=ANSWER_WITHIN):
            return ""
    from huggingface_hub import constants
    from huggingface_hub.utils import build_hf_headers, get_session

    if constants.HF_HUB_OFFLINE:
        raise ConnectionError("HF_HUB_OFFLINE is set")
    for name in one.names:
        headers = build_hf_headers(token=one.token)
        answer = get_session().head(one.address(name), headers=headers, timeout=ANSWER_WITHIN)
        if answer.status_code < 400:
            return name
    raise FileNotFoundError(f"HTTP status {answer.status_code} for {one.address(name)}")


def _download(one: Published, name: str) -> Path:
    if one.repository:
        from huggingface_hub import hf_hub_download

        repository, _, revision = one.repository.partition("@")
        given = {"token": one.token, "cache_dir": one.cache}
        options: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
        with _quiet():
            return Path(hf_hub_download(repository, name, revision=revision or None, **options))
    one.folder.mkdir(parents=True, exist_ok=True)
    with urllib.request.urlopen(one.url, timeout=READ_TIMEOUT) as answer, atomic_write(one.download) as file:
        shutil.copyfileobj(answer, file, 1 << 20)
        if (size := answer.headers.get("Content-Length")) and file.tell() != int(size):
            raise OSError(f"{file.tell()} of {size} bytes arrived")
    return one.download


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hides huggingface_hub's log of retries: the error that ends them says the same."""
    logger = logging.getLogger("huggingface_hub")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(before)


def _reason(error: Exception) -> str:
    reason = getattr(error, "reason", None)  # of urllib's errors
    return first_line(reason if isinstance(reason, Exception) else error)


def caches() -> list[str]:
    """The folders of the caches, each with what moves it."""
    import torch
    from huggingface_hub.constants import HF_HUB_CACHE

    return [
        f"{HF_HUB_CACHE} (set HF_HOME to move it)",
        f"{torch.hub.get_dir()}/checkpoints (set TORCH_HOME to move it)",
    ]
