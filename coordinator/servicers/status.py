"""StatusService: what anybody who may look can ask."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any, TypeAlias

import grpc.aio
from raflora.v1 import status_pb2 as pb
from raflora.v1 import status_pb2_grpc

from common.errors import InvalidRequest, UnknownBlob
from common.side_by_side import one_ahead
from common.transfer import check_digest, chunks_of
from coordinator.federation.state import Phase
from coordinator.service import CoordinatorService, PublishedSlice
from coordinator.servicers.status_view import SharedStatus, client_summary, rounds_of

MAX_PAGE = 100
_DEFAULT_PAGE = 20
_WATCH_PAUSE_SECONDS = 0.5  # at most twice a second
_WATCH_IDLE_SECONDS = 2.0  # progress inside a round is volatile and makes no event
_Context: TypeAlias = grpc.aio.ServicerContext[Any, Any]


class StatusServicer(status_pb2_grpc.StatusServiceServicer):
    """See proto/raflora/v1/status.proto."""

    def __init__(self, service: CoordinatorService) -> None:
        self._service = service
        self._status = SharedStatus(service)

    async def GetStatus(self, request: pb.GetStatusRequest, context: _Context) -> pb.GetStatusResponse:
        """The federation as it stands."""
        return pb.GetStatusResponse(status=self._status.newest())

    async def WatchStatus(
        self, request: pb.WatchStatusRequest, context: _Context
    ) -> AsyncIterator[pb.WatchStatusResponse]:
        """Again and again; ends with the federation."""
        engine = self._service.engine
        while True:
            version, is_last = engine.version, engine.state.phase is Phase.FINISHED or engine.is_stopping
            yield pb.WatchStatusResponse(status=self._status.newest())
            if is_last:
                return
            await asyncio.sleep(_WATCH_PAUSE_SECONDS)
            await engine.wait_for_change(version, _WATCH_IDLE_SECONDS)

    async def ListRounds(self, request: pb.ListRoundsRequest, context: _Context) -> pb.ListRoundsResponse:
        """Finished rounds, oldest first."""
        state, size = self._service.engine.state, _page_size(request.page_size)
        records = [r for r in state.history if r.number > request.after_round]
        if not records:
            return pb.ListRoundsResponse()
        rounds = rounds_of(state, self._service.foundation.known_manifest, records[:size])
        return pb.ListRoundsResponse(rounds=rounds, more=len(records) > size)

    async def ListClients(self, request: pb.ListClientsRequest, context: _Context) -> pb.ListClientsResponse:
        """Every client that ever joined, by id."""
        size, known = _page_size(request.page_size), self._service.engine.state.clients
        clients = [known[name] for name in sorted(known) if name > request.after_client_id]
        summaries = [client_summary(self._service, client) for client in clients[:size]]
        return pb.ListClientsResponse(clients=summaries, more=len(clients) > size)

    async def FetchAdapter(
        self, request: pb.FetchAdapterRequest, context: _Context
    ) -> AsyncIterator[pb.FetchAdapterResponse]:
        """A published adapter cut to a rank: first what it is, then its bytes from the offset."""
        found = await self._service.published_slice(request.lora_rank, best=request.best)
        if request.digest and check_digest(request.digest, "FetchAdapter") != found.reference.digest:
            which = "best" if request.best else "newest"
            raise UnknownBlob(f"adapter {request.digest[:12]} is no longer the {which}; start again without a digest")
        yield pb.FetchAdapterResponse(header=self._header(found))
        async for data in one_ahead(chunks_of(self._service.blobs.open(found.reference.digest), request.offset)):
            self._service.counters.bytes_sent += len(data)
            yield pb.FetchAdapterResponse(data=data)

    def _header(self, found: PublishedSlice) -> pb.AdapterHeader:
        manifest = self._service.foundation.known_manifest
        return pb.AdapterHeader(
            digest=found.reference.digest,
            size_bytes=found.reference.size_bytes,
            lora_rank=found.rank,
            scaling=manifest.scaling(found.rank),
            round=found.round,
            base_model=manifest.model.base_model,
            base_model_digest=manifest.base_model_digest,
            task=manifest.model.task,
            modules=[module.name for module in manifest.spec.modules],
            modules_to_save=manifest.adapter.modules_to_save,
            labels=manifest.model.labels,
        )


def _page_size(asked: int) -> int:
    if asked > MAX_PAGE:
        raise InvalidRequest(f"page_size {asked}: at most {MAX_PAGE}")
    return asked or _DEFAULT_PAGE
