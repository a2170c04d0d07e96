"""A join token: one line of text with which a worker comes in for the first time.

It holds the address, the authority's certificate and a certificate with its key that is good for one thing only:
the worker's first own certificate. Whoever has the line can join in the site's name, so it travels like a password.
"""

import base64
import binascii
import json
import zlib
from dataclasses import asdict, dataclass

from common.errors import BadJoinToken

_PREFIX = "raflora-join-1."
_MAX_CHARACTERS = 16_384
_MAX_BYTES = 65_536  # unpacked


@dataclass(frozen=True)
class JoinToken:
    """What the line says."""

    address: str  # HOST:PORT of the coordinator, as the operator believes workers reach it; may be empty
    site: str
    authority: str  # PEM
    certificate: str  # PEM, role join
    key: str  # PEM

    @property
    def text(self) -> str:
        """The line."""
        packed = zlib.compress(json.dumps(asdict(self), separators=(",", ":")).encode(), 9)
        return _PREFIX + base64.urlsafe_b64encode(packed).decode().rstrip("=")


def parse_join_token(text: str) -> JoinToken:
    """The inverse. Raises BadJoinToken, without repeating what it was given."""
    text = "".join(text.split())  # terminals and mail programs break long lines
    if not text.startswith(_PREFIX) or len(text) > _MAX_CHARACTERS:
        raise BadJoinToken(f"this is no join token: expected a line that begins with {_PREFIX}")
    body = text.removeprefix(_PREFIX)
    try:
        packed = base64.b64decode(body + "=" * (-len(body) % 4), altchars=b"-_", validate=True)
        unpack = zlib.decompressobj()
        content = unpack.decompress(packed, _MAX_BYTES)
        if not unpack.eof:
            raise ValueError("too long, or cut off")
        fields = json.loads(content)
        if not isinstance(fields, dict) or not all(isinstance(value, str) for value in fields.values()):
            raise ValueError("not five texts")
        return JoinToken(**fields)
    except (binascii.Error, zlib.error, ValueError, TypeError):
        raise BadJoinToken("this join token is damaged; was the whole line copied?") from None
