"""The routed layer on a GPU: Triton kernels that never synchronise with the host.

All shapes are known beforehand, so that a CUDA graph can hold a whole forward pass; which rows belong to
which expert is found on the device. Axes as in moeprune.layers.experts.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
TILE = 16384  # numbers that a program holds at once where it may choose


def unit(x: Tensor, dim: int, gain: Tensor | None, factor: Tensor | None) -> Tensor:
    """Scale vectors along dim, -1 of (...,d) or 0 of (d,v), to unit length, times gain (d) and factor (1)."""
    unit = torch.empty_like(x, memory_format=torch.contiguous_format)
    x = x.contiguous()
    length = x.shape[dim]
    vectors = x.numel() // length
    strides = (length, 1) if dim == -1 else (1, vectors)
    padded = triton.next_power_of_2(length)
    at_once = 1 if dim == -1 else max(1, min(16, TILE // padded))
    _unit[(triton.cdiv(vectors, at_once),)](
        x, gain, factor, unit, vectors, length, *strides,
        WITH_GAIN=gain is not None, WITH_FACTOR=factor is not None,
        VECTORS=at_once, LENGTH=padded,
    )  # fmt: skip
    return unit


@triton.jit
def _unit(
    x, gain, factor, unit, vectors, length, vector_stride, element_stride,
    WITH_GAIN: tl.constexpr, WITH_FACTOR: tl.constexpr, VECTORS: tl.constexpr, LENGTH: tl.constexpr,
):  # fmt: skip
    vector = tl.program_id(0).to(tl.int64) * VECTORS + tl.arange(0, VECTORS)
    element = tl.arange(0, LENGTH)
    mask = (vector < vectors)[:, None] & (element < length)[None, :]
    at = vector[:, None] * vector_stride + element[None, :] * element_stride
    values = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    norm = tl.sqrt(tl.sum(values * values, 1))
    values = values / tl.where(norm > 1e-12, norm, 1e-12)[:, None]
    if WITH_GAIN:
        values *= tl.load(gain + element, mask=element < length, other=0.0).to(tl.float32)[None, :]
    if WITH_FACTOR:
        values *= tl.load(factor).to(tl.float32)
    tl.store(unit + at, values.to(unit.dtype.element_ty), mask=mask)


def choose(scores: Tensor, k: int) -> Tensor:
    """Return the k best experts of each input, ascending (b,k), in one kernel."""
    b, n = scores.shape
    chosen = torch.empty(b, k, dtype=torch.int64, device=scores.device)
    padded = max(16, triton.next_power_of_2(n))
    _choose[(b,)](scores, chosen, n, k, *scores.stride(), N=padded)
    return chosen


@triton.jit
def _choose(scores, chosen, n, k, input_stride, expert_stride, N: tl.constexpr):
    own = scores + tl.program_id(0).to(tl.int64) * input_stride
    expert = tl.arange(0, N)
    score = tl.load(own + expert * expert_stride, mask=expert < n, other=-float("inf"))
    better = tl.zeros((N,), tl.int32)
    for first in range(0, n, 16):
        rival = first + tl.arange(0, 16)
        other = tl.load(own + rival * expert_stride, mask=rival < n, other=-float("inf"))
        wins = (other[None, :] > score[:, None]) | (
            (other[None, :] == score[:, None]) & (rival[None, :] < expert[:, None])
        )
        better += tl.sum(wins.to(tl.int32), 1)
    is_chosen = (better < k) & (expert < n)
    place = tl.cumsum(is_chosen.to(tl.int32), 0) - 1
    out = chosen + tl.program_id(0).to(tl.int64) * k + place
    tl.store(out, expert.to(tl.int64), mask=is_chosen & (place < k))


def slot_weights(
    router_logits: Tensor, chosen: Tensor, combine_source: Tensor | None, combine_dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """Return Dᵀ (b,s,m) of the chosen experts' slots (b,k), and their columns (b,m,s) of combine_source.

    router_logits and combine_source (None where it is not needed) are (b,m,n,p). Dᵀ has the type of the
    logits, the columns have combine_dtype.
    """
    b, m, n, p = router_logits.shape
    slots = chosen.shape[1] * p
    dispatch = router_logits.new_empty(b, slots, m)
    combine = None
    if combine_source is not None:
        combine = combine_source.new_empty(b, m, slots, dtype=combine_dtype)
    padded = triton.next_power_of_2(m)
    at_once = max(1, min(8, TILE // padded))
    _slot_weights[(b, triton.cdiv(slots, at_once))](
        router_logits, chosen, combine_source, dispatch, combine, m, n * p, p, slots, *chosen.stride(),
        M=padded, SLOTS=at_once, WITH_COMBINE=combine is not None,
    )  # fmt: skip
    return dispatch, combine


@triton.jit
def _slot_weights(
    router_logits, chosen, combine_source, dispatch, combine, m, columns, p, slots,
    input_stride, expert_stride, M: tl.constexpr, SLOTS: tl.constexpr, WITH_COMBINE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    slot = tl.program_id(1) * SLOTS + tl.arange(0, SLOTS)
    is_slot = slot < slots
    expert = tl.load(chosen + row * input_stride + (slot // p) * expert_stride, mask=is_slot, other=0)
    token = tl.arange(0, M)
    mask = (token < m)[:, None] & is_slot[None, :]
    at = (row * m + token[:, None]) * columns + (expert * p + slot % p)[None, :]
    logits = tl.load(router_logits + at, mask=mask, other=-float("inf")).to(tl.float32)
    logits = tl.where(is_slot[None, :], logits, 0.0)  # else -inf - -inf
    powers = tl.exp(logits - tl.max(logits, 0)[None, :])
    weights = powers / tl.sum(powers, 0)[None, :]
    dispatch_at = dispatch + (row * slots + slot[None, :]) * m + token[:, None]
    tl.store(dispatch_at, weights.to(dispatch.dtype.element_ty), mask=mask)
    if WITH_COMBINE:
        values = tl.load(combine_source + at, mask=mask, other=0.0)
        combine_at = combine + (row * m + token[:, None]) * slots + slot[None, :]
        tl.store(combine_at, values.to(combine.dtype.element_ty), mask=mask)


def group_by_expert(chosen: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """Return for each expert the pairs i·k + j with chosen[i,j] the expert (n,b), and their number (n)."""
    b, k = chosen.shape
    pairs = torch.empty(num_experts, b, dtype=torch.int32, device=chosen.device)
    counts = torch.empty(num_experts, dtype=torch.int32, device=chosen.device)
    chosen = chosen.contiguous()
    at_once = min(1024, max(16, triton.next_power_of_2(b * k)))
    _group_by_expert[(num_experts,)](chosen, pairs, counts, b, b * k, AT_ONCE=at_once)
    return pairs, counts


@triton.jit
def _group_by_expert(chosen, pairs, counts, b, num_pairs, AT_ONCE: tl.constexpr):
    expert = tl.program_id(0)
    found = 0
    for first in range(0, num_pairs, AT_ONCE):
        pair = first + tl.arange(0, AT_ONCE)
        is_own = tl.load(chosen + pair, mask=pair < num_pairs, other=-1) == expert
        place = found + tl.cumsum(is_own.to(tl.int32), 0) - 1
        tl.store(pairs + expert.to(tl.int64) * b + place, pair, mask=is_own)
        found += tl.sum(is_own.to(tl.int32), 0)
    tl.store(counts + expert, found)


def grouped_linear(
    rows: Tensor, pairs: Tensor, counts: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool = False
) -> Tensor:
    """Multiply each row by its expert's matrix and add its bias: rows (b·k,p,in) to (b·k,p,out).

    The rows of pair i·k + j belong to expert chosen[i,j]; pairs (n,b) and counts (n) are from
    `group_by_expert`; weight (n,in,out), of any strides, is converted to the rows' type while it is read, for
    experts with rows only; bias (n,out) or None. Products are summed in float32. gelu: applied to the result.
    """
    num_pairs, p, num_in = rows.shape
    n, _, num_out = weight.shape
    block_rows, block_out, block_in, warps, stages = _blocks(num_pairs * p / min(n, num_pairs), rows.dtype)
    outputs = rows.new_empty(num_pairs, p, num_out)
    most_tiles = num_pairs * p // block_rows + min(n, num_pairs)
    _grouped_linear[(triton.cdiv(num_out, block_out), max(most_tiles, 1))](
        rows, pairs, counts, weight, bias, outputs, n, pairs.shape[1], p, num_in, num_out, *weight.stride(),
        N=triton.next_power_of_2(n), WITH_BIAS=bias is not None, GELU=gelu, PRECISION=_precision(),
        BLOCK_ROWS=block_rows, BLOCK_OUT=block_out, BLOCK_IN=block_in, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return outputs


def _blocks(rows_per_expert: float, dtype: torch.dtype) -> tuple[int, int, int, int, int]:
    """Return rows, outputs and inputs of a tile, its warps and stages, as measured on an H100."""
    if dtype == torch.float32:
        return (16, 64, 64, 4, 3) if rows_per_expert <= 48 else (32, 64, 32, 4, 3)
    if rows_per_expert <= 16:
        return 16, 64, 64, 4, 4
    if rows_per_expert <= 48:
        return 32, 64, 64, 4, 4
    return 64, 128, 64, 8, 4


def _precision() -> str:
    """Return how float32 is multiplied: three passes of tensor cores come close to it, one does not."""
    return "tf32x3" if torch.get_float32_matmul_precision() == "highest" else "tf32"


@triton.jit
def _grouped_linear(
    rows, pairs, counts, weight, bias, outputs, n, b, p, num_in, num_out,
    expert_stride, in_stride, out_stride,
    N: tl.constexpr, WITH_BIAS: tl.constexpr, GELU: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(1)
    experts = tl.arange(0, N)
    num_rows = tl.load(counts + experts, mask=experts < n, other=0) * p
    tiles = (num_rows + BLOCK_ROWS - 1) // BLOCK_ROWS
    tiles_so_far = tl.cumsum(tiles, 0)
    expert = tl.sum((tiles_so_far <= tile).to(tl.int32), 0)
    if expert >= n:
        return
    first_tile = tl.sum(tl.where(experts == expert, tiles_so_far - tiles, 0), 0)
    position = (tile - first_tile) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    is_row = position < tl.sum(tl.where(experts == expert, num_rows, 0), 0)
    pair = tl.load(pairs + expert.to(tl.int64) * b + position // p, mask=is_row, other=0)
    row = (pair.to(tl.int64) * p + position % p)[:, None]
    column = tl.program_id(0) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    is_column = column < num_out
    weight_at = weight + expert.to(tl.int64) * expert_stride + column[None, :] * out_stride
    total = tl.zeros((BLOCK_ROWS, BLOCK_OUT), tl.float32)
    for first in range(0, num_in, BLOCK_IN):
        inner = first + tl.arange(0, BLOCK_IN)
        is_inner = inner < num_in
        x = tl.load(rows + row * num_in + inner[None, :], mask=is_row[:, None] & is_inner[None, :], other=0.0)
        w = tl.load(weight_at + inner[:, None] * in_stride, mask=is_inner[:, None] & is_column[None, :], other=0.0)
        total = tl.dot(x, w.to(x.dtype), total, input_precision=PRECISION)
    if WITH_BIAS:
        total += tl.load(bias + expert * num_out + column, mask=is_column, other=0.0).to(tl.float32)[None, :]
    if GELU:
        total = 0.5 * total * (1.0 + tl.erf(total * 0.7071067811865476))
    tl.store(
        outputs + row * num_out + column[None, :],
        total.to(outputs.dtype.element_ty),
        mask=is_row[:, None] & is_column[None, :],
    )
