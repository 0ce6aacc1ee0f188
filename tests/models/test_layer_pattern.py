"""Models of which every k-th layer keeps softmax attention."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors.torch import load_file
from torch_checkpoints import (
    SMALL,
    assert_same_state,
    inputs,
    make_torch,
    rel,
    run_ours,
    run_torch,
    save,
)
from torch_dit import SoftmaxAttention, randomise_

from lit_jax import inherit, models
from lit_jax.models import attention, dit
from lit_jax.models.blocks import ATTENTION, attention_error, attention_outputs
from lit_jax.porting.dit import Overrides, lit_config
from lit_jax.porting.read import read_checkpoint
from lit_jax.porting.torch_checkpoint import PortingError
from lit_jax.porting.write import export_official, export_orbax

HYBRID = dict(depth=4, attention="linear", conv_size=3)
CONFIG = dit.DiTConfig(**SMALL | HYBRID, softmax_every=2, softmax_heads=6)


def make_hybrid():
    """LiT of torch, whose second and fourth block have softmax attention of six heads."""
    model = make_torch(**HYBRID)
    for i in (1, 3):
        model.blocks[i].attn = randomise_(SoftmaxAttention(48, 6), i)
    return model.eval()


def test_a_pattern_goes_in_and_out_and_computes_layer_by_layer(tmp_path):
    model = make_hybrid()
    told = CONFIG.to_json()
    checkpoint = read_checkpoint(save(model, tmp_path / "a.safetensors", **told))
    assert checkpoint.config == CONFIG
    assert checkpoint.params["blocks"]["layer_1"]["attn"]["qkv"]["kernel"].shape == (2, 48, 144)
    x, t, y = inputs({})
    assert rel(run_ours(checkpoint, x, t, y), run_torch(model, x, t, y)) < 2e-5

    export_official(checkpoint.params, tmp_path / "b.safetensors", CONFIG)
    assert_same_state(load_file(tmp_path / "b.safetensors"), model)
    assert not (tmp_path / "lit_torch.py").exists()  # which has no such model
    export_orbax(checkpoint, tmp_path / "orbax")
    again = read_checkpoint(tmp_path / "orbax")
    assert again.config == CONFIG and again.report.checksum == checkpoint.report.checksum
    with pytest.raises(PortingError, match="softmax_every = 2"):
        lit_config(CONFIG)


def fresh(config, seed):
    """Parameters of which no two leaves, and no two layers, are alike."""
    shapes = models.param_shapes(config)
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape, np.float32), shapes)


def test_softmax_layers_are_the_teachers_entirely():
    teacher = fresh(dataclasses.replace(CONFIG, attention="softmax", num_heads=6), 0)
    student = jax.tree.map(jnp.asarray, fresh(CONFIG, 1))
    merged, report = inherit.merge_params(teacher, student, load=("o",))
    merged, before, source = (flatten_dict(tree, sep="/") for tree in (merged, student, teacher))
    for path, leaf in merged.items():
        plain = inherit.plain_path(path)
        layers = slice(int(path[len("blocks/layer_")]), None, 2) if plain != path else slice(None)
        own = "/attn/" in path and "layer_0" in path and "proj" not in path
        wanted = before[path] if own else source[plain][layers]
        np.testing.assert_array_equal(leaf, wanted, err_msg=path)
        assert (path in report.at_init) == own
    assert {path.split("/")[1] for path in report.at_init} == {"layer_0"}

    # One of the same pattern gives all that it has.
    parts = inherit.parts_of(student)
    assert set(parts) == {"q", "k", "v", "o", "conv"}
    other = fresh(CONFIG, 2)
    merged, report = inherit.merge_params(other, student, load=parts)
    jax.tree.map(np.testing.assert_array_equal, merged, other)
    assert not report.at_init and not report.left_behind


def test_a_pattern_costs_what_its_layers_do():
    size = (8, 8)
    linear = dataclasses.replace(CONFIG, softmax_every=0)
    softmax = dataclasses.replace(CONFIG, attention="softmax")
    assert softmax.softmax_every == softmax.softmax_heads == 0
    halves = [each.attention_flops(size) / 2 for each in (linear, softmax)]
    assert CONFIG.attention_flops(size) == sum(halves)
    named = dit.DiTConfig.of_size("XL", attention="linear", softmax_every=4)
    assert (named.num_heads, named.softmax_heads) == (4, 16)
    assert named == dit.DiTConfig.from_json(json.loads(json.dumps(named.to_json())))


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(softmax_every=3), "softmax_every = 3 does not divide the depth 4"),
        (dict(softmax_every=1), "softmax_every must be 0, or a whole number from 2"),
        (dict(softmax_heads=5), "softmax_heads = 5 does not divide the width 48"),
        (dict(softmax_heads=0), "softmax_heads = 0 does not divide the width 48"),
    ],
)
def test_impossible_patterns_are_named(change, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        dataclasses.replace(CONFIG, **change)


def test_the_regression_is_of_the_layers_that_are_not_softmax():
    """As that of a model of linear layers alone, in which the others have no error."""
    config = dataclasses.replace(CONFIG, depth=4)
    student = dit.DiT(config, dtype=jnp.float32)
    params = fresh(config, 3)
    rng = np.random.default_rng(4)
    read, gave = rng.standard_normal((2, 4, 2, 16, 48), np.float32)
    seen = {"blocks": {"read": (read,), "gave": (gave,)}}
    error = attention_error(student, params, seen, (4, 4))

    own = flatten_dict(params["blocks"]["layer_0"]["attn"], sep="/")
    module = attention.make_attention(config.layer(0), dtype=jnp.float32, parent=None)
    expected = []
    for group, layer in enumerate((0, 2)):
        leaves = unflatten_dict({path: leaf[group] for path, leaf in own.items()}, sep="/")
        out = module.apply({"params": leaves}, jnp.asarray(read[layer]), (4, 4))
        square = ((np.float64(out) - gave[layer]) ** 2).mean(axis=(1, 2))
        expected.append(square / (np.float64(gave[layer]) ** 2).mean())
    np.testing.assert_allclose(error, np.mean(expected, axis=0), rtol=1e-4)
    assert ATTENTION not in params


def test_each_layer_reads_its_own_input():
    """Layers of two kinds, group after group, are those applied one by one."""
    student = dit.DiT(CONFIG, dtype=jnp.float32)
    params = fresh(CONFIG, 5)
    read = np.random.default_rng(6).standard_normal((4, 2, 16, 48), np.float32)
    outputs = attention_outputs(student, params, read, (4, 4))
    for layer in range(4):
        leaves = params["blocks"][f"layer_{layer % 2}"]["attn"]
        leaves = jax.tree.map(lambda leaf, group=layer // 2: leaf[group], leaves)
        config = CONFIG.layer(layer)
        assert config.attention == ("softmax" if layer % 2 else "linear")
        module = attention.make_attention(config, dtype=jnp.float32, parent=None)
        expected = module.apply({"params": leaves}, jnp.asarray(read[layer]), (4, 4))
        scale = float(jnp.abs(expected).max())
        np.testing.assert_allclose(outputs[layer], expected, atol=1e-5 * scale)


def test_a_bare_file_with_two_attentions_is_refused(tmp_path):
    path = save(make_hybrid(), tmp_path / "a.pt")
    with pytest.raises(PortingError):
        read_checkpoint(path, overrides=Overrides(num_heads=3))
