"""The kinds of task: the model class of each, how a row becomes an example and examples a batch, what is measured.

A new kind of task is one more class here; model, data and training know none of them by name.
"""

import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    DataCollatorWithPadding,
    EvalPrediction,
    default_data_collator,
)

from common.errors import InvalidRequest
from worker.config import DataConfig
from worker.trainer.data import ClassName, DataError, Example, ExamplesOnAccess, Prepared, Row
from worker.trainer.features import FeatureClassifier, collate_features
from worker.trainer.task import Collator, ModelError, Preparation, Task, longest_input, pad_by_end, tokenizer_in
from worker.trainer.trainers import ExactTrainer

GREY_LEVELS = 255
_DEEP_LEVELS = 65_535  # of a grey PNG with 16 bits


def task_named(name: str) -> Task:
    """The task of that name. Raises InvalidRequest that lists those there are."""
    tasks: Mapping[str, Callable[[], Task]] = {
        SequenceClassification.name: SequenceClassification,
        ImageClassification.name: ImageClassification,
        FeatureClassification.name: FeatureClassification,
        "causal-lm": _causal_language_model,
    }
    if name not in tasks:
        raise InvalidRequest(f"task {name!r}: this worker knows {', '.join(tasks)}")
    return tasks[name]()


def _causal_language_model() -> Task:
    from worker.trainer.causal import CausalLanguageModel  # noqa: PLC0415 # it loads trl, which others do not need

    return CausalLanguageModel()


class _Classification:
    """What the classification tasks share."""

    trainer_class = ExactTrainer
    evaluation_batch = 64

    def metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        """The share of examples whose largest logit is that of their label."""
        logits = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
        return {"accuracy": float(np.mean(np.argmax(logits, axis=-1) == prediction.label_ids))}


class SequenceClassification(_Classification):
    """A label for a text or a pair of texts."""

    name = "sequence-classification"
    auto_class = AutoModelForSequenceClassification

    def prepare(self, folder: Path, model: Any, labels: Sequence[str], config: DataConfig) -> Preparation:
        """Loads the tokenizer; a model without a padding token pads with its end-of-sequence token."""
        tokenizer = tokenizer_in(folder)
        pad_by_end(tokenizer, model.config)
        return _Texts(tokenizer, longest_input(model), LabelColumn(config.label_column, labels), config)


class ImageClassification(_Classification):
    """A label for an image."""

    name = "image-classification"
    auto_class = AutoModelForImageClassification

    def prepare(self, folder: Path, model: Any, labels: Sequence[str], config: DataConfig) -> Preparation:
        """Loads the image processor that lies beside the model."""
        processor = _image_processor_in(folder)
        mode = "L" if getattr(model.config, "num_channels", 3) == 1 else "RGB"
        return _Images(processor, mode, LabelColumn(config.label_column, labels), config.image_column)


class FeatureClassification(_Classification):
    """A label for the features that a frozen encoder computed once."""

    name = "feature-classification"
    auto_class = FeatureClassifier

    def prepare(self, folder: Path, model: Any, labels: Sequence[str], config: DataConfig) -> Preparation:  # noqa: ARG002
        """The model's configuration says what features look like; nothing need lie beside it."""
        shape = _FeatureShape(model.config.hidden_size, of_tokens=model.config.num_hidden_layers > 0)
        return _Features(shape, LabelColumn(config.label_column, labels), config.feature_column)


def _image_processor_in(folder: Path) -> Any:
    try:
        return AutoImageProcessor.from_pretrained(  # type: ignore[no-untyped-call]
            folder, local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        raise ModelError(
            f"{folder}: no image processor that can be loaded; put the base model's preprocessor_config.json "
            f"into it: {error}"
        ) from None


class LabelColumn:
    """A column that holds a class's number or its name.

    A name wins over a number, whether a file spells it as text or as a number: with the labels "1", "2", "3" a csv
    cell 1 and a JSON number 1 both mean the first. Names that come from a data set itself are only ever names.
    """

    def __init__(self, column: str, labels: Sequence[str]) -> None:
        self._column = column
        self._labels = tuple(labels)
        self._numbers = {label: number for number, label in enumerate(self._labels)}

    def number(self, row: Row) -> int:
        """The class's number. Raises DataError if the row holds none of the federation's."""
        value = row[self._column]
        found = self._numbers.get(value.strip()) if isinstance(value, str) else None
        if found is None and not isinstance(value, ClassName):
            number = self._as_number(value)
            found = self._numbers.get(str(number), number)
        if found is None or not 0 <= found < len(self._labels):
            shown = ", ".join(self._labels[:5]) + (", ..." if len(self._labels) > 5 else "")
            raise DataError(
                f"{row.where}: column {self._column!r} holds {value!r}, which is none of the federation's "
                f"{len(self._labels)} labels ({shown}) nor a number from 0 to "
                f"{len(self._labels) - 1}; mend the record, or the operator's model.labels"
            )
        return found

    @staticmethod
    def _as_number(value: object) -> int | None:
        if isinstance(value, bool):
            return None
        try:
            number = float(value)  # type: ignore[arg-type] # whatever a file holds; what is no number raises
        except (TypeError, ValueError):
            return None
        return int(number) if number.is_integer() else None


class _AtOnce:
    """Rows that are prepared once: their examples are small."""

    def example(self, row: Row) -> Example:
        raise NotImplementedError

    def examples(self, rows: Sequence[Row], *, is_training: bool) -> Prepared:  # noqa: ARG002
        return Prepared([self.example(row) for row in rows], len(rows))


class _Texts(_AtOnce):
    def __init__(self, tokenizer: Any, longest: int, label: LabelColumn, config: DataConfig) -> None:
        self._tokenizer = tokenizer
        self._label = label
        self._columns = [c for c in (config.text_column, config.text_pair_column) if c is not None]
        self._max_length = min(config.max_length, tokenizer.model_max_length, longest)
        self.collator: Collator = DataCollatorWithPadding(tokenizer)

    def example(self, row: Row) -> Example:
        tokens = self._tokenizer(
            *(self._text(row, column) for column in self._columns), truncation=True, max_length=self._max_length
        )
        return {**tokens, "labels": self._label.number(row)}

    @staticmethod
    def _text(row: Row, column: str) -> str:
        text = row[column]
        if not isinstance(text, str):
            raise DataError(f"{row.where}: column {column!r} holds {text!r:.60}; a text is expected")
        if not text.strip():
            raise DataError(f"{row.where}: column {column!r} is empty; fill it or remove the record")
        return text


class _Images:
    def __init__(self, processor: Any, mode: str, label: LabelColumn, column: str) -> None:
        self._processor = processor
        self._mode = mode
        self._label = label
        self._column = column
        self.collator: Collator = default_data_collator

    def examples(self, rows: Sequence[Row], *, is_training: bool) -> Prepared:  # noqa: ARG002
        # As pixels a large data set fits into no memory; its files do.
        return Prepared(ExamplesOnAccess(rows, check=self._check, prepare=self.example), len(rows))

    def _check(self, row: Row) -> None:
        self._label.number(row)
        self._image(row, is_decoded=False)

    def example(self, row: Row) -> Example:
        # Cameras write how they were held beside the pixels; people see the image turned.
        image = ImageOps.exif_transpose(self._image(row)).convert(self._mode)
        pixels = self._processor(images=image, return_tensors="pt")["pixel_values"][0]
        return {"pixel_values": pixels, "labels": self._label.number(row)}

    def _image(self, row: Row, *, is_decoded: bool = True) -> Image.Image:
        value = row[self._column]
        where = f"{row.where}: column {self._column!r}"
        if isinstance(value, Mapping):  # the Image feature of data sets: bytes, or else a path
            value = value.get("bytes") or value.get("path")
        if isinstance(value, bytes):
            return _opened(io.BytesIO(value), where, is_decoded=is_decoded)
        if isinstance(value, str):
            with _file(row.folder / value, where) as file:
                return _opened(file, where, is_decoded=is_decoded)
        return _from_rows(value, where)


@dataclass(frozen=True)
class _FeatureShape:
    width: int
    of_tokens: bool

    def __str__(self) -> str:
        return f"rows of {self.width} numbers, one a token," if self.of_tokens else f"{self.width} numbers"


class _Features(_AtOnce):
    def __init__(self, shape: _FeatureShape, label: LabelColumn, column: str) -> None:
        self._shape = shape
        self._label = label
        self._column = column
        self.collator: Collator = collate_features

    def example(self, row: Row) -> Example:
        return {"features": self._numbers(row), "labels": self._label.number(row)}

    def _numbers(self, row: Row) -> np.ndarray[Any, np.dtype[np.float32]]:
        value = row[self._column]
        where = f"{row.where}: column {self._column!r}"
        try:
            with np.errstate(over="ignore"):  # infinity is looked for below
                numbers = np.asarray(value, dtype=np.float32)
        except (TypeError, ValueError, OverflowError):
            numbers = np.empty(0, dtype=np.float32)
        axes = 2 if self._shape.of_tokens else 1
        if isinstance(value, str) or numbers.ndim != axes or not numbers.size or numbers.shape[-1] != self._shape.width:
            raise DataError(f"{where} holds {value!r:.60}; {self._shape} are expected")
        if not np.isfinite(numbers).all():
            raise DataError(f"{where} holds numbers that are not finite")
        return numbers


@contextmanager
def _file(path: Path, where: str) -> Iterator[BinaryIO]:
    try:
        with path.open("rb") as file:
            yield file
    except OSError as error:
        raise DataError(f"{where} names the image {path}, which cannot be read: {error.strerror}") from None


def _opened(file: BinaryIO, where: str, *, is_decoded: bool) -> Image.Image:
    """The image; undecoded, only its header was read."""
    try:
        # Two formats on purpose: fewer decoders stand open to a file from outside.
        image = Image.open(file, formats=("PNG", "JPEG"))
        if not is_decoded:
            return image
        image.load()
    except (UnidentifiedImageError, OSError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"{where} is no PNG or JPEG that can be decoded: {error}") from None
    return _in_eight_bits(image)


def _in_eight_bits(image: Image.Image) -> Image.Image:
    """The image itself, or one of 16 bits scaled down; Pillow's own conversion would cut it off at 255."""
    if not image.mode.startswith("I"):  # "I;16": grey of 16 bits, which no JPEG has
        return image
    levels = np.asarray(image, dtype=np.float64)
    return Image.fromarray(np.round(levels * (GREY_LEVELS / _DEEP_LEVELS)).astype(np.uint8))


def _from_rows(value: object, where: str) -> Image.Image:
    try:
        grey = np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError):
        grey = np.empty(0)
    if grey.ndim != 2 or grey.size == 0:
        raise DataError(f"{where} holds {value!r:.60}; PNG or JPEG bytes, a path or rows of grey values are expected")
    if not np.all((grey >= 0) & (grey <= GREY_LEVELS) & (grey == np.round(grey))):
        raise DataError(f"{where} holds grey values that are not whole numbers from 0 to {GREY_LEVELS}")
    return Image.fromarray(grey.astype(np.uint8))
