"""--mode=layers ranks the layers of a checkpoint, and ends before it writes where it cannot."""

import json

import command
import jax
import numpy as np
import pytest
from etils import epath
from tiny_dataset import put_digits

from configs import debug
from lit_jax import checkpoint, pictures
from lit_jax.experiment import Experiment
from lit_jax.jobs import layers
from lit_jax.models import param_shapes


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """A student of random weights of a teacher of random weights."""
    folder = tmp_path_factory.mktemp("layers")
    put_digits(folder / "data")
    command.write_teacher(folder / "teacher.safetensors")
    config = debug.get_config()
    config.data.dir = str(folder / "data")
    config.teacher.update(checkpoint=str(folder / "teacher.safetensors"), num_heads=2)
    config.layers.num_batches = 2
    architecture = Experiment(config).model_config
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: 0.1 * rng.standard_normal(leaf.shape, np.float32), param_shapes(architecture)
    )
    checkpoint.save_params(folder / "params", params, {"model": architecture.to_json()})
    config.sample.checkpoint = str(folder / "params")
    return config


def changed(config, **fields):
    config = config.copy_and_resolve_references()
    config.update_from_flattened_dict({name.replace("__", "."): v for name, v in fields.items()})
    return config


def test_a_ranking_and_a_pattern(config, tmp_path):
    # Of 56 x 56 tokens, where linear attention is cheaper.
    config = changed(config, layers__flops_share=0.9, sample__size=(224, 224))
    layers.run(config, tmp_path)
    result = json.loads((tmp_path / "layers.json").read_text())
    assert result["images"] == 32 and result["attention"] == "linear"
    assert len(result["attention_error"]) == len(result["output_change"]) == 2
    assert all(error > 0 for error in result["attention_error"])
    order = np.argsort(result["output_change"])[::-1]
    assert result["ranking"] == order.tolist()
    assert [pattern["softmax_every"] for pattern in result["patterns"]] == [0, 2]
    assert result["chosen"]["flops_share"] <= 0.9
    assert result["chosen"] in result["patterns"]
    text = (tmp_path / "layers.md").read_text()
    assert f"bears it least: {order[0]}, {order[1]}." in text and text.count("| yes |") == 1
    assert pictures.is_whole(epath.Path(tmp_path) / "layers.png")


REFUSED = {
    "no teacher": (
        {"teacher__checkpoint": ""},
        "^--mode=layers compares layer with layer, but teacher.checkpoint is empty",
    ),
    "another depth": (
        {"model__depth": 3},
        "^--mode=layers compares .* the student has depth 3 and .* has 2$",
    ),
    "a budget below all": (
        {"layers__flops_share": 0.1},
        "^layers.flops_share = 0.1, but the cheapest pattern has",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_ranked_is_said_before_anything_is_written(config, tmp_path, name):
    fields, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        layers.run(changed(config, **fields), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_student_with_a_pattern_is_offered_no_other(config):
    student = dict(model__softmax_every=2, model__softmax_heads=2)
    assert layers.candidate_patterns(Experiment(changed(config, **student))) == []
    asks = changed(config, layers__flops_share=0.9, **student)
    with pytest.raises(ValueError, match="^layers.flops_share = 0.9 .*softmax_every = 2, and"):
        layers.candidate_patterns(Experiment(asks))
