"""AutoencoderKL of latent diffusion (Rombach et al., arXiv 2112.10752).

It makes latents of images, and images of latents. Module names are those of diffusers, with
`_` before an index, so that porting is the identity but for axes. Images are (B, H, W, 3) in
[-1, 1]; latents are (B, h, w, Z) with h = H / 8 for four widths. `Autoencoder` has module,
parameters and scale; with none configured a diffusion model works on pixels.
"""

import collections
import contextlib
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from lit_jax import ranges

# Of the posterior's log-variance, as in the original.
LOGVAR_RANGE = (-30.0, 20.0)
# Of the attention: at 2048 pixels it has 65,536, whose products would take 17 GB.
QUERIES_AT_ONCE = 1024


class GroupNorm(nn.Module):
    """Group norm, then SiLU unless told otherwise; the output has the input's dtype."""

    groups: int
    silu: bool = True

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        B = x.shape[0]
        C = x.shape[-1]
        scale = self.param("scale", nn.initializers.ones, (C,))
        bias = self.param("bias", nn.initializers.zeros, (C,))

        # Statistics in float32: a group has millions of values, too many to sum in bfloat16.
        grouped = x.astype(jnp.float32)
        grouped = grouped.reshape(B, -1, self.groups, C // self.groups)  # (B, hw, G, C/G)
        mean = grouped.mean(axis=(1, 3), keepdims=True)
        # Two passes: the mean of large activations is far from zero, and in
        # E[x^2] - E[x]^2 it would cancel.
        variance = jnp.square(grouped - mean).mean(axis=(1, 3), keepdims=True)
        # 1e-6 as in the original; torch's default is 1e-5.
        out = ((grouped - mean) * jax.lax.rsqrt(variance + 1e-6)).reshape(x.shape)

        ones = (1,) * (x.ndim - 1)
        out = out * scale.reshape(*ones, C) + bias.reshape(*ones, C)
        return (nn.silu(out) if self.silu else out).astype(x.dtype)


def conv(features: int, name: str, dtype: Any, size: int = 3) -> nn.Conv:
    """A convolution with torch's padding: (size - 1) / 2 on every side."""
    padding = (size - 1) // 2
    return nn.Conv(features, (size, size), padding=padding, dtype=dtype, name=name)


class ResnetBlock(nn.Module):
    """Two convolutions, each after a norm, beside the identity."""

    features: int
    groups: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        h = GroupNorm(self.groups, name="norm1")(x)
        h = conv(self.features, "conv1", self.dtype)(h)
        h = GroupNorm(self.groups, name="norm2")(h)
        h = conv(self.features, "conv2", self.dtype)(h)
        if x.shape[-1] != self.features:
            x = conv(self.features, "conv_shortcut", self.dtype, size=1)(x)
        return x + h


class Attention(nn.Module):
    """Single-head self-attention over all positions of (B, h, w, C)."""

    groups: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        B, h, w, C = x.shape
        tokens = GroupNorm(self.groups, silu=False, name="group_norm")(x)
        tokens = tokens.reshape(B, h * w, C)
        q, k, v = (
            nn.Dense(C, dtype=self.dtype, name=name)(tokens)[:, :, None]  # (B, T, 1, C)
            for name in ("to_q", "to_k", "to_v")
        )

        if h * w <= QUERIES_AT_ONCE:
            out = jax.nn.dot_product_attention(q, k, v)
        else:
            # The same: the rows of the softmax do not depend on each other.
            out = jax.lax.map(
                lambda q: jax.nn.dot_product_attention(q[:, None], k, v)[:, 0],
                q.swapaxes(0, 1),
                batch_size=QUERIES_AT_ONCE,
            ).swapaxes(0, 1)

        out = nn.Dense(C, dtype=self.dtype, name="to_out_0")(out[:, :, 0])
        return x + out.reshape(B, h, w, C)


class MidBlock(nn.Module):
    """At the lowest resolution: residual blocks around the attention."""

    groups: int
    attention: bool
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        C = x.shape[-1]
        x = ResnetBlock(C, self.groups, self.dtype, name="resnets_0")(x)
        if self.attention:
            x = Attention(self.groups, self.dtype, name="attentions_0")(x)
        return ResnetBlock(C, self.groups, self.dtype, name="resnets_1")(x)


class Downsample(nn.Module):
    """(B, h, w, C) -> (B, h/2, w/2, C)."""

    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        # The original pads below and to the right only. SAME would pad evenly, and shift
        # every latent by half a cell.
        x = jnp.pad(x, ((0, 0), (0, 1), (0, 1), (0, 0)))
        C = x.shape[-1]
        return nn.Conv(C, (3, 3), (2, 2), "VALID", dtype=self.dtype, name="conv")(x)


class Upsample(nn.Module):
    """(B, h, w, C) -> (B, 2h, 2w, C)."""

    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        # Nearest neighbours. Repeats are broadcasts, where jax.image.resize gathers.
        x = jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)
        return conv(x.shape[-1], "conv", self.dtype)(x)


class DownBlock(nn.Module):
    """Residual blocks of one resolution, then half of it."""

    features: int
    layers: int
    downsample: bool
    groups: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for j in range(self.layers):
            x = ResnetBlock(self.features, self.groups, self.dtype, name=f"resnets_{j}")(x)
        if self.downsample:
            x = Downsample(self.dtype, name="downsamplers_0")(x)
        return x


class UpBlock(nn.Module):
    """Residual blocks of one resolution, then twice that."""

    features: int
    layers: int
    upsample: bool
    groups: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for j in range(self.layers):
            x = ResnetBlock(self.features, self.groups, self.dtype, name=f"resnets_{j}")(x)
        if self.upsample:
            x = Upsample(self.dtype, name="upsamplers_0")(x)
        return x


class Encoder(nn.Module):
    """(B, H, W, 3) -> (B, h, w, 2Z): mean | log-variance, before `quant_conv`."""

    block_out_channels: tuple[int, ...]
    layers_per_block: int
    latent_channels: int
    groups: int
    attention: bool
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        widths = self.block_out_channels
        x = conv(widths[0], "conv_in", self.dtype)(x)
        # All blocks but the last halve the side; in the decoder all but the last double it.
        for i, width in enumerate(widths):
            x = DownBlock(
                width,
                self.layers_per_block,
                i < len(widths) - 1,
                self.groups,
                self.dtype,
                name=f"down_blocks_{i}",
            )(x)
        x = MidBlock(self.groups, self.attention, self.dtype, name="mid_block")(x)
        x = GroupNorm(self.groups, name="conv_norm_out")(x)
        return conv(2 * self.latent_channels, "conv_out", self.dtype)(x)


class Decoder(nn.Module):
    """(B, h, w, Z) -> (B, H, W, out_channels)."""

    block_out_channels: tuple[int, ...]
    layers_per_block: int
    out_channels: int
    groups: int
    attention: bool
    dtype: Any

    @nn.compact
    def __call__(self, z: jax.Array) -> jax.Array:
        widths = self.block_out_channels[::-1]  # from the lowest resolution to the highest
        x = conv(widths[0], "conv_in", self.dtype)(z)
        x = MidBlock(self.groups, self.attention, self.dtype, name="mid_block")(x)
        for i, width in enumerate(widths):
            x = UpBlock(
                width,
                self.layers_per_block + 1,
                i < len(widths) - 1,
                self.groups,
                self.dtype,
                name=f"up_blocks_{i}",
            )(x)
        x = GroupNorm(self.groups, name="conv_norm_out")(x)
        return conv(self.out_channels, "conv_out", self.dtype)(x)


def precision_of(dtype: Any) -> contextlib.AbstractContextManager:
    """Within it float32 means float32.

    By default a TPU rounds the factors of its products to bfloat16, and a GPU to TF32.
    """
    return jax.default_matmul_precision("highest" if dtype == jnp.float32 else None)


class AutoencoderKL(nn.Module):
    """Encoder and decoder, with the parameters of torch.

    The defaults are Stable Diffusion's and SDXL's; SD3 and Flux have 16 latent channels and
    no quant convolutions. Matmuls and convolutions are in `dtype`, statistics of group norms
    and results in float32. bfloat16 is safe; float16 overflows in SDXL's decoder.
    """

    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 4  # Z
    block_out_channels: tuple[int, ...] = (
        128,
        256,
        512,
        512,
    )  # each after the first halves the side
    layers_per_block: int = 2  # in the encoder; the decoder has one more
    norm_num_groups: int = 32
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    mid_block_add_attention: bool = True  # in the encoder and in the decoder
    dtype: Any = jnp.float32

    def setup(self):
        common: dict[str, Any] = dict(
            block_out_channels=tuple(self.block_out_channels),
            layers_per_block=self.layers_per_block,
            groups=self.norm_num_groups,
            attention=self.mid_block_add_attention,
            dtype=self.dtype,
        )
        Z = self.latent_channels
        self.encoder = Encoder(latent_channels=Z, **common)
        self.decoder = Decoder(out_channels=self.out_channels, **common)
        if self.use_quant_conv:
            self.quant_conv = nn.Conv(2 * Z, (1, 1), dtype=self.dtype)
        if self.use_post_quant_conv:
            self.post_quant_conv = nn.Conv(Z, (1, 1), dtype=self.dtype)

    def encode(self, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Images (B, H, W, 3) in [-1, 1] -> posterior mean and log-variance, (B, h, w, Z) each.

        The log-variance is clipped to [-30, 20].
        """
        # The clip is not in `moments`: tiles are blended before it.
        return split_moments(self.moments(images))

    def moments(self, images: jax.Array) -> jax.Array:
        """Mean | log-variance as the network gives them, (B, h, w, 2Z) float32."""
        with precision_of(self.dtype):
            moments = self.encoder(images.astype(self.dtype))
            if self.use_quant_conv:
                moments = self.quant_conv(moments)
        return moments.astype(jnp.float32)

    def decode(self, z: jax.Array) -> jax.Array:
        """Unscaled latents (B, h, w, Z) -> images (B, H, W, 3), about [-1, 1], not clipped."""
        with precision_of(self.dtype):
            z = z.astype(self.dtype)
            if self.use_post_quant_conv:
                z = self.post_quant_conv(z)
            return self.decoder(z).astype(jnp.float32)

    def __call__(self, images: jax.Array) -> jax.Array:
        return self.decode(self.encode(images)[0])

    @property
    def factor(self) -> int:
        """Pixels a latent cell spans, in height and in width."""
        return 2 ** (len(self.block_out_channels) - 1)


def split_moments(moments: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(B, h, w, 2Z) -> mean and clipped log-variance."""
    mean, logvar = jnp.split(moments, 2, axis=-1)
    return mean, jnp.clip(logvar, *LOGVAR_RANGE)


@dataclasses.dataclass(frozen=True)
class AutoencoderSettings:
    """How images go through the network. It checks itself.

    Raises: ValueError whose text starts with the field's name.
    """

    dtype: str = "float32"  # of activations
    slice_size: int = 0  # images that pass through the network at once; 0: the whole batch
    # Latent cells a side of a tile, of which a quarter overlaps; 0: no tiling.
    tile_size: int = 0

    def __post_init__(self):
        ranges.check(
            self,
            dtype=ranges.one_of("float32", "bfloat16"),
            slice_size=ranges.AT_LEAST_0,
            tile_size=ranges.Range("a multiple of 4, or 0", lambda x: x >= 0 and x % 4 == 0),
        )


def sample_posterior(mean: jax.Array, logvar: jax.Array, rng: jax.Array) -> jax.Array:
    """A draw from N(mean, exp(logvar)), of the shape and dtype of `mean`."""
    return mean + jnp.exp(0.5 * logvar) * jax.random.normal(rng, mean.shape, mean.dtype)


@dataclasses.dataclass(frozen=True)
class Autoencoder:
    """A module with its parameters and the scale of its latents.

    Latents of a diffusion model are (latent - shift_factor) * scaling_factor. Calls are
    jitted; the batch may be sharded over any mesh. If `slice_size` is 1, one image at a time
    passes through the network.

    Memory grows with the area of the image (that of the attention too: it takes its queries
    in blocks). With `tile_size` an input that exceeds it goes through the network one
    overlapping tile after the other, as in diffusers: neighbours share a quarter of a tile
    and are blended linearly across it. A tile sees only itself, in the statistics of the
    group norms, the attention and the borders of the convolutions. So the result is close to
    the untiled one, not equal to it. Models trained at 512 pixels need tiles of 64.
    """

    module: AutoencoderKL
    params: Any
    scaling_factor: float
    shift_factor: float = 0.0
    slice_size: int = 0  # images that pass through the network at once; 0: the whole batch
    tile_size: int = 0  # latent cells a side of a tile; 0: no tiling

    def encode(self, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Images (B, H, W, 3) -> posterior mean and log-variance, (B, h, w, Z) float32 each.

        They are unscaled. Raises: ValueError for images of another shape.
        """
        factor = self.module.factor
        channels = self.module.in_channels
        shape = images.shape
        divides = len(shape) == 4 and not (shape[1] % factor or shape[2] % factor)
        if not divides or shape[-1] != channels:
            raise ValueError(
                f"images must be (B, H, W, {channels}) with sides that {factor} divides; "
                f"got {shape}"
            )
        moments = _encode(self.module, self.slice_size, self.tile_size, self.params, images)
        return split_moments(moments)

    def decode(self, z: jax.Array) -> jax.Array:
        """Unscaled latents (B, h, w, Z) -> images (B, H, W, 3) float32.

        They are about in [-1, 1], not clipped. Raises: ValueError for another shape.
        """
        if z.ndim != 4 or z.shape[-1] != self.module.latent_channels:
            raise ValueError(
                f"latents must be (B, h, w, {self.module.latent_channels}); got {z.shape}"
            )
        return _decode(self.module, self.slice_size, self.tile_size, self.params, z)

    def from_latents(self, latents: jax.Array) -> jax.Array:
        """Images of a diffusion model's samples, (B, h, w, Z) -> (B, H, W, 3)."""
        return self.decode(latents / self.scaling_factor + self.shift_factor)


def make_autoencoder(
    params: Any, architecture: dict, settings: AutoencoderSettings | None = None
) -> Autoencoder:
    """From the parameters and the architecture that `porting.read_autoencoder` returns.

    Args:
      architecture: the fields of AutoencoderKL, with scaling_factor and shift_factor.
      settings: None: float32, whole batches and no tiles.
    """
    settings = settings or AutoencoderSettings()
    fields = dict(architecture)
    scaling_factor = fields.pop("scaling_factor")
    shift_factor = fields.pop("shift_factor")  # None for Stable Diffusion: diffusers writes null
    return Autoencoder(
        AutoencoderKL(**fields, dtype=jnp.dtype(settings.dtype).type),
        params,
        scaling_factor,
        shift_factor or 0.0,
        settings.slice_size,
        settings.tile_size,
    )


# ---- How a batch goes through the network --------------------------------------------------------
#
# Module and sizes are static: Autoencoders of one architecture share their programs.


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _decode(module, slice_size, tile_size, params, z):
    def run(z):
        def apply(z):
            return module.apply({"params": params}, z, method="decode")

        return _in_slices(apply, z, slice_size)

    return _in_tiles(run, z, tile_size, tile_size * module.factor)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _encode(module, slice_size, tile_size, params, images):
    """mean | log-variance, not yet clipped: diffusers blends tiles before the clip."""

    def run(images):
        def apply(images):
            return module.apply({"params": params}, images, method="moments")

        return _in_slices(apply, images, slice_size)

    return _in_tiles(run, images, tile_size * module.factor, tile_size)


def _in_slices(run, batch, slice_size):
    if not slice_size:
        return run(batch)
    # A loop of the program. A loop of Python would be unrolled into it, and XLA could run its
    # parts at once, in the memory of all of them.
    return jax.lax.map(lambda x: run(x[None])[0], batch, batch_size=slice_size)


def _in_tiles(run: Callable, x: jax.Array, tile: int, tile_out: int) -> jax.Array:
    """Runs overlapping tiles, one after the other, and blends them.

    An x that one tile covers is run whole, and so is every x if `tile` is 0.

    Args:
      run: (B, a, b, C) -> (B, a f, b f, C') for f = tile_out / tile.
      x: (B, h, w, C).
      tile: side of a tile of the input.
      tile_out: side of a tile of the output.
    """
    h, w = x.shape[1:3]
    if not tile or max(h, w) <= tile:
        return run(x)
    stride = tile * 3 // 4
    rows = range(0, h, stride)
    columns = range(0, w, stride)

    # Tiles of one shape are mapped together, so that there is one program for each shape;
    # those at the lower and right border may be smaller.
    corners_of = collections.defaultdict(list)
    for i in rows:
        for j in columns:
            corners_of[min(tile, h - i), min(tile, w - j)].append((i, j))
    done: dict[tuple[int, int], jax.Array] = {}
    for (a, b), corners in corners_of.items():
        tiles = jnp.stack([x[:, i : i + a, j : j + b] for i, j in corners])
        done |= zip(corners, jax.lax.map(run, tiles))

    # In place and in this order: a tile is blended with neighbours that are blended already.
    blend = tile_out // 4
    for i in rows:
        for j in columns:
            if i > 0:
                done[i, j] = _blend(done[i - stride, j], done[i, j], blend, axis=1)
            if j > 0:
                done[i, j] = _blend(done[i, j - stride], done[i, j], blend, axis=2)

    keep = tile_out * 3 // 4
    lines = [jnp.concatenate([done[i, j][:, :keep, :keep] for j in columns], axis=2) for i in rows]
    return jnp.concatenate(lines, axis=1)


def _blend(before: jax.Array, after: jax.Array, extent: int, axis: int) -> jax.Array:
    """Blends the first lines of `after` linearly with the last ones of `before`."""
    extent = min(before.shape[axis], after.shape[axis], extent)
    shape = [1, 1, 1, 1]
    shape[axis] = extent
    weight = jnp.arange(extent, dtype=jnp.float32).reshape(shape) / extent

    end = jax.lax.slice_in_dim(before, before.shape[axis] - extent, None, axis=axis)
    start = jax.lax.slice_in_dim(after, 0, extent, axis=axis)
    rest = jax.lax.slice_in_dim(after, extent, None, axis=axis)
    return jnp.concatenate([end * (1 - weight) + start * weight, rest], axis=axis)
