"""A text-to-image model as a pipeline's folder, as on the Hub.

FOLDER/tokenizer/spiece.model
FOLDER/text_encoder/    as transformers.T5EncoderModel reads it
FOLDER/transformer/     as diffusers.PixArtTransformer2DModel reads it
"""

from typing import Any

from etils import epath

from lit_jax.models.pixart_t5 import PixArtT5Config
from lit_jax.porting import pixart
from lit_jax.porting.t5 import export_text_encoder
from lit_jax.porting.write import export_diffusers, whole_folder
from lit_jax.text import TOKENIZER_FILE, Tokenizer


def export_pipeline(
    params: Any, path: epath.PathLike, config: PixArtT5Config, tokenizer: Tokenizer
) -> None:
    """Writes the two models of a PixArt that was trained with its text encoder, and the tokenizer.

    The folder appears as a whole or not at all. It has no null caption: that is what the text
    encoder makes of "".

    Args: params: the tree of `models.pixart_t5`, arrays or leaves.
    Raises: PortingError as `export_diffusers`; ValueError where the tokenizer is another one.
    """
    if tokenizer.vocab_size > config.text_vocab_size:
        raise ValueError(
            f"tokenizer has {tokenizer.vocab_size} pieces, the text encoder knows "
            f"{config.text_vocab_size}"
        )
    pixart.check_diffusers(config.transformer)
    with whole_folder(path) as folder:
        (folder / "tokenizer").mkdir()
        (folder / "tokenizer" / TOKENIZER_FILE).write_bytes(tokenizer.content)
        export_text_encoder(params["text_encoder"], folder / "text_encoder", config.text_encoder)
        export_diffusers(params["transformer"], folder / "transformer", config.transformer)
