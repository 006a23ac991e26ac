"""Which experts one set for all inputs keeps, by the error that it leaves: pure functions on a Gram matrix.

With E_j the part of expert j's contribution that is lost with it, and G_jl = E <E_j, E_l>, the expected
squared error of the layer's output when the set Z is dropped is exactly the sum of G over Z×Z. The matrix
may have rows and columns behind those of the n experts: what is lost whatever is dropped. Where the combine
weights of the kept experts are made to sum to 1 again (`renorm`), that sum is to be divided by the square of
the mass that they had, for which its mean over inputs and tokens serves.
"""

import torch
from torch import Tensor

from moeprune.layers.experts import top_k


def best_by_score(scores: Tensor, k: int, groups: int = 1) -> tuple[int, ...]:
    """Return the k experts of the highest scores (n), ascending; groups: see `best_kept`."""
    in_groups = top_k(scores.view(groups, -1), k // groups)
    first = torch.arange(groups)[:, None] * (len(scores) // groups)
    return tuple((in_groups.cpu() + first).flatten().tolist())


def drop_order(
    gram: Tensor, num_experts: int, mass: Tensor | None = None, keep: int = 0, groups: int = 1
) -> tuple[list[int], list[float]]:
    """Drop the expert that adds least error, again and again, until so many are left to keep.

    gram: G (r,r), whose first n rows are of the experts. mass: with `renorm` the mean combine mass of each (n).
    groups: see `best_kept`. Returns the experts in the order in which they are dropped (n - keep), and the error with
    the first 0, 1, … of them dropped (n - keep + 1).
    """
    n, gram, mass = num_experts, gram.double(), _mass_or_zeros(mass, num_experts)
    always = torch.ones(len(gram) - n, dtype=gram.dtype)
    added = gram.diagonal()[:n] + 2 * gram[:n, n:] @ always  # by dropping each expert now
    lost, left = always @ gram[n:, n:] @ always, torch.ones((), dtype=gram.dtype)
    order: list[int] = []
    errors = [float(lost)]
    size, counts = n // groups, [n // groups] * groups
    for _ in range(n - keep):
        after = _divided(lost + added, left - mass)
        j = int(after.argmin())
        order.append(j)
        errors.append(float(after[j]))
        lost, left = lost + added[j], left - mass[j]
        added = added + 2 * gram[:n, j]
        added[j] = torch.inf
        counts[j // size] -= 1
        if counts[j // size] == keep // groups:
            added[j // size * size : (j // size + 1) * size] = torch.inf
    return order, errors


def best_kept(gram: Tensor, num_experts: int, k: int, mass: Tensor | None = None, groups: int = 1) -> tuple[int, ...]:
    """Return the k experts to keep, ascending, of all sets that no exchange of two experts betters.

    Starts with `drop_order`, then exchanges the two whose exchange gains most while one gains; k is 0 to n. groups: of
    so many groups of consecutive experts equally many are kept; k is a multiple of it.
    """
    n, gram, mass = num_experts, gram.double(), _mass_or_zeros(mass, num_experts)
    order, _ = drop_order(gram, n, mass, k, groups)
    is_dropped = torch.zeros(n, dtype=torch.bool)
    is_dropped[order] = True
    group = torch.arange(n) // (n // groups)
    rounding = 1e-9 * float(gram.diagonal().sum())
    diagonal = gram.diagonal()[:n]
    while 0 < k < n:
        lost = torch.cat([is_dropped, is_dropped.new_ones(len(gram) - n)]).to(gram)
        with_lost = gram[:n] @ lost
        by_dropping, by_keeping = diagonal + 2 * with_lost, diagonal - 2 * with_lost
        kept, dropped = ((is_dropped == each).nonzero().flatten() for each in (False, True))
        pairs = gram[kept][:, dropped]  # one of the rows to drop, and one of the columns to keep
        added = by_dropping[kept, None] + by_keeping[dropped] - 2 * pairs
        added[group[kept, None] != group[dropped]] = torch.inf
        left = 1 - mass[is_dropped].sum()
        total = lost @ gram @ lost
        after = _divided(total + added, left - mass[kept, None] + mass[dropped])
        row, column = divmod(int(after.argmin()), len(dropped))
        if not after[row, column] < _divided(total - rounding, left):
            break
        is_dropped[kept[row]], is_dropped[dropped[column]] = True, False
    return tuple((~is_dropped).nonzero().flatten().tolist())


def _mass_or_zeros(mass: Tensor | None, num_experts: int) -> Tensor:
    return torch.zeros(num_experts, dtype=torch.float64) if mass is None else mass.double()


def _divided(lost: Tensor, left: Tensor) -> Tensor:
    """Return what is lost, divided by the square of the mass that is left."""
    return lost / left.clamp_min(1e-12).square()
