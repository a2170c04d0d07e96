"""What an operator reads: rounds as they stand in the journal."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from coordinators import BASE_MODEL, SPEC, config_of
from engines import Monotonic
from raflora.v1 import status_pb2 as pb
from rounds import ADA, BOB, CEM, RANKS, after, claims, joins, started

from coordinator.aggregation.certificate import RoundCertificate
from coordinator.aggregation.report import RankPartition, RoundReport
from coordinator.clock import FederationClock
from coordinator.federation.requests import Pause
from coordinator.federation.state import Contribution, Evaluation, RoundRecord, State, Update
from coordinator.manifest import Manifest
from coordinator.service import CoordinatorService
from coordinator.servicers.status_view import FRESH_CLIENTS, SHARED_SECONDS_A_CLIENT, SharedStatus, rounds_of
from coordinator.stores.blobs import FileBlobs
from coordinator.stores.journal import MemoryJournal

REPORT = RoundReport(
    partitions=(RankPartition(0, 2, 0.5, 3, 3.0), RankPartition(2, 4, 0.3, 2, 2.0), RankPartition(4, 8, 0.2, 1, 1.0)),
    rho=0.5,
    effective_rank=5.5,
    rank_99=7,
    energy=2.0,
    energy_lost=0.01,
    norm=2.0**0.5,
    certificate=RoundCertificate(half_passes=5, residual=1e-4, captured=0.99, exact=1, iterated=2),
)


def record(number: int, clients: Sequence[str], **changes: object) -> RoundRecord:
    contributions = tuple(
        Contribution(c, RANKS[c], Update(f"{c}-{number}", 100, 10 * (i + 1), {"train_loss": i + 1.0}, 4.0))
        for i, c in enumerate(clients)
    )
    report = json.dumps({"report": REPORT.to_json(), "aggregation_seconds": 0.25})
    return replace(RoundRecord(number, 1, f"adapter-{number}", 10.0, 40.0, 41.0, contributions, report), **changes)


def federation(*rounds: RoundRecord) -> State:
    return replace(started(num_rounds=9), round=len(rounds), history=rounds)


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    return Manifest.of(config_of(tmp_path), SPEC, BASE_MODEL)


def test_a_round_is_summed_up_from_its_record(manifest: Manifest) -> None:
    evaluations = (
        (ADA, 2, Evaluation(10, {"accuracy": 0.5, "eval_loss": 2.0})),
        (BOB, 4, Evaluation(30, {"accuracy": 0.9})),
        (CEM, 8, Evaluation(1000)),
    )
    state = federation(record(1, [ADA, BOB], evaluations=evaluations, evaluated_at=44.0))
    (summary,) = rounds_of(state, manifest, state.history)
    assert (summary.round, summary.adapter_digest, summary.learning_rate) == (1, "adapter-1", pytest.approx(0.1))
    assert (summary.training_seconds, summary.aggregation_seconds, summary.evaluation_seconds) == (30.0, 0.25, 3.0)
    assert (summary.accuracy, summary.eval_loss) == pytest.approx((0.8, 2.0))
    assert summary.train_loss == pytest.approx((10 * 1.0 + 20 * 2.0) / 30)
    assert summary.bytes_received == 200
    assert summary.bytes_sent == manifest.layout(2).size_bytes + manifest.layout(4).size_bytes
    assert (summary.rho, summary.effective_rank, summary.rank_99, summary.energy) == (0.5, 5.5, 7, 2.0)
    vouched = summary.certificate
    assert (vouched.half_passes, vouched.residual, vouched.captured) == (5, 1e-4, 0.99)
    assert (vouched.exact, vouched.iterated, vouched.dense) == (1, 2, 0)
    assert [(p.low, p.high, p.contributors) for p in summary.partitions] == [(0, 2, 3), (2, 4, 2), (4, 8, 1)]


def test_a_round_without_evaluations_has_no_accuracy(manifest: Manifest) -> None:
    state = federation(record(1, [ADA]))
    (summary,) = rounds_of(state, manifest, state.history)
    assert (summary.accuracy, summary.evaluation_seconds, len(summary.evaluations)) == (0.0, 0.0, 0)


def test_a_round_counts_since_when_a_partition_is_uncovered_as_it_was_then(manifest: Manifest) -> None:
    state = federation(record(1, [ADA, CEM]), record(2, [ADA, BOB]), record(3, [ADA]), record(4, [CEM]))
    summaries = rounds_of(state, manifest, state.history)
    uncovered = [[p.rounds_uncovered for p in summary.partitions] for summary in summaries]
    assert uncovered == [[0, 0, 0], [0, 0, 1], [0, 1, 2], [0, 0, 0]]


# ---------------------------------------------------------------- many who look


@pytest.fixture
def monotonic() -> Monotonic:
    return Monotonic()


@pytest.fixture
def service(tmp_path: Path, monotonic: Monotonic) -> Iterator[CoordinatorService]:
    service = CoordinatorService(config_of(tmp_path), MemoryJournal(), FileBlobs(tmp_path / "blobs"))
    service.engine._clock = FederationClock(0.0, monotonic)
    yield service
    service.close()


def test_in_a_small_federation_everybody_sees_what_is_now(service: CoordinatorService) -> None:
    board = SharedStatus(service)
    service.engine.state = started()
    assert [a.state for a in board.newest().assignments] == [pb.ASSIGNMENT_STATE_WAITING] * 3
    service.engine.state = after(claims(ADA), start=service.engine.state)
    assert board.newest().assignments[0].state == pb.ASSIGNMENT_STATE_WORKING


def test_a_large_status_is_shared_for_a_moment(service: CoordinatorService, monotonic: Monotonic) -> None:
    board, late = SharedStatus(service), 200
    names = [f"worker-{i:03}" for i in range(FRESH_CLIENTS + late)]
    service.engine.state = after(*map(joins, names), start=started())
    seen = board.newest()
    service.engine.state = after(claims(ADA), start=service.engine.state)
    assert board.newest() is seen
    monotonic.seconds += SHARED_SECONDS_A_CLIENT * (late + len(RANKS)) + 1e-6
    assert board.newest().assignments[0].state == pb.ASSIGNMENT_STATE_WORKING


def test_where_the_federation_stands_is_never_old(service: CoordinatorService) -> None:
    board = SharedStatus(service)
    crowd = [joins(f"worker-{i:03}") for i in range(2 * FRESH_CLIENTS)]
    service.engine.state = after(*crowd, start=started())
    assert not board.newest().paused
    service.engine.state = after(Pause(), start=service.engine.state)
    assert board.newest().paused
