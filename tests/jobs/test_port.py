"""The porting job: there and back again, every key reported, one clear line for bad input."""

import json
import os

import object_store
import pytest
import torch
from safetensors.torch import load_file
from tiny_autoencoder import write_autoencoder
from torch_checkpoints import assert_same_state, make_torch, port_config, save

from lit_jax.checkpoint import is_checkpoint
from lit_jax.jobs import port
from lit_jax.porting.read import read_autoencoder, read_checkpoint


def test_the_job_goes_there_and_back_again(tmp_path):
    model = make_torch()
    source = save(model, tmp_path / "a.pt")

    def run(source, target, **fields):
        config = port_config(source=tmp_path / source, target=tmp_path / target, **fields)
        return port.run(config, tmp_path / "work")

    report = run(source.name, "orbax", num_heads=3)
    saved = json.loads((tmp_path / "work" / "port_report.json").read_text())
    none = dict.fromkeys(("left_out", "missing", "unexpected", "reinitialised"), 0)
    assert saved["counts"] == {"keys": 42} | none
    assert saved["checksum"] == report.checksum and set(saved["keys"]) == set(model.state_dict())
    assert saved["source"] == str(source) and saved["architecture"]["grid"] == [4, 4]
    summary = report.summary()
    assert "keys: 42 matched, 0 left out" in summary and report.checksum in summary
    assert is_checkpoint(tmp_path / "orbax")
    run("orbax", "b.pt")
    assert_same_state(torch.load(tmp_path / "b.pt", weights_only=True), model)
    run("orbax", "d", layout="diffusers", timestep_freq_shift=1)
    back = run("d", "c.safetensors", timestep_freq_shift=0, mlp_norm_epsilon=1e-6)
    assert back.checksum == report.checksum
    assert_same_state(load_file(tmp_path / "c.safetensors"), model)


def test_the_job_ports_an_autoencoder(tmp_path):
    source = write_autoencoder(tmp_path / "a")
    report = port.run(port_config(source=source, target=tmp_path / "b"), tmp_path / "work")
    again = read_autoencoder(tmp_path / "b")
    assert again.report.checksum == report.checksum == read_autoencoder(source).report.checksum
    assert again.architecture == report.architecture
    message = "port.layout = dit, but .* is an autoencoder, which is ported to orbax or diffusers"
    with pytest.raises(ValueError, match=message):
        port.run(port_config(source=source, target=tmp_path / "c.pt"), tmp_path / "work")


@pytest.mark.parametrize(
    "change, message",
    [
        (
            dict(model=dict(depth=4)),
            "has depth = 3, the config's model has 4; name its model, or set port.check_model",
        ),
        (dict(model=dict(width=60)), "has width = 48, the config's model has 60"),
        (dict(model=dict(patch_size=4)), "has patch_size = 2, the config's model has 4"),
        (dict(model=dict(num_classes=1000)), "has num_classes = 10, the config's model has 1000"),
        (
            dict(model=dict(learn_sigma=False)),
            "has learn_sigma = True, the config's model has False",
        ),
        (dict(model=dict(input_size=16)), "has grid = 4x4, the config's model has 8x8"),
        (dict(target=""), "port.target is empty"),
        (dict(source=""), "port.source is empty"),
        (dict(source="/nowhere"), "port.source = /nowhere: no such file"),
        (dict(layout="onnx"), "port.layout must be one of orbax, dit, diffusers; got 'onnx'"),
        (dict(weights="best"), "port.weights must be ema or model; got 'best'"),
        (
            dict(target="new.pth"),
            "port.target = new.pth: files are written as .pt or .safetensors, not .pth",
        ),
        (dict(layout="dit"), "is written as .safetensors or .pt, not ''"),
        (dict(num_heads=-3), "port.num_heads must be at least 0; got -3"),
        (dict(num_heads=5), "port.num_heads = 5 does not divide the width 48"),
        (dict(num_classes=-1), r"port.num_classes must be in \[0, 1,000,000\]; got -1"),
        (dict(num_classes=10**13), r"port.num_classes must be in \[0, 1,000,000\]; got 10{13}$"),
        (dict(input_size=-8), "port.input_size must be 0, or a side in .*; got -8$"),
        (dict(timestep_freq_shift=2), "port.timestep_freq_shift must be 0 or 1; got 2"),
        (dict(mlp_norm_epsilon=0.0), "port.mlp_norm_epsilon must be between 0 and 1; got 0.0"),
        (
            dict(layout="diffusers"),
            "port.timestep_freq_shift = 0 is what the model computes with, but diffusers computes "
            "with 1; set it to 1 to accept that",
        ),
        (dict(layout="diffusers", num_heads=0), "port.num_heads must be named: the checkpoint"),
        (dict(input_size=7), "port.input_size = 7x7 was asked for, but the patches of .* are 2"),
    ],
)
def test_the_job_says_what_is_wrong_and_writes_nothing(tmp_path, change, message):
    source = save(make_torch(), tmp_path / "a.pt")
    fields = dict(source=source, target=tmp_path / "out", num_heads=3) | change
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        port.run(port_config(**fields), tmp_path / "work")
    assert os.listdir(tmp_path) == ["a.pt"]


def test_a_training_checkpoint_without_ema_names_the_field(tmp_path):
    torch.save({"model": make_torch().state_dict()}, tmp_path / "a.pt")
    message = "port.weights = ema, but .*a.pt has no such weights, only 'model'; choose weights="
    with pytest.raises(ValueError, match=message):
        port.run(port_config(source=tmp_path / "a.pt", target=tmp_path / "b"), tmp_path / "work")


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "the file is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\n", "Git LFS pointer"),
        (b"<!DOCTYPE html>", "a web page"),
        (b"\x80\x02cposix\nsystem\nX\x0c\0\0\0touch canary\x85R.", "asks to run posix.system"),
        (None, "neither an Orbax checkpoint nor a diffusers folder"),
    ],
)
def test_the_job_refuses_what_is_no_checkpoint(tmp_path, monkeypatch, content, message):
    """And runs nothing of it, writes nothing."""
    monkeypatch.chdir(tmp_path)
    source = tmp_path / "a.pt"
    source.mkdir() if content is None else source.write_bytes(content)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        port.run(port_config(source=source, target=tmp_path / "out"), tmp_path / "work")
    assert os.listdir(tmp_path) == ["a.pt"]


def test_a_damaged_file_is_named_before_anything_is_written(tmp_path):
    """One bit in one weight: still finite, still of the right shape."""
    model = make_torch()
    source = save(model, tmp_path / "a.pt")
    content = model.blocks[1].mlp.fc2.weight.detach().numpy().tobytes()
    data = source.read_bytes()
    place = data.index(content) + 1000
    source.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
    message = rf"^port.source = {source}: record 'a/data/\d+' is damaged: its CRC-32 is"
    with pytest.raises(ValueError, match=message):
        port.run(port_config(source=source, target=tmp_path / "out"), tmp_path / "work")
    assert os.listdir(tmp_path) == ["a.pt"]
    source.write_bytes(data)
    assert any("the CRC-32 of 42 records" in note for note in read_checkpoint(source).report.notes)


def test_a_report_without_a_place_stops_the_job_before_it_writes(tmp_path):
    source = save(make_torch(), tmp_path / "a.pt")
    (tmp_path / "file").write_text("x")
    settings = port_config(source=source, target=tmp_path / "out")
    with pytest.raises(ValueError, match="workdir = .*file/work: .*file is not a folder"):
        port.run(settings, tmp_path / "file" / "work")
    assert sorted(os.listdir(tmp_path)) == ["a.pt", "file"]


def test_the_job_never_overwrites_and_can_skip_the_check(tmp_path):
    source = save(make_torch(), tmp_path / "a.pt")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("x")
    settings = port_config(source=source, target=tmp_path / "out")
    with pytest.raises(ValueError, match="exists; a port never overwrites"):
        port.run(settings, tmp_path / "work")
    unchecked = dict(source=source, check_model=False)
    other = port_config(model=dict(depth=9), target=tmp_path / "b", **unchecked)
    port.run(other, tmp_path / "work")
    lit = dict(attention="linear", num_heads=2)  # the source is the teacher of a LiT config
    port.run(port_config(model=lit, source=source, target=tmp_path / "c"), tmp_path / "work")
    # The position table is counted in the source's patches, not the config's.
    wide = dict(model=dict(patch_size=4), target=tmp_path / "d", input_size=16)
    report = port.run(port_config(**wide, **unchecked), tmp_path / "work")
    assert report.architecture["grid"] == [8, 8]


def test_the_job_ports_from_bucket_to_bucket(tmp_path, monkeypatch):
    model = make_torch()
    (tmp_path / "in").mkdir()
    save(model, tmp_path / "in" / "a.pt")
    with object_store.serve(monkeypatch) as bucket:
        object_store.upload(tmp_path / "in", "bucket/in")

        def run(source, target, **fields):
            config = port_config(source=bucket / source, target=bucket / target, **fields)
            return port.run(config, bucket / "work")

        report = run("in/a.pt", "orbax", num_heads=3)
        saved = json.loads((bucket / "work" / "port_report.json").read_text())
        assert saved["checksum"] == report.checksum and saved["source"] == "gs://bucket/in/a.pt"
        run("orbax", "out/b.safetensors")
        run("out/b.safetensors", "out/c.pt")
        diffusers = dict(layout="diffusers", timestep_freq_shift=1)
        run("out/c.pt", "d", **diffusers)
        with pytest.raises(ValueError, match="gs://bucket/d exists; a port never overwrites"):
            run("out/c.pt", "d", **diffusers)
        back = run("d", "e.pt", timestep_freq_shift=0, mlp_norm_epsilon=1e-6)
        assert back.checksum == report.checksum
        with pytest.raises(FileNotFoundError, match="port.source = gs://bucket/x: no such file"):
            run("x", "f.pt")
        (tmp_path / "e.pt").write_bytes((bucket / "e.pt").read_bytes())
        left = {name for name in object_store.OBJECTS if ".partial" in name}
    assert_same_state(torch.load(tmp_path / "e.pt", weights_only=True), model)
    assert not left and sorted(os.listdir(tmp_path)) == ["e.pt", "in"]
