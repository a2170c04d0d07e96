"""What follows a closed round: merge, publish, sweep, export. Carries out the state machine's commands."""

import asyncio
from collections.abc import Callable
from concurrent.futures import BrokenExecutor
from dataclasses import dataclass

import structlog

from common.adapter import Adapter
from common.errors import RafloraError
from coordinator.federation.requests import AbortRound, Outcome, Publish
from coordinator.federation.state import Membership
from coordinator.federation.step import Aggregate
from coordinator.founding import Foundation
from coordinator.manifest import Manifest
from coordinator.merging import Merged, make_pool, merge
from coordinator.slices import read_global_adapter

log = structlog.get_logger()


@dataclass(frozen=True)
class PublishedAdapter:
    """For whoever exports: the effective global adapter of a round."""

    adapter: Adapter
    manifest: Manifest
    round: int


class Publisher:
    """Merges one round at a time; the heavy work is done in threads or in a pool of processes."""

    def __init__(self, foundation: Foundation, on_published: Callable[[PublishedAdapter], None] | None) -> None:
        self._foundation = foundation
        self._on_published = on_published
        self._pool = make_pool(foundation.config.aggregation.processes)
        self._merging = 0

    def close(self) -> None:
        """Ends the helper processes."""
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)

    async def carry_out(self, command: Aggregate) -> None:
        """Publishes the merged adapter, or aborts the round with the reason. Any other error is fatal."""
        self._merging += 1
        try:
            merged = await self._merge(command)
            is_published = merged is not None and await self._publish(command, merged)
        finally:
            self._merging -= 1
        await self.sweep()
        if is_published and merged is not None and self._on_published is not None:
            await self._export(self._on_published, command.number, merged.adapter_digest)

    async def sweep(self) -> None:
        """Deletes the blobs that nothing refers to."""
        if self._foundation.manifest is not None:
            await self._foundation.slices.settle()  # a slice that is being written has no name yet to keep it by
        if not self._merging:  # likewise what a merge writes; it sweeps when it is done
            self._foundation.sweep()

    async def _merge(self, command: Aggregate) -> Merged | None:
        foundation = self._foundation
        manifest, state = foundation.known_manifest, foundation.engine.state
        ranks = {c.rank for c in state.clients.values() if c.membership is not Membership.EVICTED}
        levels = tuple(sorted(ranks | set(manifest.ranks.levels)))
        try:
            return await asyncio.to_thread(merge, command, manifest, levels, foundation.blobs, self._pool)
        except (RafloraError, OSError, MemoryError, BrokenExecutor) as error:
            log.error("aggregation failed", round=command.number, error=str(error))
            opened = foundation.engine.state.open
            if opened is not None and (opened.number, opened.attempt) == (command.number, command.attempt):
                await foundation.engine.submit(AbortRound(command.number, f"the aggregation failed: {error}"))
            return None

    async def _publish(self, command: Aggregate, merged: Merged) -> bool:
        """Whether the round still wanted it."""
        publish = Publish(command.number, command.attempt, merged.adapter_digest, merged.to_json())
        return (await self._foundation.engine.submit(publish)).outcome is Outcome.ACCEPTED

    async def _export(self, export: Callable[[PublishedAdapter], None], number: int, digest: str) -> None:
        manifest = self._foundation.known_manifest
        try:
            adapter = await asyncio.to_thread(read_global_adapter, self._foundation.blobs, manifest, digest)
            await asyncio.to_thread(export, PublishedAdapter(adapter, manifest, number))
        except OSError as error:  # what is published stays published
            log.error("export failed", round=number, error=str(error))
