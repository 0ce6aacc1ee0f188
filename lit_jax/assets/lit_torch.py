"""LiT and DiT in PyTorch: runs what lit_jax exports, with PyTorch (and safetensors) alone.

    import lit_torch
    model = lit_torch.load("lit.safetensors")           # or lit.pt, with lit.pt.json beside it
    out = model(x, t, y)    # x (B, C, h, w), t (B,), y (B,) -> (B, C_out, h, w); class num_classes is the null class

The first C output channels are the predicted noise; the other C, if any, the variance's interpolation weights.
LiT: Wang et al., arXiv 2501.12976. DiT: Peebles and Xie, arXiv 2212.09748.
"""

import json
import math
import pathlib

import torch
import torch.nn.functional as F
from torch import nn

EPSILON = 1e-6  # of the kernel function, and of the normaliser


def position_table(grid, width):
    """(1, h * w, width) float32: half of the width encodes the column, half the row, each as sin | cos."""
    frequencies = 10000.0 ** (-torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    rows, columns = torch.meshgrid(torch.arange(grid[0]), torch.arange(grid[1]), indexing="ij")
    angles = [position.reshape(-1, 1) * frequencies for position in (columns, rows)]
    return torch.cat([f(angle) for angle in angles for f in (torch.sin, torch.cos)], dim=1).float()[
        None
    ]


class PatchEmbed(nn.Module):
    def __init__(self, patch_size, in_channels, width):
        super().__init__()
        self.proj = nn.Conv2d(in_channels, width, patch_size, stride=patch_size)

    def forward(self, x):
        return self.proj(x).flatten(2).transpose(1, 2)  # (B, T, D)


class TimestepEmbedder(nn.Module):
    def __init__(self, width, freq_shift):
        super().__init__()
        self.freq_shift = freq_shift
        self.mlp = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t):
        index = torch.arange(128, dtype=torch.float64)  # not every device has float64
        frequencies = (
            torch.exp(-math.log(10000.0) * index / (128 - self.freq_shift)).float().to(t.device)
        )
        angles = t.float()[:, None] * frequencies
        return self.mlp(
            torch.cat([torch.cos(angles), torch.sin(angles)], dim=-1).to(self.mlp[0].weight.dtype)
        )


class LabelEmbedder(nn.Module):
    def __init__(self, num_classes, width):
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, width)

    def forward(self, y):
        return self.embedding_table(y)


class SoftmaxAttention(nn.Module):
    def __init__(self, width, num_heads, qkv_bias):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width, bias=qkv_bias)
        self.proj = nn.Linear(width, width)

    def forward(self, x, grid):
        B, T, D = x.shape
        q, k, v = (
            self.qkv(x).reshape(B, T, 3, self.num_heads, D // self.num_heads).permute(2, 0, 3, 1, 4)
        )
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, T, D))


class LinearAttention(nn.Module):
    """out_i = phi(q_i) mean_j(phi(k_j)^T v_j) / (phi(q_i) . mean_j phi(k_j) + 1e-6) + conv(v)_i, then proj."""

    def __init__(self, width, num_heads, qkv_bias, conv_size, kernel_function):
        super().__init__()
        self.num_heads, self.kernel_function = num_heads, kernel_function
        self.q = nn.Linear(width, width, bias=qkv_bias)
        self.kv = nn.Linear(width, 2 * width, bias=qkv_bias)
        self.proj = nn.Linear(width, width)
        self.dwc = None
        if conv_size:  # one filter a head channel, shared by the heads
            H = width // num_heads
            self.dwc = nn.Conv2d(H, H, conv_size, padding=conv_size // 2, groups=H)

    def phi(self, x):
        gelu = self.kernel_function in ("gelu", "focused_gelu")
        x = (F.gelu(x) if gelu else F.relu(x)) + EPSILON
        if self.kernel_function in ("focused", "focused_gelu"):
            norm = x.norm(dim=-1, keepdim=True)
            power = (x / norm) ** 3
            x = power / power.norm(dim=-1, keepdim=True) * norm
        return x

    def forward(self, x, grid):
        (B, T, D), N = x.shape, self.num_heads
        q, k, v = (
            a.reshape(B, T, N, D // N).transpose(1, 2)  # (B, N, T, H)
            for a in (self.q(x), *self.kv(x).chunk(2, dim=-1))
        )
        phi_q, phi_k = self.phi(q.float()), self.phi(k.float())
        state = phi_k.transpose(-1, -2) @ v.float() / T  # (B, N, H, H)
        norm = phi_q @ phi_k.mean(dim=2, keepdim=True).transpose(-1, -2) + EPSILON  # (B, N, T, 1)
        out = phi_q @ state / norm
        if self.dwc is not None:
            image = v.transpose(-1, -2).reshape(B * N, D // N, *grid)
            out = out + self.dwc(image).float().reshape(B, N, D // N, T).transpose(-1, -2)
        return self.proj(out.to(x.dtype).transpose(1, 2).reshape(B, T, D))


class Mlp(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


def modulate(x, shift, scale):
    return x * (1 + scale[:, None]) + shift[:, None]


class Block(nn.Module):
    def __init__(self, width, attn, mlp_norm_epsilon):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.attn = attn
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False, eps=mlp_norm_epsilon)
        self.mlp = Mlp(width)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x, c, grid):
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = self.adaLN_modulation(
            c
        ).chunk(6, dim=1)
        x = x + gate_msa[:, None] * self.attn(modulate(self.norm1(x), shift_msa, scale_msa), grid)
        return x + gate_mlp[:, None] * self.mlp(modulate(self.norm2(x), shift_mlp, scale_mlp))


class FinalLayer(nn.Module):
    def __init__(self, width, features):
        super().__init__()
        self.norm_final = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(width, features)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x, c):
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


class LiT(nn.Module):
    """The model of one architecture, as a lit_jax export describes it; attention "softmax" is DiT."""

    def __init__(
        self,
        *,
        attention,
        depth,
        width,
        num_heads,
        patch_size,
        in_channels,
        num_classes,
        learn_sigma,
        qkv_bias,
        conv_size,
        kernel_function,
        grid,
        timestep_freq_shift,
        mlp_norm_epsilon,
    ):
        super().__init__()
        self.patch_size, self.grid = patch_size, tuple(grid)
        self.out_channels = in_channels * (2 if learn_sigma else 1)
        self.x_embedder = PatchEmbed(patch_size, in_channels, width)
        self.t_embedder = TimestepEmbedder(width, timestep_freq_shift)
        self.y_embedder = LabelEmbedder(num_classes, width)
        self.pos_embed = nn.Parameter(position_table(self.grid, width), requires_grad=False)

        def make_attention():
            if attention == "softmax":
                return SoftmaxAttention(width, num_heads, qkv_bias)
            return LinearAttention(width, num_heads, qkv_bias, conv_size, kernel_function)

        self.blocks = nn.ModuleList(
            Block(width, make_attention(), mlp_norm_epsilon) for _ in range(depth)
        )
        self.final_layer = FinalLayer(width, patch_size * patch_size * self.out_channels)

    def forward(self, x, t, y):
        p = self.patch_size
        h, w = x.shape[2] // p, x.shape[3] // p
        pos_embed = self.pos_embed
        if (h, w) != self.grid:
            pos_embed = position_table((h, w), pos_embed.shape[-1]).to(pos_embed)
        x = self.x_embedder(x) + pos_embed
        c = self.t_embedder(t) + self.y_embedder(y)
        for block in self.blocks:
            x = block(x, c, (h, w))
        x = self.final_layer(x, c).reshape(-1, h, w, p, p, self.out_channels)
        return torch.einsum("nhwpqc->nchpwq", x).reshape(-1, self.out_channels, h * p, w * p)


def load(path, device="cpu"):
    """The model of a .safetensors or .pt export, in evaluation mode."""
    path = pathlib.Path(path)
    if path.suffix == ".safetensors":
        from safetensors import safe_open

        with safe_open(path, "pt", device=str(device)) as file:
            architecture = json.loads(file.metadata()["architecture"])
            tensors = {key: file.get_tensor(key) for key in file.keys()}
    else:
        architecture = json.loads(path.with_name(path.name + ".json").read_text())["architecture"]
        tensors = torch.load(path, map_location=device, weights_only=True)
    model = LiT(**architecture).to(device)
    model.load_state_dict(tensors)
    return model.eval()
