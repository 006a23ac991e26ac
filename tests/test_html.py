"""The page of `--report`: one file that shows what the JSON says, in any browser, and runs nothing."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure as Drawing
from PIL import Image
from safetensors.numpy import load_file

import moeprune
from moeprune.cli.reporter import check_drawing
from moeprune.evaluation.gates import judge
from moeprune.plan import LayerPlan
from moeprune.report import figures
from moeprune.report.document import Document, Facts, Figure, Heading, Highlights, Lines, Table
from moeprune.report.experts import Masses, averaged, bars, curves, experts_of, heat_map
from moeprune.report.html import to_html
from moeprune.report.trade_off import draw
from tests.endings import PATIENCE
from tests.results import evaluation, row

NASTY = "<script>alert(1)<script>&\"'<b>`x`</b>"
LIMITS = "--max-accuracy-drop 0.001 --min-size-reduction 0.5"
KINDS = ("eval", "sweep", "layers", "analyze")
LAYER = "blocks.0.soft_moe"


def parsed(page):
    """A page as a tree: it is XML too."""
    assert page.startswith("<!DOCTYPE html>\n")
    return ElementTree.fromstring(page.removeprefix("<!DOCTYPE html>\n"))


def read(path):
    return parsed(path.read_text(encoding="utf-8"))


def text_of(element):
    return " ".join("".join(element.itertext()).split())


def tables_of(tree):
    """The texts of each table's cells."""
    return [[[text_of(cell) for cell in row] for row in table.iter("tr")] for table in tree.iter("table")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("pages")


@pytest.fixture(scope="module")
def pruned(single, small_analysis, made):
    return made(f"prune {single} --analysis {small_analysis} --keep 1/16 --signal gram --compensate none")


@pytest.fixture(scope="module")
def page_of_eval(single, pruned, small_analysis, run, folder):
    """Evaluate with a gate that fails; the page of that, and the JSON of the same."""

    def page_of_eval(name):
        call = f"eval {pruned} --data digits --baseline {single} --analysis {small_analysis} {LIMITS}"
        result = run(f"{call} --report {folder / name} --output-format json")
        assert result.code == 1
        return folder / name, json.loads(result.stdout)

    return page_of_eval


@pytest.fixture(scope="module")
def judged(page_of_eval):
    return page_of_eval("eval.html")


@pytest.fixture(scope="module")
def pages(single, vit, vit_analysis, small_analysis, judged, run_json, folder):
    """A page of each kind."""
    digits = f"{single} --data digits --limit 40"
    calls = {
        "sweep": f"eval {digits} --sweep 1/8 --compensate none --analysis {small_analysis}",
        "layers": f"eval {vit} --data pairs --limit 40 --analysis {vit_analysis}",
        "analyze": f"analyze {digits} -o {folder}/a.safetensors",
    }
    for name, call in calls.items():
        run_json(f"{call} --report {folder}/{name}.html")
    return {name: folder / f"{name}.html" for name in KINDS}


@pytest.mark.parametrize("kind", KINDS)
def test_a_page_is_one_file_that_asks_for_nothing_and_runs_nothing(pages, kind):
    page = pages[kind].read_text(encoding="utf-8")
    tree = parsed(page)
    assert {element.tag for element in tree.iter()}.isdisjoint({"script", "link", "iframe", "object", "a"})
    for element in tree.iter():
        for name, value in element.attrib.items():
            assert not name.startswith("on")
            assert name not in ("src", "srcset", "action", "data", "background")
            assert name != "href" or value.startswith(("#", "data:image/png;base64,"))
    assert not re.search(r"https?:|//|url\((?!#)|@import", re.sub(r"base64,[\w+/=\s]+", "", page))
    [policy] = (meta for meta in tree.iter("meta") if meta.get("http-equiv") == "Content-Security-Policy")
    assert policy.get("content").startswith("default-src 'none'")
    assert not re.search(r"#[0-9a-f]{6}", page.split("</style>")[1])  # colours follow the page's
    assert len(page.encode()) < 300_000
    for figure in tree.iter("figure"):
        [panels] = (part for part in figure.iter("div") if part.get("role") == "img")
        assert re.search(r"\d", panels.get("aria-label"))
    layers = {"eval": 1, "sweep": 1, "layers": 3, "analyze": 1}[kind]
    for title in ("mean mass of each expert", "mass of k experts", "mass of each expert over the inputs"):
        assert sum(text_of(part).startswith(title) for part in tree.iter("text")) == layers


def test_figures_have_the_colours_of_the_page_in_light():
    style = (Path(figures.__file__).parent / "page.css").read_text()
    for name, color in figures.PALETTE.items():
        assert f"--{name}: {color};" in style.split("@media")[0]
        assert f"--{name}: #" in style.split("@media")[1]


def test_the_verdict_stands_first_and_tables_have_the_values_of_the_json(judged, pruned, single):
    path, report = judged
    tree = read(path)
    header, main = tree.find("body")
    title = f"{pruned} on digits:test (531 samples)"
    assert [text_of(part) for part in header] == ["FAILED", "1 gate passed, 1 gate failed", title]
    assert main[0].find("table") is not None
    of_gates, numbers, classes, experts, facts = tables_of(tree)
    drop, size = report["gates"]
    assert of_gates[1:] == [
        ["max_accuracy_drop", "0.001", f"{drop['value']:.4g}", "✗ FAILED"],
        ["min_size_reduction", "0.5", f"{size['value']:.4g}", "✓ passed"],
    ]
    assert ["top-5 accuracy", f"{100 * report['model']['top5_accuracy']:.2f} %"] in [row[:2] for row in numbers]
    shown = {cells[0]: cells[1:5] for cells in classes[1:]}
    assert len(shown) == len(report["forgetting"]["classes"]) == 10
    for entry in report["forgetting"]["classes"]:
        low, high = entry["accuracy_drop_ci95"]
        change = f"{-100 * entry['accuracy_drop'] + 0.0:+.2f} pt ({-100 * high:+.1f} to {-100 * low:+.1f})"
        shares = (f"{100 * entry[side]:.1f} %" for side in ("baseline_accuracy", "accuracy"))
        assert shown[str(entry["class"])] == [change, *shares, str(entry["samples"])]
    assert len(experts) == 129
    origins = dict(facts)
    assert (origins["checkpoint"], origins["full model"]) == (str(pruned), str(single))
    assert (origins["data, SHA-256"], origins["torch"]) == (report["data"]["fingerprint"], torch.__version__)
    kept = moeprune.load(pruned).blocks[0].soft_moe.plan.kept
    assert origins[f"plan of {LAYER}"].endswith(": " + ", ".join(map(str, kept)))
    values = [text_of(value) for value in tree.iter("dd") if value.get("class") == "value"]
    assert values[0] == f"{100 * report['difference']['accuracy_drop']:+.2f} pt"
    assert values[2] == f"{100 * (1 - report['difference']['size_reduction']):.1f} %"


def test_classes_that_collapsed_stand_first(single, forgetful, run, tmp_path):
    assert run(f"eval {forgetful} --data digits --baseline {single} --report {tmp_path}/page.html").code == 0
    tree = read(tmp_path / "page.html")
    first = tables_of(tree)[1][1]
    assert (first[0], first[-1]) == ("3", "✗ collapsed")
    assert "hidden by the average: 3." in text_of(tree)
    assert tree.find("body/header/span") is None  # nothing was judged


def painted(paint, *values):
    axes = Drawing().subplots()
    paint(axes, *values)
    return axes


def test_experts_are_those_of_the_analysis(judged, pruned, small_analysis):
    arrays = load_file(small_analysis)
    mean_mass, class_mass = arrays[f"{LAYER}.mean_mass"], arrays[f"{LAYER}.class_mass"]
    plan = moeprune.load(pruned).blocks[0].soft_moe.plan
    is_kept = np.isin(np.arange(128), plan.kept)
    *_, (_, *rows), _ = tables_of(read(judged[0]))
    order = [int(expert) for expert, *_ in rows]
    assert order == sorted(range(128), key=lambda j: (-mean_mass[j], j))
    for expert, (_, *cells) in zip(order, rows, strict=True):
        max_mass = arrays[f"{LAYER}.max_mass"][expert]
        assert cells[:2] == [f"{100 * mean_mass[expert]:.2f} %", f"{100 * max_mass:.1f} %"]
        assert int(cells[2]) == class_mass[:, expert].argmax()
        assert (cells[-1] == "kept") == is_kept[expert]
    masses = Masses(moeprune.load_analysis(small_analysis).layers[LAYER], plan)
    kept, dropped = painted(bars, masses).patches
    assert kept.get_data().values == pytest.approx(np.where(is_kept, mean_mass, 0)[order])
    assert dropped.get_data().values == pytest.approx(np.where(is_kept, 0, mean_mass)[order])
    of_class = class_mass.argmax(0).astype(float)
    of_class[mean_mass < 0.25 / 128] = np.inf
    columns = np.lexsort((np.arange(128), -mean_mass, of_class))
    axes = painted(heat_map, masses)
    assert axes.images[0].get_array().data == pytest.approx(class_mass[:, columns])
    assert axes.lines[0].get_xdata() == pytest.approx(np.flatnonzero(is_kept[columns]) + 0.5)
    assert [label.get_text() for label in axes.get_yticklabels()] == list("0123456789")
    assert painted(curves, masses, plan).lines[0].get_ydata() == pytest.approx([0, *arrays[f"{LAYER}.kept_mass"]])


def test_of_more_cells_than_are_drawn_neighbours_are_averaged():
    values = np.random.default_rng(0).random((1024, 512))
    cells = averaged(averaged(values).T).T
    assert cells == pytest.approx(values.reshape(256, 4, 256, 2).mean((1, 3)))


@pytest.mark.slow
def test_plans_and_labels_decide_what_is_drawn(small_analysis):
    [layer] = moeprune.load_analysis(small_analysis).layers.values()

    def page_of(plan, layer=layer):
        return to_html(Document("t", list(experts_of(LAYER, layer, plan))))

    assert ">dropped<" not in page_of(None)
    assert ">dropped<" in page_of(LayerPlan("static", 0, 128, "gram", "mean", ()))
    assert "k = 16" in page_of(LayerPlan("input", 16, 128, "combine", "none"))
    assert "k = " not in page_of(LayerPlan("input", 128, 128, "combine", "none", mass=0.9))
    without = type(layer)(**{**vars(layer), "class_mass": layer.class_mass[:0]})
    assert "class" not in parsed(page_of(None, without)).find("body/main/figure").itertext()
    assert "of each class" not in page_of(None, without)


def test_points_of_a_sweep_stand_where_their_values_are():
    rows = [row(0.98, 1.0, 1.0, None, "1"), *(row(k / 10, k / 20, k / 30, f"w{k}") for k in range(1, 9))]
    for cost in ("size", "flops"):
        lines = painted(draw, rows, cost, "").lines
        drawn = {(x, y) for line in lines for x, y in line.get_xydata() if line.get_marker() != "None"}
        assert drawn == {(getattr(one, cost), one.accuracy) for one in rows}


def test_any_text_is_escaped_everywhere(single, small_analysis, run, tmp_path, monkeypatch):
    blocks = [
        Heading(NASTY), Lines([NASTY]), Facts([(NASTY, NASTY)]), Highlights([(NASTY, NASTY, NASTY)]),
        Table((NASTY, NASTY), [(NASTY, NASTY)], NASTY), Table((NASTY,), [(NASTY,)] * 3, NASTY, shown=0),
        Figure([figures.panel(lambda axes: axes.set_xlabel(f"{NASTY}$x^$"), NASTY)], NASTY, NASTY),
    ]  # fmt: skip
    page = to_html(Document(NASTY + "\0\x1b\ud800", blocks))
    assert parsed(page).find("head/title").text == NASTY + "���"
    assert "<script" not in page
    assert page.count("&lt;script&gt;alert(1)&lt;script&gt;") >= 16
    page.encode()
    monkeypatch.chdir(tmp_path)
    name = f"{NASTY.replace('/', '')}.safetensors"
    Path(name).write_bytes(single.read_bytes())
    call = ("eval", name, "--data", "digits", "--limit", 20, "--baseline", name)
    assert run(*call, "--analysis", small_analysis, "--report", "page.html").code == 0
    assert text_of(read(Path("page.html")).find("body/header/h1")) == f"{name} on digits:test (20 samples)"


def test_an_undecided_gate_is_shown_as_such():
    undecided = ("UNDECIDED", "1 gate passed, 1 gate undecided")
    for limit, words in ((0.95, undecided), (0.5, ("passed", "2 gates passed"))):
        results = judge(evaluation(98, 0), {"min_accuracy": limit, "min_size_reduction": 0.5}, 0.95)
        header = parsed(to_html(Document("t", [], results))).find("body/header")
        assert (text_of(header[0]), text_of(header[1])) == words


def test_equal_runs_give_equal_pages(page_of_eval, judged):
    assert page_of_eval("again.html")[0].read_bytes() == judged[0].read_bytes()


@pytest.mark.parametrize("missing", ["matplotlib", "jinja2"])
def test_a_missing_library_is_named_with_the_command_that_installs_it(missing, monkeypatch):
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(moeprune.MoepruneError, match=f"need {missing}") as caught:
        check_drawing(Path("page.html"), "report")
    assert caught.value.hint == "install what is missing: `pip install matplotlib jinja2`"


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
QUIET = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars",
)  # fmt: skip
SCHEMES = {"dark": (20, 23, 28), "light": (255, 255, 255)}  # in the order of the browser's numbers


@pytest.fixture
def browse(tmp_path):
    """Open a page in a browser; gives what it prints."""
    if CHROMIUM is None:
        pytest.skip("there is no chromium here")

    def browse(page, *words):
        profile = tmp_path / "profile"
        call = [CHROMIUM, *QUIET, f"--user-data-dir={profile}", *map(str, words), page.as_uri()]
        result = subprocess.run(call, capture_output=True, text=True, timeout=PATIENCE)
        shutil.rmtree(profile, ignore_errors=True)
        assert result.returncode == 0, result.stderr
        return result.stdout

    return browse


@pytest.mark.slow
@pytest.mark.parametrize("width", [1000, 400])
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("kind", ["eval", "sweep"])
def test_a_browser_shows_the_page(pages, browse, tmp_path, kind, scheme, width):
    shot = tmp_path / "shot.png"
    preferred = f"--blink-settings=preferredColorScheme={list(SCHEMES).index(scheme)}"
    browse(pages[kind], preferred, f"--window-size={width},2000", f"--screenshot={shot}")
    pixels = np.asarray(Image.open(shot).convert("RGB")).astype(int)
    paper = np.array(SCHEMES[scheme])
    assert (pixels[2, 2] == paper).all()
    assert 0.01 < (np.abs(pixels - paper).max(2) > 60).mean() < 0.6
    assert (pixels.max(2) - pixels.min(2) > 80).mean() > 0.0003  # coloured


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["eval", "sweep"])
def test_a_page_fits_a_phone_and_runs_nothing(pages, browse, tmp_path, kind):
    """Only its tables scroll; asked by a script in a copy without the policy that forbids scripts."""
    page, ask = pages[kind].read_text(encoding="utf-8"), "[document.documentElement.scrollWidth, innerWidth]"
    page = page.replace("</body>", f"<script>parent.postMessage({ask}.join(), '*')</script></body>")
    frame = tmp_path / "frame.html"
    frame.write_text(
        "<title>nothing</title><script>onmessage = event => { document.title = event.data }</script>"
        '<iframe src="copy.html" style="width: 360px; height: 700px; border: 0"></iframe>'
    )
    titles = []
    for copy in (page, page.replace('http-equiv="Content-Security-Policy"', "")):
        (tmp_path / "copy.html").write_text(copy, encoding="utf-8")
        shown = browse(frame, "--virtual-time-budget=5000", "--dump-dom")
        titles.append(re.search("<title>(.*?)</title>", shown).group(1))
    assert titles == ["nothing", "360,360"]
