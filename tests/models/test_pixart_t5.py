"""A PixArt that learns together with its text encoder, and the two models it is written as."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from oracles import assert_close
from tiny_text import CAPTIONS, spiece_model

from lit_jax import models
from lit_jax.models.pixart import PixArt
from lit_jax.models.pixart_t5 import PixArtT5, PixArtT5Config
from lit_jax.models.t5 import T5Encoder
from lit_jax.porting import pixart, pixart_t5
from lit_jax.porting.pipeline import Parts, export_pipeline
from lit_jax.porting.read import read_checkpoint
from lit_jax.porting.torch_checkpoint import PortingError
from lit_jax.samplers import SamplerSettings
from lit_jax.text import TextSettings, Tokenizer, load_text_encoder

CONFIG = PixArtT5Config(
    depth=2, width=16, num_heads=2, cross_heads=2, patch_size=2, in_channels=3, grid=(4, 4),
    caption_channels=12, caption_length=20, position_base=4, position_scale=0.125,
    text_vocab_size=64, text_depth=2, text_num_heads=3, text_head_width=4, text_mlp_width=24,
)  # fmt: skip
NULL = "y_embedder/y_embedding"
DROP = np.array([False, True, False])


@pytest.fixture(scope="module")
def params():
    """Random everywhere."""
    rng = np.random.default_rng(0)

    def draw(leaf):
        scale = leaf.shape[-2] ** -0.5 if leaf.ndim > 1 else 0.5
        return jnp.asarray(scale * rng.standard_normal(leaf.shape), jnp.float32)

    return jax.tree.map(draw, models.param_shapes(CONFIG))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "spiece.model"
    path.write_bytes(spiece_model())
    return Tokenizer(path)


@pytest.fixture(scope="module")
def told(tokenizer):
    ids, mask, _ = tokenizer([CAPTIONS[0], CAPTIONS[50], "a cat"], CONFIG.caption_length)
    return {"caption_ids": ids, "caption_mask": mask}


@pytest.fixture(scope="module")
def images():
    rng = np.random.default_rng(1)
    x = rng.standard_normal((3, 8, 8, 3)).astype(np.float32)
    return x, np.array([0.0, 400.0, 999.0], np.float32)


@pytest.fixture(scope="module")
def outputs(params, told, images):
    apply = jax.jit(PixArtT5(CONFIG, jnp.float32).apply)
    return apply({"params": params}, *images, told, DROP)


def test_it_is_a_pixart_that_is_told_its_text_encoders_features(params, told, images, outputs):
    """A row that is dropped gets those of "", padding's too, under its own caption's mask."""
    ids = np.array(told["caption_ids"])
    mask = np.array(told["caption_mask"])
    ids[1] = 0
    ids[1, 0] = 1
    readable = mask.copy()
    readable[1] = np.arange(20) == 0
    encoder = T5Encoder(CONFIG.text_encoder, jnp.float32)
    features = encoder.apply({"params": params["text_encoder"]}, ids, readable)
    condition = {"caption": features, "caption_mask": mask}
    model = PixArt(CONFIG.transformer, jnp.float32)
    expected = model.apply({"params": params["transformer"]}, *images, condition)
    # The same sums; XLA orders those of another program otherwise.
    assert_close(outputs, expected)


def test_the_mask_of_nothing_may_be_its_own(params, told, images, outputs):
    own = told | {"null_mask": np.tile(np.arange(20) == 0, (3, 1))}
    model = PixArtT5(CONFIG, jnp.float32)
    found = model.apply({"params": params}, *images, own, DROP)
    assert_close(found[::2], outputs[::2])
    assert np.abs(found[1] - outputs[1]).max() > 1e-2


def test_all_but_the_null_caption_learns(params, told, images):
    def loss(params):
        output = PixArtT5(CONFIG, jnp.float32).apply({"params": params}, *images, told, DROP)
        return jnp.sum(output**2)

    grads = flatten_dict(jax.jit(jax.grad(loss))(params), sep="/")
    still = [path for path, grad in grads.items() if not np.any(grad)]
    assert still == list(CONFIG.frozen) == [f"transformer/{NULL}"]


def test_multiply_adds_are_those_of_both_models():
    S, C, F, inner = 20, 12, 24, 12
    projections = 4 * S * C * inner
    attention = 2 * S * S * inner
    layer = projections + attention + 3 * S * C * F
    both = CONFIG.transformer.forward_flops((8, 8)) + 2 * 2 * layer
    assert CONFIG.forward_flops((8, 8)) == both


def test_the_pipelines_folder_computes_the_same(params, tokenizer, told, images, outputs, tmp_path):
    """With the null caption that its text encoder makes."""
    folder = tmp_path / "pipeline"
    export(params, folder, CONFIG, tokenizer)
    settings = TextSettings(max_length=20, batch_size=8, dtype="float32")
    encoder = load_text_encoder(folder, settings)
    overrides = pixart.Overrides(null_caption=encoder.null_features(2))
    found = read_checkpoint(folder, overrides=overrides)
    features, mask, _ = encoder([CAPTIONS[0], CAPTIONS[50], "a cat"])
    condition = {"caption": features, "caption_mask": mask}
    loaded = jax.tree.map(np.asarray, found.params)
    output = PixArt(found.config, jnp.float32).apply({"params": loaded}, *images, condition, DROP)
    assert_close(output, outputs)
    assert (folder / "tokenizer" / "spiece.model").read_bytes() == spiece_model()


def export(params, path, config, tokenizer):
    text = (params["text_encoder"], config.text_encoder)
    parts = Parts(SamplerSettings(sampler="dpm++"), 1000, tokenizer, text)
    export_pipeline(params["transformer"], path, config.transformer, parts)


def test_a_pipeline_that_cannot_be_leaves_nothing(params, tokenizer, tmp_path):
    small = PixArtT5Config.from_json(CONFIG.to_json() | {"text_vocab_size": 8})
    with pytest.raises(PortingError, match="tokenizer has .* pieces, the text encoder knows 8"):
        export(params, tmp_path / "out", small, tokenizer)
    heads = PixArtT5Config.from_json(CONFIG.to_json() | {"cross_heads": 1})
    with pytest.raises(PortingError, match="diffusers has one number of heads"):
        export(params, tmp_path / "out", heads, tokenizer)
    assert not list(tmp_path.iterdir())


def test_no_layout_of_torch_holds_both():
    with pytest.raises(PortingError, match="layout = diffusers"):
        pixart_t5.check_official(CONFIG)
    assert pixart_t5.recognises(["text_encoder/shared/embedding", "transformer/x_embedder/bias"])
    assert not pixart_t5.recognises(["x_embedder/bias", "y_embedder/y_proj/fc1/kernel"])
