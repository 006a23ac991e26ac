"""Outputs of several models on the same inputs: what they have in common runs once."""

import contextlib
import copy
import gc
import tempfile
import weakref
from types import MethodType

import pytest
import torch

import moeprune
from moeprune.calibration import together
from moeprune.calibration.together import run_paired
from moeprune.errors import MoepruneError
from moeprune.layers.surgery import prune_layer
from moeprune.models import vit
from moeprune.models.architecture import BlockConfig
from moeprune.models.model import private_copy
from moeprune.plan import LayerPlan
from tests.reference import replace
from tests.test_calibration import two_layer_model
from tests.test_walk import FIRST, LAST, SAMPLES, dataset

CPU = moeprune.Runtime("cpu", batch_size=8)
PLAN = LayerPlan("input", 2, 5, "combine", "none")


def pruned(model, *names: str):
    copy = private_copy(model)
    for name in names:
        copy.set_submodule(name, prune_layer(copy.get_submodule(name), PLAN))
    return copy


@pytest.fixture
def blocks_run(monkeypatch):
    """The plans of the blocks that ran, None for one that is not pruned."""
    run, forward = [], vit.Block.forward
    monkeypatch.setattr(vit.Block, "forward", lambda block, x: (run.append(block.soft_moe.plan), forward(block, x))[1])
    return run


@pytest.mark.parametrize("held", [together.HELD, 0])
def test_models_begin_at_their_first_pruned_layer(held, blocks_run, monkeypatch, tmp_path):
    monkeypatch.setattr(together, "HELD", held)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    full = two_layer_model()
    models = {names: pruned(full, *names) for names in [(FIRST,), (LAST,), (FIRST, LAST), ()]}
    files = []
    seen = {names: [] for names in models}
    for names, found, expected in run_paired(models, full, dataset(), CPU, "compare"):
        files.append(len([*tmp_path.iterdir()]))
        seen[names].append((found, expected))
    assert (max(files) > 0) == (held == 0)
    assert not [*tmp_path.iterdir()]
    of_batch = [None, None, PLAN, None, PLAN, PLAN, PLAN, None, None]  # LAST alone runs one block, and the others two
    assert blocks_run == of_batch * 3
    x, _ = next(dataset().batches(SAMPLES))
    for names, parts in seen.items():
        found, expected = (torch.cat(part) for part in zip(*parts, strict=True))
        assert torch.equal(found, torch.cat([CPU.forward(models[names], each) for each in x.split(8)]))
        assert torch.equal(expected, torch.cat([CPU.forward(full, each) for each in x.split(8)]))


def test_layers_run_as_before_after_an_error(monkeypatch):
    full = two_layer_model()
    models = {0: pruned(full, LAST)}
    monkeypatch.setattr(models[0].head, "forward", lambda x: 1 / 0)
    with contextlib.suppress(ZeroDivisionError):
        [*run_paired(models, full, dataset(), CPU, "compare")]
    assert not any("forward" in vars(block) for model in (full, *models.values()) for block in model.blocks)


def test_layers_that_do_not_run_in_their_order_all_run(blocks_run, monkeypatch):
    full = two_layer_model()
    monkeypatch.setattr(type(full), "sequence", ["blocks.1", "blocks.0"])
    models = {0: pruned(full, FIRST), 1: pruned(full, LAST)}
    found = {index: outputs for index, outputs, _ in run_paired(models, full, dataset(8), CPU, "compare")}
    assert len(blocks_run) == 6
    x, _ = next(dataset(8).batches(8))
    for index, outputs in found.items():
        assert torch.equal(outputs, CPU.forward(models[index], x))


class Skipping(vit.SoftMoEViT):
    """Its head reads what all blocks give."""

    def forward(self, images):
        tokens, found = self.embed(images), []
        for block in self.blocks:
            found.append(tokens := block(tokens))
        return self.head(self.norm(sum(found)).mean(1))


def test_models_with_a_forward_of_their_own_run_whole():
    model = two_layer_model()
    full = Skipping(model.config).eval()
    full.load_state_dict(model.state_dict())
    other = pruned(full, LAST)
    x, _ = next(dataset(8).batches(8))
    ((_, found, expected),) = run_paired({0: other}, full, dataset(8), CPU, "compare")
    assert torch.equal(found, CPU.forward(other, x))
    assert torch.equal(expected, CPU.forward(full, x))


def test_a_forward_set_on_a_block_stays():
    full = two_layer_model()
    first = full.blocks[0]
    first.forward = MethodType(lambda block, x: 0.5 * type(block).forward(block, x), first)
    kept = moeprune.prune(full, data=dataset(8), keep="1.0", compensate="mean", runtime=CPU)
    x, _ = next(dataset(8).batches(8))
    torch.testing.assert_close(CPU.forward(kept, x), CPU.forward(full, x))
    assert "forward" in vars(first)


def test_a_block_in_two_places_is_no_sequence():
    model = two_layer_model()
    dense = BlockConfig(mlp_dim=8)
    full = vit.SoftMoEViT(replace(model.config, blocks=(dense, dense, *model.config.blocks))).eval()
    full.blocks[1] = full.blocks[0]
    found = moeprune.prune(full, data=dataset(8), keep=2, compensate="mean", runtime=CPU)
    full.blocks[1] = copy.deepcopy(full.blocks[0])
    apart = moeprune.prune(full, data=dataset(8), keep=2, compensate="mean", runtime=CPU)
    x, _ = next(dataset(8).batches(8))
    assert torch.equal(CPU.forward(found, x), CPU.forward(apart, x))
    full.blocks[3].soft_moe = full.blocks[2].soft_moe
    with pytest.raises(MoepruneError, match="are the same module"):
        moeprune.analyze(full, dataset(8), CPU)


def test_models_are_freed_without_a_search_for_garbage():
    full = two_layer_model()
    models = {0: pruned(full, LAST)}
    gc.collect()
    gc.disable()
    try:
        assert len([*run_paired(models, full, dataset(8), CPU, "compare")]) == 1
        left = weakref.ref(models.pop(0))
        assert left() is None
    finally:
        gc.enable()
