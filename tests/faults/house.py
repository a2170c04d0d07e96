"""A coordinator with an authority of its own, and sites whose workers come in with join tokens, as processes."""

import socket
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from coordinators import settings_of, to_toml
from faults.lives import Life, Lives
from faults.roles import Order
from identities import Identities, request_of

from common.certificates import check_pair, digest_of_key, new_key, private_key, read_certificate
from common.errors import BadJoinToken
from common.join_token import parse_join_token
from coordinator.identity.registry import Registry
from worker.certificates import identity_in
from worker.identity import enrol_key_of

IDENTITY_FILES = ["address", "ca.pem", "certificate.pem", "key.pem"]


@dataclass
class House:
    """A coordinator with an authority, and sites that have a join token each."""

    folder: Path
    lives: Lives
    identities: Identities = field(init=False)
    address: str = field(init=False)

    def __post_init__(self) -> None:
        self.folder.mkdir()
        self.identities = Identities(self.folder / "authority")
        self.address = f"127.0.0.1:{free_port()}"
        settings = settings_of(self.folder, server__listen=self.address, rounds__min_clients=500)
        identity = to_toml({"server.identity": self.identities.settings()})
        (self.folder / "federation.toml").write_text(to_toml(settings) + identity)

    def open(self, plan_when_ready: str = "") -> Life:
        """Starts the coordinator."""
        key = f"coordinator-of-{self.folder.name}"
        return self.lives.start(Order(key, "coordinator", str(self.folder), plan_when_ready=plan_when_ready))

    def invite(self, site: str) -> None:
        """Writes the settings and the token of its worker."""
        token = self.identities.issuer.invite(site, workers=1, days=7.0, again=False, address=self.address)[1]
        (self.folder / f"{site}.token").write_text(token.text)
        settings = {
            "name": "gpu1",
            "rank": 4,
            "state_dir": str(self.folder / site),
            "coordinator": {"join_token_file": str(self.folder / f"{site}.token")},
            "model": {"path": "tiny"},
            "data": {"train": "none", "max_examples": 10},
        }
        (self.folder / f"{site}.toml").write_text(to_toml(settings))

    def let_in(self, site: str) -> None:
        """It has a certificate from then on."""
        self.invite(site)
        token = parse_join_token((self.folder / f"{site}.token").read_text())
        key = new_key()
        certificate, _ = self.identities.issuer.enrol(read_certificate(token.certificate.encode()), request_of(key), "")
        contents = (f"{self.address}\n".encode(), self.identities.authority.certificate, certificate, key)
        for name, content in zip(IDENTITY_FILES, contents, strict=True):
            identity_in(self.folder / site).write(name, content)
        enrol_key_of(self.folder / site)

    def send(self, site: str, plan: str = "", ahead_seconds: float = 0.0) -> Life:
        """Starts its worker; it is ready when the coordinator has answered it as one that is in."""
        return self.lives.start(Order(site, "worker", str(self.folder), plan, ahead_seconds=ahead_seconds))

    async def comes_in(self, site: str) -> Life:
        """The same command again, and nothing else."""
        life = self.send(site)
        assert await life.until_ready(), life.said
        await self.lives.kill(life)
        return life

    def key_of(self, site: str) -> bytes | None:
        file = identity_in(self.folder / site).path / "key.pem"
        return file.read_bytes() if file.exists() else None

    def check_in(self, site: str) -> None:
        """One key, on both sides; the token is worth nothing for any other."""
        folder = identity_in(self.folder / site)
        assert sorted(path.name for path in folder.path.iterdir()) == IDENTITY_FILES
        no_parts_in(self.folder / site)
        pem = folder.tls.read()
        assert pem.certificate
        assert pem.key
        check_pair(pem.certificate, pem.key)
        digest = digest_of_key(private_key(pem.key).public_key())
        known = Registry(self.identities.folder).site(site)
        assert known is not None
        assert known.keys == known.token.keys == {site: digest}
        self.identities.registry.check(read_certificate(pem.certificate))
        token = parse_join_token((self.folder / f"{site}.token").read_text())
        with pytest.raises(BadJoinToken, match="has let in its 1 worker"):
            self.identities.issuer.enrol(read_certificate(token.certificate.encode()), request_of(new_key()), "")


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


def no_parts_in(*folders: Path) -> None:
    """Nothing half written lies about for ever."""
    assert [str(path) for folder in folders for path in folder.rglob("*.part")] == []
