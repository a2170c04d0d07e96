"""From a join token to a certificate, its renewal and its end; the coordinator's own papers change under way."""

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
from coordinators import NumpyClient, Observer, config_of
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from identities import (
    CALL_SECONDS,
    House,
    Identities,
    WallClock,
    a_house,
    channel_as,
    name_of,
    reason_of,
    refused,
    request_of,
    serving,
)
from raflora.v1 import federation_pb2, federation_pb2_grpc, identity_pb2, identity_pb2_grpc, status_pb2, status_pb2_grpc

from common.certificates import new_key, read_certificate
from common.channel import Pem, rotating_server_credentials
from common.codec import digest_of
from common.identity import Role, Subject
from common.moments import DAY_SECONDS
from coordinator.config import ServerConfig
from coordinator.identity.security import security_of
from coordinator.servicers.access import AccessInterceptor
from coordinator.servicers.interceptor import ErrorInterceptor
from worker.client import CoordinatorClient, Credentials
from worker.config import CoordinatorAddress

# ---------------------------------------------------------------- join tokens


async def test_a_token_for_one_gives_the_sites_name_once(tmp_path: Path) -> None:
    async with a_house(tmp_path) as house:
        token, key = house.identities.joining("clinic-a"), new_key()
        worker = await house.enrol(token, key, "gpu1")
        assert name_of(worker) == "clinic-a"
        assert (await house.shake_hands(worker)).federation == "digits"
        assert await refused(house.enrol(token, new_key())) == "bad_join_token"
        assert name_of(await house.enrol(token, key)) == "clinic-a"  # the answer was lost


async def test_a_token_for_three_lets_in_three_keys(tmp_path: Path) -> None:
    async with a_house(tmp_path) as house:
        token, first = house.identities.joining("clinic-b", workers=3), new_key()
        assert name_of(await house.enrol(token, first, "gpu1")) == "clinic-b.gpu1"
        assert await refused(house.enrol(token, new_key(), "gpu1")) == "identity_conflict"
        assert await refused(house.enrol(token, new_key(), "")) == "invalid_request"
        assert await refused(house.enrol(token, new_key(), "../gpu")) == "invalid_request"
        assert name_of(await house.enrol(token, new_key(), "gpu2")) == "clinic-b.gpu2"
        assert name_of(await house.enrol(token, new_key(), "gpu3")) == "clinic-b.gpu3"
        assert await refused(house.enrol(token, new_key(), "gpu4")) == "bad_join_token"
        assert name_of(await house.enrol(token, first, "another host name")) == "clinic-b.gpu1"


async def test_workers_that_come_at_once_do_not_share_the_last_place(tmp_path: Path) -> None:
    async with a_house(tmp_path) as house:
        token = house.identities.joining("clinic-b", workers=4)
        came = await asyncio.gather(
            *(house.enrol(token, new_key(), f"gpu{i}") for i in range(8)), return_exceptions=True
        )
        reasons = [reason_of(error) for error in came if isinstance(error, grpc.aio.AioRpcError)]
        site = house.identities.registry.site("clinic-b")
    assert reasons == ["bad_join_token"] * 4
    assert site is not None
    assert len(site.keys) == len(set(site.keys.values())) == 4


async def test_a_used_token_is_still_used_after_a_restart(tmp_path: Path) -> None:
    identities = Identities(tmp_path / "authority")
    config = config_of(tmp_path / "federation", server__identity=identities.settings())
    token, key = identities.joining("clinic-a"), new_key()
    async with serving(config) as address:
        worker = await House(address, identities, config).enrol(token, key)
    async with serving(config) as address:
        house = House(address, identities, config)
        assert await refused(house.enrol(token, new_key())) == "bad_join_token"
        await house.shake_hands(worker)


async def test_a_token_ends(tmp_path: Path) -> None:
    clock = WallClock()
    async with a_house(tmp_path, clock) as house:
        token = house.identities.joining("clinic-a", days=1.0)
        clock.at += 1.01 * DAY_SECONDS
        assert await refused(house.enrol(token, new_key())) == "bad_join_token"


async def test_a_revoked_site_cannot_use_its_token(tmp_path: Path) -> None:
    async with a_house(tmp_path) as house:
        token = house.identities.joining("clinic-a")
        house.identities.registry.revoke_site("clinic-a")
        assert await refused(house.enrol(token, new_key())) == "revoked"


async def test_another_federations_token_does_not_even_connect(tmp_path: Path) -> None:
    elsewhere = Identities(tmp_path / "elsewhere")
    async with a_house(tmp_path) as house:
        house.identities.joining("clinic-a")
        token = elsewhere.joining("clinic-a")
        misled = replace(token, authority=house.identities.authority.certificate)
        assert await refused(house.enrol(token, new_key())) == "UNAVAILABLE"  # the worker trusts another authority
        assert await refused(house.enrol(misled, new_key())) == "UNAVAILABLE"  # and the coordinator does too


def csr(key: Any) -> bytes:
    """A signing request of any key."""
    builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
    return builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


def with_a_bad_signature() -> bytes:
    request = x509.load_pem_x509_csr(csr(ec.generate_private_key(ec.SECP256R1())))
    der = bytearray(request.public_bytes(serialization.Encoding.DER))
    other = x509.load_pem_x509_csr(csr(ec.generate_private_key(ec.SECP256R1())))
    mine, theirs = (
        r.public_key().public_bytes(serialization.Encoding.X962, serialization.PublicFormat.UncompressedPoint)
        for r in (request, other)
    )
    at = bytes(der).index(mine)
    der[at : at + len(mine)] = theirs  # somebody else's public key under my signature
    return x509.load_der_x509_csr(bytes(der)).public_bytes(serialization.Encoding.PEM)


BAD_REQUESTS: Mapping[str, Callable[[], bytes]] = {
    "nothing": lambda: b"",
    "no request": lambda: b"-----BEGIN CERTIFICATE REQUEST-----\nAAAA\n-----END CERTIFICATE REQUEST-----\n",
    "somebody else's key": with_a_bad_signature,
    "P-384": lambda: csr(ec.generate_private_key(ec.SECP384R1())),
    "RSA": lambda: csr(rsa.generate_private_key(65537, 2048)),
    "too long": lambda: request_of(new_key()) + b"\n" * 9000,
}


async def test_a_bad_signing_request_uses_no_place(tmp_path: Path) -> None:
    async with a_house(tmp_path) as house:
        token = house.identities.joining("clinic-a")
        async with channel_as(house.address, token) as channel:
            stub = identity_pb2_grpc.IdentityServiceStub(channel)
            for made in BAD_REQUESTS.values():
                request = identity_pb2.EnrolRequest(signing_request=made())
                assert await refused(stub.Enrol(request, timeout=CALL_SECONDS)) == "invalid_request"
        assert name_of(await house.enrol(token, new_key())) == "clinic-a"


# ---------------------------------------------------------------- renewal, loss and return


async def test_a_certificate_is_renewed_for_its_own_key_alone(tmp_path: Path) -> None:
    clock = WallClock()
    async with a_house(tmp_path, clock) as house:
        key = new_key()
        worker = await house.enrol(house.identities.joining("clinic-a"), key)
        assert await refused(house.renew(worker, request_of(new_key()))) == "not_allowed"
        clock.at += 300.0  # within what certificates are backdated, because TLS goes by the real clock
        fresh = await house.renew(worker, request_of(key))
        assert worker.certificate is not None
        before, after = read_certificate(worker.certificate), read_certificate(fresh)
        assert (after.subject, after.key_digest) == (before.subject, before.key_digest)
        await house.shake_hands(replace(worker, certificate=fresh))


async def test_an_expired_certificate_is_refused_on_an_open_connection_too(tmp_path: Path) -> None:
    clock = WallClock()
    async with a_house(tmp_path, clock) as house:
        worker = await house.enrol(house.identities.joining("clinic-a"), new_key())
        async with channel_as(house.address, worker) as channel:
            stub = federation_pb2_grpc.FederationServiceStub(channel)
            request = federation_pb2.HandshakeRequest(protocol_min=1, protocol_max=1)
            answer = await stub.Handshake(request, timeout=CALL_SECONDS)
            assert answer.wall_time_seconds > 1.7e9
            clock.at += 31 * DAY_SECONDS
            assert await refused(stub.Handshake(request, timeout=CALL_SECONDS)) == "not_authenticated"


async def test_an_observer_renews_too(tmp_path: Path) -> None:
    async with a_house(tmp_path) as house:
        eve = house.identities.person("eve", Role.OBSERVER)
        assert eve.key is not None
        fresh = read_certificate(await house.renew(eve, request_of(eve.key)))
    assert fresh.subject == Subject(Role.OBSERVER, "eve", "eve")


def write_files(folder: Path, pem: Pem) -> dict[str, Path]:
    """As [coordinator.tls] of a worker's settings names them."""
    folder.mkdir()
    files = {"ca_file": pem.authority, "certificate_file": pem.certificate, "key_file": pem.key}
    for name, content in files.items():
        (folder / name).write_bytes(content or b"")
    return {name: folder / name for name in files}


@asynccontextmanager
async def client_as(house: House, pem: Pem, folder: Path, enrol_key: str) -> AsyncIterator[NumpyClient]:
    """A numpy client that shows these papers; what it says of itself in its requests is its own affair."""
    client = NumpyClient(house.address, name_of(pem), 4, enrol_key=enrol_key)
    where = CoordinatorAddress.model_validate({"address": house.address, "tls": write_files(folder, pem)})
    client.rpc = CoordinatorClient(where, Credentials(client.client_id, enrol_key, "0"))
    try:
        yield client
    finally:
        await client.rpc.close()


async def test_a_worker_that_lost_everything_comes_back_with_a_new_token(tmp_path: Path) -> None:
    async with a_house(tmp_path) as house:
        first = await house.enrol(house.identities.joining("clinic-a"), new_key())
        async with client_as(house, first, tmp_path / "first", "old key") as client:
            await client.join()
        again = await house.enrol(house.identities.joining("clinic-a", again=True), new_key())
        async with client_as(house, again, tmp_path / "again", "new key") as client:
            await client.join()
        assert await refused(house.shake_hands(first)) == "revoked"
        house.identities.registry.revoke_site("clinic-a")
        assert await refused(house.shake_hands(again)) == "revoked"
        anew = await house.enrol(house.identities.joining("clinic-a"), new_key())
        async with client_as(house, anew, tmp_path / "anew", "newest key") as client:
            await client.join()
        async with channel_as(house.address, house.identities.person("eve", Role.OBSERVER)) as channel:
            listing = await Observer(channel).status.ListClients(status_pb2.ListClientsRequest())
    assert [(c.client_id, c.organisation, c.membership) for c in listing.clients] == [
        ("clinic-a", "clinic-a", "active")
    ]


async def test_one_lost_worker_of_a_site_returns_without_the_others_noticing(tmp_path: Path) -> None:
    async with a_house(tmp_path) as house:
        token = house.identities.joining("clinic-b", workers=2)
        one, two = [await house.enrol(token, new_key(), name) for name in ("gpu1", "gpu2")]
        again = await house.enrol(house.identities.joining("clinic-b", again=True), new_key(), "gpu1")
        assert name_of(again) == "clinic-b.gpu1"
        assert await refused(house.shake_hands(one)) == "revoked"
        await house.shake_hands(two)


async def test_a_federation_with_certificates_finishes(tmp_path: Path) -> None:
    identities = Identities(tmp_path / "authority")
    config = config_of(tmp_path / "federation", server__identity=identities.settings(), rounds__min_clients=2)
    async with serving(config) as address:
        house = House(address, identities, config)
        ada = await house.enrol(identities.joining("ada"), new_key())
        bob = await house.enrol(identities.joining("bob"), new_key())
        async with (
            client_as(house, ada, tmp_path / "ada", "a") as one,
            client_as(house, bob, tmp_path / "bob", "b") as two,
            channel_as(address, identities.person("eve", Role.OBSERVER)) as channel,
        ):
            await one.join()
            await two.join()
            await asyncio.gather(one.work(), two.work())
            status = await Observer(channel).finished()
    assert status.security == "mutual TLS: every caller shows a certificate of this federation's own authority"


# ---------------------------------------------------------------- revocation under way


async def test_a_revocation_ends_what_is_open(tmp_path: Path) -> None:
    async with a_house(tmp_path) as house:
        worker = await house.enrol(house.identities.joining("clinic-a"), new_key())
        eve = house.identities.person("eve", Role.OBSERVER)
        async with (
            client_as(house, worker, tmp_path / "worker", "k") as client,
            channel_as(house.address, worker) as channel,
            channel_as(house.address, eve) as eves,
        ):
            await client.join()
            stub = federation_pb2_grpc.FederationServiceStub(channel)
            polling = stub.PollTask(federation_pb2.PollTaskRequest(wait_seconds=45.0), timeout=CALL_SECONDS)
            watching = Observer(eves).status.WatchStatus(status_pb2.WatchStatusRequest(), timeout=CALL_SECONDS)
            await watching.read()
            house.identities.registry.revoke_site("clinic-a")
            house.identities.registry.revoke_person("eve")
            # Both would last longer than a call may in this test, and neither has anything to wait for.
            assert await refused(polling) == "revoked"
            while (ended := await _end_of(watching)) == "":
                pass
    assert ended in {"revoked", "CANCELLED"}


async def _end_of(call: Any) -> str:
    try:
        return "" if await call.read() is not grpc.aio.EOF else reason_of_call(await call.code())
    except grpc.aio.AioRpcError as error:
        return reason_of(error)


def reason_of_call(code: grpc.StatusCode) -> str:
    return code.name


async def test_a_revocation_ends_an_upload_under_way(tmp_path: Path) -> None:
    identities = Identities(tmp_path / "authority")
    config = config_of(tmp_path / "federation", server__identity=identities.settings(), rounds__min_clients=1)
    async with serving(config) as address:
        house = House(address, identities, config)
        worker = await house.enrol(identities.joining("clinic-a"), new_key())
        async with client_as(house, worker, tmp_path / "worker", "k") as client, channel_as(address, worker) as channel:
            await client.join()
            task = await client.fetch_task()
            content = await client.train(task)
            await client.upload(task, content, stop_at=100)
            stub = federation_pb2_grpc.FederationServiceStub(channel)
            metadata = (
                ("raflora-client-id", ""),
                ("raflora-enrol-key", ""),
                ("raflora-digest", digest_of(content)),
                ("raflora-offset", "100"),
            )
            uploading = stub.UploadAdapter(timeout=CALL_SECONDS, metadata=metadata)
            await uploading.write(federation_pb2.UploadAdapterRequest(data=content[100:200]))
            identities.registry.revoke_site("clinic-a")
            assert await refused(uploading) == "revoked"


class Endless(status_pb2_grpc.StatusServiceServicer):
    """Sends for ever, to a reader that has stopped reading."""

    def __init__(self) -> None:
        self.ended = asyncio.Event()

    async def FetchAdapter(
        self, _request: status_pb2.FetchAdapterRequest, _context: Any
    ) -> AsyncIterator[status_pb2.FetchAdapterResponse]:
        try:
            while True:
                yield status_pb2.FetchAdapterResponse(data=bytes(1 << 20))
        finally:
            self.ended.set()


async def test_a_revocation_ends_a_download_that_nobody_reads(tmp_path: Path) -> None:
    identities, endless = Identities(tmp_path / "authority"), Endless()  # type: ignore[abstract]
    security = security_of(ServerConfig.model_validate({"identity": identities.settings()}))
    assert security.gate is not None
    assert security.papers is not None
    access = AccessInterceptor(security.gate)
    server = grpc.aio.server(interceptors=[ErrorInterceptor(lambda _: None), access])
    status_pb2_grpc.add_StatusServiceServicer_to_server(endless, server)
    credentials = rotating_server_credentials(security.papers, asks_for_certificates=True)
    port = server.add_secure_port("127.0.0.1:0", credentials)
    await server.start()
    async with channel_as(f"127.0.0.1:{port}", identities.person("eve", Role.OBSERVER)) as channel:
        stub = status_pb2_grpc.StatusServiceStub(channel)
        fetching = stub.FetchAdapter(status_pb2.FetchAdapterRequest(), timeout=10 * CALL_SECONDS)
        await fetching.read()  # one message; then the windows fill up and the server waits for room
        identities.registry.revoke_person("eve")
        access.end_calls_of_the_refused()
        await asyncio.wait_for(endless.ended.wait(), CALL_SECONDS)
        fetching.cancel()
    await server.stop(None)
