"""Scores of experts and the choice of the best k: pure functions on tensors.

Axes: b inputs, m tokens, n experts, p slots per expert.
"""

from __future__ import annotations

import torch
from torch import Tensor


def combine_mass(combine_weights: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return the mass of each expert (b,n) in float32 or better, by C (b,m,n,p) and a mask of tokens (b,m).

    The sum over tokens and slots of C, divided by m: the masses of one input sum to 1 (Chung et al. 2024,
    arXiv 2409.00879, Algorithm 1).
    """
    dtype = torch.promote_types(combine_weights.dtype, torch.float32)
    if mask is not None:
        tokens = mask.sum(1).clamp_min(1)[:, None]
        return (combine_weights * mask[:, :, None, None]).sum((1, 3), dtype=dtype) / tokens
    if combine_weights.shape[-1] == 1:
        return combine_weights.mean(dim=(1, 3), dtype=dtype)
    return combine_weights.mean(dim=1, dtype=dtype).sum(dim=-1)  # both at once is 20 times slower


def rank(scores: Tensor) -> Tensor:
    """Return expert indices (...,n) from the highest to the lowest score; of equal scores the lower first."""
    return scores.sort(dim=-1, descending=True, stable=True).indices


def top_k(scores: Tensor, k: int) -> Tensor:
    """Return the k best experts of each row, ascending (...,k), with ties broken as in `rank`."""
    if scores.device.type == "cpu" and 0 < k < scores.shape[-1]:
        # Four times faster than ranking all, but which of two equal scores it takes is not specified.
        best = scores.topk(k + 1, dim=-1)
        if (best.values[..., k - 1] > best.values[..., k]).all():
            return best.indices[..., :k].sort(dim=-1).values
    return rank(scores)[..., :k].sort(dim=-1).values


def fewest_with_mass(scores: Tensor, mass: Tensor, share: float, most: int) -> Tensor:
    """Return the fewest experts of each input, best first by scores (b,n), with a share of its mass (b,n).

    As indices (b,most), ascending; n in place of those that are not needed.
    """
    n = scores.shape[-1]
    order = rank(scores)[..., :most]
    before = mass.gather(-1, order).cumsum(-1).roll(1, -1)
    before[..., 0] = 0
    is_needed = before < share * mass.sum(-1, keepdim=True)
    is_needed[..., 0] = True
    return torch.where(is_needed, order, n).sort(dim=-1).values


def random_scores(num_experts: int, seed: int, layer_index: int) -> Tensor:
    """Return the scores of the signal `random` (n): a fixed order for this seed and layer."""
    generator = torch.Generator().manual_seed((seed * 1_000_003 + layer_index) % 2**63)
    return torch.randperm(num_experts, generator=generator).to(torch.float32)
