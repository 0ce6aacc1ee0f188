"""Linear attention plus depth-wise convolution in Pallas-Triton kernels, for NVIDIA Hopper (and Ampere).

Per image and head, with P = phi(q), K = phi(k) and E = do S^T, as four kernels; (B, T, D) arrays are read and
written in place by strided loads, nothing is transposed, and the backward pass is given the forward's S and s:

    state      S = K^T v / T, s = mean K                                        reads k, v; writes S
    forward    P S / (P . s + epsilon) + DWC(v) + bias                          reads q, v, S; writes out
    dq         den = P . s + epsilon, r = -(P . E) / den^2, dP = E / den + r s  reads q, do, S; writes dq
    state      dS = P^T (do / den) / T, ds = mean r P                           reads q, do; writes dS
    dk, dv     dK = v dS^T + ds, dv = K dS + DWC^T(do), filter gradient         reads k, v, do, dS; dk, dv

The filter gradient is summed per patch of tokens and then by one XLA reduction: no atomics, so every run
gives the same bits. Sums are float32; S and dS travel in the dtype of q, because they are operands of
products.

Bytes, in units of one (B, T, D) array (25 us at 3 TB/s for D = 1152, B T = 32768 in bfloat16), with S of H
/ T such units: forward 5 + 2 H / T against a floor of 4, backward 10 + 3 H / T against 7. For XL that is
forward 183 / 140 / 129 / 127 us and backward 336 / 273 / 257 / 253 us at T = 256 / 1024 / 4096 / 16384. The
convolution is bound by instruction issue instead: 25 multiply-adds an element are 33 us, and one whose
operand is loaded and widened anew for each tap costs three to four times that. Here a row of v is loaded K
times, once per column of the filter, and feeds up to K rows of the output from registers.

No timing exists yet. What is known without a GPU is in docs/kernels_gpu.md: the numbers in interpret mode,
and what XLA's compiler makes of it for sm_90a and sm_80 (registers, spills, shared memory). It is shaped
for Hopper: for Ampere the same code compiles, but the state and dq kernels spill there, so let XLA run the
op.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

EPSILON = 1e-6  # added to phi(q), to phi(k) and to the denominator


@dataclasses.dataclass(frozen=True)
class BlockSizes:
    """Tile sizes, all powers of two of at least 16. They change speed and rounding, not the maths.

    tokens: output tokens of a program of the forward and of the dk, dv kernel, a patch of the grid.
    warps: warps of such a program.
    dq_tokens: tokens of a program of the dq kernel, which holds whole rows of a head in registers.
    state_tokens: tokens per step of the state kernel.
    state_rows: rows of a state per program of the state kernel.
    programs: the state kernel splits T until it has about this many programs.
    """

    tokens: int = 64
    warps: int = 4
    dq_tokens: int = 64
    state_tokens: int = 64
    state_rows: int = 64
    programs: int = 256


def forward(
    q, kv, conv_kernel, conv_bias, *, num_heads, grid, interpret=False, block_sizes=BlockSizes()
):
    """Returns linear attention plus convolution, (B, T, D) in the dtype of q, and (S, s) for `backward`."""
    B, T, D = q.shape
    H = D // num_heads
    state, key_mean = _state(kv, kv, None, None, num_heads, D, block_sizes, interpret)
    tile, tiles = _column_tiles(H)
    patch, patches = _patches(grid, block_sizes.tokens)
    has_conv = conv_kernel is not None
    out = pl.pallas_call(
        functools.partial(
            _forward_kernel,
            grid=grid,
            patch=patch,
            H=H,
            tile=tile,
            has_conv=has_conv,
            interpret=interpret,
        ),
        out_shape=jax.ShapeDtypeStruct((B, T, D), q.dtype),
        grid=(tiles, patches, num_heads, B),
        compiler_params=_compiler_params(block_sizes.warps, q.dtype),
        interpret=interpret,
        name="linear_attention_forward",
    )(q, kv, state, key_mean, *((conv_kernel, conv_bias) if has_conv else ()))
    return out, (state, key_mean)


def backward(
    q,
    kv,
    conv_kernel,
    conv_bias,
    saved,
    do,
    *,
    num_heads,
    grid,
    interpret=False,
    block_sizes=BlockSizes(),
):
    """Returns (dq, dkv, dconv_kernel, dconv_bias), each in its primal's shape and dtype."""
    B, T, D = q.shape
    H = D // num_heads
    has_conv = conv_kernel is not None
    state, key_mean = saved

    block = _block(T, block_sizes.dq_tokens)
    row = jax.ShapeDtypeStruct((B, num_heads, T), jnp.float32)
    dq, scale, ddenominator = pl.pallas_call(
        functools.partial(_dq_kernel, block=block, H=H),
        out_shape=(jax.ShapeDtypeStruct((B, T, D), q.dtype), row, row),
        grid=(pl.cdiv(T, block), num_heads, B),
        compiler_params=_compiler_params(8, q.dtype),
        interpret=interpret,
        name="linear_attention_dq",
    )(q, do, state, key_mean)

    dstate, dkey_mean = _state(q, do, scale, ddenominator, num_heads, 0, block_sizes, interpret)
    tile, tiles = _column_tiles(H)
    patch, patches = _patches(grid, block_sizes.tokens)
    out_shape = [jax.ShapeDtypeStruct((B, T, 2 * D), q.dtype)]
    if has_conv:  # partial sums of every tap, then of the bias, one row of a block each
        taps = conv_kernel.shape[0] ** 2
        out_shape.append(jax.ShapeDtypeStruct((B, num_heads, patches, taps + 1, H), jnp.float32))
    dkv, *partials = pl.pallas_call(
        functools.partial(
            _dkv_kernel,
            grid=grid,
            patch=patch,
            H=H,
            tile=tile,
            has_conv=has_conv,
            interpret=interpret,
        ),
        out_shape=out_shape,
        grid=(tiles, patches, num_heads, B),
        compiler_params=_compiler_params(block_sizes.warps, q.dtype),
        interpret=interpret,
        name="linear_attention_dkv",
    )(kv, do, dstate, dkey_mean, *((conv_kernel,) if has_conv else ()))
    if not has_conv:
        return dq, dkv, None, None
    dconv = jnp.sum(partials[0], axis=(0, 1, 2))  # (K * K + 1, H)
    return (
        dq,
        dkv,
        dconv[:-1].reshape(conv_kernel.shape).astype(conv_kernel.dtype),
        dconv[-1].astype(conv_bias.dtype),
    )


def _compiler_params(warps, dtype):
    # Three stages of float32 tiles do not fit an A100's shared memory.
    return plgpu.CompilerParams(num_warps=warps, num_stages=2 if dtype == jnp.float32 else 3)


def _block(length, largest):
    """The power of two that covers `length`: at least 16, a tensor core's least, and at most `largest`."""
    return min(largest, max(16, pl.next_power_of_2(length)))


def _chunks(width, largest):
    """Splits a multiple of 16 into (offset, size) of powers of two: the only tile shapes Triton has."""
    chunks, offset = [], 0
    while offset < width:
        size = largest
        while size > width - offset:
            size //= 2
        chunks.append((offset, size))
        offset += size
    return chunks


def _padded(H):
    return pl.cdiv(H, 16) * 16


def _column_tiles(H):
    """Returns (width, number) of the column tiles of a head: 288 = 3 x 96, 256 = 2 x 128, 72 = 1 x 80."""
    H = _padded(H)
    width = max(w for w in range(16, 129, 16) if H % w == 0)
    if width < min(H, 48):  # no good divisor: a masked last tile costs less than many narrow ones
        width = 64
    return width, pl.cdiv(H, width)


def _step(H):
    """Length of one step of a product over the columns of a head."""
    return next((s for s in (64, 32, 16) if H % s == 0), 32)


def _patches(grid, tokens):
    """Returns ((rows, columns), number) of the patches that pad the grid least, then have the least halo."""
    h, w = grid
    tokens = _block(_block(h, tokens) * _block(w, tokens), tokens)
    shapes = [(r, tokens // r) for r in (1, 2, 4, 8, 16) if r <= tokens]  # rows are unrolled
    number = {s: pl.cdiv(h, s[0]) * pl.cdiv(w, s[1]) for s in shapes}
    patch = min(shapes, key=lambda s: (number[s], s[0] + s[1]))
    return patch, number[patch]


def _load(ref, batch, rows, columns, row_mask, column_mask):
    """Loads ref[*batch, rows, columns] with zeros where a mask is False; None masks nothing."""
    mask = jnp.broadcast_to(row_mask[:, None], (rows.size, columns.size))
    if column_mask is not None:
        mask &= column_mask[None, :]
    return plgpu.load(ref.at[(*batch, rows[:, None], columns[None, :])], mask=mask, other=0)


def _store(ref, batch, rows, columns, value, row_mask, column_mask):
    mask = jnp.broadcast_to(row_mask[:, None], (rows.size, columns.size))
    if column_mask is not None:
        mask &= column_mask[None, :]
    plgpu.store(
        ref.at[(*batch, rows[:, None], columns[None, :])], value.astype(ref.dtype), mask=mask
    )


def _load_vector(ref, batch, index, mask):
    mask = jnp.ones(index.shape, jnp.bool_) if mask is None else mask
    return plgpu.load(ref.at[(*batch, index)], mask=mask, other=0)


def _phi(x):
    return jnp.maximum(x.astype(jnp.float32), 0) + EPSILON


def _dot(a, b, contract=(1, 0)):
    """Contracts those axes of a and b with float32 accumulation; float32 operands are not rounded to TF32."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return lax.dot_general(
        a,
        b,
        (((contract[0],), (contract[1],)), ((), ())),
        precision=precision,
        preferred_element_type=jnp.float32,
    )


def _fma(a, b, c, interpret):
    """a * b + c in one instruction: XLA has Triton round products and sums apart, which costs two."""
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


def _patch_tokens(patch_index, patch, grid):
    """Returns (first y, x of the columns, tokens, mask); tokens and mask (rows * columns,), row by row."""
    h, w = grid
    rows, columns = patch
    across = pl.cdiv(w, columns)
    y, x = patch_index // across * rows, patch_index % across * columns
    i = jnp.arange(rows * columns)
    token_y, token_x = y + i // columns, x + i % columns
    mask = (token_y < h) & (token_x < w)
    # Past the last token rather than on another's: interpret mode writes back what it finds under a mask.
    return y, x + jnp.arange(columns), jnp.where(mask, token_y * w + token_x, h * w), mask


def _load_row(ref, b, y, x, grid, columns, column_mask):
    """Loads one row of a patch, (columns of the patch, columns of the tile) float32; zeros off the grid."""
    h, w = grid
    mask = (x >= 0) & (x < w) & (y >= 0) & (y < h)
    return _load(ref, (b,), y * w + x, columns, mask, column_mask).astype(jnp.float32)


def _load_taps(kernel_ref, dx, columns, column_mask, shape):
    """Loads the K weights of one column of the filter, each broadcast over a row of a patch."""
    taps = [
        _load_vector(kernel_ref, (dy, dx), columns, column_mask)
        for dy in range(kernel_ref.shape[0])
    ]
    return [jnp.broadcast_to(tap.astype(jnp.float32)[None, :], shape) for tap in taps]


def _state(left, right, scale, weight, num_heads, right_offset, block_sizes, interpret):
    """Returns mean_t phi(left_t)^T (scale_t right_t) and mean_t weight_t phi(left_t).

    Shapes (B, N, H, H) and (B, N, H). `left` is the first D columns of its array, `right` D columns from
    `right_offset`; scale and weight are (B, N, T) float32 or None for ones. The state takes the dtype of
    `right`, the mean is float32.
    """
    B, T, _ = right.shape
    D = left.shape[2] if right_offset == 0 else right_offset
    H = D // num_heads
    block = _block(T, max(16, block_sizes.state_tokens * 2 // right.dtype.itemsize))
    rows = _block(
        H, 128 if H % 128 == 0 and right.dtype == jnp.bfloat16 else block_sizes.state_rows
    )
    row_tiles, steps = pl.cdiv(H, rows), pl.cdiv(T, block)
    splits = max(1, min(block_sizes.programs // (row_tiles * num_heads * B), steps // 4))
    steps = pl.cdiv(steps, splits)
    weighted = scale is not None
    state, mean = pl.pallas_call(
        functools.partial(
            _state_kernel,
            T=T,
            H=H,
            rows=rows,
            block=block,
            steps=steps,
            right_offset=right_offset,
            weighted=weighted,
        ),
        out_shape=(
            jax.ShapeDtypeStruct(
                (splits, B, num_heads, H, H), right.dtype if splits == 1 else jnp.float32
            ),
            jax.ShapeDtypeStruct((splits, B, num_heads, H), jnp.float32),
        ),
        grid=(row_tiles, splits, num_heads, B),
        compiler_params=_compiler_params(8, right.dtype),
        interpret=interpret,
        name="linear_attention_state",
    )(left, right, *((scale, weight) if weighted else ()))
    if splits == 1:
        return state[0], mean[0]
    return jnp.sum(state, axis=0).astype(right.dtype), jnp.sum(mean, axis=0)


def _state_kernel(left_ref, right_ref, *refs, T, H, rows, block, steps, right_offset, weighted):
    """One tile of rows of one head's state, all its columns, over one split of T."""
    if weighted:
        scale_ref, weight_ref, *refs = refs
    state_ref, mean_ref = refs
    row_tile, split, n, b = (pl.program_id(axis) for axis in range(4))
    row = row_tile * rows + jnp.arange(rows)
    row_mask = None if H % rows == 0 else row < H
    chunks = _chunks(_padded(H), 256)
    columns = [offset + jnp.arange(size) for offset, size in chunks]
    column_masks = [None if H % 16 == 0 else c < H for c in columns]

    def body(step, carry):
        states, mean = carry
        tokens = (split * steps + step) * block + jnp.arange(block)
        mask = tokens < T
        left = _load(left_ref, (b,), tokens, n * H + row, mask, row_mask)
        phi = jnp.where(mask[:, None], _phi(left), 0)  # (block, rows)
        mean += phi * _load_vector(weight_ref, (b, n), tokens, mask)[:, None] if weighted else phi
        phi = phi.astype(left.dtype)
        products = []
        for c, column_mask in zip(columns, column_masks):
            right = _load(right_ref, (b,), tokens, right_offset + n * H + c, mask, column_mask)
            if weighted:
                scale = _load_vector(scale_ref, (b, n), tokens, mask)
                right = (right.astype(jnp.float32) * scale[:, None]).astype(right.dtype)
            products.append(_dot(phi, right, (0, 0)))
        return tuple(s + p for s, p in zip(states, products)), mean

    states, mean = lax.fori_loop(
        0,
        steps,
        body,
        (
            tuple(jnp.zeros((rows, size), jnp.float32) for _, size in chunks),
            jnp.zeros((block, rows), jnp.float32),
        ),
    )
    every_row = jnp.ones(rows, jnp.bool_) if row_mask is None else row_mask
    for c, column_mask, state in zip(columns, column_masks, states):
        _store(state_ref, (split, b, n), row, c, state * (1 / T), every_row, column_mask)
    plgpu.store(mean_ref.at[split, b, n, row], jnp.sum(mean, axis=0) * (1 / T), mask=every_row)


def _forward_kernel(
    q_ref, kv_ref, state_ref, key_mean_ref, *refs, grid, patch, H, tile, has_conv, interpret
):
    """The output at one patch of tokens and one tile of a head's columns."""
    *conv_refs, out_ref = refs
    column_tile, patch_index, n, b = (pl.program_id(axis) for axis in range(4))
    D = q_ref.shape[2]
    y, x, tokens, mask = _patch_tokens(patch_index, patch, grid)
    chunks = _chunks(tile, 64)
    columns = [column_tile * tile + offset + jnp.arange(size) for offset, size in chunks]
    column_masks = [None if H % tile == 0 else c < H for c in columns]
    step_size = _step(H)

    def body(step, carry):
        numerators, denominator = carry
        k_columns = step * step_size + jnp.arange(step_size)
        k_mask = None if H % step_size == 0 else k_columns < H
        state_rows = jnp.ones(step_size, jnp.bool_) if k_mask is None else k_mask
        q = _load(q_ref, (b,), tokens, n * H + k_columns, mask, k_mask)
        phi_q = _phi(q)  # (tokens, step)
        denominator += phi_q * _load_vector(key_mean_ref, (b, n), k_columns, k_mask)[None, :]
        phi_q = phi_q.astype(q.dtype)
        products = [
            _dot(phi_q, _load(state_ref, (b, n), k_columns, c, state_rows, column_mask))
            for c, column_mask in zip(columns, column_masks)
        ]
        return tuple(s + p for s, p in zip(numerators, products)), denominator

    numerators, denominator = lax.fori_loop(
        0,
        pl.cdiv(H, step_size),
        body,
        (
            tuple(jnp.zeros((tokens.size, size), jnp.float32) for _, size in chunks),
            jnp.zeros((tokens.size, step_size), jnp.float32),
        ),
    )
    inverse = 1 / (jnp.sum(denominator, axis=1) + EPSILON)
    for c, column_mask, numerator in zip(columns, column_masks, numerators):
        out = numerator * inverse[:, None]
        if not has_conv:
            _store(out_ref, (b,), tokens, n * H + c, out, mask, column_mask)
            continue
        local = _convolve(
            kv_ref, *conv_refs, b, y, x, grid, patch[0], c, D + n * H, column_mask, interpret
        )
        _store_rows(out_ref, b, y, x, grid, n * H + c, out, local, column_mask)


def _convolve(
    ref, kernel_ref, bias_ref, b, y, x, grid, rows, columns, offset, column_mask, interpret
):
    """Returns the rows of a patch of DWC(ref[..., offset:]), each (columns of the patch, C) float32."""
    K, shape = kernel_ref.shape[0], (x.size, columns.size)

    def add_column(dx, local):
        local = list(local)
        taps = _load_taps(kernel_ref, dx, columns, column_mask, shape)
        # A row is loaded and widened once, then feeds up to K rows of the output.
        for row in range(rows + K - 1):
            v = _load_row(
                ref, b, y + row - K // 2, x + dx - K // 2, grid, offset + columns, column_mask
            )
            for dy in range(max(0, row - rows + 1), min(K, row + 1)):
                local[row - dy] = _fma(v, taps[dy], local[row - dy], interpret)
        return tuple(local)

    bias = _load_vector(bias_ref, (), columns, column_mask).astype(jnp.float32)
    return lax.fori_loop(0, K, add_column, (jnp.broadcast_to(bias[None, :], shape),) * rows)


def _convolve_transposed(
    do_ref, kernel_ref, partial_ref, index, v, y, x, grid, columns, offset, column_mask, interpret
):
    """Returns the rows of a patch of DWC^T(do), and stores the patch's sums for each tap, then for the bias.

    `v` lists the patch's rows of v. A row of do feeds up to K rows of dv and, with the rows of v, K taps.
    """
    K, rows, shape = kernel_ref.shape[0], len(v), (x.size, columns.size)
    mask = jnp.ones(columns.shape, jnp.bool_) if column_mask is None else column_mask

    def add_column(dx, local):
        local, dtaps = list(local), [jnp.zeros(shape, jnp.float32)] * K
        taps = _load_taps(kernel_ref, dx, columns, column_mask, shape)
        for row in range(rows + K - 1):
            do = _load_row(
                do_ref,
                index[0],
                y + row - K // 2,
                x + K // 2 - dx,
                grid,
                offset + columns,
                column_mask,
            )
            for back in range(max(0, row - rows + 1), min(K, row + 1)):
                dy = K - 1 - back
                local[row - back] = _fma(do, taps[dy], local[row - back], interpret)
                dtaps[dy] = _fma(do, v[row - back], dtaps[dy], interpret)
        for dy in range(K):
            plgpu.store(
                partial_ref.at[(*index, dy * K + dx, columns)],
                jnp.sum(dtaps[dy], axis=0),
                mask=mask,
            )
        return tuple(local)

    local = lax.fori_loop(0, K, add_column, (jnp.zeros(shape, jnp.float32),) * rows)
    dbias = sum(
        _load_row(do_ref, index[0], y + row, x, grid, offset + columns, column_mask)
        for row in range(rows)
    )
    plgpu.store(partial_ref.at[(*index, K * K, columns)], jnp.sum(dbias, axis=0), mask=mask)
    return local


def _store_rows(ref, b, y, x, grid, columns, product, local, column_mask):
    """Stores product (rows * columns of the patch, C) + local, a list of the patch's rows, at the patch."""
    h, w = grid
    for row, part in enumerate(lax.split(product, [x.size] * len(local), axis=0)):
        mask = (x < w) & (y + row < h)
        tokens = jnp.where(mask, (y + row) * w + x, h * w)
        _store(ref, (b,), tokens, columns, part + local[row], mask, column_mask)


def _dq_kernel(
    q_ref, do_ref, state_ref, key_mean_ref, dq_ref, scale_ref, ddenominator_ref, *, block, H
):
    """dq of one block of tokens of one head, with 1 / denominator and the denominator's cotangent, for dS.

    With E = do S^T the numerator is not needed: do . (phi(q) S) = phi(q) . E.
    """
    token_block, n, b = (pl.program_id(axis) for axis in range(3))
    T = q_ref.shape[1]
    tokens = token_block * block + jnp.arange(block)
    mask = tokens < T
    chunks = _chunks(_padded(H), 256)
    columns = [offset + jnp.arange(size) for offset, size in chunks]
    column_masks = [None if H % 16 == 0 else c < H for c in columns]
    step_size = _step(H)

    def body(step, products):
        k_columns = step * step_size + jnp.arange(step_size)
        k_mask = None if H % step_size == 0 else k_columns < H
        do = _load(do_ref, (b,), tokens, n * H + k_columns, mask, k_mask)
        out = []
        for c, column_mask, product in zip(columns, column_masks, products):
            state_rows = jnp.ones(c.size, jnp.bool_) if column_mask is None else column_mask
            state = _load(state_ref, (b, n), c, k_columns, state_rows, k_mask)
            out.append(product + _dot(do, state, (1, 1)))
        return tuple(out)

    products = lax.fori_loop(
        0,
        pl.cdiv(H, step_size),
        body,
        tuple(jnp.zeros((block, size), jnp.float32) for _, size in chunks),
    )
    denominator = jnp.full((block,), EPSILON, jnp.float32)
    dot = jnp.zeros((block,), jnp.float32)
    for c, column_mask, product in zip(columns, column_masks, products):
        phi_q = _phi(_load(q_ref, (b,), tokens, n * H + c, mask, column_mask))
        denominator += jnp.sum(
            phi_q * _load_vector(key_mean_ref, (b, n), c, column_mask)[None, :], axis=1
        )
        dot += jnp.sum(phi_q * product, axis=1)
    scale = 1 / denominator
    ddenominator = -dot * scale * scale
    for c, column_mask, product in zip(columns, column_masks, products):
        q = _load(q_ref, (b,), tokens, n * H + c, mask, column_mask)
        key_mean = _load_vector(key_mean_ref, (b, n), c, column_mask)
        dq = product * scale[:, None] + ddenominator[:, None] * key_mean[None, :]
        _store(dq_ref, (b,), tokens, n * H + c, jnp.where(q > 0, dq, 0), mask, column_mask)
    plgpu.store(scale_ref.at[b, n, tokens], scale, mask=mask)
    plgpu.store(ddenominator_ref.at[b, n, tokens], ddenominator, mask=mask)


def _dkv_kernel(
    kv_ref, do_ref, dstate_ref, dkey_mean_ref, *refs, grid, patch, H, tile, has_conv, interpret
):
    """dk and dv at one patch and one tile of a head's columns, and the patch's filter gradient."""
    kernel_ref, dkv_ref, partial_ref = refs if has_conv else (None, refs[0], None)
    column_tile, patch_index, n, b = (pl.program_id(axis) for axis in range(4))
    D = do_ref.shape[2]
    y, x, tokens, mask = _patch_tokens(patch_index, patch, grid)
    chunks = _chunks(tile, 64)
    columns = [column_tile * tile + offset + jnp.arange(size) for offset, size in chunks]
    column_masks = [None if H % tile == 0 else c < H for c in columns]
    step_size = _step(H)

    def body(step, carry):
        k_columns = step * step_size + jnp.arange(step_size)
        k_mask = None if H % step_size == 0 else k_columns < H
        k_rows = jnp.ones(step_size, jnp.bool_) if k_mask is None else k_mask
        k = _load(kv_ref, (b,), tokens, n * H + k_columns, mask, k_mask)
        phi_k = _phi(k).astype(k.dtype)
        v = _load(kv_ref, (b,), tokens, D + n * H + k_columns, mask, k_mask)
        out = []
        for c, column_mask, (dk, dv) in zip(columns, column_masks, carry):
            c_rows = jnp.ones(c.size, jnp.bool_) if column_mask is None else column_mask
            dk += _dot(v, _load(dstate_ref, (b, n), c, k_columns, c_rows, k_mask), (1, 1))
            dv += _dot(phi_k, _load(dstate_ref, (b, n), k_columns, c, k_rows, column_mask))
            out.append((dk, dv))
        return tuple(out)

    zeros = tuple((jnp.zeros((tokens.size, size), jnp.float32),) * 2 for _, size in chunks)
    gradients = lax.fori_loop(0, pl.cdiv(H, step_size), body, zeros)
    for c, column_mask, (dk, dv) in zip(columns, column_masks, gradients):
        k = _load(kv_ref, (b,), tokens, n * H + c, mask, column_mask)
        dk += _load_vector(dkey_mean_ref, (b, n), c, column_mask)[None, :]
        _store(dkv_ref, (b,), tokens, n * H + c, jnp.where(k > 0, dk, 0), mask, column_mask)
        if not has_conv:
            _store(dkv_ref, (b,), tokens, D + n * H + c, dv, mask, column_mask)
            continue
        v = [
            _load_row(kv_ref, b, y + row, x, grid, D + n * H + c, column_mask)
            for row in range(patch[0])
        ]
        local = _convolve_transposed(
            do_ref,
            kernel_ref,
            partial_ref,
            (b, n, patch_index),
            v,
            y,
            x,
            grid,
            c,
            n * H,
            column_mask,
            interpret,
        )
        _store_rows(dkv_ref, b, y, x, grid, D + n * H + c, dv, local, column_mask)
