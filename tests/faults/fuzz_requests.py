"""Odd requests against a real coordinator: every field of every call at its bounds and beyond, and bytes that are none.

Request k of a seed is always the same but for what it names of the present (a lease, a digest). After each answer:
only reasons that exist, never INTERNAL; what was refused has left no trace in the journal; the memory stays flat.
"""

import argparse
import asyncio
import gc
import logging
import multiprocessing
import sqlite3
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import grpc
import grpc.aio
import structlog
from coordinators import BASE_MODEL, SPEC, clients_of, config_of, serving
from faults.fuzz_report import Flatness, Progress, print_outcomes, resident_bytes
from google.protobuf.descriptor import FieldDescriptor, MethodDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from raflora.v1 import admin_pb2, federation_pb2, identity_pb2, status_pb2

from common.channel import REASON_KEY
from common.codec import digest_of
from common.errors import RafloraError, by_reason
from coordinator.stores.database import ENTRIES

ANSWER_SECONDS = 20.0  # a bound and no expectation: an answer that does not come is wrong
SAMPLE_EVERY = 250
CUT_OFF = "ended while we were still sending"  # our own gRPC client then tells no status, whatever it was
LONG_CALLS = frozenset({"WatchStatus"})  # ended by the caller after their first answers
METHODS: tuple[MethodDescriptor, ...] = tuple(
    method
    for file in (federation_pb2, status_pb2, admin_pb2, identity_pb2)
    for service in file.DESCRIPTOR.services_by_name.values()
    for method in service.methods
)
STRINGS = (
    "", " ", "ada", "bob", "eve", "key-of-ada", "key-of-bob", "a\nb", "\0", "\x1b[31mred", "\u202egnp.exe", "ü",
    "😀" * 40, "../../etc/passwd",
    "%s%n", "' OR 1=1 --", "a" * 100, "a" * 101, "x" * 5000, "ü" * 100_000, "0" * 64, "f" * 64,
    "F" * 64, "0" * 63,
)  # fmt: skip
INTEGERS = (0, 1, 2, 3, 7, 100, 101, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**53, 2**63 - 1, 2**63, 2**64 - 1)
FLOATS = (0.0, -0.0, 1.0, -1.0, 0.01, 1e300, -1e300, 5e-324, float("inf"), float("-inf"), float("nan"))
RAW = (b"\xff", b"\x0a\xff\xff\xff\xff\x0f", b"\x0a\x02\xff\xfe", b"\x08" + b"\xff" * 11, b"\x0b" * 200, b"{}", b"\0")
GOOD_SPEC = federation_pb2.AdapterSpec(
    modules=[
        federation_pb2.ModuleShape(name=m.name, out_features=m.out_features, in_features=m.in_features)
        for m in SPEC.modules
    ],
    tensors=[federation_pb2.TensorShape(name=t.name, shape=t.shape) for t in SPEC.tensors],
)


@dataclass
class Present:
    """What an odd request may name of the federation as it is, so that it comes far."""

    good: dict[str, Any] = field(default_factory=dict)  # values by the field's name
    update: bytes = b""  # bob's


@dataclass
class Tally:
    """What became of some requests."""

    requests: int = 0
    outcomes: Counter[tuple[str, str]] = field(default_factory=Counter)  # (method, outcome)
    breaches: list[str] = field(default_factory=list)
    memory: Flatness = field(default_factory=Flatness)


def odd_message(random: Random, method: MethodDescriptor, present: Present) -> Message:
    """A message of this call: each field a good value, an odd one or none."""
    message: Message = GetMessageClass(method.input_type)()
    share = random.choice((0.0, 0.5, 0.9, 1.0))
    who = random.choice(("bob", "bob", "ada"))
    if method.name == "EvictClient":
        who = "eve"  # the two that work must stay
    good = {**present.good, "client_id": who, "enrol_key": f"key-of-{who}"}
    if method.name == "DownloadAdapter":
        good["digest"] = good.get("slice_digest", "")
    _fill(random, message, _Choice(random, good, share), depth=0)
    if method.name == "EvictClient" and message.client_id in ("ada", "bob"):  # type: ignore[attr-defined]
        message.client_id = "eve"  # type: ignore[attr-defined]
    if message.DESCRIPTOR.fields_by_name.get("spec") is not None and random.random() < share:
        message.spec.CopyFrom(GOOD_SPEC)  # type: ignore[attr-defined]
    return message


@dataclass(frozen=True)
class _Choice:
    """How one message is filled: this share of its fields with good values."""

    random: Random
    good: dict[str, Any]
    share: float


def odd_bytes(random: Random, message: Message) -> bytes:
    """The message as bytes; now and then with unknown fields, cut, changed, or not a message at all."""
    content = message.SerializeToString()
    match random.randrange(12):
        case 0:
            return random.choice(RAW)
        case 1:
            return content[: random.randrange(len(content) + 1)]
        case 2 if content:
            at = random.randrange(len(content))
            return content[:at] + random.randbytes(1) + content[at + 1 :]
        case 3:  # a field that nobody knows, of any wire type
            return content + random.choice(
                (b"\xfa\x3f\x05hello", b"\xf8\x3f\x01", b"\xfd\x3f\0\0\0\0", b"\xf9\x3f" + b"\0" * 8)
            )
        case 4:
            return content + content  # the last one counts; what is repeated doubles
        case _:
            return content


def _fill(random: Random, message: Message, choice: _Choice, depth: int) -> None:
    for field_ in message.DESCRIPTOR.fields:
        if random.random() < 0.15 * (1.0 - choice.share):
            continue
        if field_.message_type is not None and field_.message_type.GetOptions().map_entry:
            entries = getattr(message, field_.name)
            for _ in range(random.choice((0, 1, 3, 64, 65)) if random.random() > choice.share else 0):
                entries[random.choice((*STRINGS, f"m{random.random()}"))] = random.choice(FLOATS)
        elif field_.is_repeated:
            _fill_repeated(random, message, field_, choice, depth)
        elif field_.message_type is not None:
            getattr(message, field_.name).SetInParent()
            _fill(random, getattr(message, field_.name), choice, depth + 1)
        else:
            setattr(message, field_.name, _value(random, field_, choice))


def _fill_repeated(random: Random, message: Message, field_: FieldDescriptor, choice: _Choice, depth: int) -> None:
    values = getattr(message, field_.name)
    count = random.choice((0, 1, 2, 3, 9, 20_000 if depth == 1 and random.random() < 0.05 else 4))
    for _ in range(count):
        if field_.message_type is None:
            values.append(_value(random, field_, choice))
        elif count > 100:
            values.add()
        else:
            _fill(random, values.add(), choice, depth + 1)


def _value(random: Random, field_: FieldDescriptor, choice: _Choice) -> Any:
    if field_.name in choice.good and random.random() < choice.share:
        return choice.good[field_.name]
    kind = field_.cpp_type
    if kind == FieldDescriptor.CPPTYPE_STRING and field_.type != FieldDescriptor.TYPE_BYTES:
        return random.choice(STRINGS)
    if kind == FieldDescriptor.CPPTYPE_STRING:
        return random.choice((b"", b"\0", b"x" * 1000, random.randbytes(64)))
    if kind in (FieldDescriptor.CPPTYPE_DOUBLE, FieldDescriptor.CPPTYPE_FLOAT):
        return random.choice(FLOATS)
    if kind == FieldDescriptor.CPPTYPE_BOOL:
        return random.random() < 0.5
    if kind == FieldDescriptor.CPPTYPE_ENUM:
        return random.choice((0, 1, 2, 99, -1, 2**31 - 1))
    bits = 32 if kind in (FieldDescriptor.CPPTYPE_UINT32, FieldDescriptor.CPPTYPE_INT32) else 64
    return random.choice([i for i in INTEGERS if i < 2**bits])


async def shoot(stub: grpc.aio.Channel, method: MethodDescriptor, random: Random, present: Present) -> str:
    """Makes one odd call; the outcome: OK, a reason of ours, or what gRPC said itself."""
    message = odd_message(random, method, present)
    if method.name == "PollTask" and message.wait_seconds > 0.1:  # type: ignore[attr-defined]
        message.wait_seconds = random.choice((0.05, float("nan"), float("inf")))  # type: ignore[attr-defined]
    path = f"/{method.containing_service.full_name}/{method.name}"
    try:
        if method.client_streaming:
            said = _metadata(random, present)
            stream = _stream(random, present, dict(said).get("raflora-offset", ""))
            await stub.stream_unary(path)(stream, metadata=said, timeout=ANSWER_SECONDS)
        elif method.server_streaming:
            call = stub.unary_stream(path)(odd_bytes(random, message), timeout=ANSWER_SECONDS)
            async for _ in call:
                if method.name in LONG_CALLS:
                    call.cancel()
        else:
            await stub.unary_unary(path)(odd_bytes(random, message), timeout=ANSWER_SECONDS)
    except grpc.aio.AioRpcError as error:
        return _named(error)
    except asyncio.CancelledError:
        if method.name in LONG_CALLS:
            return "OK"
        raise
    return "OK"


def _named(error: grpc.aio.AioRpcError) -> str:
    trailing = {str(key): str(value) for key, value in error.trailing_metadata() or ()}
    if REASON_KEY in trailing:
        return trailing[REASON_KEY]
    if "SendMessageOperation" in (error.debug_error_string() or ""):
        return CUT_OFF
    return f"{error.code().name}: {error.details()}"


def _stream(random: Random, present: Present, offset: str) -> Iterator[bytes]:
    if present.update and random.random() < 0.5:  # the true bytes from there on, in odd pieces
        at = int(offset) if offset.isascii() and offset.isdigit() and len(offset) < 6 else 0
        for start in range(at, len(present.update), 1000):
            yield federation_pb2.UploadAdapterRequest(data=present.update[start : start + 1000]).SerializeToString()
        return
    for _ in range(random.choice((0, 1, 2, 5))):
        data = random.choice((b"", b"x", b"x" * 1000, b"x" * (1 << 20), b"x" * (4 << 20)))
        yield odd_bytes(random, federation_pb2.UploadAdapterRequest(data=data))


def _metadata(random: Random, present: Present) -> tuple[tuple[str, str], ...]:
    def word() -> str:
        return "".join(c for c in random.choice(STRINGS) if "!" <= c <= "~")[:2000]

    offsets = ("0", "1", "-1", "9" * 18, "9" * 19, "9" * 1000, "1_0", "0x0", "+0", "", "1e3", str(2**63))
    good = random.random() < 0.6
    pairs = [
        ("raflora-client-id", "bob" if good else word()),
        ("raflora-enrol-key", "key-of-bob" if good else word()),
        ("raflora-digest", present.good.get("digest", "") if random.random() < 0.7 else word()),
        ("raflora-offset", present.good.get("committed", "0") if random.random() < 0.6 else random.choice(offsets)),
    ]
    if random.random() < 0.1:
        pairs.append(random.choice(pairs))
    return tuple(pair for pair in pairs if random.random() < 0.97)


def wrong_with(outcome: str) -> str:
    """What is wrong with an outcome; empty if nothing is."""
    if outcome in ("OK", CUT_OFF) or (outcome != "internal" and by_reason(outcome) is not RafloraError):
        return ""
    if outcome.startswith("UNIMPLEMENTED") or "larger than max" in outcome or "metadata" in outcome.lower():
        return ""  # gRPC's own limits, before our code is asked
    return f"no reason of ours: {outcome[:200]}"


async def bombard(
    address: str, seed: int, numbers: Iterable[int], trace: Callable[[], str], progress: Progress
) -> Tally:
    """Makes these calls one after another. `trace` is what nobody may change who is refused."""
    tally, present = Tally(), Present()
    async with AsyncExitStack() as stack:
        channel = await stack.enter_async_context(grpc.aio.insecure_channel(address))
        await stack.enter_async_context(clients_of(address, {"ada": 4, "bob": 2, "eve": 1}))
        before = ""
        for number in numbers:
            if trace() != before:  # something was accepted: what is good now is something else
                await _look_around(channel, address, present)
                before = trace()
            method = METHODS[number % len(METHODS)]
            random = Random(f"{seed}/{number}")  # noqa: S311 - tests, not secrets
            outcome = await shoot(channel, method, random, present)
            breach = wrong_with(outcome)
            if not breach and outcome != "OK" and trace() != before:
                breach = f"refused ({outcome}), but the journal has changed"
            tally.requests += 1
            tally.outcomes[f"{method.containing_service.name}.{method.name}", outcome[:40]] += 1
            if breach:
                tally.breaches.append(f"request {number} ({method.full_name}): {breach}")
            if tally.requests % SAMPLE_EVERY == 0:
                gc.collect()  # what is only waiting for the collector is no leak
                tally.memory.note(tally.requests, resident_bytes())
                progress.show(tally.requests, len(tally.breaches))
        await _answers(channel)
    return tally


async def _look_around(channel: grpc.aio.Channel, address: str, present: Present) -> None:
    """Both are members with their own profiles again, the round is open, and bob has a task and an upload for it."""
    await channel.unary_unary("/raflora.v1.AdminService/Resume")(b"", timeout=ANSWER_SECONDS)
    present.good = {
        "protocol": 1,
        "protocol_min": 1,
        "protocol_max": 1,
        "base_model_digest": BASE_MODEL,
        "page_size": 5,
    }
    present.good |= {"max_rank": 2, "num_examples": 10, "examples_per_second": 1.0, "training_seconds": 1.0}
    status = channel.unary_unary("/raflora.v1.StatusService/GetStatus")
    # A session of its own: an odd poll in bob's name may have begun a newer one than the last.
    async with clients_of(address, {"ada": 4, "bob": 2}) as (ada, bob):
        polled = await bob.rpc.poll_task(0.0)
        if not polled.tasks:  # bob's update was taken, and the round waits for ada
            for task in (await ada.rpc.poll_task(0.0)).tasks:
                with suppress(RafloraError):
                    await ada.do(task)
        # A round that is being merged changes the journal by itself, whatever is asked meanwhile.
        while status_pb2.GetStatusResponse.FromString(await status(b"")).status.phase == status_pb2.PHASE_AGGREGATING:
            polled = await bob.rpc.poll_task(0.05)
        for task in polled.tasks:
            present.update = await bob.train(task)
            digest, size = digest_of(present.update), len(present.update)
            with suppress(RafloraError):  # an odd profile may have given bob another rank than his task's
                whole = bool(task.round % 2)  # else half of it is for an odd stream to go on with
                await bob.upload(task, present.update, stop_at=None if whole else size // 2)
            present.good |= {"lease_token": task.lease_token, "round": task.round, "attempt": task.attempt}
            present.good |= {"digest": digest, "size_bytes": size, "slice_digest": task.adapter.digest, "offset": 0}
            present.good["committed"] = str(size // 2)


async def _answers(channel: grpc.aio.Channel) -> None:
    """Raises unless the coordinator still says how it is."""
    call = channel.unary_unary("/raflora.v1.StatusService/GetStatus")
    status_pb2.GetStatusResponse.FromString(await call(b"", timeout=ANSWER_SECONDS))


async def against_a_coordinator(folder: Path, seed: int, numbers: Sequence[int]) -> Tally:
    """The same against a new coordinator on a free port, with two members and an open round."""
    # Nobody counts as lost while it is merely not asked, so that only requests change the journal.
    rounds = {"rounds__min_clients": 2, "rounds__lease_ttl_seconds": 3600, "rounds__max_attempts": 100_000}
    rounds |= {"rounds__num_rounds": 100_000, "rounds__max_failures": 1000}
    config = config_of(folder, **rounds, limits__changes=1_000_000)  # odd requests are many, and all of two members
    path = config.state_dir / "journal.sqlite"
    reader = _Reader(path)
    async with serving(config) as address:
        return await bombard(address, seed, numbers, reader.trace, Progress("requests", len(numbers)))


def in_a_process(folder: Path, seed: int, count: int) -> Tally:
    """The same in a new process: the memory of one that has run other tests tells of those as well."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_alone, folder, seed, count).result()


def _alone(folder: Path, seed: int, count: int) -> Tally:
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    return asyncio.run(against_a_coordinator(folder, seed, range(count)))


class _Reader:
    """How far the journal has come, read beside the coordinator that writes it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._connection: sqlite3.Connection | None = None

    def trace(self) -> str:
        """Changes with every entry, and with nothing else."""
        if self._connection is None:
            self._connection = sqlite3.connect(f"file:{self._path}?mode=ro", uri=True)
        newest = f"SELECT sequence, checksum FROM {ENTRIES.name} ORDER BY sequence DESC LIMIT 1"  # noqa: S608 - ours
        return str(self._connection.execute(newest).fetchone())


def main(arguments: Sequence[str] | None = None) -> int:
    """0 if nothing is wrong, 1 if something is."""
    parser = argparse.ArgumentParser(description="Odd requests against a real coordinator.")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--requests", type=int, default=5_000)
    parser.add_argument("--verbose", action="store_true", help="with the coordinator's log")
    parser.add_argument("--replay", type=int, help="make only this request, by its number, and show it")
    given = parser.parse_args(arguments)
    numbers = range(given.requests) if given.replay is None else [given.replay]
    if given.replay is None and not given.verbose:
        structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        tally = asyncio.run(against_a_coordinator(Path(folder), given.seed, numbers))
    seconds = time.monotonic() - started
    print_outcomes("call", tally.outcomes)
    print(
        f"\n{tally.requests} requests of seed {given.seed} in {seconds:.0f} s ({tally.requests / seconds:.0f} a second)"
    )
    if len(tally.memory.samples) > 1:
        print(f"memory of client and coordinator together: {tally.memory.sentence}")
    is_bad = bool(tally.breaches) or not tally.memory.is_flat
    for breach in tally.breaches[:20]:
        print(f"WRONG: {breach}")
    print(f"verdict: {'FAILED' if is_bad else 'passed'}")
    return 1 if is_bad else 0


if __name__ == "__main__":
    sys.exit(main())
