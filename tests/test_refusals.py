"""Options that exclude, need or contradict each other: an error that names them, before any work, and no file."""

import pytest

PRUNE = "prune VIT --analysis OF_VIT"
MERGE = f"{PRUNE} --keep 8 --compensate merge -o new"
ONE_SHOT = "prune VIT --keep 4 --one-shot -o new"
ENERGY = "prune VIT --keep 4 --data pairs -o new --energy"
EVAL = "eval SINGLE --data digits"
NONE = "eval none --data digits"  # there is no such checkpoint, but nobody has looked yet
CALLS = {
    # budgets
    f"{PRUNE} --mass 0.9 --scope static -o new": "with `--scope input`",
    f"{PRUNE} --mass 1.2 -o new": "`--mass`: expected `float` <= 1.0, found 1.2",
    f"{PRUNE} --mass 0.9 --keep 4 -o new": "`--keep` and `--mass` exclude each other",
    f"{PRUNE} --keep 4": "nothing to write",
    f"{PRUNE} -o new": "no number of experts to keep",
    f"{PRUNE} --keep 4 --max-size 0.5 -o new": "`--keep` and `--max-size` exclude each other",
    f"{PRUNE} --max-size 0.05 -o new": "give at least 0.2",
    f"{PRUNE} --max-flops 0.1 -o new": "give at least 0.6",
    f"{PRUNE} --max-size 0.9 --scope input -o new": "give at least 1\n",
    f"{PRUNE} --max-accuracy-drop 0.1 -o new": "`--max-accuracy-drop` searches on labelled `--data`",
    f"{PRUNE} --keep 4 --save-plan new -o new": "`--save-plan` and another output are both",
    f"{PRUNE} --plan plan.json --scope static -o new": "`--scope` does not go with `--plan`",
    f"{PRUNE} --plan missing.json -o new": "no file `missing.json`",
    f"{PRUNE} --keep 4 --scope input --signal gram -o new": "`--signal gram` needs one set",
    "prune VIT --max-size 0.5 -o new": "`--max-size` with scope static needs an analysis",
    # compensations
    f"{MERGE} --one-shot": "is fitted to data, not in one shot",
    f"{MERGE} --scope input": "needs one set of experts for all inputs, `--scope static`",
    f"{MERGE} --signal gram": "`--compensate merge` does not go with `--signal gram`",
    f"{ENERGY} 0.9 --compensate mean": "`--energy`",
    f"{ENERGY} 1 --compensate affine": "`--energy`",
    f"{ENERGY} 0.9": "`--energy`",
    f"{ONE_SHOT} --analysis OF_VIT --compensate lstsq": "`lstsq` of layer `blocks.1.soft_moe` is fitted to data",
    f"{ONE_SHOT} --analysis OF_VIT --compensate lstsq --scope input": "`lstsq` of layer `blocks.1.soft_moe` is fitted",
    f"{ONE_SHOT} --analysis OF_VIT --data pairs": "`--one-shot` and `--data` exclude each other",
    ONE_SHOT: "needs calibration",
    # latency and confidence
    f"{NONE} --latency-batch 8": "`--latency-batch` goes with `--latency`",
    f"{NONE} --latency --latency-batch 8 --latency-batch -1": "`--latency-batch` `[1]`: expected `int` >= 1, found -1",
    f"{NONE} --sweep 1/8 --analysis a --min-speedup 2": "`--min-speedup` does not go with",
    f"{NONE} --sweep 1/8 --analysis a --latency-batch 1": "`--latency-batch` goes with",
    f"{NONE} --latency --min-speedup 2": "compares with the full model\n\nhint: give it with `--baseline`",
    f"{NONE} --baseline b --min-speedup 2": "`--min-speedup` judges measured times\n\nhint: give it with `--latency`",
    f"{NONE} --confidence 0.49 --min-accuracy 0.5": "`--confidence 0.49` is not within 0.5 and 1",
    f"{NONE} --confidence 0.95": "`--confidence` goes with a gate",
    f"{NONE} --confidence 0.95 --sweep 1/8 --analysis a.st": "does not go with `--sweep`",
    # plots and pages
    f"{EVAL} --plot f.png": "`--sweep` and `--plot` need `--analysis`",
    f"{EVAL} --plot f.pdf --analysis OF_SINGLE": "is not a plot",
    f"{EVAL} --plot f.png --analysis OF_SINGLE --min-accuracy 1": "`--min-accuracy` does not go",
    f"{EVAL} --plot f.png --analysis OF_SINGLE --output-file f.png": "are both",
    f"{EVAL} --report page.pdf": "`page.pdf` is not a page of HTML",
    f"{EVAL} --report there.html": "`there.html` exists",
    f"{EVAL} --report missing/page.html": "no directory `missing`",
    f"{EVAL} --report page.html --output-file page.html": "are both `page.html`",
    f"{EVAL} --report page.html --analysis OF_VIT": "the analysis was made for another checkpoint",
}


@pytest.mark.parametrize("call", CALLS)
def test_calls_that_are_wrong(call, single, vit, small_analysis, vit_analysis, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there.html").write_text("mine")
    files = {"SINGLE": single, "VIT": vit, "OF_SINGLE": small_analysis, "OF_VIT": vit_analysis}
    result = run(*(files.get(word, word) for word in call.split()))
    assert (result.code, result.stdout) == (2, "")
    assert result.stderr.startswith("error: ")
    assert CALLS[call] in result.stderr
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("there.html", "mine")]
