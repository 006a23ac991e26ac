"""Options from files and the environment: which counts, what is refused, and what `moeprune config` says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(text, name="moeprune.toml"):
    Path(name).write_text(text, encoding="utf-8")


@pytest.fixture
def in_force(run_json):
    """The value of an option and where it comes from."""

    def in_force(command, option, *arguments):
        found = run_json(*arguments, "config") if arguments else run_json("config")
        entry = found["commands"][command][option]
        return entry["value"], entry["source"], entry["place"]

    return in_force


def samples(result):
    assert result.code == 0, result.stderr
    assert result.stderr == ""
    return json.loads(result.stdout)["data"]["samples"]


def test_the_command_line_counts_before_the_environment_before_the_file_before_the_default(
    single, run, monkeypatch
):
    call = ("eval", single, "--data", "digits", "--output-format", "json")
    write("limit = 13")
    assert samples(run(*call)) == 13
    write("limit = 13\n[eval]\nlimit = 12")
    assert samples(run(*call)) == 12
    monkeypatch.setenv("MOEPRUNE_LIMIT", "11")
    assert samples(run(*call)) == 11
    monkeypatch.setenv("MOEPRUNE_EVAL_LIMIT", "10")
    assert samples(run(*call)) == 10
    assert samples(run(*call, "--limit", 9)) == 9
    monkeypatch.setenv("MOEPRUNE_EVAL_LIMIT", "")  # as good as not set
    assert samples(run(*call)) == 11


def test_config_says_what_is_in_force_and_where_it_comes_from(run, in_force, monkeypatch):
    assert in_force("eval", "limit") == (None, "default", None)
    assert in_force("eval", "batch-size") == (64, "default", None)
    write("limit = 13\n[eval]\nlimit = 12\nlatency = true\nlatency-batch = [1, 2]\nmin-accuracy = 1")
    assert in_force("analyze", "limit") == (13, "file", "limit")
    assert in_force("eval", "limit") == (12, "file", "eval.limit")
    assert in_force("eval", "latency") == (True, "file", "eval.latency")
    assert in_force("eval", "latency-batch") == ([1, 2], "file", "eval.latency-batch")
    assert in_force("eval", "min-accuracy") == (1, "file", "eval.min-accuracy")
    monkeypatch.setenv("MOEPRUNE_LIMIT", "11")
    monkeypatch.setenv("MOEPRUNE_EVAL_LATENCY", "0")
    monkeypatch.setenv("MOEPRUNE_EVAL_LATENCY_BATCH", "4 8")
    assert in_force("eval", "limit") == (11, "environment", "MOEPRUNE_LIMIT")
    assert in_force("eval", "latency") == (False, "environment", "MOEPRUNE_EVAL_LATENCY")
    assert in_force("eval", "latency-batch") == ([4, 8], "environment", "MOEPRUNE_EVAL_LATENCY_BATCH")
    shown = run("config").stdout
    assert shown.startswith("configuration: moeprune.toml\n")
    rows = [line.split() for line in shown.splitlines()]
    assert ["min-accuracy", "1", "eval.min-accuracy", "in", "moeprune.toml"] in rows
    assert ["limit", "11", "$MOEPRUNE_LIMIT"] in rows
    assert ["batch-size", "64", "default"] in rows


def test_config_lists_every_option_of_every_command(run, run_json):
    commands = run_json("config")["commands"]
    assert list(commands) == ["inspect", "analyze", "prune", "eval", "convert", "demo", "config"]
    for command, options in commands.items():
        shown = run(command, "--help").stdout
        offered = {
            word.strip(",")[2:]
            for line in shown.splitlines()
            if line.startswith("  -")
            for word in line.strip().split("  ")[0].split()
            if word.startswith("--")
        }
        offered = {name for name in offered if not name.startswith("no-")} - {"help"}
        assert set(options) == offered, command


@pytest.mark.parametrize("name", ["moeprune.toml", "pyproject.toml"])
def test_either_file_configures(single, run, name):
    table = "tool.moeprune.eval" if name == "pyproject.toml" else "eval"
    write(f'[{table}]\ndata = "digits"\nlimit = 8\noutput-format = "json"', name)
    assert samples(run("eval", single)) == 8


def test_a_named_file_takes_the_place_of_that_of_the_working_directory(in_force, monkeypatch):
    write("limit = 1")
    Path("ci").mkdir()
    write("limit = 2", "ci/strict.toml")
    write("[tool.moeprune]\nlimit = 3", "ci/pyproject.toml")
    assert in_force("eval", "limit")[0] == 1
    assert in_force("eval", "limit", "--config", "ci/strict.toml")[0] == 2
    assert in_force("eval", "limit", "--config", "ci/pyproject.toml")[0] == 3
    monkeypatch.setenv("MOEPRUNE_CONFIG", "ci/strict.toml")
    assert in_force("eval", "limit")[0] == 2


def test_parents_of_the_working_directory_do_not_count(in_force, monkeypatch):
    write("limit = 1")
    Path("below").mkdir()
    monkeypatch.chdir("below")
    assert in_force("eval", "limit")[0] is None


def test_a_project_that_does_not_speak_of_moeprune(in_force):
    write('[project]\nname = "x"\n[tool.ruff]\nline-length = 100', "pyproject.toml")
    assert in_force("eval", "limit")[0] is None
    write("limit = 1")
    assert in_force("eval", "limit")[0] == 1


def test_paths_of_a_file_start_at_the_working_directory(single, run, tmp_path):
    """As on the command line, wherever the file stands."""
    Path("ci").mkdir()
    write('[analyze]\noutput = "analysis.safetensors"\ndata = "digits"\nlimit = 9', "ci/x.toml")
    result = run("--config", "ci/x.toml", "analyze", single)
    assert result.code == 0, result.stderr
    assert (tmp_path / "analysis.safetensors").exists()


def test_one_text_does_for_an_option_that_may_be_repeated(in_force):
    write('scope = "input"')
    assert in_force("prune", "scope")[0] == "input"
    assert in_force("eval", "scope")[0] == ["input"]


def test_a_flag_of_a_file_is_taken_back_on_the_command_line(single, run):
    write("[inspect]\nquiet = true\nforce = true")
    Path("report").write_text("old")
    assert run("inspect", single, "--output-file", "report").code == 0
    assert run("inspect", single, "--output-file", "report", "--no-force").code == 2
    assert run("inspect", single, "--verbose", "--output-file", "report").stderr.startswith(
        "info: `--quiet`, set in `inspect.quiet` of `moeprune.toml`, is left out"
    )


# --- what does not go together -------------------------------------------------------------------


def test_a_budget_of_the_command_line_displaces_that_of_a_file(single, small_analysis, run_json, monkeypatch):
    write(f'[prune]\nmax-size = 0.4\nanalysis = "{small_analysis}"')
    assert 1 < run_json("prune", single, "-o", "a.safetensors")["plan"]["blocks.0.soft_moe"]["k"] < 128
    given = run_json("prune", single, "--keep", 7, "-o", "b.safetensors")
    assert given["plan"]["blocks.0.soft_moe"]["k"] == 7
    monkeypatch.setenv("MOEPRUNE_PRUNE_KEEP", "6")
    assert run_json("prune", single, "-o", "c.safetensors")["plan"]["blocks.0.soft_moe"]["k"] == 6
    assert (
        run_json("prune", single, "--keep", 5, "-o", "d.safetensors")["plan"]["blocks.0.soft_moe"]["k"] == 5
    )


def test_two_budgets_of_one_place_are_refused_as_ever(single, run):
    write('[prune]\nmax-size = 0.4\nkeep = "1/8"')
    result = run("prune", single, "-o", "a.safetensors")
    assert result.code == 2
    assert "`--keep` and `--max-size` given" in result.stderr
    assert "`--keep` is set in `prune.keep` of `moeprune.toml`" in result.stderr


def test_a_plan_displaces_how_a_file_chooses(single, small_analysis, run, run_json):
    choice = ("--analysis", small_analysis, "--keep", 4, "--compensate", "mean", "--save-plan", "plan.json")
    assert run("prune", single, *choice).code == 0
    write(f'[prune]\nscope = "input"\nsignal = "random"\nkeep = "1/2"\nanalysis = "{small_analysis}"')
    made = run_json("prune", single, "--plan", "plan.json", "-o", "a.safetensors")
    plan = made["plan"]["blocks.0.soft_moe"]
    assert (plan["scope"], plan["k"], plan["compensation"]) == ("static", 4, "mean")
    assert run("prune", single, "--plan", "plan.json", "--signal", "gram", "-o", "b.safetensors").code == 2


def test_gates_and_baseline_of_a_file_do_not_stand_in_the_way_of_a_sweep(single, small_analysis, run_json):
    write(
        f'limit = 20\nanalysis = "{small_analysis}"\n'
        f'[eval]\ndata = "digits"\nbaseline = "{single}"\nmax-accuracy-drop = 0'
    )
    judged = run_json("eval", single)  # the analysis is for --sweep and prune
    assert [gate["name"] for gate in judged["gates"]] == ["max_accuracy_drop"]
    swept = run_json("eval", single, "--sweep", "1/8", "--scope", "static", "--compensate", "none")
    assert len(swept["rows"]) > 1


def test_options_for_several_commands_do_not_disturb_those_that_have_no_use_for_them(single, run_json):
    write('limit = 20\nsplit = "train"')
    made = run_json("prune", single, "--keep", "1/8", "--scope", "input", "-o", "a.safetensors")
    assert made["plan"]["blocks.0.soft_moe"]["k"] == 16


def test_a_gate_of_a_file_is_never_left_out_for_want_of_what_it_needs(single, run):
    write("[eval]\nmin-speedup = 1.5")
    result = run("eval", single, "--data", "digits", "--limit", 9)
    assert result.code == 2
    assert result.stderr.startswith("error: `--min-speedup` judges measured times; `--min-speedup` is set in")


def test_what_a_command_line_asks_for_is_never_left_out(single, run):
    result = run("prune", single, "--keep", 4, "--scope", "input", "--limit", 9, "-o", "a.safetensors")
    assert result.code == 2
    assert "`--split` and `--limit` go with `--data`" in result.stderr


# --- what is refused -----------------------------------------------------------------------------

WRONG = {
    "unknown key": ("limt = 3", ("unknown key `limt`", "did you mean `limit`?")),
    "unknown key of a command": ("[eval]\nmax-acuracy-drop = 0.1", (
        "unknown key `eval.max-acuracy-drop`", "did you mean `eval.max-accuracy-drop`?",
    )),
    "unknown command": ("[evel]\nlimit = 1", ("unknown key `evel`", "did you mean `eval`?")),
    "underscore": ("batch_size = 3", ("unknown key `batch_size`", "did you mean `batch-size`?")),
    "like nothing": ("zzzzzz = 3", ("unknown key `zzzzzz`", "moeprune config")),
    "option of another command": ("[inspect]\nkeep = 3", ("unknown key `inspect.keep`",)),
    "argument": ('checkpoint = "x"', ("unknown key `checkpoint`",)),
    "text for a number": ('[eval]\nlimit = "3"', ("`eval.limit`", 'the text "3"', "a whole number")),
    "fraction for a whole number": ("limit = 3.5", ("`limit`", "the number 3.5", "a whole number")),
    "true for a number": ("limit = true", ("`limit`", "true", "a whole number")),
    "number for a text": ("[prune]\nkeep = 16", ("`prune.keep`", "a text", 'keep = "16"')),
    "number for a flag": ("force = 1", ("`force`", "the number 1", "true or false")),
    "list for one": ("limit = [3]", ("`limit`", "the list [3]", "a whole number")),
    "table for one": ("[limit]\nx = 3", ("`limit`", "a table", "a whole number")),
    "date": ("limit = 2024-01-01", ("`limit`", "the date 2024-01-01")),
    "wrong part of a list": ("[eval]\nlatency-batch = [1, 'x']", ("`eval.latency-batch`", "list of them")),
    "value for a command": ("eval = 3", ("`eval`", "the number 3", "expected a table")),
    "no TOML": ("limit =", ("is no TOML",)),
}  # fmt: skip


@pytest.mark.parametrize("name", ["moeprune.toml", "pyproject.toml"])
@pytest.mark.parametrize(("text", "fragments"), WRONG.values(), ids=WRONG)
def test_a_wrong_file_is_told_by_name_and_key(single, run, name, text, fragments):
    """Whatever command it is that runs."""
    if name == "pyproject.toml":
        is_table = text.startswith("[")
        text = text.replace("[", "[tool.moeprune.", 1) if is_table else f"[tool.moeprune]\n{text}"
        fragments = [
            part.replace("`", "`tool.moeprune.", 1) if part[0] == "`" else
            part.replace("key `", "key `tool.moeprune.").replace("mean `", "mean `tool.moeprune.")
            for part in fragments
        ]  # fmt: skip
    write(text, name)
    for command in (("inspect", single), ("config",)):
        result = run(*command)
        assert (result.code, result.stdout) == (2, "")
        assert result.stderr.startswith(f"error: `{name}`")
        for fragment in fragments:
            assert fragment in result.stderr
    assert run("eval", "--help").code == 0


def test_two_files_are_refused(single, run):
    write("limit = 1")
    write("[tool.moeprune]\nlimit = 1", "pyproject.toml")
    result = run("inspect", single)
    assert result.code == 2
    assert result.stderr.startswith("error: both `moeprune.toml` and `pyproject.toml` configure moeprune")


@pytest.mark.parametrize(
    ("path", "fragment"),
    [
        ("missing.toml", "no file `missing.toml`"),
        (".", "cannot read `.`"),
        ("pyproject.toml", "has no table"),
    ],
)
def test_a_named_file_that_is_none(single, run, path, fragment):
    write("[project]", "pyproject.toml")
    result = run("--config", path, "inspect", single)
    assert result.code == 2
    assert fragment in result.stderr


def test_bytes_that_are_no_text(single, run):
    Path("moeprune.toml").write_bytes(b"limit = \xff")
    assert run("inspect", single).stderr.startswith("error: `moeprune.toml` is no TOML")


def test_a_value_that_the_option_refuses_is_told_with_its_place(single, run, monkeypatch):
    write("[eval]\nlimit = 0")
    result = run("eval", single, "--data", "digits")
    assert result.code == 2
    assert "(set in `eval.limit` of `moeprune.toml`)" in " ".join(result.stderr.split())
    monkeypatch.setenv("MOEPRUNE_EVAL_LIMIT", "many")
    result = run("eval", single, "--data", "digits")
    assert result.code == 2
    assert "(set in `$MOEPRUNE_EVAL_LIMIT`)" in " ".join(result.stderr.split())
    assert run("config").code == 2
    monkeypatch.setenv("MOEPRUNE_EVAL_LIMIT", "9")
    monkeypatch.setenv("MOEPRUNE_OUTPUT_FORMAT", "xml")
    result = run("eval", single, "--data", "digits")
    assert result.stderr.startswith(
        "error: `--output-format xml` is unknown; `--output-format` is set in `$MOEPRUNE_OUTPUT_FORMAT`"
    )


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("MOEPRUNE_EVAL_MIN_ACURACY", "did you mean `$MOEPRUNE_EVAL_MIN_ACCURACY`?"),
        ("MOEPRUNE_MIN_ACURACY", "did you mean `$MOEPRUNE_MIN_ACCURACY`?"),
        ("MOEPRUNE_ZZZ", "unset it"),
    ],
)
def test_a_variable_that_sets_nothing_is_an_error(name, near, single, run, monkeypatch):
    """Else a gate that is mistyped there would be no gate."""
    monkeypatch.setenv(name, "1")
    for words in (("eval", single, "--data", "digits", "--limit", 9, "--quiet"), ("inspect", single)):
        result = run(*words)
        assert (result.code, result.stdout) == (2, "")
        assert f"error: no option is set by `${name}`" in result.stderr
        assert near in result.stderr


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('data = "nothing"', "no data `nothing`; `--data` is set in `data` of `moeprune.toml`"),
        (
            'preprocess = ["std=0"]',
            "`--preprocess std=0` does not fit; `--preprocess` is set in `preprocess` of `moeprune.toml`",
        ),
        (
            'output-file = "missing/x"',
            "no directory `missing` for `missing/x`; `--output-file` is set in `output-file` of",
        ),
    ],
)
def test_an_error_that_tells_a_value_tells_where_it_is_set(single, run, line, message):
    write(line if line.startswith("data") else f'data = "digits"\n{line}')
    result = run("eval", single)
    assert result.code == 2
    assert result.stderr.startswith(f"error: {message}")
