"""Disks that are full or read-only: the error says so, and nothing half-written is left."""

import contextlib
import errno
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.endings import refusal
from tests.stock import NEEDS, WRITERS, Stock

resource = pytest.importorskip("resource", reason="needs the limits of Unix")

SIZE = 64 * 1024
LIMIT = 100
"""Bytes of the largest file that may be written where the disk is not full, but files are limited."""


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


@pytest.fixture(params=[pytest.param(name, marks=pytest.mark.slow) if name in NEEDS else name for name in WRITERS])
def writer(request) -> tuple[str, str]:
    if request.param in NEEDS:
        pytest.importorskip(NEEDS[request.param])
    return WRITERS[request.param]


def check_refused(stock: Stock, command: str, path: Path, *fragments: str) -> None:
    refusal(stock.run, [*stock.command(command, path), "--force"], *fragments, folder=path.parent)


@pytest.mark.slow
@pytest.mark.parametrize("exists", [False, True])
def test_a_full_disk(stock, disk, writer, exists):
    suffix, command = writer
    path = disk / f"x{suffix}"
    if exists:
        path.write_bytes(b"old")
    fill(disk)
    check_refused(stock, command, path, f"`{path}`", os.strerror(errno.ENOSPC))


def test_files_that_may_not_be_so_long(stock, tmp_path, writer):
    """Like a full disk, for every user."""
    suffix, command = writer
    if "OLD" in command:
        pytest.skip("writes another file before")
    path = tmp_path / f"x{suffix}"
    path.write_bytes(b"old")
    with limited_files():
        check_refused(stock, command, path, f"`{path}`", os.strerror(errno.EFBIG))


@pytest.mark.slow
def test_a_read_only_disk(stock, disk, writer):
    suffix, command = writer
    path = disk / f"x{suffix}"
    path.write_bytes(b"old")
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    check_refused(stock, command, path, f"`{disk}`", "read-only")


@pytest.mark.slow
def test_a_demo_on_a_disk_that_is_full_or_read_only(run, disk):
    pytest.importorskip("sklearn")
    fill(disk)
    refusal(run, ["demo", "-o", disk / "demo"], f"error: cannot write `{disk / 'demo'}", os.strerror(errno.ENOSPC))
    assert [path for path in disk.rglob("*") if path.is_file()] == [disk / "filler"]
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    refusal(run, ["demo", "-o", disk / "other"], os.strerror(errno.EROFS))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize(
    ("call", "unbuffered"),
    [("--version", ""), ("--help", "1"), ("inspect @", "1"), ("inspect @ --output-format json", "")],
)
def test_a_full_stdout(single, call, unbuffered):
    environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    with Path("/dev/full").open("wb") as full:
        command = [sys.executable, "-m", "moeprune", *call.replace("@", str(single)).split()]
        result = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, env=environment, check=False, text=True)
    assert (result.returncode, result.stderr) == (2, f"error: cannot write to stdout ({os.strerror(errno.ENOSPC)})\n")
