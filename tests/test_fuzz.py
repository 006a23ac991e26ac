"""Thousands of damaged files, of every kind that the tool reads: read, or refused with an error that a person
can read; nothing hangs, nothing is left behind, and what was there stays.
"""

import contextlib
import gc
import io
import json
import os
import random
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.damage import (
    EXTREMES,
    damaged_json,
    damaged_safetensors,
    damaged_torch,
    encoded,
    metadata_of,
    mutated,
    places,
    removed,
    replaced,
    with_metadata,
)
from tests.endings import check_none, complaint
from tests.stock import DATA, DENSE, FACTORY, SOURCE_ARGS, Stock, add_adopted, add_images


@pytest.fixture(scope="module", autouse=True)
def _old_objects() -> Iterator[None]:
    """What is there before is not looked through for garbage again and again."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def _no_garbage() -> None:
    """What other tests have left is not finalised in the depth of a recursion, which would be written to stderr."""
    gc.collect()


def damaged_npz(whole: bytes, chance: random.Random) -> bytes:
    """The archive damaged, or one of its arrays in a sound archive."""
    if chance.random() < 0.4:
        return mutated(whole, chance)
    with zipfile.ZipFile(io.BytesIO(whole)) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    name = chance.choice(sorted(members))
    member = members[name]
    if chance.random() < 0.3:
        members[name] = mutated(member, chance)
    else:  # the text of its header
        end = 10 + int.from_bytes(member[8:10], "little")
        text, shape = member[10:end], b"(12, 1, 8, 8)" if name == "inputs.npy" else b"(12,)"
        renamed = b"de|\xff\xff"
        sizes = b"(-1,|(0,|(True,|(1.0,|(1000000,|(1000000000000000,|(%d,|((12,)," % 2**70
        shapes = b"()|(12, 1, 8|12|[12]|None|" + b"(" * 300
        orders, flags = b"'>|'||'O|'(|'%d" % 2**40, b"True|None|0|b''"
        old, new = chance.choice(
            ((b"(12,", sizes), (shape, shapes), (b"False", flags), (b"'<", orders), (b"descr", renamed))
        )
        text = text.replace(old, chance.choice(new.split(b"|")))
        members[name] = member[:8] + len(text).to_bytes(2, "little") + text + member[end:]
    if chance.random() < 0.2:
        members["labels.npy"] = members["inputs.npy"]
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", chance.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def damaged_image(whole: bytes, chance: random.Random) -> bytes:
    """The file damaged, or a PNG of another size or kind with right checksums."""
    if not whole.startswith(b"\x89PNG") or chance.random() < 0.5:
        return mutated(whole, chance)
    size = chance.choice(
        ((1, 1), (65535, 1), (1, 2**31 - 1), (2**31 - 1, 2**31 - 1), (30000, 30000), (0, 5), (9000, 9000))
    )
    start = b"".join(side.to_bytes(4, "big") for side in size) + bytes(
        (chance.choice((1, 8, 16, 3)), chance.choice((0, 2, 3, 4, 6, 7)), 0, 0, chance.choice((0, 1)))
    )
    chunk = b"IHDR" + start
    return whole[:12] + chunk + zlib.crc32(chunk).to_bytes(4, "big") + whole[33:]


def damaged_text(whole: bytes, chance: random.Random) -> bytes:
    return damaged_json(json.loads(whole), chance).encode("utf-8", "surrogatepass")


DAMAGES: dict[str, Callable[[bytes, random.Random], bytes]] = {
    ".safetensors": damaged_safetensors,
    ".json": damaged_text,
    ".npz": damaged_npz,
    ".pt": damaged_torch,
    ".png": damaged_image,
    ".jpg": damaged_image,
}
"""How a file is damaged, by its suffix."""

CASES = 60
"""Damaged files of each kind."""

ANALYSIS = "--analysis @analysis.safetensors -o OLD --force"
RANDOM = "--signal random --compensate none --keep 2 -o OLD --force"
PRUNED = ("static", "routed", "merged", "narrowed", "mapped")
KINDS = {
    "dense.safetensors": (
        f"inspect {DENSE}", f"inspect {DENSE} --output-format json", f"analyze {DENSE} {DATA} -o OLD --force",
        f"prune {DENSE} {RANDOM}", f"prune {DENSE} --scope input {RANDOM}",
        f"prune {DENSE} --keep 2 --compensate mean {ANALYSIS}",
        f"eval {DENSE} {DATA}",
        f"eval @static.safetensors {DATA} --baseline {DENSE}",
        f"export {DENSE} --to soft-moe -o OLD --force",
    ),
    **{
        f"{kind}.safetensors": (
            f"inspect @{kind}.safetensors --output-format json",
            f"eval @{kind}.safetensors {DATA} --baseline {DENSE}",
            f"eval @{kind}.safetensors {DATA} --output-format json",
            f"prune {DENSE} --plan @{kind}.safetensors {ANALYSIS}",
            f"export @{kind}.safetensors --to soft-moe -o OLD --force",
        )
        for kind in PRUNED
    },
    "analysis.safetensors": (
        f"prune {DENSE} --keep 2 --compensate mean {ANALYSIS}",
        f"prune {DENSE} --keep 2 --signal gram --compensate affine {ANALYSIS}",
        f"prune {DENSE} --max-size 0.8 --signal gram --compensate mean {ANALYSIS}",
        f"prune {DENSE} --keep 2 --scope input --signal deviation --compensate lstsq {ANALYSIS}",
        f"eval {DENSE} {DATA} --sweep 1/2 --signal gram --scope static --analysis @analysis.safetensors",
    ),
    **{
        f"{name}.json": (
            f"prune {DENSE} --plan @{name}.json {ANALYSIS}",
            f"prune {DENSE} --plan @{name}.json --output-format json {ANALYSIS}",
        )
        for name in ("plan", "merge", "narrow")
    },
    "foreign.safetensors": (f"prune @foreign.safetensors {SOURCE_ARGS} {RANDOM}", "inspect @foreign.safetensors"),
    "foreign.pt": (f"prune @foreign.pt {SOURCE_ARGS} {RANDOM}", "inspect @foreign.pt"),
    "legacy.pt": (f"prune @legacy.pt {SOURCE_ARGS} {RANDOM}",),
    "shards": (f"prune @shards {SOURCE_ARGS} {RANDOM}",),
    "data.npz": (f"eval {DENSE} {DATA}", f"analyze {DENSE} {DATA} -o OLD --force"),
    "packed.npz": (f"eval {DENSE} --limit 7 --data @packed.npz",),
    "data.safetensors": (
        f"eval {DENSE} --data @data.safetensors", f"analyze {DENSE} --data @data.safetensors -o OLD --force",
    ),
    "images": (f"eval {DENSE} --data @images", f"eval {DENSE} --data @images --preprocess resize=9"),
    "adopted.safetensors": (
        "inspect @adopted.safetensors",
        "inspect @adopted.safetensors --output-format json",
        f"prune @adopted.safetensors {RANDOM}",
        f"eval @adopted.safetensors {DATA} --model {FACTORY}",
        f"export @adopted.safetensors --to soft-moe-pytorch --model {FACTORY} -o OLD --force",
    ),
    "own.safetensors": (
        f"prune @own.safetensors --model {FACTORY} --input-shape 1,8,8 {RANDOM}",
    ),
}  # fmt: skip
"""Files and folders by their name in the stock: one file at a time is damaged, and one command reads it."""
REFUSED = {("foreign.safetensors", "inspect"), ("foreign.pt", "inspect")}
REFUSED |= {(f"{kind}.safetensors", "export") for kind in PRUNED}
"""What is refused even where nothing is damaged."""
ADDED = {"images": add_images, "adopted.safetensors": add_adopted, "own.safetensors": add_adopted}
"""What needs a library that may be missing."""


def add(stock: Stock, kind: str) -> None:
    """Make a kind of file if it is not there yet."""
    if kind in ADDED and not stock.path(kind).is_file() and not list(stock.path(kind).glob("*")):
        ADDED[kind](stock)


def case(stock: Stock, kind: str, number: int) -> tuple[Path, bytes, list[object]]:
    """A file of the stock, what to write into it, and a command that reads it."""
    chance = random.Random(f"{kind} {number}")
    whole = stock.path(kind)
    file = whole if whole.is_file() else chance.choice(sorted(p for p in whole.rglob("*") if p.is_file()))
    commands = KINDS[kind]
    return file, DAMAGES[file.suffix](file.read_bytes(), chance), stock.command(commands[number % len(commands)])


@contextlib.contextmanager
def content(file: Path, damaged: bytes) -> Iterator[None]:
    """A file with other bytes, for as long as a command runs."""
    whole = file.read_bytes()
    file.write_bytes(damaged)
    try:
        yield
    finally:
        file.write_bytes(whole)


@pytest.fixture
def quiet_places(stock, tmp_path, monkeypatch):
    """Folders where nothing may be written: the current one, and the one for temporaries."""
    monkeypatch.chdir(stock.path("empty"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    yield
    assert not [*tmp_path.iterdir(), *stock.path("empty").iterdir()]


def complaints(stock: Stock, kind: str, numbers: range) -> Iterator[str]:
    for number in numbers:
        file, damaged, words = case(stock, kind, number)
        with content(file, damaged):
            if found := stock.complaint(words):
                yield f"{kind} {number}: {' '.join(map(str, words))}: {found}"


@pytest.mark.slow
@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("kind", KINDS)
def test_damaged_files_are_read_or_refused(stock, kind, quiet_places):
    add(stock, kind)
    for command in KINDS[kind]:
        words = stock.command(command)
        result = stock.run(*words)
        assert result.code == (2 if (kind, words[0]) in REFUSED else 0), (words, result.stderr)
    stock.output.write_bytes(b"old")
    check_none(complaints(stock, kind, range(CASES)))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_the_program_reads_or_refuses_damaged_files(stock, program, kind, quiet_places, monkeypatch):
    """In a process of its own, as users start it."""
    add(stock, kind)
    monkeypatch.setenv("PYTHONPATH", str(stock.path("code")), prepend=os.pathsep)

    stock.output.write_bytes(b"old")
    file, damaged, words = case(stock, kind, CASES + len(kind))
    with content(file, damaged):
        assert complaint(program, words, stock.root / "out") is None, words
    stock.output.write_bytes(b"old")


@pytest.mark.slow
@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("kind", ["dense", *PRUNED, "adopted"])
def test_every_key_of_the_metadata_of_a_checkpoint(stock, kind, quiet_places):
    """Removed, or with extreme values in its place."""
    name = f"{kind}.safetensors"
    add(stock, name)
    whole = stock.path(name).read_bytes()
    metadata = metadata_of(whole)
    chance = random.Random(kind)
    texts = [encoded(removed(metadata, place)) for place in places(metadata) if place]
    texts += [
        encoded(replaced(metadata, place, new)) for place in places(metadata) for new in chance.sample(EXTREMES, 12)
    ]

    def complaint_of(number: int, text: str) -> str | None:
        with content(stock.path(name), with_metadata(whole, text)):
            found = stock.complaint(["inspect", stock.path(name), *(("--output-format", "json") if number % 2 else ())])
        return found and f"{text[:3000]}: {found}"

    check_none(complaint_of(number, text) for number, text in enumerate(texts))


LARGE = (9, 1000, 2**31, 2**40, 2**63, 10**400)
WRONG = {
    "merged": {
        "merged_into": (
            None, [], [0], [0, 0, 0], [9, 9], [-1, -1], [True, False], [0.0, 1.0], ["0", "1"], [[0], [1]],
            {}, "01", [2**63, 2**63], [10**400, 0], [0, 1, 2, 3], 0,
        ),
        "k": (0, 1, 3, 4, *LARGE),
        "kept": (None, [], [0], [0, 1, 2], [3, 3], [2**63, 2**64]),
        "compensation": ("mean", "affine", "refit", "renorm"),
        "rank": (1, 2, *LARGE),
        "num_experts": LARGE,
    },
    "narrowed": {
        "rank": (None, 0, -1, 1, 3, 8, *LARGE, 2.0, "2", True, [2], 1e308),
        "energy": (0.5, 1, 0, 2, "1"),
        "compensation": ("mean", "lstsq", "merge", "none"),
        "num_experts": LARGE,
        "k": (1, 3, 4, *LARGE),
    },
    "mapped": {
        "ranks": (
            None, [], [1], [9, 9], [0, 0], [1, 2, 1], [-1, 3], [True, True], [1.0, 1.0], ["1", "1"], {}, 2,
            [2**63, 2**63], [10**400, 0], [2**31, 2**31],
        ),
        "compensation": ("mean", "affine", "merge", "none"),
        "scope": ("input", "batch"),
        "k": (0, 1, 3, 4, *LARGE),
        "num_experts": LARGE,
    },
}  # fmt: skip
"""Values by key of a layer's plan that do not fit the tensors of a checkpoint."""


@contextlib.contextmanager
def little_memory() -> Iterator[None]:
    """Lets the process have 256 MB more than it has, where the system knows such limits."""
    if sys.platform != "linux":
        yield
        return
    import resource

    before = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 2**28, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.mark.mostly_slow(3)
@pytest.mark.parametrize(
    "command", ["inspect", *(pytest.param(name, marks=pytest.mark.slow) for name in ("eval", "prune"))]
)
@pytest.mark.parametrize(("kind", "key"), [(kind, key) for kind, keys in WRONG.items() for key in keys])
def test_a_plan_that_does_not_fit_its_checkpoint_is_refused(stock, quiet_places, kind, key, command):
    """At once: nothing is allocated that it asks for."""
    file = stock.path(f"{kind}.safetensors")
    whole = file.read_bytes()
    metadata = metadata_of(whole)
    [layer] = metadata["plan"]
    commands = {
        "inspect": f"inspect @{file.name}", "eval": f"eval @{file.name} {DATA}",
        "prune": f"prune {DENSE} --plan @{file.name} {ANALYSIS}",
    }  # fmt: skip
    words = stock.command(commands[command])

    def complaint_of(value: object) -> str | None:
        damaged = with_metadata(whole, encoded(replaced(metadata, ("plan", layer, key), value)))
        with content(file, damaged), little_memory():
            found = stock.complaint(words, *(() if command == "prune" else (layer,)))
        return found and f"{str(value)[:50]}: {found}"

    check_none(complaint_of(value) for value in WRONG[kind][key])
