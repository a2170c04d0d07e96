"""The model card: README.md beside the weights, for people and for the hub. A pure function from a record to text.

What sites and operators wrote is escaped; sites are named only if the record names them. The licence is the user's.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date

from cli.evaluation_screen import value_of
from cli.export_loading import Place, loading_lines
from cli.export_origin import Level, Origin
from cli.words import counted, plain

CARD_FILE = "README.md"
_MARKDOWN = re.compile(r"([\\`*_{}\[\]()<>#!|~$&@:]|(?<=www)\.)", re.IGNORECASE)
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?", re.ASCII)
_PIPELINES = {
    "sequence-classification": "text-classification",
    "image-classification": "image-classification",
    "causal-lm": "text-generation",
}
_MANY = 50  # clients or classes that are listed; the rest are counted


@dataclass(frozen=True)
class Edition:
    """How this copy of the adapter was made."""

    rank: int  # directions of the global adapter that are in it
    written_rank: int  # with the zeros of padding; the same without any
    scaling: float
    weights_digest: str  # SHA-256 of the file of weights; of an index if there are several
    place: Place
    dtype: str  # of the weights in the files
    exported_with: str  # our version
    made: date
    answer_ends: Mapping[str, int] = field(default_factory=dict)  # tokens by their texts; empty: not known here


def card_of(origin: Origin, edition: Edition) -> str:
    """README.md."""
    sections = [
        *_front_matter(origin, edition),
        f"# {escaped(origin.federation)}: {_title(origin, edition)}",
        "",
        _sentence(origin, edition),
        "",
        *_loading(origin, edition),
        *_facts(origin, edition),
        *_evaluation(origin),
        *_clients(origin),
        "## Licence",
        "",
        "None is stated here: whoever publishes this chooses one, within that of the base model and of the data "
        "(`license:` in the block at the top of this file).",
    ]
    return "\n".join(sections) + "\n"


def escaped(text: str) -> str:
    """The text on one line, with nothing in it that markdown or HTML would obey."""
    return _MARKDOWN.sub(r"\\\1", plain(text))


def is_hub_id(name: str) -> bool:
    """Whether the hub could have a model of that name; a path is none."""
    return _HUB_ID.fullmatch(name) is not None and ".." not in name and "--" not in name


def _front_matter(origin: Origin, edition: Edition) -> Iterator[str]:
    """What the hub reads; JSON's strings are YAML's."""
    merged = edition.place.merged
    yield "---"
    yield f"library_name: {'transformers' if merged else 'peft'}"
    if is_hub_id(origin.base_model):
        yield f"base_model: {json.dumps(origin.base_model)}"
        yield f"base_model_relation: {'finetune' if merged else 'adapter'}"
    if origin.task in _PIPELINES:
        yield f"pipeline_tag: {_PIPELINES[origin.task]}"
    yield "tags:"
    for tag in ("raflora", "lora", "federated-learning", *(() if merged else ("peft",))):
        yield f"- {tag}"
    yield "---"
    yield ""


def _title(origin: Origin, edition: Edition) -> str:
    what = "merged model" if edition.place.merged else "LoRA adapter"
    return f"{what} of {escaped(origin.base_model)}, round {origin.round}"


def _sentence(origin: Origin, edition: Edition) -> str:
    clients = f"by {counted(sum(group.clients for group in origin.groups), 'client')} " if origin.groups else ""
    cut = "" if edition.rank == origin.global_rank else f", cut to its first {counted(edition.rank, 'direction')}"
    padded = "" if edition.written_rank == edition.rank else f" and padded with zeros to rank {edition.written_rank}"
    return (
        f"Trained {clients}that kept their data, with federated LoRA ({escaped(origin.method)}) of global rank "
        f"{origin.global_rank}{cut}{padded}. Made with `raflora` ([the method](https://arxiv.org/abs/2602.13486))."
    )


def _loading(origin: Origin, edition: Edition) -> Iterator[str]:
    lines = loading_lines(origin, edition.place)
    if lines:
        yield from ("## Load it", "", "```python", *lines, "```", "")


def _facts(origin: Origin, edition: Edition) -> Iterator[str]:
    yield from ("## What it is", "", "| | |", "|---|---|")
    facts = {
        "base model": escaped(origin.base_model),
        "SHA-256 of the base model's weights, as `raflora spec` prints it": f"`{plain(origin.base_model_digest)}`",
        "task": escaped(origin.task),
        "classes": _listed(origin.labels),
        "method": escaped(origin.method),
        "round": f"{origin.round} of {origin.num_rounds}",
        "global rank": str(origin.global_rank),
        "rank in this folder": _rank_of(edition),
        "factor before lora\\_B lora\\_A": "" if edition.place.merged else repr(edition.scaling),
        "adapted layers": _layers_of(origin.modules),
        "trained whole": _listed(origin.modules_to_save),
        "an answer ends with": _ends_of(edition),
        "numbers": escaped(edition.dtype),
        "manifest": _digest(origin.manifest_digest),
        "global adapter": _digest(origin.adapter_digest),
        "weights in this folder (SHA-256)": _digest(edition.weights_digest),
        "coordinator's version": escaped(origin.software_version),
        "exported": f"{edition.made.isoformat()} with raflora {escaped(edition.exported_with)}",
    }
    yield from (f"| {name} | {value} |" for name, value in facts.items() if value)
    yield ""


def _evaluation(origin: Origin) -> Iterator[str]:
    best, measured = origin.best, origin.measured
    if measured is None and best is None:
        return
    yield from ("## Evaluation", "")
    if measured is not None:
        when = "of this adapter" if measured.round == origin.round else f"of round {measured.round}, the last before it"
        yield from (f"What the evaluation {when} measured:", "")
        yield from _metrics_table({"clients' own data": measured.federated, "evaluators' data": measured.central})
        yield from _levels_table(measured.levels)
    if best is not None:
        is_this = "this adapter's" if best.round == origin.round else f"round {best.round}'s"
        value = value_of({best.metric: best.value}, best.metric)
        yield f"The best so far is {is_this}: {escaped(best.metric)} {value} ({escaped(best.source)})."
        yield ""


def _metrics_table(rows: Mapping[str, Mapping[str, float]]) -> Iterator[str]:
    names = sorted({name for row in rows.values() for name in row})
    if not names:
        return
    yield from _head("data", *(escaped(name) for name in names))
    for what, row in rows.items():
        if row:
            yield _row(what, *_values(row, names))
    yield ""


def _levels_table(levels: Sequence[Level]) -> Iterator[str]:
    if not levels:
        return
    names = sorted({name for level in levels for name in level.metrics})
    yield from ("By the rank at which the clients evaluated:", "")
    yield from _head("rank", "clients", "examples", *(escaped(name) for name in names))
    for level in levels:
        yield _row(level.lora_rank, level.clients, level.num_examples, *_values(level.metrics, names))
    yield ""


def _clients(origin: Origin) -> Iterator[str]:
    if not origin.groups:
        return
    yield from ("## Who trained it", "", "Clients whose updates are in this adapter, by the rank they trained at:", "")
    yield from _head("rank", "clients", "training examples", "updates")
    for group in origin.groups:
        yield _row(group.lora_rank, group.clients, group.num_examples, group.updates)
    yield ""
    if origin.contributors:
        yield from _head("client", "rank", "training examples", "updates")
        for one in origin.contributors[:_MANY]:
            yield _row(escaped(one.client_id), one.lora_rank, one.num_examples, one.updates)
        more = len(origin.contributors) - _MANY
        yield from ("", f"{more} more are not shown.", "") if more > 0 else ("",)


def _rank_of(edition: Edition) -> str:
    if edition.place.merged:
        return f"{edition.rank}, merged into the weights"
    if edition.written_rank != edition.rank:
        return f"{edition.written_rank}: {edition.rank} and zeros"
    return str(edition.rank)


def _ends_of(edition: Edition) -> str:
    """The tokens, and where somebody must be told of them."""
    if not edition.answer_ends:
        return ""
    named = ", ".join(f"{escaped(text)} ({number})" for text, number in edition.answer_ends.items())
    told = "generation\\_config.json says so" if edition.place.merged else _told_ends(edition.answer_ends.values())
    return f"{named}; {told}"


def _told_ends(numbers: Iterable[int]) -> str:
    ends = list(numbers)
    return f'tell `generate(eos_token_id={ends})`, or vLLM with `"stop_token_ids": {ends}`'


def _layers_of(modules: Iterable[str]) -> str:
    names = list(modules)
    endings = sorted({name.rpartition(".")[2] for name in names})
    return f"{len(names)}: {', '.join(escaped(ending) for ending in endings)}"


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _MANY} more" if len(names) > _MANY else ""
    return ", ".join(escaped(name) for name in names[:_MANY]) + more


def _digest(digest: str) -> str:
    return f"`{re.sub('[^0-9a-f]', '?', digest)}`" if digest else ""


def _values(metrics: Mapping[str, float], names: Sequence[str]) -> list[str]:
    return [value_of(metrics, name) if name in metrics else "" for name in names]


def _head(*names: str) -> Iterator[str]:
    yield _row(*names)
    yield "|" + "---|" * len(names)


def _row(*cells: object) -> str:
    return f"| {' | '.join(str(cell) for cell in cells)} |"
