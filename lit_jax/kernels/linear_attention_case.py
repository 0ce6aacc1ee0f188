"""What the op and its kernels have to agree on: the epsilon, and the case that a call is."""

import dataclasses

import jax.numpy as jnp

EPSILON = 1e-6  # added to phi(q), to phi(k) and to the denominator
KERNEL_FUNCTIONS = ("relu", "gelu", "focused", "focused_gelu")
# By this name a policy of rematerialisation keeps what forward kernels wrote, where they offer it.
FUSED = "fused_linear_attention"


@dataclasses.dataclass(frozen=True)
class Case:
    """All that a linear attention's program depends on, except for the batch.

    Raises: ValueError where the values do not fit together.
    """

    width: int  # D
    num_heads: int  # N
    grid: tuple[int, int]  # (h, w) in tokens
    conv_size: int = 5  # K of the depth-wise convolution; 0: none
    kernel_function: str = "relu"
    dtype: jnp.dtype = jnp.dtype(jnp.bfloat16)  # of q, k and v

    def __post_init__(self):
        # Cases are compared and hashed, as static
        # arguments are: one spelling of each value.
        object.__setattr__(self, "grid", tuple(self.grid))
        object.__setattr__(self, "dtype", jnp.dtype(self.dtype))

        heads = self.num_heads
        if not isinstance(heads, int) or heads < 1 or self.width % heads:
            raise ValueError(
                f"the width must divide into heads; got width {self.width} and num_heads {heads}"
            )
        if len(self.grid) != 2 or not all(isinstance(n, int) and n > 0 for n in self.grid):
            raise ValueError(
                f"the grid must have two sides of one token or more; got grid {self.grid}"
            )
        if self.conv_size and self.conv_size % 2 == 0:
            raise ValueError(f"a convolution has an odd size; got {self.conv_size}")
        if self.kernel_function not in KERNEL_FUNCTIONS:
            raise ValueError(
                f"kernel_function must be one of {KERNEL_FUNCTIONS}; got {self.kernel_function!r}"
            )

    @property
    def tokens(self) -> int:
        """T."""
        return self.grid[0] * self.grid[1]

    @property
    def head_width(self) -> int:
        """H."""
        return self.width // self.num_heads
