"""A model that holds MoE layers: its common surface, and how it is saved."""

import contextlib
import copy
import itertools
import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar
from weakref import WeakKeyDictionary, ref

from torch import Tensor, nn

from moeprune.data.datasets import Data, Dataset, open_data
from moeprune.data.preprocessing import InputFormat
from moeprune.data.spec import DataInfo
from moeprune.data.tokens import AnyFormat
from moeprune.errors import MoepruneError
from moeprune.files import checkpoint
from moeprune.files.header import METADATA_KEY
from moeprune.layers.interface import Usage
from moeprune.layers.layer import MoELayer
from moeprune.models.architecture import ModelConfig
from moeprune.models.description import FORMAT, Details, require_few_types
from moeprune.models.results import ModelCost, Reading
from moeprune.plan import Plan
from moeprune.records import from_json, to_json


class Model(nn.Module):
    """A model that holds MoE layers: inputs (b,c,H,W) in, logits (b,classes) out; or token ids (b,s), logits (b,s,V).

    config: of the unpruned model. reading: of a model from a file that moeprune did not write.
    """

    def __init__(self, config: ModelConfig, details: Details):
        super().__init__()
        self.config, self.details = config, details
        self.reading: Reading | None = None

    @property
    def moe_layers(self) -> dict[str, MoELayer]:
        """The MoE layers by name, in the order of the data flow."""
        return {name: self.get_submodule(name) for name in self.config.moe_layers}  # type: ignore[misc]

    def set_submodule(self, target: str, module: nn.Module, strict: bool = False) -> None:
        """Replace a part under all of its names."""
        for name in names_of(self, target):
            super().set_submodule(name, module, strict)

    @property
    def reads_weights(self) -> bool:
        """True if layers read their weights from disk when they run."""
        return False

    @property
    def sequence(self) -> list[str]:
        """The names of layers of which each takes what the one before gives, and may take other arguments with it."""
        return []

    @property
    def plan(self) -> Plan:
        """The plans of the pruned layers."""
        return {name: layer.plan for name, layer in self.moe_layers.items() if layer.plan is not None}

    def named_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield all tensors by name."""
        yield from self.state_dict().items()

    def release_weights(self) -> None:
        """Drop the weights that are read again when they are needed, if there are any."""

    def cost(self, usage: Mapping[str, Usage] | None = None) -> ModelCost:
        """Return size and cost; see `ModelConfig.cost`."""
        return self.config.cost(self.plan, checkpoint.tensor_infos(self.state_dict()), usage)

    @property
    def input_format(self) -> AnyFormat:
        """The inputs, and how pixels or text become inputs."""
        shape, details = self.config.input_shape, self.details
        return InputFormat(*shape, self.config.num_classes, details.preprocessing, details.classes)

    def write(self, path: Path, overwrite: bool) -> None:
        """Write the model, see `save`."""
        tensors = self.state_dict()
        known = self.config.known(checkpoint.tensor_infos(tensors))  # the user's own part may have any types
        require_few_types(known, self.config, path)
        metadata = {
            "format": FORMAT,
            "kind": "checkpoint",
            "architecture": self.config.to_json(),
            "preprocessing": to_json(self.details.preprocessing),
            "source": self.details.source,
            "plan": to_json(self.plan),
            "provenance": self.details.provenance,
        }
        metadata |= {"classes": self.details.classes} if self.details.classes else {}
        if path.suffix in checkpoint.TORCH_SUFFIXES:
            checkpoint.check_finite(tensors, path)
            content = {METADATA_KEY: json.dumps(metadata, sort_keys=True), "state_dict": tensors}
            checkpoint.write_torch(path, content, overwrite)
        else:
            checkpoint.write(path, tensors, metadata, overwrite)


M = TypeVar("M", bound=nn.Module)


def names_of(model: nn.Module, path: str) -> list[str]:
    """Return all names of a part of a model, the first one first."""
    part = model.get_submodule(path)
    return [name for name, other in model.named_modules(remove_duplicate=False) if other is part]


def require_dense_layers(model: Model, hint: str) -> dict[str, MoELayer]:
    """Return the MoE layers, or raise a MoepruneError if there is none or one is pruned already."""
    layers = model.moe_layers
    if not layers:
        raise MoepruneError("no MoE layer in the model", "there is nothing to prune in it")
    for one, other in itertools.combinations(layers, 2):
        if layers[one] is layers[other]:
            raise MoepruneError(f"layers `{one}` and `{other}` are the same module", "use a copy for one of them")
    require_unpruned(model.plan, hint)
    return layers


def require_unpruned(plan: Plan, hint: str) -> None:
    """Raise a MoepruneError if a model has a plan already."""
    if plan:
        names = ", ".join(f"`{name}`" for name in plan)
        raise MoepruneError(f"layers {names} are already pruned", hint)


def private_copy(model: M) -> M:
    """Return a copy in eval mode that can be observed, moved and altered without affecting the model.

    Both share memory until one is moved or converted: `copy.deepcopy` the one that is to be trained in place. They
    also share what cannot be copied. Raises a MoepruneError if the model cannot be.
    """
    if isinstance(model, Model):
        model.release_weights()
    memory: dict[int, Any] = {id(p): nn.Parameter(p.detach(), False) for p in model.parameters()}
    memory |= {id(buffer): buffer.detach() for buffer in model.buffers()}
    try:
        return copy.deepcopy(model, dict(memory)).eval()
    except Exception:  # a lock, an open file, a tensor with a gradient's history
        shared = _uncopyable(model, memory)
    try:
        return copy.deepcopy(model, memory | shared).eval()
    except Exception as error:
        raise MoepruneError(
            f"the model cannot be copied: {type(error).__name__}: {error}", "give its class a `__deepcopy__`"
        ) from None


def _uncopyable(model: nn.Module, memory: Mapping[int, Any]) -> dict[int, Any]:
    """Return the attributes of a model's parts that cannot be copied, by their ids: copies of the model share them."""
    shared: dict[int, Any] = {}
    for part in model.modules():
        for name, value in vars(part).items():
            if name not in ("_parameters", "_buffers", "_modules"):
                try:
                    copy.deepcopy(value, dict(memory))
                except Exception:
                    shared[id(value)] = value.detach() if isinstance(value, Tensor) else value
    return shared


def dataset_for(
    model: Model,
    data: Data,
    split: str,
    limit: int | None = None,
    class_names: tuple[str, ...] = (),
    sequence_length: int | None = None,
    by: str | None = None,
) -> Dataset:
    """Return data as a data set for a model, see `open_data`.

    split: if a spec of a built-in set has none. class_names: of an analysis, if the model does not state them.
    sequence_length, by: see `open_data`.
    """
    form = model.input_format
    if isinstance(form, InputFormat) and not form.class_names:
        form = replace(form, class_names=class_names)
    return open_data(data, form, split, limit, sequence_length, by)


def fingerprint(model: Model) -> str:
    """Return the SHA-256 of the architecture and all tensors, cached until a tensor is replaced, moved or changed.

    PyTorch does not count changes in place through `.data` or through a NumPy array that shares the memory.
    """
    model.release_weights()
    state = _state_of(model)
    if state is not None and model in _fingerprints and _fingerprints[model][0] == state:
        return _fingerprints[model][1]
    found = checkpoint.fingerprint(model.named_tensors(), model.config.to_json())
    model.release_weights()
    remember_fingerprint(model, found)
    return found


def remember_fingerprint(model: Model, fingerprint: str) -> None:
    """Cache the fingerprint of a model, known from its file, until its tensors change."""
    if (state := _state_of(model)) is not None:
        _fingerprints[model] = state, fingerprint


_fingerprints: WeakKeyDictionary[Model, tuple[list[tuple], str]] = WeakKeyDictionary()


def _state_of(model: Model) -> list[tuple] | None:
    """Return a value that changes whenever a tensor does; None if PyTorch does not count changes. Files that tensors
    are read from when they are needed are taken to stay as they are.
    """
    tensors = model.state_dict()
    if any(tensor.is_inference() for tensor in tensors.values()):
        return None
    return [  # weak references distinguish a tensor from a later one in the same memory
        (name, ref(t.untyped_storage()), t.data_ptr(), t._version, t.shape, t.stride(), t.dtype)
        for name, t in tensors.items()
        if not t.is_meta
    ]


def unpruned_fingerprint(model: Model) -> str:
    """Return the fingerprint of the model that this one was pruned from, if recorded, else its own."""
    pruned_from = model.details.provenance.get("pruned_from")
    if isinstance(pruned_from, dict) and isinstance(pruned_from.get("fingerprint"), str):
        return pruned_from["fingerprint"]
    return fingerprint(model)


def calibration_of(model: Model) -> DataInfo | None:
    """Return the data that a pruned model was calibrated on, if recorded; the folders of its spec are not."""
    recorded = model.details.provenance.get("calibration")
    if not isinstance(recorded, dict):
        return None
    with contextlib.suppress(MoepruneError):
        return from_json({name: recorded.get(name) for name in DataInfo.__struct_fields__}, DataInfo, "calibration")
    return None


def save(model: Model, path: str | Path, overwrite: bool = False) -> None:
    """Write a checkpoint that `load` reads: equal models give equal bytes.

    A model that was adopted without a factory is loaded with one, `load(path, model=build)`.

    Args:
        path: the file; with a suffix .pt, .pth or .bin `torch.load` reads it (its tensors are under `state_dict`), else
            it is a safetensors file. Of a language model, the folder.
        overwrite: replace a file that exists.

    Raises:
        MoepruneError: the path cannot be written, or exists and may not be replaced; weights are NaN,
            infinite or of several types.
    """
    model.write(Path(path), overwrite)
