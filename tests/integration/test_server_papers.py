"""The coordinator's own papers, as openssl and new connections see them: modern TLS, renewed while it runs."""

import asyncio
import re
import shutil
import subprocess
from pathlib import Path

import grpc
import grpc.aio
import pytest
from coordinators import config_of
from cryptography import x509
from identities import (
    CALL_SECONDS,
    House,
    Identities,
    WallClock,
    a_house,
    channel_as,
    refused,
    serving,
)
from raflora.v1 import federation_pb2, federation_pb2_grpc

from common.certificates import new_key, private_key, read_certificate
from common.channel import Pem
from common.identity import Role, Subject
from common.moments import DAY_SECONDS

needs_openssl = pytest.mark.skipif(shutil.which("openssl") is None, reason="needs the openssl command")


# ---------------------------------------------------------------- the coordinator's own papers


async def served_certificate(house: House, pem: Pem) -> x509.Certificate:
    """What a new connection is shown; openssl asks, so that no library of ours does."""
    folder = house.identities.folder.parent
    (folder / "pem").write_bytes((pem.certificate or b"") + (pem.key or b""))
    asked = await asyncio.to_thread(_s_client, house, folder / "pem", "-no_check_time")
    found = re.search(r"-----BEGIN CERTIFICATE-----.*?-----END CERTIFICATE-----", asked, re.DOTALL)
    assert found, asked
    return x509.load_pem_x509_certificate(found[0].encode())


def _s_client(house: House, certificate: Path | None, *options: str) -> str:
    shown = ["-cert", str(certificate), "-key", str(certificate)] if certificate else []
    done = subprocess.run(
        ["openssl", "s_client", "-connect", house.address, "-CAfile", str(house.identities.folder / "ca.pem"),
         "-alpn", "h2", "-verify_return_error", "-verify_hostname", "localhost", *shown, *options],
        stdin=subprocess.DEVNULL, capture_output=True, timeout=30, check=False,
    )  # fmt: skip
    return (done.stdout + done.stderr).decode(errors="replace")


@needs_openssl
async def test_the_coordinators_certificate_is_renewed_while_it_runs(tmp_path: Path) -> None:
    clock = WallClock()
    async with a_house(tmp_path, clock, certificate_days=30.0) as house:
        eve = house.identities.person("eve", Role.OBSERVER)
        first = await served_certificate(house, eve)
        clock.at += 19 * DAY_SECONDS
        assert (await served_certificate(house, eve)).serial_number == first.serial_number
        clock.at += 2 * DAY_SECONDS
        second = await served_certificate(house, eve)
    assert second.serial_number != first.serial_number
    assert second.not_valid_after_utc > first.not_valid_after_utc
    assert second.public_key() != first.public_key()


@needs_openssl
async def test_openssl_finds_modern_tls_a_chain_that_holds_and_nothing_else(tmp_path: Path) -> None:
    async with a_house(tmp_path) as house:
        eve = house.identities.person("eve", Role.OBSERVER)
        certificate = await served_certificate(house, eve)
        pem = tmp_path / "pem"
        good = await asyncio.to_thread(_s_client, house, pem)
        tls12 = await asyncio.to_thread(_s_client, house, pem, "-tls1_2")
        tls11 = await asyncio.to_thread(_s_client, house, pem, "-tls1_1", "-cipher", "ALL:@SECLEVEL=0")
        anonymous = await asyncio.to_thread(_s_client, house, pem, "-tls1_2", "-cipher", "aNULL:eNULL:@SECLEVEL=0")
        cbc = await asyncio.to_thread(_s_client, house, pem, "-tls1_2", "-cipher", "ECDHE-ECDSA-AES128-SHA")
    assert all(said in good for said in ("Verification: OK", "TLSv1.3", "ALPN protocol: h2"))
    assert all(said in tls12 for said in ("Verification: OK", "TLSv1.2"))
    for refused_one in (tls11, anonymous, cbc):
        assert "Cipher is (NONE)" in refused_one
    usage = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert [use.dotted_string for use in usage] == ["1.3.6.1.5.5.7.3.1"]  # serves, and cannot call


async def test_a_worker_cannot_pose_as_the_coordinator(tmp_path: Path) -> None:
    identities = Identities(tmp_path / "authority")
    worker = identities.worker("localhost")  # even with the right name
    assert worker.key is not None
    assert worker.certificate is not None
    server = grpc.aio.server()
    credentials = grpc.ssl_server_credentials([(worker.key, worker.certificate)])
    port = server.add_secure_port("127.0.0.1:0", credentials)
    await server.start()
    async with channel_as(f"localhost:{port}", identities.nobody()) as channel:
        stub = federation_pb2_grpc.FederationServiceStub(channel)
        call = stub.Handshake(federation_pb2.HandshakeRequest(), timeout=CALL_SECONDS)
        assert await refused(call) == "UNAVAILABLE"
    await server.stop(None)


async def test_files_of_another_authority_are_read_again_and_broken_ones_are_not_used(tmp_path: Path) -> None:
    mine, fake = Identities(tmp_path / "mine"), Subject(Role.COORDINATOR, "coordinator", "coordinator")

    def write(pem_key: bytes | None = None) -> int:
        key = new_key()
        pem = mine.authority.issue(fake, private_key(key).public_key(), DAY_SECONDS, ("localhost", "127.0.0.1"))
        (tmp_path / "cert.pem").write_bytes(pem)
        (tmp_path / "key.pem").write_bytes(pem_key or key)
        return read_certificate(pem).serial

    first = write()
    tls = {"certificate_file": str(tmp_path / "cert.pem"), "key_file": str(tmp_path / "key.pem")}
    ca_file = str(mine.folder / "ca.pem")
    config = config_of(tmp_path / "federation", server__tls={**tls, "ca_file": ca_file})
    outsider = Identities(tmp_path / "other")
    async with serving(config) as address:
        house = House(address, mine, config)
        ada = mine.unregistered(Subject(Role.WORKER, "ada", "uni"))  # no registry: the certificate is enough
        await house.shake_hands(ada)
        assert (
            await refused(house.shake_hands(mine.unregistered(Subject(Role.OBSERVER, "eve", "uni")))) == "not_allowed"
        )
        assert (
            await refused(house.shake_hands(outsider.unregistered(Subject(Role.WORKER, "ada", "uni")))) == "UNAVAILABLE"
        )
        if shutil.which("openssl"):
            assert (await served_certificate(house, ada)).serial_number == first
            second = write()
            assert (await served_certificate(house, ada)).serial_number == second
            write(new_key())  # a key that does not belong to it
            assert (await served_certificate(house, ada)).serial_number == second
