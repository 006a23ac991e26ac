"""Ctrl-C ends every command with 130, SIGTERM with 143, and no partial file is left behind."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import pytest

import moeprune
from moeprune.__main__ import main
from moeprune.layers.config import SoftMoEConfig
from moeprune.models.architecture import BlockConfig, ViTConfig
from moeprune.models.vit import SoftMoEViT
from tests.endings import PATIENCE, files_under, time_limit
from tests.stock import NEEDS, WRITERS

needs_proc = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="watches processes")


@pytest.mark.slow
@needs_proc
@pytest.mark.parametrize("library", ["_multiarray_umath", "libtorch_python", "_check_build"])
def test_interrupted_imports_are_an_interrupt_too(single, tmp_path, library):
    """Libraries swallow a KeyboardInterrupt while they are imported, or make an ImportError of it."""
    call = f"-m moeprune analyze {single} --data digits --batch-size 1 -o {tmp_path}/output"
    with subprocess.Popen([sys.executable, *call.split()], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        while library not in Path(f"/proc/{process.pid}/maps").read_text():
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=PATIENCE)
    assert (process.returncode, output, errors) == (130, b"", b"")
    assert not list(tmp_path.iterdir())


SIGNALS = (signal.SIGTERM, signal.SIGINT)
MOMENTS = 10


@dataclass
class Started:
    """A command in a process of its own, a fork of this one so that nothing is imported anew."""

    pid: int
    shown: BinaryIO
    code: int | None = None

    def is_done(self) -> bool:
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.code = os.waitstatus_to_exitcode(status) if pid else None
        return self.code is not None

    def finish(self) -> bytes:
        """Wait until it is done; returns what it wrote to stdout and stderr."""
        with time_limit(PATIENCE):
            shown = self.shown.read()
            self.shown.close()
            while not self.is_done():
                time.sleep(0.001)
        return shown


def started(words: list[object]) -> Started:
    """A command that handles signals by now."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.dup2(writing, 1)
        os.dup2(writing, 2)
        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
        sys.argv = ["moeprune", *(str(word) for word in words)]
        code = 99
        try:
            main()
        except SystemExit as error:
            code = int(error.code or 0)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    os.close(writing)
    process = Started(pid, open(reading, "rb"))  # noqa: PTH123, SIM115
    while not process.is_done():
        caught = next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if "SigCgt" in line)
        if int(caught.split()[1], 16) >> (signal.SIGTERM - 1) & 1:
            break
    return process


def check_stopped(process: Started, *signals: int) -> int:
    """Send signals; the process ends, by one of them or because it was done. Returns its code."""
    for number in signals:
        if not process.is_done():
            os.kill(process.pid, number)
    shown = process.finish()
    assert process.code in (0, *(128 + number for number in signals)), shown
    assert b"Traceback" not in shown
    if process.code:
        assert shown == b"" or shown.startswith(b"wrote "), shown  # the report, where it was out already
    return process.code


@needs_proc
@pytest.mark.parametrize(("name", "number"), [("analyze", signal.SIGINT), ("eval report", signal.SIGTERM)])
def test_interrupted_work_leaves_files_as_they_were(stock, tmp_path, monkeypatch, name, number):
    """A model that takes long is interrupted in its midst."""
    reading, writing = os.pipe()

    def forward(self, images):
        os.write(writing, b"at work")
        time.sleep(PATIENCE)

    monkeypatch.setattr(SoftMoEViT, "forward", forward)
    suffix, command = WRITERS[name]
    output = tmp_path / f"output{suffix}"
    output.write_bytes(b"old")
    process = started([*stock.command(command, output), "--force"])
    with time_limit(PATIENCE):
        assert os.read(reading, 7) == b"at work"
    assert check_stopped(process, number) == 128 + number
    assert files_under(tmp_path) == {output.name: b"old"}


@pytest.mark.slow
@needs_proc
@pytest.mark.parametrize("name", [name for name in WRITERS if name not in ("analyze report", "prune within a drop")])
def test_a_signal_at_any_moment_leaves_whole_files_only(stock, tmp_path, name):
    suffix, command = WRITERS[name]
    if name in NEEDS:
        pytest.importorskip(NEEDS[name])
    output = tmp_path / f"output{suffix}"
    words = [*stock.command(command, output), "--force"]
    output.write_bytes(b"old")
    process, start = started(words), time.monotonic()
    shown = process.finish()
    takes = time.monotonic() - start
    whole = output.read_bytes()
    assert (process.code, whole != b"old") == (0, True), shown
    codes = set()
    for number in range(MOMENTS):
        output.write_bytes(b"old")
        process = started(words)
        time.sleep(number / MOMENTS * takes)
        code = check_stopped(process, SIGNALS[number % 2])
        codes.add(code)
        assert [path.name for path in tmp_path.iterdir()] == [output.name]
        assert output.read_bytes() in ((b"old", whole) if code else (whole,))
    assert {130, 143} <= codes


@pytest.mark.slow
@needs_proc
def test_a_signal_at_any_moment_of_a_demo_leaves_whole_files_only(tmp_path):
    pytest.importorskip("sklearn")
    for number in range(6):
        output = tmp_path / f"demo{number}"
        process = started(["demo", "--quiet", "-o", output])
        time.sleep(0.4 * number)
        assert check_stopped(process, SIGNALS[number % 2])
        for path in (path for path in output.rglob("*") if path.is_file()):
            assert not path.name.startswith(".")
            if path.suffix == ".safetensors":
                (moeprune.load_analysis if path.stem == "analysis" else moeprune.load)(path)


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> Path:
    """A checkpoint of 130 MB: writing it takes a while."""
    blocks = (BlockConfig(soft_moe=SoftMoEConfig(256, 128, 1, 512)),)
    config = ViTConfig((8, 8), (4, 4), 1, 10, 256, 4, blocks, final_norm=False, head_norm=True)
    path = tmp_path_factory.mktemp("large") / "large.safetensors"
    moeprune.save(SoftMoEViT(config).eval(), path)
    return path


WRITING = {
    "from file to file": ("x.safetensors", ["prune", "--keep", "120", *["--signal", "random", "--compensate", "none"]]),
    "in memory": (
        "x.safetensors",
        ["prune", "--keep", "2", *["--scope", "input", "--signal", "combine", "--compensate", "none"]],
    ),
    "to another library": ("x.safetensors", ["export", "--to", "soft-moe"]),
    "to a torch file": ("x.pt", ["export", "--to", "soft-moe"]),
}


@pytest.mark.slow
@needs_proc
@pytest.mark.parametrize("name", WRITING)
def test_a_file_that_is_being_written_is_removed(large, tmp_path, name):
    file, words = WRITING[name]
    output = tmp_path / file
    stopped = 0
    for signals in ((signal.SIGTERM,), (signal.SIGINT,), (signal.SIGTERM, signal.SIGINT, signal.SIGTERM)):
        output.write_bytes(b"old")
        process = started([*words, large, "-o", output, "--force"])
        while not process.is_done() and len(list(tmp_path.iterdir())) == 1:
            time.sleep(0.0005)
        code = check_stopped(process, *signals)
        assert list(tmp_path.iterdir()) == [output]
        assert (output.read_bytes() == b"old") == bool(code)
        stopped += bool(code)
    assert stopped
