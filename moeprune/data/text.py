"""Text as sequences of token ids, packed to one length.

    FILE.txt        one document
    FILE.jsonl      a document on each line: an object with `text`, or with `messages` for the model's chat template
    FILE.parquet    a document in each row, with the same columns

A document begins as the model's tokenizer begins a text (with BOS, if it has one) and ends with EOS. Documents follow
each other in sequences of `--sequence-length` tokens; what remains in the end fills no sequence and is dropped, as
padding would count where the model sees no text. With `--by FIELD` documents of each group have sequences of their own.

A file is tokenised in one pass, as it is read, into a temporary file of int32 that is mapped into memory. Long
documents are tokenised in pieces, cut where a line begins.
"""

from __future__ import annotations

import contextlib
import logging
import re
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moeprune.data.sources import Batches, Source, Texts
from moeprune.data.tokenizer import Encoded, Tokenizer
from moeprune.data.tokens import TOKENIZER_HINT, TokenFormat
from moeprune.errors import MoepruneError, listed
from moeprune.files.disk import MAX_LENGTH, refused

logger = logging.getLogger(__name__)
PIECE, MOST = 1 << 13, 1 << 16  # characters after which a text is cut where a line begins, and anywhere
BATCH = 1 << 18  # characters that are tokenised at once, by several threads
CUT = re.compile(r"(?<=\S\n)(?=\S)|(?<=\S\r\n)(?=\S)")
MUCH = 0.1  # share of tokens left out that is warned of
FIELDS_HINT = 'give objects such as {"text": "…"}'


class Piece(NamedTuple):
    """A part of a document, and where it is from; group: empty without `--by`."""

    text: str
    is_first: bool
    is_last: bool
    group: str
    where: str


def open_text(path: Path, form: TokenFormat) -> Source:
    """Tokenise a file of text, or raise a MoepruneError: it has no or damaged text, or there is no tokenizer."""
    kind = path.suffix.lower()
    if form.by is not None and kind == ".txt":
        raise MoepruneError(f"`--by {form.by}`: `{path}` has no fields", "give a .jsonl or .parquet file")
    if form.tokenizer is None:
        hint = "give token ids, `input_ids` in a .npz or .safetensors file"
        raise MoepruneError(f"the model has no tokenizer for the text of `{path}`", hint)
    tokenizer = Tokenizer(form.tokenizer)
    if not tokenizer.end:
        logger.warning(f"`{form.tokenizer}` names no EOS token: nothing separates documents")
    pieces = _of_plain(path) if kind == ".txt" else _of_records(path, KINDS[kind], form, tokenizer)
    try:
        with tempfile.TemporaryFile(prefix="moeprune-") as file:
            packer = Packer(file, form.length)
            for batch in _batches(pieces):
                for piece, found in zip(batch, tokenizer.encode([piece.text for piece in batch]), strict=True):
                    whole = _with_ends(piece, found, tokenizer)
                    _require_in_vocabulary(whole, piece, form)
                    packer.add(piece.group, whole)
            return packer.source(path)
    except OSError as error:
        raise refused("read", path, error) from None


def _with_ends(piece: Piece, found: Encoded, tokenizer: Tokenizer) -> Encoded:
    """Return the tokens of a piece with BOS and EOS, unless the text has these itself, as chat templates write them."""
    first, end = tokenizer.first, tokenizer.end
    before = first if piece.is_first and found.ids[: len(first)].tolist() != first else []
    after = end if piece.is_last and found.ids[-len(end) :].tolist() != end else []
    ids = np.concatenate([before, found.ids, after]).astype(np.int32)
    return Encoded(ids, np.pad(found.bytes, (len(before), len(after))))


def _require_in_vocabulary(found: Encoded, piece: Piece, form: TokenFormat) -> None:
    if (highest := found.ids.max(initial=0)) >= form.vocabulary:
        raise MoepruneError(
            f"{piece.where} has the token id {highest}, the model's vocabulary has {form.vocabulary} tokens",
            TOKENIZER_HINT,
        )


class Packer:
    """Packs documents into sequences of so many tokens, each of one group, and writes these into a file."""

    def __init__(self, file: IO[bytes], length: int):
        self.file, self.length = file, length
        self.open: dict[str, list[Encoded]] = defaultdict(list)  # that fill no sequence yet
        self.held: dict[str, int] = defaultdict(int)  # tokens of these
        self.bytes: list[NDArray] = []
        self.groups: list[NDArray] = []

    def add(self, group: str, found: Encoded) -> None:
        """Add a part of a document."""
        self.open[group].append(found)
        self.held[group] += len(found.ids)
        if self.held[group] >= self.length:
            ids, lengths = map(np.concatenate, zip(*self.open[group], strict=True))
            whole = len(ids) - len(ids) % self.length
            self.file.write(ids[:whole].tobytes())
            self.bytes.append(lengths[:whole].reshape(-1, self.length)[:, 1:].sum(1))
            self.groups.append(np.full(whole // self.length, [*self.open].index(group)))
            self.open[group], self.held[group] = [Encoded(ids[whole:], lengths[whole:])], len(ids) - whole

    def source(self, path: Path) -> Source:
        """Return the sequences, mapped into memory, or raise a MoepruneError if the text fills none."""
        rest, sequences = sum(self.held.values()), sum(map(len, self.groups))
        if not rest and not sequences:
            raise MoepruneError(f"`{path}` has no text")
        if not sequences:
            group = "" if len(self.open) == 1 else f" in each of {len(self.open)} groups"
            most = max(self.held.values())
            raise MoepruneError(
                f"`{path}` has at most {most} tokens{group}, fewer than one sequence of {self.length}",
                f"give more text, or `--sequence-length {max(2, most // 8)}`",
            )
        groups, names = np.concatenate(self.groups), [*self.open]
        empty = [name for place, name in enumerate(names) if not (groups == place).any()]
        if empty or rest > MUCH * (rest + sequences * self.length):
            of_groups = f", all of {listed(empty)}" if empty else ""
            logger.warning(
                f"{rest} tokens of `{path}`{of_groups} fill no sequence of {self.length} and are left out: give a"
                " smaller `--sequence-length`, or more text"
            )
        self.file.flush()
        ids = np.memmap(self.file, np.int32, "r", shape=(sequences, self.length))

        def read(batches: Batches) -> Iterator[Tensor]:
            return (torch.from_numpy(ids[list(indices)].astype(np.int64)) for indices in batches)

        texts = Texts(np.concatenate(self.bytes), tuple(names) if names != [""] else (), groups, self.length)
        return Source(sequences, None, read, [path], texts=texts)


def _batches(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    batch, size = list[Piece](), 0
    for piece in pieces:
        batch.append(piece)
        size += len(piece.text)
        if size >= BATCH:
            yield batch
            batch, size = [], 0
    yield batch


def _cut(parts: Iterable[str], group: str, where: str) -> Iterator[Piece]:
    """Yield a document, given in parts, in pieces that are tokenised as the whole would be: lines begin anew."""
    held, is_first = "", True
    for part in parts:
        held, start = held + part, 0
        while len(held) - start > PIECE:
            cut = CUT.search(held, start + PIECE // 2, start + MOST)
            if cut is None and len(held) - start < MOST:
                break
            end = start + MOST if cut is None else cut.start()
            yield Piece(held[start:end], is_first, False, group, where)
            start, is_first = end, False
        held = held[start:]
    if held or not is_first:
        yield Piece(held, is_first, True, group, where)


def _of_plain(path: Path) -> Iterator[Piece]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            yield from _cut(iter(lambda: file.read(BATCH), ""), "", f"`{path}`")
    except UnicodeDecodeError:
        raise MoepruneError(f"`{path}` is not text in UTF-8", "convert it to UTF-8") from None


def _of_records(path: Path, read: Any, form: TokenFormat, tokenizer: Tokenizer) -> Iterator[Piece]:
    for where, record in read(path, form.by):
        if not isinstance(record, dict) or not ({"text", "messages"} & set(record)):
            raise MoepruneError(f"{where} has neither `text` nor `messages`", FIELDS_HINT)
        if (text := record.get("text")) is None:
            text = _rendered(record["messages"], form, tokenizer, where) if "messages" in record else None
        if not isinstance(text, str):
            raise MoepruneError(f"`text` of {where} is {type(text).__name__}, expected a text", FIELDS_HINT)
        group = "" if form.by is None else record.get(form.by)
        if not isinstance(group, str | int | float):
            if form.by in record:
                message = f"`{form.by}` of {where} is {type(group).__name__}, expected a text or a number to group by"
                raise MoepruneError(message)
            known = f"its fields are {listed(sorted(record))}"
            raise MoepruneError(f"{where} has no field `{form.by}` to group by", known)
        yield from _cut([text], str(group), where)


def _rendered(messages: Any, form: TokenFormat, tokenizer: Tokenizer, where: str) -> str:
    if not form.has_chat_template:
        hint = "give documents with `text`, or a model with a chat template"
        raise MoepruneError(f"{where} has `messages`, and the model has no chat template", hint)
    try:
        return tokenizer.render(messages)
    except MoepruneError as error:
        raise MoepruneError(f"{where}: {error.message}", error.hint) from None


def _read_lines(path: Path, by: str | None) -> Iterator[tuple[str, Any]]:
    with path.open("rb") as file:
        for number, line in enumerate(iter(lambda: file.readline(MAX_LENGTH + 1), b""), 1):
            where = f"line {number} of `{path}`"
            if len(line) > MAX_LENGTH:
                raise MoepruneError(f"{where} is longer than {MAX_LENGTH} bytes", "split the document")
            if line.strip():
                try:
                    yield where, msgspec.json.decode(line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line)
                except (msgspec.MsgspecError, ValueError, RecursionError) as error:
                    raise MoepruneError(f"{where} is not JSON ({error})", FIELDS_HINT) from None


def _read_parquet(path: Path, by: str | None) -> Iterator[tuple[str, Any]]:
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise MoepruneError("Parquet files need pyarrow", "install it: `pip install 'moeprune[parquet]'`") from None
    with _damage_as_error(path, ArrowException), contextlib.closing(ParquetFile(path)) as file:
        wanted, number = [name for name in file.schema_arrow.names if name in ("text", "messages", by)], 0
        for batch in file.iter_batches(batch_size=256, columns=wanted):
            for row in batch.to_pylist():
                yield f"row {number} of `{path}`", row
                number += 1


@contextlib.contextmanager
def _damage_as_error(path: Path, kind: type[Exception]) -> Iterator[None]:
    try:
        yield
    except kind as error:
        raise MoepruneError(f"`{path}` is not a readable Parquet file ({error})") from None


KINDS = {".jsonl": _read_lines, ".parquet": _read_parquet}
"""Readers of documents with fields, by suffix: they yield where each is and its fields."""
