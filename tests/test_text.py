"""Text and token ids as data: what a tokenizer makes of documents, packed to one length."""

import json
import random
import re

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import moeprune
from moeprune.data import text
from moeprune.data.preprocessing import InputFormat
from moeprune.data.tokens import TokenFormat
from tests.language import BOS, EOS, make_tokenizer, write_lines

tokenizers = pytest.importorskip("tokenizers")
DOCUMENTS = [
    {"text": "The first of the documents.\nIt has two lines.", "kind": "long", "n": 1},
    {"text": "Äpfel, naïve façades – 日本語 and 🙂.", "kind": "short", "n": 2},
    {"text": "", "kind": "short", "n": 3},
    {"text": "a " * 40, "kind": "long", "n": 4},
    {"text": "The last of them: short.", "kind": "short", "n": 5},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"), [document["text"] for document in DOCUMENTS])


@pytest.fixture
def core(folder):
    found = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    found.no_truncation()
    return found


def form(folder, length=8, by=None, vocabulary=300):
    return TokenFormat(vocabulary, 64, folder, length, by)


def ids_of(core, texts):
    """All tokens in one row: each document as the tokenizer begins it, and EOS."""
    return [token for each in texts if each for token in [*core.encode(each).ids, EOS]]


def sequences(data):
    return torch.cat([inputs for inputs, _ in data.batches(3)])


def packed(ids, length=8):
    return torch.tensor(ids[: len(ids) // length * length]).view(-1, length)


def test_documents_follow_each_other_between_bos_and_eos(folder, core, tmp_path):
    data = moeprune.open_data(write_lines(tmp_path / "a.jsonl", DOCUMENTS), form(folder))
    expected = packed(ids_of(core, [document["text"] for document in DOCUMENTS]))
    assert sequences(data).tolist() == expected.tolist()
    assert not data.has_labels


def test_bytes_are_those_behind_the_first_token(folder, core, tmp_path):
    ascii_only = [document for document in DOCUMENTS if document["text"].isascii()]
    data = moeprune.open_data(write_lines(tmp_path / "a.jsonl", ascii_only), form(folder))
    lengths = [
        [0 if i in (BOS, EOS) else len(core.id_to_token(i)) for i in row[1:]] for row in sequences(data).tolist()
    ]
    assert data.source.texts.bytes.tolist() == [sum(row) for row in lengths]  # each sign of a token is one byte


def test_bytes_of_characters_that_are_cut_count_once(folder, core, tmp_path):
    content = DOCUMENTS[1]["text"] * 3
    ids = ids_of(core, [content])
    data = moeprune.open_data(write_lines(tmp_path / "a.jsonl", [{"text": content}]), form(folder, len(ids)))
    assert data.source.texts.bytes.tolist() == [len(content.encode())]


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_long_document_is_tokenised_in_pieces_as_the_whole_would_be(folder, core, tmp_path, monkeypatch, end):
    lines = [" " * (n % 3) + f"line {n}, some words; (and signs)!" + "\n" * (n % 4 == 0) for n in range(60)]
    content = end.join(lines)
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf" + content.encode())
    monkeypatch.setattr(text, "PIECE", 100)
    monkeypatch.setattr(text, "MOST", 800)
    pieces = list(text._of_plain(tmp_path / "a.txt"))
    assert len(pieces) > 10
    assert "".join(piece.text for piece in pieces) == content
    data = moeprune.open_data(tmp_path / "a.txt", form(folder))
    assert sequences(data).tolist() == packed(ids_of(core, [content])).tolist()


def test_a_document_without_lines_is_cut_somewhere(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(text, "PIECE", 10)
    monkeypatch.setattr(text, "MOST", 80)
    (tmp_path / "a.txt").write_text("x" * 200)
    assert [len(piece.text) for piece in text._of_plain(tmp_path / "a.txt")] == [80, 80, 40]


def test_documents_of_a_group_have_sequences_of_their_own(folder, core, tmp_path, caplog):
    path = write_lines(tmp_path / "a.jsonl", DOCUMENTS)
    data = moeprune.open_data(path, form(folder, by="kind"))
    found, texts = sequences(data), data.source.texts
    assert texts.groups == ("long", "short")
    for place, group in enumerate(texts.groups):
        own = [document["text"] for document in DOCUMENTS if document["kind"] == group]
        assert found[texts.group == place].tolist() == packed(ids_of(core, own)).tolist()
    moeprune.open_data(path, form(folder, 30, by="n"))
    assert re.search(r"\d+ tokens of .*, all of `1`, `2`, `5` fill no sequence of 30 and are left out", caplog.text)


def test_conversations_become_text_by_the_chat_template(folder, core, tmp_path):
    pytest.importorskip("tests.peers")
    pytest.importorskip("transformers")
    messages = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "the documents"}]
    data = moeprune.open_data(write_lines(tmp_path / "a.jsonl", [{"messages": messages}]), form(folder))
    assert sequences(data).tolist() == packed(ids_of(core, ["[user]Hello[assistant]the documents"])).tolist()
    bad = write_lines(tmp_path / "b.jsonl", [{"messages": [{"role": "user"}]}, {"messages": 3}])
    with pytest.raises(moeprune.MoepruneError, match=r"line 3 of `.*b.jsonl`: the chat template .* refuses"):
        moeprune.open_data(bad, form(folder))


def test_a_text_that_has_bos_and_eos_gets_no_others(folder, core, tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [{"text": "<s>The lines</s>"}, {"text": "The lines"}])
    ids = sequences(moeprune.open_data(path, form(folder, 4))).flatten().tolist()
    assert ids == packed(2 * ids_of(core, ["The lines"]), 4).flatten().tolist()


def test_a_tokenizer_without_its_json_is_made_by_transformers(tmp_path):
    pytest.importorskip("tests.peers")
    pytest.importorskip("transformers")
    (tmp_path / "vocab.json").write_text(json.dumps({"<s>": 0, "</s>": 1, "a": 2, "b": 3, "ab": 4}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\na b\n")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer", "eos_token": "</s>"}')
    write_lines(tmp_path / "a.jsonl", [{"text": "abba"}])
    data = moeprune.open_data(tmp_path / "a.jsonl", form(tmp_path, 4))
    assert sequences(data).tolist() == [[4, 3, 2, 1]]


def test_rows_of_parquet_are_documents(folder, core, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pytest.importorskip("pyarrow").Table.from_pylist(DOCUMENTS)
    parquet.write_table(table, tmp_path / "a.parquet")
    found = moeprune.open_data(tmp_path / "a.parquet", form(folder, by="kind"))
    expected = moeprune.open_data(write_lines(tmp_path / "a.jsonl", DOCUMENTS), form(folder, by="kind"))
    assert sequences(found).tolist() == sequences(expected).tolist()
    with pytest.raises(moeprune.MoepruneError, match=r"row 0 of `.*` has no field `kinds`"):
        moeprune.open_data(tmp_path / "a.parquet", form(folder, by="kinds"))
    (tmp_path / "b.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-9])
    with pytest.raises(moeprune.MoepruneError, match="is not a readable Parquet file"):
        moeprune.open_data(tmp_path / "b.parquet", form(folder))


def test_a_limit_draws_sequences_and_the_batch_size_leaves_no_trace(folder, tmp_path):
    data = moeprune.open_data(write_lines(tmp_path / "a.jsonl", DOCUMENTS), form(folder))
    drawn = moeprune.open_data(tmp_path / "a.jsonl", form(folder), limit=4)
    places = sorted(random.Random(0).sample(range(data.samples), 4))
    assert sequences(drawn).tolist() == sequences(data)[places].tolist()
    again = moeprune.open_data(tmp_path / "a.jsonl", form(folder), limit=4)
    assert drawn.fingerprint == again.read_fingerprint(1) != data.fingerprint


@pytest.mark.parametrize("kind", ["npz", "safetensors", "memory"])
def test_token_ids_need_no_tokenizer(tmp_path, kind):
    ids = np.random.default_rng(0).integers(0, 300, (5, 7))
    path = tmp_path / f"ids.{kind}"
    if kind == "npz":
        np.savez_compressed(path, input_ids=ids.astype(np.uint16), labels=ids)
    elif kind == "safetensors":
        save_file({"input_ids": torch.from_numpy(ids).to(torch.int32)}, path)
    data = moeprune.open_data(torch.from_numpy(ids) if kind == "memory" else path, TokenFormat(300, 64))
    assert sequences(data).tolist() == ids.tolist()
    assert sequences(data).dtype == torch.int64
    assert data.source.texts is None
    with pytest.raises(moeprune.MoepruneError, match=r"`input_ids` of .* go from 2 to 299, expected 0 to 298"):
        sequences(
            moeprune.open_data(torch.tensor([[2, 299]]) if kind == "memory" else _wide(path), TokenFormat(299, 64))
        )


def _wide(path):
    ids = np.array([[2, 299]])
    if path.suffix == ".npz":
        np.savez(path, input_ids=ids)
    else:
        save_file({"input_ids": torch.from_numpy(ids)}, path)
    return path


BAD_ARRAYS = {
    "no array `input_ids` in": {"inputs": np.zeros((2, 4), int)},
    r"have the shape \[2, 65\], expected \[n, s\] with s from 2 to 64": {"input_ids": np.zeros((2, 65), int)},
    r"have the shape \[8\]": {"input_ids": np.zeros(8, int)},
    "are torch.float64, expected integers": {"input_ids": np.zeros((2, 4))},
    "go from -1 to 0": {"input_ids": np.array([[0, -1]])},
}


@pytest.mark.parametrize("message", BAD_ARRAYS)
def test_bad_token_ids_are_refused(tmp_path, message):
    np.savez(tmp_path / "a.npz", **BAD_ARRAYS[message])
    with pytest.raises(moeprune.MoepruneError, match=message):
        moeprune.open_data(tmp_path / "a.npz", TokenFormat(300, 64))


BAD_TEXTS = {
    "line 2 of `.*` is not JSON": ("a.jsonl", '{"text": "fine"}\n{"text": "fine"\n', {}),
    "line 1 of `.*` has neither `text` nor `messages`": ("a.jsonl", '{"content": "x"}', {}),
    "line 3 of `.*` has neither": ("a.jsonl", '{"text": "x"}\n\n["x"]', {}),
    "`text` of line 1 of `.*` is int, expected a text": ("a.jsonl", '{"text": 3}', {}),
    "line 1 of `.*` has no field `kind` to group by": ("a.jsonl", '{"text": "x", "n": 3}', {"by": "kind"}),
    "`kind` of line 1 of `.*` is NoneType, expected a text": ("a.jsonl", '{"text": "x", "kind": null}', {"by": "kind"}),
    "line 1 of `.*` is not JSON": ("a.jsonl", '{"text": "\\ud800"}', {}),
    "`by=.kind.`: `.*a.txt` has no fields": ("a.txt", "x", {"by": "kind"}),
    "`.*a.txt` is not text in UTF-8": ("a.txt", b"x\xff", {}),
    "`.*a.txt` is empty": ("a.txt", "", {}),
    "`.*a.jsonl` has no text": ("a.jsonl", '{"text": ""}\n', {}),
    "has at most 3 tokens, fewer than one sequence of 8": ("a.txt", "x", {}),
    "has the token id 1., the model's vocabulary has 10": ("a.txt", "().", {"vocabulary": 10}),
    "is not a known kind of text": ("a.csv", "x", {}),
    "no data `": (None, "", {}),
}


@pytest.mark.parametrize("message", BAD_TEXTS)
def test_bad_text_is_refused(folder, tmp_path, message):
    name, content, options = BAD_TEXTS[message]
    if name:
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(moeprune.MoepruneError, match=message):
        moeprune.open_data(tmp_path / (name or "missing.txt"), form(folder, **options))


BAD_FOLDERS = {"the model has no tokenizer for the text": None, "is not a tokenizer": {"tokenizer.json": "{}"}}


@pytest.mark.parametrize("message", BAD_FOLDERS)
def test_a_missing_or_damaged_tokenizer_is_refused(tmp_path, message):
    files = BAD_FOLDERS[message]
    for name, content in (files or {}).items():
        (tmp_path / name).write_text(content)
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(moeprune.MoepruneError, match=message):
        moeprune.open_data(tmp_path / "a.txt", form(None if files is None else tmp_path))


def test_messages_without_a_template_are_refused(folder, tmp_path):
    (tmp_path / "tokenizer.json").write_text((folder / "tokenizer.json").read_text())
    path = write_lines(tmp_path / "a.jsonl", [{"messages": []}])
    with pytest.raises(moeprune.MoepruneError, match=r"line 1 of .* the model has no chat template"):
        moeprune.open_data(path, form(tmp_path))


@pytest.mark.parametrize("length", [1, 65])
def test_a_sequence_has_two_tokens_and_fits_the_model(folder, tmp_path, length):
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(moeprune.MoepruneError, match=f"`sequence_length={length}` does not fit the model, which takes"):
        moeprune.open_data(tmp_path / "a.txt", TokenFormat(300, 64, folder), sequence_length=length)


def test_options_of_text_are_for_text():
    for option in ({"sequence_length": 4}, {"by": "kind"}):
        [name] = option
        with pytest.raises(moeprune.MoepruneError, match=f"`{name}` does not go with the token ids"):
            moeprune.open_data(torch.zeros(1, 4, dtype=int), TokenFormat(300, 64), **option)
        with pytest.raises(moeprune.MoepruneError, match=f"`{name}` is for models that take text"):
            moeprune.open_data("digits", InputFormat(1, 8, 8, 10), **option)
