"""The evaluation job: files of images, references, protocols, and the reports."""

import json
import pathlib

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
from PIL import Image

from configs import debug
from lit_jax.data import dataset
from lit_jax.evaluation import features, protocol, references, reports
from lit_jax.jobs import evaluate, sample, train


def make_extractor(name="tiny", weights="w1"):
    """A real extractor with a tiny network: means of the four quarters of an image, and their products."""

    def network(params, x):
        B, H, W, C = x.shape
        quarters = (
            x.reshape(B, 2, H // 2, 2, W // 2, C).mean((2, 4)).reshape(B, -1) * params["scale"]
        )  # (B, 4 C)
        return {
            "pool": quarters,
            "spatial": quarters[:, :3] * quarters[:, 3:6],
            "logits": quarters[:, :5],
        }

    protocol = {"features": name, "weights": weights}
    return features.Extractor(
        name,
        "tiny",
        {"pool": "fd", "spatial": "sfd"},
        True,
        protocol,
        {"scale": jnp.float32(0.01)},
        network,
        lambda x: x,
        lambda x: x.astype(jnp.float32),
    )


def random_images(count, seed=0, size=8):
    rng = np.random.default_rng(seed)
    smooth = rng.uniform(0, 255, (count, 2, 2, 3)).repeat(size // 2, 1).repeat(size // 2, 2)
    return np.clip(smooth + rng.normal(0, 20, (count, size, size, 3)), 0, 255).astype(np.uint8)


def features_of(images, extractor):
    return {
        k: np.asarray(v, np.float64)
        for k, v in extractor.network(extractor.params, images.astype(np.float32)).items()
    }


def batches_of(images, batch_size):
    return (images[i : i + batch_size] for i in range(0, len(images), batch_size))


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("num_images, batch_size", [(23, 8), (16, 8), (5, 64)])
def test_images_stream_from_npz_in_file_order(tmp_path, save, num_images, batch_size):
    images, path = random_images(23), tmp_path / "images.npz"
    save(path, arr_0=images, arr_1=np.arange(23), protocol=json.dumps({"steps": 250}))
    assert references.npz_shape(path) == (23, 8, 8, 3)
    batches = list(references.npz_batches(path, num_images, batch_size))
    assert all(len(batch) == batch_size for batch in batches[:-1])
    np.testing.assert_array_equal(np.concatenate(batches), images[:num_images])
    assert (
        references.npz_json(path, "protocol") == {"steps": 250}
        and references.npz_json(path, "speed") == {}
    )


def test_files_that_are_no_images_are_named(tmp_path):
    path = tmp_path / "x.npz"
    for images, message in [
        (np.zeros((2, 8, 8, 3), np.float32), "float32"),
        (np.zeros((2, 8, 8), np.uint8), r"\(2, 8, 8\)"),
        (np.zeros((2, 3, 8, 8), np.uint8), r"\(2, 3, 8, 8\)"),
        (np.asfortranarray(np.zeros((2, 8, 8, 3), np.uint8)), "Fortran"),
    ]:
        np.savez(path, arr_0=images)
        with pytest.raises(ValueError, match=message):
            references.npz_shape(path)
    np.savez(path, other=np.zeros(3))
    with pytest.raises(ValueError, match="not an npz with an array 'arr_0'"):
        references.npz_shape(path)
    path.write_bytes(b"no zip")
    with pytest.raises(ValueError, match="not an npz"):
        references.npz_shape(path)
    with pytest.raises(FileNotFoundError, match="nowhere.npz not found"):
        references.npz_shape(tmp_path / "nowhere.npz")


@pytest.mark.parametrize("count, batch_size", [(40, 8), (43, 8), (3, 64), (33, 16)])
def test_a_ragged_last_batch_is_neither_lost_nor_padded(count, batch_size):
    extractor, images = make_extractor(), random_images(count)
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
    extractor, images = make_extractor(), random_images(43)
    keep = references.spread(43, 10)
    np.testing.assert_array_equal(keep, [0, 4, 8, 12, 17, 21, 25, 30, 34, 38])
    statistics = references.collect(extractor, batches_of(images, 8), 8, keep=keep)
    np.testing.assert_allclose(
        statistics.features, features_of(images, extractor)["pool"][keep], rtol=1e-5
    )
    np.testing.assert_array_equal(references.spread(5, 10), np.arange(5))


def test_scores_are_named_for_what_they_measure():
    extractor = make_extractor()
    reference = references.collect(extractor, batches_of(random_images(50, 1), 16), 16)
    before = []
    scores = protocol.score_images(
        extractor, random_images(43), reference, batch_size=16, on_batch=before.append
    )
    assert before == [0, 16, 32]
    assert list(scores) == [
        "fd_tiny_43",
        "sfd_tiny_43",
        "is_tiny_43",
        "precision_tiny_43",
        "recall_tiny_43",
    ]
    assert protocol.count_name(50_000) == "50k" and protocol.count_name(1234) == "1234"
    same = protocol.score_images(extractor, random_images(50, 1), reference)
    assert (
        abs(same["fd_tiny_50"]) < 1e-5
        and same["precision_tiny_50"] == same["recall_tiny_50"] == 1.0
    )
    assert scores["fd_tiny_43"] > 0.01


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
    """Its statistics are of the whole training set, its images are for precision and recall alone."""
    extractor, whole = make_extractor("inception_adm"), random_images(100)
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
    adm, other, images = make_extractor("inception_adm"), make_extractor("tiny"), random_images(40)
    save_adm_reference(tmp_path / "adm.npz", adm, images + np.uint8(0), arr_0=images[:30])
    reference = load(tmp_path / "adm.npz", other)
    assert reference.count == 30  # from its images
    np.testing.assert_allclose(
        reference.moments["pool"][0], features_of(images[:30], other)["pool"].mean(0), rtol=1e-5
    )
    assert len(reference.features) == 20

    save_adm_reference(tmp_path / "no_images.npz", adm, images)
    with pytest.raises(
        ValueError, match="statistics of inception_adm and no images.*evaluate.features = tiny"
    ):
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
    with pytest.raises(ValueError, match="not an npz file"):
        load(tmp_path / "text.npz", adm)


def test_a_hostile_or_damaged_npz_is_refused_and_runs_nothing(tmp_path, monkeypatch):
    """Whatever lies under the names that ADM uses: pickles, other shapes, other types, broken archives."""

    class Malicious:
        def __reduce__(self):
            return (eval, ("__import__('pathlib').Path('was_run').touch()",))

    monkeypatch.chdir(tmp_path)
    adm, path, images = (
        make_extractor("inception_adm"),
        tmp_path / "reference.npz",
        random_images(20),
    )
    good = {
        "mu": np.zeros(12),
        "sigma": np.eye(12),
        "mu_s": np.zeros(3),
        "sigma_s": np.eye(3),
        "arr_0": images,
    }
    pickled = np.array([Malicious()], object)
    for change, message in [
        ({"mu": pickled}, "mu cannot be read: Object arrays cannot be loaded"),
        ({"arr_0": pickled}, "arr_0 is object"),
        (
            {"protocol": pickled, "features": np.zeros((4, 12))},
            "protocol cannot be read as JSON text: Object arrays",
        ),
        ({"protocol": "[1]", "features": np.zeros((4, 12))}, "protocol is a JSON list"),
        (
            {"protocol": "{}", "features": np.zeros((4, 12))},
            "its protocol lacks count, extractor, identity",
        ),
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
    ]:
        np.savez(path, **good | change)
        with pytest.raises(ValueError, match=f"reference.npz: {message}"):
            load(path, adm)
    np.savez(path, **{key: value for key, value in good.items() if key != "sigma"})
    with pytest.raises(ValueError, match="sigma cannot be read"):
        load(path, adm)
    np.savez(path, **good)
    content = bytearray(path.read_bytes())
    content[content.index(images.tobytes()[:64]) + 700] ^= 1  # in the second batch of 8 images
    path.write_bytes(content)
    with pytest.raises(ValueError, match="arr_0 is damaged after|Bad CRC"):
        load(path, adm)
    np.savez(path, arr_0=images)
    content = path.read_bytes()
    at = content.index(b"PK\1\2")
    for offset, value in ((8, 1), (10, 77)):  # encrypted; compressed in an unknown way
        broken = bytearray(content)
        broken[at + offset] = broken[offset - 2] = value
        path.write_bytes(broken)
        with pytest.raises(ValueError, match="reference.npz"):
            load(path, adm)
    np.savez(path, arr_0=np.zeros((4, 0, 0, 3), np.uint8))
    with pytest.raises(ValueError, match=r"arr_0 is uint8 \(4, 0, 0, 3\)"):
        load(path, adm)
    with path.open("wb") as file:
        np.save(file, pickled)
    with pytest.raises(ValueError, match="not an npz file"):
        load(path, adm)
    assert not (tmp_path / "was_run").exists()


def test_dataset_statistics_are_kept_and_belong_to_their_protocol(tmp_path, monkeypatch):
    extractor, cache = make_extractor(), tmp_path / "reference.npz"
    kwargs = dict(batch_size=100, num_neighbour_images=50, cache=cache)
    first = references.dataset_reference("mnist_digits", "test", str(tmp_path), extractor, **kwargs)
    assert first.count == 500 and first.features.shape == (50, 12)
    written = cache.stat().st_mtime_ns
    again = references.dataset_reference("mnist_digits", "test", str(tmp_path), extractor, **kwargs)
    assert cache.stat().st_mtime_ns == written and again.identity == first.identity
    for key in ("pool", "spatial"):
        for kept, computed in zip(again.moments[key], first.moments[key]):
            np.testing.assert_array_equal(kept, computed)
    np.testing.assert_array_equal(load(cache, extractor).features, first.features)
    with pytest.raises(ValueError, match="another protocol: weights is 'w1' and 'w2'"):
        load(cache, make_extractor(weights="w2"))
    # Another process of a training run computes them too, and leaves the file to process 0.
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    kwargs["num_neighbour_images"] = 40
    assert (
        len(
            references.dataset_reference(
                "mnist_digits", "test", str(tmp_path), extractor, **kwargs
            ).features
        )
        == 40
    )
    assert cache.stat().st_mtime_ns == written
    monkeypatch.undo()
    kwargs["num_neighbour_images"] = 60
    more = references.dataset_reference("mnist_digits", "test", str(tmp_path), extractor, **kwargs)
    assert len(more.features) == 60


def test_statistics_kept_of_another_data_set_of_the_same_name_are_not_used(tmp_path, monkeypatch):
    def reference(images):
        source = dataset.ImageDataset(
            "x", "test", [{"image": image, "label": 0} for image in images], images.shape[1:], 1
        )
        monkeypatch.setattr(dataset, "open_dataset", lambda *_: source)
        return references.dataset_reference(
            "x",
            "test",
            "",
            make_extractor(),
            batch_size=8,
            num_neighbour_images=5,
            cache=tmp_path / "reference.npz",
        )

    images = random_images(10)
    first = reference(images)
    for other in (random_images(10, seed=1), random_images(10, size=16)):
        changed = reference(other)
        assert changed.identity != first.identity and not np.array_equal(
            changed.features, first.features
        )
    assert reference(images).identity == first.identity


def make_config(**evaluate_fields):
    defaults = dict(
        features="efficientnet_lite0",
        weights="",
        samples="",
        reference="",
        num_images=0,
        batch_size=8,
        num_neighbour_images=10_000,
        neighbours=3,
        split_size=5000,
        self_check=False,
        compare=(),
        compare_across=("samples.cfg_scale",),
    )
    return ml_collections.ConfigDict(
        {"evaluate": defaults | evaluate_fields, "data": {"dir": "data"}}
    )


def test_samples_from_elsewhere_are_known_by_their_bytes(tmp_path, monkeypatch):
    """Neither the file's name nor the number of images tells two sets apart, or makes two of one."""
    monkeypatch.setattr(features, "make_extractor", lambda name, weights: make_extractor())
    np.savez(tmp_path / "reference.npz", arr_0=random_images(8))
    results = []
    for folder, seed in (("a", 0), ("b", 1), ("c", 0)):
        workdir = tmp_path / folder
        workdir.mkdir()
        np.savez(
            workdir / "samples.npz", arr_0=random_images(8, seed), speed=json.dumps({"devices": 2})
        )
        evaluate.run(make_config(reference=str(tmp_path / "reference.npz")), workdir)
        results.append(json.loads((workdir / "evaluation_samples.json").read_text()))
    assert results[0]["protocol"] == results[2]["protocol"] and results[0]["protocol"][
        "image_shape"
    ] == [8, 8, 3]
    with pytest.raises(
        ValueError, match="a and b were not made by the same protocol: samples.file is"
    ):
        protocol.check_comparable(dict(zip("ab", results)))


def test_the_job_scores_a_workdir_and_compares_guidance_scales(tmp_path):
    """End to end with EfficientNet-Lite0: the noisier the images, the farther they are, and the report says so."""
    images = random_images(8, size=32)
    np.savez(tmp_path / "reference.npz", arr_0=random_images(8, seed=1, size=32))
    rng, files, distances = np.random.default_rng(0), [], []
    for cfg_scale, noise in [(4.0, 60), (1.0, 0), (1.5, 20)]:
        workdir = tmp_path / f"cfg_{cfg_scale}"
        workdir.mkdir()
        samples = np.clip(images + rng.normal(0, noise, images.shape), 0, 255).astype(np.uint8)
        np.savez(
            workdir / f"samples_{cfg_scale}.npz",
            arr_0=samples,
            protocol=json.dumps({"sampler": "ddpm", "steps": 250, "cfg_scale": cfg_scale}),
            speed=json.dumps({"images_per_second": 12.34, "device": "abacus", "devices": 2}),
        )
        evaluate.run(
            make_config(
                reference=str(tmp_path / "reference.npz"),
                samples=str(workdir / f"samples_{cfg_scale}.npz"),
            ),
            workdir,
        )
        path = (
            workdir / f"evaluation_samples_{cfg_scale}"
        )  # the scale's fraction is part of the name
        files.append(f"{path}.json")
        result = json.loads(pathlib.Path(files[-1]).read_text())
        assert list(result["scores"]) == [
            "fd_efficientnet_lite0_8",
            "precision_efficientnet_lite0_8",
            "recall_efficientnet_lite0_8",
        ]
        assert (
            result["protocol"]["samples"]["cfg_scale"] == cfg_scale
            and result["protocol"]["weights"]
        )
        report = pathlib.Path(f"{path}.md").read_text()
        assert (
            "fd_efficientnet_lite0_8" in report and "Drawn at 12.3 images/s on 2 x abacus" in report
        )
        assert Image.open(f"{path}.png").size == (8 * 32, 32)
        distances.append(result["scores"]["fd_efficientnet_lite0_8"])
    assert distances[1] < distances[2] < distances[0]

    evaluate.run(make_config(compare=tuple(files)), tmp_path / "all")
    table = (tmp_path / "all" / "comparison.md").read_text()
    rows = [[cell.strip() for cell in row.split("|")[1:-1]] for row in table.splitlines()[2:]]
    assert rows[0] == ["run", "samples.cfg_scale", *result["scores"], "images/s drawn"]
    expected = zip(("1.0", "1.5", "4.0"), sorted(distances))
    assert [row[1:3] for row in rows[2:]] == [
        [scale, f"{distance:.4f}"] for scale, distance in expected
    ]
    assert {row[-1] for row in rows[2:]} == {"12.3"}
    assert Image.open(tmp_path / "all" / "comparison.png").width > 500
    with pytest.raises(ValueError, match="samples.cfg_scale is 4.0 and 1.0"):
        evaluate.run(make_config(compare=tuple(files), compare_across=()), tmp_path / "all")


def test_the_curve_over_guidance_scales_has_a_line_for_each_model(tmp_path, monkeypatch):
    """And its abscissa is the field that was asked for, though the seed differs too and comes first."""
    drawn = []
    monkeypatch.setattr(
        evaluate.Figure, "savefig", lambda figure, path, **kwargs: drawn.append((figure, path))
    )
    results = {}
    for weights, distances in (
        ("a" * 64, {4.0: 9.0, 1.0: 7.0, 1.5: 5.0}),
        ("b" * 64, {1.5: 6.0, 1.0: 8.0}),
    ):
        for scale, distance in distances.items():
            protocol = {
                "samples": {
                    "seed": len(weights) - 64 + (weights[0] == "b"),
                    "weights": weights,
                    "cfg_scale": scale,
                }
            }
            results[f"{weights[0]}{scale}"] = {
                "protocol": protocol,
                "scores": {
                    "fid_adm_50k": distance,
                    "precision_adm_50k": distance / 10,
                    "recall_adm_50k": scale / 10,
                },
            }
    across = ("samples.cfg_scale", "samples.weights", "samples.seed")
    protocol.check_comparable(results, across)
    reports.write_comparison(tmp_path / "comparison.1", results, across)
    ((figure, path),) = drawn
    left, right = figure.axes
    assert (
        path.name == "comparison.1.png"
        and left.get_xlabel() == "samples.cfg_scale"
        and left.get_ylabel() == "fid_adm_50k"
    )
    lines = {line.get_label(): line.get_xydata().tolist() for line in left.lines}
    assert list(lines.values()) == [[[1.0, 7.0], [1.5, 5.0], [4.0, 9.0]], [[1.0, 8.0], [1.5, 6.0]]]
    assert all(f"samples.weights {name * 12}" in label for name, label in zip("ab", lines))
    assert right.lines[1].get_xydata().tolist() == [[0.1, 0.8], [0.15, 0.6]]
    assert json.loads((tmp_path / "comparison.1.json").read_text())["runs"] == results


def test_training_scores_what_sampling_and_evaluation_score_after_it(tmp_path, monkeypatch):
    """The EMA weights of the last step, the images of the same numbers: one score by both ways, each with its protocol."""
    monkeypatch.setattr(features, "make_extractor", lambda name, weights: make_extractor())
    np.savez(tmp_path / "reference.npz", arr_0=random_images(12, size=28)[..., :1])
    config = debug.get_config()
    config.model.attention = "softmax"
    config.student.init = "random"
    config.optimizer.learning_rate = 0.01  # two steps that can be seen
    config.ema.decay = 0.5
    config.data.dir = str(tmp_path / "data")
    config.train.update(steps=2, batch_size=8, preview_every=0)
    config.report.num_images = 0
    config.sample.update(steps=2, num_images=8, batch_size=8, labels="balanced")
    config.evaluate.update(
        every=1,
        every_images=8,
        num_images=0,
        batch_size=8,
        reference=str(tmp_path / "reference.npz"),
    )
    workdir = tmp_path / "run"
    train.run(config, workdir)
    sample.run(config, workdir)
    evaluate.run(config, workdir)
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    logged = [
        {name: value for name, value in line.items() if name.startswith("eval/")}
        | {"step": line["step"]}
        for line in lines
        if "eval/fd_tiny_8" in line
    ]
    during = [json.loads((workdir / f"evaluation_{step:07d}.json").read_text()) for step in (1, 2)]
    after = json.loads((workdir / "evaluation_samples.json").read_text())
    assert logged == [
        {f"eval/{name}": value for name, value in result["scores"].items()} | {"step": step}
        for step, result in enumerate(during, 1)
    ]
    assert (
        during[1]["scores"] == pytest.approx(after["scores"], rel=1e-4)
        and during[0]["scores"] != during[1]["scores"]
    )
    with pytest.raises(ValueError, match="samples.weights is 'EMA in training of run .*' and"):
        protocol.check_comparable({"during": during[1], "after": after}, ("samples.step",))
    protocol.check_comparable(
        {"during": during[1], "after": after}, ("samples.step", "samples.weights")
    )
    protocol.check_comparable({"first": during[0], "second": during[1]}, ("samples.step",))


def test_runs_are_called_by_what_tells_them_apart(tmp_path):
    files = [
        tmp_path / folder / name
        for folder, name in (("a", "x.json"), ("b", "x.json"), ("b", "y.json"))
    ]
    for file in files:
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps(result_of()))
    for chosen, names in ((files[1:], ["x", "y"]), (files, ["a/x", "b/x", "b/y"])):
        evaluate.compare(map(str, chosen), (), tmp_path)
        assert list(json.loads((tmp_path / "comparison.json").read_text())["runs"]) == names


def result_of(**protocol):
    protocol = {"features": "inception_adm", "samples": {"cfg_scale": 1.5}} | protocol
    return {"scores": {"fid_adm_50k": 2.0}, "protocol": protocol}


def test_unequal_protocols_refuse_to_be_compared():
    protocol.check_comparable({"a": result_of(), "b": result_of()})
    with pytest.raises(
        ValueError, match="a and b were not made by the same protocol: weights is None and 'x'"
    ):
        protocol.check_comparable({"a": result_of(), "b": result_of(weights="x")})
    scales = {"a": result_of(), "b": result_of(samples={"cfg_scale": 4.0, "sampler": "ddim"})}
    with pytest.raises(ValueError, match="samples.sampler is None and 'ddim'"):
        protocol.check_comparable(scales, ("samples.cfg_scale",))
    protocol.check_comparable(scales, ("samples",))
    with pytest.raises(ValueError, match="different scores"):
        protocol.check_comparable(
            {"a": result_of(), "b": result_of() | {"scores": {"fid_adm_10k": 2.0}}}
        )


def test_self_check_passes_at_the_published_figures_and_fails_beside_them():
    published = {name: value for name, (value, _) in protocol.PUBLISHED.items()}
    assert all(row["passed"] for row in protocol.self_check(published))
    off = published | {"fid_adm_50k": 3.97}  # what a half-pixel resize costs is larger than this
    assert [row["score"] for row in protocol.self_check(off) if not row["passed"]] == [
        "fid_adm_50k"
    ]
    with pytest.raises(ValueError, match="needs .'sfid_adm_50k'."):
        protocol.self_check(
            {name: value for name, value in published.items() if name != "sfid_adm_50k"}
        )


@pytest.mark.parametrize(
    "fields, error, message",
    [
        (dict(), FileNotFoundError, "workdir/samples.npz not found"),
        (dict(samples="nowhere.npz"), FileNotFoundError, "nowhere.npz not found"),
        (
            dict(samples="SAMPLES", num_images=50),
            ValueError,
            "num_images = 50, but .* holds 4 images",
        ),
        (dict(samples="SAMPLES", features="fid"), ValueError, "unknown features 'fid'"),
        (dict(samples="SAMPLES"), ValueError, "evaluate.reference is empty"),
        (
            dict(samples="SAMPLES", reference="cifar10"),
            ValueError,
            "'cifar10' is neither an npz file nor DATASET:SPLIT",
        ),
        (
            dict(samples="SAMPLES", reference="nowhere.npz"),
            FileNotFoundError,
            "evaluate.reference nowhere.npz not found",
        ),
        (
            dict(samples="SAMPLES", self_check=True),
            ValueError,
            "features is efficientnet_lite0, and there are 4 images",
        ),
        (
            dict(samples="SAMPLES", num_images=3),
            ValueError,
            "neighbours = 3 needs more images .* number of images is 3",
        ),
        (
            dict(samples="SAMPLES", num_neighbour_images=2),
            ValueError,
            "neighbours = 3 needs .* num_neighbour_images is 2",
        ),
        (dict(compare=("a.json",)), FileNotFoundError, "evaluate.compare: a.json not found"),
        (dict(compare=("SAMPLES",)), ValueError, "evaluate.compare: .*images.npz is no evaluation"),
        (
            dict(compare=("CONFIG",)),
            ValueError,
            "config.json is no evaluation_.*: it has no scores and protocol",
        ),
    ],
)
def test_bad_requests_end_before_anything_is_written(tmp_path, fields, error, message):
    np.savez(tmp_path / "images.npz", arr_0=random_images(4))
    (tmp_path / "config.json").write_text("{}")
    files = {"SAMPLES": str(tmp_path / "images.npz"), "CONFIG": str(tmp_path / "config.json")}
    fields = {
        key: tuple(files.get(name, name) for name in value)
        if key == "compare"
        else files.get(value, value)
        for key, value in fields.items()
    }
    with pytest.raises(error, match=message):
        evaluate.run(make_config(**fields), tmp_path / "workdir")
    assert not (tmp_path / "workdir").exists()
