"""Layers of other libraries in models of the user's own code: as ours, and back.

soft-moe (bwconrad): tokens and phi of unit length, normalised tokens dispatched.
soft-moe-pytorch (lucidrains): RMSNorm or LayerNorm on tokens and slots; MLPs or GEGLUs; dynamic slots.
soft-mixture-of-experts (fkodom): no normalisation; an expert is one linear, and the layer replaces the
    second linear of an MLP. Release 0.1 takes the dispatch softmax over the batch by mistake.
moeprune: our own layers, which need no translation.
own: token-gated layers of the user's own code, a router and a list of experts; see moeprune.models.libraries.own.
"""

import copy
import re
from collections.abc import Iterable, Mapping
from importlib import metadata
from typing import Any

import torch
from torch import Tensor, nn

from moeprune import __version__
from moeprune.errors import MoepruneError
from moeprune.layers.config import RouterNorm, SoftMoEConfig
from moeprune.layers.gated_modules import GatedModules
from moeprune.layers.interface import LayerConfig
from moeprune.layers.layer import MoELayer, new_layer
from moeprune.models.libraries.experts import parts_of, resized, stack_experts, unstack_experts
from moeprune.models.libraries.own import complete, describe_gated, has_experts, restored
from moeprune.records import to_json

Tensors = Mapping[str, Tensor]
Described = tuple[LayerConfig, dict[str, Tensor]]


class LayerLibrary:
    """A library of layers.

    name: on PyPI and on the command line. classes: full names of its layers' classes. experts: begins the names of
    experts' tensors. routers: the names of all others, of each kind of layer.
    """

    name: str
    classes: tuple[str, ...] = ()
    experts = r"experts\.(experts\.)?\d+\."
    routers: tuple[set[str], ...] = ()

    def recognises(self, module: nn.Module) -> bool:
        """Return True for a layer of this library."""
        return f"{type(module).__module__}.{type(module).__qualname__}" in self.classes

    def resembles(self, module: nn.Module) -> bool:
        """Return True for a layer with the tensors of this library's, such as a subclass or a copy of its code."""
        names = module.state_dict().keys() if hasattr(module, "experts") else ()
        others = {name for name in names if not re.match(self.experts, name)}
        return others in self.routers and len(others) < len(names)

    def describe(self, module: nn.Module, name: str, tokens: int, version: str | None) -> Described:
        """Return the config of our layer that computes the same, and its tensors.

        Args:
            name: of the layer, for errors.
            tokens: m, of one input.
            version: of the library, if the user names it; `unknown` for a copy of its code.

        Raises:
            MoepruneError: ours cannot compute the same.
        """
        raise NotImplementedError

    def complete(self, ours: MoELayer, theirs: nn.Module) -> None:
        """Give our layer what it runs of theirs, if anything."""

    def restore(self, module: nn.Module, tensors: Tensors) -> dict[str, Tensor]:
        """Return the tensors of our layer, unpruned or with fewer experts, as the state dict of such a module."""
        raise NotImplementedError

    def arguments(self, module: nn.Module, config: LayerConfig) -> dict[str, Any]:
        """Return the arguments with which the module's class builds a layer of this config, JSON values."""
        raise NotImplementedError

    def rebuild(self, module: nn.Module, config: LayerConfig) -> nn.Module:
        """Return a new layer of this config, such as one of fewer experts, of the module's own class."""
        return type(module)(**self.arguments(module, config))

    def older_name(self, name: str) -> str:
        """Return the name that a tensor of a model had in older releases."""
        return name


class _SoftMoE(LayerLibrary):
    name = "soft-moe"
    classes = ("soft_moe.soft_moe.SoftMoELayerWrapper",)
    routers = ({"phi"}, {"phi", "scale"})

    def describe(self, module: nn.Module, name: str, tokens: int, version: str | None) -> Described:
        fields, experts = stack_experts(module, name)
        router = _router(module.state_dict())
        d, n, p = router["phi"].shape
        norm: dict[str, Any] = {"router_norm": "none", "dispatch_input": "raw"}
        if "scale" in router:
            norm = {"router_norm": "l2", "dispatch_input": "normalized"}
        return SoftMoEConfig(d, n, p, **norm, **fields), router | experts

    def restore(self, module: nn.Module, tensors: Tensors) -> dict[str, Tensor]:
        return _router(tensors) | unstack_experts(tensors, module)

    def arguments(self, module: nn.Module, config: LayerConfig) -> dict[str, Any]:
        assert isinstance(config, SoftMoEConfig)
        sizes = {"dim": config.dim, "num_experts": config.num_experts, "slots_per_expert": config.slots_per_expert}
        return sizes | {"normalize": config.router_norm == "l2"}  # and `layer` with its own arguments

    def rebuild(self, module: nn.Module, config: LayerConfig) -> nn.Module:
        expert = resized(module.get_submodule("experts.0"), config.expert_width)
        return type(module)(**self.arguments(module, config), layer=lambda: copy.deepcopy(expert))


def _router(tensors: Tensors) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if name in ("phi", "scale")}


class _SoftMoEPytorch(LayerLibrary):
    name = "soft-moe-pytorch"
    classes = ("soft_moe_pytorch.soft_moe.SoftMoE", "soft_moe_pytorch.soft_moe_with_dynamic_slots.DynamicSlotsSoftMoE")
    routers = (
        {"norm.gamma", "slot_norm.gamma", "slot_embeds"},
        {"norm.gamma", "norm.beta", "slot_norm.gamma", "slot_norm.beta", "slot_embeds"},
        {"norm.gamma", "to_slot_embeds.0.weight", "to_slot_embeds.2.gamma"},
    )

    def describe(self, module: nn.Module, name: str, tokens: int, version: str | None) -> Described:
        found = module.state_dict()
        fields, experts = stack_experts(module, name)
        if any(found[key].any() for key in ("norm.beta", "slot_norm.beta") if key in found):
            raise MoepruneError(f"layer `{name}` has a `beta` that is not zero, which moeprune cannot express")
        experts["input_gain"] = found["norm.gamma"]
        if "slot_embeds" not in found:
            projection, gain = found["to_slot_embeds.0.weight"], found["to_slot_embeds.2.gamma"]  # (n·d,d), (d)
            d = len(gain)
            n = len(projection) // d
            slots = -(-tokens // n)  # rounded up
            config = SoftMoEConfig(d, n, slots, router_norm="rms", dynamic_slots=True, **fields)
            return config, experts | {"slot_projection": projection.unflatten(0, (n, d)), "phi_gain": gain}
        n, p, d = found["slot_embeds"].shape
        norm: RouterNorm = "layer" if "norm.beta" in found else "rms"
        router = {"phi": found["slot_embeds"].permute(2, 0, 1).contiguous(), "phi_gain": found["slot_norm.gamma"]}
        return SoftMoEConfig(d, n, p, router_norm=norm, **fields), experts | router

    def restore(self, module: nn.Module, tensors: Tensors) -> dict[str, Tensor]:
        restored = unstack_experts(tensors, module) | {"norm.gamma": tensors["input_gain"]}
        if "slot_projection" in tensors:
            restored["to_slot_embeds.0.weight"] = tensors["slot_projection"].flatten(0, 1)
            restored["to_slot_embeds.2.gamma"] = tensors["phi_gain"]
        else:
            restored["slot_embeds"] = tensors["phi"].permute(1, 2, 0).contiguous()
            restored["slot_norm.gamma"] = tensors["phi_gain"]
        if "norm.beta" in module.state_dict():
            zero = torch.zeros_like(tensors["input_gain"])
            restored |= {"norm.beta": zero, "slot_norm.beta": zero.clone()}
        return restored

    def arguments(self, module: nn.Module, config: LayerConfig) -> dict[str, Any]:
        assert isinstance(config, SoftMoEConfig)
        factor = 2 / 3 if config.is_gated else 1
        mult = config.expert_width / config.dim / factor
        mults = round(mult), mult, mult + 0.5 / config.dim / factor  # the library rounds the width down
        arguments: dict[str, Any] = {"dim": config.dim, "num_experts": config.num_experts}
        if not config.dynamic_slots:  # the library's default follows from `seq_len` and the number of experts
            arguments |= {"num_slots": config.slots_per_expert, "use_layernorm": config.router_norm == "layer"}
        rate = max((dropout.p for dropout in parts_of(module, nn.Dropout).values()), default=0)
        return arguments | {
            "expert_mult": next(mult for mult in mults if int(config.dim * mult * factor) == config.expert_width),
            "geglu": config.is_gated,
            "dropout": rate,
        }

    def older_name(self, name: str) -> str:
        return re.sub(r"\bexperts\.experts\.(?=\d)", "experts.", name)


class _SoftMixtureOfExperts(LayerLibrary):
    name = "soft-mixture-of-experts"
    classes = ("soft_mixture_of_experts.soft_moe.SoftMoE",)
    experts = r"experts\.(weight|bias)$"
    routers = ({"phi"},)

    def describe(self, module: nn.Module, name: str, tokens: int, version: str | None) -> Described:
        release = version or installed_version(self.name)
        is_over_batch = f"{release}.".startswith("0.1.")
        if is_over_batch and version is None:
            raise MoepruneError(
                f"layer `{name}` is from {self.name} {release}, whose dispatch softmax runs over the batch:"
                " the output for one input depends on the others",
                "install release 0.2.0 or newer, or, if the model was trained and is to run this way, give"
                f" `--source {self.name}==0.1.0`",
            )
        found = module.state_dict()
        d, n, p = found["phi"].shape
        weight = found["experts.weight"].mT.contiguous()  # (n,out,in)
        out = weight.shape[1]
        config = SoftMoEConfig(
            d, n, p, None, "none", "raw", "linear", None if out == d else out,
            dispatch_over="batch" if is_over_batch else "tokens", bias="experts.bias" in found,
        )  # fmt: skip
        bias = {"fc2_bias": found["experts.bias"]} if config.bias else {}
        return config, {"phi": found["phi"], "fc2_weight": weight} | bias

    def restore(self, module: nn.Module, tensors: Tensors) -> dict[str, Tensor]:
        restored = {"phi": tensors["phi"], "experts.weight": tensors["fc2_weight"].mT.contiguous()}
        bias = {"experts.bias": tensors["fc2_bias"]} if "experts.bias" in module.state_dict() else {}
        return restored | bias

    def arguments(self, module: nn.Module, config: LayerConfig) -> dict[str, Any]:
        assert isinstance(config, SoftMoEConfig)
        return {
            "in_features": config.dim,
            "out_features": config.output_width,
            "num_experts": config.num_experts,
            "slots_per_expert": config.slots_per_expert,
            "bias": "experts.bias" in module.state_dict(),
        }


class _UsersLayers(LayerLibrary):
    name = "own"

    def resembles(self, module: nn.Module) -> bool:
        return has_experts(module) and not lookalikes(module.state_dict())

    def describe(self, module: nn.Module, name: str, tokens: int, version: str | None) -> Described:
        return describe_gated(module, name)

    def complete(self, ours: MoELayer, theirs: nn.Module) -> None:
        complete(ours, theirs)

    def restore(self, module: nn.Module, tensors: Tensors) -> dict[str, Tensor]:
        return restored(module, tensors)

    def arguments(self, module: nn.Module, config: LayerConfig) -> dict[str, Any]:
        return {"num_experts": config.num_experts}  # whatever the class calls it

    def rebuild(self, module: nn.Module, config: LayerConfig) -> nn.Module:
        raise MoepruneError(f"it is not known how a {type(module).__qualname__} is built with fewer experts")


class _OwnLayers(LayerLibrary):
    name = "moeprune"

    def recognises(self, module: nn.Module) -> bool:
        return isinstance(module, MoELayer)

    def describe(self, module: nn.Module, name: str, tokens: int, version: str | None) -> Described:
        assert isinstance(module, MoELayer)
        if module.plan is not None:
            raise MoepruneError(f"layer `{name}` is already pruned", "adopt the unpruned model")
        return module.config, dict(module.state_dict())

    def complete(self, ours: MoELayer, theirs: nn.Module) -> None:
        if isinstance(ours, GatedModules) and isinstance(theirs, GatedModules):
            ours.module_of_expert = theirs.module_of_expert

    def restore(self, module: nn.Module, tensors: Tensors) -> dict[str, Tensor]:
        return dict(tensors)

    def arguments(self, module: nn.Module, config: LayerConfig) -> dict[str, Any]:
        return {"config": to_json(config)}

    def rebuild(self, module: nn.Module, config: LayerConfig) -> nn.Module:
        return new_layer(config)


LAYERS: dict[str, LayerLibrary] = {
    library.name: library
    for library in (_SoftMoE(), _SoftMoEPytorch(), _SoftMixtureOfExperts(), _OwnLayers(), _UsersLayers())
}
"""Libraries of layers by name; the user's own code builds the models around them."""


def lookalikes(names: Iterable[str]) -> list[str]:
    """Return the paths of what holds slots and experts, by the names of a model's tensors."""
    every, found = list(names), dict[str, None]()
    for name in every:
        if slots := re.search(r"(^|\.)(phi|slots?|slot_embed(s|dings?)?|to_slot_embeds\..+)$", name):
            path = name[: slots.start()]
            for owner in (path, path.rpartition(".")[0]):  # the slots may be in a router beside the experts
                start = re.compile(re.escape(f"{owner}." if owner else "") + r"[^.]*expert")
                if any(map(start.match, every)):
                    found[owner] = None
                    break
    return list(found)


def installed_version(library: str) -> str | None:
    """Return the version of a library in this environment, None if it is not installed."""
    try:
        return __version__ if library == "moeprune" else metadata.version(library)
    except metadata.PackageNotFoundError:
        return None
