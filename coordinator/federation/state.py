"""What the coordinator knows of a federation: frozen values, rebuilt by folding the journal.

Times are seconds of the federation's own clock: it counts while a coordinator runs and stands still while none does,
so a restart never eats a deadline.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from functools import cached_property
from math import ceil


class Phase(StrEnum):
    """Where the federation stands."""

    WAITING_FOR_SPEC = "waiting_for_spec"  # nobody has said yet which layers are adapted
    WAITING_FOR_CLIENTS = "waiting_for_clients"  # too few clients are here to open a round
    TRAINING = "training"
    AGGREGATING = "aggregating"  # the round's input list is frozen
    EVALUATING = "evaluating"
    FINISHED = "finished"


class Membership(StrEnum):
    """How a client stands to the federation."""

    ACTIVE = "active"
    LOST = "lost"  # silent for longer than its lease; comes back with its next call
    LEFT = "left"  # said good-bye; may join again
    EVICTED = "evicted"  # by an operator; may not


class RankPolicy(StrEnum):
    """Who decides a client's LoRA rank; never above what the client declares or the global rank."""

    DECLARED = "declared"  # the client's own max_rank
    TABLE = "table"  # the operator's table of client-id patterns
    CYCLE = "cycle"  # the operator's levels in the order of joining: unequal ranks for equal machines
    HARDWARE = "hardware"  # the operator's largest level that fits the client's measured memory


def part_of(share: float, count: int) -> int:
    """The share of a count, rounded up to whole clients."""
    # 0.07 * 100 is 7.000000000000001 in binary, and means seven.
    return ceil(round(share * count, 9))


@dataclass(frozen=True)
class Stopping:
    """Which evaluation counts, what is better, and when to give up hope."""

    metric: str = ""  # empty: nothing counts
    is_larger_better: bool = True
    is_central: bool = False  # the evaluators' metrics; else the clients' own, by num_examples
    min_delta: float = 0.0  # what is not better by more than this is no improvement
    patience: int = 0  # counted evaluations without an improvement; 0: never


@dataclass(frozen=True)
class Rules:
    """What the operator decided about rounds, ranks and the end; what the manifest does not freeze may change."""

    num_rounds: int
    global_rank: int
    seed: int
    min_clients: int
    fraction: float  # of the active clients that a round invites
    quorum: float  # of the cohort: a share up to 1, or a count above
    round_deadline_seconds: float
    lease_ttl_seconds: float
    evaluate_every: int  # rounds; 0: never
    max_failures: int = 2  # of one client in one round
    max_attempts: int = 3  # of one round, then the federation pauses itself
    max_clients: int = 10_000  # that may ever join
    rank_policy: RankPolicy = RankPolicy.DECLARED
    rank_table: tuple[tuple[str, int], ...] = ()  # (client-id pattern, rank), first match wins
    rank_levels: tuple[int, ...] = ()  # cycle, hardware
    memory_share: float = 0.9  # hardware: of a client's memory that a step may take
    stopping: Stopping = Stopping()

    def quorum_of(self, cohort: int) -> int:
        """How many updates a round of this cohort needs."""
        wanted = part_of(self.quorum, cohort) if self.quorum <= 1 else int(self.quorum)
        return max(1, min(wanted, cohort))


@dataclass(frozen=True)
class Measured:
    """What a dry training step took on a client's device: base_bytes + rank * bytes_per_rank."""

    base_bytes: int
    bytes_per_rank: int
    micro_batch: int
    quantization: str = "none"


@dataclass(frozen=True)
class Profile:
    """What a client says it can do and holds."""

    max_rank: int
    num_examples: int
    device: str = "cpu"
    memory_bytes: int = 0
    examples_per_second: float = 0.0
    software_version: str = ""
    measured: Measured | None = None
    evaluates_only: bool = False  # an evaluator: in no cohort that trains
    num_eval_examples: int = 0  # that it evaluates on; 0: not told


@dataclass(frozen=True)
class Client:
    """One participant."""

    client_id: str
    enrol_key_digest: str  # SHA-256: the journal must not give the key away
    profile: Profile
    rank: int  # granted; used from the next round on
    order: int  # of joining, from 0
    membership: Membership = Membership.ACTIVE
    rank_is_set: bool = False  # by an operator: policies no longer touch it
    rank_reason: str = ""  # why this rank, in a sentence
    rounds_contributed: int = 0
    last_failure: str = ""

    @property
    def is_active(self) -> bool:
        """Whether rounds may count on it."""
        return self.membership is Membership.ACTIVE


class Kind(StrEnum):
    """What a round asks of its cohort."""

    TRAIN = "train"
    EVALUATE = "evaluate"


@dataclass(frozen=True)
class Update:
    """An accepted upload; its bytes are a blob."""

    digest: str
    size_bytes: int
    num_examples: int
    metrics: Mapping[str, float] = field(default_factory=dict)
    training_seconds: float = 0.0


@dataclass(frozen=True)
class Evaluation:
    """How the published adapter does at one client's rank on its data."""

    num_examples: int
    metrics: Mapping[str, float] = field(default_factory=dict)
    is_central: bool = False  # by an evaluator; decided when it was accepted, whatever the client becomes later


@dataclass(frozen=True)
class Assignment:
    """One client's part in the open round."""

    client_id: str
    rank: int
    lease_token: int = 0  # 0: nobody has fetched it
    slice_digest: str = ""
    failures: int = 0
    failure: str = ""
    is_failed: bool = False
    update: Update | None = None
    evaluation: Evaluation | None = None

    @property
    def is_done(self) -> bool:
        """Whether its result is durable."""
        return self.update is not None or self.evaluation is not None


@dataclass(frozen=True)
class Tally:
    """How many of a round's parts have come to what."""

    updates: int  # accepted
    outstanding: int  # neither done nor failed: a lost client may come back before the deadline, a failed one will not

    @classmethod
    def of(cls, assignments: Iterable[Assignment]) -> "Tally":
        """Counted one by one."""
        updates = outstanding = 0
        for assignment in assignments:
            updates += assignment.update is not None
            outstanding += not assignment.is_done and not assignment.is_failed
        return cls(updates, outstanding)

    def __add__(self, other: "Tally") -> "Tally":
        return Tally(self.updates + other.updates, self.outstanding + other.outstanding)

    def __sub__(self, other: "Tally") -> "Tally":
        return Tally(self.updates - other.updates, self.outstanding - other.outstanding)


@dataclass(frozen=True)
class OpenRound:
    """The round in which tasks are handed out; its cohort, ranks and order never change."""

    kind: Kind
    number: int
    attempt: int
    opened_at: float
    deadline_at: float
    assignments: tuple[Assignment, ...]  # ordered by client id
    is_extended: bool = False

    def assignment_of(self, client_id: str) -> Assignment | None:
        """The client's part, if it has one."""
        place = self._places.get(client_id)
        return None if place is None else self.assignments[place]

    def with_assignment(self, assignment: Assignment) -> "OpenRound":
        """The same round with one part replaced."""
        place = self._places[assignment.client_id]
        before, after = self.assignments[:place], self.assignments[place + 1 :]
        changed = replace(self, assignments=(*before, assignment, *after))
        # One part differs: to count the others again with every request would make a round quadratic in its cohort.
        replaced = Tally.of([self.assignments[place]])
        changed.__dict__.update(_places=self._places, tally=self.tally - replaced + Tally.of([assignment]))
        return changed

    @cached_property
    def tally(self) -> Tally:
        """How far the round is."""
        return Tally.of(self.assignments)

    @cached_property
    def _places(self) -> Mapping[str, int]:
        return {assignment.client_id: place for place, assignment in enumerate(self.assignments)}

    @cached_property
    def contributions(self) -> "tuple[Contribution, ...]":
        """The accepted updates, ordered by client id."""
        return tuple(Contribution(a.client_id, a.rank, a.update) for a in self.assignments if a.update is not None)


@dataclass(frozen=True)
class Contribution:
    """An update that went into a published adapter."""

    client_id: str
    rank: int
    update: Update


@dataclass(frozen=True)
class RoundRecord:
    """A finished round; the report is the aggregation's, as JSON."""

    number: int
    attempts: int
    adapter_digest: str
    opened_at: float
    closed_at: float
    published_at: float
    contributions: tuple[Contribution, ...]
    report_json: str = "{}"
    evaluations: tuple[tuple[str, int, Evaluation], ...] = ()  # client id, rank, result
    evaluated_at: float | None = None


@dataclass(frozen=True)
class Best:
    """The published adapter whose counted evaluation was best."""

    round: int
    adapter_digest: str
    value: float
    evaluations_since: int = 0  # counted ones without an improvement
    metric: str = ""  # what the value is of; these three are the rules' at that time
    is_larger_better: bool = True
    is_central: bool = False


@dataclass(frozen=True)
class State:
    """Everything that survives a restart."""

    phase: Phase = Phase.WAITING_FOR_SPEC
    rules: Rules | None = None
    manifest_digest: str = ""
    adapter_digest: str = ""  # of the newest published global adapter; round 0 is the seeded one
    round: int = 0  # the newest published round
    attempt: int = 0  # of the next or open round; 0: not opened yet
    open: OpenRound | None = None
    closed_at: float = 0.0
    clients: Mapping[str, Client] = field(default_factory=dict)
    history: tuple[RoundRecord, ...] = ()
    last_lease_token: int = 0
    is_paused: bool = False
    pause_reason: str = ""
    last_abandoned: str = ""  # why the newest attempt of the coming round was given up
    best: Best | None = None
    stopped_early: str = ""  # why the federation ended before its last round

    @property
    def known_rules(self) -> Rules:
        """The rules of a founded federation; asking earlier is our own mistake."""
        assert self.rules is not None, "the federation is not founded yet"  # noqa: S101
        return self.rules

    @cached_property
    def active_clients(self) -> tuple[Client, ...]:
        """By client id."""
        return tuple(c for _, c in sorted(self.clients.items()) if c.is_active)

    @cached_property
    def training_clients(self) -> tuple[Client, ...]:
        """The active ones without the evaluators: whom a round that trains may invite."""
        return tuple(c for c in self.active_clients if not c.profile.evaluates_only)

    @property
    def enrolled_to_train(self) -> tuple[Client, ...]:
        """Those without the evaluators who are here or may come back: the federation's census."""
        is_enrolled = (Membership.ACTIVE, Membership.LOST)
        return tuple(c for c in self.clients.values() if c.membership in is_enrolled and not c.profile.evaluates_only)

    @property
    def rank_levels(self) -> tuple[int, ...]:
        """The distinct ranks of the federation: those that its clients train, and the levels that it grants."""
        held = {client.rank for client in self.enrolled_to_train}
        rules = self.rules
        has_levels = rules is not None and rules.rank_policy in (RankPolicy.CYCLE, RankPolicy.HARDWARE)
        granted = set(rules.rank_levels) if rules is not None and has_levels else set()
        return tuple(sorted(held | granted))

    @property
    def newest_evaluated(self) -> RoundRecord | None:
        """The newest round whose evaluation is over."""
        return next((record for record in reversed(self.history) if record.evaluated_at is not None), None)

    @property
    def required_blobs(self) -> frozenset[str]:
        """The digests that must not be lost: manifest, newest and best adapter, what the open round holds."""
        required = {self.manifest_digest, self.adapter_digest, self.best.adapter_digest if self.best else ""}
        if self.open is not None:
            required |= {c.update.digest for c in self.open.contributions}
            required |= {a.slice_digest for a in self.open.assignments}
        return frozenset(required - {""})

    def takeable_by(self, client_id: str) -> Assignment | None:
        """The client's part of the open round if it can still be worked on."""
        if self.open is None or self.phase is Phase.AGGREGATING:
            return None
        assignment = self.open.assignment_of(client_id)
        return None if assignment is None or assignment.is_done or assignment.is_failed else assignment

    @property
    def is_evaluation_due(self) -> bool:
        """Whether the newest adapter is one that the rules want evaluated, and it is not yet."""
        every = self.known_rules.evaluate_every
        if not every or not self.history or self.history[-1].evaluated_at is not None:
            return False
        return self.round % every == 0 or self.round == self.known_rules.num_rounds
