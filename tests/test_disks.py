"""Disks that are full or read-only: the error says so, and nothing half-written is left."""

from __future__ import annotations

import contextlib
import errno
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.endings import files_under
from tests.stock import SOURCE_ARGS, Stock

resource = pytest.importorskip("resource", reason="needs the limits of Unix")

SIZE = 64 * 1024
LIMIT = 100
"""Bytes of the largest file that may be written where the disk is not full, but files are limited."""

WRITERS: dict[str, tuple[str, Callable[[Stock, Path], list[object]]]] = {
    "inspect report": ("x.json", lambda s, o: ["inspect", s.path("dense.safetensors"), "--output-file", o]),
    "analyze": ("x.safetensors", lambda s, o: ["analyze", *s.dense_and_data, "-o", o]),
    "analyze report": (
        "x.txt",
        lambda s, o: ["analyze", *s.dense_and_data, "-o", s.output, "--output-file", o],
    ),
    "prune from file to file": (
        "x.safetensors",
        lambda s, o: ["prune", s.path("dense.safetensors"), "--keep", 2, "--signal", "random", "-o", o],
    ),
    "prune in memory": (
        "x.safetensors",
        lambda s, o: ["prune", s.path("dense.safetensors"), "--keep", 2, "--scope", "input", "-o", o],
    ),
    "prune with a fit": (
        "x.safetensors",
        lambda s, o: ["prune", *s.dense_and_data, "--keep", 2, "--compensate", "lstsq", "-o", o],
    ),
    "prune within a drop": (
        "x.safetensors",
        lambda s, o: [
            "prune", s.path("dense.safetensors"), "--data", "digits", "--limit", 60, "--max-accuracy-drop", 1,
            "--compensate", "mean", "-o", o,
        ],
    ),
    "save a plan": (
        "x.json",
        lambda s, o: [
            "prune", s.path("dense.safetensors"), "--keep", 2, "--scope", "input", "--save-plan", o,
        ],
    ),
    "convert": (
        "x.safetensors",
        lambda s, o: ["convert", s.path("foreign.safetensors"), *SOURCE_ARGS, "-o", o],
    ),
    "convert back": (
        "x.safetensors",
        lambda s, o: ["convert", s.path("dense.safetensors"), "--to", "soft-moe", "-o", o],
    ),
    "convert to a torch file": (
        "x.pt",
        lambda s, o: ["convert", s.path("dense.safetensors"), "--to", "soft-moe", "-o", o],
    ),
    "eval report": ("x.json", lambda s, o: ["eval", *s.dense_and_data, "--output-file", o]),
    "frontier": (
        "x.svg",
        lambda s, o: [
            "eval", *s.dense_and_data, "--analysis", s.path("analysis.safetensors"), "--sweep", "1/2",
            "--plot", o,
        ],
    ),
}  # fmt: skip
"""Every way in which a command writes a file: the file's name, and the words."""


def is_missing(name: str) -> str | None:
    """The library that a way to write needs and that is not there."""
    needed = {"frontier": "matplotlib", "prune within a drop": "sklearn"}.get(name)
    return None if needed is None or __import__("importlib.util").util.find_spec(needed) else needed


def mounted(folder: Path) -> bool:
    command = ["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "none", str(folder)]
    try:
        return subprocess.run(command, capture_output=True, check=False).returncode == 0
    except OSError:
        return False


@pytest.fixture
def disk(tmp_path) -> Iterator[Path]:
    """A file system of 64 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if sys.platform != "linux" or not mounted(folder):
        pytest.skip("this user cannot mount a file system")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(folder: Path) -> None:
    with contextlib.suppress(OSError), (folder / "filler").open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))


@contextlib.contextmanager
def limited_files() -> Iterator[None]:
    """No file may be longer than LIMIT, as if the disk were full then; Python ignores the signal."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def check_refused(run, words: list[object], folder: Path, *fragments: str) -> None:
    before = files_under(folder)
    result = run(*words)
    assert result.code == 2, result.stderr
    assert result.stderr.startswith("error: "), result.stderr
    assert "Traceback" not in result.stderr
    for fragment in fragments:
        assert fragment in result.stderr
    assert files_under(folder) == before


@pytest.fixture(
    params=[
        pytest.param(name, marks=pytest.mark.slow) if name in ("frontier", "prune within a drop") else name
        for name in WRITERS
    ]
)
def writer(request) -> tuple[str, Callable[[Stock, Path], list[object]]]:
    if library := is_missing(request.param):
        pytest.skip(f"{library} is not installed")
    return WRITERS[request.param]


@pytest.mark.slow
@pytest.mark.parametrize("exists", [False, True])
def test_a_full_disk(stock, run, disk, writer, exists):
    name, words = writer
    if exists:
        (disk / name).write_bytes(b"old")
    fill(disk)
    reason = os.strerror(errno.ENOSPC)
    check_refused(run, [*words(stock, disk / name), "--force"], disk, f"`{disk / name}`", reason)


def test_files_that_may_not_be_so_long(stock, run, tmp_path, writer):
    """Like a full disk, for every user."""
    name, words = writer
    if stock.output in words(stock, tmp_path):
        pytest.skip("writes another file before")
    (tmp_path / name).write_bytes(b"old")
    reason = os.strerror(errno.EFBIG)
    with limited_files():
        check_refused(
            run, [*words(stock, tmp_path / name), "--force"], tmp_path, f"`{tmp_path / name}`", reason
        )


@pytest.mark.slow
def test_a_read_only_disk(stock, run, disk, writer):
    name, words = writer
    (disk / name).write_bytes(b"old")
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    check_refused(run, [*words(stock, disk / name), "--force"], disk, f"`{disk}`", "read-only")


@pytest.mark.slow
def test_a_demo_on_a_disk_that_is_full_or_read_only(run, disk):
    pytest.importorskip("sklearn")
    fill(disk)
    result = run("demo", "-o", disk / "demo")
    assert (result.code, result.stdout) == (2, "")
    assert result.stderr.startswith(f"error: cannot write `{disk / 'demo'}")
    assert os.strerror(errno.ENOSPC) in result.stderr
    assert [path for path in disk.rglob("*") if path.is_file()] == [disk / "filler"]
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    result = run("demo", "-o", disk / "other")
    assert (result.code, result.stdout) == (2, "")
    assert os.strerror(errno.EROFS) in result.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize(
    ("words", "unbuffered"),
    [
        (["--version"], ""),
        (["--help"], "1"),
        (["inspect", "@"], "1"),
        (["inspect", "@", "--output-format", "json"], ""),
    ],
)
def test_a_full_stdout(single, words, unbuffered):
    words = [str(single) if word == "@" else word for word in words]
    environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    with Path("/dev/full").open("wb") as full:
        command = [sys.executable, "-m", "moeprune", *words]
        result = subprocess.run(
            command, stdout=full, stderr=subprocess.PIPE, env=environment, check=False, text=True
        )
    assert (result.returncode, result.stderr) == (
        2,
        f"error: cannot write to stdout ({os.strerror(errno.ENOSPC)})\n",
    )
