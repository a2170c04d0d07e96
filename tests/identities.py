"""Certificates for tests: a federation's authority with everybody it lets in, and everybody whom it must not."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from coordinators import config_of
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from raflora.v1 import federation_pb2, federation_pb2_grpc, identity_pb2, identity_pb2_grpc

from common.certificates import new_key, private_key, read_certificate, signing_request
from common.channel import REASON_KEY, Pem
from common.identity import Role, Subject
from common.join_token import JoinToken
from common.moments import DAY_SECONDS
from coordinator.config import CoordinatorConfig
from coordinator.identity.authority import CERTIFICATE_FILE, KEY_FILE, Authority, new_authority
from coordinator.identity.issuer import Issuer
from coordinator.identity.registry import Registry
from coordinator.server import run_coordinator

CALL_SECONDS = 30.0
NAMES = ("localhost", "127.0.0.1")


class WallClock:
    """Tells the time that it is told, beginning with the real one, because TLS itself looks at that."""

    def __init__(self) -> None:
        self.at = time.time()

    def __call__(self) -> float:
        return self.at


class Identities:
    """An authority's folder, and what an operator and the sites do with it."""

    def __init__(self, folder: Path, now: Callable[[], float] = time.time) -> None:
        folder.mkdir(mode=0o700)
        self.folder = folder
        self.authority = new_authority("tests", now)
        (folder / KEY_FILE).write_bytes(self.authority.key)
        (folder / CERTIFICATE_FILE).write_bytes(self.authority.certificate)
        self.registry = Registry(folder)
        self.issuer = Issuer(self.authority, self.registry, 30 * DAY_SECONDS)

    def settings(self, **changes: Any) -> dict[str, Any]:
        """For `config_of(folder, server__identity=...)`."""
        return {"folder": str(self.folder), "names": list(NAMES), **changes}

    # ------------------------------------------------------------ who is let in

    def invite(self, site: str, *, workers: int = 1, days: float = 7.0, again: bool = False) -> JoinToken:
        """As `raflora site add`."""
        return self.issuer.invite(site, workers=workers, days=days, again=again, address="")[1]

    def joining(self, site: str, *, workers: int = 1, days: float = 7.0, again: bool = False) -> Pem:
        """What a worker shows that holds a join token."""
        return pem_of(self.invite(site, workers=workers, days=days, again=again))

    def worker(self, site: str) -> Pem:
        """The one worker of a site, let in."""
        token, key = self.joining(site), new_key()
        assert token.certificate is not None
        certificate, _ = self.issuer.enrol(read_certificate(token.certificate), request_of(key), "")
        return Pem(self.authority.certificate, certificate, key)

    def person(self, name: str, role: Role) -> Pem:
        """As `raflora access add`."""
        certificate, key = self.issuer.give_access(name, role, 365.0, again=False)
        return Pem(self.authority.certificate, certificate, key)

    # ------------------------------------------------------------ who is not

    def nobody(self) -> Pem:
        """Shows no certificate."""
        return Pem(self.authority.certificate)

    def unregistered(self, subject: Subject) -> Pem:
        """Signed by the authority, but the registry does not know its key."""
        return self.issued_at(time.time(), subject)

    def issued_at(self, at: float, subject: Subject) -> Pem:
        """Good for a day from then."""
        key = new_key()
        then = Authority(self.authority.certificate, self.authority.key, lambda: at)
        return Pem(self.authority.certificate, then.issue(subject, private_key(key).public_key(), DAY_SECONDS), key)

    def with_uris(self, *uris: str) -> Pem:
        """Signed by the authority, with other names than one subject."""
        key = new_key()
        certificate = certificate_with(uris, private_key(key), self.authority)
        return Pem(self.authority.certificate, certificate, key)

    def of_a_stranger(self, subject: Subject) -> Pem:
        """The right name from another authority."""
        key = new_key()
        stranger = new_authority("tests", time.time)
        certificate = stranger.issue(subject, private_key(key).public_key(), DAY_SECONDS)
        return Pem(self.authority.certificate, certificate, key)

    def self_signed(self, subject: Subject) -> Pem:
        """The right name from nobody."""
        key = new_key()
        return Pem(self.authority.certificate, certificate_with((subject.uri,), private_key(key), None), key)


def pem_of(token: JoinToken) -> Pem:
    """What a worker shows that holds this token."""
    return Pem(token.authority.encode(), token.certificate.encode(), token.key.encode())


def request_of(key: bytes) -> bytes:
    """A signing request; the coordinator decides about the name."""
    return signing_request(key, Subject(Role.WORKER, "whoever", "whoever"))


def certificate_with(uris: Sequence[str], key: ec.EllipticCurvePrivateKey, authority: Authority | None) -> bytes:
    """A client's certificate for today with these URIs; without an authority signed by itself."""
    us = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "somebody")])
    issuer = x509.load_pem_x509_certificate(authority.certificate).subject if authority else us
    names = [x509.DNSName("somebody"), *map(x509.UniformResourceIdentifier, uris)]
    now = time.time()
    builder = (
        x509.CertificateBuilder()
        .subject_name(us)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(datetime.fromtimestamp(now - 600, UTC))
        .not_valid_after(datetime.fromtimestamp(now + DAY_SECONDS, UTC))
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
    )
    signed = builder.sign(private_key(authority.key) if authority else key, hashes.SHA256())
    return signed.public_bytes(serialization.Encoding.PEM)


@asynccontextmanager
async def serving(config: CoordinatorConfig, wall_clock: Callable[[], float] = time.time) -> AsyncIterator[str]:
    """A coordinator in this process by this clock; its address."""
    listening: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    running = asyncio.create_task(run_coordinator(config, on_listening=listening.set_result, wall_clock=wall_clock))
    both: list[asyncio.Future[Any]] = [running, listening]
    await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
    try:
        if running.done():
            running.result()
        yield listening.result()
    finally:
        running.cancel()
        ended = (await asyncio.gather(running, return_exceptions=True))[0]
        if isinstance(ended, Exception):
            raise ended


def channel_as(address: str, pem: Pem) -> grpc.aio.Channel:
    """A generic client's channel: none of our options, no retries."""
    credentials = grpc.ssl_channel_credentials(pem.authority, pem.key, pem.certificate)
    return grpc.aio.secure_channel(address, credentials)


@dataclass
class House:
    """A coordinator that issues certificates, as those see it who come to it."""

    address: str
    identities: Identities
    config: CoordinatorConfig

    async def enrol(self, token: Pem, key: bytes, worker: str = "") -> Pem:
        """What a worker has afterwards."""
        async with channel_as(self.address, token) as channel:
            stub = identity_pb2_grpc.IdentityServiceStub(channel)
            request = identity_pb2.EnrolRequest(signing_request=request_of(key), worker=worker)
            answer = await stub.Enrol(request, timeout=CALL_SECONDS)
        assert read_certificate(answer.certificate).subject.name == answer.client_id
        return Pem(answer.authority, answer.certificate, key)

    async def renew(self, pem: Pem, request: bytes) -> bytes:
        """The next certificate."""
        async with channel_as(self.address, pem) as channel:
            stub = identity_pb2_grpc.IdentityServiceStub(channel)
            answer = await stub.Renew(identity_pb2.RenewRequest(signing_request=request), timeout=CALL_SECONDS)
        return bytes(answer.certificate)

    async def shake_hands(self, pem: Pem) -> federation_pb2.HandshakeResponse:
        """Whether a worker is known."""
        async with channel_as(self.address, pem) as channel:
            stub = federation_pb2_grpc.FederationServiceStub(channel)
            request = federation_pb2.HandshakeRequest(protocol_min=1, protocol_max=1)
            return await stub.Handshake(request, timeout=CALL_SECONDS)


@asynccontextmanager
async def a_house(folder: Path, clock: WallClock | None = None, **identity: Any) -> AsyncIterator[House]:
    identities = Identities(folder / "authority")
    config = config_of(folder / "federation", server__identity=identities.settings(**identity))
    async with serving(config, clock or WallClock()) as address:
        yield House(address, identities, config)


async def refused(call: Any) -> str:
    """The reason."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return reason_of(caught.value)


def reason_of(error: grpc.aio.AioRpcError) -> str:
    return str(dict(error.trailing_metadata() or ()).get(REASON_KEY, error.code().name))


def name_of(pem: Pem) -> str:
    assert pem.certificate is not None
    return read_certificate(pem.certificate).subject.name
