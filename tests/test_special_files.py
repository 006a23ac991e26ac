"""Pipes, devices, folders, sockets and links where a file is expected: an error, and no waiting for ever."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.endings import complaint

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
READERS = {
    "inspect": (".safetensors", "inspect PATH"),
    "analyze": (".safetensors", "analyze PATH --data @data.npz -o NEW"),
    "prune": (".safetensors", "prune PATH --keep 2 --scope input -o NEW"),
    "prune --analysis": (".safetensors", "prune @dense.safetensors --keep 2 --analysis PATH -o NEW"),
    "prune --plan": (".json", "prune @dense.safetensors --plan PATH -o NEW"),
    "prune --plan of a checkpoint": (".safetensors", "prune @dense.safetensors --plan PATH -o NEW"),
    "eval": (".safetensors", "eval PATH --data @data.npz"),
    "eval --baseline": (".safetensors", "eval @dense.safetensors --data @data.npz --baseline PATH"),
    "eval --analysis": (
        ".safetensors", "eval @dense.safetensors --data @data.npz --sweep 1/2 --analysis PATH",
    ),
    "eval --data array": (".npz", "eval @dense.safetensors --data PATH"),
    "eval --data tensors": (".safetensors", "eval @dense.safetensors --data PATH"),
    "eval --data another": ("", "eval @dense.safetensors --data PATH"),
    "inspect torch": (".pt", "inspect PATH"),
    "inspect index": (".safetensors.index.json", "inspect PATH"),
    "inspect own model": (".pt", "inspect PATH --model os:getcwd --input-shape 1,8,8"),
    "export": (".safetensors", "export PATH --to soft-moe -o NEW"),
}  # fmt: skip
"""Every way in which a command reads a file: its suffix, and the command."""


@pytest.mark.parametrize(
    "name", [name if name == "a pipe" else pytest.param(name, marks=pytest.mark.slow) for name in SPECIAL]
)
@pytest.mark.parametrize("reader", READERS)
def test_what_is_no_file_is_refused_at_once(stock, tmp_path, reader, name):
    suffix, command = READERS[reader]
    path = tmp_path / f"special{suffix}"
    SPECIAL[name](path)
    assert complaint(stock.run, stock.command(command, path), stock.root / "out", "special") is None


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
        words = stock.command("analyze @dense.safetensors --data PATH -o NEW", data)
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
    output = "" if option == "-o" else "-o NEW"
    words = stock.command(f"prune @dense.safetensors --keep 2 --signal random --force {option} PATH {output}", path)
    assert complaint(run, words, stock.root / "out", "special") is None
    assert path.is_symlink() or not path.is_file()
