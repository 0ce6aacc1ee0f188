"""Images of classes from an exported sampler, with jax and numpy (and flatbuffers installed).

python draw_with_jax.py FOLDER grid.ppm

FOLDER is what --mode=export wrote; about.json in it says what the program takes.
"""

import json
import pathlib
import sys

import jax
import jax.export
import numpy as np

folder, picture = map(pathlib.Path, sys.argv[1:])
about = json.loads((folder / "about.json").read_text())
program = jax.export.deserialize(bytearray((folder / about["program"]).read_bytes()))
weights = {}
if about["weights"] != "inside":
    data = memoryview((folder / about["weights"]).read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")
    for name, entry in json.loads(bytes(data[8:start])).items():
        if name != "__metadata__":
            values = data[start:][slice(*entry["data_offsets"])]
            dtype = {"F32": np.float32, "I8": np.int8}[entry["dtype"]]
            weights[name] = np.frombuffer(values, dtype).reshape(entry["shape"])

count = 20 if about["batch"] == "any" else about["batch"]
index = np.arange(count, dtype=np.int32)
inputs = {
    "seed": np.uint32(about["protocol"]["seed"]),
    "index": index,
    "label": index % about["model"]["num_classes"],
    "cfg_scale": np.float32(about["protocol"]["cfg_scale"]),
}
inputs = {name: inputs[name] for name in about["inputs"]}
images = np.asarray(jax.jit(program.call)(weights, inputs))  # (count, h, w, 1 or 3)
pixels = np.clip(127.5 * images + 128, 0, 255).astype(np.uint8)
row = np.concatenate(pixels, axis=1)
h, w, channels = row.shape
picture.write_bytes(b"P%d %d %d 255\n" % (5 if channels == 1 else 6, w, h) + row.tobytes())
