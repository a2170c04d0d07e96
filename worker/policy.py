"""The site's last word, as pure checks: what is outside the policy is refused and said so.

Nothing here is relaxed by anything that the coordinator sends. Whether what it sends can be meant at all, whatever
the site allows, is checked in forms.py.
"""

import math
from collections.abc import Iterable

from common.errors import RafloraError
from worker.config import SitePolicy
from worker.egress import Spent
from worker.messages import Task, TaskKind, Welcome
from worker.trainer_protocol import GENERATION, Plan

_SHOWN = 8  # entries of a list in a message

Names = tuple[str, ...]


class PolicyRefused(RafloraError):
    """The coordinator asked for something that this site does not allow."""

    code = "FAILED_PRECONDITION"
    reason = "policy_refused"


def stricter(one: SitePolicy, other: SitePolicy) -> SitePolicy:
    """What both policies allow; the order does not matter."""
    return SitePolicy(
        allowed_federations=_in_both(one.allowed_federations, other.allowed_federations),
        allowed_manifests=_in_both(one.allowed_manifests, other.allowed_manifests),
        allowed_base_models=_in_both(one.allowed_base_models, other.allowed_base_models),
        allowed_tasks=_in_both(one.allowed_tasks, other.allowed_tasks),
        allowed_target_modules=_layers_in_both(one.allowed_target_modules, other.allowed_target_modules),
        allowed_modules_to_save=_layers_in_both(one.allowed_modules_to_save, other.allowed_modules_to_save),
        max_rank=min(one.max_rank, other.max_rank),
        max_update_bytes=min(one.max_update_bytes, other.max_update_bytes),
        max_local_steps=min(one.max_local_steps, other.max_local_steps),
        max_learning_rate=min(one.max_learning_rate, other.max_learning_rate),
        max_task_seconds=min(one.max_task_seconds, other.max_task_seconds),
        max_tasks_per_day=_least(one.max_tasks_per_day, other.max_tasks_per_day),
        max_updates=_least(one.max_updates, other.max_updates),
        max_evaluations=_least(one.max_evaluations, other.max_evaluations),
        min_examples=max(one.min_examples, other.min_examples),
        max_new_tokens=min(one.max_new_tokens, other.max_new_tokens),
        may_send_metrics=one.may_send_metrics and other.may_send_metrics,
        require_offline=one.require_offline or other.require_offline,
    )


def check_welcome(policy: SitePolicy, welcome: Welcome) -> None:
    """Raises PolicyRefused unless the federation may be joined and its model trained; before anything is loaded."""
    model = welcome.model
    _check_listed("federation", welcome.federation, policy.allowed_federations, "allowed_federations")
    if model.base_model_digest:
        check_base_model(policy, model.base_model_digest, f"the federation {welcome.federation}")
    _check_listed("task", model.task, policy.allowed_tasks, "allowed_tasks")
    for name in model.target_modules:
        _check_layer("target_modules", name, policy.allowed_target_modules)
    for name in model.modules_to_save:
        _check_layer("modules_to_save", name, policy.allowed_modules_to_save)


def check_base_model(policy: SitePolicy, digest: str, whose: str) -> None:
    """Raises PolicyRefused unless the base model is allowed; `whose` says who named it."""
    allowed = policy.allowed_base_models
    if allowed is not None and digest not in allowed:
        raise PolicyRefused(
            f"site policy: {whose} is the base model {digest[:12] or '(no digest)'}; "
            f"policy.allowed_base_models allows {_listed(known[:12] for known in allowed)}"
        )


def check_examples(policy: SitePolicy, num_examples: int, what: str = "training") -> None:
    """Raises PolicyRefused if this site has too few examples to hide one of them among; an evaluator's are `test`."""
    if num_examples < policy.min_examples:
        raise PolicyRefused(
            f"site policy: {num_examples} {what} examples, but min_examples is {policy.min_examples}; not joined"
        )


def check_manifest(policy: SitePolicy, digest: str) -> None:
    """Raises PolicyRefused unless this very manifest is allowed."""
    _check_listed("manifest", digest, policy.allowed_manifests, "allowed_manifests")


def check_task(
    policy: SitePolicy,
    task: Task,
    *,
    max_rank: int,
    num_examples: int,
    num_test_examples: int,
    evaluates_only: bool = False,
) -> None:
    """Raises PolicyRefused unless the task is within the site's bounds; `max_rank` is what this worker offered.

    `num_examples` are there to train on, `num_test_examples` to evaluate on. A worker that `evaluates_only` trains
    nothing, whatever is asked.
    """
    allowed_rank = min(policy.max_rank, max_rank)
    if not 1 <= task.lora_rank <= allowed_rank:
        raise _refusal(task, "rank", task.lora_rank, f"1 to {allowed_rank}")
    if task.kind is TaskKind.EVALUATE:
        _check_evaluation(policy, task, num_test_examples)
        return
    if evaluates_only:
        raise PolicyRefused(f"site policy: round {task.round} asks for training; this worker is an evaluator")
    if not 0 < task.plan.learning_rate <= policy.max_learning_rate:
        raise _refusal(task, "learning rate", task.plan.learning_rate, f"at most {policy.max_learning_rate}")
    steps = steps_of(task.plan, num_examples)
    if not 0 < steps <= policy.max_local_steps:
        raise _refusal(task, "optimizer steps", steps, f"1 to {policy.max_local_steps}")


def _check_evaluation(policy: SitePolicy, task: Task, num_test_examples: int) -> None:
    if not policy.may_send_metrics:
        raise PolicyRefused(f"site policy: round {task.round} asks for an evaluation; no metrics leave this site")
    asked, allowed = task.evaluation.max_new_tokens, policy.max_new_tokens
    if task.evaluation.method == GENERATION and asked > allowed:
        raise _refusal(task, "new tokens", asked, f"at most {allowed}")
    # The metrics of a few records are those records'.
    most, fewest = task.evaluation.max_examples, policy.min_examples
    if 0 < most < fewest:
        raise _refusal(task, "an evaluation on at most so many examples:", most, f"at least {fewest} (min_examples)")
    if num_test_examples < fewest:
        raise PolicyRefused(
            f"site policy: round {task.round} asks for an evaluation, but there are {num_test_examples} test examples "
            f"here and min_examples is {fewest}; no metrics of fewer leave this site"
        )


def check_size(policy: SitePolicy, task: Task, size_bytes: int) -> None:
    """Raises PolicyRefused if a slice or update of the task's rank is larger than the site lets through."""
    if size_bytes > policy.max_update_bytes:
        raise _refusal(task, "bytes", size_bytes, f"at most {policy.max_update_bytes}")


def check_budget(policy: SitePolicy, task: Task, spent: Spent) -> None:
    """Raises PolicyRefused if as much has left as the site lets leave."""
    is_evaluation = task.kind is TaskKind.EVALUATE
    in_all = spent.evaluations if is_evaluation else spent.updates
    limit = policy.max_evaluations if is_evaluation else policy.max_updates
    if limit is not None and in_all >= limit:
        raise PolicyRefused(f"site policy: {in_all} {task.kind.value} results have left; {limit} are allowed in all")
    if policy.max_tasks_per_day is not None and spent.last_day >= policy.max_tasks_per_day:
        raise PolicyRefused(
            f"site policy: {spent.last_day} results have left within a day; {policy.max_tasks_per_day} are allowed"
        )


def has_budget(policy: SitePolicy) -> bool:
    """Whether anything needs counting."""
    return any(limit is not None for limit in (policy.max_tasks_per_day, policy.max_updates, policy.max_evaluations))


def steps_of(plan: Plan, num_examples: int) -> float:
    """The optimizer steps that a plan asks of so many examples; infinite if it cannot be told."""
    if plan.local_steps:
        return plan.local_steps
    if plan.batch_size < 1 or not math.isfinite(plan.local_epochs):
        return math.inf
    steps = math.ceil(num_examples / plan.batch_size) * plan.local_epochs
    return math.ceil(steps) if math.isfinite(steps) else math.inf


def _refusal(task: Task, what: str, found: float, allowed: str) -> PolicyRefused:
    return PolicyRefused(f"site policy: round {task.round} asks for {what} {found:g}; {allowed} is allowed here")


def _check_listed(what: str, found: str, allowed: Names | None, key: str) -> None:
    if allowed is not None and found not in allowed:
        raise PolicyRefused(f"site policy: {what} {found!r}; policy.{key} allows {_listed(allowed)}")


def _check_layer(what: str, found: str, allowed: Names | None) -> None:
    if allowed is not None and not any(_is_within(found, name) for name in allowed):
        raise PolicyRefused(f"site policy: {what} {found!r}; policy.allowed_{what} allows {_listed(allowed)}")


def _listed(names: Iterable[str]) -> str:
    found = list(names)
    return ", ".join(found[:_SHOWN]) + (", ..." if len(found) > _SHOWN else "") or "none"


def _is_within(name: str, allowed: str) -> bool:
    """Whether every layer that `name` stands for is one that `allowed` stands for: names match by their ends.

    Of a pattern too, whatever it begins with: what it stands for ends as it ends, and `allowed` holds no * and no ?.
    """
    return name == allowed or name.endswith(f".{allowed}")


def _in_both(one: Names | None, other: Names | None) -> Names | None:
    if one is None or other is None:
        return other if one is None else one
    return tuple(sorted(set(one) & set(other)))


def _layers_in_both(one: Names | None, other: Names | None) -> Names | None:
    if one is None or other is None:
        return other if one is None else one
    narrower = {a for a in one for b in other if _is_within(a, b)} | {b for b in other for a in one if _is_within(b, a)}
    return tuple(sorted(narrower))


def _least(one: int | None, other: int | None) -> int | None:
    return min((limit for limit in (one, other) if limit is not None), default=None)
