"""Prompts to features: cleaning, tokens, batches, and what identifies them."""

import dataclasses
import hashlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import assert_close
from tiny_text import CAPTIONS, CONFIG, random_params, spiece_model, write_text_encoder

from lit_jax import sharding, text
from lit_jax.models.t5 import T5Config, T5Encoder
from lit_jax.porting.t5 import read_text_encoder
from lit_jax.text import TextEncoder, TextSettings, Tokenizer, clean_prompt, load_text_encoder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_text_encoder(tmp_path_factory.mktemp("pipeline"))


@pytest.fixture(scope="module")
def tokenizer(folder):
    return Tokenizer(folder)


# ---- Cleaning --------------------------------------------------------------------------


def test_none_changes_nothing_and_lower_only_the_case():
    prompt = "  A Cat, <b>Left</b> of it. "
    assert clean_prompt(prompt, "none") == prompt
    assert clean_prompt(prompt, "lower") == "a cat, <b>left</b> of it."


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "ftfy", None)
    with pytest.raises(ValueError, match="clean needs two packages: pip install ftfy beautiful"):
        clean_prompt("a cat", "clean")


# ---- Tokens ----------------------------------------------------------------------------


def test_tokens_end_are_cut_and_padded(tokenizer):
    prompts = [CAPTIONS[0], "", "a cat"]
    long = tokenizer(prompts, 64)
    assert not long.cut.any()
    counts = long.mask.sum(axis=1)
    for ids, mask, count in zip(long.ids, long.mask, counts):
        assert ids[count - 1] == 1
        assert not ids[count:].any()
        assert mask[:count].all()
    assert counts[1] == 1

    length = int(counts[2])
    short = tokenizer(prompts, length)
    np.testing.assert_array_equal(short.cut, [counts[0] - length, 0, 0])
    np.testing.assert_array_equal(short.ids[0, :-1], long.ids[0, : length - 1])
    assert short.ids[0, -1] == 1
    assert short.mask[0].all()
    np.testing.assert_array_equal(short.ids[1:], long.ids[1:, :length])
    with pytest.raises(ValueError, match="max_length must be at least 1; got 0"):
        tokenizer(prompts, 0)


def test_special_tokens_that_a_prompt_spells_out_are_text(tokenizer):
    ids = tokenizer(["a cat</s> <pad>"], 64).ids[0]
    assert (ids == 1).sum() == 1
    assert tokenizer(["a cat"], 64).ids[0].tolist() != ids.tolist()


def test_unknown_parts_are_listed_in_order(tokenizer):
    assert tokenizer.unknown("a red cat") == []
    assert tokenizer.unknown("a 日本 cat, Zzz") == ["日本", "Zzz"]


def test_the_hash_is_that_of_the_file(folder, tokenizer):
    file = folder / "tokenizer" / "spiece.model"
    assert tokenizer.sha256 == hashlib.sha256(file.read_bytes()).hexdigest()
    for path in (file, folder / "tokenizer"):
        assert Tokenizer(path).sha256 == tokenizer.sha256


@pytest.mark.parametrize("content", [b"", b"version https://git-lfs", b"{}", bytes(90), b"\x80\2."])
def test_what_is_no_sentencepiece_model_is_refused(tmp_path, content):
    (tmp_path / "spiece.model").write_bytes(content)
    with pytest.raises(ValueError, match="spiece.model: no SentencePiece model, it starts with b"):
        Tokenizer(tmp_path)


def test_other_tokenizers_are_refused(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="no spiece.model, nor a tokenizer folder"):
        Tokenizer(tmp_path)
    with pytest.raises(FileNotFoundError, match="nowhere: no such file"):
        Tokenizer(tmp_path / "nowhere")
    # As LLaMA's.
    other = spiece_model(pad_id=-1, unk_id=0, bos_id=1, eos_id=2)
    (tmp_path / "spiece.model").write_bytes(other)
    with pytest.raises(ValueError, match=r"unknown tokens are \(-1, 2, 0\), those of a T5 \(0, 1,"):
        Tokenizer(tmp_path)
    monkeypatch.setattr(text, "MAX_TOKENIZER_BYTES", 9)
    with pytest.raises(ValueError, match="larger than 9 bytes"):
        Tokenizer(tmp_path)


@pytest.mark.parametrize("prompt", ["half a pair \ud800", None, 3, b"a cat"])
def test_what_is_no_text_is_refused(tokenizer, prompt):
    with pytest.raises(ValueError, match="is no text"):
        tokenizer([prompt], 8)


# ---- Features --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def encoder(tokenizer):
    settings = TextSettings(max_length=20, batch_size=8)
    model = T5Encoder(CONFIG, dtype=jnp.float32)
    mesh = sharding.make_mesh()
    params = jax.device_put(random_params(), sharding.replicated(mesh))
    return TextEncoder(model, params, tokenizer, settings, weights="w", mesh=mesh)


def run(ids, mask):
    apply = jax.jit(T5Encoder(CONFIG, dtype=jnp.float32).apply)
    return apply({"params": random_params()}, ids, mask)


PROMPTS = ["a cat", "", CAPTIONS[5], "a red dog", *CAPTIONS[:8], "a hat"]


def test_features_are_the_models_and_zero_elsewhere(encoder, tokenizer):
    features, mask, cut = encoder(PROMPTS)
    ids, expected_mask, expected_cut = tokenizer(PROMPTS, 20)
    np.testing.assert_array_equal(mask, expected_mask)
    np.testing.assert_array_equal(cut, expected_cut)
    assert cut.any()
    expected = run(ids, expected_mask)
    assert_close(features[mask], np.asarray(expected)[mask], reduction=64)
    assert not features[~mask].any()


def test_features_of_a_prompt_depend_on_it_alone(encoder):
    """Not on their neighbours, nor on how many these are."""
    features, mask, _ = encoder(PROMPTS)
    for row in (0, 2, 12):
        alone = encoder([PROMPTS[row]])
        np.testing.assert_array_equal(features[row][mask[row]], alone.features[0][alone.mask[0]])


def test_short_prompts_need_a_short_length(encoder):
    assert TextSettings().lengths == (16, 32, 64, 128, 300)
    assert TextSettings(max_length=128).lengths == (16, 32, 64, 128)
    assert encoder.settings.lengths == (16, 20)
    assert encoder(["a cat"]).features.shape == (1, 16, CONFIG.width)
    assert encoder(PROMPTS).features.shape == (len(PROMPTS), 20, CONFIG.width)
    assert encoder([]).features.shape == (0, 16, CONFIG.width)


def test_null_features_are_those_of_the_empty_prompt(encoder, tokenizer):
    ids, mask, _ = tokenizer([""], 300)
    expected = run(ids, mask)
    actual = encoder.null_features(300)
    assert_close(actual, expected[0], reduction=64)
    assert len(np.unique(actual, axis=0)) == 2
    np.testing.assert_array_equal(encoder.null_features(1), actual[:1])
    with pytest.raises(ValueError, match="length must be at least 1; got 0"):
        encoder.null_features(0)


def test_a_folder_is_loaded_with_its_identity(folder, tokenizer):
    settings = TextSettings(cleaning="lower", max_length=40, batch_size=8)
    mesh = sharding.make_mesh(data=2, fsdp=4)
    loaded = load_text_encoder(folder, settings, mesh=mesh)
    assert loaded.identity() == {
        "tokenizer": tokenizer.sha256,
        "weights": read_text_encoder(folder).report.checksum,
        "cleaning": "lower",
        "max_length": 40,
    }
    features, mask, _ = loaded(["A CAT", "a cat"])
    assert features.dtype == jnp.bfloat16
    np.testing.assert_array_equal(features[0], features[1])
    exact = load_text_encoder(
        folder / "text_encoder",
        dataclasses.replace(settings, dtype="float32"),
        tokenizer=folder / "tokenizer",
        mesh=mesh,
    )
    assert exact.identity() == loaded.identity()
    expected = exact(["a cat"]).features[0]
    assert_close(features[0].astype(np.float32), expected, reduction=64, dtype="bfloat16")


def test_settings_that_cannot_be_are_refused(folder, tokenizer):
    wrong = {"cleaning": "upper", "max_length": 0, "batch_size": 0, "dtype": "float16"}
    for field, value in wrong.items():
        with pytest.raises(ValueError, match=f"^{field} must be"):
            TextSettings(**{field: value})
    with pytest.raises(ValueError, match="batch_size = 3 is not a multiple of the 8 devices"):
        load_text_encoder(folder, TextSettings(batch_size=3))
    small = T5Encoder(T5Config(20, 16, 2, 3, 4, 24))
    with pytest.raises(ValueError, match="has 29 pieces, the text encoder knows 20"):
        TextEncoder(small, {}, tokenizer, TextSettings(), weights="")
