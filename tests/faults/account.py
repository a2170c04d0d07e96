"""Where a step is killed that the federations of test_kills.py never come to, and which steps no kill brings about."""

from collections.abc import Mapping
from types import MappingProxyType

# Test -> the steps that it alone kills.
KILLED_BY: Mapping[str, frozenset[str]] = MappingProxyType(
    {
        "tests/scenarios/test_kills_elsewhere.py::test_a_worker_killed_on_its_way_in_comes_in_with_one_key": frozenset(
            {
                "identity.making_key",
                "identity.key_made",
                "identity.certificate_writing",
                "identity.certificate_written",
            }
        ),
        "tests/scenarios/test_kills_elsewhere.py::test_a_coordinator_killed_while_it_enrols_lets_in_one_key": (
            frozenset({"token.used", "identity.answering"})
        ),
        "tests/scenarios/test_kills_elsewhere.py::test_a_killed_backup_is_never_taken_for_whole": frozenset(
            {"backup.copied", "backup.finishing"}
        ),
        "tests/scenarios/test_kills_elsewhere.py::test_a_killed_restore_left_nothing_or_everything": frozenset(
            {"backup.restored"}
        ),
        "tests/unit/test_journal_chain.py::test_bringing_it_forward_may_be_killed_half_way": frozenset(
            {"schema.migrating", "schema.migrated"}
        ),
    }
)

# What a kill alone does not bring about, and where it is tested instead.
NEVER_KILLED: Mapping[str, str] = MappingProxyType(
    {
        "failure.answering": "no kill makes a worker give its task back; tests/integration/test_services.py",
        "leave.answering": "only SIGTERM makes a worker say goodbye; tests/integration/test_worker_agent.py",
        "part.truncating": "a full disk or damaged bytes; tests/unit/test_transfer.py",
        "part.truncated": "likewise",
    }
)


def killed_elsewhere() -> frozenset[str]:
    """The steps that are killed in other tests than test_kills.py."""
    return frozenset().union(*KILLED_BY.values())


def owed_by(test: str) -> frozenset[str]:
    """What a test must kill, by its name."""
    return frozenset().union(*(steps for name, steps in KILLED_BY.items() if name.endswith(f"::{test}")))
