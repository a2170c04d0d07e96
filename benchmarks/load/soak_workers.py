"""The workers of a soak: numpy instead of a model, tireless, and with the troubles that real ones have."""

import asyncio
import hashlib
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import grpc.aio
import numpy as np
from raflora.v1 import federation_pb2 as pb

from benchmarks.load.clients import Client, Payload, reason_of
from common.adapter import Adapter, AdapterSpec, Factors, ModuleShape, TensorShape
from common.codec import Layout, decode, encode

SPEC = AdapterSpec(
    tuple(ModuleShape(f"layer.{i}", 256, 192) for i in range(4)), (TensorShape("classifier.weight", (3, 256)),)
)
RANKS = (2, 4, 8)
_PAUSE_SECONDS = 0.5  # before a call that failed is tried again
_NOISE = 1e-3
_OVER = frozenset({"stale_round", "unknown_task", "unknown_blob", "stale_slice", "upload_taken_over"})

Key = tuple[int, int, str, str]  # round, attempt, client id, digest


@dataclass
class Ledger:
    """What the coordinator has answered to all workers."""

    acknowledged: set[Key] = field(default_factory=set)
    evaluations: int = 0
    refusals: Counter[str] = field(default_factory=Counter)  # by reason
    troubles: Counter[str] = field(default_factory=Counter)  # by kind


class Worker:
    """One worker process played by a task: `start`, `kill`, `start` again."""

    def __init__(self, address: str, number: int, folder: Path, ledger: Ledger) -> None:
        self.client_id = f"worker-{number:02}"
        self.rank = RANKS[number % len(RANKS)]
        self.breaks_off_next = False  # the next upload ends in the middle
        self.spoils_next = False  # the next update holds a number that is not finite
        self._address = address
        self._file = folder / f"{self.client_id}.update"
        self._ledger = ledger
        self._running: asyncio.Task[None] | None = None
        self._may_work = asyncio.Event()
        self._may_work.set()

    def start(self) -> None:
        """Begins to work, as a process that has just started."""
        self._running = asyncio.create_task(self._run())

    async def kill(self) -> None:
        """Ends at once and tells nobody."""
        if self._running is not None:
            self._running.cancel()
            await asyncio.wait({self._running})
            if not self._running.cancelled():
                self._running.result()

    def stall(self) -> None:
        """Says and does nothing more until `go_on`."""
        self._may_work.clear()

    def go_on(self) -> None:
        """The end of a stall."""
        self._may_work.set()

    async def _run(self) -> None:
        client = Client(self._address, self.client_id, self.rank)
        try:
            while True:
                try:
                    await client.join(SPEC)
                    await self._work(client)
                except grpc.aio.AioRpcError as error:
                    self._ledger.refusals[reason_of(error)] += 1
                    await asyncio.sleep(_PAUSE_SECONDS)
        finally:
            await client.close()

    async def _work(self, client: Client) -> None:
        """Until a call fails for another reason than that the task is over."""
        while True:
            await self._may_work.wait()
            answer = await client.poll(10.0)
            if not answer.HasField("task"):
                continue
            try:
                await self._do(client, answer.task)
            except grpc.aio.AioRpcError as error:
                if (reason := reason_of(error)) not in _OVER:
                    raise
                self._ledger.refusals[reason] += 1

    async def _do(self, client: Client, task: pb.Task) -> None:
        content = await client.download(task)
        await self._may_work.wait()
        if task.kind == pb.TASK_KIND_EVALUATE:
            self._ledger.evaluations += await client.evaluate(task) == pb.SUBMIT_OUTCOME_ACCEPTED
            return
        payload = await asyncio.to_thread(self._train, content, task)
        if self.breaks_off_next:
            self.breaks_off_next = False
            await self._break_off(client, task, payload)
        await client.upload(task, payload)
        outcome = await client.submit(task, payload)
        if outcome in (pb.SUBMIT_OUTCOME_ACCEPTED, pb.SUBMIT_OUTCOME_DUPLICATE):
            self._ledger.acknowledged.add((task.round, task.attempt, self.client_id, payload.digest))

    def _train(self, content: bytes, task: pb.Task) -> Payload:
        layout = Layout(SPEC, task.lora_rank)
        start, noise = decode(content, layout, self.client_id), np.random.default_rng(task.plan.seed)
        modules = {name: Factors(_moved(f.lora_A, noise), _moved(f.lora_B, noise)) for name, f in start.modules.items()}
        update = bytearray(encode(Adapter(modules, start.tensors)))
        if self.spoils_next:
            self.spoils_next = False
            update[-4:] = np.array([np.nan], dtype="<f4").tobytes()
        self._file.write_bytes(update)
        return Payload(self._file, hashlib.sha256(update).hexdigest(), len(update))

    async def _break_off(self, client: Client, task: pb.Task, payload: Payload) -> None:
        offset = await client.begin(task, payload)
        if offset < payload.size_bytes:
            call = client.stream(payload, offset)
            await call.write(pb.UploadAdapterRequest(data=next(payload.chunks(offset))[: payload.size_bytes // 3]))
            call.cancel()


def _moved(
    factor: "np.ndarray[tuple[int, ...], np.dtype[np.float32]]", noise: np.random.Generator
) -> "np.ndarray[tuple[int, ...], np.dtype[np.float32]]":
    return (factor + _NOISE * noise.standard_normal(factor.shape)).astype(np.float32)
