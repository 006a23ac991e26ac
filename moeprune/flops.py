"""FLOPs of a model, counted from its architecture and plan; no torch.

1 multiply-add = 2 FLOPs. Matrix products are counted, as `torch.utils.flop_counter.FlopCounterMode`
does; softmax, norms, activations, additions and sorting are left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass

from moeprune.architecture import BlockConfig, ModuleConfig, SoftMoEConfig, ViTConfig
from moeprune.plan import LayerPlan, Plan


@dataclass(frozen=True)
class Flops:
    """FLOPs for one input.

    experts: the experts' MLPs. routing: router logits, dispatch and combine. compensation: the
    combine product with surrogates. other: the rest of the model.
    """

    experts: int = 0
    routing: int = 0
    compensation: int = 0
    other: int = 0

    @property
    def total(self) -> int:
        """All of them."""
        return self.experts + self.routing + self.compensation + self.other

    def __add__(self, more: Flops) -> Flops:
        return Flops(*(a + b for a, b in zip(asdict(self).values(), asdict(more).values(), strict=True)))

    def to_json(self) -> dict[str, int]:
        """As JSON values, the total first."""
        return {"total": self.total, **asdict(self)}


def soft_moe_flops(
    config: SoftMoEConfig, tokens: int, plan: LayerPlan | None = None, running: float | None = None
) -> Flops:
    """FLOPs of one Soft MoE layer on one input of m tokens.

    Logits cost 2·m·d·n·p, dispatch 2·m·d·k·p and combine 2·m·o·k·p with o the width of the output, an
    expert of two linears 2·p·(d·f + h·o) with f the width after the first, one of one linear 2·p·d·o.
    Dynamic slots cost 2·d·d·n·p more, to project what stands for phi. Of the surrogates, scope `static`
    multiplies those of the dropped slots, the others those of all. `affine` costs 2·m·d·o more for the
    tokens and 2·d·o for their mean. With a rank r, o in these is r, the slots are all n·p, and 2·m·r·o is
    added for the directions.

    Args:
        config: of the layer.
        tokens: m.
        plan: of the layer, where it is pruned.
        running: how many experts run, in the mean, where the plan does not fix it.
    """
    d, n, p, out = config.dim, config.num_experts, config.slots_per_expert, config.output_width
    k: float = plan.k if plan else n
    if running is not None:
        k = running
    if plan and plan.merges:
        k = n  # all slots run, each by the expert that its own was folded into
    routed = plan.routed_experts if plan else n
    if config.dynamic_slots:
        tokens = n * p  # padded to so many
    surrogates, added, basis = 0, out, 0
    if plan and plan.has_surrogate:
        surrogates = n - plan.k if plan.scope == "static" else n
    if plan and plan.has_basis and plan.rank is not None:
        surrogates, added, basis = n, plan.rank, 2 * tokens * plan.rank * out
    affine = 2 * (tokens + 1) * d * added if plan and plan.has_affine else 0
    projection = 2 * d * d * n * p if config.dynamic_slots else 0
    first = d * config.first_width if config.expert != "linear" else 0
    return Flops(
        experts=round(2 * k * p * (first + config.expert_width * out)),
        routing=round(2 * tokens * p * (d * routed + (d + out) * k)) + projection,
        compensation=2 * tokens * added * p * surrogates + affine + basis,
    )


def tokens_of(config: ViTConfig | ModuleConfig, name: str) -> int:
    """The tokens of one input, m, that a Soft MoE layer of a model gets."""
    return config.num_tokens if isinstance(config, ViTConfig) else config.layers[name].tokens


def model_flops(
    config: ViTConfig | ModuleConfig, plan: Plan, running: Mapping[str, float] | None = None
) -> Flops:
    """FLOPs of a whole model on one input.

    Args:
        config: of the unpruned model.
        plan: of its pruned layers.
        running: experts that run in a layer, in the mean, where its plan does not fix it.
    """
    running = running or {}
    if isinstance(config, ViTConfig):
        return vit_flops(config, plan, running)
    flops = Flops(other=config.other_flops)
    for name, layer in config.layers.items():
        flops += soft_moe_flops(layer.soft_moe, layer.tokens, plan.get(name), running.get(name))
    return flops


def vit_flops(
    config: ViTConfig, plan: Plan | None = None, running: Mapping[str, float] | None = None
) -> Flops:
    """FLOPs of a whole model on one image; see `model_flops`."""
    plan, running = plan or {}, running or {}
    m, d = config.num_tokens, config.dim
    patch_height, patch_width = config.patch_size
    pixels = config.in_channels * patch_height * patch_width
    heads = m if config.pooling == "none" else 1
    flops = Flops(other=2 * config.num_patches * pixels * d + 2 * heads * d * config.num_classes)
    for index, block in enumerate(config.blocks):
        flops += Flops(other=_block_other(block, m, d))
        if block.soft_moe is not None:
            name = f"blocks.{index}.soft_moe"
            flops += soft_moe_flops(block.soft_moe, m, plan.get(name), running.get(name))
    return flops


def _block_other(block: BlockConfig, m: int, d: int) -> int:
    attention = 8 * m * d * d + 4 * m * m * d if block.attention else 0
    mlp = 4 * m * d * block.mlp_dim if block.mlp_dim else 0
    return attention + mlp
