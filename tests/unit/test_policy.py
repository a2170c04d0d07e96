"""What a site refuses, one line a case."""

import math
from dataclasses import replace

import pytest

from worker.config import SitePolicy
from worker.messages import Blob, Task, TaskKind
from worker.policy import PolicyRefused, check_base_model, check_task, steps_of
from worker.trainer_protocol import Plan

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
    check_task(POLICY, task, max_rank=8, num_examples=num_examples)


def test_a_task_at_every_bound_is_allowed() -> None:
    check(TASK)
    check(replace(TASK, plan=BY_EPOCHS))


@pytest.mark.parametrize(
    ("task", "sentence"),
    [
        (replace(TASK, lora_rank=9), "asks for rank 9; 1 to 8 is allowed"),
        (replace(TASK, lora_rank=0), "asks for rank 0; 1 to 8 is allowed"),
        (replace(TASK, scaling=math.nan), "asks for scaling nan; a positive number is allowed"),
        (replace(TASK, scaling=0.0), "asks for scaling 0; a positive number is allowed"),
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
        check_task(SitePolicy(max_rank=4), TASK, max_rank=8, num_examples=20)


def test_an_evaluation_trains_nothing_so_its_plan_does_not_matter() -> None:
    check(replace(TASK, kind=TaskKind.EVALUATE, plan=replace(PLAN, learning_rate=9.0, local_steps=10_000)))


def test_steps_of_whole_and_part_epochs() -> None:
    assert steps_of(PLAN, num_examples=20) == 10
    assert steps_of(BY_EPOCHS, num_examples=21) == 12
    assert steps_of(replace(BY_EPOCHS, local_epochs=0.5), num_examples=20) == 3


def test_any_base_model_is_allowed_unless_the_site_lists_some() -> None:
    check_base_model(SitePolicy(), "c" * 64, "model.path")
    check_base_model(SitePolicy(allowed_base_models=("c" * 64,)), "c" * 64, "model.path")
    with pytest.raises(PolicyRefused, match=r"the federation f is the base model dddddddddddd; .* allows cccccccccccc"):
        check_base_model(SitePolicy(allowed_base_models=("c" * 64,)), "d" * 64, "the federation f")
