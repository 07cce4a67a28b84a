"""The promise itself: digits that a stranger reads as prompted. Minutes; run with `make quality`.

The classifier is test equipment: it is trained on MNIST alone and knows nothing of the package's samples.
"""

import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import process_environment
from torch import Tensor, nn

from sana_cli.commands.sample import SampleOptions, SampleSummary, sample
from sana_cli.data import DIGIT_WORDS, MNIST, decode_image, fit_image


def digits(split: str) -> tuple[Tensor, Tensor]:
    source = MNIST(split)
    images = np.stack([fit_image(decode_image(sample.image), (32, 32), 1) for sample in source])
    return torch.from_numpy(images), torch.from_numpy(source.labels.astype(np.int64))


class Classifier(nn.Module):
    """Two convolutions and a linear layer on 32x32 pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, 24, 5, stride=2, padding=2), nn.ReLU(), nn.BatchNorm2d(24),
            nn.Conv2d(24, 48, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.BatchNorm2d(48),
            nn.Conv2d(48, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Dropout(0.3), nn.Linear(64 * 16, 10),
        )  # fmt: skip

    def forward(self, pixels: Tensor) -> Tensor:
        return self.layers(pixels.float() / 127.5 - 1)


def train_classifier() -> tuple[Classifier, float]:
    """The classifier, and its accuracy on MNIST's test images."""
    torch.manual_seed(0)
    images, labels = digits("train")
    model, epochs, batch = Classifier(), 3, 128
    optimizer = torch.optim.AdamW(model.parameters())
    steps = epochs * (len(images) // batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=steps)
    for _ in range(steps):
        rows = torch.randint(len(images), (batch,))
        loss = F.cross_entropy(model(images[rows]), labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    model.eval()
    images, labels = digits("test")
    with torch.no_grad():
        accuracy = float((model(images).argmax(1) == labels).float().mean())
    return model, accuracy


@pytest.mark.quality
def test_quickstart_draws_what_it_is_asked_for(tmp_path: Path) -> None:
    environment = process_environment(tmp_path) | {"OMP_NUM_THREADS": "2"}
    start = time.perf_counter()
    for command in (("embed",), ("train",)):
        subprocess.run([sys.executable, "-m", "sana_cli", *command], cwd=tmp_path, env=environment, check=True)
    print(f"\nembed and train: {time.perf_counter() - start:.0f} s")
    torch.set_num_threads(2)
    classifier, accuracy = train_classifier()
    print(f"the classifier reads {accuracy:.2%} of MNIST's test images")
    assert accuracy > 0.99
    prompts = (" ".join(map(str, range(10))), " ".join(DIGIT_WORDS))
    options = SampleOptions(prompts, tmp_path / "runs" / "quickstart", images_per_prompt=10, out=tmp_path / "grid.png")
    *_, summary = sample(options)
    assert isinstance(summary, SampleSummary)
    asked = torch.tensor([int(i["prompt"]) if i["prompt"].isdigit() else DIGIT_WORDS.index(i["prompt"]) for i in summary.images])
    with torch.no_grad():
        read = classifier(summary.pixels).argmax(1)
    print(f"of {len(asked)} samples, {float((read == asked).float().mean()):.1%} are read as prompted")
    assert len(asked) == 200
    assert float((read == asked).float().mean()) >= 0.96
