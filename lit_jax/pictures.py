"""Pictures for people: image grids and loss curves."""

import io
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from etils import epath
from PIL import Image, ImageDraw, ImageFont

from lit_jax.runtime import metric_writer, storage

# Of a step's metrics: what is no term of the loss.
NO_TERMS = (
    "grad_norm param_norm update_norm learning_rate images_per_second data_wait seconds_left mfu "
    "skipped skipped_in_a_row"
).split()
PANEL = 3.0  # inches that a curve is wide, with its numbers
GAP = 2  # pixels between two images of a grid
CAPTION_WIDTH = 160  # pixels that a captioned image has at least
CAPTION_LINES = 3

PNG_START = b"\x89PNG\r\n\x1a\n"
# The last chunk: no content, its name, its CRC.
PNG_END = b"\x00\x00\x00\x00IEND\xaeB\x60\x82"


def plot_curves(workdir: epath.PathLike) -> None:
    """Draws workdir/curves.png: each loss term over the steps.

    Does nothing if metrics.jsonl has no steps.
    """
    # Not at the top, for it takes a second; not pyplot, which would look for
    # a display.
    from matplotlib.figure import Figure

    lines = metric_writer.read_training(workdir)
    if not lines:
        return
    terms = loss_terms(lines[-1])
    figure = Figure(figsize=(PANEL * len(terms), 2.6))
    for place, name in enumerate(terms):
        # A layout that Matplotlib finds by itself costs as much as the picture.
        box = ((place + 0.25) / len(terms), 0.19, 0.71 / len(terms), 0.69)
        axes = figure.add_axes(box)
        # A term may come later, with another config.
        there = [line for line in lines if f"train/{name}" in line]
        steps = [line["step"] for line in there]
        values = [line[f"train/{name}"] for line in there]
        axes.plot(steps, values, color="tab:blue")
        # The variational term can be negative.
        yscale = "log" if min(values) > 0 else "linear"
        axes.set(title=name, xlabel="step", yscale=yscale)
        axes.grid(alpha=0.3)
    save_png(epath.Path(workdir) / "curves.png", figure.savefig, dpi=110)


def loss_terms(line: dict[str, Any]) -> list[str]:
    """The loss and its terms in a line of metrics, by name: those of the teacher come last."""
    names = [key.removeprefix("train/") for key in line if key.startswith("train/")]
    terms = [name for name in names if name not in NO_TERMS]
    return sorted(terms, key=lambda name: (name != "loss", name.startswith("kd_")))


def save_picture(path: epath.PathLike, picture: Image.Image) -> None:
    """Writes a PNG file, to an object store too, where Pillow cannot write."""
    save_png(path, picture.save)


def save_png(
    path: epath.PathLike,
    save: Callable[..., Any],
    **options: Any,
) -> None:
    """Writes the file that Pillow's or Matplotlib's `save` makes, as a whole.

    Raises: OSError naming the file.
    """
    # Through memory, for they can open nothing but local files.
    file = io.BytesIO()
    save(file, format="png", **options)
    storage.replace_bytes(epath.Path(path), file.getvalue())


def is_whole(path: epath.Path) -> bool:
    """Whether the PNG is there up to its last chunk, which a file cut short lacks."""
    if not path.is_file() or path.stat().length < len(PNG_START + PNG_END):
        return False
    with path.open("rb") as file:
        start = file.read(len(PNG_START))
        file.seek(-len(PNG_END), io.SEEK_END)
        return (start, file.read()) == (PNG_START, PNG_END)


def to_uint8(x: np.ndarray) -> np.ndarray:
    """[-1, 1] to uint8 as DiT does: 127.5 x + 128, clamped, truncated."""
    levels = 127.5 * np.asarray(x, np.float32) + 128.0
    return np.clip(levels, 0, 255).astype(np.uint8)


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
    columns = max(len(row) for row in rows)
    width = margin + columns * column_width + GAP
    height = len(rows) * row_height + GAP
    picture = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(picture)

    for r, row in enumerate(rows):
        top = GAP + r * row_height
        if titles:
            place = (6, top + h * scale // 2 - 8)
            draw.text(place, titles[r], fill="black", font=font)
        for c, image in enumerate(row):
            # Pillow takes a grey image without its channel axis.
            grey = image.shape[-1] == 1
            tile = Image.fromarray(image[..., 0] if grey else image)
            # Nearest: pixels stay pixels, as a person wants to judge them.
            size = (w * scale, h * scale)
            tile = tile.resize(size, Image.Resampling.NEAREST)
            left = margin + GAP + c * column_width
            picture.paste(tile.convert("RGB"), (left, top))
    return picture


def square_grid(images: np.ndarray, captions: Sequence[str] = ()) -> Image.Image:
    """One picture of all images (n, h, w, C), as square as possible.

    Args: captions: a text below each image; () for none.
    """
    columns = math.ceil(math.sqrt(len(images)))
    if captions:
        images = np.stack([_with_caption(*each) for each in zip(images, captions)])
    starts = range(0, len(images), columns)
    return image_grid([images[i : i + columns] for i in starts], scale=1 if captions else 0)


def _with_caption(image: np.ndarray, caption: str) -> np.ndarray:
    """An image (h, w, C), enlarged where it is small, with a text on white below it."""
    picture = image_grid([image[None]], scale=max(1, math.ceil(CAPTION_WIDTH / image.shape[1])))
    font = ImageFont.load_default(12)
    lines: list[str] = []
    for word in caption.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and font.getlength(longer) <= picture.width - 4:
            lines[-1] = longer
        else:
            lines.append(word)
    if len(lines) > CAPTION_LINES:
        lines = [*lines[: CAPTION_LINES - 1], lines[CAPTION_LINES - 1] + " ..."]
    # All tiles of a grid are of one size, however long their texts are.
    tile = Image.new("RGB", (picture.width, picture.height + 15 * CAPTION_LINES), "white")
    tile.paste(picture, (0, 0))
    text = ImageDraw.Draw(tile)
    for number, line in enumerate(lines):
        text.text((2, picture.height + 15 * number), line, fill="black", font=font)
    return np.asarray(tile)
