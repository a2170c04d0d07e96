"""`raflora doctor`: looks at everything that can keep a worker or coordinator from working, and names the cause."""

import asyncio
import json
import time
import tomllib
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter
from rich.table import Table
from rich.text import Text

from cli.checks import Check, Verdict, as_json, failed, ok, warning, worst
from cli.checks_coordinator import check_coordinator
from cli.checks_machine import (
    check_data,
    check_device,
    check_disk,
    check_group,
    check_model,
    check_private,
    check_versions,
)
from cli.checks_network import (
    Target,
    bad_token,
    check_certificate_files,
    check_identity,
    check_join_token,
    check_way,
)
from cli.connection import Connection
from cli.errors import ExitCode
from cli.output import Format, print_screen
from cli.tables import open_table
from common.errors import BadJoinToken, ConfigError
from common.logs import set_up_logs
from common.settings import load_settings
from coordinator.config import CoordinatorConfig
from worker.certificates import identity_in, join_token_of, pem_of
from worker.client import tls_of
from worker.config import WorkerConfig
from worker.policy_file import with_policy_file

Role = Literal["worker", "coordinator"]
_COLOURS = {Verdict.OK: "green", Verdict.WARNING: "yellow", Verdict.FAILED: "bold red"}
_OF_A_COORDINATOR = frozenset({"rounds", "training", "adapter", "server"})
_OF_A_WORKER = frozenset({"data", "rank", "coordinator", "policy"})


async def doctor(
    *,
    config: Annotated[Path | None, Parameter(help="A worker's or coordinator's settings file.")] = None,
    role: Annotated[Role | None, Parameter(help="Whose settings; unset: what the file looks like.")] = None,
    set_: Annotated[tuple[str, ...], Parameter(name="--set", help="KEY=VALUE overrides one key; repeatable.")] = (),
    format: Format = "table",
    connection: Connection = Connection(),
) -> int:
    """Checks versions, settings, address, DNS, TCP, TLS, identity, clock, disk, model, data and GPU; changes nothing.

    With --config for that role on this machine, else for the coordinator that the flags name. Exit code 1 if a check
    failed; each says what to do.
    """
    checks = [check async for check in _checks(config, role, set_, connection)]
    if format == "json":
        print(json.dumps(as_json(checks), indent=2))
    else:
        print_screen(_screen(checks))
    return ExitCode.FAILED if worst(checks) is Verdict.FAILED else ExitCode.OK


async def _checks(
    config: Path | None, role: Role | None, overrides: tuple[str, ...], connection: Connection
) -> AsyncIterator[Check]:
    if config is None and role is None:
        for check in check_versions():
            yield check
        async for check in _observer(connection):
            yield check
        return
    if replace(connection, timeout_seconds=Connection().timeout_seconds) != Connection():
        raise ConfigError("the settings say how to connect; leave --coordinator, --identity and the TLS flags out")
    try:
        role = role or _role_of(config)
        settings = _settings(role, config, overrides)
    except ConfigError as error:
        yield failed("settings", str(error), "`raflora config worker` and `raflora config coordinator` list every key")
        return
    yield ok("settings", f"{config or 'the environment'}: a {role}'s")
    for check in check_versions(role):
        yield check
    if isinstance(settings, WorkerConfig):
        async for check in _worker(settings, connection.timeout_seconds):
            yield check
    else:
        for check in await asyncio.to_thread(lambda: list(check_coordinator(settings, time.time()))):
            yield check


def _settings(role: Role, config: Path | None, overrides: tuple[str, ...]) -> WorkerConfig | CoordinatorConfig:
    """As the role itself would take them. Raises ConfigError."""
    if role == "coordinator":
        return load_settings(CoordinatorConfig, config, overrides=overrides)
    set_up_logs("text", "error")  # who reads a policy file says so, which is no part of our answer
    return with_policy_file(load_settings(WorkerConfig, config, overrides=overrides))


async def _observer(connection: Connection) -> AsyncIterator[Check]:
    """What a person with connection flags alone can know."""
    try:
        identity, tls, address = connection.shown_identity, connection.tls, connection.address
    except ConfigError as error:
        yield failed("settings", str(error))
        return
    if identity is not None:
        for check in check_identity(identity, time.time()):
            yield check
    elif tls is not None:
        for check in check_certificate_files(tls, time.time()):
            yield check
    async for check in check_way(Target(address, tls, connection.timeout_seconds)):
        yield check


async def _worker(config: WorkerConfig, timeout_seconds: float) -> AsyncIterator[Check]:
    found, target = _credentials(config, timeout_seconds)
    for check in found:
        yield check
    if target is not None:
        async for check in check_way(target):
            yield check
    for check in await asyncio.to_thread(lambda: list(_site(config))):
        yield check


def _credentials(config: WorkerConfig, timeout_seconds: float) -> tuple[list[Check], Target | None]:
    """What the worker would show, and to whom; no target if it could show nothing."""
    where, now = config.coordinator, time.time()
    folder = identity_in(config.state_dir)
    if where.tls is None and not where.insecure and folder.is_complete:
        address = where.address if "address" in where.model_fields_set else folder.address or where.address
        return list(check_identity(folder, now)), Target(address, folder.tls, timeout_seconds)
    try:
        token = join_token_of(where)
    except (BadJoinToken, ConfigError) as error:
        return [bad_token(error)], None
    if token is not None and (where.tls is not None or where.insecure):
        other = "[coordinator.tls]" if where.tls is not None else "insecure = true"
        return [failed("identity", f"a join token and {other} contradict each other", "leave one out")], None
    if token is not None:
        address = where.address if "address" in where.model_fields_set else token.address or where.address
        checks = [check_join_token(token, now), ok("identity", "none yet; the join token will bring one")]
        if where.join_token_file is not None:
            checks += check_private("join token", {"the token": where.join_token_file}, warning)
        return checks, Target(address, pem_of(token), timeout_seconds, is_join_token=True)
    try:
        tls = tls_of(where)
    except ConfigError as error:
        return [failed("identity", str(error))], None
    target = Target(where.address, tls, timeout_seconds)
    if tls is not None:
        return list(check_certificate_files(tls, now)), target
    if where.insecure:
        advice = "only where a private network or a tunnel protects it"
        return [warning("identity", "none: insecure = true, so everything goes in the clear", advice)], target
    return [ok("identity", "none: a coordinator on this machine, in the clear")], target


def _site(config: WorkerConfig) -> Iterator[Check]:
    yield from check_disk("state_dir", config.state_dir)
    yield check_model(config.model)
    yield from check_data(config.data)
    yield check_device(config.model)
    if config.launch.is_group or config.launch.shard_base:
        yield check_group(config.launch)


def _role_of(config: Path | None) -> Role:
    """Whose settings a file looks like. Raises ConfigError."""
    try:
        keys = set(tomllib.loads(config.read_text(encoding="utf-8"))) if config else set()
    except FileNotFoundError:
        raise ConfigError(f"{config}: there is no such file") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{config}: not valid TOML: {error}") from None
    except OSError as error:
        raise ConfigError(f"{config}: cannot be read: {error.strerror}") from None
    if len(keys & _OF_A_WORKER) == len(keys & _OF_A_COORDINATOR):
        raise ConfigError(f"{config}: neither clearly a worker's nor a coordinator's; say --role worker or coordinator")
    return "worker" if len(keys & _OF_A_WORKER) > len(keys & _OF_A_COORDINATOR) else "coordinator"


def _screen(checks: list[Check]) -> Table:
    table = open_table(shows_header=False)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for check in checks:
        said = Text(check.found)
        if check.advice:
            said.append(f"\n-> {check.advice}", style="bold")
        table.add_row(Text(str(check.verdict), style=_COLOURS[check.verdict]), Text(check.name), said)
    return table
