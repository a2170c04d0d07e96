"""Tasks, slices and streams of a coordinator that wants more than it may have: the real agent, a real trainer process.

Each task that is out of bounds is given back with a typed reason, nothing is fetched for it, and worker and trainer
live on; whatever never ends is bounded. Time is a clock that jumps, so an hour of pauses is no wait.
"""

import asyncio
import hashlib
import json
import math
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
import tiny_trainer
from hostile_coordinator import CANARY, TERMINAL, Says, WatchedSite, refuse, watched_site
from raflora.v1 import federation_pb2 as pb
from worker_site import RANK, SLICE, SLICE_DIGEST, TRAINED, TRAINED_DIGEST, evaluate, train

from common.codec import Layout
from common.errors import InvalidRequest, WrongOffset
from worker.config import SitePolicy
from worker.downloads import KEPT_SLICES
from worker.forms import MAX_WARMUP_STEPS

HEADER_BYTES = len(Layout(tiny_trainer.SPEC, RANK).header)


@pytest.fixture
async def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[WatchedSite]:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", f"{CANARY}-environment")
    async with watched_site(tmp_path) as made:
        yield made
        made.assert_nothing_got_out()


# --- tasks

Change = Callable[[pb.Task], None]


def of(**changes: object) -> Change:
    """Changes fields of the task; `plan__batch_size` is one of its plan."""

    def change(task: pb.Task) -> None:
        for name, value in changes.items():
            part, _, field = name.partition("__")
            setattr(getattr(task, part) if field else task, field or part, value)

    return change


REFUSED: list[tuple[Change, str]] = [
    (of(lora_rank=0), "policy_refused"),
    (of(lora_rank=RANK + 1), "policy_refused"),
    (of(lora_rank=1_000_000_000), "policy_refused"),
    (of(scaling=math.nan), "invalid_request"),
    (of(scaling=math.inf), "invalid_request"),
    (of(scaling=1e300), "invalid_request"),
    (of(scaling=0.0), "invalid_request"),
    (of(scaling=-1.0), "invalid_request"),
    (of(plan__learning_rate=math.nan), "invalid_request"),
    (of(plan__learning_rate=-1.0), "invalid_request"),
    (of(plan__learning_rate=0.0), "policy_refused"),
    (of(plan__learning_rate=1e9), "policy_refused"),
    (of(plan__local_steps=(1 << 32) - 1), "policy_refused"),
    (of(plan__local_steps=0, plan__local_epochs=math.inf), "invalid_request"),
    (of(plan__local_steps=0, plan__local_epochs=1e308), "policy_refused"),
    (of(plan__local_steps=0, plan__local_epochs=0.0), "policy_refused"),
    (of(plan__batch_size=0), "invalid_request"),
    (of(plan__batch_size=1_000_000_000), "invalid_request"),
    (of(plan__weight_decay=math.nan), "invalid_request"),
    (of(plan__max_grad_norm=-1.0), "invalid_request"),
    (of(plan__max_grad_norm=math.inf), "invalid_request"),
    (of(plan__lora_dropout=math.nan), "invalid_request"),
    (of(plan__lora_dropout=1.0), "invalid_request"),
    (of(plan__warmup_steps=MAX_WARMUP_STEPS + 1), "invalid_request"),
    (of(manifest_digest="0dd0" * 16), "adapter_mismatch"),
    (of(manifest_digest=TERMINAL), "adapter_mismatch"),
    (of(adapter__digest="../../etc/passwd"), "invalid_request"),
    (of(adapter__digest="/etc/passwd"), "invalid_request"),
    (of(adapter__digest=SLICE_DIGEST.upper()), "invalid_request"),
    (of(adapter__size_bytes=10**15), "adapter_mismatch"),
    (of(adapter__size_bytes=0), "adapter_mismatch"),
    (of(lora_rank=RANK - 1), "adapter_mismatch"),
]


async def test_each_task_out_of_bounds_is_given_back_and_the_next_one_is_done(site: WatchedSite) -> None:
    tasks = [train(token) for token in range(1, len(REFUSED) + 2)]
    for task, (change, _) in zip(tasks, REFUSED, strict=False):
        change(task)
    site.script.tasks = tasks

    await site.work()

    expected = [(number, reason) for number, (_, reason) in enumerate(REFUSED, 1)]
    assert [(failure.lease_token, failure.reason) for failure in site.hostile.failures] == expected
    assert [update.lease_token for update in site.hostile.updates] == [len(REFUSED) + 1], "worker and trainer live on"
    assert site.hostile.served_bytes == len(SLICE), "nothing was fetched for a task that is refused"
    refusals = [json.loads(line) for line in site.refusals().splitlines()]
    assert [refusal["reason"] for refusal in refusals] == [reason for _, reason in REFUSED]
    assert all(failure.message.isprintable() for failure in site.hostile.failures)


async def test_extremes_that_mean_nothing_to_a_worker_change_nothing(site: WatchedSite) -> None:
    extreme = train(2)
    of(
        lease_token=(1 << 64) - 1,
        plan__seed=(1 << 64) - 1,
        plan__warmup_steps=MAX_WARMUP_STEPS,
        deadline_seconds=math.nan,
    )(extreme)
    backwards = train(1)
    of(round=(1 << 32) - 1, attempt=(1 << 32) - 1, deadline_seconds=-1e300)(backwards)
    site.script.tasks = [extreme, backwards]

    await site.work()

    assert [update.lease_token for update in site.hostile.updates] == [(1 << 64) - 1, 1]
    assert bytes(site.hostile.uploads[TRAINED_DIGEST]) == TRAINED
    assert set(site.hostile.uploads) == {TRAINED_DIGEST}


async def test_a_kind_of_task_that_nobody_knows_ends_the_worker(site: WatchedSite) -> None:
    site.script.tasks = [pb.Task.FromString(b"\x08\x07")]
    with pytest.raises(InvalidRequest, match="kind 7 is unknown"):
        await site.work()


# --- slices


def filled(start: bytes) -> bytes:
    """Hostile bytes of exactly the right length."""
    return start[: len(SLICE)] + bytes(len(SLICE) - len(start[: len(SLICE)]))


# Whoever unpickles it opens a file for writing: the mark that the test looks for.
PICKLED = f"cbuiltins\nopen\n(S'{CANARY}-unpickled'\nS'w'\ntR.".encode()
SLICES = {
    "not a number": SLICE[:HEADER_BYTES] + b"\xff\xff\xff\x7f" + SLICE[HEADER_BYTES + 4 :],
    "infinite": SLICE[:HEADER_BYTES] + b"\x00\x00\x80\x7f" + SLICE[HEADER_BYTES + 4 :],
    "pickled": filled(PICKLED),
    "zip": filled(b"PK\x03\x04" + b"\xff" * 40),
    "header of exabytes": filled(b"\xff" * 8),
    "nested header": filled((300).to_bytes(8, "little") + b"[" * 300),
    "other names": filled((40).to_bytes(8, "little") + b'{"../../etc/passwd":{"dtype":"F32"}}    '),
}


async def test_no_slice_that_is_not_exactly_the_adapter_is_trained_from(site: WatchedSite) -> None:
    site.script.tasks = [train(token, content=content) for token, content in enumerate(SLICES.values(), 1)]
    site.script.tasks.append(train(99))
    site.script.blobs |= {hashlib.sha256(content).hexdigest(): content for content in SLICES.values()}

    await site.work()

    reasons = [failure.reason for failure in site.hostile.failures]
    assert reasons == ["not_finite"] * 2 + ["adapter_mismatch"] * 5
    assert [update.lease_token for update in site.hostile.updates] == [99]
    assert len(list((site.state_dir / "slices").iterdir())) <= KEPT_SLICES
    assert not list(Path.cwd().glob(f"{CANARY}*"))


async def endless(*_: object) -> AsyncIterator[pb.DownloadAdapterResponse]:
    while True:
        yield pb.DownloadAdapterResponse(data=bytes(1024))


async def empty(*_: object) -> AsyncIterator[pb.DownloadAdapterResponse]:
    while True:
        yield pb.DownloadAdapterResponse()


async def damaged(*_: object) -> AsyncIterator[pb.DownloadAdapterResponse]:
    yield pb.DownloadAdapterResponse(data=b"\x01" * len(SLICE))


async def trickle(request: pb.DownloadAdapterRequest, _: object) -> AsyncIterator[pb.DownloadAdapterResponse]:
    yield pb.DownloadAdapterResponse(data=SLICE[request.offset : request.offset + 1])
    await asyncio.Event().wait()


async def truncated(request: pb.DownloadAdapterRequest, _: object) -> AsyncIterator[pb.DownloadAdapterResponse]:
    if not request.offset:
        yield pb.DownloadAdapterResponse(data=SLICE[:10])


@pytest.mark.parametrize(
    ("says", "reason"),
    [
        (endless, "wrong_size"),
        (empty, "corrupt_transfer"),
        (damaged, "corrupt_transfer"),
        (trickle, "time_limit"),
        (truncated, "time_limit"),
    ],
)
async def test_a_stream_that_is_not_the_slice_ends_within_bounds(site: WatchedSite, says: Says, reason: str) -> None:
    site.script.tasks = [train(1)]
    site.hostile.says["DownloadAdapter"] = says

    await site.work(SitePolicy(max_task_seconds=0.5))

    (failure,) = site.hostile.failures
    assert failure.reason == reason
    kept = [path.stat().st_size for path in (site.state_dir / "slices").iterdir()]
    assert sum(kept) <= len(SLICE)
    assert site.hostile.updates == []


# --- uploads and submissions


@pytest.mark.parametrize("committed_bytes", [len(TRAINED) + 1, (1 << 64) - 1])
async def test_more_committed_bytes_than_there_are_make_nothing_leave(site: WatchedSite, committed_bytes: int) -> None:
    site.script.tasks = [train(1)]
    site.hostile.says["BeginUpload"] = lambda *_: pb.BeginUploadResponse(committed_bytes=committed_bytes)

    await site.work()

    assert site.hostile.calls["UploadAdapter"] == 0


async def test_an_offset_that_goes_back_and_forth_is_not_followed_for_ever(site: WatchedSite) -> None:
    site.script.tasks = [train(1)]
    offsets = iter(range(1 << 30))

    def back_and_forth(_: object, context: object) -> object:
        return refuse(context, WrongOffset("elsewhere", committed_bytes=next(offsets) % 2))

    site.hostile.says["BeginUpload"] = back_and_forth

    await site.work()

    (failure,) = site.hostile.failures
    assert failure.reason == "corrupt_transfer"
    assert site.hostile.calls["BeginUpload"] < 10


async def test_an_outcome_that_nobody_knows_is_given_back_with_a_reason(site: WatchedSite) -> None:
    site.script.tasks = [train(1)]
    site.hostile.says["SubmitUpdate"] = lambda *_: pb.SubmitUpdateResponse.FromString(b"\x08\x4d")

    await site.work()

    assert [failure.reason for failure in site.hostile.failures] == ["invalid_request"]


# --- for ever


def until(site: WatchedSite, seconds: float, says: Says) -> Says:
    """Says it until so many seconds have passed on the worker's clock, and then that all is over."""

    def answer(request: object, context: object) -> object:
        return pb.PollTaskResponse(finished=True) if site.time.seconds >= seconds else says(request, context)

    return answer


def until_refused(site: WatchedSite, task: pb.Task) -> Says:
    """Hands out the same task until the worker has refused it twice, or has done it far too often."""

    def answer(*_: object) -> pb.PollTaskResponse:
        done = len(site.hostile.updates) + len(site.hostile.evaluations)
        return pb.PollTaskResponse(task=task, finished=len(site.hostile.failures) > 1 or done > 9)

    return answer


async def test_an_idle_worker_asks_at_most_once_a_second_however_fast_it_is_answered(site: WatchedSite) -> None:
    site.hostile.says["PollTask"] = until(site, 600, lambda *_: pb.PollTaskResponse())

    await site.work()

    assert site.hostile.calls["PollTask"] <= 601


async def test_tasks_that_are_handed_out_and_taken_back_do_not_keep_a_worker_busy(site: WatchedSite) -> None:
    site.script.directive = pb.LEASE_DIRECTIVE_STOP
    site.hostile.says["DownloadAdapter"] = trickle
    site.hostile.says["PollTask"] = until(site, 600, lambda *_: pb.PollTaskResponse(task=train(1)))

    await site.work()

    assert site.hostile.calls["PollTask"] <= 60
    assert site.hostile.calls["Heartbeat"] <= 120


async def test_tasks_that_are_all_refused_do_not_keep_a_worker_busy(site: WatchedSite) -> None:
    foreign = train(1, learning_rate=9.0)
    site.hostile.says["PollTask"] = until(site, 600, lambda *_: pb.PollTaskResponse(task=foreign))

    await site.work()

    assert site.hostile.calls["PollTask"] <= 60


async def test_evaluations_in_an_endless_row_end_with_the_sites_budget_and_so_they_do_after_a_restart(
    site: WatchedSite,
) -> None:
    policy = SitePolicy(max_evaluations=2)
    site.hostile.says["PollTask"] = until_refused(site, evaluate(1))

    await site.work(policy)
    assert len(site.hostile.evaluations) == 2
    assert {failure.reason for failure in site.hostile.failures} == {"policy_refused"}

    site.hostile.failures.clear()
    await site.work(policy)
    assert len(site.hostile.evaluations) == 2


async def test_trainings_in_an_endless_row_end_with_the_sites_budget(site: WatchedSite) -> None:
    site.hostile.says["PollTask"] = until_refused(site, train(1))

    await site.work(SitePolicy(max_updates=3))

    assert len(site.hostile.updates) == 3
    assert "3 train results have left; 3 are allowed in all" in site.refusals()


async def test_a_site_that_sends_no_metrics_sends_none_at_all(site: WatchedSite) -> None:
    site.script.tasks = [train(1), evaluate(2)]

    await site.work(SitePolicy(may_send_metrics=False))

    (update,) = site.hostile.updates
    assert dict(update.metrics) == {}
    assert [failure.reason for failure in site.hostile.failures] == ["policy_refused"]
    beats = [pb.HeartbeatRequest.FromString(raw) for raw in site.hostile.heard if b"training" in raw]
    assert all(beat.progress.train_loss == 0.0 for beat in beats)


async def test_a_slice_larger_than_the_site_lets_through_is_refused_before_its_first_byte(site: WatchedSite) -> None:
    site.script.tasks = [train(1)]

    await site.work(SitePolicy(max_update_bytes=len(SLICE) - 1))

    assert [failure.reason for failure in site.hostile.failures] == ["policy_refused"]
    assert site.hostile.served_bytes == 0
