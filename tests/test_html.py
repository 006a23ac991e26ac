"""The page of `--report`: one file that shows what the JSON says, in any browser, and runs nothing."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file

import moeprune
from moeprune.calibration.results import AnalysisReport
from moeprune.evaluation.gates import judge
from moeprune.plan import LayerPlan
from moeprune.records import from_json
from moeprune.report.commands import gates
from moeprune.report.document import Document, Facts, Heading, Highlights, Interval, Lines, Table
from moeprune.report.figure import Axis, Bars, Figure, HeatMap, Plot, Series
from moeprune.report.html import to_html
from moeprune.report.markdown import to_markdown
from moeprune.report.masses import experts_of
from moeprune.report.page import Background, analysis
from moeprune.report.text import to_text
from tests.results import evaluation

NASTY = "<script>alert(1)<script>&\"'<b>`x`</b>"
LIMITS = ("--max-accuracy-drop", 0.001, "--min-size-reduction", 0.5)


def parsed(page):
    """A page as a tree: it is XML too."""
    assert page.startswith("<!DOCTYPE html>\n")
    return ElementTree.fromstring(page.removeprefix("<!DOCTYPE html>\n"))


def text_of(element):
    return " ".join("".join(element.itertext()).split())


def tables_of(tree):
    """The texts of each table's cells, without the drawings in them."""
    return [
        [[text_of(cell) for cell in row] for row in table.iter("tr")]
        for table in tree.iter("table")
    ]  # fmt: skip


def image_of(element):
    """The picture that an `img` holds."""
    data = element.get("src").removeprefix("data:image/png;base64,")
    return Image.open(io.BytesIO(base64.b64decode(data, validate=True)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("pages")


@pytest.fixture(scope="module")
def pruned(single, small_analysis, run, folder):
    path = folder / "pruned.safetensors"
    how = ("--keep", "1/16", "--signal", "gram", "--compensate", "none")
    assert run("prune", single, "--analysis", small_analysis, *how, "-o", path).code == 0
    return path


@pytest.fixture(scope="module")
def judged(single, pruned, small_analysis, run, folder):
    """The page of an eval with a gate that fails, and the JSON of the same."""
    path = folder / "eval.html"
    call = ("eval", pruned, "--data", "digits", "--baseline", single, "--analysis", small_analysis, *LIMITS)
    result = run(*call, "--report", path, "--output-format", "json")
    assert result.code == 1
    return path, json.loads(result.stdout)


@pytest.fixture(scope="module")
def pages(single, vit, vit_analysis, small_analysis, judged, run_json, folder):
    """A page of each kind, and its JSON."""
    few = ("--limit", 40)
    calls = {
        "sweep": (
            "eval", single, "--data", "digits", *few, "--sweep", "1/8", "--compensate", "none",
            "--analysis", small_analysis,
        ),
        "layers": ("eval", vit, "--data", "pairs", *few, "--analysis", vit_analysis),
        "analyze": ("analyze", single, "--data", "digits", *few, "-o", folder / "a.safetensors"),
    }  # fmt: skip
    made = {"eval": judged}
    for name, call in calls.items():
        path = folder / f"{name}.html"
        made[name] = path, run_json(*call, "--report", path)
    return made


KINDS = ("eval", "sweep", "layers", "analyze")


@pytest.mark.parametrize("kind", KINDS)
def test_a_page_is_one_file_that_asks_for_nothing_and_runs_nothing(pages, kind):
    page = pages[kind][0].read_text(encoding="utf-8")
    tree = parsed(page)
    allowed = {
        "html", "head", "meta", "title", "style", "body", "header", "main", "h1", "h2", "h3", "p", "span",
        "code", "i", "br", "dl", "dt", "dd", "div", "ul", "li", "table", "thead", "tbody", "tr", "th", "td",
        "details", "summary", "figure", "figcaption", "img", "svg", "g", "path", "circle", "polygon", "text",
    }  # fmt: skip
    assert {element.tag for element in tree.iter()} <= allowed
    for element in tree.iter():
        for name, value in element.attrib.items():
            assert not name.startswith("on")
            assert name not in ("href", "srcset", "action", "data", "background")
            if name == "src":
                assert value.startswith("data:image/png;base64,")
    assert not re.search(r"https?:|//|url\(|@import", re.sub(r"data:image/png;base64,[\w+/=]+", "", page))
    [policy] = (meta for meta in tree.iter("meta") if meta.get("http-equiv") == "Content-Security-Policy")
    assert policy.get("content").startswith("default-src 'none'")
    assert len(page.encode()) < 200_000


@pytest.mark.parametrize("kind", KINDS)
def test_every_figure_is_described_in_words(pages, kind):
    figures = list(parsed(pages[kind][0].read_text(encoding="utf-8")).iter("figure"))
    assert figures
    for figure in figures:
        [panels] = (part for part in figure.iter("div") if part.get("role") == "img")
        assert len(panels.get("aria-label")) > 30
        assert re.search(r"\d", panels.get("aria-label"))


def test_the_verdict_stands_first_and_tables_have_the_values_of_the_json(judged, pruned, single):
    path, found = judged
    tree = parsed(path.read_text(encoding="utf-8"))
    header, main = tree.find("body")
    assert [text_of(part) for part in header] == [
        "FAILED", "1 gate passed, 1 gate failed", f"{pruned} on digits:test (531 samples)",
    ]  # fmt: skip
    assert main[0].find("table") is not None
    of_gates, numbers, classes, experts, facts = tables_of(tree)
    drop, size = found["gates"]
    assert of_gates[1:] == [
        ["max_accuracy_drop", "0.001", f"{drop['value']:.4g}", "✗ FAILED"],
        ["min_size_reduction", "0.5", f"{size['value']:.4g}", "✓ passed"],
    ]
    by_name = {row[0]: row[1:] for row in numbers}
    assert by_name["top-5 accuracy"][:2] == [
        f"{100 * found[side]['top5_accuracy']:.2f} %" for side in ("model", "baseline_model")
    ]
    shown = {cells[0]: cells[1:] for cells in classes[1:]}
    assert len(shown) == len(found["forgetting"]["classes"]) == 10
    for entry in found["forgetting"]["classes"]:
        low, high = entry["accuracy_drop_ci95"]
        change = f"{-100 * entry['accuracy_drop'] + 0.0:+.2f} pt ({-100 * high:+.1f} to {-100 * low:+.1f})"
        assert shown[str(entry["class"])][:4] == [
            change,
            f"{100 * entry['baseline_accuracy']:.1f} %",
            f"{100 * entry['accuracy']:.1f} %",
            str(entry["samples"]),
        ]
    assert len(experts) == 129
    told = dict(facts)
    assert told["checkpoint"] == str(pruned)
    assert told["full model"] == str(single)
    assert told["data, SHA-256"] == found["data"]["fingerprint"]
    assert told["torch"] == torch.__version__
    kept = moeprune.load(pruned).blocks[0].soft_moe.plan.kept
    assert told["plan of blocks.0.soft_moe"].endswith(": " + ", ".join(map(str, kept)))
    values = [text_of(value) for value in tree.iter("dd") if value.get("class") == "value"]
    difference = found["difference"]
    assert values[0] == f"{100 * difference['accuracy_drop']:+.2f} pt"
    assert values[2] == f"{100 * (1 - difference['size_reduction']):.1f} %"
    assert values[3] == f"{100 * (1 - difference['flops_reduction']):.1f} %"


def test_classes_that_collapsed_stand_first(single, run, tmp_path):
    model = moeprune.load(single)
    with torch.no_grad():
        model.head.bias[3] = -1e3
    moeprune.save(model, tmp_path / "forgetful.safetensors")
    call = ("eval", tmp_path / "forgetful.safetensors", "--data", "digits", "--baseline", single)
    assert run(*call, "--report", tmp_path / "page.html").code == 0
    tree = parsed((tmp_path / "page.html").read_text(encoding="utf-8"))
    first = tables_of(tree)[1][1]
    assert (first[0], first[-1]) == ("3", "✗ collapsed")
    assert "while the average hides it: 3." in text_of(tree)
    assert tree.find("body/header/span") is None  # nothing was judged


def test_experts_of_a_page_are_those_of_the_analysis(judged, pruned, small_analysis):
    tree = parsed(judged[0].read_text(encoding="utf-8"))
    name = "blocks.0.soft_moe"
    arrays = load_file(small_analysis)
    mean_mass, class_mass = arrays[f"{name}.mean_mass"], arrays[f"{name}.class_mass"]
    kept = set(moeprune.load(pruned).blocks[0].soft_moe.plan.kept)
    *_, (columns, *rows), _ = tables_of(tree)
    assert columns[:2] == ["expert", "mean mass"]
    order = [int(row[0]) for row in rows]
    assert order == sorted(range(128), key=lambda j: (-mean_mass[j], j))
    for expert, *cells in ((int(row[0]), *row[1:]) for row in rows):
        assert cells[0] == f"{100 * mean_mass[expert]:.2f} %"
        assert cells[1] == f"{100 * arrays[f'{name}.max_mass'][expert]:.1f} %"
        assert int(cells[2]) == class_mass[:, expert].argmax()
        assert (cells[-1] == "kept") == (expert in kept)
    of_class = class_mass.argmax(0).astype(float)
    of_class[mean_mass < 0.25 / 128] = np.inf
    columns = np.lexsort((np.arange(128), -mean_mass, of_class))
    [cells] = (part for part in tree.iter("div") if part.get("class") == "cells")
    marks, image = (image_of(part) for part in cells)
    assert [bool(mark) for mark in np.asarray(marks)[0]] == [j in kept for j in columns]
    expected = 255 * np.sqrt(class_mass[:, columns] / class_mass.max())
    opacity = np.asarray(image.convert("RGBA"))[..., 3]
    assert np.abs(opacity - expected).max() <= 255 / 63 / 2 + 1
    names = [text_of(part) for part in tree.iter("div") if part.get("class") == "names"]
    assert names == ["0123456789"]


def test_each_layer_has_its_figures(pages, vit_analysis):
    tree = parsed(pages["layers"][0].read_text(encoding="utf-8"))
    layers = [text_of(part) for part in tree.iter("h2") if text_of(part).startswith("Experts of ")]
    assert layers == [f"Experts of blocks.{i}.soft_moe" for i in (1, 2, 3)]
    titles = [text_of(part) for part in tree.iter() if part.get("class") == "title"]
    for title in ("mean mass of each expert", "mass of k experts", "mass of each expert over the inputs"):
        assert sum(found.startswith(title) for found in titles) == 3
    sizes = [image_of(part).size for part in tree.iter("img")]
    of_classes = load_file(vit_analysis)["blocks.1.soft_moe.class_mass"]
    assert sizes == [(64, of_classes.any(1).sum())] * 3


def test_points_of_a_sweep_stand_where_their_values_are(pages):
    path, found = pages["sweep"]
    tree = parsed(path.read_text(encoding="utf-8"))
    figure = next(tree.iter("figure"))
    points = []
    for circle in figure.find("div/svg").iter("circle"):
        numbers = re.search(r"accuracy ([\d.]+) %, size ([\d.]+) %", circle.find("title").text).groups()
        points.append([float(number) for number in (*numbers, circle.get("cx"), circle.get("cy"))])
    accuracy, size, x, y = np.array(points).T
    rows = [row for row in found["rows"] if row["scope"] is not None and row["keep"] != "0"]
    assert len(points) == len(rows)
    assert sorted(accuracy) == pytest.approx(sorted(round(100 * row["accuracy"], 2) for row in rows))
    for values, places, direction in ((size, x, 1), (accuracy, y, -1)):
        slope, offset = np.polyfit(values, places, 1)
        assert slope * direction > 0
        assert np.abs(slope * values + offset - places).max() < 0.3
    assert len(tables_of(tree)[0]) == len(found["rows"]) + 1


def test_heights_of_bars_and_lengths_of_intervals():
    heights = [4.0, 2.0, 1.0]
    bars = Bars("b", Axis("x"), Axis("y", low=0), heights, [1])
    table = Table(("", "change"), [("a", Interval("-1", -2.0, -1.0, 0.5, 2.0))])
    tree = parsed(to_html(Document("t", [Figure([bars], "three bars"), table])))
    places = {}
    for path in tree.iter("path"):
        if path.get("class", "").startswith("area") and "M2 2" not in path.get("d"):
            for left, bottom, top in re.findall(r"M([\d.]+) ([\d.]+)V([\d.]+)", path.get("d")):
                places[float(left)] = float(bottom) - float(top)
    drawn = [places[left] for left in sorted(places)]
    assert [height / drawn[0] for height in drawn] == pytest.approx([1, 0.5, 0.25], abs=0.01)
    ends = next(path.get("d") for path in tree.iter("path") if path.get("class") == "ends")
    low, high = (float(place) for place in re.match(r"M([\d.]+) 7H([\d.]+)", ends).groups())
    assert (low - 60) / (high - 60) == pytest.approx(-4, abs=0.05)


def large_layer(single_analysis_path, experts, classes, seed=0):
    """Statistics of a layer larger than any that is shipped."""
    rng = torch.Generator().manual_seed(seed)
    loaded = moeprune.load_analysis(single_analysis_path)
    [(name, layer)] = loaded.layers.items()
    class_mass = torch.rand(classes, experts, generator=rng).softmax(1)
    kept_mass = torch.linspace(1 / experts, 1, experts)
    layer = replace(
        layer, mean_mass=class_mass.mean(0), max_mass=class_mass.amax(0), class_mass=class_mass,
        kept_mass=kept_mass,
    )  # fmt: skip
    return replace(loaded, layers={name: layer})


@pytest.fixture(scope="module")
def found(single, small_analysis, pages):
    return from_json(pages["analyze"][1], AnalysisReport, "report")


def test_a_large_layer_gives_a_page_of_moderate_size(found, small_analysis):
    loaded = large_layer(small_analysis, 512, 1024)
    page = to_html(analysis(found, Background(analysis=loaded)))
    assert len(page.encode()) < 300_000
    [image] = (image_of(part) for part in parsed(page).iter("img"))
    assert image.size == (256, 256)


def test_of_more_cells_than_are_drawn_neighbours_are_averaged():
    values = torch.rand(1024, 512, generator=torch.Generator().manual_seed(0)).tolist()
    drawing = HeatMap("h", "x", "y", values, [str(row) for row in range(1024)], [5])
    tree = parsed(to_html(Document("t", [Figure([drawing], "1024 rows")])))
    marks, image = (image_of(part) for part in tree.iter("img"))
    expected = np.array(values).reshape(256, 4, 256, 2).mean((1, 3))
    opacity = np.asarray(image.convert("RGBA"))[..., 3]
    assert np.abs(opacity - 255 * np.sqrt(expected / expected.max())).max() <= 255 / 63 / 2 + 1
    assert np.flatnonzero(np.asarray(marks)[0]).tolist() == [2]
    assert "neighbours averaged to 256 × 256 cells" in text_of(tree)


def test_an_analysis_without_labels_has_no_heat_map(found, small_analysis):
    loaded = moeprune.load_analysis(small_analysis)
    [(name, layer)] = loaded.layers.items()
    layer = replace(layer, class_mass=layer.class_mass[:0])
    page = to_html(analysis(found, Background(analysis=replace(loaded, layers={name: layer}))))
    assert list(parsed(page).iter("img")) == []
    assert "mass of k experts" in page


def legend_of(plan, layer):
    """What the legend of a layer's figure explains."""
    blocks = experts_of("blocks.0.soft_moe", layer, plan)
    [figure, *_] = (block for block in blocks if isinstance(block, Figure))
    tree = parsed(to_html(Document("t", [figure])))
    return [text_of(entry) for entry in tree.iter("li")], text_of(tree)


def test_bars_are_told_apart_where_a_plan_says_which_experts_are_kept(small_analysis):
    [layer] = moeprune.load_analysis(small_analysis).layers.values()
    curves = ["best k of each input", "one set of k for all inputs", "uniform router"]
    assert legend_of(None, layer)[0] == curves
    kept = LayerPlan("static", 2, 128, "gram", "mean", (3, 5))
    none = LayerPlan("static", 0, 128, "gram", "mean", ())
    for plan in (kept, none):
        assert legend_of(plan, layer)[0] == ["kept", "dropped", *curves]
    of_input = LayerPlan("input", 16, 128, "combine", "none")
    legend, shown = legend_of(of_input, layer)
    assert legend == curves
    assert "k = 16" in shown
    adaptive = LayerPlan("input", 128, 128, "combine", "none", mass=0.9)
    assert "k = " not in legend_of(adaptive, layer)[1]


def test_what_a_user_named_is_text(single, small_analysis, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = f"{NASTY.replace('/', '')}.safetensors"
    Path(name).write_bytes(single.read_bytes())
    call = ("eval", name, "--data", "digits", "--limit", 20, "--baseline", name)
    assert run(*call, "--analysis", small_analysis, "--report", "page.html").code == 0
    page = Path("page.html").read_text(encoding="utf-8")
    tree = parsed(page)
    assert "<script" not in page
    assert text_of(tree.find("body/header/h1")) == f"{name} on digits:test (20 samples)"
    assert text_of(tree.find("head/title")) == f"{name} on digits:test (20 samples)"


def test_any_text_is_escaped_everywhere():
    blocks = [
        Heading(NASTY), Lines([NASTY]), Facts([(NASTY, NASTY)]), Highlights([(NASTY, NASTY, NASTY)]),
        Table((NASTY, NASTY), [(NASTY, NASTY)], NASTY), Table((NASTY,), [(NASTY,)] * 3, NASTY, shown=0),
        Figure(
            [
                Plot(
                    NASTY, Axis(NASTY), Axis(NASTY),
                    [Series(NASTY, [(0, 0)], "points", 0, [NASTY])], (0, NASTY),
                ),
                Bars(NASTY, Axis(NASTY), Axis(NASTY, low=0), [1.0], [0], (NASTY, NASTY), (1.0, NASTY)),
                HeatMap(NASTY, NASTY, NASTY, [[1.0]], [NASTY], [0], NASTY),
            ],
            NASTY,
            NASTY,
        ),
    ]  # fmt: skip
    page = to_html(Document(NASTY + "\0\x1b\ud800", blocks))
    tree = parsed(page)
    assert "<script" not in page
    assert "<b>" not in page
    assert tree.find("head/title").text == NASTY + "���"
    assert page.count("&lt;script&gt;alert(1)&lt;script&gt;") >= 25
    page.encode()


def test_what_is_undecided_is_said_so():
    for limit, words in (
        (0.95, ("UNDECIDED", "1 gate passed, 1 gate undecided")),
        (0.5, ("passed", "2 gates")),
    ):
        results = judge(evaluation(98, 0), {"min_accuracy": limit, "min_size_reduction": 0.5}, 0.95)
        header = parsed(to_html(Document("t", [], gates(results), False))).find("body/header")
        assert text_of(header[0]) == words[0]
        assert text_of(header[1]).startswith(words[1])


def test_equal_runs_give_equal_pages(single, pruned, small_analysis, judged, run, tmp_path):
    call = ("eval", pruned, "--data", "digits", "--baseline", single, "--analysis", small_analysis, *LIMITS)
    assert run(*call, "--report", tmp_path / "again.html").code == 1
    assert (tmp_path / "again.html").read_bytes() == judged[0].read_bytes()


def test_text_and_markdown_say_what_a_figure_shows():
    document = Document(
        "t",
        [
            Heading("Experts"),
            Highlights([("size", "32 %", "of 170 kB")]),
            Figure([], "The best of 8 hold 50 % of it."),
            Table(("a", "b"), [("x", Interval("-1.0 pt", -2, -1, 0, 2))]),
        ],
    )
    for rendered in (to_text(document), to_markdown(document)):
        for expected in ("Experts", "32 %", "of 170 kB", "The best of 8 hold 50 % of it.", "-1.0 pt"):
            assert expected in rendered


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--report", "page.pdf"), "`page.pdf` is no page of HTML"),
        (("--report", "there.html"), "`there.html` exists"),
        (("--report", "missing/page.html"), "no directory `missing`"),
        (("--report", "page.html", "--output-file", "page.html"), "are both `page.html`"),
        (("--report", "page.html", "--analysis", "OTHER"), "the analysis was made for another checkpoint"),
        (("--report", "page.html", "--analysis", "there.html"), "there.html"),
    ],
)
def test_calls_that_are_wrong(
    words, message, pruned, small_analysis, vit_analysis, run, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    Path("there.html").write_text("mine")
    named = {"ANALYSIS": small_analysis, "OTHER": vit_analysis}
    result = run("eval", pruned, "--data", "digits", *(named.get(word, word) for word in words))
    assert result.code == 2
    assert message in result.stderr
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("there.html", "mine")]


def test_an_analysis_and_its_page_are_two_files(single, run, tmp_path):
    path = tmp_path / "both.html"
    result = run("analyze", single, "--data", "digits", "-o", path, "--report", path)
    assert result.code == 2
    assert "are both" in result.stderr
    assert not path.exists()


def test_a_configuration_names_a_page(pruned, small_analysis, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("moeprune.toml").write_text(
        f'[eval]\ndata = "digits"\nlimit = 20\nanalysis = "{small_analysis}"\nreport = "page.html"\n'
    )
    assert run("eval", pruned).code == 0
    assert "Experts of" in Path("page.html").read_text(encoding="utf-8")


# --- in a browser ------------------------------------------------------------------------------

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
QUIET = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars",
)  # fmt: skip


@pytest.fixture
def browse(tmp_path):
    """Open a page in a browser; gives what it prints."""
    if CHROMIUM is None:
        pytest.skip("there is no chromium here")

    def browse(page, *words):
        profile = tmp_path / "profile"
        call = [CHROMIUM, *QUIET, f"--user-data-dir={profile}", *map(str, words), page.as_uri()]
        result = subprocess.run(call, capture_output=True, text=True, timeout=120)
        shutil.rmtree(profile, ignore_errors=True)
        assert result.returncode == 0, result.stderr
        return result.stdout

    return browse


SCHEMES = {"dark": (20, 23, 28), "light": (255, 255, 255)}
"""Colours of the page, in the order of the browser's own numbers of the schemes."""


@pytest.mark.slow
@pytest.mark.parametrize("width", [1000, 400])
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_browser_shows_the_page(pages, browse, tmp_path, kind, scheme, width):
    shot = tmp_path / "shot.png"
    preferred = f"--blink-settings=preferredColorScheme={list(SCHEMES).index(scheme)}"
    browse(pages[kind][0], preferred, f"--window-size={width},2000", f"--screenshot={shot}")
    pixels = np.asarray(Image.open(shot).convert("RGB")).astype(int)
    assert pixels.shape == (2000, width, 3)
    paper = np.array(SCHEMES[scheme])
    assert (pixels[2, 2] == paper).all()
    is_drawn = np.abs(pixels - paper).max(2) > 60
    assert 0.01 < is_drawn.mean() < 0.6
    assert is_drawn[1000:].any()
    is_colored = pixels.max(2) - pixels.min(2) > 80
    assert is_colored.mean() > 0.0003


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_page_fits_a_phone(pages, browse, tmp_path, kind):
    """Only its tables scroll; asked by a script in a copy that allows one, in a frame as wide as a phone."""
    page = pages[kind][0].read_text(encoding="utf-8")
    page = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page)
    ask = (
        "<script>parent.postMessage([document.documentElement.scrollWidth, innerWidth].join(), '*')</script>"
    )
    (tmp_path / "copy.html").write_text(page.replace("</body>", f"{ask}</body>"), encoding="utf-8")
    frame = tmp_path / "frame.html"
    frame.write_text(
        "<title></title><script>onmessage = event => { document.title = event.data }</script>"
        '<iframe src="copy.html" style="width: 360px; height: 700px; border: 0"></iframe>'
    )
    shown = browse(frame, "--virtual-time-budget=5000", "--dump-dom")
    needed, there = map(int, re.search(r"<title>(\d+),(\d+)</title>", shown).groups())
    assert needed <= there == 360


@pytest.mark.slow
def test_a_browser_reads_what_was_written_and_runs_nothing(browse, tmp_path):
    page = tmp_path / "page.html"
    text = "<script>document.title = 'run'</script><img src=x onerror=\"document.title='run'\">"
    page.write_text(to_html(Document(text, [Heading(text), Facts([(text, text)])])), encoding="utf-8")
    shown = browse(page, "--dump-dom")
    assert "<script" not in shown
    assert "<img" not in shown
    assert "<title>&lt;script&gt;" in shown
    injected = tmp_path / "injected.html"
    written = page.read_text(encoding="utf-8")
    injected.write_text(written.replace("</body>", "<script>document.title = 'run'</script></body>"))
    assert "<title>run</title>" not in browse(injected, "--dump-dom")
