"""Reports where people look: Markdown, annotations, JUnit, the summary of a run; and what stays silent."""

import random
import re
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lxml import etree
from markdown_it import MarkdownIt
from torch import nn

from moeprune.evaluation.gates import judge as judge_gates
from moeprune.report.ci import annotation, to_annotations, to_junit
from moeprune.report.document import Document, Facts, Lines, Table, gate_in_words
from moeprune.report.markdown import to_markdown
from moeprune.report.text import to_text
from tests.endings import on_a_terminal
from tests.results import evaluation

NASTY = "a|b*c*, 50% _d_ <e> [f](g): &amp; ~~h~~ #1 $i$"


@pytest.fixture
def judge(run, forgetful, single):
    """The eval of a model that fails one gate of two, in a format."""

    def judge(output_format, more=""):
        gates = f"--max-accuracy-drop 0 --min-agreement 0.5 {more}"
        return run(f"eval {forgetful} --data digits --baseline {single} {gates} --output-format {output_format}")

    return judge


@pytest.fixture(scope="module")
def calls(forgetful, single, small_analysis, tmp_path_factory):
    """A call of each command that reports."""
    digits, output = "--data digits --limit 40", f"--force -o {tmp_path_factory.mktemp('calls')}"
    return {
        "inspect": f"inspect {single}",
        "analyze": f"analyze {single} {digits} {output}/analysis.safetensors",
        "prune": f"prune {single} --analysis {small_analysis} --keep 1/8 --compensate mean {output}/pruned.safetensors",
        "eval": f"eval {forgetful} {digits} --baseline {single}",
        "sweep": f"eval {single} {digits} --analysis {small_analysis} --sweep 1/8 --compensate none",
    }


COMMANDS = ("inspect", "analyze", "prune", "eval", "sweep")


def parsed(markdown):
    return MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(markdown)


def plain(token):
    """What a reader sees of an inline token."""
    return "".join(child.content for child in token.children or () if child.type in ("text", "code_inline"))


def tables_of(markdown):
    """Headings and cells of each table, as a reader sees them."""
    tables, rows = [], None
    for token in parsed(markdown):
        if token.type == "table_open":
            tables.append(rows := [])
        elif token.type == "tr_open":
            rows.append([])
        elif token.type == "table_close":
            rows = None
        elif token.type == "inline" and rows is not None:
            rows[-1].append(plain(token))
    return tables


def squeezed(text):
    return re.sub(r"[─\s]+", "", text.replace("`", ""))


@pytest.mark.parametrize("command", COMMANDS)
def test_markdown_shows_what_text_shows(run, calls, command):
    text = run(calls[command])
    markdown = run(f"{calls[command]} --output-format markdown")
    assert (text.code, markdown.code) == (0, 0)
    tables = tables_of(markdown.stdout)
    assert tables
    for rows in tables:
        assert len({len(row) for row in rows}) == 1
        for part in (*" ".join(rows[0]).split(), *(cell for row in rows[1:] for cell in row)):
            assert squeezed(part) in squeezed(text.stdout), part
    assert sum(map(len, tables)) >= {"sweep": 8, "inspect": 8, "analyze": 2, "prune": 4, "eval": 16}[command]
    shown = [plain(token) for token in parsed(markdown.stdout) if token.type == "inline"]
    for line in text.stdout.splitlines():
        if ": " in line and "  " not in line:
            assert any(squeezed(line) in squeezed(part) for part in shown), line


def test_the_verdict_stands_first_in_markdown_and_last_in_text(judge):
    markdown = judge("markdown")
    assert markdown.code == 1
    assert markdown.stdout.startswith("## ❌ FAILED: ")
    (header, drop, agreement), *_ = tables_of(markdown.stdout)
    assert header == ["gate", "limit", "value", ""]
    assert (drop[0], drop[-1]) == ("max_accuracy_drop", "❌ FAILED")
    assert (agreement[0], agreement[-1]) == ("min_agreement", "✅ passed")
    assert [line.split()[-1] for line in judge("text").stdout.splitlines()[-2:]] == ["FAILED", "passed"]
    passing = judge("markdown", "--max-accuracy-drop 0.99")
    assert passing.code == 0
    assert passing.stdout.startswith("## ✅ passed: ")


def test_any_text_is_shown_as_it_is_in_markdown():
    rng = random.Random(0)
    alphabet = "ab1 .-+=()!&;:#|\\*_[]<>~$'\"{}"
    for number in range(500):
        texts = ["x" + "".join(rng.choices(alphabet, k=12)).strip() + "x" for _ in range(4)]
        texts = texts if number else [NASTY] * 4
        line = "".join(rng.choices(alphabet, k=9)).strip() + "x"
        blocks = [Table(("", texts[1]), [(texts[2], "y")]), Facts([(texts[3], "z")]), Lines([line])]
        markdown = to_markdown(Document(texts[0], blocks))
        heading, *_, last = (plain(token) for token in parsed(markdown) if token.type == "inline")
        expected = [" ".join(text.split()) for text in (*texts, line)]
        assert (heading, last) == (expected[0], expected[4]), markdown
        tables = [[["", expected[1]], [expected[2], "y"]], [["", ""], [expected[3], "z"]]]
        assert tables_of(markdown) == tables, markdown


def annotations(text):
    """Level, title and message of workflow commands, as the runner takes them apart."""
    found = []
    for line in text.splitlines():
        level, title, message = re.fullmatch(r"::(\w+) title=([^,:]*)::(.*)", line).groups()
        for code, character in (("%3A", ":"), ("%2C", ","), ("%0D", "\r"), ("%0A", "\n"), ("%25", "%")):
            title = title.replace(code, character)
            message = message.replace(code, character) if code not in ("%3A", "%2C") else message
        found.append((level, title, message))
    return found


def test_one_annotation_for_each_gate_and_each_warning(judge, forgetful):
    result = judge("github")
    assert result.code == 1
    collapsed, failed, passed = annotations(result.stdout)
    assert [found[:2] for found in (collapsed, failed, passed)] == [
        ("warning", "moeprune eval"), ("error", "moeprune eval: max_accuracy_drop failed"),
        ("notice", "moeprune eval: min_agreement passed"),
    ]  # fmt: skip
    assert collapsed[2].startswith("class 3 collapsed: ")
    assert result.stderr == f"warning: {collapsed[2]}\n"
    words = r" on digits:test \(531 samples\): max_accuracy_drop is (0\.\d+), \1 above the limit of 0"
    assert re.fullmatch(re.escape(str(forgetful)) + words, failed[2])


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_without_gates_is_a_notice_and_a_test_case(run, calls, schema, command):
    github, junit = (run(f"{calls[command]} --output-format {form}").stdout for form in ("github", "junit"))
    *_, (level, title, message) = annotations(github)
    assert (level, title) == ("notice", f"moeprune {calls[command].split()[0]}")
    suite = suite_of(junit, schema)
    [case] = suite.findall("testcase")
    assert case.get("name") == title
    assert case.find("failure") is None
    assert suite.find("system-out").text.splitlines()[0] == message.splitlines()[0]


def test_a_notice_of_an_eval_without_baseline_has_the_accuracy(run, single):
    [(_, _, message)] = annotations(run(f"eval {single} --data digits --output-format github").stdout)
    assert re.search(r"^accuracy: 98\.\d\d % ", message, flags=re.MULTILINE)


def test_an_error_is_an_annotation_too(run, tmp_path):
    result = run("inspect", "missing", "--output-format", "github")
    assert (result.code, result.stderr) == (2, "error: no file `missing`\n")
    assert annotations(result.stdout) == [("error", "moeprune inspect", "no file `missing`")]
    path = tmp_path / "report"
    assert run("inspect", "missing", "--output-format", "github", "--output-file", path).stdout == ""
    assert not path.exists()


def test_annotations_are_escaped():
    text = annotation("error", NASTY, f"{NASTY}\r\n::error::% %0A")
    assert "\n" not in text
    assert annotations(text) == [("error", NASTY, f"{NASTY}\r\n::error::% %0A")]


@pytest.fixture(scope="module")
def schema():
    return etree.XMLSchema(file=str(Path(__file__).parent / "junit.xsd"))


def suite_of(text, schema):
    root = etree.fromstring(text.encode())
    schema.assertValid(root)
    [suite] = root
    for key, path in (("tests", ""), ("failures", "/failure"), ("errors", "/error")):
        assert root.get(key) == str(len(suite.findall(f"testcase{path}")))
    return suite


def test_a_test_case_for_each_gate(judge, schema):
    result = judge("junit")
    assert result.code == 1
    suite = suite_of(result.stdout, schema)
    failed, passed = suite.findall("testcase")
    assert (failed.get("name"), passed.get("name")) == ("max_accuracy_drop", "min_agreement")
    assert {suite.get("name"), *(case.get("classname") for case in (failed, passed))} == {"moeprune eval"}
    words = failed.find("failure").get("message")
    assert re.fullmatch(r"max_accuracy_drop is (0\.\d+), \1 above the limit of 0", words)
    assert words in failed.find("failure").text
    assert passed.find("failure") is None
    assert suite.find("system-out").text == judge("text").stdout
    assert suite.find("system-err").text.startswith("class 3 collapsed")
    assert judge("junit").stdout == result.stdout


def test_an_error_is_a_test_case_too_and_replaces_a_report_only_with_force(run, tmp_path, schema):
    result = run("inspect", "missing\x1b", "--output-format", "junit")
    assert (result.code, result.stderr) == (2, "error: no file `missing\x1b`\n")
    suite = suite_of(result.stdout, schema)
    [case] = suite.findall("testcase")
    assert (suite.get("name"), case.get("name")) == ("moeprune inspect", "moeprune inspect")
    assert case.find("error").get("message") == "no file `missing\ufffd`"
    assert case.find("failure") is None
    path = tmp_path / "gates.xml"
    call = ("inspect", "missing\x1b", "--output-format", "junit", "--output-file", path)
    assert run(*call)[:2] == (2, "")
    assert path.read_text() == result.stdout
    path.write_text("passed")
    again = run(*call)
    assert (again.code, again.stdout, path.read_text()) == (2, "", "passed")
    assert again.stderr.startswith(f"error: `{path}` exists")
    assert run(*call, "--force").stderr == result.stderr
    assert path.read_text() == result.stdout


def test_an_error_says_in_every_form_where_a_value_was_set(run, single, monkeypatch):
    monkeypatch.setenv("MOEPRUNE_EVAL_DATA", "nothing")
    words = "no data `nothing`; `--data` is set in `$MOEPRUNE_EVAL_DATA`"
    for output_format in ("text", "github", "junit"):
        result = run("eval", single, "--output-format", output_format)
        assert result.stderr.startswith(f"error: {words}\n")
        assert words in result.stdout or output_format == "text"


def test_what_xml_cannot_hold_is_replaced(schema):
    document = Document("a\x00b\x1b[31m <c> & ]]> \ud800 é\ufffe", [])
    suite = suite_of(to_junit("moeprune eval", document, ["w\x07"]), schema)
    assert suite.find("system-out").text == "a�b�[31m <c> & ]]> � é�\n"
    assert suite.find("system-err").text == "w�\n"


def test_bounds_of_gates_are_told_in_words():
    undecided, exact = judge_gates(evaluation(98, 0), {"min_accuracy": 0.95, "min_size_reduction": 0.5}, 0.95)
    assert undecided.reason == "undecided"
    words = gate_in_words(undecided)
    expected = r"0\.98, 0\.03 above the limit of 0\.95; its bound at 95 % is 0\.9\d+, 0\.01\d+ below the limit"
    assert re.fullmatch(f"min_accuracy is {expected}: 100 samples cannot show it, about \\d+ would", words)
    assert gate_in_words(exact) == "min_size_reduction is 0.5, at the limit of 0.5"
    document = Document("t", [], [undecided, exact])
    assert "FAILED: 100 samples cannot show it" in to_text(document)
    [[header, first, second]] = tables_of(to_markdown(document))
    assert header == ["gate", "limit", "value", "bound at 95 %", ""]
    assert first[-1].startswith("❌ FAILED: 100 samples cannot show it, about ")
    assert second[-2:] == ["exact", "✅ passed"]
    [error, notice] = annotations(to_annotations("moeprune eval", document, []))
    assert error[::2] == ("error", f"t: {words}")
    assert notice[0] == "notice"


def test_a_summary_is_appended(judge, single, run, tmp_path, monkeypatch):
    path = tmp_path / "summary.md"
    path.write_text("# Before")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(path))
    assert judge("json", "--summary").code == 1
    assert run("inspect", single, "--summary") == run("inspect", single)
    markdown = [judge("markdown").stdout, run("inspect", single, "--output-format", "markdown").stdout]
    assert path.read_text(encoding="utf-8") == f"# Before\n{markdown[0]}\n{markdown[1]}"


@pytest.mark.parametrize("value", ["", "missing/summary.md", "."])
def test_a_summary_that_cannot_be_written_is_told_before_any_work(single, run, tmp_path, monkeypatch, value):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", value)
    result = run("analyze", single, "--data", "digits", "-o", "analysis.safetensors", "--summary")
    assert (result.code, result.stdout, list(tmp_path.iterdir())) == (2, "", [])
    assert re.match("error: .*GITHUB_STEP_SUMMARY", result.stderr)
    monkeypatch.delenv("GITHUB_STEP_SUMMARY")
    assert "which is not set" in run("inspect", single, "--summary").stderr


def test_quiet_leaves_warnings_out_and_errors_in(judge, run):
    assert judge("text").stderr.startswith("warning: class 3 collapsed")
    assert judge("text", "--quiet").stderr == ""
    assert annotations(judge("github", "--quiet").stdout)[0][0] == "warning"
    assert run("inspect", "missing", "--quiet").stderr == "error: no file `missing`\n"
    assert "exclude each other" in run("inspect", "x", "--quiet", "--verbose").stderr


def test_verbose_says_what_is_read_where_it_runs_and_how_long_it_takes(single, run, tmp_path):
    path = tmp_path / "analysis.safetensors"
    call = f"analyze {single} --data digits --limit 50 -o {path}"
    said = run(f"{call} --verbose")
    assert said.stdout == run(f"{call} --force").stdout
    assert all(line.startswith("info: ") for line in said.stderr.splitlines())
    read = (f"read `{single}`: 42,539 parameters, 1 MoE layer", "read `digits:calibration`: 50 samples")
    for fragment in (*read, "runs on ", f"wrote `{path}` ({path.stat().st_size} bytes)"):
        assert fragment in said.stderr
    assert re.search(r"reach blocks\.0\.soft_moe: 50 samples in \d+\.\d\d s, \d+ samples/s", said.stderr)
    assert run(f"{call} --force").stderr == ""


@pytest.mark.slow
def test_progress_shows_samples_per_second_and_the_time_left_on_a_terminal_unless_quiet(single):
    call = f"eval {single} --data digits --batch-size 1"
    shown = on_a_terminal(call, "stderr")
    assert re.search(r"eval: +\d+%.*/531 \[00:\d\d<00:\d\d, +\d+(\.\d+)? samples/s\]", shown)
    assert on_a_terminal(f"{call} --quiet", "stderr") == ""


def test_warnings_of_libraries_are_shown_if_wished_alone(run, printed, tmp_path, monkeypatch):
    theirs = pytest.importorskip("soft_moe_pytorch")

    def build():
        warnings.warn("noise", stacklevel=1)
        layer = theirs.SoftMoE(12, num_experts=8, num_slots=1)
        pooled = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 10)
        return nn.Sequential(nn.Conv2d(3, 12, 8, 8), layer, *pooled)

    monkeypatch.setitem(sys.modules, "noisy", SimpleNamespace(build=build))
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.save(build().state_dict(), "model.pt")
    call = "inspect model.pt --model noisy:build --input-shape 3,16,16"
    printed(call)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        assert run(f"{call} --verbose").code == 0
    assert "noise" in {str(warning.message) for warning in seen}
