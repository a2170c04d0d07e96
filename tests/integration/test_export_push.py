"""`raflora export --push-to`: what reaches a hub, and what is said when nothing can.

The hub is a canned one, with real HTTP; the library reads its address and the login when it is imported, so each export
is a process of its own. No test has ever spoken to the real hub.
"""

import subprocess
import sys
from pathlib import Path

import pytest
from canned_coordinator import Canned, serving
from canned_hub import CannedHub, serving_hub

pytest.importorskip("huggingface_hub")
TOKEN = "hf_a_token_of_nobody"  # noqa: S105


def push(folder: Path, *flags: str, **environment: str) -> subprocess.CompletedProcess[str]:
    canned = Canned()
    canned.publish(rank=4)
    with serving(canned) as address:
        return subprocess.run(
            [
                *(sys.executable, "-m", "cli.main", "export", str(folder), "--coordinator", address),
                *("--push-to", "ada/moods", *flags),
            ],
            capture_output=True,
            text=True,
            check=False,
            timeout=100,
            env={"HF_HOME": str(folder.parent / "home"), "HF_HUB_DISABLE_TELEMETRY": "1", **environment},
        )


@pytest.mark.parametrize("private", [True, False])
def test_the_folder_reaches_the_hub_and_nothing_else_does(private: bool, tmp_path: Path) -> None:
    folder, hub = tmp_path / "adapter", CannedHub()
    folder.mkdir()
    (folder / "patients.csv").write_text("secret")
    with serving_hub(hub) as address:
        ended = push(folder, "--overwrite", *(["--private"] * private), HF_ENDPOINT=address, HF_TOKEN=TOKEN)
    assert ended.returncode == 0, ended.stderr
    assert f"uploaded to {hub.address}/ada/moods" in ended.stdout
    assert hub.created[0]["name"] == "moods"
    assert (hub.created[0].get("visibility") == "private" or hub.created[0].get("private") is True) is private
    names = {"README.md", "adapter_config.json", "adapter_model.safetensors", "raflora.json"}
    assert hub.files.keys() == names
    assert all(hub.files[name] == (folder / name).read_bytes() for name in names)
    assert b"PeftModel.from_pretrained(base, 'ada/moods')" in hub.files["README.md"]
    assert hub.tokens == {f"Bearer {TOKEN}"}


@pytest.mark.parametrize("status", [401, 403, 500])
def test_a_hub_that_refuses_leaves_the_folder_and_one_sentence(status: int, tmp_path: Path) -> None:
    with serving_hub(CannedHub(status=status)) as address:
        ended = push(tmp_path / "adapter", HF_ENDPOINT=address, HF_TOKEN=TOKEN)
    assert ended.returncode == 1
    assert len(ended.stderr.strip().splitlines()) == 1, ended.stderr
    assert "--push-to ada/moods: the hub did not take it: " in ended.stderr
    assert "`hf upload ada/moods" in ended.stderr
    assert TOKEN not in ended.stderr
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()


def test_a_hub_that_is_not_there_is_said_in_one_sentence(tmp_path: Path) -> None:
    ended = push(tmp_path / "adapter", HF_ENDPOINT="http://127.0.0.1:9", HF_TOKEN=TOKEN)
    assert ended.returncode == 1
    assert len(ended.stderr.strip().splitlines()) == 1, ended.stderr
    assert "the hub did not take it" in ended.stderr


@pytest.mark.parametrize(
    ("environment", "said"),
    [({}, "nobody is logged in here; run `hf auth login`"), ({"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE is set")],
)
def test_without_a_login_or_a_network_nothing_is_made(environment: dict[str, str], said: str, tmp_path: Path) -> None:
    ended = push(tmp_path / "adapter", **environment)
    assert ended.returncode == 1
    assert said in ended.stderr
    assert not (tmp_path / "adapter").exists()
