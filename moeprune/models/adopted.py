"""Models of the user's own code: MoE layers of known libraries are replaced by ours, the rest stays."""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from moeprune.errors import MoepruneError, user_code
from moeprune.layers.config import SoftMoEConfig
from moeprune.layers.layer import MoELayer, layer_of_tensors, new_layer
from moeprune.models.architecture import AdoptedLayer, ModuleConfig
from moeprune.models.description import Details
from moeprune.models.extra import decode_extra, encode_extra
from moeprune.models.factory import import_factory, normalized, same_factory
from moeprune.models.libraries.layers import LAYERS, LayerLibrary, lookalikes
from moeprune.models.model import Model, names_of
from moeprune.models.runtime import input_dtype
from moeprune.models.tracing import IGNORE, Seen, failure, materialize, require_equal, see, windows_of
from moeprune.plan import Plan
from moeprune.records import pack

logger = logging.getLogger(__name__)
CHANGED = 1e-3  # of the largest logit
NAMED = ", ".join(name for name in LAYERS if name != "own")
Factory: TypeAlias = "str | Callable[..., nn.Module]"
"""Builds a model of the user's own code: a function, or its name, see `moeprune.models.factory`."""


class AdoptedModel(Model):
    """A model of the user's own code in which all MoE layers are ours; original: builds the code's own, if known."""

    config: ModuleConfig

    def __init__(self, module: nn.Module, config: ModuleConfig, details: Details, factory: Factory | None):
        super().__init__(config, details)
        self.module = module
        self.original = (
            None
            if factory is None
            else functools.partial(build, factory, config.unpacked_arguments, config.input_shape)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Inputs (b,c,H,W) in, logits (b,classes) out."""
        if torch.compiler.is_compiling():
            return self.module(x)
        with user_code(failure(self.module, self.config.factory, x)):
            return self.module(x)

    def state_dict(self, *arguments: Any, **options: Any) -> dict[str, Any]:  # type: ignore[override]
        """Return all tensors, those of an MoE layer of several names under the first of these; state of other types
        that modules keep (`get_extra_state`) is encoded in some.
        """
        with user_code("`state_dict` fails"):
            state = encode_extra(super().state_dict(*arguments, **options))
        others = tuple(f"{alias}." for aliases in self._aliases().values() for alias in aliases)
        return {name: tensor for name, tensor in state.items() if not name.startswith(others)}

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load what `state_dict` returned."""
        state = decode_extra(state_dict)
        for layer, aliases in self._aliases().items():
            own = {name.removeprefix(layer): value for name, value in state.items() if name.startswith(f"{layer}.")}
            state |= {alias + name: value for alias in aliases for name, value in own.items()}
        return super().load_state_dict(state, strict, assign)

    def _aliases(self) -> dict[str, list[str]]:
        return {name: [other for other in names_of(self, name) if other != name] for name in self.config.moe_layers}


def adopt(
    module: nn.Module,
    input_shape: tuple[int, int, int],
    factory: Factory | None = None,
    arguments: Mapping[str, Any] | None = None,
    source: str | None = None,
    ignore_layers: Sequence[str] = (),
) -> AdoptedModel:
    """Replace every MoE layer of a known library by ours, and return the model in eval mode.

    Layers of soft-moe, soft-moe-pytorch, soft-mixture-of-experts and moeprune are known, and token-gated ones of a
    router and a list of experts, see moeprune.models.libraries.own. The module itself is changed: its layers are ours
    from then on. A random input runs through it to find out in which order the layers run, on how many tokens, and what
    the rest of the model costs.

    Args:
        module: returns logits (b,classes) for inputs (b,c,H,W).
        input_shape: of one input (c,H,W).
        factory: the function that builds the module, or its name, `package.module:function` or
            `path/module.py:function`; needed to load a saved checkpoint again.
        arguments: keyword arguments of the factory: JSON values and tuples of them.
        source: the library and release that the model was trained with, such as
            `soft-mixture-of-experts==0.1.0`, if that is not the installed one.
        ignore_layers: names of layers that are left as they are.

    Raises:
        MoepruneError: no layer is known, a layer cannot be expressed or does not run exactly once, another one
            looks like a Soft MoE layer, or the output is not logits.
    """
    materialize(module, input_shape, name_of(factory))
    module.requires_grad_(False).eval()
    libraries = _known_layers(module, ignore_layers)
    names = sorted({library.name for library in libraries.values()})
    releases = parse_source(source)
    for stated in set(releases) - set(names):
        raise MoepruneError(f"the layers of the model are from {', '.join(names)}, not from `{stated}`")
    layers = dict[str, AdoptedLayer]()
    parent = nn.ModuleDict({"module": module})  # with the names of an AdoptedModel
    built_by = name_of(factory)
    x = torch.randn(2, *input_shape, generator=torch.Generator().manual_seed(0))
    x = x.to(next(module.parameters()).device, input_dtype(module))
    (first, logits), (second, _), (both, of_both) = (
        see(module, libraries, some, built_by) for some in (x[:1], x[1:], x)
    )
    ours = {
        name: _as_ours(name, libraries[name], module.get_submodule(name), (seen, second[name], both[name]), releases)
        for name, seen in first.items()
    }
    for name, our_layer in ours.items():  # only now, so that an error leaves the module as it is
        path = f"module.{name}".rstrip(".")
        for alias in names_of(parent, path):
            parent.set_submodule(alias, our_layer)
        layers[path] = AdoptedLayer(our_layer.config, libraries[name].name, first[name].tokens, len(layers))
    module = parent["module"]
    with FlopCounterMode(display=False) as flops, sdpa_kernel(SDPBackend.MATH):
        _, found = see(module, first, x[:1], built_by)  # fails if the code has kept a layer that was replaced
    _warn_of_change(found, logits, of_both[:1])
    counted = flops.get_flop_counts()
    other = flops.get_total_flops()
    for path, layer in layers.items():
        of_layer = counted.get(f"{type(module).__name__}.{path.removeprefix('module.')}", {})
        is_soft = isinstance(layer.layer, SoftMoEConfig)  # others also apply gates by a product, which is not counted
        other -= layer.layer.flops(layer.tokens).total if is_soft else sum(of_layer.values())
    if other < 0:  # products in threads of the model's own
        logger.warning("the FLOPs of all but the MoE layers cannot be counted in this model, and are left out")
    whole = ModuleConfig(built_by, pack(dict(arguments or {})), input_shape, logits.shape[1], layers, max(other, 0))
    return AdoptedModel(module, whole, Details(), factory).eval()


def _warn_of_change(found: Tensor, expected: Tensor, in_batch: Tensor) -> None:
    """Warn if logits (1,c) are not the expected ones, by more than these differ from those of the input in a batch."""
    scale = expected.float().abs().max().clamp_min(torch.finfo(torch.float32).tiny)
    change, noise = (float((each.float() - expected.float()).abs().max() / scale) for each in (found, in_batch))
    if change > CHANGED + 10 * noise:
        logger.warning(
            f"the model's output changes by {100 * change:.2g} % where moeprune's layers take the place of its own:"
            " hooks on these layers, and a `forward` set on one of them, are lost"
        )


def _as_ours(
    name: str,
    library: LayerLibrary,
    theirs: nn.Module,
    seen: tuple[Seen, Seen, Seen],
    releases: Mapping[str, str | None],
) -> MoELayer:
    """Return our layer that computes what a library's does; seen: by it of one input, of another, and of both."""
    windows, interleaved = windows_of(name, *seen)
    is_copy = not library.recognises(theirs)
    version = releases.get(library.name) or ("unknown" if is_copy else None)
    try:
        config, tensors = library.describe(theirs, name, seen[0].tokens, version)
    except MoepruneError as error:
        raise MoepruneError(error.message, error.hint or IGNORE.format(name)) from None
    if not isinstance(config, SoftMoEConfig) and (windows > 1 or seen[0].output.ndim > 3):
        raise MoepruneError(
            f"layer `{name}` gives {list(seen[0].output.shape)} for an input, expected its tokens (1, m, {config.dim})",
            f"call it with the tokens of each input in a row of the batch; {IGNORE.format(name)}",
        )
    if windows > 1:
        assert isinstance(config, SoftMoEConfig)
        config = config.replace(windows=windows, interleaved=interleaved)
    ours = layer_of_tensors(config, None, {key: tensor.detach() for key, tensor in tensors.items()})
    library.complete(ours, theirs)
    if is_copy:
        like = "a token-gated layer" if library.name == "own" else f"{library.name}'s layer"
        require_equal(name, like, theirs, ours, seen[2])
    return ours


def _known_layers(module: nn.Module, ignored: Sequence[str]) -> dict[str, LayerLibrary]:
    """Return the library of each known layer, by the name of the layer.

    Raises a MoepruneError if there is none, or something that is not ignored looks like a layer and is not known.
    """
    found: dict[str, LayerLibrary] = {}
    parts = dict(module.named_modules())
    if unknown := [name for name in ignored if name not in parts]:
        raise MoepruneError(f"no layer `{unknown[0]}` to ignore in {type(module).__name__}", "check `--ignore-layer`")
    for name, part in parts.items():
        known = [library for library in LAYERS.values() if library.recognises(part)]
        known = known or [library for library in LAYERS.values() if library.resembles(part)]
        is_around = known and known[0].name == "own" and _holds_layers(part)  # such as a head beside a trunk
        if known and not is_around and not _is_within(name, (*found, *ignored)):
            found[name] = known[0]
    tensors = [name for name, _ in (*module.named_parameters(), *module.named_buffers())]
    others = lookalikes(name for name in tensors if not _is_within(name, (*found, *ignored)))
    if others:
        named = ", ".join(f"`{name}` (a {type(parts[name]).__qualname__})" for name in others)
        raise MoepruneError(
            f"{named} in {type(module).__name__} looks like a Soft MoE layer, but like none of {NAMED}",
            f"use a layer of these libraries, or leave it as it is: `--ignore-layer {others[0]}`",
        )
    if not found:
        raise MoepruneError(
            f"no MoE layer of a known library in {type(module).__name__}",
            f"known are those of {NAMED}, and token-gated ones of your own code: a router beside a ModuleList with"
            " `expert` in its name",
        )
    return found


def _holds_layers(module: nn.Module) -> bool:
    """Return True for a module with a part that is like an MoE layer itself."""
    parts = [part for part in module.modules() if part is not module]
    return any(library.recognises(part) or library.resembles(part) for library in LAYERS.values() for part in parts)


def _is_within(name: str, layers: Sequence[str]) -> bool:
    return any(name == layer or not layer or name.startswith(f"{layer}.") for layer in layers)


def parse_source(text: str | None) -> dict[str, str | None]:
    """Return the library of a text such as `soft-mixture-of-experts==0.1.0`, and the release if it names one."""
    name, equals, version = (text or "").partition("==")
    if equals and not re.fullmatch(r"\d+(\.\d+)+", version):
        raise MoepruneError(f"source `{text}` names no release", f"give for example `{name}==0.1.0`")
    return {name: version or None} if name else {}


def skeleton(config: ModuleConfig, plan: Plan, details: Details, factory: Factory | None) -> AdoptedModel:
    """Return the model of a checkpoint, without its weights, if the factory is the expected one and has its layers."""
    name = config.factory or "package.module:function"
    if factory is None and config.factory is None:
        raise MoepruneError(
            "the file does not say which function builds the model", "give it: `--model`, in Python `model=build`"
        )
    if factory is None or (isinstance(factory, str) and not same_factory(factory, config.factory or factory)):
        stated = "none is given" if factory is None else f"given is `{factory}`"
        raise MoepruneError(
            f"the model is built by the factory `{name}`, {stated}", f"if you trust that code, add `--model {name}`"
        )
    model = AdoptedModel(build(factory, config.unpacked_arguments, config.input_shape), config, details, factory)
    for path, layer in config.moe_layers.items():
        with torch.device("meta"):
            ours = new_layer(layer, plan.get(path))
        try:
            LAYERS[config.layers[path].library].complete(ours, model.get_submodule(path))
            model.set_submodule(path, ours, strict=True)
        except AttributeError:
            theirs = path.removeprefix("module.")
            raise MoepruneError(f"`--model` builds a model without a layer `{theirs}`", "the code changed") from None
    return model


def build(factory: Factory, arguments: Mapping[str, Any], input_shape: tuple[int, int, int] | None = None) -> nn.Module:
    """Return the model that a factory builds; input_shape: (c,H,W), from which lazy layers get their tensors."""
    name = factory if isinstance(factory, str) else getattr(factory, "__qualname__", repr(factory))
    hint = "check its name and `--model-arg`, and that it can be imported from here"
    with user_code(f"`--model {name}` fails", hint):
        model = (import_factory(factory) if isinstance(factory, str) else factory)(**arguments)
    if not isinstance(model, nn.Module):
        raise MoepruneError(f"`--model {name}` builds a {type(model).__name__}, expected a torch module")
    if input_shape is not None:
        materialize(model, input_shape, name_of(factory))
    return model


def name_of(factory: Factory | None) -> str | None:
    """Return the name of a factory; None if it cannot be imported by that."""
    if factory is None or isinstance(factory, str):
        return factory and normalized(factory)
    name = getattr(factory, "__qualname__", "<unnamed>")
    return None if "<" in name else f"{factory.__module__}:{name}"
