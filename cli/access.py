"""`raflora access`: identities for people who look on or operate.

It works on the authority's folder; a coordinator that runs notices at once.
"""

import json
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import App, Parameter
from cyclopts.types import PositiveFloat
from rich.table import Table

from cli.authority import ACCESS_DAYS, DEFAULT_FOLDER, AuthorityFolder, open_desk
from cli.output import Format, print_screen
from common.identity import Role

app = App(name="access", help="Lets people look on or operate: add, list, revoke.")


@app.command
def add(
    name: str,
    out_folder: Path,
    /,
    *,
    role: Annotated[Literal["observer", "operator"], Parameter(help="Looks on, or looks on and operates.")],
    days: Annotated[PositiveFloat, Parameter(help="Until the certificate ends.")] = ACCESS_DAYS,
    again: Annotated[bool, Parameter(help="A new identity in place of the earlier one of this name.")] = False,
    folder: AuthorityFolder = DEFAULT_FOLDER,
    format: Format = "table",
) -> None:
    """Makes OUT_FOLDER, with which NAME reaches the coordinator: raflora status --identity OUT_FOLDER.

    It holds a private key: hand it over as you would a password, and keep no copy.
    """
    open_desk(folder).write_identity(name, Role(role), days, out_folder, again=again)
    if format == "json":
        print(json.dumps({"name": name, "role": role, "identity": str(out_folder)}, indent=2))
    else:
        print(out_folder)


@app.command(name="list")
def list_people(*, folder: AuthorityFolder = DEFAULT_FOLDER, format: Format = "table") -> None:
    """Lists who may look on and who may operate."""
    people = open_desk(folder).issuer.registry.people()
    if format == "json":
        listed = [{"name": p.name, "role": p.role, "is_revoked": p.is_revoked} for p in people]
        print(json.dumps({"people": listed}, indent=2))
        return
    table = Table("name", "role", "state")
    for person in people:
        table.add_row(person.name, person.role, "revoked" if person.is_revoked else "in")
    print_screen(table if people else "nobody yet: raflora access add NAME OUT_FOLDER --role observer --folder FOLDER")


@app.command
def revoke(name: str, /, *, folder: AuthorityFolder = DEFAULT_FOLDER) -> None:
    """Takes the identity of NAME back; a running coordinator ends their calls."""
    person = open_desk(folder).issuer.registry.revoke_person(name)
    print(f"{person.role} {name} is shut out")
