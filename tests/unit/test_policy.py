"""What a site refuses, one line a case."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from common.errors import ConfigError
from worker.config import DataConfig, ModelConfig, SitePolicy, WorkerConfig
from worker.egress import Departure, Ledger, Spent, record
from worker.messages import Blob, Task, TaskKind
from worker.policy import PolicyRefused, check_base_model, check_budget, check_task, steps_of, stricter
from worker.policy_file import with_policy_file
from worker.trainer_protocol import CHOICE, GENERATION, LOSS, EvaluationPlan, Plan

PLAN = Plan(
    learning_rate=0.01,
    local_steps=10,
    local_epochs=0.0,
    batch_size=4,
    weight_decay=0.0,
    max_grad_norm=1.0,
    warmup_steps=0,
    seed=1,
)
TASK = Task(
    kind=TaskKind.TRAIN,
    round=3,
    attempt=1,
    lease_token=1,
    lora_rank=8,
    scaling=1.0,
    adapter=Blob("a" * 64, 100),
    plan=PLAN,
    manifest_digest="b" * 64,
)
POLICY = SitePolicy(max_rank=16, max_local_steps=10, max_learning_rate=0.01)
BY_EPOCHS = replace(PLAN, local_steps=0, local_epochs=2.0)


def check(task: Task, num_examples: int = 20) -> None:
    check_task(POLICY, task, max_rank=8, num_examples=num_examples, num_test_examples=20)


def test_a_task_at_every_bound_is_allowed() -> None:
    check(TASK)
    check(replace(TASK, plan=BY_EPOCHS))


@pytest.mark.parametrize(
    ("task", "sentence"),
    [
        (replace(TASK, lora_rank=9), "asks for rank 9; 1 to 8 is allowed"),
        (replace(TASK, lora_rank=0), "asks for rank 0; 1 to 8 is allowed"),
        (replace(TASK, plan=replace(PLAN, learning_rate=0.02)), "asks for learning rate 0.02; at most 0.01 is allowed"),
        (replace(TASK, plan=replace(PLAN, learning_rate=math.nan)), "asks for learning rate nan; at most 0.01"),
        (replace(TASK, plan=replace(PLAN, learning_rate=-0.01)), "asks for learning rate -0.01; at most 0.01"),
        (replace(TASK, plan=replace(PLAN, local_steps=11)), "asks for optimizer steps 11; 1 to 10 is allowed"),
        (replace(TASK, plan=replace(BY_EPOCHS, local_epochs=2.1)), "asks for optimizer steps 11; 1 to 10 is allowed"),
        (replace(TASK, plan=replace(BY_EPOCHS, batch_size=0)), "asks for optimizer steps inf; 1 to 10 is allowed"),
        (replace(TASK, plan=replace(BY_EPOCHS, local_epochs=math.inf)), "asks for optimizer steps inf"),
        (replace(TASK, plan=replace(BY_EPOCHS, local_epochs=0.0)), "asks for optimizer steps 0; 1 to 10 is allowed"),
    ],
)
def test_a_task_outside_a_bound_is_refused_with_what_was_found_and_what_is_allowed(task: Task, sentence: str) -> None:
    with pytest.raises(PolicyRefused) as refusal:
        check(task)
    assert str(refusal.value).startswith(f"site policy: round 3 {sentence}")


def test_the_policy_bounds_the_rank_even_if_more_was_offered() -> None:
    with pytest.raises(PolicyRefused, match="rank 8; 1 to 4"):
        check_task(SitePolicy(max_rank=4), TASK, max_rank=8, num_examples=20, num_test_examples=20)


def test_an_evaluation_trains_nothing_so_its_plan_does_not_matter() -> None:
    check(replace(TASK, kind=TaskKind.EVALUATE, plan=replace(PLAN, learning_rate=9.0, local_steps=10_000)))


@pytest.mark.parametrize(
    ("policy", "plan", "is_allowed"),
    [
        (SitePolicy(max_new_tokens=256), EvaluationPlan(GENERATION, max_new_tokens=256), True),
        (SitePolicy(max_new_tokens=256), EvaluationPlan(GENERATION, max_new_tokens=257), False),
        (SitePolicy(max_new_tokens=0), EvaluationPlan(GENERATION, max_new_tokens=1), False),
        (SitePolicy(max_new_tokens=0), EvaluationPlan(LOSS, max_new_tokens=9), True),
        (SitePolicy(max_new_tokens=0), EvaluationPlan(CHOICE), True),
    ],
)
def test_the_policy_bounds_what_is_generated(policy: SitePolicy, plan: EvaluationPlan, is_allowed: bool) -> None:
    task = replace(TASK, kind=TaskKind.EVALUATE, evaluation=plan)
    if is_allowed:
        check_task(policy, task, max_rank=8, num_examples=20, num_test_examples=20)
    else:
        asked, most = plan.max_new_tokens, policy.max_new_tokens
        with pytest.raises(PolicyRefused, match=f"asks for new tokens {asked}; at most {most} is allowed here"):
            check_task(policy, task, max_rank=8, num_examples=20, num_test_examples=20)


@pytest.mark.parametrize(
    ("most", "there_are", "sentence"),
    [
        (0, 500, ""),
        (500, 500, ""),
        (501, 500, ""),
        (1, 9_999, "on at most so many examples: 1; at least 500 (min_examples) is allowed here"),
        (499, 9_999, "examples: 499; at least 500"),
        (0, 499, "asks for an evaluation, but there are 499 test examples here and min_examples is 500"),
        (9_999, 499, "there are 499 test examples"),
        (0, 0, "there are 0 test examples"),
    ],
)
def test_no_metric_is_that_of_a_few_records(most: int, there_are: int, sentence: str) -> None:
    task = replace(TASK, kind=TaskKind.EVALUATE, evaluation=EvaluationPlan(LOSS, max_examples=most))
    few, many = SitePolicy(), SitePolicy(min_examples=500)
    for is_evaluator in (False, True):
        bounds: dict[str, Any] = {"max_rank": 8, "num_examples": 9_999, "evaluates_only": is_evaluator}
        if there_are:
            check_task(few, task, num_test_examples=there_are, **bounds)
        if not sentence:
            check_task(many, task, num_test_examples=there_are, **bounds)
            continue
        with pytest.raises(PolicyRefused) as refusal:
            check_task(many, task, num_test_examples=there_are, **bounds)
        assert sentence in str(refusal.value)


def test_an_evaluator_trains_nothing_and_evaluates() -> None:
    bounds: dict[str, Any] = {"max_rank": 8, "num_examples": 20, "num_test_examples": 20, "evaluates_only": True}
    check_task(POLICY, replace(TASK, kind=TaskKind.EVALUATE), **bounds)
    with pytest.raises(PolicyRefused, match="round 3 asks for training; this worker is an evaluator"):
        check_task(POLICY, TASK, **bounds)


def test_steps_of_whole_and_part_epochs() -> None:
    assert steps_of(PLAN, num_examples=20) == 10
    assert steps_of(BY_EPOCHS, num_examples=21) == 12
    assert steps_of(replace(BY_EPOCHS, local_epochs=0.5), num_examples=20) == 3


def test_any_base_model_is_allowed_unless_the_site_lists_some() -> None:
    check_base_model(SitePolicy(), "c" * 64, "model.path")
    check_base_model(SitePolicy(allowed_base_models=("c" * 64,)), "c" * 64, "model.path")
    with pytest.raises(PolicyRefused, match=r"the federation f is the base model dddddddddddd; .* allows cccccccccccc"):
        check_base_model(SitePolicy(allowed_base_models=("c" * 64,)), "d" * 64, "the federation f")


def test_an_empty_list_allows_nothing() -> None:
    with pytest.raises(PolicyRefused, match="allowed_base_models allows none"):
        check_base_model(SitePolicy(allowed_base_models=()), "c" * 64, "model.path")


def test_infinite_steps_do_not_overflow() -> None:
    assert steps_of(replace(BY_EPOCHS, local_epochs=1e308), num_examples=1 << 40) == math.inf


# --- two policies

A, B, C = "a" * 64, "b" * 64, "c" * 64
LOOSE_AND_STRICT: dict[str, tuple[Any, Any, Any]] = {  # one, other, what both allow
    "allowed_federations": (("x", "y"), ("y", "z"), ("y",)),
    "allowed_manifests": ((A, B), (B, C), (B,)),
    "allowed_base_models": ((A,), (B,), ()),
    "allowed_tasks": (None, ("image-classification",), ("image-classification",)),
    "allowed_target_modules": (("query", "value"), ("attention.query", "key"), ("attention.query",)),
    "allowed_modules_to_save": (("bert.pooler", "head"), ("pooler", "head"), ("bert.pooler", "head")),
    "max_rank": (64, 8, 8),
    "max_update_bytes": (1 << 30, 1 << 20, 1 << 20),
    "max_local_steps": (100, 50, 50),
    "max_learning_rate": (1.0, 0.1, 0.1),
    "max_task_seconds": (60.0, 600.0, 60.0),
    "max_tasks_per_day": (None, 10, 10),
    "max_updates": (0, None, 0),
    "max_evaluations": (3, 2, 2),
    "min_examples": (1, 100, 100),
    "max_new_tokens": (4096, 64, 64),
    "may_send_metrics": (True, False, False),
    "require_offline": (True, False, True),
}


@pytest.mark.parametrize("key", list(SitePolicy.model_fields))
def test_of_two_policies_the_stricter_wins_whichever_comes_first(key: str) -> None:
    one, other, both = (SitePolicy.model_validate({key: value}) for value in LOOSE_AND_STRICT[key])
    assert stricter(one, other) == stricter(other, one) == both
    assert stricter(one, one) == one
    assert stricter(one, SitePolicy()) == one


def settings(policy_file: Path | None = None, *, offline: bool = False, **policy: Any) -> WorkerConfig:
    return WorkerConfig(
        rank=8,
        model=ModelConfig(path="base", offline=offline),
        data=DataConfig(train="train.jsonl"),
        policy=SitePolicy(**policy),
        policy_file=policy_file,
    )


def test_a_policy_file_adds_to_the_settings_and_nothing_overrides_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "policy.toml"
    file.write_text('max_rank = 16\nallowed_federations = ["hospitals"]\n')
    monkeypatch.setenv("RAFLORA__MAX_RANK", "4096")

    policy = with_policy_file(settings(file, max_rank=32, max_updates=5)).policy

    assert (policy.max_rank, policy.max_updates, policy.allowed_federations) == (16, 5, ("hospitals",))
    assert with_policy_file(settings(max_rank=32)).policy == SitePolicy(max_rank=32)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("max_ranks = 4", "max_ranks: there is no such key; did you mean max_rank?"),
        ('allowed_base_models = ["abc"]', "allowed_base_models"),
        ('allowed_target_modules = ["(a+)+$"]', "allowed_target_modules"),
        ('allowed_tasks = ["anything"]', "allowed_tasks"),
        ("max_rank = 4", "site policy: rank = 8, but max_rank is 4"),
        ("require_offline = true", "site policy: require_offline is set; set model.offline = true"),
    ],
)
def test_a_policy_that_does_not_hold_stops_the_worker_before_it_starts(
    tmp_path: Path, content: str, sentence: str
) -> None:
    file = tmp_path / "policy.toml"
    file.write_text(content)
    with pytest.raises(ConfigError) as error:
        with_policy_file(settings(file))
    assert sentence in str(error.value)


def test_a_policy_file_that_is_not_there_stops_the_worker(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no such file"):
        with_policy_file(settings(tmp_path / "policy.toml"))


def test_an_offline_worker_may_start_where_that_is_required() -> None:
    with_policy_file(settings(offline=True, require_offline=True))


# --- budgets

DAY = 86_400.0
EVALUATE = replace(TASK, kind=TaskKind.EVALUATE)


@pytest.mark.parametrize(
    ("policy", "task", "spent", "is_allowed"),
    [
        (SitePolicy(max_updates=3), TASK, Spent(updates=2, evaluations=9), True),
        (SitePolicy(max_updates=3), TASK, Spent(updates=3), False),
        (SitePolicy(max_updates=0), EVALUATE, Spent(), True),
        (SitePolicy(max_evaluations=3), EVALUATE, Spent(evaluations=3), False),
        (SitePolicy(max_evaluations=3), TASK, Spent(evaluations=3), True),
        (SitePolicy(max_tasks_per_day=2), TASK, Spent(updates=9, evaluations=9, last_day=1), True),
        (SitePolicy(max_tasks_per_day=2), EVALUATE, Spent(last_day=2), False),
    ],
)
def test_a_budget_counts_updates_and_evaluations_apart(
    policy: SitePolicy, task: Task, spent: Spent, is_allowed: bool
) -> None:
    if is_allowed:
        check_budget(policy, task, spent)
    else:
        with pytest.raises(PolicyRefused, match=r"results have left.* are allowed"):
            check_budget(policy, task, spent)


def test_what_has_left_is_counted_from_the_report_of_this_and_earlier_runs(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    assert ledger.spent(now_seconds=0.0) == Spent()
    for kind in ("join", "update", "evaluation", "failure"):
        record(tmp_path, Departure(kind), time="2001-09-09T01:46:40+00:00")  # at 1e9 seconds
    assert ledger.spent(now_seconds=1e9 + 1) == Spent(updates=1, evaluations=1, last_day=2)

    record(tmp_path, Departure("update"), time="2001-09-10T01:46:40+00:00")
    assert ledger.spent(now_seconds=1e9 + DAY) == Spent(updates=2, evaluations=1, last_day=1)
    assert Ledger(tmp_path).spent(now_seconds=1e9 + DAY) == Spent(updates=2, evaluations=1, last_day=1)


def test_a_line_that_a_crash_tore_counts_as_one_of_each(tmp_path: Path) -> None:
    (tmp_path / "egress.jsonl").write_text(json.dumps({"kind": "update"})[:10] + "\n[]\n")
    assert Ledger(tmp_path).spent(now_seconds=1e9) == Spent(updates=2, evaluations=2, last_day=2)
