"""Experts that are modules of any kind, as ours, and back: features of tokens, and a linear behind them.

Where a module ends with a linear that is its last one; others get one that changes nothing, and that refits can change.

Axes: t tokens, d width, h features.
"""

import contextlib
import copy
import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from moeprune.errors import MoepruneError, user_code
from moeprune.models.libraries.experts import parts_of, tolerance

ROWS = 16  # on which a module and its features are compared


@torch.no_grad()
def stack_modules(experts: nn.ModuleList, path: str, width: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return fields of GatedModulesConfig, and the stacked tensors of experts of this width, by our names.

    path: of the list, for errors. Raises a MoepruneError if experts differ in more than the values of their tensors, or
    have tensors that cannot be stacked.
    """
    states = [_state(expert, f"{path}.{index}") for index, expert in enumerate(experts)]
    first = next(iter(states[0].values()))
    last = _last_linear(experts[0], f"{path}.0", width)
    features = features_of(experts[0], last)
    rows = torch.randn(ROWS, width, generator=torch.Generator().manual_seed(1)).to(first)
    with FlopCounterMode(display=False) as flops:
        h = features(rows).shape[-1]
    own = {f"{last}.weight": "fc2_weight", f"{last}.bias": "fc2_bias"} if last is not None else {}
    for index, (expert, state) in enumerate(zip(experts, states, strict=True)):
        if {name: tensor.shape for name, tensor in state.items()} != {n: each.shape for n, each in states[0].items()}:
            raise MoepruneError(f"expert `{path}.{index}` has other tensors than `{path}.0`")
        inner = {name: tensor for name, tensor in state.items() if name not in own}
        found, expected = functional_call(features, inner, (rows,), strict=True), copied(expert)(rows)
        if last is not None:
            found = F.linear(found, state[f"{last}.weight"], state.get(f"{last}.bias"))
        if not _is_same(found, expected):
            raise MoepruneError(f"expert `{path}.{index}` does not compute what `{path}.0` does")
    tensors = {name: torch.stack([state[name] for state in states]) for name in states[0]}
    stacked = {own[name]: tensors.pop(name) for name in own if name in tensors}
    if last is None:
        stacked["fc2_weight"] = torch.eye(width).to(first).repeat(len(experts), 1, 1)
    fields = {
        "hidden_dim": h,
        "last": last,
        "bias": "fc2_bias" in stacked,
        "features": {name.replace(".", "/"): tuple(tensor.shape[1:]) for name, tensor in tensors.items()},
        "feature_flops": flops.get_total_flops() // ROWS,
    }
    return fields, stacked | {f"features/{name.replace('.', '/')}": tensor for name, tensor in tensors.items()}


def unstack_modules(tensors: Mapping[str, Tensor], expert: nn.Module) -> dict[str, Tensor]:
    """Return stacked tensors as those of a list of experts like this one, by their names in it.

    Raises a MoepruneError if they have no last linear.
    """
    kind = type(expert).__qualname__
    last = _last_linear(expert, kind, tensors["fc2_weight"].shape[1])
    if last is None:
        raise MoepruneError(f"a {kind} has no last linear that could take what was fitted")
    names = {"fc2_weight": f"{last}.weight", "fc2_bias": f"{last}.bias"}
    stacks = {
        names.get(key, key.removeprefix("features/").replace("/", ".")): tensor
        for key, tensor in tensors.items()
        if key.startswith(("features/", "fc2_"))
    }
    return {f"{j}.{name}": stack[j] for name, stack in stacks.items() for j in range(len(stack))}


def features_of(expert: nn.Module, last: str | None) -> nn.Module:
    """Return a copy of an expert that gives what its last linear takes."""
    features = copied(expert)
    if last is not None:
        features.set_submodule(last, nn.Identity(), strict=True)
    return features


def copied(module: nn.Module) -> nn.Module:
    """Return a copy in eval mode, without the user's hooks."""
    with user_code(f"a {type(module).__qualname__} cannot be copied"):
        found = copy.deepcopy(module).eval()
    for part in found.modules():
        part._forward_hooks.clear()
        part._forward_pre_hooks.clear()
    return found


@torch.no_grad()
def draw(tensors: Iterable[Tensor], generator: torch.Generator) -> None:
    """Draw values for tensors, in place: what a module computes must not depend on how it is initialised."""
    for tensor in tensors:
        noise = torch.randn(tensor.shape, generator=generator)
        tensor.copy_(noise / math.sqrt(max(tensor.shape, default=1)))


def _is_same(found: Tensor, expected: Tensor) -> bool:
    return float((found - expected).abs().max()) <= tolerance(expected.dtype) * float(expected.abs().max())


def _state(expert: nn.Module, path: str) -> dict[str, Tensor]:
    """Return an expert's tensors, or raise a MoepruneError if they cannot be stacked with others."""
    state = dict(expert.state_dict())
    types = {tensor.dtype for tensor in state.values()}
    if len(types) != 1 or not next(iter(types)).is_floating_point:
        raise MoepruneError(f"expert `{path}` has tensors of the types {', '.join(sorted(map(str, types))) or 'none'}")
    named = [*expert.named_parameters(remove_duplicate=False), *expert.named_buffers(remove_duplicate=False)]
    if others := [name for name, _ in named if name not in state]:
        raise MoepruneError(f"expert `{path}` has the tensor `{others[0]}`, which is not in its state dict")
    if len({id(tensor) for _, tensor in named}) < len(named):
        raise MoepruneError(f"expert `{path}` has one tensor in several places")
    return state


@torch.no_grad()
def _last_linear(expert: nn.Module, path: str, width: int) -> str | None:
    """Return the name of the linear that an expert ends with, None if there is none."""
    whole, generator = copied(expert).float(), torch.Generator().manual_seed(0)
    draw(whole.parameters(), generator)
    rows = torch.randn(ROWS, width, generator=generator).to(next(whole.parameters()))
    with user_code(f"expert `{path}` fails on {ROWS} tokens of width {width}"):
        expected = whole(rows)
    linears = {name: part for name, part in parts_of(whole, nn.Linear).items() if name and type(part) is nn.Linear}
    for name, linear in reversed(linears.items()):
        features = features_of(whole, name)
        with contextlib.suppress(MoepruneError), user_code("without the linear it fails"):
            taken = features(rows)
            is_taken = isinstance(taken, Tensor) and taken.shape == (ROWS, linear.in_features)
            if is_taken and _is_same(linear(taken), expected):
                return name
    return None
