"""Makes the base model of the built-in example: `python -m simulation.pretrain_digits [FOLDER]`.

A small ViT, trained on 500 upright digits. The result is committed in digits_base/, so nobody needs to run this.
"""

import sys
from pathlib import Path

import torch
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil

from simulation.digits import BASE_FOLDER, LABELS, Digits, digits_task

STEPS = 600
BATCH_SIZE = 64
LEARNING_RATE = 2e-3
SEED = 0


def pretrain(digits: Digits) -> ViTForImageClassification:
    """A ViT of 69 thousand parameters that knows these digits."""
    torch.manual_seed(SEED)
    model = ViTForImageClassification(
        ViTConfig(
            hidden_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=128,
            image_size=8,
            patch_size=2,
            num_channels=1,
            id2label=dict(enumerate(LABELS)),
            label2id={label: number for number, label in enumerate(LABELS)},
        )
    )
    pixels = as_pixels(digits)
    labels = torch.from_numpy(digits.labels)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=LEARNING_RATE, total_steps=STEPS)
    model.train()
    for _ in range(STEPS):
        batch = torch.randint(len(labels), (BATCH_SIZE,))
        loss = model(pixel_values=pixels[batch], labels=labels[batch]).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    model.train(False)
    return model


def accuracy(model: ViTForImageClassification, digits: Digits) -> float:
    """The share of digits that the model names rightly."""
    with torch.inference_mode():
        named = model(pixel_values=as_pixels(digits)).logits.argmax(-1)
    return float((named == torch.from_numpy(digits.labels)).float().mean())


def as_pixels(digits: Digits) -> torch.Tensor:
    """What the model takes: [count, 1, 8, 8], as the image processor of the folder makes it."""
    return (torch.from_numpy(digits.images).float() / 255 - 0.5).div(0.5).unsqueeze(1)


def main(folder: Path = BASE_FOLDER) -> None:
    """Trains, reports and saves."""
    torch.set_num_threads(1)  # the same bytes on every machine of the same kind
    task = digits_task()
    model = pretrain(task.pretrain)
    upright = accuracy(model, task.pretrain)
    sideways = accuracy(model, task.test)
    model.save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)  # safetensors writes for its owner alone; a container is another
    # No resizing: the images have the model's size.
    ViTImageProcessorPil(
        do_resize=False, image_mean=[0.5], image_std=[0.5], size={"height": 8, "width": 8}
    ).save_pretrained(folder)
    print(f"{folder}: {upright:.1%} on its own digits, {sideways:.1%} on sideways ones")


if __name__ == "__main__":
    main(*(Path(argument) for argument in sys.argv[1:2]))
