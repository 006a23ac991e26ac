"""Every option of every command is given wrong values: refused with an error that names it.

A new option without a wrong value in WRONG fails a test here.
"""

from pathlib import Path

import pytest
import torch
import typer

from moeprune.cli import app
from tests.endings import check_none, complaint, files_under

COMMANDS = typer.main.get_command(app).commands
OPTIONS = [
    (command, option.opts[0], option.is_flag)
    for command, found in COMMANDS.items()
    for option in found.params
    if option.opts[0].startswith("--")
]
GOOD = {
    "inspect": "CKPT @single",
    "analyze": "CKPT @single --data digits --limit 9 --output @new",
    "prune": "CKPT @single --keep 1/8 --scope input --compensate none --data digits --limit 9 --output @new",
    "eval": "CKPT @single --data digits --limit 9",
    "export": "CKPT @vit --to soft-moe --output @new",
    "schema": "CKPT eval",
    "demo": "--output @new",
}
"""Words of each command in which an option is replaced, or to which it is added; `@` stands for a file."""

SWEEP = {"--sweep": "1/8", "--analysis": "@analysis"}
NEEDS: dict[str, dict[str, str | None]] = {
    call: needed
    for calls, needed in (
        ("prune --mass, prune --max-size, prune --max-flops, prune --max-accuracy-drop", {"--keep": None}),
        ("prune --plan", {"--keep": None, "--scope": None, "--compensate": None}),
        ("prune --energy", {"--scope": None, "--compensate": "affine"}),
        ("prune --rank", {"--scope": None, "--compensate": "low-rank"}),
        ("prune --width", {"--scope": None}),
        ("eval --confidence", {"--min-accuracy": "0.5"}),
        ("eval --scope, eval --signal, eval --compensate, eval --analysis, eval --plot, eval --repeat", SWEEP),
        ("eval --sweep", {"--analysis": "@analysis", "--scope": "static", "--compensate": "none"}),
        ("eval --latency-batch", {"--latency": ""}),
        ("eval --min-speedup", {"--latency": "", "--baseline": "@single"}),
        ("eval --max-accuracy-drop, --min-flops-reduction, --min-size-reduction, --min-agreement",
         {"--baseline": "@single"}),
        ("--max-loss-increase, --max-perplexity-ratio, --max-kl", {"--baseline": "@single"}),
        ("--model-arg, --input-shape", {"--model": "os:getcwd", "--input-shape": "3,8,8", "CKPT": "@torch"}),
        ("--source, --key, --prefix", {"CKPT": "@torch"}),
        ("--source-arg", {"CKPT": "@foreign"}),
    )
    for call in calls.split(", ")
}  # fmt: skip
"""What else an option needs, of one command or of all, or does not go with (None)."""

SHARES = ("-0.1", "1.5", "nan", "inf", "x", "")
COUNTS = ("0", "-1", "1.5", "x", "")
CHOICE = ("some", "", "STATIC")
NO_FILE = ("@missing", "@folder", "@text")
NO_OUTPUT = ("@folder", "@missing/x", "@text/x", "@text")
WRONG: dict[str, tuple[str, ...]] = {
    option: values
    for options, values in (
        ("--output-format --split --scope --signal --compensate --to --source", CHOICE),
        ("--output-file --output --save-plan", NO_OUTPUT),
        ("--plot --report", (*NO_OUTPUT, "@new")),
        ("--data", ("mnist", "digits:all", "@missing", "@text", "")),
        ("--baseline --analysis --plan --classes", NO_FILE),
        ("--model", ("package", "no.such.package:build", "os:nothing", ":", "")),
        ("--preprocess", ("crop=3", "mean=x", "std=0", "resize=0", "resize=1000000", "mean", "")),
        ("--limit --batch-size --latency-batch --sequence-length", COUNTS),
        ("--rank", (*COUNTS, "nan", "1e99999999", "9/8", "16.0")),
        ("--by", ("kind", "")),
        ("--repeat", (*COUNTS, "1", "101")),
        ("--energy", (*SHARES, "0", "1")),
        ("--confidence", (*SHARES, "0", "0.4", "1")),
        ("--device", ("gpu", "cuda:97", "")),
        ("--dtype", ("int8", "")),
        ("--seed", ("-1", "1.5", "x", str(2**63), "")),
        ("--keep --width", ("0", "16.0", "101%", "%", "-1", "9/8", "200", "nan", "x", "1e99999999", "1e-99999999", "")),
        ("--mass", (*SHARES, "0")),
        ("--max-size", (*SHARES, "0", "40", "101%", "1XB", "1e-400MB", "2 FLOPs", "1%B")),
        ("--max-flops", (*SHARES, "0", "1MB")),
        ("--max-accuracy-drop", (*SHARES, "1")),
        ("--min-accuracy --min-flops-reduction --min-size-reduction --min-agreement", SHARES),
        ("--min-speedup --max-perplexity-ratio", ("-1", "nan", "inf", "x", "")),
        ("--max-loss-increase --max-kl", ("-1", "nan", "inf", "x", "0.1", "")),
        ("--sweep", ("0", "1/8,", "x", "200", "1e999999999", "")),
        ("--source-arg", ("num_heads", "=3", "depth=x", "nothing=3", "")),
        ("--key --ignore-layer", ("nothing", "")),
        ("--prefix", ("nothing", "a.b.")),
        ("--model-arg", ("depth", "=3", "1=2", "a=1e999", "")),
        ("--input-shape", ("3", "3,8", "3,8,x", "3,8,0", "3,8,-8", "3,100000,100000", "3,8," + "9" * 5000, "")),
    )
    for option in options.split()
}
"""Values that are refused, whatever the command; flags take none."""

WRONG_FOR = {("demo", "--output"): ("@", "@text", "@text/x")}
"""Where a command refuses other values of an option."""

BY_VALUE = {
    "--output", "--output-file", "--save-plan", "--plot", "--report", "--data", "--baseline",
    "--analysis", "--plan", "--classes", "--device", "--key", "--prefix", "--preprocess",
}  # fmt: skip
"""Options whose value, a path or a name in backticks, may stand in the error in their own place."""


WITH_VALUE = [(command, option) for command, option, is_flag in OPTIONS if not is_flag]


def wrong_values(command: str, option: str) -> tuple[str, ...]:
    return WRONG_FOR.get((command, option), WRONG.get(option, ()))


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "folder").mkdir()
    (tmp_path / "text").write_text("old")
    torch.save({"weight": torch.ones(1)}, tmp_path / "torch")
    return tmp_path


@pytest.fixture
def words_with(folder, single, vit, small_analysis, stock):
    """The words of a command with an option and a value, with paths in the place of `@` names."""
    foreign = stock.path("foreign.safetensors")
    known = {"@single": single, "@vit": vit, "@analysis": small_analysis, "@foreign": foreign}

    def path(word: str) -> str:
        return str(known.get(word, folder / word[1:])) if word.startswith("@") else word

    def words_with(command: str, option: str, value: str) -> tuple[list[str], str]:
        words = GOOD[command].split()
        given = dict(zip(words[::2], words[1::2], strict=True))
        given |= NEEDS.get(f"{command} {option}", NEEDS.get(option, {}))
        words = [command]
        for key, word in given.items():
            if word is not None and key != option:
                words += [path(word)] if key == "CKPT" else [key, path(word)] if word else [key]
        return [*words, f"{option}={path(value)}"], path(value)

    return words_with


@pytest.mark.parametrize(
    ("command", "option", "value"),
    [
        pytest.param(command, option, value, marks=pytest.mark.slow if number else ())
        for command, option, is_flag in OPTIONS
        for number, value in enumerate(("wrong",) if is_flag else wrong_values(command, option) or (None,))
    ],
)
def test_a_wrong_value_is_refused_by_name(words_with, folder, run, command, option, value):
    assert value is not None, f"`{option}` needs wrong values in {__name__}.WRONG"
    words, given = words_with(command, option, value)
    of_value = [f"`{given}", option.strip("-")] if option in BY_VALUE else []
    assert complaint(run, words, folder, f"`{option}", f"'{option}'", *of_value) is None, words


EXTREMES = (
    "", " ", "-", "--", "=", ",", ":", "/", ".", "..", "0", "-0", "1", "+1", "٣", "²", "1e9", "1e999",
    "1e-400", "1e999999999", "nan", "-inf", "0x10", "1_0", "True", "None", "null", "9" * 30, "9" * 5000,
    "x" * 300, "x" * 5000, "ä😀", "a\x1b[31mb", "a\nb", "\udcff", "../../..", "/dev/null", "/dev/zero",
    "/dev/full", "/proc/self/mem", "{}", "[" * 2000, "(" * 100, "-" * 5000 + "1", "a=" + "-" * 5000 + "1",
    "a=[1]", "1/0", "1,2,3", "%s%n", "{0}", "$HOME", "~", "*", "[bold]", "\\",
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("command", "option"), [pair for pair in WITH_VALUE if pair[0] != "demo"])
def test_odd_values_are_taken_or_refused(words_with, folder, run, command, option, tmp_path, monkeypatch):
    monkeypatch.chdir(folder / "folder")

    def complaint_of(value: str) -> str | None:
        words, _ = words_with(command, option, value)
        found = complaint(run, [*words, "--force"], folder)
        for path in files_under(folder):
            if path not in ("folder", "text", "torch"):
                (folder / path).unlink()
        return found and f"{value[:50]!r}: {found}"

    check_none(complaint_of(value) for value in EXTREMES)


@pytest.mark.slow
@pytest.mark.parametrize(("command", "option"), WITH_VALUE)
def test_a_wrong_value_of_a_variable_is_refused_by_name(words_with, folder, run, command, option, monkeypatch):
    words, given = words_with(command, option, next(filter(None, wrong_values(command, option))))
    name = f"MOEPRUNE_{command}_{option[2:]}".upper().replace("-", "_")
    monkeypatch.setenv(name, given)
    assert complaint(run, words[:-1], folder, f"`${name}`") is None, words
