"""Checkpoints wrapped at random: read as the model in them, or refused with a reason."""

import argparse
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import moeprune
from moeprune.errors import MoepruneError
from moeprune.models import opening
from moeprune.models.export import skipped
from tests.test_sources import GIVEN, fake_state
from tests.test_wrappers import SHAPE, Net, Outer, Tied, drawn, logits

FACTORIES: list[Callable[[], nn.Module]] = [
    Net, Tied, lambda: Outer("model", Net()), lambda: Outer("module", Net()),
]  # fmt: skip
PREFIXES = ("net.", "ema_model.", "backbone.", "model.", "student.encoder.", "a.b.c.")
WRAPPERS = ("module.", "_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
OTHERS = {
    "n_averaged": torch.tensor(3), "initted": torch.tensor(True), "step": torch.tensor([4]),
    "criterion.weight": torch.full((5,), torch.nan), "train_acc.confmat": torch.zeros(5, 5, dtype=torch.int64),
    "projector.layers.0.weight": torch.ones(2, 2),
}  # fmt: skip
COUNTERS = ("n_averaged", "initted", "step")
KEYS = ("state_dict", "model", "ema", "model_state_dict")
State = dict[str, torch.Tensor]


def with_wrappers(state: State, chance: random.Random) -> State:
    """Parts of the model wrapped: a segment within all names that start alike."""
    for _ in range(chance.choice((0, 0, 1, 2))):
        parts = chance.choice(list(state)).split(".")
        start = ".".join(parts[: chance.randrange(1, len(parts))]) + "." if len(parts) > 1 else ""
        wrapper = chance.choice(WRAPPERS)
        state = {
            f"{start}{wrapper}{name.removeprefix(start)}" if name.startswith(start) else name: tensor
            for name, tensor in state.items()
        }
    return state


def damaged(state: State, chance: random.Random) -> State:
    """Without a tensor that counts, with one more, or with one of another shape."""
    ends = ("phi", "slot_embeds", "embed.weight", "fc1.bias")
    name = chance.choice([name for name in state if name.endswith(ends)])
    match chance.randrange(3):
        case 0:
            return {other: tensor for other, tensor in state.items() if other != name}
        case 1:
            return state | {f"{name}s": state[name]}
        case _:
            return state | {name: torch.ones(1, 2, 3, 5, 7)}


def written(folder: Path, state: State, chance: random.Random) -> Path:
    """Written in one of the forms, beside what training scripts keep."""
    path, form = folder / "found", chance.choice(("zip", "legacy", "bare", "safetensors", "shards", "bin shards"))
    if form in ("zip", "legacy", "bare"):
        beside = {
            "args": argparse.Namespace(lr=0.1, out=Path("a")),
            "epoch": 3,
            "optimizer": {"state": {0: torch.ones(2)}},
        }
        content = state if form == "bare" else {chance.choice(KEYS): state, **beside}
        torch.save(content, path, _use_new_zipfile_serialization=form != "legacy")
        return path
    if form == "safetensors":
        save_file({name: tensor.clone() for name, tensor in state.items()}, path)
        return path
    is_torch = form == "bin shards"
    shards = [
        f"{'parts/' if chance.random() < 0.5 else ''}{index}.{form[:3]}" for index in range(chance.randrange(1, 4))
    ]
    weight_map = {name: chance.choice(shards) for name in state}
    (folder / "parts").mkdir(exist_ok=True)
    for shard in set(weight_map.values()):
        held = {name: tensor.clone() for name, tensor in state.items() if weight_map[name] == shard}
        (torch.save if is_torch else save_file)(held, folder / shard)
    path = folder / ("pytorch_model.bin.index.json" if is_torch else "model.safetensors.index.json")
    path.write_text(json.dumps({"weight_map": weight_map}))
    return path


@pytest.mark.parametrize("count", [30, pytest.param(2000, marks=pytest.mark.slow)])
def test_wrapped_at_random(count, tmp_path, monkeypatch):
    for name in ("compare", "difference"):  # with the library's own model, which takes most of the time
        monkeypatch.setattr(opening, name, lambda *_: skipped("not asked for"))
    kinds: list[tuple[State, dict[str, Any]]] = [(fake_state(), GIVEN)]
    kinds += [(dict(drawn(make()).state_dict()), {"model": make, "input_shape": SHAPE}) for make in FACTORIES]
    results: dict[Any, torch.Tensor] = {}
    outcomes = dict.fromkeys(("read", "damaged", "several", "chosen"), 0)
    for seed in range(count):
        chance = random.Random(seed)
        plain, given = chance.choice(kinds)
        dtype = chance.choice((torch.float32, torch.float32, torch.float16, torch.bfloat16, torch.float64))
        state = {name: t.to(dtype) if t.is_floating_point() else t for name, t in plain.items()}
        if (id(plain), dtype) not in results:
            torch.save(state, tmp_path / "plain.pt")
            results[id(plain), dtype] = logits_of(tmp_path / "plain.pt", **given)
        expected = results[id(plain), dtype]
        is_damaged = chance.random() < 0.2
        wrapped = with_wrappers(damaged(state, chance) if is_damaged else state, chance)
        prefix = "".join(chance.choice((*PREFIXES, *WRAPPERS)) for _ in range(chance.choice((0, 1, 1, 2))))
        found = {prefix + name: tensor for name, tensor in wrapped.items()}
        is_inner = any(part in prefix for part in PREFIXES)
        others = [name for name in OTHERS if (is_inner or name in COUNTERS) and chance.random() < 0.3]
        found |= {name: OTHERS[name] for name in others}
        second = chance.choice((None, None, None, "same", "other")) if is_inner and not is_damaged else None
        if second:
            values = {n: t if second == "same" or not t.is_floating_point() else t * 2 for n, t in state.items()}
            found |= {f"online.{name}": tensor for name, tensor in values.items()}
        path, outcome = written(tmp_path, found, chance), "read"
        label = f"seed {seed}: {list(found)[:3]} of {len(found)}, {path.name}, {prefix}, damaged {is_damaged}, {second}"
        if is_damaged or second == "other":
            with pytest.raises(MoepruneError) as caught:
                print(label, logits_of(path, **given))
            outcome = "damaged" if is_damaged else "several"
            assert ("several whole models" in caught.value.message) == (outcome == "several"), label
        if not is_damaged:
            choice = {"prefix": prefix} if outcome == "several" or chance.random() < 0.1 else {}
            try:
                assert torch.equal(logits_of(path, **given, **choice), expected), label
            except MoepruneError as error:
                raise AssertionError(f"{label}: {error}") from None
            outcomes["chosen"] += bool(choice)
        outcomes[outcome] += 1
    assert all(outcomes.values())


def logits_of(path: Path, **given: Any) -> torch.Tensor:
    return logits(moeprune.load(path, **given).float())
