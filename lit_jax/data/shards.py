"""The ArrayRecord files of a prepared data set: written one by one, verified, described.

A shard gets its final name when it is whole. It is finished when a line of a journal,
written after that, gives its count and hash. So an interrupted preparation goes on where
it stopped. Each process has a journal; at the end `finish` merges them into prepared.json
and writes the metadata that TFDS reads.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from etils import epath

from lit_jax.data.dataset import PREPARED
from lit_jax.runtime import storage

VERSION = "1.0.0"

# One record a chunk, for random access. Uncompressed: latents compress by a seventh only,
# and reading them is then half as fast.
WRITER_OPTIONS = "group_size:1,uncompressed"


@dataclasses.dataclass(frozen=True)
class Shards:
    """The files of a split, and which of them this process writes.

    Shard s holds the records s * size to (s + 1) * size - 1, the last one what is left.
    Process p of n writes the shards p, p + n, p + 2n, ...
    """

    folder: epath.Path  # a local one: ArrayRecord writes to no other
    name: str
    split: str
    num_records: int
    size: int
    process_index: int = 0
    process_count: int = 1

    @property
    def count(self) -> int:
        """The number of shards."""
        return -(-self.num_records // self.size)

    @property
    def mine(self) -> range:
        """The numbers of the shards that this process writes."""
        return range(self.process_index, self.count, self.process_count)

    def rows(self, shard: int) -> range:
        """The numbers of the records of a shard."""
        start = shard * self.size
        return range(start, min(start + self.size, self.num_records))

    def path(self, shard: int) -> epath.Path:
        """The file of a shard, by the name that TFDS looks for."""
        kind = f"{self.name}-{self.split}.array_record"
        return self.folder / f"{kind}-{shard:05d}-of-{self.count:05d}"

    def journals(self) -> list[epath.Path]:
        """Those of all processes, earlier ones included."""
        return sorted(self.folder.glob(f"journal-{self.split}-*.jsonl"))

    def finished(self) -> dict[int, dict[str, Any]]:
        """{"count", "sha256"} of each finished shard."""
        split = read_about(self.folder).get("splits", {}).get(self.split, {})
        known = {}
        for shard, (count, sha256) in enumerate(split.get("shards", [])):
            known[shard] = {"count": count, "sha256": sha256}

        # After prepared.json, for they are of later runs.
        for entry in self._entries():
            known[entry.pop("shard")] = entry

        # Not those whose file was removed, because it was damaged: they are written again.
        return {s: entry for s, entry in known.items() if self.path(s).exists()}

    def _entries(self) -> Iterator[dict[str, Any]]:
        """The lines of all journals."""
        for journal in self.journals():
            for line in journal.read_text().splitlines():
                try:
                    yield json.loads(line)
                except ValueError:
                    continue  # a run was killed while it wrote the line

    def skipped(self) -> dict[str, str]:
        """{image: what is wrong with it} of those that finished shards leave out."""
        split = read_about(self.folder).get("splits", {}).get(self.split, {})
        left_out = dict(split.get("skipped", {}))
        for entry in self._entries():
            left_out |= entry.get("skipped", {})
        return left_out

    def write(
        self, shard: int, records: Iterable[bytes], skipped: Mapping[str, str] | None = None
    ) -> None:
        """Writes a whole shard, then gives it its name, then notes it in the journal.

        Args: skipped: {image: what is wrong with it} of those left out; it may be filled
          while the records are made.
        Raises: OSError naming the shard when the disk is full.
        """
        path = self.path(shard)
        part = path.with_name(f"part-{path.name}")
        with storage.naming_file(path):
            writer = ArrayRecordWriter(str(part), WRITER_OPTIONS)
        count = 0
        try:
            for record in records:
                with storage.naming_file(path):
                    writer.write(record)
                count += 1
        except BaseException:
            # What stopped it is the error to tell, not that the file cannot be closed.
            with contextlib.suppress(RuntimeError):
                writer.close()
            part.unlink(missing_ok=True)
            raise

        try:
            with storage.naming_file(path):
                writer.close()
                with open(part, "rb") as file:
                    sha256 = hashlib.file_digest(file, "sha256").hexdigest()
                    # Before the name is given: a power failure must not leave the name
                    # without the content.
                    os.fsync(file.fileno())
                os.replace(part, path)
        except OSError:
            part.unlink(missing_ok=True)  # it would fill the disk on
            raise

        entry: dict[str, Any] = {"shard": shard, "count": count, "sha256": sha256}
        if skipped:
            entry["skipped"] = dict(skipped)
        name = f"journal-{self.split}-{self.process_index:05d}.jsonl"
        with storage.naming_file(self.folder / name), open(self.folder / name, "a") as journal:
            # A killed run may have left half a line, so an entry starts a new one.
            journal.write(f"\n{json.dumps(entry)}\n")

    def verify(self) -> None:
        """Reads this process's shards back: each must have the bytes that were written.

        Raises: ValueError naming the first file that has not.
        """
        finished = self.finished()
        for shard in self.mine:
            path = self.path(shard)
            if shard not in finished:
                raise ValueError(
                    f"{path} is missing or was not finished; do all processes see the same folder?"
                )

            with open(path, "rb") as file:
                sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            written = finished[shard]["sha256"]
            if sha256 != written:
                raise ValueError(
                    f"{path} has sha256 {sha256}, {written} was written; remove it and run again"
                )

            # The hash is of what was written; whether that is right, the reader tells.
            reader = ArrayRecordReader(str(path))
            count = reader.num_records()
            reader.close()
            wanted = finished[shard]["count"]
            if count != wanted:
                raise ValueError(
                    f"{path} has {count} records, it should have {wanted}; remove it and run again"
                )

    def finish(self, features: tfds.features.FeaturesDict, about: dict[str, Any]) -> None:
        """Describes the split; see `finish_splits`."""
        finish_splits([self], features, about)

    def entries(self) -> tuple[list[dict[str, Any]], dict[str, str]]:
        """{"count", "sha256"} of every shard, and what they leave out.

        Raises: ValueError when shards are missing, or are not of all images.
        """
        finished = self.finished()
        missing = [shard for shard in range(self.count) if shard not in finished]
        if missing:
            raise ValueError(
                f"{self.folder}: {len(missing)} shards of {self.split} are missing, "
                f"the first is {self.path(missing[0]).name}; "
                f"do all processes see the same folder?"
            )

        entries = [finished[shard] for shard in range(self.count)]
        skipped = self.skipped()
        count = sum(entry["count"] for entry in entries)
        if count + len(skipped) != self.num_records:
            raise ValueError(
                f"{self.folder}: the shards of {self.split} hold {count} records and leave out "
                f"{len(skipped)}, which are not the {self.num_records} images; remove the folder "
                f"and run again"
            )
        if not count:
            raise ValueError(f"{self.folder}: none of the images of {self.split} can be read")
        return entries, skipped

    def split_info(self, split: dict[str, Any]) -> tfds.core.SplitInfo:
        """What TFDS keeps of a split. Args: split: what prepared.json says of it."""
        files = [self.path(shard) for shard in range(self.count)]
        return tfds.core.SplitInfo(
            name=self.split,
            shard_lengths=[count for count, _ in split["shards"]],
            num_bytes=sum(os.path.getsize(file) for file in files),
        )


def finish_splits(
    written: Sequence[Shards], features: tfds.features.FeaturesDict, about: dict[str, Any]
) -> None:
    """Describes all finished splits for TFDS, then those that were written in prepared.json.

    Args: written: splits of one folder.
    Raises: ValueError when shards of theirs are missing.
    """
    folder = written[0].folder
    # First what is missing: a folder that was never entered has no splits.
    found = {shards.split: shards.entries() for shards in written}
    before = read_about(folder)
    splits = before["splits"]
    left_out = {}
    for shards in written:
        entries, left_out[shards.split] = found[shards.split]
        splits[shards.split]["shards"] = [
            # Two values, not a dict: there may be thousands of shards.
            [entry["count"], entry["sha256"]]
            for entry in entries
        ]

    # TFDS keeps one list of splits: without the others' infos they would be gone.
    infos = []
    for name, split in splits.items():
        if "shards" in split:  # else it is not finished
            shards = dataclasses.replace(
                written[0], split=name, num_records=split["records"], size=split["shard_records"]
            )
            infos.append(shards.split_info(split))
    for name, skipped in left_out.items():
        if skipped:
            splits[name]["skipped"] = skipped
    about = before | about
    with storage.naming_file(folder / "dataset_info.json"):
        tfds.folder_dataset.write_metadata(
            data_dir=str(folder),
            features=features,
            split_infos=infos,
            check_data=False,  # it would count the records of every shard again
            version=VERSION,
            supervised_keys=_supervised_keys(features),
            description=_description(about),
        )
    write_about(folder, about | {"splits": splits})
    # Last: until prepared.json has the hashes, only the journals do.
    for shards in written:
        for journal in shards.journals():
            journal.unlink()


def _supervised_keys(features: tfds.features.FeaturesDict) -> tuple[str, str] | None:
    if "label" not in features:
        return None
    return ("mean" if "mean" in features else "image", "label")


def _description(about: dict[str, Any]) -> str:
    size = about["image_size"]
    if not isinstance(size, int):
        size = " x ".join(map(str, size))
    # Folders that were begun before each split had its source have one for all.
    sources = [split.get("source", about.get("source")) for split in about["splits"].values()]
    names = " and ".join(dict.fromkeys(filter(None, sources)))
    text = f"{names}, ADM centre crop to {size} pixels"
    of_what = "image and mirror"
    if about.get("crop") == "bucket":
        text = f"{names}, in aspect buckets of {size} pixels, with their captions"
        of_what = "each image"
    if not about["autoencoder"]:
        return f"{text}."
    name = about["autoencoder"]["name"]
    return f"{text}, encoded by {name}: posterior mean and log-variance, unscaled, of {of_what}."


def read_about(folder: epath.Path) -> dict[str, Any]:
    """How the data set in a folder is prepared: what prepared.json says, or {}."""
    path = folder / PREPARED
    return json.loads(path.read_text()) if path.exists() else {}


def write_about(folder: epath.Path, about: dict[str, Any]) -> None:
    """Writes prepared.json. Raises: OSError naming it; it is then as it was."""
    storage.replace_text(folder / PREPARED, json.dumps(about, indent=1) + "\n")
