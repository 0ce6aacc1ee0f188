"""LiT and DiT in PyTorch: runs what lit_jax exports, with PyTorch (and safetensors) alone.

    import lit_torch

    model = lit_torch.load("lit.safetensors")    # or lit.pt, with lit.pt.json beside it
    output = model(x, t, y)

x is (B, C, h, w), t and y are (B,), the output is (B, C_out, h, w).
The label num_classes is the null class of guidance.
The first C output channels are the predicted noise.
The other C, if any, are the interpolation weights of the variance.

    images = lit_torch.sample(model, noise, (y,), steps=50, cfg_scale=4.0)

draws from noise (B, C, h, w), by DDIM. examples/draw_with_torch.py is a whole program.

An export of a text-to-image LiT is told a caption in place of a label:

    output = model(x, t, caption, mask, drop)
    images = lit_torch.sample(model, noise, (caption, mask))

caption is (B, S, channels), features of the text encoder; mask (B, S) bool, true for tokens;
drop (B,) bool, the images of guidance that see the null caption.

LiT: Wang et al., arXiv 2501.12976. DiT: Peebles and Xie, arXiv 2212.09748.
PixArt-Sigma: Chen et al., arXiv 2403.04692.
"""

import dataclasses
import itertools
import json
import math
import pathlib

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Added after ReLU or GELU, and to the normaliser.
EPSILON = 1e-6

# A timestep becomes 128 cosines and 128 sines.
FREQUENCIES = 128

Grid = tuple[int, int]  # tokens down and across


@dataclasses.dataclass(frozen=True)
class Architecture:
    """What an export says of its model; lit_jax writes these fields as JSON."""

    attention: str  # softmax is DiT, linear is LiT
    depth: int
    width: int
    num_heads: int
    patch_size: int
    in_channels: int
    num_classes: int
    learn_sigma: bool
    qkv_bias: bool
    conv_size: int  # linear: of the depth-wise convolution of v; 0 is none
    kernel_function: str  # linear: relu, gelu, focused or focused_gelu
    grid: Grid
    timestep_freq_shift: int
    mlp_norm_epsilon: float
    prediction: str = "noise"  # or velocity: of a straight path, at times in [0, 1]


@dataclasses.dataclass(frozen=True)
class CaptionArchitecture:
    """What an export says of a model that is told a caption."""

    attention: str  # softmax is PixArt-Sigma, linear is LiT
    depth: int
    width: int
    num_heads: int
    patch_size: int
    in_channels: int
    learn_sigma: bool
    qkv_bias: bool
    conv_size: int
    kernel_function: str
    grid: Grid
    cross_heads: int  # of the attention to the caption
    caption_channels: int
    caption_length: int
    position_base: int  # positions span base / scale on both axes
    position_scale: float
    prediction: str = "noise"


def position_table(grid: Grid, width: int, base: int | None = None, scale: float = 1.0) -> Tensor:
    """(1, h * w, width) float32: sines and cosines of column, then of row.

    The angles are float64, as in DiT's NumPy code. With a base both axes span base / scale,
    as in PixArt-Sigma, which rounds positions to float32.
    """
    index = torch.arange(width // 4, dtype=torch.float64)
    frequencies = 10000.0 ** (-index / (width // 4))
    h, w = grid

    def positions(count: int) -> Tensor:
        whole = torch.arange(count, dtype=torch.float32)
        return whole if base is None else whole / (count / base) / scale

    rows = positions(h).repeat_interleave(w)
    columns = positions(w).repeat(h)

    parts = []
    for position in (columns, rows):
        angle = position[:, None].double() * frequencies
        parts += [torch.sin(angle), torch.cos(angle)]
    return torch.cat(parts, dim=1).float()[None]


class PatchEmbed(nn.Module):
    """(B, C, h * p, w * p) -> (B, h * w, D)."""

    def __init__(self, patch_size: int, in_channels: int, width: int):
        super().__init__()
        self.proj = nn.Conv2d(in_channels, width, patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


class TimestepEmbedder(nn.Module):
    """t (B,) -> (B, D)."""

    def __init__(self, width: int, freq_shift: int):
        super().__init__()
        # 0 in the official code, 1 in diffusers. The weights of one
        # do not fit the frequencies of the other.
        self.freq_shift = freq_shift
        self.mlp = nn.Sequential(
            nn.Linear(2 * FREQUENCIES, width),
            nn.SiLU(),
            nn.Linear(width, width),
        )

    def forward(self, t: Tensor) -> Tensor:
        # Computed on the CPU: not every device has float64.
        index = torch.arange(FREQUENCIES, dtype=torch.float64)
        exponent = -math.log(10000.0) * index / (FREQUENCIES - self.freq_shift)
        frequencies = torch.exp(exponent).float().to(t.device)
        angle = t.float()[:, None] * frequencies
        x = torch.cat([torch.cos(angle), torch.sin(angle)], dim=-1)
        return self.mlp(x.to(next(self.mlp.parameters()).dtype))


class LabelEmbedder(nn.Module):
    """y (B,) -> (B, D); the last row is the null class."""

    def __init__(self, num_classes: int, width: int):
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, width)

    def forward(self, y: Tensor) -> Tensor:
        return self.embedding_table(y)


class SoftmaxAttention(nn.Module):
    """DiT's attention on x (B, T, D)."""

    def __init__(self, arch: Architecture | CaptionArchitecture):
        super().__init__()
        D = arch.width
        self.num_heads = arch.num_heads
        self.qkv = nn.Linear(D, 3 * D, bias=arch.qkv_bias)
        self.proj = nn.Linear(D, D)

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        B, T, D = x.shape
        N = self.num_heads
        qkv = self.qkv(x).reshape(B, T, 3, N, D // N)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, N, T, H)
        out = F.scaled_dot_product_attention(q, k, v)
        return self.proj(out.transpose(1, 2).reshape(B, T, D))


class LinearAttention(nn.Module):
    """LiT's attention on x (B, T, D), whose tokens are the grid (h, w) row by row.

    state = mean_j phi(k_j)^T v_j
    norm_i = phi(q_i) . mean_j phi(k_j) + 1e-6
    out_i = proj(phi(q_i) state / norm_i + conv(v)_i)

    State and normaliser sum over all tokens: they are float32 whatever
    the weights are.
    """

    def __init__(self, arch: Architecture | CaptionArchitecture):
        super().__init__()
        D = arch.width
        H = D // arch.num_heads
        K = arch.conv_size
        bias = arch.qkv_bias
        self.num_heads = arch.num_heads
        self.kernel_function = arch.kernel_function

        self.q = nn.Linear(D, D, bias=bias)
        self.kv = nn.Linear(D, 2 * D, bias=bias)
        self.proj = nn.Linear(D, D)
        # One filter for each channel of a head. The heads share them.
        self.dwc = None
        if K:
            self.dwc = nn.Conv2d(H, H, K, padding=K // 2, groups=H)

    def phi(self, x: Tensor) -> Tensor:
        """The kernel function, on (B, N, T, H) float32."""
        name = self.kernel_function
        x = F.gelu(x) if name.endswith("gelu") else F.relu(x)
        x = x + EPSILON
        if name.startswith("focused"):
            # The cube sharpens the direction; the length stays.
            length = x.norm(dim=-1, keepdim=True)
            cube = (x / length) ** 3
            x = cube / cube.norm(dim=-1, keepdim=True) * length
        return x

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        B, T, D = x.shape
        N = self.num_heads
        H = D // N

        def split(a: Tensor) -> Tensor:
            return a.reshape(B, T, N, H).transpose(1, 2)  # (B, N, T, H)

        k, v = self.kv(x).chunk(2, dim=-1)
        phi_q = self.phi(split(self.q(x)).float())
        phi_k = self.phi(split(k).float())
        v = split(v)

        state = phi_k.transpose(-1, -2) @ v.float() / T  # (B, N, H, H)
        mean_k = phi_k.mean(dim=2, keepdim=True)  # (B, N, 1, H)
        norm = phi_q @ mean_k.transpose(-1, -2) + EPSILON  # (B, N, T, 1)
        out = phi_q @ state / norm

        if self.dwc is not None:
            image = v.transpose(-1, -2).reshape(B * N, H, *grid)
            local = self.dwc(image).float()
            out = out + local.reshape(B, N, H, T).transpose(-1, -2)
        return self.proj(out.to(x.dtype).transpose(1, 2).reshape(B, T, D))


class Mlp(nn.Module):
    """Two layers with tanh-GELU on (B, T, D), four times as wide inside."""

    def __init__(self, width: int):
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x (B, T, D), shift and scale (B, D)."""
    return x * (1 + scale[:, None]) + shift[:, None]


class Block(nn.Module):
    """A transformer block whose norms and gates depend on the condition c (B, D)."""

    def __init__(self, arch: Architecture):
        super().__init__()
        D = arch.width
        self.norm1 = nn.LayerNorm(D, elementwise_affine=False, eps=1e-6)
        softmax = arch.attention == "softmax"
        attention = SoftmaxAttention if softmax else LinearAttention
        self.attn = attention(arch)
        # 1e-6 in the official code, 1e-5 in diffusers.
        epsilon = arch.mlp_norm_epsilon
        self.norm2 = nn.LayerNorm(D, elementwise_affine=False, eps=epsilon)
        self.mlp = Mlp(D)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(D, 6 * D))

    def forward(self, x: Tensor, c: Tensor, grid: Grid) -> Tensor:
        attn, mlp = self.adaLN_modulation(c).chunk(2, dim=1)

        shift, scale, gate = attn.chunk(3, dim=1)
        out = self.attn(modulate(self.norm1(x), shift, scale), grid)
        x = x + gate[:, None] * out

        shift, scale, gate = mlp.chunk(3, dim=1)
        out = self.mlp(modulate(self.norm2(x), shift, scale))
        return x + gate[:, None] * out


class FinalLayer(nn.Module):
    """Modulated norm and the projection to patches: x (B, T, D), c (B, D) to (B, T, features)."""

    def __init__(self, width: int, features: int):
        super().__init__()
        D = width
        self.norm_final = nn.LayerNorm(D, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(D, features)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(D, 2 * D))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


def unpatchify(x: Tensor, grid: Grid, patch_size: int) -> Tensor:
    """(B, T, p * p * C) to (B, C, h * p, w * p): a token is (row, column, channel)."""
    h, w = grid
    p = patch_size
    x = x.reshape(len(x), h, w, p, p, -1)
    return torch.einsum("nhwpqc->nchpwq", x).reshape(len(x), -1, h * p, w * p)


class LiT(nn.Module):
    """The model of one architecture, under the official checkpoints' names."""

    def __init__(self, arch: Architecture):
        super().__init__()
        D = arch.width
        p = arch.patch_size
        self.patch_size = p
        h, w = arch.grid
        self.grid = (h, w)
        C = arch.in_channels
        self.in_channels = C
        self.prediction = arch.prediction
        self.out_channels = 2 * C if arch.learn_sigma else C

        self.x_embedder = PatchEmbed(p, C, D)
        self.t_embedder = TimestepEmbedder(D, arch.timestep_freq_shift)
        self.y_embedder = LabelEmbedder(arch.num_classes, D)
        # It never learns. It is a parameter because official checkpoints
        # have it among their keys.
        table = position_table(self.grid, D)
        self.pos_embed = nn.Parameter(table, requires_grad=False)
        self.blocks = nn.ModuleList(Block(arch) for _ in range(arch.depth))
        self.final_layer = FinalLayer(D, p * p * self.out_channels)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """The model's output.

        Args:
          x: (B, C, h, w), noisy images or latents, of any size that the
            patch size divides.
          t: (B,), timesteps from 0 to 999.
          y: (B,) int64, labels; num_classes is the null class.

        Returns: (B, C_out, h, w) in the dtype of the parameters.
        """
        p = self.patch_size
        h, w = x.shape[2] // p, x.shape[3] // p
        pos_embed: Tensor = self.pos_embed
        if (h, w) != self.grid:
            D = pos_embed.shape[-1]
            pos_embed = position_table((h, w), D).to(pos_embed)

        x = self.x_embedder(x) + pos_embed
        c = self.t_embedder(t) + self.y_embedder(y)
        for block in self.blocks:
            x = block(x, c, (h, w))

        return unpatchify(self.final_layer(x, c), (h, w), p)


# ---- With a caption ----


class CaptionEmbedder(nn.Module):
    """caption (B, S, channels) and drop (B,) bool -> (B, S, D)."""

    y_embedding: Tensor

    def __init__(self, arch: CaptionArchitecture):
        super().__init__()
        D = arch.width
        layers = {"fc1": nn.Linear(arch.caption_channels, D), "fc2": nn.Linear(D, D)}
        self.y_proj = nn.ModuleDict(layers)
        # The features of the empty prompt.
        self.register_buffer("y_embedding", torch.zeros(arch.caption_length, arch.caption_channels))

    def forward(self, caption: Tensor, drop: Tensor) -> Tensor:
        null = self.y_embedding
        caption = torch.where(drop[:, None, None], null[: caption.shape[1]], caption.to(null))
        x = F.gelu(self.y_proj["fc1"](caption), approximate="tanh")
        return self.y_proj["fc2"](x)


class CrossAttention(nn.Module):
    """Attention of x (B, T, D) to the caption (B, S, D), where the mask (B, S) is true."""

    def __init__(self, arch: CaptionArchitecture):
        super().__init__()
        D = arch.width
        self.num_heads = arch.cross_heads
        self.q_linear = nn.Linear(D, D)
        self.kv_linear = nn.Linear(D, 2 * D)
        self.proj = nn.Linear(D, D)

    def forward(self, x: Tensor, caption: Tensor, mask: Tensor) -> Tensor:
        B, T, D = x.shape
        N = self.num_heads
        q = self.q_linear(x).reshape(B, T, N, D // N).transpose(1, 2)
        kv = self.kv_linear(caption).reshape(B, -1, 2, N, D // N)
        k, v = kv.permute(2, 0, 3, 1, 4)  # each (B, N, S, H)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None, :])
        return self.proj(out.transpose(1, 2).reshape(B, T, D))


class CaptionBlock(nn.Module):
    """Self-attention, attention to the caption, MLP; t0 (B, 6, D) is one for all blocks."""

    def __init__(self, arch: CaptionArchitecture):
        super().__init__()
        D = arch.width
        self.norm = nn.LayerNorm(D, elementwise_affine=False, eps=1e-6)
        softmax = arch.attention == "softmax"
        self.attn = SoftmaxAttention(arch) if softmax else LinearAttention(arch)
        self.cross_attn = CrossAttention(arch)
        self.mlp = Mlp(D)
        self.scale_shift_table = nn.Parameter(torch.zeros(6, D))

    def forward(self, x: Tensor, caption: Tensor, t0: Tensor, mask: Tensor, grid: Grid) -> Tensor:
        attn, mlp = (self.scale_shift_table + t0).chunk(2, dim=1)

        shift, scale, gate = attn.unbind(1)
        out = self.attn(modulate(self.norm(x), shift, scale), grid)
        x = x + gate[:, None] * out

        # Without norm and gate, as PixArt's.
        x = x + self.cross_attn(x, caption, mask)

        shift, scale, gate = mlp.unbind(1)
        out = self.mlp(modulate(self.norm(x), shift, scale))
        return x + gate[:, None] * out


class CaptionFinalLayer(nn.Module):
    """Modulated norm and the projection to patches; reads the embedded t (B, D) itself."""

    def __init__(self, width: int, features: int):
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(width, features)
        self.scale_shift_table = nn.Parameter(torch.zeros(2, width))

    def forward(self, x: Tensor, embedded_t: Tensor) -> Tensor:
        shift, scale = (self.scale_shift_table + embedded_t[:, None]).unbind(1)
        return self.linear(modulate(self.norm(x), shift, scale))


class CaptionLiT(nn.Module):
    """PixArt-Sigma or its LiT, under the official checkpoints' names."""

    def __init__(self, arch: CaptionArchitecture):
        super().__init__()
        D = arch.width
        p = arch.patch_size
        C = arch.in_channels
        self.patch_size = p
        self.in_channels = C
        self.prediction = arch.prediction
        self.out_channels = 2 * C if arch.learn_sigma else C
        self.position = (D, arch.position_base, arch.position_scale)

        self.x_embedder = PatchEmbed(p, C, D)
        self.t_embedder = TimestepEmbedder(D, freq_shift=0)
        self.t_block = nn.Sequential(nn.SiLU(), nn.Linear(D, 6 * D))
        self.y_embedder = CaptionEmbedder(arch)
        # Of the nominal size; the table of other sizes is computed.
        side = arch.position_base
        self.register_buffer("pos_embed", position_table((side, side), *self.position))
        self.blocks = nn.ModuleList(CaptionBlock(arch) for _ in range(arch.depth))
        self.final_layer = CaptionFinalLayer(D, p * p * self.out_channels)

    def forward(
        self, x: Tensor, t: Tensor, caption: Tensor, mask: Tensor, drop: Tensor | None = None
    ) -> Tensor:
        """The model's output.

        Args:
          x: (B, C, h, w), noisy latents of any size that the patch size divides.
          t: (B,), timesteps from 0 to 999, whole or not; never in half precision.
          caption: (B, S, channels), features of the text encoder.
          mask: (B, S) bool, true for tokens.
          drop: (B,) bool, images that see the null caption; None: no image.

        Returns: (B, C_out, h, w) in the dtype of the parameters.
        """
        p = self.patch_size
        h, w = x.shape[2] // p, x.shape[3] // p
        if drop is None:
            drop = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        x = self.x_embedder(x)
        x = x + position_table((h, w), *self.position).to(x)
        embedded_t = self.t_embedder(t)
        t0 = self.t_block(embedded_t).reshape(len(x), 6, -1)
        y = self.y_embedder(caption, drop)
        for block in self.blocks:
            x = block(x, y, t0, mask, (h, w))

        return unpatchify(self.final_layer(x, embedded_t), (h, w), p)


# ---- Sampling ----


def guide(
    model: LiT | CaptionLiT,
    x: Tensor,
    t: Tensor,
    condition: tuple[Tensor, ...],
    cfg_scale: float,
    cfg_channels: str,
) -> Tensor:
    """The model's output under classifier-free guidance, (B, C_out, h, w).

    Args:
      x: (B, C, h, w). t: (B,).
      condition: (y,), or (caption, mask), as the model is told.
      cfg_scale: 1: no guidance, and the model sees each image once.
      cfg_channels: "3": the first three channels, as in DiT; "all".
    """
    if cfg_scale == 1.0:
        return model(x, t, *condition)
    B, C = x.shape[:2]
    if isinstance(model, CaptionLiT):
        drop = torch.arange(2 * B, device=x.device) >= B
        told = (*(torch.cat([part, part]) for part in condition), drop)
    else:
        (y,) = condition
        null = model.y_embedder.embedding_table.num_embeddings - 1
        told = (torch.cat([y, torch.full_like(y, null)]),)
    cond, uncond = model(x.repeat(2, 1, 1, 1), t.repeat(2), *told).chunk(2)
    n = C if cfg_channels == "all" else min(3, C)
    mixed = uncond[:, :n] + cfg_scale * (cond - uncond)[:, :n]
    return torch.cat([mixed, cond[:, n:]], dim=1)


@torch.no_grad()
def sample(
    model: LiT | CaptionLiT,
    noise: Tensor,
    condition: tuple[Tensor, ...],
    *,
    steps: int = 50,
    cfg_scale: float = 1.5,
    cfg_channels: str = "3",
    clip_denoised: bool = False,
) -> Tensor:
    """Images or latents by DDIM without fresh noise (arXiv 2010.02502), float32.

    The timesteps are evenly spaced from 999 to 0: lit_jax draws the same with
    sample.sampler=ddim. A model of velocities takes steps of Euler from 0 to 1: the same as
    sample.sampler=euler.

    Args:
      noise: (B, C, h, w), standard normal.
      condition, cfg_scale, cfg_channels: as `guide`.
      steps: model evaluations an image, 2 to 1000.
      clip_denoised: clips the predicted image to [-1, 1]: for models of pixels.

    Returns: (B, C, h, w), pixels about [-1, 1], or scaled latents of an autoencoder.
    """
    dtype = next(model.parameters()).dtype
    B, C = noise.shape[:2]
    x = noise.float()
    if model.prediction == "velocity":
        for step in range(steps):
            t = torch.full((B,), step / steps, device=x.device)
            out = guide(model, x.to(dtype), t, condition, cfg_scale, cfg_channels)
            x_start = x + (1.0 - step / steps) * out[:, :C].float()
            if clip_denoised:
                x_start = x_start.clamp(-1.0, 1.0)
            x = x + (x_start - x) / (steps - step)
        return x

    # float64: the product of 1000 factors is off by 2e-5 in float32.
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    powers = torch.cumprod(1.0 - betas, dim=0)
    # Accumulated, not multiplied: halves round as in DiT's code.
    strides = itertools.accumulate([0.0] + [999 / (steps - 1)] * (steps - 1))
    timesteps = torch.tensor([round(position) for position in strides][::-1])

    for step, t in enumerate(timesteps):
        power = powers[t]
        next_power = powers[timesteps[step + 1]] if step + 1 < steps else torch.ones_like(power)
        now = t.expand(B).to(x.device)
        eps = guide(model, x.to(dtype), now, condition, cfg_scale, cfg_channels)[:, :C].float()
        x_start = (x - (1.0 - power).sqrt() * eps) / power.sqrt()
        if clip_denoised:
            x_start = x_start.clamp(-1.0, 1.0)
            eps = (x - power.sqrt() * x_start) / (1.0 - power).sqrt()
        x = next_power.sqrt() * x_start + (1.0 - next_power).sqrt() * eps
    return x


# ---- Files ----


def load(path: str | pathlib.Path, device: str | torch.device = "cpu") -> LiT | CaptionLiT:
    """The model of a .safetensors or .pt export, in evaluation mode.

    Raises: RuntimeError, listing the keys, if the tensors do not fit; ValueError for another
      attention than softmax and linear, or another prediction than noise and velocity.
    """
    path = pathlib.Path(path)
    if path.suffix == ".safetensors":
        # Imported here: a .pt needs PyTorch alone.
        from safetensors import safe_open

        with safe_open(path, "pt", device=str(device)) as file:
            text = file.metadata()["architecture"]
            tensors = {key: file.get_tensor(key) for key in file.keys()}
        fields = json.loads(text)
    else:
        beside = path.with_name(path.name + ".json")
        fields = json.loads(beside.read_text())["architecture"]
        tensors = torch.load(path, map_location=device, weights_only=True)

    if fields["attention"] not in ("softmax", "linear"):
        raise ValueError(f"{path}: no attention = {fields['attention']} here")
    if fields.get("softmax_every"):
        raise ValueError(f"{path}: no layers of two kinds here, softmax_every")
    if fields.get("prediction", "noise") not in ("noise", "velocity"):
        raise ValueError(f"{path}: no prediction = {fields['prediction']} here")
    kind = CaptionArchitecture if "caption_channels" in fields else Architecture
    # Fields of other attentions are none of these two's.
    known = {field.name for field in dataclasses.fields(kind)}
    arch = kind(**{name: value for name, value in fields.items() if name in known})
    model: LiT | CaptionLiT
    model = LiT(arch) if isinstance(arch, Architecture) else CaptionLiT(arch)
    model = model.to(device)
    model.load_state_dict(tensors)
    return model.eval()
