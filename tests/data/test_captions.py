"""Images with captions: every source, and what strangers' files may not do."""

import io
import json
import tarfile

import numpy as np
import pytest
import tensorflow_datasets as tfds
from etils import epath
from PIL import Image
from tiny_captions import picture, texts, write_folder

from lit_jax.data import captions
from lit_jax.data.buckets import Buckets
from lit_jax.data.caption_records import Survey, survey_images
from lit_jax.data.captions import captions_of, check_captions, open_captioned
from lit_jax.data.raw_images import ImageSettings
from lit_jax.data.shards import VERSION, Shards, write_about

SETTINGS = ImageSettings(16)
COUNT = 4


def png(index):
    file = io.BytesIO()
    picture(index).save(file, "png")
    return file.getvalue()


def check(images, keys):
    """The images are the first COUNT, in order, with their captions."""
    assert [images.key(i) for i in range(len(images))] == keys
    for index in range(COUNT):
        file, found = images.read(index)
        assert found == texts(index)
        with file, Image.open(file) as image:
            np.testing.assert_array_equal(image, picture(index))


def survey(images, skip_broken=0):
    return survey_images(
        images, SETTINGS, num_threads=0, skip_broken=skip_broken, advance=lambda count: None
    )


# ---- The sources ---------------------------------------------------------------------------------


def test_a_folder_with_texts_beside_the_images(tmp_path):
    write_folder(tmp_path, COUNT)
    picture(9).save(tmp_path / "silent.png")
    images = open_captioned(f"{tmp_path}/", "", "train")
    check(images, [f"{i:02d}.png" for i in range(COUNT)])
    assert images.left_out == {"have no .txt beside them": 1}
    # Another text is another listing.
    (tmp_path / "00.txt").write_text("a longer text")
    assert open_captioned(f"{tmp_path}/", "", "train").listing != images.listing


def test_pixarts_list_has_its_images_in_internimgs(tmp_path):
    (tmp_path / "InternImgs" / "a").mkdir(parents=True)
    (tmp_path / "InternData").mkdir()
    items = []
    for i in range(COUNT):
        picture(i).save(tmp_path / "InternImgs" / "a" / f"{i}.png")
        item = {"path": f"a/{i}.png", "prompt": texts(i)[0], "ratio": 1.0, "width": 1, "height": 1}
        items.append(item | ({"sharegpt4v": texts(i)[1]} if len(texts(i)) > 1 else {}))
    path = tmp_path / "InternData" / "data_info.json"
    path.write_text(json.dumps(items))
    keys = [f"a/{i}.png" for i in range(COUNT)]
    check(open_captioned(str(path), "", "train"), keys)
    # The paths may start elsewhere.
    moved = tmp_path / "list.json"
    moved.write_text(json.dumps(items))
    check(open_captioned(str(moved), str(tmp_path / "InternImgs"), "train"), keys)
    # Sizes are the files', whatever the list says of them.
    sizes = [picture(i).size[::-1] for i in range(COUNT)]
    assert survey(open_captioned(str(path), "", "train")).sizes.tolist() == [list(s) for s in sizes]


def test_a_list_of_lines_beside_the_images(tmp_path):
    lines = []
    for i in range(COUNT):
        picture(i).save(tmp_path / f"{i}.png")
        one = len(texts(i)) == 1
        lines.append(
            {"file_name": f"{i}.png", "text": texts(i)[0]}
            if one
            else {"image": f"{i}.png", "captions": texts(i)}
        )
    path = tmp_path / "list.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    check(open_captioned(str(path), "", "train"), [f"{i}.png" for i in range(COUNT)])
    # As an editor of Windows saves it.
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    check(open_captioned(str(path), "", "train"), [f"{i}.png" for i in range(COUNT)])


def write_tar(path, members):
    """Args: members: {name: content}, in order."""
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def samples(numbers, ending="txt"):
    members = {}
    for i in numbers:
        text = "\n".join(texts(i)) if ending == "txt" else json.dumps({"captions": texts(i)})
        members |= {f"part/{i:04d}.seg.png": b"no image", f"part/{i:04d}.png": png(i)}
        members |= {f"part/{i:04d}.{ending}": text.encode()}
    return members


def test_tar_files_are_read_in_place(tmp_path):
    write_tar(tmp_path / "a-0.tar", samples([0, 1]) | {"part/alone.jpg": png(7)})
    write_tar(tmp_path / "a-1.tar", samples([2, 3], "json") | {"part/none.txt": b"a cat"})
    before = sorted(tmp_path.iterdir())
    keys = [f"a-{i // 2}.tar/part/{i:04d}" for i in range(COUNT)]
    for name in (f"{tmp_path}/", f"{tmp_path}/a-*.tar"):
        images = open_captioned(name, "", "train")
        check(images, keys)
        assert images.left_out == {"have no .txt or .json beside them": 1}
    check_two = open_captioned(f"{tmp_path}/a-0.tar", "", "train")
    assert len(check_two) == 2
    # Nothing is extracted.
    assert sorted(tmp_path.iterdir()) == before


def test_a_part_of_a_file_is_a_file(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(bytes(range(100)))
    window = captions.Window(path.open("rb"), 10, 20)
    with io.BufferedReader(window, 8) as file:
        assert file.read() == bytes(range(10, 30))
        assert file.seek(-5, io.SEEK_END) == 15 and file.read(9) == bytes(range(25, 30))
        assert file.seek(3) == 3 and file.seek(2, io.SEEK_CUR) == 5
        assert file.read(2) == bytes([15, 16])
        assert file.seek(90) == 90 and file.read() == b""


@pytest.mark.parametrize("kind", ["caption", "captions", "coco"])
def test_a_tfds_data_set_with_captions(tmp_path, kind):
    text = tfds.features.Text()
    field, feature = {
        "caption": ("caption", text),
        "captions": ("captions", tfds.features.Sequence(text)),
        "coco": ("captions", tfds.features.Sequence({"id": np.int64, "text": text})),
    }[kind]
    features = tfds.features.FeaturesDict({"image": tfds.features.Image(), field: feature})
    shards = Shards(epath.Path(tmp_path) / "told" / VERSION, "told", "train", COUNT, COUNT)
    shards.folder.mkdir(parents=True)
    split = {"source": "told", "records": COUNT, "shard_records": COUNT}
    write_about(shards.folder, {"splits": {"train": split}})
    values = {
        "caption": lambda i: texts(i)[0],
        "captions": texts,
        "coco": lambda i: [{"id": 1, "text": text} for text in texts(i)],
    }[kind]
    examples = [{"image": io.BytesIO(png(i)), field: values(i)} for i in range(COUNT)]
    shards.write(0, map(features.serialize_example, examples))
    shards.finish(features, {"image_size": 0, "autoencoder": None})

    images = open_captioned("told", str(tmp_path), "train[1:]")
    assert len(images) == COUNT - 1
    file, found = images.read(1)
    np.testing.assert_array_equal(Image.open(file), picture(2))
    assert found == (texts(2)[:1] if kind == "caption" else texts(2))
    with pytest.raises(ValueError, match="split = 'test' is not of told"):
        open_captioned("told", str(tmp_path), "test")


# ---- What is left out ----------------------------------------------------------------------------


def test_tall_images_silent_ones_and_broken_ones_are_counted(tmp_path):
    write_folder(tmp_path, 3)
    for name, size in (("tall", (10, 46)), ("wide", (460, 10)), ("most", (10, 45))):
        Image.new("RGB", size).save(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_text("a pole")
    (tmp_path / "01.txt").write_text(" \n\n")
    (tmp_path / "02.png").write_bytes(b"no picture")
    images = open_captioned(f"{tmp_path}/", "", "train")
    with pytest.raises(ValueError, match="^skip_broken = 0 leaves out fewer .*: image 2 of .*02.p"):
        survey(images)
    found = survey(images, skip_broken=1)
    assert list(found.broken) == ["2: 02.png"]
    assert found.left_out() == {
        "cannot be read": 1,
        "have no caption": 1,
        "are taller than 4.5 times their width": 1,
    }
    rows = found.assign(Buckets(16, ("8x32", "16x16", "32x8")))
    assert [row.tolist() for row in rows] == [[5], [0], [3]]  # wide, 00, most


def test_a_survey_is_kept_for_the_same_images(tmp_path):
    write_folder(tmp_path, COUNT)
    found = survey(open_captioned(f"{tmp_path}/", "", "train"))
    path = epath.Path(tmp_path) / "sizes.npz"
    assert Survey.read(path, "key") is None
    found.write(path, "key")
    again = Survey.read(path, "key")
    assert again.sizes.tolist() == found.sizes.tolist() and again.broken == {}
    assert Survey.read(path, "of other images") is None
    path.write_bytes(path.read_bytes()[:100])
    assert Survey.read(path, "key") is None


def test_a_picture_that_its_camera_turned_counts_as_it_stands(tmp_path):
    image = Image.new("RGB", (30, 20))
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(tmp_path / "a.jpg", exif=exif)
    (tmp_path / "a.txt").write_text("a cat")
    assert survey(open_captioned(f"{tmp_path}/", "", "train")).sizes.tolist() == [[30, 20]]


# ---- Strangers' files ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "item, message",
    [
        ({"path": "../secret.png", "prompt": "a"}, "'../secret.png' leaves the folder"),
        ({"path": "/etc/passwd", "prompt": "a"}, "'/etc/passwd' leaves the folder"),
        ({"path": "gs://bucket/a.png", "prompt": "a"}, "leaves the folder"),
        ({"path": 3, "prompt": "a"}, "it names no file"),
        ({"prompt": "a"}, "it names no file; one of path, image, file_name should"),
        ({"path": "a.png", "prompt": {"a": 1}}, "its caption .* is no text"),
        ({"path": "a.png", "prompt": "a" * 30_000}, "a caption has 30000 letters"),
        ({"path": "a.png", "captions": ["a"] * 65}, "it has 65 captions, more than 64"),
        ({"path": "a.png", "prompt": "half \ud83d"}, "surrogates not allowed"),
        ({"path": "missing.png", "prompt": "a"}, "missing.png"),
        ("a.png", "it is no JSON object|Expecting value"),
    ],
)
def test_a_bad_item_of_a_list_is_a_broken_image(tmp_path, item, message):
    picture(0).save(tmp_path / "a.png")
    path = tmp_path / "list.json"
    path.write_text(json.dumps([{"path": "a.png", "prompt": "a cat"}, item]))
    images = open_captioned(str(path), "", "train")
    with pytest.raises(ValueError, match=f"image 1 of .*list.json cannot be read: .*{message}"):
        survey(images)
    assert survey(images, skip_broken=1).sizes.tolist() == [list(picture(0).size[::-1]), [0, 0]]


@pytest.mark.parametrize("content", ["{}", "[]", "[1,", "\x80", "[" * 100_000])
def test_a_list_that_is_none_is_named(tmp_path, content):
    path = tmp_path / "list.json"
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(ValueError, match="^name = .*list.json' (is no JSON|holds no list of im)"):
        open_captioned(str(path), "", "train")


def test_a_damaged_tar_is_named(tmp_path):
    path = write_tar(tmp_path / "a.tar", samples([0, 1]))
    whole = path.read_bytes()
    members = tarfile.open(path).getmembers()
    path.write_bytes(whole[: members[-2].offset_data + 10])
    with pytest.raises(ValueError, match="^name = .*a.tar' is damaged: its member .* ends behind"):
        open_captioned(str(path), "", "train")
    path.write_bytes(b"no tar" * 200)
    with pytest.raises(ValueError, match="^name = .*a.tar' is damaged"):
        open_captioned(str(path), "", "train")


def test_a_tar_header_of_any_size_is_not_read(tmp_path):
    """A name of a gigabyte, as tar's extension for long names allows."""
    info = tarfile.TarInfo("././@LongLink")
    info.type = tarfile.GNUTYPE_LONGNAME
    info.size = 1 << 30
    path = tmp_path / "a.tar"
    with open(path, "wb") as file:
        file.write(info.tobuf())
        file.truncate(1 << 31)  # a sparse file
    with pytest.raises(ValueError, match="a.tar' is damaged: a header of 1,073,741,8.. bytes"):
        open_captioned(str(path), "", "train")


def test_links_and_large_members_of_a_tar_are_not_taken(tmp_path, monkeypatch):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        link = tarfile.TarInfo("0.png")
        link.type = tarfile.SYMTYPE
        link.linkname = "/etc/passwd"
        tar.addfile(link)
        for name, content in {"0.txt": b"a", "1.png": png(1), "1.txt": b"b" * 2000}.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    monkeypatch.setattr(captions, "MAX_TEXT_BYTES", 1000)
    with pytest.raises(ValueError, match="no image of its 1 tar files has a .txt or .json"):
        open_captioned(str(path), "", "train")


@pytest.mark.parametrize(
    "name, error, message",
    [
        ("no/such/folder/", FileNotFoundError, "^name = 'no/such/folder' is no folder"),
        ("no/list.json", FileNotFoundError, "^name = 'no/list.json': no such file"),
        ("no/a-*.tar", FileNotFoundError, "no such tar file"),
        ("a.tar.gz", ValueError, "is compressed, .*unpack it"),
        ("nothing", FileNotFoundError, "^name = 'nothing' is no prepared TFDS data set"),
    ],
)
def test_a_source_that_is_not_there_is_named(tmp_path, monkeypatch, name, error, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=message):
        open_captioned(name, str(tmp_path), "train")


def test_a_folder_without_texts_is_told_what_it_lacks(tmp_path):
    picture(0).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match="none of its 1 images has its captions beside it"):
        open_captioned(f"{tmp_path}/", "", "train")


def test_captions_are_taken_in_a_fixed_order_and_empty_ones_are_none():
    item = {"sharegpt4v": " long ", "prompt": "short", "captions": ["a", ""], "text": None}
    assert captions_of(item) == ["a", "short", "long"]
    assert check_captions([" ", ""]) == []
