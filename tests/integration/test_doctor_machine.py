"""`raflora doctor` on one machine: papers, disks, models, devices, a coordinator's folder. Nothing is mended by it."""

import json
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from coordinators import settings_of
from doctors_cases import identity, listening
from identities import Identities

from cli.checks import Check, Verdict, warning, worst
from cli.checks_coordinator import check_coordinator
from cli.checks_machine import check_data, check_device, check_disk, check_group, check_model, check_private
from cli.checks_network import check_certificate_files, check_identity, check_join_token
from common.channel import Tls
from common.moments import DAY_SECONDS
from coordinator.config import CoordinatorConfig
from coordinator.stores.lock import lock_state_folder
from worker.config import DataConfig, LaunchConfig, ModelConfig


@pytest.fixture
def identities(tmp_path: Path) -> Identities:
    return Identities(tmp_path / "authority")


# --- papers


def test_a_certificates_days_are_counted(identities: Identities, tmp_path: Path) -> None:
    folder, now = identity(tmp_path / "identity", identities.worker("clinic-a")), time.time()
    verdicts = [
        [check.verdict for check in check_identity(folder, now + days * DAY_SECONDS)] for days in (0, 25, 31, -1)
    ]
    assert verdicts == [[Verdict.OK], [Verdict.WARNING], [Verdict.FAILED], [Verdict.FAILED]]


def test_a_key_that_others_can_read_is_named(identities: Identities, tmp_path: Path) -> None:
    folder = identity(tmp_path / "identity", identities.worker("clinic-a"))
    (folder.path / "key.pem").chmod(0o644)
    found = list(check_identity(folder, time.time()))[-1]
    assert (found.verdict, "has mode 644" in found.found) == (Verdict.FAILED, True)
    assert found.advice == f"chmod 600 {folder.path / 'key.pem'}"


def test_a_token_is_read_without_being_used(identities: Identities) -> None:
    token = identities.invite("clinic-a")
    good = check_join_token(token, time.time())
    assert (good.verdict, good.advice) == (Verdict.WARNING, "whether it is used up shows only at the start")
    late = check_join_token(token, time.time() + 8 * DAY_SECONDS)
    assert (late.verdict, "raflora site add clinic-a --again" in late.advice) == (Verdict.FAILED, True)


def test_files_of_ones_own_authority_are_looked_at(identities: Identities, tmp_path: Path) -> None:
    folder, now = identity(tmp_path / "identity", identities.worker("clinic-a")), time.time()
    for days, verdict in ((0, Verdict.OK), (25, Verdict.WARNING), (31, Verdict.FAILED)):
        assert next(check_certificate_files(folder.tls, now + days * DAY_SECONDS)).verdict is verdict
    missing = Tls(tmp_path / "none.pem")
    assert "none.pem" in next(check_certificate_files(missing, now)).found


# --- the machine


def only(checks: Iterator[Check]) -> Check:
    (check,) = checks
    return check


def test_a_folder_that_keeps_what_it_is_given(tmp_path: Path) -> None:
    assert only(check_disk("state_dir", tmp_path)).verdict in {Verdict.OK, Verdict.WARNING}
    assert only(check_disk("state_dir", tmp_path / "not" / "there")).verdict in {Verdict.OK, Verdict.WARNING}
    assert list(tmp_path.iterdir()) == []


def test_a_network_file_system_is_warned_of(tmp_path: Path) -> None:
    mounts = f"22 1 0:20 / / rw - ext4 /dev/sda1 rw\n30 22 0:40 / {tmp_path} rw - nfs4 server:/export rw\n"
    found = only(check_disk("state_dir", tmp_path, mounts))
    assert (found.verdict, "on a network file system (nfs4)" in found.found) == (Verdict.WARNING, True)


def test_a_file_in_the_place_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "state").touch()
    assert "is a file, not a folder" in only(check_disk("state_dir", tmp_path / "state" / "deeper")).found


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if mounted.returncode != 0:
        pytest.skip("may not mount a small file system")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_that_is_full(small_disk: Path) -> None:
    with pytest.raises(OSError, match="No space left"):
        (small_disk / "ballast").write_bytes(b"\0" * 100_000)
    found = only(check_disk("state_dir", small_disk))
    assert (found.verdict, found.found) == (Verdict.FAILED, f"{small_disk}: the disk is full")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_of_somebody_else(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    assert "cannot be written to by this user" in only(check_disk("state_dir", tmp_path / "state")).found


def test_a_model_folder_is_whole_or_says_what_is_missing(tmp_path: Path) -> None:
    assert "no such folder" in check_model(ModelConfig(path=str(tmp_path / "none"))).found
    (tmp_path / "config.json").write_text("{}")
    assert "model.safetensors: No such file" in check_model(ModelConfig(path=str(tmp_path))).found
    index = tmp_path / "model.safetensors.index.json"
    index.write_text("[]")
    assert check_model(ModelConfig(path=str(tmp_path))).verdict is Verdict.FAILED
    index.write_text(json.dumps({"weight_map": {"a": "model-1.safetensors"}}))
    assert "model-1.safetensors: No such file" in check_model(ModelConfig(path=str(tmp_path))).found
    (tmp_path / "model-1.safetensors").write_bytes(b"12345678")
    assert check_model(ModelConfig(path=str(tmp_path))).verdict is Verdict.OK
    assert "a hub id" in check_model(ModelConfig(path="distilbert/distilbert-base-uncased")).found


def test_what_can_be_no_hub_id_is_a_folder_that_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "models").mkdir()
    monkeypatch.chdir(tmp_path)
    for path in ("models/distilbret", "a/b/c", "./model", "/models", "~/none"):
        found = check_model(ModelConfig(path=path))
        assert (found.verdict, "there is no such folder" in found.found) == (Verdict.FAILED, True), path
    assert str(tmp_path / "models" / "distilbret") in check_model(ModelConfig(path="models/distilbret")).found


def test_data_is_there_or_is_named(tmp_path: Path) -> None:
    train, empty = tmp_path / "train.jsonl", tmp_path / "test.csv"
    train.write_text("{}\n")
    empty.touch()
    good, bad = check_data(DataConfig(train=str(train), test=str(empty)))
    assert (good.verdict, bad.verdict, bad.name) == (Verdict.OK, Verdict.FAILED, "data.test")
    assert "No such file" in only(check_data(DataConfig(train=str(tmp_path / "none.jsonl")))).found
    assert "is a folder" in only(check_data(DataConfig(train=str(tmp_path)))).found
    assert "a hub data set" in only(check_data(DataConfig(train="stanfordnlp/imdb"))).found


@pytest.mark.parametrize(
    ("header", "named", "verdict", "said"),
    [
        ("text,label", {}, Verdict.OK, "columns text, label"),
        (
            "review,stars",
            {},
            Verdict.FAILED,
            "the columns are review, stars, and none is called 'text' (data.text_column)",
        ),
        ("review,stars", {"text_column": "revue"}, Verdict.FAILED, "none is called 'revue' (data.text_column)"),
        ("review,stars", {"text_column": "review"}, Verdict.OK, "columns review, stars"),
        ("prompt,answer", {"text_column": "revue"}, Verdict.WARNING, "none is called 'revue' (data.text_column)"),
    ],
)
def test_a_file_without_the_named_columns_lists_those_it_has(
    header: str, named: dict[str, str], verdict: Verdict, said: str, tmp_path: Path
) -> None:
    table, lines = tmp_path / "train.csv", tmp_path / "train.jsonl"
    table.write_text(f"{header}\nfine,5\n")
    lines.write_text(json.dumps(dict.fromkeys(header.split(","), "x")) + "\n")
    for path in (table, lines):
        found = only(check_data(DataConfig(train=str(path), **named)))  # type: ignore[arg-type]
        assert (found.verdict, said in found.found) == (verdict, True), found


def python_that_says(folder: Path, words: str) -> str:
    program = folder / "python"
    program.write_text(f"#!/bin/sh\n{words}\n")
    program.chmod(0o755)
    return str(program)


def test_the_device_is_asked_for_in_a_process_of_its_own(tmp_path: Path) -> None:
    assert check_device(ModelConfig(path="m", device="cpu")).verdict is Verdict.OK
    broken = check_device(ModelConfig(path="m"), python_that_says(tmp_path, "exit 1"))
    assert (broken.verdict, broken.found) == (Verdict.FAILED, "torch cannot be imported")
    two = python_that_says(tmp_path, "echo 2.13.0+cu130 True 2")
    assert check_device(ModelConfig(path="m"), two).verdict is Verdict.OK
    assert check_device(ModelConfig(path="m", device="cuda:2"), two).verdict is Verdict.FAILED
    none = python_that_says(tmp_path, "echo 2.13.0+cpu False 0")
    assert check_device(ModelConfig(path="m", device="cuda"), none).verdict is Verdict.FAILED


def test_how_a_group_is_launched_is_looked_at_before_it_is(tmp_path: Path) -> None:
    assert check_group(LaunchConfig(processes=2)).verdict is Verdict.OK
    assert "sharded" in check_group(LaunchConfig(processes=2, shard_base=True)).found
    found = check_group(LaunchConfig(accelerate_config=tmp_path / "none.yaml"))
    assert (found.verdict, "there is no such file" in found.found) == (Verdict.FAILED, True)


def test_secrets_are_for_their_owner(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    (found,) = check_private("authority", {"it": tmp_path, "what is not there": tmp_path / "none"}, warning)
    assert (found.verdict, found.advice) == (Verdict.WARNING, f"chmod 700 {tmp_path}")


# --- a coordinator's machine


def coordinator_checks(folder: Path, **changes: Any) -> dict[str, Check]:
    config = CoordinatorConfig.model_validate(settings_of(folder / "federation", **changes))
    return {check.name: check for check in check_coordinator(config, time.time())}


def test_a_coordinator_that_could_start(identities: Identities, tmp_path: Path) -> None:
    checks = coordinator_checks(tmp_path, server__identity=identities.settings())
    assert worst(checks.values()) in {Verdict.OK, Verdict.WARNING}
    assert checks["authority"].found.startswith("raflora authority of tests, until ")
    assert not (tmp_path / "federation" / "state").exists()


def test_a_port_that_is_taken_by_another_program(tmp_path: Path) -> None:
    with listening(b"") as address:
        found = coordinator_checks(tmp_path, server__listen=address)["port"]
        assert found.verdict is Verdict.FAILED
        with lock_state_folder(tmp_path / "federation" / "state"):
            checks = coordinator_checks(tmp_path, server__listen=address)
    assert checks["port"].found == f"{address} is taken, by the coordinator that runs"
    assert checks["lock"].found == f"a coordinator runs on this state_dir (process {os.getpid()})"


def test_the_spec_is_read_before_a_start_needs_it(tmp_path: Path) -> None:
    spec = tmp_path / "spec.json"
    spec.write_text("{")
    found = coordinator_checks(tmp_path, adapter__spec=str(spec))["adapter.spec"]
    assert (found.verdict, "is not what `raflora spec` writes" in found.found) == (Verdict.FAILED, True)
    modules = [{"name": "query", "out_features": 16, "in_features": 12}]
    spec.write_text(json.dumps({"base_model_digest": "a" * 64, "modules": modules, "tensors": []}))
    assert coordinator_checks(tmp_path, adapter__spec=str(spec))["adapter.spec"].verdict is Verdict.OK
    narrow = coordinator_checks(tmp_path, adapter__spec=str(spec), adapter__global_rank=13)["adapter.spec"]
    assert "at most rank 12 fits" in narrow.found
    spec.unlink()
    state = tmp_path / "federation" / "state"
    state.mkdir(parents=True)
    (state / "journal.sqlite").touch()
    gone = coordinator_checks(tmp_path, adapter__spec=str(spec))["adapter.spec"]
    assert (gone.verdict, str(spec) in gone.found) == (Verdict.WARNING, True), "a founded federation needs it no more"


def test_a_damaged_journal_is_named(tmp_path: Path) -> None:
    state = tmp_path / "federation" / "state"
    state.mkdir(parents=True)
    (state / "journal.sqlite").write_bytes(b"this is no database" * 100)
    assert coordinator_checks(tmp_path)["journal"].verdict is Verdict.FAILED


def test_an_authority_that_others_can_read_or_that_is_not_there(identities: Identities, tmp_path: Path) -> None:
    identities.folder.chmod(0o755)
    assert coordinator_checks(tmp_path, server__identity=identities.settings())["authority"].verdict is Verdict.FAILED
    missing = coordinator_checks(tmp_path, server__identity={"folder": str(tmp_path / "none")})
    assert "raflora init" in missing["security"].found


def test_an_open_door_is_told(tmp_path: Path) -> None:
    assert coordinator_checks(tmp_path, server__listen="0.0.0.0:0")["security"].verdict is Verdict.FAILED
    warned = coordinator_checks(tmp_path, server__listen="0.0.0.0:0", server__insecure=True)["security"]
    assert warned.verdict is Verdict.WARNING
