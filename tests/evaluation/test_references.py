"""Statistics of images, of files by other tools, and of data sets; hostile files among them."""

import jax
import numpy as np
import pytest
from tiny_dataset import put_digits
from tiny_extractor import batches_of, features_of, make_extractor, random_images

from lit_jax.data import dataset
from lit_jax.evaluation import references


@pytest.mark.parametrize("count, batch_size", [(40, 8), (43, 8), (3, 64), (33, 16)])
def test_a_ragged_last_batch_is_neither_lost_nor_padded(count, batch_size):
    extractor = make_extractor()
    images = random_images(count)
    statistics = references.collect(extractor, batches_of(images, batch_size), batch_size)
    expected = features_of(images, extractor)
    assert statistics.count == count
    for key in ("pool", "spatial"):
        mean, covariance = statistics.moments[key]
        np.testing.assert_allclose(mean, expected[key].mean(0), rtol=1e-5)
        np.testing.assert_allclose(
            covariance, np.cov(expected[key], rowvar=False), rtol=1e-3, atol=1e-6
        )
    np.testing.assert_allclose(statistics.features, expected["pool"], rtol=1e-5)
    np.testing.assert_allclose(statistics.logits, expected["logits"], rtol=1e-5)


def test_kept_features_are_those_of_the_chosen_images():
    extractor = make_extractor()
    images = random_images(43)
    keep = references.spread(43, 10)
    np.testing.assert_array_equal(keep, [0, 4, 8, 12, 17, 21, 25, 30, 34, 38])
    statistics = references.collect(extractor, batches_of(images, 8), 8, keep=keep)
    expected = features_of(images, extractor)["pool"][keep]
    np.testing.assert_allclose(statistics.features, expected, rtol=1e-5)
    np.testing.assert_array_equal(references.spread(5, 10), np.arange(5))


def test_one_image_is_too_few():
    with pytest.raises(ValueError, match="at least 2 images, got 1"):
        references.collect(make_extractor(), [random_images(1)], 8)


def save_adm_reference(path, extractor, images, **others):
    expected = features_of(images, extractor)
    np.savez(
        path,
        mu=expected["pool"].mean(0).astype(np.float32),
        sigma=np.cov(expected["pool"], rowvar=False),
        mu_s=expected["spatial"].mean(0).astype(np.float32),
        sigma_s=np.cov(expected["spatial"], rowvar=False),
        **others,
    )


def load(path, extractor, num_neighbour_images=20):
    return references.load_reference(
        path, extractor, batch_size=8, num_neighbour_images=num_neighbour_images
    )


def test_adm_reference_is_read_as_it_is(tmp_path):
    """Its statistics are of the whole training set, its images only for precision and recall."""
    extractor = make_extractor("inception_adm")
    whole = random_images(100)
    save_adm_reference(tmp_path / "adm.npz", extractor, whole, arr_0=whole[:30])
    reference = load(tmp_path / "adm.npz", extractor, 25)
    expected = features_of(whole, extractor)
    np.testing.assert_allclose(reference.moments["pool"][0], expected["pool"].mean(0), rtol=1e-6)
    np.testing.assert_allclose(
        reference.moments["spatial"][1], np.cov(expected["spatial"], rowvar=False), rtol=1e-9
    )
    np.testing.assert_allclose(reference.features, expected["pool"][:25], rtol=1e-5)
    assert reference.identity["neighbour_images"] == 25


def test_statistics_of_other_features_are_not_used(tmp_path):
    adm = make_extractor("inception_adm")
    other = make_extractor("tiny")
    images = random_images(40)
    save_adm_reference(tmp_path / "adm.npz", adm, images, arr_0=images[:30])
    reference = load(tmp_path / "adm.npz", other)
    assert reference.count == 30  # from its images
    expected = features_of(images[:30], other)["pool"].mean(0)
    np.testing.assert_allclose(reference.moments["pool"][0], expected, rtol=1e-5)
    assert len(reference.features) == 20

    save_adm_reference(tmp_path / "no_images.npz", adm, images)
    message = r"^reference = .*no_images.npz holds statistics of inception_adm and no images.*tiny"
    with pytest.raises(ValueError, match=message):
        load(tmp_path / "no_images.npz", other)
    np.savez(tmp_path / "pytorch_fid.npz", mu=np.zeros(12), sigma=np.eye(12))
    with pytest.raises(ValueError, match="statistics of inception_pytorch_fid and no images"):
        load(tmp_path / "pytorch_fid.npz", adm)
    reference = load(tmp_path / "pytorch_fid.npz", make_extractor("inception_pytorch_fid"))
    assert reference.features is None and list(reference.moments) == ["pool"]
    np.savez(tmp_path / "nothing.npz", x=np.zeros(3))
    with pytest.raises(ValueError, match=r"neither statistics nor images, but \['x'\]"):
        load(tmp_path / "nothing.npz", adm)
    (tmp_path / "text.npz").write_text("text")
    with pytest.raises(ValueError, match="^reference = .*text.npz is not an npz file"):
        load(tmp_path / "text.npz", adm)


# Whatever lies under the names that ADM uses: pickles, other shapes, other types, broken archives.


class Malicious:
    def __reduce__(self):
        return (eval, ("__import__('pathlib').Path('was_run').touch()",))


IMAGES = random_images(20)
PICKLED = np.array([Malicious()], object)
GOOD = {
    "mu": np.zeros(12),
    "sigma": np.eye(12),
    "mu_s": np.zeros(3),
    "sigma_s": np.eye(3),
    "arr_0": IMAGES,
}
OURS = {"features": np.zeros((4, 12))}


@pytest.fixture
def path(tmp_path, monkeypatch):
    """The path of a reference; what it holds may not run."""
    monkeypatch.chdir(tmp_path)
    yield tmp_path / "reference.npz"
    assert not (tmp_path / "was_run").exists()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"mu": PICKLED}, "mu cannot be read: Object arrays cannot be loaded"),
        ({"arr_0": PICKLED}, "arr_0 is object"),
        (OURS | {"protocol": PICKLED}, "protocol cannot be read as JSON text: Object arrays"),
        (OURS | {"protocol": "[1]"}, "protocol is a JSON list"),
        (OURS | {"protocol": "{}"}, "its protocol lacks count, extractor, identity"),
        (
            {"mu": np.zeros(13)},
            r"mu \(13,\) and sigma \(12, 12\) are not of the network's 12 features",
        ),
        (
            {"sigma_s": np.eye(4)},
            r"mu_s \(3,\) and sigma_s \(4, 4\) are not of the network's 3 features",
        ),
        (
            {"sigma": np.full((12, 12), np.nan)},
            r"sigma is float64 \(12, 12\), expected 2 axes of finite floats",
        ),
        ({"mu": np.array("text")}, r"mu is <U4 \(\), expected 1 axes of finite floats"),
    ],
)
def test_a_hostile_array_is_refused_and_runs_nothing(path, change, message):
    np.savez(path, **GOOD | change)
    with pytest.raises(ValueError, match=f"^reference = .*reference.npz: {message}"):
        load(path, make_extractor("inception_adm"))


def test_a_damaged_archive_is_refused(path):
    adm = make_extractor("inception_adm")
    np.savez(path, **{key: value for key, value in GOOD.items() if key != "sigma"})
    with pytest.raises(ValueError, match="sigma cannot be read"):
        load(path, adm)

    np.savez(path, **GOOD)
    content = bytearray(path.read_bytes())
    content[content.index(IMAGES.tobytes()[:64]) + 700] ^= 1  # in the second batch of 8 images
    path.write_bytes(content)
    with pytest.raises(ValueError, match="arr_0 is damaged after|Bad CRC"):
        load(path, adm)

    np.savez(path, arr_0=IMAGES)
    content = path.read_bytes()
    at = content.index(b"PK\1\2")
    for offset, value in ((8, 1), (10, 77)):  # encrypted; compressed by an unknown method
        broken = bytearray(content)
        broken[at + offset] = broken[offset - 2] = value
        path.write_bytes(broken)
        with pytest.raises(ValueError, match="reference.npz"):
            load(path, adm)

    np.savez(path, arr_0=np.zeros((4, 0, 0, 3), np.uint8))
    with pytest.raises(ValueError, match=r"arr_0 is uint8 \(4, 0, 0, 3\)"):
        load(path, adm)
    with path.open("wb") as file:
        np.save(file, PICKLED)
    with pytest.raises(ValueError, match="not an npz file"):
        load(path, adm)


# Data sets


def make_dataset(images):
    records = [{"image": image, "label": 0} for image in images]
    return dataset.ImageDataset("x", "test", records, images.shape[1:], 1)


def test_dataset_statistics_are_kept_and_belong_to_their_protocol(tmp_path, monkeypatch):
    extractor = make_extractor()
    images = random_images(40)
    cache = tmp_path / "reference.npz"

    def compute(num_neighbour_images):
        return references.dataset_reference(
            make_dataset(images),
            extractor,
            batch_size=16,
            num_neighbour_images=num_neighbour_images,
            cache=cache,
        )

    first = compute(20)
    assert first.count == 40 and first.features.shape == (20, 12)
    expected = features_of(images, extractor)["pool"]
    np.testing.assert_allclose(first.moments["pool"][0], expected.mean(0), rtol=1e-5)
    written = cache.stat().st_mtime_ns

    again = compute(20)
    assert cache.stat().st_mtime_ns == written and again.identity == first.identity
    for key in ("pool", "spatial"):
        for kept, computed in zip(again.moments[key], first.moments[key]):
            np.testing.assert_array_equal(kept, computed)
    np.testing.assert_array_equal(load(cache, extractor).features, first.features)
    with pytest.raises(ValueError, match="another protocol: weights is 'w1' and 'w2'"):
        load(cache, make_extractor(weights="w2"))

    # Another process of a training run computes them too, and leaves the file to process 0.
    with monkeypatch.context() as patch:
        patch.setattr(jax, "process_index", lambda: 1)
        assert len(compute(15).features) == 15
    assert cache.stat().st_mtime_ns == written
    assert len(compute(25).features) == 25


def test_statistics_kept_of_another_data_set_of_the_same_name_are_not_used(tmp_path):
    def reference(images):
        return references.dataset_reference(
            make_dataset(images),
            make_extractor(),
            batch_size=8,
            num_neighbour_images=5,
            cache=tmp_path / "reference.npz",
        )

    images = random_images(10)
    first = reference(images)
    for other in (random_images(10, seed=1), random_images(10, size=16)):
        changed = reference(other)
        assert changed.identity != first.identity
        assert not np.array_equal(changed.features, first.features)
    assert reference(images).identity == first.identity


def test_a_user_names_a_split_or_a_file(tmp_path):
    extractor = make_extractor()
    data = put_digits(tmp_path / "data")

    def make(reference):
        return references.make_reference(
            reference,
            data,
            tmp_path / "run",
            extractor,
            batch_size=100,
            num_neighbour_images=50,
        )

    computed = make("mnist_digits:test")
    assert computed.count == 500 and len(computed.features) == 50
    (cache,) = (tmp_path / "run").iterdir()
    assert cache.name == "reference_mnist_digits_test_tiny_w1.npz"
    np.testing.assert_array_equal(make(str(cache)).features, computed.features)

    for reference, error, message in [
        ("", ValueError, "reference = '' is empty"),
        ("cifar10", ValueError, "reference = 'cifar10' is neither an npz file, nor a folder,"),
        ("x.npz", FileNotFoundError, "reference = x.npz not found"),
        ("nothing:train", FileNotFoundError, "reference = nothing:train: .*'nothing'"),
        ("mnist_digits:nothing", ValueError, "reference = mnist_digits:nothing: .*'nothing'"),
    ]:
        with pytest.raises(error, match=f"^{message}"):
            make(reference)
