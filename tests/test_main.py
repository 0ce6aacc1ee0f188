"""Every wrong command line ends with status 1, one line and no files.

The line names the flag or the field, and both values.
"""

import logging
import os
import pathlib
import signal
import subprocess
import sys

import command
import pytest
from tiny_dataset import put_digits

from lit_jax import main

ROOT = pathlib.Path(__file__).parent.parent


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a teacher and the digits in data/, nothing else."""
    folder = tmp_path_factory.mktemp("errors")
    command.write_teacher(folder / "teacher.safetensors")
    put_digits(folder / "data")
    return folder


def expect_error(monkeypatch, folder, arguments, *parts):
    """Runs the command, which must fail with one line that has all the parts, and write no file.

    The line is one that a person can take in.
    """
    before = sorted(folder.rglob("*"))
    code = command.run(monkeypatch, *arguments)
    assert isinstance(code, str), (
        f"the command ended with {code!r}"
    )  # a string: Python prints it and exits with 1
    assert code.startswith("error: ") and "\n" not in code and "\\n" not in code, code
    assert len(code) < 700, code
    for part in parts:
        assert part in code, f"{part!r} is not in {code!r}"
    assert sorted(folder.rglob("*")) == before


# What is logged. ----------------------------------------------------------------------------------


def test_of_the_log_lines_of_libraries_only_warnings_that_mean_something_are_shown():
    def shows(path, level):
        return main.is_ours(logging.LogRecord("absl", level, path, 1, "text", (), None))

    assert shows("/x/lit_jax/jobs/train.py", logging.INFO)
    assert not shows("/x/orbax/checkpoint/handler.py", logging.INFO)
    assert shows("/x/orbax/checkpoint/handler.py", logging.WARNING)
    # It warns of a folder into which a data set is about to be written.
    assert not shows("/x/tensorflow_datasets/core/utils/file_utils.py", logging.WARNING)


# Which config is meant. ---------------------------------------------------------------------------


def test_a_shipped_config_is_found_from_any_folder(tmp_path, monkeypatch):
    """By its name, or by its path in the repository; a file that is there goes first."""
    monkeypatch.chdir(tmp_path)
    shipped = str(ROOT / "configs" / "quickstart.py")
    for name in ("quickstart", "quickstart.py", "configs/quickstart.py"):
        assert main.find_config(name) == shipped
    nested = str(ROOT / "configs" / "ablation" / "conv.py")
    assert main.find_config("ablation/conv") == nested
    assert main.find_config("debug.py:x") == str(ROOT / "configs" / "debug.py") + ":x"
    (tmp_path / "quickstart.py").write_text("")
    assert main.find_config("quickstart.py") == "quickstart.py"
    with pytest.raises(FileNotFoundError, match="--config=quickstrat: .* did you mean quickstart"):
        main.find_config("quickstrat")
    with pytest.raises(FileNotFoundError, match="--config=zzz: no such file, .*shipped: ablation"):
        main.find_config("zzz")


def test_compiled_programs_have_a_place_unless_it_is_empty(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "/chosen")
    assert main.programs_folder("auto") == "/chosen"
    assert main.programs_folder("elsewhere") == "elsewhere"
    assert main.programs_folder("") == ""
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    folder = pathlib.Path(main.programs_folder("auto"))
    assert folder.parent == tmp_path / "lit_jax"
    # Another CPU has another folder.
    monkeypatch.setattr(main.platform, "machine", lambda: "riscv64")
    assert main.programs_folder("auto") != str(folder)
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/somebody")
    assert main.programs_folder("auto").startswith("/home/somebody/.cache/lit_jax/programs_")


# What the flags catch before JAX is loaded. -------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, parts",
    [
        (
            ["--config=configs/debug.py", "--config.trian.batch_size=8"],
            ["--config.trian.batch_size"],
        ),
        (
            ["--config=configs/debug.py", "--config.train.batchsize=8"],
            ["--config.train.batchsize: ", "batch_size"],
        ),
        (
            ["--config=configs/debug.py", "--config.train.batch_size=many"],
            ["train.batch_size", "many"],
        ),
        (
            ["--config=configs/debug.py", "--config.train.batch_size=8.5"],
            ["train.batch_size", "8.5"],
        ),
        (["--config=configs/debug.py", "--config.data.flip=maybe"], ["data.flip", "maybe"]),
        (["--config=configs/debug.py", "--config.inherit.load=3"], ["inherit.load", "(3,)"]),
        (
            ["--config=configs/debug.py", "--config.optimizer.learning_rate=fast"],
            ["optimizer.learning_rate", "fast"],
        ),
        (["--config=configs/debug.py", "--mode=fly"], ["mode", "fly", "train", "sample"]),
        (["--config=configs/debug.py", "--workdri=x"], ["workdri"]),
        (["--config=configs/no_such.py"], ["configs/no_such.py"]),
        (["--config=configs"], ["configs", "directory"]),
        (["--config=configs/debug.py", "stray"], ["stray"]),
        ([], ["--config"]),
    ],
    ids=lambda value: value[-1] if value and value[-1].startswith("-") else None,
)
def test_wrong_flags(monkeypatch, folder, arguments, parts):
    expect_error(monkeypatch, folder, [f"--workdir={folder / 'run'}", *arguments], *parts)


@pytest.mark.parametrize(
    "program, parts",
    [
        ("def get_config(:", ["SyntaxError", "line 1"]),
        ("import no_such_module", ["no_such_module"]),
        ("def get_config():\n    return {}", ["no field compilation_cache", "configs/default.py"]),
        (
            "from configs import default\n\ndef get_config():\n"
            "    config = default.get_config()\n    config.train.stepss = 9\n"
            "    return config",
            ["stepss"],
        ),
    ],
    ids=["syntax", "import", "dict", "misspelt"],
)
def test_wrong_config_files(monkeypatch, folder, tmp_path, program, parts):
    path = tmp_path / "wrong.py"
    path.write_text(program)
    expect_error(monkeypatch, folder, [f"--workdir={folder / 'run'}", f"--config={path}"], *parts)


# What the training job refuses. -------------------------------------------------------------------


@pytest.mark.parametrize(
    "overrides, parts",
    [
        # what is not there
        (["teacher.checkpoint=no/such/teacher.pt"], ["teacher.checkpoint", "no/such/teacher.pt"]),
        (["student.init=no/such/init.pt"], ["student.init", "no/such/init.pt"]),
        (["data.name=cifar10:9.9.9"], ["data.name", "'cifar10:9.9.9'"]),
        (["data.name=cifar10"], ["data.name", "'cifar10'", "mnist_digits"]),
        (["data.name=no_such_set"], ["data.name", "'no_such_set'", "mnist_digits"]),
        (["data.split=validation"], ["data.split", "'validation'", "train"]),
        (["teacher.checkpoint="], ["student.init", "teacher.checkpoint"]),
        # numbers that do not divide
        (["model.num_heads=3"], ["model.num_heads", "3", "32"]),
        (["teacher.num_heads=5"], ["teacher.num_heads", "5", "32"]),
        (["train.batch_size=12"], ["train.batch_size", "12", "8 devices"]),
        (
            ["train.batch_size=16", "train.accumulation=3"],
            ["train.batch_size", "16", "train.accumulation", "3"],
        ),
        (["train.batch_size=4800"], ["train.batch_size", "4800", "4500"]),
        (["sample.batch_size=12"], ["sample.batch_size", "12", "8 devices"]),
        (["mesh.data=3"], ["mesh.data", "3", "8 devices"]),
        (["mesh.data=4", "mesh.fsdp=4"], ["mesh.data", "mesh.fsdp", "4", "8 devices"]),
        (["model.patch_size=3"], ["model.patch_size", "3", "28"]),
        (["model.width=30"], ["model.width", "30"]),
        # what the models and the data disagree on
        (["model.input_size=32"], ["model.input_size", "(32, 32, 1)", "(28, 28, 1)"]),
        (["model.input_size=(28, 56)"], ["model.input_size", "(28, 56, 1)", "(28, 28, 1)"]),
        (["model.input_size=(28, 27)"], ["model.patch_size = 4", "model.input_size = (28, 27)"]),
        (["model.input_size=(28,)"], ["model.input_size must be a side", "(28,)"]),
        (["model.input_size=large"], ["model.input_size", "large"]),
        (["prepare.image_size=10000000"], ["prepare.image_size must be a side", "10000000"]),
        (["prepare.background=whit"], ["prepare.background must be a colour", "'whit'"]),
        (["data.prefetch=1000000000"], ["data.prefetch must be in [0, 10,000]", "1000000000"]),
        (["model.num_classes=11"], ["model.num_classes", "11", "10"]),
        (["model.in_channels=3"], ["model.in_channels", "3", "1"]),
        (["model.learn_sigma=False"], ["model.learn_sigma", "False", "True"]),
        (["model.width=64"], ["model.width = 64", "has 32; set model.width=32"]),
        (["model.depth=3"], ["model.depth = 3", "has 2; set model.depth=2"]),
        # values out of range
        (["train.steps=-5"], ["train.steps", "-5"]),
        (["train.batch_size=0"], ["train.batch_size", "0"]),
        (["train.label_dropout=1.5"], ["train.label_dropout", "1.5"]),
        (["train.min_snr_gamma=-1"], ["train.min_snr_gamma", "-1"]),
        (["train.vb_weight=-1"], ["train.vb_weight", "-1"]),
        (
            ["train.min_snr_gamma=5", "model.prediction=velocity", "sample.sampler=euler"],
            ["train.min_snr_gamma = 5", "model.prediction = velocity"],
        ),
        (
            ["train.vb_weight=0.5", "model.prediction=velocity", "sample.sampler=euler"],
            ["train.vb_weight = 0.5", "model.prediction = velocity", "set it to 1"],
        ),
        (["distill.noise_weight=nan"], ["distill.noise_weight", "nan"]),
        (["ema.decay=1.0"], ["ema.decay", "1.0"]),
        (["optimizer.warmup=9"], ["optimizer.warmup", "9", "3"]),
        (["sample.steps=2000"], ["2000", "1000"]),
        (["sample.cfg_interval=(9.0, 1.0)"], ["sample.cfg_interval", "(9.0, 1.0)"]),
        (["sample.cfg_interval=(9.0,)"], ["sample.cfg_interval", "(9.0,)"]),
        (["model.conv_size=4"], ["model.conv_size", "4"]),
        (["model.depth=-1"], ["model.depth", "-1"]),
        (["model.patch_size=0"], ["model.patch_size", "0"]),
        # words that mean nothing, or nothing here
        (["model.size=XXL"], ["model.size", "'XXL'", "XL"]),
        (["model.attention=sigmoid"], ["model.attention", "'sigmoid'", "linear"]),
        (["model.kernel_function=swish"], ["model.kernel_function", "'swish'", "relu"]),
        (["model.implementation=fast"], ["model.implementation", "'fast'", "xla"]),
        (
            ["model.implementation=pallas_gpu"],
            ["model.implementation", "pallas_gpu", "gpu devices", "cpu devices"],
        ),
        (["teacher.implementation=fast"], ["teacher.implementation", "'fast'", "xla"]),
        (
            ["teacher.implementation=cudnn"],
            ["teacher.implementation", "cudnn", "gpu devices", "cpu devices"],
        ),
        (["model.dtype=float16"], ["model.dtype", "'float16'", "bfloat16"]),
        (["teacher.dtype=float16"], ["teacher.dtype", "'float16'", "bfloat16"]),
        (["train.remat=some"], ["train.remat", "'some'", "dots"]),
        (["optimizer.schedule=linear"], ["optimizer.schedule", "'linear'", "cosine"]),
        (["distill.variance_target=sigma"], ["distill.variance_target", "'sigma'", "raw"]),
        (["sample.sampler=unipc"], ["sample.sampler", "'unipc'", "ddpm"]),
        (["sample.sampler=euler"], ["sample.sampler = euler", "GaussianDiffusion", "ddpm"]),
        (["sample.cfg_channels=five"], ["sample.cfg_channels", "'five'", "all"]),
        (["autoencoder.checkpoint=no/vae"], ["autoencoder.checkpoint = no/vae: no such file"]),
        (["data.split=validation"], ["data.split = 'validation' is not one of", "train, test"]),
        (["evaluate.every=1"], ["evaluate.reference"]),
        (
            ["evaluate.every=1", "evaluate.reference=no/such.npz"],
            ["evaluate.reference", "no/such.npz"],
        ),
        (["inherit.load=('z',)"], ["inherit.load", "z", "q, k, v, o"]),
        (
            ["inherit.keep_init=('final_layr',)"],
            ["inherit.keep_init", "'final_layr'", "final_layer"],
        ),
    ],
    ids=lambda value: ",".join(value) if value and "=" in value[0] else None,
)
def test_wrong_training_configs(monkeypatch, folder, overrides, parts):
    arguments = command.debug_arguments(
        folder, folder / "teacher.safetensors", *(f"--config.{o}" for o in overrides)
    )
    expect_error(monkeypatch, folder, arguments, *parts)


@pytest.mark.parametrize("content", ["garbage", "truncated", "empty"])
def test_an_unreadable_teacher(monkeypatch, folder, tmp_path, content):
    whole, path = (folder / "teacher.safetensors").read_bytes(), tmp_path / "bad.safetensors"
    path.write_bytes(
        {"garbage": b"\x00\x01garbage" * 99, "truncated": whole[: len(whole) // 2], "empty": b""}[
            content
        ]
    )
    expect_error(monkeypatch, folder, command.debug_arguments(folder, path), str(path))


@pytest.mark.parametrize(
    "change, parts",
    [
        (dict(in_channels=3), ["model.in_channels", "1", "3"]),
        (dict(num_classes=12), ["model.num_classes", "10", "12"]),
        (dict(learn_sigma=False), ["model.learn_sigma", "True", "False"]),
        (dict(width=64), ["model.width = 32, but ", "inherits from, has 64; set model.width=64"]),
        (dict(depth=3), ["model.depth = 2, but ", "inherits from, has 3; set model.depth=3"]),
    ],
)
def test_a_teacher_of_other_images(monkeypatch, folder, tmp_path, change, parts):
    command.write_teacher(tmp_path / "other.safetensors", **change)
    expect_error(
        monkeypatch, folder, command.debug_arguments(folder, tmp_path / "other.safetensors"), *parts
    )


def test_a_corrupt_data_set(monkeypatch, folder, tmp_path):
    """The damage is found when a record is read.

    The error names the data set, the split and the record.
    """
    put_digits(tmp_path / "data")
    (path,) = (tmp_path / "data").rglob("*train*array_record*")
    content = bytearray(path.read_bytes())
    for start in range(
        0, len(content) * 9 // 10, 1024
    ):  # all over, but neither block headers nor the index at the end
        content[start + 100 : start + 200] = bytes(100)
    path.write_bytes(content)
    code = command.run(
        monkeypatch, *command.debug_arguments(tmp_path, folder / "teacher.safetensors")
    )
    assert code.startswith("error: ") and "\n" not in code
    assert "mnist_digits" in code and "train" in code and "record" in code


@pytest.mark.parametrize(
    "arguments, parts",
    [
        (["--mode=sample", "sample.checkpoint=no/such"], ["sample.checkpoint = no/such"]),
        (["--mode=sample"], ["sample.checkpoint is empty; --workdir = ", "--mode=train"]),
        (["--mode=export"], ["sample.checkpoint is empty; --workdir = ", "--mode=train"]),
        (["--mode=layers"], ["sample.checkpoint is empty; --workdir = ", "--mode=train"]),
        (["--mode=evaluate"], ["evaluate.samples is empty", "samples.npz", "--mode=sample"]),
        (["autoencoder.checkpoint=no/such"], ["autoencoder.checkpoint = no/such"]),
        (["--mode=evaluate", "evaluate.samples=no/such.npz"], ["evaluate.samples = no/such.npz"]),
        (
            [
                "--mode=evaluate",
                "evaluate.samples=README.md",
                "evaluate.features=inception_adm",
                "evaluate.weights=no/such.pth",
            ],
            ["evaluate.weights = no/such.pth"],
        ),
        (["--mode=benchmark", "benchmark.what=('data',)", "data.name=none"], ["data.name", "none"]),
        (["data.name=cifar10"], ["data.name = 'cifar10'", "data.dir = ", "tfds build cifar10"]),
        (["data.dir=gcs://bucket/x"], ["data.dir=gcs://bucket/x", "gs://"]),
        (["port.target=~no_such_user/x"], ["port.target=~no_such_user/x", "./~no_such_user"]),
    ],
    ids=lambda value: value[-1],
)
def test_files_that_are_not_there_are_named_with_their_field(monkeypatch, folder, arguments, parts):
    options = [a if a.startswith("--") else f"--config.{a}" for a in arguments]
    teacher = folder / "teacher.safetensors"
    expect_error(monkeypatch, folder, command.debug_arguments(folder, teacher, *options), *parts)


def test_the_home_folder_is_meant_in_the_workdir(monkeypatch, folder):
    monkeypatch.setenv("HOME", str(folder / "home"))
    arguments = command.debug_arguments(folder, folder / "teacher.safetensors", "--mode=sample")
    expect_error(monkeypatch, folder, [*arguments, "--workdir=~/x"], f" = {folder}/home/x holds no")


def test_a_signal_after_the_job_does_not_change_its_status(monkeypatch):
    """Python takes seconds to end, and a launcher would take the run for one that was killed."""
    monkeypatch.setattr(main.app, "run", lambda *_, **__: sys.exit(0))
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        with pytest.raises(SystemExit) as end:
            main.run()
        assert [signal.getsignal(number) for number in before] == [signal.SIG_IGN] * 2
        for number in before:
            os.kill(os.getpid(), number)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert end.value.code == 0


def test_a_workdir_that_is_a_file(monkeypatch, folder):
    (folder / "file").write_text("")
    expect_error(
        monkeypatch,
        folder,
        [
            *command.debug_arguments(folder, folder / "teacher.safetensors"),
            f"--workdir={folder / 'file'}",
        ],
        "--workdir",
        str(folder / "file"),
        "not a folder",
    )


# What the sampling job refuses. -------------------------------------------------------------------


@pytest.mark.parametrize(
    "overrides, parts",
    [
        (["sample.checkpoint=no/such"], ["no/such"]),
        ([], ["run"]),  # a workdir that has no checkpoint
        (["sample.num_images=0"], ["sample.num_images", "0"]),
        (["sample.order=4"], ["sample.order", "4", "1, 2, 3"]),
        (
            ["sample.checkpoint=TEACHER", "model.attention=linear"],
            ["model.attention", "linear", "softmax"],
        ),
        (
            ["sample.checkpoint=TEACHER", "model.attention=softmax", "model.width=64"],
            ["model.width", "64", "32"],
        ),
        (
            ["sample.checkpoint=TEACHER", "model.attention=softmax", "sample.batch_size=12"],
            ["sample.batch_size", "12", "8"],
        ),
        (
            ["sample.checkpoint=TEACHER", "model.attention=softmax", "sample.labels=sorted"],
            ["sample.labels", "'sorted'"],
        ),
        (
            ["sample.checkpoint=TEACHER", "model.attention=softmax", "sample.sampler=unipc"],
            ["sample.sampler", "'unipc'", "ddpm"],
        ),
    ],
    ids=lambda value: ",".join(value) if value and "=" in value[0] else None,
)
def test_wrong_sampling_configs(monkeypatch, folder, overrides, parts):
    overrides = [
        f"--config.{o}".replace("TEACHER", str(folder / "teacher.safetensors")) for o in overrides
    ]
    arguments = [
        "--mode=sample",
        *command.debug_arguments(folder, folder / "teacher.safetensors", *overrides),
    ]
    expect_error(monkeypatch, folder, arguments, *parts)


# The process itself. ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, part",
    [
        (["--config=configs/debug.py", "--config.train.batchsize=8"], "batchsize"),
        (
            ["--config=configs/debug.py", "--config.train.batch_size=7", "--config.mesh.data=2"],
            "mesh.data = 2",
        ),
    ],
)
def test_the_process_prints_one_line_and_exits_with_1(tmp_path, arguments, part):
    result = subprocess.run(
        [sys.executable, "-m", "lit_jax.main", f"--workdir={tmp_path / 'run'}", *arguments],
        cwd=command.ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 1
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and part in lines[0]
    assert "Traceback" not in result.stderr + result.stdout
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("place", ["gcs://bucket/run", "file:///run", "s3://bucket/run"])
def test_a_workdir_where_nothing_can_be_written(monkeypatch, folder, tmp_path, place):
    """No local folder is made of it. For s3:// a package is missing here."""
    arguments = command.debug_arguments(folder, folder / "teacher.safetensors")
    expect_error(monkeypatch, folder, [*arguments, f"--workdir={place}"], f"--workdir={place}")
    assert not (command.ROOT / place.split("/")[0]).exists()
