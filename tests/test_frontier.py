"""The trade-off of accuracy and cost: measured points, and their plot."""

import operator
import random
import re
import sys
import xml.etree.ElementTree as ElementTree

import pytest
from msgspec.structs import replace

from moeprune.cli.reporter import check_drawing
from moeprune.errors import MoepruneError
from moeprune.evaluation.latency import summarize_latency
from moeprune.evaluation.results import Latency
from moeprune.layers.config import SoftMoEConfig
from moeprune.pruning.sweep import KEEPS, METHODS, methods, on_frontier
from moeprune.report.sweeps import best_of
from moeprune.report.trade_off import plot_trade_off
from tests.results import row


def test_a_point_is_on_the_frontier_where_no_other_is_better():
    rng = random.Random(0)
    rows = [row(rng.randint(0, 9) / 9, rng.randint(1, 9) / 9, rng.randint(1, 9) / 9) for _ in range(60)]
    for found, own in zip(on_frontier(rows), rows, strict=True):
        for which in ("size", "flops"):
            saved = operator.attrgetter(f"difference.{which}_reduction")
            mine = saved(own), own.accuracy
            others = [(saved(other), other.accuracy) for other in rows]
            better = [other for other in others if other != mine and other >= mine and other[1] >= mine[1]]
            assert getattr(found, which) == (not better)


class Routed(SoftMoEConfig, frozen=True):
    """Layers that are only routed, and have no linear map."""

    scopes = ("input", "batch")
    compensations = ("none", "mean")


def test_every_method_is_measured_at_every_share_and_controls_once():
    layers = {"a": SoftMoEConfig(8, 4, 1, 8), "b": SoftMoEConfig(8, 6, 1, 8)}
    found = list(methods(KEEPS, layers))
    for label in METHODS.values():
        assert [variant.keep for variant in found if variant.label == label and variant.keep] == list(KEEPS)
    controls = [(variant.scope, variant.compensate) for variant in found if variant.keep == 0]
    assert controls == [("static", compensate) for compensate in ("none", "affine", "linear")]
    routed = {variant.label for variant in methods(KEEPS, layers | {"c": Routed(8, 4, 1, 8)})}
    assert routed == {"paper's rule: input, none"}


@pytest.fixture
def rows():
    labels = list(METHODS.values())
    points = [row(0.5 + k / 20, 0.1 * k, 0.1 * k, labels[k % len(labels)], f"1/{k}") for k in range(1, 9)]
    return [row(0.98, 1.0, 1.0, None, "1"), *points, row(0.3, 0.05, 0.1, labels[0], "0")]


def test_equal_rows_give_equal_plots(rows, tmp_path):
    for suffix in ("png", "svg"):
        for name in ("a", "b"):
            plot_trade_off(rows, "a $model^$ <on> --data", tmp_path / f"{name}.{suffix}")
        first, second = ((tmp_path / f"{name}.{suffix}").read_bytes() for name in ("a", "b"))
        assert first == second
        assert first.startswith(b"\x89PNG" if suffix == "png" else b"<?xml")
    assert "<" not in "".join(ElementTree.parse(tmp_path / "a.svg").getroot().itertext())


def test_a_speedup_has_a_panel_of_its_own(rows, tmp_path):
    plot_trade_off(rows, "t", tmp_path / "two.svg")
    latency = Latency(threads=1, batches=[summarize_latency(1, [2.0, 2.0], [3.0, 3.0])])
    plot_trade_off([replace(row, latency=latency) for row in rows], "t", tmp_path / "three.svg")
    widths = [
        float(ElementTree.parse(tmp_path / f"{name}.svg").getroot().get("width").removesuffix("pt"))
        for name in ("two", "three")
    ]
    assert widths[1] == pytest.approx(1.5 * widths[0])


def test_plots_that_cannot_be_drawn(tmp_path, monkeypatch):
    with pytest.raises(MoepruneError, match=r"is not a plot"):
        check_drawing(tmp_path / "plot.pdf", "plot")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MoepruneError, match="plots need matplotlib") as caught:
        check_drawing(tmp_path / "plot.png", "plot")
    assert "`pip install matplotlib`" in caught.value.hint


@pytest.mark.slow
def test_frontier_on_the_command_line(single, small_analysis, run, run_json, tmp_path):
    plot = tmp_path / "frontier.png"
    call = f"eval {single} --data digits --limit 40 --analysis {small_analysis} --plot {plot} --sweep 1/16,1/4"
    found = run_json(f"{call} --latency --latency-batch 2")
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert found["plot"] == str(plot)
    controls = {"static by combine, affine", "no MoE at all: linear"}
    assert {row["label"] for row in found["rows"]} == {None, *METHODS.values(), *controls}
    assert all(row["latency"]["batches"][0]["batch_size"] == 2 for row in found["rows"])
    assert {row["keep"] for row in found["rows"]} == {"1.0", "0", "1/16", "1/4"}
    best = max(row["accuracy"] for row in found["rows"])
    assert any(row["on_frontier"]["size"] and row["accuracy"] == best for row in found["rows"])
    again = run(call)
    assert (again.code, "exists" in again.stderr) == (2, True)
    assert f"drawn in {plot}" in run(f"{call} --force").stdout


@pytest.mark.slow
def test_a_sweep_ends_with_what_to_do_and_never_recommends_a_control(single, small_analysis, printed):
    words = "--limit 60 --sweep 1/16,1.0 --scope static --signal combine --compensate mean --latency --latency-batch 1"
    lines = printed(f"eval {single} --data digits --analysis {small_analysis} {words}").splitlines()
    assert max(map(len, lines[1 : lines.index("", 10) + 1])) <= 80
    assert "speed-up" in lines[1]
    marked = [line.split()[:2] for line in lines if " *" in line]
    assert ["none", "static"] in marked  # a control may be on the frontier
    answers = [line for line in lines if line.startswith("least ")]
    assert [answer.split()[1] for answer in answers] == ["size", "FLOPs"]
    assert all(re.search(r"`--keep (1/16|1\.0) --scope static --signal combine --compensate mean`", a) for a in answers)


def test_without_a_way_that_comes_near_a_sweep_says_so(rows):
    far = [rows[0], *(replace(one, accuracy=0.5) for one in rows[1:])]
    assert [best for _, _, best in best_of(far)] == [None, None]
    control = replace(rows[1], accuracy=0.98, keep="0")
    assert [best for _, _, best in best_of([*far, control, replace(control, signal="random", keep="1/8")])] == [
        None
    ] * 2
    good = replace(rows[1], accuracy=0.971)
    assert [best for _, _, best in best_of([*far, control, good])] == [good, good]
