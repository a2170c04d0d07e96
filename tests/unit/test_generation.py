"""What a language model says and finds likely, against one forward pass a token of the same tiny model."""

import copy
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import LLAMA_ORDER, LLAMA_VOCABULARY, random_adapter, save_bpe, tiny_llama
from transformers import GPT2Config, GPT2LMHeadModel

from worker.config import ModelConfig
from worker.trainer.generation import Prompted, Writer, generate, log_likelihoods
from worker.trainer.model import AdaptedModel, load_model, write_adapter
from worker.trainer.task import longest_input, tokenizer_in

pytestmark = pytest.mark.torch

PROMPTS = [[0, 17, 40, 9], [0, 5], [0, 100, 101, 102, 103, 104, 105], [0, 17, 40, 8]]


def tiny_gpt2(folder: Path) -> Path:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=LLAMA_VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=0, eos_token_id=1
    )
    GPT2LMHeadModel(config).save_pretrained(folder)
    save_bpe(folder)
    return folder


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> AdaptedModel:
    folder = tmp_path_factory.mktemp(request.param)
    llama = request.param == "llama"
    folder = tiny_llama(folder, longest=64) if llama else tiny_gpt2(folder)
    # GPT-2's positions are learnt numbers of their own: padding on the left must not move them.
    order = LLAMA_ORDER if llama else replace(LLAMA_ORDER, target_modules=("c_attn",))
    loaded = load_model(ModelConfig(path=str(folder), device="cpu", offline=True), order)
    write_adapter(loaded, random_adapter(loaded.spec, 4), scaling=0.5)
    return loaded


@pytest.fixture(scope="module")
def tokenizer(model: AdaptedModel) -> Any:
    return tokenizer_in(model.folder)


def next_scores(model: AdaptedModel, tokens: Sequence[int]) -> torch.Tensor:
    model.live.eval()
    with torch.no_grad():
        return torch.log_softmax(model.base(input_ids=torch.tensor([list(tokens)])).logits[0], dim=-1)


def greedy(model: AdaptedModel, prompt: Sequence[int], count: int, end: int = 1) -> list[int]:
    tokens = list(prompt)
    while len(tokens) < len(prompt) + count:
        following = int(next_scores(model, tokens)[-1].argmax())
        if following == end:
            break
        tokens.append(following)
    return tokens[len(prompt) :]


def said(
    model: AdaptedModel, tokenizer: Any, *, batch: int = 2, count: int = 6, ends: Sequence[int] = (1,)
) -> list[str]:
    writer = Writer(tokenizer, count, ends)
    return generate(model, PROMPTS, writer=writer, batch=batch, report=lambda *_: None)


@pytest.mark.parametrize("batch", [1, 2, 4])
def test_each_prompt_gets_the_likeliest_tokens_whatever_is_beside_it(
    model: AdaptedModel, tokenizer: Any, batch: int
) -> None:
    expected = [tokenizer.decode(greedy(model, prompt, 6), skip_special_tokens=True) for prompt in PROMPTS]
    assert said(model, tokenizer, batch=batch) == expected
    assert len(set(expected)) > 1, "the prompts must matter, or nothing is shown"


def test_an_answer_ends_where_training_ends_it_or_the_checkpoint(
    model: AdaptedModel, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = greedy(model, PROMPTS[0], 6)
    end = next(token for token in whole[1:] if token != whole[0])
    cut = tokenizer.decode(whole[: whole.index(end)], skip_special_tokens=True)
    assert said(model, tokenizer, ends=(1, end))[0] == cut
    monkeypatch.setattr(model.base.generation_config, "eos_token_id", [1, end])
    assert said(model, tokenizer)[0] == cut


def test_what_the_checkpoint_says_of_sampling_and_penalties_counts_for_nothing(
    model: AdaptedModel, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = said(model, tokenizer)
    own = copy.deepcopy(model.base.generation_config)
    own.update(do_sample=True, temperature=5.0, top_k=3, repetition_penalty=9.0, num_beams=3)
    monkeypatch.setattr(model.base, "generation_config", own)
    assert said(model, tokenizer) == expected
    assert model.base.generation_config is own


def test_of_a_prompt_that_leaves_no_room_the_end_counts(model: AdaptedModel, tokenizer: Any) -> None:
    long = [0, *range(60, 160)]
    assert longest_input(model.base) == 64
    (text,) = generate(model, [long], writer=Writer(tokenizer, 4, (1,)), batch=1, report=lambda *_: None)
    assert text == tokenizer.decode(greedy(model, long[-60:], 4), skip_special_tokens=True)


def test_every_token_is_heard_and_what_is_raised_ends_it(model: AdaptedModel, tokenizer: Any) -> None:
    class Enough(Exception):
        pass

    heard: list[tuple[int, int]] = []

    def report(done: int, total: int, _: float) -> None:
        heard.append((done, total))
        if len(heard) == 3:
            raise Enough

    model.live.train()
    settings = model.base.generation_config
    with pytest.raises(Enough):
        generate(model, PROMPTS, writer=Writer(tokenizer, 6, (1,)), batch=4, report=report)
    assert heard == [(0, 1)] * 3, "in the midst of the first batch"
    assert model.base.generation_config is settings
    assert all(module.training for module in model.live.modules())
    assert torch.is_grad_enabled()


def test_a_batch_is_reported_when_it_is_done(model: AdaptedModel, tokenizer: Any) -> None:
    heard: list[tuple[int, int]] = []
    generate(
        model,
        PROMPTS,
        writer=Writer(tokenizer, 2, (1,)),
        batch=3,
        report=lambda done, total, _: heard.append((done, total)),
    )
    assert list(dict.fromkeys(heard)) == [(0, 2), (1, 2), (2, 2)]


def test_modes_that_differ_by_layer_are_all_as_they_were(model: AdaptedModel, tokenizer: Any) -> None:
    model.live.train()
    odd = next(module for name, module in model.base.named_modules() if name.endswith("q_proj") or "attn" in name)
    odd.eval()
    before = [module.training for module in model.live.modules()]
    said(model, tokenizer, count=1)
    log_likelihoods(model, [Prompted([0], [5])], batch=1, report=lambda *_: None)
    assert [module.training for module in model.live.modules()] == before
    assert not all(before)


@pytest.mark.parametrize("batch", [1, 3])
def test_the_likelihood_of_an_answer_is_that_of_its_tokens_one_by_one(model: AdaptedModel, batch: int) -> None:
    given = [
        Prompted(prompt, answer) for prompt, answer in zip(PROMPTS, ([7], [8, 9, 10], [7, 7], [50] * 9), strict=True)
    ]
    expected = []
    for one in given:
        scores = next_scores(model, [*one.prompt, *one.answer])
        start = len(one.prompt) - 1
        expected.append(sum(float(scores[start + place, token]) for place, token in enumerate(one.answer)))
    found = log_likelihoods(model, given, batch=batch, report=lambda *_: None)
    assert found == pytest.approx(expected, rel=1e-4)


def test_of_a_text_that_is_too_long_the_answer_is_kept(model: AdaptedModel) -> None:
    prompt, answer = [0, *range(60, 160)], [7, 8]
    (found,) = log_likelihoods(model, [Prompted(prompt, answer)], batch=1, report=lambda *_: None)
    scores = next_scores(model, [*prompt, *answer][-64:])
    assert found == pytest.approx(float(scores[-3, 7] + scores[-2, 8]), rel=1e-4)
