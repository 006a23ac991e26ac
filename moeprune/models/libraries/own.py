"""Token-gated layers of the user's own code, a router and a list of experts, as ours.

How the router gates is tried, not read: gates are taken with which a copy of the layer with random weights gives what
it gives.

Axes: t tokens, d width, n experts.
"""

import copy
import itertools
import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from moeprune.errors import MoepruneError, user_code
from moeprune.layers.gated_config import GatedModulesConfig, GatedMoEConfig, Gates
from moeprune.layers.gated_modules import GatedModules
from moeprune.layers.layer import MoELayer
from moeprune.models.libraries.experts import parts_of, stack_experts, tolerance, unstack_experts
from moeprune.models.libraries.modules import split, stack_modules, unstack_modules
from moeprune.models.tracing import IGNORE

TOKENS = 64  # on which outputs are compared
GATES: tuple[Gates, ...] = ("softmax", "sigmoid")


class Router(NamedTuple):
    """Which of a layer's tensors are the router's, by name, and how it gates.

    is_transposed: the weight is (d,n). top_k: experts of a token. error: of the layer's output, relative to that.
    """

    weight: str
    is_transposed: bool
    bias: str | None
    selection_bias: str | None
    gates: Gates
    normalized: bool
    top_k: int
    error: float

    @property
    def names(self) -> dict[str, str]:
        """Its tensors by our names."""
        names = {"router_weight": self.weight, "router_bias": self.bias, "selection_bias": self.selection_bias}
        return {key: name for key, name in names.items() if name is not None}

    def turned(self, key: str, tensor: Tensor) -> Tensor:
        """Return one of the tensors, by our name, as ours, and back."""
        return tensor.mT.contiguous() if key == "router_weight" and self.is_transposed else tensor


def has_router(module: nn.Module) -> bool:
    """Return True for a module with a list of experts, and something like a router beside it."""
    path, experts = _experts(module)
    is_list = len(experts) > 1 and "expert" in path.lower() and "." not in path
    return is_list and any(tensor.ndim == 2 and len(experts) in tensor.shape for tensor in _others(module).values())


def describe_gated(module: nn.Module, name: str) -> tuple[GatedMoEConfig, dict[str, Tensor]]:
    """Return the config of our layer that computes the same, and its tensors.

    name: of the layer, for errors. Raises a MoepruneError if ours cannot compute the same.
    """
    router, others = router_of(module, name), _others(module)
    of_router = {key: router.turned(key, others[of_layer]) for key, of_layer in router.names.items()}
    n, d = of_router["router_weight"].shape
    shared: dict[str, Any] = {
        "dim": d, "num_experts": n, "experts_per_token": None if router.top_k == n else router.top_k,
        "gates": router.gates, "normalized": router.normalized, "router_bias": "router_bias" in of_router,
        "selection_bias": "selection_bias" in of_router,
    }  # fmt: skip
    try:
        fields, tensors = stack_experts(module, name)
    except MoepruneError:  # they are more than linears
        path, experts = _experts(module)
        fields, tensors = stack_modules(experts, f"{name}.{path}".lstrip("."), d)
        return GatedModulesConfig(**shared, **fields), of_router | tensors
    kind = fields.pop("expert")
    del fields["out_dim"]  # that of the input
    shared |= {"expert": "glu" if kind == "geglu" else kind, "gate_columns": "last"}
    return GatedMoEConfig(**shared, **fields), of_router | tensors


def complete(ours: MoELayer, theirs: nn.Module) -> None:
    """Give our layer the module of an expert, if it runs one."""
    if isinstance(ours, GatedModules):
        ours.of_user = (split(_experts(theirs)[1][0], "0", ours.config.dim)[1],)


def restored(module: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of our layer by their names in one of the user's.

    Raises a MoepruneError if there is one that is not used, and has a place for each expert.
    """
    router, others = router_of(module, type(module).__qualname__), _others(module)
    n, k = others[router.weight].shape[int(router.is_transposed)], len(tensors["router_weight"])
    for name in others.keys() - {*router.names.values()}:
        if n != k and n in others[name].shape:
            raise MoepruneError(
                f"`{name}` of a {type(module).__qualname__} has a place for each expert, and is not used"
            )
    others |= {of_layer: router.turned(key, tensors[key]) for key, of_layer in router.names.items()}
    if not any(key.startswith("features/") for key in tensors):
        return others | unstack_experts(tensors, module)
    path, experts = _experts(module)
    of_experts = unstack_modules(tensors, experts, tensors["router_weight"].shape[1])
    return others | {f"{path}.{name}": tensor for name, tensor in of_experts.items()}


@torch.no_grad()
def router_of(module: nn.Module, name: str) -> Router:
    """Return how a layer gates its experts; name: of the layer, for errors.

    Raises a MoepruneError if that is nothing that moeprune can express.
    """
    with user_code(f"layer `{name}` cannot be copied", IGNORE.format(name)):
        drawn, generator = copy.deepcopy(module).eval().float(), torch.Generator().manual_seed(0)
    (_, experts), others = _experts(drawn), _others(drawn)
    n = len(experts)
    of_router = [tensor for tensor in others.values() if n in tensor.shape and tensor.is_floating_point()]
    for tensor in (*experts.parameters(), *of_router):
        tensor.copy_(torch.randn(tensor.shape, generator=generator) / math.sqrt(max(tensor.shape)))
    d = next(tensor.numel() // n for tensor in of_router if tensor.ndim == 2)
    tokens = torch.randn(2, TOKENS // 2, d, generator=generator)
    rows = tokens.flatten(0, 1)
    with user_code(f"layer `{name}` fails on random tokens", IGNORE.format(name)):
        expected, outputs = drawn(tokens), [expert(rows) for expert in experts]
    for found in (expected, *outputs):
        if not isinstance(found, Tensor) or found.shape not in (tokens.shape, rows.shape):
            given = list(found.shape) if isinstance(found, Tensor) else f"a {type(found).__name__}"
            raise MoepruneError(
                f"layer `{name}` or an expert of it gives {given} for tokens of width {d}", IGNORE.format(name)
            )
    tried = _tried(others, rows, torch.stack(outputs, 1), expected.view_as(rows))
    best = min(tried, key=lambda router: router.error, default=None)
    if best is None or not best.error <= tolerance(rows.dtype):
        raise MoepruneError(
            f"layer `{name}`, a {type(module).__qualname__}, has experts and perhaps a router, and computes none of:"
            " softmax or sigmoid gates, of all experts or of the best of each token, divided by their sum or not, times"
            " what these experts give",
            IGNORE.format(name),
        )
    return best


def _experts(module: nn.Module) -> tuple[str, nn.ModuleList]:
    """Return the name of a layer's list of experts, and the list; an empty one if there is none."""
    return next(iter(parts_of(module, nn.ModuleList).items()), ("", nn.ModuleList()))


def _others(module: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of a layer that are not its experts'."""
    path, _ = _experts(module)
    return {name: tensor for name, tensor in module.state_dict().items() if not name.startswith(f"{path}.")}


def _tried(others: Mapping[str, Tensor], tokens: Tensor, outputs: Tensor, expected: Tensor) -> Iterator[Router]:
    """Yield all routers that tensors allow, simple ones first, each with the number of experts that fits best.

    others: tensors that are not the experts'. tokens (t,d), the outputs of all experts for them (t,n,d), and what the
    layer gives (t,d).
    """
    n, d = outputs.shape[1:]
    added: list[str | None] = [None, *(name for name, tensor in others.items() if tensor.shape == (n,))]
    weights = [
        (name, is_transposed)
        for is_transposed, shape in ((False, (n, d)), (True, (d, n)))
        for name, tensor in others.items()
        if tensor.shape == shape
    ]
    for (name, is_transposed), bias, selection, gates in itertools.product(weights, added, added, GATES):
        if bias is not None and bias == selection:
            continue
        logits = tokens @ (others[name] if is_transposed else others[name].mT)
        logits = logits if bias is None else logits + others[bias]
        scores = logits.softmax(1) if gates == "softmax" else logits.sigmoid()
        order = (scores if selection is None else scores + others[selection]).argsort(1, descending=True)
        scores, of_order = scores.gather(1, order), outputs.gather(1, order[:, :, None].expand_as(outputs))
        sums = (scores[:, :, None] * of_order).cumsum(1)  # with 1, 2, … n experts
        for normalized in (False, True):
            found = sums / scores.cumsum(1)[:, :, None] if normalized else sums
            error, place = ((found - expected[:, None]).abs().amax((0, 2)) / expected.abs().max()).min(0)
            top_k = int(place) + 1
            yield Router(name, is_transposed, bias, selection, gates, normalized, top_k, float(error))
