"""What the operator lets clients and organisations send: the section [limits], as pure functions and one ledger.

Every refusal is a typed error and one line in the log with client, organisation, found and allowed (docs/limits.md).
Nothing here reads a clock or a file: federation seconds and the state are arguments. The disk's quota and the limits
of an inspection are kept elsewhere.
"""

from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase

import structlog

from common.adapter import AdapterSpec, numbers_of
from common.errors import InvalidRequest, NormTooLarge, QuotaExceeded, RafloraError, TooManyExamples
from common.moments import DAY_SECONDS
from coordinator.config import LimitsConfig
from coordinator.federation.state import State

_BYTES_PER_NUMBER = 4  # the global adapter is float32, whatever travels

log = structlog.get_logger()


@dataclass(frozen=True)
class OrganisationBounds:
    """What one organisation may do; None: no bound."""

    max_examples: int | None
    max_uploads: int
    upload_bytes_per_day: int | None


def bounds_of(limits: LimitsConfig, organisation: str) -> OrganisationBounds:
    """The general limits, with those replaced that the first matching line of the table sets."""
    row = next((r for r in limits.organisations if fnmatchcase(organisation, r.organisation)), None)
    if row is None:
        return OrganisationBounds(limits.max_examples, limits.max_uploads, limits.upload_bytes_per_day)
    return OrganisationBounds(
        row.max_examples or limits.max_examples,
        row.max_uploads or limits.max_uploads,
        row.upload_bytes_per_day or limits.upload_bytes_per_day,
    )


def check_founding_size(limits: LimitsConfig, spec: AdapterSpec, global_rank: int, whose: str) -> None:
    """Raises InvalidRequest if a worker's spec would make the coordinator hold a larger adapter than allowed."""
    size_bytes = _BYTES_PER_NUMBER * numbers_of(spec, global_rank)
    if size_bytes > limits.adapter_bytes:
        log.warning("refused by a limit", limit="adapter_bytes", found=size_bytes, allowed=limits.adapter_bytes)
        raise InvalidRequest(
            f"{whose}: its layers make a global adapter of {size_bytes} bytes at rank {global_rank}, but "
            f"limits.adapter_bytes is {limits.adapter_bytes}"
        )


def partition_bounds(ranks: Sequence[int], rank: int) -> tuple[int, ...]:
    """The upper ends of the rank partitions that an update of this rank touches, given the federation's ranks."""
    return tuple(sorted({min(level, rank) for level in ranks} | {rank}))


class Ledger:
    """Who sends what now, and what was announced in the last 24 hours of the federation's clock.

    Begins with what the journal knows: the accepted updates of the last day. What was announced and never accepted
    is known until the coordinator ends.
    """

    def __init__(self, limits: LimitsConfig, organisation_of: Callable[[str], str], state: State, now: float) -> None:
        self._limits = limits
        self._organisation_of = organisation_of
        self._announced: dict[str, deque[tuple[float, int]]] = {}  # by organisation: when, bytes; the oldest first
        self._current: dict[str, str] = {}  # the digest that a client announced last, paid for once
        self._streams: dict[str, Counter[str]] = {}  # by organisation: the open streams of its clients
        for at, client_id, size_bytes in _accepted_since(state, now - DAY_SECONDS):
            self._announced.setdefault(organisation_of(client_id), deque()).append((at, size_bytes))

    def check_examples(self, client_id: str, num_examples: int) -> None:
        """Raises TooManyExamples if the client claims more than its organisation may."""
        organisation, bounds = self._bounds_of(client_id)
        allowed = bounds.max_examples
        if allowed is not None and num_examples > allowed:
            _refuse(
                TooManyExamples(
                    f"client {client_id!r} of {organisation!r}: num_examples {num_examples}, but the operator allows "
                    f"at most {allowed} (limits.max_examples)"
                ),
                client_id, organisation, num_examples, allowed,
            )  # fmt: skip

    def check_norms(self, client_id: str, bounds: Sequence[int], norms: Sequence[float]) -> None:
        """Raises NormTooLarge for the first partition, given by its upper ends, that is above the operator's bound."""
        allowed = self._limits.max_partition_norm
        for low, high, norm in zip((0, *bounds), bounds, norms, strict=False):
            if allowed is not None and not norm <= allowed:
                _refuse(
                    NormTooLarge(
                        f"client {client_id!r}: the update's norm in the rank partition {low} to {high} is {norm:.6g}, "
                        f"but the operator allows at most {allowed:g} (limits.max_partition_norm)"
                    ),
                    client_id, self._organisation_of(client_id), round(norm, 6), allowed,
                )  # fmt: skip

    def announce(self, client_id: str, digest: str, size_bytes: int, now: float) -> None:
        """Charges an upload to the client's organisation, once while it is the last that the client announced.

        Raises QuotaExceeded, and charges nothing, if the day's bytes or the organisation's streams are used up.
        """
        self._check_streams(client_id)
        if self._current.get(client_id) == digest:
            return
        organisation, bounds = self._bounds_of(client_id)
        allowed = bounds.upload_bytes_per_day
        if allowed is not None:
            announced = self._announced.setdefault(organisation, deque())
            while announced and announced[0][0] <= now - DAY_SECONDS:
                announced.popleft()
            found = size_bytes + sum(size for _, size in announced)
            if found > allowed:
                _refuse(
                    QuotaExceeded(
                        f"client {client_id!r} of {organisation!r}: {found} bytes of updates in 24 hours with this "
                        f"one, but the operator allows {allowed} (limits.upload_bytes_per_day); try again later"
                    ),
                    client_id, organisation, found, allowed,
                )  # fmt: skip
            announced.append((now, size_bytes))
        self._current[client_id] = digest

    def forget(self, client_id: str) -> None:
        """The client's upload has come to its end, good or bad: whatever it announces next is charged anew."""
        self._current.pop(client_id, None)

    @contextmanager
    def stream(self, client_id: str) -> Iterator[None]:
        """Counts a stream while it is open. Raises QuotaExceeded if the organisation has as many as it may."""
        self._check_streams(client_id)
        organisation = self._organisation_of(client_id)
        streams = self._streams.setdefault(organisation, Counter())
        streams[client_id] += 1
        try:
            yield
        finally:
            streams[client_id] -= 1
            if not streams[client_id]:
                del streams[client_id]
            if not streams:
                self._streams.pop(organisation, None)

    def _check_streams(self, client_id: str) -> None:
        organisation, bounds = self._bounds_of(client_id)
        # Clients and not streams: a worker that comes back takes its own place, before its old stream has noticed.
        others = self._streams.get(organisation, Counter()).keys() - {client_id}
        if len(others) >= bounds.max_uploads:
            _refuse(
                QuotaExceeded(
                    f"client {client_id!r} of {organisation!r}: {len(others)} other uploads of it are under way, and "
                    f"the operator allows {bounds.max_uploads} (limits.max_uploads); try again in a moment"
                ),
                client_id, organisation, len(others) + 1, bounds.max_uploads,
            )  # fmt: skip

    def _bounds_of(self, client_id: str) -> tuple[str, OrganisationBounds]:
        organisation = self._organisation_of(client_id)
        return organisation, bounds_of(self._limits, organisation)


def _refuse(error: RafloraError, client_id: str, organisation: str, found: float, allowed: float) -> None:
    log.warning(
        "refused by a limit",
        reason=error.reason,
        client=client_id,
        organisation=organisation,
        found=found,
        allowed=allowed,
    )
    raise error


def _accepted_since(state: State, since: float) -> list[tuple[float, str, int]]:
    """When, whose and how many bytes; the oldest first. A round's updates count from the round's end."""
    accepted = [
        (record.closed_at, c.client_id, c.update.size_bytes)
        for record in state.history
        if record.closed_at > since
        for c in record.contributions
    ]
    if state.open is not None:
        accepted += [(state.open.opened_at, c.client_id, c.update.size_bytes) for c in state.open.contributions]
    return sorted(accepted)
