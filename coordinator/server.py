"""Puts a coordinator together and runs it until a signal: lock, journal, blobs, engine, gRPC, health, reflection."""

import asyncio
import signal
from collections.abc import Callable

import grpc
import grpc.aio
import structlog
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from raflora.v1 import (
    admin_pb2,
    admin_pb2_grpc,
    federation_pb2,
    federation_pb2_grpc,
    status_pb2,
    status_pb2_grpc,
)

from common.channel import Keepalive, Tls, is_loopback, server_credentials, server_options
from common.errors import ConfigError
from coordinator.config import CoordinatorConfig, ServerConfig
from coordinator.founding import check_settings
from coordinator.narrator import narrate
from coordinator.publishing import PublishedAdapter
from coordinator.service import CoordinatorService
from coordinator.servicers.admin import AdminServicer
from coordinator.servicers.federation import FederationServicer
from coordinator.servicers.interceptor import ErrorInterceptor
from coordinator.servicers.status import StatusServicer
from coordinator.stores.blobs import FileBlobs
from coordinator.stores.journal import SqlJournal, public_name
from coordinator.stores.lock import lock_state_folder
from coordinator.stores.owner import Owner, claim_state_folder

_GRACE_SECONDS = 10.0  # for calls in progress at a clean end
SERVICES = tuple(
    file.services_by_name[name].full_name
    for file, name in (
        (federation_pb2.DESCRIPTOR, "FederationService"),
        (status_pb2.DESCRIPTOR, "StatusService"),
        (admin_pb2.DESCRIPTOR, "AdminService"),
    )
)
log = structlog.get_logger()


async def run_coordinator(
    config: CoordinatorConfig,
    *,
    on_published: Callable[[PublishedAdapter], None] | None = None,
    on_listening: Callable[[str], None] | None = None,
) -> None:
    """Serves until SIGTERM or SIGINT. Raises ConfigError, StateInUse or CorruptStore if it cannot start.

    Raises StorageFailed as soon as the disk fails to keep what it was given, so that nothing is promised on top of it.

    `on_listening` is told the address once calls are answered; `on_published` runs in a thread after each round.
    """
    check_settings(config)
    tls = _tls_of(config.server)
    with lock_state_folder(config.state_dir):
        blobs = FileBlobs(config.state_dir / "blobs")
        claim_state_folder(config.state_dir, _owner_of(config), blobs)
        blobs.sweep()
        journal = SqlJournal(config.store.journal or f"sqlite:///{config.state_dir / 'journal.sqlite'}")
        try:
            service = CoordinatorService(config, journal, blobs, on_published)
            try:
                await _serve(config, service, tls, on_listening)
            except BaseExceptionGroup as group:
                raise _first_of(group) from group
            finally:
                service.close()
        finally:
            journal.close()


async def _serve(
    config: CoordinatorConfig,
    service: CoordinatorService,
    tls: Tls | None,
    on_listening: Callable[[str], None] | None,
) -> None:
    server = grpc.aio.server(
        interceptors=[ErrorInterceptor(service.engine.end_with)], options=server_options(Keepalive())
    )
    federation_pb2_grpc.add_FederationServiceServicer_to_server(FederationServicer(service), server)
    status_pb2_grpc.add_StatusServiceServicer_to_server(StatusServicer(service), server)
    admin_pb2_grpc.add_AdminServiceServicer_to_server(AdminServicer(service), server)
    healthy = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(healthy, server)
    if config.server.reflection:
        reflection.enable_server_reflection((*SERVICES, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
    address = _bind(server, config.server.listen, tls)
    stopping = _stop_on_signals()
    async with asyncio.TaskGroup() as group:
        running = [group.create_task(service.run()), group.create_task(narrate(service))]
        await server.start()
        for name in ("", *SERVICES):
            await healthy.set(name, health_pb2.HealthCheckResponse.SERVING)
        log.info("listening", address=address, tls=tls is not None, status=service.explanation())
        if on_listening is not None:
            on_listening(address)
        try:
            await stopping.wait()
            log.info("stopping")
        finally:
            await healthy.enter_graceful_shutdown()
            await service.engine.stop_waiting()
            await server.stop(_GRACE_SECONDS if stopping.is_set() else 0)
            for task in running:
                task.cancel()


def _owner_of(config: CoordinatorConfig) -> Owner:
    return Owner(config.name, public_name(config.store.journal) if config.store.journal else "")


def _tls_of(server: ServerConfig) -> Tls | None:
    if server.tls is not None:
        return Tls(server.tls.ca_file, server.tls.certificate_file, server.tls.key_file)
    if not is_loopback(server.listen) and not server.insecure:
        raise ConfigError(
            f"server.listen: {server.listen} can be reached from other machines; set [server.tls], or "
            "server.insecure = true if a private network or a tunnel protects it"
        )
    return None


def _bind(server: grpc.aio.Server, listen: str, tls: Tls | None) -> str:
    try:
        port = (
            server.add_insecure_port(listen) if tls is None else server.add_secure_port(listen, server_credentials(tls))
        )
    except RuntimeError as error:
        raise ConfigError(
            f"server.listen: {listen} cannot be bound; is another coordinator running? ({error})"
        ) from None
    return listen if listen.startswith("unix:") else f"{listen.rpartition(':')[0]}:{port}"


def _first_of(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The error that ended the tasks of a group; the others are those that it took along."""
    first = group.exceptions[0]
    return _first_of(first) if isinstance(first, BaseExceptionGroup) else first


def _stop_on_signals() -> asyncio.Event:
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    for kind in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(kind, stopping.set)
    return stopping
