# SPDX-License-Identifier: MIT
"""Plugins: CLIP models, ViTs and encoders of other packages, used by name like those of open_clip and timm.

A package declares an entry point of the group ``namedmask.models`` that names a function without arguments::

    # pyproject.toml
    [project.entry-points."namedmask.models"]
    acme = "acme.models:register"

    # acme/models.py
    def register():
        timm.models.register_model(vit_acme)  # used by --backbone vit_acme, --encoder vit_acme
        open_clip.add_model_config("acme-clip.json")  # used by --clip-model acme-clip
        registry.set_default_weights("clip", "acme-clip", "acme-clip.safetensors")
        registry.set_default_weights("selfmask", "vit_acme", "selfmask.safetensors")

The default weights of a timm model are those of its ``pretrained_cfg`` (``file``, ``url`` or ``hf_hub_id``); they need
no declaration. ``namedmask/demo/models.py`` is a complete example.

Plugins are loaded in each process that needs them: the first time that a model is unknown to timm or open_clip, or
that default weights are looked up. A plugin that fails is reported in a warning and in the error for the unknown name;
the other plugins still work.
"""

from __future__ import annotations

import difflib
import functools
import os
import warnings
from importlib.metadata import EntryPoint, entry_points
from typing import Literal

from .errors import UserError, explained, first_line, not_imported

GROUP = "namedmask.models"

Kind = Literal["clip", "selfmask"]

_default_weights: dict[tuple[Kind, str], str] = {}


def plugins() -> list[EntryPoint]:
    """The installed plugins, sorted by name. Loads none of them."""
    return sorted(entry_points(group=GROUP), key=lambda plugin: (plugin.name, plugin.value))


@functools.cache
def load_plugins() -> tuple[str, ...]:
    """Loads all plugins; further calls in the same process do nothing.

    Returns:
        One line for each plugin that failed: its name, its entry point and the reason.

    Raises:
        UserError: If a plugin of this package fails because a package cannot be imported.
    """
    failures = []
    for plugin in plugins():
        try:
            plugin.load()()
        except Exception as error:  # a plugin may be other people's code and raise anything
            if plugin.value.startswith(f"{__package__}.") and not_imported(error):
                raise explained(error) from error
            reason = f"{type(error).__name__}: {first_line(error)}"
            failures.append(f"plugin {plugin.name!r} ({plugin.value}) failed: {reason}")
            warnings.warn(failures[-1], RuntimeWarning, stacklevel=2)
    return tuple(failures)


def failure_note() -> str:
    """The plugins that failed, as the end of an error message; empty if there are none."""
    return "".join(f"; {failure}" for failure in load_plugins())


def set_default_weights(kind: Kind, model: str, path: str | os.PathLike[str]) -> None:
    """Declares the weights of a model for users who give none. Called by a plugin's function.

    Args:
        kind: ``"clip"`` for a CLIP model of open_clip, ``"selfmask"`` for a SelfMask network.
        model: Name of the CLIP model, or of the ViT that is the encoder of the SelfMask network.
        path: File with the weights.
    """
    _default_weights[kind, model] = os.fspath(path)


def default_weights(kind: Kind, model: str) -> str | None:
    """Returns the file that a plugin has declared with `set_default_weights`; None if there is none."""
    load_plugins()
    return _default_weights.get((kind, model))


def expect_model(name: str) -> None:
    """Raises UserError, with similar names, if neither timm nor a plugin has the model."""
    import timm

    if not timm.is_model(name):
        load_plugins()
    if not timm.is_model(name):
        similar = ", ".join(difflib.get_close_matches(name.partition(".")[0], timm.list_models(), 5))
        hint = f"similar: {similar}" if similar else "timm.list_models() lists them"
        raise UserError(f"{name!r} is no timm model; {hint}{failure_note()}")
    architecture, _, tag = name.partition(".")
    if tag and name not in (known := timm.list_pretrained(f"{architecture}.*")):
        raise UserError(f"timm has no weights {tag!r} for {architecture}; there are: {', '.join(known) or 'none'}")
