"""The metadata of a checkpoint, and checks of its tensors by name, shape and type; no torch."""

import contextlib
import re
import zipfile
from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import msgspec

from moeprune.data.classes import read_names, require_names
from moeprune.data.preprocessing import Preprocessing
from moeprune.errors import MoepruneError
from moeprune.files.header import FLOATS, Header, TensorInfo, is_safetensors, is_too_large, read_header, require_format
from moeprune.layers.interface import Shapes
from moeprune.models.architecture import ModelConfig, architecture_from_json
from moeprune.models.request import ModelSpec
from moeprune.plan import Plan, plan_from_json, require_decided, require_fitting_plan
from moeprune.records import Record, from_json

FORMAT = 1  # of checkpoints
KINDS = (
    (r"(^|\.)soft_moe\.phi$", "a checkpoint of moeprune that has lost its metadata `moeprune`"),
    (r"(^|\.)(slot_embeds|to_slot_embeds\.0\.weight)$", "a layer of soft-moe-pytorch, in a model of other code"),
    (r"(^|\.)moe\.experts\.weight$", "a layer of soft-mixture-of-experts, in a model of other code"),
    (r"(^|\.)phi$", "a Soft MoE layer, in an unknown model or a part of one"),
    (r"(^|[./])(router|gates?|gating|w_gat(e|ing)|wg)([./]|$)", "a router that picks experts (top-k)"),
    (r"(^|\.)attn_layers\.layers\.\d+\.\d+\.", "a transformer of `x-transformers`, which has no experts"),
    (r"(^|\.)blocks\.\d+\.attn\.qkv\.weight$", "a vision transformer of `timm` without experts"),
)
"""Patterns of a tensor's name and what such a tensor belongs to, the most specific first."""


class Details(Record, frozen=True):
    """Preprocessing, names of classes and origin of a model.

    classes: in the order of the outputs; empty if they are not known.
    source: where the weights came from: `library`, `version`, and for foreign files `sha256`.
    provenance: how they were made: training, or calibration data, seed and versions.
    """

    preprocessing: Preprocessing = Preprocessing()
    source: dict[str, Any] = msgspec.field(default_factory=dict)
    provenance: dict[str, Any] = msgspec.field(default_factory=dict)
    classes: tuple[str, ...] = ()


def with_options(details: Details, spec: ModelSpec, num_classes: int) -> Details:
    """Return details with the preprocessing and the names of classes that a spec states, checked."""
    names = details.classes if spec.classes is None else read_names(spec.classes)
    require_names(names, num_classes, f"`{spec.classes or spec.path}`")
    return details.replace(preprocessing=details.preprocessing.updated(spec.preprocess), classes=names)


def our_header(path: str | Path) -> Header | None:
    """Return the header of a file that moeprune wrote; None for files of other programs and folders."""
    header = read_header(path) if is_safetensors(Path(path)) else read_torch_header(Path(path))
    return None if header is None or header.metadata is None else header


def read_torch_header(path: Path) -> Header | None:
    """Return the header of a file that moeprune wrote with torch.save, None for others."""
    with contextlib.suppress(OSError, ValueError):
        if path.is_file() and zipfile.is_zipfile(path):
            from moeprune.files.foreign import read_own

            return read_own(path)
    return None


def read_description(header: Header) -> tuple[ModelConfig, Plan, Details]:
    """Return the architecture, plan and details of a checkpoint, after checking its tensors against them.

    Raises:
        MoepruneError: the file is not a checkpoint of moeprune, of an unknown format, or damaged; it has no
            MoE layer; or tensors are missing, unexpected, or of several types.
    """
    path, metadata = header.path, header.metadata
    if metadata is None:
        raise MoepruneError(
            f"`{path}` is not a checkpoint of moeprune: {lookalike(header.tensors)}", "give one that moeprune wrote"
        )
    if metadata.get("kind") != "checkpoint":
        raise MoepruneError(
            f"`{path}` is not a checkpoint, but of kind {metadata.get('kind')!r}", "give the model's own file"
        )
    require_format(metadata, FORMAT, path)
    try:
        config = architecture_from_json(metadata.get("architecture"))
        plan = plan_from_json(metadata.get("plan", {}))
        require_fitting_plan(plan, config.moe_layers)
        require_decided(plan)
        stated = {name: metadata[name] for name in Details.__struct_fields__ if name in metadata}
        details: Details = from_json(stated, Details, "metadata")
    except MoepruneError as error:
        raise MoepruneError(f"`{path}`: {error.message}", error.hint) from None
    if not config.moe_layers:
        raise MoepruneError(f"no MoE layers in `{path}`", "there is nothing to prune in it")
    for name, moe in config.moe_layers.items():
        tokens, padded = config.tokens(name), moe.padded_tokens(config.tokens(name))
        if not tokens <= padded < tokens + moe.num_experts:
            raise MoepruneError(f"`{path}`: layer `{name}` computes with {padded} tokens, its inputs have {tokens}")
    found, shapes = config.known(header.tensors), config.shapes(plan)
    if any(is_too_large(shape) for shape in shapes.values()):
        raise MoepruneError(f"`{path}`: its architecture is too large to build a model")
    require_tensors(found, shapes, f"`{path}` does not fit its own architecture")
    require_few_types(found, config, path)
    return config, plan, details


def require_tensors(
    found: Mapping[str, TensorInfo],
    expected: Shapes,
    what: str,
    hint: str | None = None,
    integers: Collection[str] = (),
) -> None:
    """Raise a MoepruneError that begins with `what` and names missing and unexpected tensors, wrong shapes and types.

    Of each it names the first three. All tensors are floats but `integers`.
    """
    common = sorted(set(found) & set(expected))
    shapes = [
        f"`{name}` is {list(found[name].shape)}, expected {list(expected[name])}"
        for name in common
        if found[name].shape != expected[name]
    ]
    types = [
        f"`{name}` has the type {found[name].dtype}, expected {'integers' if name in integers else 'floats'}"
        for name in common
        if (found[name].dtype in FLOATS) == (name in integers)
    ]
    problems = _first([f"missing `{name}`" for name in sorted(set(expected) - set(found))], "missing")
    problems += _first([f"unexpected `{name}`" for name in sorted(set(found) - set(expected))], "unexpected")
    problems += _first(shapes, "of another shape") + _first(types, "of another type")
    if problems:
        raise MoepruneError(f"{what}: {'; '.join(problems)}", hint)


def _first(problems: list[str], kind: str, limit: int = 3) -> list[str]:
    rest = len(problems) - limit
    return problems if rest <= 0 else [*problems[:limit], f"{rest} more {kind}"]


def require_few_types(tensors: Mapping[str, TensorInfo], config: ModelConfig, path: str | Path) -> None:
    """Raise a MoepruneError that names the tensors whose type is not that of most of their kind.

    Experts may have another type than the rest of the model, and routers a type of their own.
    """
    kinds: dict[bool, dict[str, TensorInfo]] = {True: {}, False: {}}
    for name, tensor in tensors.items():
        layer, _, key = name.rpartition(".")
        part = config.moe_layers[layer].part(key) if layer in config.moe_layers else "other"
        if part != "routing":
            kinds[part == "other"][name] = tensor
    for of_kind in kinds.values():
        usual = next((dtype for dtype, _ in Counter(t.dtype for t in of_kind.values()).most_common(1)), None)
        if odd := [f"`{name}` is {t.dtype}" for name, t in sorted(of_kind.items()) if t.dtype != usual]:
            raise MoepruneError(
                f"`{path}` has tensors of several types: {', '.join(odd)}, the others are {usual}",
                "convert the model to one type, for example with `model.float()`",
            )


def lookalike(names: Collection[str]) -> str:
    """Return in words what a file of no known library is."""
    has_experts = any(re.search(r"experts?[._/]|(^|[./])experts?$", name) for name in names)
    for pattern, kind in KINDS:
        found = next((name for name in sorted(names) if re.search(pattern, name)), None)
        if found is not None and has_experts >= ("top-k" in kind):
            return f"`{found}` belongs to {kind}"
    return f"none of its {len(names)} tensors matches a known layout"
