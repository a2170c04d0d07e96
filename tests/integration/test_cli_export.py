"""`raflora export`: from the coordinator's stream to a stock PEFT folder."""

import json
from pathlib import Path

import numpy as np
import pytest
from canned_coordinator import Canned, adapter_of, serving
from raflora.v1 import status_pb2
from safetensors.numpy import load_file

from cli import download
from cli.main import main
from common.codec import WireDtype
from common.errors import NothingPublished, WrongRank
from worker.peft_format import CONFIG_FILE, WEIGHTS_FILE


@pytest.fixture
def canned() -> Canned:
    canned = Canned()
    canned.publish(rank=4)
    return canned


def export(folder: Path, address: str, *flags: str) -> int:
    return main(["export", str(folder), "--coordinator", address, *flags])


def offsets(canned: Canned) -> list[int]:
    """Of the calls that asked for a named slice."""
    asked = [r for r in canned.asked if isinstance(r, status_pb2.FetchAdapterRequest)]
    return [r.offset for r in asked if r.digest]


@pytest.mark.parametrize("dtype", list(WireDtype))
def test_the_folder_holds_the_published_adapter_under_pefts_names(
    dtype: WireDtype, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    canned, folder = Canned(), tmp_path / "made" / "adapter"
    canned.publish(rank=4, dtype=dtype)
    folder.parent.mkdir()
    with serving(canned) as address:
        assert export(folder, address) == 0
    state = load_file(folder / WEIGHTS_FILE)
    expected = adapter_of(4)
    np.testing.assert_allclose(
        state["base_model.model.encoder.0.query.lora_B.weight"], expected.modules["encoder.0.query"].lora_B
    )
    np.testing.assert_allclose(
        state["base_model.model.encoder.0.query.lora_A.weight"],
        expected.modules["encoder.0.query"].lora_A,
        atol=1e-2,
    )
    assert state["base_model.model.classifier.weight"].shape == (3, 8)
    config = json.loads((folder / CONFIG_FILE).read_text())
    assert (config["r"], config["lora_alpha"], config["base_model_name_or_path"]) == (4, 8, "tiny-vit")
    told = capsys.readouterr().out
    assert "round 3, rank 4" in told
    assert "base = AutoModelForImageClassification.from_pretrained('tiny-vit', num_labels=2)" in told
    assert "labels = ['cat', 'dog']" in told
    assert [path.name for path in folder.parent.iterdir()] == ["adapter"]  # no part file is left


def test_the_rank_is_asked_of_the_coordinator(canned: Canned, tmp_path: Path) -> None:
    canned.publish(rank=2)
    with serving(canned) as address:
        assert export(tmp_path / "adapter", address, "--rank", "2") == 0
    assert {r.lora_rank for r in canned.asked if isinstance(r, status_pb2.FetchAdapterRequest)} == {2}


def test_a_folder_that_holds_files_is_left_alone(
    canned: Canned, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with serving(canned) as address:
        assert export(tmp_path, address) == 2
        assert "holds files already; name another folder or pass --overwrite" in capsys.readouterr().err
        assert canned.asked == []
        assert export(tmp_path, address, "--overwrite") == 0
    assert (tmp_path / "mine.txt").read_text() == "mine"
    assert (tmp_path / WEIGHTS_FILE).exists()


def test_a_file_is_no_folder(canned: Canned, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    with serving(canned) as address:
        assert export(file, address, "--overwrite") == 2


def test_a_download_that_breaks_off_goes_on_at_its_offset(canned: Canned, tmp_path: Path) -> None:
    canned.break_off_after = 500
    with serving(canned) as address:
        assert export(tmp_path / "adapter", address) == 0
    assert offsets(canned) == [0, 500]


def test_the_next_run_goes_on_where_the_last_one_stopped(
    canned: Canned, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download, "RETRY_SECONDS", ())  # give up at the first failure
    canned.break_off_after = 500
    with serving(canned) as address:
        assert export(tmp_path / "adapter", address) == 4
        assert not (tmp_path / "adapter").exists()
        assert export(tmp_path / "adapter", address) == 0
    assert offsets(canned) == [0, 500]


def test_damaged_bytes_are_noticed_and_no_folder_is_made(
    canned: Canned, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    canned.adapter = canned.adapter[:-1] + b"!"
    with serving(canned) as address:
        assert export(tmp_path / "adapter", address) == 1
    assert "published adapter" in capsys.readouterr().err
    assert not (tmp_path / "adapter").exists()


def test_a_header_that_is_not_true_is_noticed(
    canned: Canned, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    canned.header.lora_rank = 3
    with serving(canned) as address:
        assert export(tmp_path / "adapter", address) == 1
    assert "something else than its header says" in capsys.readouterr().err
    assert not (tmp_path / "adapter").exists()


@pytest.mark.parametrize("digest", ["../../evil", "A" * 64, ""])
def test_a_digest_that_is_no_digest_never_becomes_a_file_name(canned: Canned, digest: str, tmp_path: Path) -> None:
    canned.header.digest = digest
    with serving(canned) as address:
        assert export(tmp_path / "adapter", address) == 3
    assert list(tmp_path.iterdir()) == []


def test_nothing_published_yet_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with serving(Canned(error=NothingPublished("round 1 is still open"))) as address:
        assert export(tmp_path / "adapter", address) == 3
    assert capsys.readouterr().err.startswith("round 1 is still open; `raflora status`")


def test_a_rank_that_there_is_not_is_refused(tmp_path: Path) -> None:
    with serving(Canned(error=WrongRank("rank 64: the global adapter has the ranks 1 to 32"))) as address:
        assert export(tmp_path / "adapter", address, "--rank", "64") == 3
