"""The model card: what it says, what it keeps to itself, and that nothing in it steers a reader's screen."""

from dataclasses import replace
from datetime import date

import pytest
from origins import ORIGIN

from cli.export_card import Edition, card_of, escaped, is_hub_id
from cli.export_loading import Place
from cli.export_origin import Contributor

EDITION = Edition(
    rank=16,
    written_rank=16,
    scaling=0.5,
    weights_digest="e" * 64,
    place=Place("ada/moods", "org/bert", merged=False),
    dtype="float32",
    exported_with="0.1.0",
    made=date(2026, 11, 23),
)


def front_matter(card: str) -> dict[str, object]:
    yaml = pytest.importorskip("yaml")
    opening, block, _ = card.split("---\n", 2)
    assert opening == ""
    found = yaml.safe_load(block)
    assert isinstance(found, dict)
    return found


def test_the_hub_reads_the_front_matter() -> None:
    assert front_matter(card_of(ORIGIN, EDITION)) == {
        "library_name": "peft",
        "base_model": "org/bert",
        "base_model_relation": "adapter",
        "pipeline_tag": "text-classification",
        "tags": ["raflora", "lora", "federated-learning", "peft"],
    }


def test_a_merged_model_is_a_transformers_model() -> None:
    found = front_matter(card_of(ORIGIN, replace(EDITION, place=replace(EDITION.place, merged=True))))
    assert (found["library_name"], found["base_model_relation"]) == ("transformers", "finetune")
    assert "license" not in found


@pytest.mark.parametrize(
    ("name", "is_one"),
    [
        ("org/bert", True),
        ("gpt2", True),
        ("../secret", False),
        ("/home/ada/bert", False),
        ('x"\nlicense: mit', False),
        ("a/b/c", False),
        ("a--b", False),
        ("", False),
    ],
)
def test_only_what_the_hub_could_have_is_called_a_base_model(name: str, is_one: bool) -> None:
    assert is_hub_id(name) is is_one
    assert ("base_model" in front_matter(card_of(replace(ORIGIN, base_model=name), EDITION))) is is_one


@pytest.mark.parametrize(
    "line",
    [
        "# moods: LoRA adapter of org/bert, round 7",
        "of global rank 32, cut to its first 16 directions",
        f"| SHA-256 of the base model's weights, as `raflora spec` prints it | `{'b' * 64}` |",
        "| round | 7 of 9 |",
        "| classes | sad, happy |",
        "| adapted layers | 2: query, value |",
        f"| manifest | `{'c' * 64}` |",
        f"| global adapter | `{'d' * 64}` |",
        f"| weights in this folder (SHA-256) | `{'e' * 64}` |",
        "| exported | 2026-11-23 with raflora 0.1.0 |",
        "Trained by 3 clients that kept their data",
        "| 8 | 2 | 300 | 14 |",
        "| 32 | 1 | 50 | 6 |",
        "| clients' own data | 75.0 % | 0.500 |",
        "| evaluators' data | 70.0 % |  |",
        "| 8 | 2 | 30 | 60.0 % |",
        "The best so far is round 5's: accuracy 81.2 % (federated).",
        "What the evaluation of this adapter measured:",
        "model = PeftModel.from_pretrained(base, 'ada/moods')",
        "None is stated here",
    ],
)
def test_the_card_says(line: str) -> None:
    assert line in card_of(ORIGIN, EDITION)


def test_a_padded_adapter_says_how_many_of_its_directions_are_zeros() -> None:
    card = card_of(ORIGIN, replace(EDITION, written_rank=64))
    assert "and padded with zeros to rank 64" in card
    assert "| rank in this folder | 64: 16 and zeros |" in card


def test_an_older_evaluation_says_whose_it_is() -> None:
    origin = replace(ORIGIN, round=8)
    assert "What the evaluation of round 7, the last before it measured:" in card_of(origin, EDITION)


def test_nothing_is_said_of_what_nobody_measured() -> None:
    card = card_of(replace(ORIGIN, measured=None, best=None, groups=()), EDITION)
    assert "## Evaluation" not in card
    assert "## Who trained it" not in card


def test_clients_are_named_if_the_record_names_them() -> None:
    named = replace(ORIGIN, contributors=(Contributor("hospital|nord", 8, 100, 7),))
    assert "| hospital\\|nord | 8 | 100 | 7 |" in card_of(named, EDITION)


def test_of_a_thousand_clients_fifty_are_named() -> None:
    many = tuple(Contributor(f"c{number:04}", 8, 1, 1) for number in range(1000))
    card = card_of(replace(ORIGIN, contributors=many), EDITION)
    assert "c0049" in card
    assert "c0050" not in card
    assert "950 more are not shown" in card


@pytest.mark.parametrize(
    "hostile",
    [
        "<script>alert(1)</script>",
        "![x](http://evil)",
        "[click](javascript:1)",
        "a|b|c",
        "`code`",
        "</td>",
        "www.evil.example",
        "x\n---\nlicense: mit\n---\n# owned",
        "\x1b[31mred\x1b[0m",
        "\u202egnirts",
    ],
)
def test_hostile_names_are_text(hostile: str) -> None:
    origin = replace(
        ORIGIN,
        federation=hostile,
        base_model=hostile,
        labels=(hostile, "other"),
        method=hostile,
        software_version=hostile,
        contributors=(Contributor(hostile, 8, 1, 1),),
    )
    card = card_of(origin, replace(EDITION, place=Place(hostile, hostile, merged=False)))
    below = card.split("---\n", 2)[2]
    prose = "".join(below.split("```")[::2])  # without the code, where names are quoted as Python quotes them
    assert hostile not in prose
    assert escaped(hostile) in prose
    assert "\n# owned" not in card
    assert not any(not char.isprintable() and char != "\n" for char in card)
    assert front_matter(card)["library_name"] == "peft"
    code = card.split("```python\n")[1].split("```")[0]
    compile(code, "card", "exec")  # a name cannot end its quotes


def test_the_card_says_what_ends_an_answer_and_who_must_be_told() -> None:
    ends = {"<|endoftext|>": 0, "<|im_end|>": 7}
    card = card_of(ORIGIN, replace(EDITION, answer_ends=ends))
    named = r"\<\|im\_end\|\> (7)"
    assert f'{named}; tell `generate(eos_token_id=[0, 7])`, or vLLM with `"stop_token_ids": [0, 7]`' in card
    merged = card_of(ORIGIN, replace(EDITION, answer_ends=ends, place=replace(EDITION.place, merged=True)))
    assert rf"{named}; generation\_config.json says so" in merged
    assert "an answer ends" not in card_of(ORIGIN, EDITION)
