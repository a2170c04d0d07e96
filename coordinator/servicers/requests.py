"""What callers send: taken from the wire when it is known who sends it, bounded by its call, and then parsed.

gRPC would take and parse it first and ask afterwards: four megabytes of empty entries become ninety in memory.
"""

from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any, TypeAlias

import grpc.aio
from google.protobuf.message import DecodeError

from common.adapter import MAX_TENSORS
from common.channel import MAX_MESSAGE_BYTES
from common.errors import InvalidRequest
from coordinator.identity.caller import own_client_id, own_enrol_key

MAX_REQUEST_BYTES = 64 << 10  # of every call that is not named below
_MAX_BYTES: Mapping[str, int] = {
    "/raflora.v1.FederationService/UploadAdapter": MAX_MESSAGE_BYTES,
    "/raflora.v1.FederationService/Join": MAX_TENSORS * 64,  # a module of PEFT's with its sizes
}
Parse: TypeAlias = Callable[[bytes], Any]
_Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"


async def only_message(context: _Context, method: str, parse: Parse) -> Any:
    """The message of a call that has one. Raises what `message_in` does, InvalidRequest without one."""
    raw = await context.read()
    if raw is grpc.aio.EOF:
        raise InvalidRequest("the call ended without its message")
    return message_in(raw, method, parse)


def message_in(raw: bytes, method: str, parse: Parse) -> Any:
    """The message, in the name of the present caller.

    Raises InvalidRequest for bytes that are too many or no message, NotAllowed for somebody else's name.
    """
    most = _MAX_BYTES.get(method, MAX_REQUEST_BYTES)
    if len(raw) > most:
        raise InvalidRequest(f"{len(raw)} bytes; a message of this call has at most {most}")
    try:
        return _in_the_callers_name(parse(raw))
    except DecodeError as error:
        raise InvalidRequest(f"{len(raw)} bytes that are not the message of this call: {error}") from None


async def messages_in(context: _Context, method: str, parse: Parse) -> AsyncIterator[Any]:
    """The messages of a stream. Takes none before it is wanted, and keeps none while the next one is waited for.

    A thousand senders may fall silent. (gRPC's own iterator keeps the message.)
    """

    async def next_one() -> list[Any]:
        raw = await context.read()
        return [] if raw is grpc.aio.EOF else [message_in(raw, method, parse)]

    while held := await next_one():
        yield held.pop()


def _in_the_callers_name(request: Any) -> Any:
    """The request with the client id of the certificate. A worker's only: an operator names clients of others."""
    fields = getattr(getattr(request, "DESCRIPTOR", None), "fields_by_name", {})
    if "client_id" in fields:
        request.client_id = own_client_id(request.client_id)
    if "enrol_key" in fields:
        request.enrol_key = own_enrol_key(request.enrol_key)
    return request
