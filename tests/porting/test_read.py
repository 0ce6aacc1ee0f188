"""Checkpoints of any layout read into our trees, and onto devices."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax.traverse_util import flatten_dict, unflatten_dict
from torch_checkpoints import (
    assert_same_tree,
    make_diffusers,
    make_torch,
    save,
    training_checkpoint,
)

from configs import debug
from lit_jax import sharding
from lit_jax.checkpoint import Checkpointer, SavedParams, save_params
from lit_jax.experiment import Experiment
from lit_jax.porting.dit import Overrides
from lit_jax.porting.read import load_params, read_checkpoint
from lit_jax.porting.torch_checkpoint import PortingError
from lit_jax.porting.write import export_orbax


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_other_float_types_are_cast_and_said_so(tmp_path, dtype):
    model = make_torch().to(dtype)
    checkpoint = read_checkpoint(save(model, tmp_path / "a.pt"))
    with torch.no_grad():  # the table is computed anew: only the weights carry the rounding
        model.float().pos_embed.copy_(make_torch().pos_embed)
    assert_same_tree(checkpoint.params, read_checkpoint(save(model, tmp_path / "b.pt")).params)
    assert "cast from" in checkpoint.report.keys["final_layer.linear.weight"]


def test_leaves_load_straight_onto_shards(tmp_path):
    model = make_torch()
    checkpoint = read_checkpoint(save(model, tmp_path / "a.pt"))
    mesh = sharding.make_mesh(2, 4)
    shardings = sharding.fsdp_sharding(checkpoint.params, mesh, min_size=1)
    read = []

    class Spy:
        def __init__(self, leaf):
            self.leaf, self.shape = leaf, leaf.shape

        def __getitem__(self, index):
            part = self.leaf[index]
            read.append(part.size / self.leaf.size)
            return part

    sharded_params = load_params(jax.tree.map(Spy, checkpoint.params), shardings)
    assert_same_tree(sharded_params, load_params(checkpoint.params))
    assert jax.tree.map(lambda a: a.sharding, sharded_params) == shardings
    assert np.median(read) == 0.25  # no device is handed more than its part


def test_a_training_checkpoint_of_ours_is_read(tmp_path):
    """EMA or raw, from the workdir of a run."""
    checkpoint = read_checkpoint(save(make_torch(attention="linear"), tmp_path / "a.safetensors"))
    params = load_params(checkpoint.params)
    raw = jax.tree.map(lambda a: a + 1.0, params)
    manager = Checkpointer(tmp_path / "work" / "checkpoints", keep=1, keep_every=0)
    items = {
        "params": raw,
        "ema_params": params,
        "opt_state": {"m": jnp.zeros(2)},
        "train": {"step": jnp.zeros(())},
    }
    manager.save(5, items, data={}, metadata={"model": checkpoint.config.to_json()})
    manager.wait()
    manager.close()
    ema = read_checkpoint(tmp_path / "work")
    assert ema.report.checksum == checkpoint.report.checksum and ema.config == checkpoint.config
    model = read_checkpoint(tmp_path / "work", weights="model")
    assert model.report.checksum != ema.report.checksum
    assert_same_tree(model.params, raw)


def test_integers_in_an_orbax_checkpoint_are_refused(tmp_path):
    checkpoint = read_checkpoint(save(make_torch(), tmp_path / "a.pt"))
    flat = flatten_dict(load_params(checkpoint.params), sep="/")
    flat["blocks/mlp/fc1/bias"] = flat["blocks/mlp/fc1/bias"].astype(jnp.int32)
    save_params(tmp_path / "b", unflatten_dict(flat, sep="/"), {})
    with pytest.raises(PortingError, match="wrong: blocks/mlp/fc1/bias of int32, expected a float"):
        read_checkpoint(tmp_path / "b")
    (tmp_path / "b" / "metadata" / "metadata").write_text("[1]")
    with pytest.raises(ValueError, match="b cannot be read: its metadata is a list, not an object"):
        read_checkpoint(tmp_path / "b")


def test_one_flipped_bit_gives_no_other_weights(tmp_path):
    """Compressed chunks have no checksum of their own: most flips read as another weight."""
    good = read_checkpoint(save(make_torch(), tmp_path / "a.pt"))
    export_orbax(good, tmp_path / "orbax")
    files = [path for path in (tmp_path / "orbax" / "params").rglob("d/*")]
    largest = max(files, key=lambda path: path.stat().st_size)
    content = largest.read_bytes()
    refused = []
    for number in range(1, 8):
        place = number * len(content) // 8
        flipped = content[place] ^ (1 << number)
        largest.write_bytes(content[:place] + bytes([flipped]) + content[place + 1 :])
        try:
            assert read_checkpoint(tmp_path / "orbax").report.checksum == good.report.checksum
        except PortingError as error:
            refused.append(str(error))
    text = f"{good.report.checksum[:16]}... was saved; port the source again"
    assert any(text in message for message in refused), refused


def test_weights_of_another_port_are_refused(tmp_path):
    """Older folders have no checksum of the metadata; those of other programs have none at all."""
    first = read_checkpoint(save(make_torch(1), tmp_path / "a.pt"))
    second = read_checkpoint(save(make_torch(2), tmp_path / "b.pt"))
    metadata = {"model": first.config.to_json()}
    old = metadata | {"checksum": second.report.checksum}
    save_params(tmp_path / "old", load_params(first.params), old)
    path = tmp_path / "old" / "metadata" / "metadata"
    path.write_text(json.dumps(old))
    message = f"checksum {first.report.checksum[:16]}..., {second.report.checksum[:16]}... was"
    with pytest.raises(PortingError, match=message):
        read_checkpoint(tmp_path / "old")
    path.write_text(json.dumps(metadata | {"checksum": first.report.checksum}))
    known = read_checkpoint(tmp_path / "old", overrides=Overrides(num_classes=5))
    assert known.report.checksum != first.report.checksum  # of the resized table
    path.write_text(json.dumps(metadata))
    unknown = read_checkpoint(tmp_path / "old")
    assert unknown.report.checksum == first.report.checksum
    added = set(unknown.report.notes) - set(known.report.notes)
    assert added == {"the checkpoint has no checksum: its weights are taken unchecked"}


def training_config(**changes):
    settings = debug.get_config()
    settings.model.update(num_heads=2, width=32, depth=2)
    settings.student.init = "teacher"
    for name, value in changes.items():
        settings.update_from_flattened_dict({name: value})
    return settings


def test_a_run_chooses_ema_or_raw(tmp_path):
    """teacher.weights and student.weights, of a DiT training checkpoint."""
    fields = dict(depth=2, width=32, num_heads=2, patch_size=4, in_channels=1, grid=(7, 7))
    model, ema = make_torch(1, **fields), make_torch(2, **fields)
    torch.save(training_checkpoint(model, ema), tmp_path / "a.pt")
    expected = {
        name: read_checkpoint(save(weights, tmp_path / f"{name}.pt")).report.checksum
        for name, weights in (("model", model), ("ema", ema))
    }
    for weights, other in (("ema", "model"), ("model", "ema")):
        settings = training_config(
            **{
                "teacher.checkpoint": str(tmp_path / "a.pt"),
                "teacher.weights": weights,
                "teacher.num_heads": 2,
                "student.init": str(tmp_path / "a.pt"),
                "student.weights": other,
            }
        )
        run = Experiment(settings)
        assert run.teacher_checkpoint.report.checksum == expected[weights]
        assert run.init_checkpoint.report.checksum == expected[other]


@pytest.mark.parametrize("field", ["teacher.checkpoint", "student.init", "autoencoder.checkpoint"])
def test_a_checkpoint_that_is_not_there_is_named_with_its_field(tmp_path, field):
    path = str(tmp_path / "nowhere.pt")
    run = Experiment(training_config(**{field: path}))
    read = {
        "teacher.checkpoint": lambda: run.teacher_checkpoint,
        "student.init": lambda: run.init_checkpoint,
        "autoencoder.checkpoint": lambda: run.autoencoder,
    }
    with pytest.raises(FileNotFoundError, match=f"^{field} = {path}: no such file or folder"):
        read[field]()


def test_a_table_of_no_square_names_the_field_that_tells_its_grid(tmp_path):
    fields = dict(depth=2, width=32, num_heads=2, patch_size=4, in_channels=1, grid=(3, 5))
    save(make_torch(**fields), tmp_path / "a.pt")
    settings = training_config(**{"teacher.checkpoint": str(tmp_path / "a.pt")})
    with pytest.raises(ValueError, match="^port.input_size must be named: pos_embed of .* has 15"):
        _ = Experiment(settings).teacher_checkpoint


def test_a_run_inherits_no_convention_unseen(tmp_path):
    """Weights of a diffusers folder are for other timestep frequencies than the student's."""
    make_diffusers(
        num_layers=2,
        num_attention_heads=2,
        patch_size=4,
        in_channels=1,
        out_channels=2,
        sample_size=28,
    ).save_pretrained(tmp_path)
    settings = training_config(**{"teacher.checkpoint": str(tmp_path)})
    message = "model.timestep_freq_shift = 0, but .* inherits from, computes with 1; set model"
    with pytest.raises(ValueError, match=message):
        Experiment(settings).check_inheritance()
    settings.model.update(timestep_freq_shift=1, mlp_norm_epsilon=1e-5)
    run = Experiment(settings)
    assert run.init_checkpoint is run.teacher_checkpoint
    settings.student.init = "random"
    assert Experiment(settings).init_checkpoint is None


@pytest.mark.parametrize(
    "stored, message",
    [
        ({"depth": 4}, "depth = 4, the tensors say 3"),
        ({"depth": "3"}, "depth must be a whole number"),
        ({"depht": 3}, "depht = 3 is no field of an architecture"),
        ({"num_heads": 5}, "num_heads = 5 does not divide the width 48"),
        ([1], "the architecture is a list, not an object"),
    ],
)
def test_metadata_of_an_orbax_checkpoint_that_lie_are_refused(tmp_path, stored, message):
    params = load_params(read_checkpoint(save(make_torch(), tmp_path / "a.pt")).params)
    save_params(tmp_path / "b", params, {"model": stored})
    with pytest.raises(PortingError, match=message):
        read_checkpoint(tmp_path / "b")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"blocks/mlp/fc1/bias": (4, 192)}, r"a: 4 blocks|missing|blocks/.* expected"),
        ({"blocks/mlp/fc1/bias": (20_000, 1)}, "20000 blocks, the limit is 10000"),
        ({"blocks/mlp/fc1/kernel": (3, 48)}, r"blocks/mlp/fc1/kernel has shape \(3, 48\)"),
        ({"extra/kernel": (3, 48)}, "unexpected: extra/kernel"),
        ({"final_layer/linear/bias": None}, "missing: final_layer/linear/bias"),
        ({"x_embedder/proj/kernel": None}, "not a DiT or LiT checkpoint: x_embedder.proj.weight"),
    ],
)
def test_trees_that_are_no_dit_are_refused_before_a_value_is_read(
    tmp_path, monkeypatch, change, message
):
    params = load_params(read_checkpoint(save(make_torch(), tmp_path / "a.pt")).params)
    flat = flatten_dict(params, sep="/")
    for path, shape in change.items():
        flat.pop(path, None)
        if shape:
            flat[path] = jnp.zeros(shape)
    save_params(tmp_path / "b", unflatten_dict(flat, sep="/"), {})
    monkeypatch.setattr(SavedParams, "read", lambda saved: pytest.fail("a value was read"))
    with pytest.raises(PortingError, match=message):
        read_checkpoint(tmp_path / "b")


def test_metadata_of_older_checkpoints_are_read(tmp_path):
    """Before `DiTConfig` the fields had another order, and a softmax model named a kernel."""
    checkpoint = read_checkpoint(save(make_torch(), tmp_path / "a.safetensors", num_heads=3))
    fields = dict(reversed(checkpoint.config.to_json().items()))
    save_params(tmp_path / "b", load_params(checkpoint.params), {"model": fields})
    assert read_checkpoint(tmp_path / "b").config == checkpoint.config
    del fields["grid"]
    save_params(tmp_path / "c", load_params(checkpoint.params), {"model": fields})
    assert read_checkpoint(tmp_path / "c").config.grid is None
