"""Every argument and option of the verbs for models says in its help what it is."""

import pytest
from cyclopts import App

from cli.main import app

VERBS = ("plan", "probe", "export", "evaluate", "local", "spec")


@pytest.mark.parametrize("verb", VERBS)
def test_every_option_says_what_it_is(verb: str) -> None:
    command: App = app[verb]
    arguments = command.assemble_argument_collection(parse_docstring=True)
    silent = [one.name for one in arguments if one.show and not one.parameter.help and one.name != "--format"]
    assert silent == []


def test_local_names_its_workers() -> None:
    assert app["local"].usage == "Usage: raflora local FEDERATION WORKERS... [OPTIONS]"
