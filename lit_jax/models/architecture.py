"""The architecture of a diffusion transformer: what decides the function of its parameters.

Each family has a frozen dataclass, a subclass of `Architecture`. It checks itself, and is the same
JSON in checkpoints, exported files and `config.json`.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar, Self

import jax

from lit_jax import ranges
from lit_jax.diffusion import PROCESSES
from lit_jax.kernels.linear_attention import KERNEL_FUNCTIONS
from lit_jax.models.attention import ATTENTIONS, make_attention
from lit_jax.ranges import Range

# size: depth, width, softmax heads, linear heads. S to XL are DiT's table 1, and XL is PixArt's
# size too; the few linear heads are LiT's. Ti is the quickstart's.
SIZES = {
    "Ti": (5, 160, 4, 2),
    "S": (12, 384, 6, 2),
    "B": (12, 768, 12, 3),
    "L": (24, 1024, 16, 4),
    "XL": (28, 1152, 16, 4),
}
MAX_COUNT = 10**6  # of any size in a config: a checkpoint from a stranger may name anything


def heads_of_size(size: str, attention: str, width: int = 0) -> int:
    """The size's number of heads or, for a width that it does not divide, the next that does.

    Args: width: 0: the size's own.
    Raises: ValueError for an unknown size.
    """
    if size not in SIZES:
        raise ValueError(f"size must be one of {', '.join(SIZES)}; got {size!r}")
    _, size_width, softmax_heads, linear_heads = SIZES[size]
    has_few = attention in ATTENTIONS and ATTENTIONS[attention].few_heads
    heads = linear_heads if has_few else softmax_heads
    return next(n for n in range(heads, 0, -1) if (width or size_width) % n == 0)


def is_count(value: Any, low: int = 1) -> bool:
    """Whether a value is a whole number from `low` to MAX_COUNT."""
    # A bool is an int to Python, and no size.
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= MAX_COUNT


def _is_grid(value: Any) -> bool:
    return isinstance(value, list | tuple) and len(value) == 2 and all(map(is_count, value))


COUNT = Range(f"a whole number from 1 to {MAX_COUNT}", is_count)
COUNT_OR_NONE = Range(f"{COUNT.words}, or None", lambda x: x is None or is_count(x))
FLAG = Range("True or False", lambda x: isinstance(x, bool))


@dataclasses.dataclass(frozen=True)
class Architecture:
    """The fields that all families have, and what a family answers.

    Raises: ValueError whose text starts with the field's name.
    """

    depth: int
    width: int  # D
    num_heads: int | None  # None: a checkpoint that does not tell; such a config builds no model
    attention: str = "softmax"  # softmax: the teacher's; linear: LiT; a row of ATTENTIONS
    patch_size: int = 2  # p
    in_channels: int = 4  # C
    learn_sigma: bool = True  # the output holds the variance's values too: 2C channels
    qkv_bias: bool = True
    conv_size: int = 5  # K of the depth-wise convolution of v (dit5: of q and k); 0: none
    kernel_function: str = "relu"  # linear, mhla: relu, gelu, focused, focused_gelu
    num_blocks: int = 16  # mhla: square blocks of the grid
    softmax_every: int = 0  # of a linear attention: every so many-th layer keeps softmax; 0: none
    softmax_heads: int = 0  # of those layers
    grid: tuple[int, int] | None = None  # tokens that it was trained on, h x w; None: not known
    # What its outputs are: noise, at timesteps 0 to 999, or velocity, at times in [0, 1].
    prediction: str = "noise"

    # What each field may hold; a family adds its own.
    ranges: ClassVar[dict[str, Range]] = {
        **dict.fromkeys(("depth", "width", "patch_size", "in_channels"), COUNT),
        "num_heads": COUNT_OR_NONE,
        "attention": ranges.one_of(*ATTENTIONS),
        "learn_sigma": FLAG,
        "qkv_bias": FLAG,
        "conv_size": Range("odd, or 0", lambda x: is_count(x, 0) and (x == 0 or x % 2 == 1)),
        "kernel_function": ranges.one_of(*KERNEL_FUNCTIONS),
        "num_blocks": Range(
            "a square from 1 to 4096",
            lambda x: is_count(x) and x <= 4096 and math.isqrt(x) ** 2 == x,
        ),
        "softmax_every": Range(
            f"0, or a whole number from 2 to {MAX_COUNT}", lambda x: is_count(x, 0) and x != 1
        ),
        "softmax_heads": Range(f"a whole number from 0 to {MAX_COUNT}", lambda x: is_count(x, 0)),
        "grid": Range("two whole numbers, or None", lambda x: x is None or _is_grid(x)),
        "prediction": ranges.one_of(*PROCESSES),
    }
    # Fields in which a teacher must be as its student, whatever its size.
    shared_with_teacher: ClassVar[tuple[str, ...]] = ("in_channels", "learn_sigma", "prediction")
    # Fields that say how a checkpoint's own code computes, which no shape tells.
    conventions: ClassVar[tuple[str, ...]] = ("prediction",)
    # Paths of leaves that travel with the weights and are not trained.
    frozen: ClassVar[tuple[str, ...]] = ()
    # The leaf of a text encoder that is trained with the model; "": none is.
    text_encoder_name: ClassVar[str] = ""

    def __post_init__(self):
        self.check_fields(dataclasses.asdict(self))
        # What the attention does not read: two equal models must not differ in it.
        design = ATTENTIONS.get(self.attention)
        unread = {"conv_size": 0, "kernel_function": "relu", "num_blocks": 16}
        for name, value in unread.items():
            if design and name not in design.fields:
                object.__setattr__(self, name, value)
        if self.attention == "softmax":
            object.__setattr__(self, "softmax_every", 0)
        if not self.softmax_every:
            object.__setattr__(self, "softmax_heads", 0)
        elif self.depth % self.softmax_every:
            raise ValueError(
                f"softmax_every = {self.softmax_every} does not divide the depth {self.depth}"
            )
        elif not self.softmax_heads or self.width % self.softmax_heads:
            raise ValueError(
                f"softmax_heads = {self.softmax_heads} does not divide the width {self.width}"
            )
        if self.width % 4:
            raise ValueError(
                f"width = {self.width} is not a multiple of 4, as the position table needs"
            )
        if self.num_heads and self.width % self.num_heads:
            raise ValueError(f"num_heads = {self.num_heads} does not divide the width {self.width}")

    # ---- Made from a size, or from JSON ----------------------------------------------------------

    @classmethod
    def of_size(
        cls,
        size: str,
        *,
        attention: str = "softmax",
        depth: int = 0,
        width: int = 0,
        num_heads: int = 0,
        softmax_heads: int = 0,
        **fields: Any,
    ) -> Self:
        """The config of a size's name; depth, width and heads of 0 are the size's own."""
        if size not in SIZES:
            raise ValueError(f"size must be one of {', '.join(SIZES)}; got {size!r}")
        size_depth, size_width, _, _ = SIZES[size]
        return cls(
            depth=depth or size_depth,
            width=width or size_width,
            num_heads=num_heads or heads_of_size(size, attention),
            attention=attention,
            softmax_heads=softmax_heads or heads_of_size(size, "softmax", width),
            **fields,
        )

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Self:
        """The config that `to_json` wrote.

        Raises: ValueError for fields that are unknown or missing, or hold what they cannot.
        """
        known = cls.check_fields(fields)
        missing = [
            field.name
            for field in dataclasses.fields(cls)
            if field.default is dataclasses.MISSING and field.name not in known
        ]
        if missing:
            raise ValueError(f"{missing[0]} is missing from the architecture")
        return cls(**known)

    def to_json(self) -> dict[str, Any]:
        """All fields, as JSON values."""
        fields = dataclasses.asdict(self)
        return fields | {"grid": list(self.grid) if self.grid else None}

    @classmethod
    def check_fields(cls, fields: Mapping[str, Any]) -> dict[str, Any]:
        """Checks some or all fields, such as a checkpoint from a stranger names.

        Returns: the fields, `grid` as a tuple.
        Raises: ValueError naming the first field that is unknown or holds what it cannot.
        """
        if not isinstance(fields, Mapping):
            raise ValueError(f"the architecture is a {type(fields).__name__}, not an object")
        for name, value in fields.items():
            if name not in cls.ranges:
                raise ValueError(
                    f"{str(name)[:40]} = {str(value)[:40]} is no field of an architecture"
                )
            words, holds = cls.ranges[name]
            if not holds(value):
                raise ValueError(f"{name} must be {words}; got {repr(value)[:40]}")
        grid = fields.get("grid")
        return dict(fields) | ({"grid": tuple(grid)} if grid is not None else {})

    # ---- What a family answers -------------------------------------------------------------------

    @property
    def teacher_defaults(self) -> tuple[str, ...]:
        """Fields that a teacher has as its student, as long as no checkpoint says otherwise."""
        return ("patch_size", "qkv_bias", *self.conventions, *self.shared_with_teacher)

    def with_heads(self, num_heads: int) -> Self:
        """The same with the heads that a checkpoint did not tell."""
        return dataclasses.replace(self, num_heads=num_heads)

    def layer(self, index: int) -> Self:
        """The same with the attention of one layer, by its number, in all of them."""
        if self.softmax_every and (index + 1) % self.softmax_every == 0:
            changes: dict[str, Any] = {"attention": "softmax", "num_heads": self.softmax_heads}
            return dataclasses.replace(self, **changes)
        return dataclasses.replace(self, softmax_every=0)

    @property
    def out_channels(self) -> int:
        """Channels of the output: C, or 2C with `learn_sigma`."""
        return self.in_channels * (2 if self.learn_sigma else 1)

    def condition_shapes(self, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
        """What the model is told of each image besides x and t, by name."""
        raise NotImplementedError

    def forward_flops(self, input_size: tuple[int, int]) -> float:
        """FLOPs of one image's forward pass: two a multiply-add.

        Counts matrix products and the depth-wise convolution, nothing else. `num_heads` must be
        known.

        Args: input_size: (h, w) of the images or latents.
        """
        raise NotImplementedError

    def attention_flops(self, input_size: tuple[int, int]) -> float:
        """FLOPs of one image's attention without its projections, in all layers."""
        T = math.prod(input_size) // self.patch_size**2
        # A group of layers, as often as there are groups.
        every = self.softmax_every or 1
        layers = [make_attention(self.layer(i), parent=None) for i in range(every)]
        macs = sum(attention.macs(T, self.width) for attention in layers)
        return 2.0 * (self.depth // every) * macs
