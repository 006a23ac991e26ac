"""Gated layers go through analyze, prune, save, load and eval; what is summed and fitted is what formulas say."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import moeprune
from moeprune.calibration.ridge import Equations, solve_held_out
from moeprune.calibration.selection import best_by_score, best_kept
from moeprune.calibration.sums import half_of
from moeprune.layers import observation
from moeprune.layers.gated_config import GatedMoEConfig
from moeprune.layers.gated_moe import GatedMoE
from moeprune.layers.observation import Observation
from moeprune.plan import LOW_RANK, LayerPlan
from moeprune.pruning import compensation as fits
from moeprune.pruning.apply import apply_plan

D, N, K, H, CLASSES = 6, 8, 3, 5, 3
FACTORY = "tests.test_gated_calibration:build"
CPU = moeprune.Runtime("cpu", batch_size=16)
CONFIG = GatedMoEConfig(D, N, H, K, normalized=True)
SIGMOID = GatedMoEConfig(D, N, H, K, "sigmoid", selection_bias=True, bias=True, groups=4, groups_kept=3)
INPUTS = GatedMoEConfig(D, N, H, K, "sigmoid", weigh="inputs")
COMPENSATIONS = ("none", "renorm", "mean", "lstsq", "affine", "renorm-refit", *LOW_RANK, "merge")


class Net(nn.Module):
    def __init__(self, config: GatedMoEConfig) -> None:
        super().__init__()
        self.embed = nn.Linear(4, D)
        self.moe = nn.ModuleList(GatedMoE(config) for _ in range(2))
        self.head = nn.Linear(D, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.embed(x.flatten(1).unflatten(1, (-1, 4)))
        for layer in self.moe:
            tokens = tokens + layer(tokens)
        return self.head(tokens.mean(1))


def build(config: GatedMoEConfig = CONFIG) -> nn.Module:
    torch.manual_seed(0)
    net = Net(config)
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.5)
    return net


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The model as a checkpoint, and labelled data: the model's own predictions."""
    path = tmp_path_factory.mktemp("gated")
    inputs = torch.randn(384, 1, 4, 4, generator=torch.Generator().manual_seed(1))
    labels = build()(inputs).argmax(1)
    for name, part in (("calibration", slice(0, 320)), ("test", slice(320, 384))):
        np.savez(path / f"{name}.npz", inputs=inputs[part].numpy(), labels=labels[part].numpy())
    moeprune.save(moeprune.adopt(build(), (1, 4, 4), FACTORY), path / "full.safetensors")
    return path


def observe(layer: GatedMoE, x: Tensor) -> tuple[Observation, Observation]:
    """What the layer shows of rows, and the same with the outputs of all experts for all tokens."""
    seen = []
    layer.observer = seen.append
    layer(x)
    layer.observer = None
    [rows] = seen
    gates, count = rows.weights.flatten(0, 1)[:, :, 0], rows.tokens.shape[:2].numel()
    outputs = torch.zeros(count, N, 1, D)
    inputs = torch.zeros(count, N, 1, D)
    outputs[rows.rows.tokens, rows.rows.experts, 0] = rows.term_outputs
    inputs[rows.rows.tokens, rows.rows.experts, 0] = torch.cat([rows._inputs(each) for each in rows.rows.slices])
    assert (gates > 0).sum(1).eq(K).all()

    def hidden(taken: Tensor) -> Tensor:
        return torch.stack([layer.hidden(taken[:, j, 0], j) for j in range(taken.shape[1])], 1)[:, :, None]

    dense = Observation(rows.weights, rows.mass, rows.output, rows.tokens, rows.mask, None, outputs, inputs, hidden)
    return rows, dense


@pytest.mark.parametrize("config", [CONFIG, SIGMOID, INPUTS])
def test_sums_over_rows_are_those_over_all_tokens_and_experts(config, monkeypatch):
    """As taken from outputs of all experts for all tokens, where each token counts as an input."""
    b, m, dtype = 9, 4, torch.float64
    layer = build(config).moe[0].requires_grad_(False)
    generator = torch.Generator().manual_seed(2)
    x, gap = torch.randn(2, b, m, D, generator=generator)
    index = torch.tensor([0, 2, 3, 7])
    for choose in (lambda part: part, lambda part: part.select(index)):
        rows, dense = map(choose, observe(layer, x))
        target, count = (gap, b) if len(rows.mass) == b else (gap[index], len(index))
        for name in ("weights", "mass", "output", "tokens"):
            assert torch.equal(getattr(rows, name), getattr(dense, name))
        pairs = [
            *zip(rows.term_sums(dtype), dense.term_sums(dtype), strict=True),
            (rows.gram(dtype), dense.gram(dtype)),
        ]
        mean, directions = torch.randn(N, 1, D, generator=generator), torch.randn(D, 4, generator=generator)
        lost, dense_lost = rows.lost(mean, directions), dense.lost(mean, directions)
        pairs.append((rows.gram(dtype, lost), dense.gram(dtype, dense_lost)))
        pairs.append(
            (rows.products(target @ directions, lost, dtype), dense.products(target @ directions, dense_lost, dtype))
        )
        z, of_inputs = torch.randn(count, m, 3, generator=generator), torch.ones(count, 1)
        crosses = torch.zeros(N, 4, 4), torch.zeros(N, 4, 4)
        with_weights = rows.add_cross(z, of_inputs, lost, crosses[0], dtype)
        pairs.append((with_weights, dense.add_cross(z, of_inputs, dense_lost, crosses[1], dtype)))
        pairs.append(crosses)
        near = torch.randn(2, 3, D, generator=generator)
        single = replace(dense, weights=dense.weights.flatten(0, 1)[:, None])
        pairs += zip(*(each.moments([1, 4, 6], *near)[1] for each in (rows, single)), strict=True)
        monkeypatch.setattr(observation, "WORKSPACE", 2 * N * H)  # two inputs at once
        products = []
        for each, b_of in ((rows, of_inputs), (dense, of_inputs.repeat_interleave(m, 0))):
            others = z if each is rows else z.flatten(0, 1)[:, None]
            power = torch.zeros(N * H, N * H, dtype=dtype)
            products.append((power, *each.hidden_products(others, b_of, power)))
        pairs += zip(*products, strict=True)
        for found, expected in pairs:
            torch.testing.assert_close(found.double(), expected.double(), rtol=1e-4, atol=1e-4)


def test_statistics_are_those_of_the_formulas(folder):
    model = moeprune.load(folder / "full.safetensors", FACTORY)
    data = str(folder / "calibration.npz")
    [found, _] = moeprune.analyze(model, data, CPU).layers.values()
    net = build().double()
    x = torch.from_numpy(np.load(data)["inputs"]).double()
    tokens, layer = net.embed(x.flatten(1).unflatten(1, (-1, 4))), net.moe[0]
    top = (tokens @ layer.router_weight.T).topk(K)
    gates = torch.zeros(*tokens.shape[:2], N).double().scatter(2, top.indices, top.values.softmax(-1))
    gate, values = torch.einsum("bmd,ndh->bmnh", tokens, layer.fc1_weight).chunk(2, -1)
    outputs = torch.einsum("bmnh,noh->bmno", values * nn.functional.silu(gate), layer.fc2_weight)
    added, norms = gates[..., None] * outputs, gates * outputs.norm(dim=-1)
    runs = (gates > 0).sum((0, 1))
    mean = added.sum((0, 1)) / gates.sum((0, 1))[:, None]
    around = gates[..., None] * (outputs - mean)
    renormed = added - gates[..., None] * added.sum(2, keepdim=True)
    expected = {
        "mean_mass": gates.mean((0, 1)),
        "term_mean": mean[:, None],
        "deviation": ((gates * (outputs - mean).square().sum(-1)).sum((0, 1)) / gates.sum((0, 1))).sqrt(),
        "frequency": runs / tokens.shape[:2].numel(),
        "reap": norms.sum((0, 1)) / runs,
        "mone": torch.stack(
            [
                (gates[..., j] > 0).double().mean() * outputs[gates[..., j] > 0][:, j].var(0, unbiased=False).sum()
                for j in range(N)
            ]
        ),
        "gram": torch.einsum("bmjo,bmlo->jl", added, added) / len(x),
        "gram_mean": torch.einsum("bmjo,bmlo->jl", around, around) / len(x),
        "gram_renorm": torch.einsum("bmjo,bmlo->jl", renormed, renormed) / len(x),
    }
    for name, tensor in expected.items():
        torch.testing.assert_close(getattr(found, name).double(), tensor.detach().double(), rtol=1e-4, atol=1e-5)
    for signal, scores in {name: getattr(found, name) for name in ("frequency", "reap", "mone", "mean_mass")}.items():
        signal = signal.replace("mean_mass", "combine")
        pruned = moeprune.prune(model, keep=3, signal=signal, compensate="none", data=data, runtime=CPU)
        assert next(iter(pruned.plan.values())).kept == tuple(sorted(scores.topk(3).indices.tolist()))


@pytest.mark.slow
def test_every_compensation_goes_through_analyze_prune_save_load_eval(folder, run_json):
    full, analysis = folder / "full.safetensors", folder / "a.safetensors"
    run_json(f"analyze {full} --data {folder}/calibration.npz -o {analysis} --model {FACTORY} --batch-size 16")
    dense, known = moeprune.load(full, FACTORY), moeprune.load_analysis(analysis)
    inputs = torch.from_numpy(np.load(folder / "test.npz")["inputs"])
    losses = {}
    for compensation in COMPENSATIONS:
        path, rank = folder / f"{compensation}.safetensors", 2 if compensation in LOW_RANK else None
        pruned = moeprune.prune(dense, known, keep="1/2", compensate=compensation, rank=rank, runtime=CPU)
        moeprune.save(pruned, path)
        loaded = moeprune.load(path, FACTORY)
        assert torch.equal(loaded(inputs), pruned(inputs))
        losses[compensation] = float((loaded(inputs) - dense(inputs)).square().mean())
    assert losses["low-rank"] < losses["affine"] < losses["lstsq"] < losses["none"]
    assert losses["renorm-refit"] < losses["renorm"]
    path = folder / "cli.safetensors"
    way = f"--analysis {analysis} --keep 1/2 --compensate renorm-refit --batch-size 16"
    assert run_json(f"prune {full} {way} -o {path} --model {FACTORY}")["model"]["experts_per_input"] == 2 * N // 2
    assert path.read_bytes() == (folder / "renorm-refit.safetensors").read_bytes()
    found = run_json(f"eval {path} --data {folder}/test.npz --baseline {full} --model {FACTORY}")
    assert found["model"]["bytes"] < found["baseline_model"]["bytes"]


def test_auto_tries_what_the_family_can_do(folder, run_json):
    full, path = folder / "full.safetensors", folder / "auto.safetensors"
    found = run_json(f"prune {full} --data {folder}/calibration.npz --keep 1/2 -o {path} --model {FACTORY}")
    tried = {each["compensate"] for each in found["candidates"]}
    assert tried == {"mean", "lstsq", "affine", "renorm-refit", *LOW_RANK}
    assert sum(each["is_chosen"] for each in found["candidates"]) == 1


@pytest.mark.slow
def test_ways_that_keep_too_few_experts_for_a_token_are_left_out(folder, run_json, run):
    full, analysis = folder / "full.safetensors", folder / "c.safetensors"
    run_json(f"analyze {full} --data {folder}/calibration.npz -o {analysis} --model {FACTORY}")
    found = run_json(f"prune {full} --analysis {analysis} --keep 2 -o {folder}/few.safetensors --model {FACTORY}")
    assert {each["compensate"] for each in found["candidates"]} == {"mean", "lstsq", "affine", *LOW_RANK}
    budget = f"--max-size 50% --compensate renorm -o {folder}/budget.safetensors --model {FACTORY}"
    run_json(f"prune {full} --analysis {analysis} {budget}")
    plan = moeprune.load(folder / "budget.safetensors", FACTORY).plan
    assert all(layer.k >= K for layer in plan.values())
    way = f"--sweep 1/4,1/2 --analysis {analysis} --data {folder}/test.npz --signal reap --compensate renorm"
    result = run(f"eval {full} {way} --model {FACTORY} --output-format json")
    assert "left out: static by reap, renorm at 1/4" in result.stderr
    assert {row["keep"] for row in json.loads(result.stdout)["rows"]} == {"1.0", "1/2"}


def test_budgets_keep_equally_many_experts_of_each_group():
    model = moeprune.adopt(build(SIGMOID), (1, 4, 4))
    pruned = moeprune.prune(model, max_size=0.8, compensate="renorm", data=torch.randn(60, 1, 4, 4), runtime=CPU)
    for layer in pruned.plan.values():
        assert len({sum(j // 2 == group for j in layer.kept) for group in range(4)}) == 1


def test_streaming_gives_what_pruning_in_memory_gives(folder, run_json):
    full, analysis = folder / "full.safetensors", folder / "b.safetensors"
    run_json("analyze", full, "--data", folder / "calibration.npz", "-o", analysis, "--model", FACTORY)
    way = f"--analysis {analysis} --keep 4 --signal reap --compensate renorm --one-shot"
    run_json(f"prune {full} {way} -o {folder}/streamed.safetensors")  # no factory: nothing is built
    dense, choice = (
        moeprune.load(full, FACTORY),
        {"keep": 4, "signal": "reap", "compensate": "renorm", "one_shot": True},
    )
    moeprune.save(
        moeprune.prune(dense, moeprune.load_analysis(analysis), **choice, runtime=CPU), folder / "memory.safetensors"
    )
    assert (folder / "streamed.safetensors").read_bytes() == (folder / "memory.safetensors").read_bytes()


def first_layer(config: GatedMoEConfig, compensation: str, samples: int = 200, batch_size: int = 64, **fields):
    """The first layer pruned in memory: it, the dense one, its inputs, and how well it was fitted."""
    model = moeprune.adopt(build(config), (1, 4, 4))
    x = torch.randn(samples, 1, 4, 4, generator=torch.Generator().manual_seed(3))
    plan = {"module.moe.0": LayerPlan("static", 4, N, "combine", compensation, (0, 2, 5, 6), **fields)}
    pruned = apply_plan(model, plan, data=x, runtime=moeprune.Runtime("cpu", batch_size=batch_size))
    tokens = model.module.embed(x.flatten(1).unflatten(1, (-1, 4)))
    [fit] = pruned.details.provenance["fits"].values()
    return pruned.module.moe[0], model.module.moe[0], tokens, fit


def equations(rows: Tensor, targets: Tensor, members: Tensor) -> Equations:
    rows, targets = rows[members].flatten(0, 1).double(), targets[members].flatten(0, 1).double()
    return Equations(rows.mT @ rows, rows.mT @ targets, float(targets.square().sum()))


@torch.no_grad()
@pytest.mark.parametrize("config", [CONFIG, SIGMOID, INPUTS])
def test_a_refit_is_the_ridge_regression_on_what_kept_experts_take(config):
    found, dense, tokens, _ = first_layer(config, "renorm-refit")
    cut = first_layer(config, "renorm-refit")[0]
    cut.fc2_weight.copy_(dense.fc2_weight[[0, 2, 5, 6]])
    if config.bias:
        cut.fc2_bias.copy_(dense.fc2_bias[[0, 2, 5, 6]])
    routing = cut.route(tokens.flatten(0, 1))
    rows = torch.zeros(tokens.shape[:2].numel(), 4, H + config.bias)
    for j in range(4):
        token, place = (routing.chosen == j).nonzero(as_tuple=True)
        gate, taken = routing.gates[token, place][:, None], tokens.flatten(0, 1)[token]
        is_input = config.weigh == "inputs"
        hidden = cut.hidden(taken * gate if is_input else taken, j) * (1 if is_input else gate)
        rows[token, j] = torch.cat([hidden, gate], 1) if config.bias else hidden
    hidden, biases = rows[:, :, :H].flatten(1), rows[:, :, H:].flatten(1)
    rows = torch.cat([hidden, biases], 1).view(*tokens.shape[:2], -1)
    half = half_of(0, len(tokens))
    gap = dense(tokens) - cut(tokens)
    halves = tuple(equations(rows, gap, half == which) for which in (0, 1))
    kinds = [4 * H, 4] if config.bias else [4 * H]
    expected = cut(tokens) + rows @ solve_held_out(halves, kinds).solution.float()
    torch.testing.assert_close(found(tokens), expected, rtol=1e-3, atol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("config", [CONFIG, SIGMOID, INPUTS])
def test_experts_refitted_one_after_the_other_come_close_to_all_at_once(config, monkeypatch):
    _, dense, tokens, fit = first_layer(config, "renorm-refit")
    monkeypatch.setattr(fits, "MAX_REGRESSORS", 0)
    alone, _, _, of_alone = first_layer(config, "renorm-refit")
    error = float((alone(tokens) - dense(tokens)).square().sum() / dense(tokens).square().sum())
    assert error == pytest.approx(of_alone["fitted_error"], rel=1e-3)
    assert 0.7 < of_alone["held_out_error"] / fit["held_out_error"] < 1.5
    others = first_layer(config, "renorm-refit", batch_size=7)[0]
    torch.testing.assert_close(others(tokens), alone(tokens), rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_low_rank_maps_of_full_rank_are_the_best_affine_maps_of_dropped_experts():
    found, dense, tokens, _ = first_layer(CONFIG, "low-rank", samples=2000, rank=D)
    rows, _ = observe(dense, tokens)
    row = 0
    for j in found.plan.columns[found.plan.k :]:
        rank = found.plan.ranks[(1, 3, 4, 7).index(j)]
        maps = (found.low_rank_in[row : row + rank].mT @ found.low_rank_out[row : row + rank]).double()
        row += rank
        mine = rows.rows.slices[j]
        inputs = tokens.flatten(0, 1)[rows.rows.tokens[mine]]
        inputs = torch.cat([inputs - inputs.mean(0), torch.ones(len(inputs), 1)], 1).double()
        weight, outputs = rows.row_weights[mine, None].double(), rows.term_outputs[mine].double()
        best = torch.linalg.lstsq(weight * inputs, weight * outputs, driver="gelsd").solution
        expected, mapped = inputs[:, :D] @ best[:D], inputs[:, :D] @ maps
        assert float((mapped - expected).square().sum() / expected.square().sum()) < 0.01


@torch.no_grad()
@pytest.mark.parametrize("compensation", ["affine", "low-rank", "linear", "renorm-refit"])
def test_a_token_does_not_see_those_after_it(compensation):
    fields = {"rank": 2} if compensation == "low-rank" else {}
    if compensation == "linear":
        model = moeprune.adopt(build(), (1, 4, 4))
        x = torch.randn(50, 1, 4, 4)
        found = moeprune.prune(model, data=x, compensate="linear", runtime=CPU).module.moe[0]
    else:
        found = first_layer(CONFIG, compensation, **fields)[0]
    tokens = torch.randn(3, 6, D)
    torch.testing.assert_close(found(tokens)[:, :4], found(tokens[:, :4]))


def test_equally_many_experts_of_each_group_are_kept():
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        part = torch.randn(12, 5, generator=generator)
        gram, scores = part @ part.mT, torch.rand(12, generator=generator)
        kept = best_kept(gram, 12, 6, groups=3)
        in_groups = [[j for j in kept if j // 4 == group] for group in range(3)]
        assert [len(each) for each in in_groups] == [2, 2, 2]

        def error(kept, gram=gram):
            dropped = [j for j in range(12) if j not in kept]
            return float(gram[dropped][:, dropped].sum())

        swaps = [{*kept} - {out} | {into} for out in kept for into in range(12) if out // 4 == into // 4]
        assert all(error(kept) <= error(swap) + 1e-4 for swap in swaps if len(swap) == 6)
        best = [
            j
            for group in range(3)
            for j in sorted((scores[group * 4 : group * 4 + 4].topk(2).indices + 4 * group).tolist())
        ]
        assert best_by_score(scores, 6, 3) == tuple(best)


@pytest.mark.parametrize("signal", ["gram", "reap", "combine", "random"])
def test_groups_of_a_cut_router_stay_equal(signal):
    model = moeprune.adopt(build(SIGMOID), (1, 4, 4))
    pruned = moeprune.prune(
        model, keep=4, signal=signal, compensate="renorm", data=torch.randn(60, 1, 4, 4), runtime=CPU
    )
    for layer in pruned.plan.values():
        assert [j // 2 for j in layer.kept] == [0, 1, 2, 3]
    with pytest.raises(moeprune.MoepruneError, match="equally many of each group"):
        moeprune.prune(model, keep=5, compensate="renorm", data=torch.randn(60, 1, 4, 4), runtime=CPU)


def test_signals_of_choices_are_refused_where_all_tokens_run_all_experts(single):
    with pytest.raises(moeprune.MoepruneError, match="by signal combine or deviation or gram or random only"):
        moeprune.prune(single, keep=2, signal="reap", data="digits", runtime=CPU)
    with pytest.raises(moeprune.MoepruneError, match=r"frequency.* needs one set of experts"):
        moeprune.prune(single, keep=2, scope="input", signal="frequency", data="digits", runtime=CPU)
