"""Images with captions, by number: lists, folders, tar files and TFDS data sets.

Files come from strangers: a path of a list must stay in its folder, tar files are read and
never extracted, and nothing is longer than it may be.
"""

import dataclasses
import hashlib
import io
import json
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, BinaryIO, NamedTuple

import tensorflow_datasets as tfds
from etils import epath

from lit_jax.data.dataset import find_builder, first_line
from lit_jax.data.raw_images import (
    IMAGE_FILES,
    file_bytes,
    find_folder,
    hash_of,
    image_files,
    printable,
    source_records,
)
from lit_jax.runtime import storage

# Of an image. Data sets that describe images have 1 to 10 captions of some hundred letters.
MAX_CAPTIONS = 64
MAX_LETTERS = 20_000
MAX_TEXT_BYTES = 1 << 20  # of a file of captions
MAX_IMAGE_BYTES = 1 << 30
MAX_TAR_HEADER = 1 << 20  # of the parts that tarfile reads as a whole

# Fields of a list's items. "prompt" and "sharegpt4v" are PixArt's, "file_name" and "text" those of
# the Hub's image folders.
PATHS = ("path", "image", "file_name")
CAPTIONS = ("captions", "caption", "prompt", "text", "sharegpt4v")


@dataclasses.dataclass(frozen=True)
class CaptionedImages:
    """Images of any size with their captions, by number.

    `read(i)` gives the open file of image i and its captions. It raises any error for an image
    that is no good.
    """

    name: str  # what prepared.json keeps
    split: str
    origin: str  # in error messages
    listing: str  # tells these images from others of the same name
    count: int
    key: Callable[[int], str]  # what a person finds the image by
    read: Callable[[int], tuple[BinaryIO, list[str]]]
    left_out: Mapping[str, int] = dataclasses.field(default_factory=dict)  # {why: how many}

    def __len__(self) -> int:
        return self.count


def open_captioned(name: str, directory: epath.PathLike, split: str) -> CaptionedImages:
    """The images of a list, a folder, tar files or a TFDS data set.

    Args:
      name: one of
        LIST.json, PixArt's: a list of {"path", "prompt", "sharegpt4v"};
        LIST.jsonl: in each line {"image": path, "caption": text or "captions": texts};
        a folder of images, each with its captions in NAME.txt, one a line;
        tar files as of WebDataset: their folder, one of them, or a pattern such as shards/*.tar;
        a TFDS data set with an image and a "caption" or "captions".
      directory: where the paths of a list start, or where the data set is. Empty: for a list,
        the folder InternImgs beside that of the list (PixArt's), or else that of the list.
      split: of a data set; of the others all is taken.
    Raises: FileNotFoundError when there is no such thing; ValueError for one without images.
    """
    path = epath.Path(name)
    if is_list(name):
        return _open_list(path, directory, split)
    if name.endswith((".tar.gz", ".tgz", ".tar.zst")):
        raise ValueError(
            f"name = {name!r} is compressed, so none of its images can be found by number; "
            f"unpack it to a .tar"
        )
    if name.endswith(".tar"):
        tars = sorted(path.parent.glob(path.name))
        if not tars:
            raise FileNotFoundError(f"name = {name!r}: no such tar file")
        return _open_tars(path, tars, split)
    folder = find_folder(name, directory)
    if folder is None:
        return _open_tfds(find_builder(name, directory), name, split)
    if tars := sorted(folder.glob("*.tar")):
        return _open_tars(folder, tars, split)
    return _open_folder(folder, split)


def is_list(name: str) -> bool:
    """Whether `open_captioned` takes it as a list of images."""
    return name.endswith((".json", ".jsonl"))


def check_captions(captions: Sequence[Any]) -> list[str]:
    """The captions that are not empty, without space around them.

    Raises: ValueError for what is no text, or too much of it.
    """
    if len(captions) > MAX_CAPTIONS:
        raise ValueError(f"it has {len(captions)} captions, more than {MAX_CAPTIONS}")
    for caption in captions:
        if not isinstance(caption, str):
            raise ValueError(f"its caption {str(caption)[:40]!r} is no text")
        if len(caption) > MAX_LETTERS:
            raise ValueError(f"a caption has {len(caption)} letters, more than {MAX_LETTERS}")
        # Half of a pair of surrogates, which JSON may spell, is a str to Python and no text.
        caption.encode()
    return [caption.strip() for caption in captions if caption.strip()]


def captions_of(item: Mapping[str, Any]) -> list[str]:
    """All captions of an item of a list, in the order of CAPTIONS."""
    found: list[Any] = []
    for name in CAPTIONS:
        value = item.get(name)
        if value is not None:
            found += value if isinstance(value, list) else [value]
    return check_captions(found)


# ---- Lists ---------------------------------------------------------------------------------------


def _open_list(path: epath.Path, directory: epath.PathLike, split: str) -> CaptionedImages:
    if not path.exists():
        raise FileNotFoundError(f"name = {str(path)!r}: no such file")
    path = storage.absolute(path)  # a name alone has no folder above its own
    content = path.read_bytes()
    try:
        if path.suffix == ".jsonl":
            items = [line for line in _lines(content.decode("utf-8-sig")) if line.strip()]
        else:
            items = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"name = {str(path)!r} is no JSON: {first_line(error)}") from error
    if not isinstance(items, list) or not items:
        raise ValueError(f"name = {str(path)!r} holds no list of images")

    folder = epath.Path(directory) if directory else path.parent
    beside = path.parent.parent / "InternImgs"
    if not directory and beside.is_dir():
        folder = beside

    def item_of(index):
        item = items[index]
        item = json.loads(item) if isinstance(item, str) else item
        if not isinstance(item, dict):
            raise ValueError("it is no JSON object")
        where = next((item[name] for name in PATHS if name in item), None)
        if not isinstance(where, str):
            raise ValueError(f"it names no file; one of {', '.join(PATHS)} should")
        return where, item

    def key(index):
        try:
            return printable(item_of(index)[0])
        except ValueError:
            return str(index)

    def read(index):
        where, item = item_of(index)
        captions = captions_of(item)
        return _inside(folder, where).open("rb"), captions

    return CaptionedImages(
        name=path.name,
        split=split,
        origin=str(path),
        listing=hashlib.sha256(content).hexdigest()[:16],
        count=len(items),
        key=key,
        read=read,
    )


def _inside(folder: epath.Path, name: str) -> epath.Path:
    """The file of a folder that a stranger's list names."""
    parts = name.split("/")
    if "" in parts[:1] or ".." in parts or "://" in name or "\0" in name:
        raise ValueError(f"its path {name[:80]!r} leaves the folder {folder}")
    return folder / name


# ---- A folder ------------------------------------------------------------------------------------


def _open_folder(folder: epath.Path, split: str) -> CaptionedImages:
    skipped: Counter[str] = Counter()
    all_files = sorted(image_files(folder, skipped))
    files = [name for name in all_files if _sidecar(folder / name).exists()]
    if not files:
        raise ValueError(
            f"name = {str(folder)!r}: none of its {len(all_files)} images has its captions beside "
            f"it, in NAME.txt, and it holds no .tar files"
        )

    def read(index):
        path = folder / files[index]
        with _sidecar(path).open("rb") as file:
            captions = _lines(_text(file.read(MAX_TEXT_BYTES + 1)))
        return path.open("rb"), check_captions(captions)

    # With the sizes: other images under the same names are another listing.
    paths = [folder / name for name in files]
    sizes = [(file_bytes(path), file_bytes(_sidecar(path))) for path in paths]
    return CaptionedImages(
        name=folder.name,
        split=split,
        origin=str(folder),
        listing=hash_of(list(zip(files, sizes, strict=True))),
        count=len(files),
        key=lambda index: printable(files[index]),
        read=read,
        left_out=_reasons({"have no .txt beside them": len(all_files) - len(files)}),
    )


def _sidecar(image: epath.Path) -> epath.Path:
    return image.with_suffix(".txt")


def _lines(text: str) -> list[str]:
    # str.splitlines would cut at U+0085 and U+2028 too, which stand within texts.
    return text.replace("\r\n", "\n").split("\n")


def _text(content: bytes) -> str:
    if len(content) > MAX_TEXT_BYTES:
        raise ValueError(f"its captions are longer than {MAX_TEXT_BYTES:,} bytes")
    return content.decode("utf-8-sig")  # Windows' editors put a mark before the text


def _reasons(counts: Mapping[str, int]) -> dict[str, int]:
    return {why: count for why, count in counts.items() if count}


# ---- Tar files -----------------------------------------------------------------------------------


class _Part(NamedTuple):
    """Where the content of a member lies in its tar file."""

    offset: int
    size: int


class _Sample(NamedTuple):
    """An image of a tar file and its captions."""

    tar: int
    key: str
    image: _Part
    text: _Part
    is_json: bool


def _open_tars(path: epath.Path, tars: list[epath.Path], split: str) -> CaptionedImages:
    counts: Counter[str] = Counter()
    samples: list[_Sample] = []
    for number, tar in enumerate(tars):
        samples += _samples(tar, number, counts)
    if not samples:
        raise ValueError(
            f"name = {str(path)!r}: no image of its {len(tars)} tar files has a .txt or .json "
            f"of the same name behind it"
        )

    def read(index):
        sample = samples[index]
        tar = tars[sample.tar]
        with tar.open("rb") as file:
            file.seek(sample.text.offset)
            text = _text(file.read(sample.text.size))
        if sample.is_json:
            item = json.loads(text)
            captions = captions_of(item if isinstance(item, dict) else {})
        else:
            captions = check_captions(_lines(text))
        # No more is read of it than is asked for: of most images the header, at first.
        part = Window(tar.open("rb"), *sample.image)
        return io.BufferedReader(part, 1 << 16), captions

    def key(index):
        sample = samples[index]
        return printable(f"{tars[sample.tar].name}/{sample.key}")

    return CaptionedImages(
        name=path.name,
        split=split,
        origin=str(path),
        listing=hash_of([[tar.name, file_bytes(tar)] for tar in tars] + samples),
        count=len(samples),
        key=key,
        read=read,
        left_out=_reasons(counts),
    )


def _samples(tar: epath.Path, number: int, counts: Counter[str]) -> Iterator[_Sample]:
    """The images of a tar file that have captions; counts what is left out.

    The members of a sample stand together, and are called as far as the first dot alike.
    """
    before = ""
    found: dict[str, _Part] = {}
    for member, part in _members(tar):
        folder, slash, name = member.rpartition("/")
        stem, _, ending = name.partition(".")
        key = f"{folder}{slash}{stem}"
        if key != before:
            yield from _sample(before, found, number, counts)
            before = key
            found = {}
        found[f".{ending.lower()}"] = part
    yield from _sample(before, found, number, counts)


def _sample(key: str, found: dict[str, _Part], tar: int, counts: Counter[str]) -> Iterator[_Sample]:
    image = next((found[ending] for ending in IMAGE_FILES if ending in found), None)
    if image is None:
        return
    text = found.get(".txt", found.get(".json"))
    if text is None:
        counts["have no .txt or .json beside them"] += 1
    elif image.size > MAX_IMAGE_BYTES or text.size > MAX_TEXT_BYTES:
        counts["are larger than an image or a caption may be"] += 1
    else:
        yield _Sample(tar, key, image, text, ".txt" not in found)


def _members(tar: epath.Path) -> Iterator[tuple[str, _Part]]:
    """The names and places of the plain files in a tar file."""
    end = file_bytes(tar)
    with tar.open("rb") as file:
        careful: Any = _Careful(file)
        archive: Any
        try:
            with tarfile.open(fileobj=careful, mode="r:") as archive:
                while (member := archive.next()) is not None:
                    archive.members.clear()  # it keeps them all
                    if not member.isreg() or member.issparse():
                        continue
                    part = _Part(member.offset_data, member.size)
                    if part.size < 0 or part.offset + part.size > end:
                        raise ValueError(f"its member {member.name[:80]!r} ends behind its end")
                    yield member.name, part
        # Of a header: no octal number, no UTF-8, a size below zero.
        except (tarfile.TarError, ValueError, OverflowError) as error:
            raise ValueError(f"name = {str(tar)!r} is damaged: {first_line(error)}") from error


class _Careful:
    """A file for tarfile, which would read a header of any size that the header names."""

    def __init__(self, file: BinaryIO):
        self._file = file
        self.seek = file.seek
        self.tell = file.tell

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= MAX_TAR_HEADER:
            raise ValueError(f"a header of {size:,} bytes, {MAX_TAR_HEADER:,} at most are read")
        return self._file.read(size)


class Window(io.RawIOBase):
    """A part of a file, as a file; closes the whole one with it."""

    def __init__(self, file: BinaryIO, offset: int, size: int):
        self._file = file
        self._offset = offset
        self._size = size
        self._place = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._size}[whence]
        self._place = max(0, start + offset)
        return self._place

    def readinto(self, buffer: Any) -> int:
        count = max(0, min(len(buffer), self._size - self._place))
        self._file.seek(self._offset + self._place)
        content = self._file.read(count)
        buffer[: len(content)] = content
        self._place += len(content)
        return len(content)

    def close(self) -> None:
        self._file.close()
        super().close()


# ---- A TFDS data set -----------------------------------------------------------------------------


def _open_tfds(builder: tfds.core.DatasetBuilder, name: str, split: str) -> CaptionedImages:
    features = builder.info.features
    field = next((n for n in ("captions", "caption", "text") if n in features), None)
    is_image = "image" in features and isinstance(features["image"], tfds.features.Image)
    if not is_image or field is None:
        raise ValueError(
            f"name = {name!r} has {', '.join(features)}; it needs an image, and its texts in "
            f"captions, caption or text"
        )
    # Pillow decodes, as all other images.
    decoders = {"image": tfds.decode.SkipDecoding()}
    records = source_records(builder, name, split, decoders)

    def read(index):
        record = records[index]
        texts = record[field]
        # COCO's are {"id", "text"} of lists.
        texts = texts["text"] if isinstance(texts, dict) else texts
        texts = [texts] if isinstance(texts, bytes | str) else list(texts)
        texts = [text.decode() if isinstance(text, bytes) else text for text in texts]
        return io.BytesIO(record["image"]), check_captions(texts)

    return CaptionedImages(
        name=name,
        split=split,
        origin=f"{name}, split {split},",
        listing=builder.info.full_name,
        count=len(records),
        key=str,
        read=read,
    )
