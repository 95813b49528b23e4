# SPDX-License-Identifier: MIT
"""How commands parse: their errors in one line, options that are generated from settings, names of categories."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import Annotated, Any

import typer
import typer.core

from .config import Setting, find_setting, merge, nest, read_settings, settings
from .console import printing
from .errors import NothingUsable, UserError, explained, plain
from .process import Interrupted, complain, keeping_interruption

CLICK_ERROR: Any = typer.BadParameter.__mro__[2]  # ClickException, of click or of typer's own copy of it
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
CategoriesFile = Annotated[
    Path | None, typer.Option("--categories-file", metavar="FILE", help="File with one category name per line.")
]


class OneLineErrors:
    """A command or group of typer whose errors about the command line have the form of all other errors."""

    def main(self, *args: Any, **extra: Any) -> Any:
        try:
            code = super().main(*args, **{**extra, "standalone_mode": False})  # type: ignore[misc]  # a mixin
        except CLICK_ERROR as error:
            message = error.format_message().replace("\n\t", " ")  # it lists choices so
            if type(error).__name__ == "NoArgsIsHelpError":  # its message is the help text
                error.show()
            else:
                path = context.command_path if (context := getattr(error, "ctx", None)) else "namedmask"
                text = plain(message[0].lower() + message[1:]).rstrip(".")
                complain(f"{text} (see `{path} --help`)")
            sys.exit(2)
        sys.exit(code if isinstance(code, int) else 0)


class Commands(OneLineErrors, typer.core.TyperGroup):
    pass


class Command(OneLineErrors, typer.core.TyperCommand):
    pass


PLAIN: Any = {"rich_markup_mode": None, "pretty_exceptions_enable": False}
HELP = {"help_option_names": ["-h", "--help"], "max_content_width": 120}


def command(function: Callable) -> Callable:
    """Turns errors into one line and an exit code."""

    @functools.wraps(function)
    def wrapper(debug: bool = False, **options: Any) -> None:
        try:
            with printing(), keeping_interruption():
                function(**options)
        except UserError as error:
            if debug:
                raise
            complain(error)
            raise typer.Exit(3 if isinstance(error, NothingUsable) else 2) from None
        except (Interrupted, KeyboardInterrupt) as error:
            interrupted = error if isinstance(error, Interrupted) else Interrupted()
            again = "the same command without --overwrite" if options.get("overwrite") else "the same command again"
            complain(f"{interrupted.reason}; run {again} to continue")
            raise typer.Exit(interrupted.exit_code) from None
        except typer.Exit:
            raise
        except Exception as error:  # an internal error, unless the memory, the disk or the network is to blame
            if debug:
                raise
            if isinstance(why := explained(error), UserError):
                complain(why)
                raise typer.Exit(2) from None
            complain(f"{type(error).__name__}: {error} (--debug shows where)")
            raise typer.Exit(2 if isinstance(error, OSError) else 1) from None

    return wrapper


# -- options that are generated from settings


def give_signature(function: Callable, parameters: dict[str, tuple[Any, Any]]) -> None:
    """Gives a function the parameters, each an annotation and a default, of which typer makes options."""
    function.__signature__ = Signature(  # type: ignore[attr-defined]
        [Parameter(n, Parameter.KEYWORD_ONLY, annotation=a, default=d) for n, (a, d) in parameters.items()]
    )
    function.__annotations__ = {name: annotation for name, (annotation, _) in parameters.items()}


def command_with_settings(function: Callable, flags: dict[str, Setting]) -> Callable:
    """A command with the parameters of a function as options, and one for each of the flags, in its **options."""
    wrapper = command(function)
    own = {
        name: (one.annotation, one.default)
        for name, one in signature(function, eval_str=True).parameters.items()
        if one.kind is not Parameter.VAR_KEYWORD
    }
    options = options_of(flags)
    first = {name: one for name, one in own.items() if name not in options}
    give_signature(wrapper, {**first, **options, "debug": (Debug, False)})
    return wrapper


def options_of(flags: dict[str, Setting]) -> dict[str, tuple[Any, Any]]:
    """The parameters of flags, as give_signature takes them, and --categories-file."""
    parameters: dict[str, tuple[Any, Any]] = {}
    for name, one in flags.items():
        parameters[name] = option(one), None
        if name == "categories":
            parameters["categories_file"] = CategoriesFile, None
    return parameters


def flags_of(names: Sequence[str]) -> dict[str, Setting]:
    """The settings with these names, or in these sections, that have a flag, by the name of its parameter."""
    found = [one for one in settings() if one.name in names or one.name.split(".")[0] in names]
    return {one.flag.lstrip("-").replace("-", "_"): one for one in found if one.flag}


def option(one: Setting) -> Any:
    """The typer option of a setting. Its text is parsed by the setting itself, as that of --set is."""
    default = one.field.default
    shown = ",".join(map(str, default)) if one.is_list else str(default).lower() if one.kind is bool else default
    notes = [one.limits, "" if default in (None, [], ...) else f"default: {shown}"]
    note = "; ".join(filter(None, notes))
    text = f"{one.field.description} [{note}]" if note else one.field.description
    if one.kind is bool:
        return Annotated[bool | None, typer.Option(f"{one.flag}/--no-{(one.flag or '')[2:]}", help=text)]
    kind: Any = one.kind if one.choices else str  # a Literal is completed by the shell
    return Annotated[kind | None, typer.Option(one.flag, metavar=one.metavar, help=text)]


def given_settings(
    sections: Sequence[str],
    config: Path | None,
    pairs: list[str],
    flags: dict[str, Setting],
    options: dict[str, Any],
) -> dict:
    """The nested settings that a command line gives: --config, over it --set, over it the options that are not None.

    Raises UserError for names that do not exist, for values that do not fit, and for --set of what no stage of the
    command reads; a file may hold the settings of other stages too.
    """
    flat: dict[str, Any] = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals:
            raise UserError(f"--set {pair}: expected NAME=VALUE, such as refine.crf.confidence=0.9")
        one = find_setting(name.strip())
        if one.name.split(".")[0] not in sections:
            raise UserError(f"--set {one.name}: this command does not read it; it reads {', '.join(sections)}")
        flat[one.name] = one.parse(text.strip())
    for name, value in options.items():
        if value is not None:
            flat[flags[name].name] = value if isinstance(value, bool) else flags[name].parse(value)
    if "categories" in flat:
        _expect_names(flat["categories"], "--categories")
    return merge(read_settings(config) if config else {}, nest(flat))


# -- names of categories


def with_names(given: dict, categories: str | None, file: Path | None) -> dict:
    """Settings with the category names of --categories-file; UserError if --categories is given as well."""
    if file is None:
        return given
    if categories is not None:
        raise UserError("pass --categories or --categories-file, not both")
    return {**given, "categories": read_names(file)}


def read_names(file: Path) -> list[str]:
    """The category names in a file, one per line. Raises UserError if there is none."""
    try:
        names = [line.strip() for line in file.read_text(encoding="utf-8-sig").splitlines()]
    except (OSError, ValueError) as error:
        raise UserError(f"--categories-file {file}: {error}") from None
    names = [name for name in names if name]
    _expect_names(names, f"--categories-file {file}")
    return names


def _expect_names(names: list[str], option: str) -> None:
    if not names:
        raise UserError(f"{option}: no category name was given")


def names_of(categories: str | None, file: Path | None, preset: str | None, distinct: bool = True) -> list[str] | None:
    """Names from --categories, --categories-file or --preset, for commands that are no stages."""
    if sum(given is not None for given in (categories, file, preset)) > 1:
        raise UserError("pass --categories, --categories-file or --preset, only one of them")
    if preset is not None:
        from . import presets

        if (names := presets.preset(preset).get("categories")) is None:
            raise UserError(f"--preset {preset} has no category names: pass them as --categories-file FILE instead")
        return names
    if categories is None and file is None:
        return None
    names = read_names(file) if file is not None else find_setting("categories").parse(categories or "")
    _expect_names(names, "--categories")
    if distinct:
        from .archive import expect_distinct

        expect_distinct(names, "--categories" if file is None else f"--categories-file {file}")
    return names
