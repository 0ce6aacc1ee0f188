"""The model card of an exported LiT: README.md, filled from the run that made the weights."""

import dataclasses
import json
import re
from collections.abc import Sequence
from typing import Any

from etils import epath

from lit_jax import conditions
from lit_jax.checkpoint import is_checkpoint, open_params
from lit_jax.models.pixart import PixArtConfig
from lit_jax.runtime import storage
from lit_jax.samplers import SamplerSettings

# What a name of published weights tells of their licence. A name proves nothing,
# and the card says so.
LICENCES = (
    (r"DiT-XL-2-(256|512)", "cc-by-nc-4.0", "DiT's published weights, CC BY-NC 4.0"),
    (
        r"quickstart_teacher\.safetensors",
        "apache-2.0",
        "the teacher shipped with lit_jax, Apache 2.0",
    ),
)
# Fields of config.json that are the recipe.
RECIPE = (
    "teacher.checkpoint",
    "student.init",
    "data.name",
    "train.steps",
    "train.batch_size",
    "optimizer.learning_rate",
    "ema.decay",
    "distill.noise_weight",
    "distill.variance_weight",
)
CITATION = """\
@article{wang2025lit,
  title={LiT: Delving into a Simple Linear Diffusion Transformer for Image Generation},
  author={Wang, Jiahao and Kang, Ning and Yao, Lewei and Chen, Mengzhao and Wu, Chengyue
    and Zhang, Songyang and Xue, Shuchen and Liu, Yong and Wu, Taiqiang and Liu, Xihui
    and Zhang, Kaipeng and Zhang, Shifeng and Shao, Wenqi and Li, Zhenguo and Luo, Ping},
  journal={arXiv preprint arXiv:2501.12976},
  year={2025}
}
"""


@dataclasses.dataclass(frozen=True)
class Run:
    """What a workdir tells of its run; empty where the weights came from elsewhere.

    Attributes:
      sources: names of the weights that these were made of, the nearest first.
      step: of the checkpoint; None: nothing tells it.
      config: of config.json. report: of report.json.
      evaluations: what evaluation_*.json hold, by the file's name.
    """

    sources: tuple[str, ...]
    step: int | None = None
    config: dict[str, Any] = dataclasses.field(default_factory=dict)
    report: dict[str, Any] = dataclasses.field(default_factory=dict)
    evaluations: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)


def read_run(source: epath.PathLike) -> Run:
    """What is known of the weights at a path: a workdir, a checkpoint in it, any other file.

    Damaged files are left out.
    """
    source = epath.Path(source)
    if not is_checkpoint(source):
        return Run((str(source),))
    saved = open_params(source)
    step = int(saved.folder.name) if saved.folder.name.isdigit() else None
    workdir = saved.folder.parent.parent
    if saved.folder.parent.name != "checkpoints" or not (workdir / "config.json").exists():
        return Run(_origins(source), step)

    config = storage.read_object(workdir / "config.json") or {}
    report = workdir / "report.json"
    evaluations = {
        path.name: content
        for path in sorted(workdir.glob("evaluation_*.json"))
        if isinstance((content := storage.read_object(path) or {}).get("scores"), dict)
    }
    made_of = [_field(config, name) for name in ("teacher.checkpoint", "student.init")]
    sources = [origin for name in made_of if name for origin in _origins(name)]
    return Run(
        tuple(name for name in sources if name not in ("teacher", "random")),
        step,
        config,
        (storage.read_object(report) or {}) if report.exists() else {},
        evaluations,
    )


def make_card(
    name: str,
    run: Run,
    config: Any,
    settings: SamplerSettings,
    *,
    parameters: int,
    checksum: str,
    vae: str,
) -> str:
    """The text of README.md, Markdown with the Hub's fields at its top.

    Args:
      name: of the folder. run: see `read_run`.
      config: the architecture, with its grid.
      settings: what a call draws with that names nothing else.
      parameters: their number. checksum: of the weights.
      vae: a sentence about the autoencoder; empty: the model draws pixels.
    """
    licence, why = licence_of(run.sources)
    is_told_captions = isinstance(config, PixArtConfig)
    what = "prompts" if is_told_captions else "classes"
    call = '"a red cat on a blue chair"'
    if not is_told_captions:
        call = f"class_labels={list(range(min(4, conditions.count_classes(config))))}"
    code = "lit_text" if is_told_captions else "lit"
    tag = "text-to-image" if is_told_captions else "unconditional-image-generation"
    kind = "" if is_told_captions else ", class-conditional"
    lines = [
        "---",
        f"license: {licence}",
        "library_name: diffusers",
        f"pipeline_tag: {tag}",
        f"tags: [lit, linear-attention, diffusion{kind}]",
        "---",
        "",
        f"# {name}",
        "",
        "A LiT (arXiv 2501.12976): a diffusion transformer with linear attention, which draws "
        f"images of {what}. Made with lit_jax.",
        "",
        "```python",
        "from diffusers import DiffusionPipeline",
        "",
        f'pipeline = DiffusionPipeline.from_pretrained("{name}", trust_remote_code=True)',
        f"images = pipeline({call}).images",
        "```",
        "",
        f"`trust_remote_code=True` runs {code}_pipeline.py, transformer/{code}_transformer.py and "
        "transformer/lit_torch.py of this folder: diffusers has no LiT.",
        "",
        "## The model",
        "",
        *_table(_architecture(config, parameters, checksum)),
        "",
    ]
    if vae:
        lines += [vae, ""]
    lines += ["A call draws with these settings unless it names others:", ""]
    chosen = dataclasses.asdict(settings)
    lines += [*_table((name, value) for name, value in chosen.items() if value != ""), ""]
    lines += ["## How it was made", "", *_recipe(run), ""]
    lines += ["## Scores", "", *_scores(run), ""]
    lines += ["## Licence", "", why, ""]
    lines += ["## Citation", "", "```bibtex", CITATION.rstrip(), "```", ""]
    return "\n".join(lines)


def licence_of(sources: Sequence[str]) -> tuple[str, str]:
    """The Hub's name of the licence, and a paragraph: what the names of the sources tell.

    Args: sources: paths or names of the weights that these were made of.
    """
    for pattern, licence, whose in LICENCES:
        for name in sources:
            if re.search(pattern, name):
                return licence, (
                    f"By its name, `{_name(name)}`, which these weights were made of, is {whose}. "
                    "What is made of them is under the same terms. A name is no proof: whoever "
                    "publishes this folder has to check it."
                )
    return "unknown", (
        "Unknown: nothing tells under which licence the weights are that these were made of. "
        "Whoever publishes this folder has to find out."
    )


def _origins(path: str | epath.Path) -> tuple[str, ...]:
    """A path, and where a ported checkpoint there says that it is from."""
    path = epath.Path(path)
    told = open_params(path).metadata.get("source") if is_checkpoint(path) else None
    return (str(path), told) if isinstance(told, str) else (str(path),)


def _architecture(config, parameters, checksum):
    p = config.patch_size
    told: tuple[str, Any]
    if isinstance(config, PixArtConfig):
        h = w = config.position_base * p
        told = ("caption", f"{config.caption_length} tokens of {config.caption_channels} channels")
    else:
        h, w = (side * p for side in config.grid)
        told = ("classes", conditions.count_classes(config))
    return [
        ("parameters", f"{parameters:,}"),
        ("blocks, width, heads", f"{config.depth}, {config.width}, {config.num_heads}"),
        ("attention", f"linear, {config.kernel_function}, {config.conv_size} x {config.conv_size}"),
        ("input", f"{h} x {w}, channels: {config.in_channels}, patches of {p} x {p}"),
        told,
        ("SHA-256 of the weights", checksum),
    ]


def _recipe(run):
    if not run.config:
        names = ", ".join(f"`{_name(name)}`" for name in run.sources)
        return [f"Unknown: the weights were read from {names}, which has no record of a run."]
    rows = [] if run.step is None else [("step of these weights", f"{run.step:,}")]
    for name in RECIPE:
        value = _field(run.config, name)
        if value not in (None, ""):
            is_path = name in ("teacher.checkpoint", "student.init")
            rows.append((name, _name(value) if is_path else value))
    for term, values in _object(run.report.get("loss")).items():
        values = _object(values)
        ends = [_plain(values.get(end)) for end in ("start", "end")]
        rows.append((f"loss {term}, start to end", " to ".join(ends)))
    return _table(rows)


def _scores(run):
    lines = []
    count = run.report.get("num_images")
    for model, share in _object(run.report.get("labels_read")).items():
        if isinstance(share, int | float):
            lines += [
                f"- A classifier of the real images reads {share:.1%} of {count} images of "
                f"`{_plain(model)}` as the class that was asked for."
            ]
    for file, result in run.evaluations.items():
        lines += ["", f"`{_plain(file)}`:", "", *_table(result["scores"].items()), ""]
        lines += ["Its protocol:", "", "```json"]
        lines += [json.dumps(result.get("protocol"), indent=1), "```"]
    return lines or ["None: the run was not evaluated."]


def _table(rows):
    lines = ["| | |", "|---|---|"]
    return lines + [f"| {_plain(name)} | {_plain(value)} |" for name, value in rows]


def _plain(value):
    """One line of text that ends no table, code or link: names of files are anybody's."""
    if isinstance(value, float):
        value = f"{value:g}"
    return re.sub(r"[\s|`<>\[\]]+", " ", str(value))[:200]


def _name(path):
    """The last part of a path: the folders above are the user's own business."""
    return _plain(str(path).rstrip("/").rpartition("/")[2])


def _field(config, name):
    for part in name.split("."):
        config = config.get(part) if isinstance(config, dict) else None
    return config


def _object(value):
    return value if isinstance(value, dict) else {}
