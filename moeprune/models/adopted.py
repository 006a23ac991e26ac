"""Models of the user's own code: MoE layers of known libraries are replaced by ours, the rest stays."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from moeprune.errors import MoepruneError
from moeprune.layers.families import layer_of_tensors
from moeprune.models.architecture import AdoptedLayer, ModuleConfig
from moeprune.models.libraries import LAYERS
from moeprune.models.libraries.layers import LayerLibrary
from moeprune.models.module import AdoptedModel, Factory, build, factory_name, load_strictly, replaced


def adopt(
    module: nn.Module,
    input_shape: tuple[int, int, int],
    factory: Factory | None = None,
    arguments: Mapping[str, Any] | None = None,
    source: str | None = None,
) -> AdoptedModel:
    """Replace every MoE layer of a known library by ours, and return the model in eval mode.

    Layers of soft-moe, soft-moe-pytorch, soft-mixture-of-experts and moeprune are known. The module itself is
    changed: its layers are ours from then on. A random input runs through it to find out in which order the
    layers run, on how many tokens, and what the rest of the model costs.

    Args:
        module: returns logits (b,classes) for inputs (b,c,H,W).
        input_shape: of one input (c,H,W).
        factory: the function that builds the module, or its name `package.module:function`; needed to load
            a saved checkpoint again.
        arguments: keyword arguments of the factory, JSON values.
        source: the library and release that the model was trained with, such as
            `soft-mixture-of-experts==0.1.0`, if that is not the installed one.

    Raises:
        MoepruneError: no layer is known, a layer cannot be expressed or does not run exactly once, or the
            output is not logits.
    """
    module.requires_grad_(False).eval()
    libraries = _known_layers(module)
    names = sorted({library.name for library in libraries.values()})
    if not names:
        raise MoepruneError(
            f"no MoE layer of a known library in {type(module).__name__}", f"known are those of {', '.join(LAYERS)}"
        )
    stated, version = parse_source(source)
    if stated is not None and stated not in names:
        raise MoepruneError(f"the layers of the model are from {', '.join(names)}, not from `{stated}`")
    layers = {}
    for name, tokens in _tokens(module, libraries, input_shape).items():
        library, theirs = libraries[name], module.get_submodule(name)
        release = version if stated == library.name else None
        config, tensors = library.describe(theirs, name, tokens, release)
        ours = layer_of_tensors(config, None, {key: tensor.detach() for key, tensor in tensors.items()})
        module = replaced(module, name, ours)
        layers[f"module.{name}".rstrip(".")] = AdoptedLayer(config, library.name, tokens)
    total, classes = _flops(module, input_shape)
    own = sum(layer.layer.flops(layer.tokens).total for layer in layers.values())
    arguments = dict(arguments or {})
    whole = ModuleConfig(factory_name(factory), arguments, input_shape, classes, layers, total - own)
    model = AdoptedModel(module, whole).eval()
    if factory is not None:
        model.original = functools.partial(build, factory, arguments)
    return model


def _known_layers(module: nn.Module) -> dict[str, LayerLibrary]:
    """Return the library of each known layer, by the name of the layer."""
    found: dict[str, LayerLibrary] = {}
    names: dict[nn.Module, str] = {}
    for name, part in module.named_modules(remove_duplicate=False):
        for library in LAYERS.values():
            if library.recognises(part):
                if part in names:
                    raise MoepruneError(
                        f"layers `{names[part]}` and `{name}` are one module, which runs more than once"
                    )
                found[name], names[part] = library, name
    return found


def _tokens(module: nn.Module, names: Iterable[str], input_shape: tuple[int, int, int]) -> dict[str, int]:
    """Return the tokens of each layer, in the order in which the layers run."""
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
    """Return the FLOPs of one input and the number of classes."""
    with FlopCounterMode(display=False) as flops, sdpa_kernel(SDPBackend.MATH):
        classes = _run(module, input_shape).shape[1]
    return flops.get_total_flops(), classes


@torch.no_grad()
def _run(module: nn.Module, input_shape: tuple[int, int, int]) -> Tensor:
    """Return the logits (1,classes) of one random input."""
    like = next(iter(module.parameters()))
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, *input_shape, generator=generator).to(like)
    try:
        output = module(x)
    except MoepruneError:
        raise
    except Exception as error:  # the user's code may raise anything
        raise MoepruneError(
            f"the {type(module).__name__} fails on an input of shape {list(x.shape)}: {type(error).__name__}: {error}",
            "check the shape of one input, channels × height × width",
        ) from None
    if not (isinstance(output, Tensor) and output.ndim == 2 and len(output) == 1):
        found = list(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise MoepruneError(
            f"the {type(module).__name__} gives {found} for one input, expected logits [1, classes]",
            "give a factory whose model returns its logits",
        )
    return output


def parse_source(text: str | None) -> tuple[str | None, str | None]:
    """Return library and release of a text such as `soft-mixture-of-experts==0.1.0`; either may be None.

    Raises:
        MoepruneError: the release is not a version number.
    """
    if text is None:
        return None, None
    name, equals, version = text.partition("==")
    if equals and not re.fullmatch(r"\d+(\.\d+)+", version):
        raise MoepruneError(f"source `{text}` names no release", f"give for example `{name}==0.1.0`")
    return name, version or None


def load_foreign(module: nn.Module, tensors: Mapping[str, Tensor], path: str | Path) -> None:
    """Load a file of the module's own code, whose layers may have names of older releases.

    Raises:
        MoepruneError: see `load_strictly`.
    """
    names = set(module.state_dict())
    for library in LAYERS.values():
        tensors = library.rename(tensors, names)
    load_strictly(module, tensors, path)
