"""`play` as the command uses it: the digits that come with scikit-learn, the demo's own base model, real training."""

from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("sklearn")
torch = pytest.importorskip("torch")

from simulation.experiment import ExperimentConfig  # noqa: E402 - after the skips
from simulation.play import play  # noqa: E402
from simulation.prepare import Files, Prepared, prepare  # noqa: E402
from simulation.results import Results, read_results  # noqa: E402
from simulation.schedule import first_plans  # noqa: E402
from simulation.torch_work import load_work  # noqa: E402

pytestmark = [pytest.mark.torch, pytest.mark.timeout(300)]

EXPERIMENT = ExperimentConfig.model_validate(
    {
        "name": "small",
        "seeds": [1],
        "model": {"path": "digits", "task": "image-classification", "device": "cpu", "offline": True},
        "data": {"train": "digits", "test": "digits", "max_test": 60, "validation": 0.2},
        "clients": {"count": 6, "ranks": [2, 4, 8], "per_round": 3},
        "rounds": {"num_rounds": 2, "evaluate_every": 1},
        "training": {"learning_rate": 4e-3, "local_steps": 4, "batch_size": 16},
        "arms": [{"name": "raflora"}, {"name": "flora", "method": "flora"}, {"name": "ffa", "method": "ffa-lora"}],
    }
)
RAFLORA, FLORA, FFA = first_plans(EXPERIMENT)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # bits can depend on it
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    folder = tmp_path_factory.mktemp("material")
    return prepare(EXPERIMENT, Files(folder, folder / "cache", folder / "base"), lambda *_: None)


def test_runs_share_a_model_and_leave_no_trace_on_it(prepared: Prepared, tmp_path: Path) -> None:
    def measured(name: str) -> tuple[object, ...]:
        results: Results = read_results(tmp_path / name)
        return results.rounds, results.partitions, results.accuracy

    first = play(RAFLORA, prepared, tmp_path / "alone")
    assert (first.status, first.rounds, first.global_rank, first.smallest_rank) == ("finished", 2, 8, 2)
    work = load_work(prepared, lora_rank=4)
    for plan, name in ((FLORA, "flora"), (FFA, "ffa"), (RAFLORA, "after the others")):
        assert play(plan, prepared, tmp_path / name, work=work).status == "finished"
    assert measured("after the others") == measured("alone")
    assert (
        len({row.train_loss for name in ("alone", "flora", "ffa") for row in read_results(tmp_path / name).rounds}) > 3
    )
