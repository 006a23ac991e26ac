"""Text of eight domains from Debian's packages, split by file, as JSON lines with a tokenizer.

    mkdir packages; cd packages
    apt-get download python3.11-doc linux-doc-6.1 dict-gcide manpages-de manpages-fr manpages-es postgresql-doc-15
    for file in *.deb; do dpkg -x $file .; done

The splits are `train.jsonl`, `calibration.jsonl` and `test.jsonl`, each line with `text` and `domain`; the tokenizer
is a BPE of 1,024 pieces.
"""

import gzip
import hashlib
import html
import json
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from moeprune.demo.train_language import train_tokenizer

VOCABULARY = 1024
MOST = {"test": (300_000, 0.08), "calibration": (600_000, 0.15), "train": (6_000_000, 1.0)}
"""Bytes of a domain in each split, and the share of the domain: at most."""
LANGUAGES = ("de", "fr", "es")
LONGEST = 60_000  # characters of a document that is not trained on


def write_corpus(packages: Path, output: Path) -> None:
    """Write the three splits and the tokenizer into a folder; packages: where Debian's were unpacked."""
    output.mkdir(parents=True)
    splits: dict[str, list[dict[str, str]]] = {split: [] for split in MOST}
    for domain, documents in _domains(packages):
        for split, texts in _split(documents).items():
            splits[split] += [{"text": text, "domain": domain} for text in texts]
    for split, documents in splits.items():
        with (output / f"{split}.jsonl").open("w") as file:
            file.writelines(json.dumps(document) + "\n" for document in documents)
    beginnings = [document["text"][:20_000] for document in splits["train"]]
    train_tokenizer(beginnings, VOCABULARY).save_pretrained(output)


def _domains(packages: Path) -> Iterator[tuple[str, list[str]]]:
    """Yield each domain with its documents."""
    docs, pages = packages / "usr/share/doc", packages / "usr/share/man"
    sources = Path(sysconfig.get_path("stdlib")).rglob("*.py")
    yield "python", [_text(path) for path in sources if "site-packages" not in path.parts]
    yield "pydoc", [_text(path) for path in (docs / "python3.11").rglob("*.txt")]
    yield "kernel", [_text(path) for path in docs.rglob("*.rst.gz")]
    [dictionary] = packages.rglob("gcide.dict.dz")
    words = _text(dictionary)
    yield "dictionary", [words[first : first + 20_000] for first in range(0, len(words), 20_000)]
    for language in LANGUAGES:
        found = [path for path in (pages / language).rglob("*.gz") if not path.is_symlink()]
        yield f"manual-{language}", [_text(path) for path in found if path.stat().st_size > 300]
    yield "postgres", [_without_tags(_text(path)) for path in (docs / "postgresql-doc-15").rglob("*.html")]


def _text(path: Path) -> str:
    content = path.read_bytes()
    return (gzip.decompress(content) if path.suffix in (".gz", ".dz") else content).decode("utf-8", "ignore")


def _without_tags(page: str) -> str:
    page = re.sub(r"(?s)<(script|style|head).*?</\1>", "", page)
    return re.sub(r"\n\s*\n+", "\n\n", html.unescape(re.sub(r"<[^>]+>", "", page)))


def _split(documents: list[str]) -> dict[str, list[str]]:
    """Deal documents out in the order of their hashes: what is tested on and calibrated with first."""
    documents = sorted({text for text in documents if len(text) > 500}, key=_hash)
    whole = sum(map(_bytes, documents))
    splits: dict[str, list[str]] = {split: [] for split in MOST}
    room = {split: min(most, share * whole) for split, (most, share) in MOST.items()}
    for text in documents:
        for split, texts in splits.items():
            if room[split] > 0:
                texts.append(text if split == "train" else text[:LONGEST])
                room[split] -= _bytes(texts[-1])
                break
    return splits


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _bytes(text: str) -> int:
    return len(text.encode())
