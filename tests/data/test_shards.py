"""The files of a preparation: their names, and what tells that a shard is finished."""

import hashlib
import json

import full_disk
import pytest
from array_record.python.array_record_module import ArrayRecordReader
from etils import epath

from lit_jax.data.shards import Shards, read_about, write_about


def make_shards(tmp_path, **process):
    """13 records in shards of 5."""
    folder = epath.Path(tmp_path) / "digits" / "1.0.0"
    folder.mkdir(parents=True, exist_ok=True)
    return Shards(folder, "digits", "train", 13, 5, **process)


def write(shards, number):
    shards.write(number, (b"record %d" % row for row in shards.rows(number)))


def test_shards_have_the_records_in_order_under_the_names_of_tfds(tmp_path):
    shards = make_shards(tmp_path)
    assert shards.count == 3
    assert [list(shards.rows(s)) for s in range(3)] == [
        [0, 1, 2, 3, 4],
        [5, 6, 7, 8, 9],
        [10, 11, 12],
    ]
    assert shards.path(2) == shards.folder / "digits-train.array_record-00002-of-00003"


def test_every_shard_has_one_process(tmp_path):
    mine = [list(make_shards(tmp_path, process_index=p, process_count=2).mine) for p in range(2)]
    assert mine == [[0, 2], [1]]


def test_a_journal_has_a_line_for_each_shard(tmp_path):
    shards = make_shards(tmp_path, process_index=1, process_count=2)
    write(shards, 1)
    (journal,) = shards.journals()
    assert journal.name == "journal-train-00001.jsonl"
    sha256 = hashlib.sha256(shards.path(1).read_bytes()).hexdigest()
    line = f'{{"shard": 1, "count": 5, "sha256": "{sha256}"}}'
    assert journal.read_text() == f"\n{line}\n"
    assert shards.finished() == {1: {"count": 5, "sha256": sha256}}


def test_a_shard_is_finished_with_its_name_and_a_whole_line(tmp_path):
    shards = make_shards(tmp_path)
    for number in range(3):
        write(shards, number)
    (journal,) = shards.journals()
    # Killed before the name was given, and while the line was written.
    shards.path(0).rename(shards.folder / "part-0")
    lines = journal.read_text()
    journal.write_text(lines[: lines.index('"shard": 2') + 20])
    assert list(shards.finished()) == [1]
    write(shards, 2)  # the next line does not join the half one
    assert list(shards.finished()) == [1, 2]


def test_a_process_verifies_its_shards_alone(tmp_path):
    shards = make_shards(tmp_path)
    write(shards, 1)
    make_shards(tmp_path, process_index=1, process_count=2).verify()
    with pytest.raises(ValueError, match="00000-of-00003 is missing or was not finished"):
        shards.verify()
    with pytest.raises(ValueError, match="2 shards of train are missing, the first is digits-"):
        shards.finish(None, {})


def test_hashes_come_from_prepared_json_when_the_journals_are_gone(tmp_path):
    shards = make_shards(tmp_path)
    assert read_about(shards.folder) == {}
    for number in range(3):
        write(shards, number)
    finished = shards.finished()
    entries = [[entry["count"], entry["sha256"]] for entry in finished.values()]
    write_about(shards.folder, {"splits": {"train": {"shards": entries}}})
    shards.journals()[0].unlink()
    assert shards.finished() == finished
    text = (shards.folder / "prepared.json").read_text()
    assert json.loads(text)["splits"]["train"]["shards"][2] == [3, finished[2]["sha256"]]
    shards.verify()


def test_a_full_disk_names_the_shard_and_leaves_no_half_of_it(tmp_path):
    shards = make_shards(tmp_path)
    write_about(shards.folder, {"splits": {"train": {}}})
    before = sorted(shards.folder.iterdir())
    message = f"^{shards.path(1)} {full_disk.MESSAGE}"
    with full_disk.full_disk(), pytest.raises(OSError, match=message):
        shards.write(1, (bytes(10_000) for _ in shards.rows(1)))
    assert sorted(shards.folder.iterdir()) == before
    about = {"splits": {"train": {"text": "x" * 1000}}}
    message = f"^{shards.folder}/prepared.json {full_disk.MESSAGE}"
    with full_disk.full_disk(), pytest.raises(OSError, match=message):
        write_about(shards.folder, about)
    assert read_about(shards.folder) == {"splits": {"train": {}}}
    assert sorted(shards.folder.iterdir()) == before


def test_a_shard_that_is_there_is_replaced_as_a_whole(tmp_path):
    """A run that is killed while it writes a shard again leaves the one that was there."""
    shards = make_shards(tmp_path)
    write(shards, 1)
    before = shards.path(1).read_bytes()

    def records():
        yield b"another record"
        assert shards.path(1).read_bytes() == before
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        shards.write(1, records())
    assert shards.path(1).read_bytes() == before

    # Whoever has the old one open reads it to its end: the new one is another file.
    with open(shards.path(1), "rb") as file:
        shards.write(1, [b"another record"] * 5)
        assert file.read() == before != shards.path(1).read_bytes()
    shards.write(1, [b"another record"])
    reader = ArrayRecordReader(str(shards.path(1)))
    assert reader.read_all() == [b"another record"]
    assert shards.finished()[1]["count"] == 1
