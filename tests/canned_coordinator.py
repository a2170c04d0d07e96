"""A coordinator that says what a test put into it: real gRPC on port 0, no state machine behind it."""
# ruff: noqa: ARG002 - the signatures are gRPC's

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NoReturn

import grpc
import numpy as np
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import HealthServicer
from raflora.v1 import admin_pb2, admin_pb2_grpc, status_pb2, status_pb2_grpc

from common.adapter import Adapter, AdapterSpec, ModuleShape, TensorShape, initial_adapter
from common.channel import REASON_KEY
from common.codec import WireDtype, digest_of, encode
from common.errors import RafloraError

SPEC = AdapterSpec(
    (ModuleShape("encoder.0.query", 12, 8), ModuleShape("encoder.0.value", 8, 12)),
    (TensorShape("classifier.weight", (3, 8)),),
)


def partitions(*shares: float, contributors: int = 2) -> list[status_pb2.RankPartition]:
    """Partitions 1-2, 3-4, 5-8, ... with these energy shares."""
    edges = [0, *(2 ** (i + 1) for i in range(len(shares)))]
    return [
        status_pb2.RankPartition(low=edges[i], high=edges[i + 1], energy_share=share, contributors=contributors)
        for i, share in enumerate(shares)
    ]


def summary(round: int, *, accuracy: float = 0.5) -> status_pb2.RoundSummary:
    """A finished round."""
    return status_pb2.RoundSummary(
        round=round,
        partitions=partitions(0.9, 0.1),
        rho=0.9,
        effective_rank=3.25,
        rank_99=4,
        evaluations=[status_pb2.EvaluationSummary(client_id="ada", lora_rank=2, num_examples=10)],
        accuracy=accuracy,
        eval_loss=0.75,
        bytes_sent=3 << 20,
        bytes_received=1536,
        training_seconds=10,
        aggregation_seconds=2,
        evaluation_seconds=1,
    )


def client(client_id: str, rank: int) -> status_pb2.ClientSummary:
    """A client that has joined."""
    return status_pb2.ClientSummary(
        client_id=client_id,
        max_rank=rank,
        lora_rank=rank,
        device="cpu",
        num_examples=312,
        membership="active",
        slice_bytes=1536,
    )


def training(round: int = 2) -> status_pb2.FederationStatus:
    """A federation in the middle of a round."""
    return status_pb2.FederationStatus(
        federation="digits",
        software_version="0.1.0",
        phase=status_pb2.PHASE_TRAINING,
        round=round,
        num_rounds=20,
        explanation="1 of 2 updates, quorum 2, deadline in 42 s",
        method="raflora",
        global_rank=4,
        assignments=[
            status_pb2.AssignmentStatus(
                client_id="ada",
                lora_rank=2,
                state=status_pb2.ASSIGNMENT_STATE_WORKING,
                activity="training",
                step=10,
                total_steps=40,
                train_loss=0.5,
            ),
            status_pb2.AssignmentStatus(
                client_id="bob", lora_rank=4, state=status_pb2.ASSIGNMENT_STATE_DONE, silent_seconds=75, late=True
            ),
        ],
        quorum=2,
        last_round=summary(round - 1),
        forecast=status_pb2.CollapseForecast(sentence="the energy above rank 2 would halve every 1.6 rounds"),
        bytes_sent=3 << 20,
        clients_connected=2,
        clients_known=2,
        task="image-classification",
        warnings=["bob is late"],
    )


def finished() -> status_pb2.FederationStatus:
    """The same at its end."""
    status = training(round=20)
    status.phase = status_pb2.PHASE_FINISHED
    status.explanation = "all 20 rounds are done"
    del status.assignments[:]
    return status


def adapter_of(rank: int) -> Adapter:
    """An adapter whose lora_B is not zero."""
    first = initial_adapter(SPEC, rank, seed=7)
    return Adapter(
        {n: type(f)(f.lora_A, np.full_like(f.lora_B, 0.25)) for n, f in first.modules.items()}, first.tensors
    )


@dataclass
class Canned:
    """What the coordinator says, and what it was asked."""

    status: status_pb2.FederationStatus = field(default_factory=training)
    watched: Sequence[status_pb2.FederationStatus] = ()
    rounds: Sequence[status_pb2.RoundSummary] = ()
    clients: Sequence[status_pb2.ClientSummary] = ()
    error: RafloraError | None = None  # raised by every admin call and by FetchAdapter
    adapter: bytes = b""
    header: status_pb2.AdapterHeader = field(default_factory=status_pb2.AdapterHeader)
    break_off_after: int | None = None  # bytes, once
    chunk_bytes: int = 100
    serving: bool = True
    asked: list[object] = field(default_factory=list)

    def publish(self, rank: int, dtype: WireDtype = WireDtype.FLOAT32) -> None:
        """Makes an adapter of that rank the published one."""
        self.adapter = encode(adapter_of(rank), dtype)
        self.header = status_pb2.AdapterHeader(
            digest=digest_of(self.adapter),
            size_bytes=len(self.adapter),
            lora_rank=rank,
            scaling=2.0,
            round=3,
            base_model="tiny-vit",
            base_model_digest="b" * 64,
            task="image-classification",
            modules=[m.name for m in SPEC.modules],
            modules_to_save=["classifier"],
            labels=["cat", "dog"],
        )


class _Status(status_pb2_grpc.StatusServiceServicer):
    def __init__(self, canned: Canned) -> None:
        self._canned = canned

    def GetStatus(self, request, context):
        return status_pb2.GetStatusResponse(status=self._canned.status)

    def WatchStatus(self, request, context):
        for status in self._canned.watched:
            yield status_pb2.WatchStatusResponse(status=status)
        context.abort(grpc.StatusCode.UNAVAILABLE, "going down")

    def ListRounds(self, request, context):
        self._canned.asked.append(request)
        rest = [r for r in self._canned.rounds if r.round > request.after_round]
        page = rest[: request.page_size]
        return status_pb2.ListRoundsResponse(rounds=page, more=len(rest) > len(page))

    def ListClients(self, request, context):
        self._canned.asked.append(request)
        rest = [c for c in self._canned.clients if c.client_id > request.after_client_id]
        page = rest[: request.page_size]
        return status_pb2.ListClientsResponse(clients=page, more=len(rest) > len(page))

    def FetchAdapter(self, request, context):
        self._canned.asked.append(request)
        if self._canned.error is not None:
            _abort(context, self._canned.error)
        yield status_pb2.FetchAdapterResponse(header=self._canned.header)
        for start in range(request.offset, len(self._canned.adapter), self._canned.chunk_bytes):
            limit = self._canned.break_off_after
            if request.digest and limit is not None and start >= limit:
                self._canned.break_off_after = None
                context.abort(grpc.StatusCode.UNAVAILABLE, "broken off")
            end = start + self._canned.chunk_bytes
            yield status_pb2.FetchAdapterResponse(data=self._canned.adapter[start:end])


class _Admin(admin_pb2_grpc.AdminServiceServicer):
    def __init__(self, canned: Canned) -> None:
        self._canned = canned

    def _note(self, request, context) -> str:
        self._canned.asked.append(request)
        if self._canned.error is not None:
            _abort(context, self._canned.error)
        return "noted"

    def Pause(self, request, context):
        return admin_pb2.PauseResponse(explanation=self._note(request, context))

    def Resume(self, request, context):
        return admin_pb2.ResumeResponse(explanation=self._note(request, context))

    def CloseRound(self, request, context):
        return admin_pb2.CloseRoundResponse(explanation=self._note(request, context))

    def AbortRound(self, request, context):
        return admin_pb2.AbortRoundResponse(explanation=self._note(request, context))

    def EvictClient(self, request, context):
        return admin_pb2.EvictClientResponse(explanation=self._note(request, context))

    def SetClientRank(self, request, context):
        return admin_pb2.SetClientRankResponse(explanation=self._note(request, context))


@contextmanager
def serving(canned: Canned, port: int = 0) -> Iterator[str]:
    """The coordinator's address, as long as it runs."""
    server = grpc.server(ThreadPoolExecutor(max_workers=4), options=[("grpc.so_reuseport", 0)])
    status_pb2_grpc.add_StatusServiceServicer_to_server(_Status(canned), server)
    admin_pb2_grpc.add_AdminServiceServicer_to_server(_Admin(canned), server)
    health = HealthServicer()
    word = health_pb2.HealthCheckResponse.SERVING if canned.serving else health_pb2.HealthCheckResponse.NOT_SERVING
    health.set("", word)
    health_pb2_grpc.add_HealthServicer_to_server(health, server)
    bound = server.add_insecure_port(f"127.0.0.1:{port}")
    server.start()
    try:
        yield f"127.0.0.1:{bound}"
    finally:
        server.stop(grace=None).wait(timeout=10)


def _abort(context, error: RafloraError) -> NoReturn:
    context.set_trailing_metadata(((REASON_KEY, error.reason),))
    context.abort(grpc.StatusCode[error.code], str(error))
