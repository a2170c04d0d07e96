"""`raflora probe`: a trainer process that trains, a coordinator that is asked, a worker that takes the rank."""

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import tiny_trainer
from coordinators import config_of, observing, serving, settings_of, to_toml
from raflora.v1 import federation_pb2 as pb
from raflora.v1 import status_pb2
from structlog.testing import capture_logs
from tiny_models import save_bert, tiny_llama
from worker_site import TRAINER, Site, scripted_site

from cli.main import main
from cli.probe import Bench, measured
from cli.probe_screen import ProbeScreen
from common.errors import ConfigError
from worker.config import CoordinatorAddress, DataConfig, ModelConfig, WorkerConfig
from worker.contact import Clock
from worker.measurement import FILE_NAME, Measurement, Probe, Proposal, line_through, read_probe, write_probe
from worker.messages import ModelRequest, Welcome
from worker.proposal import Question
from worker.run import work
from worker.supervisor import TrainerProcess
from worker.trainer.base_model import digest_of_weights

pytestmark = [pytest.mark.torch, pytest.mark.timeout(300)]

MIB = 1 << 20
WELCOME = Welcome(1, "scripted", ModelRequest("tiny", "", "sequence-classification", ("no", "yes"), (), (), 4, 1))


def write_worker(folder: Path, model: Path, address: str = "127.0.0.1:1", **more: Any) -> Path:
    """The settings of a site whose data file does not exist."""
    settings = {
        "name": "ada",
        "threads": 1,
        "state_dir": str(folder / "state"),
        **more,
        "coordinator": {"address": address},
        "model": {
            **{"path": str(model), "device": "cpu", "offline": True},
            **{"quantization": "none", "gradient_checkpointing": False},
        },
        "data": {"train": str(folder / "there is no such file.jsonl"), "max_length": 32},
    }
    (folder / "worker.toml").write_text(to_toml(settings))
    return folder / "worker.toml"


async def run(*arguments: str) -> int:
    """The command, beside a coordinator in this process."""
    return await asyncio.to_thread(main, list(arguments))


async def test_a_language_model_is_measured_for_the_coordinator_that_answers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny_llama(tmp_path / "llama")
    config = config_of(
        tmp_path / "coordinator",
        model__task="causal-lm",
        model__labels=[],
        adapter__target_modules=["q_proj", "v_proj"],
        adapter__modules_to_save=[],
        adapter__global_rank=8,
        training__batch_size=2,
        training__lora_dropout=0.1,
        ranks__policy="hardware",
        ranks__levels=[8, 2],
        ranks__memory_share=0.8,
    )
    async with serving(config) as address:
        settings = write_worker(tmp_path, model, address)
        status = await run("probe", "--config", str(settings), "--steps", "3", "--format", "json")
        shown = capsys.readouterr()
    assert status == 0, shown.err
    said = json.loads(shown.out[shown.out.index("{\n") :])  # before it is what the coordinator logs here
    probe = read_probe(tmp_path / "state" / "probe.json")
    assert probe is not None
    assert probe.proposal is not None
    assert (probe.proposal.lora_rank, probe.proposal.micro_batch) == (8, 2)
    assert (probe.base_model_digest, probe.lora_dropout, probe.batch_size) == (digest_of_weights(model), 0.1, 2)
    assert probe.memory_share == 0.8
    assert all(m.peak_bytes > 50 * MIB for m in probe.measurements)
    assert [(level["rank"], level["fits"]) for level in said["levels"]] == [(2, True), (8, True)]
    assert said["proposal"] == json.loads((tmp_path / "state" / FILE_NAME).read_text())["proposal"]
    assert "rank 8, micro-batch 2: " in shown.err
    assert not (tmp_path / "state" / "egress.jsonl").exists(), "a probe sends nothing about site or model"


def test_where_nothing_fits_it_is_said_what_was_tried_and_what_to_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    federation = tmp_path / "federation.toml"
    federation.write_text(to_toml(settings_of(tmp_path / "coordinator", adapter__target_modules=["query"])))
    settings = write_worker(tmp_path, save_bert(tmp_path / "bert"))
    command = ["probe", "--config", str(settings), "--federation", str(federation)]
    assert main([*command, "--memory-share", "0.0001", "--steps", "3"]) == 1
    shown = capsys.readouterr().out
    assert "nothing fits this machine: 1 setting tried; the smallest (rank 1, micro-batch 1) takes" in shown
    for advice in (
        "try a smaller data.max_length (now 32)",
        'leave model.quantization (now "none") out',
        "leave model.gradient_checkpointing out",
        "fewer target_modules",
    ):
        assert advice in shown
    assert main(["worker", "--config", str(settings), "--set", f"data.train={settings}"]) == 2
    assert "the last probe found nothing that fits this machine" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--steps", "2"], "at least 3"),
        (["--memory-share", "1.5"], "at most 1"),
        (["--levels", "a,b"], "ranks with commas between them"),
        (["--levels", "16,32"], "none is from 1 to 8"),
        (["--set", "evaluator=true", "--set", "data.test=x.csv"], "an evaluator trains nothing"),
    ],
)
def test_what_cannot_be_meant_is_refused_before_anything_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], complaint: str
) -> None:
    federation = tmp_path / "federation.toml"
    federation.write_text(to_toml(settings_of(tmp_path / "coordinator")))
    settings = write_worker(tmp_path, tmp_path)
    assert main(["probe", "--config", str(settings), "--federation", str(federation), *arguments]) == 2
    assert complaint in capsys.readouterr().err


def test_without_a_coordinator_the_operator_s_file_is_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = write_worker(tmp_path, tmp_path)
    assert main(["probe", "--config", str(settings), "--timeout", "0.5"]) == 4
    assert "--federation federation.toml" in capsys.readouterr().err


# --- measured in a trainer process that may die


def bench_of(folder: Path) -> Bench:
    config = WorkerConfig(
        state_dir=folder / "state", model=ModelConfig(path=str(folder)), data=DataConfig(train="none")
    )
    return Bench(config, WELCOME, 5, TrainerProcess(60, TRAINER))


QUESTION = Question(
    levels=(1, 2, 4),
    batch_size=4,
    memory_batch=None,
    quantizations=("none",),
    checkpointings=(False,),
    memory_share=0.5,
)


async def test_a_trainer_that_dies_costs_one_measurement(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mishaps").write_text("\ncrash\nout_of_memory\n")
    answer = await measured(bench_of(tmp_path), QUESTION, ProbeScreen())
    assert [(f.lora_rank, f.micro_batch, f.reason) for f in answer.failures] == [
        (4, 1, "trainer_died"),
        (2, 1, "out_of_memory"),
    ]
    assert answer.proposal is not None
    assert (answer.proposal.lora_rank, answer.proposal.micro_batch) == (1, 4)
    assert "rank 4, micro-batch 1: not measured: trainer ended with signal SIGKILL" in capsys.readouterr().err


async def test_the_line_of_a_trainer_is_found_again(tmp_path: Path) -> None:
    answer = await measured(bench_of(tmp_path), QUESTION, ProbeScreen())
    assert answer.proposal is not None
    assert (answer.proposal.lora_rank, answer.proposal.micro_batch) == (4, 4)
    line = answer.proposal.line
    assert (line.base_bytes, line.bytes_per_rank, line.deviation) == (140 * MIB, MIB, 0.0)


# --- the worker that has a probe


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    async with scripted_site(tmp_path) as made:
        yield made


def probe_of(rank: int, *, base_model_digest: str = tiny_trainer.BASE_MODEL_DIGEST, **asked: Any) -> Probe:
    """As if the probe had run on the tiny trainer for the scripted federation."""
    found = tuple(
        Measurement(lora_rank=each, micro_batch=2, peak_bytes=(120 + each) * MIB, seconds_per_step=0.5)
        for each in (1, rank)
    )
    settings = {
        "task": "sequence-classification",
        "target_modules": ("q_proj", "v_proj"),
        "modules_to_save": (),
        **asked,
    }
    return Probe(
        base_model_digest=base_model_digest,
        **settings,
        lora_dropout=0.0,
        batch_size=4,
        max_length=256,
        dtype="auto",
        memory_batch=None,
        device="cpu",
        memory_bytes=1 << 30,
        memory_share=0.9,
        measurements=found,
        proposal=Proposal(lora_rank=rank, micro_batch=2, examples_per_second=4.0, line=line_through(found)),
    )


def open_rank(config: WorkerConfig) -> WorkerConfig:
    return config.model_copy(update={"rank": 0})


async def test_a_worker_without_a_rank_joins_at_the_proposed_one_and_tells_what_was_measured(site: Site) -> None:
    write_probe(site.state_dir, probe_of(3))
    await work(open_rank(site.config()), TRAINER, site.time.clock)
    (join,) = site.coordinator.joins
    assert (join.profile.max_rank, join.profile.examples_per_second) == (3, 4.0)
    assert join.profile.measured == pb.MemoryMeasurement(
        base_bytes=120 * MIB, bytes_per_rank=MIB, micro_batch=2, quantization="none"
    )
    departure = json.loads((site.state_dir / "egress.jsonl").read_text().splitlines()[0])
    assert f"measured {120 * MIB} bytes and {MIB} a rank at micro-batch 2 (none), 4 examples/s" in departure["words"]


async def test_a_worker_without_a_rank_and_without_a_probe_asks_nobody(site: Site) -> None:
    with pytest.raises(ConfigError, match="run `raflora probe --config"):
        await work(open_rank(site.config()), TRAINER, site.time.clock)
    assert not site.coordinator.joins
    assert not (site.state_dir / "enrol-key").exists()


async def test_a_probe_of_another_base_model_is_not_sent(site: Site) -> None:
    write_probe(site.state_dir, probe_of(3, base_model_digest="cd" * 32))
    with capture_logs() as logs:
        await site.work()
    (join,) = site.coordinator.joins
    assert (join.profile.max_rank, join.profile.HasField("measured"), join.profile.examples_per_second) == (4, False, 0)
    assert [entry["why"] for entry in logs if entry["event"] == "the probe's measurements are not sent"] == [
        "probe.json was made with base model = cdcdcdcdcdcd, and this worker has loaded ba5eba5eba5e"
    ]
    with pytest.raises(ConfigError, match="base model = cdcdcdcdcdcd"):
        await work(open_rank(site.config()), TRAINER, site.time.clock)
    assert len(site.coordinator.joins) == 1


async def test_a_bigger_device_probes_again_and_the_federation_goes_on_at_the_new_rank(tmp_path: Path) -> None:
    folder = tmp_path / "coordinator"
    config = config_of(
        folder,
        adapter__target_modules=["q_proj", "v_proj"],
        adapter__modules_to_save=["head"],
        adapter__global_rank=4,
        rounds__num_rounds=3,
        rounds__min_clients=1,
    )
    (tmp_path / "mishaps").write_text("\nwait_for_stop\n")  # the second round has begun when the device is changed
    asked: dict[str, Any] = {"modules_to_save": ("head",)}
    async with serving(config) as address, observing(address) as observer:
        site = open_rank(
            WorkerConfig(
                name="ada",
                state_dir=tmp_path / "state",
                coordinator=CoordinatorAddress(address=address),
                model=ModelConfig(path=str(tmp_path)),
                data=DataConfig(train="none"),
            )
        )
        write_probe(site.state_dir, probe_of(2, **asked))
        working = asyncio.create_task(work(site, TRAINER, Clock()))
        async for answer in observer.status.WatchStatus(status_pb2.WatchStatusRequest(), timeout=60):
            if answer.status.round == 2:
                break
        assert not working.done()
        working.cancel()
        await asyncio.gather(working, return_exceptions=True)
        key = (site.state_dir / "enrol-key").read_text()

        write_probe(site.state_dir, probe_of(4, **asked))
        await asyncio.wait_for(work(site, TRAINER, Clock()), 60)

        status = await observer.finished()
        listing = await observer.status.ListClients(status_pb2.ListClientsRequest(page_size=10))
    assert (status.round, (site.state_dir / "enrol-key").read_text()) == (3, key)
    (ada,) = listing.clients
    assert (ada.client_id, ada.lora_rank, ada.micro_batch) == ("ada", 4, 2)
    ranks = [json.loads(line)["lora_rank"] for line in (site.state_dir / "egress.jsonl").read_text().splitlines()]
    assert (ranks[:2], ranks[-1]) == ([2, 2], 4), "joined and trained at 2; trained at 4 in the end"
