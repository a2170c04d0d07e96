"""The real agent and a real trainer process against a real gRPC server that says what each test needs."""

import asyncio
import hashlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import tiny_trainer
from raflora.v1 import federation_pb2 as pb
from scripted_coordinator import Script, ScriptedCoordinator
from structlog.testing import capture_logs

from common.adapter import initial_adapter
from common.codec import Layout, decode, encode
from common.errors import IdentityConflict, ProtocolTooOld, Unavailable, UnknownClient
from worker.client import CoordinatorClient, Credentials
from worker.config import CoordinatorAddress, DataConfig, ModelConfig, SitePolicy, TlsConfig, WorkerConfig
from worker.contact import Clock, pause_seconds
from worker.identity import is_alive
from worker.policy import PolicyRefused
from worker.run import work
from worker.supervisor import TaskFailed

TRAINER = (sys.executable, tiny_trainer.__file__)
RANK = 4
SLICE = encode(initial_adapter(tiny_trainer.SPEC, RANK, seed=7))
SLICE_DIGEST = hashlib.sha256(SLICE).hexdigest()
TRAINED = encode(tiny_trainer.trained(decode(SLICE, Layout(tiny_trainer.SPEC, RANK), "slice")))
TRAINED_DIGEST = hashlib.sha256(TRAINED).hexdigest()


class InstantClock:
    """Every pause ends at once, unless the test holds it; all are written down."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.pauses: list[float] = []
        self.backed_off = asyncio.Event()  # a call has failed

    async def sleep(self, seconds: float) -> None:
        self.pauses.append(seconds)
        self.seconds += seconds
        if seconds == pause_seconds(failures=1, chance=0.5):
            self.backed_off.set()
        await asyncio.sleep(0)

    @property
    def clock(self) -> Clock:
        return Clock(now=lambda: self.seconds, sleep=self.sleep, chance=lambda: 0.5, wall_time=lambda: 1e9)


@dataclass
class Site:
    """A worker that is not running yet, and the coordinator it will find."""

    coordinator: ScriptedCoordinator
    folder: Path
    time: InstantClock

    @property
    def script(self) -> Script:
        return self.coordinator.script

    @property
    def state_dir(self) -> Path:
        return self.folder / "state"

    def has_trainer(self) -> bool:
        pid = (self.folder / "pid").read_text()
        return Path(f"/proc/{pid}").exists()

    def mishaps(self, *what: str) -> None:
        (self.folder / "mishaps").write_text("".join(f"{one}\n" for one in what))

    def config(self, policy: SitePolicy = SitePolicy()) -> WorkerConfig:
        return WorkerConfig(
            name="ada",
            rank=RANK,
            state_dir=self.state_dir,
            coordinator=CoordinatorAddress(address=f"127.0.0.1:{self.coordinator.port}", rpc_timeout_seconds=5),
            model=ModelConfig(path=str(self.folder)),
            data=DataConfig(train="none"),
            policy=policy,
        )

    async def work(self, policy: SitePolicy = SitePolicy()) -> None:
        self.state_dir.mkdir(exist_ok=True)
        await work(self.config(policy), TRAINER, self.time.clock)

    @asynccontextmanager
    async def working(self) -> AsyncIterator[asyncio.Task[None]]:
        task = asyncio.create_task(self.work())
        try:
            yield task
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    coordinator = ScriptedCoordinator(Script(blobs={SLICE_DIGEST: SLICE}))
    await coordinator.start()
    yield Site(coordinator, tmp_path, InstantClock())
    await coordinator.stop()


def train(lease_token: int = 1, *, learning_rate: float = 0.1, content: bytes = SLICE) -> pb.Task:
    return pb.Task(
        kind=pb.TASK_KIND_TRAIN,
        round=lease_token,
        attempt=1,
        lease_token=lease_token,
        lora_rank=RANK,
        scaling=1.0,
        adapter=pb.BlobReference(digest=hashlib.sha256(content).hexdigest(), size_bytes=len(content)),
        plan=pb.TrainingPlan(learning_rate=learning_rate, local_steps=2, batch_size=4),
    )


def evaluate(lease_token: int = 2) -> pb.Task:
    task = train(lease_token)
    task.kind = pb.TASK_KIND_EVALUATE
    return task


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

    update, evaluation = map(json.loads, (site.state_dir / "egress.jsonl").read_text().splitlines())
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
    }
    assert (evaluation["kind"], evaluation["size_bytes"], evaluation["metrics"]) == ("evaluation", 0, {"accuracy": 0.5})


async def test_an_upload_that_is_cut_goes_on_at_the_committed_byte(site: Site) -> None:
    site.script.tasks = [train()]
    site.script.cut_uploads_after = [100, 50]

    await site.work()

    assert bytes(site.coordinator.uploads[TRAINED_DIGEST]) == TRAINED
    assert len(site.coordinator.updates) == 1
    assert sorted(set(site.coordinator.offsets)) == [0, 100, 150]


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


async def test_training_goes_on_while_the_coordinator_restarts(site: Site) -> None:
    site.script.tasks = [train()]
    site.mishaps("wait_at_gate")
    gate = site.folder / "gate"
    os.mkfifo(gate)
    async with site.working() as worker:
        await site.coordinator.training.wait()
        await site.coordinator.stop()
        await asyncio.to_thread(gate.write_bytes, b"go")
        await site.time.backed_off.wait()  # it has trained, and cannot upload yet
        await site.coordinator.start()
        await worker
    assert [u.lease_token for u in site.coordinator.updates] == [1]
    assert len(site.coordinator.joins) == 1, "a restart is no reason to join again"


@pytest.mark.parametrize(
    ("mishap", "reason", "message"),
    [
        ("crash", "trainer_died", "signal SIGKILL (often the system, short of memory): the last words"),
        ("exit", "trainer_died", "exit code 7: no kernel image is available"),
        ("babble", "trainer_died", "no message"),
        ("out_of_memory", "out_of_memory", "rank 4 does not fit"),
        ("nan", "not_finite", "head holds nan"),
    ],
)
async def test_a_trainer_that_fails_costs_one_task(site: Site, mishap: str, reason: str, message: str) -> None:
    site.script.tasks = [train(1), train(2)]
    site.mishaps(mishap)

    await site.work()

    (failure,) = site.coordinator.failures
    assert (failure.lease_token, failure.reason) == (1, reason)
    assert message in failure.message
    assert [u.lease_token for u in site.coordinator.updates] == [2]


async def test_a_trainer_that_cannot_load_again_fails_that_task_and_is_started_anew_for_the_next(site: Site) -> None:
    site.script.tasks = [train(1), train(2), train(3)]
    site.mishaps("crash", "load_fails")

    await site.work()

    assert [(f.lease_token, f.reason) for f in site.coordinator.failures] == [(1, "trainer_died"), (2, "data_error")]
    assert [u.lease_token for u in site.coordinator.updates] == [3]


async def test_a_site_that_cannot_load_says_why_and_does_not_join(site: Site) -> None:
    site.mishaps("load_fails")

    with pytest.raises(TaskFailed, match=r"data\.train: there is no such file"):
        await site.work()
    assert site.coordinator.joins == []


async def test_a_task_that_takes_too_long_is_given_back(site: Site) -> None:
    site.script.tasks = [train(1), train(2)]
    site.mishaps("hang")

    await site.work(SitePolicy(max_task_seconds=2))

    (failure,) = site.coordinator.failures
    assert (failure.reason, failure.message) == ("time_limit", "trainer: train took longer than 2 s")
    assert [u.lease_token for u in site.coordinator.updates] == [2]


async def test_stop_kills_the_work_and_the_next_task_is_done(site: Site) -> None:
    site.script.tasks = [train(1)]
    site.script.finishes = False
    site.mishaps("hang")
    async with site.working() as worker:
        await site.coordinator.training.wait()
        site.coordinator.polled.clear()
        site.script.directive = pb.LEASE_DIRECTIVE_STOP
        await site.coordinator.polled.wait()
        site.script.directive = pb.LEASE_DIRECTIVE_CONTINUE
        site.script.tasks = [train(2)]
        site.script.finishes = True
        await worker
    assert [u.lease_token for u in site.coordinator.updates] == [2]
    assert site.coordinator.failures == [], "a task that was taken back is not a failed one"


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
    site.script.poll_errors = [UnknownClient("ada was evicted")]
    site.script.refused_joins = {2: UnknownClient("ada was evicted by the operator")}

    with pytest.raises(UnknownClient, match="does not let ada in any more: ada was evicted by the operator"):
        await site.work()


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


async def test_a_cancelled_worker_leaves_and_no_trainer_survives(site: Site) -> None:
    site.script.tasks = [train()]
    site.mishaps("hang")
    async with site.working():
        await site.coordinator.training.wait()
    assert site.coordinator.departures == ["ada"]
    assert not site.has_trainer()


def test_the_agent_never_imports_torch() -> None:
    heavy = "torch transformers peft datasets accelerate"
    code = f"import sys, worker.run; print([m for m in '{heavy}'.split() if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


async def test_sigterm_stops_the_trainer_and_leaves_in_an_orderly_way(site: Site) -> None:
    site.script.tasks = [train()]
    site.mishaps("hang")
    async with site.working() as worker:
        await site.coordinator.training.wait()
        os.kill(os.getpid(), signal.SIGTERM)
        await worker  # an order that was followed is no error
    assert site.coordinator.departures == ["ada"]
    assert not site.has_trainer()


async def test_a_worker_that_terminates_without_a_coordinator_does_not_wait_for_it(site: Site) -> None:
    await site.coordinator.stop()
    with capture_logs() as logs:
        async with site.working():
            await site.time.backed_off.wait()
    assert logs[-1]["event"] == "left without a goodbye"


async def test_tls_to_a_coordinator_in_the_clear_says_handshake(site: Site) -> None:
    where = CoordinatorAddress(address=f"127.0.0.1:{site.coordinator.port}", tls=TlsConfig())
    client = CoordinatorClient(where, Credentials("ada", "key", "0"))
    with pytest.raises(Unavailable, match="cannot be reached: TLS handshake failed"):
        await client.handshake()
    await client.close()
