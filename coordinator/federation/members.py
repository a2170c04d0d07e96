"""Who is a client: enrolment, and the proof that a call comes from whom it says."""

import hashlib
import hmac

from common.errors import Evicted, IdentityConflict, InvalidRequest, TooBusy, UnknownClient
from coordinator.federation.ranks import grant_rank, keep_rank
from coordinator.federation.requests import Join, check_join
from coordinator.federation.state import Client, Membership, State

UNTOLD_EVAL_FACTOR = 10  # times num_examples: for a worker that does not tell how much it evaluates on


def member(state: State, client_id: str, enrol_key: str) -> Client:
    """The client behind a call. Raises UnknownClient, Evicted or IdentityConflict."""
    client = state.clients.get(client_id)
    if client is None or client.membership is Membership.LEFT:
        raise UnknownClient(f"client {client_id!r} has not joined this federation, or has left it; join first")
    if client.membership is Membership.EVICTED:
        raise Evicted(f"client {client_id!r} was evicted by the operator: {client.last_failure or 'no reason given'}")
    if not hmac.compare_digest(client.enrol_key_digest, _digest_of(enrol_key)):
        raise IdentityConflict(
            f"client {client_id!r}: another worker joined under this name with another enrolment key; "
            "give every worker a name of its own"
        )
    return client


def check_num_evaluated(client: Client, num_examples: int) -> None:
    """Raises InvalidRequest if an evaluation claims more examples than its client joined with: they are its weight."""
    told = client.profile.num_eval_examples
    allowed = told or UNTOLD_EVAL_FACTOR * client.profile.num_examples
    if num_examples > allowed:
        bound = f"it joined with {told}" if told else f"it told no number at its join, and {allowed} is the most then"
        raise InvalidRequest(f"client {client.client_id!r}: an evaluation on {num_examples} examples, but {bound}")


def enrolled(state: State, request: Join) -> Client:
    """The client as it stands once it has joined, with its granted rank and why; an open round keeps its own ranks.

    Raises InvalidRequest, IdentityConflict, Evicted, or TooBusy: no more clients are let in, or one that holds a task
    wants to evaluate instead of train or the other way round.
    """
    check_join(request)
    rules, known = state.known_rules, state.clients.get(request.client_id)
    # A name belongs to its key until the client leaves; silence gives it to nobody else.
    if known is not None and known.membership is not Membership.LEFT:
        member(state, request.client_id, request.enrol_key)
    if known is None and len(state.clients) >= rules.max_clients:
        raise TooBusy(f"client {request.client_id!r}: {len(state.clients)} clients have joined; more are not let in")
    if known is not None:
        _refuse_change_of_part(state, known, request)
    # Evaluators take no turn: who trains at which level must not depend on who looks on.
    order = known.order if known else sum(not c.profile.evaluates_only for c in state.clients.values())
    if known is not None and known.rank_is_set:
        grant = keep_rank(known, request.profile)
    else:
        grant = grant_rank(rules, request.client_id, request.profile, order)
    return Client(
        client_id=request.client_id,
        enrol_key_digest=_digest_of(request.enrol_key),
        profile=request.profile,
        rank=grant.rank,
        order=order,
        rank_is_set=known.rank_is_set if known else False,
        rank_reason=grant.reason,
        rounds_contributed=known.rounds_contributed if known else 0,
        last_failure=known.last_failure if known else "",
    )


def _refuse_change_of_part(state: State, known: Client, request: Join) -> None:
    """Whoever holds a task ends it as what it was: its num_examples would mean something else half-way."""
    if known.profile.evaluates_only == request.profile.evaluates_only or state.open is None:
        return
    if state.takeable_by(known.client_id) is not None:
        now, then = ("evaluates", "train") if known.profile.evaluates_only else ("trains", "evaluate")
        raise TooBusy(
            f"client {known.client_id!r} {now} and has a task in round {state.open.number}; it may join to {then} when "
            "that round is over, and will be let in if it goes on asking"
        )


def _digest_of(enrol_key: str) -> str:
    return hashlib.sha256(enrol_key.encode()).hexdigest()
