"""The codec accepts exactly one file per adapter, and every other byte string is a typed error."""

import json
import os
import struct
import tracemalloc
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load, save

from common.adapter import Adapter, AdapterSpec, Factors, ModuleShape, TensorShape
from common.codec import (
    Layout,
    WireDtype,
    check_file,
    check_header,
    decode,
    digest_of,
    encode,
    name_of_lora_A,
    name_of_lora_B,
    read_into,
    read_module,
    read_part,
    read_tensor,
)
from common.errors import AdapterMismatch, NotFinite, OutOfBounds, WrongSize

SPEC = AdapterSpec(
    (ModuleShape("encoder.layer.0.query", 6, 4), ModuleShape("encoder.layer.1.query", 6, 4)),
    (TensorShape("classifier.bias", (3,)), TensorShape("temperature", ())),
)
_PRECISE = {
    WireDtype.FLOAT32: np.dtype(np.float32),
    WireDtype.BFLOAT16: np.dtype(ml_dtypes.bfloat16),
    WireDtype.FLOAT16: np.dtype(np.float16),
}
dtypes = st.sampled_from(WireDtype)
names = st.text(st.characters(exclude_categories=("C", "Z")), min_size=1, max_size=12)
sides = st.integers(1, 9)


@st.composite
def specs(draw: st.DrawFn) -> AdapterSpec:
    drawn = draw(st.lists(names, min_size=1, max_size=5, unique=True))
    split = draw(st.integers(1, len(drawn)))
    modules = tuple(ModuleShape(name, draw(sides), draw(sides)) for name in drawn[:split])
    shapes = st.lists(sides, max_size=3).map(tuple)
    return AdapterSpec(modules, tuple(TensorShape(name, draw(shapes)) for name in drawn[split:]))


def filled(spec: AdapterSpec, rank: int, dtype: WireDtype, seed: int = 0) -> Adapter:
    """An adapter of random numbers that the dtype holds exactly."""
    numbers = np.random.default_rng(seed)

    def drawn(*shape: int) -> np.ndarray:
        return np.asarray(numbers.normal(size=shape)).astype(_PRECISE[dtype]).astype(np.float32)

    return Adapter(
        {m.name: Factors(drawn(rank, m.in_features), drawn(m.out_features, rank)) for m in spec.modules},
        {t.name: drawn(*t.shape) for t in spec.tensors},
    )


def assert_same(left: Adapter, right: Adapter) -> None:
    assert left.spec == right.spec
    for name, factors in left.modules.items():
        np.testing.assert_array_equal(factors.lora_A, right.modules[name].lora_A)
        np.testing.assert_array_equal(factors.lora_B, right.modules[name].lora_B)
    for name, tensor in left.tensors.items():
        np.testing.assert_array_equal(tensor, right.tensors[name])


@given(spec=specs(), rank=st.integers(1, 8), dtype=dtypes, seed=st.integers(0, 9))
@settings(deadline=None, max_examples=60)
def test_what_is_encoded_is_decoded_and_its_length_was_known(
    spec: AdapterSpec, rank: int, dtype: WireDtype, seed: int
) -> None:
    adapter, layout = filled(spec, rank, dtype, seed), Layout(spec, rank, dtype)
    content = encode(adapter, dtype)
    assert len(content) == layout.size_bytes
    assert_same(decode(content, layout, "ada"), adapter)
    assert encode(decode(content, layout, "ada"), dtype) == content


@given(spec=specs(), rank=st.integers(1, 8))
@settings(deadline=None, max_examples=60)
def test_the_safetensors_library_writes_the_same_bytes(spec: AdapterSpec, rank: int) -> None:
    adapter = filled(spec, rank, WireDtype.FLOAT32)
    arrays = dict(adapter.tensors)
    for name, factors in adapter.modules.items():
        arrays |= {name_of_lora_A(name): factors.lora_A, name_of_lora_B(name): factors.lora_B}
    assert save({name: np.array(array) for name, array in arrays.items()}) == encode(adapter)


@pytest.mark.parametrize("dtype", [WireDtype.FLOAT32, WireDtype.FLOAT16])
def test_the_safetensors_library_reads_what_is_sent(dtype: WireDtype) -> None:
    adapter = filled(SPEC, 2, dtype)
    found = load(encode(adapter, dtype))
    np.testing.assert_array_equal(
        found["encoder.layer.1.query.lora_B"].astype(np.float32),
        adapter.modules["encoder.layer.1.query"].lora_B,
    )
    assert found["temperature"].shape == ()


@pytest.mark.parametrize("dtype", WireDtype)
def test_every_truncation_is_refused(dtype: WireDtype, tmp_path: Path) -> None:
    layout = Layout(SPEC, 2, dtype)
    content = encode(filled(SPEC, 2, dtype), dtype)
    file = tmp_path / "update"
    for length in range(len(content)):
        with pytest.raises((AdapterMismatch, WrongSize), match="ada"):
            decode(content[:length], layout, "ada")
        if length % 50 == 0:
            file.write_bytes(content[:length])
            with pytest.raises((AdapterMismatch, WrongSize), match="ada"):
                check_file(file, layout, "ada")


@pytest.mark.parametrize("tail", [b"\0", b" " * 8, b"\0" * 4096])
def test_every_extension_is_refused(tail: bytes) -> None:
    layout = Layout(SPEC, 2)
    content = encode(filled(SPEC, 2, WireDtype.FLOAT32)) + tail
    with pytest.raises(WrongSize, match=rf"{len(content)} bytes, but rank 2 in float32 has {layout.size_bytes}"):
        decode(content, layout, "ada")


def test_every_change_of_a_single_byte_of_the_header_is_refused() -> None:
    layout = Layout(SPEC, 2)
    content = encode(filled(SPEC, 2, WireDtype.FLOAT32))
    for place in range(len(layout.header)):
        for change in (0x01, 0x20, 0x80, 0xFF):
            changed = bytearray(content)
            changed[place] ^= change
            with pytest.raises(AdapterMismatch, match="ada"):
                decode(bytes(changed), layout, "ada")


@given(start=st.binary(max_size=300), size_bytes=st.integers(0, 2**63))
@settings(deadline=None)
def test_whatever_a_peer_sends_the_error_has_a_type(start: bytes, size_bytes: int) -> None:
    with pytest.raises(AdapterMismatch):
        check_header(start, size_bytes, Layout(SPEC, 2), "ada")


_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=5), children, max_size=3),
    max_leaves=8,
)
_entries = st.fixed_dictionaries({"dtype": _json, "shape": _json, "data_offsets": _json})


@given(header=_json | st.dictionaries(st.sampled_from(list(Layout(SPEC, 2).shapes)), _entries | _json))
@settings(deadline=None)
def test_whatever_json_a_peer_sends_the_error_has_a_type_and_is_short(header: object) -> None:
    text = json.dumps(header).encode()
    with pytest.raises(AdapterMismatch) as caught:
        decode(struct.pack("<Q", len(text)) + text + b"\0" * 500, Layout(SPEC, 2), "ada")
    assert len(str(caught.value).encode()) < 1500


def safetensors_of(entries: dict[str, tuple[str, list[int]]], ending: bytes = b"") -> bytes:
    offset, header = 0, {}
    for name, (dtype, shape) in entries.items():
        end = offset + 4 * int(np.prod(shape))
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + b"\0" * offset + ending


def test_the_message_says_how_the_file_differs() -> None:
    layout = Layout(AdapterSpec((ModuleShape("q", 2, 2),)), 1)
    good = {"q.lora_A": ("F32", [1, 2]), "q.lora_B": ("F32", [2, 1])}
    stories = {
        r"missing .'q.lora_B'., unexpected .'r.lora_B'.": {"q.lora_A": good["q.lora_A"], "r.lora_B": ("F32", [2, 1])},
        r"q.lora_A is \('F32', \[2, 2\]\), expected \('F32', \[1, 2\]\)": good | {"q.lora_A": ("F32", [2, 2])},
        r"q.lora_B is \('F16', \[2, 1\]\), expected \('F32', \[2, 1\]\)": good | {"q.lora_B": ("F16", [2, 1])},
        "not in canonical form": dict(reversed(good.items())),
    }
    for message, entries in stories.items():
        with pytest.raises(AdapterMismatch, match=f"client ada: .*{message}"):
            decode(safetensors_of(entries), layout, "client ada")


def test_names_of_a_megabyte_make_no_message_of_a_megabyte() -> None:
    spec = AdapterSpec(tuple(ModuleShape("m" * 400 + str(n), 2, 2) for n in range(1000)))
    start = safetensors_of({"x" * 500_000: ("F32", [0]), "\ud800": ("F32", [0])})
    with pytest.raises(AdapterMismatch) as caught:
        check_header(start, 10**6, Layout(spec, 2), "ada")
    assert len(str(caught.value).encode()) < 1000


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", WireDtype)
def test_a_number_that_is_not_finite_is_refused_wherever_it_stands(
    dtype: WireDtype, value: float, tmp_path: Path
) -> None:
    layout = Layout(SPEC, 2, dtype)
    content = encode(filled(SPEC, 2, dtype), dtype)
    poison = np.array(value).astype(_PRECISE[dtype]).tobytes()
    file = tmp_path / "update"
    for place in range(len(layout.header), len(content), len(poison)):
        poisoned = content[:place] + poison + content[place + len(poison) :]
        with pytest.raises(NotFinite, match=r"client ada: .* at index "):
            decode(poisoned, layout, "client ada")
        file.write_bytes(poisoned)
        with pytest.raises(NotFinite, match="client ada"):
            check_file(file, layout, "client ada")


def test_the_message_says_where_the_number_stands() -> None:
    layout = Layout(SPEC, 2)
    content = bytearray(encode(filled(SPEC, 2, WireDtype.FLOAT32)))
    struct.pack_into("<f", content, layout.offsets["classifier.bias"] + 8, np.nan)
    with pytest.raises(NotFinite, match=r"classifier\.bias holds nan at index 2"):
        decode(bytes(content), layout, "ada")


def test_large_tensors_are_checked_to_their_last_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("common.codec._CHECKED_BLOCK", 4)
    layout = Layout(SPEC, 2)
    content = bytearray(encode(filled(SPEC, 2, WireDtype.FLOAT32)))
    struct.pack_into("<f", content, layout.offsets["encoder.layer.0.query.lora_B"] + 4 * 11, np.inf)
    with pytest.raises(NotFinite, match=r"query\.lora_B holds inf at index 11"):
        decode(bytes(content), layout, "ada")


@pytest.mark.parametrize(("dtype", "value"), [(WireDtype.FLOAT16, 70_000.0), (WireDtype.BFLOAT16, 3.4e38)])
def test_a_number_that_the_dtype_cannot_hold_is_never_sent_as_infinity(dtype: WireDtype, value: float) -> None:
    adapter = Adapter({"q": Factors(np.full((1, 2), value, np.float32), np.ones((2, 1), np.float32))}, {})
    with pytest.raises(NotFinite, match=dtype):
        encode(adapter, dtype)
    assert len(encode(adapter)) == Layout(adapter.spec, 1).size_bytes


def test_a_bomb_of_empty_tensors_is_refused_before_it_is_read(tmp_path: Path) -> None:
    entry = b'"%07d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]},'
    text = b"{" + b"".join(entry % number for number in range(1_060_000))[:-1] + b"}"
    assert len(text) > 59_000_000
    bomb = tmp_path / "bomb"
    bomb.write_bytes(struct.pack("<Q", len(text)) + text)
    content = bomb.read_bytes()
    del text
    layout = Layout(SPEC, 2)
    tracemalloc.start()
    try:
        with pytest.raises(AdapterMismatch):
            decode(content, layout, "ada")
        with pytest.raises(AdapterMismatch):
            check_file(bomb, layout, "ada")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 200_000


def test_an_announced_header_of_exabytes_is_refused() -> None:
    with pytest.raises(AdapterMismatch):
        decode(struct.pack("<Q", 2**63) + b"{" * 5000, Layout(SPEC, 2), "ada")


def test_nested_json_is_refused() -> None:
    deep = b"[" * 4000
    spec = AdapterSpec(tuple(ModuleShape(f"module{n}", 2, 2) for n in range(100)))
    with pytest.raises(AdapterMismatch):
        decode(struct.pack("<Q", len(deep)) + deep + b"\0" * 9000, Layout(spec, 2), "ada")


@pytest.mark.parametrize("dtype", WireDtype)
def test_one_module_or_tensor_can_be_read_alone(dtype: WireDtype, tmp_path: Path) -> None:
    adapter, layout = filled(SPEC, 3, dtype), Layout(SPEC, 3, dtype)
    file = tmp_path / "update"
    file.write_bytes(encode(adapter, dtype))
    check_file(file, layout, "ada")
    for name, factors in adapter.modules.items():
        found = read_module(file, layout, name)
        np.testing.assert_array_equal(found.lora_A, factors.lora_A)
        np.testing.assert_array_equal(found.lora_B, factors.lora_B)
    for name, tensor in adapter.tensors.items():
        np.testing.assert_array_equal(read_tensor(file, layout, name), tensor)


@pytest.mark.parametrize("dtype", list(WireDtype))
def test_a_tensor_is_read_into_memory_of_its_readers(tmp_path: Path, dtype: WireDtype) -> None:
    adapter, layout = filled(SPEC, 3, dtype), Layout(SPEC, 3, dtype)
    file = tmp_path / "adapter"
    file.write_bytes(encode(adapter, dtype))
    target = np.zeros((5, 4), np.float32)
    read_into(file, layout, name_of_lora_A(SPEC.modules[1].name), target[1:4])
    np.testing.assert_array_equal(target[1:4], adapter.modules[SPEC.modules[1].name].lora_A)
    assert not target[[0, 4]].any()
    file.write_bytes(file.read_bytes()[: layout.offsets[name_of_lora_B(SPEC.modules[1].name)] + 2])
    with pytest.raises(WrongSize, match="the file ends within it"):
        read_into(file, layout, name_of_lora_B(SPEC.modules[1].name), np.zeros((6, 3), np.float32))


@pytest.mark.parametrize("dtype", list(WireDtype))
@pytest.mark.parametrize("columns", [(0, 6), (1, 5)], ids=["whole rows", "a part of each row"])
def test_a_part_of_a_matrix_is_read_or_the_file_is_called_too_short(
    tmp_path: Path, dtype: WireDtype, columns: tuple[int, int]
) -> None:
    spec = AdapterSpec((ModuleShape("q", out_features=4, in_features=6),))
    adapter, layout, name = filled(spec, 3, dtype), Layout(spec, 3, dtype), name_of_lora_A("q")
    path = tmp_path / "adapter"
    path.write_bytes(encode(adapter, dtype))
    with path.open("rb") as file:
        part = read_part(file, layout, name, rows=(1, 3), columns=columns)
        np.testing.assert_array_equal(part, adapter.modules["q"].lora_A[1:3, slice(*columns)])
        last = layout.offsets[name] + (2 * 6 + columns[1]) * (4 if dtype is WireDtype.FLOAT32 else 2)
        for short in (last - 1, last - 4, layout.offsets[name]):  # within a number, after one, before them all
            os.truncate(path, short)
            with pytest.raises(WrongSize, match=r"q.*: the file ends within it"):
                read_part(file, layout, name, rows=(1, 3), columns=columns)


def test_the_digest_is_sha256() -> None:
    assert digest_of(b"abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert digest_of(memoryview(b"abc")) == digest_of(b"abc")


@pytest.mark.parametrize("dtype", list(WireDtype))
def test_an_update_with_an_absurd_number_is_refused_by_name(dtype: WireDtype, tmp_path: Path) -> None:
    spec = AdapterSpec((ModuleShape("q", 3, 5),))
    factors = Factors(np.ones((2, 5), np.float32), np.array([[1, 1], [1, 2e4], [1, 1]], np.float32))
    path = tmp_path / "update"
    path.write_bytes(encode(Adapter({"q": factors}, {}), dtype))
    with pytest.raises(OutOfBounds, match=r"ada: q\.lora_B holds .* at index 3; at most 10000"):
        check_file(path, Layout(spec, 2, dtype), "ada")
