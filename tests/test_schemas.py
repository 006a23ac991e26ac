"""The generated schemas allow what commands report, as every test that reads JSON checks, and no more."""

import copy
import json

import pytest
from jsonschema import Draft202012Validator
from msgspec.structs import replace

import moeprune
from moeprune.evaluation.language_results import LanguageGroup
from moeprune.layers.config import SoftMoEConfig
from moeprune.models.architecture import BlockConfig, ViTConfig
from moeprune.models.vit import SoftMoEViT
from moeprune.pruning.results import LanguageSweep, LanguageSweepRow
from moeprune.records import to_text
from moeprune.report.commands import TYPES, schema_of
from tests.language import TinyLanguageModel, ids
from tests.schemas import complaints, validator

OPEN = {"arguments", "defaults", "provenance", "source", "architecture", "preprocessing", "settings"}
"""Objects whose keys others define."""
BY_NAME = {"layers", "plan", "k"}
"""Objects whose keys are names of layers."""


@pytest.fixture(scope="module")
def reports(single, small_analysis, run_json, tmp_path_factory):
    """The report of each command, by schema."""
    folder = tmp_path_factory.mktemp("reports")
    blocks = (BlockConfig(mlp_dim=64), BlockConfig(soft_moe=SoftMoEConfig(16, 4, 1, 64)))
    config = ViTConfig((16, 16), (8, 8), 3, 10, dim=16, num_heads=2, blocks=blocks)
    moeprune.save(SoftMoEViT(config), folder / "vit.safetensors")
    pruned, digits = folder / "pruned.safetensors", "--data digits --limit 60"
    search = f"--max-accuracy-drop 0.5 --compensate mean -o {pruned} --save-plan {folder}/plan.json"
    gates = "--min-agreement 0 --latency --latency-batch 1 --min-speedup 0.001"
    return {
        "prune": run_json(f"prune {single} {digits} {search}"),
        "inspect": run_json(f"inspect {pruned}"),
        "analyze": run_json(f"analyze {single} {digits} -o {folder}/a.safetensors"),
        "eval": run_json(f"eval {pruned} {digits} --baseline {single} {gates}"),
        "sweep": run_json(f"eval {single} {digits} --analysis {small_analysis} --sweep 1/8 --compensate mean"),
        "export": run_json(f"export {folder}/vit.safetensors -o {folder}/vit.pt --to soft-moe"),
        "plan": json.loads((folder / "plan.json").read_text()),
        "eval-language": json.loads(to_text(language_evaluation())),
        "sweep-language": json.loads(to_text(sweep_of_text())),
    }


def sweep_of_text():
    """A sweep of one row, as if of a language model."""
    found = moeprune.evaluate(TinyLanguageModel(), ids(4), runtime=moeprune.Runtime("cpu"))
    names = ("loss", "loss_increase", "loss_increase_sd", "agreement", "kl", "size", "flops")
    options = {"options": "--keep 1/2", "keep": "1/2", "width": None, "signal": "gram", "compensate": "renorm"}
    row = LanguageSweepRow(**options, **dict.fromkeys(names, 0.5), draws=2)
    return LanguageSweep(
        checkpoint="full", data=found.data, sequence_length=12, rows=[row], environment=found.environment
    )


def language_evaluation():
    """A pruned language model beside the full one, with every part that a report may have."""
    full, runtime = TinyLanguageModel(), moeprune.Runtime("cpu")
    pruned = moeprune.prune(full, data=ids(16), keep=4, compensate="mean", runtime=runtime)
    gates = {"max_kl": 9}
    found = moeprune.evaluate(pruned, ids(16), full, runtime, (1,), gates=gates, confidence=0.5)
    names = LanguageGroup.__struct_fields__
    group = {name: getattr(found.difference, name, getattr(found.model, name, None)) for name in names}
    group |= {"name": "some", "samples": 16, "baseline_loss": found.baseline_model.loss}
    return replace(found, groups=[LanguageGroup(**group)])


@pytest.mark.parametrize("name", TYPES)
def test_a_schema_is_valid_and_dated(name):
    schema = schema_of(name)
    Draft202012Validator.check_schema(schema)
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"


def test_an_unknown_schema_is_refused():
    with pytest.raises(moeprune.MoepruneError, match="no schema for `evil`"):
        schema_of("evil")


def places(value, path=()):
    """Every object within a value whose keys a schema names, as a path of keys."""
    if isinstance(value, dict):
        if not path or path[-1] not in BY_NAME or path[-2:-1] == ("layers",):
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


@pytest.mark.parametrize("name", sorted(set(TYPES) - {"demo"}))
def test_a_field_more_or_less_breaks_the_schema(reports, name):
    report = reports[name]
    assert complaints(name, report) == []
    for path in places(report):
        of_plan = path[:1] == ("plan",) or path[-1:] == ("plan",)  # whose fields may have defaults
        part = report
        for key in path:
            part = part[key]
        if not of_plan:
            assert not validator(name).is_valid(changed(report, path, lambda part: part.update(news=1))), path
            for field in part:
                less = changed(report, path, lambda p, field=field: p.pop(field))
                assert not validator(name).is_valid(less), (path, field)


@pytest.mark.parametrize(
    ("layer", "is_allowed"),
    [
        ({"k": 8}, True),
        ({"kept": [1, 2]}, True),
        ({"k": 8, "kept": None, "scope": "input", "mass": 0.9}, True),
        ({"scope": "static"}, False),
        ({"kept": None}, False),
        ({"k": 8, "news": 1}, False),
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
