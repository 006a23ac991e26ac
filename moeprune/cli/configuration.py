"""Options from `moeprune.toml`, or from the table `tool.moeprune` of `pyproject.toml`.

A key is an option without its leading dashes. At the top of the file it is for every command that has the
option; in a table named after a command it is for that command alone, and takes precedence.
"""

import sys
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, get_args, get_origin

from moeprune.errors import MoepruneError
from moeprune.records import from_json

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

OWN, PROJECT = Path("moeprune.toml"), Path("pyproject.toml")
Commands = Mapping[str, Mapping[str, Any]]  # the annotated type of each option's parameter, by command and key


def read_configuration(path: Path | None, commands: Commands) -> tuple[Path | None, dict[str, Any]]:
    """Read a configuration file, or raise a MoepruneError.

    path: None for the file in the working directory, if there is one; parents are not searched. Returns its path,
    or None, and the values by command and parameter, as Click's `default_map`.
    """
    path, table = _find(path)
    prefix = "tool.moeprune." if path is not None and path.name == PROJECT.name else ""
    own = {command: table.pop(command, {}) for command in commands}
    for command, keys in own.items():
        if not isinstance(keys, dict):
            message = f"`{path}`: `{prefix}{command}` is {keys!r}, expected a table"
            raise MoepruneError(message, f"it holds options of `moeprune {command}`")
    values: dict[str, Any] = {command: {} for command in commands}
    wrong: list[MoepruneError] = []
    for scope, keys, scoped in (("", table, commands), *((f"{c}.", own[c], {c: commands[c]}) for c in commands)):
        for key, value in keys.items():
            having = [command for command, options in scoped.items() if key in options]
            if not having:
                near = _nearest(scope, key, commands)
                hint = f"did you mean `{prefix}{near}`?" if near else "keys are options, such as `limit`"
                wrong.append(MoepruneError(f"unknown key `{prefix}{scope}{key}`", hint))
            try:
                read = {command: _read(value, scoped[command][key], f"`{prefix}{scope}{key}`") for command in having}
            except MoepruneError as error:
                wrong.append(error)
            else:
                for command in having:
                    values[command][key.replace("-", "_")] = read[command]
    if wrong:
        hints = dict.fromkeys(error.hint for error in wrong if error.hint)
        raise MoepruneError(f"`{path}`: {'; '.join(error.message for error in wrong)}", " ".join(hints) or None)
    return path, values


def _nearest(scope: str, key: str, commands: Commands) -> str | None:
    """Return the key, with its command, that an unknown one may be meant for: rather of the same command."""
    having = {option: [command for command in commands if option in commands[command]] for options in commands.values()
              for option in options}  # fmt: skip
    [near] = get_close_matches(key, [*having, *(() if scope else commands)], n=1) or [None]
    if near is None or not scope:
        return near
    return f"{scope}{near}" if scope[:-1] in having[near] else f"{having[near][0]}.{near}"


def _read(value: Any, kind: Any, where: str) -> Any:
    """Return a value as Click takes it: where text is expected, numbers are too; for a list, one will do."""
    [kind] = {*(get_args(kind) if isinstance(kind, UnionType) else (kind,))} - {NoneType}
    is_list = get_origin(kind) is list
    part = get_args(kind)[0] if is_list else kind
    accepted: Any = part if part in (bool, int, float) else str | int | float
    value = from_json(value, list[accepted] | accepted if is_list else accepted, where)
    values = value if isinstance(value, list) else [value]
    values = values if part is accepted else [str(entry) for entry in values]
    return values if is_list else values[0]


def _find(path: Path | None) -> tuple[Path | None, dict[str, Any]]:
    if path is not None:
        if (table := _table_of(path)) is None:
            raise MoepruneError(f"`{path}` has no table `tool.moeprune`", f"add it, or give an {OWN}")
        return path, table
    there = [name for name in (OWN, PROJECT) if name.exists()]
    tables = {name: table for name in there if (table := _table_of(name)) is not None}
    if len(tables) == 2:
        raise MoepruneError(f"both `{OWN}` and `{PROJECT}` configure moeprune", "keep one, or name it with `--config`")
    return next(iter(tables.items()), (None, {}))


def _table_of(path: Path) -> dict[str, Any] | None:
    """Return the options in a file; None for a pyproject.toml without the table."""
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise MoepruneError(f"no file `{path}`") from None
    except OSError as error:
        raise MoepruneError(f"cannot read `{path}` ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise MoepruneError(f"`{path}` is not TOML ({error})") from None
    for key in ("tool", "moeprune") if path.name == PROJECT.name else ():
        if key not in table:
            return None
        if not isinstance(table := table[key], dict):
            raise MoepruneError(f"`{path}`: `{key}` is {table!r}, expected a table")
    return table
