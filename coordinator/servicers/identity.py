"""IdentityService: a signing request in, a certificate out."""

import asyncio
from collections.abc import Callable
from typing import Any, TypeAlias

import grpc.aio
import structlog
from raflora.v1 import identity_pb2 as pb
from raflora.v1 import identity_pb2_grpc

from common.certificates import Certificate
from common.errors import NotAuthenticated
from common.failpoints import reach
from coordinator.identity.caller import present_caller
from coordinator.identity.issuer import Issuer
from coordinator.pace import Pace
from coordinator.quiet import Quiet

_Context: TypeAlias = grpc.aio.ServicerContext[Any, Any]
log = structlog.get_logger()


class IdentityServicer(identity_pb2_grpc.IdentityServiceServicer):
    """See proto/raflora/v1/identity.proto."""

    def __init__(self, issuer: Issuer, clock: Callable[[], float]) -> None:
        """`clock` counts seconds, for how often somebody may renew."""
        self._issuer = issuer
        self._clock = clock
        self._pace = Pace()
        self._quiet = Quiet()

    async def Enrol(self, request: pb.EnrolRequest, context: _Context) -> pb.EnrolResponse:
        """A worker's first certificate. To its end even if the caller hangs up: it comes again with the same key."""
        certificate, client_id = await asyncio.to_thread(
            self._issuer.enrol, _caller(), request.signing_request, request.worker
        )
        if self._quiet.unsaid(client_id, self._clock()) >= 0:
            log.info("worker let in", client=client_id)
        reach("identity.answering")
        return pb.EnrolResponse(
            certificate=certificate, authority=self._issuer.authority.certificate, client_id=client_id
        )

    async def Renew(self, request: pb.RenewRequest, context: _Context) -> pb.RenewResponse:
        """The next certificate of the same key."""
        caller = _caller()
        who, now = str(caller.subject), self._clock()
        self._pace.check(who, now)
        self._pace.spend(who, now)
        certificate = await asyncio.to_thread(self._issuer.renew, caller, request.signing_request)
        log.info("certificate renewed", who=who)
        return pb.RenewResponse(certificate=certificate, authority=self._issuer.authority.certificate)


def _caller() -> Certificate:
    caller = present_caller()
    if caller is None:
        raise NotAuthenticated("this call needs a certificate")
    return caller.certificate
