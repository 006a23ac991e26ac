"""One walk through a model, from MoE layer to MoE layer, with all calibration data at once.

Each batch runs through the full and through the pruned model once. A forward pass has a thread of its own, which
waits at each planned layer until that layer is pruned, and then goes on; only one of them runs at a time. So any
`nn.Module` can be stopped in its middle, and data reaches the last layer without running from the inputs again for
each of them. Beyond HELD bytes, passes are not kept waiting but start anew for each layer, and what layers take lies
in files; where a model says in which sequence its layers run, they start in the one that they were in. They start anew,
too, where one cannot run while another waits, as with a lock around the forward pass.

Behind pruned layers, the layer of that sequence around an MoE layer runs once more in both models, with zeros in place
of what that gives: so it is seen what the stream that it adds to lacks in the pruned one.

Axes: b inputs, m tokens, o width of the output.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
import math
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from moeprune.calibration.passes import Pass, Sequence, StandIn, Start, gated, to_file
from moeprune.calibration.statistics import LayerMoments, MomentsAccumulator, gram_of
from moeprune.calibration.sums import Contributions, Halves, halves, lost_gram, wide_dtype
from moeprune.data.datasets import Dataset
from moeprune.errors import MoepruneError
from moeprune.layers.layer import MoELayer
from moeprune.layers.observation import Observation
from moeprune.models.model import Model
from moeprune.models.runtime import Runtime, trim_memory

logger = logging.getLogger(__name__)
WAITING, FEWEST_WAITING = 64, 8  # passes of a model that wait at once, at most: each has a thread
HELD = 4 << 30  # bytes that waiting passes may hold, by estimate
NOT_ADDED = 0.1, 0.01  # relative error from which on an output is not added to the stream: in 16 bits, in more
LIVE_TENSORS = 3  # of the size of a layer's input, that a waiting pass is taken to hold


class Halt(NamedTuple):
    """A batch at a layer.

    taken: what the layer takes in the pruned model: its arguments. expected: what it gives in the full model (b,m,o);
    padded tokens are zero. beside: what the stream that the output is added to lacks in the pruned model (b,m,o); None:
    nothing, or there is no such stream.
    """

    taken: tuple[tuple[Any, ...], dict[str, Any]]
    expected: Tensor
    beside: Tensor | None


class Gap(NamedTuple):
    """What the output of a layer lacks to the full model's (b,m,o), and what the stream beside it lacks."""

    own: Tensor
    beside: Tensor | None

    @property
    def whole(self) -> Tensor:
        """What the stream lacks behind the layer."""
        return self.own if self.beside is None else self.own + self.beside


class Stage:
    """One dense layer, and what all batches bring to it; it can be observed again and again."""

    def __init__(self, name: str, layer: MoELayer, runtime: Runtime, halts: list[Halt], lacks: bool):
        self.name, self.layer, self.runtime, self.halts = name, layer, runtime, halts
        self.lacks = lacks  # what reaches the layer may differ from what reaches it in the full model
        self._grams: dict[str, Tensor] = {}
        self.shared: dict[Any, Any] = {}  # what fits of several candidates have in common

    @cached_property
    def moments(self) -> LayerMoments:
        """The moments of the layer."""
        moments = MomentsAccumulator(self.layer)
        for _, seen, _ in self.observe():
            moments.add(seen)
        return moments.result()

    @cached_property
    def power(self) -> float:
        """The square of the full model's output at this layer, summed over all inputs; above 0."""
        wide = wide_dtype(self.layer.fc2_weight.device)
        return max(sum(float(halt.expected.square().sum(dtype=wide)) for halt in self.halts), 1e-30)

    @cached_property
    def contributions(self) -> Halves:
        """The sums for choosing among the experts, of either half of the inputs."""
        sums = tuple(Contributions(self.layer, self.moments.term_mean) for _ in range(2))
        for members, seen, gap in self.observe():
            whole = gap.whole if self.lacks else None
            for half, index in zip(sums, members, strict=True):
                half.add(seen.select(index), whole[index] if whole is not None else None)
        trim_memory()
        return sums[0], sums[1]

    def overlap(self) -> Tensor:
        """Return CᵀC (n·p,n·p) of the weights of all terms, summed over all inputs."""
        wide = wide_dtype(self.layer.fc2_weight.device)
        weights = (seen.weights.to(wide).flatten(2).flatten(0, 1) for _, seen, _ in self.observe())
        return functools.reduce(torch.add, (rows.mT @ rows for rows in weights))

    def choose_by(self, compensations: Iterable[str]) -> None:
        """Compute what `gram` returns for these compensations, and free what it is made of."""
        for compensation in compensations:
            self.gram(compensation)
        vars(self).pop("contributions", None)

    def gram(self, compensation: str) -> Tensor:
        """Return the Gram matrix of what is lost of each expert's contribution; without compensation (n,n)."""
        kind = gram_of(compensation)
        if kind not in self._grams:
            self._grams[kind] = self._gram(kind)
        return self._grams[kind]

    def _gram(self, kind: str) -> Tensor:
        if kind not in ("none", "renorm"):
            return lost_gram(*self.contributions, kind)
        dtype = wide_dtype(self.layer.fc2_weight.device)
        grams = (
            seen.gram(dtype) + (seen.renorm_gram(dtype) if kind == "renorm" else 0) for _, seen, _ in self.observe()
        )
        return functools.reduce(torch.add, grams).cpu()

    @property
    def has_stream(self) -> bool:
        """True if it is known what pruned layers before this one broke in the stream that it adds to."""
        return all(halt.beside is not None for halt in self.halts)

    def observe(self, layer: MoELayer | None = None) -> Iterator[tuple[list[Tensor], Observation, Gap]]:
        """Yield for each batch the places of its inputs in either half, what the layer shows on it, and what lacks.

        layer: one to observe in place of the dense one.
        """
        layer, count = layer or self.layer, 0
        device = layer.fc2_weight.device
        for halt in self.halts:
            (arguments, named), expected, beside = tree_map_only(Tensor, lambda each: each.to(device), halt)
            seen, _ = observed(layer, self.runtime, arguments, named)
            inputs = len(seen.mass)
            members = [half.to(expected.device) for half in halves(count, inputs)]
            count += inputs
            gap = expected.float() - seen.output.float()
            gap = gap.reshape(inputs, -1, gap.shape[-1])  # the tokens of all windows
            yield members, seen, Gap(gap, None if beside is None else beside.view_as(gap))


def observed(
    layer: MoELayer, runtime: Runtime, arguments: tuple[Any, ...], named: dict[str, Any]
) -> tuple[Observation, Any]:
    """Run a layer and return what it shows, and what it returns."""
    seen: list[Observation] = []
    layer.observer = seen.append
    try:
        with runtime.precision(layer.load().fc2_weight.device):
            output = layer(*arguments, **named)
    finally:
        layer.observer = None
    return seen[0], output


class Walk:
    """Walks all batches from layer to layer; close it at the end, as a context manager does.

    full, pruned: private copies of one model on the runtime's device; `pruned` gets its pruned layers on the way. None:
    all layers are seen as they are in the full model.
    """

    def __init__(self, full: Model, pruned: Model | None, data: Dataset, runtime: Runtime):
        self.full, self.pruned, self.data, self.runtime = full, pruned, data, runtime
        self.gates = contextlib.ExitStack()
        self.of_full: dict[int, Pass] = {}  # that wait, by batch
        self.of_pruned: dict[int, Pass] = {}
        self.labels: dict[int, Tensor | None] = {}
        self.counts: dict[int, int] = {}  # inputs of each batch
        self.held = 0
        self.lets_wait = True
        self.waiting: list[Pass] = []  # of the batch at hand
        self.files = contextlib.ExitStack()
        self.starts: dict[tuple[bool, int], Start] = {}  # of passes that begin behind the inputs; True: of `pruned`
        self.next_starts: dict[tuple[bool, int], Start] = {}
        self.sequences = [Sequence(model) for model in (full, pruned) if model is not None and model.sequence]
        self.factors: dict[str, float | None] = {}  # of what each layer adds to the stream; None: it adds nothing

    def __enter__(self) -> Walk:
        return self

    def __exit__(self, *_: object) -> None:
        self._end_waiting()
        self.gates.close()
        for sequence in self.sequences:
            sequence.close()
        self.files.close()

    @property
    def is_behind_pruned(self) -> bool:
        """True once a layer is pruned: before that both models are the same."""
        return self.pruned is not None and bool(self.pruned.plan)

    @property
    def _can_start(self) -> bool:
        return all(sequence.can_start for sequence in self.sequences)

    def _end_waiting(self, running: Pass | None = None) -> None:
        """End all passes that wait; running: one that does not."""
        for waiting in (*self.of_full.values(), *self.of_pruned.values(), *self.waiting):
            if waiting is not running:
                waiting.close()
        self.of_full, self.of_pruned, self.waiting = {}, {}, []

    def _run_to(self, name: str, running: Pass) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Let a pass run as far as a layer; if it waits for one of the others, end these."""
        stand_ins: list[StandIn] = [torch.zeros_like] if name in self.factors else [torch.zeros_like, drawn]
        running.go_to(name, stand_ins if self.factors.get(name, 1.0) is not None else [])
        while not running.has_arrived():
            if self.lets_wait and running.is_stuck():
                logger.info("a forward pass waits for another: passes start anew for each layer")
                self.lets_wait = False
                self._end_waiting(running)
        return running.arguments(name)

    def reach(
        self, name: str, see: Callable[[Observation, Tensor | None], None] | None = None, with_stream: bool = False
    ) -> Stage:
        """Return the next layer, in the order of the data flow, behind the pruned ones before it.

        see: takes what the layer shows of each batch in the full model, and its labels. with_stream: what the stream
        lacks is wanted, too.

        Raises a MoepruneError if a batch does not get there.
        """
        if not (with_stream and self.is_behind_pruned):
            self.factors[name] = None
        files, self.files = self.files, contextlib.ExitStack()
        self.starts, self.next_starts = self.next_starts, {}
        for model in filter(None, (self.full, self.pruned)):
            self.gates.enter_context(gated(model, name))
        all_wait = self.of_full and len(self.of_full) == math.ceil(self.data.samples / self.runtime.batch_size)
        batches: Iterable[Any] = [(None, None)] * len(self.of_full)
        if not all_wait or (self.is_behind_pruned and len(self.of_pruned) < len(self.of_full)):
            batches = self.runtime.batches(self.data, f"reach {name}")
        with files:
            halts = [self._reach(name, see, number, *batch) for number, batch in enumerate(batches)]
        trim_memory()
        return Stage(name, self.full.moe_layers[name].load(), self.runtime, halts, self.is_behind_pruned)

    def _reach(
        self,
        name: str,
        see: Callable[[Observation, Tensor | None], None] | None,
        number: int,
        inputs: Tensor | None,
        labels: Tensor | None,
    ) -> Halt:
        labels = self.labels.setdefault(number, labels)
        with contextlib.ExitStack() as ended:  # passes that do not wait in the end, also where one of them fails
            passes = [self.of_full.get(number) or self._start(self.full, number, inputs)]
            ended.callback(passes[0].close)
            taken = self._run_to(name, passes[0])
            seen, passes[0].output = observed(self.full.moe_layers[name], self.runtime, *taken)
            expected, beside = seen.output, None
            if name not in self.factors:
                is_stream = bool(passes[0].beside) and passes[0].beside[0].shape == expected.shape
                self.factors[name] = factor_of_stream(*passes[0].beside) if is_stream else None
            count = self.counts.setdefault(number, 0 if inputs is None else len(inputs))
            if len(seen.mass) != count:
                raise MoepruneError(f"layer `{name}` sees {len(seen.mass)} inputs where the model has {count}")
            if see is not None:
                see(seen, labels)
            if self.is_behind_pruned and self.pruned is not None:
                if not self.lets_wait:
                    passes[0].close()
                self.waiting = [passes[0]]
                passes.append(self.of_pruned.get(number) or self._start(self.pruned, number, inputs))
                ended.callback(passes[1].close)
                taken = self._run_to(name, passes[1])
                beside = self._lacking_beside(name, passes)
            trim_memory()
            if number not in self.of_full:
                tensors = [each for each in tree_leaves([inputs, taken]) if isinstance(each, Tensor)]
                size = sum(2 * LIVE_TENSORS * tensor.nbytes for tensor in tensors)
                if not self.lets_wait or self.held + size > HELD or len(self.of_full) >= most_waiting(expected.device):
                    self._keep_starts(name, number, passes)
                    return Halt(*tree_map_only(Tensor, self._filed, (taken, expected, beside)))
                self.held += size
            entered = passes[0].entered
            if self.pruned is not None and not self.is_behind_pruned and entered is not None and self._can_start:
                self.next_starts[True, number] = Start(*entered)  # up to there both models are the same
            for waiting, each in zip((self.of_full, self.of_pruned), passes, strict=False):
                waiting[number] = each
            ended.pop_all()
        return Halt(taken, expected, beside)

    def _lacking_beside(self, name: str, passes: list[Pass]) -> Tensor | None:
        """Return what the pruned model lacks of the stream that a layer adds its output to, in parts of the output."""
        factor, streams = self.factors[name], [each.beside[0] for each in passes if each.beside]
        for each in passes:
            each.beside = []
        return None if factor is None else (streams[0].float() - streams[1].float()).div_(factor)

    def _start(self, model: Model, number: int, inputs: Tensor | None) -> Pass:
        if inputs is None:  # its passes waited until one of them was stuck
            batches = self.runtime.batches(self.data, f"read batch {number} again")
            inputs = next(itertools.islice((each for each, _ in batches), number, None))
        start = self.starts.pop((model is self.pruned, number), None)
        return Pass(partial(self.runtime.forward, model, inputs), inputs.device, start)

    def _keep_starts(self, name: str, number: int, passes: list[Pass]) -> None:
        """Keep in files where the passes of a batch are, to begin there again; they have arrived at a layer."""
        if not self._can_start:
            return
        for is_pruned, each in enumerate(passes):
            if each.entered is not None:
                place, taken = each.entered
                output = None if is_pruned else self._filed(each.output)
                start = Start(place, self._filed(taken), None if is_pruned else name, output)
                self.next_starts[bool(is_pruned), number] = start
                if not self.is_behind_pruned:
                    self.next_starts[True, number] = start._replace(layer=None, output=None)

    def _filed(self, value: Tensor) -> Tensor:
        """Return a tensor in a file, on the CPU; the file is removed when a layer after the next one is reached."""
        return to_file(value, self.files)


def drawn(zeros: Tensor) -> Tensor:
    """Return noise (b,m,o), the same for all inputs, that is stronger for later tokens, as large as streams may be."""
    noise = torch.randn(zeros.shape[1:], generator=torch.Generator().manual_seed(0))
    return (noise * torch.linspace(8, 32, zeros.shape[-2])[:, None]).to(zeros).expand_as(zeros)


def factor_of_stream(without: Tensor, with_drawn: Tensor) -> float | None:
    """Return the factor by which an MoE layer's output is added to the stream; None if that is not what happens to it.

    without, with_drawn: what the layer around it gives where its output is zero, and where it is `drawn`.
    """
    without, with_drawn = without[:1], with_drawn[:1]
    added, noise = (with_drawn - without).float(), drawn(without).float()
    factor = float((added * noise).sum() / noise.square().sum())
    error = float((added - factor * noise).norm())
    return factor if error < NOT_ADDED[without.dtype.itemsize > 2] * abs(factor) * float(noise.norm()) else None


def most_waiting(device: torch.device) -> int:
    """Return how many passes of a model wait at once: on the CPU each has threads of its own for its products."""
    return WAITING if device.type != "cpu" else max(FEWEST_WAITING, WAITING // max(1, torch.get_num_threads() // 8))
