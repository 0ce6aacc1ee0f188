"""Pictures for people: image grids and loss curves."""

import math
import pathlib

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from lit_jax.runtime import metric_writer


def plot_curves(workdir: pathlib.Path) -> None:
    """Draws workdir/curves.png: each loss term of metrics.jsonl over the steps; nothing if it has no steps."""
    from matplotlib.figure import (
        Figure,  # here: it takes a second; no pyplot, which would look for a display
    )

    lines = metric_writer.read_training(workdir)
    if not lines:
        return
    terms = [
        name
        for name in ("loss", "mse", "vb", "kd_noise", "kd_variance")
        if f"train/{name}" in lines[-1]
    ]
    figure = Figure(figsize=(3 * len(terms), 2.6), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(terms), squeeze=False)[0], terms):
        points = [
            (line["step"], line[f"train/{name}"]) for line in lines if f"train/{name}" in line
        ]
        axes.plot(*zip(*points), color="tab:blue")
        axes.set(
            title=name, xlabel="step", yscale="log" if min(y for _, y in points) > 0 else "linear"
        )
        axes.grid(alpha=0.3)
    figure.savefig(workdir / "curves.png", dpi=110)


def to_uint8(x: np.ndarray) -> np.ndarray:
    """[-1, 1] to uint8 as DiT's sampling does: 127.5 x + 128, clamped, truncated."""
    return np.clip(127.5 * np.asarray(x, np.float32) + 128.0, 0, 255).astype(np.uint8)


def image_grid(
    rows: list[np.ndarray], titles: list[str] | None = None, *, scale: int = 0
) -> Image.Image:
    """One picture of rows of uint8 images, each (n, h, w, 1 or 3), a title left of each row.

    Args: scale: pixels an image pixel becomes; 0 enlarges small images to about 56 pixels.
    """
    h, w = rows[0].shape[1:3]
    scale = scale or max(1, round(56 / h))
    font = ImageFont.load_default(14)
    margin = max((int(font.getlength(title)) + 12 for title in titles), default=0) if titles else 0
    gap = 2
    columns = max(len(row) for row in rows)
    size = (margin + columns * (w * scale + gap) + gap, len(rows) * (h * scale + gap) + gap)
    picture = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(picture)
    for r, row in enumerate(rows):
        top = gap + r * (h * scale + gap)
        if titles:
            draw.text((6, top + h * scale // 2 - 8), titles[r], fill="black", font=font)
        for c, image in enumerate(row):
            tile = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).convert("RGB")
            left = margin + gap + c * (w * scale + gap)
            picture.paste(
                tile.resize((w * scale, h * scale), Image.Resampling.NEAREST), (left, top)
            )
    return picture


def square_grid(images: np.ndarray) -> Image.Image:
    """One picture of all images (n, h, w, C), as square as it gets."""
    columns = math.ceil(math.sqrt(len(images)))
    return image_grid([images[i : i + columns] for i in range(0, len(images), columns)])
