"""Who may call what, over the wire: every RPC of every service with every right and every wrong identity."""

import asyncio
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
import pytest_asyncio
from coordinators import config_of, entries_of
from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor
from google.protobuf.message_factory import GetMessageClass
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from identities import Identities, certificate_with, channel_as, serving
from raflora.v1 import admin_pb2, federation_pb2, identity_pb2, status_pb2

from common.certificates import private_key
from common.channel import REASON_KEY, Pem
from common.identity import Role, Subject
from coordinator.config import CoordinatorConfig
from coordinator.stores.journal import Entry

pytestmark = pytest.mark.asyncio(loop_scope="module")

CALL_SECONDS = 30.0
FILES = (federation_pb2, status_pb2, admin_pb2, identity_pb2, health_pb2, reflection_pb2)
SERVICES: tuple[ServiceDescriptor, ...] = tuple(
    service for file in FILES for service in file.DESCRIPTOR.services_by_name.values()
)
METHODS: tuple[MethodDescriptor, ...] = tuple(method for service in SERVICES for method in service.methods)

WORKER, OBSERVER, OPERATOR, JOIN = "worker", "observer", "operator", "join"
# The table once more, by hand: that of the product must say the same.
MAY_CALL: Mapping[str, set[str]] = {
    "raflora.v1.FederationService": {WORKER},
    "raflora.v1.StatusService": {OBSERVER, OPERATOR},
    "raflora.v1.AdminService": {OPERATOR},
    "raflora.v1.IdentityService.Enrol": {JOIN},
    "raflora.v1.IdentityService.Renew": {WORKER, OBSERVER, OPERATOR},
    "grpc.health.v1.Health": {WORKER, OBSERVER, OPERATOR, JOIN},
    "grpc.reflection.v1alpha.ServerReflection": {OBSERVER, OPERATOR},
}
IDENTITY_REASONS = {"not_authenticated", "not_allowed", "revoked", "bad_join_token"}
# TLS itself refuses these, before anybody reads a byte of a request.
REFUSED_BY_TLS = (
    "no certificate",
    "another authority",
    "self-signed",
    "expired",
    "not yet valid",
    "the coordinator's own",
)
REFUSED_BY_US = {
    "no subject": "not_authenticated",
    "two subjects": "not_authenticated",
    "a malformed subject": "not_authenticated",
    "a coordinator that calls": "revoked",
    "a key that nobody let in": "revoked",
    "a worker of a revoked site": "revoked",
    "a revoked operator": "revoked",
    "an observer who says operator": "revoked",
    "a token of a revoked site": "revoked",
    "a token that was replaced": "bad_join_token",
    "a token of no site": "bad_join_token",
}


class House:
    """A coordinator with certificates, and a channel for everybody."""

    def __init__(self, address: str, config: CoordinatorConfig, channels: Mapping[str, grpc.aio.Channel]) -> None:
        self.address = address
        self.config = config
        self.channels = channels

    @property
    def journal(self) -> list[Entry]:
        """Everything that ever changed."""
        return entries_of(self.config)


def papers_in(identities: Identities) -> dict[str, Pem]:
    """Everybody, by what they are called in the tests."""
    ada, day = Subject(Role.WORKER, "ada", "ada"), 86_400.0
    revoked_worker, revoked_operator = identities.worker("gone"), identities.person("mallory", Role.OPERATOR)
    revoked_token = identities.joining("going")
    identities.registry.revoke_site("gone")
    identities.registry.revoke_site("going")
    identities.registry.revoke_person("mallory")
    replaced_token = identities.joining("again")
    identities.joining("again", again=True)
    climber = identities.person("climber", Role.OBSERVER)
    return {
        WORKER: identities.worker("ada"),
        OBSERVER: identities.person("eve", Role.OBSERVER),
        OPERATOR: identities.person("oscar", Role.OPERATOR),
        JOIN: identities.joining("newcomers", workers=3),
        "no certificate": identities.nobody(),
        "another authority": identities.of_a_stranger(ada),
        "self-signed": identities.self_signed(ada),
        "expired": identities.issued_at(time.time() - 2 * day, ada),
        "not yet valid": identities.issued_at(time.time() + day, ada),
        "the coordinator's own": identities.unregistered(Subject(Role.COORDINATOR, "coordinator", "coordinator")),
        "no subject": identities.with_uris(),
        "two subjects": identities.with_uris(ada.uri, "raflora:operator:eve:eve"),
        "a malformed subject": identities.with_uris("raflora:worker:../../ada:ada"),
        "a coordinator that calls": identities.with_uris("raflora:coordinator:ada:ada"),
        "a key that nobody let in": identities.unregistered(ada),
        "a worker of a revoked site": revoked_worker,
        "a revoked operator": revoked_operator,
        "an observer who says operator": signed_for(identities, climber, "raflora:operator:climber:climber"),
        "a token of a revoked site": revoked_token,
        "a token that was replaced": replaced_token,
        "a token of no site": identities.unregistered(Subject(Role.JOIN, "nowhere", "nowhere")),
    }


def signed_for(identities: Identities, known: Pem, uri: str) -> Pem:
    """The key of somebody who was let in, under another role: only a careless authority would sign that."""
    assert known.key is not None
    certificate = certificate_with((uri,), private_key(known.key), identities.authority)
    return Pem(known.authority, certificate, known.key)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def house(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[House]:
    folder = tmp_path_factory.mktemp("house")
    identities = Identities(folder / "authority")
    config = config_of(folder / "federation", server__identity=identities.settings())
    async with serving(config) as address, AsyncExitStack() as stack:
        channels = {
            who: await stack.enter_async_context(channel_as(address, pem)) for who, pem in papers_in(identities).items()
        }
        yield House(address, config, channels)


async def outcome_of(
    channel: grpc.aio.Channel, method: MethodDescriptor, request: Any = None, metadata: Mapping[str, str] | None = None
) -> tuple[grpc.StatusCode, str]:
    """The status and the reason of one call; of a stream, up to its first message."""
    message = GetMessageClass(method.input_type)() if request is None else request
    kinds = {
        (False, False): channel.unary_unary,
        (False, True): channel.unary_stream,
        (True, False): channel.stream_unary,
        (True, True): channel.stream_stream,
    }
    kind: Any = kinds[method.client_streaming, method.server_streaming]
    call = kind(
        f"/{method.containing_service.full_name}/{method.name}",
        request_serializer=lambda message: message.SerializeToString(),
        response_deserializer=GetMessageClass(method.output_type).FromString,
    )(iter(()) if method.client_streaming else message, timeout=CALL_SECONDS, metadata=tuple((metadata or {}).items()))
    try:
        if method.server_streaming:
            await call.read()
            call.cancel()
        else:
            await call
    except grpc.aio.AioRpcError as error:
        trailing = dict(error.trailing_metadata() or ())
        return error.code(), str(trailing.get(REASON_KEY, ""))
    except asyncio.CancelledError:  # so gRPC says that a connection for a stream of requests never came about
        return await call.code(), ""
    return grpc.StatusCode.OK, ""


def allowed(method: MethodDescriptor) -> set[str]:
    return MAY_CALL.get(method.full_name) or MAY_CALL[method.containing_service.full_name]


def name_of(method: MethodDescriptor) -> str:
    return f"{method.containing_service.name}.{method.name}"


every_method = pytest.mark.parametrize("method", METHODS, ids=name_of)


# ---------------------------------------------------------------- every RPC, every identity


async def test_the_walk_misses_no_service(house: House, tmp_path: Path) -> None:
    identities = Identities(tmp_path / "authority")

    def services(address: str, pem: Pem) -> set[str]:
        credentials = grpc.ssl_channel_credentials(pem.authority, pem.key, pem.certificate)
        with grpc.secure_channel(address, credentials) as channel:
            return set(ProtoReflectionDescriptorDatabase(channel).get_services())

    config = config_of(tmp_path / "federation", server__identity=identities.settings())
    async with serving(config) as address:
        served = await asyncio.to_thread(services, address, identities.person("eve", Role.OBSERVER))
    assert served == {service.full_name for service in SERVICES}


@every_method
async def test_the_right_roles_are_let_in(house: House, method: MethodDescriptor) -> None:
    for role in allowed(method):
        code, reason = await outcome_of(house.channels[role], method)
        assert reason not in IDENTITY_REASONS, role
        assert code not in {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.UNKNOWN, grpc.StatusCode.INTERNAL}, role
        if name_of(method) != "Health.List":  # described by gRPC's own library, and left out there
            assert code is not grpc.StatusCode.UNIMPLEMENTED, role


@every_method
async def test_every_other_role_is_refused_and_changes_nothing(house: House, method: MethodDescriptor) -> None:
    before = house.journal
    for role in {WORKER, OBSERVER, OPERATOR, JOIN} - allowed(method):
        outcome = await outcome_of(house.channels[role], method)
        assert outcome == (grpc.StatusCode.PERMISSION_DENIED, "not_allowed"), role
    assert house.journal == before


@every_method
@pytest.mark.parametrize("who", REFUSED_BY_TLS)
async def test_who_has_no_good_certificate_gets_no_connection(house: House, method: MethodDescriptor, who: str) -> None:
    code, _ = await outcome_of(house.channels[who], method)
    assert code is (grpc.StatusCode.CANCELLED if method.client_streaming else grpc.StatusCode.UNAVAILABLE)
    assert house.channels[who].get_state() is not grpc.ChannelConnectivity.READY


@every_method
async def test_who_was_not_let_in_or_shut_out_is_refused_by_name(house: House, method: MethodDescriptor) -> None:
    before = house.journal
    for who, reason in REFUSED_BY_US.items():
        code, found = await outcome_of(house.channels[who], method)
        assert found == reason, who
        wanted = grpc.StatusCode.UNAUTHENTICATED if reason == "not_authenticated" else grpc.StatusCode.PERMISSION_DENIED
        assert code is wanted, who
    assert house.journal == before


@pytest.mark.parametrize(
    "method", [m for m in METHODS if m.full_name.startswith("raflora.v1.FederationService.")], ids=name_of
)
async def test_a_worker_speaks_for_itself_alone(house: House, method: MethodDescriptor) -> None:
    before = house.journal
    request = GetMessageClass(method.input_type)()
    upload = {"raflora-client-id": "bob", "raflora-enrol-key": "k", "raflora-digest": "d" * 64, "raflora-offset": "0"}
    if "client_id" in method.input_type.fields_by_name:
        request.client_id = "bob"  # type: ignore[attr-defined]
    elif not method.client_streaming:
        assert method.name == "Handshake"  # says what the federation is, to any worker
        return
    outcome = await outcome_of(house.channels[WORKER], method, request, upload if method.client_streaming else None)
    assert outcome == (grpc.StatusCode.PERMISSION_DENIED, "not_allowed")
    assert house.journal == before


async def test_a_coordinator_without_an_authority_serves_no_identity_service(tmp_path: Path) -> None:
    enrol = next(m for m in METHODS if m.name == "Enrol")
    async with serving(config_of(tmp_path)) as address, grpc.aio.insecure_channel(address) as channel:
        assert (await outcome_of(channel, enrol))[0] is grpc.StatusCode.UNIMPLEMENTED
