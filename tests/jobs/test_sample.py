"""The sampling job: the npz, its protocol, and images that their number decides.

Neither the batch, nor the devices, nor an interruption changes an image.
"""

import json
import shutil
import types

import full_disk
import jax
import numpy as np
import pytest
from etils import epath
from PIL import Image
from restored import restore_params

from configs import debug
from lit_jax import checkpoint, conditions, pictures, sampling, sharding
from lit_jax.experiment import Experiment
from lit_jax.jobs import sample
from lit_jax.models import param_shapes
from lit_jax.runtime import workdir_lock

COUNT = 50
NAMES = "ant bee cat dog eel fox gnu hen ibex jay".split()


@pytest.fixture(scope="module")
def config():
    config = debug.get_config()
    config.model.update(
        attention="softmax", input_size=8, patch_size=4, in_channels=3, num_classes=10
    )
    config.sample.update(sampler="ddpm", steps=3, num_images=COUNT, batch_size=16, cfg_scale=1.5)
    return config


@pytest.fixture(scope="module")
def weights(config, tmp_path_factory):
    """A checkpoint of random parameters: at init a DiT draws the same zeros for every label."""
    architecture = Experiment(config).model_config
    shapes = param_shapes(architecture)
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: (0.1 * rng.standard_normal(leaf.shape)).astype(np.float32), shapes
    )
    path = tmp_path_factory.mktemp("weights") / "params"
    about = {"model": architecture.to_json(), "class_names": NAMES}
    checkpoint.save_params(path, params, about)
    config.sample.checkpoint = str(path)
    return params


def draw(config, workdir, **change):
    config = config.copy_and_resolve_references()
    # Of a resolved copy every field keeps the type that it has.
    with config.ignore_type():
        config.sample.update(change)
    sample.run(config, workdir)
    return read_pngs(workdir)


def read_pngs(workdir):
    return {path.name: path.read_bytes() for path in sorted((workdir / "samples").glob("*.png"))}


@pytest.fixture(scope="module")
def drawn(config, weights, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("drawn")
    return draw(config, workdir), workdir


def test_fifty_images_in_batches_of_another_size_are_the_same_bytes(config, drawn, tmp_path):
    images, _ = drawn
    assert len(images) == COUNT and len(set(images.values())) == COUNT
    assert draw(config, tmp_path, batch_size=24) == images


@pytest.mark.parametrize(
    "asked, expected",
    [
        (7, [7] * 5),
        ("dog", [3] * 5),
        (("dog", 0, "jay"), [3, 0, 9, 3, 0]),
        ("balanced", [0, 1, 2, 3, 4]),
    ],
)
def test_classes_are_asked_for_by_number_and_by_name(config, weights, tmp_path, asked, expected):
    draw(config, tmp_path, labels=asked, num_images=5)
    with np.load(tmp_path / "samples.npz") as archive:
        assert archive["label"].tolist() == expected
    about = json.loads((tmp_path / "samples" / "protocol.json").read_text())
    numbers = [asked] if asked == 7 else [NAMES.index("dog")] if asked == "dog" else [3, 0, 9]
    assert about["labels"] == (asked if asked == "balanced" else numbers)
    # The grid has a caption below each image, so its cells are wider than the image.
    with Image.open(tmp_path / "samples.png") as grid:
        assert grid.width > 3 * pictures.CAPTION_WIDTH


@pytest.mark.parametrize(
    "asked, message",
    [
        (
            "dgo",
            r"^sample.labels = 'dgo', but .*numbers from 0 to 9, or names; did you mean dog\?$",
        ),
        (10, "^sample.labels = 10, but it must be random, balanced, or classes of the 10"),
        (-1, "^sample.labels = -1, but"),
        (True, "^sample.labels = True, but"),
        (("cat", 2.0), "^sample.labels = 2.0, but"),
        ((), r"^sample.labels = \(\), which names no class"),
    ],
)
def test_what_is_no_class_is_refused(config, weights, tmp_path, asked, message):
    with pytest.raises(ValueError, match=message):
        draw(config, tmp_path / "run", labels=asked)
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_without_names_knows_numbers_alone():
    assert conditions.choose_labels(4, 10) == (4,)
    with pytest.raises(ValueError, match="whose names the checkpoint does not tell"):
        conditions.choose_labels("dog", 10)


def test_names_may_be_numbers_or_shared():
    """A number is a class's place where there is one, else its name: of the first that has it."""
    years = ("2019", "2020", "2021", "2020")
    assert conditions.choose_labels(2020, 4, years) == (1,)
    assert conditions.choose_labels(["2021", 3], 4, years) == (2, 3)


def test_any_image_can_be_missing(config, drawn, tmp_path):
    """Images that exist stay. The others are drawn in other batches, and have the same bytes."""
    images, workdir = drawn
    shutil.copytree(workdir / "samples", tmp_path / "samples")
    for i in (0, 7, 8, 21, 49):
        (tmp_path / "samples" / f"{i:06d}.png").unlink()
    (tmp_path / "samples" / "000021.part").write_bytes(b"half a file")
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "samples").glob("*.png")}
    assert draw(config, tmp_path) == images
    assert all(path.stat().st_mtime_ns == then for path, then in kept.items())


def test_the_speed_of_a_resumed_run_holds_no_compilation(config, drawn, tmp_path, monkeypatch):
    """By a clock that moves where something is compiled, drawn or written."""
    images, workdir = drawn
    shutil.copytree(workdir / "samples", tmp_path / "samples")
    (tmp_path / "samples" / "000021.png").unlink()
    now = [0.0]

    def taking(seconds, function):
        def slower(*args):
            now[0] += seconds
            return function(*args)

        return slower

    monkeypatch.setattr(sample, "time", types.SimpleNamespace(monotonic=lambda: now[0]))
    for name, seconds in (("compile", 1000.0), ("draw", 0.5)):
        function = getattr(sampling.Sampler, name)
        monkeypatch.setattr(sampling.Sampler, name, taking(seconds, function))
    assert draw(config, tmp_path) == images
    assert json.loads((tmp_path / "samples" / "speed.json").read_text())["images_per_second"] == 2


def test_in_int8_images_are_near_those_in_full_and_are_not_mixed_with_them(config, drawn, tmp_path):
    _, workdir = drawn
    images = draw(config, tmp_path, quantize="int8_weights", num_images=4)
    both = [
        np.stack([sample.read_image(epath.Path(folder) / "samples" / name) for name in images])
        for folder in (workdir, tmp_path)
    ]
    distance = np.abs(both[0].astype(np.float32) - both[1]).mean()
    assert 0 < distance < 8  # of 255
    protocol = json.loads((tmp_path / "samples" / "protocol.json").read_text())
    assert protocol["quantize"] == "int8_weights"
    with pytest.raises(ValueError, match="drawn with quantize = int8_weights, this run has None"):
        draw(config, tmp_path, num_images=4)


def test_fewer_images_are_the_first_ones(config, drawn, tmp_path):
    assert list(draw(config, tmp_path, num_images=3).items()) == list(drawn[0].items())[:3]
    with np.load(tmp_path / "samples.npz") as archive:
        assert archive["arr_0"].shape == (3, 8, 8, 3)


def test_one_device_and_eight_draw_the_same_noise_labels_and_ids_and_pixels_to_one_grey_level(
    config, weights, drawn
):
    index, results = np.arange(COUNT), []
    for devices in (jax.devices()[:1], jax.devices()):
        mesh = sharding.make_mesh(devices=devices)
        experiment = Experiment(config)
        experiment.mesh = mesh
        sampler = experiment.sampler(batch_size=16)
        labels = conditions.for_images(
            experiment.model_config, index, seed=config.seed, labels="random"
        )
        params = jax.device_put(weights, sharding.replicated(mesh))
        results.append((labels, pictures.to_uint8(sampler(params, index, labels)).astype(int)))
    (labels_one, one), (labels_eight, eight) = results
    np.testing.assert_array_equal(labels_one["label"], labels_eight["label"])
    assert np.abs(one - eight).max() <= 1 and (one != eight).mean() < 0.01
    pngs = np.stack([sample.read_image(sample.image_path(drawn[1] / "samples", i)) for i in index])
    np.testing.assert_array_equal(pngs, eight)


def test_the_npz_holds_images_labels_and_protocol(config, drawn):
    _, workdir = drawn
    with np.load(workdir / "samples.npz") as archive:
        assert set(archive) == {"arr_0", "label", "protocol", "speed"}
        speed = json.loads(str(archive["speed"]))
        images, labels, protocol = (
            archive["arr_0"],
            archive["label"],
            json.loads(str(archive["protocol"])),
        )
    assert images.shape == (COUNT, 8, 8, 3) and images.dtype == np.uint8
    for i in (0, 31, 49):
        np.testing.assert_array_equal(
            images[i], sample.read_image(workdir / "samples" / f"{i:06d}.png")
        )
    assert (
        len(labels) == COUNT
        and len(set(labels.tolist())) > 5
        and set(labels.tolist()) <= set(range(10))
    )
    assert len(protocol["weights"]) == 64
    wanted = {
        "autoencoder": "none",
        "sampler": "ddpm",
        "steps": 3,
        "cfg_scale": 1.5,
        "cfg_channels": "all",
        "labels": "random",
        "seed": 0,
    }
    assert {name: protocol[name] for name in wanted} == wanted
    assert (speed["device"], speed["devices"]) == ("cpu", 8) and speed["images_per_second"] > 0


def test_a_request_that_cannot_be_drawn_leaves_nothing(config, weights, tmp_path):
    """Else the folder would refuse the request that is put right."""
    for change, message in (
        ({"cfg_channels": "2"}, "sample.cfg_channels must be one of 3, all; got '2'"),
        ({"cfg_interval": (5.0, 1.0)}, "sample.cfg_interval must be two numbers"),
        ({"variance": "none"}, "sample.variance must be one of .*; got 'none'"),
        ({"labels": "sorted"}, "sample.labels = 'sorted', but it must be random"),
    ):
        with pytest.raises(ValueError, match=message):
            draw(config, tmp_path / "workdir", **change)
        assert not (tmp_path / "workdir").exists()


def test_torn_pngs_are_drawn_again(config, drawn, tmp_path):
    images, workdir = drawn
    shutil.copytree(workdir / "samples", tmp_path / "samples")
    for i, content in (
        (0, b""),
        (3, images["000003.png"][:60]),
        (5, images["000005.png"][:-1]),
        (9, b"\0" * 100),
    ):
        (tmp_path / "samples" / f"{i:06d}.png").write_bytes(content)
    assert draw(config, tmp_path) == images


def test_an_image_that_does_not_belong_is_named_and_the_npz_stays_as_it_was(
    config, drawn, tmp_path
):
    images, workdir = drawn
    shutil.copytree(workdir / "samples", tmp_path / "samples")
    (tmp_path / "samples.npz").write_text("the old one")
    path = tmp_path / "samples" / "000007.png"
    middle = len(images[path.name]) // 2
    damaged = images[path.name][:middle] + b"\xff" + images[path.name][middle + 1 :]
    sample.save_image(tmp_path / "larger.png", np.zeros((16, 16, 3), np.uint8))
    larger = (tmp_path / "larger.png").read_bytes()
    for content, message in (
        (larger, r"000007.png is uint8 \(16, 16, 3\), 000000.png is uint8 \(8, 8, 3\)"),
        (damaged, "000007.png cannot be read"),
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            draw(config, tmp_path)
        assert (tmp_path / "samples.npz").read_text() == "the old one"


def test_images_that_are_not_finite_are_named_and_not_written(
    config, weights, tmp_path, monkeypatch
):
    """All weights are finite, but the last layer's product is not."""
    huge = jax.tree.map(np.copy, weights)
    huge["final_layer"]["linear"]["kernel"] *= np.float32(1e37)
    path = tmp_path / "params"
    checkpoint.save_params(path, huge, {"model": Experiment(config).model_config.to_json()})
    message = "000000.png, 000001.png, 000002.png would hold NaN or infinite values"
    with pytest.raises(ValueError, match=message):
        draw(config, tmp_path / "drawn", checkpoint=str(path), num_images=3)
    assert not list((tmp_path / "drawn").rglob("*.png"))


def test_images_of_another_size_are_not_mixed_in(config, drawn):
    other = config.copy_and_resolve_references()
    other.model.input_size = 16
    with pytest.raises(ValueError, match="holds images drawn with input_size = 8, this run has 16"):
        draw(other, drawn[1])


@pytest.mark.parametrize("field, value", [("cfg_scale", 2.0), ("steps", 4), ("labels", "balanced")])
def test_images_of_another_protocol_are_not_mixed_in(config, drawn, field, value):
    with pytest.raises(
        ValueError, match=f"holds images drawn with {field} = .*, this run has {value}"
    ):
        draw(config, drawn[1], **{field: value})


def test_a_damaged_protocol_is_named_and_a_damaged_speed_left_out(config, drawn, tmp_path):
    shutil.copytree(drawn[1] / "samples", tmp_path / "samples")
    (tmp_path / "samples" / "speed.json").write_text('{"images_per_')
    draw(config, tmp_path)
    with np.load(tmp_path / "samples.npz") as archive:
        assert "speed" not in archive and "protocol" in archive
    (tmp_path / "samples" / "protocol.json").write_bytes(b"\xff\0")
    with pytest.raises(ValueError, match="samples/protocol.json is damaged.* remove the folder"):
        draw(config, tmp_path)


@pytest.mark.parametrize(
    "dropout, cfg_scale, warned", [(0.0, 4.0, 1), (0.1, 4.0, 0), (0.0, 1.0, 0)]
)
def test_guidance_by_a_null_class_that_was_never_trained_is_warned_of(
    config, drawn, tmp_path, caplog, dropout, cfg_scale, warned
):
    params, metadata = restore_params(config.sample.checkpoint)
    about = {"model": metadata["model"], "fields": {"train.label_dropout": dropout}}
    checkpoint.save_params(tmp_path / "params", params, about)
    path = str(tmp_path / "params")
    draw(config, tmp_path / "drawn", checkpoint=path, num_images=1, cfg_scale=cfg_scale)
    message = f"{path} was trained with train.label_dropout = 0"
    assert sum(message in text for text in caplog.messages) == warned


def test_rows_of_a_batch_are_handed_out_once():
    batch = jax.device_put(
        np.arange(32).reshape(16, 2), sharding.batch_sharding(sharding.make_mesh(4, 2))
    )
    rows = dict(sample.local_rows(batch))
    assert sorted(rows) == list(range(16))
    for row, value in rows.items():
        np.testing.assert_array_equal(value, [2 * row, 2 * row + 1])


def test_a_second_sampling_in_the_folder_is_refused_and_told_the_owner(
    config, weights, tmp_path, monkeypatch
):
    monkeypatch.setattr(workdir_lock, "WAIT_SECONDS", 0.0)
    folder = tmp_path / "samples"
    with workdir_lock.lock_folder(folder, "", ""):
        with pytest.raises(ValueError, match=f"^{folder} is in use by process .*another --workdir"):
            sample.run(config, tmp_path)
    assert [path.name for path in folder.iterdir()] == ["lock"]


def test_a_full_disk_names_the_file_and_leaves_the_old_one(tmp_path):
    path = epath.Path(tmp_path) / "000000.png"
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8)
    with full_disk.full_disk(), pytest.raises(OSError, match=f"^{path} {full_disk.MESSAGE}"):
        sample.save_image(path, noise)
    assert not list(tmp_path.iterdir())
    sample.save_image(path, noise)
    npz = epath.Path(tmp_path) / "samples.npz"
    npz.write_text("the old one")
    with full_disk.full_disk(), pytest.raises(OSError, match=f"^{npz} {full_disk.MESSAGE}"):
        sample.write_npz(npz, [path], {}, {})
    assert npz.read_text() == "the old one"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["000000.png", "samples.npz"]
