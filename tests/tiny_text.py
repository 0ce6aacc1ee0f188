"""A tokenizer and a T5 of a few thousand random parameters, in the layout of a pipeline."""

import functools
import io

import jax
import numpy as np
import sentencepiece

from lit_jax.models import t5
from lit_jax.porting.t5 import export_text_encoder

CAPTIONS = [
    f"a {color} {thing}, {place} of the {other}"
    for color in ("red", "blue", "green")
    for thing in ("cat", "dog", "house")
    for place in ("left", "right", "on top")
    for other in ("tree", "car", "hat")
]
CONFIG = t5.T5Config(vocab_size=64, width=16, depth=2, num_heads=3, head_width=4, mlp_width=24)


@functools.cache
def spiece_model(pad_id=0, eos_id=1, unk_id=2, bos_id=-1) -> bytes:
    """The file of a tokenizer that was trained on the captions; T5's special tokens."""
    file = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CAPTIONS),
        model_writer=file,
        vocab_size=48,
        hard_vocab_limit=False,  # fewer, where the captions have no more
        pad_id=pad_id,
        eos_id=eos_id,
        unk_id=unk_id,
        bos_id=bos_id,
        num_threads=1,
        minloglevel=2,
    )
    return file.getvalue()


def random_params(config=CONFIG, seed=0):
    """Random everywhere: fresh norms are all ones and would hide one that is left out."""
    rng = np.random.default_rng(seed)

    def draw(leaf):
        # The last axis but one is the fan-in of a kernel; a norm has none.
        scale = leaf.shape[-2] ** -0.5 if leaf.ndim == 3 else 1.0
        return (scale * rng.standard_normal(leaf.shape)).astype(np.float32)

    return jax.tree.map(draw, t5.param_shapes(config))


def write_text_encoder(folder, seed=0):
    """Writes `text_encoder` and `tokenizer` into a folder and returns that."""
    export_text_encoder(random_params(seed=seed), folder / "text_encoder", CONFIG)
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "spiece.model").write_bytes(spiece_model())
    return folder
