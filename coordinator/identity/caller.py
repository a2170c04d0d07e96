"""Who is calling, as far as the code behind the interceptor needs to know. In the clear nobody is anybody."""

from contextvars import ContextVar
from dataclasses import dataclass

from common.certificates import Certificate
from common.errors import NotAllowed
from common.identity import Role


@dataclass(frozen=True)
class Caller:
    """Somebody who may make the present call."""

    certificate: Certificate
    is_registered: bool  # the registry gave its name to its key alone


_present: ContextVar[Caller | None] = ContextVar("caller", default=None)
_shown: ContextVar[str] = ContextVar("shown_subject", default="")


def present_caller() -> Caller | None:
    """Of the call that this task serves; None without certificates."""
    return _present.get()


def set_present_caller(caller: Caller) -> None:
    """For the rest of this call."""
    _present.set(caller)


def shown_subject() -> str:
    """Whom the present call's certificate names, let in or not; "" without one."""
    return _shown.get()


def set_shown_subject(subject: str) -> None:
    """For the rest of this call."""
    _shown.set(subject)


def own_client_id(asked: str) -> str:
    """The client id of the call: the certificate's. Raises NotAllowed if the request says another."""
    caller = _present.get()
    if caller is None or caller.certificate.subject.role is not Role.WORKER:
        return asked
    subject = caller.certificate.subject
    if asked not in ("", subject.name):
        raise NotAllowed(f"{subject} may not speak for client {asked[:100]!r}")
    return subject.name


def own_enrol_key(asked: str) -> str:
    """The enrolment key of the call: the certificate's key where the registry vouches for it, else the request's.

    So a worker that lost its folder comes back under its name with a new join token, and nobody else does.
    """
    caller = _present.get()
    return f"certificate:{caller.certificate.key_digest}" if caller is not None and caller.is_registered else asked
