"""How the TPU kernels cut a case up: which form, which chunks of rows, which bands fit VMEM.

Nothing here is traced. All is known from the case, the pass and the VMEM of a
core.
"""

import dataclasses
import functools
import math
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from lit_jax.kernels.cook_toom import cook_toom
from lit_jax.kernels.linear_attention_case import Case

LANES = 128  # of a vector register, and of a tile
SUBLANES = 8  # of a vector register of float32, in every TPU up to the seventh generation

# Zero columns beside each row of the convolution's scratch. One sublane
# tile, and not K // 2, so that the rows themselves start at a whole tile.
MARGIN = 8
CHUNK_TOKENS = 256  # tokens in one straight line of code; more tokens are a loop of such chunks

# (T, D) arrays that cross HBM: q, k, v, out; and q, k, v, do, dq, dk, dv.
FORWARD_ARRAYS = 4
BACKWARD_ARRAYS = 7


# ---- The plan ----------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Plan:
    """The static shape of one call: lane tiles, chunks of rows, bands of chunks.

    Wide rows are cut: the columns of an image make pieces, which lie in memory one
    below the other, as a tall image of narrow rows.
    """

    case: Case  # of one group
    backward: bool
    w: int  # the width of the grid or of a piece, padded to whole sublane tiles
    chunk_rows: int
    chunks: int  # in a band
    bands: int  # of an image, in all its pieces
    direct: bool  # by the T x T matrix, not by the state
    slots: int  # tiles whose windows the convolution's scratch holds: all, or 2 where VMEM is short
    pieces: int = 1  # column blocks of an image
    groups: int = 1  # of heads: each is treated as an image of its own

    # The case.

    @property
    def num_heads(self) -> int:
        return self.case.num_heads

    @property
    def head_width(self) -> int:
        return self.case.head_width

    @property
    def width(self) -> int:
        return self.case.width

    @property
    def tokens(self) -> int:
        """T before padding, the divisor of the means."""
        return self.case.tokens

    @property
    def dtype(self) -> jnp.dtype:
        return self.case.dtype

    @property
    def precision(self) -> jax.lax.Precision | None:
        # Float32 operands mean float32 products;
        # the default would round them to bfloat16.
        return jax.lax.Precision.HIGHEST if self.dtype == jnp.float32 else None

    # Rows and tokens.

    @property
    def chunk_tokens(self) -> int:
        return self.chunk_rows * self.w

    @property
    def band_rows(self) -> int:
        return self.chunk_rows * self.chunks

    @property
    def band_tokens(self) -> int:
        return self.band_rows * self.w

    @property
    def whole(self) -> bool:
        """Whether VMEM holds an image as it is, so that one kernel runs all passes."""
        return self.bands == 1 and self.pieces == 1

    @property
    def piece_bands(self) -> int:
        """Bands of a piece."""
        return self.bands // self.pieces

    @property
    def piece_rows(self) -> int:
        """Rows of a piece, with those that fill the last band."""
        return self.band_rows * self.piece_bands

    @property
    def halo_rows(self) -> int:
        """Rows in a halo block: at least `pad`, and a divisor of the band's rows."""
        if self.whole or not self.pad:
            return 0
        return pl.next_power_of_2(self.pad)

    # Tiles of 128 lanes, and the heads in them.

    @functools.cached_property
    def tiles(self) -> list[tuple[int, int]]:
        """[(first lane, lanes)]; the last may be narrower."""
        return [(start, min(LANES, self.width - start)) for start in range(0, self.width, LANES)]

    def tile_size(self, i: int) -> int:
        """Lanes of tile i that are in use."""
        return self.tiles[i][1]

    def tile_lanes(self, i: int, offset: int = 0) -> slice:
        """Where tile i is in an array whose D lanes begin at `offset`."""
        start, size = self.tiles[i]
        return slice(offset + start, offset + start + size)

    @property
    def lanes(self) -> int:
        """The width in whole tiles."""
        return len(self.tiles) * LANES

    @functools.cached_property
    def pairs(self) -> list[tuple[int, int]]:
        """The tile pairs (i, j) that share a head, in the order in which S is stored."""
        tiles = range(len(self.tiles))
        return [
            (i, j) for i in tiles for j in tiles if set(self.heads_of(i)) & set(self.heads_of(j))
        ]

    def heads_of(self, i: int) -> range:
        """The heads that have lanes in tile i."""
        start, size = self.tiles[i]
        return range(start // self.head_width, (start + size - 1) // self.head_width + 1)

    def tiles_of(self, n: int) -> list[int]:
        """The tiles in which head n has lanes."""
        return [i for i in range(len(self.tiles)) if n in self.heads_of(i)]

    def lanes_of_head(self, i: int, n: int) -> tuple[int, int]:
        """The lanes [low, high) of tile i that belong to head n."""
        start, size = self.tiles[i]
        low = max(n * self.head_width - start, 0)
        high = min((n + 1) * self.head_width - start, size)
        return low, high

    # The convolution: its windows of rows, and the scratch they lie in.

    @property
    def K(self) -> int:
        """The convolution's size; 0: none."""
        return self.case.conv_size

    @property
    def pad(self) -> int:
        return self.K // 2

    @property
    def outputs(self) -> int:
        """m, the rows of output that one window of the convolution yields.

        One is the plain sum, which float32 needs: larger windows mix rows of
        different magnitude.
        """
        if self.dtype == jnp.float32:
            return 1
        return next(m for m in (4, 2, 1) if self.chunk_rows % m == 0)

    @property
    def points(self) -> int:
        """n, the rows of a window of the convolution."""
        return self.outputs + self.K - 1

    @property
    def windows(self) -> int:
        """Windows in a column of a chunk."""
        return self.chunk_rows // self.outputs

    @functools.cached_property
    def matrices(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """A, B and G of Cook and Toom's algorithm."""
        return cook_toom(self.outputs, self.K)

    @property
    def windows_shape(self) -> tuple[int, int, int, int]:
        """The windows of a chunk, tile j in slot j modulo slots; a plain sum's share their rows."""
        rows = self.windows * self.points
        if self.outputs == 1:
            rows = self.chunk_rows + self.K - 1
        return (self.slots, rows, self.w + 2 * MARGIN, LANES)

    @property
    def spread_rows(self) -> int:
        """Rows of A v in a window; a plain sum's are all equal."""
        return 1 if self.outputs == 1 else self.points

    @property
    def spread_shape(self) -> tuple[int, int, int, int]:
        """A v of a chunk, for two tiles in turn."""
        return (2, self.windows * self.spread_rows, self.w, LANES)

    @property
    def segment(self) -> int:
        """Columns that the convolution treats at once: two vector registers of float32, or one."""
        return 16 if self.w % 16 == 0 else 8


# ---- Making it ---------------------------------------------------------------


def make_plan(case: Case, *, backward: bool) -> Plan:
    """Chooses the form, the chunks and the bands of one pass.

    Raises: ValueError where VMEM does not hold the state of one head.
    """
    h, w = case.grid
    w = _whole_sublanes(case, w)
    chunk_rows = pl.cdiv(h, pl.cdiv(h * w, CHUNK_TOKENS))
    chunks = pl.cdiv(h, chunk_rows)
    no_padding = h * w == case.tokens
    plan = Plan(
        case=case,
        backward=backward,
        w=w,
        chunk_rows=chunk_rows,
        chunks=chunks,
        bands=1,
        direct=chunks == 1 and no_padding and case.head_width >= LANES,
        slots=pl.cdiv(case.width, LANES),
    )
    limit = vmem_bytes()
    for slots in (plan.slots, 2):
        plan = dataclasses.replace(plan, slots=slots)
        if w <= 2 * CHUNK_TOKENS and image_bytes(plan) <= limit:
            return plan

    needed = []
    for plans in _cuts(plan):
        needed.append(band_bytes(plans[0]))
        if needed[-1] <= limit:
            fitting = [plan for plan in plans if band_bytes(plan) <= limit]
            return min(fitting, key=lambda plan: (plan.bands * plan.band_rows, plan.bands))

    head = case.head_width
    raise ValueError(
        f"pallas_tpu keeps the float32 state of a head in VMEM: a head of {head} {case.dtype.name} "
        f"takes {min(needed) / 2**20:.1f} MiB, {head} x {head} numbers of "
        f"{4 * head**2 / 2**20:.1f} MiB among them; it has {limit / 2**20:.1f}"
    )


def _cuts(plan: Plan) -> Iterator[list[Plan]]:
    """The ways to cut an image, the best first: each as plans of more or fewer bands.

    Pieces and groups cost copies of every array, so they are as few as fit. Bands are
    as few as fit, but rather more than rows added to fill the last: those cost a copy
    too. Where none fits the chunks are halved, of which less is spilled. Pieces so
    narrow that what lies beside them counts come last.
    """
    N = plan.num_heads
    w = plan.w
    divisors = [groups for groups in range(1, N + 1) if N % groups == 0]
    widest = 2 * CHUNK_TOKENS
    for narrowest in (CHUNK_TOKENS // 4, 1):
        for groups in divisors:
            pieces = pl.cdiv(w, widest)
            columns = _whole_sublanes(plan.case, pl.cdiv(w, pieces))
            while True:
                for tokens in (CHUNK_TOKENS, CHUNK_TOKENS // 2, CHUNK_TOKENS // 4):
                    yield _cut(plan, groups, columns, tokens)
                if columns <= _whole_sublanes(plan.case, narrowest):
                    break
                columns = _whole_sublanes(plan.case, columns // 2)


def _cut(plan, groups, columns, chunk_tokens):
    """Plans of `groups` of heads, pieces of `columns` and chunks of about so many tokens.

    The one with the smallest bands comes first.
    """
    h, w = plan.case.grid
    pieces = pl.cdiv(w, columns)
    chunk_rows = max(1, min(pl.cdiv(h, 2), chunk_tokens // columns))
    # Whole chunks, and whole halo blocks of the band's neighbours.
    step = math.lcm(chunk_rows, max(1, pl.next_power_of_2(plan.pad)))
    fewest = 2 if pieces == 1 else 1
    bands_by_rows = {}
    for bands in range(max(fewest, pl.cdiv(h, step)), fewest - 1, -1):
        bands_by_rows[pl.cdiv(pl.cdiv(h, bands), step) * step] = bands

    case = dataclasses.replace(
        plan.case,
        width=plan.width // groups,
        num_heads=plan.num_heads // groups,
    )
    plan = dataclasses.replace(
        plan,
        case=case,
        w=columns,
        chunk_rows=chunk_rows,
        direct=False,
        pieces=pieces,
        groups=groups,
    )
    return [
        dataclasses.replace(plan, chunks=rows // chunk_rows, bands=bands * pieces)
        for rows, bands in bands_by_rows.items()
    ]


def _whole_sublanes(case, columns):
    tile = SUBLANES if case.dtype == jnp.float32 else 2 * SUBLANES
    return pl.cdiv(columns, tile) * tile


def refusal(case: Case) -> str:
    """Why a TPU or its VMEM does not take both passes of a case, or "" where it does."""
    sublanes = pltpu.get_tpu_info().num_sublanes if pltpu.is_tpu_device() else SUBLANES
    if sublanes != SUBLANES:
        return (
            f"pallas_tpu is written for vector registers of {SUBLANES} sublanes; "
            f"this TPU's have {sublanes}"
        )
    try:
        for backward in (False, True):
            make_plan(case, backward=backward)
    except ValueError as error:
        return str(error)
    return ""


# ---- Bytes of VMEM -----------------------------------------------------------


def vmem_bytes() -> int:
    """VMEM of a core of the TPU in use, or of the TPU that the mesh in context names.

    With neither it is that of a v4 core, the smallest of any TPU.
    """
    if pltpu.is_tpu_device():
        return pltpu.get_tpu_info().vmem_capacity_bytes
    return 16 * 2**20


def image_bytes(plan: Plan) -> float:
    """VMEM that a whole image takes: blocks, scratch, and what the compiler spills of a chunk."""
    itemsize = plan.dtype.itemsize
    arrays = BACKWARD_ARRAYS if plan.backward else FORWARD_ARRAYS
    blocks = 2 * arrays * plan.band_tokens * plan.lanes * itemsize  # double-buffered
    state = 0
    columns = 0
    if not plan.direct:
        # A sum in float32, and its cast: S, and dS in the backward.
        casts = 2 if plan.backward else 1
        state = len(plan.pairs) * LANES * LANES * (4 + itemsize * casts)
        columns = _column_bytes(plan, 4 if plan.backward else 2)
    rest = 2**20
    return blocks + state + _conv_bytes(plan) + columns + _spilled_bytes(plan) + rest


def band_bytes(plan: Plan) -> int:
    """VMEM that a band takes: the most that any of the pass's kernels needs."""
    itemsize = plan.dtype.itemsize
    array = plan.band_rows * plan.w * plan.lanes * itemsize
    halo = plan.halo_rows * plan.w * plan.lanes * itemsize
    sides = 0
    if plan.pieces > 1 and plan.K:
        rows = plan.band_rows + 2 * plan.halo_rows
        sides = rows * 2 * MARGIN * plan.lanes * itemsize
    state = len(plan.pairs) * LANES * LANES * itemsize
    acc = len(plan.pairs) * LANES * LANES * 4

    # Blocks of bands are double-buffered, those of states are not.
    state_kernel = 2 * 2 * array + state + acc
    kernels = [state_kernel]
    if plan.backward:
        query_kernel = 2 * 3 * array + 2 * state + acc + _column_bytes(plan, 4)
        key_kernel = 2 * (5 * array + 2 * halo + sides) + state + _conv_bytes(plan)
        kernels += [query_kernel, key_kernel]
    else:
        values = 1 if plan.width % LANES == 0 else 2  # v, or k and v
        blocks = (2 + values) * array + 2 * values * halo + sides
        kernels += [2 * blocks + state + _conv_bytes(plan) + _column_bytes(plan, 2)]
    return max(kernels) + _spilled_bytes(plan)


def _conv_bytes(plan):
    """The convolution's scratch, its taps and, in the backward, the sums of their gradients."""
    if not plan.K:
        return 0
    scratch = math.prod(plan.windows_shape) * 4
    taps = (plan.points * plan.K + 8) * plan.lanes * 4  # a tile has eight rows
    if plan.backward:
        scratch += math.prod(plan.spread_shape) * 4
        taps *= 9  # the taps, and eight partial sums of each
    return scratch + taps


def _column_bytes(plan, columns):
    """(tokens, 1) float32 columns of each head: one fills whole registers, and spills as such."""
    return columns * plan.num_heads * plan.chunk_tokens * LANES * 4


def _spilled_bytes(plan):
    """The other values of a chunk: 2.4 (T, D) float32 arrays at most were seen."""
    return 3 * plan.chunk_tokens * plan.lanes * 4
