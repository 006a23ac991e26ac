"""A folder of transformers: `config.json`, safetensors shards, and the MoE layers in them, read from headers; no torch.

Headers are read one shard at a time and are not kept: a model may have a hundred thousand tensors.
"""

from __future__ import annotations

import copy
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import msgspec

from moeprune.data.tokens import MOST_TOKENS
from moeprune.errors import MoepruneError, listed
from moeprune.files.disk import read_json
from moeprune.files.header import Header, TensorInfo, read_header
from moeprune.models.folders.form import KEY, is_drop_in, model_type_of, require_same_plan, stated_plan
from moeprune.models.folders.layer import FolderLayer, weights_of
from moeprune.models.folders.names import Cut, Role, cut_of, further, natural, role_of
from moeprune.models.results import BytesByPart, FlopsByPart, ModelCost
from moeprune.plan import LayerPlan, Plan
from moeprune.records import from_json

PLAN = "moeprune.json"  # the plan of a pruned folder, and how it was made
CONFIG, INDEX, SINGLE = "config.json", "model.safetensors.index.json", "model.safetensors"
COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
"""Keys of the number of experts."""
TOP_K = (
    "num_experts_per_tok", "num_experts_per_token", "experts_per_token", "moe_topk", "moe_top_k", "moe_k",
    "top_k_experts",
)  # fmt: skip
"""Keys of the number of experts that run for a token, or of a list of it by layer."""
HEADS, LONGEST = ("num_attention_heads", "n_heads"), ("max_position_embeddings", "max_seq_len", "n_positions")
OTHER_INPUTS = re.compile(r"(^|\.)(visual|vision|audio|multi_modal)\w*\.")  # parts that tokens of text do not pass
LAYERS = ("num_hidden_layers", "n_layers", "num_layers")
KNOWN = "experts under `experts.0`, stacked in `experts.gate_up_proj` or `input_linear`, and a `gate` or a `router`"


@dataclass
class ModelFolder:
    """A folder that holds a model with MoE layers, as it is on disk.

    config: of the whole model. language: the part of it that has the number of experts. layers: by name, in order.
    dropped: how names begin in parts that predict further tokens with experts of their own. parts: bytes of experts,
    routers and the rest. flops: of products with weights for one token, of routers and the rest.
    """

    path: Path
    config: dict[str, Any]
    language: dict[str, Any]
    shards: dict[str, set[str] | None]  # names of files, and of their tensors, if an index has them to compare
    layers: dict[str, FolderLayer] = field(default_factory=dict)
    dropped: tuple[str, ...] = ()
    parts: Counter[str] = field(default_factory=Counter)
    flops: Counter[str] = field(default_factory=Counter)
    parameters: int = 0
    has_head: bool = False  # of its own, not the table of embeddings

    def __deepcopy__(self, _: Any) -> ModelFolder:
        return self  # nothing changes it

    @property
    def plan(self) -> Plan:
        """The plans of the layers that are pruned, if the folder is one with code."""
        return {name: layer.plan for name, layer in self.layers.items() if layer.plan is not None}

    @property
    def model_type(self) -> str:
        """The type of the language model, as transformers names it."""
        return model_type_of(self.language if "model_type" in self.language else self.config)

    @property
    def provenance(self) -> dict[str, Any]:
        """How the model was pruned, if that is recorded."""
        path = self.path / PLAN
        recorded = read_json(path, "the plan of a pruned folder") if path.is_file() else {}
        found = recorded.get("provenance") if isinstance(recorded, dict) else None
        return found if isinstance(found, dict) else {}

    @property
    def num_experts(self) -> int:
        """Experts of each layer, before it was pruned."""
        return next(iter(self.layers.values())).num_experts

    @property
    def gates(self) -> str:
        """The function that makes gates of router logits, `softmax` or `sigmoid`, as far as it can be seen."""
        stated = self.language.get("scoring_func") or self.language.get("score_function")
        keys = {role.key for layer in self.layers.values() for role, _ in layer.whole.values()}
        has_bias = any(re.fullmatch(r"(gate\.)?(e_score_correction|expert)_bias", key) for key in keys)
        is_sigmoid = has_bias or self.model_type.startswith("llama4")
        return str(stated or ("sigmoid" if is_sigmoid else "softmax"))

    @property
    def top_k(self) -> int:
        """The most experts that a token takes in a layer."""
        return next(iter(self.layers.values())).top_k

    def headers(self) -> Iterator[Header]:
        """Yield the header of each shard, checked against the index the first time."""
        for name, expected in self.shards.items():
            header = read_header(self.path / name)
            if expected is not None and (wrong := sorted(expected ^ header.tensors.keys())):
                message = f"`{self.path / name}` does not fit `{INDEX}`: only one of them has {listed(wrong, 3)}"
                raise MoepruneError(message, "index and shards are of different models or damaged; fetch both again")
            self.shards[name] = None  # names may be many
            yield header

    def role(self, name: str, info: TensorInfo) -> Role | None:
        """Return what a tensor is in an MoE layer, None for all others."""
        role = role_of(name, info.shape)
        return role if role is not None and role.layer in self.layers else None

    def cut(self, name: str, role: Role, info: TensorInfo) -> Cut | None:
        """Return where a tensor of all experts, or of the router, has their places; None if they share it."""
        layer = self.layers[role.layer]
        count = layer.num_experts if role.part == "router" else layer.stored_experts
        try:
            return cut_of(role, info.shape, count)
        except ValueError:
            found = f"`{name}` of shape {list(info.shape)}"
            raise _unknown(self.path, f"{found} has no place for each of {count} experts") from None

    def is_dropped(self, name: str) -> bool:
        """Return True for a tensor of a part that predicts further tokens, if that has experts."""
        return name.startswith(self.dropped)

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence; what is not stated is not short."""
        return _stated(self.language, LONGEST) or MOST_TOKENS

    @property
    def num_layers(self) -> int | None:
        """Blocks of the model, with MoE layers or without, if the config states it."""
        return _stated(self.language, LAYERS)

    @property
    def vocabulary(self) -> int:
        """Tokens of the vocabulary."""
        return int(self.language.get("vocab_size") or self.config.get("vocab_size") or 1)

    def cost(self) -> ModelCost:
        """Return parameters, bytes, and the FLOPs of a sequence: products with weights, and those of full attention."""
        s = min(MOST_TOKENS, self.longest)
        layers = self.layers.values()
        experts = sum(2 * layer.weights * layer.top_k // layer.num_experts for layer in layers)
        per_token = self.flops["other"] + (0 if self.has_head else self.flops["tables"])
        other = s * per_token + _attention(self.language, s)
        flops = {"experts": s * experts, "routing": s * self.flops["routing"], "other": other}
        flops["compensation"] = sum(layer.compensation_flops(s) for layer in layers)
        parts = {name: self.parts[name] for name in ("experts", "routing", "other", "compensation")}
        return ModelCost(
            parameters=self.parameters,
            bytes=sum(parts.values()),
            bytes_by_part=BytesByPart(**parts),
            flops_per_input=FlopsByPart(total=sum(flops.values()), **flops),
            experts_per_input=float(sum(layer.stored_experts for layer in layers)),
        )


def changed_config(folder: ModelFolder, changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy of the config with changes in its language part."""
    config = copy.deepcopy(folder.config)
    next(_same(config, folder.config, folder.language)).update(changes)
    return config


def _same(copied: dict[str, Any], of: dict[str, Any], part: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the place in a copied config of a part of the original."""
    if of is part:
        yield copied
    for key, value in of.items():
        if isinstance(value, dict):
            yield from _same(copied[key], value, part)


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
    language = found[0] if found else {}
    counts = {count for key in COUNTS if type(count := language.get(key)) is int}
    settings = max(counts, default=1), _top_k(language), _groups(language)
    num_layers = _stated(language, LAYERS)
    folder = ModelFolder(path, config, language, shards)
    plan = stated_plan(config, f"`{path / CONFIG}`")
    if plan and (path / PLAN).is_file():
        require_same_plan(plan, read_json(path / PLAN, "the plan of a pruned folder"), path / PLAN)
    pruned = {name: None if is_drop_in(layer) else layer for name, layer in plan.items()}
    layers = {name: FolderLayer(name, *settings, plan=layer) for name, layer in pruned.items()}
    for header in folder.headers():
        for name, info in header.tensors.items():
            folder.parameters += info.numel
            if role := role_of(name, info.shape):
                layers.setdefault(role.layer, FolderLayer(role.layer, *settings)).add(name, role, info)
            else:
                _add_other(folder, name, info, further(name, num_layers) is None)
    ahead = {name: further(name, num_layers) for name, layer in layers.items() if layer.has_experts or layer.plan}
    if not ahead:
        raise MoepruneError(f"no MoE layers in `{path}`", f"known are layers with {KNOWN}")
    if len(found) != 1 or len(counts) != 1 or not settings[0] > 0:
        where = f"several numbers of experts: {sorted(counts)}" if counts else "no number of experts"
        raise _unknown(path, f"`{CONFIG}` has {where} ({', '.join(f'`{key}`' for key in COUNTS)})")
    folder.dropped = tuple(sorted({prefix for prefix in ahead.values() if prefix is not None}))
    folder.layers = {name: layers[name] for name in sorted(ahead, key=natural) if ahead[name] is None}
    if plan and plan.keys() != folder.layers.keys():
        raise MoepruneError(f"`{path / CONFIG}`: `{KEY}` plans other layers than `{path}` has", "prune it again")
    for layer in layers.values():
        if layer.name in folder.layers:
            _require_complete(folder, layer)
            folder.parts["experts"] += layer.bytes
        for name, (role, info) in layer.whole.items():
            if layer.name in folder.layers and role.part == "router":
                _add_other(folder, name, info, True, "routing")
            elif layer.name in folder.layers and role.part == "compensation":
                folder.parts["compensation"] += info.nbytes
            elif layer.name not in folder.layers:
                _add_other(folder, name, info, layer.name not in ahead)
        folder.parts["other"] += layer.bytes if layer.name in ahead and layer.name not in folder.layers else 0
    return folder


def _add_other(folder: ModelFolder, name: str, info: TensorInfo, runs: bool, part: str = "other") -> None:
    """Count a tensor that is none of an expert; runs: for each token."""
    folder.parts[part] += info.nbytes
    is_table = re.search(r"embed|wte|wpe", name) is not None
    if runs and not OTHER_INPUTS.search(name):
        folder.flops["tables" if is_table else part] += 2 * weights_of(name, info)
        folder.has_head |= name.endswith("head.weight")


def _require_complete(folder: ModelFolder, layer: FolderLayer) -> None:
    """Raise a MoepruneError if experts lack tensors, or their layout is not known."""
    n, plan = layer.stored_experts, layer.plan
    if plan is not None:
        _require_planned(folder, layer, plan)
    for key, mask in layer.masks.items():
        if (most := mask.bit_length()) > n:
            message = f"`{folder.path}`: layer `{layer.name}` has {most} experts, `{CONFIG}` says {n}"
            raise MoepruneError(message, "config and tensors are of different models; fetch both again")
        absent = [j for j in range(n) if not mask >> j & 1]
        if missing := [f"{layer.name}.experts.{j}{key.removeprefix('experts')}" for j in absent]:
            raise MoepruneError(f"`{folder.path}` lacks {listed(missing, 3)}", "fetch all of its shards again")
    cuts = [(role.part, folder.cut(name, role, info)) for name, (role, info) in layer.whole.items()]
    has_router = any(part == "router" and cut is not None for part, cut in cuts)
    if not has_router and (plan is None or plan.compensation != "linear"):
        raise _unknown(folder.path, f"layer `{layer.name}` has experts and no router")


def _require_planned(folder: ModelFolder, layer: FolderLayer, plan: LayerPlan) -> None:
    """Raise a MoepruneError if a pruned layer is not the one of its plan, or lacks experts or its compensation."""
    if plan.num_experts != layer.num_experts:
        stated = f"is for {plan.num_experts} experts, `{CONFIG}` says {layer.num_experts}"
        raise MoepruneError(f"`{folder.path}`: the plan of layer `{layer.name}` {stated}", "prune it again")
    if reason := layer.refusal(plan):
        raise MoepruneError(f"`{folder.path}`: layer `{layer.name}` {reason}", "prune it again")
    expected = {f"{layer.name}.compensation.{key}" for key in layer.settings.compensation_shapes(plan)}
    if missing := sorted(expected - layer.whole.keys()):
        raise MoepruneError(f"`{folder.path}` lacks {listed(missing, 3)}", "fetch all of its shards again")
    if plan.k and not layer.has_experts:
        raise MoepruneError(f"`{folder.path}` lacks the experts of layer `{layer.name}`", "fetch all shards again")


def _parts(config: Any) -> Iterator[dict[str, Any]]:
    """Yield a config and all configs within it."""
    if isinstance(config, dict):
        yield config
        for key, value in config.items():
            if key not in ("quantization_config", KEY):
                yield from _parts(value)


def _attention(language: Mapping[str, Any], tokens: int) -> int:
    """Return the FLOPs of the products of queries and keys, and of weights and values, in all blocks."""
    heads, layers = _stated(language, HEADS) or 0, _stated(language, LAYERS) or 0
    width = language.get("head_dim") or (language.get("hidden_size") or 0) // max(1, heads)
    keys = (language.get("qk_nope_head_dim") or width) + (language.get("qk_rope_head_dim") or 0)
    return int(2 * tokens * tokens * layers * heads * (keys + (language.get("v_head_dim") or width)))


def _stated(language: Mapping[str, Any], keys: Sequence[str]) -> int | None:
    """Return the first of some keys that is a whole number."""
    return next((language[key] for key in keys if type(language.get(key)) is int), None)


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
