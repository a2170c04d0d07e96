"""Everything that can be wrong: its own reason and code, a message that says what and whose, and no effect at all.

In every story ada does well and bob (rank 2 of at most 8) or a newcomer does not; the round ends for whoever is left.
"""

from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import numpy as np
import pytest
from coordinators import (
    BASE_MODEL,
    SPEC,
    NumpyClient,
    Observer,
    clients_of,
    config_of,
    entries_of,
    observing,
    serving,
)
from raflora.v1 import admin_pb2, status_pb2
from raflora.v1 import federation_pb2 as pb

from common.adapter import Adapter, initial_adapter
from common.channel import COMMITTED_BYTES_KEY, REASON_KEY
from common.codec import Layout, WireDtype, decode, digest_of, encode
from common.errors import (
    AdapterMismatch,
    BaseModelMismatch,
    CorruptTransfer,
    Evicted,
    IdentityConflict,
    InvalidRequest,
    NotFinite,
    NothingPublished,
    ProtocolTooOld,
    RafloraError,
    SpecMismatch,
    StaleRound,
    StaleSlice,
    UnknownBlob,
    UnknownClient,
    UnknownTask,
    UpdateConflict,
    WrongOffset,
    WrongRank,
    WrongSize,
)
from worker.messages import Outcome, Task

BOB_RANK = 2
OTHER = digest_of(b"another base model")


@dataclass
class Site:
    """Where a row happens: bob has fetched his task and made his update."""

    observer: Observer
    bob: NumpyClient
    task: Task
    update: bytes
    me: dict[str, str] = field(default_factory=lambda: {"client_id": "bob", "enrol_key": "key-of-bob"})

    async def join(self, **changes: Any) -> None:
        request = pb.JoinRequest(
            protocol=1,
            client_id="eve",
            enrol_key="key-of-eve",
            profile=pb.RankProfile(max_rank=4, num_examples=10),
            base_model_digest=BASE_MODEL,
            spec=spec_message(),
        )
        for name, value in changes.items():
            target = request.profile if name in ("max_rank", "num_examples", "examples_per_second") else request
            if isinstance(value, pb.AdapterSpec):
                target.spec.CopyFrom(value)
            else:
                setattr(target, name, value)
        await self.observer.federation.Join(request)

    async def begin(self, content: bytes, **changes: Any) -> None:
        digest, size = changes.get("digest", digest_of(content)), changes.get("size_bytes", len(content))
        blob = pb.BlobReference(digest=digest, size_bytes=size)
        who = {key: changes.get(key, value) for key, value in self.me.items()}
        request = pb.BeginUploadRequest(**who, lease_token=self.task.lease_token, blob=blob)
        await self.observer.federation.BeginUpload(request)

    async def stream(self, digest: str, content: bytes, offset: int = 0, **metadata: str) -> None:
        said = {
            "raflora-client-id": "bob",
            "raflora-enrol-key": "key-of-bob",
            "raflora-digest": digest,
            "raflora-offset": str(offset),
        }
        said.update({f"raflora-{key}": value for key, value in metadata.items()})
        requests = (pb.UploadAdapterRequest(data=content[i : i + 1024]) for i in range(0, len(content), 1024))
        call = self.observer.federation.UploadAdapter(requests, metadata=tuple(said.items()), timeout=30)
        await call

    async def submit(self, content: bytes, **changes: Any) -> Outcome:
        fields: dict[str, Any] = {
            **self.me,
            "lease_token": self.task.lease_token,
            "round": self.task.round,
            "attempt": self.task.attempt,
            "blob": pb.BlobReference(digest=digest_of(content), size_bytes=len(content)),
            "slice_digest": self.task.adapter.digest,
            "num_examples": 10,
            **changes,
        }
        answer = await self.observer.federation.SubmitUpdate(pb.SubmitUpdateRequest(**fields))
        return answer.outcome

    async def send(self, content: bytes, **changes: Any) -> None:
        """Announces, streams and submits."""
        await self.begin(content)
        await self.stream(digest_of(content), content)
        await self.submit(content, **changes)


Act = Callable[[Site], Awaitable[Any]]


@dataclass(frozen=True)
class Row:
    name: str
    act: Act
    error: type[RafloraError]
    says: Sequence[str]  # found, expected, whose


def spec_message(**shapes: tuple[int, int]) -> pb.AdapterSpec:
    """The federation's spec, with these shapes instead or besides."""
    modules = {m.name: (m.out_features, m.in_features) for m in SPEC.modules} | {
        name.replace("_", "."): shape for name, shape in shapes.items()
    }
    return pb.AdapterSpec(
        modules=[pb.ModuleShape(name=n, out_features=o, in_features=i) for n, (o, i) in modules.items()],
        tensors=[pb.TensorShape(name=t.name, shape=t.shape) for t in SPEC.tensors],
    )


def of_rank(rank: int, dtype: WireDtype = WireDtype.FLOAT32) -> bytes:
    return encode(initial_adapter(SPEC, rank, seed=1), dtype)


def with_nan(content: bytes) -> bytes:
    layout = Layout(SPEC, BOB_RANK)
    start = layout.offsets["encoder.0.query.lora_B"]
    return content[:start] + np.float32("nan").tobytes() + content[start + 4 :]


def with_other_names(content: bytes) -> bytes:
    return content.replace(b"encoder.0.query.lora_A", b"encoder.0.value.lora_A", 1)


async def stop_half_way_then_submit(site: Site) -> None:
    await site.begin(site.update)
    await site.stream(digest_of(site.update), site.update[: len(site.update) // 2])
    await site.submit(site.update)


async def send_other_bytes(site: Site) -> None:
    await site.begin(site.update)
    await site.stream(digest_of(site.update), site.update[:-1] + bytes([site.update[-1] ^ 1]))


async def send_too_much(site: Site) -> None:
    await site.begin(site.update)
    await site.stream(digest_of(site.update), site.update + b"more")


async def go_on_at_the_wrong_byte(site: Site) -> None:
    await site.begin(site.update)
    await site.stream(digest_of(site.update), site.update[:100])
    await site.stream(digest_of(site.update), site.update[200:], offset=200)


async def be_evicted_and_submit(site: Site) -> None:
    await site.observer.admin.EvictClient(admin_pb2.EvictClientRequest(client_id="bob", reason="sends noise"))
    await site.submit(site.update)


async def submit_before_fetching(site: Site) -> None:
    await site.join()
    who = {"client_id": "eve", "enrol_key": "key-of-eve"}
    await site.submit(site.update, **who)


async def submit_another_one(site: Site) -> None:
    await site.send(site.update)
    await site.submit(of_rank(BOB_RANK))


async def download(site: Site, digest: str, offset: int = 0) -> None:
    request = pb.DownloadAdapterRequest(**site.me, digest=digest, offset=offset)
    async for _ in site.observer.federation.DownloadAdapter(request):
        pass


async def fetch(site: Site) -> None:
    await site.observer.fetch()


def admin(method: str, request: Any) -> Act:
    return lambda site: getattr(site.observer.admin, method)(request)


HEAVY = of_rank(4)
JOIN_ROWS = [
    Row("another base model", lambda s: s.join(base_model_digest=OTHER), BaseModelMismatch,
        ["'eve'", OTHER[:12], BASE_MODEL[:12]]),
    Row("no base model digest", lambda s: s.join(base_model_digest="tiny"), InvalidRequest,
        ["'eve'", "'tiny'", "SHA-256"]),
    Row("other modules", lambda s: s.join(spec=spec_message(encoder_2_extra=(8, 8))), SpecMismatch,
        ["'eve'", "unexpected ['encoder.2.extra']"]),
    Row("other shapes", lambda s: s.join(spec=spec_message(encoder_0_query=(16, 99))), SpecMismatch,
        ["'eve'", "in_features=99", "in_features=12"]),
    Row("an empty spec", lambda s: s.join(spec=pb.AdapterSpec()), InvalidRequest, ["no adapted module"]),
    Row("an old protocol", lambda s: s.join(protocol=0), ProtocolTooOld, ["0 to 0", "1 to 1", "upgrade the worker"]),
    Row("a newer protocol", lambda s: s.join(protocol=9), ProtocolTooOld, ["9 to 9", "upgrade the coordinator"]),
    Row("somebody else's name", lambda s: s.join(client_id="bob"), IdentityConflict, ["'bob'", "name of its own"]),
    Row("no name", lambda s: s.join(client_id=""), InvalidRequest, ["1 to 100 letters, digits"]),
    Row("a name of two lines", lambda s: s.join(client_id="a\nb"), InvalidRequest, ["letters, digits"]),
    Row("no key", lambda s: s.join(enrol_key=""), InvalidRequest, ["'eve'", "enrolment key"]),
    Row("rank 0", lambda s: s.join(max_rank=0), InvalidRequest, ["'eve'", "max_rank 0", "at least 1"]),
    Row("no examples", lambda s: s.join(num_examples=0), InvalidRequest, ["'eve'", "num_examples 0"]),
    Row("a speed that is no number", lambda s: s.join(examples_per_second=float("nan")), InvalidRequest,
        ["'eve'", "examples_per_second nan"]),
]  # fmt: skip
UPLOAD_ROWS = [
    Row("a rank above the grant", lambda s: s.begin(HEAVY), WrongRank,
        ["'bob'", f"{len(HEAVY)} bytes", "is rank 4", "of rank 2", f"exactly {Layout(SPEC, BOB_RANK).size_bytes}"]),
    Row("a size that is no rank's", lambda s: s.begin(HEAVY + b"?"), WrongSize,
        ["'bob'", f"{len(HEAVY) + 1} bytes", "rank 2", f"exactly {Layout(SPEC, BOB_RANK).size_bytes}"]),
    Row("another dtype", lambda s: s.begin(of_rank(BOB_RANK, WireDtype.FLOAT16)), WrongSize, ["'bob'", "float32"]),
    Row("no digest", lambda s: s.begin(s.update, digest="../../etc/passwd"), InvalidRequest, ["'bob'", "SHA-256"]),
    Row("an upload of nobody", lambda s: s.begin(s.update, client_id="mallory"), UnknownClient, ["'mallory'", "join"]),
    Row("an upload with another key", lambda s: s.begin(s.update, enrol_key="?"), IdentityConflict, ["'bob'"]),
    Row("bytes that nobody announced", lambda s: s.stream(digest_of(b"?"), b"?"), UnknownBlob,
        ["bob", digest_of(b"?")[:12], "announce it first"]),
    Row("fewer bytes than announced", stop_half_way_then_submit, UnknownBlob, ["bob", "is complete"]),
    Row("more bytes than announced", send_too_much, WrongSize, ["bob", "more bytes than the"]),
    Row("other bytes than announced", send_other_bytes, CorruptTransfer, ["bob", "expected", "send them again"]),
    Row("the wrong offset", go_on_at_the_wrong_byte, WrongOffset, ["bob", "byte 200", "expected 100"]),
    Row("a negative offset", lambda s: s.stream(digest_of(s.update), b"x", offset=-1), InvalidRequest, ["'-1'"]),
    Row("an offset beyond all files", lambda s: s.stream(digest_of(s.update), b"x", offset=1 << 64), InvalidRequest,
        ["metadata", str(1 << 64)]),
    Row("an offset that is no number", lambda s: s.stream(digest_of(s.update), b"x", offset="half"),
        InvalidRequest, ["metadata", "'half'"]),
    Row("metadata that is garbage", lambda s: s.stream("zzz", b"x"), InvalidRequest, ["bob", "'zzz'"]),
    Row("NaN", lambda s: s.send(with_nan(s.update)), NotFinite,
        ["'bob', round 1", "encoder.0.query.lora_B", "nan at index 0"]),
    Row("other tensor names", lambda s: s.send(with_other_names(s.update)), AdapterMismatch,
        ["'bob', round 1", "missing ['encoder.0.query.lora_A']", "unexpected ['encoder.0.value.lora_A']"]),
    Row("noise of the right length", lambda s: s.send(b"\xff" * len(s.update)), AdapterMismatch,
        ["'bob', round 1", "not a safetensors header"]),
]  # fmt: skip
SUBMIT_ROWS = [
    Row("a round that was never opened", lambda s: s.submit(s.update, round=7), StaleRound,
        ["round 7", "the newest is 1"]),
    Row("no task", submit_before_fetching, UnknownTask, ["'eve'", "no task in round 1"]),
    Row("a lease that was never given", lambda s: s.send(s.update, lease_token=99), UnknownTask, ["'bob'", "lease 99"]),
    Row("another slice", lambda s: s.send(s.update, slice_digest=OTHER), StaleSlice, ["'bob'", OTHER[:12]]),
    Row("nothing uploaded", lambda s: s.submit(s.update), UnknownBlob, ["bob", "is complete"]),
    Row("no examples in an update", lambda s: s.send(s.update, num_examples=0), InvalidRequest,
        ["'bob'", "num_examples 0"]),
    Row("too many examples", lambda s: s.send(s.update, num_examples=1 << 40), InvalidRequest, [str(1 << 40)]),
    Row("more examples than it joined with", lambda s: s.send(s.update, num_examples=999), InvalidRequest,
        ["num_examples 999", "it joined with"]),
    Row("a metric that is no number", lambda s: s.send(s.update, metrics={"train_loss": float("nan")}), InvalidRequest,
        ["'bob'", "train_loss is not finite"]),
    Row("a time that is no number", lambda s: s.send(s.update, training_seconds=float("inf")), InvalidRequest,
        ["'bob'", "training_seconds is not finite"]),
    Row("too many metrics", lambda s: s.send(s.update, metrics={str(i): 0.0 for i in range(65)}), InvalidRequest,
        ["65 metrics", "at most 64"]),
    Row("a second, different update", submit_another_one, UpdateConflict,
        ["'bob', round 1", "was accepted before", digest_of(of_rank(BOB_RANK))[:12]]),
    Row("an evicted client", be_evicted_and_submit, Evicted, ["'bob'", "sends noise"]),
]  # fmt: skip
OTHER_ROWS = [
    Row("a slice that is none", lambda s: download(s, OTHER), UnknownBlob, ["'bob'", OTHER[:12], "not a slice"]),
    Row("a path as a digest", lambda s: download(s, "../x"), InvalidRequest, ["'bob'", "'../x'"]),
    Row("a slice beyond its end", lambda s: download(s, s.task.adapter.digest, 1 << 30), WrongOffset, [str(1 << 30)]),
    Row("an adapter before there is one", fetch, NothingPublished, ["round 1 is not finished"]),
    Row("a page that is too large", lambda s: s.observer.status.ListRounds(status_pb2.ListRoundsRequest(page_size=101)),
        InvalidRequest, ["101", "at most 100"]),
    Row("a rank for a stranger", admin("SetClientRank", admin_pb2.SetClientRankRequest(client_id="mal", lora_rank=1)),
        UnknownClient, ["'mal'", "known: ada, bob"]),
    Row("a rank beyond the client",
        admin("SetClientRank", admin_pb2.SetClientRankRequest(client_id="bob", lora_rank=3)),
        WrongRank, ["'bob'", "rank 3", "1 to 2"]),
    Row("a round that is not open", admin("CloseRound", admin_pb2.CloseRoundRequest(round=4)), StaleRound,
        ["round 4 is not open; open is round 1"]),
    Row("a round without updates", admin("CloseRound", admin_pb2.CloseRoundRequest(round=1)), InvalidRequest,
        ["round 1 holds no update"]),
]  # fmt: skip


@pytest.mark.parametrize("row", JOIN_ROWS + UPLOAD_ROWS + SUBMIT_ROWS + OTHER_ROWS, ids=lambda row: row.name)
async def test_it_is_refused_by_name_and_changes_nothing(tmp_path: Path, row: Row) -> None:
    config = config_of(tmp_path, rounds__num_rounds=1, rounds__min_clients=2)
    async with AsyncExitStack() as stack:
        address = await stack.enter_async_context(serving(config))
        observer = await stack.enter_async_context(observing(address))
        ada, bob = await stack.enter_async_context(clients_of(address, {"ada": 8, "bob": BOB_RANK}))
        task = await bob.fetch_task()
        site = Site(observer, bob, task, await bob.train(task))
        refusal, changed = await refusal_of(site, row, config)
        assert_is(refusal, row)
        allowed = {"a second, different update": ["UpdateAccepted"], "no task": ["ClientJoined"]}
        assert changed == allowed.get(row.name, [] if row.error is not Evicted else ["MembershipChanged"])

        await ada.do(await ada.fetch_task())
        if row.error is not Evicted:
            await bob.upload(task, site.update)
            expected = Outcome.DUPLICATE if row.error is UpdateConflict else Outcome.ACCEPTED
            assert await bob.submit(task, site.update) is expected
        assert (await ada.rpc.poll_task(30.0)).is_finished
        status = await observer.see()
    contributors = [c.client_id for c in status.last_round.contributions]
    assert contributors == (["ada"] if row.error is Evicted else ["ada", "bob"])


async def refusal_of(site: Site, row: Row, config: Any) -> tuple[grpc.aio.AioRpcError, list[str]]:
    """How the row's act was refused, and the kinds of the entries that it left in the journal."""
    before = entries_of(config)
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await row.act(site)
    entries = entries_of(config)
    assert entries[: len(before)] == before
    return refused.value, [entry.kind for entry in entries[len(before) :]]


def assert_is(refusal: grpc.aio.AioRpcError, row: Row) -> None:
    trailing = dict(refusal.trailing_metadata() or ())
    assert (trailing.get(REASON_KEY), refusal.code().name) == (row.error.reason, row.error.code), refusal.details()
    for fragment in row.says:
        assert fragment in (refusal.details() or "")
    if row.error is WrongOffset:
        assert trailing[COMMITTED_BYTES_KEY].isdecimal()


def test_every_row_has_a_name_of_its_own() -> None:
    names = [row.name for row in JOIN_ROWS + UPLOAD_ROWS + SUBMIT_ROWS + OTHER_ROWS]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("changes", [{"client_id": ""}, {"enrol_key": ""}, {"max_rank": 0}, {"spec": pb.AdapterSpec()}])
async def test_a_refused_join_does_not_found_a_federation(tmp_path: Path, changes: dict[str, Any]) -> None:
    config = config_of(tmp_path)
    async with serving(config) as address, observing(address) as observer:
        site = Site(observer, *[None] * 3)  # type: ignore[arg-type] - nobody is here yet
        with pytest.raises(grpc.aio.AioRpcError):
            await site.join(**changes)
        assert (await observer.see()).phase == status_pb2.PHASE_WAITING_FOR_SPEC
    assert entries_of(config) == []


async def test_a_global_rank_that_fits_no_layer_is_told_to_the_first_worker(tmp_path: Path) -> None:
    async with serving(config_of(tmp_path, adapter__global_rank=64)) as address, observing(address) as observer:
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await Site(observer, *[None] * 3).join()  # type: ignore[arg-type] - nobody is here yet
        assert "encoder.1.dense is 11 x 20, so at most rank 11 fits" in (refused.value.details() or "")
        assert (await observer.see()).phase == status_pb2.PHASE_WAITING_FOR_SPEC


async def test_refused_bytes_can_be_sent_again_and_are_checked_again(tmp_path: Path) -> None:
    config = config_of(tmp_path, rounds__num_rounds=1, rounds__min_clients=1)
    async with (
        serving(config) as address,
        observing(address) as observer,
        clients_of(address, {"bob": BOB_RANK}) as (bob,),
    ):
        task = await bob.fetch_task()
        site = Site(observer, bob, task, await bob.train(task))
        for _ in range(2):
            with pytest.raises(grpc.aio.AioRpcError, match="only finite numbers"):
                await site.send(with_nan(site.update))
        await site.send(site.update)
        assert (await bob.rpc.poll_task(30.0)).is_finished


def test_the_rows_update_is_what_a_good_client_sends() -> None:
    decoded: Adapter = decode(of_rank(BOB_RANK), Layout(SPEC, BOB_RANK), "bob")
    assert decoded.rank == BOB_RANK
