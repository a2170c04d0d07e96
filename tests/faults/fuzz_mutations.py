"""What can be wrong with a safetensors file, as functions that change its parts; each with one source of chance."""

import json
import struct
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any

import numpy as np

HUGE = (2**31, 2**32 - 1, 2**53 + 1, 2**63, 2**64 - 1, 2**64, 10**40)
ODD_VALUES = (None, True, -1, 0, 1.5, 1e308, "", "F32", [], {}, [[]], {"a": {}}, [0, 0, 0], *HUGE)
ODD_NAMES = (
    "", "\0", "__metadata__", "A.lora_A", "a.lora_a", "a.lora_A ", "a.lora_A\0", "a\u200b.lora_A", "u\u0308.lora_A",
    "\ud800", "../../etc/passwd", "\x1b[31m", "a\u202e", "x" * 5000, "\U0001f600", "NaN",
)  # fmt: skip
ODD_DTYPES = ("F32", "F16", "BF16", "F64", "I32", "U8", "BOOL", "F8_E4M3", "f32", "", "\x1b[2J", None, 32, "x" * 3000)
ODD_HEADERS = (
    b"", b"{}", b"[]", b"null", b"0", b'""', b"{", b"}", b"\xef\xbb\xbf{}", b"\xff\xfe", b"[" * 5000, b'{"a":' * 3000,
    b"1" * 6000, b"NaN", b'{"__metadata__":{}}', b"\0" * 64,
)  # fmt: skip


class Raw(str):
    """JSON text that is written as it stands."""

    __slots__ = ()


@dataclass
class Parts:
    """A file taken apart; `content` puts it together as it now is."""

    entries: list[tuple[Any, Any]]  # of the header, in order; a name may stand twice
    payload: bytes
    dtype: "np.dtype[Any]"
    padding: bytes = b""
    is_padded: bool = True  # to a multiple of eight, after `padding`
    separators: tuple[str, str] = (",", ":")
    escapes_all: bool = False
    header: bytes | None = None  # instead of the entries
    prefix: bytes | None = None  # instead of the header's length
    edits: tuple[tuple[int, bytes, int], ...] = ()  # of the whole: where (0 to 1<<30 is all), what, how much goes
    cut: float | None = None  # what share stays
    tail: bytes = b""
    splices_with_another: bool = False

    def content(self) -> bytes:
        """The file."""
        header = self.header
        if header is None:
            fields = self.separators[0].join(
                f"{self._json(name)}{self.separators[1]}{self._json(value)}" for name, value in self.entries
            )
            header = ("{" + fields + "}").encode("utf-8", "surrogatepass") + self.padding
            if self.is_padded:
                header += b" " * (-len(header) % 8)
        whole = (struct.pack("<Q", len(header)) if self.prefix is None else self.prefix) + header + self.payload
        for where, what, gone in self.edits:
            at = where * len(whole) >> 30
            whole = whole[:at] + what + whole[at + gone :]
        return (whole if self.cut is None else whole[: int(self.cut * len(whole))]) + self.tail

    def _json(self, value: Any) -> str:
        if isinstance(value, Raw):
            return str(value)
        return json.dumps(value, separators=self.separators, ensure_ascii=self.escapes_all)


Mutation = Callable[[Random, Parts], None]


def parts_of(content: bytes, dtype: "np.dtype[Any]") -> Parts:
    """A good file taken apart."""
    (length,) = struct.unpack_from("<Q", content)
    entries = json.loads(content[8 : 8 + length], object_pairs_hook=list)
    return Parts([(name, dict(fields)) for name, fields in entries], content[8 + length :], dtype)


def _entry(random: Random, parts: Parts) -> tuple[int, Any, dict[str, Any]]:
    """A place in the header, its name and a copy of what it says."""
    if not parts.entries:
        parts.entries.append(("a", {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}))
    index = random.randrange(len(parts.entries))
    name, fields = parts.entries[index]
    return index, name, dict(fields) if isinstance(fields, dict) else {}


def _set(random: Random, parts: Parts, key: str, value: Any) -> None:
    index, name, fields = _entry(random, parts)
    fields[key] = value
    parts.entries[index] = (name, fields)


def _rename(random: Random, parts: Parts) -> None:
    index, _, fields = _entry(random, parts)
    parts.entries[index] = (random.choice(ODD_NAMES), fields)


def _swap_names(random: Random, parts: Parts) -> None:
    (i, left, of_left), (j, right, of_right) = _entry(random, parts), _entry(random, parts)
    parts.entries[i], parts.entries[j] = (right, of_left), (left, of_right)


def _duplicate(random: Random, parts: Parts) -> None:
    index, name, fields = _entry(random, parts)
    if random.random() < 0.5:
        fields["shape"] = random.choice(ODD_VALUES)
    parts.entries.insert(random.choice((0, index, len(parts.entries))), (name, fields))


def _drop(random: Random, parts: Parts) -> None:
    del parts.entries[_entry(random, parts)[0]]


def _add(random: Random, parts: Parts) -> None:
    entry = {"dtype": "F32", "shape": random.choice(([0], [1], [])), "data_offsets": [0, random.choice((0, 4))]}
    parts.entries.insert(random.randrange(len(parts.entries) + 1), (random.choice((*ODD_NAMES, "zz")), entry))


def _add_many(random: Random, parts: Parts) -> None:
    empty = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    parts.entries += [(f"t{i}", empty) for i in range(random.choice((1, 50)))]


def _shape(random: Random, parts: Parts) -> None:
    index, name, fields = _entry(random, parts)
    old = fields.get("shape")
    shape = list(old) if isinstance(old, list) else []
    fields["shape"] = random.choice(
        (shape[::-1], [*shape, 1], [1, *shape], [*shape, 0], shape[:-1], [-s for s in shape if isinstance(s, int)],
         [float(s) for s in shape if isinstance(s, int)], [random.choice(HUGE)] * 2, shape * 2,
         random.choice(ODD_VALUES))
    )  # fmt: skip
    parts.entries[index] = (name, fields)


def _offsets(random: Random, parts: Parts) -> None:
    index, name, fields = _entry(random, parts)
    old = fields.get("data_offsets")
    begin, end = old if isinstance(old, list) and len(old) == 2 else (0, 4)
    if not isinstance(begin, int) or not isinstance(end, int):
        begin, end = 0, 4
    step = random.choice((1, 2, 4, 8))
    fields["data_offsets"] = random.choice(
        ([begin + step, end + step], [begin - step, end], [begin, end + step], [end, begin], [begin, begin], [-1, end],
         [begin, random.choice(HUGE)], [random.choice(HUGE)] * 2, [float(begin), float(end)], [begin],
         [begin, end, end], [str(begin), str(end)], [0, len(parts.payload)], random.choice(ODD_VALUES))
    )  # fmt: skip
    parts.entries[index] = (name, fields)


def _metadata(random: Random, parts: Parts) -> None:
    value = random.choice(({}, {"format": "pt"}, {"a": 1}, {"a": None}, {"a": {"b": "c"}}, *ODD_VALUES))
    parts.entries.insert(random.choice((0, len(parts.entries))), ("__metadata__", value))


def _bomb(random: Random, parts: Parts) -> None:
    depth = random.choice((10, 100, 400, 900, 985, 1000, 5000))
    opened, closed = random.choice((("[", "]"), ('{"a":', "}")))
    bomb = Raw(opened * depth + ("1" if closed == "}" else "") + closed * random.choice((depth, depth, 0)))
    _set(random, parts, random.choice(("shape", "dtype", "data_offsets", "x")), bomb)


def _number(random: Random, parts: Parts) -> None:
    text = random.choice(("1e999", "-1e999", "NaN", "Infinity", "9" * 5000, "1E2", "01", "-0", "1.0", "0x10", "1_0"))
    _set(random, parts, random.choice(("shape", "data_offsets")), Raw(f"[{text},{text}]"))


def _extra_key(random: Random, parts: Parts) -> None:
    _set(random, parts, random.choice(("", "x", "shape ", "DTYPE", "__proto__")), random.choice(ODD_VALUES))


def _no_key(random: Random, parts: Parts) -> None:
    index, name, fields = _entry(random, parts)
    fields.pop(random.choice(("dtype", "shape", "data_offsets")), None)
    parts.entries[index] = (name, fields)


def _reorder_keys(random: Random, parts: Parts) -> None:
    index, name, fields = _entry(random, parts)
    parts.entries[index] = (name, dict(random.sample(list(fields.items()), len(fields))))


def _entry_itself(random: Random, parts: Parts) -> None:
    index, name, _ = _entry(random, parts)
    parts.entries[index] = (name, random.choice(ODD_VALUES))


def _escape(random: Random, parts: Parts) -> None:
    index, name, fields = _entry(random, parts)
    if isinstance(name, str) and not isinstance(name, Raw) and name:
        at = random.randrange(len(name))
        units = name[at].encode("utf-16-be", "surrogatepass")
        codes = "".join(f"\\u{units[i]:02x}{units[i + 1]:02x}" for i in range(0, len(units), 2))
        before, after = (json.dumps(part, ensure_ascii=False)[1:-1] for part in (name[:at], name[at + 1 :]))
        parts.entries[index] = (Raw(f'"{before}{codes}{after}"'), fields)


def _padding(random: Random, parts: Parts) -> None:
    parts.padding = random.choice((b" ", b" " * 8, b"\0" * 8, b"\t" * 8, b"\n", b" " * 4096, b"{}", b"//"))
    parts.is_padded = random.random() < 0.7


def _spaces(random: Random, parts: Parts) -> None:
    parts.separators = random.choice(((", ", ": "), (",", ": "), (",\n", ":"), (" ,", ":")))


def _shuffle(random: Random, parts: Parts) -> None:
    random.shuffle(parts.entries)


def _escapes_all(_random: Random, parts: Parts) -> None:
    parts.escapes_all = True


def _dtype(random: Random, parts: Parts) -> None:
    if random.random() < 0.5:
        _set(random, parts, "dtype", random.choice(ODD_DTYPES))
        return
    word = random.choice(ODD_DTYPES)
    parts.entries = [(n, {**f, "dtype": word} if isinstance(f, dict) else f) for n, f in parts.entries]


def _other_header(random: Random, parts: Parts) -> None:
    parts.header = random.choice(ODD_HEADERS)


def _prefix(random: Random, parts: Parts) -> None:
    length = struct.unpack_from("<Q", parts.content().ljust(8, b"\0"))[0]
    value = random.choice((0, 1, 7, length - 1, length + 1, length + 8, length - 8, 8 << 20, 100 << 20, *HUGE[:5]))
    order = random.choice("<<<>")
    parts.prefix = struct.pack(f"{order}Q", max(0, min(value, 2**64 - 1)))[: random.choice((8, 8, 8, 8, 4, 0))]


def _values(random: Random, parts: Parts, values: "list[Any]") -> None:
    numbers = np.frombuffer(
        parts.payload[: len(parts.payload) // parts.dtype.itemsize * parts.dtype.itemsize], parts.dtype
    )
    if not numbers.size:
        return
    changed = numbers.copy()
    for _ in range(random.choice((1, 1, 3))):
        at = random.choice((0, changed.size - 1, random.randrange(changed.size)))
        with np.errstate(over="ignore"):
            changed[at] = np.float64(random.choice(values)).astype(parts.dtype)
    parts.payload = changed.tobytes() + parts.payload[changed.nbytes :]


def _not_finite(random: Random, parts: Parts) -> None:
    _values(random, parts, [float("nan"), -float("nan"), float("inf"), -float("inf")])


def _signalling(random: Random, parts: Parts) -> None:
    """Not a number, in one of its many other bit patterns."""
    size = parts.dtype.itemsize
    pattern = {2: 0x7C01 if parts.dtype == np.dtype("<f2") else 0x7F81, 4: 0x7F800001}[size]
    bits = (pattern | random.getrandbits(7) | random.choice((0, 1 << (8 * size - 1)))).to_bytes(size, "little")
    at = random.choice((0, 1, random.randrange(max(1, len(parts.payload) // size)))) * size
    parts.payload = (parts.payload[:at] + bits + parts.payload[at + size :])[: len(parts.payload)]


def _large(random: Random, parts: Parts) -> None:
    _values(random, parts, [1e4, 9999.0, 1.0001e4, 1.01e4, -1e4, -1.1e4, 6e4, 3e38, -3e38])


def _small(random: Random, parts: Parts) -> None:
    _values(random, parts, [0.0, -0.0, 1e-45, -1e-40, 6e-8, 1e-38, 1.0, -1.0])


def _flip(random: Random, parts: Parts) -> None:
    raw = bytearray(parts.payload)
    for _ in range(random.choice((1, 1, 8))):
        if raw:
            raw[random.randrange(len(raw))] ^= 1 << random.randrange(8)
    parts.payload = bytes(raw)


def _noise(random: Random, parts: Parts) -> None:
    parts.payload = random.randbytes(len(parts.payload))


def _cut(random: Random, parts: Parts) -> None:
    parts.cut = random.choice((0.0, random.random(), random.random(), 0.9999))


def _longer(random: Random, parts: Parts) -> None:
    parts.tail += random.choice((b"\0", b" ", b"\0" * 8, parts.payload, b"PK\x03\x04", random.randbytes(100)))


def _edit(random: Random, parts: Parts) -> None:
    """Somewhere in the whole file: bytes come, go or change."""
    what = random.randbytes(random.choice((0, 1, 1, 4)))
    parts.edits += ((random.randrange(1 << 30), what, random.choice((0, 1, 1, 4))),)


def _splice(_random: Random, parts: Parts) -> None:
    parts.splices_with_another = True


def _shorter_payload(random: Random, parts: Parts) -> None:
    parts.payload = parts.payload[random.choice((1, 2, 4)) :] if random.random() < 0.5 else parts.payload[:-4]


MUTATIONS: dict[str, Mutation] = {
    "name: another": _rename,
    "names: swapped": _swap_names,
    "name: twice": _duplicate,
    "name: gone": _drop,
    "name: one more": _add,
    "names: many more": _add_many,
    "names: other order": _shuffle,
    "name: escaped": _escape,
    "names: all in ASCII": _escapes_all,
    "dtype": _dtype,
    "shape": _shape,
    "offsets": _offsets,
    "metadata": _metadata,
    "nesting": _bomb,
    "numbers in the header": _number,
    "key: one more": _extra_key,
    "key: gone": _no_key,
    "keys: other order": _reorder_keys,
    "entry: no object": _entry_itself,
    "padding": _padding,
    "spaces": _spaces,
    "header: another": _other_header,
    "length of the header": _prefix,
    "numbers: not finite": _not_finite,
    "numbers: rare NaN": _signalling,
    "numbers: large": _large,
    "numbers: small": _small,
    "numbers: flipped bits": _flip,
    "numbers: noise": _noise,
    "payload: shorter": _shorter_payload,
    "file: cut": _cut,
    "file: longer": _longer,
    "file: edited": _edit,
    "file: spliced": _splice,
}
