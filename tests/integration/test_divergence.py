"""A federation that blows up: what diverged is never handed out, and the reason is said in words."""

import asyncio
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from coordinators import BASE_MODEL, SPEC, NumpyClient, Observer, config_of, global_adapter, observing, serving
from raflora.v1 import status_pb2

from common.adapter import Adapter, Factors, initial_adapter
from common.codec import Layout, decode, encode
from coordinator.manifest import Manifest
from coordinator.merging import Diverged, check_slices
from worker.messages import Task

RANK = 8
MODULE, TENSOR = SPEC.modules[0].name, SPEC.tensors[0].name


@dataclass
class Runaway(NumpyClient):
    """Its lora_B is five times as large after every round, as with a learning rate that is far too high."""

    async def train(self, task: Task) -> bytes:
        start = decode(await self.download(task), Layout(SPEC, task.lora_rank, self.wire_dtype), self.client_id)
        modules = {n: Factors(f.lora_A, 5.0 * f.lora_B + 1.0) for n, f in start.modules.items()}
        return encode(Adapter(modules, start.tensors), self.wire_dtype)


async def when_paused(observer: Observer) -> status_pb2.FederationStatus:
    async for answer in observer.status.WatchStatus(status_pb2.WatchStatusRequest(), timeout=60):
        if answer.status.paused:
            return answer.status
    raise AssertionError("the stream ended before the federation paused")


async def test_a_federation_that_blows_up_keeps_its_last_adapter_and_says_what_can_be_done(tmp_path: Path) -> None:
    config = config_of(tmp_path, rounds__num_rounds=20, rounds__min_clients=2, rounds__max_attempts=2)
    async with serving(config) as address, observing(address) as observer:
        clients = [Runaway(address, "ada", 4), Runaway(address, "bob", RANK)]
        for client in clients:
            await client.join()
        working = [asyncio.create_task(client.work()) for client in clients]
        status = await when_paused(observer)
        for task, client in zip(working, clients, strict=True):
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task  # whatever else ended it: every update of its own was accepted
            await client.rpc.close()
    assert 2 < status.round < 10
    assert f"paused before round {status.round} because the merged adapter has diverged: " in status.explanation
    assert status.explanation.endswith(
        "at most 1000 is published; the last adapter stays; a lower training.learning_rate needs a new federation"
    )
    assert "resume" not in status.explanation
    assert status.warnings[0] == (
        "the federation paused itself for good: found a new one with a lower training.learning_rate"
    )
    published = global_adapter(config, status.adapter_digest)
    assert max(np.abs(f.lora_B).max() for f in published.modules.values()) <= 1000


@pytest.mark.parametrize(
    ("rank", "column", "scaling"),
    [
        (2, 1, "constant"),
        (2, 5, "constant"),  # nobody trains it now, and somebody may join who does
        (RANK, 0, "alpha_over_rank"),
    ],
)
def test_what_is_looked_at_is_what_would_be_handed_out(tmp_path: Path, rank: int, column: int, scaling: str) -> None:
    manifest = Manifest.of(config_of(tmp_path, adapter__scaling=scaling, adapter__lora_alpha=1.0), SPEC, BASE_MODEL)
    adapter = initial_adapter(SPEC, RANK, seed=1)
    check_slices(adapter, manifest, [rank])
    spoilt = adapter.modules[MODULE].lora_B.copy()
    spoilt[3, column] = 1001.0 * manifest.scaling(rank if column < rank else RANK)
    adapter = Adapter({**adapter.modules, MODULE: Factors(adapter.modules[MODULE].lora_A, spoilt)}, adapter.tensors)
    with pytest.raises(Diverged, match=f"{MODULE}.lora_B holds 1e\\+03, at most 1000 is published"):
        check_slices(adapter, manifest, [rank])


def test_a_trained_head_can_diverge_too(tmp_path: Path) -> None:
    manifest = Manifest.of(config_of(tmp_path), SPEC, BASE_MODEL)
    adapter = initial_adapter(SPEC, RANK, seed=1)
    head = Adapter(adapter.modules, {**adapter.tensors, TENSOR: np.full(3, -1001.0, np.float32)})
    with pytest.raises(Diverged, match=f"{TENSOR} holds 1e\\+03"):
        check_slices(head, manifest, [])
