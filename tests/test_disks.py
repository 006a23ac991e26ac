"""Disks that are full or read-only: the error says so, and nothing half-written is left."""

from __future__ import annotations

import contextlib
import errno
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.endings import files_under
from tests.stock import SOURCE_ARGS, Stock

resource = pytest.importorskip("resource", reason="needs the limits of Unix")

SIZE = 64 * 1024
LIMIT = 100
"""Bytes of the largest file that may be written where the disk is not full, but files are limited."""

WRITERS = {
    "inspect report": ("x.json", "inspect @dense.safetensors --output-file PATH"),
    "analyze": ("x.safetensors", "analyze @dense.safetensors --data @data.npz -o PATH"),
    "analyze report": ("x.txt", "analyze @dense.safetensors --data @data.npz -o OLD --output-file PATH"),
    "prune from file to file": (
        "x.safetensors", "prune @dense.safetensors --keep 2 --signal random -o PATH",
    ),
    "prune in memory": ("x.safetensors", "prune @dense.safetensors --keep 2 --scope input -o PATH"),
    "prune with a fit": (
        "x.safetensors", "prune @dense.safetensors --data @data.npz --keep 2 --compensate lstsq -o PATH",
    ),
    "prune within a drop": (
        "x.safetensors",
        "prune @dense.safetensors --data digits --limit 60 --max-accuracy-drop 1 --compensate mean -o PATH",
    ),
    "save a plan": ("x.json", "prune @dense.safetensors --keep 2 --scope input --save-plan PATH"),
    "prune foreign": (
        "x.safetensors", f"prune @foreign.safetensors {SOURCE_ARGS} --keep 2 --signal random -o PATH",
    ),
    "export": ("x.safetensors", "export @dense.safetensors --to soft-moe -o PATH"),
    "export to a torch file": ("x.pt", "export @dense.safetensors --to soft-moe -o PATH"),
    "eval report": ("x.json", "eval @dense.safetensors --data @data.npz --output-file PATH"),
    "plot": (
        "x.svg",
        "eval @dense.safetensors --data @data.npz --analysis @analysis.safetensors --sweep 1/2 --plot PATH",
    ),
}  # fmt: skip
"""Every way in which a command writes a file: the file's name, and the command."""
NEEDS = {"plot": "matplotlib", "prune within a drop": "sklearn"}


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


def check_refused(stock: Stock, command: str, path: Path, *fragments: str) -> None:
    before = files_under(path.parent)
    result = stock.run(*stock.command(command, path), "--force")
    assert (result.code, result.stderr[:7]) == (2, "error: "), result.stderr
    assert "Traceback" not in result.stderr
    assert [fragment for fragment in fragments if fragment not in result.stderr] == []
    assert files_under(path.parent) == before


@pytest.fixture(params=[pytest.param(name, marks=pytest.mark.slow) if name in NEEDS else name for name in WRITERS])
def writer(request) -> tuple[str, str]:
    if request.param in NEEDS:
        pytest.importorskip(NEEDS[request.param])
    return WRITERS[request.param]


@pytest.mark.slow
@pytest.mark.parametrize("exists", [False, True])
def test_a_full_disk(stock, disk, writer, exists):
    name, command = writer
    if exists:
        (disk / name).write_bytes(b"old")
    fill(disk)
    check_refused(stock, command, disk / name, f"`{disk / name}`", os.strerror(errno.ENOSPC))


def test_files_that_may_not_be_so_long(stock, tmp_path, writer):
    """Like a full disk, for every user."""
    name, command = writer
    if "OLD" in command:
        pytest.skip("writes another file before")
    (tmp_path / name).write_bytes(b"old")
    with limited_files():
        check_refused(stock, command, tmp_path / name, f"`{tmp_path / name}`", os.strerror(errno.EFBIG))


@pytest.mark.slow
def test_a_read_only_disk(stock, disk, writer):
    name, command = writer
    (disk / name).write_bytes(b"old")
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    check_refused(stock, command, disk / name, f"`{disk}`", "read-only")


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
        result = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, env=environment, check=False, text=True)
    assert (result.returncode, result.stderr) == (2, f"error: cannot write to stdout ({os.strerror(errno.ENOSPC)})\n")
