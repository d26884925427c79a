"""Letters and digits of real typefaces, those that come with matplotlib, turned, stretched, moved and noisy.

The network learns from sixteen typefaces and is judged on five it never sees, one of each family.
"""

from __future__ import annotations

import string
from pathlib import Path

import numpy as np
import torch
from nowcast_proto.errors import UnreadableFile
from torch import Tensor, nn
from torch.nn.functional import affine_grid, cross_entropy, grid_sample

from nowcast_lab.demo.training_job.task import Task

CHARACTERS = string.ascii_letters + string.digits
TRAINING = (
    *("DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-BoldOblique"),
    *("DejaVuSansMono", "DejaVuSansMono-Oblique", "DejaVuSansMono-BoldOblique"),
    *("DejaVuSerif", "DejaVuSerif-Bold", "DejaVuSerif-Italic"),
    *("STIXGeneral", "STIXGeneralBol", "STIXGeneralBolIta"),
    *("cmr10", "cmb10", "cmti10", "cmtt10"),
)
HELD_OUT = ("DejaVuSans-Oblique", "DejaVuSansMono-Bold", "DejaVuSerif-BoldItalic", "STIXGeneralItalic", "cmss10")
SIZE = 16
"""Height and width of an image; typefaces are drawn at twice that."""
VIEWS = 4
"""Times every held-out letter is seen, each time distorted another way."""
WIDTHS = (16, 32, 32)
REMEDY = "pip install matplotlib, or train on text: --task text"


def letters(folder: Path | None = None) -> Task:
    """The task: tell 62 letters and digits apart.

    Args:
        folder: Where the typefaces lie; matplotlib's own by default.

    Raises:
        UnreadableFile: A typeface is not there, or matplotlib is not.
    """
    folder = folder or typefaces()
    training = torch.cat([drawn(folder / f"{name}.ttf") for name in TRAINING])
    held_out = torch.cat([drawn(folder / f"{name}.ttf") for name in HELD_OUT]).repeat(VIEWS, 1, 1, 1)
    labels = torch.arange(len(CHARACTERS))

    def draw(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        rows = torch.randint(len(training), (count,), generator=generator)
        return distorted(training[rows], generator), rows % len(CHARACTERS)

    return Task(
        title="A convolutional network",
        subject=f"learns the letters of {len(TRAINING)} typefaces and is judged on {len(HELD_OUT)} it never sees",
        unit="nats per letter",
        model=_network,
        loss=lambda model, batch: cross_entropy(model(batch[0]), batch[1]),
        draw=draw,
        held_out=(
            distorted(held_out, torch.Generator().manual_seed(0)),
            labels.repeat(len(HELD_OUT) * VIEWS),
        ),
        batch=64,
        steps=2000,
        rate=6.4e-2,
        betas=(0.9, 0.999),
        weight_decay=0.01,
    )


def typefaces() -> Path:
    """The folder of the typefaces that come with matplotlib.

    Raises:
        UnreadableFile: matplotlib is not installed.
    """
    try:
        import matplotlib as mpl
    except ModuleNotFoundError as exc:
        raise UnreadableFile("matplotlib, which brings the typefaces, is not installed", remedy=REMEDY) from exc
    return Path(mpl.get_data_path()) / "fonts" / "ttf"


def _network() -> nn.Module:
    layers: list[nn.Module] = []
    fan_in = 1
    for width in WIDTHS:
        layers.append(nn.Conv2d(fan_in, width, 3, stride=2 if fan_in == 1 else 1, padding=1, bias=False))
        layers += [nn.BatchNorm2d(width), nn.ReLU()]
        fan_in = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(fan_in, len(CHARACTERS)))


def drawn(path: Path) -> Tensor:
    """Every character of a typeface, (62, 1, 32, 32) in [0, 1].

    Args:
        path: A TrueType file.

    Raises:
        UnreadableFile: It is not there, or no typeface.
    """
    from PIL import Image, ImageDraw, ImageFont

    try:
        font = ImageFont.truetype(path, int(1.4 * SIZE))
    except OSError as exc:
        raise UnreadableFile(
            f"the typeface {path} cannot be read: {exc}",
            expected="the typefaces that come with matplotlib",
            remedy=REMEDY,
        ) from exc
    images = []
    for character in CHARACTERS:
        image = Image.new("L", (2 * SIZE, 2 * SIZE))
        ImageDraw.Draw(image).text((SIZE, SIZE), character, fill=255, font=font, anchor="mm")
        images.append(np.asarray(image, dtype=np.float32) / 255)
    return torch.from_numpy(np.stack(images)[:, None])


def distorted(images: Tensor, generator: torch.Generator) -> Tensor:
    """Images turned, sheared, stretched, moved, dimmed and noisy, each in its own way.

    Args:
        images: (n, 1, height, width) in [0, 1].
        generator: Of all randomness.

    Returns:
        (n, 1, 16, 16), roughly standardised.
    """

    def between(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(len(images), generator=generator)

    angle, size, stretch, shear = between(-0.3, 0.3), between(0.8, 1.25), between(0.85, 1.15), between(-0.3, 0.3)
    cos, sin = size * angle.cos(), size * angle.sin()
    across = torch.stack((cos, shear - sin, between(-0.2, 0.2)), 1)
    down = torch.stack((stretch * sin, stretch * cos, between(-0.2, 0.2)), 1)
    grid = affine_grid(torch.stack((across, down), 1), [len(images), 1, SIZE, SIZE], align_corners=False)
    seen = grid_sample(images, grid, align_corners=False) * between(0.5, 1.0)[:, None, None, None]
    noisy = seen + 0.15 * torch.randn(seen.shape, generator=generator)
    return (noisy - 0.2) / 0.35
