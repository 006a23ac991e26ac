"""Weights that stay on disk (`--offload`): the same results, with one layer at a time in memory."""

import json
import shutil
from collections import Counter

import pytest
import torch
from safetensors.torch import save_file

import moeprune
from moeprune.calibration import walk
from moeprune.errors import MoepruneError
from moeprune.models import offload
from moeprune.models.model import fingerprint, private_copy
from moeprune.models.reading import Reader
from tests.architectures import CASES, language_model, saved_models, tensors_of
from tests.test_quantised_folders import in_fp8, in_mxfp4

pytest.importorskip("transformers")
TOKENS = torch.arange(3, 27).view(2, 12)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folder of a small model of an architecture."""
    return saved_models(tmp_path_factory)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A file of token ids."""
    path = tmp_path_factory.mktemp("text") / "ids.safetensors"
    save_file({"input_ids": torch.randint(64, (20, 16), generator=torch.Generator().manual_seed(1))}, path)
    return path


@pytest.fixture
def most_held(monkeypatch):
    """The most elements of each kind of parts that were in memory at once."""
    most, give = dict.fromkeys(offload.ROOM, 0), offload.Part.give

    def counted(part, *arguments):
        give(part, *arguments)
        for kind, held in part.store.held.items():
            sizes = [sum(tensor.numel() for tensor in each.tensors.values()) for each in held]
            most[kind] = max(most[kind], sum(sizes))

    monkeypatch.setattr(offload.Part, "give", counted)
    return most


@pytest.fixture
def times_read(monkeypatch):
    """How often each part of a folder was read."""
    times, read = Counter(), Reader.read
    monkeypatch.setattr(Reader, "read", lambda reader, part: (times.update([part]), read(reader, part))[1])
    return times


ALWAYS = ("deepseek_v3", "gpt_oss", "qwen3_next")
OTHERS = [pytest.param(name, marks=pytest.mark.slow) for name in CASES if name not in ALWAYS]


@pytest.mark.parametrize("name", [*ALWAYS, *OTHERS])
def test_a_model_computes_the_same_with_its_weights_on_disk(name, folder):
    here, there = moeprune.load(folder(name)), moeprune.load(folder(name), offload=True)
    assert all(tensor.is_meta for layer in there.moe_layers.values() for tensor in layer.parameters())
    with torch.no_grad():
        assert torch.equal(there(TOKENS), here(TOKENS))
    assert fingerprint(there) == fingerprint(here)
    assert there.cost() == here.cost()
    assert {k: (t.shape, t.dtype) for k, t in there.state_dict().items()} == {
        k: (t.shape, t.dtype) for k, t in here.state_dict().items()
    }


def test_quantised_weights_are_read_from_disk_too(tmp_path):
    for source in (in_fp8(tmp_path, "minimax_m2", (12, 10))[0], in_mxfp4(tmp_path / "mxfp4")):
        with torch.no_grad():
            assert torch.equal(moeprune.load(source, offload=True)(TOKENS), moeprune.load(source)(TOKENS))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options"),
    [("qwen2_moe", ("--keep", "1/2")), pytest.param("deepseek_v3", ("--width", "1/2"), marks=pytest.mark.slow)],
)
def test_commands_give_the_same_with_weights_on_disk(name, options, folder, data, run, run_json, tmp_path):
    source, results = folder(name), {}
    for kind, extra in (("here", ()), ("there", ("--offload",))):
        (tmp_path / kind).mkdir()
        analysis, pruned = tmp_path / kind / "analysis.safetensors", tmp_path / kind / "pruned"
        shared = ("--data", data, *extra, "--batch-size", "16")
        found = [run_json("analyze", source, *shared, "-o", analysis)]
        found.append(run_json("prune", source, *shared, *options, "-o", pruned))
        found.append(run_json("eval", pruned, *shared, "--baseline", source))
        results[kind] = json.loads(json.dumps(found).replace(str(tmp_path / kind), ""))
        analysis.rename(tmp_path / f"{kind}.safetensors")
    assert results["here"] == results["there"]
    files = [file.relative_to(tmp_path / "here") for file in (tmp_path / "here").rglob("*") if file.is_file()]
    assert len(files) > 4
    for file in files:
        assert (tmp_path / "here" / file).read_bytes() == (tmp_path / "there" / file).read_bytes(), file
    assert (tmp_path / "here.safetensors").read_bytes() == (tmp_path / "there.safetensors").read_bytes()


@pytest.mark.mostly_slow(1)
@pytest.mark.parametrize("held", [walk.HELD, 0])
def test_one_layer_at_a_time_is_in_memory_and_few_are_read_again(
    held, data, most_held, times_read, monkeypatch, tmp_path
):
    """Passes wait, or they begin anew where they were: then too all batches reach a layer before the next is read."""
    monkeypatch.setattr(walk, "HELD", held)
    language_model("qwen2_moe", num_hidden_layers=3).save_pretrained(tmp_path / "full")
    model = moeprune.load(tmp_path / "full", offload=True)
    runtime = moeprune.Runtime(batch_size=4)
    pruned = moeprune.prune(model, data=str(data), keep="1/2", compensate="renorm-refit", runtime=runtime)
    assert len(times_read) == 6
    assert max(times_read.values()) <= 2  # for the fingerprint, and for the five batches
    layer = sum(tensor.numel() for tensor in next(iter(model.moe_layers.values())).parameters())
    assert most_held["experts"] == layer
    assert most_held["pruned"] < 0.51 * layer
    times_read.clear()
    moeprune.analyze(model, str(data), runtime)
    assert max(times_read.values()) <= 7  # for the statistics, to leave out experts, and with each batch of six models
    assert most_held["experts"] == layer
    everything = sum(tensor.numel() for tensor in model.state_dict().values())
    assert most_held["rest"] < (everything - 3 * layer) / 1.2
    here = moeprune.prune(
        tmp_path / "full", data=str(data), keep="1/2", compensate="renorm-refit", runtime=runtime.replace(offload=False)
    )
    with torch.no_grad():
        assert torch.equal(pruned(TOKENS), here(TOKENS))
        assert torch.equal(private_copy(pruned)(TOKENS), here(TOKENS))
    moeprune.save(pruned, tmp_path / "there")
    moeprune.save(here, tmp_path / "here")
    before, after = tensors_of(tmp_path / "here"), tensors_of(tmp_path / "there")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_model_on_disk_is_not_converted(folder):
    model = moeprune.load(folder("qwen3_moe"), offload=True)
    with pytest.raises(MoepruneError, match="have one type"):
        model.double()
    with torch.no_grad():
        assert model.to("cpu").float()(TOKENS).dtype == torch.float32


def test_what_has_no_layers_to_read_is_refused(run, data, folder, tmp_path):
    save_file({"weight": torch.ones(2)}, tmp_path / "model.safetensors")
    for command in (("analyze", "-o", tmp_path / "out"), ("prune", "--keep", "1/2", "-o", tmp_path / "out"), ("eval",)):
        found = run(command[0], tmp_path / "model.safetensors", *command[1:], "--data", "digits", "--offload")
        assert (found.code, "goes with folders of transformers" in found.stderr) == (2, True), found.stderr
    found = run("eval", folder("qwen3_moe"), "--data", data, "--offload", "--latency")
    assert (found.code, "does not go with `--offload`" in found.stderr) == (2, True), found.stderr
    runtime = moeprune.Runtime("cpu", offload=True)
    with pytest.raises(MoepruneError, match="`latency` does not go with `offload`"):
        moeprune.evaluate(folder("qwen3_moe"), data, runtime=runtime, latency_batches=(1,))
    source = shutil.copytree(folder("qwen3_moe"), tmp_path / "full")
    tensors = tensors_of(source)
    del tensors["model.layers.1.self_attn.k_proj.weight"]
    for file in source.glob("model*"):
        file.unlink()
    save_file(tensors, source / "model.safetensors")
    found = run("prune", source, "--data", data, "--keep", "1/2", "--offload", "-o", tmp_path / "pruned")
    assert (found.code, "lacks tensors" in found.stderr, "k_proj" in found.stderr) == (2, True, True), found.stderr
    with pytest.raises(MoepruneError, match="lacks tensors"):
        moeprune.load(source)
    assert not (tmp_path / "pruned").exists()
