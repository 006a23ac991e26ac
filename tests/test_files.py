"""Files of moeprune's own: tensors, fingerprints, and writing all of a file or none of it."""

import errno
import os
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from safetensors.torch import load_file, save_file

import moeprune
from moeprune.errors import MoepruneError
from moeprune.files import checkpoint, disk
from moeprune.files.checkpoint import Copied
from moeprune.files.disk import replacing, write_file
from moeprune.files.header import read_header
from moeprune.models.model import fingerprint, private_copy
from moeprune.models.opening import open_model
from moeprune.models.request import ModelSpec
from tests.endings import PATIENCE
from tests.stock import SOURCE_ARGS

MIB = 1 << 20
LAYER = "blocks.0.soft_moe.fc1_weight"


def tensors_of_all_types() -> dict[str, torch.Tensor]:
    return {
        "b": torch.randn(3, 2).half(), "a": torch.randn(2, 2), "c": torch.zeros(0, 2), "é": torch.arange(3),
        "flag": torch.tensor([True, False]), "scalar": torch.tensor(1.5), "d": torch.randn(4).double(),
        "bf": torch.randn(5).bfloat16(), "int": torch.arange(4, dtype=torch.int32), "u": torch.ones(1).byte(),
        "view": torch.randn(4, 6).t()[::2], "complex": torch.randn(2, dtype=torch.complex64),
    }  # fmt: skip


def test_what_is_written_is_what_the_library_reads_and_copies_are_equal(tmp_path):
    tensors = tensors_of_all_types()
    old, new = tmp_path / "old.safetensors", tmp_path / "new.safetensors"
    checkpoint.write(old, tensors, {"ü": 1, "x": 'é\n\u2028"\\'})
    header = read_header(old)
    assert header.metadata == {"ü": 1, "x": 'é\n\u2028"\\'}
    checkpoint.write(new, {name: Copied(header, name) for name in reversed(tensors)}, header.metadata)
    assert new.read_bytes() == old.read_bytes()
    for found in (load_file(old), checkpoint.read_tensors(header)):
        assert found.keys() == tensors.keys()
        assert all(torch.equal(found[name], tensors[name]) for name in tensors)
    for name, offset in header.offsets.items():
        assert offset % tensors[name].element_size() == 0


def test_files_of_one_type_are_those_of_the_library(tmp_path):
    tensors = {name: torch.randn(3, 2) for name in "ba"}
    checkpoint.write(tmp_path / "a", tensors, None)
    save_file(tensors, tmp_path / "b", {"format": "pt"})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_tensors_that_share_memory(tmp_path):
    tied = torch.randn(3)
    checkpoint.write(tmp_path / "x", {"a": tied, "b": tied}, None)
    assert torch.equal(load_file(tmp_path / "x")["b"], tied)


def test_a_type_that_no_file_holds(tmp_path):
    with pytest.raises(MoepruneError, match=r"can hold `a` is torch\.complex128"):
        checkpoint.write(tmp_path / "x", {"a": torch.ones(1, dtype=torch.complex128)}, None)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_values_that_are_not_finite_are_named(dtype, tmp_path):
    path = tmp_path / "x.safetensors"
    info = torch.finfo(dtype)
    good = torch.tensor([info.max, info.min, info.tiny, info.smallest_normal / 2, 0.0, -0.0], dtype=dtype)
    good = torch.cat([good, torch.ones(MIB, dtype=dtype)])  # several blocks
    checkpoint.write(path, {"good": good}, {})
    checkpoint.scan(read_header(path))
    for value in (torch.nan, -torch.nan, torch.inf, -torch.inf):
        for at in (0, MIB // dtype.itemsize - 1, MIB // dtype.itemsize, -1):
            bad = good.clone()
            bad[at] = value
            tensors = {"z": bad, "good": good, "bad": bad}
            with pytest.raises(MoepruneError, match="NaN or infinite values in `bad`, `z`\n"):
                checkpoint.write(path, tensors, {})
            checkpoint.check_finite({"good": good}, path)
            with pytest.raises(MoepruneError, match="NaN or infinite values in `bad`, `z`\n"):
                checkpoint.check_finite(tensors, path)
    save_file({"z": bad, "good": good, "bad": bad.clone()}, path)
    with pytest.raises(MoepruneError, match="NaN or infinite values in `bad`, `z`\n"):
        checkpoint.scan(read_header(path))


def test_a_file_that_becomes_shorter_or_another_while_it_is_read(tmp_path, single, monkeypatch):
    path = tmp_path / "model.safetensors"
    shutil.copy(single, path)
    header = read_header(path)
    os.truncate(path, path.stat().st_size - 8)
    with pytest.raises(MoepruneError, match="became shorter"):
        checkpoint.scan(header)
    shutil.copy(single, path)

    def read_tensors(header, read_tensors=checkpoint.read_tensors):
        shutil.copy(single, tmp_path / "other")
        (tmp_path / "other").replace(path)
        return read_tensors(header)

    monkeypatch.setattr(checkpoint, "read_tensors", read_tensors)
    with pytest.raises(MoepruneError, match="was replaced while it was read"):
        moeprune.load(path)


def test_a_checkpoint_is_hashed_once(single, monkeypatch, tmp_path):
    scanned = []

    def file_blocks(*arguments, file_blocks=checkpoint.file_blocks):
        scanned.append(arguments)
        return file_blocks(*arguments)

    monkeypatch.setattr(checkpoint, "file_blocks", file_blocks)
    header = read_header(single)
    model = open_model(ModelSpec(path=single), header=header)
    assert open_model(ModelSpec(path=single), header=header) is not model
    assert len(scanned) == len(header.tensors)
    monkeypatch.setattr(checkpoint, "_blocks", None)
    found = fingerprint(model)
    assert found == checkpoint.fingerprint(header, model.config.to_json())
    monkeypatch.undo()
    assert found == checkpoint.fingerprint(model.state_dict(), model.config.to_json())
    assert found == fingerprint(private_copy(model))
    moeprune.save(model, tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == single.read_bytes()
    assert "fingerprint" not in header.metadata


def replace_layer(model):
    layer = model.blocks[0].soft_moe
    layer.fc1_weight = torch.nn.Parameter(layer.fc1_weight * 2, False)


CHANGES = {
    "in place": lambda model: model.get_parameter(LAYER).add_(1),
    "one value": lambda model: model.get_parameter(LAYER).view(-1)[-1:].fill_(9),
    "by an optimizer": lambda model: torch._foreach_add_([model.get_parameter(LAYER)], 1.0),
    "another tensor": replace_layer,
    "another type": lambda model: model.double(),
    "other weights": lambda model: model.load_state_dict(
        {name: tensor + 1 for name, tensor in model.state_dict().items()}
    ),
}


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("change", CHANGES)
def test_a_model_that_was_changed_has_another_fingerprint(single, change, mode):
    model = moeprune.load(single)
    before = fingerprint(model)
    with mode():
        CHANGES[change](model)
    assert fingerprint(model) == checkpoint.fingerprint(model.state_dict(), model.config.to_json()) != before


def test_a_tensor_in_the_place_of_one_that_is_gone_is_hashed(single):
    model = moeprune.load(single).double()
    layer = model.blocks[0].soft_moe
    found = set()
    for value in range(5):
        shape = layer.fc1_weight.shape
        del layer.fc1_weight  # the next one is often allocated in the same memory
        layer.fc1_weight = torch.nn.Parameter(torch.full(shape, float(value), dtype=torch.double), False)
        found.add(fingerprint(model))
    assert len(found) == 5


def write_at_once(path, barrier, text):
    try:
        with replacing(path, overwrite=False) as temporary:
            temporary.write_text(text)
            barrier.wait()
    except MoepruneError as error:
        return error.message
    return None


@pytest.fixture(params=["hard links", "no hard links"])
def _links(request, monkeypatch):
    if request.param == "no hard links":

        def link(*_):
            raise OSError(errno.EPERM, os.strerror(errno.EPERM))

        monkeypatch.setattr(os, "link", link)


@pytest.mark.usefixtures("_links")
def test_of_several_writers_one_wins(tmp_path):
    path = tmp_path / "x"
    barrier = threading.Barrier(8, timeout=PATIENCE)
    with ThreadPoolExecutor(8) as pool:
        ended = list(pool.map(lambda text: write_at_once(path, barrier, text), "abcdefgh"))
    assert ended.count(None) == 1
    assert set(ended) == {None, f"`{path}` exists"}
    assert path.read_text() == "abcdefgh"[ended.index(None)]
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask()
    assert [p.name for p in tmp_path.iterdir()] == ["x"]
    assert not disk.temporaries


def umask() -> int:
    found = os.umask(0)
    os.umask(found)
    return found


@pytest.mark.slow
def test_of_two_commands_one_wins(single, tmp_path):
    path = tmp_path / "x.safetensors"
    call = f"{sys.executable} -m moeprune prune {single} --keep 4 --signal random --compensate none -o {path} --seed"
    runs = [subprocess.Popen([*call.split(), str(n)], stderr=subprocess.PIPE, text=True) for n in range(2)]
    errors = [process.communicate(timeout=PATIENCE)[1] for process in runs]
    assert sorted(process.returncode for process in runs) == [0, 2]
    assert f"error: `{path}` exists" in "".join(errors)
    assert moeprune.load(path).details.provenance["seed"] == [p.returncode for p in runs].index(0)


@pytest.mark.usefixtures("_links")
def test_a_file_that_exists_is_replaced_only_if_asked(tmp_path):
    path = tmp_path / "x"
    write_file(path, "old", overwrite=False)
    with pytest.raises(MoepruneError, match=r"exists\n\nhint: .*--force"):
        write_file(path, "new", overwrite=False)
    assert path.read_text() == "old"
    write_file(path, "new")
    assert path.read_text() == "new"


@pytest.mark.parametrize("overwrite", [False, True])
def test_links_are_followed(tmp_path, overwrite):
    (tmp_path / "there").mkdir()
    target = tmp_path / "there" / "target"
    (tmp_path / "link").symlink_to("middle")
    (tmp_path / "middle").symlink_to("there/target")
    write_file(tmp_path / "link", "new", overwrite)  # the link leads nowhere yet
    assert target.read_text() == "new"
    if overwrite:
        write_file(tmp_path / "link", "newer")
        assert target.read_text() == "newer"
    else:
        with pytest.raises(MoepruneError, match="link` exists"):
            write_file(tmp_path / "link", "newer", overwrite)
    assert (tmp_path / "link").is_symlink()
    assert not target.is_symlink()
    (tmp_path / "circle").symlink_to("circle")
    with pytest.raises(MoepruneError, match="not a regular file"):
        write_file(tmp_path / "circle", "new", overwrite)


def test_nothing_is_left_of_a_file_that_fails(tmp_path):
    def write():
        with replacing(tmp_path / "x") as temporary:
            temporary.write_bytes(b"half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        write()
    assert not list(tmp_path.iterdir())
    assert not disk.temporaries


READ_AND_WRITTEN = {
    "analyze model.safetensors --data digits -o model.safetensors": "--output model.safetensors",
    "analyze model.safetensors --data data.npz -o ./x/../data.npz": "--output x/../data.npz",
    "analyze model.safetensors --data images -o new --report images/0/a.png": "--report images/0/a.png",
    "prune model.safetensors --keep 4 --analysis of.safetensors -o of.safetensors": "--output of.safetensors",
    "prune model.safetensors --keep 4 --scope input -o link": "--output link",
    "prune model.safetensors --plan plan.json -o new --save-plan plan.json": "--save-plan plan.json",
    "eval model.safetensors --data digits --baseline hard --output-file hard": "--output-file hard",
    "inspect model.safetensors --output-file model.safetensors": "--output-file model.safetensors",
    "inspect model.safetensors --output-format junit --output-file model.safetensors": "--output-file",
    "inspect shards --output-file shards/b.safetensors": "--output-file shards/b.safetensors",
    "inspect shards/m.safetensors.index.json --output-file shards/b.safetensors": "--output-file shards/b",
    "export shards --to soft-moe -o shards/m.safetensors.index.json": "--output shards/m.safetensors.index.json",
    "inspect other.safetensors --output-file moeprune.toml": "--output-file moeprune.toml",
}


@pytest.mark.parametrize("call", READ_AND_WRITTEN)
def test_a_file_that_is_read_is_never_replaced(call, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("x", "images/0", "shards"):
        (tmp_path / folder).mkdir(parents=True)
    files = ("model.safetensors", "of.safetensors", "data.npz", "plan.json", "images/0/a.png", "shards/b.safetensors")
    for name in files:
        (tmp_path / name).write_text("mine")
    (tmp_path / "shards/m.safetensors.index.json").write_text('{"weight_map": {"w": "b.safetensors"}}')
    (tmp_path / "moeprune.toml").write_text("[inspect]\nquiet = true")
    (tmp_path / "link").symlink_to("model.safetensors")
    (tmp_path / "hard").hardlink_to("model.safetensors")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    result = run(*call.split(), "--force")
    assert result.code == 2
    assert f"`{READ_AND_WRITTEN[call]}" in result.stderr
    assert "would replace a file that the command reads" in result.stderr
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_file_beside_what_is_read_may_be_replaced(run, stock, tmp_path):
    shutil.copytree(stock.path("shards"), tmp_path / "shards")
    about = tmp_path / "shards" / "about.txt"
    about.write_text("old")
    assert run("inspect", tmp_path / "shards", *SOURCE_ARGS.split(), "--output-file", about, "--force").code == 0
    assert "soft_moe" in about.read_text()


def test_a_checkpoint_by_a_suffix_of_torch_is_read_by_torch_and_as_if_it_were_safetensors(
    single, small_analysis, run_json, tmp_path
):
    suffix = ".pth"
    theirs, ours = tmp_path / f"model{suffix}", tmp_path / "pruned.safetensors"
    model = moeprune.load(single)
    moeprune.save(model, theirs)
    found = torch.load(theirs, weights_only=True)
    model.load_state_dict(found["state_dict"])
    assert fingerprint(moeprune.load(theirs)) == fingerprint(model)
    words = ("--analysis", small_analysis, "--keep", 4, "--compensate", "mean", "-o")
    reports = [run_json("prune", path, *words, to) for path, to in ((theirs, ours), (single, ours.with_suffix(suffix)))]
    assert [report.pop("checkpoint") for report in reports] == [str(ours), str(ours.with_suffix(suffix))]
    assert reports[0] == reports[1]
    assert fingerprint(moeprune.load(ours)) == fingerprint(moeprune.load(ours.with_suffix(suffix)))
    run_json("prune", single, "--plan", ours.with_suffix(suffix), *words[:2], "--save-plan", tmp_path / "plan.json")
    assert run_json("inspect", ours)["layers"] == run_json("inspect", ours.with_suffix(suffix))["layers"]
    data = ("--data", "digits", "--limit", 40)
    assert run_json("eval", ours.with_suffix(suffix), *data, "--baseline", theirs)["difference"]["agreement"] > 0.5


def test_nothing_is_replaced_unless_asked(stock, small_analysis, tmp_path):
    model, path = moeprune.load(stock.path("dense.safetensors")), tmp_path / "there.pt"
    path.write_text("mine")
    for write in (
        lambda: moeprune.save(model, path),
        lambda: moeprune.export(stock.path("dense.safetensors"), path, "soft-moe"),
        lambda: moeprune.save_analysis(moeprune.load_analysis(small_analysis), path),
    ):
        with pytest.raises(MoepruneError, match=r"there.pt` exists"):
            write()
        assert path.read_text() == "mine"
    moeprune.save(model, path, overwrite=True)
    assert fingerprint(moeprune.load(path)) == fingerprint(model)
