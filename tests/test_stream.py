"""What pruned layers break in the stream that later layers add to: the targets of fits make up for it."""

from unittest.mock import patch

import pytest
import torch
from torch import Tensor

import moeprune
from moeprune.calibration import walk as walk_module
from moeprune.calibration.walk import Walk, drawn, factor_of_stream
from moeprune.layers.config import SoftMoEConfig
from moeprune.layers.surgery import prune_layer
from moeprune.models.architecture import BlockConfig, ViTConfig
from moeprune.models.model import private_copy
from moeprune.models.vit import SoftMoEViT
from moeprune.plan import LayerPlan
from moeprune.pruning import compensation as compensation_module
from tests.architectures import CASES, language_model
from tests.test_soft_moe import relative_error

CPU = moeprune.Runtime("cpu", batch_size=4)
IDS = torch.randint(3, 64, (10, 17), generator=torch.Generator().manual_seed(1))
FACTOR = 0.22
ALWAYS = ("granitemoe", "qwen2_moe")


def first_pruned(walk: Walk) -> str:
    """Prune the first layer to a few experts; return the name of the next."""
    assert walk.pruned is not None
    name, after = walk.full.moe_layers
    layer = walk.reach(name).layer
    n = layer.config.num_experts
    plan = LayerPlan("static", 2, n, "reap", "none", (1, 6))
    walk.pruned.set_submodule(name, prune_layer(layer, plan))
    return after


@torch.no_grad()
def stream_of(model, ids: Tensor) -> Tensor:
    """What the last layer of the decoder gives."""
    seen: list[Tensor] = []
    handle = model.get_submodule(model.sequence[-1]).register_forward_hook(lambda _, args, output: seen.append(output))
    model(ids)
    handle.remove()
    return seen[0]


@pytest.mark.parametrize("held", [walk_module.HELD, 0], ids=["kept", "anew"])
@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize(
    "name", [*ALWAYS, *(pytest.param(name, marks=pytest.mark.slow) for name in CASES if name not in ALWAYS)]
)
def test_gaps_are_what_the_stream_lacks_behind_a_layer(name, offload, held, monkeypatch, tmp_path):
    """In parts of what the layer gives: Granite adds a multiple of it."""
    changes = {"residual_multiplier": FACTOR} if name == "granitemoe" else {}
    changes |= {"first_k_dense_replace": 0} if name == "deepseek_v3" else {}
    language_model(name, **changes).save_pretrained(tmp_path)
    monkeypatch.setattr(walk_module, "HELD", held)
    model = moeprune.load(tmp_path, offload=offload)
    full, pruned = private_copy(model), private_copy(model)
    data = moeprune.open_data(IDS, model.input_format)
    with Walk(full, pruned, data, CPU) as walk:
        stage = walk.reach(first_pruned(walk), with_stream=True)
        assert stage.has_stream
        found = torch.cat([gap.whole for _, _, gap in stage.observe()])
    factor = FACTOR if name == "granitemoe" else 1.0
    lacking = stream_of(model, IDS) - stream_of(pruned, IDS)
    assert float(lacking.norm()) > 0.01
    assert relative_error(factor * found, lacking) < 1e-4


def test_the_first_layer_that_is_pruned_lacks_nothing(tmp_path):
    language_model("qwen2_moe").save_pretrained(tmp_path)
    model = moeprune.load(tmp_path)
    with Walk(private_copy(model), private_copy(model), moeprune.open_data(IDS, model.input_format), CPU) as walk:
        assert not walk.reach(next(iter(model.moe_layers)), with_stream=True).has_stream


@pytest.mark.parametrize("ways", [{"compensate": "renorm-refit"}, {"signal": "reap", "compensate": "renorm"}])
def test_layers_of_a_decoder_may_give_more_than_the_stream(ways, tmp_path):
    """Those of GLM-5 give pairs."""
    changes = {
        **CASES["deepseek_v3"], "q_lora_rank": 16, "index_topk": 64, "index_n_heads": 2, "index_head_dim": 16,
        "num_hidden_layers": 3, "first_k_dense_replace": 0, "mlp_layer_types": ["sparse"] * 3, "n_group": 1,
    }  # fmt: skip
    with patch.dict(CASES, glm_moe_dsa=changes):
        language_model("glm_moe_dsa").save_pretrained(tmp_path)
    model = moeprune.load(tmp_path)
    pruned = moeprune.prune(model, data=IDS, keep=4, runtime=CPU, **ways)
    assert pruned(IDS).isfinite().all()


def test_what_is_padded_in_a_layer_is_no_stream():
    """Dynamic slots: four tokens are five in a layer of five experts."""
    moe = SoftMoEConfig(12, 5, slots_per_expert=1, hidden_dim=6, dynamic_slots=True, router_norm="rms")
    blocks = (BlockConfig(soft_moe=moe),) * 2
    model = SoftMoEViT(ViTConfig((8, 8), (4, 4), 1, 7, dim=12, num_heads=3, blocks=blocks)).eval()
    data = torch.randn(20, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    for compensate in ("mean", "affine"):
        pruned = moeprune.prune(model, data=data, keep=2, scope="input", signal="combine", compensate=compensate)
        assert pruned(data).isfinite().all()


@pytest.mark.slow
@pytest.mark.parametrize("most", [4096, 0], ids=["jointly", "expert by expert"])
def test_errors_on_other_inputs_are_predicted(most, monkeypatch, tmp_path):
    monkeypatch.setattr(compensation_module, "MAX_REGRESSORS", most)
    language_model("qwen3_moe", num_hidden_layers=4).save_pretrained(tmp_path)
    model = moeprune.load(tmp_path)
    ids = torch.randint(3, 64, (260, 16), generator=torch.Generator().manual_seed(3))
    pruned = moeprune.prune(model, data=ids[:60], keep=4, compensate="renorm-refit", runtime=CPU)
    shift = moeprune.evaluate(pruned, ids[60:], model, CPU).shift
    assert len(shift) == 4
    for name, layer in shift.items():
        assert layer.error == pytest.approx(layer.predicted_error, rel=0.15), name


def test_a_factor_is_known_where_a_layer_is_added_to_the_stream_and_nowhere_else():
    stream = 3 * torch.randn(4, 9, 8, generator=torch.Generator().manual_seed(2))
    noise = drawn(torch.zeros_like(stream))

    def factor(with_noise: Tensor, dtype: torch.dtype = torch.float32) -> float | None:
        return factor_of_stream(stream.to(dtype), with_noise.to(dtype))

    assert factor(stream + noise) == pytest.approx(1)
    assert factor(stream - 0.22 * noise) == pytest.approx(-0.22)
    assert factor(stream + noise, torch.bfloat16) == pytest.approx(1, rel=1e-2)
    normalized = noise / noise.square().mean(-1, keepdim=True).sqrt()
    for other in (
        stream,
        stream + normalized,
        stream + noise * torch.linspace(0.5, 1.5, 8),
        stream + noise.flip(1),
        torch.nn.functional.gelu(stream + noise),
    ):
        assert factor(other) is None
