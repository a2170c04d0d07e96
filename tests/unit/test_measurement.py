"""The probe's file: its line, and whether it is about the worker that reads it."""

import json
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from common.errors import ConfigError
from worker.config import DataConfig, ModelConfig, SitePolicy, WorkerConfig
from worker.measurement import (
    FILE_NAME,
    Line,
    Measurement,
    Probe,
    Proposal,
    Settled,
    check_rank,
    line_through,
    read_probe,
    settle,
    write_probe,
)
from worker.messages import MemoryMeasurement, ModelRequest, Welcome
from worker.trainer_protocol import Loaded

MIB = 1 << 20
DIGEST = "ab" * 32


def taken(rank: int, peak_bytes: int, *, micro_batch: int = 4, seconds: float = 0.5) -> Measurement:
    return Measurement(lora_rank=rank, micro_batch=micro_batch, peak_bytes=peak_bytes, seconds_per_step=seconds)


MEASURED = (taken(8, 108 * MIB, seconds=0.5), taken(16, 116 * MIB, seconds=1.0), taken(32, 132 * MIB, seconds=2.0))
PROPOSAL = Proposal(lora_rank=32, micro_batch=4, examples_per_second=2.0, line=line_through(MEASURED))
PROBE = Probe(
    base_model_digest=DIGEST,
    task="causal-lm",
    target_modules=("q_proj",),
    modules_to_save=(),
    lora_dropout=0.0,
    batch_size=16,
    max_length=256,
    dtype="auto",
    memory_batch=None,
    device="cuda:0",
    memory_bytes=1000 * MIB,
    memory_share=0.9,
    measurements=MEASURED,
    proposal=PROPOSAL,
)
MODEL = ModelRequest("tiny", DIGEST, "causal-lm", (), ("q_proj",), (), global_rank=64, seed=1)
WELCOME = Welcome(1, "federation", MODEL, batch_size=16)


def worker(folder: Path, **changes: Any) -> WorkerConfig:
    settings: dict[str, Any] = {"model": ModelConfig(path="base"), "data": DataConfig(train="train.jsonl"), **changes}
    return WorkerConfig(state_dir=folder, **settings)


def loaded(**changes: Any) -> Loaded:
    found: dict[str, Any] = {"base_model_digest": DIGEST, "device": "cuda:0", "memory_bytes": 1000 * MIB, **changes}
    return Loaded(modules=(), tensors=(), num_examples=10, **found)


def probed(folder: Path, **changes: Any) -> Path:
    write_probe(folder, PROBE.model_copy(update=changes))
    return folder


def test_two_ranks_give_the_line_and_a_third_says_how_far_off_it_is() -> None:
    assert line_through(MEASURED) == Line(base_bytes=100 * MIB, bytes_per_rank=MIB, deviation=0.0)
    bent = (MEASURED[0], taken(16, 120 * MIB), MEASURED[2])
    line = line_through(bent)
    assert (line.base_bytes, line.bytes_per_rank, line.peak_bytes(64)) == (100 * MIB, MIB, 164 * MIB)
    assert line.deviation == pytest.approx(4 / 120)


def test_where_noise_says_that_memory_falls_the_line_is_flat_at_the_larger() -> None:
    assert line_through([taken(8, 110), taken(16, 100)]) == Line(base_bytes=110, bytes_per_rank=0, deviation=0.0)


def test_a_flat_line_lies_above_both_ends() -> None:
    # 3/8 of a byte a rank are none.
    assert line_through([taken(8, 100), taken(16, 103)]) == Line(base_bytes=103, bytes_per_rank=0, deviation=0.0)


def test_one_rank_gives_no_line() -> None:
    with pytest.raises(ValueError, match="two ranks"):
        line_through([taken(8, 100), taken(8, 110)])


def test_what_was_written_is_read(tmp_path: Path) -> None:
    assert read_probe(tmp_path / FILE_NAME) is None
    assert write_probe(tmp_path / "new", PROBE) == tmp_path / "new" / FILE_NAME
    assert read_probe(tmp_path / "new" / FILE_NAME) == PROBE


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("{", "cannot be read"),
        ("[]", "schema_version None, expected 1"),
        ('{"schema_version": 2}', "schema_version 2, expected 1"),
        ('{"schema_version": 1, "proposal": null}', "base_model_digest: is required"),
        (json.dumps({**PROBE.model_dump(mode="json"), "memory_bytes": -1}), "memory_bytes"),
    ],
)
def test_a_file_that_cannot_be_used_is_named_with_what_to_do(tmp_path: Path, content: str, complaint: str) -> None:
    (tmp_path / FILE_NAME).write_text(content)
    with pytest.raises(ConfigError, match="run `raflora probe") as caught:
        read_probe(tmp_path / FILE_NAME)
    assert complaint in str(caught.value)
    assert str(tmp_path / FILE_NAME) in str(caught.value)


def test_speed_is_that_of_the_next_larger_measured_rank() -> None:
    speeds = [PROBE.examples_per_second(rank) for rank in (4, 8, 9, 32, 64)]
    assert speeds == [8.0, 8.0, 4.0, 2.0, 2.0]


def test_measurements_of_another_setting_say_nothing_about_the_proposal_s_speed() -> None:
    small = taken(64, 1, micro_batch=1, seconds=1e-3)
    assert PROBE.model_copy(update={"measurements": (*MEASURED, small)}).examples_per_second(64) == 2.0


def test_a_rank_of_0_is_the_probe_s_and_so_is_an_open_micro_batch(tmp_path: Path) -> None:
    settled = settle(worker(probed(tmp_path)), WELCOME)
    assert (settled.config.rank, settled.config.batch_size) == (32, 4)
    assert settled.measured == MemoryMeasurement(100 * MIB, MIB, 4, "none")
    assert settled.examples_per_second == 2.0


def test_a_rank_of_one_s_own_stays_and_what_was_measured_goes_with_it(tmp_path: Path) -> None:
    settled = settle(worker(probed(tmp_path), rank=8, batch_size=4), WELCOME)
    assert (settled.config.rank, settled.config.batch_size) == (8, 4)
    assert settled.measured is not None
    assert settled.examples_per_second == 8.0


def test_no_more_is_held_at_one_time_than_the_probe_proposed(tmp_path: Path) -> None:
    settled = settle(worker(probed(tmp_path, memory_batch=6), batch_size=6), WELCOME)
    assert settled.config.batch_size == 4


def test_the_site_s_largest_rank_has_the_last_word(tmp_path: Path) -> None:
    assert settle(worker(probed(tmp_path), policy=SitePolicy(max_rank=4)), WELCOME).config.rank == 4


def test_without_a_probe_a_rank_is_needed(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no .*probe\.json; run `raflora probe --config \.\.\.` or set rank"):
        check_rank(worker(tmp_path))
    config = worker(tmp_path, rank=8)
    assert settle(config, WELCOME) == Settled(config, None)


def test_an_evaluator_needs_no_probe_and_tells_none(tmp_path: Path) -> None:
    config = worker(probed(tmp_path), evaluator=True, data=DataConfig(test="test.jsonl"))
    assert settle(config, WELCOME) == Settled(config, None)


_OTHER_SETTINGS: list[tuple[dict[str, Any], str]] = [
    ({"model": ModelConfig(path="base", quantization="4bit")}, "quantization = none, and the settings say 4bit"),
    ({"model": ModelConfig(path="base", gradient_checkpointing=True)}, "gradient_checkpointing = False"),
    ({"model": ModelConfig(path="base", dtype="bfloat16")}, "dtype = auto, and the settings say bfloat16"),
    ({"model": ModelConfig(path="base", device="cpu")}, "device = cuda:0, and the settings say cpu"),
    ({"data": DataConfig(train="a.jsonl", max_length=512)}, "max_length = 256, and the settings say 512"),
    ({"batch_size": 8}, "batch_size = 4, and the settings say 8"),
]


@pytest.mark.parametrize(("changes", "complaint"), _OTHER_SETTINGS)
def test_a_probe_of_other_settings_gives_no_rank_and_is_not_sent(
    tmp_path: Path, changes: dict[str, Any], complaint: str
) -> None:
    probed(tmp_path)
    with pytest.raises(ConfigError, match="or set rank") as caught:
        check_rank(worker(tmp_path, **changes))
    assert complaint in str(caught.value)
    with capture_logs() as logs:
        settled = settle(worker(tmp_path, rank=8, **changes), WELCOME)
    assert (settled.measured, settled.examples_per_second) == (None, 0.0)
    assert [complaint in entry["why"] for entry in logs] == [True]


def test_a_batch_size_that_was_set_when_the_probe_ran_is_no_other_setting(tmp_path: Path) -> None:
    check_rank(worker(probed(tmp_path, memory_batch=6), batch_size=6))


@pytest.mark.parametrize(
    ("asked", "complaint"),
    [
        ({"target_modules": ("q_proj", "v_proj")}, "target_modules = ['q_proj'], and the federation says"),
        ({"modules_to_save": ("score",)}, "modules_to_save"),
        ({"task": "sequence-classification"}, "task = causal-lm"),
        ({"base_model_digest": "cd" * 32}, "base model = abababababab, and the federation says cdcdcdcdcdcd"),
    ],
)
def test_a_probe_for_another_federation_gives_no_rank(tmp_path: Path, asked: dict[str, Any], complaint: str) -> None:
    welcome = Welcome(1, "other", ModelRequest(**{**vars(MODEL), **asked}), batch_size=16)
    probed(tmp_path)
    with pytest.raises(ConfigError) as caught:
        settle(worker(tmp_path), welcome)
    assert complaint in str(caught.value)
    assert settle(worker(tmp_path, rank=8), welcome).measured is None


def test_a_federation_that_drops_out_more_is_another(tmp_path: Path) -> None:
    welcome = Welcome(1, "other", MODEL, batch_size=16, lora_dropout=0.1)
    with pytest.raises(ConfigError, match=r"lora_dropout = 0\.0, and the federation says 0\.1"):
        settle(worker(probed(tmp_path)), welcome)


def test_a_probe_that_found_nothing_gives_no_rank(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="the last probe found nothing that fits"):
        check_rank(worker(probed(tmp_path, proposal=None)))
    assert settle(worker(tmp_path, rank=8), WELCOME).measured is None


_OTHER_MACHINES: list[tuple[dict[str, Any], str]] = [
    ({"base_model_digest": "cd" * 32}, "base model = abababababab, and this worker has loaded cdcdcdcdcdcd"),
    ({"device": "cpu"}, "device = cuda:0, and this worker runs on cpu"),
    ({"memory_bytes": 2000 * MIB}, "memory_bytes"),
]


@pytest.mark.parametrize(("changes", "complaint"), _OTHER_MACHINES)
def test_a_probe_of_another_base_model_or_device_is_not_sent(
    tmp_path: Path, changes: dict[str, Any], complaint: str
) -> None:
    probed(tmp_path)
    with pytest.raises(ConfigError) as caught:
        settle(worker(tmp_path), WELCOME).on(loaded(**changes))
    assert complaint in str(caught.value)
    own_rank = settle(worker(tmp_path, rank=8), WELCOME)
    with capture_logs() as logs:
        assert own_rank.on(loaded(**changes)).measured is None
    assert [complaint in entry["why"] for entry in logs] == [True]


def test_a_driver_that_keeps_a_little_more_makes_no_other_device(tmp_path: Path) -> None:
    settled = settle(worker(probed(tmp_path)), WELCOME)
    assert settled.on(loaded(device="cuda:1", memory_bytes=995 * MIB)) == settled
