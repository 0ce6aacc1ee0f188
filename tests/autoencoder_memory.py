"""Compiles the decoder of Stable Diffusion's autoencoder for one TPU chip and prints the memory an image takes. Needs libtpu.

    python tests/autoencoder_memory.py           # not part of the suite; minutes on two cores
"""
import functools
import pathlib
import sys
import time

import jax
import jax.numpy as jnp
from flax.traverse_util import unflatten_dict
from jax.sharding import SingleDeviceSharding

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

from lit_jax import layouts, plan  # noqa: E402
from lit_jax.models.autoencoder import make_autoencoder  # noqa: E402

TOPOLOGY = "v5e:2x2"
SD = dict(in_channels=3, out_channels=3, latent_channels=4, block_out_channels=(128, 256, 512, 512), layers_per_block=2,
          norm_num_groups=32, use_quant_conv=True, use_post_quant_conv=True, mid_block_add_attention=True,
          scaling_factor=0.18215, shift_factor=None)


def main() -> None:
    place = SingleDeviceSharding(plan.topology_devices(TOPOLOGY, 1)[0])
    array = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32, sharding=place)
    shapes = layouts.tree_shapes(layouts.autoencoder_rules(SD))
    params = unflatten_dict({path: array(shape) for path, shape in shapes.items()}, sep="/")
    for pixels in (512, 1024, 2048):
        for dtype, tile_size in (("bfloat16", 0), ("bfloat16", 64), ("float32", 0), ("float32", 64)):
            if tile_size * 8 >= pixels:
                continue

            def decode(params, z, dtype=dtype, tile_size=tile_size):
                return make_autoencoder(params, SD, dtype=dtype, tile_size=tile_size).decode(z)

            start = time.monotonic()
            what = f"{pixels} pixels, {dtype}, {f'tiles of {tile_size}' if tile_size else 'whole'}"
            try:
                program = jax.jit(decode).lower(params, array((1, pixels // 8, pixels // 8, 4))).compile()
                memory = f"{program.memory_analysis().temp_size_in_bytes / 2**30:.2f} GiB"
            except jax.errors.JaxRuntimeError as error:
                memory = f"does not fit: {str(error).splitlines()[0][:200]}"
            print(f"{TOPOLOGY[:3]}, {what}: {memory} (compiled in {time.monotonic() - start:.0f} s)", flush=True)


if __name__ == "__main__":
    main()
