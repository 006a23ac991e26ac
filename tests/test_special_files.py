"""Pipes, devices, folders, sockets and links where a file is expected: an error, and no waiting for ever."""

import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.endings import complaint
from tests.stock import READERS

pytestmark = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")


def listening(path: Path) -> None:
    here = Path.cwd()
    os.chdir(path.parent)  # names of sockets are short
    try:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(path.name)
    finally:
        os.chdir(here)


def long_chain(path: Path) -> None:
    for number in range(100):
        path.with_name(f"{number}").symlink_to(path.with_name(f"{number + 1}"))
    path.symlink_to(path.with_name("0"))


SPECIAL: dict[str, Callable[[Path], None]] = {
    "a pipe": lambda path: os.mkfifo(path),
    "a folder": Path.mkdir,
    "a socket": listening,
    "a link to itself": lambda path: path.symlink_to(path),
    "a long chain of links": long_chain,
    "a dangling link": lambda path: path.symlink_to(path.with_name("nothing")),
    "zeros without end": lambda path: path.symlink_to("/dev/zero"),
    "nothing": lambda path: path.symlink_to("/dev/null"),
    "a terminal": lambda path: path.symlink_to("/dev/tty"),
}
every_special_file = pytest.mark.parametrize(
    "name", [name if name == "a pipe" else pytest.param(name, marks=pytest.mark.slow) for name in SPECIAL]
)


@every_special_file
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
        if name == "a folder":  # of images, of a class
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


@pytest.mark.parametrize("option", ["--output-file", "-o"])
@every_special_file
def test_outputs_that_are_no_files_are_left_alone(stock, run, tmp_path, option, name):
    path = tmp_path / "special"
    SPECIAL[name](path)
    if name in ("a dangling link", "a long chain of links"):
        pytest.skip("leads to a file that can be written")
    output = "" if option == "-o" else "-o NEW"
    words = stock.command(
        f"prune @dense.safetensors --keep 2 --signal random --compensate none --force {option} PATH {output}", path
    )
    assert complaint(run, words, stock.root / "out", "special") is None
    assert path.is_symlink() or not path.is_file()
