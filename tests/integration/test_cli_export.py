"""`raflora export`: from the coordinator's stream to a stock PEFT folder."""

import json
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
from canned_coordinator import Canned, adapter_of, serving
from raflora.v1 import status_pb2
from safetensors.numpy import load_file

from cli import download
from cli.main import main
from common.codec import WireDtype, digest_of, encode
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
    assert "from_pretrained('tiny-vit', num_labels=2, ignore_mismatched_sizes=True)" in told
    assert "labels = ['cat', 'dog']" in told
    assert [path.name for path in folder.parent.iterdir()] == ["adapter"]  # no part file is left


def test_the_best_adapter_is_asked_for(canned: Canned, tmp_path: Path) -> None:
    canned.status.best.CopyFrom(status_pb2.BestAdapter(round=3, metric="accuracy", value=0.5, source="federated"))
    with serving(canned) as address:
        assert export(tmp_path / "adapter", address, "--best") == 0
    assert {r.best for r in canned.asked if isinstance(r, status_pb2.FetchAdapterRequest)} == {True}
    assert "The best so far is this adapter's: accuracy 50.0 %" in (tmp_path / "adapter" / "README.md").read_text()


def test_a_script_gets_an_object(canned: Canned, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "adapter"
    with serving(canned) as address:
        assert export(folder, address, "--rank", "4", "--format", "json") == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["folder"], told["round"], told["rank"], told["merged"]) == (str(folder), 3, 4, False)
    assert {file["name"]: file["size_bytes"] for file in told["files"]} == {
        path.name: path.stat().st_size for path in folder.iterdir()
    }
    assert told["weights_digest"] == sha256((folder / WEIGHTS_FILE).read_bytes()).hexdigest()
    assert told["load"][0] == "from peft import PeftModel"
    assert (told["serve"], told["uploaded_to"]) == ([], None)


def test_a_script_gets_the_command_that_serves(
    canned: Canned, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    canned.header.task = "causal-lm"
    del canned.header.modules_to_save[:]
    bare = replace(adapter_of(4), tensors={})
    canned.adapter = encode(bare)
    canned.header.digest, canned.header.size_bytes = digest_of(canned.adapter), len(canned.adapter)
    with serving(canned) as address:
        assert export(tmp_path / "served", address, "--for", "vllm", "--format", "json") == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["rank"], told["written_rank"]) == (4, 8)
    assert told["serve"][0].startswith("vllm serve tiny-vit --enable-lora --max-lora-rank 8")
    unknown, layers = told["warnings"]
    assert "'tiny-vit', which is neither a folder here nor a USER/NAME of the hub; name it with --model" in unknown
    assert "query, value are adapted" in layers


def test_the_name_that_is_given_for_the_base_stands_everywhere(
    canned: Canned, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, again = tmp_path / "adapter", tmp_path / "again"
    with serving(canned) as address:
        assert export(folder, address, "--model", "org/vit") == 0
    assert "warning" not in capsys.readouterr().out
    assert main(["export", str(again), "--from", str(folder)]) == 0
    for made in (folder, again):
        assert json.loads((made / CONFIG_FILE).read_text())["base_model_name_or_path"] == "org/vit"
        assert json.loads((made / "raflora.json").read_text())["base_model"] == "org/vit"
        card = (made / "README.md").read_text()
        assert 'base_model: "org/vit"' in card
        assert "tiny-vit" not in card


def test_a_folder_of_the_base_stands_in_the_printed_lines_alone(
    canned: Canned, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, folder = tmp_path / "models" / "vit", tmp_path / "adapter"
    base.mkdir(parents=True)
    with serving(canned) as address:
        assert export(folder, address, "--model", str(base)) == 0
    assert f"from_pretrained('{base}'" in capsys.readouterr().out
    assert json.loads((folder / CONFIG_FILE).read_text())["base_model_name_or_path"] == "vit"
    for name in (CONFIG_FILE, "README.md", "raflora.json"):
        assert str(tmp_path) not in (folder / name).read_text()


def test_a_coordinator_that_knows_no_best_adapter_is_noticed(
    canned: Canned, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with serving(canned) as address:
        assert export(tmp_path / "adapter", address, "--best") == 1
    assert "knows of no best adapter and sent its newest; leave --best out" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--best", "--from", "x"), "--best asks the coordinator, and --from asks none"),
        (("--merged",), "--merged needs --model BASE"),
        (("--merged", "--model", "x", "--pad-to", "8"), "--pad-to is for adapters"),
        (("--dtype", "float16"), "they go with --merged"),
        (("--offline",), "they go with --merged"),
        (("--for", "vllm", "--pad-to", "9"), "vLLM takes the ranks 8, 16, 32"),
        (("--private",), "--private is for --push-to"),
        (("--push-to", "no-user"), "expected USER/REPOSITORY"),
        (("--push-to", "../x"), "expected USER/REPOSITORY"),
        (("--for", "tgi"), "vllm"),
    ],
)
def test_flags_that_cannot_be_meant_are_refused_before_anybody_is_asked(
    canned: Canned, flags: tuple[str, ...], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with serving(canned) as address:
        assert export(tmp_path / "adapter", address, *flags) == 2
    assert said in capsys.readouterr().err
    assert canned.asked == []


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--for", "vllm"), "task is 'image-classification'"),
        (("--pad-to", "2"), "the adapter has rank 4; cut it with --rank 2"),
    ],
)
def test_a_form_that_the_adapter_cannot_have_leaves_nothing(
    canned: Canned, flags: tuple[str, ...], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with serving(canned) as address:
        assert export(tmp_path / "adapter", address, *flags) != 0
    assert said in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_features_are_not_merged_and_the_lines_say_how_to_load_them(
    canned: Canned, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    canned.header.task = "feature-classification"
    with serving(canned) as address:
        assert export(tmp_path / "merged", address, "--merged", "--model", "x") == 1
        assert "a type that plain transformers does not know" in capsys.readouterr().err
        assert export(tmp_path / "adapter", address) == 0
    assert "from worker.trainer.features import FeatureClassifier" in capsys.readouterr().out


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
    assert "README.md" in {path.name for path in tmp_path.iterdir()}
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
