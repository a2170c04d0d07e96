"""How a person shows who they are: a folder, named by a flag or a variable; what is said to whoever may not look."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from coordinators import settings_of
from identities import Identities, serving

from cli.main import main
from common.channel import Pem
from common.identity import Role
from common.identity_folder import IdentityFolder
from coordinator.config import CoordinatorConfig


@pytest.fixture
def identities(tmp_path: Path) -> Identities:
    return Identities(tmp_path / "authority")


@pytest.fixture
async def address(tmp_path: Path, identities: Identities) -> AsyncIterator[str]:
    settings = settings_of(tmp_path / "federation", server__identity=identities.settings())
    async with serving(CoordinatorConfig.model_validate(settings)) as address:
        yield address


def folder_of(path: Path, pem: Pem, address: str = "") -> Path:
    folder = IdentityFolder(path)
    content = {"ca.pem": pem.authority, "key.pem": pem.key, "certificate.pem": pem.certificate, "address": b"x"}
    for name, text in content.items():
        folder.write(name, f"{address}\n".encode() if name == "address" else text or b"")
    return path


async def raflora(*arguments: str) -> int:
    return await asyncio.to_thread(main, list(arguments))


async def test_the_variable_is_all_that_a_person_needs(
    identities: Identities,
    address: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = folder_of(tmp_path / "eve", identities.person("eve", Role.OBSERVER), address)
    monkeypatch.setenv("RAFLORA_IDENTITY", str(folder))
    assert await raflora("status") == 0
    assert "digits" in capsys.readouterr().out
    assert await raflora("pause") == 3
    assert "observer eve may not call Pause" in capsys.readouterr().err


async def test_the_flag_is_stronger_than_the_variable_and_an_address_than_the_folders(
    identities: Identities, address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = folder_of(tmp_path / "eve", identities.person("eve", Role.OPERATOR), "127.0.0.1:1")
    monkeypatch.setenv("RAFLORA_IDENTITY", str(tmp_path / "none"))
    assert await raflora("status", "--identity", str(folder)) == 4
    assert await raflora("status", "--identity", str(folder), "--coordinator", address) == 0
    monkeypatch.setenv("RAFLORA_COORDINATOR", address)
    assert await raflora("clients", "--identity", str(folder)) == 0


async def test_a_workers_identity_may_not_look_and_is_told_what_may(
    identities: Identities, address: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder_of(tmp_path / "state" / "identity", identities.worker("clinic-a"), address)
    assert await raflora("status", "--identity", str(tmp_path / "state")) == 3
    assert capsys.readouterr().err.endswith(
        "worker clinic-a may not call GetStatus: that takes observer or operator; `raflora access add` makes an "
        "identity that may: show it with --identity FOLDER\n"
    )


@pytest.mark.parametrize("contradiction", [["--insecure"], ["--ca-file", "ca.pem"], ["--key-file", "key.pem"]])
async def test_an_identity_and_another_way_contradict_each_other(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], contradiction: list[str]
) -> None:
    assert await raflora("status", "--identity", str(tmp_path), *contradiction) == 2
    assert "--identity has the certificates of TLS in it" in capsys.readouterr().err


async def test_a_folder_that_is_no_identity_says_what_it_lacks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert await raflora("status", "--identity", str(tmp_path)) == 2
    assert "it lacks ca.pem, certificate.pem, key.pem" in capsys.readouterr().err


async def test_in_the_clear_to_a_coordinator_with_tls_is_explained(
    address: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert await raflora("status", "--coordinator", address) == 4
    assert "it speaks TLS, but this side speaks in the clear" in capsys.readouterr().err
