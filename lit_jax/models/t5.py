"""The encoder of T5 v1.1, which turns a prompt's tokens into features.

T5: Raffel et al., arXiv 1910.10683; the gated MLP of v1.1: Shazeer, arXiv 2002.05202.
Parameters carry the names of its checkpoints. The blocks are scanned, so every leaf
under `blocks` has a leading layer axis.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from lit_jax import ranges
from lit_jax.models.architecture import COUNT
from lit_jax.models.autoencoder import precision_of
from lit_jax.models.blocks import scan_blocks
from lit_jax.models.dense import Dense
from lit_jax.partitioning import constrain_rows

# Of every T5 v1.1; no shape tells the last two.
BUCKETS = 32
MAX_DISTANCE = 128
EPSILON = 1e-6
# Ids of the padding and of the token that ends a text, in the tokenizer of every T5.
PAD, END = 0, 1
# float16 is not among them: the MLP of the XXL overflows in it.
DTYPES = ("float32", "bfloat16")


# ---- The architecture ------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class T5Config:
    """The architecture of an encoder; the defaults are those of the XXL.

    Raises: ValueError whose text starts with the field's name.
    """

    vocab_size: int = 32128  # rows of the table: more than the tokenizer has pieces
    width: int = 4096  # D
    depth: int = 24
    num_heads: int = 64  # N
    head_width: int = 64  # H; N * H need not be D
    mlp_width: int = 10240  # F

    def __post_init__(self):
        ranges.check(self, **{field.name: COUNT for field in dataclasses.fields(self)})

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> "T5Config":
        """The config that `to_json` wrote.

        Raises: ValueError for fields that are unknown or missing, or hold what they cannot.
        """
        if not isinstance(fields, Mapping):
            kind = type(fields).__name__
            raise ValueError(f"the architecture is a {kind}, not an object")
        known = {field.name for field in dataclasses.fields(cls)}
        for name in fields:
            if name not in known:
                raise ValueError(f"{str(name)[:40]} is no field of a T5's architecture")
        for name in sorted(known):
            if name not in fields:
                raise ValueError(f"{name} is missing from the architecture")
        return cls(**fields)

    def to_json(self) -> dict[str, Any]:
        """All fields, as JSON values."""
        return dataclasses.asdict(self)


# ---- Positions -------------------------------------------------------------------------


def relative_buckets(length: int) -> np.ndarray:
    """The row of the bias table for every query and key, (length, length) int32.

    Half of the buckets are for keys after the query. In each half the first eight are
    one distance each, and the others grow geometrically up to MAX_DISTANCE.
    """
    half = BUCKETS // 2
    exact = half // 2
    position = np.arange(length)
    offset = position[None] - position[:, None]  # key - query
    distance = np.abs(offset)

    # The edges are 8 * 16^(k/8) for k = 1..7. Compared as squares they are whole
    # numbers, and no rounded logarithm decides a bucket.
    squares = exact**2 * 2 ** np.arange(1, half - exact)
    far = exact + np.sum(distance[..., None] ** 2 >= squares, axis=-1)

    bucket = np.where(distance < exact, distance, far)
    return (bucket + np.where(offset > 0, half, 0)).astype(np.int32)


def near_first(rng: jax.Array, shape: tuple[int, int], dtype: Any = jnp.float32) -> jax.Array:
    """The first biases (BUCKETS, N): heads look back and ahead by turns, at near tokens most.

    T5 draws them with a deviation of D**-0.5, so that a fresh encoder takes a caption for a bag of
    words. A small one did not get over that in 400,000 images, as Adam moves a bias by its rate a
    step. The slopes are ALiBi's (arXiv 2108.12409): 2, 2, 1/2, 1/2, 1/8, ...
    """
    del rng
    buckets, N = shape
    half = buckets // 2
    row = np.arange(buckets)[:, None]
    head = np.arange(N)[None]
    distance = row % half
    is_ahead = row >= half
    seen = (distance > 0) & (is_ahead == (head % 2 == 1))
    slope = 2.0 ** (1 - 2 * (head // 2))
    return jnp.asarray(np.where(seen, np.maximum(slope * (1 - distance), -4.0), -4.0), dtype)


# ---- The encoder -----------------------------------------------------------------------


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + epsilon) * scale, in float32."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        # Under the checkpoint's own name, one module less deep than nn.RMSNorm would be.
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        x = x.astype(jnp.float32)
        power = jnp.mean(jnp.square(x), axis=-1, keepdims=True)
        return x * jax.lax.rsqrt(power + EPSILON) * scale[(None,) * (x.ndim - 1)]


def _dense(features, dtype, std, name):
    # T5's initial weights: what follows has a variance of one without any scaling.
    return Dense(
        features,
        use_bias=False,
        dtype=dtype,
        kernel_init=nn.initializers.normal(std),
        name=name,
    )


class SelfAttention(nn.Module):
    """Softmax attention with a bias for relative positions and without 1 / sqrt(H)."""

    config: T5Config
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, bias: jax.Array, mask: jax.Array) -> jax.Array:
        """x (B, S, D), bias (N, S, S), mask (B, S) of the keys -> (B, S, D)."""
        config = self.config
        B, S, D = x.shape
        N = config.num_heads
        H = config.head_width
        dense = functools.partial(_dense, dtype=self.dtype)

        heads = (B, S, N, H)
        q = dense(N * H, std=(D * H) ** -0.5, name="q")(x).reshape(heads)
        k = dense(N * H, std=D**-0.5, name="k")(x).reshape(heads)
        v = dense(N * H, std=D**-0.5, name="v")(x).reshape(heads)

        scores = jnp.einsum("bqnh,bknh->bnqk", q, k, preferred_element_type=jnp.float32)
        # Not -inf: a row of padding that fills a batch has no key at all.
        lowest = jnp.finfo(jnp.float32).min
        scores = jnp.where(mask[:, None, None], scores + bias[None], lowest)
        weights = jax.nn.softmax(scores, axis=-1).astype(self.dtype)
        out = jnp.einsum("bnqk,bknh->bqnh", weights, v)
        return dense(D, std=(N * H) ** -0.5, name="o")(out.reshape(B, S, N * H))


class AttentionLayer(nn.Module):
    """What attention adds to the residual stream x (B, S, D)."""

    config: T5Config
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, bias: jax.Array, mask: jax.Array) -> jax.Array:
        x = RMSNorm(name="layer_norm")(x)
        return SelfAttention(self.config, self.dtype, name="SelfAttention")(x, bias, mask)


class DenseReluDense(nn.Module):
    """The MLP with a tanh-GELU gate, (B, S, D) -> (B, S, D)."""

    config: T5Config
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        D = x.shape[-1]
        F = self.config.mlp_width
        gate = _dense(F, self.dtype, D**-0.5, "wi_0")(x)
        x = _dense(F, self.dtype, D**-0.5, "wi_1")(x)
        x = nn.gelu(gate, approximate=True) * x
        return _dense(D, self.dtype, F**-0.5, "wo")(x)


class MlpLayer(nn.Module):
    """What the MLP adds to the residual stream x (B, S, D)."""

    config: T5Config
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = RMSNorm(name="layer_norm")(x)
        return DenseReluDense(self.config, self.dtype, name="DenseReluDense")(x)


class Block(nn.Module):
    """One block on x (B, S, D) float32, scanned over the depth."""

    config: T5Config
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, bias: jax.Array, mask: jax.Array) -> tuple[jax.Array, None]:
        x = constrain_rows(x)
        x = x + AttentionLayer(self.config, self.dtype, name="layer_0")(x, bias, mask)
        x = x + MlpLayer(self.config, self.dtype, name="layer_1")(x)
        return x, None


class T5Encoder(nn.Module):
    """Token ids (B, S) and their mask to features (B, S, D) in `dtype`.

    The rows of valid tokens do not depend on the padding after them. Matmuls are in
    `dtype`. The residual stream, norms and softmax are float32: the stream of the XXL
    reaches thousands, where bfloat16 counts in steps of eight and more.
    """

    config: T5Config
    dtype: Any = jnp.bfloat16

    @nn.compact
    def __call__(self, ids: jax.Array, mask: jax.Array) -> jax.Array:
        """The features of every row, of padding too.

        Args:
          ids: (B, S) int32, below the vocabulary's size.
          mask: (B, S) bool, False where there is padding, which no token sees.
        Raises: ValueError for another dtype, or shapes that differ.
        """
        config = self.config
        name = jnp.dtype(self.dtype).name
        if name not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}; got {name}")
        if ids.ndim != 2 or ids.shape != mask.shape:
            raise ValueError(f"ids and mask must both be (B, S); got {ids.shape}, {mask.shape}")
        D = config.width
        N = config.num_heads
        S = ids.shape[1]

        init = nn.initializers.normal(1.0)
        x = nn.Embed(config.vocab_size, D, embedding_init=init, name="shared")(ids)
        x = x.astype(jnp.float32)
        # One table serves all layers.
        table = nn.Embed(BUCKETS, N, embedding_init=near_first, name="relative_attention_bias")
        bias = table(relative_buckets(S)).transpose(2, 0, 1)  # (N, S, S)

        blocks = scan_blocks(self, Block, config.depth, dtype=self.dtype, shared_inputs=2)
        with precision_of(self.dtype):
            x, _ = blocks(config, self.dtype, name="blocks")(x, bias, mask)
        return RMSNorm(name="final_layer_norm")(x).astype(self.dtype)


def init_params(config: T5Config, rng: jax.Array) -> Any:
    """Fresh parameters, float32."""
    ids = jnp.zeros((1, 1), jnp.int32)
    model = T5Encoder(config, dtype=jnp.float32)
    return model.init(rng, ids, jnp.ones((1, 1), bool))["params"]


def param_shapes(config: T5Config) -> Any:
    """The tree of parameters as ShapeDtypeStructs; nothing is computed."""
    return jax.eval_shape(functools.partial(init_params, config), jax.random.key(0))
