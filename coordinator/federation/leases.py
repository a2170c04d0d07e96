"""Fencing: which leases a task has had, and which one holds.

Every time a task is handed out it has a higher lease token, so who was given it before can neither submit nor upload.
"""

from common.errors import LeaseSuperseded, UnknownTask
from coordinator.federation.state import Assignment


def check_lease_was_given(assignment: Assignment, lease_token: int, whose: str) -> None:
    """Raises UnknownTask if this lease cannot be of this task; one older than the present passes."""
    if assignment.lease_token == 0 or lease_token > assignment.lease_token:
        raise UnknownTask(f"{whose}: lease {lease_token} was never given for this task; poll for the task again")


def check_lease_holds(assignment: Assignment, lease_token: int, whose: str) -> None:
    """Raises UnknownTask for a lease that was never given, LeaseSuperseded for one older than the present."""
    check_lease_was_given(assignment, lease_token, whose)
    if lease_token < assignment.lease_token:
        raise LeaseSuperseded(f"{whose}: lease {lease_token} was followed by {assignment.lease_token}; drop this task")
