"""Matrices in few bits: FP8 with a scale for each block, as DeepSeek-V3, Qwen3 and MiniMax-M2 are published, and MXFP4,
as gpt-oss is. Each tensor is read and written by itself; all others are left as they are.

FP8: `NAME` and the scales `NAME_scale_inv`, by which its blocks of `weight_block_size` are multiplied. MXFP4:
`NAME_blocks` (n,out,in/32,16), of two values a byte, the first in the lower half, and `NAME_scales` (n,out,in/32), the
exponents of two of 32 values, plus 127; what they stand for is (n,in,out).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from moeprune.errors import MoepruneError
from moeprune.files.header import Header, unreadable
from moeprune.models.folders.layout import CONFIG, ModelFolder
from moeprune.plan import Plan

SCALE, BLOCKS, SCALES = "_scale_inv", "_blocks", "_scales"
"""What the names of scales, and of both parts of MXFP4, have behind that of the weight."""
LARGEST = 448.0  # of float8_e4m3fn
FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


class Quantisation(NamedTuple):
    """How a folder's weights are quantised; block: rows and columns that share a scale of FP8, None for all."""

    method: str
    block: tuple[int, int] | None = None
    has_powers_of_two: bool = False  # as scales

    def __str__(self) -> str:
        size = "" if self.block is None else f" in blocks of {self.block[0]} × {self.block[1]}"
        return "MXFP4" if self.method == "mxfp4" else f"FP8{size}"


def quantisation_of(folder: ModelFolder) -> Quantisation | None:
    """Return how the weights of a folder are quantised, None if they are not.

    Raises a MoepruneError for a way that cannot be read.
    """
    settings = folder.config.get("quantization_config") or folder.language.get("quantization_config")
    if not settings:
        return None
    method = settings.get("quant_method") if isinstance(settings, dict) else settings
    if method == "mxfp4":
        return Quantisation("mxfp4")
    block: Any = settings.get("weight_block_size") if method == "fp8" else ()
    is_pair = isinstance(block, list) and len(block) == 2 and all(type(size) is int and size > 0 for size in block)
    if method != "fp8" or not (block is None or is_pair):
        found = f"by `{method}`" + (f" in blocks of {block}" if method == "fp8" else "")
        hint = "dequantise them first; `--signal random` and `--plan` with compensation `renorm` need no model"
        message = f"`{folder.path / CONFIG}`: weights are quantised {found}, which calibration cannot read"
        raise MoepruneError(message, f"known are `fp8` with a pair in `weight_block_size`, and `mxfp4`; {hint}")
    return Quantisation("fp8", None if block is None else (block[0], block[1]), settings.get("scale_fmt") == "ue8m0")


def changes_weights(plan: Plan) -> bool:
    """Return True if a plan changes weights of experts, and does not only drop experts."""
    return any(layer.changes_experts for layer in plan.values())


def require_form(folder: ModelFolder, plan: Plan) -> None:
    """Raise a MoepruneError if weights that a plan changes cannot have the form of those in the folder."""
    how = quantisation_of(folder)
    if how is None or not changes_weights(plan):
        return
    if how.method == "mxfp4":
        message = f"`{folder.path}` has weights in MXFP4: rounding refitted ones to it would lose what the fit gains"
        raise MoepruneError(message, "give `--keep` with `--compensate renorm`, which copies weights as they are")
    width, size = next(iter(plan.values())).width, 1 if how.block is None else math.lcm(*how.block)
    if width is not None and width % size:
        message = f"`--width` leaves {width} hidden units, the weights are in {how}"
        raise MoepruneError(message, f"give a multiple of {size}")


class Stored:
    """A tensor of a folder, read when it is indexed, as those of safetensors are; `parts`: headers and names."""

    def __init__(self, parts: list[tuple[Header, str]], how: Quantisation | None):
        self.parts, self.how = parts, how

    def __getitem__(self, index: Any) -> Tensor:
        tensors = [_read(header, name) for header, name in self.parts]
        if len(tensors) == 1 or self.how is None:
            found = tensors[0]
        elif self.how.method == "mxfp4":
            found = from_mxfp4(tensors[0], tensors[1])
        else:
            found = from_fp8(tensors[0], tensors[1], self.how.block, self.parts[0][1])
        return found[index]


def stored_tensors(folder: ModelFolder, how: Quantisation | None) -> dict[str, Stored]:
    """Return the tensors of a folder by name, as they are without quantisation: of both its parts as one.

    Raises a MoepruneError if a part is missing.
    """
    places = {name: (header, name) for header in folder.headers() for name in header.tensors}
    found: dict[str, Stored] = {}
    for name, place in places.items():
        dtype = place[0].tensors[name].dtype
        if how is not None and how.method == "mxfp4" and name.endswith(BLOCKS):
            whole = name.removesuffix(BLOCKS)
            found[whole] = Stored([place, _other(folder, places, whole + SCALES, name)], how)
        elif how is not None and how.method == "fp8" and dtype == "torch.float8_e4m3fn":
            found[name] = Stored([place, _other(folder, places, name + SCALE, name)], how)
        elif how is None or not _is_part(name, how, places):
            found[name] = Stored([place], None)
    return found


def _other(folder: ModelFolder, places: Mapping[str, tuple[Header, str]], name: str, of: str) -> tuple[Header, str]:
    if name not in places:
        raise MoepruneError(f"`{folder.path}` lacks `{name}`, the scales of `{of}`", "fetch all of its shards again")
    return places[name]


def _is_part(name: str, how: Quantisation, places: Mapping[str, Any]) -> bool:
    """Return True for scales."""
    if how.method == "mxfp4":
        return name.endswith(SCALES) and name.removesuffix(SCALES) + BLOCKS in places
    return name.endswith((SCALE, ".activation_scale", ".input_scale"))


def _read(header: Header, name: str) -> Tensor:
    """Read a tensor of a file, into memory of its own."""
    info = header.tensors[name]
    try:
        values = np.fromfile(header.path, np.uint8, info.nbytes, offset=header.offsets[name])
    except OSError as error:
        raise unreadable(header.path, error) from None
    if len(values) != info.nbytes:
        raise unreadable(header.path, OSError("the file became shorter while it was read"))
    return torch.from_numpy(values).view(getattr(torch, info.dtype.removeprefix("torch."))).view(info.shape)


def from_fp8(weight: Tensor, scales: Tensor, block: tuple[int, int] | None, name: str = "weight") -> Tensor:
    """Return in float32 what FP8 (…,r,c) stands for, with a scale for each block, or one for all.

    name: for errors. Raises a MoepruneError if the scales do not fit.
    """
    wide = scales.float()
    if block is None:
        grid = (*weight.shape[:-2], 1, 1) if scales.numel() > 1 else tuple(scales.shape)
    else:
        grid = _grid(weight.shape, block)
    if grid != tuple(scales.shape) or weight.ndim < 2:
        message = f"`{name}` of shape {list(weight.shape)} has scales of shape {list(scales.shape)}"
        raise MoepruneError(
            message, f"with `weight_block_size` {block} they are of shape {list(grid)}: fetch both again"
        )
    if block is not None:
        wide = _spread(wide, block, weight.shape)
    return weight.float() * wide


def to_fp8(weight: Tensor, how: Quantisation, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return a matrix (…,r,c) in FP8, and the scales of its blocks in a type: the largest value becomes 448."""
    block = how.block or (weight.shape[-2], weight.shape[-1])
    grid = _grid(weight.shape, block)
    padding = grid[-1] * block[1] - weight.shape[-1], grid[-2] * block[0] - weight.shape[-2]
    padded = torch.nn.functional.pad(weight.float(), (0, padding[0], 0, padding[1]))
    blocks = padded.unflatten(-1, (grid[-1], block[1])).unflatten(-3, (grid[-2], block[0]))
    scales = blocks.abs().amax((-3, -1)) / LARGEST
    scales = torch.where(scales > 0, scales, 1.0)
    if how.has_powers_of_two:
        scales = scales.log2().ceil().exp2()
    scales = scales.to(dtype)
    scaled = weight.float() / _spread(scales.float(), block, weight.shape)
    return scaled.clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn), scales


def _grid(shape: torch.Size, block: tuple[int, int]) -> tuple[int, ...]:
    """Return the shape of the scales of a matrix (…,r,c)."""
    return *shape[:-2], -(-shape[-2] // block[0]), -(-shape[-1] // block[1])


def _spread(scales: Tensor, block: tuple[int, int], shape: torch.Size) -> Tensor:
    """Return the scale of each element of a matrix (…,r,c)."""
    of_rows = scales.repeat_interleave(block[0], -2)[..., : shape[-2], :]
    return of_rows.repeat_interleave(block[1], -1)[..., : shape[-1]]


def from_mxfp4(blocks: Tensor, exponents: Tensor) -> Tensor:
    """Return in float32 what MXFP4 stands for: (n,out,g,16) and (n,out,g) to (n,g·32,out)."""
    table, (n, out, groups, _) = torch.tensor(FP4), blocks.shape
    found = torch.empty(n, groups * 32, out)
    for expert in range(n):  # in little memory
        low, high = table[(blocks[expert] & 15).int()], table[(blocks[expert] >> 4).int()]
        powers = exponents[expert].int()[..., None] - 127
        found[expert] = torch.ldexp(torch.stack([low, high], -1).flatten(-2), powers).flatten(-2).mT
    return found


def requantised(tensors: Iterator[tuple[str, str, Tensor]], folder: ModelFolder) -> Iterator[tuple[str, Tensor]]:
    """Yield changed tensors in the types that they have in a folder: those in FP8 with new scales.

    tensors: names in the full folder and in the pruned one, and values in full precision.
    """
    infos = {name: info for header in folder.headers() for name, info in header.tensors.items()}
    how = quantisation_of(folder)
    for old, new, tensor in tensors:
        dtype = getattr(torch, infos[old].dtype.removeprefix("torch."))
        if how is None or old + SCALE not in infos:
            yield new, tensor.to(dtype).contiguous()
            continue
        of_scales = getattr(torch, infos[old + SCALE].dtype.removeprefix("torch."))
        weight, scales = to_fp8(tensor, how, of_scales)
        yield new, weight.contiguous()
        is_single = how.block is None and scales.numel() == 1
        yield new + SCALE, scales.view(infos[old + SCALE].shape) if is_single else scales.contiguous()
