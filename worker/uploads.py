"""One file's way to the coordinator: in calls of bounded length, resumed at what is durable there."""

from dataclasses import dataclass
from pathlib import Path

import structlog

from common.errors import CorruptTransfer, UnknownBlob, WrongOffset
from common.failpoints import reach
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

    Raises CorruptTransfer if the coordinator keeps refusing the bytes, LeaseSuperseded if it gave a newer lease.
    """

    async def go_on() -> int:
        reach("upload.beginning")
        committed = await client.begin_upload(upload.lease_token, upload.blob)
        reach("upload.begun")
        if committed >= upload.blob.size_bytes:
            return committed
        with upload.path.open("rb") as source:
            source.seek(committed)
            committed = await client.upload(upload.blob, committed, source)
        reach("upload.sent")
        return committed

    committed = furthest = stalls = damaged = 0
    while committed < upload.blob.size_bytes:
        try:
            committed = await contact.insist(go_on)
        except WrongOffset as error:  # a repeated call whose first attempt did arrive
            committed = error.committed_bytes
        except UnknownBlob as error:  # the coordinator began anew between the announcement and the bytes
            log.info("an upload is announced again", why=str(error))
        except CorruptTransfer as error:
            log.warning("an upload arrived damaged", error=str(error))
            committed, furthest, damaged = 0, 0, damaged + 1
            if damaged >= MAX_DAMAGED_UPLOADS:
                raise
            continue
        # Not against the call before: an offset that goes back and forth would keep us sending for ever.
        stalls = 0 if committed > furthest else stalls + 1
        furthest = max(furthest, committed)
        if stalls >= MAX_STALLS:
            raise CorruptTransfer(
                f"upload: {stalls} answered calls and still {committed} of {upload.blob.size_bytes} bytes are durable"
            )
