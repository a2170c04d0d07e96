"""`raflora health`: 0 if the coordinator serves, or if a worker is alive; else 1. Made for container health checks."""

import time
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter
from cyclopts.types import PositiveFloat
from grpc_health.v1 import health_pb2, health_pb2_grpc

from cli.connection import Connection, reach
from cli.errors import Failed, sentence_of
from common.errors import ConfigError, RafloraError
from worker.identity import is_alive


async def health(
    *,
    worker: Annotated[
        Path | None, Parameter(help="A worker's state_dir: is that worker alive? Asks no coordinator.")
    ] = None,
    max_age: Annotated[
        PositiveFloat, Parameter(help="Seconds since the coordinator last answered the worker.")
    ] = 120.0,
    connection: Connection = Connection(),
) -> None:
    """Asks whether the coordinator serves (grpc.health.v1), or with --worker whether a worker is alive.

    Exit code 0: yes; 1: no, also if nobody answers.
    """
    if worker is not None:
        if not is_alive(worker, max_age, time.time()):
            raise Failed(f"worker {worker}: the coordinator has not answered it for {max_age:g} s")
        print("alive")
        return
    try:
        async with reach(connection) as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            request = health_pb2.HealthCheckRequest()
            answer = await stub.Check(request, timeout=connection.timeout_seconds)
    except ConfigError:
        raise
    except RafloraError as error:
        # A health check knows yes and no only: container engines reserve the other codes.
        raise Failed(sentence_of(error)) from None
    if answer.status != health_pb2.HealthCheckResponse.SERVING:
        word = health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)
        raise Failed(f"coordinator {connection.address} says {word}")
    print("serving")
