"""The Pallas Mosaic GPU kernels of `linear_attention`, for NVIDIA Hopper.

Per image and head, with P = phi(q), K = phi(k) and E = do S^T, the kernels are

    state      S = K^T v / T, s = mean K
               reads k, v; writes S, s
    out        P S / (P . s + epsilon) + DWC(v) + bias
               reads q, v, S, s; writes out
    dq         den = P . s + epsilon, r = -(P . E) / den^2, dP = E / den + r s
               reads q, do, S, s; writes dq, 1 / den and r den
    dstate     dS = P^T (do / den) / T, ds = mean r P
               reads q, do, 1 / den, r den; writes dS, ds
    dk         dK = v dS^T + ds
               reads k, v, dS, ds; writes dk
    dv         dv = K dS + DWC^T(do)
               reads k, do, dS; writes dv
    dfilter    reads v, do; writes its sums over parts of the tokens

The last sums are added by XLA: no atomics, so every run gives the same bits.
Sums are float32. S and dS travel in bfloat16, because they are operands of
products; s and ds travel as two bfloat16 numbers, whose sum keeps 16 bits.

A state is stored transposed, (columns of v, columns of k), in groups of 64 rows,
and what the last group has left holds s: the tile of v is widened by ones, so
the product that gives S gives s. The product with S gives P . s likewise.

Tiles come by TMA. The tile of v for a convolution includes a halo: where that
lies outside the grid TMA fills in zeros, which are the padding. A row of v is
loaded K times, moved by a column each, and feeds up to K rows of the output.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from lit_jax.kernels.linear_attention_case import EPSILON, FUSED, Case
from lit_jax.kernels.linear_attention_gpu_plan import CHUNK, PATCH, ROWS, Plan

Inputs = tuple[jax.Array, jax.Array, jax.Array | None, jax.Array | None]

WGMMA = plgpu.Layout.WGMMA
# 64 bytes and not 128: slices of 96 columns divide by 32, not by 64.
TILED = (plgpu.TilingTransform((8, 32)), plgpu.SwizzleTransform(64))
TILED_FLOAT32 = (plgpu.TilingTransform((8, 32)), plgpu.SwizzleTransform(128))
# A convolution's window starts at any column. In a swizzled tile, which Mosaic would choose by
# itself, it would have to start at a multiple of eight: Mosaic counts the swizzle from the start of
# a slice, the copy counts it from the start of the memory, and neither says a word.
HALO = (plgpu.TilingTransform((1, 32)),)
# 8 columns of the grid x 32 channels on a warpgroup. A lane has the same two
# channels everywhere, so that their taps stay in its registers.
IMAGE = plgpu.Layout.TILED(
    plgpu.Tiling(((8, 32), (2, 32), (2,))),
    warp_dims=(-5,),
    lane_dims=(-3, -2),
    vector_dim=-1,
)
PATCH_WARPGROUPS = PATCH[0] * PATCH[1] // ROWS
PATCH_ROWS = PATCH[0] // PATCH_WARPGROUPS  # of a warpgroup


# ---- The two passes of the op ------------------------------------------------


def forward(inputs: Inputs, *, case: Case, interpret: bool = False) -> tuple[jax.Array, jax.Array]:
    """The op's output, and the state, which `backward` needs.

    Args:
      inputs: q (B, T, D), kv (B, T, 2D), conv_kernel (K, K, H), conv_bias (H,);
        the last two may be None.
    Returns: (B, T, D) in the dtype of q, and the state (B N, rows, H).
    """
    q, kv, conv_kernel, conv_bias = inputs
    plan = Plan(case, q.shape[0], interpret)
    state = _state(kv, kv, None, plan)

    taps = None
    if conv_kernel is not None and conv_bias is not None:
        taps = _flat(conv_kernel, conv_bias)
    out = jax.ShapeDtypeStruct((q.shape[0], *case.grid, case.width), q.dtype)
    [out] = _patches((q, kv, state, taps), [out], plan, normalise=True)
    # Kept, the backward pass runs neither kernel again. The barriers: XLA's GPU compiler makes two
    # calls of one whose result is used and also put into a scan's stack.
    out, state = map(lax.optimization_barrier, (out.reshape(q.shape), state))
    return checkpoint_name(out, FUSED), checkpoint_name(state, FUSED)


def backward(
    inputs: Inputs,
    state: jax.Array,
    do: jax.Array,
    *,
    case: Case,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array | None, jax.Array | None]:
    """The gradients (dq, dkv, dconv_kernel, dconv_bias) for `do` (B, T, D).

    Args: inputs: as in `forward`. state: what it returned.
    Returns: each gradient in the shape and dtype of its input; None for what
      was None.
    """
    q, kv, conv_kernel, conv_bias = inputs
    B, T, D = q.shape
    plan = Plan(case, B, interpret)

    row = jax.ShapeDtypeStruct((B, case.num_heads, T), jnp.float32)
    dq = jax.ShapeDtypeStruct(q.shape, q.dtype)
    dq, *weights = _rows((do, q, state), [dq, row, row], plan, normalise=True)
    dstate = _state(q, do, weights, plan)

    # Two kernels write one array, a half each.
    halves = jax.new_ref(lax.empty(kv.shape, kv.dtype))
    _rows((kv, kv, dstate, halves), [], plan, normalise=False)
    halves = jax.new_ref(jax.freeze(halves).reshape(B, *case.grid, 2 * D))
    taps = None
    if conv_kernel is not None:
        no_bias = jnp.zeros_like(conv_kernel[0, 0])
        taps = _flat(conv_kernel[::-1, ::-1], no_bias)
    _patches((kv, do, dstate, taps, halves), [], plan, normalise=False)
    dkv = jax.freeze(halves).reshape(kv.shape)
    if conv_kernel is None or conv_bias is None:
        return dq, dkv, None, None

    dfilter = _filter_gradient(kv, do, plan)
    return (
        dq,
        dkv,
        dfilter[:-1].reshape(conv_kernel.shape).astype(conv_kernel.dtype),
        dfilter[-1].astype(conv_bias.dtype),
    )


# ---- What the kernels share --------------------------------------------------


def _call(kernel, operands, out_type, *, plan: Plan, **launch):
    """Runs a kernel; grid axes go slowest first."""
    interpret = None
    if plan.interpret:
        interpret = plgpu.InterpretGPUParams(detect_races=True, on_race="raise")
    return plgpu.kernel(
        functools.partial(kernel, plan=plan),
        out_type=out_type,
        thread_name="warpgroup",
        interpret=interpret,
        **launch,
    )(*operands)


def _head(plan: Plan):
    """The image and the head of a block, and both as one index."""
    index = lax.axis_index("head")
    N = plan.case.num_heads
    return lax.div(index, N), lax.rem(index, N), index


def _phi(x):
    """phi in the dtype of x: exact but for the rounding that a product's operand gets."""
    return jnp.maximum(x, jnp.zeros((), x.dtype)) + jnp.asarray(EPSILON, x.dtype)


def _by_row(x, shape):
    return lax.broadcast_in_dim(x, shape, (0,))


def _by_column(x, shape):
    return lax.broadcast_in_dim(x, shape, (1,))


def _split(x):
    """Returns float32 (high, low) whose sum is x; high is exact in bfloat16."""
    # By its bits: compilers may take a cast to bfloat16 and back for nothing.
    bits = lax.bitcast_convert_type(x, jnp.int32)
    high = lax.bitcast_convert_type(bits & jnp.int32(-65536), jnp.float32)
    return high, x - high


def _flat(conv_kernel, conv_bias):
    """Returns (K * K + 1, H) float32: the taps, then the bias."""
    taps = conv_kernel.reshape(-1, conv_kernel.shape[-1])
    rows = (taps.astype(jnp.float32), conv_bias[None].astype(jnp.float32))
    return jnp.concatenate(rows)


def _image(x, plan: Plan):
    """(B, T, columns) to (B, h, w, columns)."""
    return x.reshape(x.shape[0], *plan.case.grid, x.shape[-1])


def _haloed(x, plan: Plan):
    """The same for tiles with a halo; the interpreter needs it padded."""
    x = _image(x, plan)
    pad = plan.interpret_pad
    return jnp.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0))) if pad else x


def _tile_at(y, x, plan: Plan):
    """The slices of a haloed image that the tile of the patch at (y, x) covers."""
    start = plan.interpret_pad - plan.halo
    return tuple(pl.ds(at + start, size) for at, size in zip((y, x), plan.tile))


# ---- The state ---------------------------------------------------------------


def _state(left, right, weights, plan: Plan):
    """Returns the state of phi(left) and `right`, the last D columns of its array.

    `left` is the first D columns of its array. With `weights` (scale, weight),
    each (B, N, T) float32, phi(left) is multiplied by scale, and the mean is of
    weight_t scale_t phi(left_t): dS, from q and do. Without them both are ones.

    Returns: (B N, rows, H). Rows of H are columns of `right`. Row H is the mean
      and row H + 1 what bfloat16 lost of it.
    """
    H = plan.case.head_width
    shape = (plan.splits, *plan.state_shape)
    tiles = (plan.stages, plan.groups, ROWS, ROWS)
    barriers = (
        plgpu.Barrier(num_barriers=plan.stages),
        plgpu.Barrier(num_arrivals=plan.groups - (not plan.rest), num_barriers=plan.stages),
        plgpu.Barrier(num_barriers=plan.stages),
        plgpu.Barrier(num_arrivals=plan.groups, num_barriers=plan.stages),
    )
    [state] = _call(
        _state_kernel,
        (left, right, *(weights or ())),
        [jax.ShapeDtypeStruct(shape, right.dtype)],
        plan=plan,
        scratch_types=(
            plgpu.SMEM((plan.stages, ROWS, plan.slice), right.dtype, transforms=TILED),
            plgpu.SMEM(tiles, right.dtype, transforms=TILED),
            plgpu.SMEM((plan.groups, ROWS, plan.slice), right.dtype, transforms=TILED),
            barriers,
        ),
        grid=(plan.heads, plan.splits, plan.slices),
        grid_names=("head", "split", "slice"),
        num_threads=plan.groups + 1,
        kernel_name="linear_attention_dstate" if weights else "linear_attention_state",
    )
    if plan.splits == 1:
        return state[0]
    state = jnp.sum(state.astype(jnp.float32), axis=0)
    high, low = _split(state[:, H : H + 1] + state[:, H + 1 : H + 2])
    parts = [state[:, :H], high, low, state[:, H + 2 :]]
    return jnp.concatenate(parts, axis=1).astype(right.dtype)


def _state_kernel(left_ref, right_ref, *refs, plan: Plan):
    """A slice of one head's state over one split of T.

    One warpgroup fetches tiles and prepares phi; each of the others multiplies
    64 columns of `right` by all columns of the slice.
    """
    *weight_refs, state_ref, left_tiles, right_tiles, out_tiles, barriers = refs
    left_full, right_full, ready, consumed = barriers
    b, n, head = _head(plan)
    split = lax.axis_index("split")
    columns = pl.ds(lax.axis_index("slice") * plan.slice, plan.slice)
    warpgroup = lax.axis_index("warpgroup")
    H = plan.case.head_width
    last = plan.groups - 1
    steps = plan.case.tokens // ROWS // plan.splits
    first_left = n * H + lax.axis_index("slice") * plan.slice
    first_right = right_ref.shape[2] - plan.case.width + n * H

    def tokens(step):
        return pl.ds((split * steps + step) * ROWS, ROWS)

    def fetch(step, slot):
        plgpu.copy_gmem_to_smem(
            left_ref.at[b, tokens(step), pl.ds(first_left, plan.slice)],
            left_tiles.at[slot],
            left_full.at[slot],
        )
        # The last group may reach into the next head or past the
        # array. What it brings from there is overwritten.
        for group in range(plan.groups if plan.rest else last):
            plgpu.copy_gmem_to_smem(
                right_ref.at[b, tokens(step), pl.ds(first_right + group * ROWS, ROWS)],
                right_tiles.at[slot, group],
                right_full.at[slot],
            )

    def prepare(step):
        slot = lax.rem(step, plan.stages)
        plgpu.barrier_wait(left_full.at[slot])
        phi = _phi(plgpu.load(left_tiles.at[slot], layout=WGMMA))
        ones = jnp.ones((ROWS, ROWS - plan.rest), phi.dtype)
        if weight_refs:
            scale, weight = (
                plgpu.load(ref.at[b, n, tokens(step)], layout=WGMMA.reduce(1), optimized=False)
                for ref in weight_refs
            )
            scaled = phi.astype(jnp.float32) * _by_row(scale, phi.shape)
            phi = scaled.astype(phi.dtype)
            ones = _by_row(weight.astype(phi.dtype), ones.shape)
        # After the copy, which may write to these columns too.
        plgpu.barrier_wait(right_full.at[slot])
        right_tiles[slot, last, :, pl.ds(plan.rest, ROWS - plan.rest)] = ones
        left_tiles[slot] = phi
        # Tensor cores read past the cache of ordinary writes.
        plgpu.commit_smem()
        plgpu.barrier_arrive(ready.at[slot])

    @pl.when(warpgroup == plan.groups)
    def _produce():
        for slot in range(plan.stages):
            fetch(slot, slot)

        @pl.loop(0, steps)
        def _step(step):
            prepare(step)

            # A step late, so that preparing never waits for the last product.
            @pl.when((step > 0) & (step - 1 + plan.stages < steps))
            def _refill():
                slot = lax.rem(step - 1, plan.stages)
                plgpu.barrier_wait(consumed.at[slot])
                fetch(step - 1 + plan.stages, slot)

    def multiply(sums):
        @pl.loop(0, steps)
        def _step(step):
            slot = lax.rem(step, plan.stages)
            plgpu.barrier_wait(right_full.at[slot])
            plgpu.barrier_wait(ready.at[slot])
            right = right_tiles.at[slot, warpgroup].transpose((1, 0))
            plgpu.wgmma(sums, right, left_tiles.at[slot])
            plgpu.wgmma_wait(0)

            # Only for those who wait: a barrier must not be ahead by two.
            @pl.when(step + plan.stages < steps)
            def _release():
                plgpu.barrier_arrive(consumed.at[slot])

        return sums[...]

    @pl.when(warpgroup < plan.groups)
    def _consume():
        accumulator = plgpu.ACC((ROWS, plan.slice), jnp.float32)
        state = pl.run_scoped(multiply, accumulator) * (1 / plan.case.tokens)
        out_tiles[warpgroup] = state.astype(out_tiles.dtype)

        @pl.when(warpgroup == last)
        def _add_mean():
            # By parts: the whole tile three times over is more than the registers.
            for first in range(0, plan.slice, CHUNK):
                part = state[:, first : first + CHUNK]
                high, low = _split(part)
                row = plgpu.broadcasted_iota(jnp.int32, part.shape, 0, layout=WGMMA)
                low = jnp.where(row == plan.rest + 1, low, jnp.zeros_like(low))
                mean = jnp.where(row == plan.rest, high, low)
                part = jnp.where(row < plan.rest, part, mean).astype(out_tiles.dtype)
                out_tiles[warpgroup, :, pl.ds(first, CHUNK)] = part

        plgpu.commit_smem()
        rows = pl.ds(warpgroup * ROWS, ROWS)
        plgpu.copy_smem_to_gmem(out_tiles.at[warpgroup], state_ref.at[split, head, rows, columns])
        plgpu.wait_smem_to_gmem(0)


# ---- phi times a state, plus the convolution: out and dv ---------------------


def _patches(operands, out_type, plan: Plan, *, normalise):
    """phi(left) S, normalised or not, plus the convolution of `image`.

    `operands` are left, image, state, taps or None, and what a kernel that has
    no output of its own writes to. `left` is the first D columns of its array,
    `image` and the output are the last.
    """
    left, image, state, taps, *out = operands
    H = plan.case.head_width
    dtype = left.dtype
    columns = plan.slice + 8 * normalise
    scratch = [
        plgpu.SMEM((columns, H), dtype, transforms=TILED),
        plgpu.SMEM((PATCH_WARPGROUPS, ROWS, H), dtype, transforms=TILED),
        plgpu.SMEM((PATCH_WARPGROUPS, ROWS, plan.slice), jnp.float32, transforms=TILED_FLOAT32),
    ]
    if taps is not None:
        scratch.append(plgpu.SMEM((*plan.tile, plan.slice), dtype, transforms=HALO))
    scratch.append(
        (
            plgpu.Barrier(num_arrivals=1 + normalise),
            plgpu.Barrier(num_arrivals=PATCH_ROWS, num_barriers=PATCH_WARPGROUPS),
            plgpu.Barrier(),
            plgpu.Barrier(num_arrivals=PATCH_WARPGROUPS),
        )
    )
    arrays = [_image(left, plan), state]
    if taps is not None:
        arrays += [_haloed(image, plan), taps]
    return _call(
        functools.partial(_patch_kernel, normalise=normalise),
        (*arrays, *out),
        out_type,
        plan=plan,
        scratch_types=scratch,
        grid=(plan.heads, plan.patch_chunks, plan.slices),
        grid_names=("head", "chunk", "slice"),
        num_threads=PATCH_WARPGROUPS,
        kernel_name="linear_attention_out" if normalise else "linear_attention_dv",
    )


def _patch_kernel(left_ref, state_ref, *refs, plan: Plan, normalise):
    """A slice of a head's columns at some patches of an image, one after the other.

    The slice of the state stays in shared memory. While a warpgroup convolves,
    the tokens of its next patch are on their way.
    """
    has_conv = bool(plan.case.conv_size)
    image_ref, taps_ref, *own = refs if has_conv else (None, None, *refs)
    out_ref, state_tile, left_tiles, products, *last = own
    image_tile, barriers = last if has_conv else (None, *last)
    state_full, left_full, image_full, done = barriers

    b, n, head = _head(plan)
    column = lax.axis_index("slice") * plan.slice
    chunk = lax.axis_index("chunk")
    warpgroup = lax.axis_index("warpgroup")
    D = plan.case.width
    H = plan.case.head_width
    steps = plan.patches // plan.patch_chunks
    first_row = warpgroup * PATCH_ROWS

    def corner(step):
        patch = chunk * steps + step
        y = lax.rem(patch, plan.patches_down) * PATCH[0]
        return y, lax.div(patch, plan.patches_down) * PATCH[1]

    def fetch_left(step):
        y, x = corner(step)
        # A copy for each row of the patch makes its tokens the rows of a matrix.
        for row in range(PATCH_ROWS):
            row_of_grid = left_ref.at[b, y + first_row + row]
            plgpu.copy_gmem_to_smem(
                row_of_grid.at[pl.ds(x, PATCH[1]), pl.ds(n * H, H)],
                left_tiles.at[warpgroup, pl.ds(row * PATCH[1], PATCH[1])],
                left_full.at[warpgroup],
            )

    def fetch_image(step):
        y, x = corner(step)
        first = image_ref.shape[3] - D + n * H + column
        tile = (*_tile_at(y, x, plan), pl.ds(first, plan.slice))
        plgpu.copy_gmem_to_smem(image_ref.at[(b, *tile)], image_tile, image_full)

    @pl.when(warpgroup == 0)
    def _start():
        plgpu.copy_gmem_to_smem(
            state_ref.at[head, pl.ds(column, plan.slice)],
            state_tile.at[pl.ds(0, plan.slice)],
            state_full,
        )
        if normalise:
            plgpu.copy_gmem_to_smem(
                state_ref.at[head, pl.ds(H, 8)],
                state_tile.at[pl.ds(plan.slice, 8)],
                state_full,
            )
        if has_conv:
            fetch_image(0)

    fetch_left(0)
    plgpu.barrier_wait(state_full)

    def multiply(sums):
        plgpu.wgmma(sums, left_tiles.at[warpgroup], state_tile.transpose((1, 0)))
        return sums[...]

    def attend(step):
        """Leaves the step's product in shared memory, and asks for the next tokens."""
        plgpu.barrier_wait(left_full.at[warpgroup])
        phi = _phi(plgpu.load(left_tiles.at[warpgroup], layout=WGMMA))
        left_tiles[warpgroup] = phi
        plgpu.commit_smem()
        accumulator = plgpu.ACC((ROWS, state_tile.shape[0]), jnp.float32)
        product = pl.run_scoped(multiply, accumulator)

        # The product has read the tile, which is free again.
        @pl.when(step + 1 < steps)
        def _next():
            fetch_left(step + 1)

        if normalise:
            # Two of the eight columns are not zero: P . s in two parts.
            denominator = jnp.sum(product[:, plan.slice :], axis=1) + EPSILON
            product = product[:, : plan.slice]
            product = product * _by_row(1 / denominator, product.shape)
        products[warpgroup] = product

    # The first warpgroup multiplies while the others convolve, and the other way round: a
    # product waits for memory and tensor cores, a convolution is all instructions.
    @pl.when(warpgroup > 0)
    def _ahead():
        attend(0)

    @pl.loop(0, steps)
    def _step(step):
        @pl.when(warpgroup == 0)
        def _product():
            attend(step)

        if has_conv:
            plgpu.barrier_wait(image_full)
        y, x = corner(step)
        first = out_ref.shape[3] - D + n * H + column

        # A loop: unrolled, its parts would share the registers.
        @pl.loop(0, plan.slice // CHUNK)
        def _part(part):
            channels = pl.ds(part * CHUNK, CHUNK)
            rows = []
            for row in range(PATCH_ROWS):
                tokens = pl.ds(row * PATCH[1], PATCH[1])
                product = products.at[warpgroup, tokens, channels]
                rows.append(plgpu.load(product, layout=IMAGE))
            if has_conv:
                window = image_tile.at[:, :, channels]
                taps = taps_ref.at[:, pl.ds(column + part * CHUNK, CHUNK)]
                _convolve(rows, window.at[pl.ds(first_row, PATCH_ROWS + 2 * plan.halo)], taps)
            for row, value in enumerate(rows):
                out = out_ref.at[b, y + first_row + row, pl.ds(x, PATCH[1])]
                out = out.at[:, pl.ds(first + part * CHUNK, CHUNK)]
                # Straight to memory: a warp writes whole sectors of 64 bytes.
                plgpu.store(out, value.astype(out_ref.dtype), optimized=False)

        if has_conv:
            # Orders these reads before the copy's writes, which go another way.
            plgpu.commit_smem()
            plgpu.barrier_arrive(done)

        @pl.when((warpgroup > 0) & (step + 1 < steps))
        def _next_product():
            attend(step + 1)

        # Both warpgroups read rows of the one tile: it is replaced when both are through.
        if has_conv:
            plgpu.barrier_wait(done)

            @pl.when((warpgroup == 0) & (step + 1 < steps))
            def _next():
                fetch_image(step + 1)


def _convolve(rows, window, taps_ref):
    """Adds the convolution and the bias to a list of rows of the grid.

    `window` is (rows + K - 1, columns + K - 1, CHUNK) in shared memory, and
    taps_ref (K * K + 1, CHUNK) in global memory.
    """
    K = window.shape[0] - len(rows) + 1
    shape = (PATCH[1], CHUNK)
    taps = [
        _by_column(plgpu.load(taps_ref.at[i], layout=IMAGE.reduce(0), optimized=False), shape)
        for i in range(K * K + 1)
    ]
    for row in range(len(rows)):
        rows[row] += taps[-1]
    for i in range(window.shape[0]):
        for dx in range(K):
            # Loaded and widened once, then used by up to K rows.
            # Two columns of the grid that are 128 bytes apart share the banks.
            value = _load_image(window.at[i, pl.ds(dx, PATCH[1])], optimized=False)
            for row in range(max(0, i - K + 1), min(len(rows), i + 1)):
                rows[row] += value * taps[(i - row) * K + dx]


def _load_image(ref, optimized=True):
    return plgpu.load(ref, layout=IMAGE, optimized=optimized).astype(jnp.float32)


# ---- `right` times a state: dq and dk ----------------------------------------


def _rows(operands, out_type, plan: Plan, *, normalise):
    """The gradient of `left`, 1[left > 0] (scale right S^T + r mean).

    `operands` are right, left, state, and what a kernel that has no output of
    its own writes to. `right` is the last D columns of its array, `left` and
    the output are the first. With `normalise`, scale and r are those of the
    module's docstring, and the outputs are scale and r / scale too; else both
    are one.
    """
    H = plan.case.head_width
    dtype = operands[0].dtype
    return _call(
        functools.partial(_row_kernel, normalise=normalise),
        operands,
        out_type,
        plan=plan,
        scratch_types=(
            plgpu.SMEM((plan.slices, H, plan.slice), dtype, transforms=TILED),
            plgpu.SMEM((ROWS, H), dtype, transforms=TILED),
            plgpu.SMEM((2, 2, plan.slices, ROWS), jnp.float32),
            (
                plgpu.Barrier(num_arrivals=plan.slices),
                plgpu.Barrier(),
                plgpu.Barrier(num_arrivals=plan.slices),
                plgpu.Barrier(num_arrivals=plan.slices),
            ),
        ),
        grid=(plan.heads, plan.row_chunks),
        grid_names=("head", "chunk"),
        num_threads=plan.slices,
        kernel_name="linear_attention_dq" if normalise else "linear_attention_dk",
    )


def _row_kernel(right_ref, left_ref, state_ref, out_ref, *refs, plan: Plan, normalise):
    """All columns of a head at some tokens: each warpgroup has a slice of them.

    With E = do S^T the numerator is not needed: do . (phi(q) S) = phi(q) . E.
    """
    *row_refs, state_tiles, right_tile, sums, barriers = refs
    state_full, right_full, read, summed = barriers
    b, n, head = _head(plan)
    chunk = lax.axis_index("chunk")
    warpgroup = lax.axis_index("warpgroup")
    H = plan.case.head_width
    steps = plan.case.tokens // ROWS // plan.row_chunks
    shape = (ROWS, plan.slice)
    first_right = right_ref.shape[2] - plan.case.width + n * H
    columns = pl.ds(n * H + warpgroup * plan.slice, plan.slice)

    def tokens(step):
        return pl.ds((chunk * steps + step) * ROWS, ROWS)

    def fetch(step):
        plgpu.copy_gmem_to_smem(
            right_ref.at[b, tokens(step), pl.ds(first_right, H)], right_tile, right_full
        )

    @pl.when(warpgroup == 0)
    def _start():
        for i in range(plan.slices):
            plgpu.copy_gmem_to_smem(
                state_ref.at[head, pl.ds(0, H), pl.ds(i * plan.slice, plan.slice)],
                state_tiles.at[i],
                state_full,
            )
        fetch(0)

    plgpu.barrier_wait(state_full)

    def multiply(products):
        plgpu.wgmma(products, right_tile, state_tiles.at[warpgroup])
        return products[...]

    def load_mean():
        parts = (
            plgpu.load(
                state_ref.at[head, H + i, pl.ds(warpgroup * plan.slice, plan.slice)],
                layout=WGMMA.reduce(0),
                optimized=False,
            )
            for i in range(2)
        )
        return _by_column(sum(part.astype(jnp.float32) for part in parts), shape)

    def sum_rows(step, *values):
        """Sums each (tokens, slice) over the columns of all warpgroups."""
        # Two slots: nobody writes to one that another still reads.
        slot = lax.rem(step, 2)
        for i, value in enumerate(values):
            sums[slot, i, warpgroup] = jnp.sum(value, axis=1)
        plgpu.barrier_arrive(summed)
        plgpu.barrier_wait(summed)
        for i in range(len(values)):
            yield sum(
                plgpu.load(sums.at[slot, i, part], layout=WGMMA.reduce(1))
                for part in range(plan.slices)
            )

    @pl.loop(0, steps)
    def _step(step):
        plgpu.barrier_wait(right_full)
        gradient = pl.run_scoped(multiply, plgpu.ACC(shape, jnp.float32))
        plgpu.barrier_arrive(read)

        @pl.when((warpgroup == 0) & (step + 1 < steps))
        def _next():
            plgpu.barrier_wait(read)
            fetch(step + 1)

        # Read at every step: kept, it would take 24 registers through the product.
        mean = load_mean()
        left = plgpu.load(
            left_ref.at[b, tokens(step), columns], layout=WGMMA, optimized=False
        ).astype(jnp.float32)
        if normalise:
            phi = _phi(left)
            denominator, dot = sum_rows(step, phi * mean, phi * gradient)
            scale = 1 / (denominator + EPSILON)
            weight = -dot * scale
            gradient = gradient * _by_row(scale, shape)
            gradient += _by_row(weight * scale, shape) * mean

            @pl.when(warpgroup == 0)
            def _store_weights():
                for ref, value in zip(row_refs, (scale, weight)):
                    plgpu.store(ref.at[b, n, tokens(step)], value, optimized=False)
        else:
            gradient += mean
        gradient = jnp.where(left > 0, gradient, jnp.zeros_like(gradient))
        plgpu.store(
            out_ref.at[b, tokens(step), columns],
            gradient.astype(out_ref.dtype),
            optimized=False,
        )


# ---- The gradient of the filter ----------------------------------------------


def _filter_gradient(kv, do, plan: Plan):
    """Returns (K * K + 1, H) float32: of every tap, then of the bias."""
    case = plan.case
    terms = case.conv_size**2 + 1
    B, _, D = do.shape
    h, w = case.grid
    shape = (plan.filter_chunks, PATCH_WARPGROUPS, terms, D)
    [parts] = _call(
        _filter_kernel,
        (_haloed(kv, plan), do.reshape(B * h, w, D)),
        [jax.ShapeDtypeStruct(shape, jnp.float32)],
        plan=plan,
        scratch_types=(
            plgpu.SMEM((2, *plan.tile, CHUNK), do.dtype, transforms=HALO),
            plgpu.SMEM((2, *PATCH, CHUNK), do.dtype),
            (
                plgpu.Barrier(num_arrivals=2, num_barriers=2),
                plgpu.Barrier(num_arrivals=PATCH_WARPGROUPS, num_barriers=2),
                plgpu.Barrier(num_barriers=PATCH_WARPGROUPS - 1),
            ),
        ),
        grid=(plan.filter_chunks, D // CHUNK),
        grid_names=("chunk", "channels"),
        num_threads=PATCH_WARPGROUPS,
        kernel_name="linear_attention_dfilter",
    )
    parts = parts.reshape(-1, terms, case.num_heads, case.head_width)
    return jnp.sum(parts, axis=(0, 2))


def _filter_kernel(kv_ref, do_ref, out_ref, image_tiles, do_tiles, barriers, *, plan: Plan):
    """The sums of some channels over some patches of all images."""
    full, read, turn = barriers
    channel = lax.axis_index("channels") * CHUNK
    chunk = lax.axis_index("chunk")
    warpgroup = lax.axis_index("warpgroup")
    K = plan.case.conv_size
    h = plan.case.grid[0]
    steps = plan.batch * plan.patches // plan.filter_chunks
    first_row = warpgroup * PATCH_ROWS

    def fetch(step, slot):
        patch = chunk * steps + step
        b = lax.div(patch, plan.patches)
        y = lax.rem(patch, plan.patches_down) * PATCH[0]
        x = lax.div(lax.rem(patch, plan.patches), plan.patches_down) * PATCH[1]
        image = (b, *_tile_at(y, x, plan), pl.ds(plan.case.width + channel, CHUNK))
        plgpu.copy_gmem_to_smem(kv_ref.at[image], image_tiles.at[slot], full.at[slot])
        do = do_ref.at[pl.ds(b * h + y, PATCH[0]), pl.ds(x, PATCH[1])]
        plgpu.copy_gmem_to_smem(
            do.at[:, :, pl.ds(channel, CHUNK)], do_tiles.at[slot], full.at[slot]
        )

    @pl.when(warpgroup == 0)
    def _start():
        fetch(0, 0)

    def add(step, sums):
        sums = list(sums)
        slot = lax.rem(step, 2)

        # Two slots: the next tile arrives while this one is summed.
        @pl.when((warpgroup == 0) & (step + 1 < steps))
        def _next():
            @pl.when(step > 0)
            def _wait():
                plgpu.barrier_wait(read.at[1 - slot])

            fetch(step + 1, 1 - slot)

        plgpu.barrier_wait(full.at[slot])
        do = [_load_image(do_tiles.at[slot, first_row + row]) for row in range(PATCH_ROWS)]
        for row in do:
            sums[-1] += row[:8] + row[8:]
        for i in range(PATCH_ROWS + K - 1):
            for dx in range(K):
                value = _load_image(image_tiles.at[slot, first_row + i, pl.ds(dx, PATCH[1])])
                for row in range(max(0, i - K + 1), min(PATCH_ROWS, i + 1)):
                    at = (i - row) * K + dx
                    sums[at] += value[:8] * do[row][:8]
                    sums[at] += value[8:] * do[row][8:]

        plgpu.commit_smem()

        @pl.when(step + 2 < steps)
        def _release():
            plgpu.barrier_arrive(read.at[slot])

        return tuple(sums)

    zero = plgpu.layout_cast(jnp.zeros((8, CHUNK), jnp.float32), IMAGE)
    # In registers through all patches; summed over the warpgroup once, at the end.
    sums = lax.fori_loop(0, steps, add, (zero,) * (K * K + 1))

    # One warpgroup after the other: Mosaic adds over warps in a scratch that all of them share.
    @pl.when(warpgroup > 0)
    def _wait_for_turn():
        plgpu.barrier_wait(turn.at[warpgroup - 1])

    for i, value in enumerate(sums):
        out = out_ref.at[chunk, warpgroup, i, pl.ds(channel, CHUNK)]
        plgpu.store(out, jnp.sum(value, axis=0), optimized=False)

    @pl.when(warpgroup + 1 < PATCH_WARPGROUPS)
    def _give_turn():
        plgpu.barrier_arrive(turn.at[warpgroup])
