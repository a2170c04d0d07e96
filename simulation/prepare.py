"""What an experiment trains on, made ready: the base model's folder, the examples, and how batches are made of them.

Examples go through the same preparation as a worker's own data; with a class-name head the frozen part of the
encoder has run over every text before. Nothing here trains, divides data or draws anything.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import ValidationError
from transformers import AutoConfig

from common.errors import ConfigError
from simulation import digits
from simulation.contents import CONTENTS_FILE, Contents, claim_contents, digest_of_examples
from simulation.encoder import MINILM, Features, Told, features_of, load_encoder, minilm_folder, write_base
from simulation.experiment import DataSection, ExperimentConfig, ModelSection
from simulation.text_data import DIGITS, Corpus, DataPlace, read_test, read_train
from worker.config import DataConfig, ModelConfig
from worker.trainer.base_model import device_of, digest_of_weights, resolve_folder
from worker.trainer.data import Example
from worker.trainer.features import PROJECTION, collate_features
from worker.trainer.model import AdaptedModel
from worker.trainer.task import Collator, ModelError, Task
from worker.trainer.tasks import FeatureClassification, task_named
from worker.trainer_protocol import ModelOrder

TEXT_TASK = "sequence-classification"


class FeatureExamples(Sequence[Example]):
    """Features with labels; each example is made when it is asked for, so that the features stay on the disk."""

    def __init__(self, features: Features, labels: NDArray[np.int64]) -> None:
        self._features = features
        self._labels: list[int] = labels.tolist()

    def __len__(self) -> int:
        return len(self._labels)

    @overload
    def __getitem__(self, index: int) -> Example: ...

    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...

    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        """What the collator takes."""
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        number = range(len(self))[index]
        return {"features": self._features[number], "labels": self._labels[number]}


@dataclass(frozen=True)
class Files:
    """Where an experiment's files lie."""

    experiment_folder: Path  # that of the experiment's own file
    cache_dir: Path  # of features; experiments may share it
    base_folder: Path  # of the base model that a class-name head makes, and of the digests of what was read


@dataclass(frozen=True)
class Prepared:
    """Everything about model and data that does not depend on a seed or a method."""

    model_config: ModelConfig
    task: str
    labels: tuple[str, ...]
    target_modules: tuple[str, ...]
    modules_to_save: tuple[str, ...]
    train_examples: Sequence[Example]
    train_labels: NDArray[np.int64]
    train_groups: tuple[str, ...] | None
    test_examples: Sequence[Example]
    test_labels: NDArray[np.int64]
    contents: Contents
    collator_for: Callable[[AdaptedModel], Collator]  # of the model that `load_model` made of config and order

    def order(self, *, lora_rank: int, seed: int) -> ModelOrder:
        """The other half of what `load_model` takes."""
        return ModelOrder(
            task=self.task,
            labels=self.labels,
            target_modules=self.target_modules,
            modules_to_save=self.modules_to_save,
            lora_rank=lora_rank,
            seed=seed,
        )


def prepare(experiment: ExperimentConfig, files: Files, progress: Told) -> Prepared:
    """Reads and prepares all examples; with a class-name head also writes the base model.

    `progress` is told of texts that are encoded, which happens once: the cache keeps what was computed.
    Raises ConfigError, also if earlier results here are of other data or another base model; ModelError or DataError.
    """
    _check(experiment)
    place = DataPlace(experiment.data, files.experiment_folder)
    offline = experiment.model.offline
    corpora = read_train(place, experiment.clients, offline=offline), read_test(place, offline=offline)
    source = _source(experiment.model, files.experiment_folder)
    if experiment.model.class_name_head:
        return _with_class_name_head(experiment, source, corpora, files, progress)
    return _plain(experiment, source, corpora, files)


def _check(experiment: ExperimentConfig) -> None:
    """Raises ConfigError for settings that do not go together."""
    model, data = experiment.model, experiment.data
    if model.trained_layers and not model.class_name_head:
        raise ConfigError("model.trained_layers is for class_name_head = true")
    if model.class_name_head and model.task != TEXT_TASK:
        raise ConfigError(f"model.class_name_head is for task {TEXT_TASK!r}, not {model.task!r}")
    if model.class_name_head and model.modules_to_save:
        raise ConfigError(f"model.modules_to_save {list(model.modules_to_save)}: a class-name head stays frozen")
    if data.train == DIGITS and model.task == TEXT_TASK:
        raise ConfigError(f"data.train {DIGITS!r} holds images, but model.task is {TEXT_TASK!r}")


def _source(model: ModelSection, experiment_folder: Path) -> ModelConfig:
    """Where the model that the settings name comes from."""
    inside = experiment_folder / Path(model.path).expanduser()
    if model.path == MINILM:
        path = minilm_folder()
    elif model.path == DIGITS:
        path = digits.BASE_FOLDER
    else:
        path = inside if inside.is_dir() else Path(model.path)
    return ModelConfig(path=str(path), revision=model.revision, device=model.device, offline=model.offline)


def _with_class_name_head(
    experiment: ExperimentConfig, source: ModelConfig, corpora: tuple[Corpus, Corpus], files: Files, progress: Told
) -> Prepared:
    train, test = corpora
    trained_layers, folder = experiment.model.trained_layers, resolve_folder(source)
    # The texts, not what is made of them: that may be gigabytes, and follows from the texts and the encoder.
    train_texts, test_texts = (_labelled_texts(corpus, experiment.data.text_column) for corpus in corpora)
    contents = _claimed(files, train, (train_texts, test_texts), folder)
    encoder = load_encoder(
        folder,
        trained_layers=trained_layers,
        max_length=experiment.data.max_length,
        device=device_of(source),
    )
    write_base(encoder, train.class_names, files.base_folder)

    def examples(corpus: Corpus, already: int) -> FeatureExamples:
        texts = corpus.texts(experiment.data.text_column)
        told: Told = lambda done, _: progress(already + done, len(train) + len(test))  # noqa: E731
        return FeatureExamples(features_of(encoder, texts, files.cache_dir, told), corpus.labels)

    return Prepared(
        model_config=ModelConfig(path=str(files.base_folder), device=source.device, offline=True),
        task=FeatureClassification.name,
        labels=train.class_names,
        target_modules=experiment.model.target_modules if trained_layers else (PROJECTION,),
        modules_to_save=(),
        train_examples=examples(train, 0),
        train_labels=train.labels,
        train_groups=train.groups,
        test_examples=examples(test, len(train)),
        test_labels=test.labels,
        contents=contents,
        collator_for=lambda _: collate_features,
    )


def _plain(experiment: ExperimentConfig, source: ModelConfig, corpora: tuple[Corpus, Corpus], files: Files) -> Prepared:
    """A whole model of transformers: what a worker with these rows would have."""
    train, test = corpora
    task = task_named(experiment.model.task)
    folder = resolve_folder(source)
    config = _data_config(experiment.data)
    # Only its shape is asked when rows are prepared; the weights are loaded by who trains them.
    shape = _model_shape(folder, task)
    preparation = task.prepare(folder, shape, train.class_names, config)
    train_examples, test_examples = ([preparation.example(row) for row in corpus.rows] for corpus in corpora)
    return Prepared(
        model_config=source,
        task=task.name,
        labels=train.class_names,
        target_modules=experiment.model.target_modules,
        modules_to_save=experiment.model.modules_to_save,
        train_examples=train_examples,
        train_labels=train.labels,
        train_groups=train.groups,
        test_examples=test_examples,
        test_labels=test.labels,
        contents=_claimed(files, train, (train_examples, test_examples), folder),
        collator_for=lambda model: task.prepare(model.folder, model.base, model.labels, config).collator,
    )


def _labelled_texts(corpus: Corpus, column: str) -> list[Mapping[str, Any]]:
    pairs = zip(corpus.texts(column), corpus.labels.tolist(), strict=True)
    return [{"text": text, "label": label} for text, label in pairs]


def _claimed(
    files: Files, train: Corpus, examples: tuple[Iterable[Mapping[str, Any]], Iterable[Mapping[str, Any]]], model: Path
) -> Contents:
    """The contents, held against those of earlier runs in this results folder."""
    about: Mapping[str, Any] = {"classes": list(train.class_names), "groups": list(train.groups or ())}
    contents = Contents(
        train_examples=digest_of_examples(chain([about], examples[0])),
        test_examples=digest_of_examples(examples[1]),
        base_model=digest_of_weights(model),
    )
    claim_contents(files.base_folder / CONTENTS_FILE, contents)
    return contents


def _data_config(data: DataSection) -> DataConfig:
    try:
        return DataConfig(
            train=data.train,
            text_column=data.text_column,
            image_column=data.image_column,
            label_column=data.label_column,
            max_length=data.max_length,
        )
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise ConfigError(f"data.{first['loc'][0]}: {first['msg']}, found {first['input']!r}") from None


def _model_shape(folder: Path, task: Task) -> Any:
    """The model without its weights."""
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        with torch.device("meta"):
            return task.auto_class.from_config(config)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"{folder}: its config.json cannot be used: {error}") from None
