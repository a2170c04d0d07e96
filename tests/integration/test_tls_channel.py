"""TLS: who is let in, who is not, with a throw-away authority made by openssl."""

import shutil
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from raflora.v1 import status_pb2, status_pb2_grpc

from common.channel import Keepalive, Tls, client_channel, rotating_server_credentials, server_options
from common.errors import ConfigError

CALL_SECONDS = 30.0

needs_openssl = pytest.mark.skipif(shutil.which("openssl") is None, reason="needs the openssl command")


class Status(status_pb2_grpc.StatusServiceServicer):
    """Answers with the name on the caller's certificate."""

    async def GetStatus(
        self, _request: status_pb2.GetStatusRequest, context: grpc.ServicerContext
    ) -> status_pb2.GetStatusResponse:
        # The published types of auth_context say less than it is: lists of bytes by name.
        names: Any = context.auth_context().get("x509_common_name", [b"nobody"])
        status = status_pb2.FederationStatus(explanation=names[0].decode())
        return status_pb2.GetStatusResponse(status=status)


def openssl(*arguments: str | Path) -> None:
    subprocess.run(["openssl", *map(str, arguments)], check=True, capture_output=True, timeout=30)


def make_authority(folder: Path) -> Path:
    folder.mkdir()
    openssl(
        "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "1",
        "-subj", "/CN=throw-away authority", "-keyout", folder / "ca.key", "-out", folder / "ca.pem",
    )  # fmt: skip
    return folder


def issue(authority: Path, name: str, subject_alternative_name: str) -> Tls:
    """A certificate of this authority; as a client's Tls it trusts the same authority."""
    key, request, certificate = (authority / f"{name}.{ending}" for ending in ("key", "csr", "pem"))
    extensions = authority / f"{name}.cnf"
    extensions.write_text(f"subjectAltName={subject_alternative_name}\n")
    openssl(
        "req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes",
        "-subj", f"/CN={name}", "-keyout", key, "-out", request,
    )  # fmt: skip
    openssl(
        "x509", "-req", "-in", request, "-CA", authority / "ca.pem", "-CAkey", authority / "ca.key",
        "-CAcreateserial", "-days", "1", "-extfile", extensions, "-out", certificate,
    )  # fmt: skip
    return Tls(ca_file=authority / "ca.pem", certificate_file=certificate, key_file=key)


class Papers:
    """What our authority issued, and what a stranger's did."""

    def __init__(self, folder: Path) -> None:
        ours, strangers = make_authority(folder / "ours"), make_authority(folder / "strangers")
        self.ca_file = ours / "ca.pem"
        self.coordinator = issue(ours, "coordinator", "IP:127.0.0.1,DNS:localhost")
        self.elsewhere = issue(ours, "elsewhere", "DNS:coordinator.example.org")
        self.ada = issue(ours, "ada", "DNS:ada")
        stranger = issue(strangers, "ada", "DNS:ada")
        self.stranger = Tls(self.ca_file, stranger.certificate_file, stranger.key_file)
        self.trusts_strangers = Tls(strangers / "ca.pem")


@pytest.fixture(scope="module")
def papers(tmp_path_factory: pytest.TempPathFactory) -> Papers:
    return Papers(tmp_path_factory.mktemp("papers"))


def credentials_of(tls: Tls) -> grpc.ServerCredentials:
    """With an authority, callers must show a certificate of it."""
    return rotating_server_credentials(tls.read, asks_for_certificates=tls.ca_file is not None)


@asynccontextmanager
async def serving(tls: Tls | None) -> AsyncIterator[str]:
    server = grpc.aio.server(options=server_options(Keepalive()))
    status_pb2_grpc.add_StatusServiceServicer_to_server(Status(), server)  # type: ignore[abstract]
    if tls is None:
        port = server.add_insecure_port("127.0.0.1:0")
    else:
        port = server.add_secure_port("127.0.0.1:0", credentials_of(tls))
    await server.start()
    yield f"127.0.0.1:{port}"
    await server.stop(None)


async def ask(address: str, tls: Tls | None) -> str:
    """Whom the server takes us for."""
    async with client_channel(address, tls) as channel:
        stub = status_pb2_grpc.StatusServiceStub(channel)
        response = await stub.GetStatus(status_pb2.GetStatusRequest(), timeout=CALL_SECONDS)
    return response.status.explanation


async def is_refused(address: str, tls: Tls | None) -> bool:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await ask(address, tls)
    return caught.value.code() is grpc.StatusCode.UNAVAILABLE


def without_ca(tls: Tls) -> Tls:
    return Tls(certificate_file=tls.certificate_file, key_file=tls.key_file)


@needs_openssl
async def test_a_client_that_trusts_the_authority_gets_an_answer(papers: Papers) -> None:
    async with serving(without_ca(papers.coordinator)) as address:
        assert await ask(address, Tls(ca_file=papers.ca_file)) == "nobody"


@needs_openssl
async def test_without_ca_file_nobody_is_asked_who_he_is(papers: Papers) -> None:
    async with serving(without_ca(papers.coordinator)) as address:
        assert await ask(address, papers.ada) == "nobody"


@needs_openssl
async def test_a_client_that_trusts_somebody_else_sends_nothing(papers: Papers) -> None:
    async with serving(without_ca(papers.coordinator)) as address:
        assert await is_refused(address, papers.trusts_strangers)
        assert await is_refused(address, Tls())  # the system's authorities


@needs_openssl
async def test_a_certificate_for_another_host_is_not_accepted(papers: Papers) -> None:
    async with serving(without_ca(papers.elsewhere)) as address:
        assert await is_refused(address, Tls(ca_file=papers.ca_file))


@needs_openssl
async def test_one_side_in_the_clear_does_not_work(papers: Papers) -> None:
    async with serving(without_ca(papers.coordinator)) as address:
        assert await is_refused(address, None)
    async with serving(None) as address:
        assert await is_refused(address, Tls(ca_file=papers.ca_file))


@needs_openssl
async def test_with_ca_file_a_client_must_show_a_certificate_and_is_known_by_it(papers: Papers) -> None:
    async with serving(papers.coordinator) as address:
        assert await ask(address, papers.ada) == "ada"


@needs_openssl
async def test_with_ca_file_no_certificate_or_a_strangers_is_refused(papers: Papers) -> None:
    async with serving(papers.coordinator) as address:
        assert await is_refused(address, Tls(ca_file=papers.ca_file))
        assert await is_refused(address, papers.stranger)


def test_a_coordinator_without_its_certificate_does_not_start(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="certificate_file and key_file"):
        credentials_of(Tls(ca_file=None))
    with pytest.raises(ConfigError, match=f"{tmp_path}/none.pem cannot be read: No such file"):
        credentials_of(Tls(certificate_file=tmp_path / "none.pem", key_file=tmp_path / "none.key"))
