"""From prompts to features: cleaning, tokens, and T5 over the mesh.

A cached feature is of use only where the same tokenizer, weights, cleaning and length made
it: `TextEncoder.identity` names them.
"""

import dataclasses
import hashlib
import html
import math
import re
import urllib.parse
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import sentencepiece
from etils import epath
from jax.experimental import multihost_utils

from lit_jax import ranges, sharding
from lit_jax.models.t5 import DTYPES, END, PAD, T5Config, T5Encoder
from lit_jax.porting.t5 import load_encoder_params, read_text_encoder

CLEANINGS = ("none", "lower", "clean")
UNKNOWN = 2  # beside PAD and END
TOKENIZER_FILE = "spiece.model"
MAX_TOKENIZER_BYTES = 64 << 20  # T5's has 0.8 MB, that of a hundred languages 4 MB
# Token counts that a batch is padded to, so that there are few programs.
LENGTHS = (16, 32, 64, 128, 300)


# ---- Cleaning --------------------------------------------------------------------------


def clean_prompt(prompt: str, cleaning: str) -> str:
    """A prompt as the tokenizer gets it.

    Args: cleaning: what was done to the captions in training.
      none: as it is, which PixArt was trained with.
      lower: lower case, which diffusers does where it cannot clean.
      clean: diffusers' cleaning of captions from the web; needs ftfy and beautifulsoup4.
    Raises: ValueError for another cleaning, or where a package is missing.
    """
    if cleaning == "none":
        return prompt
    if cleaning == "lower":
        return prompt.lower().strip()
    if cleaning != "clean":
        raise ValueError(f"cleaning must be one of {', '.join(CLEANINGS)}; got {cleaning!r}")
    # Twice, as diffusers: what one pass leaves may be what another one drops.
    return _clean(_clean(prompt))


_DOMAIN = r"[a-zA-Z0-9.\-]+[.](?:com|co|ru|net|org|edu|gov|it)[\w/-]*\b\/?(?!@)"
_FILE_TYPES = "png|jpg|jpeg|bmp|webp|eps|pdf|apk|mp4"
# What is replaced by what, in this order, before HTML is made text.
_ADDRESSES = (
    ("<person>", "person"),
    (rf"\b(https?:(\/{{1,3}}|[a-zA-Z0-9%])|{_DOMAIN})", ""),
    (rf"\b(www:(\/{{1,3}}|[a-zA-Z0-9%])|{_DOMAIN})", ""),
)
# After it.
_SYMBOLS = (
    (r"@\w+\b", ""),  # names of users
    (r"[\u31c0-\u9fff]+", ""),  # Chinese characters
    (
        r"[-\u058A\u05BE\u1400\u1806\u2010-\u2015\u2E17\u2E1A\u2E3A\u2E3B\u2E40\u301C\u3030"
        r"\u30A0\uFE31\uFE32\uFE58\uFE63\uFF0D]+",
        "-",
    ),
    ("[`´«»“”¨]", '"'),
    ("[‘’]", "'"),
    ("&quot;?", ""),
    ("&amp", ""),
    (r"\d{1,3}(\.\d{1,3}){3}", " "),  # IP addresses
    (r"\d:\d\d\s+$", ""),
    (r"\\n", " "),
    (r"#\d{1,3}\b", ""),
    (r"#\d{5,}\b", ""),
    (r"\b\d{6,}\b", ""),
    (rf"\S+\.({_FILE_TYPES})", ""),
    ("[\"']{2,}", '"'),
    (r"\.{2,}", " "),
    (r"[#®•©™&@·º½¾¿¡§~)(\][}{|\\/*]+", " "),
    (r"\s+\.\s+", " "),
)
# Last, when mojibake is mended.
_WORDS = (
    (r"\b[a-zA-Z]{1,3}\d{3,15}\b", ""),  # numbers of articles
    (r"\b[a-zA-Z]+\d+[a-zA-Z]+\b", ""),
    (r"\b\d+[a-zA-Z]+\d+\b", ""),
    (r"(worldwide\s+)?(free\s+)?shipping", ""),
    (r"(free\s)?download(\sfree)?", ""),
    (r"\bclick\b\s(for|on)\s\w+", ""),
    (rf"\b({_FILE_TYPES})(\simages?)?", ""),
    (r"\bpage\s+\d+\b", ""),
    (r"\b\d*[a-zA-Z]+\d+[a-zA-Z]+\d+[a-zA-Z\d]*\b", " "),
    (r"\b\d+\.?\d*[xх×]\d+\.?\d*\b", ""),  # sizes; the second x is Cyrillic
    (r"\b\s+:\s+", ": "),
    (r"(\D[,./])\b", r"\1 "),
    (r"\s+", " "),
    (r"^[\"']([\w\W]+)[\"']$", r"\1"),
    (r"^['_,\-:;]", ""),
    (r"['_,\-:+]$", ""),
    (r"^\.\S+$", ""),
)


def _clean(text):
    try:
        import bs4
        import ftfy
    except ImportError as error:
        raise ValueError(
            "cleaning = clean needs two packages: pip install ftfy beautifulsoup4"
        ) from error

    text = urllib.parse.unquote_plus(text).strip().lower()
    text = _replace(text, _ADDRESSES)
    text = bs4.BeautifulSoup(text, features="html.parser").text
    text = _replace(text, _SYMBOLS)
    # The name of a file, not of a thing with a hyphen.
    if len(re.findall("[-_]", text)) > 3:
        text = re.sub("[-_]", " ", text)
    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return _replace(text, _WORDS).strip()


def _replace(text, pairs):
    for pattern, replacement in pairs:
        text = re.sub(pattern, replacement, text)
    return text


# ---- Tokens ----------------------------------------------------------------------------


class Tokens(NamedTuple):
    """The tokens of n prompts, padded to one length.

    Attributes:
        ids: (n, S) int32, each row with the end token after the prompt's.
        mask: (n, S) bool, False where there is padding.
        cut: (n,) int32, how many tokens of each prompt found no place.
    """

    ids: np.ndarray
    mask: np.ndarray
    cut: np.ndarray


class Tokenizer:
    """T5's tokenizer, from the `spiece.model` that comes with every T5.

    It agrees with that of transformers but for special tokens that a prompt spells out
    ("</s>"): here these are text.

    Args: path: the file, the folder that holds it, or a pipeline with such a `tokenizer`.
    Raises: ValueError for a file that is no SentencePiece model, or not one of a T5;
      FileNotFoundError.
    """

    def __init__(self, path: epath.PathLike):
        path = _tokenizer_file(epath.Path(path))
        if path.stat().length > MAX_TOKENIZER_BYTES:
            raise ValueError(f"{path}: larger than {MAX_TOKENIZER_BYTES} bytes: no tokenizer")
        content = path.read_bytes()
        self._pieces = _processor(content, path)
        self.content = content
        self.sha256 = hashlib.sha256(content).hexdigest()
        self.vocab_size = self._pieces.get_piece_size()
        found = (self._pieces.pad_id(), self._pieces.eos_id(), self._pieces.unk_id())
        if found != (PAD, END, UNKNOWN):
            raise ValueError(
                f"{path}: its padding, end and unknown tokens are {found}, those of a T5 "
                f"{(PAD, END, UNKNOWN)}"
            )

    def __call__(self, prompts: Sequence[str], max_length: int) -> Tokens:
        """The tokens of cleaned prompts, padded to max_length.

        Raises: ValueError for a prompt that is no text, or a max_length below 1.
        """
        if max_length < 1:
            raise ValueError(f"max_length must be at least 1; got {max_length}")
        ids = np.full((len(prompts), max_length), PAD, np.int32)
        mask = np.zeros(ids.shape, bool)
        cut = np.zeros(len(prompts), np.int32)
        for row, prompt in enumerate(prompts):
            pieces = self._encode(prompt)
            kept = pieces[: max_length - 1]
            ids[row, : len(kept) + 1] = [*kept, END]
            mask[row, : len(kept) + 1] = True
            cut[row] = len(pieces) - len(kept)
        return Tokens(ids, mask, cut)

    def unknown(self, prompt: str) -> list[str]:
        """The words of a prompt that the vocabulary does not wholly have, in their order."""
        return [word for word in prompt.split() if UNKNOWN in self._encode(word)]

    def _encode(self, prompt, **how):
        # Half of a pair of surrogates is a str to Python and no text.
        try:
            prompt.encode()
        except (AttributeError, UnicodeEncodeError) as error:
            raise ValueError(f"the prompt {prompt!r:.80} is no text: {error}") from error
        return self._pieces.encode(prompt, **how)


def _tokenizer_file(path):
    if path.is_dir():
        places = (path / TOKENIZER_FILE, path / "tokenizer" / TOKENIZER_FILE)
        found = next((place for place in places if place.is_file()), None)
        if found is None:
            raise FileNotFoundError(f"{path}: no {TOKENIZER_FILE}, nor a tokenizer folder with one")
        return found
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    return path


def _processor(content, path):
    # Of an empty file the library makes a tokenizer that knows nothing.
    text = f"{path}: no SentencePiece model, it starts with {content[:16]!r}"
    if not content:
        raise ValueError(text)
    try:
        return sentencepiece.SentencePieceProcessor(model_proto=content)
    except RuntimeError as error:
        raise ValueError(text) from error


# ---- Features --------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class TextSettings:
    """How prompts become features. It checks itself.

    Raises: ValueError whose text starts with the field's name.
    """

    cleaning: str = "none"  # none, lower, clean: see `clean_prompt`
    max_length: int = 300  # tokens with the end token; longer prompts are cut
    batch_size: int = 16  # global; the devices of the mesh must divide it
    dtype: str = "bfloat16"  # of parameters and features

    def __post_init__(self):
        ranges.check(
            self,
            cleaning=ranges.one_of(*CLEANINGS),
            max_length=ranges.between(1, 65_536),
            batch_size=ranges.between(1, 65_536),
            dtype=ranges.one_of(*DTYPES),
        )

    @property
    def lengths(self) -> tuple[int, ...]:
        """The token counts that there are programs for."""
        return (*(length for length in LENGTHS if length < self.max_length), self.max_length)

    def fitting(self, counts: np.ndarray) -> np.ndarray:
        """The shortest of `lengths` that holds each of the token counts (n,)."""
        lengths = np.array(self.lengths)
        return lengths[np.searchsorted(lengths, counts)]


class TextFeatures(NamedTuple):
    """The features of n prompts, padded to the shortest length that holds all.

    Attributes:
        features: (n, S, C) in the encoder's dtype, zero where the mask is False.
        mask: (n, S) bool, True for tokens.
        cut: (n,) int32, how many tokens of each prompt found no place.
    """

    features: np.ndarray
    mask: np.ndarray
    cut: np.ndarray


class TextEncoder:
    """Prompts to features over the mesh; those of a prompt depend on that prompt alone.

    Args:
      model: its dtype is that of the features.
      params: of the model, on the mesh.
      weights: what identifies them, the checksum of a port's report.
      mesh: None: all devices, as replicas.
    Raises: ValueError where the tokenizer has more pieces than the model has rows, or the
      devices do not divide the batch.
    """

    def __init__(
        self,
        model: T5Encoder,
        params: Any,
        tokenizer: Tokenizer,
        settings: TextSettings,
        *,
        weights: str,
        mesh: jax.sharding.Mesh | None = None,
    ):
        mesh = mesh or sharding.make_mesh()
        sharding.check_batch(settings.batch_size, mesh)
        rows = model.config.vocab_size
        # JAX would read another row, without a word.
        if tokenizer.vocab_size > rows:
            raise ValueError(
                f"the tokenizer has {tokenizer.vocab_size} pieces, the text encoder knows {rows}"
            )
        self.settings = settings
        self.tokenizer = tokenizer
        self.config: T5Config = model.config
        self._weights = weights
        self._params = params
        self._sharding = sharding.batch_sharding(mesh)

        def apply(params, ids, mask):
            return model.apply({"params": params}, ids, mask)

        def apply_in_parts(params, ids, mask):
            B, S = ids.shape
            # The devices divide both, and so each part.
            count = B // math.gcd(B, settings.batch_size)

            def split(x):
                # Every count-th row: each device keeps working on rows that it holds.
                return x.reshape(B // count, count, S).swapaxes(0, 1)

            parts = jax.lax.map(lambda rows: apply(params, *rows), (split(ids), split(mask)))
            features = parts.swapaxes(0, 1).reshape(B, S, model.config.width)
            return jnp.where(mask[..., None], features, 0)

        def jit(fn):
            return jax.jit(sharding.on_mesh(fn, mesh), out_shardings=self._sharding)

        self._apply = jit(apply)
        self._apply_in_parts = jit(apply_in_parts)
        self._dtype = jnp.dtype(model.dtype)

    def __call__(self, prompts: Sequence[str]) -> TextFeatures:
        """The features of prompts, the same on every process.

        Raises: ValueError for a prompt that is no text.
        """
        cleaned = [clean_prompt(prompt, self.settings.cleaning) for prompt in prompts]
        ids, mask, cut = self.tokenizer(cleaned, self.settings.max_length)
        # The length of each prompt by itself, not of its batch: what is near it must not
        # change a bit of it.
        fitting = self.settings.fitting(mask.sum(axis=1))
        S = int(fitting.max(initial=self.settings.lengths[0]))
        features = np.zeros((len(prompts), S, self.config.width), self._dtype)
        for length in np.unique(fitting):
            rows = np.flatnonzero(fitting == length)
            for start in range(0, len(rows), self.settings.batch_size):
                part = rows[start : start + self.settings.batch_size]
                features[part, :length] = self._encode(ids[part, :length], mask[part, :length])
        features[~mask[:, :S]] = 0
        return TextFeatures(features, mask[:, :S], cut)

    def encode_tokens(self, ids: jax.Array, mask: jax.Array) -> jax.Array:
        """Features (B, S, C) of tokens (B, S) that are on the mesh; they stay there.

        Zero where the mask is False. At most `batch_size` rows are encoded at once.
        """
        return self._apply_in_parts(self._params, ids, mask)

    @property
    def dtype(self) -> Any:
        """Of the features."""
        return self._dtype

    def null_features(self, length: int) -> np.ndarray:
        """The features of the empty prompt, (length, C), those of its padding too.

        There are two different rows. A lone valid token makes every softmax 1, so all
        rows of padding are one and the same.
        """
        if length < 1:
            raise ValueError(f"length must be at least 1; got {length}")
        tokens = self.tokenizer([""], max(2, self.settings.lengths[0]))
        end, padding = self._encode(tokens.ids, tokens.mask)[0, :2]
        return np.stack([end] + [padding] * (length - 1))

    def identity(self) -> dict[str, Any]:
        """What features must agree on to be of one kind, as JSON values."""
        return identity_of(self.tokenizer, self._weights, self.settings)

    def _encode(self, ids, mask):
        """At most a batch of rows of one length: (n, S) to (n, S, C)."""
        fill = self.settings.batch_size - len(ids)

        def put(rows):
            return jax.device_put(np.pad(rows, ((0, fill), (0, 0))), self._sharding)

        out = self._apply(self._params, put(ids), put(mask))
        # Of a mesh over several processes each has some of the rows.
        if not out.is_fully_addressable:
            out = multihost_utils.process_allgather(out, tiled=True)
        return np.asarray(out)[: len(ids)]


def identity_of(tokenizer: Tokenizer, weights: str, settings: TextSettings) -> dict[str, Any]:
    """What `TextEncoder.identity` says, of an encoder that is not loaded."""
    return {
        "tokenizer": tokenizer.sha256,
        "weights": weights,
        "cleaning": settings.cleaning,
        "max_length": settings.max_length,
    }


def load_text_encoder(
    path: epath.PathLike,
    settings: TextSettings,
    *,
    tokenizer: epath.PathLike = "",
    mesh: jax.sharding.Mesh | None = None,
) -> TextEncoder:
    """The text encoder of a pipeline's folder, or of a T5's.

    Args:
      path: what `read_text_encoder` takes.
      tokenizer: what `Tokenizer` takes; "": it is in `path`.
    Raises: as both.
    """
    dtype = settings.dtype
    mesh = mesh or sharding.make_mesh()
    # The tokenizer first: it costs nothing to find out that it is missing.
    pieces = Tokenizer(tokenizer or path)
    checkpoint = read_text_encoder(path)
    params = load_encoder_params(checkpoint.params, dtype, mesh)
    return TextEncoder(
        T5Encoder(checkpoint.config, dtype=jnp.dtype(dtype).type),
        params,
        pieces,
        settings,
        weights=checkpoint.report.checksum,
        mesh=mesh,
    )
