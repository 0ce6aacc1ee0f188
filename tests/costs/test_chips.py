"""The table of chips, where a second source can be asked."""

import pytest

from lit_jax.costs import chips


@pytest.mark.parametrize(
    "device_kind, expected",
    [
        ("TPU v5 lite", 197e12),
        ("TPU v5e", 197e12),
        ("TPU v5", 459e12),
        ("TPU7x", 1153.5e12),  # of one of the chip's two devices
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("cpu", None),
    ],
)
def test_the_peak_is_known_by_the_name_that_jax_gives_a_chip(device_kind, expected):
    assert chips.peak_flops(device_kind) == expected
