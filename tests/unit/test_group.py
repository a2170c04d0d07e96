"""How a group is launched, and what a process of it is told."""

from pathlib import Path

import pytest
from pydantic import ValidationError

from common.errors import ConfigError
from common.settings import environment_alone, take_launch
from worker.config import LaunchConfig, WorkerConfig
from worker.launch import check_launch, group_command, group_environment

FSDP = "distributed_type: FSDP\nfsdp_config:\n"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "there is no such file; `accelerate config --config_file"),
        ("distributed_type: DEEPSPEED", r"DEEPSPEED, which is not used here.*choose FSDP, or .*launch\.shard_base"),
        ("distributed_type: MEGATRON_LM", "asks for distributed_type MEGATRON_LM; MULTI_GPU .* or FSDP .* is expected"),
        (FSDP + "  fsdp_reshard_after_forward: false", "fsdp_reshard_after_forward is False; .* MULTI_GPU"),
        (FSDP + "  fsdp_sharding_strategy: SHARD_GRAD_OP", "fsdp_sharding_strategy is SHARD_GRAD_OP"),
        (FSDP + "  fsdp_offload_params: true", "fsdp_offload_params is true; weights are kept on the GPUs"),
        (FSDP + "  fsdp_activation_checkpointing: true", r"model\.gradient_checkpointing = true"),
        ("distributed_type: 'NO'", "asks for one process"),
        ("- a list", "holds no settings of accelerate"),
        ("a: [", "cannot be read"),
    ],
)
def test_an_accelerate_file_that_cannot_be_used_says_what_to_do(tmp_path: Path, content: str | None, said: str) -> None:
    path = tmp_path / "accelerate.yaml"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError, match=said):
        check_launch(LaunchConfig(accelerate_config=path))


@pytest.mark.parametrize(
    "content", [FSDP + "  fsdp_version: 2", FSDP + "  fsdp_version: 1\n  fsdp_sharding_strategy: FULL_SHARD", FSDP]
)
def test_an_accelerate_file_may_ask_for_a_sharded_base(tmp_path: Path, content: str) -> None:
    path = tmp_path / "accelerate.yaml"
    path.write_text(content)
    check_launch(LaunchConfig(accelerate_config=path))


def test_a_process_alone_has_nobody_to_share_the_base_with() -> None:
    with pytest.raises(ConfigError, match=r"launch\.shard_base: there is one process"):
        check_launch(LaunchConfig(shard_base=True))
    check_launch(LaunchConfig(processes=2, shard_base=True))


def test_a_quantised_base_cannot_be_sharded() -> None:
    settings = {"model": {"path": "m", "quantization": "4bit"}, "data": {"train": "t"}}
    with pytest.raises(ValidationError, match="quantised weights cannot be sharded"):
        WorkerConfig.model_validate({**settings, "launch": {"processes": 2, "shard_base": True}})


def test_one_way_to_launch_is_enough() -> None:
    with pytest.raises(ConfigError, match=r"launch\.processes and launch\.command are both set"):
        check_launch(LaunchConfig(processes=2, command=("srun",)))


def test_a_launcher_that_is_not_there() -> None:
    with pytest.raises(ConfigError, match="no program 'no-such-launcher' is found on PATH"):
        check_launch(LaunchConfig(command=("no-such-launcher", "-n", "2")))


def test_a_launcher_of_ones_own_stands_before_the_trainer() -> None:
    command = group_command(LaunchConfig(command=("env", "A=1")), ("python", "-m", "worker.trainer"), Path("/tmp/x"))
    assert command == ("env", "A=1", "python", "-m", "worker.trainer", "--socket", "/tmp/x")


def test_the_processes_of_one_machine_meet_on_loopback_and_know_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAFLORA__COORDINATOR__JOIN_TOKEN", "secret")
    monkeypatch.setenv("WORLD_SIZE", "8")
    environment = group_environment(LaunchConfig(processes=2))
    assert (environment["GLOO_SOCKET_IFNAME"], environment["NCCL_SOCKET_IFNAME"]) == ("lo", "lo")
    assert "RAFLORA__COORDINATOR__JOIN_TOKEN" not in environment
    assert "WORLD_SIZE" not in environment


def test_a_lone_trainer_does_not_take_itself_for_one_of_a_group(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "TORCHELASTIC_RUN_ID", "ACCELERATE_USE_FSDP"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("RANKED", "1")
    alone = environment_alone()
    assert "RANKED" in alone
    assert not {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "TORCHELASTIC_RUN_ID", "ACCELERATE_USE_FSDP"} & {
        *alone
    }


@pytest.mark.parametrize(
    "said",
    [
        {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"},
        {"SLURM_PROCID": "3", "SLURM_NTASKS": "9", "SLURM_STEP_NUM_TASKS": "4", "SLURM_LOCALID": "1"},
        {"OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_RANK": "1"},
    ],
)
def test_torchrun_srun_and_mpirun_each_say_it_in_their_own_words(said: dict[str, str]) -> None:
    environment = {**said, "MASTER_ADDR": "node-1", "MASTER_PORT": "29500", "HOME": "/home/ada"}
    launched = take_launch(environment)
    assert (launched.rank, launched.size, launched.local_rank) == (3, 4, 1)
    assert (launched.host, launched.port, launched.has_store) == ("node-1", 29500, False)
    assert not {"RANK", "WORLD_SIZE", "MASTER_ADDR", "OMPI_COMM_WORLD_RANK"} & {*environment}
    assert "HOME" in environment


@pytest.mark.parametrize(
    ("said", "is_sharded", "is_foreign"),
    [
        ({}, False, False),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}, True, False),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, False, True),
    ],
)
def test_what_accelerate_was_told_is_kept_from_the_libraries(
    said: dict[str, str], is_sharded: bool, is_foreign: bool
) -> None:
    environment = {**said, "RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "x", "MASTER_PORT": "1"}
    launched = take_launch(environment)
    assert (launched.is_sharded, launched.is_foreign) == (is_sharded, is_foreign)
    assert not environment


def test_a_launcher_that_says_too_little_is_told_what_is_missing() -> None:
    with pytest.raises(ConfigError, match=r"none of the variables MASTER_ADDR is set.*export MASTER_ADDR"):
        take_launch({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"})
    with pytest.raises(ConfigError, match=r"no number: .*'two'"):
        take_launch({"RANK": "0", "WORLD_SIZE": "two", "LOCAL_RANK": "0"})
