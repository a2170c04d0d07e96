"""The fuzzers find nothing in the product, and find every weakness that is planted in it."""

import json
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from faults import fuzz_codec
from faults.fuzz_codec import NUMPY, WORDS, Check, Tally, bases, hunt, hunt_in_processes, mutant_of
from faults.fuzz_report import Flatness, Progress
from faults.fuzz_requests import in_a_process, wrong_with

from common.codec import Layout, check_file, check_header
from common.errors import NotFinite, WrongSize

CODEC_MUTANTS = 100_000
REQUESTS = 2_000
PLANTED_MUTANTS = 6_000  # enough for the rarest of the plants below


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_hundred_thousand_mutants_find_nothing() -> None:
    tally, flat = hunt_in_processes(2026, CODEC_MUTANTS, 2, Progress("mutants", CODEC_MUTANTS))
    assert not tally.breaches
    assert tally.mutants == CODEC_MUTANTS
    assert all(process.is_flat for process in flat), [process.sentence for process in flat]
    # A fuzzer whose mutants are all refused at the first byte, or all by one check, would look at nothing.
    assert tally.accepted > CODEC_MUTANTS / 100
    assert tally.accepted_by_library > CODEC_MUTANTS / 5
    reasons = {outcome for _, outcome in tally.outcomes}
    assert reasons == {"accepted", "adapter_mismatch", "not_finite", "out_of_bounds", "wrong_size"}


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_thousands_of_odd_requests_find_nothing(tmp_path: Path) -> None:
    tally = in_a_process(tmp_path, 2026, REQUESTS)
    assert not tally.breaches
    assert tally.memory.is_flat, tally.memory.sentence
    said = {outcome for _, outcome in tally.outcomes}
    assert said >= {"OK", "invalid_request", "unknown_client", "identity_conflict", "wrong_rank", "stale_round"}


def _content(path: Path) -> bytes:
    return path.read_bytes()


def _on_changed(change: Callable[[bytes], bytes]) -> Check:
    """The product's check of other bytes than those that came."""

    def check(path: Path, layout: Layout, whose: str) -> None:
        path.write_bytes(change(_content(path)))
        check_file(path, layout, whose)

    return check


def header_only(path: Path, layout: Layout, whose: str) -> None:
    check_header(_content(path), path.stat().st_size, layout, whose)


def finite_only(path: Path, layout: Layout, whose: str) -> None:
    header_only(path, layout, whose)
    values = np.frombuffer(_content(path)[len(layout.header) :], NUMPY[WORDS[layout.dtype]]).astype(np.float64)
    if not np.isfinite(values).all():
        raise NotFinite(whose)


def all_but_the_last_number(path: Path, layout: Layout, whose: str) -> None:
    header_only(path, layout, whose)
    content = _content(path)
    size = NUMPY[WORDS[layout.dtype]].itemsize
    path.write_bytes(content[:-size] + b"\0" * size)
    check_file(path, layout, whose)


def no_metadata(content: bytes) -> bytes:
    try:
        (length,) = struct.unpack_from("<Q", content)
        said = json.loads(content[8 : 8 + length])
        del said["__metadata__"]
    except (struct.error, ValueError, KeyError, TypeError, RecursionError):
        return content
    return rewritten(said, content[8 + length :])


def rewritten(said: object, payload: bytes) -> bytes:
    text = json.dumps(said, separators=(",", ":"), ensure_ascii=False).encode(errors="surrogatepass")
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + payload


def reads_json_as_it_comes(content: bytes) -> bytes:
    """Spaces, escapes, order and repeated names are forgiven."""
    try:
        (length,) = struct.unpack_from("<Q", content)
        said = json.loads(content[8 : 8 + length])
        said = {name: {key: said[name][key] for key in ("dtype", "shape", "data_offsets")} for name in sorted(said)}
    except (struct.error, ValueError, KeyError, TypeError, RecursionError):
        return content
    return rewritten(said, content[8 + length :])


def forgives_dtype(path: Path, layout: Layout, whose: str) -> None:
    word = WORDS[layout.dtype].encode()
    content = _content(path)
    for other in (b"F16", b"BF16", b"F32"):
        changed = content.replace(b'"' + other + b'"', b'"' + word + b'"')
        if len(changed) == len(content):
            content = changed
    path.write_bytes(content)
    check_file(path, layout, whose)


def trusts_the_header(path: Path, layout: Layout, whose: str) -> None:
    """Not typed: what is missing in the header is a KeyError."""
    content = _content(path)
    if content[8:9] == b"{" and b'"dtype"' not in content:
        raise KeyError("dtype")
    check_file(path, layout, whose)


def forgets_its_manners(path: Path, layout: Layout, whose: str) -> None:
    """Quotes what came as it came."""
    try:
        check_file(path, layout, whose)
    except WrongSize as error:
        raise WrongSize(f"{error}: {_content(path)[:8].decode('latin1')}") from None


def refuses_negative_zero(path: Path, layout: Layout, whose: str) -> None:
    """A good file that is refused is wrong too."""
    check_file(path, layout, whose)
    values = np.frombuffer(_content(path)[len(layout.header) :], NUMPY[WORDS[layout.dtype]]).astype(np.float64)
    if np.any((values == 0) & np.signbit(values)):
        raise NotFinite(whose)


PLANTS: dict[str, Check] = {
    "no number is looked at": header_only,
    "no bound on numbers": finite_only,
    "the last number is not looked at": all_but_the_last_number,
    "metadata is dropped": _on_changed(no_metadata),
    "any JSON that means the same": _on_changed(reads_json_as_it_comes),
    "bytes after the end": lambda path, layout, whose: _on_changed(lambda c: c[: layout.size_bytes])(
        path, layout, whose
    ),
    "zeros where the end is missing": lambda path, layout, whose: _on_changed(
        lambda c: c.ljust(layout.size_bytes, b"\0")
    )(path, layout, whose),
    "any dtype": forgives_dtype,
    "an error without a type": trusts_the_header,
    "a message with control characters": forgets_its_manners,
    "a good file is refused": refuses_negative_zero,
}


@pytest.mark.parametrize("weak", PLANTS.values(), ids=PLANTS.keys())
def test_a_weakness_is_found(tmp_path: Path, weak: Check) -> None:
    tally = Tally()
    for begin in range(0, PLANTED_MUTANTS, 500):
        tally.add(hunt(weak, 7, range(begin, begin + 500), tmp_path))
        if tally.breaches:
            return
    pytest.fail(f"{tally.mutants} mutants, and nothing was found")


def test_a_mutant_is_always_the_same() -> None:
    good = bases()
    assert [mutant_of(3, n, good) for n in range(50)] == [mutant_of(3, n, bases()) for n in range(50)]
    assert mutant_of(3, 1, good).content != mutant_of(4, 1, good).content


def test_a_leak_is_seen() -> None:
    flat, leaking = Flatness(), Flatness()
    for done in range(0, 100_000, 5_000):
        flat.note(done, (100 << 20) + done % 3 * 4096)
        leaking.note(done, (100 << 20) + 1_000 * done)
    assert flat.is_flat
    assert not leaking.is_flat


def test_the_command_says_what_it_found(capsys: pytest.CaptureFixture[str]) -> None:
    assert fuzz_codec.main(["--mutants", "200", "--processes", "1"]) == 0
    said = capsys.readouterr().out
    assert "200 mutants of seed 1" in said
    assert said.rstrip().endswith("verdict: passed")
    assert fuzz_codec.main(["--replay", "17"]) == 0
    assert "mutant 17 of seed 1" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("outcome", "is_wrong"),
    [("OK", False), ("too_busy", False), ("internal", True), ("no_such_reason", True), ("INTERNAL: boom", True)],
)
def test_only_reasons_that_exist_are_right(outcome: str, is_wrong: bool) -> None:
    assert bool(wrong_with(outcome)) is is_wrong
