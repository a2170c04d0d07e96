"""A line that knows calls: forwards a worker's gRPC calls to a coordinator and loses, repeats, holds or cuts them.

    async with CallProxy(target) as line:
        line.lose_answers["SubmitUpdate"] = 1    # the coordinator has answered; the worker hears that the line broke
        line.repeat.add("Join")                  # every Join arrives twice; the worker hears the second answer
        line.hold["Heartbeat"] = event           # none is passed on before the event
        line.cut_uploads = [1_000_000]           # this many bytes of the next upload call arrive, then the line breaks
        line.calls["Join"], line.answers["Join"], line.uploaded_bytes

Messages travel as the bytes that they are: nothing here reads one, but for the length of a chunk.
"""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from types import TracebackType
from typing import Any, Self

import grpc
import grpc.aio
from raflora.v1 import federation_pb2

_BROKEN = "the line broke"
_SERVICE = federation_pb2.DESCRIPTOR.services_by_name["FederationService"]
_LONGEST_CALL_SECONDS = 100.0


class CallProxy(grpc.GenericRpcHandler):
    """Serves FederationService by asking `target`; all counters are by method."""

    def __init__(self, target: str) -> None:
        self.address = ""  # once it is entered
        self.calls: Counter[str] = Counter()  # that arrived here
        self.answers: Counter[str] = Counter()  # that the coordinator gave
        self.lose_answers: Counter[str] = Counter()
        self.repeat: set[str] = set()
        self.hold: dict[str, asyncio.Event] = {}
        self.cut_uploads: list[int] = []
        self.cut_before_the_end = True  # of the coordinator's side too; otherwise it sees an orderly, short stream
        self.uploaded_bytes = 0  # passed on, repetitions included
        self.appended = b""  # to every unary answer: fields that nobody knows yet
        self._target = target

    async def __aenter__(self) -> Self:
        self._channel = grpc.aio.insecure_channel(self._target)
        self._server = grpc.aio.server()
        self._server.add_generic_rpc_handlers((self,))
        self.address = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        await self._server.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._server.stop(None)
        await self._channel.close()

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> Any:
        """See grpc.GenericRpcHandler."""
        method = handler_call_details.method
        described = _SERVICE.methods_by_name.get(method.rpartition("/")[2])
        if described is None:
            return None
        if described.client_streaming:
            return grpc.stream_unary_rpc_method_handler(self._upload)
        if described.server_streaming:
            return grpc.unary_stream_rpc_method_handler(self._download)

        async def call(request: bytes, context: Any) -> bytes:
            return await self._call(described.name, request, context)

        return grpc.unary_unary_rpc_method_handler(call)

    async def _call(self, name: str, request: bytes, context: Any) -> bytes:
        self.calls[name] += 1
        if name in self.hold:
            await self.hold[name].wait()
        answer = b""
        for _ in range(2 if name in self.repeat else 1):
            method = self._channel.unary_unary(f"/{_SERVICE.full_name}/{name}")
            try:
                answer = await method(request, timeout=_LONGEST_CALL_SECONDS)
            except grpc.aio.AioRpcError as error:
                await _pass_on(error, context)
        return await self._answered(name, answer, context)

    async def _answered(self, name: str, answer: bytes, context: Any) -> bytes:
        self.answers[name] += 1
        if self.lose_answers[name]:
            self.lose_answers[name] -= 1
            await context.abort(grpc.StatusCode.UNAVAILABLE, _BROKEN)
        return answer + self.appended

    async def _upload(self, requests: AsyncIterator[bytes], context: Any) -> bytes:
        self.calls["UploadAdapter"] += 1
        cut = self.cut_uploads.pop(0) if self.cut_uploads else 1 << 62
        metadata = [(k, v) for k, v in context.invocation_metadata() if k.startswith("raflora-")]
        method = self._channel.stream_unary(f"/{_SERVICE.full_name}/UploadAdapter")
        call = method(metadata=metadata, timeout=_LONGEST_CALL_SECONDS)
        passed = 0
        try:
            async for request in requests:
                data = federation_pb2.UploadAdapterRequest.FromString(request).data[: cut - passed]
                if data:
                    await call.write(federation_pb2.UploadAdapterRequest(data=data).SerializeToString())
                passed += len(data)
                self.uploaded_bytes += len(data)
                if passed == cut:
                    if self.cut_before_the_end:
                        call.cancel()
                    else:
                        await call.done_writing()
                        await call
                    await context.abort(grpc.StatusCode.UNAVAILABLE, _BROKEN)
            await call.done_writing()
            answer = await call
        except grpc.aio.AioRpcError as error:
            await _pass_on(error, context)
        except asyncio.InvalidStateError:  # the coordinator has refused before the end
            await _pass_on_status(call, context)
        finally:
            call.cancel()
        return await self._answered("UploadAdapter", answer, context)

    async def _download(self, request: bytes, context: Any) -> AsyncIterator[bytes]:
        self.calls["DownloadAdapter"] += 1
        call = self._channel.unary_stream(f"/{_SERVICE.full_name}/DownloadAdapter")(
            request, timeout=_LONGEST_CALL_SECONDS
        )
        try:
            async for chunk in call:
                yield chunk
        except grpc.aio.AioRpcError as error:
            await _pass_on(error, context)
        finally:
            call.cancel()


async def _pass_on(error: grpc.aio.AioRpcError, context: Any) -> None:
    trailing = tuple((key, value) for key, value in error.trailing_metadata() or () if key.startswith("raflora-"))
    await context.abort(error.code(), error.details() or "", trailing)


async def _pass_on_status(call: Any, context: Any) -> None:
    trailing = tuple((k, v) for k, v in await call.trailing_metadata() or () if k.startswith("raflora-"))
    await context.abort(await call.code(), await call.details() or "", trailing)
