"""The application, and how a command becomes part of it: where its options come from, what it reports, and
how what it raises becomes an exit code.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import inspect
import os
import re
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, NoReturn, get_args, get_origin

import typer
from typer.core import TyperCommand, TyperOption
from typer.models import OptionInfo

from moeprune import __version__
from moeprune.cli.configuration import Configuration, Option, read_configuration
from moeprune.cli.options import Force, OutputFile, OutputFormat, Quiet, Summary, Verbose
from moeprune.cli.reporter import Reporter, emit_error, logger, messages, summary_file
from moeprune.errors import MoepruneError

Names = Mapping[str, Sequence[str]]
"""Options by the name of another option, as parameters: with underscores."""

RANKS = {"COMMANDLINE": 3, "ENVIRONMENT": 2, "DEFAULT_MAP": 1}
"""Where an option's value may come from: of the higher rank counts."""

OF_ALL = {"quiet": ("verbose",), "verbose": ("quiet",)}
"""What displaces what in every command."""


@dataclass(frozen=True)
class Rules:
    """How the options of a command get their values.

    options: what may stand in a configuration, by option name with hyphens.
    displaces: options that do not go with another, and give way if that is given in a place that counts more:
        `--keep` to the `max-size` of a file.
    needs: options that are left out if none of those that they go with is given, and they were not asked for
        on the command line.
    """

    options: Mapping[str, Option]
    displaces: Names
    needs: Names


rules_of: dict[str, Rules] = {}
"""By command."""


class Command(TyperCommand):
    """A command whose options come from the command line, the environment, a file or their defaults."""

    def __init__(self, name: str | None, **settings: Any):
        super().__init__(name, **settings)
        for option in self.params:
            if isinstance(option, TyperOption):
                option.envvar, option.show_envvar = variables(str(name), option.name), False

    def parse_args(self, context: Any, args: list[str]) -> list[str]:
        """Take what the command line does not say from the environment and the configuration."""
        if set(args).isdisjoint(context.help_option_names):
            context.meta["configuration"] = configure(context.find_root().params["config"])
            context.default_map = default_map(context.meta["configuration"], context.info_name)
        try:
            rest = super().parse_args(context, args)
        except typer.BadParameter as error:
            source = origin(context, error.param)
            if source is not None:
                error.message += f" (set in {source})"
            raise
        self._settle(context)
        return rest

    def _settle(self, context: Any) -> None:
        """Leave out what does not go with options that were given in a place that counts more."""
        options = {option.name: option for option in self.params}
        left_out = context.meta.setdefault("left_out", [])

        def rank(name: str) -> int:
            is_given = context.params[name] not in (None, [], ()) and context.params[name] is not False
            source = context.get_parameter_source(name)
            return RANKS.get(source.name, 0) if is_given and source is not None else 0

        def leave_out(name: str, why: str) -> None:
            left_out.append(f"`{dashed(name)}`, set in {origin(context, options[name])}, is left out: {why}")
            context.default_map.pop(name, None)
            context.set_parameter_source(name, None)
            context.params[name] = options[name].process_value(context, options[name].default)

        rules = rules_of[context.info_name]
        for name, others in {**OF_ALL, **rules.displaces}.items():
            for other in others:
                if 0 < rank(other) < rank(name):
                    leave_out(other, f"it does not go with `{dashed(name)}`")
        for name, others in rules.needs.items():
            if 0 < rank(name) < RANKS["COMMANDLINE"] and not any(rank(other) for other in others):
                leave_out(name, f"it goes with `{dashed(others[0])}`")


def dashed(name: str) -> str:
    """The option of a parameter: `--batch-size`."""
    return "--" + name.replace("_", "-")


def variables(command: str, name: str) -> list[str]:
    """The variables of the environment that an option's value may stand in; the first that is set counts."""
    return [f"MOEPRUNE_{command}_{name}".upper(), f"MOEPRUNE_{name}".upper()]


def configure(path: Path | None) -> Configuration:
    """The configuration that `--config` names, or that of the working directory; ends the program if it is
    wrong.
    """
    try:
        return read_configuration(path, {command: rules.options for command, rules in rules_of.items()})
    except MoepruneError as error:
        _fail(f"error: {error}\n")


def default_map(configuration: Configuration, command: str) -> dict[str, Any]:
    """A command's values in a configuration, by parameter, as Click takes them."""
    return {name.replace("-", "_"): value for name, value in configuration.values.get(command, {}).items()}


def place(context: Any, option: Any) -> str | None:
    """The variable or the key of the file that an option's value comes from, if it comes from there."""
    source = context.get_parameter_source(option.name)
    if source is not None and source.name == "ENVIRONMENT":
        return next(name for name in option.envvar if os.environ.get(name))
    if source is not None and source.name == "DEFAULT_MAP":
        return context.meta["configuration"].keys[context.info_name][option.name.replace("_", "-")]
    return None


def origin(context: Any, option: Any) -> str | None:
    """Where an option's value comes from, in words; None for the command line and for defaults."""
    name = None if option is None else place(context, option)
    if name is None:
        return None
    if context.get_parameter_source(option.name).name == "ENVIRONMENT":
        return f"`${name}`"
    return f"`{name}` of `{context.meta['configuration'].path}`"


def require_known_variables() -> None:
    """Raise a MoepruneError if a variable is to set an option, and sets none: a gate may be missing."""
    known = {"MOEPRUNE_CONFIG"}
    for command, rules in rules_of.items():
        for option in rules.options:
            known.update(variables(command, option.replace("-", "_")))
    for name in sorted(os.environ):
        if name.startswith("MOEPRUNE_") and name not in known:
            near = get_close_matches(name, known, n=1, cutoff=0.8)
            hint = f"did you mean `${near[0]}`?" if near else "unset it; `moeprune config` shows all options"
            raise MoepruneError(f"no option is set by `${name}`", hint)


NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO}
"""What writing to stdout may raise; of files it has become a MoepruneError."""

app = typer.Typer(
    help="Inference-time expert pruning of Soft Mixture-of-Experts models.",
    epilog="Exit codes: 0 passed, 1 a gate failed, 2 anything wrong with the call, the input or the"
    " program, 130 interrupted, 143 terminated.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)


def reporter_of(
    command: str,
    warnings: Sequence[str],
    output_format: OutputFormat = "text",
    output_file: OutputFile = None,
    summary: Summary = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    force: Force = False,
) -> Reporter:
    """How a command reports; from the third on, its parameters are options of every command."""
    if quiet and verbose:
        raise MoepruneError("`--quiet` and `--verbose` do not go together", "give one of them")
    appended = summary_file() if summary else None
    return Reporter(command, output_format, output_file, appended, not quiet, force, warnings)


def add_command(
    function: Callable[..., int | None], displaces: Names | None = None, needs: Names | None = None
) -> None:
    """Add a command that returns its exit code, None for 0; what it raises is mapped to exit codes.

    Args:
        function: takes a `reporter` beside its own options.
        displaces: see Rules, as needs.
    """
    name = function.__name__
    own = inspect.signature(function, eval_str=True).parameters
    common = [*inspect.signature(reporter_of, eval_str=True).parameters.values()][2:]
    parameters = {
        "context": inspect.Parameter("context", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context)
    }
    for parameter in (*own.values(), *common):
        if parameter.name != "reporter":
            parameters[parameter.name] = parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)

    @functools.wraps(function)
    def run(context: typer.Context, **values: Any) -> None:
        reporter = None
        try:
            with messages(values["quiet"], values["verbose"]) as warnings:
                require_known_variables()
                for left_out in context.meta["left_out"]:
                    logger.info(left_out)
                reporter = reporter_of(
                    name, warnings, **{option.name: values[option.name] for option in common}
                )
                given = {"reporter": reporter, "context": context, **values}
                code = function(**{parameter: given[parameter] for parameter in own}) or 0
        except MoepruneError as error:
            error = _with_origins(error, context)
            if reporter is not None or values["output_file"] is None:
                with contextlib.suppress(BrokenPipeError, MoepruneError):
                    emit_error(name, error, values["output_format"], values["output_file"])
            _fail(f"error: {error}\n")
        except BrokenPipeError:
            raise typer.Exit(2) from None
        except Exception as error:
            if _is_out_of_memory(error):
                sizes = "`--batch-size`" + (" or `--latency-batch`" if values.get("latency") else "")
                _fail(f"error: out of memory ({error})\n\nhint: give a smaller {sizes}\n")
            if isinstance(error, OSError) and error.errno in NO_ROOM:
                sys.stdout = None  # else it is tried again in the end
                _fail(f"error: cannot write to stdout ({error.strerror})\n")
            _fail(f"{traceback.format_exc()}\nerror: moeprune failed; this is a defect, please report it\n")
        raise typer.Exit(code)

    run.__signature__ = inspect.Signature(list(parameters.values()))  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters.values()}
    options = {
        key.replace("_", "-"): option
        for key, parameter in parameters.items()
        if (option := _option(parameter.annotation)) is not None
    }
    rules_of[name] = Rules(options, displaces or {}, needs or {})
    app.command(name, cls=Command)(run)


def _option(annotation: Any) -> Option | None:
    """What an annotated parameter takes; None if it is no option."""
    if get_origin(annotation) is not Annotated:
        return None
    kind, info = get_args(annotation)
    if not isinstance(info, OptionInfo):
        return None
    if type(None) in get_args(kind):
        kind = get_args(kind)[0]
    repeatable = get_origin(kind) is list
    if repeatable:
        [kind] = get_args(kind)
    return Option(str if kind is Path else kind, repeatable)


def _with_origins(error: MoepruneError, context: Any) -> MoepruneError:
    """Say of options in the message, by name or by value, where they were set, if not on the command line."""
    named = set(re.findall(r"--[a-z][a-z-]*", error.message))
    sources = [
        f"`{dashed(option.name)}` is set in {source}"
        for option in context.command.params
        if (dashed(option.name) in named or _names_value(error.message, context.params.get(option.name)))
        and (source := origin(context, option)) is not None
    ]
    return MoepruneError("; ".join([error.message, *sources]), error.hint)


def _names_value(message: str, value: Any) -> bool:
    """Whether a text or a path, or one of a list of them, stands in a message in backticks."""
    values = value if isinstance(value, list | tuple) else [value]
    return any(f"`{text}`" in message for text in values if isinstance(text, str | Path))


def _is_out_of_memory(error: Exception) -> bool:
    """Whether it is Python's own, torch's on a device, or torch's on the CPU."""
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or "DefaultCPUAllocator" in str(error)
    )


def _fail(message: str) -> NoReturn:
    sys.stderr.write(message)
    raise typer.Exit(2)


def _show_version(value: bool) -> None:
    if value:
        print(f"moeprune {__version__}", flush=True)  # noqa: T201
        raise typer.Exit


@app.callback()
def _options(
    config: Annotated[
        Path | None,
        typer.Option(
            help="The configuration, in place of moeprune.toml or pyproject.toml in the working directory.",
            envvar="MOEPRUNE_CONFIG",
        ),
    ] = None,
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit."),
    ] = False,
) -> None:
    pass
