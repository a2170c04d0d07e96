"""A coordinator that wants more than it may have: a real gRPC server that says anything and writes down everything.

What a call answers can be replaced by name (`says`). Every byte of every request, and all metadata of every call,
is kept as it came off the wire, before anybody parses it.
"""

import inspect
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
from raflora.v1 import federation_pb2 as pb
from raflora.v1 import federation_pb2_grpc as rpc
from scripted_coordinator import MANIFEST_DIGEST, Script, ScriptedCoordinator
from worker_site import RANK, SLICE, SLICE_DIGEST, TRAINER, InstantClock, Site

from common.channel import COMMITTED_BYTES_KEY, REASON_KEY, Keepalive, server_options
from common.errors import RafloraError, WrongOffset
from worker.config import SitePolicy, WorkerConfig
from worker.run import work

CANARY = "canary-7f3a"  # stands in every secret of the site, whatever else it says
TERMINAL = "\x1b]0;owned\x07\x1b[2J\r\n2026-01-01 [info] all is well \u202e\x00"
# What may stand beside a message: gRPC's own, and ours.
METADATA_KEYS = frozenset({"user-agent", "raflora-client-id", "raflora-enrol-key", "raflora-digest", "raflora-offset"})

Says = Callable[..., Any]  # (request, context) -> a response, an awaitable or an async iterator of them


class HostileCoordinator(ScriptedCoordinator):
    """Follows its script unless a test says otherwise."""

    def __init__(self, script: Script) -> None:
        super().__init__(script)
        self.says: dict[str, Says] = {}
        self.calls: Counter[str] = Counter()
        self.heard: list[bytes] = []
        self.metadata: dict[str, set[str]] = {}

    async def start(self, *, serves_federation: bool = True) -> None:  # noqa: ARG002 (it always does)
        self._server = grpc.aio.server(options=server_options(Keepalive()), interceptors=[_Ear(self)])
        rpc.add_FederationServiceServicer_to_server(self, self._server)
        self.port = self._server.add_insecure_port(f"127.0.0.1:{self.port}")
        await self._server.start()

    def has_heard(self, secret: str) -> bool:
        """Whether the text came in, in any message or beside one."""
        everything = [*self.heard, *(value.encode() for values in self.metadata.values() for value in values)]
        return any(secret.encode() in content for content in everything)


class _Ear(grpc.aio.ServerInterceptor):
    """Hears every call before the servicer does, and answers in its place where a test wants it."""

    def __init__(self, owner: HostileCoordinator) -> None:
        self._owner = owner

    async def intercept_service(self, continuation: Any, details: grpc.HandlerCallDetails) -> Any:
        handler = await continuation(details)
        name = details.method.rpartition("/")[2]
        self._owner.calls[name] += 1
        for key, value in details.invocation_metadata:
            self._owner.metadata.setdefault(key, set()).add(str(value))

        def hear(raw: bytes) -> Any:
            self._owner.heard.append(raw)
            return handler.request_deserializer(raw)

        heard = handler._replace(request_deserializer=hear)
        says = self._owner.says.get(name)
        if says is None:
            return heard
        return (
            heard._replace(unary_stream=says) if handler.response_streaming else heard._replace(unary_unary=_as(says))
        )


def _as(says: Says) -> Says:
    async def answer(request: Any, context: Any) -> Any:
        said = says(request, context)
        return await said if inspect.isawaitable(said) else said

    return answer


class WatchedSite(Site):
    """A site with secrets, and a coordinator that is after them."""

    coordinator: HostileCoordinator

    @property
    def hostile(self) -> HostileCoordinator:
        return self.coordinator

    def config(self, policy: SitePolicy = SitePolicy()) -> WorkerConfig:
        honest = super().config(policy)
        data = honest.data.model_copy(update={"train": str(self.folder / f"{CANARY}-patients.jsonl")})
        return honest.model_copy(update={"data": data})

    async def work_as(self, config: WorkerConfig) -> None:
        """Works with these settings."""
        self.state_dir.mkdir(exist_ok=True)
        await work(config, TRAINER, self.time.clock)

    def refusals(self) -> str:
        """The site's own list of what was refused."""
        path = self.state_dir / "refusals.jsonl"
        return path.read_text() if path.exists() else ""

    def assert_nothing_got_out(self) -> None:
        """No secret, no path and no host name was heard; nothing was written but where the worker may write."""
        assert not self.hostile.has_heard(CANARY)
        assert not self.hostile.has_heard(str(self.folder))
        assert not self.hostile.has_heard("/usr/")
        assert self.hostile.metadata.keys() <= METADATA_KEYS | {"raflora-session"}
        own = {self.state_dir.name, "pid", "mishaps", "gate", f"{CANARY}-patients.jsonl"}
        assert {path.name for path in self.folder.iterdir()} <= own
        allowed = {"enrol-key", "alive", "egress.jsonl", "refusals.jsonl", "slices", "update.safetensors", "identity"}
        assert {path.name for path in self.state_dir.iterdir()} <= allowed


@asynccontextmanager
async def watched_site(folder: Path) -> AsyncIterator[WatchedSite]:
    """A site with canaries in its data and its file names; those in the environment are the test's."""
    coordinator = HostileCoordinator(Script(blobs={SLICE_DIGEST: SLICE}))
    await coordinator.start()
    (folder / f"{CANARY}-patients.jsonl").write_text(f'{{"text": "{CANARY} Jane Doe", "label": "yes"}}\n')
    try:
        yield WatchedSite(coordinator, folder, InstantClock())
    finally:
        await coordinator.stop()


def welcome(*, protocol: int = 1, federation: str = "scripted", **model: Any) -> Says:
    """An answer to the handshake with something else in it."""
    honest: dict[str, Any] = {
        "base_model": "tiny",
        "task": "sequence-classification",
        "labels": ["no", "yes"],
        "target_modules": ["q_proj", "v_proj"],
        "global_rank": RANK,
    }
    request = pb.ModelRequest(**(honest | model))
    return lambda *_: pb.HandshakeResponse(protocol=protocol, federation=federation, model=request)


def place(**changes: Any) -> Says:
    """An answer to a join with something else in it."""
    honest: dict[str, Any] = {
        "lora_rank": RANK,
        "heartbeat_seconds": 1.0,
        "wire_dtype": "float32",
        "manifest_digest": MANIFEST_DIGEST,
    }
    return lambda *_: pb.JoinResponse(**(honest | changes))


async def refuse(context: Any, error: RafloraError) -> None:
    """Answers with an error whose words are taken as they are."""
    trailing = [(REASON_KEY, error.reason)]
    if isinstance(error, WrongOffset):
        trailing.append((COMMITTED_BYTES_KEY, str(error.committed_bytes)))
    await context.abort(grpc.StatusCode[error.code], str(error), tuple(trailing))
