"""What is shown together: the stages of an experiment, and in each the arms of one setting side by side. Pure.

Arms with settings of their own ([[arms]] set) are compared only with arms that have the same ones.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from simulation.experiment import ExperimentConfig
from simulation.report.summary import ArmSummary, summarise
from simulation.results import Results
from simulation.schedule import BEST, SAME


@dataclass(frozen=True)
class Group:
    """Arms of equal settings, and the one of them that the others are compared with."""

    setting: str  # in words; empty: the experiment's own
    summaries: tuple[ArmSummary, ...]
    baseline: str

    @property
    def title(self) -> str:
        """For a heading over it."""
        return f"Arms with {self.setting}" if self.setting else "Arms with the experiment's own settings"


@dataclass(frozen=True)
class Stage:
    """The arms' runs at one learning rate for all, or at each one's best."""

    name: str
    title: str
    summaries: tuple[ArmSummary, ...]
    groups: tuple[Group, ...]


def stages_of(results: Results, experiment: ExperimentConfig, baseline: str = "") -> tuple[Stage, ...]:
    """The stages of which there are rows; none if only tuning runs are finished.

    A group without the wanted baseline has the default one: FlexLoRA's rank-agnostic average, or its first arm.
    """
    summaries = summarise(results, experiment)
    found = []
    for name in (SAME, BEST):
        of_stage = tuple(each for each in summaries if each.stage == name)
        if of_stage:
            groups = tuple(
                Group(setting, arms, baseline if baseline in [each.arm for each in arms] else default_baseline(arms))
                for setting, arms in by_setting(of_stage).items()
            )
            found.append(Stage(name, _title(name, of_stage), of_stage, groups))
    return tuple(found)


def by_setting(summaries: Sequence[ArmSummary]) -> Mapping[str, tuple[ArmSummary, ...]]:
    """The arms of each setting, in their order."""
    found: dict[str, tuple[ArmSummary, ...]] = {}
    for each in summaries:
        found[each.census.set] = (*found.get(each.census.set, ()), each)
    return found


def have_one_rate(summaries: Sequence[ArmSummary]) -> bool:
    """Whether all arms were trained at the same rate and schedule."""
    return len({(each.learning_rate, each.decay) for each in summaries}) == 1


def default_baseline(summaries: Sequence[ArmSummary]) -> str:
    """The rank-agnostic average (FlexLoRA) where it is among the arms, or else the first arm."""
    flexlora = [each.arm for each in summaries if each.method == "flexlora" and not each.is_reference]
    return (flexlora or [summaries[0].arm])[0]


def cpu_variant(experiment: ExperimentConfig) -> str:
    """What the experiment has been made smaller by for want of a GPU, in words; empty if it has not."""
    content: Mapping[str, Any] = experiment.model_dump(mode="json")
    changed = {key: _at(content, key) for key in experiment.without_gpu}
    wanted = {key: _at(experiment.on_cpu().model_dump(mode="json"), key) for key in changed}
    return ", ".join(f"{key} = {value}" for key, value in sorted(changed.items())) if changed == wanted else ""


def _at(content: Any, key: str) -> Any:
    for part in key.split("."):
        content = content[part]
    return content


def _title(stage: str, summaries: Sequence[ArmSummary]) -> str:
    if stage == BEST:
        return "Every arm at its own best learning rate"
    if have_one_rate(summaries):
        return "All arms at the experiment's own learning rate"
    return "Every arm at the learning rate of its own settings"
