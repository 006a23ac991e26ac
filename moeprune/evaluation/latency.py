"""Latency of models: a warm-up, then interleaved repetitions of all models on the same inputs."""

import itertools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from moeprune.data.datasets import Dataset
from moeprune.evaluation.results import BatchLatency, Latency
from moeprune.models.model import Model, private_copy
from moeprune.models.runtime import Runtime

WARM_UP_CALLS, WARM_UP_SECONDS = 2, 0.2  # warm-up ends after this many calls of each function and this many seconds
MIN_REPETITIONS, MAX_REPETITIONS, MEASURED_SECONDS = 7, 200, 2.0
"""Repetitions end after this many seconds in all calls, within these bounds."""
READY_BATCHES, READY_INPUTS = 8, 256
"""Upper bounds of the batches, and of their inputs, kept on the device; at least two batches are."""


def measure_latency(
    model: Model, data: Dataset, baseline: Model | None, batch_sizes: Sequence[int], runtime: Runtime
) -> Latency:
    """Measure the seconds of a forward pass, alone and against a baseline on the same inputs.

    Each repetition uses another batch of the data, already on the device, as a routed model chooses different experts
    for different inputs. The batch size of the runtime is ignored.
    """
    device = runtime.torch_device
    models = {"model": model} if baseline is None else {"model": model, "baseline": baseline}
    functions = {name: partial(runtime.forward, private_copy(module).to(device)) for name, module in models.items()}
    batches = []
    for batch_size in runtime.bar("latency", "batch sizes", batch_sizes):
        seconds = interleaved(functions, ready_batches(data, batch_size, device))
        batches.append(summarize_latency(batch_size, seconds["model"], seconds.get("baseline")))
    return Latency(threads=torch.get_num_threads(), batches=batches)


def ready_batches(data: Dataset, batch_size: int, device: torch.device) -> list[Tensor]:
    """Return the first samples of the data, repeated if there are too few, as batches on the device."""
    count = max(2, min(READY_BATCHES, READY_INPUTS // batch_size))
    batches = [inputs for inputs, _ in itertools.islice(data.batches(batch_size), count)]
    if data.samples < count * batch_size:
        samples = torch.cat(batches)
        places = torch.arange(count * batch_size) % len(samples)
        batches = [samples[part] for part in places.split(batch_size)]
    return [inputs.to(device) for inputs in batches]


def interleaved(
    functions: Mapping[str, Callable[[Tensor], object]],
    inputs: Sequence[Tensor],
    seconds_of: Callable[[Callable[[], object]], float] | None = None,
) -> dict[str, list[float]]:
    """Return the seconds of each function in each repetition, after a warm-up of all functions.

    A repetition calls every function once on the same input; the next one uses the next input (cyclically) and the
    opposite order. Drift (clock rates, other programs) affects all functions alike, so ratios within a repetition vary
    less than seconds. All inputs are on one device. seconds_of: times a call; None: seconds_of_call.
    """
    seconds_of = seconds_of or partial(seconds_of_call, device=inputs[0].device)
    warm_at = time.perf_counter() + WARM_UP_SECONDS
    for index in itertools.count():
        if index >= WARM_UP_CALLS and time.perf_counter() >= warm_at:
            break
        for function in functions.values():
            seconds_of(partial(function, inputs[index % len(inputs)]))
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    order = list(functions)
    for repetition in range(MAX_REPETITIONS):
        if repetition >= MIN_REPETITIONS and sum(map(sum, seconds.values())) >= MEASURED_SECONDS:
            break
        for name in order:
            seconds[name].append(seconds_of(partial(functions[name], inputs[repetition % len(inputs)])))
        order.reverse()
    return seconds


def seconds_of_call(call: Callable[[], object], device: torch.device) -> float:
    """Return the seconds from a call to the end of its work on the device.

    On CUDA, two events enclose the work, so that the return of the host from waiting is not counted. The device is idle
    before each call: otherwise the kernels of this call would be launched while those of the last one run, and a model
    bound by launches would look as fast as its kernels alone.
    """
    if device.type == "cuda":
        stream = torch.cuda.current_stream(device)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        start.record(stream)
        call()
        end.record(stream)
        end.synchronize()
        return start.elapsed_time(end) / 1000  # milliseconds
    synchronize = torch.mps.synchronize if device.type == "mps" else lambda: None
    synchronize()
    begin = time.perf_counter()
    call()
    synchronize()
    return time.perf_counter() - begin


def summarize_latency(batch_size: int, model: Sequence[float], baseline: Sequence[float] | None = None) -> BatchLatency:
    """Summarize the seconds of each repetition (at least two) of a model and a baseline."""
    speedups = None if baseline is None else [b / m for m, b in zip(model, baseline, strict=True)]
    figures: dict[str, Any] = {}
    for name, values in (("speedup", speedups), ("model_seconds", model), ("baseline_seconds", baseline)):
        quartiles = [None] * 3 if values is None else statistics.quantiles(values, n=4, method="inclusive")
        figures[name], figures[f"{name}_iqr"] = quartiles[1], values and tuple(quartiles[::2])
    return BatchLatency(batch_size=batch_size, repetitions=len(model), speedups=speedups, **figures)
