"""The report is one file that fetches nothing, and says the numbers of its rows."""

from html.parser import HTMLParser

import pytest
from simulated_rows import a_run, an_experiment, key

pytest.importorskip("matplotlib")

from simulation.experiment import ExperimentConfig
from simulation.report.render import Report, render
from simulation.schedule import Choice

VOID = {"meta", "br", "hr", "img", "input", "link"}


class Page(HTMLParser):
    """Checks that tags close in order, and gathers what tests ask for."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.tags: list[str] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in VOID:
            self.open.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value or "")
            if name in ("href", "src", "xlink:href", "data", "action"):
                self.links.append(value or "")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data.strip())


def experiment(**changes: object) -> ExperimentConfig:
    arms = [{"name": "raflora"}, {"name": "flexlora", "method": "flexlora"}, {"name": "flora", "method": "flora"}]
    settings = {
        "name": "collapse",
        "description": "Who keeps <their> ranks?",
        "model": {"path": "digits", "task": "image-classification"},
        "data": {"train": "digits", "test": "digits"},
        "clients": {"count": 4, "ranks": [4, 8, 16], "per_round": 2},
        "rounds": {"num_rounds": 3},
        "training": {"learning_rate": 0.005},
        "arms": arms,
    }
    return ExperimentConfig.model_validate(settings | changes)


@pytest.fixture(scope="module")
def text() -> str:
    tuning = {"learning_rates": [0.001, 0.005]}
    choices = (Choice("raflora", 0.005, "linear", 0.861, at_the_edge=True),)
    results = an_experiment() + an_experiment(stage="best")
    return render(
        Report(experiment(tuning=tuning), results, choices, made_with="raflora 0", missing=("flora, seed 3",))
    )


def test_the_page_is_well_formed(text: str) -> None:
    assert text.startswith("<!DOCTYPE html>")
    assert Page(text).open == []


def test_the_page_fetches_nothing_and_runs_nothing(text: str) -> None:
    page = Page(text)
    assert all(link.startswith("#") for link in page.links)
    assert "script" not in page.tags
    assert "@import" not in text
    assert "http:" not in text
    assert "https:" not in text


def test_ids_are_there_once_also_with_several_lost_runs_and_names_with_blanks() -> None:
    results = an_experiment()
    for seed in range(3):
        results += a_run(key("too hot", seed), 0.1, method="flexlora", status="diverged: not finite")
        results += a_run(key("too", seed), 0.1, method="flexlora", status="diverged: not finite")
    page = Page(render(Report(experiment(), results)))
    assert len(page.ids) == len(set(page.ids))
    assert not any(" " in each for each in page.ids)
    assert "0, 3 diverged" in page.words


def test_only_tuning_rows_are_a_page_that_says_so() -> None:
    text = render(Report(experiment(), a_run(key("raflora", stage="tuning"), 0.5)))
    assert "Only tuning runs are finished" in text
    assert Page(text).open == []


def test_many_missing_runs_are_counted() -> None:
    missing = tuple(f"raflora, seed {seed}" for seed in range(9))
    text = render(Report(experiment(), an_experiment(), missing=missing))
    assert "9 runs are missing: raflora, seed 0; " in text
    assert "raflora, seed 4; and 4 more." in text
    assert "raflora, seed 5" not in text


def test_arms_of_equal_settings_have_a_table_of_their_own() -> None:
    one_shot = {"set": {"rounds.num_rounds": 1}}
    arms = [{"name": "raflora"}, {"name": "flexlora", "method": "flexlora"}]
    arms += [{"name": "once", **one_shot}, {"name": "once flexlora", "method": "flexlora", **one_shot}]
    results = an_experiment()
    for seed in range(3):
        results += a_run(key("once", seed), 0.95, method="raflora", rounds=1)
        results += a_run(key("once flexlora", seed), 0.6, method="flexlora", rounds=1)
    text = render(Report(experiment(arms=arms), results))
    assert "<h3>Arms with rounds.num_rounds = 1</h3>" in text
    assert "points over once flexlora" in text
    assert 'class="leaders"' not in text  # nobody leads among arms of other settings


def test_the_variant_without_a_gpu_is_announced() -> None:
    whole = experiment(without_gpu={"rounds.num_rounds": 2})
    assert "Run without a GPU" not in render(Report(whole, an_experiment()))
    assert "as its small variant: rounds.num_rounds = 2." in render(Report(whole.on_cpu(), an_experiment()))


def test_every_id_is_there_once_and_every_link_meets_one(text: str) -> None:
    page = Page(text)
    assert len(page.ids) == len(set(page.ids))
    assert {link.removeprefix("#") for link in page.links} <= set(page.ids)


def test_the_page_has_the_numbers_of_the_rows(text: str) -> None:
    words = Page(text).words
    assert "86.8 ± 0.4 (3)" in words  # raFLoRA's accuracy
    assert "+8.3 ± 0.8 (3)" in words  # and its paired difference to FlexLoRA
    assert "3 of 3" in words
    assert any(word.startswith("87.3 ± 0.4 (3)") for word in words)
    assert "86.1" in words  # the validation accuracy of the choice


def test_numbers_come_first_and_then_what_speaks_against_it(text: str) -> None:
    against = text.index("Above raflora: flora (+0.5 points)")
    assert text.index("<table") < against < text.index("Below raflora: ")


def test_what_settings_say_is_text_and_never_markup(text: str) -> None:
    assert "Who keeps &lt;their&gt; ranks?" in text
    assert "<their>" not in text


def test_runs_that_are_missing_are_said(text: str) -> None:
    assert "Not everything has been run: 1 run is missing: flora, seed 3." in text


def test_another_baseline_is_compared_with() -> None:
    text = render(Report(experiment(), an_experiment(), baseline="flora"))
    assert "points over flora" in text
    assert "-0.5 ± 0.0 (3)" in Page(text).words


def test_a_page_of_one_diverged_run_still_stands() -> None:
    text = render(Report(experiment(), a_run(key("raflora"), 0.5, status="diverged: not <finite>")))
    assert "diverged: not &lt;finite&gt;" in text
    assert Page(text).open == []
