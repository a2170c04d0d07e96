"""Checks of a coordinator's own machine: state folder, journal, port, authority. Nothing is changed."""

import fcntl
import os
import socket
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

from cli.checks import Check, failed, ok, warning
from cli.checks_machine import check_disk, check_private
from cli.checks_network import check_certificate_files
from common.channel import Tls, is_loopback
from common.errors import ConfigError, RafloraError
from common.moments import moment
from coordinator.config import CoordinatorConfig, ServerConfig
from coordinator.founding import read_spec
from coordinator.identity.security import security_of
from coordinator.stores.lock import LOCK_FILE
from worker.certificates import describe
from worker.probe import host_and_port

_CONNECT_SECONDS = 3.0


def check_coordinator(config: CoordinatorConfig, now: float) -> Iterator[Check]:
    """Everything that keeps a coordinator of these settings from serving on this machine."""
    yield from check_disk("state_dir", config.state_dir)
    yield from check_private("state_dir", {"the journal": config.state_dir}, warning)
    holder = _holder_of(config.state_dir)
    if holder:
        yield ok("lock", f"a coordinator runs on this state_dir (process {holder})")
    else:
        yield ok("lock", "no coordinator runs on this state_dir")
    if not config.store.journal:
        yield _journal(config.state_dir / "journal.sqlite")
    if config.adapter.spec is not None:
        yield _spec(config, config.adapter.spec)
    yield _port(config.server.listen, is_running=bool(holder))
    yield from _security(config.server, now)


def _holder_of(state_dir: Path) -> str:
    """The process that holds a state folder; empty if nobody does."""
    try:
        descriptor = os.open(state_dir / LOCK_FILE, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return ""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return os.pread(descriptor, 32, 0).decode(errors="replace").strip() or "unknown"
    finally:
        os.close(descriptor)
    return ""


def _journal(path: Path) -> Check:
    if not path.exists():
        return ok("journal", f"{path}: not there yet; the first start makes it")
    advice = "stop the coordinator, keep the whole folder, and restore a backup"
    try:
        connection = sqlite3.connect(f"file:{quote(str(path.absolute()))}?mode=ro", uri=True, timeout=_CONNECT_SECONDS)
        try:
            found = str(connection.execute("PRAGMA integrity_check(1)").fetchone()[0])
        finally:
            connection.close()
    except sqlite3.DatabaseError as error:
        return failed("journal", f"{path}: {error}", advice)
    if found != "ok":
        return failed("journal", f"{path}: {found}", advice)
    return ok("journal", f"{path}: sound; a start also checks every entry's seal")


def _spec(config: CoordinatorConfig, path: Path) -> Check:
    try:
        spec, digest = read_spec(config, path)
    except RafloraError as error:
        if (config.state_dir / "journal.sqlite").exists():
            return warning("adapter.spec", str(error), "needed only if this federation is not founded yet")
        return failed("adapter.spec", str(error), "`raflora spec MODEL --out FILE` makes it, where torch is")
    return ok("adapter.spec", f"{path}: {len(spec.modules)} modules, base model {digest[:12]}")


def _port(listen: str, *, is_running: bool) -> Check:
    if listen.startswith("unix:") or listen.endswith(":0"):
        return ok("port", listen)
    try:
        host, port = host_and_port(listen)
    except ConfigError as error:
        return failed("port", str(error), "set server.listen to HOST:PORT")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_STREAM) as candidate:
            candidate.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            candidate.bind((host, port))
    except OSError as error:
        if is_running and error.errno != 13:
            return ok("port", f"{listen} is taken, by the coordinator that runs")
        return failed(
            "port",
            f"{listen} cannot be taken: {error.strerror or error}",
            "another program listens there, or this user may not, or the address is none of this machine's",
        )
    if is_running:
        return warning("port", f"nobody listens on {listen}, though a coordinator runs", "was it started otherwise?")
    return ok("port", f"{listen} is free")


def _security(server: ServerConfig, now: float) -> Iterator[Check]:
    """Who would be let in; certificates and their dates."""
    if server.identity is not None:
        yield from check_private(
            "authority",
            {"the authority": server.identity.folder, "its key": server.identity.folder / "ca.key"},
        )
    if server.tls is not None:
        files = Tls(server.tls.ca_file, server.tls.certificate_file, server.tls.key_file)
        yield from check_certificate_files(files, now)
    try:
        security = security_of(server, lambda: now)
    except ConfigError as error:
        yield failed("security", str(error))
        return
    if security.issuer is not None:
        authority = describe(security.issuer.authority.certificate)
        names = ", ".join(server.identity.names) if server.identity else ""
        yield ok("authority", f"{authority.issuer}, until {moment(authority.not_after)}; its server is {names}")
    if server.insecure and not is_loopback(server.listen):
        yield warning("security", security.sentence, "`raflora init` makes a folder for [server.identity]")
    else:
        yield ok("security", security.sentence)
