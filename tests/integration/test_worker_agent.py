"""The real agent and a real trainer process against a real gRPC server that says what each test needs."""

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import tiny_trainer
from raflora.v1 import federation_pb2 as pb
from structlog.contextvars import merge_contextvars
from structlog.testing import capture_logs
from worker_site import RANK, SLICE, SLICE_DIGEST, TRAINED, TRAINED_DIGEST, Site, evaluate, scripted_site, train

from common.errors import Evicted, IdentityConflict, LeaseSuperseded, ProtocolTooOld, Unavailable, UnknownClient
from worker.client import CoordinatorClient, Credentials
from worker.config import CoordinatorAddress, SitePolicy, TlsConfig
from worker.identity import is_alive
from worker.policy import PolicyRefused


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    async with scripted_site(tmp_path) as made:
        yield made


async def test_a_worker_trains_then_evaluates_and_ends_with_the_federation(site: Site) -> None:
    site.script.tasks = [train(1), evaluate(2)]

    await site.work()

    (join,) = site.coordinator.joins
    assert (join.client_id, join.profile.max_rank, join.profile.num_examples) == ("ada", RANK, 40)
    assert join.enrol_key == (site.state_dir / "enrol-key").read_text().strip()
    assert [module.name for module in join.spec.modules] == ["q_proj", "v_proj"]
    (update,) = site.coordinator.updates
    assert (update.lease_token, update.round, update.num_examples, update.slice_digest) == (1, 1, 40, SLICE_DIGEST)
    assert bytes(site.coordinator.uploads[update.blob.digest]) == TRAINED
    (evaluation,) = site.coordinator.evaluations
    assert (evaluation.lease_token, dict(evaluation.metrics)) == (2, {"accuracy": 0.5})
    assert site.coordinator.served_bytes == len(SLICE), "the evaluation needs the same slice: no second download"
    assert site.coordinator.departures == []
    assert is_alive(site.state_dir, max_age_seconds=60, now=1e9 + 59)


async def test_the_egress_report_says_exactly_what_left(site: Site) -> None:
    site.script.tasks = [train(1), evaluate(2)]

    await site.work()

    join, update, evaluation = map(json.loads, (site.state_dir / "egress.jsonl").read_text().splitlines())
    (sent,) = site.coordinator.joins
    assert (join["kind"], join["digest"], join["lora_rank"]) == ("join", sent.base_model_digest, RANK)
    assert (join["num_tensors"], join["num_examples"], join["size_bytes"]) == (3, sent.profile.num_examples, 0)
    assert sent.profile.num_eval_examples > 0
    assert join["words"] == (
        f"device {sent.profile.device}, {sent.profile.memory_bytes} bytes of memory; "
        f"evaluates on {sent.profile.num_eval_examples} examples"
    )
    assert update == {
        "time": "2001-09-09T01:46:40+00:00",
        "kind": "update",
        "round": 1,
        "attempt": 1,
        "digest": TRAINED_DIGEST,
        "size_bytes": len(TRAINED),
        "num_tensors": 5,
        "dtype": "float32",
        "lora_rank": RANK,
        "num_examples": 40,
        "metrics": {"train_loss": 0.25},
        "words": "",
    }
    assert (evaluation["kind"], evaluation["size_bytes"], evaluation["metrics"]) == ("evaluation", 0, {"accuracy": 0.5})


async def test_an_upload_that_is_cut_goes_on_at_the_committed_byte(site: Site) -> None:
    site.script.tasks = [train()]
    site.script.cut_uploads_after = [100, 50]

    await site.work()

    assert bytes(site.coordinator.uploads[TRAINED_DIGEST]) == TRAINED
    assert len(site.coordinator.updates) == 1
    assert sorted(set(site.coordinator.offsets)) == [0, 100, 150]


async def test_a_task_that_another_process_holds_by_now_is_dropped_and_not_given_back(site: Site) -> None:
    site.script.tasks = [train(1), train(2)]
    site.script.refused_announcements = [LeaseSuperseded("lease 1 was followed by 2")]

    await site.work()

    assert site.coordinator.failures == []
    assert [u.lease_token for u in site.coordinator.updates] == [2]


async def test_a_download_that_is_cut_goes_on_where_it_broke_off(site: Site) -> None:
    site.script.tasks = [train()]
    site.script.cut_downloads_after = [64, 128]

    await site.work()

    assert site.coordinator.served_bytes == len(SLICE), "no byte came twice"
    assert len(site.coordinator.updates) == 1


async def test_a_damaged_download_is_fetched_again(site: Site) -> None:
    site.script.tasks = [train()]
    site.script.damaged_downloads = 1

    await site.work()

    assert site.coordinator.served_bytes == 2 * len(SLICE)
    assert len(site.coordinator.updates) == 1


async def test_a_download_that_stays_damaged_fails_the_task_and_not_the_worker(site: Site) -> None:
    site.script.tasks = [train(1), train(2)]
    site.script.damaged_downloads = 3

    await site.work()

    assert [(f.lease_token, f.reason) for f in site.coordinator.failures] == [(1, "corrupt_transfer")]
    assert [u.lease_token for u in site.coordinator.updates] == [2]


async def test_a_slice_of_the_wrong_size_is_refused_before_a_byte_is_fetched(site: Site) -> None:
    site.script.tasks = [train(1, content=SLICE + b"more")]

    await site.work()

    (failure,) = site.coordinator.failures
    assert failure.reason == "adapter_mismatch"
    assert str(len(SLICE)) in failure.message
    assert site.coordinator.served_bytes == 0


async def test_a_task_of_another_manifest_is_refused(site: Site) -> None:
    foreign = train(1)
    foreign.manifest_digest = "0dd" * 20
    site.script.tasks = [foreign, train(2)]

    await site.work()

    (failure,) = site.coordinator.failures
    assert (failure.lease_token, failure.reason) == (1, "adapter_mismatch")
    assert "a task of the manifest 0dd0dd0dd0dd, but this worker joined fed0fed0fed0" in failure.message
    assert [u.lease_token for u in site.coordinator.updates] == [2]


async def test_the_coordinator_hears_at_once_what_is_being_done(site: Site) -> None:
    site.script.tasks = [train()]
    site.mishaps("wait_at_gate")
    site.time.stands_still = True  # no interval ever passes
    gate = site.folder / "gate"
    os.mkfifo(gate)
    with capture_logs() as logs:
        async with site.working() as worker:
            await site.coordinator.heard_of["training"].wait()
            await asyncio.to_thread(gate.write_bytes, b"go")
            await worker
    assert site.coordinator.activities[:2] == ["downloading", "training"]
    (told,) = [line for line in logs if line["event"] == "training"]
    assert (told["round"], told["rank"], told["examples"]) == (1, RANK, 40)


async def test_every_line_after_the_handshake_names_the_federation(site: Site) -> None:
    with capture_logs(processors=[merge_contextvars]) as logs:
        await site.work()
    assert {line["federation"] for line in logs} == {"scripted"}


async def test_a_worker_that_comes_first_waits_for_the_coordinator_and_says_why(site: Site) -> None:
    await site.coordinator.stop()
    with capture_logs() as logs:
        async with site.working() as worker:
            await site.time.backed_off.wait()
            await site.coordinator.start()
            await worker
    address = f"127.0.0.1:{site.coordinator.port}"
    said = [line["event"] for line in logs]
    assert f"coordinator {address} cannot be reached: connection refused; trying again" in said
    assert "the coordinator is back" in said
    assert all(0.5 <= pause <= 30 for pause in site.time.pauses)


@pytest.mark.parametrize(
    "outcome",
    [
        pb.SUBMIT_OUTCOME_SUPERSEDED,
        pb.SUBMIT_OUTCOME_STALE,
        pb.SUBMIT_OUTCOME_ROUND_CLOSED,
        pb.SUBMIT_OUTCOME_DUPLICATE,
    ],
)
async def test_an_outcome_is_normal_life_and_the_worker_goes_on(site: Site, outcome: pb.SubmitOutcome) -> None:
    site.script.tasks = [train(1), train(2)]
    site.script.outcome = outcome

    await site.work()

    assert [u.lease_token for u in site.coordinator.updates] == [1, 2]
    assert site.coordinator.failures == []


async def test_what_the_site_does_not_allow_is_refused_and_nothing_leaves(site: Site) -> None:
    site.script.tasks = [train(1, learning_rate=0.5), train(2)]

    await site.work(SitePolicy(max_learning_rate=0.2))

    (failure,) = site.coordinator.failures
    assert (failure.lease_token, failure.reason) == (1, "policy_refused")
    assert failure.message == "site policy: round 1 asks for learning rate 0.5; at most 0.2 is allowed here"
    assert [u.lease_token for u in site.coordinator.updates] == [2]


async def test_a_base_model_that_the_site_does_not_allow_ends_the_worker_before_it_loads(site: Site) -> None:
    site.script.base_model_digest = "bad0" * 16

    with pytest.raises(PolicyRefused, match="the federation scripted is the base model bad0bad0bad0"):
        await site.work(SitePolicy(allowed_base_models=(tiny_trainer.BASE_MODEL_DIGEST,)))
    assert site.coordinator.joins == []


async def test_a_coordinator_that_forgot_its_clients_is_joined_again(site: Site) -> None:
    site.script.poll_errors = [UnknownClient("ada never joined")]
    site.script.tasks = [train()]

    await site.work()

    first, second = site.coordinator.joins
    assert first.enrol_key == second.enrol_key
    assert len(site.coordinator.updates) == 1


async def test_an_evicted_worker_ends_and_says_so(site: Site) -> None:
    site.script.poll_errors = [Evicted("client ada was evicted by the operator")]

    with pytest.raises(Evicted, match="ada was evicted by the operator"):
        await site.work()
    assert len(site.coordinator.joins) == 1


async def test_another_worker_of_this_name_ends_the_worker_at_once(site: Site) -> None:
    site.script.refused_joins = {1: IdentityConflict("another worker is ada")}

    with pytest.raises(IdentityConflict, match="another worker is ada"):
        await site.work()
    assert len(site.coordinator.joins) == 1


async def test_a_server_that_is_no_coordinator_ends_the_worker(site: Site) -> None:
    await site.coordinator.stop()
    await site.coordinator.start(serves_federation=False)

    with pytest.raises(ProtocolTooOld, match="does not speak raflora"):
        await site.work()


def test_the_agent_never_imports_torch() -> None:
    heavy = "torch transformers peft datasets accelerate"
    code = f"import sys, worker.run; print([m for m in '{heavy}'.split() if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


async def test_a_worker_that_terminates_without_a_coordinator_does_not_wait_for_it(site: Site) -> None:
    await site.coordinator.stop()
    with capture_logs() as logs:
        async with site.working():
            await site.time.backed_off.wait()
    assert logs[-1]["event"] == "left without a goodbye"


async def test_tls_to_a_coordinator_in_the_clear_says_handshake(site: Site) -> None:
    where = CoordinatorAddress(address=f"127.0.0.1:{site.coordinator.port}", tls=TlsConfig())
    client = CoordinatorClient(where, Credentials("ada", "key", "0"))
    with pytest.raises(Unavailable, match="cannot be reached: it does not speak TLS"):
        await client.handshake()
    await client.close()
