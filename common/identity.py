"""Who somebody is, as a certificate says it: a role, a name and an organisation in one URI.

    raflora:worker:clinic-a.gpu1:clinic-a

It stands in the certificate's subject alternative names, so any authority can issue it. Nothing here does cryptography.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

from common.errors import NotAuthenticated

_SCHEME = "raflora"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


class Role(StrEnum):
    """What somebody may do."""

    WORKER = "worker"  # FederationService for its own client id
    OBSERVER = "observer"  # StatusService
    OPERATOR = "operator"  # StatusService and AdminService
    JOIN = "join"  # nothing but the first certificate of a worker
    COORDINATOR = "coordinator"  # serves


@dataclass(frozen=True)
class Subject:
    """Somebody."""

    role: Role
    name: str  # of a worker: its client id
    organisation: str  # for quotas; of a worker that is alone in its organisation the same as its name

    @property
    def uri(self) -> str:
        """As it stands in a certificate."""
        return f"{_SCHEME}:{self.role}:{self.name}:{self.organisation}"

    def __str__(self) -> str:
        return f"{self.role} {self.name}"


def is_name(text: str) -> bool:
    """Whether this can name a client, a site or an organisation: letters, digits, dots, dashes, at most 100."""
    return _NAME.fullmatch(text) is not None


def subject_of(uris: Iterable[str]) -> Subject:
    """The one subject among a certificate's URIs. Raises NotAuthenticated unless there is exactly one, well formed."""
    ours = [uri for uri in uris if uri.startswith(f"{_SCHEME}:")]
    if len(ours) != 1:
        raise NotAuthenticated(
            f"the certificate names {len(ours)} subjects; exactly one URI {_SCHEME}:ROLE:NAME:ORGANISATION is expected"
        )
    parts = ours[0].split(":")
    if len(parts) != 4 or parts[1] not in set(Role) or not is_name(parts[2]) or not is_name(parts[3]):
        raise NotAuthenticated(f"the certificate's subject {ours[0][:300]!r} is not {_SCHEME}:ROLE:NAME:ORGANISATION")
    return Subject(Role(parts[1]), parts[2], parts[3])
