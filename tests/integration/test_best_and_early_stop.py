"""Evaluators, the best adapter and the early stop over the wire, through kill -9: what is counted, kept and served."""

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from coordinators import (
    BASE_MODEL,
    SPEC,
    CoordinatorProcess,
    NumpyClient,
    Observer,
    config_of,
    observing,
    serving,
    settings_of,
)
from raflora.v1 import status_pb2 as pb

from common.channel import REASON_KEY
from common.codec import digest_of
from common.version import PROTOCOL
from coordinator.stores.blobs import FileBlobs
from worker.messages import Enrolment, Evaluation, Outcome, RankProfile, Task, TaskKind

RANKS = {"ada": 2, "bob": 4, "cem": 4}
ACCURACIES = {1: 0.5, 2: 0.875, 3: 0.5, 4: 0.625}  # by round
STOPPED = "no improvement of accuracy for 2 evaluations; best 0.875 in round 2"


@dataclass
class ScoredClient(NumpyClient):
    """A client whose accuracy is the round's; it may be an evaluator."""

    evaluates_only: bool = False
    accuracies: Mapping[int, float] = field(default_factory=lambda: ACCURACIES)

    async def join(self, base_model: str = BASE_MODEL) -> None:
        profile = RankProfile(self.rank, "cpu", 1 << 30, self.num_examples, evaluates_only=self.evaluates_only)
        await self.rpc.join(Enrolment(PROTOCOL, profile, base_model, SPEC))

    async def do(self, task: Task) -> Outcome:
        if task.kind is TaskKind.TRAIN:
            assert not self.evaluates_only
            return await super().do(task)
        await self.download(task)
        metrics = {"accuracy": self.accuracies[task.round], "eval_loss": float(task.lora_rank)}
        return await self.rpc.submit_evaluation(Evaluation(task, self.num_examples, metrics))


@asynccontextmanager
async def crew_of(address: str, evaluator: bool = True) -> AsyncIterator[list[ScoredClient]]:
    """Eve, who evaluates 1,000 examples at rank 8 and finds everything worse, and three who train."""
    eve = ScoredClient(address, "eve", 8, 1_000, evaluates_only=True, accuracies=dict.fromkeys(range(1, 10), 0.25))
    crew = [eve] if evaluator else []
    crew += [ScoredClient(address, name, rank, 10 * (i + 1)) for i, (name, rank) in enumerate(RANKS.items())]
    try:
        for client in crew:
            await client.join()
        yield crew
    finally:
        for client in crew:
            await client.rpc.close()


async def play_round(crew: Sequence[ScoredClient]) -> None:
    """One round from its opening to the end of its evaluation."""
    for client in crew:
        if not client.evaluates_only:
            assert await client.do(await client.fetch_task()) is Outcome.ACCEPTED
    for client in crew:
        task = await client.fetch_task()
        assert task.kind is TaskKind.EVALUATE
        assert await client.do(task) is Outcome.ACCEPTED


async def fetch(observer: Observer, **asked: Any) -> tuple[pb.AdapterHeader, bytes]:
    call = observer.status.FetchAdapter(pb.FetchAdapterRequest(**asked), timeout=60)
    parts = [part async for part in call]
    return parts[0].header, b"".join(part.data for part in parts[1:])


def settings(folder: Path, **changes: Any) -> dict[str, Any]:
    return settings_of(
        folder,
        **{"rounds__num_rounds": 9, "rounds__evaluate_every": 1, "evaluation__patience": 2, "store__keep_rounds": 1}
        | changes,
    )


async def test_the_best_adapter_outlives_later_rounds_and_kills_and_patience_ends_the_federation(
    tmp_path: Path,
) -> None:
    process = CoordinatorProcess(tmp_path, settings(tmp_path))
    try:
        address = process.wait_until_listening()
        async with crew_of(address) as crew, observing(address) as observer:
            await play_round(crew)
            await play_round(crew)
            newest_then = await fetch(observer, lora_rank=3)
            assert (await observer.see()).best.round == 2
            await crew[1].do(await crew[1].fetch_task())  # round 3 has begun
        process.kill()
        process.close()

        process = CoordinatorProcess(tmp_path, settings(tmp_path))
        address = process.wait_until_listening()
        async with crew_of(address) as crew, observing(address) as observer:
            for client in crew[2:]:
                await client.do(await client.fetch_task())
            for client in crew:
                await client.do(await client.fetch_task())
            await play_round(crew)
            status = await observer.finished()
            assert (status.round, status.num_rounds, status.last_round.round) == (4, 9, 4)
            assert status.explanation == f"finished early, after 4 of 9 rounds: {STOPPED}"
            best = status.best
            assert (best.round, best.metric, best.value, best.source) == (2, "accuracy", 0.875, "federated")
            assert (best.evaluations_since, best.patience) == (2, 2)
            polled = await crew[0].rpc.poll_task(0.0)
            assert (polled.is_finished, polled.status_sentence) == (True, status.explanation)
            header, content = await fetch(observer, lora_rank=3, best=True)
            assert (header.round, header.lora_rank, header.digest) == (2, 3, digest_of(content))
            assert (header, content) == newest_then
            _, rest = await fetch(observer, lora_rank=3, best=True, digest=header.digest, offset=100)
            assert rest == content[100:]
            assert (await fetch(observer, lora_rank=3))[0].round == 4
            adapters = {best.digest, status.adapter_digest}
        assert process.terminate() == 0, process.output
        assert f'"early": "{STOPPED}"' in "".join(process.output)
    finally:
        process.close()
    assert adapters <= FileBlobs(tmp_path / "state" / "blobs").digests()


async def test_the_scores_of_a_round_are_those_of_who_trains_of_each_rank_and_of_the_evaluators(
    tmp_path: Path,
) -> None:
    config = config_of(tmp_path, rounds__evaluate_every=1, evaluation__source="central")
    async with serving(config) as address, observing(address) as observer, crew_of(address) as crew:
        crew[1].accuracies = {1: 0.25}
        await play_round(crew)
        status = await observer.see()
        last, clients = status.last_round, (await observer.status.ListClients(pb.ListClientsRequest())).clients
    # ada 10 examples at 0.25, bob 20 and cem 30 at 0.5
    assert last.accuracy == last.federated_metrics["accuracy"] == pytest.approx((10 * 0.25 + 50 * 0.5) / 60)
    assert last.eval_loss == pytest.approx((10 * 2 + 50 * 4) / 60)
    assert dict(last.central_metrics) == {"accuracy": 0.25, "eval_loss": 8.0}
    levels = [
        (level.lora_rank, level.clients, level.num_examples, level.metrics["accuracy"]) for level in last.rank_levels
    ]
    assert levels == [(2, 1, 10, 0.25), (4, 2, 50, 0.5)]
    assert [e.client_id for e in last.evaluations if e.central] == ["eve"]
    assert (status.best.source, status.best.value) == ("central", 0.25)
    assert [(p.low, p.high, p.contributors) for p in last.partitions] == [(0, 2, 3), (2, 4, 2), (4, 8, 0)]
    assert sum(c.num_examples for c in last.contributions) == 60
    assert (status.forecast.smallest_rank, status.forecast.largest_rank) == (2, 4)
    assert [(c.client_id, c.lora_rank) for c in clients if c.evaluates_only] == [("eve", 8)]


async def test_a_metric_that_nobody_tells_is_warned_of_once_and_there_is_no_best_adapter(tmp_path: Path) -> None:
    config = config_of(
        tmp_path, rounds__evaluate_every=1, evaluation__metric="f1", evaluation__patience=1, rounds__num_rounds=3
    )
    async with serving(config) as address, observing(address) as observer, crew_of(address, evaluator=False) as crew:
        assert await refusal(observer) == ("FAILED_PRECONDITION", "nothing_published")
        for _ in range(3):
            await play_round(crew)
        status = await observer.finished()
        assert [w for w in status.warnings if "f1" in w] == [
            "evaluation.metric 'f1' was not among accuracy, eval_loss: round 3 does not count for the best adapter, "
            "nor for evaluation.patience; [evaluation] may be corrected with a restart (docs/best-adapter.md)"
        ]
        assert (status.round, status.HasField("best")) == (3, False)
        assert await refusal(observer) == ("NOT_FOUND", "no_best_adapter")


async def refusal(observer: Observer) -> tuple[str, str]:
    """Status and reason of the answer to who asks for the best adapter."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await fetch(observer, best=True)
    trailing = dict(caught.value.trailing_metadata() or ())
    return caught.value.code().name, str(trailing[REASON_KEY])
