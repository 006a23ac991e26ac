"""A forward pass that stops in the middle of a model, and may begin there."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from moeprune.errors import MoepruneError, StopForward
from moeprune.files.disk import ScratchFolder
from moeprune.layers.layer import MoELayer
from moeprune.models.model import Model

STUCK_SECONDS = 1.0  # without any work, twice in a row, after which a pass is taken to wait for another
StandIn = Callable[[Tensor], Tensor]
"""Makes of zeros, shaped as an MoE layer's output, what is given in place of it."""
_running = threading.local()  # `current`: the Pass of this thread


class Start(NamedTuple):
    """Where a pass begins: in the model's sequence, at the place of a layer that takes a tensor.

    layer, output: an MoE layer whose output is known.
    """

    place: int
    taken: Tensor | None  # None: it has begun
    layer: str | None = None
    output: Any = None


@contextlib.contextmanager
def replaced_forward(layer: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Let a layer run another forward pass; then what it ran before, which may be set on the layer itself."""
    before = vars(layer).get("forward")
    layer.forward = forward
    try:
        yield
    finally:
        if before is None:
            del layer.forward
        else:
            layer.forward = before


class Sequence:
    """The layers of a model that run one after the other, made to be passed over by passes that begin behind them."""

    def __init__(self, model: Model):
        self.layers = [model.get_submodule(name) for name in model.sequence]
        moe_layers = model.moe_layers.items()
        self.first_moe = [
            next((name for name, part in moe_layers if part in parts), None)
            for parts in ({*layer.modules()} for layer in self.layers)
        ]
        self.can_start = True  # so far each has run behind the one before it, and given what that takes
        self.replaced = contextlib.ExitStack()
        for place, layer in enumerate(self.layers):
            self.replaced.enter_context(replaced_forward(layer, self._passed_over(place, layer.forward)))

    def first_pruned(self) -> int:
        """Return the place of the first layer with a pruned MoE layer in it; 0 if there is none."""
        for place, layer in enumerate(self.layers):
            if any(isinstance(part, MoELayer) and part.plan is not None for part in layer.modules()):
                return place
        return 0

    def close(self) -> None:
        """Let the layers run as before."""
        self.replaced.close()

    def _passed_over(self, place: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any, **named: Any) -> Any:
            current: Pass | None = getattr(_running, "current", None)
            if current is None or not arguments or not isinstance(arguments[0], Tensor):
                return forward(*arguments, **named)
            taken = arguments[0]
            is_next = place == current.next_place
            if current.start is not None and place < current.start.place:
                return taken
            if current.start is not None and place == current.start.place and current.start.taken is not None:
                taken = current.start.taken.to(current.device)
                current.start = current.start._replace(taken=None)
            current.entered = (place, taken)
            if current.see is not None:
                current.see(place, taken)
            if place == current.end:
                raise StopForward
            if current.goal is not None and current.goal == self.first_moe[place]:
                current.look_beside(lambda: forward(taken, *arguments[1:], **named))
            output = forward(taken, *arguments[1:], **named)
            self.can_start = self.can_start and isinstance(output, Tensor) and is_next
            return output

        return run


def to_file(value: Tensor, files: contextlib.ExitStack) -> Tensor:
    """Return a tensor in a file, on the CPU; the file is removed when the stack is closed."""
    folder = files.enter_context(ScratchFolder())
    of_file = torch.from_file(str(Path(folder) / "tensor"), True, value.numel(), dtype=value.dtype)
    return of_file.copy_(value.flatten()).view(value.shape)


def gated(model: Model, name: str) -> contextlib.AbstractContextManager[None]:
    """Make a layer wait where a pass is to run to it, and then run what has taken its place in the model."""
    layer = model.moe_layers[name]
    forward = layer.forward

    def gate(*arguments: Any, **named: Any) -> Any:
        current = getattr(_running, "current", None)
        if current is not None and current.goal == name:
            if current.stand_in is not None:
                return current.stand_in(arguments[0].new_zeros(*arguments[0].shape[:-1], layer.config.output_width))
            known = current.wait(arguments, named)
            if known is not None:
                return known
        elif current is not None and current.start is not None and current.start.layer == name:
            return current.start.output.to(current.device)
        now = model.get_submodule(name)
        return forward(*arguments, **named) if now is layer else now(*arguments, **named)

    return replaced_forward(layer, gate)


class Pass:
    """A forward pass in a thread, which waits where it reaches the layer that it is to run to.

    start: where it begins; None: with the inputs.
    """

    def __init__(self, forward: Callable[[], Tensor], device: torch.device, start: Start | None = None):
        self.forward: Callable[[], Tensor] | None = forward
        self.device, self.start = device, start
        self.end: int | None = None  # the place of the layer before which it ends
        self.see: Callable[[int, Tensor], None] | None = None  # gets the place of each layer, and what it takes
        self.entered: tuple[int, Tensor] | None = None  # of the model's sequence: the last layer, and what it takes
        self.stand_ins: list[StandIn] = []  # for the MoE layer that it is to run to
        self.stand_in: StandIn | None = None  # at work
        self.beside: list[Tensor] = []  # what the last layer of the sequence gives with each of them
        self.goal: str | None = None
        self.taken: tuple[tuple[Any, ...], dict[str, Any]] | None = None
        self.output: Any = None  # what the layer gives for that, if it is known
        self.error: BaseException | None = None
        self.is_closed = False
        self.used = -1.0  # seconds of the processor, when they were last looked at
        self.may_go, self.has_stopped = threading.Semaphore(0), threading.Semaphore(0)
        self.thread: threading.Thread | None = None  # which would keep a pass that needs none from being freed

    def run(self) -> Tensor:
        """Run in this thread, to the end; return the output."""
        assert self.forward is not None
        _running.current = self
        try:
            return self.forward()
        finally:
            _running.current = None

    def run_before(self, place: int) -> None:
        """Run in this thread, as far as a layer of the sequence."""
        self.end = place
        with contextlib.suppress(StopForward):
            self.run()

    @property
    def next_place(self) -> int:
        """The place of the layer that comes next where a model's layers run one after the other."""
        if self.entered is not None:
            return self.entered[0] + 1
        return 0 if self.start is None else self.start.place

    def look_beside(self, run: Callable[[], Any]) -> None:
        """Run a layer of the sequence with each of the stand-ins for the MoE layer in it; keep what it gives."""
        for stand_in in self.stand_ins:
            self.stand_in = stand_in
            found = run()
            self.beside.append(found[0] if isinstance(found, tuple) else found)
        self.stand_in = None

    def go_to(self, name: str, stand_ins: Iterable[StandIn] = ()) -> None:
        """Go on as far as a layer; look at what the one of the sequence around it gives with each of the stand-ins."""
        self.goal, self.taken, self.used = name, None, -1.0
        self.stand_ins, self.beside = [*stand_ins], []
        if self.thread is None:
            self.thread = threading.Thread(target=self._run, daemon=True)
            self.thread.start()
        else:
            self.may_go.release()

    def has_arrived(self) -> bool:
        """Wait for some seconds, and return True if the pass has arrived, or has ended."""
        return self.has_stopped.acquire(timeout=STUCK_SECONDS)

    def is_stuck(self) -> bool:
        """Return True if the thread has used no time of the processor since this was asked before."""
        before = self.used
        with contextlib.suppress(AttributeError, OSError):  # on some systems nobody knows
            thread = 0 if self.thread is None else self.thread.ident or 0
            self.used = time.clock_gettime(time.pthread_getcpuclockid(thread))
        return self.used == before != -1.0

    def arguments(self, name: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the arguments of the layer at which the pass has arrived.

        Raises what the pass raises, or a MoepruneError if it has ended before.
        """
        error, self.error = self.error, None
        if error is not None:
            raise error
        if self.taken is None:
            raise MoepruneError(f"layer `{name}` is not reached by all inputs", "leave it out, with `--plan`")
        return self.taken

    def wait(self, arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
        """Stop this thread, which is the pass's own, until it may go on; return the layer's output if it is known."""
        self.taken, self.goal = (arguments, named), None
        self.has_stopped.release()
        self.may_go.acquire()
        if self.is_closed:
            raise StopForward
        output, self.output = self.output, None
        return output

    def close(self) -> None:
        """End the pass, whether it waits or runs."""
        self.is_closed = True
        self.may_go.release()
        if self.thread is not None:
            self.thread.join()

    def _run(self) -> None:
        _running.current = self
        try:
            if self.device.type == "cuda":
                torch.cuda.set_device(self.device)
            assert self.forward is not None
            self.forward()
        except StopForward:
            pass
        except BaseException as error:
            self.error = error
        self.forward = None  # which holds the inputs
        self.has_stopped.release()
