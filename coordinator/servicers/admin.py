"""AdminService: the operator's levers. Every answer is the explanation of how things stand now."""

from typing import Any, TypeAlias

import grpc.aio
import structlog
from raflora.v1 import admin_pb2 as pb
from raflora.v1 import admin_pb2_grpc

from common.plain import plain
from coordinator.federation.requests import AbortRound, CloseRound, Evict, Pause, Request, Resume, SetRank
from coordinator.service import MAX_FAILURE_CHARS, CoordinatorService

_Context: TypeAlias = grpc.aio.ServicerContext[Any, Any]
log = structlog.get_logger()


class AdminServicer(admin_pb2_grpc.AdminServiceServicer):
    """See proto/raflora/v1/admin.proto."""

    def __init__(self, service: CoordinatorService) -> None:
        self._service = service

    async def Pause(self, request: pb.PauseRequest, context: _Context) -> pb.PauseResponse:
        """Opens no further round."""
        return pb.PauseResponse(explanation=await self._order(Pause()))

    async def Resume(self, request: pb.ResumeRequest, context: _Context) -> pb.ResumeResponse:
        """Goes on."""
        return pb.ResumeResponse(explanation=await self._order(Resume()))

    async def CloseRound(self, request: pb.CloseRoundRequest, context: _Context) -> pb.CloseRoundResponse:
        """Closes with what is here."""
        return pb.CloseRoundResponse(explanation=await self._order(CloseRound(request.round)))

    async def AbortRound(self, request: pb.AbortRoundRequest, context: _Context) -> pb.AbortRoundResponse:
        """Throws the round's results away."""
        return pb.AbortRoundResponse(explanation=await self._order(AbortRound(request.round)))

    async def EvictClient(self, request: pb.EvictClientRequest, context: _Context) -> pb.EvictClientResponse:
        """Shuts a client out."""
        order = Evict(request.client_id, plain(request.reason, MAX_FAILURE_CHARS) or "no reason given")
        return pb.EvictClientResponse(explanation=await self._order(order))

    async def SetClientRank(self, request: pb.SetClientRankRequest, context: _Context) -> pb.SetClientRankResponse:
        """Grants a rank."""
        order = SetRank(request.client_id, request.lora_rank)
        return pb.SetClientRankResponse(explanation=await self._order(order))

    async def _order(self, request: Request) -> str:
        self._service.foundation.known_manifest  # noqa: B018 - raises before there is anything to order
        transition = await self._service.engine.submit(request)
        log.info("operator", order=type(request).__name__, outcome=transition.outcome)
        return self._service.explanation()
