"""The third part of the demo: a small language model with token-gated experts, pruned in several ways.

The model is a folder of transformers, trained on the sources of Python's standard library; its modules are dealt out by
their names, so that the text that it is tested on is not what it was trained on, whatever release of Python runs.
"""

import hashlib
import json
import sysconfig
from fractions import Fraction
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from msgspec.structs import replace

from moeprune.data.datasets import Dataset, open_data
from moeprune.demo.records import DemoLanguage, LanguageRow
from moeprune.demo.train_language import LENGTH, fit_language, fresh_language, train_tokenizer
from moeprune.errors import MoepruneError
from moeprune.evaluation.evaluate import evaluate
from moeprune.evaluation.language_results import LanguageEvaluation
from moeprune.files.disk import write_file
from moeprune.models.language import LanguageModel
from moeprune.models.model import Model, save
from moeprune.models.opening import load
from moeprune.models.runtime import Runtime
from moeprune.pruning.prune import prune
from moeprune.records import to_text

TITLE = "language model with token gates, 3 layers of 32 experts"
SHAPE: dict[str, Any] = {
    "model_type": "qwen3_moe", "vocab_size": 1024, "hidden_size": 96, "intermediate_size": 96,
    "moe_intermediate_size": 48, "num_experts": 32, "num_experts_per_tok": 4, "norm_topk_prob": True,
    "decoder_sparse_step": 1, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 4,
    "head_dim": 24, "max_position_embeddings": 512, "tie_word_embeddings": True, "pad_token_id": None,
    "bos_token_id": None, "eos_token_id": 0,
}  # fmt: skip
STEPS = 2500
SPLITS = {"calibration": 82_000, "test": 40_000}  # tokens
WAYS: dict[str, dict[str, Any]] = {
    "drop-in: gram, renorm-refit": {"compensate": "renorm-refit"},
    "drop-in: narrower experts, width": {},
    "static by gram, low-rank 8": {"compensate": "low-rank", "rank": 8},
    "REAP: reap, renorm": {"signal": "reap", "compensate": "renorm"},
    "MoNE: mone, mean": {"signal": "mone", "compensate": "mean"},
    "merging: frequency, merge": {"signal": "frequency", "compensate": "merge"},
}
KEEPS = (Fraction(1, 2), Fraction(1, 4))


def run_language(
    texts: dict[str, list[str]], directory: Path, train_anew: bool, seed: int, runtime: Runtime
) -> DemoLanguage:
    """Prune and evaluate the language model; write it, its text and what is pruned into a directory.

    texts: what `sources` returns.
    """
    folder = directory / "full"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MoepruneError(f"cannot write into `{directory}` ({error.strerror})") from None
    for split in SPLITS:
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts[split])
        write_file(directory / f"{split}.jsonl", lines)
    if train_anew:
        train_language(texts["train"], folder, seed, runtime.progress)
    else:
        for file in (resources.files("moeprune.demo") / "checkpoints/language").iterdir():
            write_file(folder / file.name, file.read_bytes())
    full = load(folder)
    calibration, test = (_open(full, directory, split) for split in SPLITS)
    rows = [_row(None, "1.0", evaluate(full, test, full, runtime), runtime)]
    for label, way in WAYS.items():
        for keep in KEEPS:
            amount: dict[str, Any] = {"width" if label.endswith("width") else "keep": keep}
            pruned = prune(full, data=calibration, seed=seed, runtime=runtime, **amount, **way)
            result = evaluate(pruned, test, full, runtime)
            rows.append(_row(label, str(keep), result, runtime))
            if label.startswith("drop-in") and isinstance(pruned, LanguageModel):
                name = f"{'width' if 'width' in amount else 'renorm-refit'}-{str(keep).replace('/', '-')}"
                save(pruned, directory / name, overwrite=True)
                write_file(directory / f"{name}.json", to_text(result))
    return DemoLanguage(title=TITLE, data=replace(test.info, spec=f"{directory.name}/test.jsonl"), rows=rows)


def _open(full: Model, directory: Path, split: str) -> Dataset:
    form = full.input_format.prepared(LENGTH, None)
    return open_data(str(directory / f"{split}.jsonl"), form, split, SPLITS[split] // LENGTH)


def _row(label: str | None, keep: str, result: Any, runtime: Runtime) -> LanguageRow:
    assert isinstance(result, LanguageEvaluation)
    assert result.difference is not None
    way = "full model" if label is None else f"{label}, {keep} kept"
    runtime.step(f"language: {way}: loss {result.model.loss:.3f} nats per token")
    return LanguageRow(label=label, keep=keep, model=result.model, difference=result.difference)


def sources() -> dict[str, list[str]]:
    """Return the modules of Python's standard library in three splits, `train`, `calibration` and `test`.

    Raises a MoepruneError if there are none, as where they are in an archive.
    """
    root = Path(sysconfig.get_path("stdlib"))
    texts: dict[str, list[str]] = {"train": [], "calibration": [], "test": []}
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        if not {"site-packages", "dist-packages", "test", "tests"} & {*path.parts}:
            tenth = int(hashlib.sha256(name.encode()).hexdigest(), 16) % 10
            text = path.read_text(encoding="utf-8", errors="ignore")
            texts[{0: "test", 1: "calibration"}.get(tenth, "train")].append(text)
    if not all(texts.values()):
        raise MoepruneError(
            f"the sources of Python's standard library are not in `{root}`", "use a Python that has them"
        )
    return texts


def train_language(texts: list[str], folder: Path, seed: int, progress: bool) -> None:
    """Train the model on text, and write its folder, in bfloat16."""
    tokenizer = train_tokenizer([text[:20_000] for text in texts], SHAPE["vocab_size"])
    ids = [0, *(each for text in texts for each in [*tokenizer(text)["input_ids"], 0])]
    with torch.enable_grad():
        model = fit_language(fresh_language(SHAPE, seed), [torch.tensor(ids, dtype=torch.int16)], STEPS, seed, progress)
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
