"""The parity oracle: PixArt-Sigma and its LiT in PyTorch, from the papers, with official keys."""

import torch
import torch.nn.functional as F
from torch import nn
from torch_dit import LinearAttention, Mlp, Patches, SoftmaxAttention, TimestepEmbedder, modulate


def sincos_table(grid, dim, base, scale):
    """(1, T, dim) float32: positions span [0, base / scale) on both axes; column, then row."""
    omega = 10000.0 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))

    def positions(count):
        return torch.arange(count, dtype=torch.float32) / (count / base) / scale

    rows, columns = torch.meshgrid(positions(grid[0]), positions(grid[1]), indexing="ij")
    halves = []
    for position in (columns, rows):
        angle = position.reshape(-1, 1).double() * omega
        halves += [torch.sin(angle), torch.cos(angle)]
    return torch.cat(halves, dim=1).float()[None]


class CaptionMlp(nn.Module):
    def __init__(self, channels, dim):
        super().__init__()
        self.fc1 = nn.Linear(channels, dim)
        self.fc2 = nn.Linear(dim, dim)

    def forward(self, y):
        return self.fc2(F.gelu(self.fc1(y), approximate="tanh"))


class CaptionEmbedder(nn.Module):
    def __init__(self, channels, dim, length):
        super().__init__()
        self.y_proj = CaptionMlp(channels, dim)
        self.register_buffer("y_embedding", torch.randn(length, channels))

    def forward(self, y, drop):
        return self.y_proj(torch.where(drop[:, None, None], self.y_embedding[: y.shape[1]], y))


class CrossAttention(nn.Module):
    """Padded keys are cut away, as the official code does: image by image."""

    def __init__(self, dim, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.q_linear = nn.Linear(dim, dim)
        self.kv_linear = nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x, y, mask):
        N, D = self.num_heads, x.shape[-1]
        out = []
        for image, caption, valid in zip(x, y, mask):
            q = self.q_linear(image).reshape(-1, N, D // N).transpose(0, 1)
            k, v = self.kv_linear(caption[valid]).reshape(-1, 2, N, D // N).permute(1, 2, 0, 3)
            weights = torch.softmax(q @ k.transpose(-1, -2) * (D // N) ** -0.5, dim=-1)
            out.append((weights @ v).transpose(0, 1).reshape(-1, D))
        return self.proj(torch.stack(out))


class Block(nn.Module):
    def __init__(self, dim, attn, cross_heads):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.attn = attn
        self.cross_attn = CrossAttention(dim, cross_heads)
        self.norm2 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.mlp = Mlp(dim)
        self.scale_shift_table = nn.Parameter(torch.randn(6, dim))

    def forward(self, x, y, t0, mask, grid):
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = (
            self.scale_shift_table + t0.reshape(len(x), 6, -1)
        ).unbind(1)
        x = x + gate_msa[:, None] * self.attn(modulate(self.norm1(x), shift_msa, scale_msa), grid)
        x = x + self.cross_attn(x, y, mask)
        return x + gate_mlp[:, None] * self.mlp(modulate(self.norm2(x), shift_mlp, scale_mlp))


class FinalLayer(nn.Module):
    def __init__(self, dim, features):
        super().__init__()
        self.norm_final = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(dim, features)
        self.scale_shift_table = nn.Parameter(torch.randn(2, dim))

    def forward(self, x, t):
        shift, scale = (self.scale_shift_table + t[:, None]).unbind(1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


class PixArt(nn.Module):
    """PixArt-Sigma (attention="softmax") or LiT ("linear"); state_dict() has the official keys.

    forward(x (B, C, h, w), t (B,), y (B, S, C_y), mask (B, S) bool, drop (B,) bool)
    -> (B, C_out, h, w).
    """

    def __init__(
        self,
        depth,
        width,
        num_heads,
        *,
        cross_heads,
        grid,
        patch_size=2,
        in_channels=4,
        caption_channels=24,
        caption_length=6,
        position_base=4,
        position_scale=1.0,
        attention="softmax",
        conv_size=5,
    ):
        super().__init__()
        self.patch_size = patch_size
        self.out_channels = 2 * in_channels
        self.position = (width, position_base, position_scale)
        self.x_embedder = Patches(patch_size, in_channels, width)
        self.t_embedder = TimestepEmbedder(width)
        self.t_block = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
        self.y_embedder = CaptionEmbedder(caption_channels, width, caption_length)
        self.register_buffer("pos_embed", sincos_table(grid, *self.position))

        def make_attention():
            if attention == "softmax":
                return SoftmaxAttention(width, num_heads)
            return LinearAttention(width, num_heads, conv_size=conv_size)

        self.blocks = nn.ModuleList(
            Block(width, make_attention(), cross_heads) for _ in range(depth)
        )
        self.final_layer = FinalLayer(width, patch_size**2 * self.out_channels)

    def forward(self, x, t, y, mask, drop):
        p = self.patch_size
        h, w = x.shape[2] // p, x.shape[3] // p
        # The table is made for the images, whatever size the stored one is for.
        x = self.x_embedder(x) + sincos_table((h, w), *self.position)
        embedded_t = self.t_embedder(t)
        t0 = self.t_block(embedded_t)
        y = self.y_embedder(y, drop)
        for block in self.blocks:
            x = block(x, y, t0, mask, (h, w))
        x = self.final_layer(x, embedded_t).reshape(-1, h, w, p, p, self.out_channels)
        return torch.einsum("nhwpqc->nchpwq", x).reshape(-1, self.out_channels, h * p, w * p)
