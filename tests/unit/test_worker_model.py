"""The base model and its live adapter: real transformers models, tiny, with random weights."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from structlog.testing import capture_logs
from tiny_models import BERT_ORDER, MOODS, SIDES, VIT_ORDER, random_adapter, same, save_bert, save_vit
from transformers import (
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    RobertaConfig,
    RobertaForMaskedLM,
)

from common.adapter import Adapter, Factors, initial_adapter, slice_adapter
from common.errors import AdapterMismatch, InvalidRequest
from worker.config import DataConfig, ModelConfig
from worker.peft_format import CONFIG_FILE, write_peft_folder
from worker.trainer.base_model import digest_of_weights
from worker.trainer.model import AdaptedModel, describe_model, load_model, read_adapter, write_adapter
from worker.trainer.task import ModelError
from worker.trainer_protocol import ModelOrder

pytestmark = pytest.mark.torch

TOKENS = torch.tensor([[2, 3, 4, 5], [6, 7, 8, 9]])


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_vit(tmp_path_factory.mktemp("vit"))


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_bert(tmp_path_factory.mktemp("bert"))


def load(folder: Path, order: ModelOrder, **changes: Any) -> AdaptedModel:
    config = ModelConfig(path=str(folder), device="cpu", offline=True)
    return load_model(config, dataclasses.replace(order, **changes))


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = model.eval()(input_ids=TOKENS).logits
    return found


def test_the_spec_names_the_adapted_layers_and_the_trained_head(bert: Path) -> None:
    spec = load(bert, BERT_ORDER).spec
    assert [(m.name, m.out_features, m.in_features) for m in spec.modules] == [
        ("bert.encoder.layer.0.attention.self.query", 16, 16),
        ("bert.encoder.layer.0.attention.self.value", 16, 16),
    ]
    assert [(t.name, t.shape) for t in spec.tensors] == [("classifier.bias", (3,)), ("classifier.weight", (3, 16))]


def test_the_spec_does_not_depend_on_the_rank(bert: Path) -> None:
    assert load(bert, BERT_ORDER, lora_rank=2).spec == load(bert, BERT_ORDER, lora_rank=8).spec


def test_all_linear_takes_every_linear_layer_but_the_head(vit: Path) -> None:
    names = {
        m.name.removeprefix("vit.layers.0.") for m in load(vit, VIT_ORDER, target_modules=("all-linear",)).spec.modules
    }
    assert names == {"mlp.fc1", "mlp.fc2"} | {f"attention.{part}_proj" for part in "qkvo"}


def test_describing_a_model_gives_its_spec_and_the_digest_of_its_weights(vit: Path) -> None:
    spec, digest = describe_model(ModelConfig(path=str(vit)), VIT_ORDER)
    assert (spec, digest) == (load(vit, VIT_ORDER).spec, digest_of_weights(vit))


@pytest.mark.parametrize("rank", [1, 4, 16])
@pytest.mark.parametrize("scaling", [1.0, 0.25])
def test_what_is_written_is_read_back_at_any_rank(bert: Path, rank: int, scaling: float) -> None:
    model = load(bert, BERT_ORDER)
    adapter = random_adapter(model.spec, rank)
    write_adapter(model, adapter, scaling=scaling)
    assert same(read_adapter(model), adapter)


def test_an_adapter_that_was_read_does_not_change_with_the_model(bert: Path) -> None:
    model = load(bert, BERT_ORDER)
    first = random_adapter(model.spec, 4, seed=1)
    write_adapter(model, first, scaling=1.0)
    kept = read_adapter(model)
    write_adapter(model, random_adapter(model.spec, 4, seed=2), scaling=1.0)
    assert same(kept, first)


def test_a_new_rank_keeps_the_model_trainable_in_the_same_places(bert: Path) -> None:
    model = load(bert, BERT_ORDER)

    def trained() -> set[str]:
        named = {name for name, parameter in model.live.named_parameters() if parameter.requires_grad}
        return {name.replace(f".{model.adapter_name}.", ".") for name in named}

    before = trained()
    for rank in (2, 8, 4):
        write_adapter(model, random_adapter(model.spec, rank), scaling=1.0)
        assert trained() == before
    assert len(before) == 2 * 2 + 2  # two factors for two layers, and the head


def test_the_model_computes_scaling_times_the_factors_and_the_head(bert: Path) -> None:
    model = load(bert, BERT_ORDER)
    adapter = random_adapter(model.spec, 4)
    write_adapter(model, adapter, scaling=0.5)
    adapted = logits(model.live)
    plain = AutoModelForSequenceClassification.from_pretrained(bert, num_labels=3)
    with torch.no_grad():
        for name, factors in adapter.modules.items():
            plain.get_submodule(name).weight += torch.from_numpy(0.5 * factors.lora_B @ factors.lora_A)
        for name, tensor in adapter.tensors.items():
            plain.get_parameter(name).copy_(torch.from_numpy(np.array(tensor)))
    torch.testing.assert_close(adapted, logits(plain), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("rank", [2, 4])
def test_stock_peft_loads_the_exported_folder_and_says_the_same(bert: Path, tmp_path: Path, rank: int) -> None:
    model = load(bert, BERT_ORDER)
    adapter = random_adapter(model.spec, rank)
    write_adapter(model, adapter, scaling=0.5)
    write_peft_folder(
        tmp_path,
        adapter,
        scaling=0.5,
        base_model=str(bert),
        task=BERT_ORDER.task,
        modules_to_save=model.modules_to_save,
    )
    base = AutoModelForSequenceClassification.from_pretrained(bert)
    stock = PeftModel.from_pretrained(base, tmp_path)
    torch.testing.assert_close(logits(stock), logits(model.live), atol=0, rtol=0)
    assert str(bert.parent) not in (tmp_path / CONFIG_FILE).read_text()


def test_a_first_slice_leaves_the_base_model_as_it_is(vit: Path) -> None:
    model = load(vit, VIT_ORDER)
    write_adapter(model, slice_adapter(initial_adapter(model.spec, 8, seed=3), 2, scaling=1.0), scaling=1.0)
    pixels = torch.zeros(1, 1, 8, 8)
    with torch.inference_mode(), model.live.disable_adapter():
        bare = model.live.eval()(pixel_values=pixels).logits
    with torch.inference_mode():
        torch.testing.assert_close(model.live(pixel_values=pixels).logits, bare, atol=0, rtol=0)


def test_an_adapter_of_another_model_is_refused(bert: Path) -> None:
    model = load(bert, BERT_ORDER)
    foreign = Adapter({"elsewhere": Factors(np.ones((1, 2), np.float32), np.ones((2, 1), np.float32))}, {})
    with pytest.raises(AdapterMismatch):
        write_adapter(model, foreign, scaling=1.0)


def test_the_digest_follows_the_weights_and_nothing_else(tmp_path: Path) -> None:
    one, other = save_vit(tmp_path / "one"), save_vit(tmp_path / "other")
    (other / "README.md").write_text("a comment")
    assert digest_of_weights(one) == digest_of_weights(other)
    content = bytearray((other / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (other / "model.safetensors").write_bytes(content)
    assert digest_of_weights(one) != digest_of_weights(other)


def test_a_head_that_the_checkpoint_lacks_must_be_trained(bert: Path) -> None:
    # Five labels, but the checkpoint has values for three.
    with pytest.raises(ModelError, match=r"classifier.bias.*add \['classifier'\] to modules_to_save"):
        load(bert, BERT_ORDER, labels=tuple("abcde"), modules_to_save=())
    assert load(bert, BERT_ORDER, labels=tuple("abcde")).spec.tensors[0].shape == (5,)


def test_a_missing_head_of_several_layers_is_named_whole(tmp_path: Path) -> None:
    config = RobertaConfig(
        vocab_size=16, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8,
        max_position_embeddings=16, num_labels=3,
    )  # fmt: skip
    RobertaForMaskedLM(config).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"add \['classifier'\] to modules_to_save"):
        load(tmp_path, BERT_ORDER, modules_to_save=())


def test_a_missing_pooler_is_not_made_up_in_silence(tmp_path: Path) -> None:
    folder = save_bert(tmp_path, with_pooler=False)
    with pytest.raises(ModelError, match=r"bert.pooler.dense.*modules_to_save"):
        load(folder, BERT_ORDER)
    assert len(load(folder, BERT_ORDER, modules_to_save=("classifier", "pooler")).spec.tensors) == 4


def test_a_frozen_head_keeps_its_labels_in_its_order(vit: Path) -> None:
    with pytest.raises(ModelError, match=r"head is frozen.*left.*right"):
        load(vit, VIT_ORDER, labels=tuple(reversed(SIDES)))


def test_a_head_is_frozen_even_if_another_module_is_trained(tmp_path: Path) -> None:
    folder = save_bert(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    own = {str(number): mood for number, mood in enumerate(reversed(MOODS))}
    config |= {"id2label": own, "label2id": {mood: int(number) for number, mood in own.items()}}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"head is frozen.*neither.*sad"):
        load(folder, BERT_ORDER, modules_to_save=("pooler",))
    assert load(folder, BERT_ORDER).labels == MOODS


def test_values_of_the_checkpoint_that_the_federation_replaces_are_told(bert: Path, tmp_path: Path) -> None:
    with capture_logs() as logs:
        load(bert, BERT_ORDER)
    (told,) = [line for line in logs if line["log_level"] == "warning"]
    assert told["modules_to_save"] == ["classifier"]
    assert "from the coordinator's seed" in told["why"]
    with capture_logs() as logs:
        load(save_bert(tmp_path, with_pooler=False), BERT_ORDER, modules_to_save=("classifier", "pooler"))
    assert logs == []


@pytest.mark.parametrize(
    ("save", "missing", "order", "advice"),
    [
        (save_vit, ["preprocessor_config.json"], VIT_ORDER, "preprocessor_config.json"),
        (save_bert, ["tokenizer.json", "tokenizer_config.json"], BERT_ORDER, "put the tokenizer of the base model"),
    ],
)
def test_what_must_lie_beside_the_weights_is_named(
    tmp_path: Path, save: Any, missing: list[str], order: ModelOrder, advice: str
) -> None:
    folder = save(tmp_path)
    for name in missing:
        (folder / name).unlink()
    model = load(folder, order)
    with pytest.raises(ModelError, match=advice):
        model.task.prepare(model.folder, model.base, model.labels, DataConfig(train="-"))


def test_without_labels_the_models_own_hold(vit: Path) -> None:
    assert load(vit, VIT_ORDER, labels=()).labels == SIDES


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target_modules": ("query",)}, "no layer of this ViTForImageClassification is called so.*q_proj"),
        ({"target_modules": ("layernorm",)}, "vit.layernorm is no linear layer"),
        ({"target_modules": ()}, "at least one is needed"),
        ({"modules_to_save": ("score",)}, "no such module; at the top there are classifier, vit"),
    ],
)
def test_a_name_that_is_not_there_is_answered_with_those_that_are(
    vit: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ModelError, match=message):
        load(vit, VIT_ORDER, **changes)


def test_an_unknown_task_is_answered_with_the_known_ones(vit: Path) -> None:
    with pytest.raises(InvalidRequest, match="knows sequence-classification, image-classification"):
        load(vit, VIT_ORDER, task="poetry")


def test_weights_that_are_no_safetensors_are_not_loaded(tmp_path: Path) -> None:
    folder = save_vit(tmp_path)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match="only safetensors weights are loaded"):
        load(folder, VIT_ORDER)


def test_a_shard_outside_the_folder_is_refused(tmp_path: Path) -> None:
    folder = save_vit(tmp_path / "model")
    (folder / "model.safetensors").rename(tmp_path / "model.safetensors")
    index = {"weight_map": {"classifier.weight": "../model.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match="are missing"):
        digest_of_weights(folder)


def test_a_model_that_is_nowhere_is_a_model_error(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="neither a folder nor"):
        load(tmp_path / "nowhere", VIT_ORDER)


@pytest.mark.parametrize("device", ["cuda:99", "toaster"])
def test_a_device_that_is_not_there_is_named(vit: Path, device: str) -> None:
    with pytest.raises(ModelError, match=device):
        load_model(ModelConfig(path=str(vit), device=device), VIT_ORDER)


def test_factors_and_heads_are_trained_in_float32_whatever_the_base(bert: Path) -> None:
    model = load_model(ModelConfig(path=str(bert), dtype="bfloat16", device="cpu"), BERT_ORDER)
    write_adapter(model, random_adapter(model.spec, 2), scaling=1.0)
    kinds = {(p.requires_grad, p.dtype) for p in model.live.parameters()}
    assert kinds == {(True, torch.float32), (False, torch.bfloat16)}


def test_float16_is_widened_on_a_cpu_unless_the_site_insists(tmp_path: Path) -> None:
    folder = save_vit(tmp_path)
    AutoModelForImageClassification.from_pretrained(folder, dtype="float16").save_pretrained(folder)
    assert {p.dtype for p in load(folder, VIT_ORDER).live.parameters()} == {torch.float32}
    with pytest.raises(ModelError, match="float16 cannot be trained on a CPU"):
        load_model(ModelConfig(path=str(folder), dtype="float16", device="cpu"), VIT_ORDER)
