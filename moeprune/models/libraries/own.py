"""Token-gated layers of the user's own code, a router and a list of experts, as ours.

How the router gates is tried, not read: gates are taken with which a copy of the layer with random weights gives what
it gives.

Axes: t tokens, d width, n experts.
"""

import itertools
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from moeprune.errors import MoepruneError, user_code
from moeprune.layers.gated_config import GatedModulesConfig, GatedMoEConfig, Gates
from moeprune.layers.gated_modules import GatedModules
from moeprune.layers.layer import MoELayer, layer_of_tensors
from moeprune.models.libraries.experts import stack_experts, tolerance, unstack_experts
from moeprune.models.libraries.modules import copied, draw, features_of, stack_modules, unstack_modules

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


def has_experts(module: nn.Module) -> bool:
    """Return True for a module with a list of experts, and a matrix beside it that may be a router."""
    _, experts = _experts(module)
    others = _others(module) if experts else {}
    return any(tensor.ndim == 2 and len(experts) in tensor.shape for tensor in others.values())


def describe_gated(module: nn.Module, name: str) -> tuple[GatedMoEConfig, dict[str, Tensor]]:
    """Return the config of our layer that computes the same, and its tensors.

    name: of the layer, for errors. Raises a MoepruneError if ours cannot compute the same.
    """
    router, others, (path, experts) = router_of(module, name), _others(module), _experts(module)
    of_router = {key: router.turned(key, others[of_layer]) for key, of_layer in router.names.items()}
    n, d = of_router["router_weight"].shape
    shared: dict[str, Any] = {
        "dim": d, "num_experts": n, "experts_per_token": None if router.top_k == n else router.top_k,
        "gates": router.gates, "normalized": router.normalized, "router_bias": "router_bias" in of_router,
        "selection_bias": "selection_bias" in of_router,
    }  # fmt: skip
    try:
        fields, tensors = stack_experts(module, name, path)
    except MoepruneError:  # they are more than linears, or differ
        fields, tensors = stack_modules(experts, f"{name}.{path}".lstrip("."), d)
        config: GatedMoEConfig = GatedModulesConfig(**shared, **fields)
    else:
        kind = fields.pop("expert")
        del fields["out_dim"]  # that of the input
        fields |= {"expert": "glu" if kind == "geglu" else kind, "gate_columns": "last"}
        config = GatedMoEConfig(**shared, **fields)
    return _with_type_of_logits(module, name, config, of_router | tensors), of_router | tensors


@torch.no_grad()
def _with_type_of_logits(
    module: nn.Module, name: str, config: GatedMoEConfig, tensors: Mapping[str, Tensor]
) -> GatedMoEConfig:
    """Return the config with logits in the type that a layer has them in: only with weights of 16 bits that shows."""
    weight = tensors["router_weight"]
    if weight.dtype.itemsize > 2:
        return config
    rows = torch.randn(TOKENS, config.dim, generator=torch.Generator().manual_seed(2)).to(weight)
    found, expected = [], _outputs(copied(module), rows, name).float()
    for tried in (config, config.replace(float32_router=True)):
        ours = layer_of_tensors(tried, None, tensors)
        complete(ours, module)
        found.append((float((ours(rows[None])[0].float() - expected).norm()), tried))
    return min(found, key=lambda each: each[0])[1]


def complete(ours: MoELayer, theirs: nn.Module) -> None:
    """Give our layer the module of an expert, if it runs one."""
    if isinstance(ours, GatedModules):
        _, experts = _experts(theirs)
        if not experts:
            raise MoepruneError(f"a {type(theirs).__qualname__} has no list of experts", "the code changed")
        ours.module_of_expert = (features_of(experts[0], ours.config.last),)


def restored(module: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of our layer by their names in one of the user's.

    Raises a MoepruneError if the user's has tensors that ours does not have.
    """
    router, others, (path, experts) = router_of(module, type(module).__qualname__), _others(module), _experts(module)
    found, kind = dict[str, Tensor](), f"a {type(module).__qualname__}"
    for key, of_layer in router.names.items():
        places = [name for name in others if others[name].data_ptr() == others[of_layer].data_ptr()]
        found |= dict.fromkeys(places, router.turned(key, tensors[key]))
    if unknown := sorted(others.keys() - found):
        raise MoepruneError(f"`{unknown[0]}` of {kind} takes no part in its output, and has not been kept")
    if len({id(expert) for expert in experts}) < len(experts):
        raise MoepruneError(f"{kind} has one expert in several places, which are different ones here")
    if not any(key.startswith("features/") for key in tensors):
        return found | unstack_experts(tensors, module, path)
    of_experts = unstack_modules(tensors, experts[0])
    return found | {f"{path}.{name}": tensor for name, tensor in of_experts.items()}


@torch.no_grad()
def router_of(module: nn.Module, name: str) -> Router:
    """Return how a layer gates its experts; name: of the layer, for errors.

    Raises a MoepruneError if that is nothing that moeprune can express.
    """
    drawn, generator = copied(module).float(), torch.Generator().manual_seed(0)
    (_, experts), others = _experts(drawn), _others(drawn)
    n = len(experts)
    of_router = [tensor for tensor in others.values() if n in tensor.shape and tensor.is_floating_point()]
    draw([*experts.parameters(), *of_router], generator)
    matrix = next(tensor for tensor in of_router if tensor.ndim == 2)
    d = matrix.numel() // n
    rows = torch.randn(TOKENS, d, generator=generator).to(matrix)
    expected = _outputs(drawn, rows, name)
    outputs = torch.stack([_run(expert, rows, name) for expert in experts], 1)
    best = min(_tried(others, rows, outputs, expected), key=lambda router: router.error, default=None)
    if best is None or not best.error <= tolerance(rows.dtype):
        raise MoepruneError(
            f"layer `{name}`, a {type(module).__qualname__}, has experts and perhaps a router, and computes none of:"
            " softmax or sigmoid gates, of all experts or of the best of each token, divided by their sum or not, times"
            " what these experts give"
        )
    return best


def _outputs(layer: nn.Module, rows: Tensor, name: str) -> Tensor:
    """Return what a layer gives for tokens (t,d), be they of inputs, or alone."""
    try:
        return _run(layer, rows.unflatten(0, (2, -1)), name).flatten(0, 1)
    except MoepruneError:
        return _run(layer, rows, name)


def _run(module: nn.Module, tokens: Tensor, name: str) -> Tensor:
    """Return what a layer, or one of its experts, gives for tokens (…,d)."""
    kind, shape = type(module).__qualname__, list(tokens.shape)
    with user_code(f"layer `{name}`: a {kind} fails on random tokens of the shape {shape}"):
        found = module(tokens)
    if not isinstance(found, Tensor) or found.shape != tokens.shape:
        given = list(found.shape) if isinstance(found, Tensor) else f"a {type(found).__name__}"
        raise MoepruneError(f"layer `{name}`: a {kind} gives {given} for tokens of the shape {shape}")
    return found


def _experts(module: nn.Module) -> tuple[str, nn.ModuleList]:
    """Return the name of a layer's list of experts, and the list; an empty one if there is none."""
    for name, part in module.named_children():
        if isinstance(part, nn.ModuleList) and len(part) > 1 and re.search("(?<!shared_)expert", name.lower()):
            return name, part
    return "", nn.ModuleList()


def _others(module: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of a layer that are not its experts'."""
    path, _ = _experts(module)
    return {name: tensor for name, tensor in module.state_dict().items() if not name.startswith(f"{path}.")}


def _tried(others: Mapping[str, Tensor], tokens: Tensor, outputs: Tensor, expected: Tensor) -> Iterator[Router]:
    """Yield all routers that tensors allow, each with the number of experts that fits best.

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
