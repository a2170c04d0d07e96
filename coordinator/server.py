"""Puts a coordinator together and runs it until a signal: lock, journal, blobs, engine, gRPC, health, reflection."""

import asyncio
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import grpc
import grpc.aio
import structlog
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from raflora.v1 import (
    admin_pb2,
    admin_pb2_grpc,
    federation_pb2,
    identity_pb2,
    identity_pb2_grpc,
    status_pb2,
    status_pb2_grpc,
)

from common.channel import Keepalive, rotating_server_credentials, server_options
from common.descriptors import most_connections
from common.errors import ConfigError
from coordinator.config import CoordinatorConfig
from coordinator.founding import check_settings
from coordinator.identity.security import Security, security_of
from coordinator.narrator import narrate
from coordinator.publishing import PublishedAdapter
from coordinator.service import CoordinatorService
from coordinator.servicers import streams
from coordinator.servicers.access import AccessInterceptor
from coordinator.servicers.admin import AdminServicer
from coordinator.servicers.federation import FederationServicer
from coordinator.servicers.identity import IdentityServicer
from coordinator.servicers.interceptor import ErrorInterceptor
from coordinator.servicers.status import StatusServicer
from coordinator.stores.blobs import FileBlobs
from coordinator.stores.journal import SqlJournal, public_name
from coordinator.stores.lock import lock_state_folder
from coordinator.stores.owner import Owner, claim_state_folder
from coordinator.tracking import track, trackers_of

_DISK_THREADS = 32  # most of them wait for an fsync, and the kernel makes one of many that come together
_GRACE_SECONDS = 10.0  # for calls in progress at a clean end
_FAILED_GRACE_SECONDS = 1.0  # after a failure: long enough for health's watchers to hear of it, and for answers
SERVICES = tuple(
    file.services_by_name[name].full_name
    for file, name in (
        (federation_pb2.DESCRIPTOR, "FederationService"),
        (status_pb2.DESCRIPTOR, "StatusService"),
        (admin_pb2.DESCRIPTOR, "AdminService"),
    )
)
IDENTITY_SERVICE = identity_pb2.DESCRIPTOR.services_by_name["IdentityService"].full_name  # with an authority only
log = structlog.get_logger()


async def run_coordinator(
    config: CoordinatorConfig,
    *,
    on_published: Callable[[PublishedAdapter], None] | None = None,
    on_best: Callable[[PublishedAdapter], None] | None = None,
    on_listening: Callable[[str], None] | None = None,
    wall_clock: Callable[[], float] = time.time,
) -> None:
    """Serves until SIGTERM or SIGINT. Raises ConfigError, StateInUse or CorruptStore if it cannot start.

    Raises StorageFailed as soon as the disk fails to keep what it was given, so that nothing is promised on top of it.

    `on_listening` is told the address once calls are answered; `on_published` runs in a thread after each round,
    `on_best` in another when an evaluation finds another adapter to be the best, and once after a start.
    By `wall_clock` (unix seconds) certificates begin and end, and nothing else.
    """
    check_settings(config)
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(_DISK_THREADS, thread_name_prefix="disk"))
    security = security_of(config.server, wall_clock)
    with lock_state_folder(config.state_dir):
        blobs = FileBlobs(config.state_dir / "blobs")
        claim_state_folder(config.state_dir, _owner_of(config), blobs)
        blobs.sweep()
        journal = SqlJournal(config.store.journal or f"sqlite:///{config.state_dir / 'journal.sqlite'}")
        try:
            service = CoordinatorService(config, journal, blobs, on_published, security, on_best=on_best)
            try:
                await _serve(config, service, on_listening)
            except BaseExceptionGroup as group:
                raise _first_of(group) from group
            finally:
                service.close()
        finally:
            journal.close()


async def _serve(
    config: CoordinatorConfig,
    service: CoordinatorService,
    on_listening: Callable[[str], None] | None,
) -> None:
    trackers = trackers_of(config)
    gate, issuer = service.security.gate, service.security.issuer
    access = AccessInterceptor(gate)
    server = grpc.aio.server(
        interceptors=[ErrorInterceptor(service.engine.end_with), access],
        options=server_options(Keepalive(), most_connections()),
    )
    served = SERVICES if issuer is None else (*SERVICES, IDENTITY_SERVICE)
    streams.add_to_server(FederationServicer(service), server)
    status_pb2_grpc.add_StatusServiceServicer_to_server(StatusServicer(service), server)
    admin_pb2_grpc.add_AdminServiceServicer_to_server(AdminServicer(service), server)
    if issuer is not None:
        identity = IdentityServicer(issuer, lambda: service.engine.now)
        identity_pb2_grpc.add_IdentityServiceServicer_to_server(identity, server)
    healthy = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(healthy, server)
    if config.server.reflection:
        reflection.enable_server_reflection((*served, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
    address = _bind(server, config.server.listen, service.security)
    stopping = _stop_on_signals()
    async with asyncio.TaskGroup() as group:
        running = [group.create_task(service.run()), group.create_task(narrate(service))]
        running.append(group.create_task(access.watch()))
        running.append(group.create_task(track(service, trackers)))
        await server.start()
        for name in ("", *served):
            await healthy.set(name, health_pb2.HealthCheckResponse.SERVING)
        log.info("listening", address=address, security=service.security.sentence, status=service.explanation())
        if on_listening is not None:
            on_listening(address)
        try:
            await stopping.wait()
            log.info("stopping")
        finally:
            await healthy.enter_graceful_shutdown()
            await service.engine.stop_waiting()
            await server.stop(_GRACE_SECONDS if stopping.is_set() else _FAILED_GRACE_SECONDS)
            for task in running:
                task.cancel()
            await asyncio.to_thread(trackers.close)


def _owner_of(config: CoordinatorConfig) -> Owner:
    return Owner(config.name, public_name(config.store.journal) if config.store.journal else "")


def _bind(server: grpc.aio.Server, listen: str, security: Security) -> str:
    try:
        if security.papers is None:
            port = server.add_insecure_port(listen)
        else:
            credentials = rotating_server_credentials(
                security.papers, asks_for_certificates=security.asks_for_certificates
            )
            port = server.add_secure_port(listen, credentials)
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
