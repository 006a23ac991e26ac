"""Foreign checkpoints: what is read, what is refused and why, and that nothing in a file is ever run."""

import argparse
import datetime
import enum
import errno
import hashlib
import io
import json
import os
import pickle
import random
import subprocess
import sys
import tarfile
import zipfile
from collections import OrderedDict, defaultdict, deque
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from moeprune.errors import MoepruneError
from moeprune.files.checkpoint import check_finite
from moeprune.files.foreign import STATE_DICT_KEYS, StateDict, read_state_dict
from moeprune.files.pickles import MAX_CLASSES
from tests.damage import Call, damaged_torch, mutated
from tests.endings import PATIENCE
from tests.stock import SHARDS, save_shards

pytestmark = pytest.mark.filterwarnings("ignore")  # of torch, about what people still have in files
MIB = 1 << 20
FORMATS = ("safetensors", "shards", "zip", "legacy")
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
FIRST, SECOND = SHARDS
BOTH = pytest.mark.parametrize("form", ["zip", "legacy"])
"""Both formats of torch."""
MARKER = "MOEPRUNE_TEST_MARKER"
"""The environment variable that names the file which code in a pickle would leave behind."""


class Config:
    """An object as training code puts it beside the weights."""


class Settings(dict):
    """Such as EasyDict: a dict with a state of its own."""

    def __init__(self, *arguments: Any, **entries: Any):
        super().__init__(*arguments, **entries)
        self.__dict__["path"] = Path("run")


class Kind(enum.Enum):
    LARGE = "large"


def bomb(function: Any = os.system) -> Call:
    """Leaves a file behind when it is unpickled."""
    code = f'touch "${MARKER}"' if function is os.system else f"open(__import__('os').environ[{MARKER!r}], 'w')"
    return Call(function, code)


@pytest.fixture(autouse=True)
def _nothing_runs(tmp_path_factory, monkeypatch):
    marker = tmp_path_factory.mktemp("marker") / "ran"
    monkeypatch.setenv(MARKER, str(marker))
    yield
    assert not marker.exists()


def tensors(dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "blocks.0.weight": torch.randn(3, 5, generator=generator).to(dtype),
        "blocks.0.bias": torch.randn(3, generator=generator).to(dtype),
        "steps": torch.tensor(7),
        "mask": torch.tensor([True, False]),
        "empty": torch.zeros(0, 2, dtype=dtype),
    }


def save(folder: Path, form: str, found: Any, name: str = "model.weights") -> Path:
    """Write in one of the formats; the suffix says nothing."""
    path = folder / name
    if form == "safetensors":
        save_file(found, path)
    elif form == "shards":
        return save_shards(folder, found)
    else:
        torch.save(found, path, _use_new_zipfile_serialization=form == "zip")
    return path


def refused(path: Path, *fragments: str, key: str | None = None) -> str:
    with pytest.raises(MoepruneError) as caught:
        read_state_dict(path, key)
    text = str(caught.value)
    assert [part for part in (path.name, *fragments) if part not in text] == [], text
    return text


def equal(found: StateDict, expected: dict[str, torch.Tensor]) -> None:
    assert found.tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        got = found.tensors[name]
        assert (type(got), got.requires_grad, got.dtype) == (torch.Tensor, False, tensor.dtype)
        assert torch.equal(got, tensor)


# --- what is read
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("form", FORMATS)
def test_every_format_and_type(tmp_path, form, dtype):
    expected = tensors(dtype)
    path = save(tmp_path, form, expected)
    found = read_state_dict(path)
    equal(found, expected)
    assert found.files[0] == path
    assert found.sha256() == hashlib.sha256(b"".join(file.read_bytes() for file in found.files)).hexdigest()
    check_finite(found.tensors, path)
    found.files[-1].unlink()
    with pytest.raises(MoepruneError, match="cannot read"):
        found.sha256()


@BOTH
@pytest.mark.parametrize("key", STATE_DICT_KEYS)
def test_training_checkpoints(tmp_path, form, key):
    expected = tensors()
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.ones(2))])
    rest = {
        "epoch": 3, "best": torch.tensor(0.9), "args": {"lr": 0.1}, "optimizer": optimizer.state_dict(),
        "scheduler": None, "losses": [1.0, float("nan")],
    }  # fmt: skip
    equal(read_state_dict(save(tmp_path, form, {key: OrderedDict(expected), **rest})), expected)
    inner = next(other for other in STATE_DICT_KEYS if other != key)
    path = save(tmp_path, form, {key: {inner: expected, "epoch": 1}, **rest})
    for chosen in (None, key, f"{key}.{inner}"):
        equal(read_state_dict(path, chosen), expected)


@BOTH
def test_of_several_state_dicts_one_is_chosen_by_key(tmp_path, form):
    model, ema = tensors(), {"weight": torch.ones(2)}
    nested = {"state_dict": model, "state_dict_ema": ema}
    for found, names in (
        ({"model": model, "model_ema": ema}, ("model", "model_ema")),
        ({"model": nested, "epoch": 2}, ("model.state_dict", "model.state_dict_ema")),
    ):
        path = save(tmp_path, form, found)
        refused(path, "several state dicts", *(f"`{name}`" for name in names), f"--key {names[1]}")
        equal(read_state_dict(path, names[0]), model)
        equal(read_state_dict(path, names[1]), ema)
    refused(path, "`model.state_dict`", key="model")
    path = save(tmp_path, form, {"generator": model, "discriminator": ema})
    refused(path, "no state dict", "`generator`, `discriminator`", "--key")
    equal(read_state_dict(path, "discriminator"), ema)
    for key in ("model", "generator.model", "gen"):
        refused(path, f"no state dict under `{key}`", "`generator`", key=key)


@pytest.mark.parametrize("form", ["safetensors", "shards"])
def test_a_key_means_nothing_to_safetensors(tmp_path, form):
    refused(save(tmp_path, form, tensors()), "no key `model`", "safetensors", key="model")


@BOTH
def test_tied_views_and_parameters(tmp_path, form):
    weight = torch.nn.Parameter(torch.randn(4, 6))
    with torch.no_grad():
        transposed, part = weight.t(), weight[1:3, ::2]
    found = read_state_dict(save(tmp_path, form, {"a": weight, "b": weight, "t": transposed, "p": part}))
    equal(found, {"a": weight.detach(), "b": weight.detach(), "t": transposed, "p": part})
    assert found.tensors["a"].data_ptr() == found.tensors["b"].data_ptr() == found.tensors["t"].data_ptr()
    assert not found.tensors["t"].is_contiguous()
    check_finite(found.tensors, tmp_path)


def test_shards_are_found_through_their_folder(tmp_path):
    path = save_shards(tmp_path, tensors())
    equal(read_state_dict(tmp_path), tensors())
    assert list(read_state_dict(tmp_path).tensors) == list(tensors())
    (tmp_path / "snapshot").mkdir()
    for file in tmp_path.glob("*.*"):
        (tmp_path / "snapshot" / file.name).symlink_to(file)
    equal(read_state_dict(tmp_path / "snapshot"), tensors())
    (tmp_path / "other.safetensors.index.json").write_text("{}")
    (tmp_path / "pytorch_model.bin.index.json").write_text("{}")  # of the same weights in another format
    refused(tmp_path, "several indexes", path.name, "other.safetensors.index.json")
    path.unlink()
    (tmp_path / "other.safetensors.index.json").unlink()
    (tmp_path / "pytorch_model.bin.index.json").unlink()
    refused(tmp_path, "without an index", "give one of its files")


SYSTEM_MEMORY = """
import json, sys
import torch
from moeprune.files.checkpoint import check_finite
from moeprune.files.foreign import read_state_dict

def kilobytes(name):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(name + ":"))

warm = read_state_dict(sys.argv[1])
before = kilobytes("RssAnon"), kilobytes("VmRSS")
found = read_state_dict(sys.argv[2])
read = kilobytes("RssAnon"), kilobytes("VmRSS")
total = sum(float(tensor.sum()) for tensor in found.tensors.values())
summed = kilobytes("RssAnon"), kilobytes("VmRSS")
check_finite(found.tensors, "")
print(json.dumps([before, read, summed, (kilobytes("RssAnon"), kilobytes("VmRSS")), total]))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("form", ["safetensors", "shards", "zip"])
def test_weights_are_mapped_not_copied(tmp_path, form):
    large = {f"w{i}": torch.ones(4 * MIB) for i in range(4)}
    (tmp_path / "small").mkdir()
    small = save(tmp_path / "small", form, tensors())
    path = save(tmp_path, form, large)
    ran = subprocess.run(
        [sys.executable, "-c", SYSTEM_MEMORY, small, path],
        capture_output=True, text=True, check=True, timeout=PATIENCE,
    )  # fmt: skip
    before, read, summed, checked, total = json.loads(ran.stdout)
    assert total == 16 * MIB
    assert read[1] - before[1] < 4096  # of 64 MiB of weights
    assert summed[0] - before[0] < 4096
    assert summed[1] - read[1] > 60 * 1024  # the pages of the file
    assert checked[0] - before[0] < 8192


# --- what is refused
@BOTH
@pytest.mark.parametrize(
    ("make", "fragment"),
    [
        (lambda: 3, "`odd` is of type int"),
        (lambda: None, "`odd` is of type NoneType"),
        (lambda: {"weight": 1}, "`odd` is of type dict"),
        (lambda: torch.ones(2).storage(), "`odd` is of type TypedStorage"),
        (lambda: torch.ones(2, device="meta"), "`odd` has no values (device meta)"),
        (lambda: torch.eye(3).to_sparse(), "`odd` is sparse (torch.sparse_coo)"),
        (lambda: torch.eye(3).to_sparse_csr(), "`odd` is sparse (torch.sparse_csr)"),
        (lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8), "`odd` has the type torch.qint8"),
        (lambda: torch.zeros(1).expand(10**12), "`odd` has the shape [1000000000000], larger than the whole file"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_entries_that_are_no_plain_tensors_are_named(tmp_path, form, make, fragment):
    entry = make()
    path = save(tmp_path, form, tensors() | {"odd": entry, "another": "text"})
    refused(path, fragment, "`another` is of type str", "state_dict()")
    refused(save(tmp_path, form, {"epoch": 1, "model": tensors() | {"odd": entry}}), fragment)


def test_entries_that_only_some_formats_hold_are_named(tmp_path):
    refused(save(tmp_path, "zip", tensors() | {3: torch.ones(1)}), "`3` has a name of type int")
    nested = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])
    refused(save(tmp_path, "zip", tensors() | {"odd": nested}), "`odd` is a nested tensor")
    for form in ("zip", "safetensors", "shards"):
        small = {"odd": torch.ones(4).to(torch.float8_e5m2), "another": torch.ones(1)}
        refused(save(tmp_path, form, small), "`odd` has the type torch.float8_e5m2")
    refused(save(tmp_path, "safetensors", {}), "no tensors")


@BOTH
@pytest.mark.parametrize(
    ("content", "fragments"),
    [
        (torch.ones(3), ("(Tensor) holds no state dict", "expected tensors by name")),
        ([torch.ones(3)], ("(list) holds no state dict",)),
        ({}, ("no state dict", "save `model.state_dict()`")),
        ({"model": {}, "epoch": 3}, ("no state dict", "`state_dict`")),
        ({"model": {"a": {"state_dict": tensors()}}}, ("no state dict",)),
    ],
    ids=["a tensor", "a list", "nothing", "an empty model", "too deep"],
)
def test_files_without_a_state_dict(tmp_path, form, content, fragments):
    refused(save(tmp_path, form, content), *fragments)


WHERE = ("alone", "beside", "within", "in the optimizer")


def placed(thing: Any, where: str) -> Any:
    return {
        "alone": thing,
        "beside": {"model": tensors(), "args": thing},
        "within": {"model": tensors() | {"odd": thing}},
        "in the optimizer": {"optimizer": {"state": [thing]}, "state_dict": tensors()},
    }[where]


@BOTH
@pytest.mark.parametrize(
    ("thing", "wanted"),
    [
        (bomb(), f"{os.system.__module__}.system"),
        (bomb(eval), "eval"),
        (bomb(exec), "exec"),
        (Call(print, "x"), "print"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
@pytest.mark.parametrize("where", WHERE)
def test_pickles_that_run_code_are_refused(tmp_path, form, thing, wanted, where):
    text = refused(save(tmp_path, form, placed(thing, where)), wanted, "without running code", "weights_only=False")
    assert "torch.save(found['state_dict'], NEW)" in text
    assert "\x1b" not in text


@BOTH
@pytest.mark.parametrize(
    ("thing", "wanted"),
    [
        (argparse.Namespace(lr=0.1), "argparse.Namespace"),
        (Config(), ".Config"),
        (np.float64(0.9), "core.multiarray.scalar"),
        (Path("run"), "pathlib"),
        (Kind.LARGE, ".Kind"),
        (datetime.datetime(2026, 1, 2), "datetime.datetime"),
        (np.arange(3), "core.multiarray._reconstruct"),
        ({"rng": np.random.get_state(), "types": [np.dtype("f4"), int, Config]}, "core.multiarray._reconstruct"),
        (defaultdict(list, a=[Config()]), "collections.defaultdict"),
        (Settings(a=1, b=Config()), ".Settings"),
        (deque([1, Config()]), "collections.deque"),
        (slice(1, 2), "builtins.slice"),
        (Call(subprocess.getoutput, f'touch "${MARKER}"'), ".getoutput"),
        (Call(getattr, Config(), "__init__"), "builtins.getattr"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_objects_beside_the_weights_are_not_loaded(tmp_path, form, thing, wanted):
    for where in ("beside", "in the optimizer"):
        equal(read_state_dict(save(tmp_path, form, placed(thing, where))), tensors())
    for where in ("alone", "within"):
        text = refused(save(tmp_path, form, placed(thing, where)))
        if not isinstance(thing, dict | deque):
            assert wanted in text
            assert "without running code" in text


@BOTH
def test_objects_that_may_be_the_weights_are_not_passed_over(tmp_path, form):
    model, ema = Config(), tensors()
    path = save(tmp_path, form, {"model": model, "ema": ema})
    refused(path, "`ema`", ".Config`", "--key ema")
    equal(read_state_dict(path, "ema"), ema)
    refused(path, "without running code", ".Config", key="model")
    refused(save(tmp_path, form, {"model": model, "epoch": 3}), "without running code", ".Config")
    arrays = {name: tensor.numpy() for name, tensor in ema.items()}
    for content in (arrays, {"model": arrays, "epoch": 3}):
        refused(save(tmp_path, form, content), "without running code", "multiarray._reconstruct")
    refused(save(tmp_path, form, {"args": Config(), "epoch": 3}), "no state dict")
    equal(read_state_dict(save(tmp_path, form, {"model": Settings(ema)})), ema)


class Called(Call):
    """The result of a call, called again."""

    __call__ = Call.__reduce__


def stated(function: Any, *arguments: Any, state: Any) -> Call:
    """A call whose result then gets a state."""
    found = Call(function, *arguments)
    found.call = (*found.call, state)
    return found


@BOTH
@pytest.mark.parametrize(
    "thing",
    [
        stated(os.system, f'touch "${MARKER}"', state={"a": 1}),
        stated(torch.device, "cpu", state={"type": Config()}),
        Call(torch._utils._rebuild_parameter, Config(), False, OrderedDict()),
        Call(torch._utils._rebuild_tensor_v2, Config(), 0, (1,), (1,), False, OrderedDict()),
        Call(torch._tensor._rebuild_from_type_v2, Config, torch.Tensor, (), {}),
        Call(Called(getattr, Config(), "__init__"), 1),
        Call(OrderedDict, Call(Config)),
        [[{"a": (bomb(),)}]],
    ],
    ids=["state", "state of a device", "parameter", "tensor", "type", "method", "dict", "nested"],
)
def test_inert_objects_do_nothing_in_the_place_of_others(tmp_path, form, thing):
    refused(save(tmp_path, form, {"model": tensors(), "args": thing}), "without running code")


@BOTH
@pytest.mark.slow
def test_files_of_many_classes_end(tmp_path, form):
    several = [type(f"C{i}", (), {"__reduce__": lambda self: (sys.intern, ("a",))})() for i in range(3)]
    refused(save(tmp_path, form, {"model": tensors(), "args": several}), "sys.intern")
    classes = [type(f"Many{i}", (), {"__module__": __name__}) for i in range(MAX_CLASSES + 1)]
    globals().update({kind.__name__: kind for kind in classes})
    equal(read_state_dict(save(tmp_path, form, {"model": tensors(), "args": classes[:-1]})), tensors())
    refused(save(tmp_path, form, {"model": tensors(), "args": classes}), f"Many{MAX_CLASSES}")
    before = torch.serialization.get_safe_globals()
    assert not any("Inert" in str(kind) for kind in before)


def test_the_bombs_would_go_off(tmp_path):
    """Loaded with code, each leaves its marker; else the tests above would show nothing."""
    marker = Path(os.environ[MARKER])
    for form in ("zip", "legacy"):
        for function in (os.system, eval, exec):
            torch.load(save(tmp_path, form, {"a": bomb(function)}), weights_only=False)
            marker.unlink()
    pickle.loads(pickle.dumps(bomb()))
    marker.unlink()


def test_other_pickles_and_archives_are_refused_by_name(tmp_path):
    path = tmp_path / "model.pt"
    for content in ({"a": bomb()}, tensors()):
        for protocol in range(6):
            path.write_bytes(pickle.dumps(content, protocol))
            refused(path, *(["without running code", "weights_only=False"] if protocol > 1 else []))
    for form in ("zip", "legacy"):
        torch.save(tensors(), path, pickle_protocol=4, _use_new_zipfile_serialization=form == "zip")
        refused(path, "without running code", "Unsupported operand")
    torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.ones(1, 2)), path)
    refused(path, "TorchScript", "torch.jit.load")
    with tarfile.open(path, "w") as archive:
        for name in ("sys_info", "pickle", "storages", "tensors"):
            content = pickle.dumps(bomb())
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    refused(path, "tar format", "without running code")
    np.savez(path.with_suffix(".npz"), a=np.ones(2))
    refused(path.with_suffix(".npz"), "an archive of NumPy arrays", "--data")
    whole = save(tmp_path, "zip", tensors())
    with zipfile.ZipFile(whole) as source, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as target:
        for name in source.namelist():
            target.writestr(name, source.read(name))
    refused(path, "it was compressed after `torch.save`")


CLAIMS = {
    "more bytes": (10**15, 1),
    "one byte repeated": (10**15, 0),
    "a few more bytes": (1000, 1),
    "a negative size": (-3, 1),
    "a negative stride": (2, -1),
    "values made of nothing": (10**9,),
    "values that no memory holds": (10**16,),
}
"""The size of a tensor of four values and its stride; without one a tensor of its own."""


@BOTH
@pytest.mark.parametrize(("size", "stride"), [(size, stride) for size, *stride in CLAIMS.values()], ids=CLAIMS)
def test_tensors_that_claim_more_than_the_file_has(tmp_path, form, size, stride):
    found = Call(torch.FloatTensor, size)
    if stride:
        found = Call(
            torch._utils._rebuild_tensor_v2, torch.zeros(4).storage(), 0, (size,), (*stride,), False, OrderedDict()
        )
    refused(save(tmp_path, form, {"a": found}))


def test_attributes_that_a_file_gives_to_tensors_and_dicts_change_nothing(tmp_path):
    weight = torch.ones(3)
    weight.isfinite = weight.detach = weight.reshape = "not callable"
    attributes = dict.fromkeys(("items", "keys", "values", "get", "__iter__"), 3)
    found = Call(OrderedDict)
    found.call = OrderedDict, (), attributes, None, iter({"a": weight}.items())
    path = save(tmp_path, "zip", found)
    loaded = torch.load(path, weights_only=True)
    assert loaded.items == 3
    assert loaded["a"].detach == "not callable"
    state = read_state_dict(path)
    equal(state, {"a": torch.ones(3)})
    check_finite(state.tensors, path)


# --- files that cannot be read
def test_paths_that_are_no_files(tmp_path):
    refused(tmp_path / "none.pt", "no file")
    refused(tmp_path / ("x" * 300), "cannot read")
    refused(tmp_path / "a\0b", "cannot read")
    (tmp_path / "empty.pt").touch()
    refused(tmp_path / "empty.pt", "empty")
    (tmp_path / "link.pt").symlink_to("link.pt")
    refused(tmp_path / "link.pt", "cannot read")
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe.pt")
        refused(tmp_path / "pipe.pt", "not a regular file")


@pytest.mark.parametrize("form", FORMATS)
def test_files_without_permission(tmp_path, form, monkeypatch):
    path = save(tmp_path, form, tensors())
    if os.geteuid() == 0:  # who may read everything

        def denied(self, *arguments):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

        monkeypatch.setattr(Path, "open", denied)
    path.chmod(0)
    refused(path, "cannot read", "Permission denied")


@pytest.mark.parametrize("suffix", [".pt", ".safetensors", ".bin", ".index.json"])
@pytest.mark.parametrize(
    ("content", "fragment"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        (b"<!DOCTYPE html><html>404</html>", "<!DOCTYPE html>"),
        (np.random.default_rng(0).bytes(5000), "it starts with"),
        (b"\x80", "pickle"),
        (b"PK\x03\x04", "torch cannot load"),
        (b"[1, 2]", "it starts with"),
        (b"{}", "missing required field `weight_map`"),
        (b'{"weight_map": null}', "`weight_map`: expected `object`, got `null`"),
        (b'{"weight_map": {}}', "`weight_map`: expected `object` of length >= 1"),
        (b'{"weight_map": {"a": 1}}', "expected `str`, got `int`"),
        (b'{"weight_map": ', "not JSON"),
        (b'{"a": ' + b"[" * 100_000, "not JSON"),
        (b'{"a": ' + b"1" * 5000, "not JSON"),
        (b"{\xff", "not JSON"),
    ],
    ids=lambda value: "" if isinstance(value, bytes) else value,
)
def test_garbage(tmp_path, suffix, content, fragment):
    path = tmp_path / f"model{suffix}"
    path.write_bytes(content)
    refused(path, fragment)


@pytest.mark.parametrize("form", FORMATS)
def test_truncated_files(tmp_path, form):
    path = save(tmp_path, form, tensors())
    if form == "shards":
        path = tmp_path / FIRST
    whole = path.read_bytes()
    for share in (0, 1, 8, 9, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:share])
        refused(path)
        if form == "shards":
            with pytest.raises(MoepruneError, match=path.name):
                read_state_dict(tmp_path)


# --- shards
def test_all_that_is_wrong_with_shards_is_listed(tmp_path):
    found = {name: torch.ones(2) for name in "abcdef"}
    map_ = {"a": FIRST, "b": SECOND, "c": FIRST, "d": SECOND, "e": SECOND, "x": FIRST}
    path = save_shards(tmp_path, found, weight_map=map_)
    save_file({name: torch.ones(2) for name in "defc"}, tmp_path / SECOND)
    of_first = ("missing `x`", "unexpected `b`")
    of_second = ("missing `b`", "unexpected `c`", "unexpected `f`")
    refused(path, *(f"{text} in `{FIRST}`" for text in of_first), *(f"{text} in `{SECOND}`" for text in of_second))
    path = save_shards(tmp_path, tensors(), weight_map={"a": FIRST, "b": "gone.safetensors", "c": "lost"})
    refused(path, "missing", "`gone.safetensors`, `lost`")


@pytest.mark.parametrize(
    "metadata", [{}, None, {"format": "pt"}, {"total_size": 47}, {"total_size": "no number"}], ids=repr
)
def test_an_index_may_lack_the_size_or_have_another(tmp_path, metadata, caplog):
    equal(read_state_dict(save_shards(tmp_path, tensors(), metadata=metadata)), tensors())
    size = sum(tensor.nbytes for tensor in tensors().values())
    expected = f"`total_size` is {(metadata or {}).get('total_size')!r}, but the tensors have {size} bytes"
    assert (expected in caplog.text) == ("total_size" in (metadata or {}))
    path = save_shards(tmp_path, tensors(), metadata={"total_size": float(size)})
    path.write_text(path.read_text(), encoding="utf-8-sig")  # with a byte order mark
    equal(read_state_dict(path), tensors())


OUTSIDE = "../secret.safetensors|/etc/passwd|sub/../../secret.safetensors|..|.||..\\a|C:\\a|C:a|a\0b|a/|//host/a"


@pytest.mark.parametrize("shard", OUTSIDE.split("|"))
def test_shards_lie_in_the_folder_of_the_index(tmp_path, shard):
    folder = tmp_path / "model"
    folder.mkdir()
    save_file(tensors(), tmp_path / "secret.safetensors")
    path = save_shards(folder, tensors(), weight_map=dict.fromkeys(tensors(), shard))
    refused(path, "shards that are not in its folder")


@BOTH
@pytest.mark.parametrize("folder", ["", "weights", "a/b"])
def test_shards_of_torch_and_in_folders(tmp_path, form, folder):
    (tmp_path / folder).mkdir(parents=True, exist_ok=True)
    found, names = tensors(), [f"{folder}/{name}".removeprefix("/") for name in ("one.bin", "two.bin")]
    weight_map = {name: names[index % 2] for index, name in enumerate(found)}
    for shard in names:
        save(tmp_path, form, {name: found[name] for name in found if weight_map[name] == shard}, shard)
    path = tmp_path / "pytorch_model.bin.index.json"
    path.write_text(json.dumps({"weight_map": weight_map}))
    for given in (path, tmp_path):
        equal(read_state_dict(given), found)
    save(tmp_path, form, {"a": bomb()}, names[1])
    refused(path.parent / names[1], "without running code")
    with pytest.raises(MoepruneError, match=r"two\.bin` cannot be loaded"):
        read_state_dict(path)
    (tmp_path / names[1]).unlink()
    (tmp_path / names[1]).mkdir()
    with pytest.raises(MoepruneError, match="is a folder"):
        read_state_dict(path)


# --- anything at all
def check_read_or_refused(path: Path) -> bool:
    """Whether a file of unknown content was read."""
    try:
        state = read_state_dict(path)
        assert isinstance(state, StateDict)
        assert all(type(tensor) is torch.Tensor for tensor in state.tensors.values())
        assert len(state.sha256()) == 64
        check_finite(state.tensors, path)
    except MoepruneError:
        return False
    return True


@pytest.mark.parametrize(("form", "explodes"), [*((form, False) for form in FORMATS), ("zip", True), ("legacy", True)])
def test_damaged_files_are_read_or_refused(tmp_path, form, explodes):
    chance = random.Random(form)
    beside = {"args": bomb()} if explodes else {"optimizer": {"state": [1, "a"]}}
    in_torch = form in ("zip", "legacy")
    path = save(tmp_path, form, {"model": tensors(), "epoch": 3, **beside} if in_torch else tensors())
    changed = sorted(tmp_path.iterdir())
    outcomes = set()
    for file in changed:
        whole = file.read_bytes()
        for _ in range(240 // len(changed)):
            file.write_bytes((damaged_torch if in_torch else mutated)(whole, chance))
            outcomes.add(check_read_or_refused(path))
        file.write_bytes(whole)
    assert outcomes == ({False} if explodes else {False, True})
    assert check_read_or_refused(path) == (not explodes)
