"""Whose blobs lie in a state folder: a small file, so that another federation never sweeps them away.

Blobs have no names but their digests: only the journal of their own federation knows which are still needed.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from common.errors import ConfigError, CorruptStore
from common.failpoints import reach
from common.transfer import sweep_parts, write_durably
from coordinator.stores.blobs import FileBlobs

OWNER_FILE = "owner.json"


@dataclass(frozen=True)
class Owner:
    """A federation, and where its journal is."""

    federation: str
    journal: str  # without a password; empty: in the state folder itself

    def __str__(self) -> str:
        return f"federation {self.federation!r} (journal {self.journal or 'in the folder'})"


def claim_state_folder(folder: Path, owner: Owner, blobs: FileBlobs) -> None:
    """Notes durably whose blobs these are. Call it under the folder's lock, before anything is swept.

    Raises ConfigError if blobs are here and are another's; a folder without blobs changes hands.
    """
    sweep_parts(folder)
    file = folder / OWNER_FILE
    if file.is_file():
        found = owner_of(folder)
        if found == owner:
            return
        if blobs.digests():
            raise ConfigError(
                f"state_dir: {folder} holds the adapters of {found}, but this is {owner}; give this one another "
                "state_dir, or start it with the name and store.journal of the federation that lives there"
            )
    write_durably(file, json.dumps(asdict(owner)).encode(), mode=0o600)
    reach("folder.claimed")


def owner_of(folder: Path) -> Owner:
    """Whose state folder this is. Raises CorruptStore if its file is not what was written."""
    file = folder / OWNER_FILE
    try:
        fields = json.loads(file.read_bytes())
        return Owner(str(fields["federation"]), str(fields["journal"]))
    except (ValueError, KeyError, TypeError) as error:
        raise CorruptStore(f"{file}: not what raflora wrote: {error!r}") from None
