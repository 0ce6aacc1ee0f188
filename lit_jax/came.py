"""CAME, the optimizer that PixArt-Sigma is trained with: Luo et al., arXiv 2307.02047.

Its second moment is factored into rows and columns, as Adafactor's. A second pair of factors
tracks how far an update is from the running mean of the updates, and divides that mean. The state
is one array of the parameter's size, where Adam has two.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

EPSILON = 1e-30  # added to the squared gradient
RESIDUAL_EPSILON = 1e-16  # added to the squared distance from the mean update


class Factored(NamedTuple):
    """State of a tensor with two axes or more: of one layer, but for the leading layer axis."""

    mean: jax.Array  # of the updates, in the shape of the tensor
    rows: jax.Array  # of the squared gradient: means over the last axis
    columns: jax.Array  # and over the one before it
    residual_rows: jax.Array
    residual_columns: jax.Array


class Whole(NamedTuple):
    """State of a vector."""

    mean: jax.Array
    square: jax.Array


def scale_by_came(
    b1: float = 0.9, b2: float = 0.999, b3: float = 0.9999, clip_threshold: float = 1.0
) -> optax.GradientTransformation:
    """The update of CAME, before the learning rate and the weight decay.

    It is that of each layer by itself: a leaf under `blocks` has a leading layer axis, which is
    neither factored nor averaged over. A convolution is factored over its window, as in PyTorch,
    where the window is last.

    There is no bias correction: the first update has an rms of 11 per element, and that of pure
    noise falls to 1 after 1000 steps. A run from a fresh state needs a warm-up.

    Args:
      b1, b2, b3: decay of the mean update, of the squared gradient, of the residual.
      clip_threshold: the largest rms of a normalised gradient.
    """

    def init_one(p):
        zeros = jnp.zeros(p.shape, jnp.float32)
        if p.ndim < 2:
            return Whole(zeros, zeros)
        rows = jnp.zeros_like(zeros, shape=_window_last(p).shape[:-1])
        columns = jnp.zeros_like(zeros, shape=_without_rows(_window_last(p).shape))
        return Factored(zeros, rows, columns, rows, columns)

    def update_one(gradient, state):
        g = gradient.astype(jnp.float32)
        square = jnp.square(g) + EPSILON
        if isinstance(state, Whole):
            second = b2 * state.square + (1 - b2) * square
            mean = b1 * state.mean + (1 - b1) * _clipped(g * jax.lax.rsqrt(second))
            return mean, Whole(mean, second)

        rows, columns = _decayed(b2, state.rows, state.columns, square)
        update = _clipped(g * _window_first(_rsqrt(rows, columns), g))
        mean = b1 * state.mean + (1 - b1) * update
        residual = jnp.square(update - mean) + RESIDUAL_EPSILON
        factors = (state.residual_rows, state.residual_columns)
        residual_rows, residual_columns = _decayed(b3, *factors, residual)
        scale = _window_first(_rsqrt(residual_rows, residual_columns), g)
        return mean * scale, Factored(mean, rows, columns, residual_rows, residual_columns)

    def _clipped(update):
        rms = jnp.sqrt(jnp.square(update).mean())
        return update / jnp.maximum(rms / clip_threshold, 1.0)

    def init(params):
        return jax.tree_util.tree_map_with_path(
            lambda path, p: _by_layer(path, init_one)(p), params
        )

    def update(gradients, state, params=None):
        del params
        both = jax.tree_util.tree_map_with_path(
            lambda path, g, s: _by_layer(path, update_one)(g, s), gradients, state
        )
        # A tree of pairs to a pair of trees; the states of its leaves are of two kinds.
        updates = jax.tree.map(lambda _, pair: pair[0], gradients, both)
        return updates, jax.tree.map(lambda _, pair: pair[1], gradients, both)

    return optax.GradientTransformation(init, update)


def _by_layer(path: tuple[Any, ...], function: Any) -> Any:
    """The function for each layer of a stacked leaf by itself."""
    is_stacked = any(getattr(key, "key", None) == "blocks" for key in path)
    return jax.vmap(function) if is_stacked else function


def _window_last(x: jax.Array) -> jax.Array:
    """A convolution (h, w, I, O) as (I, O, h, w); other tensors as they are."""
    return x.transpose(2, 3, 0, 1) if x.ndim == 4 else x


def _window_first(x: jax.Array, like: jax.Array) -> jax.Array:
    return x.transpose(2, 3, 0, 1) if like.ndim == 4 else x


def _without_rows(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (*shape[:-2], shape[-1])


def _decayed(
    decay: float, rows: jax.Array, columns: jax.Array, square: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The factors after one more square."""
    square = _window_last(square)
    rows = decay * rows + (1 - decay) * square.mean(axis=-1)
    columns = decay * columns + (1 - decay) * square.mean(axis=-2)
    return rows, columns


def _rsqrt(rows: jax.Array, columns: jax.Array) -> jax.Array:
    """1 / sqrt of the outer product of the factors, divided by the rows' mean."""
    relative = rows / rows.mean(axis=-1, keepdims=True)
    return jax.lax.rsqrt(relative)[..., :, None] * jax.lax.rsqrt(columns)[..., None, :]
