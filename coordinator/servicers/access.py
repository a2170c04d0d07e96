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
from common.errors import NotAuthenticated, RafloraError, TooBusy
from coordinator.identity.caller import set_present_caller
from coordinator.identity.gate import Gate
from coordinator.servicers.interceptor import method_of
from coordinator.servicers.places import MAX_CALLS, MAX_CALLS_IN_THE_CLEAR, Places
from coordinator.servicers.requests import messages_in, only_message

_CHECK_SECONDS = 1.0  # between two looks at the calls in progress
_Handler: TypeAlias = Any  # grpc.RpcMethodHandler, which cannot be subscripted when this runs
_Context: TypeAlias = grpc.aio.ServicerContext[Any, Any]
_Read: TypeAlias = Callable[[_Context], Awaitable[Any]]  # what the method is given of what came


@dataclass(eq=False)
class _Call:
    """One in progress."""

    certificate: Certificate
    task: "asyncio.Task[Any]"
    refusal: RafloraError | None = None


class AccessInterceptor(grpc.aio.ServerInterceptor):
    """Lets a call reach its method only if the gate knows its caller; without a gate everybody is let in.

    Nothing is taken from the wire or parsed before that. `watch` must run beside the server.
    """

    def __init__(self, gate: Gate | None) -> None:
        self._gate = gate
        self._places = Places()
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
                cast(Gate, self._gate).check(call.certificate)  # without one there are none
            except TooBusy:
                continue  # the registry cannot be read now
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
        _, inner = method_of(handler)
        guard = self._guard_stream if inspect.isasyncgenfunction(inner) else self._guard
        method, parse = handler_call_details.method, handler.request_deserializer

        async def read(context: _Context) -> Any:
            stream = handler.request_streaming
            return messages_in(context, method, parse) if stream else await only_message(context, method, parse)

        # A stream on the wire looks the same, and of it gRPC takes nothing before it is asked to.
        of_stream, of_one = grpc.stream_stream_rpc_method_handler, grpc.stream_unary_rpc_method_handler
        kind: Any = of_stream if handler.response_streaming else of_one
        return kind(guard(inner, method, read), None, handler.response_serializer)

    def _guard(self, inner: Any, method: str, read: _Read) -> Any:
        async def guarded(_: object, context: _Context) -> Any:
            async with self._admitted(context, method):
                return await inner(await read(context), context)

        return guarded

    def _guard_stream(self, inner: Any, method: str, read: _Read) -> Any:
        async def guarded(_: object, context: _Context) -> AsyncIterator[Any]:
            async with self._admitted(context, method):
                async for response in inner(await read(context), context):
                    yield response

        return guarded

    @asynccontextmanager
    async def _admitted(self, context: _Context, method: str) -> AsyncIterator[None]:
        if self._gate is None:
            with self._places.one_for("in the clear", MAX_CALLS_IN_THE_CLEAR):
                yield
            return
        caller = self._gate.admit(_shown(context), method)
        set_present_caller(caller)
        subject = caller.certificate.subject
        with self._places.one_for(str(subject), MAX_CALLS[subject.role]):
            async with self._ended_if_refused(caller.certificate):
                yield

    @asynccontextmanager
    async def _ended_if_refused(self, certificate: Certificate) -> AsyncIterator[None]:
        task = cast("asyncio.Task[Any]", asyncio.current_task())  # a call is always served by a task
        call = _Call(certificate, task)
        self._calls.add(call)
        try:
            yield
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
