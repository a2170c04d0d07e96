"""A federation of language models as users start it: two `raflora worker` processes, then `raflora export`."""

import asyncio
import json
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from coordinators import config_of, observing, serving, to_toml
from peft import PeftModel
from raflora.v1 import status_pb2
from tiny_models import tiny_llama, word_problems
from transformers import AutoModelForCausalLM, AutoTokenizer

pytestmark = [pytest.mark.torch, pytest.mark.slow, pytest.mark.timeout(600)]  # two workers import torch
SECONDS = 300.0  # a bound, not an expectation


def site(folder: Path, rank: int, model: Path, address: str, data: dict[str, Any]) -> Path:
    """The worker.toml of a worker that is not running yet; it is called what its folder is called."""
    folder.mkdir()
    records: list[Any] = word_problems(40, seed=rank)
    if data.get("format") == "messages":
        records = [{"messages": turns(record)} for record in records]
    train, file = folder / "train.jsonl", folder / "worker.toml"
    train.write_text("".join(json.dumps(record) + "\n" for record in records))
    settings: dict[str, Any] = {
        "name": folder.name,
        "rank": rank,
        "threads": 1,
        "state_dir": str(folder / "state"),
        "coordinator": {"address": address},
        "model": {"path": str(model), "device": "cpu", "offline": True},
        "data": {"train": str(train), "max_length": 128, **data},
    }
    file.write_text(to_toml(settings))
    return file


def turns(row: dict[str, str]) -> list[dict[str, str]]:
    return [{"role": "user", "content": row["question"]}, {"role": "assistant", "content": row["answer"]}]


@asynccontextmanager
async def working(*files: Path) -> AsyncIterator[None]:
    """A real `raflora worker` for each file; none is left behind."""
    processes = []
    for file in files:
        with file.with_name("log").open("wb") as log:
            started = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "cli.main", "worker", "--config", str(file)), stdout=log, stderr=log
            )
        processes.append(started)
    try:
        yield
    finally:
        for process in processes:
            if process.returncode is None:
                process.terminate()
        await asyncio.gather(*(asyncio.wait_for(process.wait(), SECONDS) for process in processes))


@pytest.mark.parametrize("kind", ["instructions", "chat"])
async def test_two_workers_of_unequal_rank_teach_a_language_model(tmp_path: Path, kind: str) -> None:
    model = tiny_llama(tmp_path / "llama", chat_template=kind == "chat")
    columns = {"prompt_column": "question", "response_column": "answer", "prompt_template": "Q: {prompt}\nA: "}
    # In the chat federation one site has messages and the other questions and answers, which are the same turns.
    ada: dict[str, Any] = {"format": "messages"} if kind == "chat" else {**columns, "packing": True}
    bob = {**columns, "chat": True, "prompt_template": "{prompt}"} if kind == "chat" else columns
    config = config_of(
        tmp_path / "coordinator",
        model={"base_model": "tiny-llama", "task": "causal-lm"},
        adapter={"target_modules": ["all-linear"], "global_rank": 4},
        rounds={"num_rounds": 2, "min_clients": 2, "evaluate_every": 1, "seed": 3},
        training={"learning_rate": 2e-2, "local_steps": 15, "batch_size": 8},
    )
    async with serving(config) as address, observing(address) as observer:
        files = [
            site(tmp_path / "ada", 4, model, address, ada),
            site(tmp_path / "bob", 2, model, address, bob),
        ]
        async with working(*files):
            answers = observer.status.WatchStatus(status_pb2.WatchStatusRequest(), timeout=SECONDS)
            phases = [answer.status.phase async for answer in answers]
        assert phases[-1] == status_pb2.PHASE_FINISHED, [file.with_name("log").read_text()[-2000:] for file in files]
        rounds = (await observer.status.ListRounds(status_pb2.ListRoundsRequest())).rounds
        clients = (await observer.status.ListClients(status_pb2.ListClientsRequest())).clients
        export = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "cli.main", "export", str(tmp_path / "exported"), "--coordinator", address)
        )
        assert await asyncio.wait_for(export.wait(), SECONDS) == 0
    # Records are the weight, also of a site that packs several into one sequence.
    joined = {client.client_id: client.num_examples for client in clients}
    assert all({c.client_id: c.num_examples for c in summary.contributions} == joined for summary in rounds)
    assert len(set(joined.values())) == 1  # both sites were given as many
    losses = [{e.client_id: e.metrics["eval_loss"] for e in summary.evaluations} for summary in rounds]
    assert losses[0].keys() == losses[1].keys() == {"ada", "bob"}
    untrained = torch.log(torch.tensor(400.0))  # of a model that thinks all tokens equally likely
    assert all(losses[1][name] < losses[0][name] < untrained for name in losses[0])

    tokenizer = AutoTokenizer.from_pretrained(model)
    ids = tokenizer("Q: Ada has 3 apples", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        before = AutoModelForCausalLM.from_pretrained(model)(input_ids=ids).logits
        adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), str(tmp_path / "exported"))
        assert not torch.allclose(adapted(input_ids=ids).logits, before, atol=1e-3)
