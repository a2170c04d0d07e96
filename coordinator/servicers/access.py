"""Asks every call of every service who makes it, and ends the calls of those who are shut out meanwhile.

It stands inside the ErrorInterceptor, which turns its refusals into statuses.
"""

import asyncio
import inspect
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias, cast

import grpc
import grpc.aio

from common.certificates import Certificate
from common.errors import NotAuthenticated, RafloraError
from coordinator.identity.caller import Caller, own_client_id, own_enrol_key, set_present_caller
from coordinator.identity.gate import Gate
from coordinator.servicers.interceptor import method_of

_CHECK_SECONDS = 1.0  # between two looks at the calls in progress
_Handler: TypeAlias = Any  # grpc.RpcMethodHandler, which cannot be subscripted when this runs
_Context: TypeAlias = grpc.aio.ServicerContext[Any, Any]


@dataclass(eq=False)
class _Call:
    """One in progress."""

    certificate: Certificate
    task: "asyncio.Task[Any]"
    refusal: RafloraError | None = None


class AccessInterceptor(grpc.aio.ServerInterceptor):
    """Lets a call reach its method only if the gate knows its caller. `watch` must run beside the server."""

    def __init__(self, gate: Gate) -> None:
        self._gate = gate
        self._calls: set[_Call] = set()

    async def watch(self) -> None:
        """Ends calls whose caller was revoked, or whose certificate has expired. Until cancelled."""
        while True:
            await asyncio.sleep(_CHECK_SECONDS)
            self.end_calls_of_the_refused()

    def end_calls_of_the_refused(self) -> None:
        """One look at all of them."""
        for call in tuple(self._calls):
            try:
                self._gate.check(call.certificate)
            except RafloraError as error:
                if call.refusal is None:
                    call.refusal = error
                    call.task.cancel()

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[_Handler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> _Handler:
        """See grpc.aio.ServerInterceptor."""
        handler = await continuation(handler_call_details)
        if handler is None:
            return None
        kind, inner = method_of(handler)
        guard = self._guard_stream if inspect.isasyncgenfunction(inner) else self._guard
        guarded = guard(inner, handler_call_details.method)
        return kind(guarded, handler.request_deserializer, handler.response_serializer)

    def _guard(self, inner: Any, method: str) -> Any:
        async def guarded(request: Any, context: _Context) -> Any:
            async with self._admitted(context, method):
                return await inner(_in_the_callers_name(request), context)

        return guarded

    def _guard_stream(self, inner: Any, method: str) -> Any:
        async def guarded(request: Any, context: _Context) -> AsyncIterator[Any]:
            async with self._admitted(context, method):
                async for response in inner(_in_the_callers_name(request), context):
                    yield response

        return guarded

    @asynccontextmanager
    async def _admitted(self, context: _Context, method: str) -> AsyncIterator[Caller]:
        caller = self._gate.admit(_shown(context), method)
        set_present_caller(caller)
        task = cast("asyncio.Task[Any]", asyncio.current_task())  # a call is always served by a task
        call = _Call(caller.certificate, task)
        self._calls.add(call)
        try:
            yield caller
        except asyncio.CancelledError:
            if call.refusal is None or task.uncancel() > 0:
                raise  # the caller hung up, or the server ends
            raise call.refusal from None
        finally:
            self._calls.discard(call)


def _shown(context: _Context) -> bytes:
    # The published types of auth_context say less than it is: lists of bytes by name.
    shown: Any = context.auth_context().get("x509_pem_cert", [])
    if not shown:
        raise NotAuthenticated("the caller showed no certificate")
    return bytes(shown[0])


def _in_the_callers_name(request: Any) -> Any:
    """The request with the client id of the certificate. A worker's only: an operator names clients of others."""
    fields = getattr(getattr(request, "DESCRIPTOR", None), "fields_by_name", {})
    if "client_id" in fields:
        request.client_id = own_client_id(request.client_id)
    if "enrol_key" in fields:
        request.enrol_key = own_enrol_key(request.enrol_key)
    return request
