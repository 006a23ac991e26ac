"""Files damaged in every way: bytes, headers of safetensors files, JSON."""

import copy
import io
import json
import random
import zipfile
from collections.abc import Iterator
from typing import Any

DEPTH = 900
RAW = {
    "@deep list": "[" * DEPTH + "]" * DEPTH,
    "@deep object": '{"a":' * DEPTH + "1" + "}" * DEPTH,
    "@4000 digits": "9" * 4000,
    "@5000 digits": "9" * 5000,
    "@infinite": "1e999",
    "@NaN": "NaN",
    "@half a surrogate pair": '"\\ud800"',
}
"""Texts that `json.dumps` writes for no value, or for none that it reads."""

EXTREMES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 3, 2**31, 2**63, 10**15, 10**400, 0.5, -1e-9, 1e308, "", "text", "a\0b\x1b[31m", "ä😀",
    "x" * 5000, "../..", [], [0], [[]], [None], [-1, 2**63], {}, {"a": 1}, {"": None}, *RAW,
)  # fmt: skip
"""Values to put in the place of any other."""

Path = tuple[str | int, ...]


class Call:
    """An object that is pickled as a call of a function."""

    def __init__(self, function: Any, *arguments: Any):
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


def mutated(whole: bytes, chance: random.Random) -> bytes:
    """A part of the bytes, or all with some of them changed, put in or left out."""
    content = bytearray(whole)
    if chance.random() < 0.3:
        return bytes(content[: chance.randrange(len(content))])
    for _ in range(chance.choice((1, 1, 2, 5, 50))):
        if not content:
            break
        at = chance.randrange(len(content))
        match chance.randrange(4):
            case 0:
                content[at] = chance.randrange(256)
            case 1:
                content[at] ^= 1 << chance.randrange(8)
            case 2:
                content[at:at] = chance.randbytes(chance.randrange(1, 5))
            case 3:
                del content[at : at + chance.randrange(1, 9)]
    return bytes(content)


def places(value: Any, start: Path = ()) -> Iterator[Path]:
    """The paths of all values in a JSON value, its own first; of a long list the first three."""
    yield start
    if isinstance(value, dict):
        entries: list[tuple[str | int, Any]] = list(value.items())
    else:
        entries = list(enumerate(value[:3])) if isinstance(value, list) else []
    for key, inner in entries:
        yield from places(inner, (*start, key))


def replaced(value: Any, place: Path, new: Any) -> Any:
    """A JSON value with another one in a place."""
    if not place:
        return new
    value = copy.deepcopy(value)
    _holder(value, place)[place[-1]] = new
    return value


def removed(value: Any, place: Path) -> Any:
    """A JSON value without what stands in a place."""
    value = copy.deepcopy(value)
    del _holder(value, place)[place[-1]]
    return value


def _holder(value: Any, place: Path) -> Any:
    for key in place[:-1]:
        value = value[key]
    return value


def encoded(value: Any) -> str:
    """The JSON text of a value, with RAW texts in the places of their names."""
    text = json.dumps(value)
    for name, raw in RAW.items():
        text = text.replace(json.dumps(name), raw)
    return text


def damaged_json(value: Any, chance: random.Random) -> str:
    """The text of a JSON value in which a value is another one, or gone, or stands there twice."""
    place = chance.choice(list(places(value)))
    match chance.randrange(6):
        case 0 if place:
            return encoded(removed(value, place))
        case 1 if place and isinstance(place[-1], str):
            twice = replaced(value, place, "@twice")
            key = json.dumps(place[-1])
            return json.dumps(twice).replace(f'{key}: "@twice"', f"{key}: 1, {key}: 2")
        case 2:
            return mutated(json.dumps(value).encode(), chance).decode("latin-1")
        case _:
            return encoded(replaced(value, place, chance.choice(EXTREMES)))


def toml(table: dict[str, Any]) -> str:
    """The TOML text of a table: its own values first, then the tables in it."""
    return "\n".join(_toml_lines(table, ""))


def _toml_lines(table: dict[str, Any], name: str) -> Iterator[str]:
    tables = {key: value for key, value in table.items() if isinstance(value, dict)}
    yield from (f"{json.dumps(key)} = {_toml(value)}" for key, value in table.items() if key not in tables)
    for key, value in tables.items():
        inner = f"{name}.{json.dumps(key)}" if name else json.dumps(key)
        yield f"[{inner}]"
        yield from _toml_lines(value, inner)


def _toml(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(_toml(part) for part in value)}]"
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def parts_of(whole: bytes) -> tuple[dict[str, Any], bytes]:
    """Header and data of a safetensors file."""
    length = int.from_bytes(whole[:8], "little")
    return json.loads(whole[8 : 8 + length]), whole[8 + length :]


def with_header(text: str, data: bytes) -> bytes:
    """A safetensors file of a header and data."""
    header = text.encode("utf-8", "surrogatepass")
    return len(header).to_bytes(8, "little") + header + data


def with_metadata(whole: bytes, text: str) -> bytes:
    """A safetensors file with another text under the key `moeprune`."""
    header, data = parts_of(whole)
    header["__metadata__"] = {"moeprune": text}
    return with_header(json.dumps(header), data)


def metadata_of(whole: bytes) -> Any:
    """What stands under the key `moeprune` of a safetensors file."""
    return json.loads(parts_of(whole)[0]["__metadata__"]["moeprune"])


def damaged_safetensors(whole: bytes, chance: random.Random) -> bytes:
    """A safetensors file with a damage anywhere: length, header, metadata, values."""
    header, data = parts_of(whole)
    metadata = header.pop("__metadata__", {})
    names = sorted(header)
    name, other = chance.choice(names), chance.choice(names)
    entry, (start, end) = header[name], header[name]["data_offsets"]
    match chance.randrange(12):
        case 0 | 1:
            return mutated(whole, chance)
        case 2:
            lengths = (0, 1, len(whole), len(whole) - 8, 10**8, 2**63, 2**64 - 1)
            return chance.choice(lengths).to_bytes(8, "little") + whole[8:]
        case 3:
            return with_header(damaged_json({"__metadata__": metadata} | header, chance), data)
        case 4:
            header[name], header[other] = header[other], header[name]
        case 5:
            entry["data_offsets"], header[other]["data_offsets"] = header[other]["data_offsets"], [start, end]
        case 6:  # another type, or another type and the shape of as many bytes
            types = {"F64": 8, "F16": 2, "BF16": 2, "I32": 4, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "C64": 8}
            entry["dtype"] = chance.choice([*types])
            if chance.random() < 0.5:
                entry["shape"] = [(end - start) // types[entry["dtype"]]]
        case 7:
            shape = entry["shape"]
            shapes = [1, *shape], [*shape, 1], shape[:-1], [0, *shape], [2**62, *shape], [-1, *shape]
            entry["shape"] = chance.choice((shape[::-1], *shapes))
        case 8:
            header[chance.choice(("", "a\0b", "\x1b[31m", "ä", "x" * 3000, name + "."))] = header.pop(name)
        case 9:
            del header[name]
            data = data[:start] + data[end:]
            for tensor in header.values():
                if tensor["data_offsets"][0] >= end:
                    tensor["data_offsets"] = [at - (end - start) for at in tensor["data_offsets"]]
        case 10:  # values that are no numbers, or too large ones
            value = chance.choice((b"\xff\xff\xff\xff", b"\0\0\x80\x7f", b"\xff\xff\x7f\x7f", b"\1\0\0\0"))
            stop = end if chance.random() < 0.5 else start + 4
            data = data[:start] + (value * len(data))[: stop - start] + data[stop:]
        case _:
            text = damaged_json(json.loads(metadata.get("moeprune", "{}")), chance)
            return with_metadata(with_header(json.dumps(header), data), text)
    return with_header(json.dumps({"__metadata__": metadata} | header), data)


def damaged_torch(whole: bytes, chance: random.Random) -> bytes:
    """The file damaged, or its pickle in a sound archive."""
    if not whole.startswith(b"PK") or chance.random() < 0.4:
        return mutated(whole, chance)
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(whole)) as old, zipfile.ZipFile(buffer, "w") as new:
        for name in old.namelist():
            content = old.read(name)
            new.writestr(name, mutated(content, chance) if name.endswith("/data.pkl") else content)
    return buffer.getvalue()
