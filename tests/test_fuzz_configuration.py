"""Hundreds of odd configuration files: taken, or refused with an error that says where it is set."""

import os
import random
from pathlib import Path
from typing import Any

import pytest

from tests.damage import EXTREMES, mutated, places, removed, replaced, toml
from tests.endings import check_none, complaint
from tests.stock import Stock

CASES = 100
"""Damaged files of each kind."""


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A working directory where nothing is set."""
    for name in [name for name in os.environ if name.startswith("MOEPRUNE_")]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def good(stock: Stock) -> dict[str, Any]:
    """A configuration with options of every type, for all commands and for one."""
    data, dense = str(stock.path("data.npz")), str(stock.path("dense.safetensors"))
    return {
        "limit": 9, "batch-size": 4, "data": data, "dtype": "float32", "quiet": False,
        "inspect": {"output-format": "json"}, "analyze": {"output": "analysis.safetensors"},
        "prune": {"output": "pruned.safetensors", "keep": "1/2", "signal": "random", "seed": 3},
        "eval": {
            "baseline": dense, "min-accuracy": 0.0, "min-agreement": 0, "latency-batch": [1], "latency": True,
            "preprocess": ["resize=8"], "confidence": 0.9,
        },
    }  # fmt: skip


COMMANDS = (
    "inspect @static.safetensors", "analyze @dense.safetensors", "prune @dense.safetensors", "eval @static.safetensors",
)  # fmt: skip
FILES = {
    "moeprune.toml": (),
    "pyproject.toml": ("tool", "moeprune"),
    "ci/given.toml": (),
    "ci/pyproject.toml": ("tool", "moeprune"),
}
"""Where the options stand in a file; those of a folder are named by `--config`."""

RAW = (
    "", "=", "1e999", "-inf", "nan", "0x1F", "1_000", "+9", "9" * 5000, "-" + "9" * 4000, "1979-05-27", "07:32:00",
    "1979-05-27T07:32:00Z", "'''a\nb'''", '"\\u0000\\u001b[31m"', '"\\ud800"', "[" * 900 + "]" * 900, "[" * 5000,
    "{a=" * 900 + "1" + "}" * 900, "{}", "{a = 1, a = 2}", "[1, 'a', [2]]", "[[]]", "[nan]", "True", "'x' y",
    "1 # text", "[1,\n2]", "1\r", "1\n1 = 2", "1\n[a.b.c]\nd = 1", "1\n[[eval]]\nlimit = 1", "\ufeff1",
)  # fmt: skip
"""Values as they stand in a file, many of which are none."""
KEYS = ("limt", "", "eval", "a.b", "x" * 3000, "ä😀", "a\x1b[31m", "batch_size", "checkpoint", "--limit")


def damaged(table: dict[str, Any], start: tuple[str, ...], chance: random.Random) -> tuple[bytes, str]:
    """A file with a damage, and the key that it has, empty where it may be any."""
    whole = toml(table)
    place = chance.choice([place for place in places(table) if len(place) > len(start)])
    [name, *_] = [key for key in place[::-1] if isinstance(key, str)]
    match chance.randrange(6):
        case 0:
            return mutated(whole.encode(), chance), ""
        case 1:
            return toml(removed(table, place)).encode(), ""
        case 2:
            key = (*place[:-1], chance.choice(KEYS)) if isinstance(place[-1], str) else place
            return toml(replaced(table, key, 1)).encode(), ""
        case 3 | 4:
            new = toml(replaced(table, place, "@raw")).replace('"@raw"', chance.choice(RAW))
            return new.encode("utf-8", "surrogatepass"), ""
        case _:
            values = [value for value in EXTREMES if "@" not in str(value) and "None" not in str(value)]
            return toml(replaced(table, place, chance.choice(values))).encode(), name


@pytest.mark.slow
@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", FILES)
def test_damaged_configurations_are_taken_or_refused(stock, folder, run, name):
    table = good(stock)
    start = FILES[name]
    for key in start[::-1]:
        table = {key: table}
    file = folder / name
    file.parent.mkdir(exist_ok=True)

    def complaint_of(number: int) -> str | None:
        chance = random.Random(f"{name} {number}")
        content, key = damaged(table, start, chance) if number >= 0 else (toml(table).encode(), "")
        file.write_bytes(content)
        words = stock.command(COMMANDS[number % len(COMMANDS)])
        words = ["--config", name, *words] if "/" in name else words
        ends = []
        found = complaint(lambda *words: ends.append(run(*words)) or ends[-1], words, folder)
        error = " ".join(ends[0].stderr.split()) if ends and ends[0].code == 2 else ""
        is_lacking = "Missing option" in error or "nothing to write" in error  # no file is to blame
        if error and not is_lacking and not (f"`{name}`" in error and key in error and number >= 0):
            found = found or f"names no file or key: {error[:1000]}"
        for path in folder.rglob("*"):
            if path.is_file() and path != file:
                path.unlink()
        return found and f"{number}: {words} {content[:3000]!r}: {found}"

    check_none(complaint_of(number) for number in range(-len(COMMANDS), CASES))
