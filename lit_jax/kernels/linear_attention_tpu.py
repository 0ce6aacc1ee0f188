"""The Mosaic TPU kernels behind `linear_attention`: forward and backward, fused with the convolution.

Two forms of the same sums, both on whole images in VMEM, where HBM sees each input and output once:

- *direct*, for a few wide heads and at most 256 tokens: a head's T x T matrix phi(q) phi(k)^T is then no larger
  than the state, and one straight line of code keeps the matrix and the vector units busy together;
- *by state*, for all else, in passes over chunks of rows. The state pass sums S = phi(k)^T v and phi(k); the query
  pass turns q into outputs (forward) or, with the cotangent, into dq, dS and d(mean phi(k)) (backward); the key
  pass of the backward turns those into dk and dv, and holds the convolution's gradients. An image too large for
  VMEM takes one `pallas_call` per pass, walking bands of rows whose neighbours come as halo blocks.

Heads of 72, 192 or 288 lanes do not start on multiples of 128 lanes, and moving them there costs more than it
saves. So a head is never sliced out: everything works on aligned tiles of 128 lanes, S is the list of the tile
pairs (i, j) that share a head, and what belongs to another head is zeroed where tiles straddle two.

The convolution is bound by the vector unit, which has no fused multiply-add. In bfloat16 its columns of K taps go by
Cook and Toom's algorithm (Winograd's, in one dimension): m rows of output need m + K - 1 products in place of m K.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

EPSILON = 1e-6  # as in linear_attention.py: added to phi(q), phi(k) and the denominator
LANES = 128
MARGIN = (
    8  # zero columns beside each row of the convolution's scratch: a sublane tile, to stay aligned
)
FORWARD_ARRAYS, BACKWARD_ARRAYS = (
    4,
    7,
)  # of (T, D) that cross HBM: q, k, v, out; and q, k, v, do, dq, dk, dv
CHUNK_TOKENS = 256  # tokens in one straight line of code; more tokens are a loop of such chunks


@dataclasses.dataclass(frozen=True)
class _Plan:
    """The static shape of one call: lane tiles, chunks of rows, bands of chunks."""

    num_heads: int
    head_width: int
    tokens: int  # T before padding, the divisor of the means
    w: int  # padded grid width, a multiple of the sublane tile
    chunk_rows: int
    chunks: int  # chunks in a band
    bands: int  # 1: the image fits VMEM
    direct: bool  # by the T x T matrix rather than the state
    slots: int  # tiles whose windows the convolution's scratch holds: all, or 2 where VMEM is short
    K: int  # 0: no convolution
    dtype: jnp.dtype

    @property
    def width(self):
        return self.num_heads * self.head_width

    @property
    def lanes(self):
        """The width in whole tiles."""
        return len(self.tiles) * LANES

    @property
    def pad(self):
        return self.K // 2

    @property
    def halo_rows(self):
        """Rows in a halo block: at least `pad`, and a divisor of the band's rows."""
        return 0 if self.bands == 1 else pl.next_power_of_2(self.pad) if self.pad else 0

    @property
    def outputs(self):
        """m, the rows of output that one window of the convolution yields. One is the plain sum, exact in float32."""
        return (
            1
            if self.dtype == jnp.float32
            else next(m for m in (4, 2, 1) if self.chunk_rows % m == 0)
        )

    @property
    def points(self):
        """n, the rows of a window of the convolution."""
        return self.outputs + self.K - 1

    @property
    def windows(self):
        """Windows in a column of a chunk."""
        return self.chunk_rows // self.outputs

    @property
    def windows_shape(self):
        """The windows of a chunk, tile j in slot j modulo slots; those of a plain sum share their rows."""
        rows = self.chunk_rows + self.K - 1 if self.outputs == 1 else self.windows * self.points
        return (self.slots, rows, self.w + 2 * MARGIN, LANES)

    @property
    def spread_rows(self):
        """Rows of A v in a window; a plain sum's are all equal."""
        return 1 if self.outputs == 1 else self.points

    @property
    def spread_shape(self):
        return (2, self.windows * self.spread_rows, self.w, LANES)

    @functools.cached_property
    def matrices(self):
        return _cook_toom(self.outputs, self.K)

    @property
    def band_rows(self):
        return self.chunk_rows * self.chunks

    @property
    def chunk_tokens(self):
        return self.chunk_rows * self.w

    @property
    def band_tokens(self):
        return self.band_rows * self.w

    @property
    def segment(self):
        """Columns the convolution treats at once: two vector registers of float32 where the row allows it."""
        return 16 if self.w % 16 == 0 else 8

    @property
    def precision(self):
        return jax.lax.Precision.HIGHEST if self.dtype == jnp.float32 else None

    @functools.cached_property
    def tiles(self):
        """[(first lane, lanes)]."""
        return [(start, min(LANES, self.width - start)) for start in range(0, self.width, LANES)]

    @functools.cached_property
    def pairs(self):
        """The tile pairs that share a head, in the order S is stored."""
        count = range(len(self.tiles))
        return [
            (i, j) for i in count for j in count if set(self.heads_of(i)) & set(self.heads_of(j))
        ]

    def heads_of(self, i):
        start, size = self.tiles[i]
        return range(start // self.head_width, (start + size - 1) // self.head_width + 1)

    def lanes_of_head(self, i, n):
        """The lanes [lo, hi) of tile i that belong to head n."""
        start, size = self.tiles[i]
        return max(n * self.head_width - start, 0), min((n + 1) * self.head_width - start, size)

    def tiles_of(self, n):
        return [i for i in range(len(self.tiles)) if n in self.heads_of(i)]


# ---------------------------------------------------------------- pieces that work on values


def _dot(plan, x, y, contract):
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
    """x (rows, lanes of tile i) where the lane belongs to head n, else `other`."""
    lo, hi = plan.lanes_of_head(i, n)
    lane = jax.lax.broadcasted_iota(jnp.int32, x.shape, 1)
    if lo > 0:
        x = jnp.where(lane >= lo, x, other)
    if hi < plan.tiles[i][1]:
        x = jnp.where(lane < hi, x, other)
    return x


def _per_lane(plan, i, per_head):
    """A column (rows, 1) for each head -> (rows, lanes of tile i), each lane with its head's."""
    heads = plan.heads_of(i)
    out = per_head[heads[-1]]
    for n in reversed(heads[:-1]):
        shape = (out.shape[0], plan.tiles[i][1])
        lane = jax.lax.broadcasted_iota(jnp.int32, shape, 1)
        out = jnp.where(lane < plan.lanes_of_head(i, n)[1], per_head[n], out)
    return out


def _head_sums(plan, products):
    """Tiles (rows, lanes) -> for each head the sum over its lanes, (rows, 1)."""
    sums = []
    for n in range(plan.num_heads):
        parts = [_only_head(plan, i, n, products[i]) for i in plan.tiles_of(n)]
        parts = [jnp.sum(p, axis=1, keepdims=True) for p in _add_alike(parts)]
        sums.append(functools.reduce(jnp.add, parts))
    return sums


def _add_alike(parts):
    """Adds up the parts of equal shape, so that one lane reduction serves them all."""
    by_width = {}
    for part in parts:
        width = part.shape[1]
        by_width[width] = by_width[width] + part if width in by_width else part
    return list(by_width.values())


def _zero_other_heads(plan, i, j, x):
    """Keeps the entries of x (lanes of tile i, lanes of tile j) whose row and column belong to one head."""
    if len(plan.heads_of(i)) == 1 and len(plan.heads_of(j)) == 1:
        return x
    blocks = []
    for n in plan.heads_of(i):
        lo, hi = plan.lanes_of_head(i, n)
        blocks.append(
            _only_head(plan, j, n, x[lo:hi]) if n in plan.heads_of(j) else jnp.zeros_like(x[lo:hi])
        )
    return jnp.concatenate(blocks, axis=0)


def _reciprocal(plan, x):
    """1 / x for positive normal x: the hardware's estimate and Newton's steps, without special cases."""
    y = pl.reciprocal(x, approx=True)
    for _ in range(2 if plan.dtype == jnp.float32 else 1):
        y = y * (2.0 - x * y)
    return y


def _loop(count, body):
    """Runs body(0..count-1); a single turn is inlined, so that the scheduler sees one straight line."""
    if count == 1:
        body(0)
    else:
        jax.lax.fori_loop(0, count, lambda c, carry: (body(c), carry)[1], 0)


def _alone(once, body):
    """Runs body(); if `once`, a traced 1, in a loop of as many turns: little is moved across its ends, and little spilled."""
    if once is None:
        body()
    else:
        jax.lax.fori_loop(0, once, lambda _, carry: (body(), carry)[1], 0)


def _interleave(*works):
    """Runs lists of steps, evenly mixed: the scheduler overlaps what stands close together in the program."""
    steps = [((i + 0.5) / len(work), step) for work in works for i, step in enumerate(work)]
    for _, step in sorted(steps, key=lambda item: item[0]):
        step()


# ---------------------------------------------------------------- the convolution

POINTS = (
    0.0,
    1.0,
    -1.0,
    2.0,
    -2.0,
    0.5,
    -0.5,
    4.0,
    -4.0,
)  # where Cook and Toom evaluate; and at infinity, last


def _cook_toom(m, K):
    """Matrices A (n, m), B (n, n), G (n, K), n = m + K - 1: m outputs of K taps g on n inputs x are A^T ((G g) * (B x)).

    Rows 1 and 2, 3 and 4, ... belong to points p and -p: they are equal but for the sign of their odd columns.
    """
    if m == 1:
        return np.ones((K, 1)), np.eye(K), np.eye(K)
    n = m + K - 1
    points = POINTS[: n - 1]
    A, B, G = np.zeros((n, m)), np.zeros((n, n)), np.zeros((n, K))
    for row, p in enumerate(points):
        others = [q for q in points if q != p]
        A[row] = p ** np.arange(m)
        B[row, : n - 1] = np.poly(others)[
            ::-1
        ]  # the polynomial that vanishes at the others, lowest power first
        G[row] = p ** np.arange(K) / np.prod([p - q for q in others])
    A[-1, -1] = G[-1, -1] = 1.0
    B[-1] = np.poly(points)[::-1]
    return A, B, G


def _weighted(weights, values):
    """The sum of weights * values, or None if it is empty; a value of None is zero."""
    total = None
    for weight, value in zip(weights, values):
        if weight == 0 or value is None:
            continue
        if total is None:
            total = value if weight == 1 else value * float(weight)
        elif weight == -1:
            total = total - value
        else:
            total = total + (value if weight == 1 else value * float(weight))
    return total


def _evaluate(matrix, values):
    """matrix times a list of rows, for A and B of _cook_toom: what p and -p share is computed once."""
    out = [_weighted(matrix[0], values)]
    for row in matrix[1:-1:2]:
        even, odd = _weighted(row[::2], values[::2]), _weighted(row[1::2], values[1::2])
        if even is None or odd is None:
            out += [even, even] if odd is None else [odd, -odd]
        else:
            out += [even + odd, even - odd]
    return out + [_weighted(matrix[-1], values)]


def _interpolate(A, values):
    """A^T times a list of rows."""
    if A.shape[1] == 1:
        return [_weighted(A[:, 0], values)]
    pairs = [(x + y, x - y) for x, y in zip(values[1:-1:2], values[2:-1:2])]
    return [
        _weighted(
            [A[0, i], *A[1:-1:2, i], A[-1, i]],
            [values[0], *(pair[i % 2] for pair in pairs), values[-1]],
        )
        for i in range(A.shape[1])
    ]


@dataclasses.dataclass(frozen=True)
class _Conv:
    """What the convolution needs in VMEM: the windows of a chunk, as B x, in float32 with margins, and the taps, as G g."""

    x_ref: jax.Array  # (1, band tokens, ...): what is convolved, D lanes from `offset` on
    offset: int
    halos: tuple  # of bands: the blocks above and below, and whether those are in the image
    windows_ref: jax.Array  # (slots, rows, w + 2 MARGIN, 128)
    taps_ref: jax.Array  # (n * K, D)
    bias_ref: jax.Array | None = None  # (1, D); the backward has no use for it
    spread_ref: jax.Array | None = None  # (2, rows, w, 128): of v, as A v; the backward's


def _window_row(plan, window, i):
    """Where the scratch holds row i of a window; a plain sum's windows share their rows."""
    return window + i if plan.outputs == 1 else window * plan.points + i


def _halos(plan, refs):
    band = pl.program_id(2)
    return tuple(zip(refs, (band > 0, band < plan.bands - 1)))


def _zero_margins(plan, windows_ref):
    """Nothing writes the margins later."""

    @pl.when((pl.program_id(1) == 0) & (pl.program_id(2) == 0))
    def _():
        def zero(j, carry):
            side = jnp.zeros((windows_ref.shape[1], MARGIN, LANES), jnp.float32)
            windows_ref[j, :, :MARGIN] = side
            windows_ref[j, :, MARGIN + plan.w :] = side
            return carry

        jax.lax.fori_loop(0, plan.slots, zero, 0)


def _image_row(plan, conv, chunk, r, j):
    """Row r of a chunk (w, lanes of tile j) float32; None where it lies outside the image for certain."""
    start, size = plan.tiles[j]
    lanes = slice(conv.offset + start, conv.offset + start + size)

    def read(ref, row):
        token = row * plan.w
        if not isinstance(row, int):
            token = pl.multiple_of(token, plan.w)
        return ref[0, pl.ds(token, plan.w), lanes].astype(jnp.float32)

    row = chunk * plan.chunk_rows + r
    if 0 <= r < plan.chunk_rows:
        return read(conv.x_ref, row)
    if not conv.halos and isinstance(row, int):
        return read(conv.x_ref, row) if 0 <= row < plan.band_rows else None
    last = plan.band_rows - 1
    outside, value = row < 0 if r < 0 else row > last, read(conv.x_ref, jnp.clip(row, 0, last))
    beyond = jnp.zeros_like(value)
    if conv.halos:
        halo, inside = conv.halos[r >= 0]
        row = row + plan.halo_rows if r < 0 else row - plan.band_rows
        beyond = jnp.where(inside, read(halo, jnp.clip(row, 0, plan.halo_rows - 1)), 0.0)
    return jnp.where(outside, beyond, value)


def _window_steps(plan, conv, chunk, j):
    """Steps that fill the windows of tile j of a chunk."""
    n, size, rows = plan.points, plan.tiles[j][1], {}

    def step(window):
        for r in range(window * plan.outputs - plan.pad, window * plan.outputs - plan.pad + n):
            if r not in rows:
                rows[r] = _image_row(plan, conv, chunk, r, j)
        values = [rows[window * plan.outputs - plan.pad + i] for i in range(n)]
        if plan.outputs > 1:
            values = _evaluate(plan.matrices[1], values)
        for i in range(n):
            if plan.outputs == 1 and window > 0 and i < n - 1:
                continue  # the window before has written it
            value = jnp.zeros((plan.w, size), jnp.float32) if values[i] is None else values[i]
            conv.windows_ref[
                j % plan.slots, _window_row(plan, window, i), MARGIN : MARGIN + plan.w, :size
            ] = value

    return [functools.partial(step, window) for window in range(plan.windows)]


def _shifted(plan, conv, window, i, column, j):
    """The K shifted versions (segment, lanes) of row i of a window of tile j, from `column` on."""
    first = MARGIN - plan.pad + column
    row, size = _window_row(plan, window, i), plan.tiles[j][1]
    return [
        conv.windows_ref[j % plan.slots, row, first + dx : first + dx + plan.segment, :size]
        for dx in range(plan.K)
    ]


def _convolution_steps(plan, conv, j, window, emit):
    """Steps that correlate a window of tile j with the taps and call emit(row, column, (segment, lanes))."""
    start, size = plan.tiles[j]

    def point(column, i, sums):
        total = None
        for dx, value in enumerate(_shifted(plan, conv, window, i, column, j)):
            tap = i * plan.K + dx
            term = value * conv.taps_ref[tap : tap + 1, start : start + size]
            total = term if total is None else total + term
        sums.append(total)

    def finish(column, sums):
        for i, value in enumerate(_interpolate(plan.matrices[0], sums)):
            emit(window * plan.outputs + i, column, value)

    return [
        step
        for column in range(0, plan.w, plan.segment)
        for sums in [[]]
        for step in [
            *(functools.partial(point, column, i, sums) for i in range(plan.points)),
            functools.partial(finish, column, sums),
        ]
    ]


def _filter_gradient_steps(plan, conv, kv_ref, do_ref, dtaps_ref, chunk, j):
    """Steps that add a chunk of tile j to dtaps_ref (1, n * K + 1, 8, D): gradients of G g, last of the bias.

    The gradient of (G g)[i] is the sum over windows of (A v)[i] times (B x)[i], x the cotangent shifted the opposite way;
    kept as 8 partial sums.
    """
    start, size = plan.tiles[j]
    lanes = slice(start, start + size)
    half = j % 2  # of the scratch: a tile need not wait for the one before

    def spread(window):
        tokens = [
            pl.ds(chunk * plan.chunk_tokens + (window * plan.outputs + y) * plan.w, plan.w)
            for y in range(plan.outputs)
        ]
        rows = [
            kv_ref[0, t, plan.width + start : plan.width + start + size].astype(jnp.float32)
            for t in tokens
        ]
        for i, value in enumerate(rows if plan.outputs == 1 else _evaluate(plan.matrices[0], rows)):
            conv.spread_ref[half, window * plan.spread_rows + i, :, :size] = value

    def point(i):
        sums = [None] * plan.K
        for window in range(plan.windows):
            for column in range(0, plan.w, plan.segment):
                row = window * plan.spread_rows + i % plan.spread_rows
                v = conv.spread_ref[half, row, column : column + plan.segment, :size]
                for dx, x in enumerate(_shifted(plan, conv, window, i, column, j)):
                    term = v * x
                    term = functools.reduce(
                        jnp.add, [term[s : s + 8] for s in range(0, plan.segment, 8)]
                    )
                    sums[dx] = term if sums[dx] is None else sums[dx] + term
        for dx, gradient in enumerate(sums):
            dtaps_ref[0, i * plan.K + dx, :, lanes] += gradient

    def bias():  # a product with eighths sums up the tokens, in the matrix unit
        eighths = jnp.full((8, plan.chunk_tokens), 1 / 8, plan.dtype)
        dtaps_ref[0, plan.points * plan.K, :, lanes] += _dot(
            plan, eighths, _tile(plan, do_ref, chunk, j), (1, 0)
        )

    return [
        *(functools.partial(spread, window) for window in range(plan.windows)),
        *(functools.partial(point, i) for i in range(plan.points)),
        bias,
    ]


def _write_steps(plan, conv, chunk, j, value, out_ref, offset=0, block=0):
    """Steps that write tile j of a chunk of out_ref: value(first, count), tokens x lanes, plus any convolution.

    They ask for `block` tokens at a time (0: one window's), just before the convolution adds to them: so little waits in
    registers.
    """
    start, size = plan.tiles[j]
    window = plan.outputs * plan.w
    if conv is None:
        block = block or plan.chunk_tokens
    elif not block or block % window:
        block = plan.chunk_tokens if plan.outputs == 1 else window
    lanes = slice(offset + start, offset + start + size)
    values = {}

    def compute(first):
        values[first] = value(first, block)
        if conv is None:
            out_ref[0, pl.ds(chunk * plan.chunk_tokens + first, block), lanes] = values.pop(
                first
            ).astype(out_ref.dtype)
        elif conv.bias_ref is not None:
            values[first] += conv.bias_ref[:, start : start + size]

    blocks = {
        first: functools.partial(compute, first) for first in range(0, plan.chunk_tokens, block)
    }
    if conv is None:
        return list(blocks.values())

    def emit(row, column, convolved):
        token = row * plan.w + column
        first = token // block * block
        total = values[first][token - first : token - first + plan.segment] + convolved
        token = pl.ds(chunk * plan.chunk_tokens + token, plan.segment)
        out_ref[0, token, lanes] = total.astype(out_ref.dtype)

    steps = _window_steps(plan, conv, chunk, j)
    for i in range(plan.windows):
        steps += [blocks[i * window]] if i * window in blocks else []
        steps += _convolution_steps(plan, conv, j, i, emit)
    return steps


# ---------------------------------------------------------------- by state: the passes over a chunk


def _tokens(plan, chunk):
    start = chunk * plan.chunk_tokens
    return pl.ds(
        start if isinstance(start, int) else pl.multiple_of(start, plan.chunk_tokens),
        plan.chunk_tokens,
    )


def _tile(plan, ref, chunk, i, offset=0):
    start, size = plan.tiles[i]
    return ref[0, _tokens(plan, chunk), offset + start : offset + start + size]


def _accumulate(ref, index, value, first):
    """ref[index] = value on the first visit, else += value; `first` may be traced."""
    if isinstance(first, bool):
        ref[index] = value if first else ref[index] + value
    else:
        ref[index] = jnp.where(first, 0.0, ref[index]) + value


def _state_pass(plan, kv_ref, chunk, acc_ref, sum_ref, first):
    """Adds one chunk to acc_ref (pairs, 128, 128), the sums of phi(k)^T v, and to sum_ref (1, D), of relu(k)."""
    for i, (start, size) in enumerate(plan.tiles):
        positive = jnp.maximum(_tile(plan, kv_ref, chunk, i).astype(jnp.float32), 0.0)
        lanes = (slice(None), slice(start, start + size))
        _accumulate(sum_ref, lanes, jnp.sum(positive, 0, keepdims=True), first)
        phi_k = (positive + EPSILON).astype(plan.dtype)
        for p, (row, j) in enumerate(plan.pairs):
            if row == i:
                product = _dot(plan, phi_k, _tile(plan, kv_ref, chunk, j, plan.width), (0, 0))
                _accumulate(acc_ref, (p, slice(size), slice(plan.tiles[j][1])), product, first)


def _finish_state(plan, acc_ref, out_ref):
    """Zeroes what mixes heads and casts: acc_ref (pairs, 128, 128) float32 -> out_ref."""
    for p, (i, j) in enumerate(plan.pairs):
        rows, columns = plan.tiles[i][1], plan.tiles[j][1]
        value = acc_ref[p, :rows, :columns]
        out_ref[p, :rows, :columns] = _zero_other_heads(plan, i, j, value).astype(out_ref.dtype)


def _mean_phi_k(plan, sum_ref):
    """(1, D) sums of relu(k) -> means of phi(k). Padded tokens add nothing to the sum: the epsilon is added here."""
    return sum_ref[...] * (1 / plan.tokens) + EPSILON


def _product(plan, xs, state_ref, i, transpose):
    """Tile i of x S (or x S^T): the sum over the tiles j of xs[j] S[j, i] (or xs[j] S[i, j]^T)."""
    total = None
    for p, pair in enumerate(plan.pairs):
        row, column = pair if transpose else pair[::-1]
        if row == i:
            state = state_ref[p, : plan.tiles[pair[0]][1], : plan.tiles[pair[1]][1]]
            term = _dot(plan, xs[column], state, (1, 1) if transpose else (1, 0))
            total = term if total is None else total + term
    return total


def _reciprocals(plan, phi_q, mean):
    """z (tokens, 1) of each head: 1 / (phi(q) . mean phi(k) + epsilon)."""
    products = [
        phi_q[i] * mean[:, start : start + size] for i, (start, size) in enumerate(plan.tiles)
    ]
    return [_reciprocal(plan, total + EPSILON) for total in _head_sums(plan, products)]


def _parts(value):
    return lambda first, count: value[first : first + count]


def _output_pass(plan, q_ref, state_ref, mean, conv, out_ref, chunk):
    """Writes one chunk of out_ref: phi(q) S z, plus the convolution of the padded v."""
    phi_q = [_phi(_tile(plan, q_ref, chunk, i)) for i in range(len(plan.tiles))]
    z = [
        z * (1 / plan.tokens) for z in _reciprocals(plan, phi_q, mean)
    ]  # S is a sum, not yet a mean
    phi_q = [x.astype(plan.dtype) for x in phi_q]
    for j in range(len(plan.tiles)):
        attention = _product(plan, phi_q, state_ref, j, transpose=False) * _per_lane(plan, j, z)
        _interleave(_write_steps(plan, conv, chunk, j, _parts(attention), out_ref))


def _query_pass(plan, q_ref, do_ref, state_ref, mean, dq_ref, acc_ref, dmean_ref, chunk, first):
    """Writes one chunk of dq; adds it to acc_ref, the sums of phi(q)^T (z do / T), and dmean_ref (1, D)."""
    tiles = range(len(plan.tiles))
    q = [_tile(plan, q_ref, chunk, i).astype(jnp.float32) for i in tiles]
    do = [_tile(plan, do_ref, chunk, j) for j in tiles]
    phi_q = [_phi(x) for x in q]
    z = _reciprocals(plan, phi_q, mean)
    z_mean = [x * (1 / plan.tokens) for x in z]
    u = [_product(plan, do, state_ref, i, transpose=True) for i in tiles]  # T do S^T
    weight = _head_sums(plan, [phi_q[i] * u[i] for i in tiles])
    dden = [-(z[n] * z_mean[n]) * weight[n] for n in range(plan.num_heads)]  # (tokens, 1)
    for i, (start, size) in enumerate(plan.tiles):
        lanes = (slice(None), slice(start, start + size))
        dden_i = _per_lane(plan, i, dden)
        dphi_q = u[i] * _per_lane(plan, i, z_mean) + dden_i * mean[lanes]
        dq_ref[0, _tokens(plan, chunk), lanes[1]] = jnp.where(q[i] > 0, dphi_q, 0.0).astype(
            dq_ref.dtype
        )
        _accumulate(dmean_ref, lanes, jnp.sum(dden_i * phi_q[i], 0, keepdims=True), first)
    phi_q = [x.astype(plan.dtype) for x in phi_q]
    zdo = [
        (do[j].astype(jnp.float32) * _per_lane(plan, j, z_mean)).astype(plan.dtype) for j in tiles
    ]
    for p, (i, j) in enumerate(plan.pairs):
        product = _dot(plan, phi_q[i], zdo[j], (0, 0))
        _accumulate(acc_ref, (p, slice(plan.tiles[i][1]), slice(plan.tiles[j][1])), product, first)


def _key_pass(plan, kv_ref, do_ref, dstate_ref, dmean, conv, dkv_ref, dtaps_ref, chunk, once=None):
    """Writes one chunk of dk and dv and adds to the filter's gradients; `once` as in _alone, a tile at a time."""

    def k(i):
        return _tile(plan, kv_ref, chunk, i).astype(jnp.float32)

    def write_dk(i):
        start, size = plan.tiles[i]
        v = {j: _tile(plan, kv_ref, chunk, j, plan.width) for row, j in plan.pairs if row == i}
        dphi_k = _product(plan, v, dstate_ref, i, transpose=True)
        dphi_k = dphi_k + dmean[:, start : start + size] * (1 / plan.tokens)
        dk = jnp.where(k(i) > 0, dphi_k, 0.0)
        dkv_ref[0, _tokens(plan, chunk), start : start + size] = dk.astype(dkv_ref.dtype)

    def write_dv(j):
        phi_k = {i: _phi(k(i)).astype(plan.dtype) for i, column in plan.pairs if column == j}
        dv = _product(plan, phi_k, dstate_ref, j, transpose=False)
        _interleave(_write_steps(plan, conv, chunk, j, _parts(dv), dkv_ref, plan.width))
        if conv is not None:
            _interleave(_filter_gradient_steps(plan, conv, kv_ref, do_ref, dtaps_ref, chunk, j))

    for i in range(len(plan.tiles)):
        _alone(once, functools.partial(write_dk, i))
    for j in range(len(plan.tiles)):
        _alone(once, functools.partial(write_dv, j))


# ---------------------------------------------------------------- direct: by the T x T matrix of each head

ROWS = 64  # of a head's matrices in one step, so that few of their float32 values are spilled; the backward's 128 were best


def _whole_tile(plan, ref, i, offset=0, block=None):
    """Tile i of all tokens, or of those of `block` (first, count)."""
    start, size = plan.tiles[i]
    first, count = block or (0, plan.tokens)
    return ref[0, first : first + count, offset + start : offset + start + size]


class _Heads:
    """The attention matrices of the heads, and what the backward needs of them, computed in steps, by blocks of rows."""

    def __init__(self, plan, q_ref, kv_ref, do_ref=None):
        self.plan, self.q_ref, self.kv_ref, self.do_ref = plan, q_ref, kv_ref, do_ref
        self.weights = {}  # head -> normalised attention matrix (T, T), in the dtype of q
        self.dscores = {}  # head -> gradient of phi(q) phi(k)^T (T, T), in the dtype of q
        self.phi_ks = {}  # tile -> phi(k) (T, lanes), in the dtype of q

    def phi_k(self, i):
        if i not in self.phi_ks:
            self.phi_ks[i] = _phi(_whole_tile(self.plan, self.kv_ref, i)).astype(self.plan.dtype)
        return self.phi_ks[i]

    def steps(self, n):
        """Steps that compute head n."""
        rows = ROWS if self.do_ref is None else 2 * ROWS
        blocks = [
            (first, min(rows, self.plan.tokens - first))
            for first in range(0, self.plan.tokens, rows)
        ]
        weights, dscores = [], []

        def finish():
            self.weights[n] = jnp.concatenate(weights, axis=0)
            if self.do_ref is not None:
                self.dscores[n] = jnp.concatenate(dscores, axis=0)

        return [
            step for block in blocks for step in self._block_steps(n, block, weights, dscores)
        ] + [finish]

    def _block_steps(self, n, block, weights_out, dscores_out):
        """Steps that compute the rows `block` of head n's matrices and append them to the lists."""
        plan = self.plan
        values = dict(scores=0.0, dweights=0.0)

        def add_scores(i):
            phi_q = _only_head(
                plan, i, n, _phi(_whole_tile(plan, self.q_ref, i, block=block))
            ).astype(plan.dtype)
            values["scores"] += _dot(plan, phi_q, self.phi_k(i), (1, 1))

        def add_dweights(j):
            do = _only_head(
                plan, j, n, _whole_tile(plan, self.do_ref, j, block=block).astype(jnp.float32)
            ).astype(plan.dtype)
            values["dweights"] += _dot(
                plan, do, _whole_tile(plan, self.kv_ref, j, plan.width), (1, 1)
            )

        def normalise():
            mean = jnp.sum(values["scores"], axis=1, keepdims=True) * (1 / plan.tokens)
            z_mean = _reciprocal(plan, mean + EPSILON) * (1 / plan.tokens)
            weights = values["scores"] * z_mean
            weights_out.append(weights.astype(plan.dtype))
            if self.do_ref is not None:
                mean = jnp.sum(weights * values["dweights"], axis=1, keepdims=True)
                dscores_out.append(((values["dweights"] - mean) * z_mean).astype(plan.dtype))

        tiles = plan.tiles_of(n)
        steps = [functools.partial(add_scores, i) for i in tiles]
        if self.do_ref is not None:
            steps += [functools.partial(add_dweights, j) for j in tiles]
        return steps + [normalise]

    def steps_of_tile(self, i):
        """Steps that compute the heads which tile i is the first to need."""
        return [
            step
            for n in self.plan.heads_of(i)
            if i == self.plan.tiles_of(n)[0]
            for step in self.steps(n)
        ]

    def product(self, i, matrices, x, block, transpose=False):
        """The rows `block` of tile i (T, lanes) of the heads' matrices (or their transposes) times x (T, lanes).

        Each lane is by its own head's matrix.
        """
        heads, rows = self.plan.heads_of(i), slice(block[0], block[0] + block[1])
        out = None
        for n in reversed(heads):
            matrix = matrices[n][:, rows] if transpose else matrices[n][rows]
            product = _dot(self.plan, matrix, x, (0 if transpose else 1, 0))
            out = product if out is None else _only_head(self.plan, i, n, product, out)
        return out


def _direct_forward(plan, q_ref, kv_ref, conv, out_ref):
    """Writes out_ref (1, T, D). The matrices of a head go beside the convolution of the tile before."""
    heads = _Heads(plan, q_ref, kv_ref)

    def attention(j):
        return lambda *block: heads.product(
            j, heads.weights, _whole_tile(plan, kv_ref, j, plan.width), block
        )

    vector_steps = []
    for j in range(len(plan.tiles)):
        _interleave(vector_steps, heads.steps_of_tile(j))
        vector_steps = _write_steps(
            plan, conv, 0, j, attention(j), out_ref, block=0 if conv else plan.tokens
        )
    _interleave(vector_steps)


def _direct_backward(plan, q_ref, kv_ref, do_ref, conv, dq_ref, dkv_ref, dtaps_ref):
    """Writes dq_ref (1, T, D) and dkv_ref (1, T, 2 D), and adds to dtaps_ref."""
    heads = _Heads(plan, q_ref, kv_ref, do_ref)
    columns = (
        LANES if plan.tokens % LANES == 0 else plan.tokens
    )  # a block of a transposed matrix: whole lane tiles

    def matrix_steps(i):
        start, size = plan.tiles[i]

        def write_dq(*block):
            dphi_q = heads.product(i, heads.dscores, heads.phi_k(i), block)
            q = _whole_tile(plan, q_ref, i, block=block).astype(jnp.float32)
            dq_ref[0, block[0] : block[0] + block[1], start : start + size] = jnp.where(
                q > 0, dphi_q, 0.0
            ).astype(dq_ref.dtype)

        def write_dk(*block):
            phi_q = _phi(_whole_tile(plan, q_ref, i)).astype(plan.dtype)
            dphi_k = heads.product(i, heads.dscores, phi_q, block, transpose=True)
            k = _whole_tile(plan, kv_ref, i, block=block).astype(jnp.float32)
            dkv_ref[0, block[0] : block[0] + block[1], start : start + size] = jnp.where(
                k > 0, dphi_k, 0.0
            ).astype(dkv_ref.dtype)

        return [
            *heads.steps_of_tile(i),
            *(
                functools.partial(write, first, columns)
                for first in range(0, plan.tokens, columns)
                for write in (write_dq, write_dk)
            ),
        ]

    def dv(i):
        return lambda *block: heads.product(
            i, heads.weights, _whole_tile(plan, do_ref, i), block, transpose=True
        )

    vector_steps = []
    for i in range(len(plan.tiles)):
        _interleave(vector_steps, matrix_steps(i))
        vector_steps = _write_steps(plan, conv, 0, i, dv(i), dkv_ref, plan.width, block=columns)
        if conv is not None:
            vector_steps += _filter_gradient_steps(plan, conv, kv_ref, do_ref, dtaps_ref, 0, i)
    _interleave(vector_steps)


# ---------------------------------------------------------------- the kernels; grid (core, image of the core, band)


def _take(refs, *counts):
    """Splits refs into groups of the given sizes."""
    refs = iter(refs)
    return [[next(refs) for _ in range(count)] for count in counts]


def _forward_kernel(plan, *refs):
    """Whole images: q, kv[, taps, bias] -> out; scratch [windows][, state, acc, sum]."""
    k = bool(plan.K)
    (q_ref, kv_ref), taps, (out_ref,), windows, scratch = _take(
        refs, 2, 2 * k, 1, k, 0 if plan.direct else 3
    )
    conv = _Conv(kv_ref, plan.width, (), *windows, *taps) if k else None
    if k:
        _zero_margins(plan, conv.windows_ref)
    if plan.direct:
        return _direct_forward(plan, q_ref, kv_ref, conv, out_ref)
    state_ref, acc_ref, sum_ref = scratch
    _loop(plan.chunks, lambda c: _state_pass(plan, kv_ref, c, acc_ref, sum_ref, c == 0))
    _finish_state(plan, acc_ref, state_ref)
    mean = _mean_phi_k(plan, sum_ref)
    _loop(plan.chunks, lambda c: _output_pass(plan, q_ref, state_ref, mean, conv, out_ref, c))


def _backward_kernel(plan, *refs):
    """Whole images: q, kv, do[, taps] -> dq, dkv[, dtaps]; scratch [windows, spread]
    [, state, dstate, acc, sum, dmean]."""
    k = bool(plan.K)
    (q_ref, kv_ref, do_ref), taps, (dq_ref, dkv_ref), dtaps, windows, scratch = _take(
        refs, 3, k, 2, k, 2 * k, 0 if plan.direct else 5
    )
    conv = _backward_conv(do_ref, (), *windows, *taps) if k else None
    dtaps_ref = dtaps[0] if k else None
    if k:
        _zero_first(dtaps_ref)
        _zero_margins(plan, conv.windows_ref)
    if plan.direct:
        return _direct_backward(plan, q_ref, kv_ref, do_ref, conv, dq_ref, dkv_ref, dtaps_ref)
    state_ref, dstate_ref, acc_ref, sum_ref, dmean_ref = scratch
    _loop(plan.chunks, lambda c: _state_pass(plan, kv_ref, c, acc_ref, sum_ref, c == 0))
    _finish_state(plan, acc_ref, state_ref)
    mean = _mean_phi_k(plan, sum_ref)
    _loop(
        plan.chunks,
        lambda c: _query_pass(
            plan, q_ref, do_ref, state_ref, mean, dq_ref, acc_ref, dmean_ref, c, c == 0
        ),
    )
    _finish_state(plan, acc_ref, dstate_ref)
    dmean = dmean_ref[...]
    _loop(
        plan.chunks,
        lambda c: _key_pass(plan, kv_ref, do_ref, dstate_ref, dmean, conv, dkv_ref, dtaps_ref, c),
    )


def _backward_conv(do_ref, halos, windows_ref, spread_ref, taps_ref):
    return _Conv(do_ref, 0, halos, windows_ref, taps_ref, spread_ref=spread_ref)


def _zero_first(dtaps_ref):
    @pl.when((pl.program_id(1) == 0) & (pl.program_id(2) == 0))
    def _():
        dtaps_ref[...] = jnp.zeros_like(dtaps_ref)


def _state_kernel(plan, kv_ref, state_ref, mean_ref, acc_ref, sum_ref):
    """A band: adds to the state; the last band writes it."""
    band = pl.program_id(2)
    _loop(
        plan.chunks,
        lambda c: _state_pass(plan, kv_ref, c, acc_ref, sum_ref, (band == 0) & (c == 0)),
    )

    @pl.when(band == plan.bands - 1)
    def _():
        _finish_state(plan, acc_ref, state_ref.at[0])
        mean_ref[0] = _mean_phi_k(plan, sum_ref)


def _output_kernel(plan, q_ref, state_ref, mean_ref, *refs, offset):
    """A band: q, state, mean[, v, v above, v below, taps, bias] -> out; scratch [windows]."""
    k = bool(plan.K)
    values, taps, (out_ref,), windows = _take(refs, 3 * k, 2 * k, 1, k)
    conv = _Conv(values[0], offset, _halos(plan, values[1:]), *windows, *taps) if k else None
    if k:
        _zero_margins(plan, conv.windows_ref)
    mean = mean_ref[0]
    _loop(plan.chunks, lambda c: _output_pass(plan, q_ref, state_ref.at[0], mean, conv, out_ref, c))


def _query_kernel(plan, q_ref, do_ref, state_ref, mean_ref, dq_ref, dstate_ref, dmean_ref, acc_ref):
    """A band: writes dq and adds to the gradient of the state; the last band writes that."""
    band = pl.program_id(2)
    mean = mean_ref[0]
    _loop(
        plan.chunks,
        lambda c: _query_pass(
            plan,
            q_ref,
            do_ref,
            state_ref.at[0],
            mean,
            dq_ref,
            acc_ref,
            dmean_ref.at[0],
            c,
            (band == 0) & (c == 0),
        ),
    )

    @pl.when(band == plan.bands - 1)
    def _():
        _finish_state(plan, acc_ref, dstate_ref.at[0])


def _key_kernel(plan, kv_ref, do_ref, dstate_ref, dmean_ref, *refs):
    """A band: kv, do, dstate, dmean[, do above, do below, taps] -> dkv[, dtaps]; scratch [windows, spread]."""
    k = bool(plan.K)
    halos, taps, (dkv_ref,), dtaps, windows = _take(refs, 2 * k, k, 1, k, 2 * k)
    conv = _backward_conv(do_ref, _halos(plan, halos), *windows, *taps) if k else None
    dtaps_ref = dtaps[0] if k else None
    if k:
        _zero_first(dtaps_ref)
        _zero_margins(plan, conv.windows_ref)
    dmean = dmean_ref[0]
    once = jnp.minimum(pl.program_id(2) + 1, 1)  # one, but the compiler does not know
    _loop(
        plan.chunks,
        lambda c: _key_pass(
            plan, kv_ref, do_ref, dstate_ref.at[0], dmean, conv, dkv_ref, dtaps_ref, c, once
        ),
    )


# ---------------------------------------------------------------- the calls


def forward(q, kv, conv_kernel, conv_bias, *, num_heads, grid, interpret=False):
    """Returns the output (B, T, D) of `linear_attention`, whose arguments these are, and None: the backward needs no more."""
    plan = _plan_of(q, conv_kernel, num_heads, grid, FORWARD_ARRAYS)
    call = _Call(plan, q.shape[0], grid, interpret)
    q, kv = call.pad(q), call.pad(kv)
    taps = [call.constant(x) for x in _per_channel(plan, conv_kernel, conv_bias)]
    if plan.bands == 1:
        scratch = call.windows() + ([] if plan.direct else [call.state(), call.acc(), call.row()])
        (out,) = call(
            _forward_kernel,
            [call.band(q), call.band(kv), *taps],
            [call.band_like(q)],
            scratch,
            products=2,
        )
        return call.unpad(out), None
    state, mean = call.state_of(kv)
    values = []
    if plan.K:
        aligned = plan.width % LANES == 0  # then v can be a block of its own
        values = [call.band(kv, half=aligned), *call.halos(kv, half=aligned)]
    (out,) = call(
        functools.partial(_output_kernel, offset=0 if plan.K and aligned else plan.width),
        [call.band(q), call.image(state), call.image(mean), *values, *taps],
        [call.band_like(q)],
        call.windows(),
        products=1,
    )
    return call.unpad(out), None


def backward(q, kv, conv_kernel, conv_bias, saved, do, *, num_heads, grid, interpret=False):
    """The gradients (dq, dkv, dconv_kernel, dconv_bias) for the cotangent `do` (B, T, D); recomputes the state."""
    plan = _plan_of(q, conv_kernel, num_heads, grid, BACKWARD_ARRAYS)
    call = _Call(plan, q.shape[0], grid, interpret)
    q, kv, do = call.pad(q), call.pad(kv), call.pad(do)
    taps = [call.constant(x) for x in _per_channel(plan, conv_kernel, None, flip=True)]
    dtaps = [call.core_like((plan.points * plan.K + 1, 8, plan.width))] if plan.K else []
    if plan.bands == 1:
        scratch = call.windows(spread=True)
        if not plan.direct:
            scratch += [call.state(), call.state(), call.acc(), call.row(), call.row()]
        dq, dkv, *dtaps = call(
            _backward_kernel,
            [call.band(q), call.band(kv), call.band(do), *taps],
            [call.band_like(q), call.band_like(kv), *dtaps],
            scratch,
            products=5,
            convolutions=2,
        )
    else:
        state, mean = call.state_of(kv)
        dq, dstate, dmean = call(
            _query_kernel,
            [call.band(q), call.band(do), call.image(state), call.image(mean)],
            [call.band_like(q), call.image_like(state), call.image_like(mean)],
            [call.acc()],
            products=2,
            convolutions=0,
        )
        dkv, *dtaps = call(
            _key_kernel,
            [
                call.band(kv),
                call.band(do),
                call.image(dstate),
                call.image(dmean),
                *(call.halos(do) if plan.K else []),
                *taps,
            ],
            [call.band_like(kv), *dtaps],
            call.windows(spread=True),
            products=2,
            convolutions=2,
            divisions=0,
        )
    dq, dkv = call.unpad(dq), call.unpad(dkv)
    if not plan.K:
        return dq, dkv, None, None
    # (cores, n * K + 1, 8 partial sums, D) -> (n * K + 1, H): all heads share the filters
    dtaps = jnp.sum(dtaps[0], axis=(0, 2)).reshape(-1, num_heads, plan.head_width).sum(1)
    dconv_kernel = _times(
        plan.matrices[2].T, dtaps[:-1].reshape(plan.points, plan.K, plan.head_width)
    )[::-1, ::-1]
    return dq, dkv, dconv_kernel.astype(conv_kernel.dtype), dtaps[-1].astype(conv_bias.dtype)


def _times(matrix, x):
    """A constant matrix (i, j) times x (j, ...), float32."""
    return jnp.einsum(
        "ij,j...->i...",
        jnp.asarray(matrix, jnp.float32),
        x.astype(jnp.float32),
        precision=jax.lax.Precision.HIGHEST,
    )


def _per_channel(plan, conv_kernel, conv_bias, flip=False):
    """The taps G g (n * K, D) and the bias (1, D), repeated for each head, float32; what is None is left out."""
    if conv_kernel is not None:
        conv_kernel = _times(plan.matrices[2], conv_kernel[::-1, ::-1] if flip else conv_kernel)
    return [
        jnp.tile(x.astype(jnp.float32).reshape(-1, plan.head_width), (1, plan.num_heads))
        for x in (conv_kernel, conv_bias)
        if x is not None
    ]


def _vmem_bytes():
    """VMEM of a core of the TPU in use, or of the one the mesh in context names; else the smallest of any TPU."""
    return pltpu.get_tpu_info().vmem_capacity_bytes if pltpu.is_tpu_device() else 16 * 2**20


def refusal(*, width, num_heads, grid, conv_size, dtype):
    """Why VMEM does not hold the forward or the backward of a case, or "" where it holds both."""
    try:
        for arrays in (FORWARD_ARRAYS, BACKWARD_ARRAYS):
            _make_plan(
                grid[0] * grid[1], width, jnp.dtype(dtype), conv_size, num_heads, grid, arrays
            )
    except ValueError as error:
        return str(error)
    return ""


def loop_turns(width, num_heads, grid, conv_size, dtype, backward):
    """How often the loops inside the kernels and over their bands turn for an image."""
    plan = _make_plan(
        grid[0] * grid[1],
        width,
        jnp.dtype(dtype),
        conv_size,
        num_heads,
        grid,
        BACKWARD_ARRAYS if backward else FORWARD_ARRAYS,
    )
    return plan.chunks * plan.bands


def _plan_of(q, conv_kernel, num_heads, grid, arrays):
    return _make_plan(
        *q.shape[1:],
        q.dtype,
        0 if conv_kernel is None else conv_kernel.shape[0],
        num_heads,
        grid,
        arrays,
    )


def _make_plan(T, D, dtype, K, num_heads, grid, arrays):
    """Chooses the form, the chunks and the bands; `arrays` (T, D) arrays pass through HBM.

    Raises: ValueError where no band is small enough for VMEM: the kernel does not cut rows.
    """
    h, w = grid
    sublanes = 8 if dtype == jnp.float32 else 16
    w = pl.cdiv(w, sublanes) * sublanes
    chunk_rows = pl.cdiv(h, pl.cdiv(h * w, CHUNK_TOKENS))
    chunks = pl.cdiv(h, chunk_rows)
    direct = chunks == 1 and h * w == T and D // num_heads >= LANES
    plan = _Plan(
        num_heads=num_heads,
        head_width=D // num_heads,
        tokens=T,
        w=w,
        chunk_rows=chunk_rows,
        chunks=chunks,
        bands=1,
        direct=direct,
        slots=pl.cdiv(D, LANES),
        K=K,
        dtype=dtype,
    )
    limit = _vmem_bytes()
    for slots in (plan.slots, 2):
        plan = dataclasses.replace(plan, slots=slots)
        if _image_bytes(plan, arrays) <= limit:
            return plan
    # Bands: whole chunks, and whole halo blocks of the band's neighbours. As few as fit, but rather more than rows added to
    # fill the last: those cost a copy of every array. Smaller chunks, of which less is spilled, where none fits.
    halo_rows = max(1, pl.next_power_of_2(K // 2))
    needed = []
    for chunk_tokens in (CHUNK_TOKENS, CHUNK_TOKENS // 2, CHUNK_TOKENS // 4):
        chunk_rows = max(1, min(pl.cdiv(h, 2), chunk_tokens // w))
        step = math.lcm(chunk_rows, halo_rows)
        rows = pl.cdiv(h, step) * step
        fitting = []
        for bands in range(2, max(2, rows // step) + 1):
            band_rows = pl.cdiv(pl.cdiv(h, bands), step) * step
            plan = dataclasses.replace(
                plan,
                chunk_rows=chunk_rows,
                chunks=band_rows // chunk_rows,
                bands=bands,
                direct=False,
            )
            needed.append(_band_bytes(plan, arrays))
            if needed[-1] <= limit:
                fitting.append(plan)
        if fitting:
            return min(fitting, key=lambda plan: (plan.bands * plan.band_rows, plan.bands))
    state = len(plan.pairs) * LANES * LANES * 4
    raise ValueError(
        f"pallas_tpu walks the rows of a grid, and the fewest rows of {h} x {w} tokens of width {D} {dtype.name} "
        f"take {min(needed) / 2**20:.1f} MiB of VMEM, a float32 state of {num_heads} heads of {D // num_heads} "
        f"({state / 2**20:.1f} MiB) among them; it has {limit / 2**20:.1f}"
    )


def _image_bytes(plan, arrays):
    """Bytes of VMEM that a whole image takes: double-buffered blocks, scratch, and what the compiler spills of a chunk."""
    itemsize, backward = jnp.dtype(plan.dtype).itemsize, arrays == BACKWARD_ARRAYS
    blocks = 2 * arrays * plan.band_tokens * plan.lanes * itemsize
    state = columns = 0
    if not plan.direct:
        state = len(plan.pairs) * LANES * LANES * (4 + itemsize * (2 if backward else 1))
        columns = _column_bytes(plan, 4 if backward else 2)
    return blocks + state + _conv_bytes(plan, backward) + columns + _spilled_bytes(plan) + 2**20


def _band_bytes(plan, arrays):
    """The same of a band: the most that any of the kernels takes."""
    itemsize = jnp.dtype(plan.dtype).itemsize
    array, halo = (
        rows * plan.w * plan.lanes * itemsize for rows in (plan.band_rows, plan.halo_rows)
    )
    state, acc = (len(plan.pairs) * LANES * LANES * size for size in (itemsize, 4))
    kernels = [2 * (2 * array + state) + acc]  # of the state
    if arrays == FORWARD_ARRAYS:
        values = 1 if plan.width % LANES == 0 else 2  # v, or k and v
        kernels += [
            2 * ((2 + values) * array + 2 * values * halo + state)
            + _conv_bytes(plan, False)
            + _column_bytes(plan, 2)
        ]
    else:
        kernels += [
            2 * (3 * array + 2 * state) + acc + _column_bytes(plan, 4),  # of the queries
            2 * (5 * array + 2 * halo + state) + _conv_bytes(plan, True),
        ]  # of the keys
    return max(kernels) + _spilled_bytes(plan)


def _conv_bytes(plan, backward):
    """Of the convolution's scratch, its taps and the sums of their gradients; a chip's tiles are of eight rows."""
    if not plan.K:
        return 0
    scratch = math.prod(plan.windows_shape) * 4 + (
        math.prod(plan.spread_shape) * 4 if backward else 0
    )
    return scratch + 2 * (plan.points * plan.K + 8) * plan.lanes * 4 * (9 if backward else 1)


def _column_bytes(plan, columns):
    """Of (tokens, 1) float32 of each head: a column fills whole registers, and spills as such."""
    return columns * plan.num_heads * plan.chunk_tokens * LANES * 4


def _spilled_bytes(plan):
    """Of the other values of a chunk: 2.4 (T, D) float32 arrays at most were seen."""
    return 3 * plan.chunk_tokens * plan.lanes * 4


@dataclasses.dataclass(frozen=True)
class _Call:
    """Builds the blocks of the calls; the grid is (core, image of the core, band).

    The axis of cores is for chips whose two cores share a kernel: each sums the filters' gradients for itself.
    """

    plan: _Plan
    batch: int
    grid: tuple[int, int]
    interpret: bool

    @property
    def cores(self):
        return 2 if self.batch % 2 == 0 else 1

    def _image_index(self, core, image):
        return core * (self.batch // self.cores) + image

    # Inputs are (array, BlockSpec), outputs (ShapeDtypeStruct, BlockSpec).
    def band(self, x, half=False):
        """A band of (B, T, C); `half` takes the second half of C."""
        block = (1, self.plan.band_tokens, x.shape[2] // (2 if half else 1))
        return x, pl.BlockSpec(block, lambda c, b, i: (self._image_index(c, b), i, int(half)))

    def halos(self, x, half=False):
        """The rows above and below a band, clamped to the image; the kernel zeroes what lies outside."""
        plan = self.plan
        block = (1, plan.halo_rows * plan.w, x.shape[2] // (2 if half else 1))
        step = plan.band_rows // plan.halo_rows
        last = plan.bands * step - 1
        return [
            (
                x,
                pl.BlockSpec(
                    block,
                    lambda c, b, i: (
                        self._image_index(c, b),
                        jnp.maximum(i * step - 1, 0),
                        int(half),
                    ),
                ),
            ),
            (
                x,
                pl.BlockSpec(
                    block,
                    lambda c, b, i: (
                        self._image_index(c, b),
                        jnp.minimum((i + 1) * step, last),
                        int(half),
                    ),
                ),
            ),
        ]

    def image(self, x):
        """All of one image's (B, ...)."""
        tail = (0,) * (x.ndim - 1)
        return x, pl.BlockSpec((1, *x.shape[1:]), lambda c, b, i: (self._image_index(c, b), *tail))

    def constant(self, x):
        return x, pl.BlockSpec(x.shape, lambda c, b, i: (0,) * x.ndim)

    def band_like(self, x):
        return self._output(x.shape, x.dtype, self.band(x)[1])

    def image_like(self, x):
        return self._output(x.shape, x.dtype, self.image(x)[1])

    def core_like(self, shape):
        """A float32 sum of each core: (cores, ...)."""
        spec = pl.BlockSpec((1, *shape), lambda c, b, i: (c, *(0,) * len(shape)))
        return self._output((self.cores, *shape), jnp.float32, spec)

    def _output(self, shape, dtype, spec):
        return jax.ShapeDtypeStruct(shape, dtype), spec

    # Scratch.
    def windows(self, spread=False):
        """The convolution's scratch, if there is a convolution; the backward's with `spread`."""
        shapes = (
            [self.plan.windows_shape, self.plan.spread_shape][: 1 + spread] if self.plan.K else []
        )
        return [pltpu.VMEM(shape, jnp.float32) for shape in shapes]

    def state(self):
        return pltpu.VMEM((len(self.plan.pairs), LANES, LANES), self.plan.dtype)

    def acc(self):
        return pltpu.VMEM((len(self.plan.pairs), LANES, LANES), jnp.float32)

    def row(self):
        return pltpu.VMEM((1, self.plan.width), jnp.float32)

    def state_of(self, kv):
        """The state (B, pairs, 128, 128) and the mean of phi(k) (B, 1, D) by a call of their own."""
        plan, B = self.plan, self.batch
        state = jax.ShapeDtypeStruct((B, len(plan.pairs), LANES, LANES), plan.dtype)
        mean = jax.ShapeDtypeStruct((B, 1, plan.width), jnp.float32)
        return self(
            _state_kernel,
            [self.band(kv)],
            [self.image_like(state), self.image_like(mean)],
            [self.acc(), self.row()],
            products=1,
            convolutions=0,
            divisions=0,
        )

    def pad(self, x):
        """(B, h * w, C) -> zeros added up to whole sublane tiles and bands; no copy where they fit."""
        plan, (h, w) = self.plan, self.grid
        rows = plan.band_rows * plan.bands
        if (h, w) == (rows, plan.w):
            return x
        B, _, C = x.shape
        x = jnp.pad(x.reshape(B, h, w, C), ((0, 0), (0, rows - h), (0, plan.w - w), (0, 0)))
        return x.reshape(B, rows * plan.w, C)

    def unpad(self, x):
        plan, (h, w) = self.plan, self.grid
        rows = plan.band_rows * plan.bands
        if (h, w) == (rows, plan.w):
            return x
        B, _, C = x.shape
        return x.reshape(B, rows, plan.w, C)[:, :h, :w].reshape(B, h * w, C)

    def __call__(self, kernel, inputs, outputs, scratch, *, products, convolutions=1, divisions=1):
        """Runs kernel(plan, *refs). The counts are of its work over all tokens."""
        plan = self.plan
        taps = plan.points * plan.K / plan.outputs if plan.K else 0
        product = plan.tokens if plan.direct else plan.head_width
        flops = int(
            2 * self.batch * plan.tokens * plan.width * (products * product + convolutions * taps)
        )
        moved = sum(_bytes_moved(x, spec, self) for x, spec in [*inputs, *outputs])
        return pl.pallas_call(
            functools.partial(kernel, plan),
            grid=(self.cores, self.batch // self.cores, plan.bands),
            in_specs=[spec for _, spec in inputs],
            out_specs=[spec for _, spec in outputs],
            out_shape=[x for x, _ in outputs],
            scratch_shapes=scratch,
            interpret=self.interpret,
            cost_estimate=pl.CostEstimate(
                flops=flops,
                bytes_accessed=moved,
                transcendentals=divisions * self.batch * plan.tokens * plan.num_heads,
            ),
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel", "arbitrary", "arbitrary"),
                vmem_limit_bytes=_vmem_bytes(),
            ),
            name=getattr(kernel, "func", kernel).__name__.strip("_"),
        )(*(x for x, _ in inputs))


def _bytes_moved(x, spec, call):
    """Bytes of x that cross HBM: its block once for every image and band it depends on."""
    if x.ndim != 3 or x.shape[1] == 1:  # constants, states and sums: each once
        return math.prod(x.shape) * x.dtype.itemsize
    return math.prod(spec.block_shape) * x.dtype.itemsize * call.batch * call.plan.bands
