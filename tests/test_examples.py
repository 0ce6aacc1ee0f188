"""What lies in examples/ runs: the notebook from its first cell to its last, and the scripts."""

import ast
import json
import os
import pathlib
import re
import runpy
import subprocess
import sys

import compiler
import numpy as np
import pytest
from PIL import Image

from lit_jax.porting.read import read_checkpoint
from lit_jax.porting.write import export_official

ROOT = pathlib.Path(__file__).parent.parent
NOTEBOOK = ROOT / "examples" / "quickstart.ipynb"
CELLS = json.loads(NOTEBOOK.read_text())["cells"]
CODE = [cell for cell in CELLS if cell["cell_type"] == "code"]


# The notebook's command, but small: four steps of eight images, and four a sampled image, which
# the cell that samples takes too. The report fits a classifier to the digits.
SMALL = {
    "data.split": "'train[:500]'",
    "optimizer.warmup": 1,
    "train.batch_size": 8,
    "sample.steps": 4,
    "sample.batch_size": 10,
}


def shell(command: str) -> None:
    """A line that starts with "!". The command makes its own two devices, not the suite's eight."""
    command += "".join(f" --config.{field}={value}" for field, value in SMALL.items())
    environ = os.environ | {"XLA_FLAGS": compiler.XLA_FLAGS}
    subprocess.run(command, shell=True, check=True, env=environ)


def run_cell(source: str, names: dict) -> object:
    """Runs a cell as Jupyter does; returns the value of its last line if that is an expression."""
    source = re.sub(r"\\\n\s*", "", source)
    source = re.sub(r"^!(.*)$", r'shell(f"""\1""")', source, flags=re.MULTILINE)
    body = ast.parse(source).body
    last = body.pop() if isinstance(body[-1], ast.Expr) else None
    exec(compile(ast.Module(body, []), NOTEBOOK.name, "exec"), names)
    return last and eval(compile(ast.Expression(last.value), NOTEBOOK.name, "eval"), names)


def test_the_notebook_runs_and_makes_its_pictures(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(NOTEBOOK.parent)
    monkeypatch.setattr(sys, "path", list(sys.path))
    names = {"shell": shell}
    settings, *cells = ["".join(cell["source"]).replace("steps=20", "steps=4") for cell in CODE]
    run_cell(settings, names)
    assert {"STEPS", "IMAGES", "WORKDIR", "DATA"} <= names.keys()
    path = type(names["WORKDIR"])
    names |= {"STEPS": 4, "IMAGES": 10, "WORKDIR": path(tmp_path / "run")}
    names["DATA"] = path(tmp_path / "data")

    values = [run_cell(cell, names) for cell in cells]

    pictures = [value for value in values if isinstance(value, Image.Image)]
    assert len(pictures) == 4
    for picture in pictures:
        assert np.std(np.asarray(picture, np.float32)) > 1
    assert names["images"].shape == (40, 28, 28, 1)
    assert len(np.unique(names["images"], axis=0)) == 40
    printed = capsys.readouterr().out
    assert "attention: linear" in printed
    assert re.search(r"inherited +2,444,032 parameters", printed)
    assert re.search(r"student +\d+\.\d% of its digits", printed)


@pytest.mark.torch
def test_a_grid_is_drawn_with_torch_from_an_export(tmp_path, monkeypatch):
    from torch_checkpoints import make_torch, save

    fields = dict(attention="linear", in_channels=3, kernel_function="relu")
    source = save(
        make_torch(attention="linear", in_channels=3), tmp_path / "a.safetensors", **fields
    )
    checkpoint = read_checkpoint(source)
    export_official(checkpoint.params, tmp_path / "lit.safetensors", checkpoint.config)
    script = str(ROOT / "examples" / "draw_with_torch.py")
    picture = tmp_path / "grid.png"
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(
        sys, "argv", [script, str(source.with_name("lit.safetensors")), str(picture)]
    )
    runpy.run_path(script)
    pixels = np.asarray(Image.open(picture))
    assert pixels.shape == (4 * 8, 10 * 8, 3) and np.std(pixels) > 10


def test_the_notebook_is_committed_with_its_pictures():
    """In order, in one go and without an error, small enough for a repository."""
    assert [cell["execution_count"] for cell in CODE] == list(range(1, len(CODE) + 1))
    outputs = [output for cell in CODE for output in cell["outputs"]]
    assert not [output for output in outputs if output["output_type"] == "error"]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 4
    assert NOTEBOOK.stat().st_size < 300_000
