"""Experts that are modules of their own: linears with an activation or a gate between them, as ours, and back.

Which linears, which activation and which half is the gate is tried, not read: a form is taken if a copy of the
expert with random weights computes it.
"""

import contextlib
import copy
import math
from collections.abc import Iterator, Mapping
from itertools import permutations
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from moeprune.errors import MoepruneError, user_code
from moeprune.layers.activations import ACTIVATIONS
from moeprune.layers.experts import Experts
from moeprune.layers.interface import Activation

M = TypeVar("M", bound=nn.Module)
ROWS = 16  # on which experts are compared


class Form(NamedTuple):
    """How an expert computes; linears are paths in it.

    first: none for an expert of one linear, two if the values and their gate have a linear each.
    gate_first: the first half of the one first linear's output gates the second.
    """

    first: tuple[str, ...]
    last: str
    activation: Activation = "gelu"
    gate_first: bool = False

    def tensors(self, expert: nn.Module) -> dict[str, Tensor]:
        """Return the expert's tensors by their names in Experts; with zeros for a bias that only some linears have."""
        linears = parts_of(expert, nn.Linear)
        last, first = linears[self.last], [linears[path] for path in self.first]
        found = {"fc2_weight": last.weight, "fc2_bias": _bias(last)}
        if first:
            weight, bias = _joined([part.weight for part in first]), _joined([_bias(part) for part in first])
            found |= {"fc1_weight": self.reordered(weight).mT, "fc1_bias": self.reordered(bias)}
        if all(part.bias is None for part in (last, *first)):
            found = {key: tensor for key, tensor in found.items() if not key.endswith("bias")}
        return {key: tensor.detach() for key, tensor in found.items()}

    def restored(self, expert: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the tensors of an expert as the state dict of the original, which has this form."""
        parts = {self.last: (tensors["fc2_weight"], tensors.get("fc2_bias"))}
        if self.first:
            weights = self.reordered(tensors["fc1_weight"].mT).chunk(len(self.first))
            bias = tensors.get("fc1_bias")
            biases = [None] * len(weights) if bias is None else self.reordered(bias).chunk(len(weights))
            parts |= dict(zip(self.first, zip(weights, biases, strict=True), strict=True))
        named = {
            f"{path}.{key}".lstrip("."): tensor.contiguous()
            for path, of_linear in parts.items()
            for key, tensor in zip(("weight", "bias"), of_linear, strict=True)
            if tensor is not None
        }
        known = expert.state_dict().keys()
        for key in named.keys() - known:
            if not key.endswith("bias") or named[key].any():
                raise MoepruneError(f"a {type(expert).__qualname__} has no `{key}` that could take what was fitted")
        return {key: tensor for key, tensor in named.items() if key in known}

    def reordered(self, rows: Tensor) -> Tensor:
        """Return the rows of a first linear with its halves swapped if need be, in both directions."""
        return rows.roll(len(rows) // 2, 0) if self.gate_first else rows

    @torch.no_grad()
    def error(self, expert: nn.Module) -> float:
        """Return the largest difference from what an expert computes, relative to that; infinite if it does not run."""
        tensors = {key: tensor[None] for key, tensor in self.tensors(expert).items()}
        weight = tensors.get("fc1_weight", tensors["fc2_weight"].mT)
        rows = torch.randn(2, ROWS // 2, weight.shape[1], generator=torch.Generator().manual_seed(1)).to(weight)
        absent = dict.fromkeys(Experts._fields[:4])
        found = Experts(**absent | tensors, activation=self.activation).run(rows.flatten(0, 1)[None])  # type: ignore[arg-type]
        found = found.unflatten(1, rows.shape[:2])[0]
        with contextlib.suppress(MoepruneError), user_code("an expert fails"):
            expected = expert(rows)
            if isinstance(expected, Tensor) and expected.shape == found.shape:
                difference = float((found - expected).abs().max())
                return difference / max(float(expected.abs().max()), torch.finfo(weight.dtype).tiny)
        return math.inf


def stack_experts(layer: nn.Module, name: str, prefix: str | None = None) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return fields of SoftMoEConfig, and the stacked tensors of a layer's experts by their names in Experts.

    name: of the layer, for errors. prefix: of the list of experts; None: the first list that there is.

    Raises a MoepruneError if an expert computes something else than moeprune can, or not what the first one does.
    """
    prefix, experts = _list_of(layer, prefix)
    path = f"{name}.{prefix}".lstrip(".")
    form, stacks = form_of(experts[0], f"{path}.0"), []
    for index, expert in enumerate(experts):
        if index and not _has(form, expert, experts[0]):
            raise MoepruneError(f"expert `{path}.{index}`, {_made_of(expert)}, does not compute what `{path}.0` does")
        stacks.append(form.tensors(expert))
    tensors = {key: torch.stack([stack[key] for stack in stacks]) for key in stacks[0]}
    last = tensors["fc2_weight"]
    is_gated = bool(form.first) and tensors["fc1_weight"].shape[2] == 2 * last.shape[2]
    kind = "linear" if not form.first else "mlp" if not is_gated else "geglu" if form.activation == "gelu" else "glu"
    d = tensors["fc1_weight"].shape[1] if form.first else last.shape[2]
    fields = {
        "hidden_dim": last.shape[2] if form.first else None,
        "expert": kind,
        "out_dim": None if last.shape[1] == d else last.shape[1],
        "activation": form.activation,
        "bias": "fc2_bias" in tensors,
    }
    return fields, tensors


def unstack_experts(tensors: Mapping[str, Tensor], layer: nn.Module, prefix: str | None = None) -> dict[str, Tensor]:
    """Return stacked tensors as those of a layer's experts, by their names in it; prefix: see `stack_experts`."""
    prefix, experts = _list_of(layer, prefix)
    form, unstacked = form_of(experts[0], f"{prefix}.0"), dict[str, Tensor]()
    own = {key: tensor for key, tensor in tensors.items() if key in Experts._fields}
    for j in range(len(own["fc2_weight"])):
        restored = form.restored(experts[0], {key: tensor[j] for key, tensor in own.items()})
        unstacked |= {f"{prefix}.{j}.{key}": tensor for key, tensor in restored.items()}
    return unstacked


def _list_of(layer: nn.Module, prefix: str | None) -> tuple[str, nn.ModuleList]:
    lists = parts_of(layer, nn.ModuleList)
    prefix = next(iter(lists)) if prefix is None else prefix
    return prefix, lists[prefix]


def resized(expert: M, width: int) -> M:
    """Return a copy of an expert with so many hidden units; the weights of linears that change are to be loaded."""
    form, copied = form_of(expert, "0"), copy.deepcopy(expert)
    linears = parts_of(copied, nn.Linear)
    hidden = linears[form.last].in_features
    for path in (*form.first, form.last) if form.first and width != hidden else ():
        old, is_last = linears[path], path == form.last
        taken, given = (width, old.out_features) if is_last else (old.in_features, old.out_features * width // hidden)
        smaller = nn.utils.skip_init(nn.Linear, taken, given, bias=old.bias is not None, dtype=old.weight.dtype)
        copied.set_submodule(path, smaller)
    return copied


def parts_of(module: nn.Module, kind: type[M]) -> dict[str, M]:
    """Return the parts of a kind by their path in the module, in the order of the data flow."""
    return {path: part for path, part in module.named_modules() if isinstance(part, kind)}


def form_of(expert: nn.Module, name: str) -> Form:
    """Return what an expert computes, or raise a MoepruneError if that is nothing that moeprune can express."""
    dtype = next((tensor.dtype for tensor in expert.parameters()), torch.float64)
    for tried in dict.fromkeys((torch.float64, dtype)) if _has_only_linears(expert) else ():
        with user_code(f"expert `{name}` cannot be copied"), torch.no_grad():
            drawn, generator = copy.deepcopy(expert).eval().to(tried), torch.Generator().manual_seed(0)
            for tensor in drawn.parameters():  # hidden values go to where activations differ
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * 4 / math.sqrt(tensor.shape[-1]))
        errors: dict[Form, float] = {}
        for form in _candidates(parts_of(drawn, nn.Linear)):
            errors[form] = form.error(drawn)
            if errors[form] <= tolerance(torch.float64):
                return form
        best = min(errors, key=lambda form: errors[form], default=None)
        if best is not None and errors[best] <= tolerance(tried):
            return best
        if best is not None and tolerance(torch.float32) < errors[best] < math.inf:  # more than rounding
            break
    raise MoepruneError(
        f"expert `{name}` is {_made_of(expert)}, and computes none of: one linear; two linears with an activation or"
        " a gate between them; three linears, of which one gates another",
        f"known activations are {', '.join(ACTIVATIONS)}",
    )


def _candidates(linears: Mapping[str, nn.Linear]) -> Iterator[Form]:
    """Yield all forms that the shapes of an expert's linears allow, those in the order of the linears first."""
    if len(linears) == 1:
        yield Form((), next(iter(linears)))
    for first, last in permutations(linears, 2) if len(linears) == 2 else ():
        out, width = linears[first].out_features, linears[last].in_features
        halves = [False] if out == width else [False, True] if out == 2 * width else []
        yield from (Form((first,), last, activation, half) for half in halves for activation in ACTIVATIONS)
    for values, gate, last in permutations(linears, 3) if len(linears) == 3 else ():
        shape = linears[values].weight.shape
        if shape == linears[gate].weight.shape and shape[0] == linears[last].in_features:
            yield from (Form((values, gate), last, activation) for activation in ACTIVATIONS)


def _has(form: Form, expert: nn.Module, reference: nn.Module) -> bool:
    """Return True if an expert has a form, and tensors like those of another one."""
    if not _has_only_linears(expert) or _shapes(expert) != _shapes(reference):
        return False
    return form.error(expert) <= tolerance(next(expert.parameters()).dtype)


def _shapes(module: nn.Module) -> dict[str, torch.Size]:
    return {key: tensor.shape for key, tensor in module.state_dict().items()}


def _has_only_linears(expert: nn.Module) -> bool:
    linears = parts_of(expert, nn.Linear)
    own = {f"{path}.{key}".lstrip(".") for path, linear in linears.items() for key in linear.state_dict()}
    return set(expert.state_dict()) == own


def _made_of(expert: nn.Module) -> str:
    leaves = [part for part in expert.modules() if not any(part.children())]
    return f"a {type(expert).__name__} of {', '.join(map(str, leaves))}"


def tolerance(dtype: torch.dtype) -> float:
    """Return the relative error up to which outputs are the same."""
    return math.sqrt(torch.finfo(dtype).eps) / 2


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)  # which copies


def _bias(linear: nn.Linear) -> Tensor:
    return linear.weight.new_zeros(linear.out_features) if linear.bias is None else linear.bias
