"""AutoencoderKL of latent diffusion (Rombach et al., arXiv 2112.10752): images to latents and back.

Module names are those of diffusers, with `_` before an index, so that porting is the identity but for axes. Images are
(B, H, W, 3) in [-1, 1]; latents are (B, h, w, Z) with h = H / 8 for four widths. `Autoencoder` holds module,
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

LOGVAR_RANGE = (-30.0, 20.0)  # of the posterior's log-variance, as in the original
QUERIES_AT_ONCE = (
    1024  # of the attention: at 2048 pixels it has 65,536, whose products would take 17 GB
)


class GroupNorm(nn.Module):
    """Group norm with float32 statistics, then SiLU unless told otherwise; output in the input's dtype."""

    groups: int
    silu: bool = True

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        B, C = x.shape[0], x.shape[-1]
        scale = self.param("scale", nn.initializers.ones, (C,))
        bias = self.param("bias", nn.initializers.zeros, (C,))
        grouped = x.astype(jnp.float32).reshape(
            B, -1, self.groups, C // self.groups
        )  # (B, hw, G, C/G)
        mean = grouped.mean(axis=(1, 3), keepdims=True)
        # Two passes: the mean of large activations is far from zero, and E[x^2] - E[x]^2 would cancel.
        variance = jnp.square(grouped - mean).mean(axis=(1, 3), keepdims=True)
        out = ((grouped - mean) * jax.lax.rsqrt(variance + 1e-6)).reshape(x.shape)
        ones = (1,) * (x.ndim - 1)
        out = out * scale.reshape(*ones, C) + bias.reshape(*ones, C)
        return (nn.silu(out) if self.silu else out).astype(x.dtype)


def conv(features: int, name: str, dtype: Any, size: int = 3, **kwargs) -> nn.Conv:
    """A convolution with torch's padding: (size - 1) / 2 on every side."""
    return nn.Conv(
        features, (size, size), padding=(size - 1) // 2, dtype=dtype, name=name, **kwargs
    )


class ResnetBlock(nn.Module):
    features: int
    groups: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        h = conv(self.features, "conv1", self.dtype)(GroupNorm(self.groups, name="norm1")(x))
        h = conv(self.features, "conv2", self.dtype)(GroupNorm(self.groups, name="norm2")(h))
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
        tokens = GroupNorm(self.groups, silu=False, name="group_norm")(x).reshape(B, h * w, C)
        q, k, v = (
            nn.Dense(C, dtype=self.dtype, name=name)(tokens)[:, :, None]
            for name in ("to_q", "to_k", "to_v")
        )
        if h * w <= QUERIES_AT_ONCE:
            out = jax.nn.dot_product_attention(q, k, v)
        else:  # the same, rows of the softmax being independent
            out = jax.lax.map(
                lambda q: jax.nn.dot_product_attention(q[:, None], k, v)[:, 0],
                q.swapaxes(0, 1),
                batch_size=QUERIES_AT_ONCE,
            ).swapaxes(0, 1)
        return x + nn.Dense(C, dtype=self.dtype, name="to_out_0")(out[:, :, 0]).reshape(B, h, w, C)


class MidBlock(nn.Module):
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
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        # The original pads below and to the right only; SAME would pad evenly and shift every latent by half a cell.
        x = jnp.pad(x, ((0, 0), (0, 1), (0, 1), (0, 0)))
        return nn.Conv(x.shape[-1], (3, 3), (2, 2), "VALID", dtype=self.dtype, name="conv")(x)


class Upsample(nn.Module):
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)  # nearest
        return conv(x.shape[-1], "conv", self.dtype)(x)


class DownBlock(nn.Module):
    features: int
    layers: int
    downsample: bool
    groups: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for j in range(self.layers):
            x = ResnetBlock(self.features, self.groups, self.dtype, name=f"resnets_{j}")(x)
        return Downsample(self.dtype, name="downsamplers_0")(x) if self.downsample else x


class UpBlock(nn.Module):
    features: int
    layers: int
    upsample: bool
    groups: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for j in range(self.layers):
            x = ResnetBlock(self.features, self.groups, self.dtype, name=f"resnets_{j}")(x)
        return Upsample(self.dtype, name="upsamplers_0")(x) if self.upsample else x


class Encoder(nn.Module):
    """(B, H, W, 3) -> (B, h, w, 2Z), the posterior's mean | log-variance before `quant_conv`."""

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
        widths = self.block_out_channels[::-1]
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
    """Within it float32 means float32: by default a TPU rounds its products to bfloat16, a GPU to TF32."""
    return jax.default_matmul_precision("highest" if dtype == jnp.float32 else None)


class AutoencoderKL(nn.Module):
    """The pair, with torch-exact parameters; Stable Diffusion and SDXL are the defaults, SD3 and Flux have 16
    latent channels and no quant convolutions.

    Matmuls and convolutions are in `dtype`, group-norm statistics in float32, results in float32. bfloat16 is
    safe; float16 overflows in SDXL's decoder.
    """

    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 4
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    norm_num_groups: int = 32
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    mid_block_add_attention: bool = True
    dtype: Any = jnp.float32

    def setup(self):
        common = dict(
            block_out_channels=tuple(self.block_out_channels),
            layers_per_block=self.layers_per_block,
            groups=self.norm_num_groups,
            attention=self.mid_block_add_attention,
            dtype=self.dtype,
        )
        self.encoder = Encoder(latent_channels=self.latent_channels, **common)
        self.decoder = Decoder(out_channels=self.out_channels, **common)
        if self.use_quant_conv:
            self.quant_conv = nn.Conv(2 * self.latent_channels, (1, 1), dtype=self.dtype)
        if self.use_post_quant_conv:
            self.post_quant_conv = nn.Conv(self.latent_channels, (1, 1), dtype=self.dtype)

    def encode(self, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Images (B, H, W, 3) in [-1, 1] -> posterior mean, log-variance clipped to [-30, 20]; (B, h, w, Z) each."""
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
        """Pixels a latent cell spans, each way."""
        return 2 ** (len(self.block_out_channels) - 1)


def split_moments(moments: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(B, h, w, 2Z) -> mean and clipped log-variance."""
    mean, logvar = jnp.split(moments, 2, axis=-1)
    return mean, jnp.clip(logvar, *LOGVAR_RANGE)


def sample_posterior(mean: jax.Array, logvar: jax.Array, rng: jax.Array) -> jax.Array:
    """A draw from N(mean, exp(logvar)), of the shape and dtype of `mean`."""
    return mean + jnp.exp(0.5 * logvar) * jax.random.normal(rng, mean.shape, mean.dtype)


@dataclasses.dataclass(frozen=True)
class Autoencoder:
    """A module with its parameters and the scale of its latents: what sampling and data preparation call.

    Latents of a diffusion model are (latent - shift_factor) * scaling_factor. Calls are jitted; the batch may be
    sharded over any mesh, and one image at a time passes through the network if `slice_size` is 1.

    Large images: memory grows with the image's area (the attention's too: it takes its queries in blocks). With
    `tile_size` (latent cells; 64 for models trained at 512 pixels) an input that exceeds it goes through the network
    one overlapping tile after the other, as diffusers tiles: neighbours share a quarter of a tile and are blended
    linearly across it. Every tile sees only itself, in the group norms' statistics, the attention and the
    convolutions' borders: the result is close to the untiled one, not equal to it.
    """

    module: AutoencoderKL
    params: Any
    scaling_factor: float
    shift_factor: float = 0.0
    slice_size: int = 0  # images that pass through the network at once; 0: the whole batch
    tile_size: int = 0  # latent cells a side of a tile; 0: no tiling

    def __post_init__(self):
        if self.slice_size < 0:
            raise ValueError(f"autoencoder.slice_size must not be negative; got {self.slice_size}")
        if self.tile_size < 0 or self.tile_size % 4:
            raise ValueError(
                "autoencoder.tile_size must be a multiple of 4, for a quarter of it overlaps, or 0 for no tiles; "
                f"got {self.tile_size}"
            )

    def encode(self, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Images (B, H, W, 3) -> unscaled posterior mean and log-variance, (B, h, w, Z) float32 each."""
        factor = self.module.factor
        if (
            images.ndim != 4
            or images.shape[-1] != self.module.in_channels
            or (images.shape[1] % factor or images.shape[2] % factor)
        ):
            raise ValueError(
                f"images must be (B, H, W, {self.module.in_channels}) with sides that {factor} "
                f"divides; got {images.shape}"
            )
        return split_moments(
            _encode(self.module, self.slice_size, self.tile_size, self.params, images)
        )

    def decode(self, z: jax.Array) -> jax.Array:
        """Unscaled latents (B, h, w, Z) -> images (B, H, W, 3) float32, about [-1, 1], not clipped."""
        if z.ndim != 4 or z.shape[-1] != self.module.latent_channels:
            raise ValueError(
                f"latents must be (B, h, w, {self.module.latent_channels}); got {z.shape}"
            )
        return _decode(self.module, self.slice_size, self.tile_size, self.params, z)

    def to_latents(self, mean: jax.Array, logvar: jax.Array, rng: jax.Array) -> jax.Array:
        """A scaled draw from the posterior: what the diffusion model is trained on."""
        return (sample_posterior(mean, logvar, rng) - self.shift_factor) * self.scaling_factor

    def from_latents(self, latents: jax.Array) -> jax.Array:
        """Images of a diffusion model's samples."""
        return self.decode(latents / self.scaling_factor + self.shift_factor)


def make_autoencoder(
    params: Any,
    architecture: dict,
    *,
    dtype: str = "float32",
    slice_size: int = 0,
    tile_size: int = 0,
) -> Autoencoder:
    """From the parameters and the architecture that `porting.read_autoencoder` returns."""
    if dtype not in ("float32", "bfloat16"):
        raise ValueError(f"autoencoder.dtype must be float32 or bfloat16; got {dtype!r}")
    fields = dict(architecture)
    scale, shift = fields.pop("scaling_factor"), fields.pop("shift_factor")
    return Autoencoder(
        AutoencoderKL(**fields, dtype=jnp.dtype(dtype).type),
        params,
        scale,
        shift or 0.0,
        slice_size,
        tile_size,
    )


def _in_slices(run, batch, slice_size):
    return (
        run(batch)
        if not slice_size
        else jax.lax.map(lambda x: run(x[None])[0], batch, batch_size=slice_size)
    )


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _decode(module, slice_size, tile_size, params, z):
    def run(z):
        return _in_slices(
            lambda z: module.apply({"params": params}, z, method="decode"), z, slice_size
        )

    return _in_tiles(run, z, tile_size, tile_size * module.factor) if tile_size else run(z)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _encode(module, slice_size, tile_size, params, images):
    """mean | log-variance, not yet clipped: tiles are blended before the clip, as in diffusers."""

    def run(images):
        return _in_slices(
            lambda x: module.apply({"params": params}, x, method="moments"), images, slice_size
        )

    return (
        _in_tiles(run, images, tile_size * module.factor, tile_size) if tile_size else run(images)
    )


def _in_tiles(run: Callable, x: jax.Array, tile: int, tile_out: int) -> jax.Array:
    """Runs overlapping tiles, one after the other, and blends them; an x that one tile covers is run whole.

    Args:
        run: (B, a, b, C) -> (B, a f, b f, C') for f = tile_out / tile.
        x: (B, h, w, C). tile, tile_out: side of a tile of the input, and of the output.
    """
    h, w = x.shape[1:3]
    if max(h, w) <= tile:
        return run(x)
    blend, keep = tile_out // 4, tile_out * 3 // 4
    rows, columns = (range(0, size, tile * 3 // 4) for size in (h, w))
    places = collections.defaultdict(list)  # tiles at the lower and right border may be smaller
    for i in rows:
        for j in columns:
            places[min(tile, h - i), min(tile, w - j)].append((i, j))
    done = {}
    for (a, b), corners in places.items():
        tiles = jnp.stack([x[:, i : i + a, j : j + b] for i, j in corners])
        done |= zip(corners, jax.lax.map(run, tiles))
    for i in rows:  # in place: a tile is blended with its blended neighbours
        for j in columns:
            if i > 0:
                done[i, j] = _blend(done[i - rows.step, j], done[i, j], blend, axis=1)
            if j > 0:
                done[i, j] = _blend(done[i, j - columns.step], done[i, j], blend, axis=2)
    lines = [jnp.concatenate([done[i, j][:, :keep, :keep] for j in columns], axis=2) for i in rows]
    return jnp.concatenate(lines, axis=1)


def _blend(before: jax.Array, after: jax.Array, extent: int, axis: int) -> jax.Array:
    """Replaces the first `extent` lines of `after` by the linear passage from the last ones of `before`."""
    extent = min(before.shape[axis], after.shape[axis], extent)
    shape = [1, 1, 1, 1]
    shape[axis] = extent
    weight = jnp.arange(extent, dtype=jnp.float32).reshape(shape) / extent
    end = jax.lax.slice_in_dim(before, before.shape[axis] - extent, None, axis=axis)
    start = jax.lax.slice_in_dim(after, 0, extent, axis=axis)
    rest = jax.lax.slice_in_dim(after, extent, None, axis=axis)
    return jnp.concatenate([end * (1 - weight) + start * weight, rest], axis=axis)
