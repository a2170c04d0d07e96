"""An identity as a folder: what a person or a worker shows to a coordinator, in four small files.

ca.pem            the authority that the coordinator's certificate must be of
certificate.pem   who this is
key.pem           its key; nobody else may read it
address           HOST:PORT of the coordinator, one line

Nothing here does cryptography or opens a connection.
"""

from dataclasses import dataclass
from pathlib import Path

from common.channel import Tls
from common.errors import ConfigError
from common.transfer import sweep_parts, write_durably

AUTHORITY_FILE = "ca.pem"
CERTIFICATE_FILE = "certificate.pem"
KEY_FILE = "key.pem"
ADDRESS_FILE = "address"


@dataclass(frozen=True)
class IdentityFolder:
    """Where an identity lies, or will."""

    path: Path

    @property
    def tls(self) -> Tls:
        """Its files."""
        return Tls(self.path / AUTHORITY_FILE, self.path / CERTIFICATE_FILE, self.path / KEY_FILE)

    @property
    def is_complete(self) -> bool:
        """Whether somebody can be told by it; the certificate is written last."""
        return (self.path / CERTIFICATE_FILE).exists()

    @property
    def address(self) -> str:
        """The coordinator's; empty if the folder does not say."""
        try:
            return (self.path / ADDRESS_FILE).read_text(encoding="utf-8").strip()
        except FileNotFoundError:
            return ""
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{self.path / ADDRESS_FILE}: cannot be read: {error}") from None

    def check(self) -> None:
        """Raises ConfigError unless all of it is there."""
        missing = [name for name in (AUTHORITY_FILE, CERTIFICATE_FILE, KEY_FILE) if not (self.path / name).is_file()]
        if missing:
            raise ConfigError(
                f"{self.path} is no identity folder: it lacks {', '.join(missing)} "
                "(`raflora init` and `raflora access add` make such folders)"
            )

    def write(self, name: str, content: bytes) -> None:
        """Puts one of the files there, durably and for its owner's eyes only."""
        self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
        sweep_parts(self.path, of=name)  # of a process that died here; it may be a key
        write_durably(self.path / name, content, mode=0o600)

    def sweep(self) -> None:
        """Removes what a process that died while it wrote has left. Only while nobody writes there."""
        for name in (AUTHORITY_FILE, CERTIFICATE_FILE, KEY_FILE, ADDRESS_FILE):
            sweep_parts(self.path, of=name)
