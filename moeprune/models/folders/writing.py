"""Write a folder of transformers with fewer experts, tensor by tensor, from the bytes of the full one."""

import itertools
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from moeprune import __version__
from moeprune.errors import MoepruneError, listed
from moeprune.files.checkpoint import Copied, check_finite, tensor_infos, write_unscanned
from moeprune.files.disk import check_output_folder, refused, replacing_folder, write_file
from moeprune.files.header import Header
from moeprune.models.folders.form import CODE, IN_WORDS, code_for, coded, form_of, is_drop_in
from moeprune.models.folders.layout import CONFIG, COUNTS, INDEX, PLAN, SINGLE, ModelFolder, changed_config
from moeprune.models.folders.names import Role, renumbered
from moeprune.models.folders.quantised import changes_weights, quantisation_of
from moeprune.plan import LayerPlan, Plan, require_decided, require_fitting_plan
from moeprune.records import to_json

logger = logging.getLogger(__name__)

CARD = "README.md"
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".onnx", ".h5", ".msgpack")
"""Suffixes of files that may hold weights: those of the full model are not copied."""
FEWEST_IN_GROUP = 2  # experts, by whose scores DeepSeek-V3 ranks a group


def require_fitting(folder: ModelFolder, plan: Plan) -> None:
    """Raise a MoepruneError if a folder cannot hold the layers that a plan makes: of one width, and of as many experts
    in each unless there is code for it.
    """
    require_fitting_plan(plan, folder.layers)
    counts, hint = {layer.k for layer in plan.values()}, f"`{CONFIG}` has one number of experts for all layers"
    widths = {layer.width for layer in plan.values()}
    if lacking := [name for name in folder.layers if name not in plan]:
        raise MoepruneError(f"the plan leaves out layers {listed(lacking, 3)}", f"{hint}: plan them all")
    if form_of(plan) == "custom-code":
        if mixed := {layer.compensation for layer in plan.values() if layer.drops and is_drop_in(layer)}:
            others = listed(sorted({layer.compensation for layer in plan.values()} - mixed))
            message = f"the plan has compensation {listed(sorted(mixed))} in some layers and {others} in others"
            raise MoepruneError(message, "a folder has either fewer experts in all layers, or custom code for all")
        if folder.config.get("quantization_config"):
            message = f"the weights of `{folder.path}` are quantised: no compensation can stand beside them"
            raise MoepruneError(message, "give `--compensate renorm-refit` or `renorm`, or dequantise the weights")
    elif len(counts) > 1:
        raise MoepruneError(f"the plan keeps {min(counts)} to {max(counts)} experts", hint)
    if len(widths) > 1:
        found = listed(sorted("all" if width is None else str(width) for width in widths))
        raise MoepruneError(f"the plan keeps {found} hidden units", f"`{CONFIG}` has one width for all layers")


def write_folder(
    folder: ModelFolder,
    plan: Plan,
    output: Path,
    overwrite: bool,
    provenance: Mapping[str, Any],
    replaced: Mapping[str, Tensor | Copied] | None = None,
    changes: Mapping[str, int] | None = None,
    added: Mapping[str, Tensor] | None = None,
) -> None:
    """Write a folder with the kept experts, and what compensates for the others; it appears when it is complete.

    Args:
        plan: of every layer, decided, see `require_fitting`.
        provenance: how the plan was made.
        replaced: tensors to write in place of those of the same name in the output, in their types; with a width all
            that have it. Those of files are known to be finite.
        added: tensors of the compensation, by their names in the output.
        changes: keys of the language config that state a width, and their values.

    Raises a MoepruneError if the folder cannot hold what the plan makes, or cannot be written.
    """
    check_output_folder(output, overwrite, folder.path)
    require_fitting(folder, plan)
    require_decided(plan)
    config, replaced, added = pruned_config(folder, plan, changes or {}), replaced or {}, added or {}
    is_changed, has_code = _is_changed(plan), form_of(plan) == "custom-code"
    if is_changed and folder.dropped:
        logger.warning(
            f"{listed(folder.dropped)}: layers that predict further tokens are left out: no data reaches them"
        )
    new = {**replaced, **added}
    check_finite({name: tensor for name, tensor in new.items() if isinstance(tensor, Tensor)}, output)
    with replacing_folder(output, overwrite) as target:
        _copy_others(folder, target, {CONFIG, INDEX})
        _write_shards(folder, plan, target, replaced, added)
        if has_code:
            write_file(target / CODE, code_for(folder.config))
        write_file(target / CONFIG, json.dumps(config, indent=2, ensure_ascii=False) + "\n")
        if is_changed:
            made = {"schema_version": 1, "plan": to_json(plan), "provenance": provenance}
            write_file(target / PLAN, json.dumps(made, indent=2, sort_keys=True) + "\n")
            card = folder.path / CARD
            text = card.read_text("utf-8", "replace").rstrip() + "\n\n" if card.is_file() else ""
            write_file(target / CARD, text + _section(folder, plan, provenance))


def copy_folder(folder: ModelFolder, output: Path, overwrite: bool) -> None:
    """Write a folder as it is; raise a MoepruneError if it cannot be written."""
    check_output_folder(output, overwrite, folder.path)
    with replacing_folder(output, overwrite) as target:
        _copy_others(folder, target, {INDEX})
        for name in (*folder.shards, INDEX):
            if (folder.path / name).is_file():
                shutil.copyfile(folder.path / name, target / name)


def pruned_config(folder: ModelFolder, plan: Plan, changes: Mapping[str, int]) -> dict[str, Any]:
    """Return the content of `config.json` for the experts of a plan, with other changes of its language part.

    Beside code it keeps the number of experts, which is that of the router.

    Raises a MoepruneError if it names single experts, whose numbers change.
    """
    made, language, k = dict(changes), folder.language, next(iter(plan.values())).k
    has_code = form_of(plan) == "custom-code"
    if k < folder.num_experts and not has_code:
        if re.search(r"experts\.\d", json.dumps(folder.config.get("quantization_config"))):
            raise MoepruneError(
                f"`{folder.path / CONFIG}`: `quantization_config` names single experts", "quantise it later"
            )
        made |= {key: k for key in COUNTS if key in language}
        if (groups := next(iter(folder.layers.values())).groups) > 1:
            size = k // groups
            if size < FEWEST_IN_GROUP or size * int(language.get("topk_group") or groups) < folder.top_k:
                logger.warning(f"groups of {size} experts are too few to choose among: the {groups} groups become one")
                made |= {"n_group": 1, "topk_group": 1}
    for key, value in language.items() if folder.dropped and _is_changed(plan) else ():
        if re.search(r"mtp|nextn", key) and isinstance(value, int):
            made[key] = type(value)(0)
    config = changed_config(folder, made)
    return coded(config, plan) if has_code else config


def _is_changed(plan: Plan) -> bool:
    """Return True if a plan drops experts or hidden units."""
    return any(layer.drops or layer.width is not None for layer in plan.values())


def _write_shards(
    folder: ModelFolder, plan: Plan, target: Path, replaced: Mapping[str, Tensor | Copied], added: Mapping[str, Tensor]
) -> None:
    """Write the shards of a folder, without those that hold no tensor any more, what is added, and their index."""
    written: list[list[str]] = []
    total_size = 0
    for header in itertools.chain(folder.headers(), [None]):
        entries: dict[str, Tensor | Copied] = dict(added if header is None else _entries(folder, plan, header))
        entries |= {name: replaced[name] for name in entries if name in replaced}
        infos = tensor_infos(entries)
        if entries:
            write_unscanned(target / f"{len(written)}.safetensors", entries, None)
            written.append(list(entries))
            total_size += sum(info.nbytes for info in infos.values())
    if len(written) == 1:
        (target / "0.safetensors").rename(target / SINGLE)
        return
    names = [f"model-{index + 1:05}-of-{len(written):05}.safetensors" for index in range(len(written))]
    for index, name in enumerate(names):
        (target / f"{index}.safetensors").rename(target / name)
    weight_map = {tensor: name for name, tensors in zip(names, written, strict=True) for tensor in tensors}
    content = {"metadata": {"total_size": total_size}, "weight_map": dict(sorted(weight_map.items()))}
    write_file(target / INDEX, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def _entries(folder: ModelFolder, plan: Plan, header: Header) -> Iterator[tuple[str, Copied]]:
    """Yield the tensors of a shard that stay, by their new names."""
    is_changed = _is_changed(plan)
    for name, info in header.tensors.items():
        if is_changed and folder.is_dropped(name):
            continue
        role = folder.role(name, info)
        if role is None:
            yield name, Copied(header, name)
            continue
        layer, kept = plan[role.layer], plan[role.layer].kept
        assert kept is not None
        if _is_left_out(layer, role):
            continue
        if role.part == "router" and not layer.cuts_router:
            yield name, Copied(header, name)
        elif role.expert is None:
            cut = folder.cut(name, role, info)
            yield name, Copied(header, name) if cut is None else Copied(header, name, kept, *cut)
        elif role.expert in kept:
            yield renumbered(name, kept.index(role.expert)), Copied(header, name)


def _is_left_out(layer: LayerPlan, role: Role) -> bool:
    """Return True for a tensor that no kept expert has a part in."""
    return not layer.k and (role.part != "router" or layer.cuts_router)


def _copy_others(folder: ModelFolder, target: Path, written: set[str]) -> None:
    """Copy tokenizer, generation config and all else that holds no weights; links become what they lead to.

    written: names of files that are not copied, as they are written anew.
    """
    left_out = []
    for root, folders, files in os.walk(folder.path):
        inside = Path(root).relative_to(folder.path)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        weights = [name for name in files if name.endswith(WEIGHTS) or name.endswith(".index.json")]
        if inside.parts and weights:  # another copy of the model, with files of its own
            left_out.append(str(inside))
            folders.clear()
            continue
        left_out += [name for name in weights if name not in folder.shards and name not in written]
        for name in sorted({*files} - {*weights}):
            if (inside / name).as_posix() in written or not (Path(root) / name).is_file():
                continue
            (target / inside).mkdir(parents=True, exist_ok=True)
            try:
                shutil.copyfile(Path(root) / name, target / inside / name)
            except OSError as error:
                raise refused("read", Path(root) / name, error) from None
    if left_out:
        logger.warning(f"left out, as they may hold weights of the full model: {listed(sorted(left_out))}")


def _section(folder: ModelFolder, plan: Plan, provenance: Mapping[str, Any]) -> str:
    """Return the section of the model card that says how the folder was made."""
    has_code, data = form_of(plan) == "custom-code", provenance.get("calibration")
    first = next(layer for layer in plan.values() if is_drop_in(layer) != has_code)
    kept, repaired = f"all of its {first.k} experts", ""
    if any(layer.drops for layer in plan.values()):
        counts = sorted({layer.k for layer in plan.values()})
        count = f"{counts[0]} to {counts[-1]}" if len(counts) > 1 else str(first.k)
        chosen = f"chosen by signal `{first.signal}`" if data or first.signal == "random" else "chosen by a plan"
        kept = f"{count} of {folder.num_experts} experts, {chosen}"
        repaired = " and the last linears of kept experts are refitted" if first.compensation == "renorm-refit" else ""
    if has_code:
        rank = "" if first.rank is None else f" of rank {first.rank:g}"
        repaired = f"; compensation: `{first.compensation}`{rank}"
    elif first.drops:
        kept += "; the routers know no others"
    if first.width is not None:
        repaired += f"; each expert keeps {first.width} hidden units, to which its last linear is refitted"
    how = quantisation_of(folder) if changes_weights(plan) else None
    repaired += f"; changed weights are rounded to {how} anew" if how is not None else ""
    calibrated = f" Calibration data: `{data['spec']}`, {data['samples']} sequences." if data else ""
    return (
        f"## Pruned with moeprune {__version__}\n\n"
        f"Made from `{Path(os.path.realpath(folder.path)).name}`. Each of its {len(plan)} MoE layers keeps {kept}"
        f"{repaired}.{calibrated} `{PLAN}` lists the kept experts.\n\n"
        f"The form of the folder is {IN_WORDS[form_of(plan)]}.\n"
    )
