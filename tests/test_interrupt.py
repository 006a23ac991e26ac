"""Ctrl-C ends every command with 130 and leaves no partial file behind."""

from __future__ import annotations

import os
import select
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import moeprune

fcntl = pytest.importorskip("fcntl", reason="needs a Unix terminal")
termios = pytest.importorskip("termios", reason="needs a Unix terminal")
pty = pytest.importorskip("pty", reason="needs a Unix terminal")

SAMPLES = 6000
PATIENCE = 60.0


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """So many samples that one at a time takes seconds."""
    path = tmp_path_factory.mktemp("data") / "data.npz"
    np.savez(path, inputs=np.zeros((SAMPLES, 1, 8, 8), np.float16), labels=np.zeros(SAMPLES, np.int64))
    return path


def interrupt(words: list[object], ready: Callable[[bytes], bool]) -> tuple[int, bytes, bytes]:
    """Start a command with a terminal as stderr and press Ctrl-C once what it shows there says it works.

    Returns:
        Its exit code, stdout and stderr.
    """
    terminal, errors = pty.openpty()
    fcntl.ioctl(errors, termios.TIOCSWINSZ, struct.pack("HHHH", 25, 100, 0, 0))
    command = [sys.executable, "-m", "moeprune", *(str(word) for word in words)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors) as process:
        os.close(errors)
        shown = b""
        try:
            deadline = time.monotonic() + PATIENCE
            while not ready(shown):
                assert process.poll() is None, shown
                assert time.monotonic() < deadline, shown
                if select.select([terminal], [], [], 0.1)[0]:
                    shown += read(terminal)
            process.send_signal(signal.SIGINT)
            output = process.stdout.read()
            process.wait(PATIENCE)
            while more := read(terminal):
                shown += more
        finally:
            process.kill()
            os.close(terminal)
    return process.returncode, output, shown


def read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 4096)
    except OSError:  # Linux says so when the other end is closed
        return b""


def bar_moves(name: str) -> Callable[[bytes], bool]:
    """Whether the progress bar of this name has counted some of the samples."""

    def moves(shown: bytes) -> bool:
        bars = [part for part in shown.split(b"\r") if part.startswith(name.encode())]
        return any(f" 0/{SAMPLES} ".encode() not in bar for bar in bars)

    return moves


CALLS = {
    "analyze": ("analyze", ["analyze"]),
    "measuring": ("measure", ["prune", "--keep", "1/8", "--signal", "random", "--compensate", "mean"]),
    "fit": ("fit", ["prune", "--keep", "1/8", "--scope", "input", "--compensate", "lstsq"]),
    "eval": ("eval", ["eval"]),
}
"""The progress bar to wait for, the command and what it needs beside a checkpoint, data and output."""


@pytest.fixture(scope="module")
def data_analysis(single, data, run, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("analysis") / "analysis.safetensors"
    assert run("analyze", single, "--data", data, "--batch-size", 500, "-o", path).code == 0
    return path


@pytest.mark.parametrize("name", CALLS)
def test_interrupted_work_leaves_files_as_they_were(single, data, data_analysis, tmp_path, name):
    bar, words = CALLS[name]
    words = [*words, single, "--data", data, "--batch-size", 1, "--force"]
    if name == "fit":
        words += ["--analysis", data_analysis]
    output = tmp_path / "output"
    output.write_bytes(b"old")
    words += ["--output-file" if name == "eval" else "-o", output]
    code, stdout, shown = interrupt(words, bar_moves(bar))
    assert (code, stdout) == (130, b"")
    assert b"Traceback" not in shown
    assert b"error" not in shown
    assert [path.name for path in tmp_path.iterdir()] == ["output"]
    assert output.read_bytes() == b"old"


@pytest.mark.slow
def test_interrupted_demo_leaves_whole_files_only(tmp_path):
    pytest.importorskip("sklearn")
    output = tmp_path / "demo"
    done = output / "single" / "input-none-1-8.safetensors"
    code, stdout, shown = interrupt(["demo", "-o", output], lambda shown: done.exists())
    assert (code, stdout) == (130, b"")
    assert b"Traceback" not in shown
    files = [path for path in output.rglob("*") if path.is_file()]
    assert done in files
    assert not (output / "summary.json").exists()
    for path in files:
        assert path.suffix in (".safetensors", ".json")
        assert not path.name.startswith(".")
        if path.suffix == ".safetensors":
            (moeprune.load_analysis if path.stem == "analysis" else moeprune.load)(path)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="watches what a process loads")
@pytest.mark.parametrize("library", ["_multiarray_umath", "libtorch_python", "_check_build"])
def test_interrupted_imports_are_an_interrupt_too(single, tmp_path, library):
    """Libraries swallow a KeyboardInterrupt while they are imported, or make an ImportError of it."""
    words = ["analyze", single, "--data", "digits", "--batch-size", "1", "-o", tmp_path / "output"]
    command = [sys.executable, "-m", "moeprune", *(str(word) for word in words)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        maps = Path(f"/proc/{process.pid}/maps")
        while library not in maps.read_text():
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=PATIENCE)
    assert (process.returncode, output, errors) == (130, b"", b"")
    assert not list(tmp_path.iterdir())
