"""`raflora site`: lets organisations with workers in, lists them, shuts them out.

It works on the authority's folder; a coordinator that runs notices at once.
"""

import json
from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter
from cyclopts.types import PositiveFloat, PositiveInt
from rich.table import Table

from cli.authority import DEFAULT_FOLDER, AuthorityFolder, hint, open_desk
from cli.output import Format, print_screen
from common.errors import ConfigError
from common.moments import moment
from common.transfer import sweep_parts, write_durably
from coordinator.identity.registry import MAX_WORKERS, Site

app = App(name="site", help="Lets organisations with workers in: add, list, revoke.")


@app.command
def add(
    name: str,
    /,
    *,
    workers: Annotated[PositiveInt, Parameter(help="That may join with the token, each with a key of its own.")] = 1,
    days: Annotated[PositiveFloat, Parameter(help="Until the token is worth nothing.")] = 7.0,
    again: Annotated[bool, Parameter(help="A new token for a site that is known; its workers stay.")] = False,
    if_missing: Annotated[bool, Parameter(help="Do nothing if the site is known, and --out written.")] = False,
    coordinator: Annotated[str, Parameter(help="HOST:PORT for this site, if `raflora init` said another.")] = "",
    out: Annotated[Path | None, Parameter(help="Write the token to this file, for its owner alone.")] = None,
    folder: AuthorityFolder = DEFAULT_FOLDER,
    format: Format = "table",
) -> None:
    """Prints a join token for the site NAME: one line that lets its workers in. Send it as you would a password.

    A new token takes the place of the site's earlier one. A revoked site that is added again begins anew.
    """
    if workers > MAX_WORKERS:
        raise ConfigError(f"--workers {workers}: at most {MAX_WORKERS}")
    desk = open_desk(folder)
    known = desk.issuer.registry.site(name)
    is_in = known is not None and not known.is_revoked
    if if_missing and is_in and (out is None or out.exists()):
        hint(f"site {name} is known; nothing was changed")
        return
    site, token = desk.issuer.invite(
        name, workers=workers, days=days, again=again or if_missing, address=coordinator or desk.address
    )
    if out is not None:
        sweep_parts(out.parent, of=out.name)
        write_durably(out, f"{token.text}\n".encode(), mode=0o600)
        token_said = str(out)
    else:
        token_said = token.text
    if format == "json":
        key = "join_token_file" if out else "join_token"
        print(json.dumps({**_as_json(site), "coordinator": token.address, key: token_said}, indent=2))
        return
    print(token_said)
    ends = moment(site.token.expires_at)
    hint(f"good for {workers} worker(s) of {name} until {ends}: coordinator.join_token_file in the worker's settings")


@app.command(name="list")
def list_sites(*, folder: AuthorityFolder = DEFAULT_FOLDER, format: Format = "table") -> None:
    """Lists the sites: what is left of their tokens, and the workers that came in."""
    sites = open_desk(folder).issuer.registry.sites()
    if format == "json":
        print(json.dumps({"sites": [_as_json(site) for site in sites]}, indent=2))
        return
    table = Table("site", "state", "token", "until", "workers")
    for site in sites:
        used = f"{len(site.token.keys)} of {site.token.workers} used"
        state = "revoked" if site.is_revoked else "in"
        table.add_row(site.name, state, used, moment(site.token.expires_at), "\n".join(sorted(site.keys)) or "none yet")
    print_screen(table if sites else "no sites yet: raflora site add NAME --folder FOLDER")


@app.command
def revoke(name: str, /, *, folder: AuthorityFolder = DEFAULT_FOLDER) -> None:
    """Takes back the token and the identities of all workers of the site NAME; a running coordinator ends their calls.

    What they have contributed to finished rounds stays. It comes in again with: raflora site add NAME --folder FOLDER.
    """
    site = open_desk(folder).issuer.registry.revoke_site(name)
    print(f"site {name} is shut out, with {len(site.keys)} worker(s)")


def _as_json(site: Site) -> dict[str, object]:
    return {
        "site": site.name,
        "is_revoked": site.is_revoked,
        "workers": sorted(site.keys),
        "token_workers": site.token.workers,
        "token_used": len(site.token.keys),
        "token_expires_at": site.token.expires_at,
    }
