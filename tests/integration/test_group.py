"""A group of processes behind one trainer: it goes on or ends as one, whatever happens to one of them."""

import asyncio
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import tiny_member

from worker.config import LaunchConfig
from worker.supervisor import TaskFailed, TrainerDied, TrainerProcess
from worker.trainer_protocol import Evaluate, Load, ModelOrder, Plan, Train, Trained

pytestmark = [pytest.mark.torch, pytest.mark.timeout(240)]

MEMBER = (sys.executable, tiny_member.__file__)
PLAN = Plan(0.1, 1, 0.0, 4, 0.0, 1.0, 0, 1)
LONGEST_END_SECONDS = 30.0


def load(folder: Path) -> Load:
    return Load("{}", ModelOrder("", (), (), (), 1, 0), str(folder))


def train(what: str) -> Train:
    return Train(what, "", 1, 1.0, "float32", PLAN)


async def ask(trainer: TrainerProcess, what: str) -> Trained:
    return await trainer.train(train(what), lambda _: None)


def pids(folder: Path) -> list[int]:
    return [int(path.read_text()) for path in sorted(folder.glob("pid-*"))]


def environments(folder: Path) -> list[str]:
    """What each process's libraries could take for a group."""
    return [path.read_text() for path in sorted(folder.glob("environment-*"))]


def have_ended(folder: Path) -> bool:
    """Looks until the group's processes are gone; one that was adopted may lie unburied."""
    deadline = time.monotonic() + LONGEST_END_SECONDS
    while time.monotonic() < deadline:
        if not [pid for pid in pids(folder) if lives(pid)]:
            return True
        os.sched_yield()
    return False


def lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture
async def trainer(environment: None) -> AsyncIterator[TrainerProcess]:
    """Of two processes, when it has loaded."""
    trainer = TrainerProcess(60, MEMBER, LaunchConfig(processes=2))
    try:
        yield trainer
    finally:
        await trainer.stop()


async def test_a_group_outlives_what_fails_in_one_process_and_ends_with_one_that_is_killed(
    trainer: TrainerProcess, tmp_path: Path
) -> None:
    loaded = await trainer.load(load(tmp_path))
    before = pids(tmp_path)
    assert (loaded.num_examples, len(before)) == (tiny_member.NUM_EXAMPLES, 2)
    assert environments(tmp_path) == ["", ""]

    well = await ask(trainer, "well")
    assert (well.num_examples, well.metrics) == (3, {"sum": 3.0})
    for where in (0, 1):
        with pytest.raises(TaskFailed, match=f"process {where} of 2: data_error on demand") as failed:
            await ask(trainer, f"data_error@{where}")
        assert failed.value.word == "data_error"
        with pytest.raises(TaskFailed, match=f"process {where} of 2: MemoryError") as failed:
            await ask(trainer, f"out_of_memory@{where}")
        assert failed.value.word == "out_of_memory"
    assert await ask(trainer, "well") == well

    evaluated = await trainer.evaluate(Evaluate("", 1, 1.0, "float32"), lambda _: None)
    assert (evaluated.num_examples, evaluated.metrics) == (3, {"columns": 3, "sum": 3.0})

    await stop_while_it_waits(trainer)
    assert await ask(trainer, "well") == well
    assert pids(tmp_path) == before, "all of this was one group"

    with pytest.raises((TrainerDied, TaskFailed)):
        await ask(trainer, "die@1")
    assert have_ended(tmp_path)


async def stop_while_it_waits(trainer: TrainerProcess) -> None:
    has_begun = asyncio.Event()
    working = asyncio.create_task(trainer.train(train("wait"), lambda _: has_begun.set()))
    await has_begun.wait()
    working.cancel()
    await asyncio.gather(working, return_exceptions=True)
    assert working.cancelled()


def test_a_group_ends_with_its_agent(tmp_path: Path) -> None:
    agent = f"""
        import asyncio, os, signal
        from worker.config import LaunchConfig
        from worker.supervisor import TrainerProcess
        from worker.trainer_protocol import Load, ModelOrder

        async def main():
            trainer = TrainerProcess(60, {MEMBER!r}, LaunchConfig(processes=2))
            await trainer.load(Load("{{}}", ModelOrder("", (), (), (), 1, 0), {str(tmp_path)!r}))
            os.kill(os.getpid(), signal.SIGKILL)

        asyncio.run(main())
    """
    ended = subprocess.run([sys.executable, "-c", textwrap.dedent(agent)], timeout=120, check=False)
    assert ended.returncode == -signal.SIGKILL
    assert len(pids(tmp_path)) == 2
    assert have_ended(tmp_path)


async def test_accelerate_launches_a_group_that_shards_and_says_why_it_ends(tmp_path: Path) -> None:
    config = tmp_path / "accelerate.yaml"
    config.write_text(
        "distributed_type: FSDP\nnum_processes: 2\nnum_machines: 1\nmachine_rank: 0\n"
        "fsdp_config:\n  fsdp_version: 2\n  fsdp_reshard_after_forward: true\n"
    )
    trainer = TrainerProcess(60, MEMBER, LaunchConfig(accelerate_config=config))
    try:
        await trainer.load(load(tmp_path))
        assert environments(tmp_path) == ["", ""]
        assert (await ask(trainer, "well")).num_examples == 3
        with pytest.raises(
            TaskFailed, match="process 1 of 2: MemoryError; with a sharded base the group ends"
        ) as failed:
            await ask(trainer, "out_of_memory_in_a_pass@1")
        assert failed.value.word == "out_of_memory"
        assert have_ended(tmp_path)
    finally:
        await trainer.stop()


async def test_a_launcher_that_ends_at_once_says_so(tmp_path: Path) -> None:
    trainer = TrainerProcess(60, MEMBER, LaunchConfig(command=("false",)))
    with pytest.raises(TrainerDied, match="exit code 1"):
        await trainer.load(load(tmp_path))


async def test_a_launcher_of_ones_own_that_does_not_say_who_is_who(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    trainer = TrainerProcess(60, MEMBER, LaunchConfig(command=("env", "RANK=0")))
    with pytest.raises(TrainerDied):
        await trainer.load(load(tmp_path))
    assert "none of the variables WORLD_SIZE" in capfd.readouterr().err
