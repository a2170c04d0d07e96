"""Writes the folder of a CIFAR-100 federation: data and settings of the sites; with --tiny all of it for a CPU.

    python prepare.py OUT [--alpha 0.5] [--tiny]

The data set is fetched from the hub (uoft-cs/cifar100) and divided among five sites: of each class the shares are drawn
from Dirichlet(alpha), so that every site sees other classes often. With --tiny ten classes of made-up images (a colour
and stripes of a direction) stand in for it, and a ViT with random weights for the model.
"""

import argparse
import io
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow
from PIL import Image
from pyarrow import parquet

from simulation.partition import dirichlet_partition

HERE = Path(__file__).resolve().parent
RANKS, TINY_RANKS = (8, 16, 32, 48, 64), (2, 4, 8, 12, 16)
SEED = 0
TINY_SIZE, TINY_TRAIN, TINY_TEST = 16, 800, 200
COLOURS = {
    "red": (200, 40, 40),
    "green": (40, 180, 60),
    "blue": (50, 70, 210),
    "yellow": (220, 200, 40),
    "grey": (128,) * 3,
}
STRIPES = ("upright", "level")
TINY_CLASSES = tuple(f"{colour} {stripes}" for colour in COLOURS for stripes in STRIPES)

Data = tuple[list[bytes], list[int]]  # PNG, class


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes the folder and says how to go on."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="a new folder")
    parser.add_argument("--alpha", type=float, default=0.5, help="of the division; small: few classes a site")
    parser.add_argument("--tiny", action="store_true", help="made-up images and a random model, for a CPU")
    given = parser.parse_args(arguments)
    out: Path = given.out
    if out.exists():
        parser.error(f"{out} exists already; name a new folder")
    names, train, test = _tiny_data() if given.tiny else _cifar100()
    out.mkdir(parents=True)
    model = _tiny_model(out / "model") if given.tiny else None
    parts = dirichlet_partition(train[1], len(RANKS), alpha=given.alpha, seed=SEED, at_least=10)
    _write(out / "test.parquet", names, test, range(len(test[1])))
    for number, part in enumerate(parts, start=1):
        _write(out / f"site-{number}.parquet", names, train, [int(index) for index in part])
        _site(out, number, model)
    _federation(out, names, model)
    print(f"{out}: {len(train[1])} training and {len(test[1])} test images, sites of {[len(part) for part in parts]}")
    print("Run all of it here:")
    print(f"  raflora local {out}/federation.toml {out}/site-*.toml --logs {out}/logs --export-to {out}/adapter")
    return 0


def _cifar100() -> tuple[tuple[str, ...], Data, Data]:
    import datasets  # noqa: PLC0415 - seconds, and not needed for --tiny

    found = datasets.load_dataset("uoft-cs/cifar100")
    names = tuple(found["train"].features["fine_label"].names)
    decoded = {name: found[name].cast_column("img", datasets.Image(decode=False)) for name in ("train", "test")}
    train, test = (([i["bytes"] for i in split["img"]], list(split["fine_label"])) for split in decoded.values())
    return names, train, test


def _tiny_data() -> tuple[tuple[str, ...], Data, Data]:
    chance = np.random.Generator(np.random.PCG64(SEED))
    images: list[bytes] = []
    classes = [int(kind) for kind in chance.integers(len(TINY_CLASSES), size=TINY_TRAIN + TINY_TEST)]
    for kind in classes:
        colour = np.array(list(COLOURS.values())[kind // len(STRIPES)], dtype=np.float64)
        wave = np.sin(np.arange(TINY_SIZE) * chance.uniform(1.2, 2.0) + chance.uniform(0, 6))
        pattern = np.tile(wave, (TINY_SIZE, 1)) if kind % len(STRIPES) == 0 else np.tile(wave[:, None], (1, TINY_SIZE))
        pixels = colour * (1 + 0.4 * pattern[..., None]) + chance.normal(0, 20, (TINY_SIZE, TINY_SIZE, 3))
        images.append(_png(pixels.clip(0, 255).astype(np.uint8)))
    train, test = (images[:TINY_TRAIN], classes[:TINY_TRAIN]), (images[TINY_TRAIN:], classes[TINY_TRAIN:])
    return TINY_CLASSES, train, test


def _png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="PNG")
    return file.getvalue()


def _tiny_model(folder: Path) -> Path:
    """ViT's architecture with random weights."""
    import torch  # noqa: PLC0415 - seconds that the large variant does not need
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil  # noqa: PLC0415

    torch.manual_seed(SEED)
    config = ViTConfig(
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=96,
        image_size=TINY_SIZE,
        patch_size=4,
    )
    ViTForImageClassification(config).save_pretrained(folder)
    size = {"height": TINY_SIZE, "width": TINY_SIZE}
    ViTImageProcessorPil(do_resize=False, image_mean=[0.5] * 3, image_std=[0.5] * 3, size=size).save_pretrained(folder)
    return folder


def _write(path: Path, names: Sequence[str], data: Data, chosen: Sequence[int]) -> None:
    images, classes = data
    columns = {"img": [images[i] for i in chosen], "label": [names[classes[i]] for i in chosen]}
    parquet.write_table(pyarrow.table(columns), path)


def _site(out: Path, number: int, model: Path | None) -> None:
    changes: dict[str, object] = {
        "name": f"site-{number}",
        "rank": (TINY_RANKS if model else RANKS)[number - 1],
        "state_dir": f"{out}/site-{number}-state",
        "train": f"{out}/site-{number}.parquet",
        "test": f"{out}/test.parquet",
    }
    if model:
        changes["path"] = str(model)
    text = _changed((HERE / "worker.toml").read_text(encoding="utf-8"), changes)
    if model:
        text = text.replace("[coordinator]", "threads = 1\n\n[coordinator]", 1)
        text = text.replace("[model]\n", '[model]\ndevice = "cpu"\noffline = true\n', 1)
    (out / f"site-{number}.toml").write_text(text, encoding="utf-8")


def _federation(out: Path, names: Sequence[str], model: Path | None) -> None:
    changes: dict[str, object] = {"state_dir": f"{out}/coordinator-state", "labels": list(names)}
    if model:
        changes |= {"base_model": "tiny-random-vit", "global_rank": max(TINY_RANKS), "num_rounds": 6}
        changes |= {"evaluate_every": 1, "learning_rate": 5e-3}
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


if __name__ == "__main__":
    sys.exit(main())
