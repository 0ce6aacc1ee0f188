"""A made-up model on images of 4 x 4, and how the tests of the samplers sample from it."""

import jax
import jax.numpy as jnp
import numpy as np

from lit_jax import diffusion, samplers

PROCESS = diffusion.GaussianDiffusion()
SHAPE = (4, 4, 4)
NULL = 10


def make_keys(count, seed=0):
    return jax.vmap(lambda i: jax.random.fold_in(jax.random.key(seed), i))(jnp.arange(count))


def make_grid(sampler, steps, *, timesteps=None, **fields):
    """A grid; DDPM's noise is learned where nothing else is said."""
    fields = dict(variance="learned_range") | fields
    settings = samplers.SamplerSettings(sampler=sampler, steps=steps, **fields)
    return samplers.make_grid(PROCESS, settings, timesteps=timesteps)


def model_fn(x, t, condition, drop):
    """A smooth made-up network: its output depends on the image, the time and the label."""
    y = jnp.where(drop, NULL, condition["label"])
    t = t.astype(jnp.float32)[:, None, None, None] / 1000.0
    y = y.astype(jnp.float32)[:, None, None, None]
    eps = jnp.tanh(x + 0.1 * y) * jnp.cos(t) + 0.2 * jnp.roll(x, 1, axis=-1)
    return jnp.concatenate([eps, jnp.sin(3.0 * x + t)], axis=-1)


def run(grid, count=3, model_fn=model_fn, *, keys=None, labels=None, noise=None, **settings):
    """Images of a grid; `settings` are those of guidance, of which there is none by default."""
    settings = samplers.SamplerSettings(**dict(cfg_scale=1.0) | settings)
    keys = make_keys(count) if keys is None else keys
    condition = {"label": jnp.arange(count) % 10 if labels is None else labels}

    def draw(keys, condition):
        return samplers.sample(model_fn, keys, condition, SHAPE, grid, settings, noise=noise)

    return np.asarray(jax.jit(draw)(keys, condition))
