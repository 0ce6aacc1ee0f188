"""The teacher's own samples in the place of images: distillation without a data set.

`--mode=prepare` writes them as any other images: in shards, resumable, with what they
depend on in prepared.json.
"""

import dataclasses
from typing import Any

import jax
import numpy as np

from lit_jax.data.encoding import Encode, Record
from lit_jax.data.raw_images import ImageSettings, hash_of
from lit_jax.pictures import to_uint8
from lit_jax.sampling import Sampler

SOURCE = "teacher"  # the word in prepare.source


@dataclasses.dataclass(frozen=True)
class TeacherImages:
    """Stands where `RawImages` do, for images that are not drawn yet.

    The "image" of record i is its number, of which `make_drawer` makes the arrays.
    """

    labels: np.ndarray  # (n,)
    num_classes: int
    class_names: tuple[str, ...] | None
    settings: ImageSettings  # of which the sides count
    channels: int
    protocol: dict[str, Any]  # all that the images depend on, JSON values
    name: str = SOURCE
    split: str = ""

    @property
    def listing(self) -> str:
        """Tells these images from others of a teacher."""
        return hash_of(self.protocol)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Record:
        index = int(index)
        label = int(self.labels[index])
        return {"image": np.int64(index), "label": label, "id": str(index), "treated": []}

    def about(self) -> dict[str, Any]:
        """What prepared.json keeps, by its keys."""
        h, w = self.settings.sides
        return {
            "image_size": h if h == w else [h, w],
            "num_classes": self.num_classes,
            "class_names": hash_of(self.class_names),
            "protocol": self.protocol,
        }


def make_drawer(sampler: Sampler, params: Any, labels: np.ndarray, encode: Encode) -> Encode:
    """The function from numbers of images, (B,), to the arrays of their records.

    Args:
      sampler: of at least B images at once.
      params: the teacher's. labels: (n,), of all images.
      encode: makes arrays of pixels, see `encoding.make_encoder`.
    """

    def draw(index: np.ndarray) -> dict[str, jax.Array]:
        images = sampler.draw(params, index, {"label": labels[index]})
        good = sampler.are_finite(images)[: len(index)]
        if not good.all():
            raise ValueError(
                f"the teacher's image {index[~good][0]} is not finite; another teacher.dtype "
                f"than bfloat16 may help"
            )
        return encode(to_uint8(np.asarray(images)[: len(index)]))

    return draw
