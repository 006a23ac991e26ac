"""Names of the tensors of an MoE layer in folders of transformers, by rules that hold for all architectures; no torch.

An expert has tensors of its own (`mlp.experts.3.down_proj.weight`), or its place along the first axis of stacked ones
(`mlp.experts.down_proj`, with `_bias`, `_blocks` or `_scales`; `block_sparse_moe.input_linear.weight`), or its block of
rows in flattened ones (`ffn.experts.mlp.w1`). A router has a row, and an entry of each bias, for each expert. Shared
experts have other names (`shared_experts`, `shared_expert`, `shared_mlp`). What compensates for dropped experts is
under `compensation` (`mlp.compensation.low_rank_in`).
"""

import re
from collections.abc import Sequence
from typing import Literal, NamedTuple

EACH = re.compile(r"(?P<layer>.+)\.(?P<key>experts)\.(?P<expert>\d+)\.(?P<rest>.+)")
STACKED = re.compile(r"(?P<layer>.+)\.(?P<key>experts\..+)")
LINEAR = re.compile(r"(?P<layer>.+)\.(?P<key>(input|output)_linear\.weight)")
FLATTENED = re.compile(r"experts\.mlp\.(w1|v1|w2)")
ROUTER = re.compile(
    r"(?P<layer>.+?)\.(?P<key>(router|gate|gating|moe_statics)(\..+)?|expert_bias|e_score_correction_bias)"
)
COMPENSATION = re.compile(r"(?P<layer>.+)\.(?P<key>compensation\.(surrogate|basis|affine_\w+|low_rank_(in|out)))")
ROWS = re.compile(r"(.+\.)?(weight|bias|e_score_correction_bias|correction_bias|expert_bias|per_expert_scale)")
SHARED = re.compile(r"router\.(scale|norm\.weight)")  # tensors of a router that experts share
MTP = re.compile(r"(?P<prefix>(.+\.)?mtp)[._]")  # layers that predict further tokens
NUMBERED = re.compile(r"(?P<prefix>(.+\.)?(layers|blocks|h)\.)(?P<number>\d+)\.")


class Role(NamedTuple):
    """What a tensor is in an MoE layer; key: its name there, without the number of the expert."""

    layer: str
    part: Literal["expert", "stack", "router", "compensation"]
    key: str
    expert: int | None = None


class Cut(NamedTuple):
    """Where a tensor has the places of experts: `parts` equal ones along an axis; all axes before it are of size 1."""

    axis: int
    parts: int


def role_of(name: str, shape: Sequence[int]) -> Role | None:
    """Return the role that a tensor has if its layer holds experts, None if it has none.

    >>> role_of("model.layers.3.mlp.experts.7.down_proj.weight", (32, 16))
    Role(layer='model.layers.3.mlp', part='expert', key='experts.down_proj.weight', expert=7)
    >>> role_of("model.layers.3.mlp.gate.weight", (8, 32))
    Role(layer='model.layers.3.mlp', part='router', key='gate.weight', expert=None)
    """
    if found := COMPENSATION.fullmatch(name):
        return Role(found["layer"], "compensation", found["key"])
    if found := EACH.fullmatch(name):
        return Role(found["layer"], "expert", f"experts.{found['rest']}", int(found["expert"]))
    if (found := LINEAR.fullmatch(name)) and len(shape) == 3 and not found["layer"].endswith(".experts"):
        return Role(found["layer"], "stack", found["key"])
    if found := STACKED.fullmatch(name):
        return Role(found["layer"], "stack", found["key"])
    if found := ROUTER.fullmatch(name):
        return Role(found["layer"], "router", found["key"])
    return None


def renumbered(name: str, expert: int) -> str:
    """Return the name of an expert's tensor with another number.

    >>> renumbered("layers.3.mlp.experts.7.w1.weight", 2)
    'layers.3.mlp.experts.2.w1.weight'
    """
    found = EACH.fullmatch(name)
    assert found is not None
    return f"{found['layer']}.experts.{expert}.{found['rest']}"


def cut_of(role: Role, shape: Sequence[int], num_experts: int) -> Cut | None:
    """Return where a stacked tensor or one of the router is cut, None if all experts share it; num_experts: in it.

    Raises a ValueError if the layout is unknown.
    """
    n = num_experts
    if role.part == "compensation":
        return None
    if role.part == "stack":
        if not shape or all(size == 1 for size in shape):  # one scale for all experts
            return None
        if FLATTENED.fullmatch(role.key) and len(shape) == 2 and shape[0] % n == 0:
            return Cut(0, n)
        axis = 0
    else:
        if SHARED.fullmatch(role.key):
            return None
        axis = 0 if role.key.endswith("weight") else len(shape) - 1
        if not ROWS.fullmatch(role.key) or axis < 0 or any(size != 1 for size in shape[:axis]):
            raise ValueError
    if not shape or shape[axis] != n:
        raise ValueError
    return Cut(axis, n)


def further(layer: str, num_layers: int | None) -> str | None:
    """Return how names begin in a part that predicts further tokens (multi-token prediction), if a layer is in one.

    num_layers: of the model itself; such parts may be numbered on from there.

    >>> further("model.mtp.layers.0.mlp", 4), further("model.layers.4.mlp", 4), further("model.layers.3.mlp", 4)
    ('model.mtp', 'model.layers.4.', None)
    """
    if found := MTP.match(layer):
        return found["prefix"]
    found = NUMBERED.match(f"{layer}.")
    if found is None or num_layers is None or int(found["number"]) < num_layers:
        return None
    return found[0]


def natural(name: str) -> list[tuple[int, str]]:
    """Return a key that sorts the numbers in names by value."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]
