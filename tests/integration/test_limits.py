"""The operator's limits and the bounds of the code over the wire: a reason, a line in the log, nothing changed."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc.aio
import numpy as np
import pytest
from coordinators import BASE_MODEL, SPEC, NumpyClient, Observer, clients_of, config_of, entries_of, observing, serving
from raflora.v1 import admin_pb2, status_pb2
from raflora.v1 import federation_pb2 as pb
from structlog.testing import capture_logs

from common.adapter import Adapter, Factors
from common.channel import REASON_KEY
from common.codec import Layout, decode, encode
from common.errors import ConfigError, NormTooLarge, QuotaExceeded, RafloraError, TooManyExamples
from coordinator.config import CoordinatorConfig
from worker.messages import Outcome

KEYS = {"bob": "key-of-bob"}


@asynccontextmanager
async def bob_at(folder: Path, **changes: Any) -> AsyncIterator[tuple[CoordinatorConfig, Observer, NumpyClient]]:
    """A federation that bob has joined, with a round of his own."""
    changes = {"rounds__min_clients": 1, "rounds__num_rounds": 1} | changes
    config = config_of(folder, **changes)
    async with (
        serving(config) as address,
        observing(address) as observer,
        clients_of(address, {"bob": 4}) as (bob,),
    ):
        yield config, observer, bob


async def reason_of(call: Any) -> tuple[str, str]:
    """The reason and the sentence of a refusal."""
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await call
    trailing = dict(refused.value.trailing_metadata() or ())
    return str(trailing.get(REASON_KEY)), refused.value.details() or ""


def times(content: bytes, factor: float, rank: int) -> bytes:
    """The same update with lora_B multiplied."""
    adapter = decode(content, Layout(SPEC, rank), "bob")
    modules = {name: Factors(f.lora_A, f.lora_B * np.float32(factor)) for name, f in adapter.modules.items()}
    return encode(Adapter(modules, adapter.tensors))


async def test_who_claims_too_many_examples_does_not_even_get_a_place(tmp_path: Path) -> None:
    config = config_of(tmp_path, limits__max_examples=9)
    async with serving(config) as address:
        with capture_logs() as lines, pytest.raises(TooManyExamples, match=r"num_examples 10, .* at most 9"):
            async with clients_of(address, {"bob": 4}):
                pass
    assert [line["found"] for line in lines if line["event"] == "refused by a limit"] == [10]
    assert entries_of(config) == []


async def test_a_limit_that_became_lower_refuses_the_submission(tmp_path: Path) -> None:
    async with bob_at(tmp_path) as (config, _, bob):
        pass
    lower = config_of(tmp_path, rounds__min_clients=1, rounds__num_rounds=1, limits__max_examples=9)
    async with serving(lower) as address:
        bob = NumpyClient(address, "bob", 4)
        task = await bob.fetch_task()
        content = await bob.train(task)
        await bob.upload(task, content)
        before = len(entries_of(config))
        with pytest.raises(TooManyExamples):
            await bob.submit(task, content)
        assert len(entries_of(config)) == before
        bob.num_examples = 9
        assert await bob.submit(task, content) is Outcome.ACCEPTED
        await bob.rpc.close()


async def test_an_update_that_is_too_large_is_forgotten_and_a_smaller_one_taken(tmp_path: Path) -> None:
    async with bob_at(tmp_path, limits__max_partition_norm=3.0) as (_, _, bob):
        task = await bob.fetch_task()
        good = await bob.train(task)
        large = times(good, 1000.0, task.lora_rank)
        await bob.upload(task, large)
        with capture_logs() as lines, pytest.raises(NormTooLarge, match=r"rank partition 0 to 4 is .* at most 3 "):
            await bob.submit(task, large)
        assert [line["reason"] for line in lines if line["event"] == "refused by a limit"] == ["norm_too_large"]
        await bob.upload(task, good)
        assert await bob.submit(task, good) is Outcome.ACCEPTED


async def test_a_day_s_bytes_outlast_a_restart(tmp_path: Path) -> None:
    size = Layout(SPEC, 4).size_bytes
    limits = {"limits__upload_bytes_per_day": 2 * size, "rounds__num_rounds": 5}
    async with bob_at(tmp_path, **limits) as (_, _, bob):
        await bob.do(await bob.fetch_task())
    async with bob_at(tmp_path, **limits) as (_, observer, bob):
        await bob.do(await bob.fetch_task())
        task = await bob.fetch_task()
        with capture_logs() as lines, pytest.raises(QuotaExceeded, match=f"{3 * size} bytes .* allows {2 * size}"):
            await bob.upload(task, await bob.train(task))
        assert [line["found"] for line in lines if line["event"] == "refused by a limit"] == [3 * size]
        assert (await observer.see()).round == 3


async def test_a_process_that_cannot_look_at_an_update_costs_that_update_alone(tmp_path: Path) -> None:
    """A time that is too short for any process: refused by name, and the coordinator goes on."""
    async with bob_at(tmp_path, limits__inspection_seconds=1e-6) as (config, observer, bob):
        task = await bob.fetch_task()
        content = await bob.train(task)
        await bob.upload(task, content)
        before = len(entries_of(config))
        with capture_logs() as lines, pytest.raises(RafloraError) as refused:
            await bob.submit(task, content)
        assert refused.value.reason == "inspection_failed"
        assert "took longer than 1e-06 s" in str(refused.value)
        assert [line["client"] for line in lines if line["event"] == "inspection failed"] == ["bob"]
        assert len(entries_of(config)) == before
        assert (await observer.see()).phase == status_pb2.PHASE_TRAINING
        # The bytes are forgotten, so it may send them again.
        assert await bob.rpc.begin_upload(task.lease_token, _blob(content)) == 0


async def test_a_spec_that_would_fill_the_memory_founds_nothing(tmp_path: Path) -> None:
    config = config_of(tmp_path, limits__adapter_bytes=1000)
    async with serving(config) as address, observing(address) as observer:
        module = pb.ModuleShape(name="a", out_features=1 << 24, in_features=12)
        request = join_request(spec=pb.AdapterSpec(modules=[module]))
        reason, says = await reason_of(observer.federation.Join(request))
        assert (reason, "limits.adapter_bytes is 1000" in says) == ("invalid_request", True)
        assert (await observer.see()).phase == status_pb2.PHASE_WAITING_FOR_SPEC


def _blob(content: bytes) -> Any:
    from common.codec import digest_of  # noqa: PLC0415
    from worker.messages import Blob  # noqa: PLC0415 - beside its only use

    return Blob(digest_of(content), len(content))


def join_request(**changes: Any) -> pb.JoinRequest:
    fields = {
        "protocol": 1,
        "client_id": "eve",
        "enrol_key": "key-of-eve",
        "profile": pb.RankProfile(max_rank=4, num_examples=10),
        "base_model_digest": BASE_MODEL,
        "spec": pb.AdapterSpec(
            modules=[pb.ModuleShape(name=m.name, out_features=m.out_features, in_features=m.in_features)
                     for m in SPEC.modules],
            tensors=[pb.TensorShape(name=t.name, shape=t.shape) for t in SPEC.tensors],
        ),
    }  # fmt: skip
    return pb.JoinRequest(**{**fields, **changes})


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"spec": pb.AdapterSpec(modules=[pb.ModuleShape()] * 20_000)}, "at most 16384"),
        ({"spec": pb.AdapterSpec(tensors=[pb.TensorShape(name="a", shape=[1] * 9)])}, "axes"),
        ({"spec": pb.AdapterSpec(modules=[pb.ModuleShape(name="a", out_features=2**32 - 1, in_features=1)])}, "shape"),
        ({"profile": pb.RankProfile(max_rank=4, num_examples=1 << 33)}, f"at most {1 << 32}"),
        ({"profile": pb.RankProfile(max_rank=4, num_examples=1, examples_per_second=-1.0)}, "not below 0"),
        ({"client_id": "a" * 1_000_000}, "1 to 100 letters"),
        ({"enrol_key": "k" * 201}, "1 to 200 visible"),
    ],
)
async def test_a_join_beyond_the_bounds_of_the_code(tmp_path: Path, changes: dict[str, Any], says: str) -> None:
    async with bob_at(tmp_path) as (config, observer, _):
        before = entries_of(config)
        reason, sentence = await reason_of(observer.federation.Join(join_request(**changes)))
        assert (reason, says in sentence) == ("invalid_request", True), sentence
        assert entries_of(config) == before


@pytest.mark.parametrize("seconds", [float("nan"), float("inf"), float("-inf")])
async def test_a_wait_that_is_no_number_is_refused(tmp_path: Path, seconds: float) -> None:
    """A timer at NaN would be overdue for ever, and put the event loop's others out of order."""
    async with bob_at(tmp_path) as (_, observer, _):
        request = pb.PollTaskRequest(client_id="bob", enrol_key="key-of-bob", wait_seconds=seconds)
        assert (await reason_of(observer.federation.PollTask(request, timeout=30)))[0] == "invalid_request"


@pytest.mark.parametrize(
    "changes",
    [
        {"metrics": {"a\x1b[2J": 1.0}},
        {"metrics": {"": 1.0}},
        {"metrics": {"loss": 1e31}},
        {"metrics": {str(index): 0.0 for index in range(1000)}},
        {"training_seconds": -1.0},
        {"training_seconds": 1e10},
    ],
)
async def test_numbers_that_no_training_brings_about(tmp_path: Path, changes: dict[str, Any]) -> None:
    async with bob_at(tmp_path) as (config, observer, bob):
        task = await bob.fetch_task()
        before = entries_of(config)
        request = pb.SubmitUpdateRequest(
            client_id="bob", enrol_key="key-of-bob", lease_token=task.lease_token, round=1, attempt=1,
            num_examples=1, **changes,
        )  # fmt: skip
        reason, sentence = await reason_of(observer.federation.SubmitUpdate(request))
        assert reason == "invalid_request", sentence
        assert sentence.isprintable()
        assert entries_of(config) == before


async def test_what_others_write_reaches_the_status_and_the_log_as_one_plain_line(tmp_path: Path) -> None:
    escape = "\x1b]0;owned\x07\n\u202e" + "x" * 5000
    async with bob_at(tmp_path) as (_, observer, bob):
        profile = pb.RankProfile(max_rank=4, num_examples=10, device=escape)
        await observer.federation.Join(
            join_request(client_id="bob", enrol_key="key-of-bob", profile=profile, software_version=escape)
        )
        task = await bob.fetch_task()
        who = {"client_id": "bob", "enrol_key": "key-of-bob", "lease_token": task.lease_token}
        progress = pb.Progress(activity=escape, step=2**32 - 1, total_steps=0, train_loss=float("nan"))
        await observer.federation.Heartbeat(pb.HeartbeatRequest(**who, progress=progress))
        with capture_logs() as lines:
            await observer.federation.FailTask(pb.FailTaskRequest(**who, reason=escape, message=escape))
            await observer.admin.EvictClient(admin_pb2.EvictClientRequest(client_id="bob", reason=escape))
            status = await observer.see()
            clients = (await observer.status.ListClients(status_pb2.ListClientsRequest())).clients
        said = [str(value) for line in lines for value in line.values()]
        shown = [f"{a.activity} {a.last_failure}" for a in status.assignments] + [status.explanation]
        shown += [f"{c.device} {c.software_version} {c.last_failure}" for c in clients]
        for text in (*said, *shown):
            assert text.isprintable()
            assert len(text) < 1200


@pytest.mark.parametrize("raw", [b"\xff", b"\x0a\xff\xff\xff\xff\x0f", b"\x0b" * 200])
@pytest.mark.parametrize("method", ["Join", "SubmitUpdate", "UploadAdapter", "DownloadAdapter"])
async def test_bytes_that_are_no_message_are_the_caller_s_fault(tmp_path: Path, method: str, raw: bytes) -> None:
    async with bob_at(tmp_path) as (_, observer, bob):
        path = f"/raflora.v1.FederationService/{method}"
        if method == "UploadAdapter":
            task = await bob.fetch_task()
            content = await bob.train(task)
            await bob.rpc.begin_upload(task.lease_token, _blob(content))
            said = (
                ("raflora-client-id", "bob"),
                ("raflora-enrol-key", "key-of-bob"),
                ("raflora-digest", _blob(content).digest),
                ("raflora-offset", "0"),
            )
            call = observer.channel.stream_unary(path)(iter([raw]), metadata=said)
        elif method == "DownloadAdapter":
            call = observer.channel.unary_stream(path)(raw).read()
        else:
            call = observer.channel.unary_unary(path)(raw)
        reason, sentence = await reason_of(call)
        assert (reason, "not the message of this call" in sentence) == ("invalid_request", True)


async def test_a_name_of_kilobytes_is_refused_with_its_reason(tmp_path: Path) -> None:
    """A sentence that quotes it whole would be too long for gRPC's trailers, and the reason would be lost."""
    async with bob_at(tmp_path) as (_, observer, _):
        for name in ("x" * 60_000, "ü" * 30_000):
            request = pb.HeartbeatRequest(client_id=name, enrol_key="?")
            reason, sentence = await reason_of(observer.federation.Heartbeat(request))
            assert (reason, len(sentence) <= 600) == ("unknown_client", True)


def test_a_table_of_limits_that_cannot_be_meant_ends_the_start(tmp_path: Path) -> None:
    from coordinators import settings_of, to_toml  # noqa: PLC0415

    from common.settings import load_settings  # noqa: PLC0415 - beside its only use

    file = tmp_path / "federation.toml"
    row = '[[limits.organisations]]\norganisation = "a"\nmax_uploads = 1\n'
    file.write_text(to_toml(settings_of(tmp_path)) + row * 2)
    with pytest.raises(ConfigError, match="never counts"):
        load_settings(CoordinatorConfig, file)
