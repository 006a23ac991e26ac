"""Which experts one set for all inputs keeps, by the error that it leaves: pure functions on a Gram matrix.

With E_j the part of expert j's contribution that is lost with it, and G_jl = E <E_j, E_l>, the expected
squared error of the layer's output when the set Z is dropped is exactly the sum of G over Z×Z. The matrix
may have rows and columns behind those of the n experts: what is lost whatever is dropped.
"""

from __future__ import annotations

import torch
from torch import Tensor


def drop_order(gram: Tensor, num_experts: int) -> tuple[list[int], list[float]]:
    """Backward elimination: drop the expert that adds least error, again and again.

    Args:
        gram: G (r,r), whose first n rows are of the experts.
        num_experts: n.

    Returns:
        The experts in the order in which they are dropped (n), and the error with the first 0, 1, … n
        of them dropped (n + 1).
    """
    n = num_experts
    always = torch.ones(len(gram) - n, dtype=gram.dtype)
    added = gram.diagonal()[:n] + 2 * gram[:n, n:] @ always  # by dropping each expert now
    order: list[int] = []
    errors = [float(always @ gram[n:, n:] @ always)]
    for _ in range(n):
        j = int(added.argmin())
        order.append(j)
        errors.append(errors[-1] + float(added[j]))
        added = added + 2 * gram[:n, j]
        added[j] = torch.inf
    return order, errors


def best_kept(gram: Tensor, num_experts: int, k: int) -> tuple[int, ...]:
    """The k experts to keep, ascending, of all sets that no exchange of two experts betters.

    Starts with backward elimination, then exchanges the two whose exchange gains most while one gains.

    Args:
        gram: G (r,r), whose first n rows are of the experts.
        num_experts: n.
        k: 0 to n.
    """
    n = num_experts
    gram = gram.double()
    order, errors = drop_order(gram, n)
    is_dropped = torch.zeros(n, dtype=torch.bool)
    is_dropped[order[: n - k]] = True
    least = 1e-9 * max(abs(error) for error in errors)  # less is rounding
    diagonal = gram.diagonal()[:n]
    while 0 < k < n:
        lost = torch.cat([is_dropped, is_dropped.new_ones(len(gram) - n)]).to(gram)
        with_lost = gram[:n] @ lost
        by_dropping, by_keeping = diagonal + 2 * with_lost, diagonal - 2 * with_lost
        added = by_dropping[:, None] + by_keeping - 2 * gram[:n, :n]  # drop the row's, keep the column's
        added[is_dropped] = torch.inf
        added[:, ~is_dropped] = torch.inf
        dropped, kept = divmod(int(added.argmin()), n)
        if not added[dropped, kept] < -least:
            break
        is_dropped[dropped], is_dropped[kept] = True, False
    return tuple((~is_dropped).nonzero().flatten().tolist())
