"""Device, precision, batch size and progress of running models; imports torch only to run one."""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import logging
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

from moeprune.errors import MoepruneError
from moeprune.plan import Positive
from moeprune.records import Request, option

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
    from tqdm import tqdm

    from moeprune.data.datasets import Batch, Dataset

logger = logging.getLogger(__name__)
MOST_LOGITS = 1 << 26  # of a forward pass whose outputs are compared
CHUNK, CHUNK_ON_CPU = 1 << 24, 1 << 20  # logits that are compared at once: on the CPU as many as its cache holds
T = TypeVar("T")

Dtype = Literal["float32", "fp32", "bfloat16", "bf16"]


class Runtime(Request, frozen=True):
    """Settings for running models over a data set.

    progress: show a progress bar on stderr when that is a terminal.
    """

    device: Annotated[str, option("cpu, cuda, cuda:N, mps, or auto: CUDA if available, else the CPU.")] = "auto"
    dtype: Annotated[Dtype, option("float32: the precision of the weights; bf16: autocast.")] = "float32"
    offload: Annotated[
        bool,
        option(
            "Keep the weights of a folder of transformers on disk, and read those of one layer at a time into memory;"
            " pruned layers go to the folder for temporary files (TMPDIR)."
        ),
    ] = False
    batch_size: Annotated[
        Positive, option("Inputs of a forward pass; with scope batch, also the batch that shares experts.")
    ] = 64
    progress: bool = False

    @property
    def torch_device(self) -> torch.device:
        """The device that `device` names, or a MoepruneError."""
        import torch

        found = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
        found += ["mps"] if torch.backends.mps.is_available() else []
        name = self.device if self.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
        if name.removesuffix(":0") not in [each.removesuffix(":0") for each in found]:
            raise MoepruneError(f"no device `{name}` here", f"found: {', '.join(found)}; or give `auto`")
        return torch.device(name)

    def updated(self, device: object = None, batch_size: int | None = None) -> Runtime:
        """Return a copy with those settings replaced that are given."""
        given = {"device": None if device is None else str(device), "batch_size": batch_size}
        return self.replace(**{name: value for name, value in given.items() if value is not None})

    def require_device(self) -> None:
        """Raise a MoepruneError if the device does not exist; log the settings."""
        logger.info(f"runs on {self.torch_device} in {self.dtype}, {self.batch_size} inputs at a time")

    def step(self, done: str) -> None:
        """Write a line on stderr where no progress bar is shown, as it is no terminal."""
        if self.progress and not sys.stderr.isatty():
            sys.stderr.write(f"{done}\n")
            sys.stderr.flush()

    def bar(self, what: str, unit: str, items: Sequence[T] | None = None, total: int | None = None) -> tqdm[T]:
        """Return a progress bar named `what`, over items or of so many steps."""
        from tqdm import tqdm

        return tqdm(items, what, total, unit=f" {unit}", leave=False, disable=None if self.progress else True)

    def batches(self, data: Dataset, what: str) -> Iterator[Batch]:
        """Yield the data once, in batches on the device, with a progress bar named `what`."""
        device, start = self.torch_device, time.perf_counter()
        with self.bar(what, "samples", total=data.samples) as bar:
            for inputs, labels in data.batches(self.batch_size):
                yield inputs.to(device, non_blocking=True), labels
                bar.update(len(inputs))
        seconds = time.perf_counter() - start
        logger.info(f"{what}: {data.samples} samples in {seconds:.2f} s, {data.samples / seconds:.0f} samples/s")

    def forward(self, model: nn.Module, inputs: Tensor) -> Tensor:
        """Return the output of a model, without gradients, in the precision of this runtime."""
        with self.precision(inputs.device):
            return model(inputs.to(input_dtype(model)) if inputs.is_floating_point() else inputs)

    @contextlib.contextmanager
    def precision(self, device: torch.device) -> Iterator[None]:
        """Run without gradients, in the precision of this runtime."""
        import torch

        is_narrow = self.dtype in ("bfloat16", "bf16")
        with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=is_narrow):
            yield


def fitting(inputs: Tensor, model: nn.Module) -> Sequence[Tensor]:
    """Return a batch in parts whose outputs fit into memory: token ids (b,s) of a model of a large vocabulary."""
    form: Any = getattr(model, "input_format", None)
    vocabulary = 0 if inputs.is_floating_point() else form.vocabulary
    return inputs.split(max(1, MOST_LOGITS // (inputs[0].numel() * vocabulary))) if vocabulary else [inputs]


def by_rows(compare: Callable[[Tensor, Tensor], Tensor], found: Tensor, expected: Tensor) -> Tensor:
    """Compare outputs (…,c) by a function of some of their rows (r,c) that gives (r) or (r,k); return (…) or (…,k)."""
    import torch

    rows = zip(*(each.flatten(0, -2).split(rows_at_once(found)) for each in (found, expected)), strict=True)
    return torch.cat([compare(*both) for both in rows]).unflatten(0, found.shape[:-1])


def rows_at_once(outputs: Tensor) -> int:
    """Return how many rows of outputs (…,c) are compared at once."""
    return max(1, (CHUNK_ON_CPU if outputs.device.type == "cpu" else CHUNK) // outputs.shape[-1])


def input_dtype(model: nn.Module) -> torch.dtype:
    """Return the type of a model's inputs: that of its first linear or convolution, or of its first floats."""
    import torch

    stems = torch.nn.Linear | torch.nn.modules.conv._ConvNd
    weights = itertools.chain((part.weight for part in model.modules() if isinstance(part, stems)), model.parameters())
    return next((weight.dtype for weight in weights if weight.is_floating_point()), torch.get_default_dtype())


def trim_memory() -> None:
    """Return what threads have freed to the system: glibc keeps it for each of them, a hundred megabytes and more."""
    with contextlib.suppress(AttributeError, OSError, TypeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)
