"""The one place where errors become gRPC statuses: code, message and the stable reason in the trailing metadata."""

import inspect
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeAlias

import grpc
import grpc.aio
import structlog
from google.protobuf.message import DecodeError

from common.channel import COMMITTED_BYTES_KEY, REASON_KEY
from common.errors import (
    BadJoinToken,
    InvalidRequest,
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
from common.transfer import is_disk_full

log = structlog.get_logger()
MAX_MESSAGE_CHARS = 600  # at most 12 bytes each as gRPC escapes them: under its 8 KiB of trailers
_REPEATED = (NotAuthenticated, NotAllowed, Revoked, BadJoinToken)
_QUIET_SECONDS = 60.0
_MAX_SENTENCES = 1000
_Handler: TypeAlias = Any  # grpc.RpcMethodHandler, which cannot be subscripted when this runs


class Quiet:
    """Counts what is said again within a while, for a bounded number of sentences."""

    def __init__(self, seconds: float, most: int) -> None:
        self._seconds = seconds
        self._most = most
        self._said: dict[str, tuple[float, int]] = {}  # when, and how often unsaid since; the oldest first

    def unsaid(self, sentence: str, now: float) -> int:
        """How often it was kept quiet since it was last said, if it is to be said now; else -1."""
        at, count = self._said.get(sentence, (-math.inf, 0))
        if now - at < self._seconds:
            self._said[sentence] = (at, count + 1)
            return -1
        self._said.pop(sentence, None)
        while len(self._said) >= self._most:
            del self._said[next(iter(self._said))]
        self._said[sentence] = (now, 0)
        return count


_quiet = Quiet(_QUIET_SECONDS, _MAX_SENTENCES)


class ErrorInterceptor(grpc.aio.ServerInterceptor):
    """Wraps every method of every service; a bug is INTERNAL with a fixed text, and its traceback in the log.

    A StorageFailed is not the caller's: `end_with` is told, and the caller that the coordinator cannot be reached.
    """

    def __init__(self, end_with: Callable[[StorageFailed], None]) -> None:
        self._end_with = end_with

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
        # A method that streams its answers is a generator, or a coroutine that writes them to the context.
        guard = _guard_stream if inspect.isasyncgenfunction(inner) else _guard
        guarded = guard(_refusing(inner, handler), handler_call_details.method, self._end_with)
        return kind(guarded, _parsing(handler.request_deserializer), handler.response_serializer)


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


def _parsing(parse: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    """Parses a message; bytes that are none become an error to raise, where gRPC would say INTERNAL and no reason."""

    def parsed(raw: bytes) -> Any:
        try:
            return parse(raw)
        except DecodeError as error:
            return InvalidRequest(f"{len(raw)} bytes that are not the message of this call: {error}")

    return parsed


def _refusing(inner: Any, handler: _Handler) -> Any:
    """The method behind a handler; raises what `_parsing` found. Who reads from the context must look for it too."""

    async def messages_in(stream: AsyncIterator[Any]) -> AsyncIterator[Any]:
        async for message in stream:
            yield message_of(message)

    read = messages_in if handler.request_streaming else message_of
    return lambda request, context: inner(read(request), context)


def message_of(read: Any) -> Any:
    """What gRPC read, if it is a message. Raises InvalidRequest if it was none."""
    if isinstance(read, InvalidRequest):
        raise read
    return read


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
    if isinstance(error, _REPEATED):
        _say_quietly(error, method)
    else:
        log.info("refused", method=method, reason=error.reason, message=plain(str(error), MAX_MESSAGE_CHARS))
    # Cut and without control characters: gRPC drops a call whose trailers are too long, and with it the reason.
    await context.abort(grpc.StatusCode[error.code], plain(str(error), MAX_MESSAGE_CHARS), tuple(metadata))


def _say_quietly(error: RafloraError, method: str) -> None:
    """One line a while for the same sentence: who is shut out may go on knocking all day."""
    unsaid = _quiet.unsaid(f"{method} {error}", time.monotonic())
    if unsaid >= 0:
        log.warning("shut out", method=method, reason=error.reason, message=str(error), unsaid=unsaid)


async def _abort_unknown(context: grpc.aio.ServicerContext[Any, Any], error: BaseException, method: str) -> None:
    if isinstance(error, (grpc.aio.AbortError, grpc.aio.UsageError)):
        raise error
    if isinstance(error, NotImplementedError):  # a method that the health library describes and does not have
        await context.abort(grpc.StatusCode.UNIMPLEMENTED, f"{method} is not served here")
    if is_disk_full(error):
        log.error("disk full", method=method)
        await _abort(context, TooBusy("the coordinator's disk is full; try again later"), method)
    log.error("bug", method=method, exc_info=error)
    await context.abort(
        grpc.StatusCode.INTERNAL, "internal error; the coordinator's log has the details", ((REASON_KEY, "internal"),)
    )
