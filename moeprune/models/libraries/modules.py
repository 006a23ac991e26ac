"""Experts that are modules of any kind, as ours, and back: features of tokens, and a linear behind them.

Where a module ends with a linear that is its last one; others get one that changes nothing, and that refits can change.

Axes: t tokens, d width, h features.
"""

import contextlib
import copy
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from moeprune.errors import MoepruneError, user_code
from moeprune.models.libraries.experts import parts_of, tolerance

ROWS = 16  # on which a module and its features are compared


@torch.no_grad()
def stack_modules(experts: nn.ModuleList, path: str, width: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return fields of GatedModulesConfig, and the stacked tensors of experts of this width, by our names.

    path: of the list, for errors. Raises a MoepruneError if experts differ in more than the values of their tensors.
    """
    linear, features = split(experts[0], f"{path}.0", width)
    states = [dict(expert.state_dict()) for expert in experts]
    for index, (expert, state) in enumerate(zip(experts, states, strict=True)):
        if type(expert) is not type(experts[0]) or _shapes(state) != _shapes(states[0]):
            raise MoepruneError(f"expert `{path}.{index}` has other tensors than `{path}.0`")
    tensors = {name: torch.stack([state[name] for state in states]) for name in states[0]}
    dtype = next(tensor.dtype for tensor in states[0].values() if tensor.is_floating_point())
    rows = torch.randn(2, width, generator=torch.Generator().manual_seed(1)).to(dtype)
    with FlopCounterMode(display=False) as flops:
        h = features(rows).shape[-1]
    own = {f"{linear}.weight": "fc2_weight", f"{linear}.bias": "fc2_bias"} if linear is not None else {}
    found = {own[name]: tensors.pop(name) for name in own if name in tensors}
    if linear is None:
        found["fc2_weight"] = torch.eye(width, dtype=dtype).repeat(len(experts), 1, 1)
    fields = {
        "hidden_dim": h,
        "bias": "fc2_bias" in found,
        "features": {name.replace(".", "/"): tuple(tensor.shape[1:]) for name, tensor in tensors.items()},
        "feature_flops": flops.get_total_flops() // len(rows),
    }
    return fields, found | {f"features/{name.replace('.', '/')}": tensor for name, tensor in tensors.items()}


def unstack_modules(tensors: Mapping[str, Tensor], experts: nn.ModuleList, width: int) -> dict[str, Tensor]:
    """Return stacked tensors as those of the list of experts, by their names in it.

    Raises a MoepruneError if experts of this kind have no last linear.
    """
    linear, _ = split(experts[0], "0", width)
    if linear is None:
        raise MoepruneError(f"a {type(experts[0]).__qualname__} has no last linear that could take what was fitted")
    names = {"fc2_weight": f"{linear}.weight", "fc2_bias": f"{linear}.bias"}
    stacks = {
        names.get(key, key.removeprefix("features/").replace("/", ".")): tensor
        for key, tensor in tensors.items()
        if key.startswith(("features/", "fc2_"))
    }
    return {f"{j}.{name}": stack[j] for name, stack in stacks.items() for j in range(len(stack))}


@torch.no_grad()
def split(expert: nn.Module, path: str, width: int) -> tuple[str | None, nn.Module]:
    """Return the name of the linear that an expert ends with, None if there is none, and a module of what it takes.

    Raises a MoepruneError if tensors of the expert have several types, or it cannot be copied or run.
    """
    types = {tensor.dtype for tensor in expert.state_dict().values()}
    if len(types) != 1 or not next(iter(types)).is_floating_point:
        raise MoepruneError(f"expert `{path}` has tensors of the types {', '.join(sorted(map(str, types))) or 'none'}")
    with user_code(f"expert `{path}` fails on {ROWS} tokens of width {width}"):
        whole = copy.deepcopy(expert).eval()
        rows = torch.randn(ROWS, width, generator=torch.Generator().manual_seed(1)).to(next(iter(types)))
        expected = whole(rows)
    for name, linear in reversed(parts_of(whole, nn.Linear).items()):
        features = copy.deepcopy(whole)
        features.set_submodule(name, nn.Identity())
        with contextlib.suppress(MoepruneError), user_code("without the linear it fails"):
            taken = features(rows)
            if isinstance(taken, Tensor) and taken.shape == (ROWS, linear.in_features):
                change = F.linear(taken, linear.weight, linear.bias) - expected
                if float(change.abs().max()) <= tolerance(rows.dtype) * float(expected.abs().max()):
                    return name, features
    return None, whole


def _shapes(state: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in state.items()}
