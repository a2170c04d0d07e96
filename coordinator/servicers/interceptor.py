"""The one place where errors become gRPC statuses: code, message and the stable reason in the trailing metadata."""

import inspect
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeAlias

import grpc
import grpc.aio
import structlog

from common.channel import COMMITTED_BYTES_KEY, REASON_KEY
from common.errors import (
    BadJoinToken,
    NotAllowed,
    NotAuthenticated,
    RafloraError,
    Revoked,
    StorageFailed,
    TooBusy,
    Unavailable,
    WrongOffset,
)
from common.plain import plain
from common.transfer import shortage_of
from coordinator.identity.caller import shown_subject
from coordinator.quiet import Quiet

log = structlog.get_logger()
MAX_MESSAGE_CHARS = 600  # at most 12 bytes each as gRPC escapes them: under its 8 KiB of trailers
_SHUT_OUT = (NotAuthenticated, NotAllowed, Revoked, BadJoinToken)
_Handler: TypeAlias = Any  # grpc.RpcMethodHandler, which cannot be subscripted when this runs


_quiet = Quiet()


class ErrorInterceptor(grpc.aio.ServerInterceptor):
    """Wraps every method of every service; a bug is INTERNAL with a fixed text, and its traceback in the log.

    A StorageFailed is not the caller's: `end_with` is told, and the caller that the coordinator cannot be reached.
    """

    def __init__(self, end_with: Callable[[StorageFailed], None]) -> None:
        self._end_with = end_with
        self._guarded: dict[str, _Handler] = {}  # by method: a handler is the same for every call

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[_Handler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> _Handler:
        """See grpc.aio.ServerInterceptor."""
        known = self._guarded.get(handler_call_details.method)
        if known is not None:
            return known
        handler = await continuation(handler_call_details)
        if handler is None:
            return None
        kind, inner = method_of(handler)
        # A method that streams its answers is a generator, or a coroutine that writes them to the context.
        guard = _guard_stream if inspect.isasyncgenfunction(inner) else _guard
        guarded = guard(inner, handler_call_details.method, self._end_with)
        made = kind(guarded, handler.request_deserializer, handler.response_serializer)
        self._guarded[handler_call_details.method] = made
        return made


def method_of(handler: _Handler) -> tuple[Any, Any]:
    """How to make a handler of the same kind, and the method behind this one."""
    match handler.request_streaming, handler.response_streaming:
        case False, False:
            return grpc.unary_unary_rpc_method_handler, handler.unary_unary
        case False, True:
            return grpc.unary_stream_rpc_method_handler, handler.unary_stream
        case True, False:
            return grpc.stream_unary_rpc_method_handler, handler.stream_unary
        case _:
            return grpc.stream_stream_rpc_method_handler, handler.stream_stream


def _guard(inner: Any, method: str, end_with: Callable[[StorageFailed], None]) -> Any:
    async def guarded(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        try:
            return await inner(request, context)
        except StorageFailed as error:
            end_with(error)
            await _abort(context, Unavailable("the coordinator is ending: its disk failed; ask again later"), method)
        except RafloraError as error:
            await _abort(context, error, method)
        except (Exception, BaseExceptionGroup) as error:
            await _abort_unknown(context, error, method)

    return guarded


def _guard_stream(inner: Any, method: str, end_with: Callable[[StorageFailed], None]) -> Any:
    async def guarded(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> AsyncIterator[Any]:
        try:
            async for response in inner(request, context):
                yield response
        except StorageFailed as error:
            end_with(error)
            await _abort(context, Unavailable("the coordinator is ending: its disk failed; ask again later"), method)
        except RafloraError as error:
            await _abort(context, error, method)
        except (Exception, BaseExceptionGroup) as error:
            await _abort_unknown(context, error, method)

    return guarded


async def _abort(context: grpc.aio.ServicerContext[Any, Any], error: RafloraError, method: str) -> None:
    metadata = [(REASON_KEY, error.reason)]
    if isinstance(error, WrongOffset):
        metadata.append((COMMITTED_BYTES_KEY, str(error.committed_bytes)))
    _say_quietly(error, method, shown_subject() or _host_of(context.peer()))
    # Cut and without control characters: gRPC drops a call whose trailers are too long, and with it the reason.
    await context.abort(grpc.StatusCode[error.code], plain(str(error), MAX_MESSAGE_CHARS), tuple(metadata))


def _say_quietly(error: RafloraError, method: str, who: str) -> None:
    """One line a while for the same refusal of the same caller, who may go on knocking all day.

    The sentence itself may hold the caller's own words, so it does not tell two refusals apart.
    """
    unsaid = _quiet.unsaid(f"{method} {error.reason} {who}", time.monotonic())
    if unsaid < 0:
        return
    message = plain(str(error), MAX_MESSAGE_CHARS)
    if isinstance(error, _SHUT_OUT):
        log.warning("shut out", method=method, reason=error.reason, message=message, unsaid=unsaid)
    else:
        log.info("refused", method=method, reason=error.reason, message=message, unsaid=unsaid)


def _host_of(peer: str) -> str:
    return peer.rpartition(":")[0]  # a caller has a new port as often as it likes


async def _abort_unknown(context: grpc.aio.ServicerContext[Any, Any], error: BaseException, method: str) -> None:
    if isinstance(error, (grpc.aio.AbortError, grpc.aio.UsageError)):
        raise error
    if isinstance(error, NotImplementedError):  # a method that the health library describes and does not have
        await context.abort(grpc.StatusCode.UNIMPLEMENTED, f"{method} is not served here")
    if shortage := shortage_of(error):
        log.error("shortage", what=shortage, method=method)
        await _abort(context, TooBusy(f"the coordinator cannot do that now: {shortage}; try again later"), method)
    log.error("bug", method=method, exc_info=error)
    await context.abort(
        grpc.StatusCode.INTERNAL, "internal error; the coordinator's log has the details", ((REASON_KEY, "internal"),)
    )
