"""What a model holds in memory: of a mapped checkpoint the pages that are used, and activations."""

import json
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import moeprune
from moeprune.calibration.sums import CROSS, Contributions, RegressionSums
from moeprune.layers import observation
from moeprune.layers.config import SoftMoEConfig
from moeprune.layers.soft_moe import SoftMoE
from moeprune.layers.surgery import Calibrated, prune_layer
from moeprune.models.architecture import BlockConfig, ViTConfig
from moeprune.models.vit import SoftMoEViT
from moeprune.plan import LayerPlan
from tests.endings import PATIENCE
from tests.peers import has

MIB = 1 << 20
RESIDENT = """
import json, sys
import torch
import moeprune
from memory import resident

model = moeprune.load(sys.argv[1])
[layer] = model.moe_layers.values()
seen, rows = [], [(0, resident(sys.argv[1]))]
layer.observer = lambda observation: seen.append(observation.chosen)
torch.manual_seed(0)
with torch.inference_mode():
    for _ in range(3):
        model(torch.randn(1, 3, 32, 32))
        rows.append((len(torch.cat(seen).unique()), resident(sys.argv[1])))
print(json.dumps(rows))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_routed_model_holds_only_the_experts_that_inputs_chose(tmp_path):
    torch.manual_seed(0)
    config = SoftMoEConfig(256, 64, 1, 1024)
    model = SoftMoEViT(ViTConfig((32, 32), (8, 8), 3, 10, 256, 4, (BlockConfig(soft_moe=config),)))
    model.blocks[0].soft_moe.scale.data.fill_(8)
    path = tmp_path / "model.safetensors"
    moeprune.save(moeprune.prune(model, keep=2, scope="input", signal="combine", compensate="none"), path)
    call, benchmarks = [sys.executable, "-c", RESIDENT, path], Path(__file__).parent / "benchmarks"
    rows = json.loads(subprocess.check_output(call, text=True, timeout=PATIENCE, cwd=benchmarks))
    expert = 2 * config.dim * config.hidden_dim * 4
    rest = path.stat().st_size - config.num_experts * expert
    for distinct, resident in rows:
        # An expert lies in two places, in each of which what the system maps at once, 2 MiB perhaps,
        # may begin before it and end after it.
        assert distinct * expert <= resident <= distinct * (expert + 2 * 2 * 2 * MIB) + rest + 4 * MIB
    assert 3 < rows[-1][0] < config.num_experts // 2


class PeakBytes(TorchDispatchMode):
    """The most bytes that tensors made meanwhile held at once."""

    def __init__(self):
        super().__init__()
        self.live, self.peak, self.known = 0, 0, weakref.WeakSet()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        given = {id(t.untyped_storage()) for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        for tensor in tree_leaves(found):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if id(storage) not in given and storage not in self.known:
                    self.known.add(storage)
                    self.live += storage.nbytes()
                    weakref.finalize(storage, self._freed, storage.nbytes())
        self.peak = max(self.peak, self.live)
        return found

    def _freed(self, nbytes):
        self.live -= nbytes


def peak_bytes(layer, x) -> int:
    with torch.no_grad(), PeakBytes() as peak:
        layer(x)
    return peak.peak


def test_peak_bytes_counts_what_lives_at_once():
    x = torch.zeros(1000)
    with PeakBytes() as peak:
        for _ in range(3):
            y = (x + 1) * 2
            del y
    assert peak.peak == 8000


@pytest.mark.parametrize("scope", ["static", "input"])
def test_weights_are_used_where_they_lie(scope):
    """Nothing as large as one expert is made."""
    config = SoftMoEConfig(64, 4, 1, 8192)
    kept = (0, 1) if scope == "static" else None
    layer = prune_layer(SoftMoE(config).eval(), LayerPlan(scope, 2, 4, "combine", "none", kept))
    assert peak_bytes(layer, torch.randn(1, 8, 64)) < layer.fc1_weight[0].nbytes / 4


@pytest.mark.slow
@pytest.mark.parametrize(
    "compensation", [*(pytest.param(name, marks=pytest.mark.slow) for name in ("none", "renorm")), "mean"]
)
def test_activations_of_a_pruned_layer_are_no_more_than_the_dense_layers(compensation):
    config = SoftMoEConfig(384, 128, 1, 1536)  # of a ViT-S
    dense, x = SoftMoE(config).eval(), torch.randn(32, 196, 384)
    full = peak_bytes(dense, x)
    for scope, kept in (("input", None), ("batch", None), ("static", tuple(range(16)))):
        plan = LayerPlan(scope, 16, 128, "combine", compensation, kept)
        assert peak_bytes(prune_layer(dense, plan, Calibrated(None, torch.zeros(128, 1, 384))), x) <= full


def test_sums_for_choosing_grow_neither_with_the_width_of_the_output_nor_without_bound_with_experts():
    def nbytes(n: int, out: int) -> int:
        layer = SoftMoE(SoftMoEConfig(64, n, 1, 2, out_dim=out))
        return Contributions(layer, torch.zeros(n, 1, out)).cross.nbytes

    assert nbytes(16, 512) == nbytes(16, 1024) < nbytes(16, 16) * 512 / 16
    assert nbytes(1024, 512) <= CROSS


def test_a_refit_never_holds_hidden_units_of_all_tokens(monkeypatch):
    """Their products are summed up a few inputs at a time."""
    monkeypatch.setattr(observation, "WORKSPACE", 2**14)
    b, m, k, h = 256, 16, 16, 32
    config = SoftMoEConfig(16, 20, 1, h)
    plan = LayerPlan("static", k, 20, "combine", "refit", tuple(range(k)))
    layer = prune_layer(SoftMoE(config).eval(), plan, Calibrated(None, torch.zeros(20, 1, 16)))
    seen = []
    layer.observer = seen.append
    with torch.no_grad():
        layer(torch.randn(b, m, 16))
    regression = RegressionSums(layer.regressor_kinds(), 16, torch.device("cpu"))
    with torch.no_grad(), PeakBytes() as peak:
        regression.add(seen[0], torch.zeros(b, m, 16))
    assert peak.peak < 4 * b * m * k * h / 2


@pytest.mark.skipif(not has("soft_moe"), reason="soft-moe is not installed")
def test_foreign_checkpoints_hold_the_weights_stacked_and_one_copy_in_float64(tmp_path):
    from soft_moe import SoftMoEVisionTransformer

    theirs = SoftMoEVisionTransformer(
        img_size=16, patch_size=8, embed_dim=64, depth=2, num_heads=2, num_classes=10, mlp_ratio=16,
        moe_layer_index=1, num_experts=32, slots_per_expert=1,
    )  # fmt: skip
    path, ours, back = tmp_path / "theirs.pt", tmp_path / "ours.safetensors", tmp_path / "back.pt"
    torch.save(theirs.state_dict(), path)
    with PeakBytes() as peak:
        moeprune.save(moeprune.load(path, num_heads=2, global_pool="avg"), ours)
    assert peak.peak < 3.3 * path.stat().st_size
    with PeakBytes() as peak:
        moeprune.export(moeprune.load(ours), back, "soft-moe")
    assert peak.peak < 3.3 * path.stat().st_size


@pytest.mark.skipif(not has("soft_moe_pytorch"), reason="soft-moe-pytorch is not installed")
def test_adopting_a_model_holds_the_weights_stacked_and_one_copy_in_float64(tmp_path):
    from soft_moe_pytorch import SoftMoE as Theirs

    def build():
        return torch.nn.Sequential(
            torch.nn.Flatten(2), Theirs(64, num_slots=1, num_experts=16, expert_mult=16), torch.nn.Flatten()
        )

    path = tmp_path / "theirs.pt"
    torch.save(build().state_dict(), path)
    with PeakBytes() as peak:
        moeprune.save(moeprune.load(path, build, input_shape=(3, 8, 8)), tmp_path / "ours.safetensors")
    assert peak.peak < 3.3 * path.stat().st_size
