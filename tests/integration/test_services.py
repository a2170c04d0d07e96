"""The services as strangers meet them: reflection, health, status, admin verbs, and starts that must fail."""

import asyncio
import json
from pathlib import Path

import grpc
import grpc.aio
import pytest
from coordinators import (
    BASE_MODEL,
    SPEC,
    CoordinatorProcess,
    NumpyClient,
    clients_of,
    config_of,
    entries_of,
    observing,
    serving,
    settings_of,
)
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.json_format import MessageToDict
from google.protobuf.message_factory import GetMessageClass
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from raflora.v1 import admin_pb2, status_pb2
from structlog.testing import capture_logs

from common.codec import digest_of
from common.errors import BaseModelMismatch, ConfigError, StateInUse
from coordinator.server import SERVICES, run_coordinator
from coordinator.service import CoordinatorService
from coordinator.stores.blobs import FileBlobs
from coordinator.stores.journal import MemoryJournal
from worker.messages import Progress, TaskKind

RANKS = {"ada": 2, "bob": 4, "cem": 8}
BOTH = {"ada": 2, "bob": 4}


# ---------------------------------------------------------------- generic clients


async def test_a_call_can_be_made_from_reflection_alone(tmp_path: Path) -> None:
    def call(address: str) -> dict[str, str]:
        with grpc.insecure_channel(address) as channel:
            known = ProtoReflectionDescriptorDatabase(channel)
            assert set(SERVICES) <= set(known.get_services())
            pool = DescriptorPool(known)
            method = pool.FindServiceByName("raflora.v1.StatusService").FindMethodByName("GetStatus")
            answer_class = GetMessageClass(method.output_type)
            get_status = channel.unary_unary(
                f"/{method.containing_service.full_name}/{method.name}",
                request_serializer=lambda message: message.SerializeToString(),
                response_deserializer=answer_class.FromString,
            )
            return MessageToDict(get_status(GetMessageClass(method.input_type)(), timeout=30))["status"]

    async with serving(config_of(tmp_path)) as address:
        status = await asyncio.to_thread(call, address)
    assert (status["federation"], status["phase"]) == ("digits", "PHASE_WAITING_FOR_SPEC")
    assert status["explanation"] == "waiting for the first worker to say which layers are adapted"


async def test_reflection_can_be_switched_off(tmp_path: Path) -> None:
    def services(address: str) -> list[str]:
        with grpc.insecure_channel(address) as channel:
            return list(ProtoReflectionDescriptorDatabase(channel).get_services())

    async with serving(config_of(tmp_path, server__reflection=False)) as address:
        with pytest.raises(grpc.RpcError) as refused:
            await asyncio.to_thread(services, address)
    assert refused.value.code() is grpc.StatusCode.UNIMPLEMENTED


@pytest.mark.parametrize("service", ["", *SERVICES])
async def test_every_service_is_healthy(tmp_path: Path, service: str) -> None:
    async with serving(config_of(tmp_path)) as address, observing(address) as observer:
        stub = health_pb2_grpc.HealthStub(observer.channel)
        answer = await stub.Check(health_pb2.HealthCheckRequest(service=service))
    assert answer.status == health_pb2.HealthCheckResponse.SERVING


# ---------------------------------------------------------------- looking


async def test_the_status_says_who_works_and_what_is_waited_for(tmp_path: Path) -> None:
    config = config_of(tmp_path, rounds__quorum=2)
    async with serving(config) as address, observing(address) as observer, clients_of(address, RANKS) as clients:
        ada, bob, _ = clients
        await ada.do(await ada.fetch_task())
        await bob.fetch_task()
        status = await observer.see()
        listed = (await observer.status.ListClients(status_pb2.ListClientsRequest())).clients
    states = [(a.client_id, a.lora_rank, status_pb2.AssignmentState.Name(a.state)) for a in status.assignments]
    assert states == [
        ("ada", 2, "ASSIGNMENT_STATE_DONE"),
        ("bob", 4, "ASSIGNMENT_STATE_WORKING"),
        ("cem", 8, "ASSIGNMENT_STATE_WAITING"),
    ]
    assert (status.phase, status.round, status.quorum) == (status_pb2.PHASE_TRAINING, 1, 2)
    assert status.explanation.startswith("1 of 3 updates, quorum 2, deadline in ")
    assert status.explanation.endswith("waiting for bob, cem")
    assert (status.bytes_sent, status.bytes_received) == (len(ada.received[1]), len(ada.sent[1]))
    assert (status.forecast.smallest_rank, status.forecast.largest_rank) == (2, 8)
    assert [(c.client_id, c.lora_rank, c.membership) for c in listed] == [(c, r, "active") for c, r in RANKS.items()]
    assert listed[0].slice_bytes == len(ada.received[1])


async def test_what_will_not_mend_itself_stands_in_the_status_and_once_in_the_log(tmp_path: Path) -> None:
    config = config_of(tmp_path, rounds__num_rounds=5)
    with capture_logs() as logs:
        async with serving(config) as address, observing(address) as observer, clients_of(address, RANKS) as clients:
            await asyncio.gather(*(client.work() for client in clients))
            status = await observer.finished()
    (warning,) = status.warnings
    assert warning.startswith("ranks 5-8 had at most one client in each of the last 3 rounds")
    told = [line for line in logs if line["event"] == "one client alone trains ranks 5-8"]
    assert [(line["log_level"], line["why"]) for line in told] == [("warning", warning)]


async def test_watching_ends_with_the_finished_federation(tmp_path: Path) -> None:
    async with serving(config_of(tmp_path)) as address, observing(address) as observer:
        watched = asyncio.create_task(observer.finished())
        async with clients_of(address, RANKS) as clients:
            await asyncio.gather(*(client.work() for client in clients))
        assert (await watched).explanation == "finished: 2 of 2 rounds are published"


async def test_many_changes_at_once_are_watched_as_few(tmp_path: Path) -> None:
    async with serving(config_of(tmp_path)) as address, observing(address) as observer:
        async with clients_of(address, {"ada": 2}):
            seen, changes = 0, 200
            watch = observer.status.WatchStatus(status_pb2.WatchStatusRequest(), timeout=60)
            await watch.read()
            for _ in range(changes // 2):
                await observer.admin.Resume(admin_pb2.ResumeRequest())
                await observer.admin.Pause(admin_pb2.PauseRequest())
            await observer.admin.EvictClient(admin_pb2.EvictClientRequest(client_id="ada"))
            while (await watch.read()).status.clients_connected:
                seen += 1
            watch.cancel()
        assert seen < changes / 2


async def test_rounds_and_clients_come_in_pages(tmp_path: Path) -> None:
    config = config_of(tmp_path, rounds__num_rounds=3)
    async with serving(config) as address, observing(address) as observer, clients_of(address, RANKS) as clients:
        await asyncio.gather(*(client.work() for client in clients))
        rounds = observer.status.ListRounds
        first = await rounds(status_pb2.ListRoundsRequest(page_size=2))
        rest = await rounds(status_pb2.ListRoundsRequest(page_size=2, after_round=first.rounds[-1].round))
        beyond = await rounds(status_pb2.ListRoundsRequest(after_round=3))
        some = await observer.status.ListClients(status_pb2.ListClientsRequest(page_size=2))
        others = await observer.status.ListClients(status_pb2.ListClientsRequest(page_size=2, after_client_id="bob"))
    assert ([r.round for r in first.rounds], first.more) == ([1, 2], True)
    assert ([r.round for r in rest.rounds], rest.more) == ([3], False)
    assert (list(beyond.rounds), beyond.more) == ([], False)
    assert ([c.client_id for c in some.clients], some.more) == (["ada", "bob"], True)
    assert ([c.client_id for c in others.clients], others.more) == (["cem"], False)
    assert [c.rounds_contributed for c in some.clients] == [3, 3]
    assert first.rounds[0].learning_rate == pytest.approx(0.1)
    assert first.rounds[0].bytes_received == sum(len(client.sent[1]) for client in clients)


async def test_an_adapter_is_fetched_on_from_any_byte(tmp_path: Path) -> None:
    config = config_of(tmp_path, rounds__num_rounds=1, adapter__scaling="alpha_over_rank", adapter__lora_alpha=16)
    async with serving(config) as address, observing(address) as observer, clients_of(address, RANKS) as clients:
        await asyncio.gather(*(client.work() for client in clients))
        header, whole = await observer.fetch()
        again, tail = await observer.fetch(8, offset=len(whole) - 7)
        assert (again, tail) == (header, whole[-7:])
        assert (await observer.fetch(8, offset=len(whole)))[1] == b""
        request = status_pb2.FetchAdapterRequest(lora_rank=8, digest=digest_of(b"yesterday's"))
        with pytest.raises(grpc.aio.AioRpcError, match="no longer the newest; start again without a digest"):
            async for _ in observer.status.FetchAdapter(request):
                pass
        with pytest.raises(grpc.aio.AioRpcError, match="rank slice 9: the global adapter has the ranks 1 to 8"):
            await observer.fetch(9)
    assert (digest_of(whole), len(whole)) == (header.digest, header.size_bytes)
    assert (header.lora_rank, header.scaling, header.round, header.task) == (8, 2.0, 1, "sequence-classification")
    assert list(header.modules) == ["encoder.0.query", "encoder.1.dense"]


# ---------------------------------------------------------------- levers


async def test_the_operator_s_levers(tmp_path: Path) -> None:
    config = config_of(tmp_path, rounds__min_clients=2, rounds__num_rounds=3)
    async with serving(config) as address, observing(address) as observer, clients_of(address, BOTH) as (ada, bob):
        admin = observer.admin
        await ada.do(await ada.fetch_task())
        assert "paused after" in (await admin.Pause(admin_pb2.PauseRequest())).explanation
        await admin.SetClientRank(admin_pb2.SetClientRankRequest(client_id="bob", lora_rank=3))
        await admin.CloseRound(admin_pb2.CloseRoundRequest(round=1))
        async for answer in observer.status.WatchStatus(status_pb2.WatchStatusRequest(), timeout=60):
            if answer.status.last_round.round == 1:
                break
        assert answer.status.explanation == "paused before round 2; `raflora resume` goes on"
        assert [c.client_id for c in answer.status.last_round.contributions] == ["ada"]

        await admin.Resume(admin_pb2.ResumeRequest())
        task = await bob.fetch_task()
        assert (task.round, task.attempt, task.lora_rank) == (2, 1, 3)
        await admin.AbortRound(admin_pb2.AbortRoundRequest(round=2))
        assert (await bob.fetch_task()).attempt == 2
        evicted = await admin.EvictClient(admin_pb2.EvictClientRequest(client_id="bob", reason="sends noise"))
        assert evicted.explanation.startswith("0 of 1 updates")
        with pytest.raises(Exception, match="evicted by the operator: sends noise"):
            await bob.rpc.poll_task(0.0)


async def test_levers_before_there_is_a_federation_are_refused(tmp_path: Path) -> None:
    async with serving(config_of(tmp_path)) as address, observing(address) as observer:
        with pytest.raises(grpc.aio.AioRpcError, match="no worker has joined yet"):
            await observer.admin.Pause(admin_pb2.PauseRequest())


async def test_a_holder_of_a_dead_lease_is_told_to_stop(tmp_path: Path) -> None:
    config = config_of(tmp_path, rounds__min_clients=2)
    async with serving(config) as address, observing(address) as observer, clients_of(address, BOTH) as (ada, _):
        older = await ada.fetch_task()
        await ada.restart()
        newer = await ada.fetch_task()
        progress = Progress("training", 3, 10, 0.25)
        assert not await ada.rpc.heartbeat(older.lease_token, progress)
        assert await ada.rpc.heartbeat(newer.lease_token, progress)
        seen = (await observer.see()).assignments[0]
        assert (seen.activity, seen.step, seen.total_steps, seen.train_loss) == ("training", 3, 10, 0.25)
        assert await ada.rpc.fail_task(newer.lease_token, "out_of_memory", "rank 2 does not fit")
        assert not await ada.rpc.heartbeat(newer.lease_token, progress)
        seen = (await observer.see()).assignments[0]
        assert (seen.failures, seen.last_failure) == (1, "out_of_memory: rank 2 does not fit")


async def test_everybody_evaluates_what_was_published(tmp_path: Path) -> None:
    config = config_of(tmp_path, rounds__num_rounds=1, rounds__min_clients=2, rounds__evaluate_every=1)
    async with serving(config) as address, clients_of(address, BOTH) as (ada, bob):
        for client in (ada, bob):
            await client.do(await client.fetch_task())
        task = await ada.fetch_task()
        assert (task.kind, task.round) == (TaskKind.EVALUATE, 1)
        await asyncio.gather(ada.do(task), bob.work())
        assert (await ada.rpc.poll_task(30.0)).is_finished


# ---------------------------------------------------------------- starts that must fail


async def test_two_coordinators_cannot_share_a_state_folder(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    async with serving(config):
        with pytest.raises(StateInUse, match="another coordinator"):
            async with serving(config):
                pass


async def test_two_coordinators_cannot_share_a_port(tmp_path: Path) -> None:
    async with serving(config_of(tmp_path)) as address:
        with pytest.raises(ConfigError, match=f"server.listen: {address} cannot be bound; is another coordinator"):
            async with serving(config_of(tmp_path / "other", server__listen=address)):
                pass


@pytest.mark.parametrize("listen", ["0.0.0.0:0", "[::]:0"])
async def test_an_address_that_others_can_reach_needs_tls(tmp_path: Path, listen: str) -> None:
    with pytest.raises(ConfigError, match=r"server.listen: .*`raflora init FOLDER`.* or set server.insecure = true"):
        async with serving(config_of(tmp_path, server__listen=listen)):
            pass
    assert not (tmp_path / "state").exists()


async def test_a_founded_federation_cannot_be_given_other_settings(tmp_path: Path) -> None:
    async with serving(config_of(tmp_path)) as address, clients_of(address, {"ada": 2}):
        pass
    with pytest.raises(ConfigError, match=r"rounds\.num_rounds: 9, but federation 'digits' was founded with 2"):
        async with serving(config_of(tmp_path, rounds__num_rounds=9)):
            pass


def spec_file(folder: Path) -> str:
    file = folder / "spec.json"
    modules = [{"name": m.name, "out_features": m.out_features, "in_features": m.in_features} for m in SPEC.modules]
    tensors = [{"name": t.name, "shape": list(t.shape)} for t in SPEC.tensors]
    file.write_text(json.dumps({"base_model_digest": BASE_MODEL, "modules": modules, "tensors": tensors}))
    return str(file)


async def test_a_restart_may_change_when_rounds_open_and_close(tmp_path: Path) -> None:
    two = {"ada": 2, "bob": 4}
    config = config_of(tmp_path, rounds__min_clients=3)
    async with serving(config) as address, observing(address) as observer, clients_of(address, two):
        assert "2 of 3 are here" in (await observer.see()).explanation
    smaller = config_of(tmp_path, rounds__min_clients=2)
    async with serving(smaller) as address, observing(address) as observer:
        async for seen in observer.status.WatchStatus(status_pb2.WatchStatusRequest()):
            if seen.status.phase == status_pb2.PHASE_TRAINING:
                break
    assert [entry.kind for entry in entries_of(smaller)][-2:] == ["RulesChanged", "RoundOpened"]


async def test_the_operator_sees_why_a_worker_could_not_join(tmp_path: Path) -> None:
    config = config_of(tmp_path, model__base_model_digest=BASE_MODEL)
    async with serving(config) as address, observing(address) as observer:
        stranger = NumpyClient(address, "eve", 2, 10)
        try:
            with pytest.raises(BaseModelMismatch):
                await stranger.join(base_model="e" * 64)
        finally:
            await stranger.rpc.close()
        (warning,) = (await observer.see()).warnings
        assert warning.startswith("a worker could not join: client 'eve': base model eeeeeeeeeeee")


async def test_a_spec_file_founds_the_federation_before_anybody_joins(tmp_path: Path) -> None:
    config = config_of(tmp_path, adapter__spec=spec_file(tmp_path), rounds__min_clients=1)
    async with serving(config) as address, observing(address) as observer:
        async for answer in observer.status.WatchStatus(status_pb2.WatchStatusRequest(), timeout=60):
            if answer.status.phase == status_pb2.PHASE_WAITING_FOR_CLIENTS:
                break
        async with clients_of(address, {"ada": 2}) as (ada,):
            assert (await ada.fetch_task()).manifest_digest == answer.status.manifest_digest


async def test_with_a_spec_file_no_worker_is_waited_for(tmp_path: Path) -> None:
    config = config_of(tmp_path, adapter__spec=spec_file(tmp_path))
    service = CoordinatorService(config, MemoryJournal(), FileBlobs(tmp_path / "blobs"))
    try:
        assert service.explanation() == "being founded on adapter.spec"
    finally:
        service.close()


async def test_a_spec_file_whose_layers_are_too_narrow_ends_the_start(tmp_path: Path) -> None:
    config = config_of(tmp_path, adapter__spec=spec_file(tmp_path), adapter__global_rank=12)
    with pytest.raises(ConfigError, match=r"adapter.global_rank: global rank 12: module encoder.1.dense is 11 x 20"):
        await run_coordinator(config)


async def test_a_spec_file_of_another_base_model_ends_the_start(tmp_path: Path) -> None:
    other = digest_of(b"another base model")
    config = config_of(tmp_path, adapter__spec=spec_file(tmp_path), model__base_model_digest=other)
    with pytest.raises(BaseModelMismatch, match=f"adapter.spec: base model {BASE_MODEL[:12]}, but .*{other[:12]}"):
        await run_coordinator(config)


@pytest.mark.parametrize(
    ("spec", "complaint"), [("{", "is not what `raflora spec` writes"), (None, "cannot be read: No such file")]
)
async def test_a_bad_spec_file_is_told_as_a_config_error(tmp_path: Path, spec: str | None, complaint: str) -> None:
    file = tmp_path / "spec.json"
    if spec is not None:
        file.write_text(spec)
    process = CoordinatorProcess(tmp_path, settings_of(tmp_path, adapter__spec=str(file)))
    try:
        assert process.wait() == 2, process.output
        assert complaint in " ".join(" ".join(process.output).split())
        assert "Traceback" not in "".join(process.output)
        assert "listening" not in "".join(process.output), "who cannot be founded must not be called healthy"
    finally:
        process.close()
