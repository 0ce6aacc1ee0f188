"""Recipes of the workbench as fields of a config: what they refuse, and which leaves they mean."""

import pytest
from torch_checkpoints import make_torch, save, small_config

from lit_jax.experiment import Experiment


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return save(make_torch(), tmp_path_factory.mktemp("teacher") / "dit.pt")


def experiment(teacher, **fields):
    """The debug config for a student of the teacher's size."""
    named = {name.replace("__", "."): value for name, value in fields.items()}
    return Experiment(small_config(teacher, **{"student.init": "teacher"} | named))


def test_what_is_inherited_as_a_whole_has_the_rate_of_inherited_parameters(teacher):
    half = dict(inherit__load=("q", "k"))
    assert experiment(teacher, **half).inherited_paths == ()
    slow = experiment(teacher, optimizer__inherited_rate=0.01, **half)
    paths = set(slow.inherited_paths)
    assert {"blocks/attn/q/kernel", "x_embedder/proj/kernel", "blocks/mlp/fc1/bias"} <= paths
    # Half of kv is new, and so are proj and the convolution.
    assert not {path for path in paths if path.startswith(("blocks/attn/kv", "blocks/attn/proj"))}
    with pytest.raises(ValueError, match="^optimizer.inherited_rate = 0.01, but student.init = r"):
        _ = experiment(
            teacher, optimizer__inherited_rate=0.01, student__init="random"
        ).inherited_paths


def test_layers_are_compared_with_those_of_a_teacher_of_the_same_shape(teacher):
    assert experiment(teacher, distill__attention_weight=1.0).teacher.config.depth == 3
    other = experiment(teacher, distill__attention_weight=1.0, model__depth=2)
    with pytest.raises(ValueError, match="^distill.attention_weight = 1 .* depth 2 and .* has 3"):
        _ = other.teacher
    other = experiment(teacher, distill__feature_weight=0.5, model__depth=2)
    with pytest.raises(ValueError, match="^distill.feature_weight = 0.5 .* depth 2 and .* has 3"):
        _ = other.teacher
    with pytest.raises(ValueError, match="^distill.denoising_weight = 0, and so are all other"):
        experiment(
            teacher,
            distill__denoising_weight=0.0,
            distill__noise_weight=0.0,
            distill__variance_weight=0.0,
        )


def test_layers_that_keep_softmax_have_the_teachers_heads(teacher):
    kept = dict(model__softmax_every=3, model__softmax_heads=3)
    experiment(teacher, **kept).check_inheritance()
    other = experiment(teacher, **kept | dict(model__softmax_heads=6))
    with pytest.raises(ValueError, match="^model.softmax_heads = 6, but .* has 3 heads; set model"):
        other.check_inheritance()
