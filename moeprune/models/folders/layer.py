"""One MoE layer of a folder of transformers, as its headers show it; no torch."""

import re
from collections import Counter
from dataclasses import dataclass, field

from moeprune.files.header import TensorInfo
from moeprune.layers.gated_config import GatedMoEConfig
from moeprune.models.folders.form import WITH_CODE, is_drop_in
from moeprune.models.folders.names import Role
from moeprune.plan import LayerPlan

NO_WEIGHTS = re.compile(r"(bias|scales?|scale_inv)$")


@dataclass
class FolderLayer:
    """One MoE layer: experts, how many of them a token takes, and in how many groups it chooses them.

    masks: the numbers of experts that have a tensor of their own, as bits, by its key. whole: other tensors of experts
    and the router. bytes, weights: of experts. parameters: of the router too. dtype: of the experts' linears. plan: of
    the pruned layer, in a folder with code.
    """

    name: str
    num_experts: int
    top_k: int
    groups: int
    masks: Counter[str] = field(default_factory=Counter)
    whole: dict[str, tuple[Role, TensorInfo]] = field(default_factory=dict)
    bytes: int = 0
    weights: int = 0
    parameters: int = 0
    dtype: str = "torch.float32"
    plan: LayerPlan | None = None

    @property
    def stored_experts(self) -> int:
        """Experts whose tensors are there."""
        return self.num_experts if self.plan is None else self.plan.k

    @property
    def has_experts(self) -> bool:
        """False for something else with a gate, such as attention."""
        return bool(self.masks) or any(role.part == "stack" for role, _ in self.whole.values())

    @property
    def settings(self) -> GatedMoEConfig:
        """The config of the layer, as far as the size and FLOPs of its compensation depend on it."""
        widths = [info.shape[-1] for role, info in self.whole.values() if role.part != "stack" and len(info.shape) > 1]
        return GatedMoEConfig(max(widths, default=1), self.num_experts, 1, self.top_k)

    def compensation_flops(self, tokens: int) -> int:
        """Return the FLOPs of what compensates for dropped experts, for so many tokens."""
        return 0 if self.plan is None else self.settings.flops(tokens, self.plan).compensation

    def add(self, name: str, role: Role, info: TensorInfo) -> None:
        """Count a tensor of the layer."""
        self.parameters += info.numel
        if role.part in ("expert", "stack"):
            self.bytes += info.nbytes
            self.weights += (weights := weights_of(role.key, info))
            self.dtype = info.dtype if weights else self.dtype
        if role.expert is None:
            self.whole[name] = role, info
        else:
            self.masks[role.key] |= 1 << role.expert

    def refusal(self, plan: LayerPlan) -> str | None:
        """Return why the folder cannot hold the layer pruned by a plan, None if it can."""
        if plan.scope != "static" or not (is_drop_in(plan) or plan.compensation in WITH_CODE):
            only = f"scope `static` and compensation `renorm`, `renorm-refit`, `{'`, `'.join(WITH_CODE)}`"
            no_other = f"{only}: a folder of transformers holds no other"
            return f"can be pruned with {no_other}; the plan has `{plan.scope}` and `{plan.compensation}`"
        if not is_drop_in(plan):
            return None
        if plan.k < self.top_k:
            return f"runs {self.top_k} experts for each token, the plan keeps {plan.k}"
        size = self.num_experts // self.groups
        counts = [sum(j // size == group for j in plan.kept or ()) for group in range(self.groups)]
        if plan.k % self.groups or len({*counts}) > 1:
            kept = f"{plan.k} experts" if plan.kept is None else f"{', '.join(map(str, counts))} experts of them"
            return f"chooses among {self.groups} groups of experts, which stay equal in size; the plan keeps {kept}"
        return None


def weights_of(name: str, info: TensorInfo) -> int:
    """Return how many factors of a matrix product a tensor holds; MXFP4 has two in a byte."""
    if len(info.shape) < 2 or NO_WEIGHTS.search(name):
        return 0
    return info.numel * (2 if name.endswith("_blocks") else 1)
