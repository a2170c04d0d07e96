"""From the federation's words to the full names of layers, and what the words cannot mean."""

from typing import Any

import pytest
import torch
import transformers
from transformers import GPT2Config, LlamaConfig, MixtralConfig

from worker.trainer.targets import _matching, layers_of_the_base, resolve_targets
from worker.trainer.task import ModelError
from worker.trainer_protocol import ModelOrder

pytestmark = pytest.mark.torch

SMALL: Any = {
    "vocab_size": 16,
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "pad_token_id": 0,
}


def sketched(config: Any) -> Any:
    """The model's layers without their weights."""
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]


@pytest.fixture(scope="module")
def llama() -> Any:
    return sketched(LlamaConfig(num_hidden_layers=12, **SMALL))


@pytest.fixture(scope="module")
def mixtral() -> Any:
    return sketched(MixtralConfig(num_hidden_layers=1, num_local_experts=2, **SMALL))


def resolved(base: Any, *targets: str, modules_to_save: tuple[str, ...] = ()) -> list[str]:
    order = ModelOrder("causal-lm", (), targets, modules_to_save, 4, seed=1)
    return [name.removeprefix("model.layers.") for name in resolve_targets(base, order)]


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ("model.layers.1?.self_attn.q_proj", ["10.self_attn.q_proj", "11.self_attn.q_proj"]),
        ("layers.1?.self_attn.q_proj", ["10.self_attn.q_proj", "11.self_attn.q_proj"]),
        ("1?.self_attn.q_proj", ["10.self_attn.q_proj", "11.self_attn.q_proj"]),
        ("layers.0.mlp.*", ["0.mlp.down_proj", "0.mlp.gate_proj", "0.mlp.up_proj"]),
        ("layers.0.*.?_proj", [f"0.self_attn.{letter}_proj" for letter in "koqv"]),
        ("model.layers.3.mlp.up_proj", ["3.mlp.up_proj"]),
        ("3.mlp.up_proj", ["3.mlp.up_proj"]),
    ],
)
def test_a_pattern_stands_for_whole_names_and_their_ends(llama: Any, target: str, expected: list[str]) -> None:
    assert resolved(llama, target) == expected


def test_a_pattern_takes_only_linear_layers_of_the_base(llama: Any) -> None:
    every = sorted(name.removeprefix("model.layers.") for name in layers_of_the_base(llama))
    assert len(every) == 12 * 7
    assert resolved(llama, "*") == resolved(llama, "*_proj") == every  # no norm, no embedding, no head
    with pytest.raises(ModelError, match=r"'lm_\?ead'.*no linear layer of the base.*called so.*end in down_proj"):
        resolved(llama, "lm_?ead")
    assert resolved(llama, "lm_head") == ["lm_head"], "by its name the head is meant"


def test_a_pattern_leaves_alone_what_is_trained_whole(llama: Any) -> None:
    assert "0.mlp.up_proj" not in resolved(llama, "*", modules_to_save=("layers.0.mlp",))


@pytest.mark.parametrize(
    "target",
    [
        "*proj*q",  # matches nothing
        "q_proj*x",
        "Layers.0.mlp.*",  # in another case
        "proj",  # a part of a name's last part
        "1.self_attn.q",
    ],
)
def test_what_matches_nothing_is_answered_with_the_names_there_are(llama: Any, target: str) -> None:
    with pytest.raises(
        ModelError, match="LlamaForCausalLM is called so; linear layers here end in down_proj, gate"
    ) as no:
        resolved(llama, target)
    assert "lm_head" not in str(no.value), "LoRA on a language model's head is not trained"


@pytest.mark.parametrize(
    ("target", "reason"),
    [
        ("embed_tokens", "model.embed_tokens is no linear layer but a Embedding, and only the factors of a matrix"),
        ("norm", "model.norm is no linear layer but a LlamaRMSNorm"),
        ("layers.0.mlp", r"no linear layer but a LlamaMLP; name layers inside it.*model.layers.0.mlp.gate_proj"),
    ],
)
def test_what_is_no_linear_layer_is_refused_with_the_reason(llama: Any, target: str, reason: str) -> None:
    with pytest.raises(ModelError, match=reason):
        resolved(llama, target)


@pytest.mark.parametrize("target", ["gate_up_proj", "experts.down_proj"])
def test_experts_in_one_tensor_are_refused_with_the_reason(mixtral: Any, target: str) -> None:
    with pytest.raises(ModelError, match=r"experts\.\w+ of this MixtralForCausalLM is a tensor, not a linear layer"):
        resolved(mixtral, target)
    assert resolved(mixtral, "q_proj") == ["0.self_attn.q_proj"]


def test_conv1d_is_a_linear_layer() -> None:
    gpt2 = sketched(GPT2Config(vocab_size=16, n_embd=8, n_layer=1, n_head=2, bos_token_id=1, eos_token_id=2))
    ends = [name.removeprefix("transformer.h.0.") for name in resolved(gpt2, "all-linear")]
    assert ends == ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]


def test_a_hostile_pattern_costs_linear_time() -> None:
    # A pattern that a backtracking match would try in about 10^40 ways; it ends, or the test's own limit ends it.
    hostile = "*a" * 99 + "?b"
    names = ["a" * 200] * 100
    assert _matching(hostile, names) == set()
    assert _matching("*a" * 99, names) == {"a" * 200}
