"""Checks of the way to a coordinator: address, name, TCP, TLS, certificates, protocol, clocks. Nothing is changed."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from raflora.v1 import federation_pb2, federation_pb2_grpc

from cli.checks import Check, failed, ok, warning
from cli.checks_machine import check_private
from cli.words import human_seconds, plain
from common.certificates import read_certificate
from common.channel import REASON_KEY, Pem, Tls, client_channel
from common.errors import BadJoinToken, ConfigError, NotAllowed, NotAuthenticated, RafloraError, Unavailable
from common.identity_folder import IdentityFolder
from common.join_token import JoinToken
from common.moments import DAY_SECONDS, moment
from common.version import PROTOCOL, PROTOCOL_OLDEST, software_version
from worker.certificates import authority_of, certificate_in, check_files, describe, pem_of
from worker.probe import THEY_SPEAK_TLS, Probed, Step, probe
from worker.wire_errors import meaning_of

MOST_CLOCK_SECONDS = 60.0
FEW_DAYS_SECONDS = 7 * DAY_SECONDS
_ADVICE = {
    Step.ADDRESS: "write it as HOST:PORT",
    Step.NAME: "check the spelling, and this machine's DNS",
    Step.TCP: "is the coordinator running there, and does every firewall on the way let this port through?",
    Step.TLS: "the sentence says which side must change; `raflora doctor` on the other machine may say more",
    Step.HTTP2: "check host and port; a proxy in between must pass HTTP/2 on",
}
_SHOW_SOMETHING = "`raflora site add` and `raflora access add`, at the operator's, make what has to be shown"
_NAMES = {
    Step.ADDRESS: "address",
    Step.NAME: "DNS",
    Step.TCP: "TCP",
    Step.TLS: "TLS",
    Step.HTTP2: "gRPC",
}


@dataclass(frozen=True)
class Target:
    """Whom to reach, and as whom."""

    address: str
    tls: Tls | Pem | None
    timeout_seconds: float
    is_join_token: bool = False  # shown instead of a certificate: it may do nothing but come in


async def check_way(target: Target, now: Callable[[], float] = time.time) -> AsyncIterator[Check]:
    """Every step to the coordinator until one fails, then what it says."""
    probed = await asyncio.to_thread(probe, target.address, target.tls, target.timeout_seconds, now())
    for check in steps(target, probed):
        yield check
    if probed.failed is Step.DONE:
        async for check in _conversation(target, now):
            yield check


def steps(target: Target, probed: Probed) -> Iterator[Check]:
    """A probe's result, a check a step."""
    server = probed.server
    told = {
        Step.ADDRESS: target.address,
        Step.NAME: ", ".join(probed.addresses),
        Step.TCP: f"connected in {human_seconds(probed.seconds)}",
        Step.TLS: f"certificate of {server.issuer!r}, good until {moment(server.not_after)}" if server else "",
        Step.HTTP2: "a gRPC server answers",
    }
    for step, found in told.items():
        if step is probed.failed:
            is_in_the_clear = step is Step.HTTP2 and probed.cause == THEY_SPEAK_TLS
            yield failed(_NAMES[step], probed.cause, _SHOW_SOMETHING if is_in_the_clear else _ADVICE[step])
            return
        if step is not Step.TLS or target.tls is not None:
            yield ok(_NAMES[step], found)
        elif not target.address.startswith("unix:"):
            yield ok(_NAMES[step], "none: in the clear")


async def _conversation(target: Target, now: Callable[[], float]) -> AsyncIterator[Check]:
    async with client_channel(target.address, target.tls) as channel:
        try:
            if not target.is_join_token:
                for check in await _handshake(channel, target, now):
                    yield check
                return
            await _health(channel, target)
        except NotAllowed:
            # An observer or operator; the handshake is for workers.
            try:
                await _health(channel, target)
            except RafloraError as error:
                yield _refused(error)
                return
        except RafloraError as error:
            yield _refused(error)
            return
    yield ok("federation", "serving; it tells its name and clock to workers with a certificate")


async def _handshake(channel: grpc.aio.Channel, target: Target, now: Callable[[], float]) -> list[Check]:
    request = federation_pb2.HandshakeRequest(
        protocol_min=PROTOCOL_OLDEST, protocol_max=PROTOCOL, software_version=software_version()
    )
    stub = federation_pb2_grpc.FederationServiceStub(channel)
    asked_at = now()
    try:
        answer = await stub.Handshake(request, timeout=target.timeout_seconds)
    except grpc.aio.AioRpcError as error:
        raise _meaning(error, target) from None
    answered_at = now()
    model = f", base model {plain(answer.model.base_model)}" if answer.model.base_model else ""
    theirs = f"protocol {answer.protocol}, raflora {plain(answer.software_version)} there"
    found = ok("federation", f"{plain(answer.federation)}{model}; {theirs}")
    if not answer.wall_time_seconds:
        return [found, ok("clock", "the coordinator does not tell its time")]
    return [found, clock(answer.wall_time_seconds - (asked_at + answered_at) / 2)]


async def _health(channel: grpc.aio.Channel, target: Target) -> None:
    try:
        stub = health_pb2_grpc.HealthStub(channel)
        await stub.Check(health_pb2.HealthCheckRequest(), timeout=target.timeout_seconds)
    except grpc.aio.AioRpcError as error:
        raise _meaning(error, target) from None


def _meaning(error: grpc.aio.AioRpcError, target: Target) -> RafloraError:
    trailing = {key: value for key, value in error.trailing_metadata() or () if isinstance(value, str)}
    details = error.details() or "no details"
    if REASON_KEY not in trailing and error.code() is grpc.StatusCode.UNIMPLEMENTED:
        return Unavailable(f"{target.address} is a gRPC server, but no coordinator: {plain(details)}")
    return meaning_of(error.code().name, details, trailing, target.address)


def _refused(error: RafloraError) -> Check:
    advice = {
        "revoked": "ask the operator for a new join token (raflora site add SITE --folder FOLDER) or identity "
        "(raflora access add)",
        "bad_join_token": "ask the operator for a new join token (raflora site add SITE --again --folder FOLDER)",
        "not_authenticated": "show a certificate of this federation: a join token, or --identity FOLDER",
        "unavailable": "check host and port, or try again",
        "protocol_unsupported": "install the version of raflora that the coordinator has",
    }
    return failed("federation", plain(str(error)), advice.get(error.reason, ""))


def clock(ahead_seconds: float) -> Check:
    """How far the coordinator's clock is ahead of this machine's."""
    if abs(ahead_seconds) <= MOST_CLOCK_SECONDS:
        return ok("clock", f"{abs(ahead_seconds):.1f} s apart")
    which = "behind" if ahead_seconds > 0 else "ahead of"
    return warning(
        "clock",
        f"this machine's clock is {human_seconds(abs(ahead_seconds))} {which} the coordinator's",
        "set one of them right (timedatectl, chrony): certificates begin and end by them",
    )


def check_identity(folder: IdentityFolder, now: float) -> Iterator[Check]:
    """Who the certificate in an identity folder says we are, and for how long."""
    try:
        certificate = certificate_in(folder)
    except ConfigError as error:
        yield failed("identity", str(error), "start again with a new join token, or take a whole identity folder")
        return
    left_seconds = certificate.not_after - now
    until = f"{certificate.subject}, until {moment(certificate.not_after)}"
    site = certificate.subject.organisation
    again = f"ask the operator for a new join token: raflora site add {site} --again --folder FOLDER"
    if left_seconds <= 0:
        yield failed("identity", f"{until}: expired (this machine's clock: {moment(now)})", again)
    elif now < certificate.not_before:
        yield failed(
            "identity",
            f"{certificate.subject}, only from {moment(certificate.not_before)} (this machine's clock: {moment(now)})",
            "set this machine's clock",
        )
    elif certificate.is_due(now):
        yield warning(
            "identity",
            f"{until} ({human_seconds(left_seconds)} left)",
            "a running worker renews it by itself; a person's identity is made anew with `raflora access add`",
        )
    else:
        yield ok("identity", f"{until} ({human_seconds(left_seconds)} left)")
    yield from check_private("identity", {"the key": folder.path / "key.pem"})


def check_join_token(token: JoinToken, now: float) -> Check:
    """Whether a join token still lets in; whether its places are used only the coordinator knows."""
    try:
        certificate = read_certificate(pem_of(token).certificate or b"")
        authority_of(token.authority.encode())
    except (NotAuthenticated, ConfigError) as error:
        return failed("join token", f"for site {plain(token.site)}: {error}", "ask the operator for a new one")
    until = f"for site {plain(token.site)}, until {moment(certificate.not_after)}"
    if now >= certificate.not_after:
        return failed(
            "join token",
            f"{until}: expired (this machine's clock: {moment(now)})",
            f"ask the operator for a new one: raflora site add {plain(token.site)} --again --folder FOLDER",
        )
    return warning("join token", until, "whether it is used up shows only at the start")


def check_certificate_files(tls: Tls, now: float) -> Iterator[Check]:
    """Certificates of an authority of one's own: whether the files fit together, and for how long."""
    try:
        check_files(tls)
        mine = describe(tls.certificate_file.read_bytes()) if tls.certificate_file else None
    except (ConfigError, OSError) as error:
        yield failed("certificate files", str(error))
        return
    if mine is None:
        yield ok("certificate files", f"authority {tls.ca_file or 'of the system'}; no certificate of our own")
    elif now >= mine.not_after:
        yield failed("certificate files", f"expired: {mine.validity(now)}", "renew the certificate")
    elif mine.not_after - now < FEW_DAYS_SECONDS:
        yield warning("certificate files", f"until {moment(mine.not_after)}", "renew the certificate soon")
    else:
        yield ok("certificate files", f"of {mine.issuer!r}, until {moment(mine.not_after)}")
    if tls.key_file:
        yield from check_private("certificate files", {"the key": Path(tls.key_file)})


def bad_token(error: BadJoinToken | ConfigError) -> Check:
    """A token that cannot even be read."""
    return failed("join token", str(error), "copy the whole line again, or ask the operator for a new one")
