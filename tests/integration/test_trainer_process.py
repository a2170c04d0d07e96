"""The trainer as its agent meets it: a process, two pipes, real training."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny_models import PLAN, VIT_ORDER, save_vit, side_images

from common.adapter import Adapter, AdapterSpec, ModuleShape, TensorShape, initial_adapter, slice_adapter
from common.codec import Layout, WireDtype, decode, encode
from worker.config import DataConfig, ModelConfig, WorkerConfig
from worker.trainer_protocol import (
    Answer,
    Evaluate,
    Evaluated,
    Failed,
    Load,
    Loaded,
    ProgressMade,
    Request,
    Stop,
    Train,
    Trained,
    answer_from_line,
    to_line,
)

pytestmark = [pytest.mark.torch, pytest.mark.timeout(300)]

RANK = 4


class TrainerProcess:
    """One trainer, and a folder with its model and data."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "worker.trainer"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
        )

    def send(self, line: bytes) -> None:
        assert self.process.stdin
        self.process.stdin.write(line)
        self.process.stdin.flush()

    def answers(self) -> Iterator[Answer]:
        """Until the pipe ends."""
        assert self.process.stdout
        yield from map(answer_from_line, self.process.stdout)

    def ask(self, request: Request) -> Answer:
        """The last answer to a request."""
        self.send(to_line(request))
        return next(answer for answer in self.answers() if not isinstance(answer, ProgressMade))

    def load(self) -> Load:
        config = WorkerConfig(
            name="ada",
            rank=RANK,
            threads=1,
            model=ModelConfig(path=str(self.folder), device="cpu", offline=True),
            data=DataConfig(train=str(self.folder / "train.jsonl")),
        )
        return Load(config.model_dump_json(), VIT_ORDER)

    def train(self, rank: int = RANK, **plan: Any) -> Train:
        return Train(
            slice_path=str(self.folder / f"slice-{rank}"),
            update_path=str(self.folder / "update"),
            lora_rank=rank,
            scaling=1.0,
            wire_dtype="float32",
            plan=dataclasses.replace(PLAN, **plan),
        )

    def evaluate(self) -> Evaluate:
        return Evaluate(str(self.folder / f"slice-{RANK}"), RANK, 1.0, "float32")

    def end(self) -> int:
        """Its exit status after its input has ended."""
        assert self.process.stdin
        self.process.stdin.close()
        return self.process.wait(timeout=60)

    def __enter__(self) -> "TrainerProcess":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        with self.process:  # closes the pipes and reaps it
            pass


def make(folder: Path) -> TrainerProcess:
    save_vit(folder)
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in side_images(20)))
    return TrainerProcess(folder)


def spec_of(loaded: Loaded) -> AdapterSpec:
    return AdapterSpec(
        tuple(ModuleShape(*module) for module in loaded.modules),
        tuple(TensorShape(*tensor) for tensor in loaded.tensors),
    )


@pytest.fixture(scope="module")
def loaded() -> list[Loaded]:
    return []


@pytest.fixture(scope="module")
def trainer(tmp_path_factory: pytest.TempPathFactory, loaded: list[Loaded]) -> Iterator[TrainerProcess]:
    """A trainer that has loaded model and data; the tests of this file share it, as rounds do."""
    with make(tmp_path_factory.mktemp("trainer")) as trainer:
        answer = trainer.ask(trainer.load())
        assert isinstance(answer, Loaded), answer
        loaded.append(answer)
        for rank in (2, RANK):
            content = encode(slice_adapter(initial_adapter(spec_of(answer), 8, seed=3), rank, scaling=1.0))
            (trainer.folder / f"slice-{rank}").write_bytes(content)
        yield trainer
        assert trainer.end() == 0


def update_of(trainer: TrainerProcess, loaded: list[Loaded], rank: int) -> Adapter:
    layout = Layout(spec_of(loaded[0]), rank, WireDtype.FLOAT32)
    return decode((trainer.folder / "update").read_bytes(), layout, whose="the test")


def test_loading_tells_what_the_coordinator_wants_to_know(trainer: TrainerProcess, loaded: list[Loaded]) -> None:
    assert [module[0] for module in loaded[0].modules] == [
        "vit.layers.0.attention.q_proj",
        "vit.layers.0.attention.v_proj",
    ]
    assert (loaded[0].num_examples, loaded[0].num_test_examples) == (18, 2)  # two of twenty are held out
    assert loaded[0].device == "cpu"
    assert loaded[0].memory_bytes > 1 << 28
    assert len(loaded[0].base_model_digest) == 64


def test_a_round_leaves_an_update_of_its_rank_with_other_numbers(trainer: TrainerProcess, loaded: list[Loaded]) -> None:
    for rank in (RANK, 2):
        answer = trainer.ask(trainer.train(rank))
        assert isinstance(answer, Trained)
        assert (answer.num_examples, set(answer.metrics)) == (18, {"train_loss", "micro_batch"})
        assert update_of(trainer, loaded, rank).rank == rank
        assert (trainer.folder / "update").read_bytes() != (trainer.folder / f"slice-{rank}").read_bytes()


def test_the_same_task_again_gives_the_same_bytes(trainer: TrainerProcess) -> None:
    trainer.ask(trainer.train())
    first = (trainer.folder / "update").read_bytes()
    trainer.ask(trainer.train(2))
    trainer.ask(trainer.train())
    assert (trainer.folder / "update").read_bytes() == first


def test_an_update_travels_in_the_dtype_that_is_asked_for(trainer: TrainerProcess, loaded: list[Loaded]) -> None:
    layout = Layout(spec_of(loaded[0]), RANK, WireDtype.BFLOAT16)
    adapter = initial_adapter(spec_of(loaded[0]), RANK, seed=3)
    (trainer.folder / "slice-bf16").write_bytes(encode(adapter, WireDtype.BFLOAT16))
    request = dataclasses.replace(trainer.train(), wire_dtype="bfloat16", slice_path=str(trainer.folder / "slice-bf16"))
    assert isinstance(trainer.ask(request), Trained)
    assert decode((trainer.folder / "update").read_bytes(), layout, whose="the test").rank == RANK


def test_an_evaluation_answers_with_its_measurements(trainer: TrainerProcess) -> None:
    answer = trainer.ask(trainer.evaluate())
    assert isinstance(answer, Evaluated)
    assert (answer.num_examples, set(answer.metrics)) == (2, {"accuracy", "eval_loss"})


def test_progress_comes_while_it_works_and_ends_at_the_last_step(trainer: TrainerProcess) -> None:
    trainer.send(to_line(trainer.train(local_steps=5)))
    seen = []
    for answer in trainer.answers():
        if not isinstance(answer, ProgressMade):
            break
        seen.append((answer.activity, answer.step, answer.total_steps))
    assert seen[0] == ("training", 1, 5)
    assert seen[-1] == ("training", 5, 5)


def test_a_task_that_is_stopped_leaves_a_trainer_that_works_on(trainer: TrainerProcess) -> None:
    trainer.ask(trainer.train())
    whole = (trainer.folder / "update").read_bytes()
    trainer.send(to_line(trainer.train(local_steps=10_000_000)))
    assert isinstance(next(trainer.answers()), ProgressMade)
    stopped = trainer.ask(Stop())
    assert isinstance(stopped, Failed)
    assert (stopped.reason, stopped.fatal) == ("stopped", False)
    trainer.send(to_line(Stop()))  # too late, so it is meant for nothing that follows
    assert isinstance(trainer.ask(trainer.train()), Trained)
    assert (trainer.folder / "update").read_bytes() == whole


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"not json\n", "invalid_request"),
        (b"[1]\n", "invalid_request"),
        (b'{"kind": "Dance"}\n', "invalid_request"),
        (b'{"kind": "Train", "lora_rank": 4}\n', "invalid_request"),
        (b'{"kind": "Load", "config_json": "{}", "order": 7}\n', "invalid_request"),
    ],
)
def test_a_line_that_is_no_request_is_answered_and_changes_nothing(
    trainer: TrainerProcess, line: bytes, reason: str
) -> None:
    trainer.send(line)
    answer = next(trainer.answers())
    assert isinstance(answer, Failed)
    assert (answer.reason, answer.fatal) == (reason, False)
    assert isinstance(trainer.ask(trainer.evaluate()), Evaluated)


def test_a_task_that_cannot_be_done_says_why_and_the_next_one_is_done(trainer: TrainerProcess) -> None:
    cases = {
        "invalid_request": dataclasses.replace(trainer.train(), slice_path=str(trainer.folder / "nothing")),
        "adapter_mismatch": dataclasses.replace(trainer.train(), lora_rank=3),
        "diverged": trainer.train(learning_rate=1e30, max_grad_norm=1e30),
    }
    for reason, request in cases.items():
        answer = trainer.ask(request)
        assert isinstance(answer, Failed)
        assert (answer.reason, answer.fatal) == (reason, False)
    assert isinstance(trainer.ask(trainer.train()), Trained)


def test_a_truncated_slice_is_refused(trainer: TrainerProcess) -> None:
    content = (trainer.folder / f"slice-{RANK}").read_bytes()
    (trainer.folder / "slice-cut").write_bytes(content[:-1])
    answer = trainer.ask(dataclasses.replace(trainer.train(), slice_path=str(trainer.folder / "slice-cut")))
    assert isinstance(answer, Failed)
    assert answer.reason == "wrong_size"


def test_what_cannot_be_loaded_is_named_and_another_order_can_follow(tmp_path: Path) -> None:
    with make(tmp_path) as trainer:
        load = trainer.load()
        answer = trainer.ask(trainer.train())
        assert isinstance(answer, Failed)
        assert (answer.reason, answer.message) == ("invalid_request", "trainer: Train before Load")

        answer = trainer.ask(Load("{}", VIT_ORDER))
        assert isinstance(answer, Failed)
        assert answer.reason == "config_invalid"

        answer = trainer.ask(dataclasses.replace(load, order=dataclasses.replace(VIT_ORDER, target_modules=("query",))))
        assert isinstance(answer, Failed)
        assert (answer.reason, "q_proj" in answer.message) == ("model_error", True)

        with (tmp_path / "train.jsonl").open("a") as file:
            file.write(json.dumps({"image": [[0] * 8] * 8, "label": "up"}) + "\n")
        answer = trainer.ask(load)
        assert isinstance(answer, Failed)
        assert answer.reason == "data_error"
        assert "train.jsonl, line 21: column 'label' holds 'up'" in answer.message

        (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in side_images(8)))
        loaded = trainer.ask(load)
        assert isinstance(loaded, Loaded)

        # In the middle of endless work, with an agent that is gone: it ends, and does not work on.
        content = encode(initial_adapter(spec_of(loaded), RANK, seed=0))
        (tmp_path / f"slice-{RANK}").write_bytes(content)
        trainer.send(to_line(trainer.train(local_steps=10_000_000)))
        assert isinstance(next(trainer.answers()), ProgressMade)
        assert trainer.end() == 0
        assert not (tmp_path / "update").exists()


def test_a_killed_trainer_ends_its_pipe_and_ctrl_c_does_not_kill_it(tmp_path: Path) -> None:
    with make(tmp_path) as trainer:
        trainer.send(b"hello\n")
        assert isinstance(next(trainer.answers()), Failed)  # it is up, and its signals are set
        trainer.process.send_signal(signal.SIGINT)
        trainer.send(b"hello again\n")
        assert isinstance(next(trainer.answers()), Failed)
        trainer.process.kill()
        assert list(trainer.answers()) == []
        assert trainer.process.wait(timeout=60) == -signal.SIGKILL


_EVERYTHING_A_TRAINER_LOADS = """
import sys
import worker.trainer.process, worker.trainer.data, worker.trainer.model, worker.trainer.tasks, worker.trainer.training
assert "torch" in sys.modules
raise SystemExit(sorted(name for name in sys.modules if name == "grpc" or name.startswith("raflora")) or 0)
"""


def test_the_trainer_never_loads_grpc() -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", _EVERYTHING_A_TRAINER_LOADS],
        env=environment,
        check=False,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stderr) == (0, "")
