"""What the tests share: the shipped checkpoints, analyses of them, and the commands run in process."""

import functools
import json
import os
import shlex
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

if not Path("/proc/driver/nvidia").exists():
    os.environ["TRITON_INTERPRET"] = "1"  # kernels run on the CPU, slowly; read when torch is imported

import pytest
import torch
from typer.testing import CliRunner

import moeprune
from moeprune.cli import app
from tests.schemas import complaints, schema_of
from tests.stock import Stock, make_stock

os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that tests start


class Result(NamedTuple):
    """How a command ended and what it wrote."""

    code: int
    stdout: str
    stderr: str


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Of a test with the marker `mostly_slow`, all parameters but the first ones are slow."""
    counts = Counter[str]()
    for item in items:
        if (marker := item.get_closest_marker("mostly_slow")) is not None:
            name = item.nodeid.partition("[")[0]
            counts[name] += 1
            if counts[name] > marker.args[0]:
                item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    """The models are so small that threads on busy cores cost more than they save."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def words_of(call: tuple[object, ...]) -> list[str]:
    """The words of a call: a command line as one text, or its words, anything that has a string form."""
    return shlex.split(str(call[0])) if len(call) == 1 else [str(word) for word in call]


@pytest.fixture(scope="session")
def run() -> Callable[..., Result]:
    """Run a command in process."""

    def run(*call: object) -> Result:
        result = CliRunner().invoke(app, words_of(call), prog_name="moeprune", catch_exceptions=False)
        return Result(result.exit_code, result.stdout, result.stderr)

    return run


@pytest.fixture(scope="session")
def program() -> Callable[..., Result]:
    """Run a command in a process of its own, as users start it."""

    def program(*call: object) -> Result:
        words = [sys.executable, "-m", "moeprune", *words_of(call)]
        ended = subprocess.run(words, capture_output=True, text=True, check=False)
        return Result(ended.returncode, ended.stdout, ended.stderr)

    return program


@pytest.fixture(scope="session")
def printed(run: Callable[..., Result]) -> Callable[..., str]:
    """Run a command that succeeds and has nothing to warn of; what it prints."""

    def printed(*call: object) -> str:
        result = run(*call)
        assert (result.code, result.stderr) == (0, ""), call
        return result.stdout

    return printed


@pytest.fixture(scope="session")
def run_json(run: Callable[..., Result]) -> Callable[..., dict[str, Any]]:
    """Run a command that succeeds and read its JSON, which the schema allows and which has all that stderr has."""

    def run_json(*call: object) -> dict[str, Any]:
        words = words_of(call)
        result = run(*words, "--output-format", "json")
        assert result.code == 0, (call, result.stderr)
        found = json.loads(result.stdout)
        assert result.stderr.splitlines() == [f"warning: {text}" for text in found.get("warnings", ())], call
        assert complaints(schema_of(words, found), found) == []
        return found

    return run_json


@pytest.fixture(scope="session")
def made(run: Callable[..., Result], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Run a command that succeeds, given without its output; the file that it makes."""

    def made(call: str) -> Path:
        path = tmp_path_factory.mktemp("made") / "made.safetensors"
        result = run(f"{call} -o {path}")
        assert result.code == 0, result.stderr
        return path

    return made


def _shipped(name: str) -> Iterator[Path]:
    with resources.as_file(resources.files("moeprune.demo") / "checkpoints" / f"{name}.safetensors") as path:
        yield path


@pytest.fixture(scope="session")
def single() -> Iterator[Path]:
    """The shipped checkpoint of one Soft MoE layer with 128 experts, for digits."""
    yield from _shipped("single")


@pytest.fixture(scope="session")
def vit() -> Iterator[Path]:
    """The shipped vision transformer with several Soft MoE layers, for pairs of digits."""
    yield from _shipped("vit")


@pytest.fixture(scope="session")
def single_analysis(single: Path, made: Callable[[str], Path]) -> Path:
    """An analysis of `single` on all calibration digits."""
    return made(f"analyze {single} --data digits --batch-size 128")


@pytest.fixture(scope="session")
def small_analysis(single: Path, made: Callable[[str], Path]) -> Path:
    """An analysis of `single` on 60 calibration digits, for what only has to be fast."""
    return made(f"analyze {single} --data digits --limit 60")


@pytest.fixture(scope="session")
def vit_analysis(vit: Path, made: Callable[[str], Path]) -> Path:
    """An analysis of `vit` on 100 calibration pairs."""
    return made(f"analyze {vit} --data pairs --limit 100")


@pytest.fixture(scope="session")
def forgetful(single: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`single` with a head that never says 3: a class that collapses, and gates that fail."""
    model = moeprune.load(single)
    model.head.bias.data[3] = -1e3
    path = tmp_path_factory.mktemp("forgetful") / "forgetful.safetensors"
    moeprune.save(model, path)
    return path


@pytest.fixture(scope="session")
def stock(run: Callable[..., Result], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stock]:
    """Small good files of every kind; who changes one puts it back."""
    before = list(sys.path)
    yield make_stock(tmp_path_factory.mktemp("stock"), run)
    sys.path[:] = before


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A file of short texts, and a tokenizer beside it."""
    from tests.language import make_tokenizer, write_lines

    folder = tmp_path_factory.mktemp("text")
    texts = [f"text number {n} of some {'more ' * (n % 5)}words" for n in range(40)]
    make_tokenizer(folder, texts)
    return write_lines(folder / "text.jsonl", [{"text": text} for text in texts])


@pytest.fixture(scope="module")
def speaking(text, tmp_path_factory):
    """Return the folder of a small model with a tokenizer, in several shards."""
    from tests.architectures import language_model
    from tests.language import V

    @functools.cache
    def speaking(name: str, dtype: torch.dtype = torch.float32, **changes) -> Path:
        folder = tmp_path_factory.mktemp(name) / "full"
        model = language_model(name, vocab_size=V, **changes).to(dtype)
        model.save_pretrained(folder, max_shard_size="40KB")
        for file in ("tokenizer.json", "tokenizer_config.json"):
            (folder / file).write_bytes((text.parent / file).read_bytes())
        return folder

    return speaking
