"""The two forms of a pruned folder, and what `config.json` says of them; no torch.

A drop-in folder has fewer experts and is loaded as the full one. Others have more: their routers know the experts that
are dropped, and compensation tensors stand beside the experts. transformers runs them by `modeling_moeprune.py`, with
`trust_remote_code=True`; without, it refuses a `model_type` that it does not know.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from moeprune import __version__
from moeprune.errors import MoepruneError
from moeprune.plan import LOW_RANK, LayerPlan, Plan, plan_from_json, require_decided
from moeprune.records import to_json

Form = Literal["drop-in", "custom-code"]
KEY, CODE = "moeprune", "modeling_moeprune.py"
PREFIX = "moeprune_"  # of the model type
CLASSES = "PrunedMoEConfig", "PrunedMoEForCausalLM"
DROP_IN = ("renorm", "renorm-refit")
WITH_CODE = ("none", "mean", "lstsq", "affine", *LOW_RANK, "linear")
"""Compensations of folders of either form."""
IN_WORDS: Mapping[Form, str] = {
    "drop-in": "drop-in: whatever loads the full model loads it",
    "custom-code": "custom code: it runs with transformers and moeprune installed, `trust_remote_code=True`; vLLM does"
    " not load it",
}

TEXT = '''"""A model that moeprune {version} has pruned: it runs with the packages transformers and moeprune."""

from moeprune.models.folders.remote import pruned_classes

{classes} = pruned_classes("{model_type}", "{auto}", __name__)
'''


def is_drop_in(plan: LayerPlan) -> bool:
    """Return True if a layer is of its old kind when it is pruned, with fewer or narrower experts."""
    nothing_more = not plan.drops and plan.compensation in ("none", *LOW_RANK)
    return plan.compensation in DROP_IN or nothing_more or not (plan.drops or plan.width is not None)


def form_of(plan: Plan) -> Form:
    """Return the form of the folder that a plan makes."""
    return "drop-in" if all(is_drop_in(layer) for layer in plan.values()) else "custom-code"


def model_type_of(config: Mapping[str, Any]) -> str:
    """Return the type of the model that a folder's model was before it was pruned."""
    return str(config.get("model_type")).removeprefix(PREFIX)


def auto_class(config: Mapping[str, Any]) -> str:
    """Return the class of transformers that loads a model with this config."""
    return "AutoModelForImageTextToText" if "text_config" in config else "AutoModelForCausalLM"


def coded(config: Mapping[str, Any], plan: Plan) -> dict[str, Any]:
    """Return a config that leads to the code, with the plan that this follows."""
    module = CODE.removesuffix(".py")
    return {
        **config,
        "model_type": PREFIX + model_type_of(config),
        "architectures": [CLASSES[1]],
        "auto_map": {"AutoConfig": f"{module}.{CLASSES[0]}", auto_class(config): f"{module}.{CLASSES[1]}"},
        KEY: {"plan": to_json(plan)},
    }


def code_for(config: Mapping[str, Any]) -> str:
    """Return the modelling code of a pruned model, given its config before."""
    its = {"model_type": model_type_of(config), "auto": auto_class(config)}
    return TEXT.format(version=__version__, classes=", ".join(CLASSES), **its)


def stated_plan(config: Mapping[str, Any], where: str) -> Plan:
    """Return the plan that a config states, empty if it is not of a folder with code.

    Raises a MoepruneError that begins with `where` if the plan is damaged or leaves something open.
    """
    if KEY not in config and not str(config.get("model_type")).startswith(PREFIX):
        return {}
    stated = config.get(KEY)
    try:
        plan = plan_from_json(stated.get("plan") if isinstance(stated, Mapping) else None)
        require_decided(plan)
        if not plan:
            raise MoepruneError("the plan is empty")
    except MoepruneError as error:
        raise MoepruneError(f"{where}: `{KEY}`: {error.message}", "prune the full model again") from None
    return plan


def require_same_plan(plan: Plan, recorded: Any, path: Path) -> None:
    """Raise a MoepruneError if a plan file (its JSON) of a folder does not record the plan of its config."""
    try:
        is_same = plan_from_json(recorded.get("plan") if isinstance(recorded, Mapping) else None) == plan
    except MoepruneError:
        is_same = False
    if not is_same:
        hint = "one of them is damaged, or of another model; prune the full model again"
        raise MoepruneError(f"`{path}` has another plan than `config.json`", hint)
