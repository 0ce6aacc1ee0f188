"""Weight inheritance: what a student takes from its teacher leaf by leaf, and what it refuses."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import NamedSharding, PartitionSpec

from lit_jax import inherit, sharding
from lit_jax.models import param_shapes
from lit_jax.models.dit import DiTConfig

D, L = 32, 2
shapes_of = functools.cache(param_shapes)  # most of these tests' time is tracing
ATTENTION = {"q", "kv", "proj", "dwc"}


def make_params(attention="linear", seed=0, **overrides):
    """A tree of the model's shapes with distinct values everywhere; NumPy, as a checkpoint's."""
    fields = (
        dict(
            depth=L,
            width=D,
            num_heads=2,
            patch_size=2,
            in_channels=4,
            num_classes=5,
            attention=attention,
        )
        | overrides
    )
    shapes = shapes_of(DiTConfig(**fields))
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape).astype(np.float32), shapes)


def make_student(**overrides):
    return jax.tree.map(jnp.asarray, make_params(seed=1, **overrides))


def merge(teacher, student, **kwargs):
    """The merged leaves by path, the student's before, and the report."""
    merged, report = inherit.merge_params(teacher, student, **kwargs)
    return flatten_dict(merged, sep="/"), flatten_dict(student, sep="/"), report


@pytest.mark.parametrize("source", ["softmax", "linear"])
def test_everything_but_attention_is_inherited(source):
    teacher = make_params(source)
    merged, student, report = merge(teacher, make_student())
    expected = flatten_dict(teacher, sep="/")
    kept = set()
    for path, leaf in merged.items():
        if path.startswith("blocks/attn/"):
            kept.add(path.split("/")[2])
            np.testing.assert_array_equal(leaf, student[path], err_msg=path)
        else:
            np.testing.assert_array_equal(leaf, expected[path], err_msg=path)
    assert kept == ATTENTION  # the paper's missing leaves are exactly these
    assert set(merged) == set(student)
    assert set(report.at_init) == {path for path in student if path.startswith("blocks/attn/")}
    assert set(report.inherited) == set(student) - set(report.at_init)
    assert set(report.left_behind) == {path for path in expected if path.startswith("blocks/attn/")}
    assert sum(report.inherited.values()) + sum(report.at_init.values()) == sum(
        leaf.size for leaf in student.values()
    )


@pytest.mark.parametrize("source", ["softmax", "linear"])
@pytest.mark.parametrize(
    "load", [("q",), ("k",), ("v",), ("k", "v"), ("q", "k", "v"), ("o",), ("q", "k", "v", "o")]
)
def test_named_attention_parts_are_loaded_column_by_column(source, load):
    teacher = make_params(source)
    merged, student, report = merge(teacher, make_student(), load=load)
    theirs = flatten_dict(teacher, sep="/")
    for leaf in ("kernel", "bias"):
        if source == "softmax":
            q, k, v = np.split(theirs[f"blocks/attn/qkv/{leaf}"], 3, axis=-1)
        else:
            q, (k, v) = (
                theirs[f"blocks/attn/q/{leaf}"],
                np.split(theirs[f"blocks/attn/kv/{leaf}"], 2, axis=-1),
            )
        old_k, old_v = np.split(np.asarray(student[f"blocks/attn/kv/{leaf}"]), 2, axis=-1)
        new_k, new_v = np.split(np.asarray(merged[f"blocks/attn/kv/{leaf}"]), 2, axis=-1)
        np.testing.assert_array_equal(
            merged[f"blocks/attn/q/{leaf}"], q if "q" in load else student[f"blocks/attn/q/{leaf}"]
        )
        np.testing.assert_array_equal(new_k, k if "k" in load else old_k)
        np.testing.assert_array_equal(new_v, v if "v" in load else old_v)
        o = theirs if "o" in load else student
        np.testing.assert_array_equal(
            merged[f"blocks/attn/proj/{leaf}"], o[f"blocks/attn/proj/{leaf}"]
        )
        np.testing.assert_array_equal(
            merged[f"blocks/attn/dwc/{leaf}"], student[f"blocks/attn/dwc/{leaf}"]
        )
    each = L * (D * D + D)  # parameters of one projection
    attention = sum(
        size for path, size in report.inherited.items() if path.startswith("blocks/attn/")
    )
    assert attention == each * len(load)


def test_a_linear_source_gives_its_convolution_too():
    teacher = make_params("linear")
    merged, _, report = merge(teacher, make_student(), load=inherit.PARTS)
    for path, leaf in flatten_dict(teacher, sep="/").items():
        np.testing.assert_array_equal(merged[path], leaf, err_msg=path)
    assert not report.at_init and not report.left_behind


def test_a_softmax_student_takes_parts_of_a_softmax_source():
    teacher = make_params("softmax")
    merged, student, _ = merge(teacher, make_student(attention="softmax"), load=("v", "o"))
    q, k, v = np.split(np.asarray(merged["blocks/attn/qkv/kernel"]), 3, axis=-1)
    np.testing.assert_array_equal(v, teacher["blocks"]["attn"]["qkv"]["kernel"][..., 2 * D :])
    np.testing.assert_array_equal(
        np.concatenate([q, k], -1), student["blocks/attn/qkv/kernel"][..., : 2 * D]
    )
    np.testing.assert_array_equal(
        merged["blocks/attn/proj/kernel"], teacher["blocks"]["attn"]["proj"]["kernel"]
    )


@pytest.mark.parametrize("keep_init", [("final_layer",), ("final_layer/linear/bias", "y_embedder")])
def test_named_modules_stay_at_init(keep_init):
    teacher = make_params("softmax")
    merged, student, report = merge(teacher, make_student(), keep_init=keep_init)
    for path, leaf in merged.items():
        kept = path.startswith("blocks/attn/") or any(
            path == k or path.startswith(k + "/") for k in keep_init
        )
        np.testing.assert_array_equal(
            leaf, student[path] if kept else flatten_dict(teacher, sep="/")[path], err_msg=path
        )
        assert (path in report.at_init) == kept


def test_another_number_of_classes_fits_once_the_table_stays_at_init():
    teacher, student = make_params("softmax", num_classes=9), make_student()
    with pytest.raises(
        ValueError,
        match=r"embedding_table/embedding: \(6, 32\) in the student, \(10, 32\) in the source",
    ):
        inherit.merge_params(teacher, student)
    merged, _, _ = merge(teacher, student, keep_init=("y_embedder",))
    np.testing.assert_array_equal(
        merged["y_embedder/embedding_table/embedding"],
        student["y_embedder"]["embedding_table"]["embedding"],
    )


@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda t: t.pop("x_embedder/proj/bias"),
            r"x_embedder/proj/bias \(32,\): the source has no x_embedder/proj/bias",
        ),
        (
            lambda t: t.update({"pos_embed": np.zeros((1, 16, D))}),
            r"pos_embed \(1, 16, 32\): the student has no such parameter",
        ),
        (
            lambda t: t.update({"blocks/mlp/fc1/bias": np.zeros((L, 7))}),
            r"fc1/bias: \(2, 128\) in the student, \(2, 7\) in the source",
        ),
        (
            lambda t: t.update({"blocks/mlp/fc1/bias": np.zeros((0, 128))}),
            r"fc1/bias: \(2, 128\) in the student, \(0, 128\) in the",
        ),
    ],
)
def test_a_source_that_does_not_fit_is_refused_naming_both_sides(change, message):
    teacher = flatten_dict(make_params("softmax"), sep="/")
    change(teacher)
    with pytest.raises(ValueError, match=message):
        inherit.merge_params(unflatten_dict(teacher, sep="/"), make_student())


def test_every_misfit_is_listed_at_once():
    teacher = flatten_dict(make_params("softmax", depth=L + 1), sep="/")
    teacher["extra"] = np.zeros(3)
    with pytest.raises(ValueError) as error:
        inherit.merge_params(unflatten_dict(teacher, sep="/"), make_student())
    for part in (
        "extra (3,)",
        "blocks/mlp/fc1/kernel",
        "blocks/mlp/fc2/bias",
        "blocks/adaLN_modulation/kernel",
    ):
        assert part in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "kwargs, message",
    [
        (dict(load=("qkv",)), "load = qkv: it may name q, k, v, o, conv"),
        (
            dict(keep_init=("final_layr",)),
            "keep_init = 'final_layr' is no parameter of the student; .*final_layer",
        ),
    ],
)
def test_misspelt_names_are_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        inherit.merge_params(make_params("softmax"), make_student(), **kwargs)


def test_a_convolution_is_not_loaded_into_a_student_without_one():
    with pytest.raises(
        ValueError,
        match="load = conv, but the student has no convolution: .*blocks/attn/kv/bias",
    ):
        inherit.merge_params(make_params("linear"), make_student(conv_size=0), load=("conv",))


def test_a_width_that_differs_names_the_attention_part_too():
    with pytest.raises(
        ValueError,
        match=r"blocks/attn/q/kernel: \(2, 32, 32\) in the student, \(2, 48, 48\) in the source",
    ):
        inherit.merge_params(make_params("softmax", width=48), make_student(), load=("q",))


def test_parameters_stay_on_the_students_shards():
    mesh = sharding.make_mesh(2, 4)
    student = make_params(seed=1)
    shardings = sharding.fsdp_sharding(student, mesh, min_size=64)
    student = jax.tree.map(jax.device_put, student, shardings)
    merged, _ = inherit.merge_params(make_params("softmax"), student, load=("v",))
    jax.tree.map(
        lambda leaf, wanted: pytest.fail(f"{leaf.sharding}") if leaf.sharding != wanted else None,
        merged,
        shardings,
    )
    assert shardings["blocks"]["mlp"]["fc1"]["kernel"] != NamedSharding(mesh, PartitionSpec())


@pytest.mark.parametrize("load", [(), ("v",), ("q", "k", "v", "o")])
def test_of_what_is_inherited_whole_the_shapes_are_enough(load):
    """And only of that: the new columns of a leaf are those of its first values."""
    teacher, student = make_params("softmax"), make_student()
    expected, flat, report = merge(teacher, student, load=load)
    shapes = {
        path: leaf
        if path in report.at_init
        else jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
        for path, leaf in flat.items()
    }
    merged, _ = inherit.merge_params(teacher, unflatten_dict(shapes, sep="/"), load=load)
    jax.tree.map(np.testing.assert_array_equal, flatten_dict(merged, sep="/"), expected)


def test_the_report_says_it_in_words_and_as_json(tmp_path):
    _, _, report = merge(make_params("softmax"), make_student(), load=("o",))
    report.save(tmp_path / "inheritance.json")
    saved = json.loads((tmp_path / "inheritance.json").read_text())
    assert (
        saved["at_init"] == report.at_init
        and saved["inherited"]["blocks/attn/proj/kernel"] == L * D * D
    )
    title, inherited, new, left = report.summary().splitlines()
    assert f"{sum(report.inherited.values()):,}" in inherited and "blocks/attn/proj" in inherited
    assert "blocks/attn/dwc" in new and "blocks/attn/kv" in new and "blocks/attn/proj" not in new
    assert "blocks/attn/qkv" in left


def test_another_design_inherits_the_parts_that_it_has_and_starts_with_the_rest():
    """Modules that no part names, such as a gate's norm, are the design's own."""
    student = make_student()
    student["blocks"]["attn"]["gate"] = {"norm": {"scale": jnp.ones((L, D))}}
    teacher = make_params("softmax")
    merged, before, report = merge(teacher, student, load=("q", "o"))
    gate = "blocks/attn/gate/norm/scale"
    assert gate in report.at_init
    np.testing.assert_array_equal(merged[gate], before[gate])
    proj = "blocks/attn/proj/kernel"
    np.testing.assert_array_equal(merged[proj], flatten_dict(teacher, sep="/")[proj])
    # From a source of its own design it takes them as the rest.
    source = make_params()
    source["blocks"]["attn"]["gate"] = {"norm": {"scale": np.full((L, D), 3.0, np.float32)}}
    assert inherit.parts_of(student) == ("q", "k", "v", "o", "conv", "rest")
    merged, _, report = merge(source, student, load=inherit.parts_of(student))
    assert not report.at_init
    # Those of LiT and of DiT have no rest, whatever the modules outside attention.
    assert inherit.parts_of(make_params()) == ("q", "k", "v", "o", "conv")
    assert inherit.parts_of(teacher) == ("q", "k", "v", "o")
    np.testing.assert_array_equal(merged[gate], 3.0)
