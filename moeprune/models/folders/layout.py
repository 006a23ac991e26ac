"""A folder of transformers: `config.json`, safetensors shards, and the MoE layers in them, read from headers; no torch.

Headers are read one shard at a time and are not kept: a model may have a hundred thousand tensors.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import msgspec

from moeprune.errors import MoepruneError, listed
from moeprune.files.disk import read_json
from moeprune.files.header import Header, TensorInfo, read_header
from moeprune.models.folders.names import Cut, Role, cut_of, further, natural, role_of
from moeprune.models.results import BytesByPart, FlopsByPart, ModelCost
from moeprune.plan import LayerPlan
from moeprune.records import from_json

CONFIG, INDEX, SINGLE = "config.json", "model.safetensors.index.json", "model.safetensors"
COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
"""Keys of the number of experts."""
TOP_K = (
    "num_experts_per_tok", "num_experts_per_token", "experts_per_token", "moe_topk", "moe_top_k", "moe_k",
    "top_k_experts",
)  # fmt: skip
"""Keys of the number of experts that run for a token, or of a list of it by layer."""
LAYERS = ("num_hidden_layers", "n_layers", "num_layers")
KNOWN = "experts under `experts.0`, stacked in `experts.gate_up_proj` or `input_linear`, and a `gate` or a `router`"
COMPENSATIONS = ("renorm", "renorm-refit")


@dataclass
class FolderLayer:
    """One MoE layer: experts, how many of them a token takes, and in how many groups it chooses them.

    masks: the numbers of experts that have a tensor of their own, as bits, by its key. bytes, values: of experts.
    """

    name: str
    num_experts: int
    top_k: int
    groups: int = 1
    masks: dict[str, int] = field(default_factory=Counter)
    routers: int = 0
    stacks: int = 0
    bytes: int = 0
    values: int = 0

    def refusal(self, plan: LayerPlan) -> str | None:
        """Return why the folder cannot hold the layer pruned by a plan, None if it can."""
        if plan.scope != "static" or (plan.compensation not in COMPENSATIONS and plan.drops):
            only = "scope `static` and compensation `renorm` or `renorm-refit`: a folder of transformers holds no other"
            return f"can be pruned with {only}; the plan has `{plan.scope}` and `{plan.compensation}`"
        if plan.k < self.top_k:
            return f"runs {self.top_k} experts for each token, the plan keeps {plan.k}"
        if plan.k % self.groups:
            return f"chooses among {self.groups} groups of experts of one size, the plan keeps {plan.k} experts"
        counts = Counter(j * self.groups // self.num_experts for j in plan.kept or ())
        if plan.kept is not None and len({*counts.values()}) > 1:
            return f"chooses among {self.groups} groups of experts of one size, the plan keeps {[*counts.values()]}"
        return None


@dataclass
class ModelFolder:
    """A folder that holds a model with MoE layers, as it is on disk.

    config: of the whole model. language: the part of it that has the number of experts. layers: by name, in order.
    dropped: how names begin in parts that predict further tokens with experts of their own.
    """

    path: Path
    config: dict[str, Any]
    language: dict[str, Any]
    shards: dict[str, set[str] | None]  # names of files, and of their tensors, if an index has them
    layers: dict[str, FolderLayer] = field(default_factory=dict)
    dropped: tuple[str, ...] = ()
    parts: Counter[str] = field(default_factory=Counter)
    parameters: int = 0
    flops: Counter[str] = field(default_factory=Counter)

    @property
    def num_experts(self) -> int:
        """Experts of each layer."""
        return next(iter(self.layers.values())).num_experts

    @property
    def top_k(self) -> int:
        """The most experts that a token takes in a layer."""
        return _top_k(self.language)

    def headers(self) -> Iterator[Header]:
        """Yield the header of each shard, checked against the index."""
        for name, expected in self.shards.items():
            header = read_header(self.path / name)
            if expected is not None and (wrong := sorted(expected ^ header.tensors.keys())):
                message = f"`{self.path / name}` does not fit `{INDEX}`: only one of them has {listed(wrong, 3)}"
                raise MoepruneError(message, "index and shards are of different models or damaged; fetch both again")
            yield header

    def place(self, name: str, info: TensorInfo) -> tuple[Role | None, Cut | None]:
        """Return the role of a tensor in an MoE layer, and where experts have their places in it, None if nowhere."""
        role = role_of(name, info.shape)
        if role is None or role.layer not in self.layers:
            return None, None
        if role.part == "expert":
            return role, None
        try:
            return role, cut_of(role, info.shape, self.num_experts, self.language.get("zero_expert_num") or 0)
        except ValueError:
            found = f"`{name}` of shape {list(info.shape)}"
            raise _unknown(self.path, f"{found} has no place for each of {self.num_experts} experts") from None

    def is_dropped(self, name: str) -> bool:
        """Return True for a tensor of a part that predicts further tokens."""
        return name.startswith(self.dropped)

    def cost(self) -> ModelCost:
        """Return parameters, bytes, and FLOPs for one token: 2 for each weight; attention over others is left out."""
        experts = sum(2 * layer.values * layer.top_k // layer.num_experts for layer in self.layers.values())
        flops = {"experts": experts, "routing": self.flops["routing"], "other": self.flops["other"], "compensation": 0}
        parts = {name: self.parts[name] for name in ("experts", "routing", "other")}
        return ModelCost(
            parameters=self.parameters,
            bytes=sum(parts.values()),
            bytes_by_part=BytesByPart(compensation=0, **parts),
            flops_per_input=FlopsByPart(total=sum(flops.values()), **flops),
            experts_per_input=float(sum(layer.top_k for layer in self.layers.values())),
        )


class _Index(msgspec.Struct):
    weight_map: Annotated[dict[str, str], msgspec.Meta(min_length=1)]
    metadata: dict[str, Any] | None = None


def is_model_folder(path: Path) -> bool:
    """Return True for a folder with a `config.json` that names a `model_type`: one that transformers reads."""
    try:
        return path.is_dir() and (path / CONFIG).is_file() and "model_type" in read_json(path / CONFIG, "a config")
    except (OSError, ValueError, TypeError, MoepruneError):
        return False


def read_folder(path: Path) -> ModelFolder:
    """Read what a folder holds, and check that nothing is missing.

    Raises a MoepruneError if a shard is missing or damaged, there are no MoE layers, their layout is unknown, or
    `config.json` contradicts the tensors.
    """
    config = read_json(path / CONFIG, "the config of a model")
    shards = _shards(path)
    found = [part for part in _parts(config) if any(type(part.get(key)) is int for key in COUNTS)]
    folder = ModelFolder(path, config, found[0] if found else config, shards)
    layers = _layers_of(folder)
    if not layers:
        raise MoepruneError(f"no MoE layers in `{path}`", f"known are layers with {KNOWN}")
    if len(found) != 1:
        where = "no number of experts" if not found else "several numbers of experts"
        raise _unknown(path, f"`{CONFIG}` has {where} ({', '.join(f'`{key}`' for key in COUNTS)})")
    num_layers = next((folder.language[key] for key in LAYERS if type(folder.language.get(key)) is int), None)
    ahead = {name: further(name, num_layers) for name in layers}
    folder.dropped = tuple(sorted({prefix for prefix in ahead.values() if prefix is not None}))
    n, groups = _count(folder), _groups(folder.language)
    names = sorted((name for name, prefix in ahead.items() if prefix is None), key=natural)
    folder.layers = {name: FolderLayer(name, n, folder.top_k, groups) for name in names}
    for header in folder.headers():
        for name, info in header.tensors.items():
            _add(folder, name, info)
    for layer in folder.layers.values():
        _require_complete(folder, layer)
    return folder


def _layers_of(folder: ModelFolder) -> set[str]:
    """Return the names of the layers that hold experts."""
    layers = set()
    for header in folder.headers():
        for name, info in header.tensors.items():
            if (role := role_of(name, info.shape)) and role.part != "router":
                layers.add(role.layer)
    return layers


def _add(folder: ModelFolder, name: str, info: TensorInfo) -> None:
    """Count a tensor of a folder."""
    role, cut = folder.place(name, info)
    folder.parameters += info.numel
    part = "other" if role is None else "routing" if role.part == "router" else "experts"
    folder.parts[part] += info.nbytes
    if role is None or role.part == "router":
        is_weight = len(info.shape) > 1 and not re.search(r"embed|wte|wpe", name) and not folder.is_dropped(name)
        folder.flops[part] += 2 * info.numel * is_weight
        if role is not None and cut is not None:
            folder.layers[role.layer].routers += 1
        return
    layer = folder.layers[role.layer]
    layer.bytes += info.nbytes
    layer.values += info.numel * (len(info.shape) > 1)
    if role.expert is None:
        layer.stacks += 1
    else:
        layer.masks[role.key] |= 1 << role.expert


def _require_complete(folder: ModelFolder, layer: FolderLayer) -> None:
    """Raise a MoepruneError if experts lack tensors, or the router is not known."""
    n = layer.num_experts
    for key, mask in layer.masks.items():
        most = mask.bit_length()
        if most > n:
            message = f"`{folder.path}`: layer `{layer.name}` has {most} experts, `{CONFIG}` says {n}"
            raise MoepruneError(message, "config and tensors are of different models; fetch both again")
        if missing := [
            f"{layer.name}.{key.replace('experts', f'experts.{j}', 1)}" for j in range(n) if not mask >> j & 1
        ]:
            raise MoepruneError(f"`{folder.path}` lacks {listed(missing, 3)}", "fetch all of its shards again")
    if not layer.routers:
        raise _unknown(folder.path, f"layer `{layer.name}` has experts and no router")


def _parts(config: Any) -> Iterator[dict[str, Any]]:
    """Yield a config and all configs within it."""
    if isinstance(config, dict):
        yield config
        for key, value in config.items():
            if key != "quantization_config":
                yield from _parts(value)


def _count(folder: ModelFolder) -> int:
    counts = {folder.language[key] for key in COUNTS if key in folder.language}
    if len(counts) > 1 or not min(counts) > 0:
        raise _unknown(folder.path, f"`{CONFIG}` has several numbers of experts: {sorted(counts)}")
    return int(counts.pop())


def _top_k(language: Mapping[str, Any]) -> int:
    values = [language[key] for key in TOP_K if language.get(key) is not None]
    return max((max(each) if isinstance(each, list) else int(each) for each in values), default=1)


def _groups(language: Mapping[str, Any]) -> int:
    """Return the number of groups that the choice of experts is limited by, 1 for none."""
    return 1 if language.get("topk_method") == "greedy" else int(language.get("n_group") or 1)


def _shards(path: Path) -> dict[str, set[str] | None]:
    """Return the files that hold the tensors, in their order, with the names that an index gives them."""
    if (path / INDEX).exists():
        index: _Index = from_json(read_json(path / INDEX, "an index"), _Index, f"index `{path / INDEX}`")
        shards: dict[str, set[str] | None] = {name: set() for name in sorted(set(index.weight_map.values()))}
        for name, shard in index.weight_map.items():
            shards[shard].add(name)  # type: ignore[union-attr]
        if outside := [name for name in shards if Path(name).name != name]:
            raise MoepruneError(f"`{path / INDEX}` names shards that are not in its folder: {listed(outside)}")
        if missing := [name for name in shards if not (path / name).is_file()]:
            raise MoepruneError(f"`{path}` lacks shards that its index names: {listed(missing)}", "fetch them too")
        return shards
    found = sorted(file.name for file in path.glob("*.safetensors"))
    if SINGLE in found or len(found) == 1:
        return {SINGLE if SINGLE in found else found[0]: None}
    if found:
        raise MoepruneError(f"`{path}` has {len(found)} safetensors files and no `{INDEX}`", "fetch the index too")
    hint = "save it as safetensors: `model.save_pretrained(folder)` of transformers does so"
    raise MoepruneError(f"`{path}` has no safetensors files", hint)


def _unknown(path: Path, reason: str) -> MoepruneError:
    return MoepruneError(f"`{path}`: the layout of its MoE layers is unknown: {reason}", f"known are {KNOWN}")
