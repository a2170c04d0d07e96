"""Who may call what: one table and a pure function. What is not in the table, nobody may call."""

from collections.abc import Mapping

from common.errors import NotAllowed
from common.identity import Role, Subject

_EVERYBODY = frozenset({Role.WORKER, Role.OBSERVER, Role.OPERATOR, Role.JOIN})
_LOOKS_ON = frozenset({Role.OBSERVER, Role.OPERATOR})

# By service, or by a single method of it.
ROLES: Mapping[str, frozenset[Role]] = {
    "raflora.v1.FederationService": frozenset({Role.WORKER}),
    "raflora.v1.StatusService": _LOOKS_ON,
    "raflora.v1.AdminService": frozenset({Role.OPERATOR}),
    "raflora.v1.IdentityService/Enrol": frozenset({Role.JOIN}),
    "raflora.v1.IdentityService/Renew": frozenset({Role.WORKER}) | _LOOKS_ON,
    "grpc.health.v1.Health": _EVERYBODY,
    "grpc.reflection.v1alpha.ServerReflection": _LOOKS_ON,
}


def roles_of(method: str) -> frozenset[Role]:
    """Who may call a method, given as gRPC names it: /package.Service/Method."""
    name = method.removeprefix("/")
    return ROLES.get(name) or ROLES.get(name.partition("/")[0], frozenset())


def authorise(subject: Subject, method: str) -> None:
    """Raises NotAllowed unless the subject's role may call this method."""
    allowed = roles_of(method)
    if subject.role not in allowed:
        wanted = " or ".join(sorted(allowed)) or "no role at all"
        raise NotAllowed(f"{subject} may not call {method.rpartition('/')[2]}: that takes {wanted}")
