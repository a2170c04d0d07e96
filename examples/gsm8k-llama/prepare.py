"""Writes the folder of a GSM8K federation: data and settings of five sites; with --tiny a model small enough for a CPU.

    python prepare.py OUT [--data FOLDER] [--tiny]

--data names a folder with train.jsonl and test.jsonl of GSM8K ("question", "answer"); without it the data set is
fetched from the hub (openai/gsm8k). With --tiny and no --data problems in GSM8K's form are made up. The tiny model
has LLaMA's architecture and random weights: it shows that everything works and learns the form of the answers, but no
arithmetic.
"""

import argparse
import json
import random
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
RANKS = (8, 16, 32, 48, 64)
SHARES = (5, 2, 1, 1, 1)  # of the training data: most of it lies where the GPUs are small
SEED = 0
TINY_TRAIN, TINY_TEST = 600, 60
TINY_RANKS = (2, 4, 8, 12, 16)
TINY_STEPS, TINY_TOKENS = 300, 64
TINY_LENGTH = 512  # tokens that the tiny model reads; GSM8K's own problems need most of them
VOCABULARY = 512
NAMES = ("Ada", "Bob", "Eve", "Mia", "Tom", "Zoe")
THINGS = ("apples", "books", "cards", "eggs", "pens", "stamps")

Record = dict[str, str]


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes the folder and says how to go on."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="a new folder")
    parser.add_argument("--data", type=Path, help="a folder with train.jsonl and test.jsonl")
    parser.add_argument("--tiny", action="store_true", help="a random model of LLaMA's architecture, for a CPU")
    given = parser.parse_args(arguments)
    out: Path = given.out
    if out.exists():
        parser.error(f"{out} exists already; name a new folder")
    train, test = _records(given.data, tiny=given.tiny)
    out.mkdir(parents=True)
    model = _tiny_model(out / "model", train) if given.tiny else None
    _write(out / "test.jsonl", test)
    parts = _parts(train)
    for number, part in enumerate(parts, start=1):
        _write(out / f"site-{number}.jsonl", part)
        _site(out, number, model)
    _federation(out, model)
    print(f"{out}: {sum(map(len, parts))} training and {len(test)} test problems, sites of {[len(p) for p in parts]}")
    print("Run all of it here:")
    print(f"  raflora local {out}/federation.toml {out}/site-*.toml --logs {out}/logs --export-to {out}/adapter")
    return 0


def _records(folder: Path | None, *, tiny: bool) -> tuple[list[Record], list[Record]]:
    if folder is not None:
        train, test = (_read(folder / f"{name}.jsonl") for name in ("train", "test"))
    elif tiny:
        problems = list(_problems(TINY_TRAIN + TINY_TEST))
        train, test = problems[:TINY_TRAIN], problems[TINY_TRAIN:]
    else:
        import datasets  # noqa: PLC0415 - seconds, and not needed for files

        found = datasets.load_dataset("openai/gsm8k", "main")
        train, test = (list(found[name]) for name in ("train", "test"))
    return (train[:TINY_TRAIN], test[:TINY_TEST]) if tiny else (train, test)


def _problems(count: int) -> Iterator[Record]:
    """Problems in the form of GSM8K: a text, a calculation in steps, "#### " and a number."""
    chance = random.Random(SEED)  # noqa: S311 - examples, not secrets
    for _ in range(count):
        name, thing = chance.choice(NAMES), chance.choice(THINGS)
        first, second = chance.randrange(2, 40), chance.randrange(2, 40)
        if chance.random() < 0.5:
            question = f"{name} has {first} {thing} and buys {second} more. How many {thing} does {name} have?"
            answer, sign = first + second, "+"
        else:
            first += second
            question = f"{name} has {first} {thing} and gives away {second}. How many {thing} are left?"
            answer, sign = first - second, "-"
        step = f"{first} {sign} {second} = <<{first}{sign}{second}={answer}>>{answer} {thing}."
        yield {"question": question, "answer": f"{name} has {step}\n#### {answer}"}


def _parts(train: Sequence[Record]) -> list[list[Record]]:
    """Every problem at one site, in the shares above."""
    order = list(train)
    random.Random(SEED).shuffle(order)  # noqa: S311 - a division of data, not a secret
    parts, begin = [], 0
    for number in range(len(SHARES)):
        end = len(order) * sum(SHARES[: number + 1]) // sum(SHARES)
        parts.append(order[begin:end])
        begin = end
    return parts


def _site(out: Path, number: int, model: Path | None) -> None:
    rank = (TINY_RANKS if model else RANKS)[number - 1]
    changes: dict[str, object] = {
        "name": f"site-{number}",
        "rank": rank,
        "state_dir": f"{out}/site-{number}-state",
        "train": f"{out}/site-{number}.jsonl",
        "test": f"{out}/test.jsonl",
    }
    if model:
        changes |= {"path": str(model), "dtype": "float32", "gradient_checkpointing": False, "max_length": TINY_LENGTH}
    text = _changed((HERE / "worker.toml").read_text(encoding="utf-8"), changes)
    if model:
        text = text.replace("[coordinator]", "threads = 1\n\n[coordinator]", 1)
        text = text.replace("[model]\n", '[model]\ndevice = "cpu"\noffline = true\n', 1)
    (out / f"site-{number}.toml").write_text(text, encoding="utf-8")


def _federation(out: Path, model: Path | None) -> None:
    changes: dict[str, object] = {"state_dir": f"{out}/coordinator-state"}
    if model:
        changes |= {"base_model": "tiny-random-llama", "global_rank": max(TINY_RANKS), "num_rounds": 3, "quorum": 5}
        changes |= {
            "evaluate_every": 1,
            "learning_rate": 1e-2,
            "target_modules": ["all-linear"],
            "max_new_tokens": 48,
            "max_examples": 10,
        }
        changes |= {"warmup_steps": 0, "local_epochs": 2}
    text = _changed((HERE / "federation.toml").read_text(encoding="utf-8"), changes)
    (out / "federation.toml").write_text(text, encoding="utf-8")


def _changed(toml: str, changes: dict[str, object]) -> str:
    """The settings with other values for these keys, each of which stands in them once."""
    for key, value in changes.items():
        line = f"{key} = {json.dumps(value)}"
        toml, count = re.subn(rf"^{key} = .*$", lambda _, line=line: line, toml, flags=re.MULTILINE)
        if count != 1:
            raise SystemExit(f"{key}: stands {count} times in the settings, expected once")
    return toml


def _tiny_model(folder: Path, train: Sequence[Record]) -> Path:
    """LLaMA's architecture with random weights (0.2 M parameters) and a tokenizer learnt from the problems."""
    import torch  # noqa: PLC0415 - seconds that the large variant does not need
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers  # noqa: PLC0415
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast  # noqa: PLC0415

    begin, end = "<|begin_of_text|>", "<|end_of_text|>"
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    texts = [f"{record['question']}\n{record['answer']}" for record in train]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[begin, end],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    special = {"bos_token": begin, "eos_token": end}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special, model_max_length=TINY_LENGTH)
    fast.save_pretrained(folder)
    torch.manual_seed(SEED)
    config = LlamaConfig(
        vocab_size=len(fast),
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=128,
        max_position_embeddings=TINY_LENGTH,
        bos_token_id=fast.bos_token_id,
        eos_token_id=fast.eos_token_id,
    )
    model = LlamaForCausalLM(config)
    _pretrain(model, [fast(record["question"]).input_ids[:TINY_TOKENS] for record in train])
    model.save_pretrained(folder)
    return folder


def _pretrain(model: Any, texts: Sequence[list[int]]) -> None:
    """A quarter of a minute of next-token training on the questions: a base that knows the words and no answer."""
    import torch  # noqa: PLC0415

    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    chance = random.Random(SEED)  # noqa: S311
    for step in range(TINY_STEPS):
        rows = [torch.tensor(text) for text in chance.choices(texts, k=16)]
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        there = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
        loss = model(input_ids=ids, attention_mask=there, labels=ids.masked_fill(there == 0, -100)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if sys.stderr.isatty() or (step + 1) % 100 == 0:
            end = "\n" if (step + 1) % 100 == 0 else "\r"
            print(f"making the tiny model: step {step + 1}/{TINY_STEPS}, loss {loss:.2f}", end=end, file=sys.stderr)


def _read(path: Path) -> list[Record]:
    with path.open(encoding="utf-8") as file:  # splitlines would also split within a text, at Unicode's separators
        return [json.loads(line) for line in file if line.strip()]


def _write(path: Path, records: Sequence[Record]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
