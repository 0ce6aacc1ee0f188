"""The parity oracle: DiT and LiT in PyTorch, from the papers, with the official keys."""

import math

import torch
import torch.nn.functional as F
from torch import nn


def sincos_table(grid_height, grid_width, dim):
    """(1, T, dim) float32: half of the width encodes the column, half the row; raster order."""
    omega = 10000.0 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    rows, columns = torch.meshgrid(
        torch.arange(grid_height), torch.arange(grid_width), indexing="ij"
    )
    halves = []
    for position in (columns, rows):
        angle = position.reshape(-1, 1).to(torch.float64) * omega
        halves += [torch.sin(angle), torch.cos(angle)]
    return torch.cat(halves, dim=1).float()[None]


class Patches(nn.Module):
    def __init__(self, patch_size, channels, dim):
        super().__init__()
        self.proj = nn.Conv2d(channels, dim, patch_size, stride=patch_size)

    def forward(self, x):
        return self.proj(x).flatten(2).transpose(1, 2)


class TimestepEmbedder(nn.Module):
    def __init__(self, dim, freq_shift=0):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.freq_shift = freq_shift

    def forward(self, t):
        frequencies = torch.exp(
            -math.log(10000.0) * torch.arange(128, dtype=torch.float32) / (128 - self.freq_shift)
        )
        angle = t.float()[:, None] * frequencies
        return self.mlp(torch.cat([torch.cos(angle), torch.sin(angle)], dim=1))


class LabelEmbedder(nn.Module):
    def __init__(self, num_classes, dim):
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, dim)

    def forward(self, y):
        return self.embedding_table(y)


class SoftmaxAttention(nn.Module):
    def __init__(self, dim, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x, grid):
        B, T, D = x.shape
        q, k, v = self.qkv(x).reshape(B, T, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        weights = torch.softmax(q @ k.transpose(-1, -2) * (D // self.num_heads) ** -0.5, dim=-1)
        return self.proj((weights @ v).transpose(1, 2).reshape(B, T, D))


class LinearAttention(nn.Module):
    """ReLU linear attention, mean normaliser, a depth-wise convolution of v for all heads."""

    def __init__(self, dim, num_heads, qkv_bias=True, conv_size=5):
        super().__init__()
        self.num_heads = num_heads
        self.q = nn.Linear(dim, dim, bias=qkv_bias)
        self.kv = nn.Linear(dim, 2 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        head = dim // num_heads
        self.dwc = (
            nn.Conv2d(head, head, conv_size, padding=conv_size // 2, groups=head)
            if conv_size
            else None
        )

    def forward(self, x, grid):
        B, T, D = x.shape
        N, H = self.num_heads, D // self.num_heads

        def split(array):
            return array.reshape(B, T, N, H).transpose(1, 2)  # (B, N, T, H)

        q = split(F.relu(self.q(x)) + 1e-6)
        k, v = self.kv(x).chunk(2, dim=-1)
        k, v = split(F.relu(k) + 1e-6), split(v)
        z = 1.0 / (q @ k.mean(dim=2, keepdim=True).transpose(-1, -2) + 1e-6)
        out = q @ ((k * T**-0.5).transpose(-1, -2) @ (v * T**-0.5)) * z
        if self.dwc is not None:
            image = v.reshape(B * N, grid[0], grid[1], H).permute(0, 3, 1, 2)
            out = out + self.dwc(image).reshape(B, N, H, T).transpose(-1, -2)
        return self.proj(out.transpose(1, 2).reshape(B, T, D))


class Mlp(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.fc2 = nn.Linear(4 * dim, dim)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


def modulate(x, shift, scale):
    return x * (1 + scale[:, None]) + shift[:, None]


class Block(nn.Module):
    def __init__(self, dim, attn, mlp_norm_epsilon):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.attn = attn
        self.norm2 = nn.LayerNorm(dim, elementwise_affine=False, eps=mlp_norm_epsilon)
        self.mlp = Mlp(dim)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))

    def forward(self, x, c, grid):
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = self.adaLN_modulation(
            c
        ).chunk(6, dim=1)
        x = x + gate_msa[:, None] * self.attn(modulate(self.norm1(x), shift_msa, scale_msa), grid)
        return x + gate_mlp[:, None] * self.mlp(modulate(self.norm2(x), shift_mlp, scale_mlp))


class FinalLayer(nn.Module):
    def __init__(self, dim, patch_size, out_channels):
        super().__init__()
        self.norm_final = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(dim, patch_size * patch_size * out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim))

    def forward(self, x, c):
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


class DiT(nn.Module):
    """DiT (attention="softmax") or LiT ("linear"); state_dict() has the official keys.

    forward(x (B, C, h, w), t (B,), y (B,)) -> (B, C_out, h, w), channels first as in torch.
    """

    def __init__(
        self,
        depth,
        width,
        num_heads,
        patch_size,
        in_channels,
        num_classes,
        grid,
        *,
        learn_sigma=True,
        attention="softmax",
        qkv_bias=True,
        conv_size=5,
        timestep_freq_shift=0,
        mlp_norm_epsilon=1e-6,
    ):
        super().__init__()
        self.patch_size, self.grid = patch_size, tuple(grid)
        self.out_channels = in_channels * (2 if learn_sigma else 1)
        self.x_embedder = Patches(patch_size, in_channels, width)
        self.t_embedder = TimestepEmbedder(width, timestep_freq_shift)
        self.y_embedder = LabelEmbedder(num_classes, width)
        self.pos_embed = nn.Parameter(sincos_table(*self.grid, width), requires_grad=False)

        def make_attention():
            if attention == "softmax":
                return SoftmaxAttention(width, num_heads)
            return LinearAttention(width, num_heads, qkv_bias, conv_size)

        self.blocks = nn.ModuleList(
            Block(width, make_attention(), mlp_norm_epsilon) for _ in range(depth)
        )
        self.final_layer = FinalLayer(width, patch_size, self.out_channels)

    def forward(self, x, t, y):
        (h, w), p = self.grid, self.patch_size
        x = self.x_embedder(x) + self.pos_embed
        c = self.t_embedder(t) + self.y_embedder(y)
        for block in self.blocks:
            x = block(x, c, self.grid)
        x = self.final_layer(x, c).reshape(-1, h, w, p, p, self.out_channels)
        return torch.einsum("nhwpqc->nchpwq", x).reshape(-1, self.out_channels, h * p, w * p)


def randomise_(module, seed):
    """Fills every trainable parameter from a seeded normal: no gate is zero, no bias is hidden.

    Matrices get N(0, 1/fan_in) and vectors N(0, 0.1): outputs stay near one at any depth.

    Returns: the module.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                fan_in = parameter[0].numel() if parameter.ndim > 1 else 100
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * fan_in**-0.5)
    return module
