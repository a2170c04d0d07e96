"""The authority folder as the verbs init, site and access use it: found, opened, and described to its operator."""

import sys
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from common.errors import ConfigError
from common.identity import Role
from common.identity_folder import ADDRESS_FILE, AUTHORITY_FILE, CERTIFICATE_FILE, KEY_FILE, IdentityFolder
from coordinator.config import IdentityConfig
from coordinator.identity.authority import CERTIFICATE_FILE as AUTHORITY_CERTIFICATE
from coordinator.identity.authority import DAY_SECONDS, load_authority
from coordinator.identity.issuer import Issuer
from coordinator.identity.registry import Registry

AuthorityFolder = Annotated[Path, Parameter(name="--folder", help="What `raflora init` made: authority, or around it.")]
DEFAULT_FOLDER = Path("authority")
ACCESS_DAYS = 365.0


@dataclass(frozen=True)
class Desk:
    """Where an operator lets others in."""

    folder: Path
    issuer: Issuer

    @property
    def address(self) -> str:
        """HOST:PORT by which workers reach the coordinator, as far as the operator said."""
        path = self.folder / ADDRESS_FILE
        return path.read_text(encoding="utf-8").strip() if path.exists() else ""

    def write_identity(self, name: str, role: Role, days: float, out: Path, *, again: bool = False) -> None:
        """Makes an identity folder for a person. Raises ConfigError if there is one, or the name is taken."""
        folder = IdentityFolder(out)
        if folder.is_complete and not again:
            raise ConfigError(f"{out} holds an identity already; choose another folder, or replace it with --again")
        certificate, key = self.issuer.give_access(name, role, days, again=again)
        out.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder.write(AUTHORITY_FILE, self.issuer.authority.certificate)
        folder.write(ADDRESS_FILE, f"{self.address}\n".encode())
        folder.write(KEY_FILE, key)
        folder.write(CERTIFICATE_FILE, certificate)


def open_desk(folder: Path) -> Desk:
    """The authority in this folder or in its subfolder `authority`. Raises ConfigError."""
    inner = folder / "authority"
    if not (folder / AUTHORITY_CERTIFICATE).exists() and (inner / AUTHORITY_CERTIFICATE).exists():
        folder = inner
    authority = load_authority(folder, time.time)
    days: float = IdentityConfig.model_fields["certificate_days"].default
    return Desk(folder, Issuer(authority, Registry(folder), days * DAY_SECONDS))


def day_of(seconds: float) -> str:
    """A date for people."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M UTC")


def hint(sentence: str) -> None:
    """Beside what a script reads from standard output."""
    print(sentence, file=sys.stderr)
