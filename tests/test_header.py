"""The header of a safetensors file, against the library that reads the same files."""

import json
import struct
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from moeprune.errors import MoepruneError
from moeprune.files.checkpoint import tensor_infos
from moeprune.files.header import DTYPES, TensorInfo, read_header

GOOD = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
SECOND = {**GOOD, "data_offsets": [8, 16]}
FIELDS = json.dumps(GOOD)[1:-1]


def content(header: object, data: int = 8, length: int | None = None) -> bytes:
    """A file of a header, as JSON values or as raw text, and so many bytes of data."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + bytes(data)


def with_tensor(data: int = 8, **changed: object) -> bytes:
    return content({"a": {**GOOD, **changed}}, data)


ACCEPTED = {
    "one tensor": with_tensor(),
    "no tensor": content({}, 0),
    "a scalar": with_tensor(4, shape=[], data_offsets=[0, 4]),
    "no elements": with_tensor(0, shape=[3, 0], data_offsets=[0, 0]),
    "no elements between others": content(
        {"a": GOOD, "b": {**GOOD, "shape": [0], "data_offsets": [8, 8]}, "c": SECOND}, 16
    ),
    "not in the order of the data": content({"a": SECOND, "b": GOOD}, 16),
    "spaces around": content(b" " + json.dumps({"a": GOOD}).encode() + b"   "),
    "another field": with_tensor(origin="here"),
    "no metadata": content({"__metadata__": None, "a": GOOD}),
    "other metadata": content({"__metadata__": {"format": "pt"}, "a": GOOD}),
    "a name beyond ASCII": content({"ä😀": GOOD}),
    "an escaped name": content(b'{"\\ud83d\\ude00": {' + FIELDS.encode() + b"}}"),
}
REFUSED = {
    "nothing": b"",
    "a length of 0": content(b"", 0),
    "a length beyond the end": content({"a": GOOD}, length=1000),
    "no UTF-8": content(b"\xff\xfe{}", 0),
    "a byte order mark": content(b"\xef\xbb\xbf{}", 0),
    "no JSON": content(b"{'a': 1}", 0),
    "half a surrogate pair": content(b'{"\\ud800": {' + FIELDS.encode() + b"}}"),
    "half a surrogate pair in the metadata": content(b'{"__metadata__": {"moeprune": "\\udc00"}}', 0),
    "deep objects": content(b'{"a":' * 100_000, 0),
    "a list": content([], 0),
    "metadata of numbers": content({"__metadata__": {"moeprune": 1}}, 0),
    "a tensor that is null": content({"a": None}, 0),
    "no type": content({"a": {"shape": [2], "data_offsets": [0, 8]}}),
    "an unknown type": with_tensor(dtype="F33"),
    "a negative size": with_tensor(shape=[-2]),
    "a size that is a float": with_tensor(shape=[2.0]),
    "a size that is a boolean": with_tensor(shape=[True, 2]),
    "a size of 5000 digits": content(b'{"a": {"dtype": "F32", "shape": [' + b"9" * 5000 + b"]}}"),
    "sizes that overflow": with_tensor(shape=[2**40, 2**40]),
    "sizes that overflow to 0": with_tensor(0, shape=[2**32, 2**32], data_offsets=[0, 0]),
    "a shape that is text": with_tensor(shape="2"),
    "one offset": with_tensor(data_offsets=[0]),
    "offsets the wrong way": with_tensor(data_offsets=[8, 0]),
    "a negative offset": with_tensor(data_offsets=[-8, 0]),
    "an offset beyond the end": with_tensor(shape=[4], data_offsets=[0, 16]),
    "another size than the shape's": with_tensor(shape=[3]),
    "a gap between": content({"a": GOOD, "b": {**GOOD, "data_offsets": [12, 20]}}, 20),
    "an overlap": content({"a": GOOD, "b": {**GOOD, "data_offsets": [4, 12]}}, 12),
    "the same data twice": content({"a": GOOD, "b": GOOD}),
    "a byte too many": with_tensor(9),
    "a byte too few": with_tensor(7),
}
STRICTER = {
    "a tensor that is a list": content({"a": list(GOOD.values())}),
    "a type in an object": with_tensor(dtype={"F32": None}),
    "a size of 2^63 beside 0": with_tensor(0, shape=[0, 2**63], data_offsets=[0, 0]),
    "strides that overflow": with_tensor(0, shape=[0, 2**40, 2**40], data_offsets=[0, 0]),
}
"""What the library lets pass, for better or worse."""


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def check_refused(path: Path) -> None:
    with pytest.raises(MoepruneError) as caught:
        read_header(path)
    assert f"`{path}`" in caught.value.message


@pytest.mark.parametrize("name", ACCEPTED)
def test_headers_that_are_read(name, tmp_path):
    path = write(tmp_path / "x.safetensors", ACCEPTED[name])
    with safe_open(path, "pt") as file:
        slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
        expected = {key: (part.get_dtype(), part.get_shape()) for key, part in slices.items()}
    found = read_header(path)
    assert found.path == path
    assert found.metadata is None
    assert {key: (t.dtype, list(t.shape)) for key, t in found.tensors.items()} == {
        key: (DTYPES[dtype][0], shape) for key, (dtype, shape) in expected.items()
    }


@pytest.mark.parametrize("name", [*REFUSED, *STRICTER])
def test_headers_that_the_library_refuses_are_refused_and_some_that_it_reads(name, tmp_path):
    path = write(tmp_path / "x.safetensors", (REFUSED | STRICTER)[name])
    with pytest.raises(SafetensorError) if name in REFUSED else nullcontext():
        safe_open(path, "pt")
    check_refused(path)


@pytest.mark.parametrize("cut", [1, 7, 8, 9, 100, 1000, 5000, -1])
def test_a_truncated_file_is_refused(single, tmp_path, cut):
    check_refused(write(tmp_path / "x.safetensors", single.read_bytes()[:cut]))


def test_shipped_checkpoints_are_read_as_torch_reads_them(single, vit):
    for path in (single, vit):
        header = read_header(path)
        assert header.tensors == tensor_infos(load_file(path))
        assert list(header.tensors) == sorted(header.tensors)
        with safe_open(path, "pt") as file:
            assert header.metadata == json.loads(file.metadata()["moeprune"])


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_type_is_known_by_its_name_in_torch_and_its_size(dtype, tmp_path):
    name, itemsize = DTYPES[dtype]
    content = with_tensor(8 * itemsize, dtype=dtype, shape=[8], data_offsets=[0, 8 * itemsize])
    path = write(tmp_path / "x.safetensors", content)
    assert read_header(path).tensors == tensor_infos(load_file(path)) == {"a": TensorInfo(name, (8,), 8 * itemsize)}


def test_the_number_of_elements():
    assert TensorInfo("torch.float16", (3, 4), 24).numel == 12
    assert TensorInfo("torch.float16", (), 2).numel == 1
    assert TensorInfo("torch.float16", (3, 0), 0).numel == torch.empty(3, 0).numel()
