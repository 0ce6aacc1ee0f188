"""Checkpoints: what is kept, what is restored and onto which devices.

And what damaged ones, and those of other runs, lead to.
"""

import dataclasses
import functools
import json
import logging
import pathlib
import shutil
import sys
import time
import types

import full_disk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tensorstore
from jax.experimental import multihost_utils
from restored import restore_params

from lit_jax import checkpoint, sharding
from lit_jax.models.dit import DiT, DiTConfig
from lit_jax.runtime.exit_status import TryAgainError
from lit_jax.train_step import TrainState, state_shapes

PIXELS = dict(patch_size=4, in_channels=1, num_classes=3)
MODEL = DiT(DiTConfig(2, 16, 2, attention="linear", **PIXELS))
OPTIMIZER = optax.adamw(1e-3)
FIELDS = {"train.batch_size": 8}


@functools.cache
def shapes_of_state(model, optimizer):
    """Traced once for all tests."""
    return state_shapes(model, optimizer)


def make_state(data=2, fsdp=4, model=MODEL, optimizer=OPTIMIZER, seed=0):
    """A state with random numbers in every leaf, on a mesh."""
    shapes = shapes_of_state(model, optimizer)
    shardings = sharding.fsdp_sharding(
        shapes, sharding.make_mesh(data, fsdp, devices=jax.devices()[: data * fsdp]), min_size=64
    )
    rng = np.random.default_rng(seed)

    def draw(leaf, where):
        floating = jnp.issubdtype(leaf.dtype, jnp.floating)
        values = rng.standard_normal(leaf.shape) if floating else rng.integers(0, 99, leaf.shape)
        return jax.device_put(np.asarray(values, leaf.dtype), where)

    return jax.tree.map(draw, shapes, shardings)


def shapes_of(state):
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    ).items()


def open_run(folder, **options):
    return checkpoint.Checkpointer(folder, **dict(keep=3, keep_every=0) | options)


def save_run(folder, states, **options):
    """Saves {step: state} in order; the data state names the step."""
    run = open_run(folder, **options)
    for number, state in states.items():
        run.save(
            number,
            state.items(),
            data={"read": number},
            metadata={"name": f"step {number}", "fields": FIELDS},
        )
    run.wait()
    run.close()


def assert_same(restored, state):
    jax.tree.map(
        np.testing.assert_array_equal,
        jax.device_get(TrainState.from_items(restored)),
        jax.device_get(state),
    )


@pytest.fixture(scope="module")
def states():
    return {number: make_state(seed=number) for number in (2, 4, 6)}


@pytest.fixture(scope="module")
def saved(tmp_path_factory, states):
    """A folder with checkpoints of steps 2, 4 and 6; tests that damage it work on a copy."""
    folder = tmp_path_factory.mktemp("run") / "checkpoints"
    save_run(folder, states)
    return folder


@pytest.fixture(scope="module")
def few_states():
    """States of four arrays: Orbax takes its time for each."""
    mesh = sharding.make_mesh(2, 4)

    def state(seed):
        values = np.random.default_rng(seed).standard_normal((3, 8, 5)).astype(np.float32)
        spread = jax.device_put(list(values), sharding.batch_sharding(mesh))
        trees = [{"a": array} for array in spread]
        counters = jax.device_put(list(np.int32([seed, 0, 0])), sharding.replicated(mesh))
        return TrainState(*counters, *trees)

    return {number: state(number) for number in (2, 4, 6)}


@pytest.fixture(scope="module")
def few_saved(tmp_path_factory, few_states):
    folder = tmp_path_factory.mktemp("few") / "checkpoints"
    save_run(folder, few_states)
    return folder


@pytest.fixture
def few(few_saved, tmp_path):
    return pathlib.Path(shutil.copytree(few_saved, tmp_path / "checkpoints"))


@pytest.fixture
def copy(saved, tmp_path):
    return pathlib.Path(shutil.copytree(saved, tmp_path / "checkpoints"))


def folders(path):
    return sorted(p.name for p in path.iterdir())


def test_the_newest_is_restored_bit_for_bit(saved, states):
    run = open_run(saved)
    number, items, data, metadata = run.restore(shapes_of(states[6]))
    assert (number, data, metadata["name"]) == (6, {"read": 6}, "step 6")
    assert_same(items, states[6])
    jax.tree.map(
        lambda a, b: pytest.fail(f"{a.sharding}") if a.sharding != b.sharding else None,
        items["params"],
        states[6].params,
    )
    run.close()


@pytest.mark.parametrize("data, fsdp", [(1, 1), (4, 2)])
def test_another_mesh_restores_the_same_values(saved, states, data, fsdp):
    run, other = open_run(saved), make_state(data, fsdp)
    _, items, _, _ = run.restore(shapes_of(other))
    assert_same(items, states[6])
    kernel = items["params"]["blocks"]["mlp"]["fc1"]["kernel"]
    assert kernel.sharding == other.params["blocks"]["mlp"]["fc1"]["kernel"].sharding
    run.close()


def test_an_empty_workdir_restores_nothing(tmp_path, states):
    run = open_run(tmp_path / "checkpoints")
    assert run.restore(shapes_of(states[2])) is None and run.latest_step() is None
    run.close()


def test_the_newest_and_every_so_many_steps_are_kept(tmp_path, few_states):
    save_run(
        tmp_path, {number: few_states[2] for number in (2, 4, 5, 6, 8, 9)}, keep=2, keep_every=4
    )
    assert folders(tmp_path) == ["4", "8", "9"]


def test_saving_copies_before_it_returns(tmp_path):
    state, run = make_state(seed=9), open_run(tmp_path)
    kept = jax.device_get(state)
    run.save(1, state.items(), data={}, metadata={})
    jax.tree.map(lambda x: x.delete(), state)  # as the next step does, which donates the state
    run.wait()
    _, items, _, _ = run.restore(shapes_of(make_state()))
    assert_same(items, kept)
    run.close()


def test_the_wait_for_the_step_is_not_counted_as_the_save(tmp_path, monkeypatch, caplog):
    """A step that still runs when `save` is called ends before the clock starts."""
    clock = {"now": 0.0}
    waited = []
    fake = types.SimpleNamespace(monotonic=lambda: clock["now"], sleep=time.sleep)
    monkeypatch.setattr(checkpoint, "time", fake)

    wait = jax.block_until_ready

    def slow_step(tree):
        waited.append(tree)
        clock["now"] += 100.0
        return wait(tree)

    monkeypatch.setattr(jax, "block_until_ready", slow_step)
    items = dict.fromkeys(checkpoint.ARRAY_ITEMS, {"a": jnp.zeros(2)})
    run = open_run(tmp_path)
    with caplog.at_level(logging.INFO, logger="absl"):
        run.save(1, items, data={}, metadata={})
    run.wait()
    run.close()
    assert items in waited and "the loop stood still for 0.00 s" in caplog.text


# Damage. ------------------------------------------------------------------------------------------


def spoil(item):
    """Cuts every file of array data of one saved item in half."""
    for path in item.rglob("d/*"):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def damage(folder, how):
    if how == "array data cut short":
        spoil(folder / "opt_state")
    elif how == "item missing":
        shutil.rmtree(folder / "ema_params")
    elif how == "metadata garbled":
        (folder / "params" / "_METADATA").write_text("{")
    else:  # a file of JSON, and what becomes of its text
        item, change = how
        path = folder / item / "metadata"
        before = path.read_text()
        path.write_text(change(before))
        assert path.read_text() != before


# All but the first are still JSON, which only the checksum can tell from what was saved.
JSON_DAMAGE = {
    "data state garbled": ("data", lambda text: "{"),
    "data state of another step": ("data", lambda text: text.replace("6", "7")),
    "data state negative": ("data", lambda text: text.replace("6", "-6")),
    "data state renamed": ("data", lambda text: text.replace("read", "raed")),
    "data state a list": ("data", lambda text: "[]"),
    "metadata renamed": ("metadata", lambda text: text.replace("name", "nmae")),
    "metadata of another step": ("metadata", lambda text: text.replace("step 6", "step 7")),
    "metadata a list": ("metadata", lambda text: "[]"),
    "metadata empty": ("metadata", lambda text: "{}"),
    "a field changed": ("metadata", lambda text: text.replace(": 8", ": 9")),
    "checksum changed": (
        "metadata",
        lambda text: text[:-3] + ('0"}' if text[-3] != "0" else '1"}'),
    ),
}


@pytest.mark.parametrize(
    "how", ["array data cut short", "item missing", "metadata garbled", *JSON_DAMAGE]
)
def test_a_damaged_newest_checkpoint_is_named_set_aside_and_skipped(few, few_states, how, caplog):
    damage(few / "6", JSON_DAMAGE.get(how, how))
    run = open_run(few)
    with caplog.at_level(logging.WARNING, logger="absl"):
        number, items, data, _ = run.restore(shapes_of(few_states[4]), FIELDS)
    assert (number, data) == (4, {"read": 4})
    assert_same(items, few_states[4])
    warnings = [
        record.getMessage() for record in caplog.records if "is damaged and" in record.getMessage()
    ]
    assert len(warnings) == 1 and str(few / "6") in warnings[0]
    assert folders(few) == ["2", "4", "6.damaged"]
    run.save(6, few_states[6].items(), data={}, metadata={})  # the step is free again
    run.wait()
    assert run.latest_step() == 6
    run.close()


def test_one_of_several_processes_that_meets_damage_stops_after_renaming(
    few, few_states, monkeypatch
):
    """The others may have read the same checkpoint well, and would go on from another step."""

    class TwoProcesses:
        """JAX as one of two processes sees it; only lit_jax.checkpoint does."""

        process_count = staticmethod(lambda: 2)

        def __getattr__(self, name):
            return getattr(jax, name)

    damage(few / "6", "item missing")
    run = open_run(few)
    monkeypatch.setattr(checkpoint, "jax", TwoProcesses())
    with pytest.raises(TryAgainError, match="6 is damaged and set aside; run the same command"):
        run.restore(shapes_of(few_states[4]), FIELDS)
    run.close()
    assert folders(few) == ["2", "4", "6.damaged"]
    checkpoint.set_aside(checkpoint.orbax_path(few / "6"))  # as one that comes second
    assert folders(few) == ["2", "4", "6.damaged"]


def test_when_none_can_be_read_the_run_stops_and_does_not_begin_again(few, few_states):
    for number in (2, 4, 6):
        damage(few / str(number), "item missing")
    for _ in range(2):  # the same command again finds only what the first has set aside
        run = open_run(few)
        with pytest.raises(
            ValueError,
            match="no checkpoint in .*checkpoints can be read; set aside: 2.damaged, 4.d.*, 6.d",
        ):
            run.restore(shapes_of(few_states[2]))
        run.close()


def test_a_checkpoint_from_before_the_checksum_is_taken_with_a_warning(few, few_states, caplog):
    path = few / "6" / "metadata" / "metadata"
    metadata = json.loads(path.read_text())
    del metadata["checksum"]
    path.write_text(json.dumps(metadata))
    run = open_run(few)
    with caplog.at_level(logging.WARNING, logger="absl"):
        assert run.restore(shapes_of(few_states[6]))[0] == 6
    assert f"checkpoint {few}/6 has no checksum of its data state" in caplog.text
    run.close()


@pytest.mark.parametrize(
    "error",
    [
        jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate"),
        TypeError("a fault of ours"),
    ],
)
def test_no_memory_or_a_fault_of_ours_is_no_damage(few, few_states, monkeypatch, error):
    """What XLA raises when the arrays do not fit the devices, and what a bug raises."""

    def fail(items):
        raise error

    monkeypatch.setattr(checkpoint, "fingerprints", fail)
    run = open_run(few)
    with pytest.raises(type(error), match=str(error)):
        run.restore(shapes_of(few_states[6]))
    run.close()
    assert folders(few) == ["2", "4", "6"]


@pytest.mark.parametrize(
    "files, target, message",
    [
        ("metadata/metadata", "/proc/self/mem", "Input/output error"),  # Python reads it
        ("params/_METADATA", "/proc/self/mem", "Input/output error"),  # Orbax
        ("opt_state/d/*", "", "Too many levels of symbolic links"),  # TensorStore, a link to itself
    ],
)
def test_a_failing_file_system_stops_the_run_and_leaves_the_checkpoint_alone(
    few, few_states, files, target, message
):
    for path in list((few / "6").glob(files)):
        path.unlink()
        path.symlink_to(target or path)
    run = open_run(few)
    with pytest.raises(
        OSError, match=f"checkpoint {few}/6 cannot be read and is left as it is: .*{message}"
    ) as error:
        run.restore(shapes_of(few_states[6]))
    run.close()
    assert "\n" not in str(error.value) and folders(few) == ["2", "4", "6"]


def test_a_half_written_checkpoint_does_not_count(few, few_states):
    """What a killed process leaves: a temporary folder without its final name."""
    shutil.copytree(few / "6", few / "8.orbax-checkpoint-tmp-1")
    run = open_run(few)
    assert run.restore(shapes_of(few_states[6]))[0] == 6
    run.close()


@pytest.mark.parametrize(
    "change, name, there, wanted",
    [
        (dict(width=32), "blocks/adaLN_modulation/bias", r"\(2, 96\)", r"\(2, 192\)"),
        (dict(depth=3), "blocks/adaLN_modulation/bias", r"\(2, 96\)", r"\(3, 96\)"),
        (dict(attention="softmax"), "blocks/attn/dwc/bias", r"\(2, 8\)", "not there"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused_and_left_alone(copy, change, name, there, wanted):
    run = open_run(copy)
    with pytest.raises(
        ValueError,
        match=f"{copy}/6 does not fit the model: {name} is {there} in the checkpoint, {wanted} in",
    ):
        run.restore(
            shapes_of(
                make_state(model=MODEL.clone(config=dataclasses.replace(MODEL.config, **change)))
            )
        )
    run.close()
    assert folders(copy) == ["2", "4", "6"]


def test_a_checkpoint_of_another_optimizer_is_refused_and_left_alone(copy):
    run = open_run(copy)
    other = make_state(
        optimizer=optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(1e-3, momentum=0.9))
    )
    with pytest.raises(ValueError, match=f"{copy}/6 .*optimizer"):
        run.restore(shapes_of(other))
    run.close()
    assert folders(copy) == ["2", "4", "6"]


# Parameters alone. --------------------------------------------------------------------------------


@pytest.mark.parametrize("below", ["", "6"])
@pytest.mark.parametrize("ema", [True, False])
def test_sampling_reads_one_set_of_parameters_and_nothing_else(few, few_states, ema, below):
    for number in ("6", "4"):
        shutil.rmtree(few / number / "opt_state")  # what is not needed may be missing or damaged
        spoil(few / number / ("params" if ema else "ema_params"))
    path = few / below if below else few.parent  # a checkpoint, or a workdir and so its newest
    params, metadata = restore_params(path, ema=ema)
    expected = few_states[6].ema_params if ema else few_states[6].params
    jax.tree.map(np.testing.assert_array_equal, params, jax.device_get(expected))
    assert (
        metadata["weights"] == ("ema_params" if ema else "params") and metadata["name"] == "step 6"
    )
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(params))


def test_a_training_checkpoint_without_its_ema_is_not_sampled_from_raw_weights(few, few_states):
    shutil.rmtree(few / "6" / "ema_params")
    with pytest.raises(ValueError, match="6 cannot be read: .*ema_params"):
        restore_params(few / "6")
    params, metadata = restore_params(few / "6", ema=False)
    assert metadata["weights"] == "params"
    jax.tree.map(np.testing.assert_array_equal, params, jax.device_get(few_states[6].params))


def test_parameters_are_read_onto_shards(saved, states):
    mesh = sharding.make_mesh(1, 8)
    shardings = sharding.fsdp_sharding(states[6].params, mesh, min_size=64)
    params, _ = restore_params(saved, shardings)
    jax.tree.map(
        np.testing.assert_array_equal, jax.device_get(params), jax.device_get(states[6].ema_params)
    )
    jax.tree.map(
        lambda a, b: pytest.fail(f"{a.sharding}") if a.sharding != b else None, params, shardings
    )


def test_a_parameter_checkpoint_goes_there_and_back(tmp_path, states):
    checkpoint.save_params(tmp_path / "ported", states[2].params, {"model": {"depth": 2}})
    assert checkpoint.is_checkpoint(tmp_path / "ported")
    params, metadata = restore_params(tmp_path / "ported")
    jax.tree.map(np.testing.assert_array_equal, params, jax.device_get(states[2].params))
    assert metadata["model"] == {"depth": 2} and metadata["weights"] == "params"
    with pytest.raises(ValueError, match="ported already holds files"):
        checkpoint.save_params(tmp_path / "ported", states[2].params, {})


@pytest.mark.parametrize("onto_shards", [False, True])
@pytest.mark.parametrize("ema", [True, False])
def test_parameters_of_another_step_are_refused(few, few_states, ema, onto_shards):
    """As from a disk that changes bits: readable, finite, of the right shapes."""
    item = "ema_params" if ema else "params"
    shutil.rmtree(few / "6" / item)
    shutil.copytree(few / "4" / item, few / "6" / item)
    shardings = (
        jax.tree.map(lambda leaf: leaf.sharding, few_states[6].params) if onto_shards else None
    )
    with pytest.raises(ValueError, match=f"{few}/6 cannot be read: {item} is not what was saved"):
        restore_params(few, shardings, ema=ema)
    restore_params(few, shardings, ema=not ema)  # what is not read is not compared


def test_changed_metadata_are_refused(tmp_path, few, few_states):
    """One bit makes another model of the same weights: 2 heads or 3, a shift of 0 or 1."""
    checkpoint.save_params(tmp_path / "ported", few_states[2].params, {"model": {"num_heads": 2}})
    for folder, item in ((tmp_path / "ported", "metadata"), (few / "6", "metadata")):
        path = folder / item / "metadata"
        text = path.read_text()
        for old, new in (("2", "3"), ("{", "[")):
            path.write_text(text.replace(old, new, 1))
            with pytest.raises(ValueError, match=f"checkpoint {folder} cannot be read: "):
                restore_params(folder)
        path.write_text(text)
        restore_params(folder)
    damage(few / "6", JSON_DAMAGE["data state of another step"])
    with pytest.raises(ValueError, match="6 cannot be read: data or metadata is not what was"):
        restore_params(few / "6")


def fingerprint_oracle(tree):
    """Element by element, in Python's integers."""
    total = 0
    for number, leaf in enumerate(jax.tree.leaves(tree)):
        bits = np.asarray(leaf).view(f"uint{8 * leaf.dtype.itemsize}").flatten().tolist()
        total += (2 * number + 1) * sum(value * (2 * place + 1) for place, value in enumerate(bits))
    return total % 2**32


def test_a_fingerprint_sees_every_value_and_where_it_stands(monkeypatch):
    rng = np.random.default_rng(0)
    whole = {
        "a": rng.standard_normal((3, 4, 2)).astype(np.float32),
        "b": rng.standard_normal((3, 4, 2)).astype(np.float32),
        "c": rng.standard_normal(5).astype(jnp.bfloat16),
        "d": np.int32(7),
    }
    a, b = whole["a"], whole["b"]
    bit = a.copy()
    bit.view(np.uint32)[1, 2, 1] ^= 1 << 30
    changes = {
        "as it is": {},
        "one bit": {"a": bit},
        "two elements": {"a": a.reshape(-1)[[1, 0, *range(2, 24)]].reshape(a.shape)},
        "two rows": {"a": a[[1, 0, 2]]},
        "two columns": {"a": a[:, [1, 0, 2, 3]]},
        "the last axis": {"a": a[..., ::-1]},
        "two leaves": {"a": b, "b": a},
    }
    seen = set()
    monkeypatch.setattr(checkpoint, "ELEMENTS_AT_ONCE", 7)  # so that a leaf has several
    for change in changes.values():
        tree = whole | change
        expected = fingerprint_oracle(tree)
        assert checkpoint.host_fingerprint(tree) == expected
        assert checkpoint.fingerprints({"tree": tree}) == {"tree": expected}
        seen.add(expected)
    assert len(seen) == len(changes)


def test_a_failed_read_prints_one_error(few, monkeypatch):
    """Orbax leaves tracebacks of the arrays that it had begun to read."""
    printed = []
    monkeypatch.setattr("sys.unraisablehook", printed.append)
    spoil(few / "6" / "ema_params")
    for _ in range(2):
        with pytest.raises(ValueError, match="cannot be read"):
            restore_params(few / "6")
    printed.clear()
    echo = types.SimpleNamespace(exc_value=RuntimeError("Event loop is closed"))
    other = types.SimpleNamespace(exc_value=RuntimeError("another"))
    sys.unraisablehook(echo)
    sys.unraisablehook(other)
    assert printed == [other]


def rewrite(name, change):
    """Replaces the text of one file of a parameter checkpoint."""

    def apply(folder):
        path = folder / name
        path.write_bytes(change(path.read_text()).encode("latin-1"))

    return apply


def grow(name):
    return lambda folder: (folder / name).open("r+").truncate(5 << 20)


def large_chunks(folder):
    """An array of 5 elements, stored as one of 500 million would be."""
    metadata = dict(shape=[5], chunks=[500_000_000], dtype="<f4", compressor=None, fill_value=None)
    store = dict(driver="ocdbt", base=f"file://{folder}/params/", path="b/")
    tensorstore.open(
        dict(driver="zarr", kvstore=store, metadata=metadata), create=True, delete_existing=True
    ).result()


LIES = {
    "more zeros than weights": (lambda folder: None, "would unpack [0-9]+ bytes to 800020, as no"),
    "chunks larger than the array": (large_chunks, r"b has shape \(5,\), but chunks of \(500000"),
    "much metadata": (grow("metadata/metadata"), "metadata has more than 4194304 bytes"),
    "much tree metadata": (grow("params/_METADATA"), "_METADATA has more than 4194304 bytes"),
    "deep metadata": (rewrite("metadata/metadata", lambda text: "[" * 200_000), "recursion"),
    "deep tree metadata": (rewrite("params/_METADATA", lambda text: "[" * 200_000), "recursion"),
    "metadata in no UTF-8": (rewrite("metadata/metadata", lambda text: "\xff{}"), "utf-8"),
    "tree metadata in no UTF-8": (rewrite("params/_METADATA", lambda text: "\xff{}"), "utf-8"),
    "a key of an unknown type": (
        rewrite("params/_METADATA", lambda text: text.replace('"key_type": 2', '"key_type": 99')),
        "99 is not a valid KeyType",
    ),
    "a tree that is none": (
        rewrite("params/_METADATA", lambda text: '{"tree_metadata": null}'),
        "cannot be read: ",
    ),
    "metadata with a huge number": (
        rewrite("metadata/metadata", lambda text: "9" * 10_000),
        "4300 digits",
    ),
    "fingerprints that are none": (
        rewrite("metadata/metadata", lambda text: '{"fingerprints": 7}'),
        "its fingerprints are not an object",
    ),
}


@pytest.mark.parametrize("name", LIES)
def test_folders_that_lie_are_refused_before_a_value_is_read(tmp_path, monkeypatch, name):
    change, message = LIES[name]
    zeros = {"a": jnp.zeros((200, 1000)), "b": jnp.zeros(5)}
    checkpoint.save_params(tmp_path / "saved", zeros, {})
    change(tmp_path / "saved")
    if name == "more zeros than weights":
        assert checkpoint.open_params(tmp_path / "saved").metadata == {}
        monkeypatch.setattr(checkpoint, "MAX_UNPACKED_BYTES", 1000)
    with pytest.raises(ValueError, match=message) as caught:
        checkpoint.open_params(tmp_path / "saved")
    text = str(caught.value)
    assert text.startswith(f"checkpoint {tmp_path}/saved cannot be read: ") and "\n" not in text


def test_a_folder_whose_name_is_no_number_is_no_step(few, few_states):
    """Python calls a superscript a digit."""
    shutil.copytree(few / "6", few / "\u00b2")
    assert restore_params(few.parent)[1]["path"] == f"{few}/6"
    run = open_run(few)
    assert run.restore(shapes_of(few_states[6]))[0] == 6
    run.close()


def test_what_is_no_checkpoint_is_named(tmp_path, few):
    assert not checkpoint.is_checkpoint(tmp_path / "nothing")
    for path in (tmp_path / "nothing", tmp_path):
        if path == tmp_path:
            shutil.rmtree(few)
        with pytest.raises(FileNotFoundError, match=f"{path} holds no Orbax checkpoint"):
            restore_params(path)


def test_unreadable_parameters_are_named_in_one_line(few):
    spoil(few / "6" / "ema_params")
    with pytest.raises(ValueError, match=f"checkpoint {few}/6 cannot be read") as error:
        restore_params(few)
    assert "\n" not in str(error.value)


def test_paths_and_sizes_of_a_tree():
    tree = {
        "a": {"b": np.zeros((2, 3))},
        "c": [np.zeros(4), ()],
        "d": optax.ScaleByScheduleState(np.zeros(1)),
    }
    assert {path: leaf.shape for path, leaf in checkpoint.flatten(tree).items()} == {
        "a/b": (2, 3),
        "c/0": (4,),
        "d/count": (1,),
    }
    assert checkpoint.parameter_count(tree) == 11


def test_saving_does_not_ask_whether_to_stop(tmp_path, monkeypatch, few_states):
    """JAX's service hears one count alone, that of distributed.Preemption."""
    asked = []
    monkeypatch.setattr(
        multihost_utils, "reached_preemption_sync_point", lambda step: asked.append(step) or False
    )
    save_run(tmp_path, {2: few_states[2]})
    assert not asked


def test_a_port_to_a_full_disk_names_the_folder_and_leaves_nothing(tmp_path, capfd):
    params = {"a": np.random.default_rng(0).random((500, 500), np.float32)}
    message = f"^{tmp_path / 'out'} {full_disk.MESSAGE}"
    with full_disk.full_disk(100_000), pytest.raises(OSError, match=message):
        checkpoint.save_params(tmp_path / "out", params, {})
    assert not list(tmp_path.iterdir())
    assert "Traceback" not in capfd.readouterr().err
