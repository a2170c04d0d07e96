"""`raflora init`: an authority, the operator's identity and a settings file with certificates for everybody."""

import json
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter
from cyclopts.types import UInt16

from cli.authority import ACCESS_DAYS, open_desk
from common.errors import ConfigError
from common.identity import Role
from common.identity_folder import ADDRESS_FILE
from common.transfer import rename_durably, sweep_parts, write_durably
from coordinator.identity import authority as certificates
from coordinator.identity.authority import new_authority

_LOCAL_NAMES = ("localhost", "127.0.0.1")
_PRIVATE = 0o600

_SETTINGS = """\
name = {name}
state_dir = {state_dir}  # journal and adapters; a restart goes on from here
export_dir = {export_dir}  # the newest adapter as a PEFT folder

[server]
listen = {listen}  # one port, for workers and operators alike

[server.identity]                 # mutual TLS: everybody shows a certificate of the authority in this folder
folder = {folder}  # whoever reads it can let anybody in
names = {names}  # by which workers reach this machine

[model]                           # yours: see docs/data-and-models.md
base_model = "distilbert/distilbert-base-uncased"   # a name for people; every worker says where its copy is
task = "sequence-classification"
labels = ["no", "yes"]
# base_model_digest = "..."       # `raflora spec` prints it; without it the first worker's weights decide

[adapter]
target_modules = ["q_lin", "v_lin"]                 # as in PEFT; `raflora spec` shows what they match
modules_to_save = ["pre_classifier", "classifier"]  # the new head
global_rank = 64
wire_dtype = "bfloat16"                             # half the bytes, 1e-3 in the product

[rounds]
num_rounds = 40
min_clients = 2
quorum = 2                        # updates; a share such as 0.8 works too
round_deadline_seconds = 1800

[limits]                          # what a site may send; docs/limits.md
# max_examples = 50_000           # num_examples are a site's weight in the merge and in the evaluation, and its
                                  # own word: set this to about the largest number that you believe

[training]
learning_rate = 1e-3              # decays linearly to a tenth over the rounds
local_epochs = 1
batch_size = 32
"""


def init(
    folder: Path,
    /,
    *,
    name: Annotated[
        tuple[str, ...], Parameter(help="HOST by which workers reach the coordinator; repeatable, the best first.")
    ] = (),
    federation: Annotated[str, Parameter(help="What the federation is called.")] = "federation",
    port: Annotated[UInt16, Parameter(help="Where the coordinator will listen.")] = 7070,
    if_missing: Annotated[bool, Parameter(help="Make only what is not there yet.")] = False,
) -> None:
    """Makes FOLDER with an authority of the federation's own, the operator's identity and federation.toml.

    Nothing that is there is overwritten. Keep FOLDER/authority to yourself: it can let anybody in.
    """
    given, folder = folder, folder.resolve()
    parts = authority, operator, settings = tuple(folder / p for p in ("authority", "operator", "federation.toml"))
    found = [part for part in parts if part.exists()]
    if found and not if_missing:
        raise ConfigError(f"{found[0]} is there already, and nothing is overwritten; choose another folder")
    if len(found) == len(parts):
        return
    hosts = name or (socket.gethostname(),)
    # Each part appears whole or not at all, so that after a crash --if-missing can go on where it ended.
    if authority not in found:
        _make_authority(authority, federation, f"{hosts[0]}:{port}")
    desk = open_desk(authority)
    # A finished one that is not here was taken away to be kept elsewhere: a new one would end its life.
    was_taken_away = desk.issuer.registry.person("operator") is not None and not _part_of(operator).exists()
    if operator not in found and not was_taken_away:
        with _appearing(operator) as part:
            desk.write_identity("operator", Role.OPERATOR, ACCESS_DAYS, part, again=True)
    if settings not in found:
        text = _SETTINGS.format(
            name=json.dumps(federation),
            state_dir=json.dumps(str(folder / "state")),
            export_dir=json.dumps(str(folder / "adapter")),
            listen=json.dumps(f"0.0.0.0:{port}"),
            folder=json.dumps(str(authority)),
            names=json.dumps(tuple(dict.fromkeys([*hosts, *_LOCAL_NAMES]))),
        )
        sweep_parts(folder, of=settings.name)
        write_durably(settings, text.encode())
    settings = given / settings.name
    print(f"1. write your model into {settings}, then: raflora coordinator --config {settings}")
    print(f"2. for every site:          raflora site add NAME --folder {given}")
    print(f"3. to look and to operate:  raflora status --identity {given / operator.name}")


def _make_authority(folder: Path, federation: str, address: str) -> None:
    authority = new_authority(federation, time.time)
    with _appearing(folder) as part:
        write_durably(part / certificates.KEY_FILE, authority.key, mode=_PRIVATE)
        write_durably(part / certificates.CERTIFICATE_FILE, authority.certificate, mode=_PRIVATE)
        write_durably(part / ADDRESS_FILE, f"{address}\n".encode(), mode=_PRIVATE)


@contextmanager
def _appearing(folder: Path) -> Iterator[Path]:
    """A private folder to be filled; it gets its name at the end, so a half of it never has it."""
    part = _part_of(folder)
    part.mkdir(mode=0o700, parents=True, exist_ok=True)
    for left in part.iterdir():  # of an attempt that was cut off; the folder itself says that there was one
        left.unlink()
    yield part
    rename_durably(part, folder)


def _part_of(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.part")
