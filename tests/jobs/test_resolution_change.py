"""From 512 to 1024 pixels: configs/pixart_sigma_1024.py in small, by the command line."""

import json

import command
import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from tiny_captions import write_folder
from tiny_text import write_text_encoder

from configs import pixart_sigma_512, pixart_sigma_1024
from lit_jax import checkpoint
from lit_jax.models import param_shapes
from lit_jax.models.dit import position_embedding
from lit_jax.models.pixart import PixArtConfig
from lit_jax.porting.read import read_checkpoint

STEPS = 13
# Of both stages and of the teacher.
SIZE = dict(
    depth=2, width=16, cross_heads=2, patch_size=2, in_channels=3, caption_channels=16,
    caption_length=20, learn_sigma=True,
)  # fmt: skip


def save_random(path, seed, **fields):
    config = PixArtConfig(**SIZE, **fields)
    rng = np.random.default_rng(seed)
    params = jax.tree.map(
        lambda leaf: 0.1 * rng.standard_normal(leaf.shape, np.float32), param_shapes(config)
    )
    checkpoint.save_params(path, params, {"model": config.to_json()})
    return flatten_dict(params, sep="/")


def test_the_recipes_spread_the_positions_alike():
    """Every second token of the larger image has the position of one of the smaller."""
    stages = [recipe.get_config().model for recipe in (pixart_sigma_512, pixart_sigma_1024)]
    tables = []
    for model in stages:
        side = model.input_size // 2
        table = position_embedding((side, side), 16, model.position_base, model.position_scale)
        tables.append(table.reshape(side, side, 16))
    np.testing.assert_array_equal(tables[1][::2, ::2], tables[0])


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The workdir of the second stage, and the parameters of the LiT that it began with."""
    folder = tmp_path_factory.mktemp("stages")
    for name in ("images", "text"):
        (folder / name).mkdir()
    linear = dict(attention="linear", num_heads=1)
    first = save_random(folder / "first", 1, **linear, position_base=8, grid=(8, 8))
    second = dict(position_base=16, position_scale=2.0, grid=(16, 16))
    save_random(folder / "teacher", 2, attention="softmax", num_heads=2, **second)
    fields = {
        "model.depth": 2, "model.width": 16, "model.num_heads": 1, "model.cross_heads": 2,
        "model.patch_size": 2, "model.in_channels": 3, "model.caption_channels": 16,
        "model.caption_length": 20, "model.input_size": 32, "model.position_base": 16,
        "teacher.checkpoint": folder / "teacher", "teacher.size": "",
        "student.init": folder / "first", "autoencoder.checkpoint": "",
        "text.checkpoint": write_text_encoder(folder / "text"), "text.max_length": 20,
        "text.batch_size": 8, "data.dir": folder / "data", "data.num_threads": 1,
        "prepare.source": f"{write_folder(folder / 'images', 15)}/", "prepare.image_size": 32,
        "prepare.buckets": "('16x16',)", "prepare.batch_size": 8,
        "train.batch_size": 8, "train.steps": STEPS, "train.preview_every": 0,
        "train.log_every": 1, "train.remat": "none",
        "optimizer.warmup": 12, "optimizer.learning_rate": 1e-3,
        "checkpoint.every": STEPS, "compilation_cache": "",
    }  # fmt: skip
    overrides = [f"--config.{name}={value}" for name, value in fields.items()]
    config = ("--config=configs/pixart_sigma_1024.py", *overrides)
    devices = jax.devices()[:2]  # eight would only compile longer
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(jax, "devices", lambda *platform: devices)
        for mode in ("prepare", "train"):
            work = folder / mode
            assert command.run(monkeypatch, *config, f"--mode={mode}", f"--workdir={work}") is None
    return folder / "train", first


def test_the_second_stage_begins_with_all_of_the_first(trained):
    """Its attention too, which a softmax teacher does not have."""
    workdir, first = trained
    told = json.loads((workdir / "inheritance.json").read_text())
    names = {name for name in first if name != "y_embedder/y_embedding"}
    assert names <= told["inherited"].keys() and not told["at_init"]
    found = read_checkpoint(workdir)
    assert (found.config.position_base, found.config.position_scale) == (16, 2.0)


def test_the_second_stage_trains(trained):
    """A finite loss at each step, and all has moved but for the null caption."""
    workdir, first = trained
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    losses = [line["train/loss"] for line in lines if "train/loss" in line]
    assert len(losses) == STEPS and np.isfinite(losses).all()
    found = flatten_dict(read_checkpoint(workdir, weights="model").params, sep="/")
    for name, start in first.items():
        moved = not np.array_equal(found[name], start)
        assert moved == (name != "y_embedder/y_embedding"), name
