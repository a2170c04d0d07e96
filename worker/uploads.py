"""One file's way to the coordinator: in calls of bounded length, resumed at what is durable there."""

from dataclasses import dataclass
from pathlib import Path

import structlog

from common.errors import CorruptTransfer, WrongOffset
from worker.client import CoordinatorClient
from worker.contact import Contact
from worker.messages import Blob

MAX_DAMAGED_UPLOADS = 3
MAX_STALLS = 5  # calls that were answered, but nothing more was durable afterwards

log = structlog.get_logger()


@dataclass(frozen=True)
class Upload:
    """What goes where."""

    path: Path
    blob: Blob
    lease_token: int


async def send(upload: Upload, client: CoordinatorClient, contact: Contact) -> None:
    """Returns when every byte is durable at the coordinator; a lost connection only takes longer.

    Raises CorruptTransfer if the coordinator keeps refusing the bytes.
    """

    async def go_on() -> int:
        committed = await client.begin_upload(upload.lease_token, upload.blob)
        if committed >= upload.blob.size_bytes:
            return committed
        with upload.path.open("rb") as source:
            source.seek(committed)
            return await client.upload(upload.blob, committed, source)

    committed = stalls = damaged = 0
    while committed < upload.blob.size_bytes:
        before = committed
        try:
            committed = await contact.insist(go_on)
        except WrongOffset as error:  # a repeated call whose first attempt did arrive
            committed = error.committed_bytes
        except CorruptTransfer as error:
            log.warning("an upload arrived damaged", error=str(error))
            committed, damaged = 0, damaged + 1
            if damaged >= MAX_DAMAGED_UPLOADS:
                raise
            continue
        stalls = 0 if committed > before else stalls + 1
        if stalls >= MAX_STALLS:
            raise CorruptTransfer(
                f"upload: {stalls} answered calls and still {committed} of {upload.blob.size_bytes} bytes are durable"
            )
