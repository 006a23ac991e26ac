"""Classes of transformers whose MoE layers are pruned and compensated, for folders with modelling code.

`modeling_moeprune.py`, which is written beside the weights, makes them by `pruned_classes`: folders that exist import
it from here. Models hold the tensors as the folder has them, and our layers are made of these when they are first run.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from moeprune.errors import MoepruneError
from moeprune.layers.gated_config import GatedMoEConfig
from moeprune.layers.layer import MoELayer, layer_of_tensors
from moeprune.models.folders.form import CLASSES, KEY, PREFIX, is_drop_in, stated_plan
from moeprune.models.folders.names import natural
from moeprune.models.libraries.transformers import (
    ROUTER_NAMES,
    RoutedBlock,
    describe_block,
    is_block,
    return_no_router_logits,
    returns_pair,
    tensors_of_block,
)
from moeprune.plan import LayerPlan, Plan


class PrunedBlock(nn.Module):
    """A block of transformers with kept experts alone, and what compensates for the others; to run, not to train.

    Its parts have the names that they have in the block, so that the folder's tensors are loaded into them.
    """

    def __init__(self, block: nn.Module, config: GatedMoEConfig, plan: LayerPlan):
        super().__init__()
        self.config, self.plan, self.returns_pair = config, plan, returns_pair(block)
        left_out = {*(() if plan.k else ("experts",)), *(ROUTER_NAMES if plan.compensation == "linear" else ())}
        for name, part in block.named_children():
            if name not in left_out:
                self.add_module(name, part)
        if plan.compensation != "linear":  # else what lies in the block is a bias of the router
            self._parameters |= block._parameters
            self._buffers |= block._buffers
        experts = block.get_submodule("experts")
        for name, stacked in [*experts.named_parameters(recurse=False)]:
            setattr(experts, name, nn.Parameter(stacked.detach()[: plan.k].clone(), stacked.requires_grad))
        self.compensation = nn.Module()
        for name, shape in config.compensation_shapes(plan).items():
            self.compensation.register_buffer(name, torch.zeros(shape))
        self._made: tuple[Any, RoutedBlock] | None = None

    def forward(self, x: Tensor) -> Any:
        """Return what the block returned: the output (b,m,d), perhaps with None for the router logits."""
        return self.routed(x)

    @property
    def routed(self) -> RoutedBlock:
        """The layer with the shared experts, made anew if tensors were moved, converted or replaced."""
        tensors = {name: tensor.detach() for name, tensor in tensors_of_block(self).items()}
        tensors |= dict(self.compensation.named_buffers())
        versions = {name: None if t.is_inference() else t._version for name, t in tensors.items()}
        now = [(name, t.data_ptr(), versions[name], t.dtype, t.device) for name, t in tensors.items()]
        if self._made is None or self._made[0] != now:
            with torch.inference_mode(False):
                self._made = now, RoutedBlock(self, self._layer_of(tensors))
        return self._made[1]

    def _layer_of(self, tensors: dict[str, Tensor]) -> MoELayer:
        """Return our layer of the block's tensors, its router with the kept experts first."""
        shapes, like = self.config.shapes(self.plan), next(iter(tensors.values()))
        columns = torch.tensor(self.plan.columns, device=like.device)
        for name in self.config.router_shapes(1).keys() & tensors.keys():
            tensors[name] = tensors[name][columns]
        tensors |= {name: like.new_empty(shape) for name, shape in shapes.items() if name not in tensors}
        return layer_of_tensors(self.config, self.plan, {name: tensors[name] for name in shapes})


def prune_blocks(model: nn.Module, plan: Plan) -> dict[str, str]:
    """Put pruned blocks in place of those that a plan prunes; return the last parts of their names in the folder and in
    the model, where these differ.

    Raises a MoepruneError if the plan does not fit.
    """
    blocks = sorted((name for name, part in model.named_modules() if is_block(part)), key=natural)
    names = sorted(plan, key=natural)
    if len(blocks) != len(plan):
        message = f"transformers builds {len(blocks)} blocks of experts, `config.json` plans {len(plan)}"
        raise MoepruneError(message, "its release is too old, or the config is damaged")
    for path, name in zip(blocks, names, strict=True):
        if not is_drop_in(plan[name]):
            block = model.get_submodule(path)
            config, _ = describe_block(block, path)
            if reason := config.refusal(plan[name]):
                raise MoepruneError(f"layer `{name}` {reason}", "`config.json` is damaged: prune the full model again")
            model.set_submodule(path, PrunedBlock(block, config, plan[name]), strict=True)
    last = [(name.rpartition(".")[2], path.rpartition(".")[2]) for name, path in zip(names, blocks, strict=True)]
    return {old: new for old, new in last if old != new}


def _learn_names(full: type, model_type: str, places: Mapping[str, str]) -> None:
    """Have transformers convert the names and stacks of a pruned model as it does those of the full one.

    full: the class of that. places: see `prune_blocks`.
    """
    from transformers import conversion_mapping
    from transformers.core_model_loading import WeightRenaming

    library: Any = conversion_mapping
    known = library.get_checkpoint_conversion_mapping(full.__name__)
    if known is None:
        known = library.get_checkpoint_conversion_mapping(model_type)
    own = [WeightRenaming(rf"\.{old}\.compensation\.", f".{new}.compensation.") for old, new in places.items()]
    library.register_checkpoint_conversion_mapping(PREFIX + model_type, [*own, *(known or [])], overwrite=True)


@functools.cache
def pruned_classes(model_type: str, auto: str, module: str = __name__) -> tuple[type, type]:
    """Return the classes of the config and of the model for pruned models of a type.

    auto: the class of transformers that loads the full model. module: that the classes belong to. Raises a
    MoepruneError if transformers does not know the type, or has no such model of it.
    """
    import transformers

    if model_type not in transformers.CONFIG_MAPPING:
        raise MoepruneError(f"transformers {transformers.__version__} does not know the model type `{model_type}`")
    of_config: Any = transformers.CONFIG_MAPPING[model_type]
    known = getattr(transformers, auto)._model_mapping
    if of_config not in known:
        raise MoepruneError(f"transformers {transformers.__version__} has no `{auto}` of type `{model_type}`")
    of_model = known[of_config]
    of_model = of_model[0] if isinstance(of_model, tuple) else of_model
    config = type(CLASSES[0], (of_config,), {"model_type": PREFIX + model_type, "__module__": module})

    def initialise(self: Any, config: Any, *arguments: Any, **options: Any) -> None:
        of_model.__init__(self, config, *arguments, **options)
        return_no_router_logits(config)
        plan = stated_plan({KEY: getattr(config, KEY, None)}, "`config.json`")
        _learn_names(of_model, model_type, prune_blocks(self, plan))

    members = {
        "config_class": config,
        "__module__": module,
        "__init__": initialise,
        "is_backend_compatible": classmethod(lambda _: False),  # vLLM asks: it would run all experts of a router
    }
    return config, type(CLASSES[1], (of_model,), members)
