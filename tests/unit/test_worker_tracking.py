"""What a site's own trackers are told of the site: everything is listed at the start, and no path is in it."""

from pathlib import Path

import pytest
from structlog.testing import capture_logs

from common.tracking import TrackingConfig
from worker.config import DataConfig, ModelConfig, WorkerConfig
from worker.tracking import shown_beside, trackers_of


def config_of(path: str, state_dir: Path = Path("state"), **tracking: object) -> WorkerConfig:
    return WorkerConfig(
        rank=8,
        state_dir=state_dir,
        model=ModelConfig(path=path, quantization="4bit"),
        data=DataConfig(train="t.csv"),
        tracking=TrackingConfig.model_validate(tracking),
    )


def test_a_folder_is_called_by_its_name_and_a_hub_id_stays_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "patients" / "llama").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    for path in (str(tmp_path / "patients" / "llama"), "patients/llama", "./patients/llama"):
        assert shown_beside(config_of(path)) == {"model": "llama", "rank": "8", "quantization": "4bit"}
    assert shown_beside(config_of("org/llama"))["model"] == "org/llama"


def test_all_that_is_sent_is_listed_at_the_start(tmp_path: Path) -> None:
    config = config_of("org/llama", tmp_path, tensorboard=str(tmp_path / "boards"), run_name="second try")
    with capture_logs() as logged:
        trackers_of(config, "ada").close()
    (told,) = [line for line in logged if line["event"] == "tracking"]
    assert (told["run"], told["beside"]) == ("second try", shown_beside(config))
    assert told["what"] == "train/loss of each step; metrics, seconds, examples, round and rank of each task"
