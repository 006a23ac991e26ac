"""Options from files and the environment: which value counts, and what is refused."""

from pathlib import Path

import pytest
import typer

from moeprune.cli import app
from tests.endings import refusal


@pytest.fixture(autouse=True)
def _empty_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def write(text, name="moeprune.toml"):
    Path(name).parent.mkdir(exist_ok=True)
    Path(name).write_text(text, encoding="utf-8")


def value_of(command, option, *words):
    """The value with which a command would run."""
    group = typer.main.get_command(app)
    root = group.make_context("moeprune", [*words, command])
    given = {"prune": ["x", "-o", "y"], "eval": ["x", "--data", "y"], "inspect": ["x"]}[command]
    return group.commands[command].make_context(command, given, parent=root).params[option]


def test_the_command_line_counts_before_the_environment_and_both_before_the_file(single, run_json, monkeypatch):
    def samples(*options):
        return run_json("eval", single, "--data", "digits", *options)["data"]["samples"]

    write("limit = 13")
    assert samples() == 13
    write("limit = 13\n[eval]\nlimit = 12")
    assert samples() == 12
    monkeypatch.setenv("MOEPRUNE_EVAL_LIMIT", "10")
    assert samples() == 10
    assert samples("--limit", 9) == 9
    monkeypatch.setenv("MOEPRUNE_EVAL_LIMIT", "")  # as good as not set
    assert samples() == 12


@pytest.mark.parametrize(
    ("text", "command", "option", "value"),
    [
        ("", "eval", "batch_size", 64),
        ("batch-size = 3", "prune", "batch_size", 3),
        ("[eval]\nlatency = true", "eval", "latency", True),
        ("[eval]\nlatency-batch = [1, 2]", "eval", "latency_batch", [1, 2]),
        ("[eval]\nmin-accuracy = 1", "eval", "min_accuracy", 1.0),
        ('scope = "input"', "prune", "scope", "input"),
        ('scope = "input"', "eval", "scope", ["input"]),
        ("[prune]\nkeep = 16", "prune", "keep", "16"),
        ("keep = 0.125", "prune", "keep", "0.125"),
        ("keep = 1.0", "prune", "keep", "1.0"),
        ("max-size = 0.4", "prune", "max_size", "0.4"),
        ('max-size = "1MB"', "prune", "max_size", "1MB"),
        ("sweep = 0.125", "eval", "sweep", "0.125"),
        ("\ufefflimit = 3", "eval", "limit", 3),
        ("force = true\n[eval]\nforce = false", "eval", "force", False),
        ("[tool.moeprune]\nlimit = 3", "eval", "limit", 3),
        ("[tool.moeprune.eval]\nlimit = 3", "eval", "limit", 3),
    ],
)
def test_values_of_a_file(text, command, option, value):
    write(text, "pyproject.toml" if "tool." in text else "moeprune.toml")
    assert value_of(command, option) == value


def test_values_of_variables(monkeypatch):
    monkeypatch.setenv("MOEPRUNE_EVAL_LATENCY", "0")
    monkeypatch.setenv("MOEPRUNE_EVAL_LATENCY_BATCH", "4 8")
    write("[eval]\nlatency = true")
    assert value_of("eval", "latency") is False
    assert value_of("eval", "latency_batch") == [4, 8]


def test_a_named_file_takes_the_place_of_that_of_the_working_directory(monkeypatch):
    write("limit = 1")
    write("limit = 2", "ci/strict.toml")
    write("[tool.moeprune]\nlimit = 3", "ci/pyproject.toml")
    assert value_of("eval", "limit") == 1
    assert value_of("eval", "limit", "--config", "ci/strict.toml") == 2
    assert value_of("eval", "limit", "--config", "ci/pyproject.toml") == 3
    monkeypatch.setenv("MOEPRUNE_CONFIG", "ci/strict.toml")
    assert value_of("eval", "limit") == 2


def test_parents_and_other_projects_are_not_read(monkeypatch):
    write("limit = 1")
    Path("below").mkdir()
    monkeypatch.chdir("below")
    write('[project]\nname = "x"\n[tool.ruff]\nline-length = 100', "pyproject.toml")
    assert value_of("eval", "limit") is None


def test_paths_of_a_file_start_at_the_working_directory(single, run, tmp_path):
    """As on the command line, wherever the file stands."""
    write('[analyze]\noutput = "analysis.safetensors"\ndata = "digits"\nlimit = 9', "ci/x.toml")
    result = run("--config", "ci/x.toml", "analyze", single)
    assert result.code == 0, result.stderr
    assert (tmp_path / "analysis.safetensors").exists()


def test_a_flag_of_a_file_is_taken_back_on_the_command_line(single, run):
    write("[inspect]\nforce = true")
    Path("report").write_text("old")
    assert run("inspect", single, "--output-file", "report").code == 0
    assert run("inspect", single, "--output-file", "report", "--no-force").code == 2


IN_FILE = "is set in `moeprune.toml`"
REFUSED = [
    ('[prune]\nmax-size = 0.4\nkeep = "1/8"', "prune SINGLE -o a", "`--keep` and `--max-size`", f"`--keep` {IN_FILE}"),
    ("[prune]\nmax-size = 0.4", "prune SINGLE -o a --keep 4", "`--keep` and `--max-size`", f"`--max-size` {IN_FILE}"),
    ('[prune]\nscope = "input"', "prune SINGLE -o a --plan p", "`--scope`", f"`--scope` {IN_FILE}"),
    ("limit = 9", "prune SINGLE -o a --keep 4 --scope input", "`--limit`", f"`--limit` {IN_FILE}"),
    ("quiet = true", "prune SINGLE -o a --keep 4 --verbose", "`--verbose`", f"`--quiet` {IN_FILE}"),
    ("[eval]\nmax-accuracy-drop = 0", "eval SINGLE --data digits --sweep 1/8 --analysis a.st", "`--sweep`", IN_FILE),
    ("[eval]\nlimit = 0", "eval SINGLE --data digits", f"`--limit` {IN_FILE}"),
    ('data = "nothing"', "eval SINGLE", f"error: no data `nothing`; `--data` {IN_FILE}"),
    ('output-file = "missing/x"', "eval SINGLE --data digits", f"error: no directory `missing` for `missing/x`; "
     f"`--output-file` {IN_FILE}"),
    ("", "--config missing.toml inspect SINGLE", "no file `missing.toml`"),
    ("", "--config . inspect SINGLE", "cannot read `.`"),
    ("", "--config pyproject.toml inspect SINGLE", "has no table"),
    ("", "--config bytes.toml inspect SINGLE", "`bytes.toml` is not TOML"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "words", "fragments"), [(text, words, rest) for text, words, *rest in REFUSED])
def test_an_error_names_the_file_that_sets_the_option(single, run, text, words, fragments):
    """Also where options exclude each other, wherever each of them stands."""
    write(text)
    write("[project]", "pyproject.toml")
    Path("bytes.toml").write_bytes(b"limit = \xff")
    refusal(run, [single if word == "SINGLE" else word for word in words.split()], *fragments)


def test_an_error_names_the_variable_that_sets_the_option(single, run, monkeypatch):
    monkeypatch.setenv("MOEPRUNE_EVAL_LIMIT", "many")
    result = run("eval", single, "--data", "digits")
    assert result.code == 2
    assert "(set in `$MOEPRUNE_EVAL_LIMIT`)" in " ".join(result.stderr.split())
    monkeypatch.setenv("MOEPRUNE_EVAL_LIMIT", "9")
    monkeypatch.setenv("MOEPRUNE_EVAL_OUTPUT_FORMAT", "xml")
    message = "found 'xml'; `--output-format` is set in `$MOEPRUNE_EVAL_OUTPUT_FORMAT`\n"
    refusal(run, ["eval", single, "--data", "digits"], message)


WRONG = {
    "unknown key": ("limt = 3", ("unknown key `limt`", "did you mean `limit`?")),
    "unknown key of a command": (
        "[eval]\nmin-acuracy = 0.1", ("unknown key `eval.min-acuracy`", "did you mean `eval.min-accuracy`?"),
    ),
    "unknown command": ("[evel]\nlimit = 1", ("unknown key `evel`", "did you mean `eval`?")),
    "of which another command has the nearest": (
        "[eval]\nkep = 3", ("unknown key `eval.kep`", "did you mean `", "prune.keep`?"),
    ),
    "several": (
        "[prune]\nlimt = 3\nforce = 1\nkepe = 4",
        ("key `prune.limt`; ", "found 1; ", "key `prune.kepe`\n", "prune.limit`? did you"),
    ),
    "underscore": ("batch_size = 3", ("unknown key `batch_size`", "did you mean `batch-size`?")),
    "like nothing": ("zzzzzz = 3", ("unknown key `zzzzzz`", "keys are options")),
    "a key with a dot": ('"eval.limit" = 3', ("unknown key `eval.limit`",)),
    "option of another command": ("[inspect]\nkeep = 3", ("unknown key `inspect.keep`",)),
    "argument": ('checkpoint = "x"', ("unknown key `checkpoint`",)),
    "text for a number": ('[eval]\nlimit = "3"', ("`eval.limit`", "expected `int`, got `str`, found '3'")),
    "fraction for a whole number": ("limit = 3.5", ("`limit`", "expected `int`", "found 3.5")),
    "true for a number": ("limit = true", ("`limit`", "expected `int`", "found True")),
    "true for a text": ("[prune]\nkeep = true", ("`prune.keep`", "found True")),
    "number for a flag": ("force = 1", ("`force`", "expected `bool`", "found 1")),
    "list for one": ("limit = [3]", ("`limit`", "expected `int`, got `array`")),
    "table for one": ("[limit]\nx = 3", ("`limit`", "expected `int`, got `object`")),
    "date": ("limit = 2024-01-01", ("`limit`", "expected `int`, got `date`")),
    "wrong part of a list": ("[eval]\nlatency-batch = [1, 'x']", ("`eval.latency-batch`", "found 'x'")),
    "value for a command": ("eval = 3", ("`eval` is 3", "expected a table")),
    "not TOML": ("limit =", ("is not TOML",)),
}  # fmt: skip


@pytest.mark.parametrize("name", ["moeprune.toml", "pyproject.toml"])
@pytest.mark.parametrize(("text", "fragments"), WRONG.values(), ids=WRONG)
def test_a_wrong_file_is_named_with_its_key(single, run, name, text, fragments):
    """Whichever command runs."""
    if name == "pyproject.toml":
        text = text.replace("[", "[tool.moeprune.", 1) if text[0] == "[" else f"[tool.moeprune]\n{text}"
        fragments = [
            part.replace("`", "`tool.moeprune.", 1) if part[0] == "`" else
            part.replace("key `", "key `tool.moeprune.").replace("mean `", "mean `tool.moeprune.")
            for part in fragments
        ]  # fmt: skip
    write(text, name)
    refusal(run, ["inspect", single], f"error: `{name}`", *fragments)
    assert run("eval", "--help").code == 0


def test_two_files_are_refused(single, run):
    write("limit = 1")
    write("[tool.moeprune]\nlimit = 1", "pyproject.toml")
    refusal(run, ["inspect", single], "error: both `moeprune.toml` and `pyproject.toml` configure moeprune")


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("MOEPRUNE_EVAL_MIN_ACURACY", "did you mean `$MOEPRUNE_EVAL_MIN_ACCURACY`?"),
        ("MOEPRUNE_PRUNE_KEPE", "did you mean `$MOEPRUNE_PRUNE_KEEP`?"),
        ("MOEPRUNE_EVAL_XYZZY_XYZZY", "unset it"),
        ("MOEPRUNE_EVAL_HELP", "did you mean"),
    ],
)
def test_a_variable_of_a_command_that_sets_nothing_is_an_error(name, near, single, run, monkeypatch):
    """A misspelt gate must not pass unnoticed."""
    monkeypatch.setenv(name, "1")
    refusal(run, ["inspect", single], f"error: unknown environment variable `${name}`", near)


@pytest.mark.parametrize("name", ["MOEPRUNE_HOME", "MOEPRUNE_LIMIT", "MOEPRUNE_VERSION", "MOEPRUNE_HELP"])
def test_other_variables_are_not_moeprunes(name, single, run, monkeypatch):
    expected = run("inspect", single)
    monkeypatch.setenv(name, "1")
    assert run("inspect", single) == expected
