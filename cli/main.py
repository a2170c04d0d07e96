"""The `raflora` command: finds the verb, and turns errors into one line and an exit code.

Exit codes, the same for every verb:

    0    done; for `raflora health`: serving
    1    failed; for `raflora health`: not healthy
    2    the command line or a settings file is wrong
    3    the other side refused
    4    the other side cannot be reached
    130  interrupted with Ctrl-C

Verbs are named by import path and loaded when they are called: `raflora status` never imports torch or SQL.
"""

import os
import sys
from collections.abc import Iterable, Sequence

from cyclopts import App, CycloptsError, Group, MissingArgumentError, Parameter
from rich.console import Console
from rich.text import Text

from cli.errors import ExitCode, exit_code_of, sentence_of
from cli.words import plain
from common.errors import RafloraError
from common.settings import quiet_grpc_core
from common.version import software_version

app = App(
    name="raflora",
    help="Fine-tune one model across sites with unequal GPUs: federated LoRA that keeps its ranks alive.",
    version=software_version,
    default_parameter=Parameter(negative=()),
    result_action="return_value",
)

_RUN = Group.create_ordered("Run")
_LOOK = Group.create_ordered("Look")
_OPERATE = Group.create_ordered("Operate")
_SET_UP = Group.create_ordered("Set up")

# One line a verb; its help is its docstring.
app.command("cli.demo:demo", group=_RUN)
app.command("cli.local:local", group=_RUN, usage="Usage: raflora local FEDERATION WORKERS... [OPTIONS]")
app.command("cli.simulate:simulate", group=_RUN)
app.command("cli.compare:compare", group=_RUN)
app.command("cli.coordinator:coordinator", group=_RUN)
app.command("cli.worker:worker", group=_RUN)
app.command("cli.status:status", group=_LOOK)
app.command("cli.rounds:rounds", group=_LOOK)
app.command("cli.clients:clients", group=_LOOK)
app.command("cli.health:health", group=_LOOK)
app.command("cli.doctor:doctor", group=_LOOK)
app.command("cli.export:export", group=_LOOK)
app.command("cli.evaluate:evaluate", group=_LOOK)
app.command("cli.operate:pause", group=_OPERATE)
app.command("cli.operate:resume", group=_OPERATE)
app.command("cli.operate:close_round", group=_OPERATE)
app.command("cli.operate:abort_round", group=_OPERATE)
app.command("cli.operate:evict", group=_OPERATE)
app.command("cli.operate:set_rank", group=_OPERATE)
app.command("cli.backup:backup", group=_OPERATE)
app.command("cli.backup:restore", group=_OPERATE)
app.command("cli.init:init", group=_SET_UP)
app.command("cli.site:app", name="site", group=_SET_UP)
app.command("cli.access:app", name="access", group=_SET_UP)
app.command("cli.spec:spec", group=_SET_UP)
app.command("cli.plan:plan", group=_SET_UP)
app.command("cli.probe:probe", group=_SET_UP)
app.command("cli.example:digits", group=_SET_UP)
app.command("cli.config:app", name="config", group=_SET_UP)
app.command("cli.version:show_version", name="version", group=_SET_UP)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one verb and returns its exit code; `arguments` are the process's own unless given."""
    tokens = sys.argv[1:] if arguments is None else list(arguments)
    _never_fail_on_encoding()
    quiet_grpc_core()
    try:
        if not tokens or tokens[0] in app.help_flags:
            app.resolved_commands()  # the list of verbs shows a sentence of each, so all are loaded
        result = app(tokens, exit_on_error=False, print_error=False)
        sys.stdout.flush()
    except MissingArgumentError as error:
        verb, missing = " ".join(error.command_chain or ()), error.argument.name if error.argument else "an argument"
        value = " with a value" if missing.startswith("-") else ""
        return _complain(f"raflora {verb}: {missing}{value} is required; `raflora {verb} --help`", ExitCode.USAGE)
    except CycloptsError as error:
        return _complain(f"{error} `raflora --help` lists the verbs.", ExitCode.USAGE)
    except RafloraError as error:
        return _complain(sentence_of(error), exit_code_of(error))
    except BrokenPipeError:
        # The reader (head, less) has gone; what the interpreter still flushes at exit goes nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return ExitCode.FAILED
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        return _complain(f"{where}{error.strerror or error}", ExitCode.FAILED)
    except KeyboardInterrupt:
        return ExitCode.INTERRUPTED
    return result if isinstance(result, int) else ExitCode.OK


def _never_fail_on_encoding() -> None:
    # A bar drawn in a latin-1 terminal must come out as question marks, not as a traceback.
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="replace")


def _complain(sentence: str, code: ExitCode) -> int:
    lines: Iterable[str] = sentence.splitlines() or [""]
    console = Console(stderr=True, markup=False, highlight=False, emoji=False, soft_wrap=True)
    for line in lines:
        console.print(Text(plain(line), style="red"))
    return code


if __name__ == "__main__":
    sys.exit(main())
