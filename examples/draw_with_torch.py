"""A grid of images from an exported LiT, with torch, safetensors and Pillow.

python draw_with_torch.py lit.safetensors grid.png

`lit_torch.py` lies beside the export. A model of latents needs a decoder: pass what `sample`
returns, divided by the scaling factor, to diffusers' AutoencoderKL.
"""

import pathlib
import sys

import torch
from PIL import Image

export, picture = map(pathlib.Path, sys.argv[1:])
sys.path.insert(0, str(export.parent))
import lit_torch  # noqa: E402  found beside the export

model = lit_torch.load(export)
rows, columns = 4, 10
classes = model.y_embedder.embedding_table.num_embeddings - 1
labels = torch.arange(rows * columns) % min(classes, columns)
h, w = (side * model.patch_size for side in model.grid)
noise = torch.randn(len(labels), model.in_channels, h, w, generator=torch.manual_seed(0))
images = lit_torch.sample(
    model, noise, (labels,), steps=50, cfg_scale=3.0, cfg_channels="all", clip_denoised=True
)
pixels = (127.5 * images + 128).clamp(0, 255).to(torch.uint8)
grid = pixels.reshape(rows, columns, -1, h, w).permute(0, 3, 1, 4, 2)
Image.fromarray(grid.reshape(rows * h, columns * w, -1).squeeze(-1).numpy()).save(picture)
