"""The Mosaic TPU kernels of `linear_attention`, forward and backward, with the convolution.

There are two forms of the same sums. Both work on whole images in VMEM, where
HBM sees each input and output once:

- *direct*, for a few wide heads and at most 256 tokens. A head's T x T matrix
  phi(q) phi(k)^T is then no larger than the state, and one straight line of
  code keeps the matrix unit and the vector unit busy together;
- *by state*, for all else, in passes over chunks of rows. The state pass sums
  S = phi(k)^T v and phi(k). The query pass turns q into outputs (forward) or,
  with the cotangent, into dq, dS and d(mean phi(k)) (backward). The key pass of
  the backward turns those into dk and dv, and makes the convolution's
  gradients. An image too large for VMEM takes one `pallas_call` a pass, which
  walks bands of rows; the rows around a band come as halo blocks.

Heads of 72, 192 or 288 lanes do not start on multiples of 128 lanes, and moving
them there costs more than it saves. So no head is ever cut out. Everything
works on aligned tiles of 128 lanes, S is the list of the tile pairs (i, j) that
share a head, and where a tile straddles two heads, what belongs to the other
one is zeroed.

The convolution is bound by the vector unit, which has no fused multiply-add. In
bfloat16 its columns of K taps go by Cook and Toom's algorithm: m rows of output
need m + K - 1 products in place of m K.

docs/kernels_tpu.md has the numbers behind these choices.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from lit_jax.kernels.cook_toom import evaluate, interpolate
from lit_jax.kernels.linear_attention_case import EPSILON, Case
from lit_jax.kernels.linear_attention_tpu_plan import (
    LANES,
    MARGIN,
    Plan,
    make_plan,
    refusal,
    vmem_bytes,
)

__all__ = ["backward", "forward", "refusal"]

Inputs = tuple[jax.Array, jax.Array, jax.Array | None, jax.Array | None]

# A step emits a few dozen instructions of the kernel. The compiler's
# scheduler keeps close to program order, so work for different units
# is listed in steps and mixed by `_interleave`.
Step = Callable[[], None]


# ---- Pieces that work on values ----------------------------------------------


def _dot(plan, x, y, contract):
    """Contracts those two axes of x and y, accumulating in float32."""
    return jax.lax.dot_general(
        x,
        y,
        ((contract[:1], contract[1:]), ((), ())),
        precision=plan.precision,
        preferred_element_type=jnp.float32,
    )


def _phi(x):
    return jnp.maximum(x.astype(jnp.float32), 0.0) + EPSILON


def _only_head(plan, i, n, x, other=0.0):
    """x (rows, lanes of tile i) where the lane is of head n, else `other`."""
    low, high = plan.lanes_of_head(i, n)
    # A select is one vector operation; cutting
    # the head out would rotate every register.
    lane = jax.lax.broadcasted_iota(jnp.int32, x.shape, 1)
    if low > 0:
        x = jnp.where(lane >= low, x, other)
    if high < plan.tile_size(i):
        x = jnp.where(lane < high, x, other)
    return x


def _per_lane(plan, i, per_head):
    """A column (rows, 1) for each head -> (rows, lanes of tile i)."""
    heads = plan.heads_of(i)
    # From the last head down: each select
    # overwrites the lanes below its head's end.
    out = per_head[heads[-1]]
    for n in reversed(heads[:-1]):
        shape = (out.shape[0], plan.tile_size(i))
        lane = jax.lax.broadcasted_iota(jnp.int32, shape, 1)
        out = jnp.where(lane < plan.lanes_of_head(i, n)[1], per_head[n], out)
    return out


def _head_sums(plan, products):
    """Tiles (rows, lanes) -> for each head the sum over its lanes, (rows, 1)."""
    sums = []
    for n in range(plan.num_heads):
        parts = [_only_head(plan, i, n, products[i]) for i in plan.tiles_of(n)]
        columns = [jnp.sum(x, axis=1, keepdims=True) for x in _add_alike(parts)]
        sums.append(functools.reduce(jnp.add, columns))
    return sums


def _add_alike(parts):
    """Adds up the parts of equal shape: one lane reduction then serves them all."""
    by_width: dict[int, Any] = {}
    for part in parts:
        width = part.shape[1]
        by_width[width] = by_width[width] + part if width in by_width else part
    return list(by_width.values())


def _zero_other_heads(plan, i, j, x):
    """Zeroes the entries of x (lanes of tile i, lanes of tile j) that mix two heads."""
    if len(plan.heads_of(i)) == 1 and len(plan.heads_of(j)) == 1:
        return x
    blocks = []
    for n in plan.heads_of(i):
        low, high = plan.lanes_of_head(i, n)
        rows = x[low:high]
        if n in plan.heads_of(j):
            blocks.append(_only_head(plan, j, n, rows))
        else:
            blocks.append(jnp.zeros_like(rows))
    return jnp.concatenate(blocks, axis=0)


def _reciprocal(plan, x):
    """1 / x for positive normal x.

    The hardware's estimate and Newton's steps: the special cases of an exact
    division were 8 % of the vector unit's work.
    """
    y = pl.reciprocal(x, approx=True)
    # A step doubles the number of correct
    # bits; bfloat16 needs one, float32 two.
    for _ in range(2 if plan.dtype == jnp.float32 else 1):
        y = y * (2.0 - x * y)
    return y


# ---- Order of the program ----------------------------------------------------


def _loop(count, body):
    """Runs body(0..count-1)."""
    if count == 1:
        body(0)  # inlined: the scheduler sees one straight line
        return

    def turn(c, carry):
        body(c)
        return carry

    jax.lax.fori_loop(0, count, turn, 0)


def _alone(once, body):
    """Runs body(); if `once`, a traced 1, in a loop of as many turns.

    The compiler moves little across the ends of a loop, and so spills little.
    """
    if once is None:
        body()
        return

    def turn(_, carry):
        body()
        return carry

    jax.lax.fori_loop(0, once, turn, 0)


def _interleave(*works: list[Step]) -> None:
    """Runs lists of steps, evenly mixed.

    The scheduler overlaps only what stands close together in the program: a
    product for the matrix unit goes next to a sum for the vector unit.
    """
    steps = []
    for work in works:
        # A step's place in its own list, from 0 to 1.
        steps += [((i + 0.5) / len(work), step) for i, step in enumerate(work)]
    for _, step in sorted(steps, key=lambda item: item[0]):
        step()


def _mix(matrix: list[Step], vector: list[tuple[int, Step]]) -> None:
    """Runs steps for the matrix unit between steps for the vector unit.

    A vector step comes with the number of matrix steps that it has to wait for.
    Those are spread evenly over the vector steps before it.
    """
    positions = [0]  # where the number grows, and to what
    needs = [0]
    for i, (needed, _) in enumerate(vector):
        if needed > needs[-1]:
            positions.append(i)
            needs.append(needed)
    due = np.interp(range(len(vector)), [*positions, len(vector)], [*needs, len(matrix)])

    done = 0
    for (_, step), count in zip(vector, due):
        for matrix_step in matrix[done : math.ceil(count)]:
            matrix_step()
        done = max(done, math.ceil(count))
        step()
    for matrix_step in matrix[done:]:
        matrix_step()


# ---- Reading and writing tiles -----------------------------------------------


def _tokens(plan, chunk):
    """The tokens of a chunk; `chunk` may be traced."""
    start = chunk * plan.chunk_tokens
    if not isinstance(start, int):
        start = pl.multiple_of(start, plan.chunk_tokens)
    return pl.ds(start, plan.chunk_tokens)


def _some_tokens(plan, chunk, first, count):
    """`count` tokens of a chunk from its token `first` on."""
    return pl.ds(chunk * plan.chunk_tokens + first, count)


def _tile(plan, ref, chunk, i, offset=0):
    """Tile i of a chunk of `ref` (1, tokens, lanes), from lane `offset` on."""
    return ref[0, _tokens(plan, chunk), plan.tile_lanes(i, offset)]


def _whole_tile(plan, ref, i, offset=0, block=None):
    """Tile i of all tokens, or of those of `block` (first, count)."""
    first, count = block or (0, plan.tokens)
    return ref[0, first : first + count, plan.tile_lanes(i, offset)]


def _accumulate(ref, index, value, first):
    """ref[index] = value on the first visit, else += value."""
    if isinstance(first, bool):
        ref[index] = value if first else ref[index] + value
        return
    # Traced, inside a loop: a select, for a
    # branch would cut the straight line in two.
    ref[index] = jnp.where(first, 0.0, ref[index]) + value


@dataclasses.dataclass(frozen=True)
class _Place:
    """Where a tile is written: tile j of a chunk of `ref`, from lane `offset` on."""

    ref: jax.Array  # (1, band tokens, ...)
    chunk: int | jax.Array
    j: int
    offset: int = 0


# ---- The convolution ---------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Conv:
    """The convolution's arrays in VMEM. Windows hold B x, taps G g: see cook_toom.py."""

    x: "_Rows"  # what is convolved
    sides: "_Rows | None"  # of pieces: the MARGIN columns on their left, and those on their right
    windows_ref: jax.Array  # (slots, rows, w + 2 MARGIN, 128) float32
    taps_ref: jax.Array  # (n * K, D) float32
    bias_ref: jax.Array | None = None  # (1, D); the backward has no use for it
    spread_ref: jax.Array | None = None  # (2, rows, w, 128): A v, in the backward


@dataclasses.dataclass(frozen=True)
class _Rows:
    """Rows of a grid in VMEM: a band, and what is above and below it."""

    ref: jax.Array  # (1, band rows * columns, ...)
    columns: int
    offset: int = 0  # of its first lane
    halos: tuple = ()  # of bands: (block above, is it in the image), (block below, ...)


def _window_row(plan, window, i):
    """Where the scratch has row i of a window."""
    if plan.outputs == 1:
        return window + i  # a plain sum's windows share their rows
    return window * plan.points + i


def _rows(plan, ref, halo_refs, columns, offset=0):
    """A band and its halo blocks, (above, below) or none."""
    band = pl.program_id(2) % plan.piece_bands
    inside = (band > 0, band < plan.piece_bands - 1)
    return _Rows(ref, columns, offset, tuple(zip(halo_refs, inside)))


def _sides(plan, refs):
    """The columns beside a band of a piece: (band, above, below), or none."""
    return _rows(plan, refs[0], refs[1:], 2 * MARGIN) if refs else None


def _zero_margins(plan, windows_ref):
    """Zeroes what pads the image on the left and right; with pieces each window has its own."""
    if plan.pieces > 1:
        return

    @pl.when((pl.program_id(1) == 0) & (pl.program_id(2) == 0))
    def _():
        def zero(j, carry):
            side = jnp.zeros((windows_ref.shape[1], MARGIN, LANES), jnp.float32)
            windows_ref[j, :, :MARGIN] = side
            windows_ref[j, :, MARGIN + plan.w :] = side
            return carry

        jax.lax.fori_loop(0, plan.slots, zero, 0)


def _image_row(plan, rows: _Rows, chunk, r, j):
    """Row r of a chunk, (columns, lanes of tile j) float32.

    Rows r < 0 and r >= chunk_rows belong to the chunk's neighbours, or to the
    halo blocks. None: the row is outside the image, whatever the chunk.
    """
    lanes = plan.tile_lanes(j, rows.offset)

    def read(ref, row):
        token = row * rows.columns
        if not isinstance(row, int):
            token = pl.multiple_of(token, rows.columns)
        return ref[0, pl.ds(token, rows.columns), lanes].astype(jnp.float32)

    row = chunk * plan.chunk_rows + r
    if 0 <= r < plan.chunk_rows:
        return read(rows.ref, row)
    if not rows.halos and isinstance(row, int):
        return read(rows.ref, row) if 0 <= row < plan.band_rows else None

    # The chunk is traced: read a row that exists, and choose.
    last = plan.band_rows - 1
    outside = row < 0 if r < 0 else row > last
    value = read(rows.ref, jnp.clip(row, 0, last))
    beyond = jnp.zeros_like(value)
    if rows.halos:
        halo, inside = rows.halos[r >= 0]
        row = row + plan.halo_rows if r < 0 else row - plan.band_rows
        value_beyond = read(halo, jnp.clip(row, 0, plan.halo_rows - 1))
        beyond = jnp.where(inside, value_beyond, 0.0)
    return jnp.where(outside, beyond, value)


def _padded_row(plan, conv, chunk, r, j):
    """As `_image_row`, of a piece with the columns beside it."""
    row = _image_row(plan, conv.x, chunk, r, j)
    if conv.sides is None:
        return row
    sides = _image_row(plan, conv.sides, chunk, r, j)
    return jnp.concatenate([sides[:MARGIN], row, sides[MARGIN:]])


def _window_steps(plan, conv, chunk, j) -> list[Step]:
    """Steps that fill the windows of tile j of a chunk."""
    size = plan.tile_size(j)
    # The columns of the scratch outside are zero.
    columns = slice(MARGIN, MARGIN + plan.w)
    if conv.sides is not None:
        columns = slice(0, 2 * MARGIN + plan.w)
    rows: dict[int, Any] = {}  # of the image: neighbouring windows share K - 1

    def step(window):
        first = window * plan.outputs - plan.pad
        for r in range(first, first + plan.points):
            if r not in rows:
                rows[r] = _padded_row(plan, conv, chunk, r, j)
        values = [rows[first + i] for i in range(plan.points)]
        if plan.outputs > 1:
            values = evaluate(plan.matrices[1], values)
        for i, value in enumerate(values):
            if plan.outputs == 1 and window > 0 and i < plan.points - 1:
                continue  # the window before has written it
            if value is None:
                value = jnp.zeros((columns.stop - columns.start, size), jnp.float32)
            row = _window_row(plan, window, i)
            conv.windows_ref[j % plan.slots, row, columns, :size] = value

    return [functools.partial(step, window) for window in range(plan.windows)]


def _shifted(plan, conv, window, i, column, j):
    """Row i of a window of tile j at its K shifts, each (segment, lanes).

    A shift is a load from another column of the scratch: no register is
    shifted.
    """
    first = MARGIN - plan.pad + column
    row = _window_row(plan, window, i)
    slot = j % plan.slots
    size = plan.tile_size(j)
    starts = range(first, first + plan.K)
    return [conv.windows_ref[slot, row, x : x + plan.segment, :size] for x in starts]


def _convolution_steps(plan, conv, j, window, emit) -> list[Step]:
    """Steps that correlate a window of tile j with the taps.

    They call emit(row, column, value) with each result, (segment, lanes)
    float32.
    """
    lanes = plan.tile_lanes(j)

    def point(column, i, sums):
        total = None
        shifted = _shifted(plan, conv, window, i, column, j)
        for dx, value in enumerate(shifted):
            tap = i * plan.K + dx
            term = value * conv.taps_ref[tap : tap + 1, lanes]
            total = term if total is None else total + term
        # Point 1 adds to every row of output what it is: the bias once a window.
        if i == 1 and conv.bias_ref is not None:
            total = total + conv.bias_ref[:, lanes]
        sums.append(total)

    def finish(column, sums):
        for i, value in enumerate(interpolate(plan.matrices[0], sums)):
            emit(window * plan.outputs + i, column, value)

    steps: list[Step] = []
    for column in range(0, plan.w, plan.segment):
        sums: list[Any] = []
        for i in range(plan.points):
            steps += [functools.partial(point, column, i, sums)]
        steps += [functools.partial(finish, column, sums)]
    return steps


def _filter_gradient_steps(plan, conv, kv_ref, dtaps_ref, chunk, j) -> list[Step]:
    """Steps that add a chunk of tile j to dtaps_ref (1, n * K + 1, 8, D).

    Those are the gradients of G g, and the last row is that of the bias. The
    gradient of (G g)[i] is the sum over the windows of (A v)[i] times (B x)[i],
    x the cotangent shifted the opposite way. It is kept as 8 partial sums, one
    a sublane; XLA adds them up at the end.
    """
    size = plan.tile_size(j)
    lanes = plan.tile_lanes(j)
    v_lanes = plan.tile_lanes(j, plan.width)
    half = j % 2  # of the scratch: a tile need not wait for the one before

    def spread(window):
        first = window * plan.outputs
        tokens = [
            _some_tokens(plan, chunk, row * plan.w, plan.w)
            for row in range(first, first + plan.outputs)
        ]
        rows = [kv_ref[0, t, v_lanes].astype(jnp.float32) for t in tokens]
        if plan.outputs > 1:
            rows = evaluate(plan.matrices[0], rows)
        for i, value in enumerate(rows):
            conv.spread_ref[half, window * plan.spread_rows + i, :, :size] = value

    def point(i):
        sums: list[Any] = [None] * plan.K
        for window in range(plan.windows):
            for column in range(0, plan.w, plan.segment):
                row = window * plan.spread_rows + i % plan.spread_rows
                columns = slice(column, column + plan.segment)
                v = conv.spread_ref[half, row, columns, :size]
                shifted = _shifted(plan, conv, window, i, column, j)
                for dx, x in enumerate(shifted):
                    term = v * x
                    # Whole registers are added: no sum over sublanes.
                    parts = [term[s : s + 8] for s in range(0, plan.segment, 8)]
                    term = functools.reduce(jnp.add, parts)
                    sums[dx] = term if sums[dx] is None else sums[dx] + term
        for dx, gradient in enumerate(sums):
            dtaps_ref[0, i * plan.K + dx, :, lanes] += gradient

    def bias():
        # A product with eighths sums up the tokens in the matrix unit.
        eighths = jnp.full((8, plan.chunk_tokens), 1 / 8, plan.dtype)
        dtaps_ref[0, plan.points * plan.K, :, lanes] += _dot(
            plan, eighths, _tile(plan, conv.x.ref, chunk, j, conv.x.offset), (1, 0)
        )

    return [
        *(functools.partial(spread, window) for window in range(plan.windows)),
        *(functools.partial(point, i) for i in range(plan.points)),
        bias,
    ]


def _write_steps(plan, conv, place: _Place, value, block=0) -> list[Step]:
    """Steps that write a tile: value(first, count), tokens x lanes, plus any convolution.

    They ask for `block` tokens at a time (0: those of one window), just before
    the convolution adds to them: so little waits in registers. The
    convolution's windows are filled already.
    """
    lanes = plan.tile_lanes(place.j, place.offset)
    window = plan.outputs * plan.w
    if conv is None:
        block = block or plan.chunk_tokens
    elif not block or block % window:
        # A plain sum's window is one row of the grid: too little for a product.
        block = plan.chunk_tokens if plan.outputs == 1 else window
    values: dict[int, Any] = {}  # by their first token, until the convolution is added

    def compute(first):
        values[first] = value(first, block)
        if conv is None:
            out = values.pop(first).astype(place.ref.dtype)
            tokens = _some_tokens(plan, place.chunk, first, block)
            place.ref[0, tokens, lanes] = out

    blocks: dict[int, Step] = {}
    for first in range(0, plan.chunk_tokens, block):
        blocks[first] = functools.partial(compute, first)
    if conv is None:
        return list(blocks.values())

    def emit(row, column, convolved):
        token = row * plan.w + column
        first = token // block * block
        start_in_block = token - first
        segment = slice(start_in_block, start_in_block + plan.segment)
        total = values[first][segment] + convolved
        tokens = _some_tokens(plan, place.chunk, token, plan.segment)
        place.ref[0, tokens, lanes] = total.astype(place.ref.dtype)

    steps: list[Step] = []
    for i in range(plan.windows):
        if i * window in blocks:
            steps += [blocks[i * window]]
        steps += _convolution_steps(plan, conv, place.j, i, emit)
    return steps


# ---- By state: the passes over a chunk ---------------------------------------


def _state_pass(plan, kv_ref, chunk, acc_ref, sum_ref, first):
    """Adds a chunk to acc_ref (pairs, 128, 128), the sums of phi(k)^T v, and to sum_ref (1, D).

    The latter sums relu(k). Zeros that pad a ragged grid add nothing to it;
    phi(k) would.
    """
    for i in range(len(plan.tiles)):
        k = _tile(plan, kv_ref, chunk, i).astype(jnp.float32)
        positive = jnp.maximum(k, 0.0)
        column_sums = jnp.sum(positive, 0, keepdims=True)
        lanes = (slice(None), plan.tile_lanes(i))
        _accumulate(sum_ref, lanes, column_sums, first)

        phi_k = (positive + EPSILON).astype(plan.dtype)
        for p, (row, j) in enumerate(plan.pairs):
            if row == i:
                v = _tile(plan, kv_ref, chunk, j, plan.width)
                product = _dot(plan, phi_k, v, (0, 0))
                _accumulate(acc_ref, _entries(plan, p), product, first)


def _entries(plan, p):
    """The entries in use of pair p in an array of pairs (pairs, 128, 128)."""
    i, j = plan.pairs[p]
    return p, slice(plan.tile_size(i)), slice(plan.tile_size(j))


def _finish_state(plan, acc_ref, out_ref):
    """Zeroes what mixes heads and casts: acc_ref (pairs, 128, 128) float32 -> out_ref."""
    for p, (i, j) in enumerate(plan.pairs):
        entries = _entries(plan, p)
        state = _zero_other_heads(plan, i, j, acc_ref[entries])
        out_ref[entries] = state.astype(out_ref.dtype)


def _mean_phi_k(plan, sum_ref):
    """(1, D) sums of relu(k) -> means of phi(k), whose epsilon the sums leave out."""
    return sum_ref[...] * (1 / plan.tokens) + EPSILON


def _product(plan, xs, state_ref, i, transpose):
    """Tile i of x S, the sum over the tiles j of xs[j] S[j, i]; or of x S^T."""
    total = None
    contract = (1, 1) if transpose else (1, 0)
    for p, pair in enumerate(plan.pairs):
        row, column = pair if transpose else pair[::-1]
        if row == i:
            state = state_ref[_entries(plan, p)]
            term = _dot(plan, xs[column], state, contract)
            total = term if total is None else total + term
    return total


def _reciprocals(plan, phi_q, mean):
    """z (tokens, 1) of each head: 1 / (phi(q) . mean phi(k) + epsilon)."""
    products = [x * mean[:, plan.tile_lanes(i)] for i, x in enumerate(phi_q)]
    sums = _head_sums(plan, products)
    return [_reciprocal(plan, total + EPSILON) for total in sums]


def _output_pass(plan, q_ref, state_ref, mean, conv, out_ref, chunk):
    """Writes one chunk of out_ref: phi(q) S z, plus the convolution of the padded v."""
    tiles = range(len(plan.tiles))
    phi_q = [_phi(_tile(plan, q_ref, chunk, i)) for i in tiles]
    # S is a sum, not yet a mean: the division
    # by T goes into z, which is smaller.
    z = _reciprocals(plan, phi_q, mean)
    z_mean = [x * (1 / plan.tokens) for x in z]
    phi_q = [x.astype(plan.dtype) for x in phi_q]

    outputs: dict[int, jax.Array] = {}

    def attention(j):
        product = _product(plan, phi_q, state_ref, j, transpose=False)
        outputs[j] = product * _per_lane(plan, j, z_mean)

    def part(j, first, count):
        return outputs[j][first : first + count]

    # The product of a tile goes next to the convolution of the tile before.
    vector: list[tuple[int, Step]] = []
    for j in tiles:
        steps = [] if conv is None else _window_steps(plan, conv, chunk, j)
        steps += _write_steps(plan, conv, _Place(out_ref, chunk, j), functools.partial(part, j))
        vector += [(j + 1, step) for step in steps]
    _mix([functools.partial(attention, j) for j in tiles], vector)


def _product_rows(plan):
    """Rows in one product: few of its float32 values wait for the convolution."""
    return LANES if plan.chunk_tokens % LANES == 0 else plan.chunk_tokens


@dataclasses.dataclass(frozen=True)
class _QueryRefs:
    """What the query pass of the backward reads, and what it writes."""

    q: jax.Array
    do: jax.Array
    state: jax.Array
    dq: jax.Array
    acc: jax.Array  # (pairs, 128, 128): the sums of phi(q)^T (z do / T)
    dmean: jax.Array  # (1, D): of the cotangent of mean phi(k)


def _query_pass(plan, refs: _QueryRefs, mean, chunk, first):
    """Writes one chunk of dq, and adds the chunk to acc and dmean."""
    tiles = range(len(plan.tiles))
    q = [_tile(plan, refs.q, chunk, i).astype(jnp.float32) for i in tiles]
    do = [_tile(plan, refs.do, chunk, j) for j in tiles]
    phi_q = [_phi(x) for x in q]
    z = _reciprocals(plan, phi_q, mean)
    z_mean = [x * (1 / plan.tokens) for x in z]

    # u = T do S^T. So the numerator is not needed
    # here: do . (phi(q) S) is phi(q) . u / T.
    u = [_product(plan, do, refs.state, i, transpose=True) for i in tiles]
    weight = _head_sums(plan, [phi_q[i] * u[i] for i in tiles])
    heads = range(plan.num_heads)
    ddenominators = [-(z[n] * z_mean[n]) * weight[n] for n in heads]  # each (tokens, 1)
    for i in tiles:
        lanes = (slice(None), plan.tile_lanes(i))
        ddenominator = _per_lane(plan, i, ddenominators)
        dphi_q = u[i] * _per_lane(plan, i, z_mean) + ddenominator * mean[lanes]
        # phi is relu: no gradient where q <= 0, whatever the epsilon.
        dq = jnp.where(q[i] > 0, dphi_q, 0.0).astype(refs.dq.dtype)
        refs.dq[0, _tokens(plan, chunk), lanes[1]] = dq
        dmean = jnp.sum(ddenominator * phi_q[i], 0, keepdims=True)
        _accumulate(refs.dmean, lanes, dmean, first)

    # The operands of dS: z is folded into do,
    # so that the sums over chunks need no more.
    phi_q = [x.astype(plan.dtype) for x in phi_q]
    z_do = []
    for j in tiles:
        scaled = do[j].astype(jnp.float32) * _per_lane(plan, j, z_mean)
        z_do.append(scaled.astype(plan.dtype))
    for p, (i, j) in enumerate(plan.pairs):
        product = _dot(plan, phi_q[i], z_do[j], (0, 0))
        _accumulate(refs.acc, _entries(plan, p), product, first)


@dataclasses.dataclass(frozen=True)
class _KeyRefs:
    """What the key pass reads, and what it writes."""

    kv: jax.Array
    dstate: jax.Array
    dkv: jax.Array
    dtaps: jax.Array | None  # None: no convolution


def _key_pass(plan, refs: _KeyRefs, dmean, conv, chunk, once=None):
    """Writes one chunk of dk and dv, and adds to the filter's gradients.

    It goes tile by tile, and with `once` (see `_alone`) keeps the tiles apart:
    a chunk of all tiles at once would spill several arrays (T, D) to VMEM,
    which bands are short of.
    """

    block = _product_rows(plan)

    def k(i, tokens):
        return refs.kv[0, tokens, plan.tile_lanes(i)].astype(jnp.float32)

    def v(j, tokens):
        return refs.kv[0, tokens, plan.tile_lanes(j, plan.width)]

    def write_dk(i, first):
        tokens = _some_tokens(plan, chunk, first, block)
        lanes = plan.tile_lanes(i)
        vs = {j: v(j, tokens) for row, j in plan.pairs if row == i}
        dphi_k = _product(plan, vs, refs.dstate, i, transpose=True)
        dphi_k = dphi_k + dmean[:, lanes] * (1 / plan.tokens)
        dk = jnp.where(k(i, tokens) > 0, dphi_k, 0.0)
        refs.dkv[0, tokens, lanes] = dk.astype(refs.dkv.dtype)

    def dv(j, first, count):
        tokens = _some_tokens(plan, chunk, first, count)
        rows = [i for i, column in plan.pairs if column == j]
        phi_k = {i: _phi(k(i, tokens)).astype(plan.dtype) for i in rows}
        return _product(plan, phi_k, refs.dstate, j, transpose=False)

    def write(j):
        firsts = range(0, plan.chunk_tokens, block)
        matrix: list[Step] = [functools.partial(write_dk, j, first) for first in firsts]
        steps: list[Step] = []
        if conv is not None:
            steps += _window_steps(plan, conv, chunk, j)
            steps += _filter_gradient_steps(plan, conv, refs.kv, refs.dtaps, chunk, j)
        place = _Place(refs.dkv, chunk, j, offset=plan.width)
        steps += _write_steps(plan, conv, place, functools.partial(dv, j), block)
        _interleave(matrix, steps)

    for j in range(len(plan.tiles)):
        _alone(once, functools.partial(write, j))


# ---- Direct: by the T x T matrix of each head --------------------------------

# Rows of a head's matrices in one step of the forward, so that few of their
# float32 values are spilled. In the backward twice as many were best.
ROWS = 64


class _Heads:
    """The attention matrices of the heads, computed in steps, by blocks of rows.

    Attributes, all in the dtype of q, filled by the steps:
      weights: {head: normalised attention matrix (T, T)}.
      dscores: {head: gradient of phi(q) phi(k)^T (T, T)}, in the backward.
    """

    def __init__(self, plan, q_ref, kv_ref, do_ref=None):
        self.plan = plan
        self.q_ref = q_ref
        self.kv_ref = kv_ref
        self.do_ref = do_ref  # None in the forward
        self.weights: dict[int, jax.Array] = {}
        self.dscores: dict[int, jax.Array] = {}
        self._phi_k: dict[int, jax.Array] = {}

    def phi_k(self, i):
        """phi(k) of tile i (T, lanes), computed on the first call."""
        if i not in self._phi_k:
            k = _whole_tile(self.plan, self.kv_ref, i)
            self._phi_k[i] = _phi(k).astype(self.plan.dtype)
        return self._phi_k[i]

    def steps(self, n) -> list[Step]:
        """Steps that compute head n."""
        T = self.plan.tokens
        rows = ROWS if self.do_ref is None else 2 * ROWS
        weights: list[jax.Array] = []
        dscores: list[jax.Array] = []

        def finish():
            self.weights[n] = jnp.concatenate(weights, axis=0)
            if self.do_ref is not None:
                self.dscores[n] = jnp.concatenate(dscores, axis=0)

        steps: list[Step] = []
        for first in range(0, T, rows):
            block = (first, min(rows, T - first))
            steps += self._block_steps(n, block, weights, dscores)
        return steps + [finish]

    def _block_steps(self, n, block, weights_out, dscores_out) -> list[Step]:
        """Steps that compute the rows `block` of head n's matrices, for the two lists."""
        plan = self.plan
        sums = dict(scores=0.0, dweights=0.0)  # float32, over the head's tiles

        def add_scores(i):
            phi_q = _phi(_whole_tile(plan, self.q_ref, i, block=block))
            phi_q = _only_head(plan, i, n, phi_q).astype(plan.dtype)
            sums["scores"] += _dot(plan, phi_q, self.phi_k(i), (1, 1))

        def add_dweights(j):
            do = _whole_tile(plan, self.do_ref, j, block=block).astype(jnp.float32)
            do = _only_head(plan, j, n, do).astype(plan.dtype)
            v = _whole_tile(plan, self.kv_ref, j, plan.width)
            sums["dweights"] += _dot(plan, do, v, (1, 1))

        def normalise():
            # The row sums of the matrix are the
            # normaliser: no product with mean phi(k).
            scores = sums["scores"]
            mean = jnp.sum(scores, axis=1, keepdims=True) * (1 / plan.tokens)
            z_mean = _reciprocal(plan, mean + EPSILON) * (1 / plan.tokens)
            weights = scores * z_mean
            weights_out.append(weights.astype(plan.dtype))
            if self.do_ref is not None:
                # As in softmax attention, without the exponential.
                dweights = sums["dweights"]
                mean = jnp.sum(weights * dweights, axis=1, keepdims=True)
                dscores = (dweights - mean) * z_mean
                dscores_out.append(dscores.astype(plan.dtype))

        tiles = plan.tiles_of(n)
        steps: list[Step] = [functools.partial(add_scores, i) for i in tiles]
        if self.do_ref is not None:
            steps += [functools.partial(add_dweights, j) for j in tiles]
        return steps + [normalise]

    def product(self, i, matrices, x, block, transpose=False):
        """The rows `block` of the heads' matrices (or their transposes) times x (T, lanes).

        x is of tile i; each of its lanes is multiplied by the matrix of its
        head.
        """
        plan = self.plan
        rows = slice(block[0], block[0] + block[1])
        out = None
        for n in reversed(plan.heads_of(i)):
            if transpose:
                product = _dot(plan, matrices[n][:, rows], x, (0, 0))
            else:
                product = _dot(plan, matrices[n][rows], x, (1, 0))
            out = product if out is None else _only_head(plan, i, n, product, out)
        return out


def _direct_forward(plan, q_ref, kv_ref, conv, out_ref):
    """Writes out_ref (1, T, D): the heads' matrices next to the convolution of the tiles."""
    heads = _Heads(plan, q_ref, kv_ref)

    def attention(j, *block):
        v = _whole_tile(plan, kv_ref, j, plan.width)
        return heads.product(j, heads.weights, v, block)

    matrix: list[Step] = []
    heads_done = []
    for n in range(plan.num_heads):
        matrix += heads.steps(n)
        heads_done.append(len(matrix))

    block = 0 if conv else plan.tokens
    vector: list[tuple[int, Step]] = []
    for j in range(len(plan.tiles)):
        if conv is not None:
            vector += [(0, step) for step in _window_steps(plan, conv, 0, j)]
        value = functools.partial(attention, j)
        needed = heads_done[plan.heads_of(j)[-1]]
        steps = _write_steps(plan, conv, _Place(out_ref, 0, j), value, block)
        vector += [(needed, step) for step in steps]
    _mix(matrix, vector)


def _direct_backward(plan, heads: _Heads, conv, dq_ref, dkv_ref, dtaps_ref):
    """Writes dq_ref (1, T, D) and dkv_ref (1, T, 2 D), and adds to dtaps_ref."""
    q_ref = heads.q_ref
    kv_ref = heads.kv_ref
    # A block of a transposed matrix has whole lane tiles.
    columns = LANES if plan.tokens % LANES == 0 else plan.tokens

    def rows(block):
        return slice(block[0], block[0] + block[1])

    def write_dq(i, *block):
        dphi_q = heads.product(i, heads.dscores, heads.phi_k(i), block)
        q = _whole_tile(plan, q_ref, i, block=block).astype(jnp.float32)
        dq = jnp.where(q > 0, dphi_q, 0.0).astype(dq_ref.dtype)
        dq_ref[0, rows(block), plan.tile_lanes(i)] = dq

    def write_dk(i, *block):
        phi_q = _phi(_whole_tile(plan, q_ref, i)).astype(plan.dtype)
        dphi_k = heads.product(i, heads.dscores, phi_q, block, transpose=True)
        k = _whole_tile(plan, kv_ref, i, block=block).astype(jnp.float32)
        dk = jnp.where(k > 0, dphi_k, 0.0).astype(dkv_ref.dtype)
        dkv_ref[0, rows(block), plan.tile_lanes(i)] = dk

    def dv(i, *block):
        do = _whole_tile(plan, heads.do_ref, i)
        return heads.product(i, heads.weights, do, block, transpose=True)

    def write_steps(i):
        steps: list[Step] = []
        for first in range(0, plan.tokens, columns):
            steps += [
                functools.partial(write_dq, i, first, columns),
                functools.partial(write_dk, i, first, columns),
            ]
        return steps

    # dq and dk of a tile wait until the head after its own is under way: the
    # convolution of the next tiles waits for that head.
    matrix: list[Step] = []
    heads_done = []
    tiles = list(range(len(plan.tiles)))
    for n in range(plan.num_heads):
        matrix += heads.steps(n)
        heads_done.append(len(matrix))
        while tiles and (tiles[0] + 1 < plan.tiles_of(n)[-1] or n == plan.num_heads - 1):
            matrix += write_steps(tiles.pop(0))

    # A tile's windows and filter gradients need no head: they come before the
    # convolution of the tile before.
    vector: list[tuple[int, Step]] = []
    previous: list[tuple[int, Step]] = []
    for i in range(len(plan.tiles)):
        if conv is not None:
            steps = _window_steps(plan, conv, 0, i)
            steps += _filter_gradient_steps(plan, conv, kv_ref, dtaps_ref, chunk=0, j=i)
            vector += [(0, step) for step in steps]
        vector += previous
        place = _Place(dkv_ref, 0, i, offset=plan.width)
        needed = heads_done[plan.heads_of(i)[-1]]
        steps = _write_steps(plan, conv, place, functools.partial(dv, i), columns)
        previous = [(needed, step) for step in steps]
    _mix(matrix, vector + previous)


# ---- The kernels; the grid is (core, image of the core, band) ----------------


def _take(refs, *counts):
    """Splits refs into groups of the given sizes."""
    refs = iter(refs)
    return [[next(refs) for _ in range(count)] for count in counts]


def _forward_kernel(plan, *refs):
    """Whole images: q, kv[, taps, bias] -> out.

    Scratch: [windows][, state, acc, sum].
    """
    has_conv = bool(plan.K)
    (q_ref, kv_ref), taps, (out_ref,), windows, scratch = _take(
        refs,
        2,
        2 * has_conv,
        1,
        has_conv,
        0 if plan.direct else 3,
    )
    conv = None
    if has_conv:
        conv = _Conv(_Rows(kv_ref, plan.w, plan.width), None, *windows, *taps)
        _zero_margins(plan, conv.windows_ref)
    if plan.direct:
        _direct_forward(plan, q_ref, kv_ref, conv, out_ref)
        return

    state_ref, acc_ref, sum_ref = scratch

    def sum_up(c):
        _state_pass(plan, kv_ref, c, acc_ref, sum_ref, first=c == 0)

    def write(c):
        _output_pass(plan, q_ref, state_ref, mean, conv, out_ref, c)

    _loop(plan.chunks, sum_up)
    _finish_state(plan, acc_ref, state_ref)
    mean = _mean_phi_k(plan, sum_ref)
    _loop(plan.chunks, write)


def _backward_kernel(plan, *refs):
    """Whole images: q, kv, do[, taps] -> dq, dkv[, dtaps].

    Scratch: [windows, spread][, state, dstate, acc, sum, dmean].
    """
    has_conv = bool(plan.K)
    inputs, taps, outputs, dtaps, windows, scratch = _take(
        refs,
        3,
        has_conv,
        2,
        has_conv,
        2 * has_conv,
        0 if plan.direct else 5,
    )
    q_ref, kv_ref, do_ref = inputs
    dq_ref, dkv_ref = outputs
    conv = None
    dtaps_ref = None
    if has_conv:
        (dtaps_ref,) = dtaps
        conv = _backward_conv(_Rows(do_ref, plan.w), None, *windows, *taps)
        _zero_first(dtaps_ref)
        _zero_margins(plan, conv.windows_ref)
    if plan.direct:
        heads = _Heads(plan, q_ref, kv_ref, do_ref)
        _direct_backward(plan, heads, conv, dq_ref, dkv_ref, dtaps_ref)
        return

    state_ref, dstate_ref, acc_ref, sum_ref, dmean_ref = scratch
    queries = _QueryRefs(q_ref, do_ref, state_ref, dq_ref, acc_ref, dmean_ref)
    keys = _KeyRefs(kv_ref, dstate_ref, dkv_ref, dtaps_ref)

    def sum_up(c):
        _state_pass(plan, kv_ref, c, acc_ref, sum_ref, first=c == 0)

    # The state is computed again: to save the forward's would cost HBM traffic.
    _loop(plan.chunks, sum_up)
    _finish_state(plan, acc_ref, state_ref)
    mean = _mean_phi_k(plan, sum_ref)
    # From here on acc_ref sums dS.
    _loop(plan.chunks, lambda c: _query_pass(plan, queries, mean, c, c == 0))
    _finish_state(plan, acc_ref, dstate_ref)
    dmean = dmean_ref[...]
    _loop(plan.chunks, lambda c: _key_pass(plan, keys, dmean, conv, c))


def _backward_conv(do, sides, windows_ref, spread_ref, taps_ref):
    return _Conv(do, sides, windows_ref, taps_ref, spread_ref=spread_ref)


def _zero_first(dtaps_ref):
    """On a core's first visit: dtaps is summed over its images and bands."""

    @pl.when((pl.program_id(1) == 0) & (pl.program_id(2) == 0))
    def _():
        def zero(i, carry):
            dtaps_ref[0, i] = jnp.zeros(dtaps_ref.shape[2:], jnp.float32)
            return carry

        # A loop, for it is the code of the first step alone.
        jax.lax.fori_loop(0, dtaps_ref.shape[1], zero, 0)


def _state_kernel(plan, kv_ref, state_ref, mean_ref, acc_ref, sum_ref):
    """A band: adds to the state; the last band writes it."""
    band = pl.program_id(2)

    def sum_up(c):
        first = (band == 0) & (c == 0)
        _state_pass(plan, kv_ref, c, acc_ref, sum_ref, first)

    _loop(plan.chunks, sum_up)

    @pl.when(band == plan.bands - 1)
    def _():
        _finish_state(plan, acc_ref, state_ref.at[0])
        mean_ref[0] = _mean_phi_k(plan, sum_ref)


def _output_kernel(plan, q_ref, state_ref, mean_ref, *refs, offset):
    """A band: q, state, mean[, v, v above, v below][, sides, ...][, taps, bias] -> out.

    Scratch: [windows]. `offset` is the first lane of v in its block.
    """
    has_conv = bool(plan.K)
    values, sides, taps, (out_ref,), windows = _take(
        refs,
        3 * has_conv,
        3 * has_conv * (plan.pieces > 1),
        2 * has_conv,
        1,
        has_conv,
    )
    conv = None
    if has_conv:
        v = _rows(plan, values[0], values[1:], plan.w, offset)
        conv = _Conv(v, _sides(plan, sides), *windows, *taps)
        _zero_margins(plan, conv.windows_ref)
    mean = mean_ref[0]

    def write(c):
        _output_pass(plan, q_ref, state_ref.at[0], mean, conv, out_ref, c)

    _loop(plan.chunks, write)


def _query_kernel(plan, *refs):
    """A band: q, do, state, mean -> dq, dstate, dmean; scratch acc.

    The last band writes dstate, which all bands add to.
    """
    (q_ref, do_ref, state_ref, mean_ref), outputs, (acc_ref,) = _take(refs, 4, 3, 1)
    dq_ref, dstate_ref, dmean_ref = outputs
    band = pl.program_id(2)
    mean = mean_ref[0]

    def write(c):
        queries = _QueryRefs(
            q=q_ref,
            do=do_ref,
            state=state_ref.at[0],
            dq=dq_ref,
            acc=acc_ref,
            dmean=dmean_ref.at[0],
        )
        first = (band == 0) & (c == 0)
        _query_pass(plan, queries, mean, c, first)

    _loop(plan.chunks, write)

    @pl.when(band == plan.bands - 1)
    def _():
        _finish_state(plan, acc_ref, dstate_ref.at[0])


def _key_kernel(plan, kv_ref, do_ref, dstate_ref, dmean_ref, *refs):
    """A band: kv, do, dstate, dmean[, do above, do below][, sides, ...][, taps] -> dkv[, dtaps].

    Scratch: [windows, spread].
    """
    has_conv = bool(plan.K)
    halos, sides, taps, (dkv_ref,), dtaps, windows = _take(
        refs,
        2 * has_conv,
        3 * has_conv * (plan.pieces > 1),
        has_conv,
        1,
        has_conv,
        2 * has_conv,
    )
    conv = None
    dtaps_ref = None
    if has_conv:
        (dtaps_ref,) = dtaps
        do = _rows(plan, do_ref, halos, plan.w)
        conv = _backward_conv(do, _sides(plan, sides), *windows, *taps)
        _zero_first(dtaps_ref)
        _zero_margins(plan, conv.windows_ref)
    dmean = dmean_ref[0]
    # One, but the compiler does not know, and so keeps the loops of one turn.
    once = jnp.minimum(pl.program_id(2) + 1, 1)

    def write(c):
        keys = _KeyRefs(kv_ref, dstate_ref.at[0], dkv_ref, dtaps_ref)
        _key_pass(plan, keys, dmean, conv, c, once)

    _loop(plan.chunks, write)


# ---- The two passes of the op ------------------------------------------------


def forward(
    inputs: Inputs,
    *,
    case: Case,
    interpret: bool = False,
) -> tuple[jax.Array, None]:
    """The op's output. Nothing is saved: `backward` computes the state again.

    Args:
      inputs: q (B, T, D), kv (B, T, 2D), conv_kernel (K, K, H), conv_bias (H,);
        the last two may be None.
    Returns: (B, T, D) in the dtype of q, and None.
    Raises: ValueError where VMEM does not hold the case.
    """
    q, kv, conv_kernel, conv_bias = inputs
    plan = make_plan(case, backward=False)
    call = _Call(plan, q.shape[0] * plan.groups, interpret)
    q = call.cut(q)
    kv = call.cut(kv)
    taps = [call.constant(x) for x in _per_channel(plan, conv_kernel, conv_bias)]

    if plan.whole:
        scratch = call.windows()
        if not plan.direct:
            scratch += [call.state(), call.acc(), call.row()]
        (out,) = call(
            _forward_kernel,
            [call.band(q), call.band(kv), *taps],
            [call.band_like(q)],
            scratch,
            _Work(products=2),
        )
        return call.join(out), None

    state, mean = call.state_of(kv)
    values = []
    offset = plan.width
    if plan.K:
        # v is half of kv. A block can start there if it starts at a whole tile;
        # otherwise k is read once more.
        aligned = plan.width % LANES == 0
        values = [call.band(kv, half=aligned), *call.halos(kv, half=aligned)]
        values += call.sides(kv[:, :, plan.width :])
        offset = 0 if aligned else plan.width
    (out,) = call(
        functools.partial(_output_kernel, offset=offset),
        [call.band(q), call.image(state), call.image(mean), *values, *taps],
        [call.band_like(q)],
        call.windows(),
        _Work(products=1),
    )
    return call.join(out), None


def backward(
    inputs: Inputs,
    saved: None,
    do: jax.Array,
    *,
    case: Case,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array | None, jax.Array | None]:
    """The gradients (dq, dkv, dconv_kernel, dconv_bias) for `do` (B, T, D).

    Args: inputs: as in `forward`. saved: what it returned.
    Returns: each gradient in the shape and dtype of its input; None for what
      was None.
    """
    del saved
    q, kv, conv_kernel, conv_bias = inputs
    plan = make_plan(case, backward=True)
    call = _Call(plan, q.shape[0] * plan.groups, interpret)
    q = call.cut(q)
    kv = call.cut(kv)
    do = call.cut(do)
    # The bias has no part in the gradient of v.
    taps = _per_channel(plan, conv_kernel, None, flip=True)
    taps = [call.constant(x) for x in taps]
    dtaps = []
    if plan.K:
        rows = plan.points * plan.K + 1  # of the taps, and of the bias
        dtaps = [call.core_like((rows, 8, plan.width))]

    if plan.whole:
        scratch = call.windows(spread=True)
        if not plan.direct:
            scratch += [call.state(), call.state(), call.acc()]
            scratch += [call.row(), call.row()]
        dq, dkv, *dtaps = call(
            _backward_kernel,
            [call.band(q), call.band(kv), call.band(do), *taps],
            [call.band_like(q), call.band_like(kv), *dtaps],
            scratch,
            _Work(products=5, convolutions=2),
        )
    else:
        state, mean = call.state_of(kv)
        dq, dstate, dmean = call(
            _query_kernel,
            [call.band(q), call.band(do), call.image(state), call.image(mean)],
            [call.band_like(q), call.image_like(state), call.image_like(mean)],
            [call.acc()],
            _Work(products=2, convolutions=0),
        )
        halos = [*call.halos(do), *call.sides(do)] if plan.K else []
        gradients = [call.image(dstate), call.image(dmean)]
        dkv, *dtaps = call(
            _key_kernel,
            [call.band(kv), call.band(do), *gradients, *halos, *taps],
            [call.band_like(kv), *dtaps],
            call.windows(spread=True),
            _Work(products=2, convolutions=2, divisions=0),
        )

    dq = call.join(dq)
    dkv = call.join(dkv)
    if conv_kernel is None or conv_bias is None:
        return dq, dkv, None, None

    # (cores, n * K + 1, 8 partial sums, D), and all heads share the filters.
    N = plan.num_heads
    H = plan.head_width
    sums = jnp.sum(dtaps[0], axis=(0, 2))  # (n * K + 1, D)
    sums = sums.reshape(-1, N, H).sum(1)  # (n * K + 1, H)
    dG = sums[:-1].reshape(plan.points, plan.K, H)
    # Flipped back: the taps were flipped for the transposed convolution.
    dconv_kernel = _times(plan.matrices[2].T, dG)[::-1, ::-1]
    dconv_kernel = dconv_kernel.astype(conv_kernel.dtype)
    return dq, dkv, dconv_kernel, sums[-1].astype(conv_bias.dtype)


def _times(matrix, x):
    """A constant matrix (i, j) times x (j, ...), float32."""
    return jnp.einsum(
        "ij,j...->i...",
        jnp.asarray(matrix, jnp.float32),
        x.astype(jnp.float32),
        precision=jax.lax.Precision.HIGHEST,
    )


def _per_channel(plan, conv_kernel, conv_bias, flip=False):
    """The taps G g (n * K, D) and the bias (1, D), float32, the same for each head.

    None is left out. `flip` turns a convolution into its transpose.
    """
    if conv_kernel is not None:
        taps = conv_kernel[::-1, ::-1] if flip else conv_kernel
        conv_kernel = _times(plan.matrices[2], taps)

    def repeat(x):
        rows = x.astype(jnp.float32).reshape(-1, plan.head_width)
        return jnp.tile(rows, (1, plan.num_heads))

    return [repeat(x) for x in (conv_kernel, conv_bias) if x is not None]


# ---- The calls ---------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Work:
    """What a kernel computes for all tokens, by kind, for its cost estimate."""

    products: int  # with the state, or with a head's T x T matrix
    convolutions: int = 1
    divisions: int = 1  # by the normaliser


@dataclasses.dataclass(frozen=True)
class _Call:
    """Builds the calls and their blocks; the grid is (core, image of the core, band).

    The axis of cores is for chips whose two cores share a kernel. Each core
    sums the filters' gradients for itself.
    """

    plan: Plan
    batch: int  # of groups of heads
    interpret: bool

    @property
    def cores(self):
        # Also where the chip has one core: it then runs both halves of the batch.
        return 2 if self.batch % 2 == 0 else 1

    def _image_index(self, core, image):
        return core * (self.batch // self.cores) + image

    # Inputs are (array, BlockSpec), outputs (ShapeDtypeStruct, BlockSpec).

    def band(self, x, half=False):
        """A band of (B, T, C), also of fewer columns; `half` takes the second half of C."""
        C = x.shape[2] // (2 if half else 1)
        tokens = x.shape[1] // self.plan.bands

        def index(c, b, i):
            return self._image_index(c, b), i, int(half)

        return x, pl.BlockSpec((1, tokens, C), index)

    def halos(self, x, half=False):
        """The rows above and below a band, each as a block of `halo_rows`.

        The index is clamped to the image: the kernel zeroes what is outside.
        """
        plan = self.plan
        # halo_rows divides the band's rows, so band i starts at block i * step.
        columns = x.shape[1] // (plan.bands * plan.band_rows)
        block = (1, plan.halo_rows * columns, x.shape[2] // (2 if half else 1))
        step = plan.band_rows // plan.halo_rows
        last = plan.bands * step - 1

        def above(c, b, i):
            return self._image_index(c, b), jnp.maximum(i * step - 1, 0), int(half)

        def below(c, b, i):
            return self._image_index(c, b), jnp.minimum((i + 1) * step, last), int(half)

        return [(x, pl.BlockSpec(block, above)), (x, pl.BlockSpec(block, below))]

    def sides(self, x):
        """The columns beside the pieces of (B, T, C), as bands with halos; none without pieces.

        A row is the MARGIN columns on its left and those on its right, zero
        outside the image.
        """
        plan = self.plan
        if plan.pieces == 1:
            return []
        B, _, C = x.shape
        pieces = x.reshape(B, plan.pieces, plan.piece_rows, plan.w, C)
        left = jnp.pad(pieces[:, :-1, :, -MARGIN:], ((0, 0), (1, 0), *[(0, 0)] * 3))
        right = jnp.pad(pieces[:, 1:, :, :MARGIN], ((0, 0), (0, 1), *[(0, 0)] * 3))
        sides = jnp.concatenate([left, right], axis=3).reshape(B, -1, C)
        return [self.band(sides), *self.halos(sides)]

    def image(self, x):
        """All of one image's (B, ...), not double-buffered: it changes with the image."""
        tail = (0,) * (x.ndim - 1)

        def index(c, b, i):
            return self._image_index(c, b), *tail

        return x, pl.BlockSpec((1, *x.shape[1:]), index, pipeline_mode=pl.Buffered(1))

    def constant(self, x):
        """All of an array, the same for every image."""
        return x, pl.BlockSpec(x.shape, lambda c, b, i: (0,) * x.ndim)

    def band_like(self, x):
        return self._output(x.shape, x.dtype, self.band(x)[1])

    def image_like(self, x):
        return self._output(x.shape, x.dtype, self.image(x)[1])

    def core_like(self, shape):
        """A float32 sum of each core: (cores, ...)."""
        tail = (0,) * len(shape)
        spec = pl.BlockSpec(
            (1, *shape),
            lambda c, b, i: (c, *tail),
            pipeline_mode=pl.Buffered(1),
        )
        return self._output((self.cores, *shape), jnp.float32, spec)

    def _output(self, shape, dtype, spec):
        return jax.ShapeDtypeStruct(shape, dtype), spec

    # Scratch.

    def windows(self, spread=False):
        """The convolution's scratch, if there is a convolution."""
        if not self.plan.K:
            return []
        shapes = [self.plan.windows_shape]
        if spread:
            shapes += [self.plan.spread_shape]
        return [pltpu.VMEM(shape, jnp.float32) for shape in shapes]

    def state(self):
        """A state as the operand of products."""
        return pltpu.VMEM((len(self.plan.pairs), LANES, LANES), self.plan.dtype)

    def acc(self):
        """A state while it is summed."""
        return pltpu.VMEM((len(self.plan.pairs), LANES, LANES), jnp.float32)

    def row(self):
        """A sum over tokens."""
        return pltpu.VMEM((1, self.plan.width), jnp.float32)

    # Arrays around the kernels.

    def state_of(self, kv):
        """The state and the mean of phi(k), by a call of their own.

        Returns: (B, pairs, 128, 128) in the dtype of kv, and (B, 1, D) float32.
        """
        plan = self.plan
        pairs = len(plan.pairs)
        state = jax.ShapeDtypeStruct((self.batch, pairs, LANES, LANES), plan.dtype)
        mean = jax.ShapeDtypeStruct((self.batch, 1, plan.width), jnp.float32)
        return self(
            _state_kernel,
            [self.band(kv)],
            [self.image_like(state), self.image_like(mean)],
            [self.acc(), self.row()],
            _Work(products=1, convolutions=0, divisions=0),
        )

    def cut(self, x):
        """(B, h * w, C) -> (B * groups, tokens of all pieces, C / groups), zeros where padded.

        A copy, but where the grid divides into sublane tiles and bands as it is.
        """
        plan = self.plan
        if self._as_it_is:
            return x
        h, w = plan.case.grid
        halves = x.shape[2] // (plan.width * plan.groups)  # k and v
        columns = plan.w * plan.pieces
        image = x.reshape(-1, h, w, x.shape[2])
        image = jnp.pad(image, ((0, 0), (0, plan.piece_rows - h), (0, columns - w), (0, 0)))
        shape = (plan.piece_rows, plan.pieces, plan.w, halves, plan.groups, plan.width)
        image = image.reshape(-1, *shape).transpose(0, 5, 2, 1, 3, 4, 6)
        return image.reshape(self.batch, -1, halves * plan.width)

    def join(self, x):
        """The inverse of `cut`."""
        plan = self.plan
        if self._as_it_is:
            return x
        h, w = plan.case.grid
        halves = x.shape[2] // plan.width
        columns = plan.w * plan.pieces
        shape = (plan.groups, plan.pieces, plan.piece_rows, plan.w, halves, plan.width)
        image = x.reshape(-1, *shape).transpose(0, 3, 2, 4, 5, 1, 6)
        image = image.reshape(-1, plan.piece_rows, columns, plan.groups * x.shape[2])
        return image[:, :h, :w].reshape(-1, h * w, plan.groups * x.shape[2])

    @property
    def _as_it_is(self):
        plan = self.plan
        cuts = (plan.groups, plan.pieces, plan.piece_rows, plan.w)
        return cuts == (1, 1, *plan.case.grid)

    def __call__(self, kernel, inputs, outputs, scratch, work: _Work):
        """Runs kernel(plan, *refs)."""
        return pl.pallas_call(
            functools.partial(kernel, self.plan),
            grid=(self.cores, self.batch // self.cores, self.plan.bands),
            in_specs=[spec for _, spec in inputs],
            out_specs=[spec for _, spec in outputs],
            out_shape=[x for x, _ in outputs],
            scratch_shapes=scratch,
            interpret=self.interpret,
            cost_estimate=self._cost([*inputs, *outputs], work),
            compiler_params=pltpu.CompilerParams(
                # Only cores are independent: images and bands add to the same sums.
                dimension_semantics=("parallel", "arbitrary", "arbitrary"),
                # By default the compiler lets a kernel use only a part of VMEM.
                vmem_limit_bytes=vmem_bytes(),
            ),
            name=getattr(kernel, "func", kernel).__name__.strip("_"),
        )(*(x for x, _ in inputs))

    def _cost(self, arrays, work):
        """What the kernel costs, for XLA, which cannot see into it and schedules around it."""
        plan = self.plan
        length = plan.tokens if plan.direct else plan.head_width
        taps = plan.points * plan.K / plan.outputs if plan.K else 0
        per_value = work.products * length + work.convolutions * taps
        tokens = self.batch * plan.tokens
        return pl.CostEstimate(
            flops=int(2 * tokens * plan.width * per_value),
            bytes_accessed=sum(self._bytes_moved(x, spec) for x, spec in arrays),
            transcendentals=work.divisions * tokens * plan.num_heads,
        )

    def _bytes_moved(self, x, spec):
        """Bytes of x that cross HBM."""
        # Constants, states and sums cross it once.
        if x.ndim != 3 or x.shape[1] == 1:
            return math.prod(x.shape) * x.dtype.itemsize
        # Of all else a block crosses it for each image and band.
        block = math.prod(spec.block_shape) * x.dtype.itemsize
        return block * self.batch * self.plan.bands
