"""The feature networks in torch, written from their descriptions, to test the Flax ones against.

`Inception3` is torchvision's Inception-v3 with the four changes of pytorch-fid, under the same
keys. Branches are rows of a table here and code in lit_jax, so that a slip in one is not repeated
in the other.
"""

import flax.linen as flax_nn
import jax
import torch
from torch import nn
from torch.nn import functional as F


class BasicConv2d(nn.Module):
    def __init__(self, inputs, outputs, kernel, stride=1, padding=(0, 0)):
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(outputs, eps=0.001)

    def forward(self, x):
        return F.relu(self.bn(self.conv(x)))


def fid_avg_pool(x):
    # Changes 1 to 3: in blocks A, C and the first E.
    return F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)


def fid_max_pool(x):
    # Change 4: in the second E.
    return F.max_pool2d(x, 3, 1, 1)


def halving_max_pool(x):
    return F.max_pool2d(x, 3, 2)


class Mixed(nn.Module):
    """Branches of convolutions (name, outputs, kernel, stride, pad) side by side.

    A list of two such convolutions is a fork at the end of a branch.
    """

    def __init__(self, inputs, branches, pool, pool_features=None):
        super().__init__()
        self.pool = pool
        self.paths = []
        self.outputs = 0
        for branch in branches:
            names = []
            channels = inputs
            for step in branch:
                fork = step if isinstance(step, list) else [step]
                for name, outputs, kernel, stride, padding in fork:
                    setattr(self, name, BasicConv2d(channels, outputs, kernel, stride, padding))
                names.append([name for name, *_ in fork])
                channels = sum(outputs for _, outputs, *_ in fork)
            self.paths.append(names)
            self.outputs += channels
        if pool_features:
            self.branch_pool = BasicConv2d(inputs, pool_features, 1)
        self.outputs += pool_features or inputs

    def forward(self, x):
        outputs = []
        for path in self.paths:
            y = [x]
            for names in path:
                y = [getattr(self, name)(torch.cat(y, 1)) for name in names]
            outputs += y
        pooled = self.pool(x)
        if hasattr(self, "branch_pool"):
            pooled = self.branch_pool(pooled)
        return torch.cat([*outputs, pooled], 1)


def mixed_a(inputs, pool_features):
    return Mixed(
        inputs,
        [
            [("branch1x1", 64, 1, 1, 0)],
            [("branch5x5_1", 48, 1, 1, 0), ("branch5x5_2", 64, 5, 1, 2)],
            [
                ("branch3x3dbl_1", 64, 1, 1, 0),
                ("branch3x3dbl_2", 96, 3, 1, 1),
                ("branch3x3dbl_3", 96, 3, 1, 1),
            ],
        ],
        fid_avg_pool,
        pool_features,
    )


def mixed_b(inputs):
    return Mixed(
        inputs,
        [
            [("branch3x3", 384, 3, 2, 0)],
            [
                ("branch3x3dbl_1", 64, 1, 1, 0),
                ("branch3x3dbl_2", 96, 3, 1, 1),
                ("branch3x3dbl_3", 96, 3, 2, 0),
            ],
        ],
        halving_max_pool,
    )


def mixed_c(inputs, c):
    across, down = ((1, 7), 1, (0, 3)), ((7, 1), 1, (3, 0))
    return Mixed(
        inputs,
        [
            [("branch1x1", 192, 1, 1, 0)],
            [("branch7x7_1", c, 1, 1, 0), ("branch7x7_2", c, *across), ("branch7x7_3", 192, *down)],
            [
                ("branch7x7dbl_1", c, 1, 1, 0),
                ("branch7x7dbl_2", c, *down),
                ("branch7x7dbl_3", c, *across),
                ("branch7x7dbl_4", c, *down),
                ("branch7x7dbl_5", 192, *across),
            ],
        ],
        fid_avg_pool,
        192,
    )


def mixed_d(inputs):
    return Mixed(
        inputs,
        [
            [("branch3x3_1", 192, 1, 1, 0), ("branch3x3_2", 320, 3, 2, 0)],
            [
                ("branch7x7x3_1", 192, 1, 1, 0),
                ("branch7x7x3_2", 192, (1, 7), 1, (0, 3)),
                ("branch7x7x3_3", 192, (7, 1), 1, (3, 0)),
                ("branch7x7x3_4", 192, 3, 2, 0),
            ],
        ],
        halving_max_pool,
    )


def mixed_e(inputs, pool):
    def fork(name):
        return [(f"{name}a", 384, (1, 3), 1, (0, 1)), (f"{name}b", 384, (3, 1), 1, (1, 0))]

    return Mixed(
        inputs,
        [
            [("branch1x1", 320, 1, 1, 0)],
            [("branch3x3_1", 384, 1, 1, 0), fork("branch3x3_2")],
            [
                ("branch3x3dbl_1", 448, 1, 1, 0),
                ("branch3x3dbl_2", 384, 3, 1, 1),
                fork("branch3x3dbl_3"),
            ],
        ],
        pool,
        192,
    )


class Inception3(nn.Module):
    """(B, 3, 299, 299) in [-1, 1] -> (B, 2048) features, (B, 1008) logits."""

    def __init__(self):
        super().__init__()
        self.Conv2d_1a_3x3 = BasicConv2d(3, 32, 3, 2)
        self.Conv2d_2a_3x3 = BasicConv2d(32, 32, 3)
        self.Conv2d_2b_3x3 = BasicConv2d(32, 64, 3, 1, 1)
        self.Conv2d_3b_1x1 = BasicConv2d(64, 80, 1)
        self.Conv2d_4a_3x3 = BasicConv2d(80, 192, 3)
        channels = 192
        for name, make in {
            "Mixed_5b": lambda n: mixed_a(n, 32),
            "Mixed_5c": lambda n: mixed_a(n, 64),
            "Mixed_5d": lambda n: mixed_a(n, 64),
            "Mixed_6a": mixed_b,
            "Mixed_6b": lambda n: mixed_c(n, 128),
            "Mixed_6c": lambda n: mixed_c(n, 160),
            "Mixed_6d": lambda n: mixed_c(n, 160),
            "Mixed_6e": lambda n: mixed_c(n, 192),
            "Mixed_7a": mixed_d,
            "Mixed_7b": lambda n: mixed_e(n, fid_avg_pool),
            "Mixed_7c": lambda n: mixed_e(n, fid_max_pool),
        }.items():
            block = make(channels)
            setattr(self, name, block)
            channels = block.outputs
        self.fc = nn.Linear(2048, 1008)

    def forward(self, x):
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(halving_max_pool(x)))
        x = halving_max_pool(x)
        for name in ("5b", "5c", "5d", "6a", "6b", "6c", "6d", "6e", "7a", "7b", "7c"):
            x = getattr(self, f"Mixed_{name}")(x)
        features = x.mean((2, 3))
        return features, self.fc(features)


def conv_same(x, conv):
    """A convolution with TensorFlow's SAME padding: of an odd total the larger half comes after."""
    padding = []
    for size, kernel, stride in zip(x.shape[:1:-1], conv.kernel_size[::-1], conv.stride[::-1]):
        total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
        padding += [total // 2, total - total // 2]
    return conv(F.pad(x, padding))


class LiteBlock(nn.Module):
    def __init__(self, inputs, outputs, kernel, stride, expansion):
        super().__init__()
        wide = inputs * expansion
        self.expands = expansion > 1
        self.is_residual = stride == 1 and inputs == outputs
        if self.expands:
            self._expand_conv = nn.Conv2d(inputs, wide, 1, bias=False)
            self._bn0 = nn.BatchNorm2d(wide, eps=1e-3)
        self._depthwise_conv = nn.Conv2d(wide, wide, kernel, stride, groups=wide, bias=False)
        self._bn1 = nn.BatchNorm2d(wide, eps=1e-3)
        self._project_conv = nn.Conv2d(wide, outputs, 1, bias=False)
        self._bn2 = nn.BatchNorm2d(outputs, eps=1e-3)

    def forward(self, x):
        y = F.relu6(self._bn0(self._expand_conv(x))) if self.expands else x
        y = F.relu6(self._bn1(conv_same(y, self._depthwise_conv)))
        y = self._bn2(self._project_conv(y))
        return x + y if self.is_residual else y


class EfficientNetLite0(nn.Module):
    """(B, 3, 224, 224) scaled by (x - 127) / 128 -> (B, 1280) features, (B, 1000) logits."""

    def __init__(self):
        super().__init__()
        self._conv_stem = nn.Conv2d(3, 32, 3, 2, bias=False)
        self._bn0 = nn.BatchNorm2d(32, eps=1e-3)
        widths = [16] + [24] * 2 + [40] * 2 + [80] * 3 + [112] * 3 + [192] * 4 + [320]
        kernels = [3] + [3] * 2 + [5] * 2 + [3] * 3 + [5] * 3 + [5] * 4 + [3]
        strides = [1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1, 1, 1, 1]
        self._blocks = nn.ModuleList(
            LiteBlock(before, after, kernel, stride, 1 if i == 0 else 6)
            for i, (before, after, kernel, stride) in enumerate(
                zip([32, *widths], widths, kernels, strides)
            )
        )
        self._conv_head = nn.Conv2d(320, 1280, 1, bias=False)
        self._bn1 = nn.BatchNorm2d(1280, eps=1e-3)
        self._fc = nn.Linear(1280, 1000)

    def forward(self, x):
        x = F.relu6(self._bn0(conv_same(x, self._conv_stem)))
        for block in self._blocks:
            x = block(x)
        features = F.relu6(self._bn1(self._conv_head(x))).mean((2, 3))
        return features, self._fc(features)


def randomise(network, seed=0):
    """Random weights everywhere, and statistics of the norms; activations stay of size one."""
    generator = torch.Generator().manual_seed(seed)
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            fan_in = module.weight[0].numel()
            nn.init.normal_(module.weight, std=(2.0 / fan_in) ** 0.5, generator=generator)
            if module.bias is not None:
                nn.init.normal_(module.bias, generator=generator)
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5, generator=generator)
            nn.init.normal_(module.bias, std=0.3, generator=generator)
            nn.init.normal_(module.running_mean, std=0.3, generator=generator)
            nn.init.uniform_(module.running_var, 0.5, 1.5, generator=generator)
    return network.eval().requires_grad_(False)


def record_outputs(network):
    """Every module's output by its name, in channels-last NumPy, filled when the network runs."""
    outputs = {}

    def hook(name):
        def record(module, inputs, output):
            output = output[0] if isinstance(output, tuple) else output
            outputs[name] = output.movedim(1, -1).numpy() if output.ndim == 4 else output.numpy()

        return record

    for name, module in network.named_modules():
        module.register_forward_hook(hook(name))
    return outputs


def run_with_layers(apply):
    """A Flax network's `apply(params, x)`, jitted: its result, and every module's output."""

    @jax.jit
    def run(params, x):
        layers = {}

        def record(method, args, kwargs, context):
            output = method(*args, **kwargs)
            if context.method_name == "__call__":
                path = "/".join(context.module.path)
                layers[path] = output[0] if isinstance(output, tuple) else output
            return output

        with flax_nn.intercept_methods(record):
            return apply(params, x), layers

    return run
