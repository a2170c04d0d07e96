"""`raflora demo`: a real federation on this machine, with nothing to download or to configure.

One coordinator and five worker processes speak gRPC over loopback; then the same again with the rank-agnostic average.
"""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter
from cyclopts.types import NonNegativeInt, PositiveInt
from rich.text import Text

from cli.demo_results import Check, results_of, write_results
from cli.demo_setting import Setting, forget_state, prepare, write_settings
from cli.errors import ExitCode, Failed
from cli.local_federation import Story, run_federation
from cli.local_processes import output_of, until_told_to_end
from cli.local_screen import LocalScreen, accuracy_table, energies, name_of
from cli.output import stderr_console, stdout_console
from cli.words import human_seconds, percent
from common.errors import ConfigError

METHOD, RIVAL = "raflora", "flexlora"
CHECK_SECONDS = 180.0
_NEEDED = ("torch", "transformers", "peft", "accelerate", "sklearn")


@dataclass(frozen=True)
class Wishes:
    """What of the demonstration is wanted."""

    compare: bool = True
    keep: bool = False


async def demo(
    *,
    rounds: PositiveInt = 12,
    out: Path = Path("runs/demo"),
    seed: NonNegativeInt = 0,
    keep: bool = False,
    comparison: Annotated[bool, Parameter(negative="--no-comparison")] = True,
    format: Literal["text", "json"] = "text",
) -> int:
    """Runs a federation of five unequal sites on this machine: about two minutes on two cores, nothing to download.

    Settings, logs, results and the trained adapter go to --out, a new folder or an earlier demo's, which is replaced.
    --keep leaves the processes' state there as well. --no-comparison leaves out the second federation, which averages
    without regard to ranks. With --format json the results go to standard output and the screen to standard error.
    """
    missing = [name for name in _NEEDED if find_spec(name) is None]
    if missing:
        raise ConfigError(f"raflora demo needs {', '.join(missing)}: pip install 'raflora[demo]'")
    console = stdout_console() if format == "text" else stderr_console()
    with LocalScreen(console) as screen:
        setting = Setting(out, rounds, seed)
        check = await until_told_to_end(
            run_demo(setting, Wishes(comparison, keep), screen),
            lambda: screen.say(
                f"Interrupted; every process that was started has been ended. Their logs: {setting.folder}"
            ),
        )
    if format == "json":
        print(json.dumps(json.loads(setting.results.read_text(encoding="utf-8"))))
    return ExitCode.OK if check.agrees else ExitCode.FAILED


async def run_demo(setting: Setting, wishes: Wishes, screen: LocalScreen) -> Check:
    """The whole demonstration. Raises ConfigError, or Failed if a part of it does not do its work in time."""
    started = time.monotonic()
    prepare(setting)
    files = write_settings(setting, METHOD)
    screen.say(*_introduction(setting))
    screen.title(f"A federation with raFLoRA, {setting.rounds} rounds")
    story = await run_federation(METHOD, files, screen, export_to=setting.adapter)
    stories, all_files = [story], [files]
    if wishes.compare:
        rival_files = write_settings(setting, RIVAL)
        screen.title("The same again, but averaged as FlexLoRA does, without regard to ranks")
        stories.append(await run_federation(RIVAL, rival_files, screen))
        all_files.append(rival_files)
    check = await _checked(setting, story, screen)
    _show_outcome(stories, check, screen)
    write_results(results_of(setting, stories, check), setting.results)
    if not wishes.keep:
        for each in all_files:
            forget_state(each)
    _show_adapter(setting, check, screen)
    screen.say("", f"Settings, logs and results: {setting.folder}   ({human_seconds(time.monotonic() - started)})")
    return check


def _introduction(setting: Setting) -> Sequence[str | Text]:
    sites = len(setting.sites)
    ranks = ", ".join(str(site.rank) for site in setting.sites)
    return (
        Text(f"{sites} sites fine-tune one model together, each at the LoRA rank that it can afford.", style="bold"),
        f"A coordinator and {sites} workers run here as processes of their own and speak gRPC; ranks {ranks}.",
        "The model, a small vision transformer, learned handwritten digits upright. The sites' cameras hang sideways",
        "and see negatives; each site has other digits, and no image leaves its site. Only LoRA factors do.",
    )


def _show_outcome(stories: Sequence[Story], check: Check, screen: LocalScreen) -> None:
    screen.title("Accuracy after the last round: each site's rank slice of the global adapter")
    screen.say(accuracy_table(stories), f"The base model alone names {percent(check.base_accuracy)}.")
    screen.title("Energy per rank partition after the last round")
    screen.say(energies(stories))
    if len(stories) > 1:
        screen.say(*_comparison(*stories))


def _comparison(ours: Story, rivals: Story) -> Sequence[str]:
    """What the two columns mean, and what they do not."""
    one, other = ours.rounds[-1], rivals.rounds[-1]
    smallest = one.partitions[0].high
    shares = (
        f"Above rank {smallest} lies {percent(1 - one.rho)} of {name_of(ours)}'s energy and {percent(1 - other.rho)} "
        f"of {name_of(rivals)}'s"
    )
    if 1 - other.rho > (1 - one.rho) / 2:
        return (f"{shares}; a few more rounds show where the two go.",)
    return (
        f"{shares}: that is rank collapse.",
        f"A slice carries the energy of its own ranks only: rank {smallest} receives {percent(one.rho)} of "
        f"{name_of(ours)}'s and {percent(other.rho)} of {name_of(rivals)}'s.",
        "One seed of a small task: read the energies as the result and the accuracies as an example.",
    )


async def _checked(setting: Setting, story: Story, screen: LocalScreen) -> Check:
    """Loads the exported folder in a fresh process and compares with what the largest site measured."""
    screen.waiting("loading the exported adapter with PEFT in a fresh process")
    largest = [e for e in story.rounds[-1].evaluations if e.lora_rank == setting.global_rank]
    if not largest:
        raise Failed(f"no worker has evaluated the adapter at its full rank {setting.global_rank}")
    arguments = (str(setting.adapter), str(setting.test_data), "--base", str(setting.base_model))
    log = setting.folder / "check.log"
    module = ("-m", "simulation.check_adapter")
    printed = await output_of("the check", *module, *arguments, log=log, seconds=CHECK_SECONDS)
    found = json.loads(printed)
    return Check(
        reported_accuracy=largest[0].metrics["accuracy"],
        loaded_accuracy=found["accuracy"],
        base_accuracy=found["base_accuracy"],
        num_examples=found["num_examples"],
        load=tuple(found["load"]),
    )


def _show_adapter(setting: Setting, check: Check, screen: LocalScreen) -> None:
    screen.title(f"The adapter is a stock PEFT folder: {setting.adapter}")
    for line in check.load:
        screen.quote(f"  {line}")
    verdict = Text("OK", style="bold green") if check.agrees else Text("MISMATCH", style="bold red")
    screen.say(
        Text(
            f"Loaded so in a fresh process it names {percent(check.loaded_accuracy)} of {check.num_examples} test "
            f"digits;\nthe worker of rank {setting.global_rank} reported {percent(check.reported_accuracy)}: "
        ).append(verdict)
    )
