"""T5 encoders of the Hub: every layout and key, bit for bit, and what transformers computes."""

import json
import shutil
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax.traverse_util import flatten_dict
from safetensors.torch import load_file, save_file
from tiny_text import random_params
from torch_checkpoints import rel, rename_key, set_key

from lit_jax import sharding
from lit_jax.models.t5 import T5Config, T5Encoder
from lit_jax.porting import t5
from lit_jax.porting.torch_checkpoint import PortingError
from lit_jax.porting.untrusted import TensorFileError

CONFIG = T5Config(vocab_size=40, width=32, depth=2, num_heads=3, head_width=4, mlp_width=48)
NAME = "model.safetensors"


def make_theirs(config=CONFIG, kind=transformers.T5EncoderModel, seed=0, **fields):
    """Of transformers, with random weights everywhere."""
    theirs = transformers.T5Config(
        vocab_size=config.vocab_size,
        d_model=config.width,
        d_kv=config.head_width,
        d_ff=config.mlp_width,
        num_layers=config.depth,
        num_heads=config.num_heads,
        feed_forward_proj="gated-gelu",
        **fields,
    )
    torch.manual_seed(seed)
    # Not drawn twice: of a block of full width transformers' own numbers take longest.
    with torch.device("meta"):
        model = kind(theirs).eval()
    model.to_empty(device="cpu").tie_weights()
    with torch.no_grad():
        for parameter in model.parameters():
            fan_in = parameter.shape[-1] if parameter.ndim == 2 else 1
            parameter.normal_(0, fan_in**-0.5)
    return model


@pytest.fixture(scope="module")
def theirs():
    return make_theirs()


@pytest.fixture(scope="module")
def saved(theirs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    theirs.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    """A copy that a test may spoil."""
    return shutil.copytree(saved, tmp_path / "copy")


def assert_holds(checkpoint, model):
    """Every weight of a torch model, found under the name that its key says."""
    state = {key: value.numpy() for key, value in model.state_dict().items()}
    for entry in t5.entries(checkpoint.config):
        leaf = np.asarray(flatten_dict(checkpoint.params, sep="/")[entry.path])
        for layer, key in enumerate(entry.keys):
            ours = leaf[layer] if entry.is_stacked else leaf
            np.testing.assert_array_equal(ours.T if "kernel" in entry.path else ours, state[key])


# ---- The function ----------------------------------------------------------------------


def features(model, ids, counts):
    ids = torch.tensor(ids)
    mask = torch.arange(ids.shape[1])[None] < torch.tensor(counts)[:, None]
    with torch.no_grad():
        out = model(input_ids=ids, attention_mask=mask.long()).last_hidden_state
    return out.numpy(), mask.numpy()


def run(config, params, ids, mask):
    return jax.jit(T5Encoder(config, dtype=jnp.float32).apply)({"params": params}, ids, mask)


def test_the_features_are_those_of_transformers(theirs, saved):
    checkpoint = t5.read_text_encoder(saved)
    assert checkpoint.config == CONFIG
    counts = [300, 260, 9, 1]
    ids = np.random.default_rng(0).integers(0, 40, (4, 300))
    expected, mask = features(theirs, ids, counts)
    params = t5.load_encoder_params(checkpoint.params, "float32", sharding.make_mesh())
    actual = run(CONFIG, params, ids, mask)
    assert rel(actual, expected) < 1e-5


def test_a_block_of_full_width():
    """float32 with the XXL's long sums. One block has 0.8 GB, so no file is written."""
    config = T5Config(vocab_size=16, depth=1)
    model = make_theirs(config)
    state = {key: value.numpy() for key, value in model.state_dict().items()}
    flat = {}
    for entry in t5.entries(config):
        value = state[entry.keys[0]]
        value = value.T if "kernel" in entry.path else value
        flat[entry.path] = value[None] if entry.is_stacked else value
    params = jax.tree.map(jnp.asarray, t5.unflatten_dict(flat, sep="/"))
    ids = np.random.default_rng(0).integers(0, 16, (1, 60))
    expected, mask = features(model, ids, [50])
    actual = run(config, params, ids, mask)
    assert rel(actual, expected) < 1e-5


# ---- The layouts -----------------------------------------------------------------------


def test_every_layout_holds_the_same_weights(theirs, saved, tmp_path):
    """Single and sharded, .safetensors and .bin, alone, below a pipeline, and in half."""
    expected = t5.read_text_encoder(saved)
    assert_holds(expected, theirs)
    state = {key: value.clone() for key, value in theirs.state_dict().items()}

    (tmp_path / "pipeline").mkdir()
    shutil.copytree(saved, tmp_path / "pipeline" / "text_encoder")
    theirs.save_pretrained(tmp_path / "shards", max_shard_size="8KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    single = {key: value for key, value in state.items() if key != t5.TIED}
    save_file(single, tmp_path / "t5.safetensors")
    torch.save(state, tmp_path / "t5.bin")
    write_bin_shards(saved, tmp_path / "bins", state)

    for name in ("pipeline", "shards", "t5.safetensors", "t5.bin", "bins"):
        checkpoint = t5.read_text_encoder(tmp_path / name)
        assert checkpoint.report.checksum == expected.report.checksum, name
        assert checkpoint.config == CONFIG
    assert checkpoint.report.left_out == {t5.TIED: "the same as shared.weight"}

    half = {key: value.to(torch.bfloat16) for key, value in single.items()}
    save_file(half, tmp_path / "half.safetensors")
    report = t5.read_text_encoder(tmp_path / "half.safetensors").report
    assert all("cast from bfloat16" in how for how in report.keys.values())


def write_bin_shards(saved, folder, state):
    """Two files and an index, as the Hub has the XXL."""
    folder.mkdir()
    shutil.copy(saved / "config.json", folder)
    keys = sorted(state)
    weight_map = {}
    for number, part in enumerate((keys[:7], keys[7:]), 1):
        name = f"pytorch_model-{number:05}-of-00002.bin"
        torch.save({key: state[key] for key in part}, folder / name)
        weight_map |= dict.fromkeys(part, name)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))


def test_of_a_whole_t5_the_decoder_is_left_out_and_named(tmp_path):
    kind = transformers.T5ForConditionalGeneration
    whole = make_theirs(kind=kind)
    whole.save_pretrained(tmp_path)
    # Files of before transformers 5 have the head, and v1.1's is not the table.
    state = load_file(tmp_path / NAME)
    save_file(state | {"lm_head.weight": torch.zeros(40, 32)}, tmp_path / NAME)
    checkpoint = t5.read_text_encoder(tmp_path)
    assert_holds(checkpoint, whole)
    left = checkpoint.report.left_out
    assert "lm_head.weight" in left
    assert "decoder.block.1.layer.1.EncDecAttention.q.weight" in left
    assert not any(key.startswith("encoder.block") for key in left)


# ---- What is refused -------------------------------------------------------------------


def test_two_tables_that_differ_are_refused(theirs, tmp_path):
    state = {key: value.clone() for key, value in theirs.state_dict().items()}
    state[t5.TIED][7, 3] += 1e-3
    torch.save(state, tmp_path / "t5.bin")
    with pytest.raises(PortingError, match="embed_tokens.weight and shared.weight differ"):
        t5.read_text_encoder(tmp_path / "t5.bin")
    state[t5.TIED] = state[t5.TIED][:-1]
    torch.save(state, tmp_path / "t5.bin")
    with pytest.raises(PortingError, match="embed_tokens.weight and shared.weight differ"):
        t5.read_text_encoder(tmp_path / "t5.bin")
    del state[t5.TIED]
    state[t5.TIED] = state.pop(t5.SHARED)
    torch.save(state, tmp_path / "t5.bin")
    assert_holds(t5.read_text_encoder(tmp_path / "t5.bin"), theirs)


Q1 = "encoder.block.1.layer.0.SelfAttention.q.weight"
WI = "encoder.block.0.layer.1.DenseReluDense.wi"


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda state: state.pop(Q1), f"missing: {Q1}"),
        (set_key("encoder.extra.weight", torch.zeros(2)), "unexpected: encoder.extra.weight"),
        # As in UMT5: a bias of its own in each layer.
        (
            rename_key(Q1, Q1.replace(".q.", ".relative_attention_bias.")),
            "unexpected: encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight",
        ),
        (set_key(Q1, torch.zeros(12, 31)), r"q.weight \(12, 31\), expected \(12, 32\)"),
        (set_key(Q1, torch.zeros(12, 32, dtype=torch.int8)), "of int8, expected a float"),
        (set_key(Q1, torch.full((12, 32), torch.nan)), r"q/kernel\[1\] holds values that are not"),
        (rename_key(f"{WI}_0.weight", f"{WI}.weight"), "first version, whose MLP has no gate"),
        (set_key(t5.SHARED, torch.zeros(3)), r"shared.weight has shape \(3,\), expected 2"),
        (
            set_key(Q1.replace("1", "0", 1), torch.zeros(13, 32)),
            "3 heads do not divide the 13 rows",
        ),
    ],
)
def test_keys_that_do_not_fit_are_named(folder, change, message):
    state = {key: value.clone() for key, value in load_file(folder / NAME).items()}
    change(state)
    save_file(state, folder / NAME)
    with pytest.raises(PortingError, match=message):
        t5.read_text_encoder(folder)


@pytest.mark.parametrize(
    "field, value, message",
    [
        ("model_type", "clip_text_model", "describes a model of type clip_text_model, expected t5"),
        ("d_ff", 47, "d_ff = 47, expected 48"),
        ("feed_forward_proj", "gated-silu", "feed_forward_proj = gated-silu, expected gated-gelu"),
        ("relative_attention_max_distance", 64, "max_distance = 64, expected 128"),
        ("layer_norm_epsilon", 1e-5, "layer_norm_epsilon = 1e-05, expected 1e-06"),
    ],
)
def test_a_config_of_another_model_is_refused(folder, field, value, message):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {field: value}))
    with pytest.raises(PortingError, match=message):
        t5.read_text_encoder(folder)


def test_hostile_shards_are_refused(theirs, saved, tmp_path):
    state = theirs.state_dict()
    folder = tmp_path / "bins"
    write_bin_shards(saved, folder, state)
    index = folder / "pytorch_model.bin.index.json"
    text = index.read_text()
    content = json.loads(text)
    first = sorted(state)[0]

    outside = content["weight_map"] | {first: "../t5.bin"}
    index.write_text(json.dumps({"weight_map": outside}))
    with pytest.raises(PortingError, match="'../t5.bin', which is not a plain file name"):
        t5.read_text_encoder(folder)
    # A key that no file has, and one that another file has.
    index.write_text(json.dumps({"weight_map": content["weight_map"] | {"x": next_name(content)}}))
    with pytest.raises(PortingError, match="disagree on x"):
        t5.read_text_encoder(folder)
    index.write_text(text.replace(f'"{first}"', f'"{first}": "a.bin", "{first}"'))
    with pytest.raises(PortingError, match="appears twice"):
        t5.read_text_encoder(folder)
    index.unlink()
    with pytest.raises(FileNotFoundError, match="pytorch_model-00001-of-00002.bin.* is a variant"):
        t5.read_text_encoder(folder)


def next_name(content):
    return next(iter(content["weight_map"].values()))


def test_quantised_weights_are_refused_in_one_line(theirs, tmp_path):
    state = {Q1: theirs.state_dict()[Q1].to(torch.float8_e4m3fn)}
    save_file(state, tmp_path / "fp8.safetensors")
    with pytest.raises(TensorFileError, match="'F8_E4M3': quantised weights, which are not read"):
        t5.read_text_encoder(tmp_path / "fp8.safetensors")
    (tmp_path / "t5.gguf").write_bytes(b"GGUF\3\0\0\0" + bytes(100))
    with pytest.raises(TensorFileError, match="a GGUF file: quantised weights, which are not read"):
        t5.read_text_encoder(tmp_path / "t5.gguf")
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        t5.read_text_encoder(tmp_path / "nowhere")


# ---- Out again -------------------------------------------------------------------------


def test_an_export_is_read_by_transformers_bit_for_bit(theirs, saved, tmp_path):
    checkpoint = t5.read_text_encoder(saved)
    out = tmp_path / "text_encoder"
    t5.export_text_encoder(checkpoint.params, out, checkpoint.config)
    again = transformers.T5EncoderModel.from_pretrained(out)
    for key, value in theirs.state_dict().items():
        torch.testing.assert_close(again.state_dict()[key], value, rtol=0, atol=0)
    theirs_on_disk = load_file(saved / NAME)
    assert load_file(out / NAME).keys() == theirs_on_disk.keys()
    assert t5.read_text_encoder(tmp_path).report.checksum == checkpoint.report.checksum

    with pytest.raises(PortingError, match="exists; an export never overwrites"):
        t5.export_text_encoder(checkpoint.params, out, checkpoint.config)
    del checkpoint.params["final_layer_norm"]
    with pytest.raises(PortingError, match="missing: final_layer_norm/scale"):
        t5.export_text_encoder(checkpoint.params, tmp_path / "b", checkpoint.config)
    assert not (tmp_path / "b").exists()


# ---- Memory ----------------------------------------------------------------------------


def test_loading_a_leaf_needs_one_layer_beside_it(tmp_path):
    """On the host; a stacked leaf of the XXL has 4 GB in float32."""
    config = T5Config(vocab_size=8, width=64, depth=16, num_heads=1, head_width=1, mlp_width=512)
    t5.export_text_encoder(random_params(config), tmp_path / "a", config)
    params = t5.read_text_encoder(tmp_path / "a").params
    del params["blocks"]["layer_1"]["DenseReluDense"]["wi_0"]
    del params["blocks"]["layer_1"]["DenseReluDense"]["wi_1"]
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    for dtype, itemsize in (("bfloat16", 2), ("float32", 4)):
        tracemalloc.start()
        loaded = t5.load_encoder_params(params, dtype, mesh)["blocks"]["layer_1"]
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        layer = 64 * 512
        # A layer is read in float32 and cast; the rest is what Python itself needs.
        assert peak < 16 * layer * itemsize + 2 * 4 * layer + 2**17
        assert loaded["DenseReluDense"]["wo"]["kernel"].dtype == dtype
        assert loaded["layer_norm"]["scale"].dtype == np.float32
    with pytest.raises(ValueError, match="dtype must be one of float32, bfloat16; got 'float16'"):
        t5.load_encoder_params(params, "float16", mesh)


def test_shards_of_the_mesh_hold_the_weights(theirs, saved):
    """Each device reads its part of every layer."""
    config = T5Config(vocab_size=2048, width=32, depth=2, num_heads=2, head_width=4, mlp_width=2048)
    params = random_params(config)
    mesh = sharding.make_mesh(fsdp=8)
    loaded = t5.load_encoder_params(params, "float32", mesh)
    kernel = loaded["blocks"]["layer_1"]["DenseReluDense"]["wi_0"]["kernel"]
    assert kernel.addressable_shards[0].data.shape == (2, 32, 256)
    assert loaded["shared"]["embedding"].addressable_shards[0].data.shape == (256, 32)
    jax.tree.map(np.testing.assert_array_equal, loaded, params)
