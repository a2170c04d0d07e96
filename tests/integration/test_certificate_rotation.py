"""A coordinator that runs shows its next certificate to the next connection: nobody restarts it."""

import asyncio
import socket
import ssl
from pathlib import Path

from coordinators import config_of
from cryptography import x509
from identities import Identities, WallClock, a_house, channel_as, serving
from raflora.v1 import status_pb2, status_pb2_grpc

from common.certificates import new_key, private_key
from common.identity import Role, Subject
from common.moments import DAY_SECONDS

SECONDS = 30.0  # for one call; a bound, not an expectation
SHORT_DAYS = 0.03  # 2,592 s; with the 600 s by which they are backdated a third of that life is 1,064 s


def serial_shown_by(address: str) -> int:
    """The serial number of the certificate that a new connection is shown. Blocking."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    host, _, port = address.rpartition(":")
    with socket.create_connection((host, int(port)), SECONDS) as plain, context.wrap_socket(plain) as secure:
        shown = secure.getpeercert(binary_form=True)
    assert shown is not None
    return x509.load_der_x509_certificate(shown).serial_number


async def test_a_certificate_that_the_coordinator_issues_to_itself_is_followed_by_the_next(tmp_path: Path) -> None:
    clock = WallClock()
    clock.at -= 2000.0  # so that both certificates are good today
    async with a_house(tmp_path, clock, certificate_days=SHORT_DAYS) as house:
        first = await asyncio.to_thread(serial_shown_by, house.address)
        assert await asyncio.to_thread(serial_shown_by, house.address) == first
        clock.at += 2000.0
        second = await asyncio.to_thread(serial_shown_by, house.address)
        assert second != first
        assert await asyncio.to_thread(serial_shown_by, house.address) == second
        await house.shake_hands(house.identities.worker("clinic-a"))


async def test_certificate_files_that_are_replaced_are_shown_and_open_connections_stay(tmp_path: Path) -> None:
    identities = Identities(tmp_path / "authority")
    files = {"ca_file": str(identities.folder / "ca.pem"), **write_papers(tmp_path, identities)}
    observer = identities.unregistered(Subject(Role.OBSERVER, "eve", "eve"))
    async with serving(config_of(tmp_path / "federation", server__tls=files)) as address:
        first = await asyncio.to_thread(serial_shown_by, address)
        async with channel_as(address, observer) as channel:
            stub = status_pb2_grpc.StatusServiceStub(channel)
            await stub.GetStatus(status_pb2.GetStatusRequest(), timeout=SECONDS)
            write_papers(tmp_path, identities)
            second = await asyncio.to_thread(serial_shown_by, address)
            assert second != first
            await stub.GetStatus(status_pb2.GetStatusRequest(), timeout=SECONDS)
        async with channel_as(address, observer) as channel:
            stub = status_pb2_grpc.StatusServiceStub(channel)
            await stub.GetStatus(status_pb2.GetStatusRequest(), timeout=SECONDS)


def write_papers(folder: Path, identities: Identities) -> dict[str, str]:
    """A coordinator's certificate and key, new ones each time."""
    key, subject = new_key(), Subject(Role.COORDINATOR, "coordinator", "coordinator")
    certificate = identities.authority.issue(subject, private_key(key).public_key(), DAY_SECONDS, ("127.0.0.1",))
    (folder / "cert.pem").write_bytes(certificate)
    (folder / "key.pem").write_bytes(key)
    return {"certificate_file": str(folder / "cert.pem"), "key_file": str(folder / "key.pem")}
