"""What a plan predicts: exact numbers against tables and by hand, estimates against their own arithmetic."""

import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.adapter import AdapterSpec, ModuleShape, TensorShape
from common.codec import Layout, WireDtype
from common.errors import ConfigError
from coordinator.aggregation.forecast import energy_factor, forecast_collapse, half_life_of
from coordinator.config import CoordinatorConfig
from coordinator.federation.state import Measured, Profile
from coordinator.footprint import (
    FRAMEWORK_BYTES,
    MAX_LOGITS_BYTES,
    BaseFacts,
    StepSetting,
    footprint_of,
    lora_numbers,
    trained_numbers,
)
from coordinator.planning import (
    AGGREGATION_FLOPS,
    FederationPlan,
    Links,
    Question,
    Site,
    plan_federation,
    training_seconds,
)

GIB = 1 << 30
HIDDEN, KEY_VALUE, INNER, LAYERS = 3072, 1024, 8192, 28  # LLaMA-3.2-3B
SIDES = {  # out_features, in_features
    "q": (HIDDEN, HIDDEN),
    "k": (KEY_VALUE, HIDDEN),
    "v": (KEY_VALUE, HIDDEN),
    "o": (HIDDEN, HIDDEN),
    "gate": (INNER, HIDDEN),
    "up": (INNER, HIDDEN),
    "down": (HIDDEN, INNER),
}
LLAMA = BaseFacts(
    parameters=3_212_749_824,
    linear_parameters=2_818_572_288,
    hidden_size=HIDDEN,
    layers=LAYERS,
    vocabulary=128_256,
    dtype="bfloat16",
)
STEP = StepSetting(micro_batch=8, tokens=512, is_language_model=True)
SMALL = AdapterSpec((ModuleShape("a.query", 16, 12), ModuleShape("b.dense", 11, 20)), (TensorShape("head", (3, 16)),))


def llama(*targets: str) -> AdapterSpec:
    return AdapterSpec(
        tuple(ModuleShape(f"layers.{i}.{name}", *SIDES[name]) for i in range(LAYERS) for name in targets)
    )


def config_of(**changes: Any) -> CoordinatorConfig:
    settings: dict[str, Any] = {
        "name": "gsm8k",
        "model": {"base_model": "llama", "task": "causal-lm"},
        "adapter": {"target_modules": ["query"], "global_rank": 8},
        "rounds": {"num_rounds": 10, "min_clients": 3},
        "training": {"learning_rate": 1e-4, "local_steps": 50, "batch_size": 4},
    }
    for name, value in changes.items():
        section, _, key = name.partition("__")
        settings.setdefault(section, {})[key] = value
    return CoordinatorConfig.model_validate(settings)


def site(name: str, rank: int, examples: int = 0, **profile: Any) -> Site:
    return Site(name, rank, "given", Profile(rank, examples or 1, **profile), knows_examples=examples > 0)


def planned(sites: list[Site], spec: AdapterSpec = SMALL, **changes: Any) -> FederationPlan:
    links = changes.pop("links", Links())
    return plan_federation(Question(config_of(**changes), spec, LLAMA, STEP, tuple(sites), links))


THREE = [site("ada", 2), site("bob", 4), site("cem", 8)]

# ---------------------------------------------------------------- exact: numbers and bytes


@pytest.mark.parametrize(
    ("targets", "megabytes"),
    [
        (("q", "v"), (9.2, 18.4, 36.7, 55.1, 73.4)),
        (("q", "k", "v", "o"), (18.4, 36.7, 73.4, 110, 147)),
        (tuple(SIDES), (48.6, 97.3, 195, 292, 389)),
    ],
)
@pytest.mark.parametrize("dtype", [WireDtype.FLOAT32, WireDtype.BFLOAT16])
def test_the_slices_of_llama_3_2_3b_are_those_of_the_paper_s_setting(
    targets: tuple[str, ...], megabytes: tuple[float, ...], dtype: WireDtype
) -> None:
    sites = [site(f"s{rank}", rank) for rank in (8, 16, 32, 48, 64)]
    changes: dict[str, Any] = {"adapter__global_rank": 64, "adapter__wire_dtype": dtype}
    plan = planned(sites, llama(*targets), **changes)
    share = 1.0 if dtype is WireDtype.FLOAT32 else 0.5
    for level, expected in zip(plan.levels, megabytes, strict=True):
        assert level.slice_bytes / 1e6 == pytest.approx(share * expected, rel=5e-3)
        assert level.slice_bytes == level.update_bytes == Layout(llama(*targets), level.rank, dtype).size_bytes


def test_parameters_are_counted_by_hand() -> None:
    # (16 + 12) + (11 + 20) = 59 a rank, and a head of 48.
    assert (lora_numbers(SMALL, 4), trained_numbers(SMALL, 4)) == (236, 284)
    # With lora_A frozen only 16 + 11 a rank are trained.
    assert trained_numbers(SMALL, 4, freezes_lora_A=True) == 4 * 27 + 48
    level = planned(THREE).levels[1]
    assert (level.lora_parameters, level.trained_parameters) == (236, 284)


def test_what_is_trained_takes_sixteen_bytes_a_number() -> None:
    footprint = footprint_of(SMALL, 4, LLAMA, STEP)
    parts = (footprint.factors_bytes, footprint.gradient_bytes, footprint.adam_bytes)
    assert parts == (4 * 284, 4 * 284, 8 * 284)
    assert footprint.trained_bytes == 16 * 284
    frozen = footprint_of(SMALL, 4, LLAMA, replace(STEP, freezes_lora_A=True))
    assert frozen.trained_bytes == 4 * 284 + 12 * (4 * 27 + 48)


@pytest.mark.parametrize(
    ("rounds", "evaluate_every", "versions"),
    [
        (10, 1, 11),  # the seeded adapter, and each round's own for its evaluation: the next round has it already
        (10, 0, 10),  # nobody fetches the last one
        (10, 4, 11),
        (1, 1, 2),
        (1, 0, 1),
    ],
)
def test_down_is_one_slice_a_version_of_the_adapter(rounds: int, evaluate_every: int, versions: int) -> None:
    plan = planned(THREE, rounds__num_rounds=rounds, rounds__evaluate_every=evaluate_every)
    once = sum(Layout(SMALL, rank).size_bytes for rank in (2, 4, 8))
    traffic = plan.traffic
    assert (traffic.down_round, traffic.up_round, traffic.is_exact) == (once, once, True)
    assert (traffic.down_total, traffic.up_total) == (versions * once, rounds * once)


def test_a_cohort_that_is_drawn_moves_its_share_and_is_an_expectation() -> None:
    sites = [site(f"s{i}", 4) for i in range(10)]
    plan = planned(sites, rounds__fraction=0.5, rounds__evaluate_every=5)
    once = Layout(SMALL, 4).size_bytes
    assert (plan.cohort, plan.traffic.is_exact, plan.traffic.up_round) == (5, False, 5 * once)
    # Two of ten adapters are evaluated, by all ten; nine versions are only trained from, by five.
    assert plan.traffic.down_total == (5 * 9 + 10 * 2) * once


# ---------------------------------------------------------------- estimates: memory and time


def test_the_base_is_exact_unless_it_is_quantised() -> None:
    plain = footprint_of(SMALL, 4, LLAMA, STEP)
    assert (plain.base_bytes, plain.is_base_exact) == (2 * LLAMA.parameters, True)
    small = footprint_of(SMALL, 4, LLAMA, replace(STEP, quantization="4bit"))
    rest = 2 * (LLAMA.parameters - LLAMA.linear_parameters)
    assert small.base_bytes - rest == pytest.approx(0.5159 * LLAMA.linear_parameters, rel=1e-3)
    assert not small.is_base_exact
    eight = footprint_of(SMALL, 4, LLAMA, replace(STEP, quantization="8bit"))
    assert eight.base_bytes - rest == LLAMA.linear_parameters


def test_the_total_is_the_sum_of_its_parts_and_unknown_without_the_base() -> None:
    found = footprint_of(SMALL, 4, LLAMA, STEP)
    parts = found.trained_bytes + found.base_bytes + found.activation_bytes + FRAMEWORK_BYTES
    assert found.total_bytes == parts
    unknown = footprint_of(SMALL, 4, BaseFacts(), STEP)
    assert (unknown.total_bytes, unknown.activation_bytes, unknown.is_known) == (0, 0, False)
    assert unknown.trained_bytes == found.trained_bytes


@given(
    rank=st.integers(1, 64),
    micro_batch=st.integers(1, 64),
    tokens=st.integers(1, 4096),
    quantization=st.sampled_from(["none", "8bit", "4bit"]),
    checkpoints=st.booleans(),
)
def test_more_of_anything_needs_no_less_memory(
    rank: int, micro_batch: int, tokens: int, quantization: str, checkpoints: bool
) -> None:
    setting = StepSetting(micro_batch, tokens, quantization=quantization, checkpoints_gradients=checkpoints)
    spec = llama("q", "v")
    least = footprint_of(spec, rank, LLAMA, setting).total_bytes
    assert least < footprint_of(spec, rank + 1, LLAMA, setting).total_bytes
    assert least < footprint_of(spec, rank, LLAMA, replace(setting, micro_batch=micro_batch + 1)).total_bytes
    assert least < footprint_of(spec, rank, LLAMA, replace(setting, is_language_model=True)).total_bytes
    assert least >= footprint_of(spec, rank, LLAMA, replace(setting, checkpoints_gradients=True)).total_bytes
    assert least >= footprint_of(spec, rank, LLAMA, replace(setting, quantization="4bit")).total_bytes
    assert least < footprint_of(spec, rank, LLAMA, replace(setting, dtype="float32")).total_bytes


def logits_bytes(micro_batch: int, **changes: Any) -> int:
    """What a language model's step holds more than the same step without a head over the vocabulary."""
    setting = replace(STEP, micro_batch=micro_batch, **changes)
    classifier = replace(setting, is_language_model=False)
    return footprint_of(SMALL, 4, LLAMA, setting).activation_bytes - (
        footprint_of(SMALL, 4, LLAMA, classifier).activation_bytes
    )


def test_logits_count_until_there_are_so_many_that_they_are_made_in_tiles() -> None:
    # 512 tokens of 128,256 words are 250.5 MiB in float32: held at once, unlike those of two examples.
    assert logits_bytes(1) == 14 * 512 * LLAMA.vocabulary
    assert logits_bytes(2) == logits_bytes(64) == logits_bytes(2, tokens=4096) == 896 << 20


@pytest.mark.torch
def test_the_trainer_makes_logits_in_tiles_above_the_same_size() -> None:
    language_trainer = pytest.importorskip("worker.trainer.language_trainer")
    assert language_trainer.MAX_LOGITS_BYTES == MAX_LOGITS_BYTES


def test_what_checkpointing_keeps_is_counted_by_hand() -> None:
    base = BaseFacts(parameters=1000, hidden_size=64, layers=2)
    setting = StepSetting(micro_batch=2, tokens=16)
    adapted = 4 * ((12 + 4) + (20 + 4))  # lora_A's input and output in float32, of both layers
    assert footprint_of(SMALL, 4, base, setting).activation_bytes == 32 * (2 * 34 * 64 + adapted)
    # Of every layer its input, and one layer with its half of the adapted ones at a time.
    checkpointed = replace(setting, checkpoints_gradients=True)
    assert footprint_of(SMALL, 4, base, checkpointed).activation_bytes == 32 * (2 * 2 * 64 + 34 * 64 + adapted // 2)


def test_a_model_of_patches_decides_itself_how_long_an_example_is() -> None:
    vit = replace(LLAMA, tokens=197, vocabulary=0)
    short, long = replace(STEP, tokens=16), replace(STEP, tokens=4096)
    assert footprint_of(SMALL, 4, vit, short) == footprint_of(SMALL, 4, vit, long)


def test_training_time_is_work_over_the_speed_that_was_measured() -> None:
    probed = site("ada", 4, examples=900, examples_per_second=8.0)
    assert training_seconds(config_of(), probed) == 50 * 4 / 8.0
    by_epochs = config_of(training__local_steps=0, training__local_epochs=2.0)
    assert training_seconds(by_epochs, probed) == 2 * 900 / 8.0
    assert training_seconds(by_epochs, replace(probed, knows_examples=False)) == 0.0
    assert training_seconds(config_of(), site("ada", 4, examples=900)) == 0.0


def test_a_round_waits_for_its_slowest_level_and_is_unknown_if_one_is() -> None:
    slow, fast = site("ada", 2, examples_per_second=2.0), site("bob", 8, examples_per_second=200.0)
    plan = planned([slow, fast, fast], rounds__min_clients=2)
    assert plan.round_seconds == pytest.approx(100.0 + plan.levels[0].transfer_seconds + plan.aggregation_seconds)
    assert planned([slow, fast, site("cem", 4)]).round_seconds == 0.0


def test_the_coordinator_s_link_is_shared() -> None:
    sites = [site(f"s{i}", 8) for i in range(100)]
    size = Layout(SMALL, 8).size_bytes
    wide = planned(sites, links=Links(site_mbit=10.0, coordinator_mbit=10_000.0)).levels[0]
    assert wide.transfer_seconds == pytest.approx(2 * 8 * size / 10e6)
    narrow = planned(sites, links=Links(site_mbit=10.0, coordinator_mbit=100.0)).levels[0]
    assert narrow.transfer_seconds == pytest.approx(10 * wide.transfer_seconds)


def test_more_processes_and_fewer_sites_aggregate_sooner() -> None:
    spec, changes = llama("q", "v"), {"adapter__global_rank": 64}
    sites = [site(f"s{i}", 64) for i in range(4)]
    alone = planned(sites, spec, **changes).aggregation_seconds
    assert planned(sites, spec, aggregation__processes=4, **changes).aggregation_seconds == pytest.approx(alone / 4)
    assert 0 < planned(sites[:3], spec, **changes).aggregation_seconds < alone


def test_the_work_of_an_aggregation_is_counted_by_hand() -> None:
    spec = AdapterSpec((ModuleShape("a.query", 16, 12),))
    plan = planned([site("ada", 4)], spec, rounds__min_clients=1)
    # A stack of width 4: a QR of either side (4 m n^2 - 4/3 n^3) and the way back to rank 8 (2 m n r) ...
    sides = (4 * 16 * 16 - 4 / 3 * 64 + 2 * 16 * 4 * 8) + (4 * 12 * 16 - 4 / 3 * 64 + 2 * 12 * 4 * 8)
    # ... then the product and the SVD of a core of 4 x 4.
    core = 2 * 4 * 4 * 4 + 22 * 4**2 * 4
    assert plan.aggregation_seconds == pytest.approx((sides + core) / AGGREGATION_FLOPS, rel=1e-12)


def test_a_large_stack_is_multiplied_and_not_decomposed() -> None:
    spec, changes = llama("q"), {"adapter__global_rank": 64}
    plan = planned([site(f"s{i}", 64) for i in range(50)], spec, **changes)
    # Four half passes with a block of the rank over (m + n) x 3200 numbers, a product and a sum each.
    sides = sum(module.out_features + module.in_features for module in spec.modules)
    assert plan.aggregation_seconds == pytest.approx(4 * 2 * sides * 3200 * 64 / AGGREGATION_FLOPS, rel=1e-12)


# ---------------------------------------------------------------- the collapse, and warnings


def test_every_partition_is_told_apart() -> None:
    # Shares of examples above ranks 2 and 4: 5/6 and 3/6; an average keeps their squares.
    plan = planned([site("ada", 2, 100), site("bob", 4, 200), site("cem", 8, 300)])
    found = [(p.low, p.high, p.sites) for p in plan.partitions]
    assert found == [(0, 2, 3), (2, 4, 2), (4, 8, 1)]
    assert [p.average_factor for p in plan.partitions] == pytest.approx([1.0, 25 / 36, 0.25])
    assert [p.half_life_rounds for p in plan.partitions] == pytest.approx([math.inf, 1.9010, 0.5], rel=1e-3)
    assert plan.forecast == forecast_collapse([(2, 100), (4, 200), (8, 300)])


def test_sites_of_unknown_size_count_as_the_mean_of_the_others() -> None:
    plan = planned([site("ada", 2, 100), site("bob", 8, 300), site("cem", 8)])
    assert plan.partitions[1].share == pytest.approx(500 / 600)


@given(share=st.floats(0.0, 1.0), clients=st.integers(2, 50), data=st.data())
def test_a_draw_never_keeps_less_than_all_together_and_never_more_than_everything(
    share: float, clients: int, data: st.DataObject
) -> None:
    drawn = data.draw(st.integers(1, clients))
    factor = energy_factor(share, clients, drawn)
    assert share**2 - 1e-12 <= factor <= share + 1e-12
    assert half_life_of(factor) >= 0.0


def test_lone_and_missing_owners_are_warned_of_partition_by_partition() -> None:
    plan = planned([site("ada", 2), site("bob", 2), site("cem", 4)])
    assert plan.warnings == (
        "ranks 3-4: one site alone trains them, and its noise goes into the adapter whole",
        "ranks 5-8: no site trains them; a smaller adapter.global_rank would do",
        "let a second site train each of these ranks, or set aggregation.weight_floor (0.3, say)",
    )
    assert planned([site("ada", 8), site("bob", 8), site("cem", 8)]).warnings == ()
    bounded = planned([site("ada", 4), site("bob", 4), site("cem", 8)], aggregation__weight_floor=0.3)
    assert bounded.warnings == (
        "ranks 5-8: one site alone trains them, and aggregation.weight_floor 0.3 bounds what it does",
    )


def test_what_cannot_work_is_warned_of() -> None:
    measured = Measured(10 * GIB, GIB // 8, 4)
    tight = site("ada", 8, memory_bytes=12 * GIB, measured=measured, examples_per_second=0.01)
    room = site("bob", 8, memory_bytes=24 * GIB, measured=measured, examples_per_second=9.0)
    few, large, late = planned([tight, room]).warnings
    assert few == "2 sites, but rounds.min_clients is 3: no round would open"
    assert large == ("ada: a step at rank 8 takes 11.0 GiB as probed, which is more than 90% of the device's 12.0 GiB")
    assert late.startswith("a round takes about 20,")


def test_levels_that_may_be_granted_are_partitions_too() -> None:
    sites = [site("ada", 4), site("bob", 4), site("cem", 4)]
    plan = planned(sites, ranks__policy="cycle", ranks__levels=[2, 4, 6])
    assert [(p.low, p.high, p.sites) for p in plan.partitions] == [(0, 2, 3), (2, 4, 3), (4, 6, 0), (6, 8, 0)]


# ---------------------------------------------------------------- what `raflora spec` writes


def test_facts_of_a_base_are_read_and_what_is_new_is_left() -> None:
    written = {"parameters": 9, "hidden_size": 2, "model_type": "llama", "dtype": "bfloat16", "mood": "good"}
    assert BaseFacts.from_json(written, "spec.json") == BaseFacts(
        parameters=9, hidden_size=2, model_type="llama", dtype="bfloat16"
    )


@pytest.mark.parametrize("value", [-1, 1.5, "many", None, True])
def test_facts_that_are_no_numbers_are_refused(value: object) -> None:
    with pytest.raises(ConfigError, match=r"spec.json: base.layers is .*; a whole number is expected"):
        BaseFacts.from_json({"layers": value}, "spec.json")
