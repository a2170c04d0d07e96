"""How a federation comes to be, and what everything else stands on: settings, engine, disk, manifest, slices."""

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import ParamSpec, TypeVar

import structlog

from common.adapter import AdapterSpec, check_rank, initial_adapter
from common.codec import encode
from common.errors import (
    BaseModelMismatch,
    ConfigError,
    NothingPublished,
    SpecMismatch,
    StorageFailed,
    TooBusy,
    Unavailable,
    WrongRank,
)
from common.failpoints import reach
from coordinator.aggregation.methods import make_method
from coordinator.config import CoordinatorConfig
from coordinator.engine import Engine
from coordinator.federation.requests import Found
from coordinator.federation.state import Kind
from coordinator.manifest import Manifest, check_unchanged, read_spec_file
from coordinator.slices import Slices
from coordinator.stores.blobs import BlobStore, FileBlobs
from coordinator.stores.disk import Disk, DiskLimits
from coordinator.stores.uploads import UploadSpool

_SPEC_KEY = "adapter.spec"
ROOM_PAUSE_SECONDS = 1.0  # after the first try on a full disk or into a locked journal, then ever longer
MAX_ROOM_PAUSE_SECONDS = 60.0

P = ParamSpec("P")
T = TypeVar("T")

log = structlog.get_logger()


class Foundation:
    """A federation's engine, blobs and uploads; its manifest and slices as soon as it is founded."""

    def __init__(self, config: CoordinatorConfig, engine: Engine, blobs: FileBlobs) -> None:
        """Raises ConfigError if the federation was founded with other settings, CorruptStore for a damaged manifest.

        Of a federation that is still to be founded, the operator's spec is read and checked here: what cannot be
        founded must not listen.
        """
        self.config = config
        self.engine = engine
        self.blobs = blobs
        self.disk = Disk(config.state_dir, DiskLimits(config.limits.disk_bytes, config.limits.min_free_bytes))
        self.uploads = UploadSpool(config.state_dir / "uploads", blobs, config.server.max_uploads, self.disk)
        self.manifest: Manifest | None = None
        self._slices: Slices | None = None
        self._founding = asyncio.Lock()
        self._pins: Counter[str] = Counter()
        self._spec: tuple[AdapterSpec, str] | None = None  # the operator's, with the base model's digest
        self.obstacle = ""  # what cannot be done for lack of room, and why; it will be when there is some
        if engine.state.manifest_digest:
            self._adopt(Manifest.from_content(blobs.verify(engine.state.manifest_digest).read_bytes()))
            check_unchanged(self.known_manifest, config)
        elif config.adapter.spec is not None:
            self._spec = read_spec(config, config.adapter.spec)

    @property
    def is_founding(self) -> bool:
        """Whether the operator's spec is known, and nobody has to be waited for."""
        return self.manifest is None and self._spec is not None

    @property
    def known_manifest(self) -> Manifest:
        """Raises NothingPublished before the federation is founded."""
        if self.manifest is None:
            raise NothingPublished("no worker has joined yet, so there is no manifest and no adapter")
        return self.manifest

    @property
    def slices(self) -> Slices:
        """Likewise."""
        if self._slices is None:
            raise NothingPublished("no worker has joined yet, so there is no manifest and no adapter")
        return self._slices

    async def found_from_file(self) -> None:
        """Founds the federation if the operator gave a spec. Raises ConfigError."""
        if self.manifest is None and self._spec is not None:
            spec, digest = self._spec
            await self.found_if_new(spec, digest, _SPEC_KEY)

    async def found_if_new(self, spec: AdapterSpec, base_model_digest: str, whose: str) -> None:
        """Founds the federation on this spec unless it is founded already. Raises BaseModelMismatch, ConfigError."""
        async with self._founding:
            if self.manifest is not None:
                return
            check_base_model(self.config.model.base_model_digest, base_model_digest, whose)
            manifest = Manifest.of(self.config, spec, base_model_digest)
            request = await self.on_disk(found, manifest, self.blobs)
            reach("federation.founding")
            transition = await self.engine.submit(request)
            reach("federation.founded")
            # The journal's, not ours: a caller that hung up after its own was recorded may have come before.
            path = await self.on_disk(self.blobs.verify, transition.state.manifest_digest)
            self._adopt(Manifest.from_content(path.read_bytes()))
            log.info("federation founded", manifest=self.known_manifest.digest[:12], modules=len(spec.modules))

    async def on_disk(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """The result of blocking work, done in a thread.

        A StorageFailed ends the coordinator, also when the caller has hung up and nobody hears of it any more.
        """
        loop = asyncio.get_running_loop()

        def watched() -> T:
            try:
                return work(*args, **kwargs)
            except StorageFailed as failure:
                loop.call_soon_threadsafe(self.engine.end_with, failure)
                raise

        return await asyncio.to_thread(watched)

    async def when_there_is_room(self, what: str, work: Callable[[], Awaitable[T]]) -> T:
        """The work's result. A full disk or a locked journal is waited out, and the status says so meanwhile."""
        pause = ROOM_PAUSE_SECONDS
        try:
            while True:
                try:
                    return await work()
                except (TooBusy, Unavailable) as error:
                    if self.engine.has_ended:
                        raise
                    self.obstacle = f"{what}: {error}"
                    log.error("waiting for room", what=what, why=str(error), pause_seconds=pause)
                await asyncio.sleep(pause)
                pause = min(2 * pause, MAX_ROOM_PAUSE_SECONDS)
        finally:
            self.obstacle = ""

    @contextmanager
    def pinned(self, digest: str) -> Iterator[None]:
        """Keeps a blob from being swept while nothing in the journal refers to it yet."""
        self._pins[digest] += 1
        try:
            yield
        finally:
            self._pins[digest] -= 1
            self._pins += Counter()  # drops what is at zero

    def sweep(self) -> list[Path]:
        """Sets aside the blobs that nothing refers to. Never waits, so no submission can come in between.

        Does nothing before the federation is founded: then no journal says what may be needed.
        """
        if self.manifest is None:
            return []
        state = self.engine.state
        self.slices.keep_only(state.adapter_digest, *([state.best.adapter_digest] if state.best else []))
        return self.blobs.set_aside(self.blobs.digests() - self._needed())

    def _needed(self) -> set[str]:
        state = self.engine.state
        keep = {*self._pins, *state.required_blobs}
        keep |= {r.adapter_digest for r in state.history[-self.config.store.keep_rounds :]}
        if self._slices is not None:
            keep |= self._slices.digests()
        return keep

    def expected_uploaders(self) -> list[str]:
        """The clients that may still upload for the open round; what others began is of no use to anybody."""
        state = self.engine.state
        assignments = state.open.assignments if state.open is not None and state.open.kind is Kind.TRAIN else ()
        return [a.client_id for a in assignments if state.takeable_by(a.client_id) is not None]

    def warnings(self) -> list[str]:
        """What the disk keeps from happening, in sentences; docs/operations.md says what to do about each."""
        refusal = self.disk.refusal
        return [*([self.obstacle] if self.obstacle else []), *([f"uploads are refused: {refusal}"] if refusal else [])]

    def _granted_ranks(self) -> set[int]:
        return {client.rank for client in self.engine.state.clients.values()}

    def _drop(self, digest: str) -> None:
        if digest not in self._needed():
            self.blobs.delete(digest)

    def _adopt(self, manifest: Manifest) -> None:
        self.manifest = manifest
        self._slices = Slices(self.blobs, manifest, self._granted_ranks, self._drop)


def check_settings(config: CoordinatorConfig) -> None:
    """What pydantic cannot know. Raises ConfigError."""
    method = make_method(config.aggregation.options)
    if method.service_refusal:
        raise ConfigError(f"aggregation.method {method.name}: {method.service_refusal}; run it with raflora simulate")


def read_spec(config: CoordinatorConfig, path: Path) -> tuple[AdapterSpec, str]:
    """The spec in this file and its base model's digest, if a federation of these settings can be founded on them.

    Raises ConfigError, BaseModelMismatch.
    """
    spec, digest = read_spec_file(path)
    check_base_model(config.model.base_model_digest, digest, _SPEC_KEY)
    try:
        check_rank(spec, config.adapter.global_rank)
    except WrongRank as error:
        raise ConfigError(f"adapter.global_rank: {error}") from None
    return spec, digest


def found(manifest: Manifest, blobs: BlobStore) -> Found:
    """Makes manifest and seeded adapter durable. Raises ConfigError if the global rank does not fit the layers."""
    try:
        adapter = initial_adapter(manifest.spec, manifest.adapter.global_rank, manifest.rounds.seed)
    except WrongRank as error:
        raise ConfigError(f"adapter.global_rank: {error}") from None
    return Found(manifest.rules, blobs.put(manifest.content), blobs.put(encode(adapter)))


def check_base_model(expected: str, found_digest: str, whose: str) -> None:
    """Raises BaseModelMismatch unless both sides hold the same weights; an empty `expected` accepts any."""
    if expected and expected != found_digest:
        raise BaseModelMismatch(
            f"{whose}: base model {found_digest[:12] or '(no digest)'}, but this federation trains {expected[:12]}; "
            "point the worker's model.path at the same weights"
        )


def check_spec(manifest: Manifest, spec: AdapterSpec, whose: str) -> None:
    """Raises SpecMismatch, saying how they differ, unless the worker adapts exactly the manifest's layers."""
    if spec == manifest.spec:
        return
    expected = {**{m.name: m for m in manifest.spec.modules}, **{t.name: t for t in manifest.spec.tensors}}
    have = {**{m.name: m for m in spec.modules}, **{t.name: t for t in spec.tensors}}
    missing, extra = sorted(expected.keys() - have.keys()), sorted(have.keys() - expected.keys())
    if missing or extra:
        difference = f"missing {missing[:3] or 'none'}, unexpected {extra[:3] or 'none'}"
    else:
        name = next(n for n in sorted(expected) if expected[n] != have[n])
        difference = f"{name} is {have[name]}, expected {expected[name]}"
    raise SpecMismatch(
        f"{whose}: other adapted layers than the federation's: {difference}; "
        "is it the same model, and the same version of transformers?"
    )
