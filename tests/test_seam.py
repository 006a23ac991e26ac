"""The seam between layers and the rest: a second family, token-gated, goes through everything.

y = sum over j of g_j(x)·f_j(x), with g the softmax of x·router and f_j(x) = W_j·tanh(x) + b_j.
"""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import moeprune
from moeprune.calibration.sums import Contributions, half_of, lost_gram
from moeprune.layers.config import register
from moeprune.layers.interface import LayerConfig, Shapes
from moeprune.layers.layer import MoELayer
from moeprune.layers.observation import Observation
from moeprune.plan import Positive
from moeprune.records import Record
from tests.test_contributions import chosen_ridges, held_out_error, regressors
from tests.test_ridge import scale_of_kinds

D, N, CLASSES = 6, 8, 3
FACTORY = "tests.test_seam:build"
CPU = moeprune.Runtime("cpu", batch_size=16)


class GatesConfig(LayerConfig, Record, frozen=True, tag_field="family", tag="dense_gates"):
    """Dense softmax gates."""

    dim: Positive
    num_experts: Positive

    @property
    def output_width(self) -> int:
        return self.dim

    expert_width = output_width

    @property
    def scopes(self) -> tuple[str, ...]:
        return ("static",)

    def router_shapes(self, num_experts: int) -> Shapes:
        return {"router": (self.dim, num_experts)}

    def expert_shapes(self, num_experts: int) -> Shapes:
        return {"fc2_weight": (num_experts, self.dim, self.dim), "fc2_bias": (num_experts, self.dim)}

    def router_axis(self, tensor: str) -> int | None:
        return {"router": 1}.get(tensor)

    def router_flops(self, tokens: int, routed: int, running: float) -> float:
        return 2 * tokens * self.dim * routed

    def expert_flops(self, tokens: int, running: float) -> float:
        return 2 * tokens * running * self.dim**2


class Gates(MoELayer):
    def forward(self, x: Tensor) -> Tensor:
        gates = (x @ self.router).softmax(-1)[..., None]  # (b,m,n,1)
        outputs = torch.einsum("bmd,jod->bmjo", x.tanh(), self.fc2_weight) + self.fc2_bias
        added = (gates[:, :, : outputs.shape[2]] * outputs).sum(2)
        output = self.compensated(added, x, gates, None)
        of_tokens = outputs.flatten(0, 1)[:, :, None]  # (b·m,n,1,o)
        self.observe(lambda: Observation(gates, gates.mean((1, 3)), output, x, None, None, of_tokens))
        return output


register(GatesConfig, Gates)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(4, D)
        self.moe = nn.ModuleList(Gates(GatesConfig(D, N)) for _ in range(2))
        self.head = nn.Linear(D, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.embed(x.flatten(1).unflatten(1, (-1, 4)))
        for layer in self.moe:
            tokens = tokens + layer(tokens)
        return self.head(tokens.mean(1))


def build() -> nn.Module:
    torch.manual_seed(0)
    net = Net()
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=1.0 if parameter.ndim == 2 else 0.5)
    return net


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The model as a checkpoint, and labelled data: the model's own predictions."""
    path = tmp_path_factory.mktemp("gates")
    inputs = torch.randn(256, 1, 4, 4, generator=torch.Generator().manual_seed(1))
    labels = build()(inputs).argmax(1)
    for name, part in (("calibration", slice(0, 192)), ("test", slice(192, 256))):
        np.savez(path / f"{name}.npz", inputs=inputs[part].numpy(), labels=labels[part].numpy())
    moeprune.save(moeprune.adopt(build(), (1, 4, 4), FACTORY), path / "full.safetensors")
    return path


def test_statistics_are_those_of_the_formulas(folder):
    model = moeprune.load(folder / "full.safetensors", FACTORY)
    analysis = moeprune.analyze(model, str(folder / "calibration.npz"), CPU)
    net = build().double()
    x = torch.from_numpy(np.load(folder / "calibration.npz")["inputs"]).double()
    tokens = net.embed(x.flatten(1).unflatten(1, (-1, 4)))
    layer = net.moe[0]
    gates = (tokens @ layer.router).softmax(-1)
    outputs = torch.einsum("bmd,jod->bmjo", tokens.tanh(), layer.fc2_weight) + layer.fc2_bias
    added = gates[..., None] * outputs
    [statistics, _] = analysis.layers.values()
    expected = {
        "mean_mass": gates.mean((0, 1)),
        "term_mean": (added.sum((0, 1)) / gates.sum((0, 1))[:, None])[:, None],
        "gram": torch.einsum("bmjo,bmlo->jl", added, added) / len(x),
    }
    beside = gates[..., None] * (outputs - expected["term_mean"][:, 0])
    expected["gram_mean"] = torch.einsum("bmjo,bmlo->jl", beside, beside) / len(x)
    for name, tensor in expected.items():
        torch.testing.assert_close(getattr(statistics, name).double(), tensor, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("compensation", ["lstsq", "affine"])
def test_errors_of_regressions_are_those_on_the_rows_of_the_other_half(compensation):
    """Each token has outputs of its own."""
    layer = build().double().moe[0].requires_grad_(False)
    b, m = 50, 4
    generator = torch.Generator().manual_seed(2)
    x, gap = torch.randn(2, b, m, D, generator=generator, dtype=torch.float64)
    seen, gap = observe(layer, x), 0.1 * gap
    mean = seen.term_outputs.mean(0) / 2
    halves = Contributions(layer, mean), Contributions(layer, mean)
    for which, half in enumerate(halves):
        members = (half_of(0, b) == which).nonzero().flatten()
        half.add(seen.select(members), gap[members])
    gram = lost_gram(*halves, compensation)
    beside = (seen.term_outputs - mean).view(b, m, N, D)
    parts = torch.cat([(seen.weights * beside).movedim(2, 0), gap[None]]).numpy()
    rows, kinds, groups = regressors(seen, compensation)
    ridges, scale = chosen_ridges(rows, kinds, groups, parts.sum(0)), scale_of_kinds(rows.reshape(b * m, -1), kinds)
    for dropped in ([0, N], [1, 3, 5, N], [*range(N + 1)]):
        expected = held_out_error(rows, parts[dropped].sum(0), ridges, scale)
        assert float(gram[dropped][:, dropped].sum()) == pytest.approx(expected, rel=1e-4)


def observe(layer, x: Tensor) -> Observation:
    seen: list[Observation] = []
    layer.observer = seen.append
    layer(x)
    layer.observer = None
    return seen[0]


def test_every_compensation_goes_through_analyze_prune_save_load_eval(folder, run_json):
    full, analysis = folder / "full.safetensors", folder / "a.safetensors"
    run_json(f"analyze {full} --data {folder}/calibration.npz -o {analysis} --model {FACTORY}")
    dense = moeprune.load(full, FACTORY)
    inputs = torch.from_numpy(np.load(folder / "test.npz")["inputs"])
    losses = {}
    for compensation in ("none", "mean", "lstsq", "affine"):
        path = folder / f"{compensation}.safetensors"
        way = f"--analysis {analysis} --keep 1/2 --signal gram --compensate {compensation}"
        assert run_json(f"prune {full} {way} -o {path} --model {FACTORY}")["model"]["experts_per_input"] == 2 * N // 2
        found = run_json(f"eval {path} --data {folder}/test.npz --baseline {full} --model {FACTORY}")
        assert found["model"]["bytes"] < found["baseline_model"]["bytes"] or compensation == "affine"
        loaded = moeprune.load(path, FACTORY)
        choice = {"keep": "1/2", "signal": "gram", "compensate": compensation}
        in_memory = moeprune.prune(dense, moeprune.load_analysis(analysis), **choice, runtime=CPU)
        torch.testing.assert_close(loaded(inputs), in_memory(inputs), rtol=1e-4, atol=1e-4)
        losses[compensation] = float((loaded(inputs) - dense(inputs)).square().mean())
    assert losses["affine"] < losses["lstsq"] < losses["mean"] < losses["none"]


def test_streaming_gives_what_pruning_in_memory_gives(folder, run_json):
    full, analysis = folder / "full.safetensors", folder / "b.safetensors"
    run_json("analyze", full, "--data", folder / "calibration.npz", "-o", analysis, "--model", FACTORY)
    way = f"--analysis {analysis} --keep 3 --compensate mean --one-shot"
    run_json(f"prune {full} {way} -o {folder}/streamed.safetensors")  # no factory: nothing is built
    dense, choice = moeprune.load(full, FACTORY), {"keep": 3, "compensate": "mean", "one_shot": True}
    pruned = moeprune.prune(dense, moeprune.load_analysis(analysis), **choice, runtime=CPU)
    moeprune.save(pruned, folder / "memory.safetensors")
    assert (folder / "streamed.safetensors").read_bytes() == (folder / "memory.safetensors").read_bytes()


def test_what_the_family_cannot_do_is_refused(folder):
    model = moeprune.load(folder / "full.safetensors", FACTORY)
    with pytest.raises(moeprune.MoepruneError, match="scope"):
        moeprune.prune(model, keep=2, scope="input")
    data = str(folder / "calibration.npz")
    for compensate in ("refit", "renorm-refit", "low-rank", "merge"):
        possible = "can be compensated by `none`, `renorm`, `mean`, `lstsq`, `affine`, the plan has"
        with pytest.raises(moeprune.MoepruneError, match=f"{possible} `{compensate}`"):
            moeprune.prune(model, keep=2, compensate=compensate, data=data, runtime=CPU)


def test_auto_tries_what_the_family_can_do(folder, run_json):
    full, path = folder / "full.safetensors", folder / "auto.safetensors"
    found = run_json(f"prune {full} --data {folder}/calibration.npz --keep 1/2 -o {path} --model {FACTORY}")
    assert {each["compensate"] for each in found["candidates"]} == {"mean", "lstsq", "affine"}
    assert sum(each["is_chosen"] for each in found["candidates"]) == 1
