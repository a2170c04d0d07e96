"""The authority folder as the verbs init, site and access use it: found, opened, and described to its operator."""

import os
import stat
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from common.certificates import MALFORMED, digest_of_key, new_key, private_key
from common.errors import ConfigError, NotAuthenticated
from common.identity import Role
from common.identity_folder import ADDRESS_FILE, AUTHORITY_FILE, CERTIFICATE_FILE, KEY_FILE, IdentityFolder
from common.moments import DAY_SECONDS
from common.transfer import rename_durably
from coordinator.config import IdentityConfig
from coordinator.identity.authority import CERTIFICATE_FILE as AUTHORITY_CERTIFICATE
from coordinator.identity.authority import load_authority
from coordinator.identity.issuer import Issuer
from coordinator.identity.registry import Registry

AuthorityFolder = Annotated[Path, Parameter(name="--folder", help="What `raflora init` made: authority, or around it.")]
DEFAULT_FOLDER = Path("authority")
ACCESS_DAYS = 365.0
_BEGUN_KEY_FILE = "key.pem.begun"  # until the registry knows it


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
        key = b"" if folder.is_complete else self._key_begun_in(folder, name)
        if not key:
            self.issuer.registry.check_is_new(name, again=again)
            # Durable before the registry knows it: after a crash the same command goes on with the same key.
            key = new_key()
            folder.write(_BEGUN_KEY_FILE, key)
        certificate, _ = self.issuer.give_access(name, role, days, again=again, key=key)
        folder.write(AUTHORITY_FILE, self.issuer.authority.certificate)
        folder.write(ADDRESS_FILE, f"{self.address}\n".encode())
        if (out / _BEGUN_KEY_FILE).exists():
            rename_durably(out / _BEGUN_KEY_FILE, out / KEY_FILE)
        folder.write(CERTIFICATE_FILE, certificate)

    def _key_begun_in(self, folder: IdentityFolder, name: str) -> bytes:
        """The key of an attempt that was cut off after the registry knew it; empty if there was none.

        Raises ConfigError for any other key: whoever put it there would come in by this name.
        """
        person = self.issuer.registry.person(name)
        known = person.key_digest if person and not person.is_revoked else ""
        for path in (folder.path / _BEGUN_KEY_FILE, folder.path / KEY_FILE):
            if _is_private(folder.path, stat.S_ISDIR) and _is_private(path, stat.S_ISREG):
                key = path.read_bytes()
                if known and _digest_of(key) == known:
                    return key
        if os.path.lexists(folder.path / KEY_FILE):
            raise ConfigError(
                f"{folder.path / KEY_FILE} is there, and is not the key that {name} was given; take it away, or "
                "choose another folder"
            )
        return b""


def open_desk(folder: Path) -> Desk:
    """The authority in this folder or in its subfolder `authority`. Raises ConfigError."""
    inner = folder / "authority"
    if not (folder / AUTHORITY_CERTIFICATE).exists() and (inner / AUTHORITY_CERTIFICATE).exists():
        folder = inner
    if not folder.is_dir():
        where = folder if folder.is_absolute() else f"./{folder}"
        raise ConfigError(f"no authority in {where}; say --folder FOLDER, which `raflora init FOLDER` made")
    authority = load_authority(folder, time.time)
    days: float = IdentityConfig.model_fields["certificate_days"].default
    return Desk(folder, Issuer(authority, Registry(folder), days * DAY_SECONDS))


def _is_private(path: Path, is_kind: Callable[[int], bool]) -> bool:
    """Whether it is there, ours, and nobody else's to read or change."""
    try:
        found = path.lstat()
    except OSError:
        return False
    return is_kind(found.st_mode) and found.st_uid == os.geteuid() and not found.st_mode & 0o077


def _digest_of(key: bytes) -> str:
    """As the registry keeps it; empty if it is no key."""
    try:
        return digest_of_key(private_key(key).public_key())
    except (*MALFORMED, NotAuthenticated):
        return ""


def hint(sentence: str) -> None:
    """Beside what a script reads from standard output."""
    print(sentence, file=sys.stderr)
