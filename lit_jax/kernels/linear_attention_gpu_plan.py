"""How the GPU kernels cut a case up, and which cases they offer.

Nothing here needs Mosaic GPU, which JAX before 0.12 does not have in this form.
"""

import dataclasses

import jax
import jax.numpy as jnp

from lit_jax.kernels.linear_attention_case import Case

ROWS = 64  # of a warpgroup's product: tokens, or columns of a head
PATCH = (8, 16)  # rows and columns of the grid that a block convolves at a time
CHUNK = 32  # channels that a warpgroup convolves at a time
WIDEST_HEAD = 288  # its state, in bfloat16, takes 166 KB of a block's 227 KB of shared memory
CONV_SIZES = (0, 3, 5)  # of 7, the taps alone are 98 registers, and the tile does not fit
JAX_NEEDED = (0, 12)  # its Mosaic GPU is the one that the kernels are written for
# Blocks that fill the 132 multiprocessors of an H100 three times, at one each.
BLOCKS = 396


def refusal(case: Case) -> str:
    """Why the kernels do not offer a case on this JAX, or "" where they do."""
    h, w = case.grid
    H = case.head_width
    if jax.__version_info__[:2] < JAX_NEEDED:
        needed = ".".join(str(number) for number in JAX_NEEDED)
        return f"pallas_gpu needs JAX {needed} or later; this is JAX {jax.__version__}"
    if case.dtype != jnp.bfloat16:
        return f"pallas_gpu offers bfloat16; got {case.dtype.name}"
    if H > WIDEST_HEAD or (H % 64 and H % 96):
        offered = f"heads of a multiple of 64 or 96 columns, at most {WIDEST_HEAD}"
        return f"pallas_gpu offers {offered}; got {H}"
    if h % PATCH[0] or w % PATCH[1]:
        offered = f"grids of a multiple of {PATCH[0]} rows and of {PATCH[1]} columns"
        return f"pallas_gpu offers {offered}; got {case.grid}"
    if case.conv_size not in CONV_SIZES:
        return f"pallas_gpu offers convolutions of 3 or 5; got {case.conv_size}"
    return ""


@dataclasses.dataclass(frozen=True)
class Plan:
    """The static sizes of all kernels of one call."""

    case: Case
    batch: int
    interpret: bool = False

    @property
    def heads(self) -> int:
        """Heads of all images."""
        return self.batch * self.case.num_heads

    # Columns.

    @property
    def slice(self) -> int:
        """Columns of a head in one product; 288 = 3 x 96, 256 = 4 x 64."""
        return 64 if self.case.head_width % 96 else 96

    @property
    def slices(self) -> int:
        return self.case.head_width // self.slice

    @property
    def groups(self) -> int:
        """Groups of 64 rows of a stored state; the last has room for the mean."""
        return self.case.head_width // ROWS + 1

    @property
    def rest(self) -> int:
        """Rows of the state in the last group; the mean follows them."""
        return self.case.head_width % ROWS

    @property
    def state_shape(self) -> tuple[int, int, int]:
        return self.heads, self.groups * ROWS, self.case.head_width

    # Tokens.

    @property
    def splits(self) -> int:
        """Parts of T that a state is summed over, each by its own block."""
        return self._parts(self.case.tokens // ROWS, self.heads * self.slices)

    @property
    def stages(self) -> int:
        """Tiles of tokens that a state kernel has in flight."""
        return min(3, self.case.tokens // ROWS // self.splits)

    @property
    def row_chunks(self) -> int:
        """Parts of T of the kernels that hold a whole state."""
        return self._parts(self.case.tokens // ROWS, self.heads * 3)

    @property
    def patches_down(self) -> int:
        return self.case.grid[0] // PATCH[0]

    @property
    def patches(self) -> int:
        return self.case.tokens // (PATCH[0] * PATCH[1])

    @property
    def patch_chunks(self) -> int:
        """Parts of an image's patches, each for its own block."""
        return self._parts(self.patches, self.heads * self.slices)

    @property
    def halo(self) -> int:
        """Rows and columns of the grid that a patch needs around it."""
        return self.case.conv_size // 2

    @property
    def interpret_pad(self) -> int:
        """Zeros around an image in interpret mode.

        The interpreter reads a tile that starts before its array as zeros, all
        of it; the hardware, only what lies outside.
        """
        return self.halo if self.interpret else 0

    @property
    def tile(self) -> tuple[int, int]:
        """Rows and columns of a patch with its halo."""
        return PATCH[0] + 2 * self.halo, PATCH[1] + 2 * self.halo

    @property
    def filter_chunks(self) -> int:
        """Parts of all patches over which the filter's gradient is summed."""
        most = max(1, BLOCKS // (self.case.width // CHUNK))
        patches = self.batch * self.patches
        return max(n for n in range(1, most + 1) if patches % n == 0)

    @staticmethod
    def _parts(length: int, blocks: int) -> int:
        """The largest power of two that divides `length` and leaves a full GPU."""
        parts = 1
        while blocks * parts * 2 <= BLOCKS and length % (parts * 2) == 0:
            parts *= 2
        return parts
