"""Tensors of files, loaded into modules under the names that these have."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from moeprune.errors import MoepruneError, listed, user_code
from moeprune.files.checkpoint import tensor_infos
from moeprune.files.foreign import StateDict
from moeprune.files.names import COUNTERS, View, as_they_are, unwrapped, views
from moeprune.models.description import require_tensors
from moeprune.models.libraries.layers import LAYERS

logger = logging.getLogger(__name__)


def load_strictly(module: nn.Module, tensors: Mapping[str, Any], path: str | Path) -> None:
    """Load the tensors of a file into a module, which must have exactly these; an error names some of the others."""
    extra = {name: entry for name, entry in tensors.items() if not isinstance(entry, Tensor)}
    found = StateDict({name: tensor for name, tensor in tensors.items() if name not in extra}, (), extra)
    view = as_they_are(tensors)
    if problem := _load(module, found, view):
        raise _misfit(module, found, view, problem, path)


def load_foreign(module: nn.Module, found: StateDict, path: str | Path, prefix: str | None = None) -> View:
    """Load a file of the module's own code; return which of its tensors were taken.

    A file that torch's `load_state_dict` takes strictly is loaded as it is. Else the parts of names that wrappers added
    are taken off, tensors of layers may have names of older releases, and the prefix of the model is looked for.

    Args:
        prefix: of the names of the model's tensors, if the user gives it.

    Raises:
        MoepruneError: tensors are missing, unexpected, or of other shapes; or several models are in the file.
    """
    names = [*found.tensors, *found.extra]
    if prefix is None and _load(module, found, as_they_are(names)) is None:
        return as_they_are(names)
    own = _state(module)
    known = {unwrapped(name): name for name in own}
    if len(known) < len(own):  # two would be one
        known = {name: name for name in own}
    for library in LAYERS.values():
        known = {library.older_name(plain): name for plain, name in known.items()} | known
    options = views(names, known.__contains__, max(1, len(own) // 2), prefix, path, known)
    options = [_renamed(view, known) for view in options]
    problems = [_load(module, found, view) for view in options]
    whole = [view for view, problem in zip(options, problems, strict=True) if problem is None]
    if not whole:
        raise _misfit(module, found, options[0], problems[0] or "", path)
    view = only(whole, found, path)
    if view is not options[-1]:
        load_view(module, found, view)
    return view


def load_view(module: nn.Module, found: StateDict, view: View) -> None:
    """Load what `load_foreign` took into another module of the same kind."""
    problem = _load(module, found, view)
    assert problem is None, problem


def tensors_of(found: StateDict, view: View) -> dict[str, Tensor]:
    """Return the tensors of a view by the model's names."""
    return {name: found.tensors[raw] for name, raw in view.names.items() if raw in found.tensors}


def only(whole: Sequence[View], found: StateDict, path: str | Path) -> View:
    """Return the view of the one whole model in a file; raise a MoepruneError if there are several that differ."""
    first = tensors_of(found, whole[0])
    for other in (tensors_of(found, view) for view in whole[1:]):
        if first.keys() != other.keys() or not all(torch.equal(first[name], other[name]) for name in first):
            prefixes = ", ".join(f"`{view.prefix}`" for view in whole)
            raise MoepruneError(
                f"`{path}` holds several whole models, under the prefixes {prefixes}",
                f"choose one, for example with `--prefix {whole[-1].prefix}`",
            )
    return whole[0]


def warn_of_dropped(view: View, path: str | Path) -> None:
    """Warn of tensors of a file that belong to no part of the model, as far as names tell."""
    if dropped := [name for name in view.dropped if not COUNTERS.fullmatch(name.removeprefix(view.prefix))]:
        kind = "tensor is" if len(dropped) == 1 else "tensors are"
        logger.warning(f"`{path}`: {len(dropped)} {kind} left out: {listed(dropped, 3)}")


def _renamed(view: View, known: Mapping[str, str]) -> View:
    names = {known.get(name, name): raw for name, raw in view.names.items()}
    return view._replace(names=names) if len(names) == len(view.names) else view


def _load(module: nn.Module, found: StateDict, view: View) -> str | None:
    """Load a view strictly, as `load_state_dict` does, but keep the file's types and memory; return why that failed."""
    own, tensors = _state(module), tensors_of(found, view)
    _add_tied(own, tensors)
    for name in [name for name in tensors if isinstance(own.get(name), Tensor)]:
        dtype, expected = tensors[name].dtype, own[name].dtype
        if _is_number(dtype) != _is_number(expected):
            return f"`{name}` has the type {dtype}"
        if not _is_number(dtype):
            tensors[name] = tensors[name].to(expected)
    extra = {name: found.extra[raw] for name, raw in view.names.items() if raw in found.extra}
    state: Any = OrderedDict(tensors | extra)
    state._metadata = _versions(module, found, view)
    before = [(part, leaf, held) for part in module.modules() for leaf, held in _tensors_in(part).items()]
    try:
        with user_code("`load_state_dict` fails"):
            module.load_state_dict(state, strict=True, assign=True)
    except MoepruneError as error:
        return error.message
    finally:
        for part, leaf, held in before:  # what else refers to a tensor, such as a tied layer, gets the new values too
            new = _tensors_in(part).get(leaf)
            if new is not None and new is not held and not (held.is_meta or is_lazy(held) or held.is_inference()):
                held.data = new.detach()
                setattr(part, leaf, held)
    return None


def _state(module: nn.Module) -> dict[str, Any]:
    with user_code("`state_dict` fails"):
        return module.state_dict()


def _tensors_in(part: nn.Module) -> dict[str, Tensor]:
    found = part._parameters | part._buffers
    return {name: tensor for name, tensor in found.items() if tensor is not None}


def _is_number(dtype: torch.dtype) -> bool:
    """Return True for types that weights have, False for integers and booleans."""
    return dtype.is_floating_point or dtype.is_complex


def _add_tied(own: Mapping[str, Any], tensors: dict[str, Tensor]) -> None:
    """Add missing tensors that are, in the module, one with others: safetensors.torch.save_model writes only one."""
    groups: dict[Any, list[str]] = {}
    for name, tensor in own.items():
        is_plain = isinstance(tensor, Tensor) and not (is_lazy(tensor) or tensor.is_meta) and tensor.numel()
        if is_plain and tensor.layout == torch.strided:
            groups.setdefault((tensor.data_ptr(), tensor.shape, tensor.stride()), []).append(name)
    for group in groups.values():
        if stated := [name for name in group if name in tensors]:
            tensors |= {name: tensors[stated[0]] for name in group if name not in tensors}


def _versions(module: nn.Module, found: StateDict, view: View) -> dict[str, dict[str, Any]]:
    """Return the versions of modules in a file by the names that the modules have; torch writes into them."""
    if all(name == raw for name, raw in view.names.items()):
        return {name: dict(versions) for name, versions in found.versions.items()}
    plain = {unwrapped(f"{name}."): versions for name, versions in found.versions.items()}
    names = {name: view.prefix + unwrapped(f"{name}.").removeprefix(".") for name, _ in module.named_modules()}
    return {name: dict(plain[key]) for name, key in names.items() if key in plain}


def _misfit(module: nn.Module, found: StateDict, view: View, problem: str, path: str | Path) -> MoepruneError:
    """Return the error of a file that a module does not take."""
    own = {name: entry for name, entry in _state(module).items() if isinstance(entry, Tensor)}
    lazy = {name for name, tensor in own.items() if is_lazy(tensor)}  # they take any shape
    tensors = {name: tensor for name, tensor in tensors_of(found, view).items() if name not in lazy}
    what = f"`{path}` does not fit the model that `--model` builds"
    what += f" (names without their prefix `{view.prefix}`)" if view.prefix else ""
    hint = "give the function and the `--model-arg` that it was trained with"
    try:
        require_tensors(
            tensor_infos(tensors),
            {name: tuple(tensor.shape) for name, tensor in own.items() if name not in lazy},
            what,
            hint,
            {name for name, tensor in own.items() if not _is_number(tensor.dtype)},
        )
    except MoepruneError as error:
        return error
    return MoepruneError(f"{what}: {problem}", hint)
