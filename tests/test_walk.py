"""One walk of all data through the full and the pruned model, however many layers are pruned."""

import gc
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import moeprune
from moeprune.calibration import analysis as analysis_module
from moeprune.calibration import walk as walk_module
from moeprune.calibration.walk import Walk
from moeprune.data.datasets import from_tensors
from moeprune.demo.train import initialize
from moeprune.errors import MoepruneError
from moeprune.layers.layer import new_layer
from moeprune.layers.surgery import prune_layer
from moeprune.models import vit
from moeprune.models.architecture import BlockConfig
from moeprune.models.model import private_copy
from moeprune.models.vit import SoftMoEViT
from moeprune.plan import LayerPlan
from moeprune.pruning.apply import apply_plan
from tests.reference import replace
from tests.test_calibration import layer_inputs_and_outputs, two_layer_model
from tests.test_compensation import block_outputs
from tests.test_soft_moe import relative_error

CPU = moeprune.Runtime("cpu", batch_size=8)
FIRST, LAST = "blocks.0.soft_moe", "blocks.1.soft_moe"
SAMPLES = 23
WAYS = {
    "affine": {"signal": "gram", "compensate": "affine"},
    "low-rank": {"compensate": "low-rank", "rank": 2},
    "routed": {"scope": "input", "compensate": "lstsq"},
    "batch": {"scope": "batch", "compensate": "mean"},
    "merge": {"signal": "combine", "compensate": "merge"},
}


def dataset(samples: int = SAMPLES):
    x = torch.randn(samples, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    return from_tensors("drawn", x, torch.arange(samples) % 7, 7)


@pytest.fixture
def model():
    return two_layer_model()


@pytest.fixture(autouse=True)
def _nothing_is_left(tmp_path, monkeypatch):
    """No thread waits after a test, and no temporary file is left."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    before = {*threading.enumerate()}
    gc.freeze()  # what is there already takes long to go through
    yield
    gc.collect()
    gc.unfreeze()
    for thread in {*threading.enumerate()} - before:
        if thread.name != "tqdm_monitor":
            thread.join(5)  # the one that reads data ends by itself
            assert not thread.is_alive(), thread
    assert [*(tmp_path / "temporary").glob("moeprune*")] == []


def rows_embedded(model) -> list[int]:
    """The number of inputs of each batch that the patch embedding, of this model or a copy, gets from now on."""
    rows: list[int] = []
    model.patch_embed.register_forward_hook(lambda _, args, output: rows.append(len(output)))
    return rows


def assert_equal_models(found, expected, tolerance: float = 0.0) -> None:
    assert found.plan == expected.plan
    for name, tensor in expected.state_dict().items():
        torch.testing.assert_close(found.state_dict()[name], tensor, rtol=tolerance, atol=tolerance)


# --- how often the model runs
def test_an_analysis_runs_each_input_once(model, monkeypatch):
    monkeypatch.setattr(analysis_module, "measure_sensitivity", lambda *args: {})
    rows = rows_embedded(model)
    moeprune.analyze(model, dataset(), CPU)
    assert rows == [8, 8, 7]


@pytest.mark.parametrize("way", ["affine", "low-rank", "routed", "merge"])
def test_pruning_runs_each_input_once_through_the_full_and_once_through_the_pruned_model(way, model):
    rows = rows_embedded(model)
    moeprune.prune(model, keep=2, **WAYS[way], data=dataset(), runtime=CPU)
    assert sorted(rows) == [7, 7, 8, 8, 8, 8]


def test_pruning_one_layer_runs_each_input_once(model):
    rows = rows_embedded(model)
    plan = {LAST: LayerPlan("static", 2, 5, "gram", "affine")}
    moeprune.prune(model, plan=plan, data=dataset(), runtime=CPU)
    assert rows == [8, 8, 7]


def test_all_candidates_share_one_pass_of_the_full_model(model):
    from moeprune.plan import Method
    from moeprune.pruning.auto import fit_all

    rows = rows_embedded(model)
    plans = [{name: Method("static", "gram", way).plan(2, 5) for name in (FIRST, LAST)} for way in ("mean", "affine")]
    fit_all(private_copy(model), plans, dataset(), 0, CPU)
    assert rows == [8, 8, 7]


@pytest.mark.parametrize("held", [walk_module.HELD, 0])
def test_blocks_before_the_first_pruned_layer_run_once(held, monkeypatch):
    monkeypatch.setattr(walk_module, "HELD", held)
    model, run, forward = two_layer_model(), [], vit.Block.forward
    dense = BlockConfig(mlp_dim=9)
    model = SoftMoEViT(replace(model.config, blocks=(dense, *model.config.blocks)))
    initialize(model, 4.0, 0.1, torch.Generator().manual_seed(0))

    def counted(block: vit.Block, x: Tensor) -> Tensor:
        run.append(hasattr(block, "mlp"))
        return forward(block, x)

    monkeypatch.setattr(vit.Block, "forward", counted)
    found = moeprune.prune(model, keep=2, **WAYS["affine"], data=dataset(), runtime=CPU)
    assert sum(run) == 3
    run.clear()
    monkeypatch.setattr(SoftMoEViT, "sequence", [])
    assert_equal_models(found, moeprune.prune(model, keep=2, **WAYS["affine"], data=dataset(), runtime=CPU))
    assert sum(run) == (6 if held else 9)


def test_no_more_passes_wait_than_may_at_once(model, monkeypatch):
    monkeypatch.setattr(walk_module, "WAITING", 2)
    monkeypatch.setattr(walk_module, "FEWEST_WAITING", 2)
    rows = rows_embedded(model)
    with Walk(private_copy(model), None, dataset(), moeprune.Runtime("cpu", batch_size=4)) as walk:
        stage = walk.reach(FIRST)
        assert len(walk.of_full) == 2
        walk.reach(LAST)
    assert [len(halt.expected) for halt in stage.halts] == [4] * 5 + [3]
    assert rows == [4] * 5 + [3] + [4] * 3 + [3]  # those that did not wait run again


def test_layers_behind_one_that_needs_no_data_see_it_pruned(model):
    """The first layer takes its experts from the plan, so that the data need not reach it."""
    plan = {
        FIRST: LayerPlan("static", 1, 5, "combine", "none", (2,)),
        LAST: LayerPlan("static", 2, 5, "gram", "affine"),
    }
    behind = apply_plan(model, plan, data=dataset(), runtime=CPU).moe_layers[LAST]
    alone = apply_plan(model, {LAST: plan[LAST]}, data=dataset(), runtime=CPU).moe_layers[LAST]
    assert float((behind.surrogate - alone.surrogate).norm() / alone.surrogate.norm()) > 1e-3


def test_scope_batch_keeps_its_batches(model):
    rows = rows_embedded(model)
    moeprune.prune(model, keep=2, **WAYS["batch"], data=dataset(), runtime=moeprune.Runtime("cpu", batch_size=5))
    assert sorted(rows) == [3, 3, *[5] * 8]


# --- what a layer gets
@pytest.mark.parametrize("held", [4 << 30, 0, 50_000], ids=["kept", "anew", "some anew"])
def test_a_stage_has_what_layers_take_behind_pruned_ones_and_give_in_the_full_model(held, model, monkeypatch):
    monkeypatch.setattr(walk_module, "HELD", held)
    full, pruned, data = private_copy(model), private_copy(model), dataset()
    expected_inputs, expected = {}, {}
    with Walk(full, pruned, data, CPU) as walk:
        first = walk.reach(FIRST)
        taken = torch.cat([halt.taken[0][0] for halt in first.halts])
        assert torch.equal(taken, layer_inputs_and_outputs(model, FIRST, data)[0])
        smaller = prune_layer(first.layer, LayerPlan("static", 1, 5, "combine", "none", (2,)))
        pruned.set_submodule(FIRST, smaller)
        last = walk.reach(LAST, with_stream=True)
        assert not (held > 1e6 and [*Path(tempfile.gettempdir()).glob("moeprune*")])
        changed = two_layer_model()
        changed.set_submodule(FIRST, smaller)
        expected_inputs, expected = (
            layer_inputs_and_outputs(changed, LAST, data)[0],
            layer_inputs_and_outputs(model, LAST, data)[1],
        )
        assert relative_error(torch.cat([halt.taken[0][0] for halt in last.halts]), expected_inputs) < 1e-6
        assert relative_error(torch.cat([halt.expected for halt in last.halts]), expected) < 1e-6
        gaps = [gap for _, _, gap in last.observe()]
        own, with_stream = (torch.cat(each) for each in zip(*((gap.own, gap.whole) for gap in gaps), strict=True))
        given = last.layer(expected_inputs)
        blocks = [block_outputs(each, data) for each in (model, changed)]
    assert relative_error(own, expected - given) < 1e-4
    assert relative_error(with_stream, (blocks[0] - blocks[1]).float()) < 1e-4
    assert last.power == pytest.approx(float(expected.double().square().sum()), rel=1e-6)


@pytest.mark.mostly_slow(3)
@pytest.mark.parametrize("held", [0, 50_000], ids=["anew", "some anew"])
@pytest.mark.parametrize("way", WAYS)
def test_passes_that_start_anew_give_the_same(way, held, model, monkeypatch):
    kept = moeprune.prune(model, keep=2, **WAYS[way], data=dataset(), runtime=CPU)
    monkeypatch.setattr(walk_module, "HELD", held)
    rows = rows_embedded(model)
    assert_equal_models(moeprune.prune(model, keep=2, **WAYS[way], data=dataset(), runtime=CPU), kept)
    assert (sum(rows) == 3 * SAMPLES) if held == 0 else (2 * SAMPLES < sum(rows) < 3 * SAMPLES)


@pytest.mark.parametrize("way", ["routed", "merge"])
def test_results_do_not_depend_on_the_batch_size(way, model):
    sizes = (1, 8, 64)
    found = [
        moeprune.prune(model, keep=2, **WAYS[way], data=dataset(), runtime=CPU.updated(batch_size=size))
        for size in sizes
    ]
    for each in found[1:]:
        assert each.plan == found[0].plan
        x, _ = next(dataset().batches(64))
        assert relative_error(each(x), found[0](x)) < 1e-3


def test_the_models_that_are_walked_compute_what_they_did(model):
    full, data = private_copy(model), dataset()
    x, _ = next(data.batches(64))
    expected = model(x)
    with Walk(full, None, data, CPU) as walk:
        walk.reach(FIRST)
        walk.reach(LAST)
    assert torch.equal(full(x), expected)
    assert torch.equal(private_copy(full)(x), expected)


# --- user code
class Net(nn.Module):
    """Three layers, and code of the user's between them."""

    def __init__(self, between: Callable[[int, Tensor, Tensor], Tensor] = lambda index, x, y: x + y):
        super().__init__()
        torch.manual_seed(0)
        self.between, self.again = between, False
        self.embed, self.head = nn.Linear(4, 6), nn.Linear(6, 3)
        config = two_layer_model().config.moe_layers[LAST].replace(dim=6)
        self.layers = nn.ModuleList(new_layer(config) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.embed(x.flatten(1).unflatten(1, (-1, 4)))
        for index, layer in enumerate(self.layers):
            y = layer(tokens)
            tokens = self.between(index, tokens, layer(y) if self.again else y)
        return self.head(tokens.mean(1))


def adopted(between=lambda index, x, y: x + y):
    return moeprune.adopt(Net(between), (1, 4, 4))


def net_data(samples: int = SAMPLES):
    return from_tensors("drawn", torch.randn(samples, 1, 4, 4, generator=torch.Generator().manual_seed(1)), None, 3)


class UserError(Exception):
    pass


@pytest.mark.mostly_slow(2)
@pytest.mark.parametrize("held", [4 << 30, 0], ids=["kept", "anew"])
@pytest.mark.parametrize("fails", [1, 2, 5], ids=["of the full model", "of the pruned model", "later"])
def test_an_error_in_user_code_ends_all_passes(fails, held, monkeypatch):
    monkeypatch.setattr(walk_module, "HELD", held)
    calls = []

    def between(index: int, x: Tensor, y: Tensor) -> Tensor:
        if index == 1 and calls:
            calls.append(index)
            if len(calls) > fails:
                raise UserError("as the user's code says")
        return x + y

    model = adopted(between)
    calls.append(1)
    with pytest.raises(MoepruneError, match="UserError: as the user's code says"):
        moeprune.prune(model, keep=2, compensate="affine", data=net_data(), runtime=CPU)


@pytest.mark.parametrize("held", [4 << 30, 0], ids=["kept", "anew"])
def test_an_error_in_a_layer_ends_all_passes(held, monkeypatch):
    monkeypatch.setattr(walk_module, "HELD", held)
    model, calls = adopted(), []
    [_, name, _] = model.moe_layers
    layer = model.moe_layers[name]

    def fail(slot_inputs: Tensor) -> Tensor:
        calls.append(1)
        if len(calls) > 2:
            raise UserError("no memory")
        return type(layer)._run_experts(layer, slot_inputs)

    with Walk(model, None, net_data(), CPU) as walk:
        walk.reach(next(iter(model.moe_layers)))
        layer._run_experts = fail
        with pytest.raises(UserError, match="no memory"):
            walk.reach(name)


def test_code_that_writes_into_outputs_and_inputs_of_layers_gives_the_same():
    """In place: what a layer took and gave must be looked at before it goes on."""

    def in_place(index: int, x: Tensor, y: Tensor) -> Tensor:
        return y.mul_(0.5) if index == 0 else x.add_(y)

    def plain(index: int, x: Tensor, y: Tensor) -> Tensor:
        return y * 0.5 if index == 0 else x + y

    for choice in ({"compensate": "affine"}, {"scope": "input", "compensate": "lstsq"}, {"compensate": "refit"}):
        found, expected = (
            moeprune.prune(adopted(between), keep=2, **choice, data=net_data(), runtime=CPU)
            for between in (in_place, plain)
        )
        assert_equal_models(found, expected, 1e-6)


def test_a_layer_that_runs_again_in_a_pass_is_pruned_there_too():
    """The user's code holds the layer while it is replaced."""
    model, data = adopted(), net_data()
    model.module.again = True
    full, pruned = private_copy(model), private_copy(model)
    names = [*model.moe_layers]
    with Walk(full, pruned, data, CPU) as walk:
        for name, kept in zip(names[:2], ((1,), (2, 3)), strict=True):
            layer = walk.reach(name).layer
            pruned.set_submodule(name, prune_layer(layer, LayerPlan("static", len(kept), 5, "combine", "none", kept)))
        last = walk.reach(names[2])
        found = torch.cat([halt.taken[0][0] for halt in last.halts])
    x, _ = next(data.batches(64))
    assert relative_error(found, first_taken(pruned, names[2], x)) < 1e-6
    assert relative_error(torch.cat([halt.taken[0][0] for halt in last.halts]), first_taken(model, names[2], x)) > 1e-3


def first_taken(model, name: str, x: Tensor) -> Tensor:
    """What a layer takes when it runs first."""
    seen: list[Tensor] = []
    handle = model.moe_layers[name].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model(x)
    handle.remove()
    return seen[0]


def test_code_that_catches_all_exceptions_does_not_keep_a_pass():
    class Catching(Net):
        def forward(self, x: Tensor) -> Tensor:
            try:
                return super().forward(x)
            except Exception:
                return super().forward(x)

    model = moeprune.adopt(Catching(), (1, 4, 4))
    moeprune.prune(model, keep=2, compensate="affine", data=net_data(), runtime=CPU)


@pytest.mark.mostly_slow(2)
@pytest.mark.parametrize("held", [4 << 30, 0], ids=["kept", "anew"])
@pytest.mark.parametrize("compensate", ["affine", "refit", "low-rank"])
def test_padding_that_layers_are_told_of_changes_nothing(compensate, held, monkeypatch):
    """Whatever padded tokens hold, fits are those of the real ones."""

    class Masked(Net):
        def forward(self, x: Tensor) -> Tensor:
            tokens = self.embed(x.flatten(1).unflatten(1, (-1, 4)))
            mask = torch.ones_like(tokens[..., 0], dtype=torch.bool)
            mask[:, 3:] = False
            tokens = torch.where(mask[..., None], tokens, self.padding)
            for layer in self.layers:
                tokens = tokens + layer(tokens, mask=mask) * mask[..., None]
            return self.head(tokens[:, :3].mean(1))

    monkeypatch.setattr(walk_module, "HELD", held)
    found = []
    for padding in (0.0, 7.0):
        module = Masked()
        module.padding = padding
        model = moeprune.adopt(module, (1, 4, 4))
        found.append(moeprune.prune(model, keep=2, compensate=compensate, data=net_data(), runtime=CPU))
    assert_equal_models(*found, 1e-5)


def test_a_layer_that_some_inputs_do_not_reach_is_an_error():
    class Leaving(Net):
        def forward(self, x: Tensor) -> Tensor:
            tokens = self.embed(x.flatten(1).unflatten(1, (-1, 4)))
            for layer in self.layers[: 2 if len(x) == 7 else 3]:
                tokens = tokens + layer(tokens)
            return self.head(tokens.mean(1))

    model = moeprune.adopt(Leaving(), (1, 4, 4))
    with pytest.raises(MoepruneError, match=r"layer `module\.layers\.2` is not reached by all inputs"):
        moeprune.analyze(model, net_data(), CPU)


def test_modes_and_types_of_the_caller_hold_in_passes(model):
    """Passes have threads of their own."""
    seen = []
    model.patch_embed.register_forward_hook(
        lambda *_: seen.append((torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")))
    )
    moeprune.prune(model, keep=2, compensate="affine", data=dataset(), runtime=moeprune.Runtime("cpu", dtype="bf16"))
    assert {*seen} == {(True, True)}
