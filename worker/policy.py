"""The site's last word, as pure checks: what is outside the policy is refused and said so.

Nothing here is relaxed by anything that the coordinator sends.
"""

import math

from common.errors import RafloraError
from worker.config import SitePolicy
from worker.messages import Task, TaskKind
from worker.trainer_protocol import Plan


class PolicyRefused(RafloraError):
    """The coordinator asked for something that this site does not allow."""

    code = "FAILED_PRECONDITION"
    reason = "policy_refused"


def check_base_model(policy: SitePolicy, digest: str, whose: str) -> None:
    """Raises PolicyRefused unless the base model is allowed; `whose` says who named it."""
    if policy.allowed_base_models and digest not in policy.allowed_base_models:
        allowed = ", ".join(known[:12] for known in policy.allowed_base_models)
        raise PolicyRefused(
            f"site policy: {whose} is the base model {digest[:12] or '(no digest)'}; "
            f"policy.allowed_base_models allows {allowed}"
        )


def check_task(policy: SitePolicy, task: Task, *, max_rank: int, num_examples: int) -> None:
    """Raises PolicyRefused unless the task is within the site's bounds; `max_rank` is what this worker offered."""
    allowed_rank = min(policy.max_rank, max_rank)
    if not 1 <= task.lora_rank <= allowed_rank:
        raise _refusal(task, "rank", task.lora_rank, f"1 to {allowed_rank}")
    if not (math.isfinite(task.scaling) and task.scaling > 0):
        raise _refusal(task, "scaling", task.scaling, "a positive number")
    if task.kind is TaskKind.EVALUATE:
        return
    if not 0 < task.plan.learning_rate <= policy.max_learning_rate:
        raise _refusal(task, "learning rate", task.plan.learning_rate, f"at most {policy.max_learning_rate}")
    steps = steps_of(task.plan, num_examples)
    if not 0 < steps <= policy.max_local_steps:
        raise _refusal(task, "optimizer steps", steps, f"1 to {policy.max_local_steps}")


def steps_of(plan: Plan, num_examples: int) -> float:
    """The optimizer steps that a plan asks of so many examples; infinite if it cannot be told."""
    if plan.local_steps:
        return plan.local_steps
    if plan.batch_size < 1 or not math.isfinite(plan.local_epochs):
        return math.inf
    return math.ceil(math.ceil(num_examples / plan.batch_size) * plan.local_epochs)


def _refusal(task: Task, what: str, found: float, allowed: str) -> PolicyRefused:
    return PolicyRefused(f"site policy: round {task.round} asks for {what} {found:g}; {allowed} is allowed here")
