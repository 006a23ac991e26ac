"""Options from a file: `moeprune.toml`, or the table `tool.moeprune` of `pyproject.toml`; no torch.

A key is an option without its dashes in front. At the top it is for all commands that have the option, in a
table of a command's name for that command, where it comes before one at the top.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from moeprune.errors import MoepruneError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

OWN, PROJECT = "moeprune.toml", "pyproject.toml"
IN_PROJECT = ("tool", "moeprune")
KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}


@dataclass(frozen=True)
class Option:
    """What an option takes: one of KINDS, or a list of them where it may be repeated."""

    kind: type
    repeatable: bool = False

    @property
    def in_words(self) -> str:
        """What is expected of a value."""
        return KINDS[self.kind] + (", or a list of them" if self.repeatable else "")

    def fits(self, value: Any) -> bool:
        """Whether a value of a file is one of this option's."""
        if self.repeatable and isinstance(value, list):
            return all(self._fits(part) for part in value)
        return self._fits(value)

    def _fits(self, value: Any) -> bool:
        return type(value) in ((int, float) if self.kind is float else (self.kind,))


@dataclass(frozen=True)
class Configuration:
    """What a file says of each command's options.

    path: of the file, None where there is none. values: by command and option name, with hyphens; keys: which
    key of the file each comes from, likewise.
    """

    path: Path | None = None
    values: dict[str, dict[str, Any]] = field(default_factory=dict)
    keys: dict[str, dict[str, str]] = field(default_factory=dict)


def read_configuration(
    path: Path | None, commands: Mapping[str, Mapping[str, Option]], directory: Path = Path()
) -> Configuration:
    """Read what is in force.

    Args:
        path: of the file; None: the one in the directory, if any.
        commands: the options of each command, by name.
        directory: where to look for a file; its parents do not count.

    Raises:
        MoepruneError: the file cannot be read, there are two, or one has a key or a value that no option has.
    """
    if path is not None:
        table = _table_of(path)
        if table is None:
            raise MoepruneError(
                f"`{path}` has no table `{'.'.join(IN_PROJECT)}`", f"add it, or give an {OWN}"
            )
    else:
        found = {name: _table_of(directory / name) for name in (OWN, PROJECT) if (directory / name).exists()}
        tables = {name: table for name, table in found.items() if table is not None}
        if len(tables) == 2:
            raise MoepruneError(
                f"both `{OWN}` and `{PROJECT}` configure moeprune", "keep one, or name it with `--config`"
            )
        if not tables:
            return Configuration()
        [(name, table)] = tables.items()
        path = directory / name
    prefix = f"{'.'.join(IN_PROJECT)}." if path.name == PROJECT else ""
    return _Reader(path, prefix, commands).read(table)


@dataclass(frozen=True)
class _Reader:
    path: Path
    prefix: str
    commands: Mapping[str, Mapping[str, Option]]

    def read(self, table: Mapping[str, Any]) -> Configuration:
        read = Configuration(self.path, {c: {} for c in self.commands}, {c: {} for c in self.commands})
        for key, value in table.items():
            if key not in self.commands:
                users = [command for command, options in self.commands.items() if key in options]
                if not users:
                    known = [
                        *self.commands,
                        *(name for options in self.commands.values() for name in options),
                    ]
                    raise self._unknown(key, known)
                for command in users:
                    self._set(read, command, key, value, key)
        for command in self.commands:
            own = table.get(command, {})
            if not isinstance(own, dict):
                raise MoepruneError(
                    f"`{self.path}`: `{self.prefix}{command}` is {_in_words(own)}, expected a table",
                    f"it holds options of `moeprune {command}`",
                )
            for key, value in own.items():
                if key not in self.commands[command]:
                    raise self._unknown(
                        f"{command}.{key}", [f"{command}.{k}" for k in self.commands[command]]
                    )
                self._set(read, command, key, value, f"{command}.{key}")
        return read

    def _set(self, read: Configuration, command: str, name: str, value: Any, key: str) -> None:
        option = self.commands[command][name]
        if not option.fits(value):
            raise MoepruneError(
                f"`{self.path}`: `{self.prefix}{key}` is {_in_words(value)}, expected {option.in_words}",
                f'write it in quotes: {name} = "{value}"'
                if option.kind is str and isinstance(value, int | float)
                else f"it is what `moeprune {command}` takes as `--{name}`",
            )
        read.values[command][name] = [value] if option.repeatable and not isinstance(value, list) else value
        read.keys[command][name] = self.prefix + key

    def _unknown(self, key: str, known: Iterable[str]) -> MoepruneError:
        near = get_close_matches(key, list(known), n=1)
        hint = f"did you mean `{self.prefix}{near[0]}`?" if near else "`moeprune config` shows all options"
        return MoepruneError(f"`{self.path}`: unknown key `{self.prefix}{key}`", hint)


def _table_of(path: Path) -> dict[str, Any] | None:
    """What a file says to moeprune; None if it is a pyproject.toml that does not speak of it."""
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise MoepruneError(f"no file `{path}`") from None
    except OSError as error:
        raise MoepruneError(f"cannot read `{path}` ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise MoepruneError(f"`{path}` is no TOML ({error})") from None
    if path.name != PROJECT:
        return table
    for key in IN_PROJECT:
        if key not in table:
            return None
        table = table[key]
        if not isinstance(table, dict):
            raise MoepruneError(f"`{path}`: `{key}` is {_in_words(table)}, expected a table")
    return table


def _in_words(value: Any) -> str:
    """What a value of a TOML file is: `the text "1/8"`, `the number 3`, a table, a list."""
    if isinstance(value, dict):
        return "a table"
    if isinstance(value, list):
        return f"the list {value}"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return f'the text "{value}"'
    return f"the number {value}" if isinstance(value, int | float) else f"the date {value}"
