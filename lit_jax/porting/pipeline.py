"""A text-to-image model as a pipeline's folder, as on the Hub, for diffusers.

FOLDER/model_index.json   names the parts
FOLDER/scheduler/         the settings of one of diffusers' schedulers
FOLDER/transformer/       PixArtTransformer2DModel; of a LiT official keys, with its code
FOLDER/tokenizer/         T5Tokenizer: spiece.model
FOLDER/text_encoder/      T5EncoderModel
FOLDER/vae/               AutoencoderKL
FOLDER/lit_text_pipeline.py, FOLDER/README.md: of a LiT, whose code diffusers does not have
"""

import dataclasses
import json
from typing import Any

from etils import epath

from lit_jax.models.pixart import PixArtConfig
from lit_jax.models.t5 import T5Config
from lit_jax.porting import pixart
from lit_jax.porting.lit_pipeline import ASSETS, DIFFUSERS_VERSION, WEIGHTS, scheduler_config
from lit_jax.porting.t5 import export_text_encoder
from lit_jax.porting.torch_checkpoint import PortingError
from lit_jax.porting.torch_file import write_safetensors
from lit_jax.porting.write import export_autoencoder, export_diffusers, whole_folder, write_json
from lit_jax.samplers import SamplerSettings
from lit_jax.text import TOKENIZER_FILE, Tokenizer

# Those of our samplers that PixArtSigmaPipeline draws with: it drops the predicted variance.
SAMPLERS = ("dpm++", "ddim")
EXTRA_IDS = 100  # of a T5, behind its tokenizer's pieces


@dataclasses.dataclass(frozen=True)
class Parts:
    """What a folder holds beside the transformer; None: it goes without.

    Attributes:
      sampler: what the scheduler does. A LiT's call that names nothing else draws with it.
      num_steps: of the process that the model was trained on.
      tokenizer: with the bytes of its file.
      text_encoder: the tree of `models.t5`, arrays or leaves, and its architecture.
      autoencoder: the tree of `models.autoencoder`, and what `AutoencoderCheckpoint` says of it.
      cleaning: of a LiT's prompts, see `text.clean_prompt`.
      card: the text of a LiT's README.md.
    """

    sampler: SamplerSettings
    num_steps: int
    tokenizer: Tokenizer | None = None
    text_encoder: tuple[Any, T5Config] | None = None
    autoencoder: tuple[Any, dict[str, Any]] | None = None
    cleaning: str = "none"
    card: str = ""


def export_pipeline(params: Any, path: epath.PathLike, config: PixArtConfig, parts: Parts) -> None:
    """Writes the folder, as a whole or not at all.

    A PixArt is one for PixArtSigmaPipeline. It has no null caption: that is what the text encoder
    makes of "". A LiT is one for DiffusionPipeline with trust_remote_code=True.

    Args: params: the tree of `models.pixart`, arrays or leaves.
    Raises: PortingError as `export_diffusers`, or for parts that do not fit; ValueError, whose
      text starts with the setting's name, for a sampler that the pipeline does not have.
    """
    is_lit = config.attention == "linear"
    _check_parts(config, parts)
    check_sampler(config, parts)
    kind, scheduler = _scheduler(parts)
    with whole_folder(path) as folder:
        if is_lit:
            _write_lit(params, folder, config, parts.card)
        else:
            export_diffusers(params, folder / "transformer", config)
        (folder / "scheduler").mkdir()
        write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
        if parts.tokenizer:
            _write_tokenizer(folder / "tokenizer", parts)
        if parts.text_encoder:
            text_params, text_config = parts.text_encoder
            export_text_encoder(text_params, folder / "text_encoder", text_config)
        if parts.autoencoder:
            vae_params, architecture = parts.autoencoder
            export_autoencoder(vae_params, folder / "vae", architecture)
        write_json(folder / "model_index.json", _index(config, parts, kind))


def _index(config, parts, scheduler):
    """model_index.json: where each part's class is, and null for one that is not there."""
    nothing = [None, None]
    index: dict[str, Any] = {
        "_class_name": "PixArtSigmaPipeline",
        "_diffusers_version": DIFFUSERS_VERSION,
        "scheduler": ["diffusers", scheduler],
        "transformer": ["diffusers", "PixArtTransformer2DModel"],
        "tokenizer": ["transformers", "T5Tokenizer"] if parts.tokenizer else nothing,
        "text_encoder": ["transformers", "T5EncoderModel"] if parts.text_encoder else nothing,
        "vae": ["diffusers", "AutoencoderKL"] if parts.autoencoder else nothing,
    }
    if config.attention != "linear":
        return index
    return index | {
        "_class_name": ["lit_text_pipeline", "LiTTextPipeline"],
        "transformer": ["lit_text_transformer", pixart.LIT_CLASS],
        "num_inference_steps": parts.sampler.steps,
        "guidance_scale": parts.sampler.cfg_scale,
        "eta": parts.sampler.eta,
        "cleaning": parts.cleaning,
        "max_sequence_length": config.caption_length,
    }


def _write_lit(params, folder, config, card):
    """transformer/, and the code that diffusers does not have."""
    model = folder / "transformer"
    model.mkdir()
    write_json(model / "config.json", pixart.lit_config(config))
    # Our own reader learns the architecture from here.
    metadata = {"format": "pt", "architecture": json.dumps(config.to_json())}
    write_safetensors(model / WEIGHTS, pixart.official_tensors(params, config), metadata)
    for name in ("lit_text_transformer.py", "lit_torch.py"):
        (model / name).write_text((ASSETS / name).read_text())
    pipeline = "lit_text_pipeline.py"
    (folder / pipeline).write_text((ASSETS / pipeline).read_text())
    (folder / "README.md").write_text(card)


def _check_parts(config, parts):
    """Raises where the parts are not those of one pipeline."""
    if parts.text_encoder:
        text = parts.text_encoder[1]
        if text.width != config.caption_channels:
            raise PortingError(
                f"the text encoder's features have {text.width} channels, the transformer takes "
                f"{config.caption_channels}"
            )
        if parts.tokenizer and parts.tokenizer.vocab_size > text.vocab_size:
            raise PortingError(
                f"the tokenizer has {parts.tokenizer.vocab_size} pieces, the text encoder knows "
                f"{text.vocab_size}"
            )
    if parts.autoencoder:
        about = parts.autoencoder[1]
        if about["latent_channels"] != config.in_channels:
            raise PortingError(
                f"the autoencoder's latents have {about['latent_channels']} channels, the "
                f"transformer's {config.in_channels}"
            )
        if about["shift_factor"]:
            raise PortingError(
                f"the autoencoder shifts its latents by {about['shift_factor']}, which "
                "PixArtSigmaPipeline does not"
            )


def check_sampler(config: PixArtConfig, parts: Parts) -> None:
    """Raises ValueError, with the setting's name first, for what the pipeline does not draw with.

    A PixArt's calls choose the guidance themselves.
    """
    settings = parts.sampler
    if settings.sampler not in SAMPLERS:
        raise ValueError(
            f"sampler = {settings.sampler} is none of PixArtSigmaPipeline's, which drops the "
            f"predicted variance; choose {' or '.join(SAMPLERS)}"
        )
    _scheduler(parts)
    if config.attention != "linear" or settings.cfg_scale == 1:
        return
    low, high = settings.cfg_interval
    if low > 0 or high < parts.num_steps - 1:
        raise ValueError(
            f"cfg_interval = {settings.cfg_interval}, but PixArtSigmaPipeline guides at every step"
        )
    if settings.cfg_channels != "all":
        raise ValueError(
            f"cfg_channels = {settings.cfg_channels}, but PixArtSigmaPipeline guides all of them; "
            f"set it to all"
        )


def _scheduler(parts):
    settings = parts.sampler
    if settings.spacing == "time_uniform":
        # PixArt's own grid, between whole timesteps. Its published folders have this one.
        settings = dataclasses.replace(settings, spacing="linspace")
    return scheduler_config(settings, parts.num_steps)


def _write_tokenizer(folder, parts):
    rows = parts.text_encoder[1].vocab_size if parts.text_encoder else None
    pieces = parts.tokenizer.vocab_size
    about = {
        "tokenizer_class": "T5Tokenizer",
        # No more than the text encoder has rows for.
        "extra_ids": EXTRA_IDS if rows is None else min(EXTRA_IDS, rows - pieces),
        "pad_token": "<pad>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
    }
    folder.mkdir()
    (folder / TOKENIZER_FILE).write_bytes(parts.tokenizer.content)
    write_json(folder / "tokenizer_config.json", about)
