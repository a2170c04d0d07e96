"""A model by its hub id: from the hub's cache folder as huggingface_hub lays it out, without any network."""

import dataclasses
import socket
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants
from huggingface_hub.utils._paths import filter_repo_objects
from tiny_models import LLAMA_ORDER, tiny_llama

from worker.config import DataConfig, ModelConfig
from worker.trainer import base_model
from worker.trainer.base_model import digest_of_weights, resolve_folder
from worker.trainer.model import load_model
from worker.trainer.task import ModelError

pytestmark = pytest.mark.torch

COMMIT, OLDER = "a" * 40, "b" * 40


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Every attempt to reach the network, each of which fails."""
    tried: list[Any] = []

    def refuse(*arguments: Any, **_: Any) -> None:
        tried.append(arguments[-1])
        raise OSError("this machine has no network")

    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    return tried


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache that holds one commit of lab/tiny, its files links to blobs."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    plain = tiny_llama(tmp_path / "plain")
    repository = tmp_path / "hub" / "models--lab--tiny"
    snapshot = repository / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    for number, path in enumerate(sorted(plain.iterdir())):
        blob = repository / "blobs" / f"{number:064x}"
        path.replace(blob)
        (snapshot / path.name).symlink_to(Path("..", "..", "blobs", blob.name))
    return snapshot


def test_offline_a_cached_model_is_loaded_and_no_network_touched(cache: Path, calls: list[Any]) -> None:
    config = ModelConfig(path="lab/tiny", device="cpu", offline=True)
    assert resolve_folder(config) == cache
    model = load_model(config, LLAMA_ORDER)
    assert model.base_model_digest == digest_of_weights(cache)
    model.task.prepare(model.folder, model.base, model.labels, DataConfig(train="-"))
    assert calls == []


def test_a_commit_is_found_by_its_number(cache: Path, calls: list[Any]) -> None:
    config = ModelConfig(path="lab/tiny", revision=COMMIT, device="cpu", offline=True)
    assert resolve_folder(config) == cache
    with pytest.raises(ModelError, match="nor in the local hub cache"):
        resolve_folder(config.model_copy(update={"revision": OLDER}))
    assert calls == []


def test_offline_a_model_that_is_not_cached_is_an_error_without_a_network(cache: Path, calls: list[Any]) -> None:
    with pytest.raises(ModelError, match="lab/other: neither a folder nor in the local hub cache"):
        load_model(ModelConfig(path="lab/other", offline=True), dataclasses.replace(LLAMA_ORDER))
    assert calls == []


def test_without_a_network_the_cache_is_taken(cache: Path, calls: list[Any]) -> None:
    assert resolve_folder(ModelConfig(path="lab/tiny")) == cache
    assert calls, "the guard sees what would leave"


def test_of_a_hub_model_only_what_is_read_is_downloaded() -> None:
    files = {
        "config.json": True,
        "generation_config.json": True,
        "tokenizer.json": True,
        "tokenizer.model": True,
        "vocab.txt": True,
        "merges.txt": True,
        "chat_template.jinja": True,
        "model.safetensors": True,
        "model-00001-of-00002.safetensors": True,
        "model.safetensors.index.json": True,
        "pytorch_model.bin": False,
        "modeling_tiny.py": False,
        "original/consolidated.00.pth": False,
        "onnx/config.json": False,
        "consolidated.safetensors": False,
    }
    taken = filter_repo_objects(files, allow_patterns=base_model._DOWNLOADED, ignore_patterns=base_model._NOT_INSIDE)
    assert set(taken) == {name for name, is_taken in files.items() if is_taken}
