"""The application: how a function becomes a command, and what it raises an exit code."""

import contextlib
import functools
import inspect
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, NoReturn, get_args

import typer
from typer.core import TyperCommand
from typer.models import OptionInfo

from moeprune import __version__
from moeprune.cli.configuration import read_configuration
from moeprune.cli.inputs import require_inputs, require_other_file
from moeprune.cli.options import KEYWORD, options_of, request_of
from moeprune.cli.reporter import Output, Reporter
from moeprune.errors import MoepruneError, is_out_of_memory

app = typer.Typer(
    help="Inference-time expert pruning of Soft Mixture-of-Experts models.",
    epilog="Options can also be set in moeprune.toml, or by variables such as MOEPRUNE_EVAL_LIMIT. Exit"
    " codes: 0 passed, 1 a gate failed, 2 anything wrong with the call, the input or the program, 130"
    " interrupted, 143 terminated.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)

OPTIONS: dict[str, dict[str, Any]] = {}
"""The annotated type of each option by command and name, without the leading dashes."""


class Command(TyperCommand):
    """Options come from the command line, a variable, a file or their defaults, in this order."""

    def parse_args(self, context: Any, args: list[str]) -> list[str]:
        """Read the configuration first, unless help is asked for."""
        if set(args).isdisjoint(context.help_option_names):
            try:
                _require_known_variables()
                path, values = read_configuration(context.find_root().params["config"], OPTIONS)
            except MoepruneError as error:
                _fail(f"error: {error}\n")
            context.meta["configuration"], context.default_map = path, values[context.info_name]
        try:
            return super().parse_args(context, args)
        except typer.BadParameter as error:
            if error.param is not None and (place := _place(context, error.param)):
                error.message += f" (set in {place})"
            raise


def _require_known_variables() -> None:
    """Refuse a variable that begins with a command's name and sets no option of it: a gate may be misspelt."""
    prefixes = {f"MOEPRUNE_{command}_".upper(): options for command, options in OPTIONS.items()}
    known = [prefix + key.upper().replace("-", "_") for prefix, options in prefixes.items() for key in options]
    for name in sorted(os.environ):
        if name.startswith(tuple(prefixes)) and name not in known:
            near = get_close_matches(name, known, n=1, cutoff=0.8)
            hint = f"did you mean `${near[0]}`?" if near else "unset it, or see `--help` of the command"
            raise MoepruneError(f"unknown environment variable `${name}`", hint)


def command(function: Callable[..., int | None]) -> None:
    """Add a command.

    function: takes a Reporter, a Request whose fields are its options, and further options by keyword; returns the
    exit code, None for 0.
    """
    _, request, *own = inspect.signature(function, eval_str=True).parameters.values()
    options = [*options_of(request.annotation), *own, *options_of(Output)]
    parameters = [inspect.Parameter("context", KEYWORD, annotation=typer.Context), *options]

    @functools.wraps(function)
    def run(context: typer.Context, **values: Any) -> None:
        with _exit_codes(context):
            inputs = {**values, "config": context.meta.get("configuration")}
            require_other_file("output_file", inputs)  # before an error is written to it
            output = request_of(Output, values)
            context.obj = reporter = Reporter(function.__name__, output)
            with reporter.working():
                for name in ("output", "save_plan", "plot", "report"):
                    require_other_file(name, inputs)
                made = request_of(request.annotation, values, progress=not output.quiet, overwrite=output.force)
                require_inputs(values)
                code = function(reporter, made, **{extra.name: values[extra.name] for extra in own}) or 0
        raise typer.Exit(code)

    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    types = {option.name.replace("_", "-"): get_args(option.annotation) for option in options}
    OPTIONS[function.__name__] = {key: kind for key, (kind, info) in types.items() if isinstance(info, OptionInfo)}
    variables = {"auto_envvar_prefix": f"MOEPRUNE_{function.__name__}".upper()}
    app.command(function.__name__, cls=Command, context_settings=variables)(run)


@contextlib.contextmanager
def _exit_codes(context: typer.Context) -> Iterator[None]:
    """End the program with exit code 2 and a message, whatever is raised."""
    try:
        yield
    except MoepruneError as error:
        error = MoepruneError("; ".join((error.message, *_places(context, error.message))), error.hint)
        if context.obj is not None:
            with contextlib.suppress(BrokenPipeError, MoepruneError):
                context.obj.show_error(error)
        _fail(f"error: {error}\n")
    except BrokenPipeError:  # nobody reads stdout any more
        raise typer.Exit(2) from None
    except SystemExit as end:
        _fail(f"error: code that moeprune called ended the program (exit code {end.code})\n")
    except Exception as error:
        if is_out_of_memory(error):
            sizes = "`--batch-size`" + (" or `--latency-batch`" if context.params.get("latency") else "")
            _fail(f"error: out of memory ({error})\n\nhint: give a smaller {sizes}\n")
        _fail(f"{traceback.format_exc()}\nerror: moeprune failed; this is a defect, please report it\n")


def _places(context: typer.Context, message: str) -> list[str]:
    """Return where options are set that a message names or quotes, if not on the command line."""
    named = {*re.findall(r"--[a-z][a-z-]*", message), *re.findall(r"`([^`]*)`", message)}
    places = []
    for option in context.command.params:
        name, values = f"--{option.name}".replace("_", "-"), context.params.get(str(option.name))
        values = values if isinstance(values, list | tuple) else [values]
        if not named.isdisjoint((name, *map(str, values))) and (place := _place(context, option)):
            places.append(f"`{name}` is set in {place}")
    return places


def _place(context: Any, option: Any) -> str | None:
    """Return the variable or the file that an option's value comes from, in backticks, if it does."""
    source = context.get_parameter_source(option.name)
    variable, file = f"${context.auto_envvar_prefix}_{option.name.upper()}", context.meta.get("configuration")
    place = {"ENVIRONMENT": variable, "DEFAULT_MAP": file}.get(source.name if source is not None else "")
    return None if place is None else f"`{place}`"


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
            help="Configuration file, instead of moeprune.toml or pyproject.toml in the working directory.",
            envvar="MOEPRUNE_CONFIG",
            show_envvar=False,
        ),
    ] = None,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass
