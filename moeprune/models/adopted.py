"""Models of the user's own code: Soft MoE layers of known libraries become ours, the rest stays as it is."""

from __future__ import annotations

import ast
import json
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from moeprune.errors import MoepruneError
from moeprune.layers.families import layer_of_tensors
from moeprune.models.architecture import AdoptedLayer, ModuleConfig
from moeprune.models.details import Details
from moeprune.models.libraries import bwconrad_layer, fkodom, lucidrains
from moeprune.models.module import AdoptedModel, replaced
from moeprune.models.tensors import load_strictly
from moeprune.plan import LayerPlan

MAX_ELEMENTS = 2**28
"""Values of one input; more are a mistake and fill the memory."""
LIBRARIES: tuple[ModuleType, ...] = (bwconrad_layer, lucidrains, fkodom)


def adopt(
    module: nn.Module,
    input_shape: tuple[int, int, int],
    factory: str | None = None,
    arguments: Mapping[str, Any] | None = None,
    details: Details = Details(),
    source: str | None = None,
) -> AdoptedModel:
    """The model with every Soft MoE layer of a known library replaced by ours, in eval mode.

    Layers of soft-moe, soft-moe-pytorch and soft-mixture-of-experts are known. The module itself is
    changed: its layers are ours from then on. A random input runs through it, to find out in which order
    the layers run, on how many tokens, and what the rest of the model costs.

    Args:
        module: gives logits (b,classes) for inputs (b,c,H,W).
        input_shape: of one input (c,H,W).
        factory: `package.module:function` that builds the module; needed to load a saved checkpoint.
        arguments: keyword arguments of the factory, JSON values.
        details: what its checkpoint says beside that.
        source: the library and release that the model was trained with, such as
            `soft-mixture-of-experts==0.1.0`, where that is not the installed one.

    Raises:
        MoepruneError: no layer is known, one of them cannot be expressed or does not run exactly once,
            or the output is something else.
    """
    module.requires_grad_(False).eval()
    libraries = {name: library_of(layer) for name, layer in _known_layers(module)}
    if not libraries:
        raise MoepruneError(
            f"no Soft MoE layer of a known library in {type(module).__name__}",
            f"known are those of {', '.join(library.LIBRARY for library in LIBRARIES)}",
        )
    named, version = parse_source(source)
    if named is not None and named not in {library.LIBRARY for library in libraries.values()}:
        found = sorted({library.LIBRARY for library in libraries.values()})
        raise MoepruneError(f"the layers of the model are of {', '.join(found)}, not of `{named}`")
    tokens = _tokens(module, libraries, input_shape)
    configs = {}
    for name, library in libraries.items():
        layer_version = version if named == library.LIBRARY else None
        theirs = module.get_submodule(name)
        config, tensors = library.describe(theirs, name, tokens[name], layer_version)
        ours = layer_of_tensors(config, None, {key: tensor.detach() for key, tensor in tensors.items()})
        configs[name] = config
        module = replaced(module, name, ours)
    total, classes = _flops(module, input_shape)
    layers = {
        f"module.{name}".rstrip("."): AdoptedLayer(configs[name], libraries[name].LIBRARY, m)
        for name, m in tokens.items()
    }
    own = sum(layer.layer.flops(layer.tokens).total for layer in layers.values())
    whole = ModuleConfig(factory, dict(arguments or {}), input_shape, classes, layers, total - own)
    return AdoptedModel(module, whole, details).eval()


def library_of(module: nn.Module) -> ModuleType:
    """The library that a Soft MoE layer is of."""
    [library] = [library for library in LIBRARIES if library.recognises(module)]
    return library


def _known_layers(module: nn.Module) -> list[tuple[str, nn.Module]]:
    found: dict[nn.Module, str] = {}
    for name, part in module.named_modules(remove_duplicate=False):
        if any(library.recognises(part) for library in LIBRARIES):
            if part in found:
                raise MoepruneError(f"layers `{found[part]}` and `{name}` are one: it runs more than once")
            found[part] = name
    return [(name, part) for part, name in found.items()]


def _tokens(module: nn.Module, names: Iterable[str], input_shape: tuple[int, int, int]) -> dict[str, int]:
    """Tokens of each layer, in the order in which they run."""
    tokens: dict[str, int] = {}

    def hook(name: str) -> Any:
        def seen(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            if name in tokens:
                raise MoepruneError(f"layer `{name}` runs more than once for an input")
            tokens[name] = output[0].numel() // output.shape[1 if output.ndim == 4 else -1]

        return seen

    handles = [module.get_submodule(name).register_forward_hook(hook(name)) for name in names]
    try:
        _run(module, input_shape)
    finally:
        for handle in handles:
            handle.remove()
    if idle := sorted(set(names) - set(tokens)):
        raise MoepruneError(f"layers {', '.join(f'`{name}`' for name in idle)} do not run")
    return tokens


def _flops(module: nn.Module, input_shape: tuple[int, int, int]) -> tuple[int, int]:
    """FLOPs of one input, and the classes of its logits."""
    with FlopCounterMode(display=False) as flops, sdpa_kernel(SDPBackend.MATH):
        classes = _run(module, input_shape).shape[1]
    return flops.get_total_flops(), classes


@torch.no_grad()
def _run(module: nn.Module, input_shape: tuple[int, int, int]) -> Tensor:
    """Logits (1,classes) of one random input."""
    like = next(iter(module.parameters()))
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, *input_shape, generator=generator).to(like)
    try:
        output = module(x)
    except MoepruneError:
        raise
    except Exception as error:  # the user's code may raise anything
        raise MoepruneError(
            f"the {type(module).__name__} fails on an input of shape {list(x.shape)}:"
            f" {type(error).__name__}: {error}",
            "check the shape of one input, channels × height × width",
        ) from None
    if not (isinstance(output, Tensor) and output.ndim == 2 and len(output) == 1):
        found = list(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise MoepruneError(
            f"the {type(module).__name__} gives {found} for one input, expected logits [1, classes]",
            "give a factory whose model returns its logits",
        )
    return output


def parse_arguments(given: Iterable[str]) -> dict[str, Any]:
    """Keyword arguments from `key=value` texts: values are Python literals, or else texts.

    >>> parse_arguments(["depth=4", "pool=avg", "sizes=[1, 2]"])
    {'depth': 4, 'pool': 'avg', 'sizes': [1, 2]}

    Raises:
        MoepruneError: a text without a key, or a key given twice.
    """
    arguments: dict[str, Any] = {}
    for text in given:
        key, equals, value = text.partition("=")
        if not equals or not key.isidentifier():
            raise MoepruneError(f"`--model-arg {text}` is no KEY=VALUE")
        if key in arguments:
            raise MoepruneError(f"`--model-arg {key}` is given twice")
        try:
            arguments[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            arguments[key] = value
    try:
        return dict(json.loads(json.dumps(arguments, allow_nan=False)))
    except (TypeError, ValueError) as error:
        raise MoepruneError(f"`--model-arg`: {error}", "give numbers, texts, lists and the like") from None


def parse_source(text: str | None) -> tuple[str | None, str | None]:
    """Library and version of a text such as `soft-mixture-of-experts==0.1.0`; either may be None.

    Raises:
        MoepruneError: no library of that name is known, or that is no version.
    """
    if text is None:
        return None, None
    name, equals, version = text.partition("==")
    known = [library.LIBRARY for library in LIBRARIES]
    if name not in known:
        raise MoepruneError(f"`--source {text}` is unknown", f"with `--model` give one of {', '.join(known)}")
    if equals and not re.fullmatch(r"\d+(\.\d+)+", version):
        raise MoepruneError(f"`--source {text}` names no release", f"give for example `{name}==0.1.0`")
    return name, version or None


def parse_shape(text: str | None) -> tuple[int, int, int]:
    """The shape of one input from a text such as `3,224,224`.

    Raises:
        MoepruneError: there is none, or it is another.
    """
    sides = (text or "").split(",")
    fits = len(sides) == 3 and all(re.fullmatch("[1-9][0-9]{0,5}", side) for side in sides)
    if not fits or math.prod(map(int, sides)) > MAX_ELEMENTS:
        found = "none is given" if text is None else f"given is `{text}`"
        raise MoepruneError(
            f"a model of your own code needs the shape of one input, {found}",
            f"give channels, height and width, {MAX_ELEMENTS} values at most: `--input-shape 3,224,224`",
        )
    channels, height, width = map(int, sides)
    return channels, height, width


def load_foreign(module: nn.Module, tensors: Mapping[str, Tensor], path: str | Path) -> None:
    """The same for a file of the module's own code, whose layers may have names of older releases."""
    names = set(module.state_dict())
    for library in LIBRARIES:
        tensors = library.rename_old_keys(tensors, names)
    load_strictly(module, tensors, path)


def library_tensors(model: AdoptedModel, module: nn.Module) -> dict[str, Tensor]:
    """The tensors of an adopted model by the names of the libraries that its layers are from.

    Args:
        model: unpruned, or statically pruned with `renorm`.
        module: what the model's factory builds.

    Raises:
        MoepruneError: a layer's plan cannot be expressed by the library.
    """
    found = {name.removeprefix("module."): tensor for name, tensor in model.module.state_dict().items()}
    for name, ours in model.moe_layers.items():
        path = name.removeprefix("module").removeprefix(".")
        require_expressible(ours.plan, name)
        tensors = {key: found.pop(f"{path}.{key}".lstrip(".")) for key in ours.state_dict()}
        theirs = module.get_submodule(path)
        restored = library_of(theirs).restore(theirs, tensors)
        found |= {f"{path}.{key}".lstrip("."): tensor for key, tensor in restored.items()}
    return found


def require_expressible(plan: LayerPlan | None, name: str) -> None:
    """Raise a MoepruneError if no other library's layer computes what a plan says."""
    if plan is None or (plan.scope == "static" and plan.compensation == "renorm" and plan.k):
        return
    raise MoepruneError(
        f"layer `{name}` is pruned with scope {plan.scope} and compensation {plan.compensation}, which other"
        " libraries cannot express: their layers of fewer experts take the combine softmax over those alone",
        "prune with `--scope static --compensate renorm` to give the model back",
    )
