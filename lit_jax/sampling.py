"""Images from a model: one jitted sampler over the mesh, and the label and noise that belong to image number i."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from lit_jax import samplers, sharding
from lit_jax.diffusion import Diffusion
from lit_jax.models.autoencoder import Autoencoder
from lit_jax.models.dit import DiT

# The fields of config.sample that an image depends on, besides its number, label and seed.
SETTINGS = (
    "sampler",
    "steps",
    "spacing",
    "variance",
    "eta",
    "order",
    "cfg_scale",
    "cfg_channels",
    "cfg_interval",
    "clip_denoised",
)
LABEL_STREAM = (
    2**31 - 1
)  # sampling steps fold small numbers into an image's key; its label takes one far away


def protocol(
    settings: Mapping[str, Any],
    *,
    input_size: int,
    seed: int,
    dtype: str,
    weights: str,
    autoencoder: dict[str, Any] | None,
    labels: str,
) -> dict[str, Any]:
    """Everything that the uint8 images of a generator depend on: what has to be equal for their scores to be comparable.

    Args: settings: config.sample. input_size: height = width in the model's space. weights: the hash of the model's.
        autoencoder: what identifies it, None for pixels.
    """
    return {
        "weights": weights,
        "input_size": input_size,
        "seed": seed,
        "dtype": dtype,
        "autoencoder": autoencoder or "none",
        "uint8": "clip(127.5 x + 128) truncated",
        "labels": labels,
    } | {name: settings[name] for name in SETTINGS}


class Sampler:
    """Draws images by number. Image i depends on (seed, i) and its label alone, not on the batch or the mesh.

    With an autoencoder the model's space is that of its scaled latents, and images are decoded from there.

    Args:
      size: height = width of an image in the model's space. batch_size: global; the mesh must divide it.
      sampler, steps, spacing, eta, order: see `samplers.make_grid`; cfg_*: see `samplers.sample`.
      variance: DDPM's noise, see `samplers.make_grid`; empty: "learned_range" of a model that predicts it, else
        "fixed_large".
      clip_denoised: clip the predicted x_start to [-1, 1]: for models of pixels.
    """

    def __init__(
        self,
        model: DiT,
        diffusion: Diffusion,
        mesh: jax.sharding.Mesh,
        *,
        size: int,
        seed: int,
        sampler: str,
        steps: int,
        batch_size: int,
        cfg_scale: float,
        cfg_channels: str,
        cfg_interval: tuple[float, float],
        clip_denoised: bool,
        spacing: str = "",
        variance: str = "",
        eta: float = 0.0,
        order: int = 2,
        autoencoder: Autoencoder | None = None,
    ):
        sharding.check_batch(batch_size, mesh, "sample.batch_size")
        self.batch_size, self._num_classes, self._seed = batch_size, model.num_classes, seed
        self._sharding = sharding.batch_sharding(mesh)
        variance = variance or ("learned_range" if model.learn_sigma else "fixed_large")
        if variance == "learned_range" and not model.learn_sigma:
            raise ValueError(
                "sample.variance = learned_range, but model.learn_sigma = False: the model predicts no variance"
            )
        samplers.check_guidance(cfg_channels, cfg_interval)
        grid = samplers.make_grid(
            diffusion,
            sampler,
            steps,
            spacing=spacing or None,
            eta=eta,
            order=order,
            variance=variance,
        )
        root = jax.random.key(seed)

        def draw(params, index, labels):
            keys = jax.vmap(lambda i: jax.random.fold_in(root, i))(index)
            return samplers.sample(
                lambda x, t, y: model.apply({"params": params}, x, t, y),
                keys,
                (size, size, model.in_channels),
                grid=grid,
                labels=labels,
                null_label=model.num_classes,
                cfg_scale=cfg_scale,
                cfg_channels=cfg_channels,
                cfg_interval=tuple(cfg_interval),
                clip_denoised=clip_denoised,
            )

        # (params, index (B,), labels (B,)) -> (B, h, w, C) in the model's space, B = batch_size.
        self.draw_batch = jax.jit(sharding.on_mesh(draw, mesh), out_shardings=self._sharding)
        self._autoencoder = autoencoder
        if autoencoder:
            self._decode = sharding.map_rows(
                lambda params, latents: dataclasses.replace(
                    autoencoder, params=params
                ).from_latents(latents),
                mesh,
            )

    def labels(self, index: np.ndarray, mode: str) -> np.ndarray:
        """Labels (n,) int32 of images by number: "random" uniform from (seed, i), or "balanced": i modulo the classes."""
        if mode == "balanced":
            return (index % self._num_classes).astype(np.int32)
        if mode != "random":
            raise ValueError(f"sample.labels must be random or balanced, got {mode!r}")

        def label(i):
            rng = jax.random.fold_in(
                jax.random.fold_in(jax.random.key(self._seed), i), LABEL_STREAM
            )
            return jax.random.randint(rng, (), 0, self._num_classes)

        return np.asarray(jax.vmap(label)(jnp.asarray(index)), np.int32)

    def __call__(
        self,
        params: Any,
        index: np.ndarray,
        labels: np.ndarray,
        on_batch: Callable[[int], None] = lambda done: None,
    ) -> np.ndarray:
        """Images (n, h, w, C) float32, about [-1, 1], on every process; `on_batch` is told how many are done."""
        images = []
        for start in range(0, len(index), self.batch_size):
            rows = slice(start, start + self.batch_size)
            out = self.draw(params, index[rows], labels[rows])
            images.append(multihost_utils.process_allgather(out, tiled=True)[: len(index[rows])])
            on_batch(min(rows.stop, len(index)))
        return np.concatenate(images)

    def draw(self, params: Any, index: np.ndarray, labels: np.ndarray) -> jax.Array:
        """One batch over the mesh, (batch_size, h, w, C): at most batch_size images; the rows after them repeat the last."""
        fill = self.batch_size - len(index)  # one compiled shape
        rows = [
            jax.device_put(np.pad(x, (0, fill), mode="edge"), self._sharding)
            for x in (index, labels)
        ]
        out = self.draw_batch(params, *rows)
        return self._decode(self._autoencoder.params, out) if self._autoencoder else out
