"""Forward passes of a module of the user's own code, to find out what its MoE layers see."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from moeprune.errors import MoepruneError, user_code


def failure(module: nn.Module, factory: str | None, x: Tensor) -> str:
    """Return the beginning of an error of a forward pass."""
    builder = f" that `--model {factory}` builds" if factory else ""
    return f"the {type(module).__name__}{builder} fails on an input of shape {list(x.shape)}"


IGNORE = "`--ignore-layer {}` leaves it as it is"


class Seen(NamedTuple):
    """Inputs of a layer in a forward pass, each of them one row, and how many tokens each has."""

    rows: Tensor
    tokens: int
    call: Callable[[nn.Module], Any]  # calls another layer in the same way
    output: Tensor


def see(module: nn.Module, names: Iterable[str], x: Tensor, factory: str | None) -> tuple[dict[str, Seen], Tensor]:
    """Return what each layer sees of inputs, in the order in which the layers run, and the model's output."""
    seen: dict[str, Seen] = {}

    def note(name: str, _: nn.Module, given: tuple[Any, ...], named: dict[str, Any], output: Tensor) -> None:
        if name in seen:
            raise MoepruneError(f"layer `{name}` runs more than once for an input", IGNORE.format(name))
        taken = next((part for part in (*given, *named.values()) if isinstance(part, Tensor)), None)
        if taken is None or not isinstance(output, Tensor):
            raise MoepruneError(
                f"layer `{name}` gives a {type(output).__name__}, expected a tensor", IGNORE.format(name)
            )
        tokens = output[0].numel() // output.shape[1 if output.ndim == 4 else -1]
        seen[name] = Seen(taken.flatten(1), tokens, lambda layer: layer(*given, **named), output)

    with ExitStack() as hooks:
        for name in names:
            part = module.get_submodule(name)
            hooks.enter_context(part.register_forward_hook(functools.partial(note, name), with_kwargs=True))
        logits = run(module, x, factory)
    if idle := sorted(set(names) - set(seen)):
        raise MoepruneError(f"layers {', '.join(f'`{name}`' for name in idle)} do not run", IGNORE.format(idle[0]))
    return seen, logits


def windows_of(name: str, first: Seen, second: Seen, both: Seen) -> tuple[int, bool]:
    """Return how many inputs a layer has for each input of the model, and if those of several are interleaved.

    first, second, both: what it sees of one input, of another, and of both in a batch.
    """
    r = len(first.rows)
    shapes = {(len(first.rows), first.tokens), (len(second.rows), second.tokens), (len(both.rows) / 2, both.tokens)}
    if shapes == {(1, first.tokens)}:
        return 1, False
    if len(shapes) == 1:
        alone = torch.stack([first.rows, second.rows])
        orders = both.rows.unflatten(0, (2, r)), both.rows.unflatten(0, (r, 2)).transpose(0, 1)
        errors = [float((order - alone).abs().max()) for order in orders]
        rounding = math.sqrt(torch.finfo(alone.dtype).eps) * float(alone.abs().max())
        if min(errors) <= max(rounding, max(errors) / 20):
            return r, errors[1] < errors[0]
    raise MoepruneError(
        f"layer `{name}` sees {r} × {first.tokens} tokens of one input of the model and"
        f" {len(both.rows)} × {both.tokens} of two: it is not clear which belong to which input",
        f"let it see a batch of inputs, or of a fixed number of windows of each; {IGNORE.format(name)}",
    )


@torch.no_grad()
def require_equal(name: str, like: str, theirs: nn.Module, ours: nn.Module, seen: Seen) -> None:
    """Raise a MoepruneError if our layer does not compute what one of the user's with the same tensors does."""
    expected = seen.output
    scale = max(float(expected.abs().max()), torch.finfo(expected.dtype).tiny)
    try:
        difference = float((seen.call(ours) - expected).abs().max()) / scale
    except (TypeError, RuntimeError) as error:
        reason = f"{type(error).__name__}: {error}"
    else:
        if difference <= math.sqrt(torch.finfo(expected.dtype).eps) / 2:
            return
        reason = f"outputs differ by {difference:.1e} of the largest"
    raise MoepruneError(
        f"layer `{name}`, a {type(theirs).__qualname__}, has the tensors of {like} and computes something else"
        f" ({reason})",
        IGNORE.format(name),
    )


def materialize(module: nn.Module, input_shape: tuple[int, int, int], factory: str | None) -> None:
    """Run a module whose lazy layers have no tensors yet."""
    if any(map(is_lazy, (*module.parameters(), *module.buffers()))):
        run(module.eval(), torch.zeros(1, *input_shape), factory)


@torch.no_grad()
def run(module: nn.Module, x: Tensor, factory: str | None) -> Tensor:
    """Return the logits (b,classes) of inputs (b,c,H,W)."""
    with user_code(
        failure(module, factory, x), "if it is about shapes, check that of one input, channels × height × width"
    ):
        output = module(x)
    if not (isinstance(output, Tensor) and output.ndim == 2 and len(output) == len(x)):
        found = list(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise MoepruneError(
            f"the {type(module).__name__} gives {found} for {len(x)} input{'s' * (len(x) > 1)}, expected logits"
            f" [{len(x)}, classes]",
            "give a factory whose model returns its logits",
        )
    return output
