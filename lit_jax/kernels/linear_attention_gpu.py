"""The Pallas-Triton kernels of `linear_attention`, for NVIDIA Hopper.

Per image and head, with P = phi(q), K = phi(k) and E = do S^T, there are four
kernels. They read and write (B, T, D) arrays in place by strided loads, so
nothing is transposed. The backward pass is given the forward's S and s:

    state      S = K^T v / T, s = mean K
               reads k, v; writes S
    forward    P S / (P . s + epsilon) + DWC(v) + bias
               reads q, v, S; writes out
    dq         den = P . s + epsilon, r = -(P . E) / den^2, dP = E / den + r s
               reads q, do, S; writes dq
    state      dS = P^T (do / den) / T, ds = mean r P
               reads q, do; writes dS
    dk, dv     dK = v dS^T + ds, dv = K dS + DWC^T(do), filter gradient
               reads k, v, do, dS; writes dk, dv

The filter gradient is summed per patch of tokens and then by one XLA reduction:
no atomics, so every run gives the same bits. Sums are float32. S and dS travel
in the dtype of q, because they are operands of products.

Bytes, in units of one (B, T, D) array (25 us at 3 TB/s for D = 1152 and
B T = 32768 in bfloat16), with S of H / T such units: forward 5 + 2 H / T against
a floor of 4, backward 10 + 3 H / T against 7. For XL that is forward
183 / 140 / 129 / 127 us and backward 336 / 273 / 257 / 253 us at
T = 256 / 1024 / 4096 / 16384. The convolution is bound by instruction issue
instead: 25 multiply-adds an element are 33 us, and three to four times that if
each tap loads and widens its operand anew. Here a row of v is loaded K times,
once per column of the filter, and feeds up to K rows of the output from
registers.

No timing exists yet. What is known without a GPU is in docs/kernels_gpu.md: the
numbers in interpret mode, and what XLA's compiler makes of it for sm_90a and
sm_80 (registers, spills, shared memory). The shapes suit Hopper. For Ampere the
same code compiles, but the state and dq kernels spill there, so XLA runs the op.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from lit_jax.kernels.linear_attention_case import EPSILON, Case

Inputs = tuple[jax.Array, jax.Array, jax.Array | None, jax.Array | None]


@dataclasses.dataclass(frozen=True)
class BlockSizes:
    """Tile sizes. They change speed and rounding, not the maths.

    Raises: ValueError for tokens or rows that are no power of two of at least 16.
    """

    # A program of the forward and of the dk, dv kernel has a patch of the grid.
    tokens: int = 64
    warps: int = 4
    # One of the dq kernel has whole rows of a head in registers.
    dq_tokens: int = 64
    # One of the state kernel walks the tokens in steps, for some rows of a state.
    state_tokens: int = 64
    state_rows: int = 64
    programs: int = 256  # T is split until there are about so many

    def __post_init__(self):
        for name in ("tokens", "dq_tokens", "state_tokens", "state_rows"):
            size = getattr(self, name)
            if size < 16 or size & (size - 1):
                raise ValueError(f"{name} = {size} is no power of two of at least 16")


# ---- The two passes of the op ------------------------------------------------


def forward(
    inputs: Inputs,
    *,
    case: Case,
    interpret: bool = False,
    block_sizes: BlockSizes = BlockSizes(),
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """The op's output, and what `backward` needs of the forward.

    Args:
      inputs: q (B, T, D), kv (B, T, 2D), conv_kernel (K, K, H), conv_bias (H,);
        the last two may be None.
    Returns: (B, T, D) in the dtype of q, and the state S (B, N, H, H) with
      s (B, N, H) float32.
    """
    q, kv, *filters = inputs
    B, T, D = q.shape
    state, key_mean = _state(kv, kv, None, case, block_sizes, interpret)

    tiling = _Tiling.of(case, block_sizes.tokens, interpret)
    out = pl.pallas_call(
        functools.partial(_forward_kernel, tiling=tiling),
        out_shape=jax.ShapeDtypeStruct((B, T, D), q.dtype),
        grid=tiling.programs(B),
        compiler_params=_compiler_params(block_sizes.warps, q.dtype),
        interpret=interpret,
        name="linear_attention_forward",
    )(q, kv, state, key_mean, *(filters if case.conv_size else ()))
    return out, (state, key_mean)


def backward(
    inputs: Inputs,
    saved: tuple[jax.Array, jax.Array],
    do: jax.Array,
    *,
    case: Case,
    interpret: bool = False,
    block_sizes: BlockSizes = BlockSizes(),
) -> tuple[jax.Array, jax.Array, jax.Array | None, jax.Array | None]:
    """The gradients (dq, dkv, dconv_kernel, dconv_bias) for `do` (B, T, D).

    Args: inputs: as in `forward`. saved: what it returned.
    Returns: each gradient in the shape and dtype of its input; None for what
      was None.
    """
    q, kv, conv_kernel, conv_bias = inputs
    B, T, D = q.shape
    N = case.num_heads
    H = case.head_width
    state, key_mean = saved

    block = _block(T, block_sizes.dq_tokens)
    row = jax.ShapeDtypeStruct((B, N, T), jnp.float32)
    dq, scale, ddenominator = pl.pallas_call(
        functools.partial(_dq_kernel, block=block, H=H),
        out_shape=(jax.ShapeDtypeStruct((B, T, D), q.dtype), row, row),
        grid=(pl.cdiv(T, block), N, B),
        compiler_params=_compiler_params(8, q.dtype),
        interpret=interpret,
        name="linear_attention_dq",
    )(q, do, state, key_mean)

    weights = (scale, ddenominator)
    dstate, dkey_mean = _state(q, do, weights, case, block_sizes, interpret)

    tiling = _Tiling.of(case, block_sizes.tokens, interpret)
    out_shape = [jax.ShapeDtypeStruct((B, T, 2 * D), q.dtype)]
    if case.conv_size:
        # Partial sums of every tap, then of the bias, one row of a block each.
        rows = case.conv_size**2 + 1
        partials_shape = (B, N, tiling.patches, rows, H)
        out_shape.append(jax.ShapeDtypeStruct(partials_shape, jnp.float32))
    dkv, *partials = pl.pallas_call(
        functools.partial(_dkv_kernel, tiling=tiling),
        out_shape=out_shape,
        grid=tiling.programs(B),
        compiler_params=_compiler_params(block_sizes.warps, q.dtype),
        interpret=interpret,
        name="linear_attention_dkv",
    )(kv, do, dstate, dkey_mean, *((conv_kernel,) if case.conv_size else ()))
    if conv_kernel is None or conv_bias is None:
        return dq, dkv, None, None

    dconv = jnp.sum(partials[0], axis=(0, 1, 2))  # (K * K + 1, H)
    dconv_kernel = dconv[:-1].reshape(conv_kernel.shape)
    return (
        dq,
        dkv,
        dconv_kernel.astype(conv_kernel.dtype),
        dconv[-1].astype(conv_bias.dtype),
    )


def _state(left, right, weights, case: Case, block_sizes: BlockSizes, interpret):
    """Returns mean_t phi(left_t)^T (scale_t right_t) and mean_t weight_t phi(left_t).

    `left` is the first D columns of its array. With `weights` (scale, weight),
    each (B, N, T) float32, `right` is too: the state of dS, from q and do.
    Without them both are ones, and `right` is the second half of kv.

    Returns: (B, N, H, H) in the dtype of `right`, and (B, N, H) float32.
    """
    B, T, _ = right.shape
    N = case.num_heads
    H = case.head_width
    weighted = weights is not None
    right_offset = 0 if weighted else case.width

    itemsize = right.dtype.itemsize
    block = _block(T, max(16, block_sizes.state_tokens * 2 // itemsize))
    wide = H % 128 == 0 and right.dtype == jnp.bfloat16
    rows = _block(H, 128 if wide else block_sizes.state_rows)
    row_tiles = pl.cdiv(H, rows)
    steps = pl.cdiv(T, block)
    # Few images of many tokens would leave most of the GPU idle: T is split too,
    # but not into less than four steps, which would not hide the loads.
    splits = max(1, min(block_sizes.programs // (row_tiles * N * B), steps // 4))
    steps = pl.cdiv(steps, splits)

    # Parts of a sum are float32; a whole one is cast where it is written.
    state_dtype = right.dtype if splits == 1 else jnp.float32
    sizes = _StateSizes(T, H, rows, block, steps, right_offset)
    state, mean = pl.pallas_call(
        functools.partial(_state_kernel, sizes=sizes),
        out_shape=(
            jax.ShapeDtypeStruct((splits, B, N, H, H), state_dtype),
            jax.ShapeDtypeStruct((splits, B, N, H), jnp.float32),
        ),
        grid=(row_tiles, splits, N, B),
        compiler_params=_compiler_params(8, right.dtype),
        interpret=interpret,
        name="linear_attention_state",
    )(left, right, *(weights or ()))
    if splits == 1:
        return state[0], mean[0]
    return jnp.sum(state, axis=0).astype(right.dtype), jnp.sum(mean, axis=0)


# ---- Sizes of tiles ----------------------------------------------------------


def _compiler_params(warps, dtype):
    # Three stages of float32 tiles do not fit an A100's shared memory.
    stages = 2 if dtype == jnp.float32 else 3
    return plgpu.CompilerParams(num_warps=warps, num_stages=stages)


def _block(length, largest):
    """The power of two that covers `length`, at most `largest`.

    It is at least 16: a tensor core takes no less.
    """
    return min(largest, max(16, pl.next_power_of_2(length)))


def _chunks(width, largest):
    """Splits a multiple of 16 into (offset, size), sizes being powers of two.

    Triton has no other tile shapes.
    """
    chunks = []
    offset = 0
    while offset < width:
        size = largest
        while size > width - offset:
            size //= 2
        chunks.append((offset, size))
        offset += size
    return chunks


def _padded(H):
    return pl.cdiv(H, 16) * 16


def _step(H):
    """Length of one step of a product over the columns of a head."""
    return next((s for s in (64, 32, 16) if H % s == 0), 32)


@dataclasses.dataclass(frozen=True)
class _Tiling:
    """How the forward and the dk, dv kernel cut the output up.

    A program has one patch of tokens and one tile of a head's columns.
    """

    case: Case
    patch: tuple[int, int]  # rows and columns of the grid
    patches: int
    tile: int  # columns of a head
    tiles: int
    interpret: bool

    @classmethod
    def of(cls, case: Case, tokens: int, interpret: bool) -> "_Tiling":
        patch, patches = _patches(case.grid, tokens)
        tile, tiles = _column_tiles(case.head_width)
        return cls(case, patch, patches, tile, tiles, interpret)

    def programs(self, batch):
        return (self.tiles, self.patches, self.case.num_heads, batch)

    def columns(self, column_tile) -> "list[_Slice]":
        """The columns of a tile, in chunks of at most 64: the registers hold no more."""
        columns = [
            column_tile * self.tile + offset + jnp.arange(size)
            for offset, size in _chunks(self.tile, 64)
        ]
        return _slices(columns, self.case.head_width, self.tile)


def _column_tiles(H):
    """Returns (width, number) of the column tiles of a head.

    288 = 3 x 96, 256 = 2 x 128, 72 = 1 x 80.
    """
    H = _padded(H)
    width = max(w for w in range(16, 129, 16) if H % w == 0)
    # No good divisor: a masked last tile costs less than many narrow ones.
    if width < min(H, 48):
        width = 64
    return width, pl.cdiv(H, width)


def _patches(grid, tokens):
    """Returns ((rows, columns), number) of the patches that pad the grid least.

    Among those it takes the one with the smallest halo.
    """
    h, w = grid
    tokens = _block(_block(h, tokens) * _block(w, tokens), tokens)
    # The rows are unrolled, so there are few of them.
    shapes = [(r, tokens // r) for r in (1, 2, 4, 8, 16) if r <= tokens]
    number = {s: pl.cdiv(h, s[0]) * pl.cdiv(w, s[1]) for s in shapes}
    patch = min(shapes, key=lambda s: (number[s], s[0] + s[1]))
    return patch, number[patch]


# ---- Loads and stores --------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Slice:
    """Indices along one axis, and which of them exist; a mask of None: all do."""

    index: jax.Array
    mask: Any = None

    @property
    def size(self):
        return self.index.size

    def moved(self, offset):
        return _Slice(offset + self.index, self.mask)

    def masked(self):
        """The same with a mask that is an array, as the rows of a tile need it."""
        if self.mask is not None:
            return self
        return _Slice(self.index, jnp.ones(self.index.shape, jnp.bool_))


def _slices(columns, H, unit) -> list[_Slice]:
    """Columns of a head; the last are masked where `unit` does not divide H."""
    masks = [None if H % unit == 0 else c < H for c in columns]
    return [_Slice(c, mask) for c, mask in zip(columns, masks)]


def _head_columns(H) -> list[_Slice]:
    """All columns of a head, in chunks of at most 256."""
    chunks = _chunks(_padded(H), 256)
    columns = [offset + jnp.arange(size) for offset, size in chunks]
    return _slices(columns, H, 16)


def _step_columns(step, H):
    """The columns of one step of a product over a head."""
    size = _step(H)
    index = step * size + jnp.arange(size)
    return _Slice(index, None if H % size == 0 else index < H)


def _load(ref, batch, rows: _Slice, columns: _Slice):
    """Loads ref[*batch, rows, columns], with zeros where a mask is False."""
    mask = jnp.broadcast_to(rows.mask[:, None], (rows.size, columns.size))
    if columns.mask is not None:
        mask &= columns.mask[None, :]
    tile = ref.at[(*batch, rows.index[:, None], columns.index[None, :])]
    # Zeros add nothing to a product, so a product masks no more.
    return plgpu.load(tile, mask=mask, other=0)


def _store(ref, batch, rows: _Slice, columns: _Slice, value):
    mask = jnp.broadcast_to(rows.mask[:, None], (rows.size, columns.size))
    if columns.mask is not None:
        mask &= columns.mask[None, :]
    tile = ref.at[(*batch, rows.index[:, None], columns.index[None, :])]
    plgpu.store(tile, value.astype(ref.dtype), mask=mask)


def _load_vector(ref, batch, index: _Slice):
    mask = index.masked().mask
    return plgpu.load(ref.at[(*batch, index.index)], mask=mask, other=0)


def _phi(x):
    return jnp.maximum(x.astype(jnp.float32), 0) + EPSILON


def _dot(a, b, contract=(1, 0)):
    """Contracts those axes of a and b with float32 accumulation."""
    # Float32 operands would otherwise be rounded to TF32.
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return lax.dot_general(
        a,
        b,
        (((contract[0],), (contract[1],)), ((), ())),
        precision=precision,
        preferred_element_type=jnp.float32,
    )


def _fma(a, b, c, interpret):
    """a * b + c in one instruction.

    XLA has Triton round products and sums apart, which costs two.
    """
    if interpret:
        return a * b + c
    [out] = plgpu.elementwise_inline_asm(
        "fma.rn.f32 $0, $1, $2, $3;",
        args=[a, b, c],
        constraints="=f,f,f,f",
        pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct(c.shape, jnp.float32)],
    )
    return out


# ---- Patches of the grid -----------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Patch:
    """The tokens of one program: a patch of image b."""

    grid: tuple[int, int]
    rows: int
    b: jax.Array
    y: jax.Array  # of the first row
    x: jax.Array  # (columns of the patch,)
    tokens: _Slice  # (rows * columns,), row by row

    def load_row(self, ref, dy, dx, columns: _Slice):
        """Row y + dy of the patch, moved by dx; zeros where it is off the grid.

        Returns: (columns of the patch, columns of the tile) float32.
        """
        h, w = self.grid
        y = self.y + dy
        x = self.x + dx
        mask = (x >= 0) & (x < w) & (y >= 0) & (y < h)
        tokens = _Slice(y * w + x, mask)
        return _load(ref, (self.b,), tokens, columns).astype(jnp.float32)


def _make_patch(patch_index, b, tiling: _Tiling) -> _Patch:
    h, w = tiling.case.grid
    rows, columns = tiling.patch
    across = pl.cdiv(w, columns)
    y = patch_index // across * rows
    x = patch_index % across * columns
    i = jnp.arange(rows * columns)
    token_y = y + i // columns
    token_x = x + i % columns
    mask = (token_y < h) & (token_x < w)
    # Past the last token and not on another's: interpret mode writes back what
    # it finds under a mask.
    xs = x + jnp.arange(columns)
    tokens = _Slice(jnp.where(mask, token_y * w + token_x, h * w), mask)
    return _Patch(tiling.case.grid, rows, b, y, xs, tokens)


def _store_rows(ref, patch: _Patch, columns: _Slice, product, local):
    """Stores product + local at the patch.

    product is (rows * columns of the patch, C), local a list of the patch's rows.
    """
    h, w = patch.grid
    parts = lax.split(product, [patch.x.size] * len(local), axis=0)
    for row, part in enumerate(parts):
        y = patch.y + row
        mask = (patch.x < w) & (y < h)
        tokens = jnp.where(mask, y * w + patch.x, h * w)
        _store(ref, (patch.b,), _Slice(tokens, mask), columns, part + local[row])


# ---- The convolution ---------------------------------------------------------


def _load_taps(kernel_ref, dx, columns: _Slice, shape):
    """The K weights of one column of the filter, each of the shape of a patch's row."""
    K = kernel_ref.shape[0]
    taps = [_load_vector(kernel_ref, (dy, dx), columns) for dy in range(K)]
    rows = [tap.astype(jnp.float32)[None, :] for tap in taps]
    return [jnp.broadcast_to(row, shape) for row in rows]


def _convolve(ref, filter_refs, patch: _Patch, columns: _Slice, offset, interpret):
    """Returns the rows of a patch of DWC(ref[..., offset:]).

    Each is (columns of the patch, C) float32.
    """
    kernel_ref, bias_ref = filter_refs
    K = kernel_ref.shape[0]
    shape = (patch.x.size, columns.size)

    def add_column(dx, local):
        local = list(local)
        taps = _load_taps(kernel_ref, dx, columns, shape)
        # A row is loaded and widened once, then feeds up to K rows of the output.
        for row in range(patch.rows + K - 1):
            v = patch.load_row(
                ref,
                row - K // 2,
                dx - K // 2,
                columns.moved(offset),
            )
            for dy in range(max(0, row - patch.rows + 1), min(K, row + 1)):
                local[row - dy] = _fma(v, taps[dy], local[row - dy], interpret)
        return tuple(local)

    # A loop over the columns of the filter, not unrolled: the compiler would
    # hoist all loads into 255 registers, and one block would fill an SM.
    bias = _load_vector(bias_ref, (), columns).astype(jnp.float32)
    start = (jnp.broadcast_to(bias[None, :], shape),) * patch.rows
    return lax.fori_loop(0, K, add_column, start)


@dataclasses.dataclass(frozen=True)
class _FilterGradient:
    """Where a program's part of the filter's gradient goes."""

    # (B, N, patches, K * K + 1, H) float32: of every tap, then of the bias.
    ref: Any
    index: tuple  # (b, n, patch)
    columns: _Slice  # of the head

    def store(self, row, value):
        """Sums value (columns of the patch, C) over the patch, and stores it."""
        where = self.ref.at[(*self.index, row, self.columns.index)]
        plgpu.store(where, jnp.sum(value, axis=0), mask=self.columns.mask)


def _convolve_transposed(
    filter_and_do, patch: _Patch, do_columns: _Slice, v, gradient: _FilterGradient, interpret
):
    """Returns the rows of a patch of DWC^T(do), and stores the filter's gradient.

    `v` lists the patch's rows of v. A row of do feeds up to K rows of dv and,
    with the rows of v, K taps.
    """
    kernel_ref, do_ref = filter_and_do
    K = kernel_ref.shape[0]
    rows = patch.rows
    columns = gradient.columns
    shape = (patch.x.size, columns.size)

    def add_column(dx, local):
        local = list(local)
        dtaps = [jnp.zeros(shape, jnp.float32)] * K
        taps = _load_taps(kernel_ref, dx, columns, shape)
        for row in range(rows + K - 1):
            do = patch.load_row(do_ref, row - K // 2, K // 2 - dx, do_columns)
            for back in range(max(0, row - rows + 1), min(K, row + 1)):
                dy = K - 1 - back
                at = row - back
                local[at] = _fma(do, taps[dy], local[at], interpret)
                dtaps[dy] = _fma(do, v[at], dtaps[dy], interpret)
        for dy in range(K):
            gradient.store(dy * K + dx, dtaps[dy])
        return tuple(local)

    start = (jnp.zeros(shape, jnp.float32),) * rows
    local = lax.fori_loop(0, K, add_column, start)
    do_rows = [patch.load_row(do_ref, row, 0, do_columns) for row in range(rows)]
    gradient.store(K * K, sum(do_rows))  # of the bias
    return local


# ---- The kernels -------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _StateSizes:
    """The static sizes of a state kernel."""

    T: int
    H: int
    rows: int  # of the state, in a program
    block: int  # tokens in a step
    steps: int  # of a split of T
    right_offset: int  # first column of `right` in its array


def _state_kernel(left_ref, right_ref, *refs, sizes: _StateSizes):
    """One tile of rows of one head's state, all its columns, over one split of T.

    refs: [scale, weight,] state, mean.
    """
    *weight_refs, state_ref, mean_ref = refs
    row_tile, split, n, b = (pl.program_id(axis) for axis in range(4))
    T = sizes.T
    H = sizes.H
    row_index = row_tile * sizes.rows + jnp.arange(sizes.rows)
    rows = _Slice(row_index, None if H % sizes.rows == 0 else row_index < H)
    columns = _head_columns(H)

    def body(step, carry):
        states, mean = carry
        first = (split * sizes.steps + step) * sizes.block
        token = first + jnp.arange(sizes.block)
        tokens = _Slice(token, token < T)
        left = _load(left_ref, (b,), tokens, rows.moved(n * H))
        # phi of a token that does not exist would be the epsilon.
        phi = jnp.where(tokens.mask[:, None], _phi(left), 0)  # (block, rows)
        if weight_refs:
            weight = _load_vector(weight_refs[1], (b, n), tokens)
            mean += phi * weight[:, None]
        else:
            mean += phi
        phi = phi.astype(left.dtype)
        products = []
        for c in columns:
            right_columns = c.moved(sizes.right_offset + n * H)
            right = _load(right_ref, (b,), tokens, right_columns)
            if weight_refs:
                scale = _load_vector(weight_refs[0], (b, n), tokens)
                scaled = right.astype(jnp.float32) * scale[:, None]
                right = scaled.astype(right.dtype)
            products.append(_dot(phi, right, (0, 0)))
        return tuple(s + p for s, p in zip(states, products)), mean

    zeros = tuple(jnp.zeros((sizes.rows, c.size), jnp.float32) for c in columns)
    # Summed over a block's tokens after the loop, not in it.
    mean = jnp.zeros((sizes.block, sizes.rows), jnp.float32)
    states, mean = lax.fori_loop(0, sizes.steps, body, (zeros, mean))

    rows = rows.masked()
    for c, state in zip(columns, states):
        _store(state_ref, (split, b, n), rows, c, state * (1 / T))
    plgpu.store(
        mean_ref.at[split, b, n, rows.index],
        jnp.sum(mean, axis=0) * (1 / T),
        mask=rows.mask,
    )


def _forward_kernel(q_ref, kv_ref, state_ref, key_mean_ref, *refs, tiling: _Tiling):
    """The output at one patch of tokens and one tile of a head's columns."""
    *filter_refs, out_ref = refs
    column_tile, patch_index, n, b = (pl.program_id(axis) for axis in range(4))
    D = q_ref.shape[2]
    H = tiling.case.head_width
    patch = _make_patch(patch_index, b, tiling)
    columns = tiling.columns(column_tile)
    step_size = _step(H)

    def body(step, carry):
        numerators, denominator = carry
        k_columns = _step_columns(step, H)
        state_rows = k_columns.masked()
        q = _load(q_ref, (b,), patch.tokens, k_columns.moved(n * H))
        phi_q = _phi(q)  # (tokens, step)
        key_mean = _load_vector(key_mean_ref, (b, n), k_columns)
        denominator += phi_q * key_mean[None, :]
        phi_q = phi_q.astype(q.dtype)
        products = []
        for c in columns:
            state = _load(state_ref, (b, n), state_rows, c)
            products.append(_dot(phi_q, state))
        return tuple(s + p for s, p in zip(numerators, products)), denominator

    tokens = patch.tokens.size
    zeros = tuple(jnp.zeros((tokens, c.size), jnp.float32) for c in columns)
    # Summed over a step's columns after the loop, not in it.
    denominator = jnp.zeros((tokens, step_size), jnp.float32)
    steps = pl.cdiv(H, step_size)
    numerators, denominator = lax.fori_loop(0, steps, body, (zeros, denominator))
    inverse = 1 / (jnp.sum(denominator, axis=1) + EPSILON)
    for c, numerator in zip(columns, numerators):
        out = numerator * inverse[:, None]
        if not filter_refs:
            _store(out_ref, (b,), patch.tokens, c.moved(n * H), out)
            continue
        local = _convolve(kv_ref, filter_refs, patch, c, D + n * H, tiling.interpret)
        _store_rows(out_ref, patch, c.moved(n * H), out, local)


def _dq_kernel(q_ref, do_ref, state_ref, key_mean_ref, *out_refs, block, H):
    """dq of one block of tokens of one head.

    For dS it stores 1 / denominator and the denominator's cotangent. With
    E = do S^T the numerator is not needed: do . (phi(q) S) = phi(q) . E.
    """
    dq_ref, scale_ref, ddenominator_ref = out_refs
    token_block, n, b = (pl.program_id(axis) for axis in range(3))
    T = q_ref.shape[1]
    token = token_block * block + jnp.arange(block)
    tokens = _Slice(token, token < T)
    columns = _head_columns(H)
    step_size = _step(H)

    def body(step, products):
        k_columns = _step_columns(step, H)
        do = _load(do_ref, (b,), tokens, k_columns.moved(n * H))
        out = []
        for c, product in zip(columns, products):
            state = _load(state_ref, (b, n), c.masked(), k_columns)
            out.append(product + _dot(do, state, (1, 1)))
        return tuple(out)

    zeros = tuple(jnp.zeros((block, c.size), jnp.float32) for c in columns)
    products = lax.fori_loop(0, pl.cdiv(H, step_size), body, zeros)

    denominator = jnp.full((block,), EPSILON, jnp.float32)
    dot = jnp.zeros((block,), jnp.float32)
    for c, product in zip(columns, products):
        phi_q = _phi(_load(q_ref, (b,), tokens, c.moved(n * H)))
        key_mean = _load_vector(key_mean_ref, (b, n), c)
        denominator += jnp.sum(phi_q * key_mean[None, :], axis=1)
        dot += jnp.sum(phi_q * product, axis=1)
    scale = 1 / denominator
    ddenominator = -dot * scale * scale

    # q is loaded again: to keep it would take the registers that the
    # products are in.
    for c, product in zip(columns, products):
        q = _load(q_ref, (b,), tokens, c.moved(n * H))
        key_mean = _load_vector(key_mean_ref, (b, n), c)
        through_denominator = ddenominator[:, None] * key_mean[None, :]
        dq = product * scale[:, None] + through_denominator
        dq = jnp.where(q > 0, dq, 0)
        _store(dq_ref, (b,), tokens, c.moved(n * H), dq)
    here = (b, n, token)
    plgpu.store(scale_ref.at[here], scale, mask=tokens.mask)
    plgpu.store(ddenominator_ref.at[here], ddenominator, mask=tokens.mask)


def _dkv_kernel(kv_ref, do_ref, dstate_ref, dkey_mean_ref, *refs, tiling: _Tiling):
    """dk and dv at one patch and one tile of a head's columns.

    With a convolution it stores the patch's part of the filter's gradient too.
    refs: dkv; with a convolution kernel, dkv, partial.
    """
    has_conv = bool(tiling.case.conv_size)
    dkv_ref = refs[1] if has_conv else refs[0]
    column_tile, patch_index, n, b = (pl.program_id(axis) for axis in range(4))
    D = do_ref.shape[2]
    H = tiling.case.head_width
    patch = _make_patch(patch_index, b, tiling)
    columns = tiling.columns(column_tile)

    def body(step, carry):
        k_columns = _step_columns(step, H)
        k_rows = k_columns.masked()
        k = _load(kv_ref, (b,), patch.tokens, k_columns.moved(n * H))
        phi_k = _phi(k).astype(k.dtype)
        v = _load(kv_ref, (b,), patch.tokens, k_columns.moved(D + n * H))
        out = []
        for c, (dk, dv) in zip(columns, carry):
            c_rows = c.masked()
            dk += _dot(v, _load(dstate_ref, (b, n), c_rows, k_columns), (1, 1))
            dv += _dot(phi_k, _load(dstate_ref, (b, n), k_rows, c))
            out.append((dk, dv))
        return tuple(out)

    tokens = patch.tokens.size
    zeros = tuple((jnp.zeros((tokens, c.size), jnp.float32),) * 2 for c in columns)
    gradients = lax.fori_loop(0, pl.cdiv(H, _step(H)), body, zeros)

    for c, (dk, dv) in zip(columns, gradients):
        k = _load(kv_ref, (b,), patch.tokens, c.moved(n * H))
        dk += _load_vector(dkey_mean_ref, (b, n), c)[None, :]
        dk = jnp.where(k > 0, dk, 0)
        _store(dkv_ref, (b,), patch.tokens, c.moved(n * H), dk)
        if not has_conv:
            _store(dkv_ref, (b,), patch.tokens, c.moved(D + n * H), dv)
            continue
        kernel_ref, _, partial_ref = refs
        v_columns = c.moved(D + n * H)
        v = [patch.load_row(kv_ref, row, 0, v_columns) for row in range(patch.rows)]
        gradient = _FilterGradient(partial_ref, (b, n, patch_index), c.masked())
        local = _convolve_transposed(
            (kernel_ref, do_ref),
            patch,
            c.moved(n * H),
            v,
            gradient,
            tiling.interpret,
        )
        _store_rows(dkv_ref, patch, v_columns, dv, local)
