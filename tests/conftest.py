"""What the tests share: the shipped checkpoints, analyses of them, and the commands run in process."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

if not Path("/proc/driver/nvidia").exists():
    os.environ["TRITON_INTERPRET"] = "1"  # kernels run on the CPU, slowly; read when torch is imported

import pytest
import torch
from typer.testing import CliRunner

from moeprune.cli import app
from tests.schemas import complaints, schema_of
from tests.stock import Stock, make_stock

os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that tests start


class Result(NamedTuple):
    """How a command ended and what it wrote."""

    code: int
    stdout: str
    stderr: str


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    """The models are so small that threads on busy cores cost more than they save."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def run() -> Callable[..., Result]:
    """Run a command in process; arguments may be anything that has a string form."""

    def run(*arguments: object) -> Result:
        words = [str(argument) for argument in arguments]
        result = CliRunner().invoke(app, words, prog_name="moeprune", catch_exceptions=False)
        return Result(result.exit_code, result.stdout, result.stderr)

    return run


@pytest.fixture(scope="session")
def program() -> Callable[..., Result]:
    """Run a command in a process of its own, as users start it."""

    def program(*arguments: object) -> Result:
        words = [sys.executable, "-m", "moeprune", *map(str, arguments)]
        ended = subprocess.run(words, capture_output=True, text=True, check=False)
        return Result(ended.returncode, ended.stdout, ended.stderr)

    return program


@pytest.fixture(scope="session")
def run_json(run: Callable[..., Result]) -> Callable[..., dict[str, Any]]:
    """Run a command that succeeds and read its JSON, which the published schema allows."""

    def run_json(*arguments: object) -> dict[str, Any]:
        result = run(*arguments, "--output-format", "json")
        assert result.code == 0, result.stderr
        assert result.stderr == ""
        found = json.loads(result.stdout)
        assert complaints(schema_of(map(str, arguments), found), found) == []
        return found

    return run_json


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
def analyzed(run: Callable[..., Result], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Analyze a checkpoint, with options of `analyze`; where the analysis is."""

    def analyzed(checkpoint: Path, *options: object) -> Path:
        path = tmp_path_factory.mktemp("analysis") / "analysis.safetensors"
        result = run("analyze", checkpoint, *options, "-o", path)
        assert result.code == 0, result.stderr
        return path

    return analyzed


@pytest.fixture(scope="session")
def single_analysis(single: Path, analyzed: Callable[..., Path]) -> Path:
    """An analysis of `single` on all calibration digits."""
    return analyzed(single, "--data", "digits", "--batch-size", 128)


@pytest.fixture(scope="session")
def small_analysis(single: Path, analyzed: Callable[..., Path]) -> Path:
    """An analysis of `single` on 60 calibration digits, for what only has to be fast."""
    return analyzed(single, "--data", "digits", "--limit", 60)


@pytest.fixture(scope="session")
def vit_analysis(vit: Path, analyzed: Callable[..., Path]) -> Path:
    """An analysis of `vit` on 100 calibration pairs."""
    return analyzed(vit, "--data", "pairs", "--limit", 100)


@pytest.fixture(scope="session")
def stock(run: Callable[..., Result], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stock]:
    """Small good files of every kind; who changes one puts it back."""
    before = list(sys.path)
    yield make_stock(tmp_path_factory.mktemp("stock"), run)
    sys.path[:] = before
