"""Images from a model: one jitted sampler over the mesh; image i depends on (seed, i) alone."""

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

from lit_jax import ranges, samplers, sharding
from lit_jax.diffusion import PROCESSES, Process
from lit_jax.models import Model
from lit_jax.models.autoencoder import Autoencoder
from lit_jax.samplers import Guidance, SamplerSettings


def protocol(
    settings: SamplerSettings,
    *,
    input_size: int | Sequence[int],
    seed: int,
    dtype: str,
    weights: str,
    autoencoder: dict[str, Any] | None,
    labels: str,
) -> dict[str, Any]:
    """Everything that the uint8 images of a sampler depend on.

    Two scores are comparable only where it is equal.

    Args:
      input_size: height = width in the model's space, or the two. dtype: the activations'
        type.
      weights: the hash of the model's. labels: how the images' labels were chosen.
      autoencoder: what identifies it, None for pixels.
    """
    h, w = ranges.sides(input_size)
    # The names are those of protocol.json in folders that older versions began: keep them.
    about = {
        "weights": weights,
        "input_size": h if h == w else [h, w],
        "seed": seed,
        "dtype": dtype,
        "autoencoder": autoencoder or "none",
        # Rounding in place of truncation moves FID by 0.01.
        "uint8": "clip(127.5 x + 128) truncated",
        "labels": labels,
    }
    return about | dataclasses.asdict(settings)


class Sampler:
    """Draws images by number. Image i depends on (seed, i) and its condition, on nothing else.

    Neither the batch nor the mesh changes it. With an autoencoder the model's space is that of its
    scaled latents, and images are decoded from there.

    Seed, guidance and condition are arguments of one compiled program: `with_guidance` and
    `with_seed` give a sampler that compiles nothing. Without guidance (cfg_scale 1) the program is
    another one, in which the model sees each image once.

    Args:
      settings: which sampler, its steps and the guidance.
      batch_size: global; the devices of the mesh must divide it.
      process: what the model was trained on; None: what its config says it predicts.
      mesh: None: all devices, as replicas.
      size: (h, w) of an image in the model's space; None: what the model was trained on.
    Raises: ValueError where the settings ask for a variance that the model does not predict, or
      the batch does not fit the mesh.
    """

    def __init__(
        self,
        model: Model,
        settings: SamplerSettings,
        *,
        batch_size: int,
        seed: int = 0,
        process: Process | None = None,
        mesh: jax.sharding.Mesh | None = None,
        size: tuple[int, int] | None = None,
        autoencoder: Autoencoder | None = None,
    ):
        process = process or PROCESSES[model.config.prediction]()
        mesh = mesh or sharding.make_mesh()
        sharding.check_batch(batch_size, mesh)
        self.batch_size = batch_size
        self._model = model
        self._process = process
        self._mesh = mesh
        self.shape = (*(size or _trained_size(model)), model.config.in_channels)
        self._sharding = sharding.batch_sharding(mesh)
        # One root for all images: a key of the batch would tie an image to its neighbours.
        self._root = jax.random.key(seed)
        self._set(settings)
        # What goes from step to step lies where the next one expects it: one program is enough.
        past = NamedSharding(mesh, PartitionSpec(None, *self._sharding.spec))
        placed = samplers.Progress._make((self._sharding, past))
        self._begin = jax.jit(self._trace_begin, static_argnums=2, out_shardings=placed)
        self._advance = jax.jit(
            sharding.on_mesh(self._trace_step, mesh),
            static_argnums=7,
            out_shardings=(placed, self._sharding),
        )
        self._are_finite = jax.jit(
            lambda images: jnp.isfinite(images).all((1, 2, 3)),
            out_shardings=sharding.replicated(mesh),
        )
        self._set_autoencoder(autoencoder)

    def _set_autoencoder(self, autoencoder):
        self._autoencoder = autoencoder
        if autoencoder:
            bare = dataclasses.replace(autoencoder, params=None)

            # Its parameters are an argument: closed over, they would be constants of the program.
            def decode(params, latents):
                return dataclasses.replace(bare, params=params).from_latents(latents)

            self._decode: Any = sharding.map_rows(decode, self._mesh)
            self._decode_program: Callable[..., Any] = self._decode

    def with_autoencoder(self, autoencoder: Autoencoder | None) -> "Sampler":
        """The same program for latents, which this autoencoder decodes; None: nothing does."""
        other = copy.copy(self)
        other._set_autoencoder(autoencoder)
        return other

    def _set(self, settings: SamplerSettings) -> None:
        """The grid of the settings, and its program."""
        config = self._model.config
        channels = (config.in_channels, config.out_channels)
        variance = self._process.choose_variance(settings.variance, *channels)
        settings = dataclasses.replace(settings, variance=variance)
        grid = samplers.make_grid(self._process, settings)
        self._settings = settings
        self._grid = grid
        self._guidance = Guidance.of(grid, settings.cfg_scale, settings.cfg_interval)
        is_guided = settings.cfg_scale != 1
        self.is_guided = is_guided  # whether the program takes a scale of guidance
        shape = self.shape

        def draw(params, index, condition, root, guidance):
            return samplers.sample(
                self._model_fn(params),
                _keys(root, index),
                condition,
                shape,
                grid,
                settings,
                guidance=guidance if is_guided else None,
            )

        # To (B, h, w, C) in the model's space, B = batch_size.
        self._draw_batch = jax.jit(sharding.on_mesh(draw, self._mesh), out_shardings=self._sharding)
        # What is called: this, or what `compile` made of it.
        self._draw_program: Callable[..., Any] = self._draw_batch

    def _model_fn(self, params: Any) -> Callable[..., jax.Array]:
        def model_fn(x, t, condition, drop):
            return self._model.apply({"params": params}, x, t, condition, drop)

        return model_fn

    def with_settings(self, settings: SamplerSettings) -> "Sampler":
        """The same model by another sampler; `stream` compiles nothing for other steps or guidance.

        Raises: ValueError as the class does.
        """
        other = copy.copy(self)
        other._set(settings)
        return other

    def with_seed(self, seed: int) -> "Sampler":
        """The same program with other noise."""
        return self._with(_root=jax.random.key(seed))

    def with_guidance(
        self, cfg_scale: float, cfg_interval: tuple[float, float] = (0.0, 1000.0)
    ) -> "Sampler":
        """The same program with other guidance, where low <= t <= high.

        Raises: ValueError for a sampler that was built without guidance.
        """
        if not self.is_guided:
            raise ValueError(
                f"cfg_scale = {cfg_scale}, but the sampler was built with 1, without guidance"
            )
        return self._with(_guidance=Guidance.of(self._grid, cfg_scale, cfg_interval))

    def _with(self, **fields: Any) -> "Sampler":
        other = copy.copy(self)
        for name, value in fields.items():
            setattr(other, name, value)
        return other

    @property
    def how(self) -> tuple[jax.Array, Guidance]:
        """The program's last arguments: the seed's key, and the guidance."""
        return self._root, self._guidance

    @property
    def step_kind(self) -> samplers.StepKind:
        """Two samplers of a model that have the same one share the program of `stream`'s step."""
        return samplers.StepKind.of(self._grid, self._settings)

    def lower(self, params: Any, index: Any, condition: Mapping[str, Any]) -> jax.stages.Lowered:
        """The program of a batch, not compiled; arrays or ShapeDtypeStructs."""
        return self._draw_batch.lower(params, index, condition, *self.how)

    def compile(self, params: Any, condition: Mapping[str, Any]) -> "Sampler":
        """The same with its programs compiled: what it draws takes the time of drawing alone.

        Args:
          params: those that it will draw with, or ShapeDtypeStructs with their sharding.
          condition: arrays (n, ...) of any n, of which the shapes are read.
        """

        def rows(shape, dtype):
            return jax.ShapeDtypeStruct((self.batch_size, *shape), dtype, sharding=self._sharding)

        shapes = {name: rows(value.shape[1:], value.dtype) for name, value in condition.items()}
        program = self.lower(params, rows((), np.int32), shapes).compile()
        other = self._with(_draw_program=program)
        if self._autoencoder:
            latents = program.out_info
            decoder = self._decode.lower(
                self._autoencoder.params, rows(latents.shape[1:], latents.dtype)
            )
            other = other._with(_decode_program=decoder.compile())
        return other

    def trace(
        self,
        params: Any,
        decoder: Any,
        index: jax.Array,
        condition: Mapping[str, jax.Array],
        seed: jax.Array,
        cfg_scale: jax.Array | None = None,
    ) -> jax.Array:
        """Images within a program of the caller's, whose batch may be of any size, or symbolic.

        Args:
          decoder: the autoencoder's parameters; read only where there is one.
          index: (B,) int32. condition: arrays (B, ...). seed: () uint32.
          cfg_scale: () float32; read only where the sampler is guided.
        Returns: (B, h, w, C) float32.
        """
        guidance = self._guidance
        if self.is_guided:
            guidance = Guidance(cfg_scale, guidance.is_guided)
        root = jax.random.key(seed)
        latents = self._draw_batch(params, index, condition, root, guidance)
        return self._decode(decoder, latents) if self._autoencoder else latents

    def __call__(
        self,
        params: Any,
        index: Sequence[int] | np.ndarray,
        condition: Mapping[str, Any],
        on_batch: Callable[[int], None] = lambda done: None,
    ) -> np.ndarray:
        """Images (n, h, w, C) float32, about [-1, 1], the same on every process.

        Args:
          index: (n,) numbers of the images. condition: arrays (n, ...).
          on_batch: is told after each batch how many images are done.
        """
        index = np.asarray(index)
        condition = {name: np.asarray(value) for name, value in condition.items()}
        images = []
        for start in range(0, len(index), self.batch_size):
            rows = slice(start, start + self.batch_size)
            part = {name: value[rows] for name, value in condition.items()}
            out = self.draw(params, index[rows], part)
            # Every process gets all images: scores and grids are made of all of them.
            whole = multihost_utils.process_allgather(out, tiled=True)
            images.append(whole[: len(index[rows])])
            on_batch(min(rows.stop, len(index)))
        return np.concatenate(images)

    def draw(
        self, params: Any, index: np.ndarray, condition: Mapping[str, np.ndarray]
    ) -> jax.Array:
        """One batch over the mesh, (batch_size, h, w, C), of at most batch_size images.

        The rows after those repeat the last one: there is one compiled shape.
        """
        return self.decode(self.draw_latents(params, index, condition))

    def draw_latents(
        self, params: Any, index: np.ndarray, condition: Mapping[str, np.ndarray]
    ) -> jax.Array:
        """As `draw`, but in the model's space: for an autoencoder that is loaded later."""
        return self._draw_program(params, *self._place(index, condition), *self.how)

    def put(self, rows: np.ndarray) -> jax.Array:
        """At most batch_size rows (n, ...) on the devices, filled up with the last one."""
        edges = [(0, self.batch_size - len(rows))] + [(0, 0)] * (rows.ndim - 1)
        return jax.device_put(np.pad(rows, edges, mode="edge"), self._sharding)

    def _place(self, index, condition):
        placed = {name: self.put(rows) for name, rows in condition.items()}
        return self.put(np.asarray(index, np.int32)), placed

    def stream(
        self, params: Any, index: np.ndarray, condition: Mapping[str, np.ndarray]
    ) -> Iterator[jax.Array]:
        """One batch step by step, in the model's space, as `draw_latents` draws it at once.

        Yields: after each step the model's estimate of the images, (batch_size, h, w, C) float32,
          and after the last one the images themselves.
        """
        numbers, placed = self._place(index, condition)
        root, guidance = self.how
        progress = self._begin(root, numbers, self._grid.x_start_coefs.shape[1])
        table = jax.device_get(samplers.table_of(self._grid, guidance))
        kind = self.step_kind
        last = len(self._grid.timesteps) - 1
        for s in range(last + 1):
            row = {name: column[s] for name, column in table.items()}
            progress, x_start = self._advance(
                params, numbers, placed, root, guidance.scale, progress, row, kind
            )
            yield x_start if s < last else progress.x

    def _trace_begin(self, root, index, order):
        x = samplers.step_noise(_keys(root, index), 0, self.shape)
        return samplers.Progress(x, samplers.no_past(x, order))

    def _trace_step(self, params, index, condition, root, scale, progress, row, kind):
        step = samplers.make_step(
            self._model_fn(params), _keys(root, index), condition, kind, scale=scale
        )
        return step(progress, row)

    def decode(self, latents: jax.Array) -> jax.Array:
        """Images of what `draw_latents` returned: the same, where there is no autoencoder."""
        if self._autoencoder is None:
            return latents
        return self._decode_program(self._autoencoder.params, latents)

    def are_finite(self, images: jax.Array) -> np.ndarray:
        """Which images of a batch that `draw` returned hold neither NaN nor infinity, (B,) bool.

        Finite weights may overflow all the same. The answer is the same on every process.
        """
        return np.asarray(self._are_finite(images))


def _keys(root: jax.Array, index: jax.Array) -> jax.Array:
    return jax.vmap(lambda i: jax.random.fold_in(root, i))(index)


def _trained_size(model: Model) -> tuple[int, int]:
    grid = model.config.grid
    if grid is None:
        raise ValueError("size = None, but the model does not say which grid it was trained on")
    p = model.config.patch_size
    return grid[0] * p, grid[1] * p
