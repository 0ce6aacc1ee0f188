"""Images of prompts: which prompt an image is of, GenEval's folder, sizes, and memory in turns."""

import gc
import json
import shutil
import weakref

import jax
import numpy as np
import pytest
from PIL import Image
from tiny_autoencoder import write_autoencoder
from tiny_text import write_text_encoder

from configs import debug
from lit_jax import checkpoint, experiment, text
from lit_jax.experiment import Experiment
from lit_jax.jobs import demo, port, sample
from lit_jax.models import param_shapes
from lit_jax.porting.pixart import Overrides, read_null_caption
from lit_jax.porting.read import read_checkpoint
from lit_jax.porting.torch_checkpoint import PortingError
from lit_jax.prompts import choose_prompts

# Of 12 and of 20 tokens: they are padded to 16 and to 20.
PROMPTS = ("a blue dog", "a red cat, on top of the hat")


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """A random PixArt of latents, with a random text encoder and a random autoencoder."""
    folder = tmp_path_factory.mktemp("models")
    config = debug.get_config()
    with config.model.unlocked():
        config.model.update(
            family="pixart", num_classes=None, timestep_freq_shift=None, mlp_norm_epsilon=None,
            input_size=8, patch_size=2, in_channels=4, caption_channels=16, caption_length=20,
            position_base=4, cross_heads=2, dtype="float32",
        )  # fmt: skip
    config.text.update(
        checkpoint=str(write_text_encoder(folder)), dtype="float32", max_length=20, batch_size=8
    )
    config.autoencoder.update(checkpoint=str(write_autoencoder(folder / "autoencoder")))
    config.sample.update(
        sampler="dpm++", spacing="time_uniform", steps=2, cfg_scale=4.5, cfg_channels="all",
        batch_size=8, prompts=PROMPTS, images_per_prompt=3,
        checkpoint=str(folder / "params"),
    )  # fmt: skip
    architecture = Experiment(config).model_config
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: 0.1 * rng.standard_normal(leaf.shape, np.float32), param_shapes(architecture)
    )
    checkpoint.save_params(folder / "params", params, {"model": architecture.to_json()})
    return config


def draw(config, workdir, **change):
    config = config.copy_and_resolve_references()
    config.sample.update(change)
    sample.run(config, workdir)
    return workdir / "samples"


@pytest.fixture(scope="module")
def drawn(config, tmp_path_factory):
    return draw(config, tmp_path_factory.mktemp("drawn"))


def images(folder, pattern="*.png"):
    return [path.read_bytes() for path in sorted(folder.glob(pattern))]


def test_an_image_depends_on_its_number_and_its_prompt(config, drawn, tmp_path):
    """Shorter and longer prompts beside it, other batches and an interruption change nothing."""
    six = images(drawn)
    assert len(set(six)) == 6
    change = dict(prompts=(PROMPTS[0], "a green house"))
    others = draw(config, tmp_path, **change)
    found = images(others)
    assert found[:3] == six[:3] and found[3] != six[3]
    for name in ("000001.png", "000003.png"):
        (others / name).unlink()
    draw(config, tmp_path, **change)
    assert images(others) == found


def test_the_demo_draws_a_prompt_as_sampling_does(config, drawn, tmp_path):
    """Step by step, one image at once: sums round otherwise, so a grey level may differ."""
    studio = demo.Studio(config, tmp_path)
    (name,) = studio.names
    for number, prompt in enumerate(PROMPTS):
        request = demo.Request(prompt, config.seed, 4.5, "dpm++", 2)
        (*_, last) = studio.draw(request)
        # Image 0 of the seed is of the first prompt alone.
        expected = np.int32(sample.read_image(drawn / "000000.png"))
        difference = np.abs(last[name].image - expected)
        assert difference.max() <= 1 if number == 0 else difference.mean() > 0.1


def test_what_a_prompt_is_told_with_depends_on_it_alone(config):
    """To the bit, before pictures are rounded to bytes: no padding follows a longer neighbour."""

    def condition(prompts, numbers):
        changed = config.copy_and_resolve_references()
        changed.sample.update(prompts=prompts, images_per_prompt=1)
        experiment = Experiment(changed)
        params = read_checkpoint(config.sample.checkpoint).params
        asked = sample.what_is_asked(experiment, ())
        told, _ = sample.tell(experiment, asked, params, np.array(numbers))
        ((_, batch),) = told.batches(8)
        return told.condition(batch) | {"preview": experiment.conditions(batch, "")["caption"]}

    alone = condition(PROMPTS[:1], [0])
    assert alone["caption"].shape == (1, 16, 16) and alone["preview"].shape == (1, 20, 16)
    for prompts, number in ((PROMPTS, 0), (PROMPTS[::-1], 1)):
        beside = condition(prompts, [number])
        for name, value in alone.items():
            np.testing.assert_array_equal(beside[name], value, strict=True)


def test_a_finished_folder_needs_no_text_encoder(config, drawn, tmp_path, monkeypatch, caplog):
    """It is compared with the one that made the images, not loaded."""
    shutil.copytree(drawn.parent, tmp_path / "copy")
    with monkeypatch.context() as patch, caplog.at_level("INFO"):
        for loader in ("load_text_encoder", "encode"):
            patch.setattr(Experiment, loader, lambda *_: pytest.fail("the text encoder is loaded"))
        patch.setattr(sample, "load_params", lambda *_: pytest.fail("the model is loaded"))
        folder = draw(config, tmp_path / "copy")
        assert f"all 6 images are in {folder} already" in caplog.text
        assert images(folder) == images(drawn)
        config = config.copy_and_resolve_references()
        (tmp_path / "other").mkdir()
        config.text.checkpoint = str(write_text_encoder(tmp_path / "other", seed=1))
        with pytest.raises(ValueError, match="holds images drawn with text = "):
            draw(config, tmp_path / "copy")


@pytest.mark.parametrize("offload", [False, True])
def test_text_encoder_model_and_decoder_come_one_after_the_other(
    config, drawn, tmp_path, monkeypatch, offload
):
    """With offload no two of them are in memory; without, the text encoder is gone at least."""
    gc.freeze()  # what other tests left need not be searched for garbage, which takes seconds
    events = []
    alive = {}

    def watch(module, name, what):
        load = getattr(module, name)

        def loaded(*args, **kwargs):
            gc.collect()
            there = [
                other for other, refs in alive.items() if any(ref() is not None for ref in refs)
            ]
            events.append((what, there))
            found = load(*args, **kwargs)
            leaves = jax.tree.leaves(found)
            alive[what] = [weakref.ref(leaf) for leaf in leaves]
            return found

        monkeypatch.setattr(module, name, loaded)

    watch(text, "load_encoder_params", "text encoder")
    watch(sample, "load_params", "model")
    watch(experiment, "load_params", "decoder")
    found = images(draw(config, tmp_path, offload=offload, prompts=PROMPTS[:1]))
    assert found == images(drawn)[:3]
    beside = [] if offload else ["model"]
    assert events == [("text encoder", []), ("model", []), ("decoder", beside)]


def test_latents_that_are_drawn_are_kept_when_offload_is_interrupted(
    config, drawn, tmp_path, monkeypatch
):
    def stop(*args, **kwargs):
        raise InterruptedError

    with monkeypatch.context() as patch:
        patch.setattr(experiment, "load_params", stop)  # of the decoder, whose turn is last
        with pytest.raises(InterruptedError):
            draw(config, tmp_path, offload=True, prompts=PROMPTS[:1])
    latents = sorted((tmp_path / "samples").rglob("*.latents"))
    assert len(latents) == 3 and not images(tmp_path / "samples")
    latents[0].unlink()
    latents[2].write_bytes(latents[2].read_bytes()[:-1])
    again = []
    save = sample.save_latents

    def watched(path, content):
        again.append(path.stem)
        save(path, content)

    monkeypatch.setattr(sample, "save_latents", watched)
    found = images(draw(config, tmp_path, offload=True, prompts=PROMPTS[:1]))
    assert found == images(drawn)[:3]
    assert again == [latents[0].stem, latents[2].stem]
    assert not list((tmp_path / "samples").rglob("*.latents"))
    # Of a run that was killed between its images.
    latents[0].write_bytes(b"")
    draw(config, tmp_path, prompts=PROMPTS[:1])
    assert not latents[0].exists()


def test_a_batch_is_not_larger_than_what_is_asked_for(config, tmp_path, caplog):
    """It would be filled up with copies: one prompt would take the time of a whole batch."""
    caplog.set_level("INFO")
    draw(config, tmp_path, batch_size=32, images_per_prompt=1, num_images=1)
    # Two prompts on eight devices.
    assert "compiling the sampler for 8 images at once" in caplog.text


def test_the_folder_says_what_its_images_depend_on(config, drawn, tmp_path):
    protocol = json.loads((drawn / "protocol.json").read_text())
    assert protocol["text"].keys() == {"tokenizer", "weights", "cleaning", "max_length", "dtype"}
    assert protocol["null_mask"] == "prompt" and protocol["images_per_prompt"] == 3
    with np.load(drawn.parent / "samples.npz") as archive:
        assert list(archive["prompt"]) == [PROMPTS[0]] * 3 + [PROMPTS[1]] * 3
    with pytest.raises(ValueError, match="drawn with null_mask = prompt, this run has own"):
        draw(config, drawn.parent, null_mask="own")
    with pytest.raises(ValueError, match="drawn with prompts = "):
        draw(config, drawn.parent, prompts=("a dog",))
    found = images(draw(config, tmp_path, null_mask="own", prompts=PROMPTS[:1]))
    assert found != images(drawn)[:3]


def test_a_size_is_that_of_the_images(config, tmp_path):
    """The tiny autoencoder halves the side, and a token is of 2 x 2 latents."""
    folder = draw(config, tmp_path, size=(8, 20), prompts=PROMPTS[:1], images_per_prompt=1)
    assert Image.open(folder / "000000.png").size == (20, 8)
    with pytest.raises(ValueError, match=r"sample.size = \(8, 18\): .* multiples of the 4 pixels"):
        draw(config, tmp_path / "b", size=(8, 18))


def test_another_text_encoder_than_the_models_is_told(config, tmp_path, caplog):
    """The random null caption of these weights is no encoder's; a ported one is its own's."""
    config = config.copy_and_resolve_references()
    experiment = Experiment(config)
    null = experiment.load_text_encoder().null_features(20)
    with caplog.at_level("WARNING"):
        experiment.encode(PROMPTS[1:], null)
        assert not caplog.records
        experiment.encode(PROMPTS[1:], null[::-1] * 0.5)
    assert "another text encoder or tokenizer than the model was trained with" in caplog.text


def test_an_aspect_is_the_nearest_bucket(config):
    """Of 16 latents, whose buckets are in sixteenths: 16:9 is 12 x 21 of them."""
    config = config.copy_and_resolve_references()
    config.model.update(input_size=64, position_base=32)
    config.sample.aspect = "16:9"
    assert Experiment(config).sample_size == (48, 84)
    config.sample.size = (8, 8)
    with pytest.raises(ValueError, match=r"sample.size = \(8, 8\), but sample.aspect = 16:9 too"):
        _ = Experiment(config).sample_size


def test_genevals_metadata_make_genevals_folder(config, drawn, tmp_path):
    lines = [json.dumps({"tag": "colors", "prompt": prompt}) for prompt in PROMPTS]
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines) + "\n")
    change = dict(prompts=(), prompt_file=str(tmp_path / "prompts.jsonl"))
    folder = draw(config, tmp_path, **change)
    assert images(folder, "0*/samples/*.png") == images(drawn)
    assert (folder / "00001" / "metadata.jsonl").read_text() == lines[1]
    (folder / "00001" / "samples" / "0002.png").unlink()
    draw(config, tmp_path, **change)
    assert images(folder, "0*/samples/*.png") == images(drawn)


def test_a_prompt_ends_with_its_line_alone(tmp_path):
    """Windows' mark and line ends are none of it, and U+0085 and U+2028 do not end it."""
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeffone\x85cat\r\n\r\ntwo\u2028cats\r\n".encode())
    assert choose_prompts((), str(path), 1).texts == ("one\x85cat", "two\u2028cats")
    path = path.with_suffix(".jsonl")
    path.write_bytes('\ufeff{"prompt": "two\u2028cats"}\r\n'.encode())
    assert choose_prompts((), str(path), 1).texts == ("two\u2028cats",)


@pytest.mark.parametrize(
    "change, match",
    [
        (dict(prompts=()), r"^sample.prompts = \(\), but the model is told a caption"),
        (dict(prompt_file="nowhere.txt"), "^sample.prompt_file = nowhere.txt, but there are 2"),
        (dict(prompts=(), prompt_file="nowhere.txt"), "^sample.prompt_file = nowhere.txt: no such"),
    ],
)
def test_prompts_that_are_not_there_are_named(config, tmp_path, change, match):
    with pytest.raises((ValueError, FileNotFoundError), match=match):
        draw(config, tmp_path, **change)
    assert not (tmp_path / "samples").exists()


def test_a_text_encoder_of_another_width_is_named(config, tmp_path):
    config = config.copy_and_resolve_references()
    config.model.caption_channels = 15
    with pytest.raises(ValueError, match="caption_channels = 15, but the checkpoint"):
        sample.run(config, tmp_path)
    config.model.caption_channels = 16
    config.text.max_length = 21
    with pytest.raises(ValueError, match="text.max_length = 21, but model.caption_length = 20"):
        sample.run(config, tmp_path)


# ---- The null caption from a file ----------------------------------------------------------------


def test_the_null_caption_is_read_from_files(tmp_path, config):
    rows = np.random.default_rng(0).standard_normal((1, 3, 16)).astype(np.float32)
    np.save(tmp_path / "null.npy", rows)
    np.testing.assert_array_equal(read_null_caption(tmp_path / "null.npy"), rows[0])
    asked = Overrides(null_caption=read_null_caption(tmp_path / "null.npy"))
    read = read_checkpoint(config.sample.checkpoint, overrides=asked)
    table = np.asarray(read.params["y_embedder"]["y_embedding"])
    np.testing.assert_array_equal(table[:3], rows[0])
    np.testing.assert_array_equal(table[3:], np.broadcast_to(rows[0, 2], (17, 16)))
    np.save(tmp_path / "objects.npy", np.array([{}], object), allow_pickle=True)
    np.save(tmp_path / "whole.npy", np.zeros((3, 16), int))
    for name in ("objects", "whole"):
        with pytest.raises(PortingError, match=f"{name}.npy"):
            read_null_caption(tmp_path / f"{name}.npy")


def test_a_port_makes_the_null_caption_with_the_text_encoder(config, tmp_path):
    config = config.copy_and_resolve_references()
    config.port.update(
        source=config.sample.checkpoint,
        target=str(tmp_path / "ported"),
        null_caption=config.text.checkpoint,
    )
    port.run(config, tmp_path)
    table = read_checkpoint(tmp_path / "ported").params["y_embedder"]["y_embedding"]
    expected = Experiment(config).load_text_encoder().null_features(20)
    np.testing.assert_array_equal(np.asarray(table), expected)
    config.model.update(family="dit", num_classes=10, timestep_freq_shift=0, mlp_norm_epsilon=1e-6)
    for name in ("caption_channels", "caption_length", "position_base", "cross_heads"):
        setattr(config.model, name, None)
    with pytest.raises(ValueError, match="port.null_caption = .*family = dit has no null_caption"):
        port.run(config, tmp_path)
