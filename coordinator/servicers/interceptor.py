"""The one place where errors become gRPC statuses: code, message and the stable reason in the trailing metadata."""

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeAlias

import grpc
import grpc.aio
import structlog

from common.channel import COMMITTED_BYTES_KEY, REASON_KEY
from common.errors import RafloraError, StorageFailed, TooBusy, Unavailable, WrongOffset
from common.transfer import is_disk_full

log = structlog.get_logger()
_Handler: TypeAlias = Any  # grpc.RpcMethodHandler, which cannot be subscripted when this runs


class ErrorInterceptor(grpc.aio.ServerInterceptor):
    """Wraps every method of our own services; a bug is INTERNAL with a fixed text, and its traceback in the log.

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
        method = handler_call_details.method
        if handler is None or not method.startswith("/raflora."):
            return handler
        if handler.response_streaming:
            return grpc.unary_stream_rpc_method_handler(
                _guard_stream(handler.unary_stream, method, self._end_with),
                handler.request_deserializer,
                handler.response_serializer,
            )
        make = (
            grpc.stream_unary_rpc_method_handler if handler.request_streaming else grpc.unary_unary_rpc_method_handler
        )
        inner = handler.stream_unary if handler.request_streaming else handler.unary_unary
        return make(_guard(inner, method, self._end_with), handler.request_deserializer, handler.response_serializer)


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
    log.info("refused", method=method, reason=error.reason, message=str(error))
    await context.abort(grpc.StatusCode[error.code], str(error), tuple(metadata))


async def _abort_unknown(context: grpc.aio.ServicerContext[Any, Any], error: BaseException, method: str) -> None:
    if isinstance(error, (grpc.aio.AbortError, grpc.aio.UsageError)):
        raise error
    if is_disk_full(error):
        log.error("disk full", method=method)
        await _abort(context, TooBusy("the coordinator's disk is full; try again later"), method)
    log.error("bug", method=method, exc_info=error)
    await context.abort(
        grpc.StatusCode.INTERNAL, "internal error; the coordinator's log has the details", ((REASON_KEY, "internal"),)
    )
