"""How long the main thread waits for data: `python tests/benchmarks/data.py`.

Images of 224×224 in a safetensors file, as uint8 and as float32, are read in batches of 64, each followed by
a pause that stands for a model on another device. Waiting is what remains of a pass without the pauses,
for each batch, in the first pass over a data set, which checks and hashes its samples, and in a later one.
"""

import argparse
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

import moeprune
from moeprune.data.preprocessing import InputFormat

BATCH, PAUSE = 64, 0.1
FORM = InputFormat(3, 224, 224, classes=10)


def waiting(data: object, batches: int) -> float:
    """Milliseconds per batch that the main thread waits for data in one pass."""
    start = time.perf_counter()
    for _ in data.batches(BATCH):
        time.sleep(PAUSE)
    return 1000 * ((time.perf_counter() - start) / batches - PAUSE)


def main() -> None:
    """Print a row for each type."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=512)
    samples = parser.parse_args().samples
    with tempfile.TemporaryDirectory() as folder:
        for dtype in (torch.uint8, torch.float32):
            path = Path(folder) / "data.safetensors"
            save_file({"inputs": torch.randint(0, 256, (samples, *FORM.shape)).to(dtype)}, path)
            data = moeprune.open_data(str(path), FORM)
            first, later = (waiting(data, -(-samples // BATCH)) for _ in range(2))
            print(f"{dtype}: {first:.0f} ms a batch in the first pass, {later:.0f} ms in a later one")


if __name__ == "__main__":
    main()
