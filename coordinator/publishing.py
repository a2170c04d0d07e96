"""What follows a closed round: merge, publish, sweep, export. Carries out the state machine's commands."""

import asyncio
from collections.abc import Callable
from concurrent.futures import BrokenExecutor
from dataclasses import dataclass

import structlog

from common.adapter import Adapter
from common.errors import RafloraError, StorageFailed, TooBusy
from common.failpoints import reach
from common.transfer import shortage_of
from coordinator.federation.requests import AbortRound, Outcome, Publish
from coordinator.federation.state import Membership
from coordinator.federation.step import Aggregate, pending
from coordinator.founding import Foundation
from coordinator.manifest import Manifest
from coordinator.merging import Diverged, Merged, make_pool, merge
from coordinator.slices import read_global_adapter

_LOOK_SECONDS = 60.0  # a bound: every change of the state ends the wait

log = structlog.get_logger()


@dataclass(frozen=True)
class PublishedAdapter:
    """For whoever exports: the effective global adapter of a round."""

    adapter: Adapter
    manifest: Manifest
    round: int


class Publisher:
    """Merges one round at a time; the heavy work is done in threads or in a pool of processes."""

    def __init__(
        self,
        foundation: Foundation,
        on_published: Callable[[PublishedAdapter], None] | None,
        on_best: Callable[[PublishedAdapter], None] | None = None,
    ) -> None:
        self._foundation = foundation
        self._on_published = on_published
        self._on_best = on_best
        self._pool = make_pool(foundation.config.aggregation.processes)
        self._merging = 0
        self._exporting = asyncio.Lock()  # one folder is renewed by one writer
        self._exported_round = 0  # by this process

    def close(self) -> None:
        """Ends the helpers."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    async def carry_out(self, command: Aggregate) -> None:
        """Publishes the merged adapter, or aborts the round with the reason. Any other error is fatal."""
        self._merging += 1
        reach("round.merging")
        try:
            wait, what = self._foundation.when_there_is_room, f"round {command.number} is closed but not yet published"
            merged = await wait(what, lambda: self._merge(command))
            if merged is not None:
                await wait(what, lambda: self._publish(command, merged))
        finally:
            self._merging -= 1
        reach("round.sweeping")
        try:
            await self.sweep()
        except TooBusy as error:  # the next sweep does what this one could not
            log.warning("not everything could be swept", why=str(error))
        reach("round.swept")

    async def sweep(self) -> None:
        """Brings the disk in line with the journal, at start and after every round: what a crash left undone is done.

        Deletes the blobs that nothing refers to and the uploads that nobody waits for any more, and exports the
        newest adapter unless this process has done so.
        """
        foundation = self._foundation
        if foundation.manifest is None:
            return
        await foundation.slices.settle()  # a slice that is being written has no name yet to keep it by
        if not self._merging:  # likewise what a merge writes; it sweeps when it is done
            aside = foundation.sweep()
            await foundation.on_disk(foundation.blobs.remove, aside)
        clients = foundation.engine.state.clients.values()
        gone = [c.client_id for c in clients if c.membership in (Membership.LEFT, Membership.EVICTED)]
        await foundation.on_disk(foundation.uploads.sweep, foundation.expected_uploaders(), gone)
        await foundation.on_disk(foundation.disk.measure)
        if self._on_published is not None:
            await self._export_newest(self._on_published)

    async def watch_best(self) -> None:
        """Exports the best adapter, once for every one that becomes it and once after a start. Until the end."""
        if self._on_best is None:
            return
        engine, version, exported = self._foundation.engine, -1, ""
        while not engine.is_stopping:
            version = await engine.wait_for_change(version, _LOOK_SECONDS)
            best = engine.state.best
            if best is None or best.adapter_digest == exported or self._foundation.manifest is None:
                continue
            exported = best.adapter_digest
            with self._foundation.pinned(best.adapter_digest):  # another one may become the best meanwhile
                await self._export(self._on_best, best.round, best.adapter_digest)

    async def _merge(self, command: Aggregate) -> Merged | None:
        foundation = self._foundation
        manifest, state = foundation.known_manifest, foundation.engine.state
        levels = state.rank_levels
        if command not in pending(state):  # aborted while it waited for room
            return None
        try:
            try:
                return await foundation.on_disk(merge, command, manifest, levels, foundation.blobs, self._pool)
            except BrokenExecutor:
                log.warning("a helper process died; merging once more with new ones", round=command.number)
                self.close()
                self._pool = make_pool(foundation.config.aggregation.processes)
                return await foundation.on_disk(merge, command, manifest, levels, foundation.blobs, self._pool)
        except (StorageFailed, TooBusy):
            raise
        except (RafloraError, OSError, MemoryError, BrokenExecutor) as error:
            if shortage := shortage_of(error):
                raise TooBusy(f"the coordinator cannot do that now: {shortage}") from error
            log.error("aggregation failed", round=command.number, error=str(error))
            opened = foundation.engine.state.open
            if opened is not None and (opened.number, opened.attempt) == (command.number, command.attempt):
                reason = str(error) if isinstance(error, Diverged) else f"the aggregation failed: {error}"
                await foundation.engine.submit(AbortRound(command.number, reason))
            return None

    async def _publish(self, command: Aggregate, merged: Merged) -> None:
        reach("round.publishing")
        publish = Publish(command.number, command.attempt, merged.adapter_digest, merged.to_json())
        outcome = (await self._foundation.engine.submit(publish)).outcome
        reach("round.published")
        if outcome is not Outcome.ACCEPTED:
            log.info("the round was aborted while it was merged", round=command.number, attempt=command.attempt)

    async def _export_newest(self, export: Callable[[PublishedAdapter], None]) -> None:
        async with self._exporting:
            foundation, state = self._foundation, self._foundation.engine.state
            if state.round <= self._exported_round:
                return
            self._exported_round = state.round
            with foundation.pinned(state.adapter_digest):
                await self._export(export, state.round, state.adapter_digest)

    async def _export(self, export: Callable[[PublishedAdapter], None], number: int, digest: str) -> None:
        foundation, manifest = self._foundation, self._foundation.known_manifest
        try:
            adapter = await foundation.on_disk(read_global_adapter, foundation.blobs, manifest, digest)
            reach("adapter.exporting")
            await foundation.on_disk(export, PublishedAdapter(adapter, manifest, number))
            reach("adapter.exported")
        except StorageFailed:
            raise
        except Exception as error:  # somebody else's code: what is published stays published
            log.error("export failed", round=number, error=str(error), exc_info=error)
