"""Pipes, devices, folders, sockets and links where a file is expected: an error, and no waiting for ever."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.endings import complaint
from tests.stock import Stock

pytestmark = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")


def pipe(path: Path) -> None:
    os.mkfifo(path)


def folder(path: Path) -> None:
    path.mkdir()


def listening(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        here = Path.cwd()
        os.chdir(path.parent)  # names of sockets are short
        try:
            server.bind(path.name)
        finally:
            os.chdir(here)


def link_to_itself(path: Path) -> None:
    path.symlink_to(path)


def long_chain(path: Path) -> None:
    for number in range(100):
        path.with_name(f"{number}").symlink_to(path.with_name(f"{number + 1}"))
    path.symlink_to(path.with_name("0"))


def dangling(path: Path) -> None:
    path.symlink_to(path.with_name("nothing"))


def device(name: str) -> Callable[[Path], None]:
    return lambda path: path.symlink_to(f"/dev/{name}")


SPECIAL = {
    "a pipe": pipe,
    "a folder": folder,
    "a socket": listening,
    "a link to itself": link_to_itself,
    "a long chain of links": long_chain,
    "a dangling link": dangling,
    "zeros without end": device("zero"),
    "nothing": device("null"),
    "a terminal": device("tty"),
}
READERS: dict[str, tuple[str, Callable[[Stock, Path], list[object]]]] = {
    "inspect": (".safetensors", lambda s, p: ["inspect", p]),
    "analyze": (".safetensors", lambda s, p: ["analyze", p, "--data", s.path("data.npz"), "-o", s.new]),
    "prune": (".safetensors", lambda s, p: ["prune", p, "--keep", 2, "--scope", "input", "-o", s.new]),
    "prune --analysis": (
        ".safetensors",
        lambda s, p: ["prune", s.path("dense.safetensors"), "--keep", 2, "--analysis", p, "-o", s.new],
    ),
    "prune --plan": (".json", lambda s, p: ["prune", s.path("dense.safetensors"), "--plan", p, "-o", s.new]),
    "prune --plan of a checkpoint": (
        ".safetensors",
        lambda s, p: ["prune", s.path("dense.safetensors"), "--plan", p, "-o", s.new],
    ),
    "eval": (".safetensors", lambda s, p: ["eval", p, "--data", s.path("data.npz")]),
    "eval --baseline": (".safetensors", lambda s, p: ["eval", *s.dense_and_data, "--baseline", p]),
    "eval --analysis": (
        ".safetensors",
        lambda s, p: ["eval", *s.dense_and_data, "--sweep", "1/2", "--analysis", p],
    ),
    "eval --data array": (".npz", lambda s, p: ["eval", s.path("dense.safetensors"), "--data", p]),
    "eval --data tensors": (".safetensors", lambda s, p: ["eval", s.path("dense.safetensors"), "--data", p]),
    "eval --data another": ("", lambda s, p: ["eval", s.path("dense.safetensors"), "--data", p]),
    "convert": (".safetensors", lambda s, p: ["convert", p, "-o", s.new]),
    "convert torch": (".pt", lambda s, p: ["convert", p, "-o", s.new]),
    "convert index": (".safetensors.index.json", lambda s, p: ["convert", p, "-o", s.new]),
    "convert own model": (
        ".pt",
        lambda s, p: ["convert", p, "--model", "os:getcwd", "--input-shape", "1,8,8", "-o", s.new],
    ),
    "convert back": (".safetensors", lambda s, p: ["convert", p, "--to", "soft-moe", "-o", s.new]),
}
"""Every way in which a command reads a file: its suffix, and the words."""


@pytest.mark.parametrize("reader", READERS)
def test_a_pipe_is_not_waited_for(stock, run, tmp_path, reader):
    suffix, words = READERS[reader]
    path = tmp_path / f"special{suffix}"
    pipe(path)
    assert complaint(run, words(stock, path), stock.root / "out", "special") is None


@pytest.mark.slow
@pytest.mark.parametrize("reader", READERS)
def test_what_is_no_file_is_refused_at_once(stock, run, tmp_path, reader):
    suffix, words = READERS[reader]
    for name, make in SPECIAL.items():
        (tmp_path / name).mkdir()
        path = tmp_path / name / f"special{suffix}"
        make(path)
        assert complaint(run, words(stock, path), stock.root / "out", "special") is None, name


@pytest.mark.slow
def test_images_that_are_no_files(stock, run, tmp_path):
    image = pytest.importorskip("PIL.Image")
    for name, make in SPECIAL.items():
        if make is folder:  # of images, of a class
            continue
        data = tmp_path / name
        data.mkdir()
        image.new("L", (8, 8)).save(data / "a.png")
        make(data / "special.png")
        words = ["analyze", stock.path("dense.safetensors"), "--data", data, "-o", stock.new]
        assert complaint(run, words, stock.root / "out", "special.png") is None, name


def test_a_folder_of_images_that_links_to_itself_is_read_once(stock, run, tmp_path):
    image = pytest.importorskip("PIL.Image")
    for label in range(9):
        (tmp_path / str(label)).mkdir()
        image.new("L", (8, 8)).save(tmp_path / str(label) / "a.png")
    (tmp_path / "9").symlink_to(tmp_path)
    result = run("eval", stock.path("dense.safetensors"), "--data", tmp_path)
    assert (result.code, result.stderr) == (0, "")
    assert "(9 samples)" in result.stdout


@pytest.mark.slow
@pytest.mark.parametrize("option", ["--output-file", "-o"])
@pytest.mark.parametrize("name", SPECIAL)
def test_outputs_that_are_no_files_are_left_alone(stock, run, tmp_path, option, name):
    path = tmp_path / "special"
    SPECIAL[name](path)
    if name in ("a dangling link", "a long chain of links"):
        pytest.skip("leads to a file that can be written")
    words = [
        "prune",
        stock.path("dense.safetensors"),
        "--keep",
        2,
        "--scope",
        "input",
        "--force",
        option,
        path,
    ]
    words += [] if option == "-o" else ["-o", stock.new]
    assert complaint(run, words, stock.root / "out", "special") is None
    assert path.is_symlink() or not path.is_file()
