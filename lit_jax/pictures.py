"""Pictures for people: image grids and loss curves."""

import io
import math
from typing import Any

import numpy as np
from etils import epath
from PIL import Image, ImageDraw, ImageFont

from lit_jax.runtime import metric_writer

LOSS_TERMS = ("loss", "mse", "vb", "kd_noise", "kd_variance")
GAP = 2  # pixels between two images of a grid


def plot_curves(workdir: epath.PathLike) -> None:
    """Draws workdir/curves.png: each loss term of metrics.jsonl over the steps.

    Does nothing if the file has no steps.
    """
    # Not at the top, for it takes a second; not pyplot, which would look for
    # a display.
    from matplotlib.figure import Figure

    lines = metric_writer.read_training(workdir)
    if not lines:
        return
    terms = [name for name in LOSS_TERMS if f"train/{name}" in lines[-1]]
    figure = Figure(figsize=(3 * len(terms), 2.6), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(terms), squeeze=False)[0], terms):
        with_term = [line for line in lines if f"train/{name}" in line]
        values = [line[f"train/{name}"] for line in with_term]
        axes.plot([line["step"] for line in with_term], values, color="tab:blue")
        # The variational term can be negative.
        yscale = "log" if min(values) > 0 else "linear"
        axes.set(title=name, xlabel="step", yscale=yscale)
        axes.grid(alpha=0.3)
    save_png(epath.Path(workdir) / "curves.png", figure.savefig, dpi=110)


def save_picture(path: epath.PathLike, picture: Image.Image) -> None:
    """Writes a PNG file, to an object store too, where Pillow cannot write."""
    save_png(path, picture.save)


def save_png(path: epath.PathLike, save: Any, **options: Any) -> None:
    """Writes the file that Pillow's or Matplotlib's `save` function makes."""
    file = io.BytesIO()
    save(file, format="png", **options)
    epath.Path(path).write_bytes(file.getvalue())


def to_uint8(x: np.ndarray) -> np.ndarray:
    """[-1, 1] to uint8 as DiT's sampling does: 127.5 x + 128, clamped, truncated."""
    return np.clip(127.5 * np.asarray(x, np.float32) + 128.0, 0, 255).astype(np.uint8)


def image_grid(
    rows: list[np.ndarray], titles: list[str] | None = None, *, scale: int = 0
) -> Image.Image:
    """One picture of rows of images, with a title left of each row.

    Args:
      rows: uint8, each (n, h, w, 1 or 3); n may differ.
      scale: pixels an image pixel becomes; 0 enlarges small images to about
        56 pixels.
    """
    h, w = rows[0].shape[1:3]
    scale = scale or max(1, round(56 / h))
    row_height = h * scale + GAP
    column_width = w * scale + GAP

    font = ImageFont.load_default(14)
    margin = 0
    if titles:
        margin = max(int(font.getlength(title)) + 12 for title in titles)
    width = margin + max(len(row) for row in rows) * column_width + GAP
    picture = Image.new("RGB", (width, len(rows) * row_height + GAP), "white")
    draw = ImageDraw.Draw(picture)

    for r, row in enumerate(rows):
        top = GAP + r * row_height
        if titles:
            draw.text((6, top + h * scale // 2 - 8), titles[r], fill="black", font=font)
        for c, image in enumerate(row):
            # Pillow takes a grey image without its channel axis.
            tile = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
            # Nearest: pixels stay pixels, as a person wants to judge them.
            tile = tile.resize((w * scale, h * scale), Image.Resampling.NEAREST)
            picture.paste(tile.convert("RGB"), (margin + GAP + c * column_width, top))
    return picture


def square_grid(images: np.ndarray) -> Image.Image:
    """One picture of all images (n, h, w, C), as square as possible."""
    columns = math.ceil(math.sqrt(len(images)))
    return image_grid([images[i : i + columns] for i in range(0, len(images), columns)])
