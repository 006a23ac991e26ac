"""The published schemas allow what commands report, as every test that reads JSON checks, and no more."""

from __future__ import annotations

import copy
import json

import pytest
from jsonschema import Draft202012Validator

import moeprune
from moeprune import plan
from moeprune.layers import config
from moeprune.layers.config import SoftMoEConfig
from moeprune.models.architecture import BlockConfig, ViTConfig
from moeprune.models.vit import SoftMoEViT
from tests.schemas import FILES, complaints, validator

OPEN = {"arguments", "defaults", "provenance", "source"}
"""Objects that other programs fill."""


@pytest.fixture(scope="module")
def reports(single, small_analysis, run_json, tmp_path_factory):
    """What each command says, by schema."""
    folder = tmp_path_factory.mktemp("reports")
    blocks = (BlockConfig(mlp_dim=64), BlockConfig(soft_moe=SoftMoEConfig(16, 4, 1, 64)))
    config = ViTConfig((16, 16), (8, 8), 3, 10, dim=16, num_heads=2, blocks=blocks)
    moeprune.save(SoftMoEViT(config), folder / "vit.safetensors")
    pruned, calibrated = folder / "pruned.safetensors", ("--analysis", small_analysis)
    digits = ("--data", "digits", "--limit", 60)
    searched = run_json(
        "prune", single, *digits, "--max-accuracy-drop", 0.5, "--compensate", "mean", "-o", pruned,
        "--save-plan", folder / "plan.json",
    )  # fmt: skip
    judged = run_json(
        "eval", pruned, *digits, "--baseline", single, "--min-agreement", 0, "--latency",
        "--latency-batch", 1, "--min-speedup", 0.001,
    )  # fmt: skip
    return {
        "inspect": run_json("inspect", pruned),
        "analyze": run_json("analyze", single, *digits, "-o", folder / "a.safetensors"),
        "prune": searched,
        "eval": judged,
        "sweep": run_json("eval", single, *digits, *calibrated, "--sweep", "1/8", "--compensate", "mean"),
        "convert": run_json(
            "convert", folder / "vit.safetensors", "-o", folder / "vit.pt", "--to", "soft-moe"
        ),
        "config": run_json("config"),
        "plan": json.loads((folder / "plan.json").read_text()),
    }


def objects(schema, path="$"):
    """Every schema of an object within a schema, with where it stands."""
    if isinstance(schema, dict):
        if "properties" in schema or schema.get("type") == "object":
            yield path, schema
        for key, part in schema.items():
            yield from objects(part, f"{path}.{key}")
    elif isinstance(schema, list):
        for part in schema:
            yield from objects(part, path)


@pytest.mark.parametrize("name", FILES)
def test_a_schema_is_one_and_leaves_nothing_open(name):
    Draft202012Validator.check_schema(FILES[name])
    assert FILES[name]["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert FILES[name]["$id"] == f"{name}.json"
    for path, found in objects(FILES[name]):
        if path.rpartition(".")[2] not in OPEN and ".anyOf" not in path:
            assert "additionalProperties" in found, path


def places(value, path=()):
    """Every object within a value whose keys a schema names, as a path of keys."""
    if isinstance(value, dict):
        yield path
        for key, part in value.items():
            if key not in OPEN:
                yield from places(part, (*path, key))
    elif isinstance(value, list) and value:
        yield from places(value[0], (*path, 0))


def changed(value, path, change):
    value = copy.deepcopy(value)
    part = value
    for key in path:
        part = part[key]
    change(part)
    return value


BY_NAME = {"layers", "plan", "k", "commands"}
"""Objects whose keys are names of layers or commands."""


@pytest.mark.parametrize("name", sorted(set(FILES) - {"common", "demo"}))
def test_a_field_more_or_less_breaks_the_schema(reports, name):
    found = reports[name]
    assert complaints(name, found) == []
    checked = 0
    for path in places(found):
        if path and (path[-1] in BY_NAME or path[-2:-1] == ("commands",)) and path[-2:] != ("layers", "plan"):
            continue
        assert not validator(name).is_valid(changed(found, path, lambda part: part.update(news=1))), path
        part = found
        for key in path:
            part = part[key]
        for field in part if name != "plan" or not path else ():
            less = changed(found, path, lambda p, field=field: p.pop(field))
            assert not validator(name).is_valid(less), (path, field)
        checked += 1
    assert checked > 0


def test_schemas_name_the_choices_of_the_code():
    definitions = FILES["common"]["$defs"]
    of_plan = definitions["plan"]["properties"]
    assert of_plan["scope"]["enum"] == list(plan.SCOPES)
    assert of_plan["signal"]["enum"] == list(plan.SIGNALS)
    assert of_plan["compensation"]["enum"] == list(plan.COMPENSATIONS)
    of_layer = definitions["soft_moe"]["properties"]
    assert of_layer["expert"]["enum"] == list(config.EXPERTS)
    assert of_layer["router_norm"]["enum"] == list(config.ROUTER_NORMS)


@pytest.mark.parametrize(
    ("layer", "is_allowed"),
    [
        ({"k": 8}, True),
        ({"kept": [1, 2]}, True),
        ({"k": 8, "kept": None, "scope": "input", "mass": 0.9}, True),
        ({"scope": "static"}, False),
        ({"kept": None}, False),
        ({"k": 8, "scope": "all"}, False),
        ({"k": -1}, False),
    ],
)
def test_a_plan_that_is_allowed_is_one_that_prune_takes(single, run, tmp_path, layer, is_allowed):
    written = {"schema_version": 1, "plan": {"blocks.0.soft_moe": layer}}
    assert (complaints("plan", written) == []) is is_allowed
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(written))
    if layer.get("scope") != "input" and is_allowed:
        layer["signal"] = "random"  # which needs no analysis
        path.write_text(json.dumps(written))
    result = run("prune", single, "--plan", path, "-o", tmp_path / "pruned.safetensors")
    assert result.code == (0 if is_allowed else 2), result.stderr
