"""Functions of the user's own code, by name: `package.module:function` or `path/module.py:function`."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from moeprune.errors import MoepruneError


def import_factory(name: str) -> Callable[..., Any]:
    """Return the function of a name, found from the current directory or, for a file, from its folder.

    Raises:
        MoepruneError: the name has another form, or no such file exists. The code may raise anything.
    """
    place, _, function = name.rpartition(":")
    if not (place and function):
        raise MoepruneError(
            f"`--model {name}` is not a factory", "give `package.module:function` or `path/module.py:function`"
        )
    _make_importable(Path.cwd())
    module = _import_file(place) if _is_path(place) else importlib.import_module(place)
    return getattr(module, function)


def normalized(name: str) -> str:
    """Return the name that a checkpoint stores: `./nets/../net.py:build` is `net.py:build`."""
    place, colon, function = name.rpartition(":")
    return f"{Path(os.path.normpath(place)).as_posix()}{colon}{function}" if _is_path(place) else name


def same_factory(one: str, other: str) -> bool:
    """Return True if two names may mean one function: where a file is does not matter."""
    return _without_folder(one) == _without_folder(other)


def _without_folder(name: str) -> tuple[str, str]:
    place, _, function = name.rpartition(":")
    return Path(place).name.removesuffix(".py") if _is_path(place) else place, function


def _is_path(place: str) -> bool:
    return place.endswith(".py") or "/" in place or os.sep in place


def _import_file(place: str) -> ModuleType:
    """Import a file by the name that it has for the files beside it, or by its path if another module has that."""
    file = Path(f"{Path(place.removesuffix('.py'))}.py").resolve()
    if not file.is_file():
        raise MoepruneError(f"no file `{file}`", "give `path/module.py:function`")
    root, parts = file.parent, [file.stem]
    while (root / "__init__.py").is_file():
        root, parts = root.parent, [root.name, *parts]
    _make_importable(root)
    name = ".".join(parts)
    if name in sys.modules and getattr(sys.modules[name], "__file__", None) != str(file):
        name = str(file)
    elif len(parts) > 1:  # for its relative imports
        importlib.import_module(name.rpartition(".")[0])
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, file)
        assert spec is not None
        assert spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(sys.modules[name])
        except BaseException:
            del sys.modules[name]
            raise
    return sys.modules[name]


def _make_importable(folder: Path) -> None:
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
