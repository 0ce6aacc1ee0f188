"""What a config describes: every object, built once from settings that were checked once.

All jobs ask an `Experiment` for what they need.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from absl import logging
from etils import epath
from flax.traverse_util import flatten_dict, unflatten_dict
from ml_collections import ConfigDict

from lit_jax import conditions, inherit, quantization, ranges, sharding, text
from lit_jax.checkpoint import is_checkpoint
from lit_jax.data import buckets, caption_records, dataset, digit_scenes, pipeline
from lit_jax.evaluation.label_classifier import LabelClassifier
from lit_jax.models import FAMILIES, Architecture, Model
from lit_jax.models.architecture import heads_of_size
from lit_jax.models.attention import ATTENTIONS
from lit_jax.models.autoencoder import Autoencoder, make_autoencoder
from lit_jax.porting.pixart import NoNullCaptionError
from lit_jax.porting.read import (
    KEY_TABLES,
    AutoencoderCheckpoint,
    Checkpoint,
    checksum,
    load_params,
    read_autoencoder,
    read_checkpoint,
)
from lit_jax.porting.t5 import T5Checkpoint, read_text_encoder
from lit_jax.prompts import Prompts, choose_prompts, to_condition
from lit_jax.sampling import Sampler
from lit_jax.settings import naming, read_settings, reading
from lit_jax.train_step import (
    StepSettings,
    TrainState,
    make_optimizer,
    make_train_step,
    state_shapes,
    with_sharding,
)

# Where the attentions that are written for one kind of device run.
PLATFORMS = {"pallas_tpu": "tpu", "pallas_gpu": "gpu", "cudnn": "gpu"}
# How far, relative to their length, a text encoder's features of "" may be from the model's.
NULL_DISTANCE = 0.1


class Experiment:
    """The settings of a config, checked, and its objects, each built when it is first asked for.

    Raises: ValueError for settings that cannot be, before any device or file is touched.
    """

    def __init__(self, config: ConfigDict):
        self.config = config
        settings = read_settings(config)
        self.process = settings.process
        self.model_config = settings.model
        self.sampler_settings = settings.sampler
        self.optimizer_settings = settings.optimizer
        self.unscaled_step_settings = settings.step
        self.text_settings = settings.text
        self.autoencoder_settings = settings.autoencoder
        self.image_settings = settings.images
        self.port_overrides = settings.port
        # The text encoder, while somebody holds it.
        self._text_encoder: Callable[[], text.TextEncoder | None] = lambda: None

    @property
    def input_size(self) -> tuple[int, int]:
        """(h, w) of the images or latents."""
        return ranges.sides(self.config.model.input_size)

    @property
    def step_settings(self) -> StepSettings:
        """Those of the step, with the scale of the data that it reads."""
        return dataclasses.replace(
            self.unscaled_step_settings,
            inherited=self.inherited_paths,
            scaling_factor=self.dataset.scaling_factor,
            shift_factor=self.dataset.shift_factor,
        )

    def to_json(self) -> str:
        """The resolved config, and the architecture that it comes to, for workdir/config.json."""
        resolved = json.loads(self.config.to_json_best_effort())
        return json.dumps(resolved | {"architecture": self.model_config.to_json()}, indent=1) + "\n"

    # ---- Devices and models ----------------------------------------------------------------------

    @functools.cached_property
    def mesh(self) -> jax.sharding.Mesh:
        with naming("mesh", fsdp="mesh.fsdp"):
            return sharding.make_mesh(self.config.mesh.data, self.config.mesh.fsdp)

    @functools.cached_property
    def model(self) -> Model:
        """The model that is trained, or sampled from."""
        config = self.config
        return FAMILIES[config.model.family].model(
            self.model_config,
            dtype=_dtype(config.model.dtype),
            remat=config.train.remat,
            implementation=config.model.implementation,
        )

    def read_sampled(self, workdir: epath.PathLike) -> Checkpoint:
        """The checkpoint that is drawn from, of the config's model, still on disk.

        That is what sample.checkpoint names, or the newest of the workdir.
        Raises: ValueError or FileNotFoundError naming the field.
        """
        path = self.config.sample.checkpoint
        field = "sample.checkpoint"
        if not path:
            path = str(workdir)
            field = "sample.checkpoint is empty; --workdir"
            if not is_checkpoint(epath.Path(path)):
                raise FileNotFoundError(
                    f"{field} = {path} holds no checkpoint yet: train first, by the same command "
                    f"with --mode=train, or name another's in sample.checkpoint"
                )
        checkpoint = self.read_checkpoint(field, path)
        self.check_checkpoint(checkpoint, path)
        return checkpoint

    def read_checkpoint(
        self, field: str, path: str, weights: str = "ema", overrides: Any = None
    ) -> Checkpoint:
        """The checkpoint that a field names, of a model of the config's family, still on disk.

        The folders of diffusers have no null caption: the text encoder makes it when it is read.

        Args: overrides: None: those that change nothing.
        Raises: ValueError or FileNotFoundError naming the field.
        """
        overrides = overrides or KEY_TABLES[type(self.model_config)].Overrides()
        read = functools.partial(
            read_checkpoint, path, weights=weights, family=self.config.model.family
        )
        advice = "it is what training, --mode=port or a download leaves"
        names = {"family": "model.family", "input_size": "port.input_size"}
        with reading(field, path, advice, **names):
            try:
                return read(overrides=overrides)
            except NoNullCaptionError as error:
                shape = (self.model_config.caption_length, error.channels)
            self.check_null_caption(field, path)
            # The checksum is that with zeros: what devices compute is not the same to the last bit.
            # The data, and a folder of samples, tell the text encoder.
            changed = {"null_caption": np.zeros(shape, np.float32), "caption_length": shape[0]}
            checkpoint = read(overrides=dataclasses.replace(overrides, **changed))
        params = flatten_dict(checkpoint.params, sep="/")
        params[self.model_config.frozen[0]] = _NullCaption(shape, lambda: self.null_caption)
        return dataclasses.replace(checkpoint, params=unflatten_dict(params, sep="/"))

    @functools.cached_property
    def teacher_checkpoint(self) -> Checkpoint | None:
        """Still on disk; None: plain training."""
        teacher = self.config.teacher
        if not teacher.checkpoint:
            return None
        return self.read_checkpoint("teacher.checkpoint", teacher.checkpoint, teacher.weights)

    @functools.cached_property
    def teacher(self) -> Model | None:
        """The frozen model, as its checkpoint and the config say; None: plain training.

        Raises: ValueError where checkpoint, config and student contradict each other.
        """
        if self.teacher_checkpoint is None:
            return None
        teacher = self.config.teacher
        found = self.teacher_checkpoint.config
        path = teacher.checkpoint
        num_heads = teacher.num_heads or found.num_heads
        if not num_heads:
            raise ValueError(
                f"{path} does not say how many heads its width of {found.width} has; set "
                f"teacher.num_heads"
            )
        if found.width % num_heads:
            raise ValueError(
                f"teacher.num_heads = {num_heads} does not divide the width {found.width} of {path}"
            )
        # A guard for the user: a teacher of another size distils without any error.
        if teacher.size:
            with naming("teacher"):
                wanted = type(found).of_size(teacher.size)
            if (wanted.depth, wanted.width) != (found.depth, found.width):
                raise ValueError(
                    f"teacher.size = {teacher.size}, but {path} has {found.depth} blocks of width "
                    f"{found.width}"
                )
        for name in self.model_config.shared_with_teacher:
            ours = getattr(self.model_config, name)
            theirs = getattr(found, name)
            if ours != theirs:
                # Of a convention a bare file of weights tells nothing: the user may know better.
                is_told = name not in self.model_config.conventions
                advice = "" if is_told else f"; if it has {ours}, port it with port.{name}={ours}"
                raise ValueError(
                    f"model.{name} = {ours}, but the teacher {path} has {theirs}{advice}"
                )
        for name in ("attention_weight", "feature_weight"):
            if weight := getattr(self.unscaled_step_settings, name):
                self.check_layers(f"distill.{name} = {weight:g}", "; set it to 0")
        return self._as_teacher(found.with_heads(num_heads))

    def check_layers(self, asked: str, advice: str = "") -> None:
        """Raises ValueError where student and teacher cannot be compared layer with layer.

        Args:
          asked: the field or the flag that compares them.
          advice: the end of the error.
        """
        if self.teacher_checkpoint is None:
            raise ValueError(
                f"{asked} compares layer with layer, but teacher.checkpoint is empty; name one"
            )
        found = self.teacher_checkpoint.config
        path = self.config.teacher.checkpoint
        for name in ("depth", "width", "patch_size"):
            ours = getattr(self.model_config, name)
            theirs = getattr(found, name)
            if ours != theirs:
                raise ValueError(
                    f"{asked} compares layer with layer, but the student has {name} {ours} and "
                    f"{path} has {theirs}{advice}"
                )
        if "blocks" not in self.state_shapes.params:
            raise ValueError(
                f"{asked} compares layer with layer, but a model of the family "
                f"{self.config.model.family} has no layers of its own{advice}"
            )
        if found.softmax_every:
            raise ValueError(
                f"{asked} needs a teacher of one attention, but {path} has softmax_every = "
                f"{found.softmax_every}{advice}"
            )

    def default_teacher(self) -> Model:
        """The teacher of a config that names no checkpoint: a softmax model of the same size."""
        teacher = self.config.teacher
        model = self.config.model
        # What no size names is taken from the student, whose teacher it is.
        like_the_student = {
            name: getattr(self.model_config, name) for name in self.model_config.teacher_defaults
        }
        with naming("teacher"):
            size = teacher.size or model.size
            width = 0 if teacher.size else model.width
            architecture = FAMILIES[model.family].config.of_size(
                size,
                attention="softmax",
                depth=0 if teacher.size else model.depth,
                width=width,
                num_heads=teacher.num_heads or heads_of_size(size, "softmax", width),
                grid=self.model_config.grid,
                **like_the_student,
            )
        return self._as_teacher(architecture)

    def _as_teacher(self, architecture: Architecture) -> Model:
        teacher = self.config.teacher
        return FAMILIES[self.config.model.family].model(
            architecture, dtype=_dtype(teacher.dtype), implementation=teacher.implementation
        )

    @property
    def teacher_shapes(self) -> Any:
        """Shapes of the teacher's parameters as `load_teacher` gives them; None: no teacher."""
        if self.teacher_checkpoint is None:
            return None
        params = self.teacher_checkpoint.params
        dtype = self.config.teacher.dtype
        shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), params)
        return with_sharding(shapes, sharding.fsdp_sharding(params, self.mesh))

    def load_teacher(self) -> Any:
        """The teacher's parameters on the mesh, sharded by shape, in teacher.dtype; None: none."""
        if self.teacher_checkpoint is None:
            return None
        shapes = self.teacher_shapes
        # Each device reads its part of the file. The cast comes after: a file holds float32.
        shardings = jax.tree.map(lambda shape: shape.sharding, shapes)
        loaded = load_params(self.teacher_checkpoint.params, shardings)
        return jax.tree.map(lambda x, shape: x.astype(shape.dtype), loaded, shapes)

    @functools.cached_property
    def init_checkpoint(self) -> Checkpoint | None:
        """What the student inherits from, still on disk; None: nothing."""
        student = self.config.student
        if student.init == "random":
            return None
        checkpoint = self.teacher_checkpoint
        if student.init != "teacher":
            # Fine-tuning on other classes resizes the label table, as port.num_classes does.
            overrides = KEY_TABLES[type(self.model_config)].Overrides
            asked = overrides.of_student(self.model_config, self.config.seed)
            checkpoint = self.read_checkpoint("student.init", student.init, student.weights, asked)
        if checkpoint is None:
            raise ValueError(
                "student.init = teacher, but teacher.checkpoint is empty; name one, or set "
                "student.init=random"
            )
        return checkpoint

    def check_inheritance(self) -> None:
        """Raises ValueError where student and init checkpoint do not fit.

        That is another convention of the weights' own code, which no shape tells, or other leaves.
        """
        checkpoint = self.init_checkpoint
        if checkpoint is None:
            return
        for name in self.model_config.conventions:
            ours = getattr(self.model_config, name)
            theirs = getattr(checkpoint.config, name)
            if ours != theirs:
                raise ValueError(
                    f"model.{name} = {ours}, but {checkpoint.report.source}, which the student "
                    f"inherits from, computes with {theirs}; set model.{name}={theirs} or, if it "
                    f"was trained with {ours}, port it with port.{name}={ours} first"
                )
        self._check_softmax_layers(checkpoint)
        try:
            with naming("inherit"):
                inherit.plan_merge(checkpoint.params, self.state_shapes.params, **self.inheritance)
        except ValueError as error:
            # One number that differs shows in every leaf.
            for name in ("width", "depth", "patch_size", "in_channels", "learn_sigma"):
                ours = getattr(self.model_config, name)
                theirs = getattr(checkpoint.config, name)
                if ours != theirs:
                    raise ValueError(
                        f"model.{name} = {ours}, but {checkpoint.report.source}, which the student "
                        f"inherits from, has {theirs}; set model.{name}={theirs}, or inherit from "
                        f"another checkpoint"
                    ) from error
            raise

    @property
    def inheritance(self) -> dict[str, tuple[str, ...]]:
        """What `inherit.merge_params` is told: attention parts to load, paths to keep."""
        chosen = self.config.inherit
        load = tuple(chosen.load)
        if load == ("auto",):
            load = self._whole_attention()
        return {"load": load, "keep_init": tuple(chosen.keep_init)}

    def _check_softmax_layers(self, source: Checkpoint) -> None:
        """Raises ValueError where layers that keep softmax would have other heads than it had."""
        ours = self.model_config.softmax_heads
        theirs = source.config.num_heads
        # A bare file does not tell its heads, but the config may name the teacher's.
        if source is self.teacher_checkpoint and self.teacher:
            theirs = self.teacher.config.num_heads
        if ours and source.config.attention == "softmax" and theirs not in (None, ours):
            raise ValueError(
                f"model.softmax_heads = {ours}, but {source.report.source}, whose attention every "
                f"{self.model_config.softmax_every}th layer keeps, has {theirs} heads; set "
                f"model.softmax_heads={theirs}"
            )

    @functools.cached_property
    def inherited_paths(self) -> tuple[str, ...]:
        """Leaves that are inherited as a whole, where they have a learning rate of their own."""
        rate = self.optimizer_settings.inherited_rate
        if rate == 1:
            return ()
        if self.init_checkpoint is None:
            raise ValueError(
                f"optimizer.inherited_rate = {rate:g}, but student.init = random inherits nothing; "
                f"set it to 1"
            )
        source = self.init_checkpoint.params
        _, report = inherit.plan_merge(source, self.state_shapes.params, **self.inheritance)
        return tuple(path for path in report.inherited if path not in report.at_init)

    def _whole_attention(self) -> tuple[str, ...]:
        """All parts of an attention that the student shares with its source; of another, none.

        Raises: ValueError where the two are of one kind, but compute with other numbers.
        """
        source = self.init_checkpoint
        ours = self.model_config
        if source is None or source.config.attention != ours.attention:
            return ()
        shared = ("num_heads", "softmax_every", "softmax_heads")
        for name in (*shared, *ATTENTIONS[ours.attention].fields):
            value = getattr(ours, name)
            theirs = getattr(source.config, name)
            # A file of softmax attention may not tell its heads.
            if theirs is not None and theirs != value:
                raise ValueError(
                    f"model.{name} = {value}, but {source.report.source}, which the student "
                    f"inherits its attention from, has {theirs}; set model.{name}={theirs}, or "
                    f"name the parts that it takes: inherit.load=() for none"
                )
        return inherit.parts_of(self.state_shapes.params)

    # ---- Data ------------------------------------------------------------------------------------

    @functools.cached_property
    def dataset(self) -> Any:
        """What training reads: a `Dataset`, or a `BucketedDataset` of images with captions."""
        data = self.config.data
        with naming("data", directory="data.dir"):
            if self.is_told_captions:
                return caption_records.open_captions(data.name, data.dir, data.split)
            return dataset.open_dataset(
                data.name,
                data.dir,
                data.split,
                classes=conditions.count_classes(self.model_config),
            )

    def read_autoencoder(self) -> AutoencoderCheckpoint | None:
        """The autoencoder of the config, not on the devices; None: the model works on pixels.

        Raises: ValueError or FileNotFoundError naming the field.
        """
        wanted = self.config.autoencoder
        if not wanted.checkpoint:
            return None
        with reading("autoencoder.checkpoint", wanted.checkpoint, "it is a download"):
            checkpoint = read_autoencoder(wanted.checkpoint, scaling_factor=wanted.scaling_factor)
        channels = checkpoint.architecture["latent_channels"]
        if channels != self.model_config.in_channels:
            raise ValueError(
                f"model.in_channels = {self.model_config.in_channels}, but the latents of "
                f"autoencoder.checkpoint = {wanted.checkpoint} have {channels} channels"
            )
        return checkpoint

    @functools.cached_property
    def label_classifier(self) -> LabelClassifier:
        """Of the data set's images. Scores and report share it: fitting takes seconds."""
        return LabelClassifier(*dataset.read_all(self.dataset))

    @functools.cached_property
    def _bare_autoencoder(self) -> tuple[Autoencoder | None, dict[str, Any] | None]:
        """It without its parameters, and what tells it from others.

        Its file is read for that, and let go: who only asks for a size needs no memory for it.
        """
        checkpoint = self.read_autoencoder()
        if checkpoint is None:
            return None, None
        wanted = self.config.autoencoder
        with naming("autoencoder"):
            bare = make_autoencoder(None, checkpoint.architecture, self.autoencoder_settings)
        # Latents depend on the encoder alone: decoders that were tuned for one encoder share them.
        encoder = {
            name: tree
            for name, tree in checkpoint.params.items()
            if name in ("encoder", "quant_conv")
        }
        return bare, {
            "name": epath.Path(wanted.checkpoint).name,
            "sha256": checkpoint.report.checksum,
            "encoder_sha256": checksum(encoder),
            "scaling_factor": bare.scaling_factor,
            "shift_factor": bare.shift_factor,
            "dtype": wanted.dtype,
            "tile_size": wanted.tile_size,
        }

    @property
    def sample_size(self) -> tuple[int, int]:
        """(h, w) of the images or latents that are drawn: of config.sample.size, or as trained."""
        sample = self.config.sample
        sides = tuple(sample.size)
        if sample.aspect:
            if sides:
                raise ValueError(f"sample.size = {sides}, but sample.aspect = {sample.aspect} too")
            width, height = map(int, sample.aspect.split(":"))
            # The sides of a bucket are multiples of a token's, at every size.
            with naming("sample", size="model.input_size"):
                nominal = buckets.Buckets(max(self.input_size))
            return nominal.sides(nominal.choose(height, width))
        if not sides:
            return self.input_size
        cell = self.autoencoder_factor * self.model_config.patch_size
        if any(side % cell for side in sides):
            raise ValueError(
                f"sample.size = {sides}: its sides must be multiples of the {cell} pixels "
                f"of a token"
            )
        return sides[0] // self.autoencoder_factor, sides[1] // self.autoencoder_factor

    @property
    def autoencoder_factor(self) -> int:
        """Pixels of an image along each side of a cell of the model's input."""
        if bare := self._bare_autoencoder[0]:
            return bare.module.factor
        # As many channels as a picture has are pixels; a latent's cell has 8.
        return 1 if self.model_config.in_channels in (1, 3) else 8

    @functools.cached_property
    def autoencoder(self) -> Autoencoder | None:
        """Its parameters on every device of the mesh; None: the model works on pixels."""
        bare, _ = self._bare_autoencoder
        checkpoint = self.read_autoencoder()
        if bare is None or checkpoint is None:
            return None
        # Whole on every device: 0.3 GB, and its convolutions work on each device's own images.
        everywhere = jax.tree.map(lambda _: sharding.replicated(self.mesh), checkpoint.params)
        return dataclasses.replace(bare, params=load_params(checkpoint.params, everywhere))

    @property
    def autoencoder_identity(self) -> dict[str, Any] | None:
        """What tells the autoencoder from others: names, hashes, scale; None for pixels."""
        return self._bare_autoencoder[1]

    def batches(self) -> Any:
        """The endless batches of this process's rows; see `pipeline.make_batches`."""
        config = self.config
        # A process reads the rows that its own devices hold, so no batch crosses the network.
        rows = sharding.process_rows(sharding.batch_sharding(self.mesh), config.train.batch_size)
        common: dict[str, Any] = dict(
            batch_size=config.train.batch_size,
            seed=config.seed,
            rows=rows,
            num_threads=config.data.num_threads,
            prefetch=config.data.prefetch,
        )
        with naming("train"):
            if isinstance(self.dataset, caption_records.BucketedDataset):
                return pipeline.make_bucket_batches(
                    self.dataset,
                    caption_ratio=config.text.caption_ratio,
                    read_caption=self._read_caption(),
                    **common,
                )
            return pipeline.make_batches(self.dataset, flip=config.data.flip, **common)

    def batch_shapes(self) -> list[dict[str, jax.ShapeDtypeStruct]]:
        """The shapes of the batches: one, or one a bucket, the largest picture first."""
        B = self.config.train.batch_size
        rows = sharding.batch_sharding(self.mesh)
        if not isinstance(self.dataset, caption_records.BucketedDataset):
            return [pipeline.batch_shapes(self.dataset, B, rows)]
        shapes = pipeline.bucket_shapes(self.dataset, B, rows, self._read_caption())
        picture = "mean" if self.dataset.autoencoder else "image"
        shapes.sort(key=lambda batch: -batch[picture].size)
        if encoder := self.caption_encoder:
            for batch in shapes:
                shape = (*batch.pop("caption_ids").shape, encoder.config.width)
                batch["caption"] = jax.ShapeDtypeStruct(shape, encoder.dtype, sharding=rows)
        return shapes

    @functools.cached_property
    def caption_encoder(self) -> text.TextEncoder | None:
        """What makes features of the records' captions in training; None: they have them."""
        data = self.dataset
        if not isinstance(data, caption_records.BucketedDataset) or data.text:
            return None
        return None if self.is_told_tokens else self.load_text_encoder()

    def _read_caption(self) -> caption_records.ReadCaption:
        """How a batch gets one of a record's captions."""
        if self.dataset.text:
            longest = self.dataset.text["max_length"]
            return functools.partial(caption_records.stored_caption, max_length=longest)
        encoder = self.caption_encoder
        return functools.partial(
            caption_records.tokens_of_caption,
            tokenizer=encoder.tokenizer if encoder else self.tokenizer,
            settings=self.text_settings,
        )

    def encode_captions(self, batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
        """A batch on the mesh with features where it has tokens."""
        if "caption_ids" not in batch or self.caption_encoder is None:
            return batch
        ids = batch["caption_ids"]
        rest = {name: value for name, value in batch.items() if name != "caption_ids"}
        return rest | {"caption": self.caption_encoder.encode_tokens(ids, rest["caption_mask"])}

    # ---- Text ------------------------------------------------------------------------------------

    @property
    def is_told_captions(self) -> bool:
        return "caption_mask" in self.model_config.condition_shapes(1)

    @property
    def is_told_tokens(self) -> bool:
        """Whether the model has its text encoder within it."""
        return "caption_ids" in self.model_config.condition_shapes(1)

    @functools.cached_property
    def tokenizer(self) -> text.Tokenizer:
        """That of text.tokenizer, or the one in text.checkpoint.

        Raises: ValueError where the config names none, or one with more pieces than the model.
        """
        field = "tokenizer" if self.config.text.tokenizer else "checkpoint"
        path = self.config.text[field]
        if not path:
            raise ValueError(
                "text.tokenizer is empty, but the model reads the tokens of a caption; name its "
                "spiece.model"
            )
        with self._reading_text(f"text.{field}", path):
            tokenizer = text.Tokenizer(path)
        rows = self.model_config.text_vocab_size if self.is_told_tokens else tokenizer.vocab_size
        if tokenizer.vocab_size > rows:
            raise ValueError(
                f"model.text_vocab_size = {rows}, but the tokenizer text.{field} = {path} has "
                f"{tokenizer.vocab_size} pieces"
            )
        return tokenizer

    @functools.cached_property
    def prompts(self) -> Prompts:
        """What config.sample asks of a model that is told a caption."""
        sample = self.config.sample
        with naming("sample"):
            return choose_prompts(sample.prompts, sample.prompt_file, sample.images_per_prompt)

    def load_text_encoder(self, path: str = "", field: str = "text.checkpoint") -> text.TextEncoder:
        """The text encoder on the mesh. Who drops it frees its memory, 10 GB for T5-XXL.

        Args:
          path: in place of text.checkpoint.
          field: that which names the path.
        Raises: ValueError where the config names none, or one of another width.
        """
        settings = self.config.text
        is_configs = not path
        if is_configs and (encoder := self._text_encoder()):
            return encoder
        path = path or self._text_checkpoint
        longest = self.model_config.caption_length
        if settings.max_length > longest:
            raise ValueError(
                f"text.max_length = {settings.max_length}, but model.caption_length = {longest}"
            )
        with self._reading_text(field, path):
            encoder = text.load_text_encoder(
                path,
                self.text_settings,
                tokenizer=settings.tokenizer,
                mesh=self.mesh,
            )
        channels = self.model_config.caption_channels
        if encoder.config.width != channels:
            raise ValueError(
                f"model.caption_channels = {channels}, but the features of {field} = "
                f"{path} have {encoder.config.width}"
            )
        if is_configs:
            self._text_encoder = weakref.ref(encoder)
        return encoder

    @property
    def _text_checkpoint(self) -> str:
        path = self.config.text.checkpoint
        if not path:
            raise ValueError(
                "text.checkpoint is empty, but the model is told a caption; name the folder of its "
                "text encoder (training on stored features needs none with train.preview_every=0)"
            )
        return path

    @contextlib.contextmanager
    def _reading_text(self, field: str, path: str) -> Iterator[None]:
        """Errors name the field of the text encoder, that of the tokenizer, or their own."""
        tokenizer = self.config.text.tokenizer
        with contextlib.ExitStack() as stack:
            if path:
                stack.enter_context(reading(field, path, "it is a download"))
            if tokenizer:
                stack.enter_context(reading("text.tokenizer", tokenizer, "it is a spiece.model"))
            stack.enter_context(naming("text", path=field))
            yield

    def text_identity(self) -> dict[str, Any]:
        """What tells the text encoder from others; it is read, not loaded."""
        settings = self.config.text
        if self.is_told_tokens:  # it is a part of the model
            return {"tokenizer": self.tokenizer.sha256, "cleaning": settings.cleaning}
        tokenizer, checkpoint = self.read_text_encoder()
        identity = text.identity_of(tokenizer, checkpoint.report.checksum, self.text_settings)
        return identity | {"dtype": settings.dtype}

    def read_text_encoder(self) -> tuple[text.Tokenizer, T5Checkpoint]:
        """Tokenizer and text encoder of the config, whose leaves are still in their files.

        Raises: ValueError or FileNotFoundError naming the field.
        """
        path = self._text_checkpoint
        with self._reading_text("text.checkpoint", path):
            return text.Tokenizer(self.config.text.tokenizer or path), read_text_encoder(path)

    @functools.cached_property
    def null_caption(self) -> np.ndarray:
        """The features of "" by the text encoder, (caption_length, C) float32."""
        encoder = self.load_text_encoder()
        rows = encoder.null_features(self.model_config.caption_length)
        return rows.astype(np.float32)

    def check_null_caption(self, field: str, path: epath.PathLike) -> None:
        """Says that the text encoder makes the null caption of a checkpoint that lacks it.

        Raises: ValueError where the config names no text encoder that is there.
        """
        encoder = self.config.text.checkpoint
        if not encoder or not epath.Path(encoder).exists():
            found = f"= {encoder} is not there" if encoder else "is empty"
            raise ValueError(
                f'{field} = {path} has no null caption, the text encoder\'s features of "" that '
                f"guidance compares with, and text.checkpoint {found}: name the folder of the text "
                f"encoder there, or let --mode=port write a checkpoint that has it, with the "
                f"features in a file that port.null_caption names"
            )
        logging.info(
            "%s = %s has no null caption: text.checkpoint = %s makes it", field, path, encoder
        )

    def encode(self, prompts: Sequence[str], null_caption: Any = None) -> tuple[Any, Any]:
        """The condition of prompts, and what tells their text encoder from others.

        The encoder is loaded for it and dropped.

        Args: null_caption: that of the model's checkpoint, (n, C). The encoder's is compared with
          it, for nothing else tells a wrong encoder from the right one.
        Returns: arrays (n, ...) by name, and JSON values by name.
        """
        if self.is_told_tokens:
            return self._tokens(prompts)
        encoder = self.load_text_encoder()
        found = encoder(prompts)
        self._warn_of_prompts(prompts, found.cut, encoder.tokenizer)
        if null_caption is not None:
            ours = np.asarray(encoder.null_features(2), np.float32)
            theirs = np.asarray(null_caption[:2], np.float32)
            length = max(float(np.linalg.norm(theirs)), 1e-30)
            distance = float(np.linalg.norm(ours - theirs)) / length
            # bfloat16 moves it by less than 0.02.
            if distance > NULL_DISTANCE:
                logging.warning(
                    'text.checkpoint = %s: its features of "" are %.2f of their length away from '
                    "those in the model's checkpoint; it is another text encoder or tokenizer than "
                    "the model was trained with, and pictures will not follow the prompts",
                    self.config.text.checkpoint,
                    distance,
                )
        identity = encoder.identity() | {"dtype": self.config.text.dtype}
        return to_condition(found, self.config.sample.null_mask), identity

    def _tokens(self, prompts: Sequence[str]) -> tuple[Any, Any]:
        """As `encode`, for a model that has its text encoder within it."""
        settings = self.text_settings
        cleaned = [text.clean_prompt(prompt, settings.cleaning) for prompt in prompts]
        ids, mask, cut = self.tokenizer(cleaned, settings.max_length)
        self._warn_of_prompts(prompts, cut, self.tokenizer)
        return {"caption_ids": ids, "caption_mask": mask}, self.text_identity()

    def _warn_of_prompts(
        self, prompts: Sequence[str], cuts: np.ndarray, tokenizer: text.Tokenizer
    ) -> None:
        """Names the prompts that are too long, and words that the tokenizer does not have."""
        for prompt, cut in zip(prompts, cuts):
            if cut:
                logging.warning(
                    "the last %d tokens of a prompt are cut, text.max_length is %d: %.60s...",
                    cut,
                    self.text_settings.max_length,
                    prompt,
                )
            if unknown := tokenizer.unknown(prompt):
                logging.warning("the text encoder does not know %s: %.60s", unknown, prompt)

    @functools.cached_property
    def prompt_condition(self) -> dict[str, np.ndarray]:
        """The condition of each prompt in config.sample, (n, ...)."""
        return self.encode(self.prompts.texts)[0]

    def labels(self, names: Sequence[str] = ()) -> conditions.Labels:
        """What sample.labels asks for; `names`: of the classes, as a checkpoint says."""
        with naming("sample"):
            return conditions.choose_labels(
                self.config.sample.labels, conditions.count_classes(self.model_config), names
            )

    def conditions(self, index: np.ndarray, labels: conditions.Labels) -> dict[str, np.ndarray]:
        """What the model is told of pictures for people, by their numbers.

        Prompts that are fewer than the pictures begin again.

        Args: labels: how classes are chosen, see `conditions.for_images`.
        """
        if self.is_told_captions:
            rows = index % len(self.prompts.texts)
            told = {name: value[rows] for name, value in self.prompt_condition.items()}
            # To one length whatever the prompts are: a picture follows from its own alone.
            missing = self.text_settings.max_length - told["caption_mask"].shape[1]
            return {
                name: np.pad(value, ((0, 0), (0, missing)) + ((0, 0),) * (value.ndim - 2))
                for name, value in told.items()
            }
        with naming("sample"):
            return conditions.for_images(
                self.model_config, index, seed=self.config.seed, labels=labels
            )

    # ---- The step and its state ------------------------------------------------------------------

    @functools.cached_property
    def state_shapes(self) -> TrainState:
        return state_shapes(self.model, make_optimizer(self.optimizer_settings))

    @functools.cached_property
    def state_sharding(self) -> TrainState:
        """Read off the shapes: no full copy ever sits on one device."""
        return sharding.fsdp_sharding(self.state_shapes, self.mesh)

    @property
    def sharded_state_shapes(self) -> TrainState:
        return with_sharding(self.state_shapes, self.state_sharding)

    @functools.cached_property
    def train_step(self) -> Any:
        return make_train_step(
            self.model,
            self.teacher,
            self.process,
            self.optimizer_settings,
            self.step_settings,
            self.mesh,
        )

    def for_drawing(self, model: Model) -> Any:
        """A model in the precision of config.sample.quantize; `drawn_params` has its parameters."""
        kind = self.config.sample.quantize
        with naming("sample"):
            return model if kind == "none" else quantization.QuantizedModel(model, kind)

    def drawn_params(self, model: Any, params: Any) -> Any:
        """Parameters that are loaded, as the model of `for_drawing` takes them."""
        is_quantized = isinstance(model, quantization.QuantizedModel)
        return model.quantize(params) if is_quantized else params

    def sampler(
        self, model: Model | None = None, batch_size: int = 0, *, decodes: bool = True
    ) -> Sampler:
        """The config's sampler for its model, or another one; batch_size 0: sample.batch_size.

        Not `decodes`: it ends with latents, and the autoencoder is not read.
        """
        with naming("sample"):
            return Sampler(
                model or self.model,
                self.sampler_settings,
                batch_size=batch_size or self.config.sample.batch_size,
                seed=self.config.seed,
                process=self.process,
                mesh=self.mesh,
                size=self.sample_size,
                autoencoder=self.autoencoder if decodes else None,
            )

    # ---- Checks of what belongs together ---------------------------------------------------------

    def check_batches(self) -> None:
        """Raises ValueError for a batch that the devices do not divide."""
        train = self.config.train
        with naming("train"):
            sharding.check_batch(train.batch_size, self.mesh)
        if train.batch_size % (self.mesh.size * train.accumulation):
            raise ValueError(
                f"train.batch_size = {train.batch_size} is not a multiple of train.accumulation = "
                f"{train.accumulation} times the {self.mesh.size} devices of the mesh"
            )
        if self.config.report.num_images or self.config.evaluate.every:
            with naming("sample"):
                sharding.check_batch(self.config.sample.batch_size, self.mesh)

    def check_platform(self) -> None:
        """Raises ValueError for an attention by name that the devices of the mesh cannot run."""
        # All devices of a mesh are of one kind.
        platform = self.mesh.devices.flat[0].platform
        for group in ("model", "teacher"):
            name = self.config[group].implementation
            wanted = PLATFORMS.get(name, platform)
            if wanted != platform:
                raise ValueError(
                    f"{group}.implementation = {name} runs on {wanted} devices, these are "
                    f"{platform} devices"
                )

    def check_data(self) -> None:
        """Raises ValueError where the data are not what model and autoencoder work on."""
        config = self.config
        data = self.dataset
        identity = self.autoencoder_identity
        wanted = (*self.input_size, self.model_config.in_channels)
        # A data set of latents says which autoencoder made them.
        is_latent = getattr(data, "autoencoder", None) is not None
        if data.image_shape != wanted:
            raise ValueError(
                f"model.input_size and model.in_channels make images of {wanted}, the "
                f"{'latents' if is_latent else 'images'} of data.name = {data.name} are "
                f"{data.image_shape}"
            )
        with naming("model"):
            conditions.check_dataset(self.model_config, data)
        if isinstance(data, caption_records.BucketedDataset):
            self._check_captions(data)
        checkpoint = config.autoencoder.checkpoint
        if not is_latent:
            if identity:
                raise ValueError(
                    f"autoencoder.checkpoint = {checkpoint}, but data.name = {data.name} holds "
                    f"images, not latents; --mode=prepare encodes them, or clear "
                    f"autoencoder.checkpoint to train on pixels"
                )
            return
        encoder = data.autoencoder["name"]
        pictures = {
            "train.preview_every": config.train.preview_every,
            "report.num_images": config.report.num_images,
            "evaluate.every": config.evaluate.every,
        }
        asked_for = [name for name, count in pictures.items() if count]
        if identity is None and asked_for:
            raise ValueError(
                f"data.name = {data.name} holds latents of {encoder}, but autoencoder.checkpoint "
                f"is empty: name it, or set {' and '.join(asked_for)} to 0"
            )
        # Another encoder or scale would shift the latents without any error.
        for name in ("encoder_sha256", "scaling_factor", "shift_factor"):
            stored = data.autoencoder[name]
            asked = identity[name] if identity else config.autoencoder.get(name) or stored
            if asked != stored:
                raise ValueError(
                    f"data.name = {data.name} holds latents of {encoder} with {name} {stored}, but "
                    f"the autoencoder of the config ({checkpoint or 'no checkpoint'}) has {asked}"
                )
        if config.report.read_labels:
            raise ValueError(
                f"report.read_labels needs images, but data.name = {data.name} holds latents"
            )

    def _check_captions(self, data: caption_records.BucketedDataset) -> None:
        """Raises ValueError where the features are not those of the config's text encoder."""
        config = self.config
        if config.data.flip:
            raise ValueError(
                "data.flip = True, but captions say left and right; set data.flip=False"
            )
        if config.report.read_labels:
            raise ValueError(
                f"report.read_labels = True, but data.name = {data.name} has captions, not labels"
            )
        if config.report.read_scenes:
            self._check_scenes()
        if data.text is None:  # the texts alone, which this run encodes
            return
        asked: dict[str, Any] = {
            "cleaning": config.text.cleaning,
            "max_length": config.text.max_length,
        }
        checkpoint = config.text.checkpoint
        tokenizer = config.text.tokenizer or checkpoint
        with self._reading_text("text.checkpoint", checkpoint):
            if tokenizer:
                asked["tokenizer"] = text.Tokenizer(tokenizer).sha256
            if checkpoint:
                asked["weights"] = read_text_encoder(checkpoint).report.checksum
        # The hashes are of the files that two fields name.
        fields = {"weights": f"checkpoint ({checkpoint})", "tokenizer": f"tokenizer ({tokenizer})"}
        for name, value in asked.items():
            if value != data.text[name]:
                raise ValueError(
                    f"text.{fields.get(name, name)} = {value}, but the captions of data.name = "
                    f"{data.name} were encoded with {name} = {data.text[name]}; features of two "
                    f"kinds must not mix: prepare them again, or set the field"
                )

    def _check_scenes(self) -> None:
        """Raises ValueError unless all prompts of the digit scenes are drawn."""
        asked_for = self.config.sample.prompt_file
        if asked_for != digit_scenes.NAME:
            raise ValueError(
                f"report.read_scenes finds the digits of digit scenes, but sample.prompt_file = "
                f"{asked_for!r}; set it to {digit_scenes.NAME}"
            )
        drawn = self.config.report.num_images
        if drawn < len(self.prompts.texts):
            raise ValueError(
                f"report.num_images = {drawn}, but report.read_scenes needs one of each of the "
                f"{len(self.prompts.texts)} prompts"
            )

    def check_checkpoint(self, checkpoint: Checkpoint, path: str) -> None:
        """Raises ValueError naming the first field in which a checkpoint is of another model."""
        theirs = dataclasses.asdict(checkpoint.config)
        for name, ours in dataclasses.asdict(self.model_config).items():
            # The position table follows the images, and what a file does not tell cannot differ.
            if name == "grid" or theirs[name] is None:
                continue
            if ours != theirs[name]:
                raise ValueError(
                    f"model.{name} = {ours}, but the checkpoint {path} has {theirs[name]}"
                )

    # ---- What tells runs apart -------------------------------------------------------------------

    def decisive_fields(self) -> dict[str, Any]:
        """What a resumed run must have in common with the one that wrote the checkpoint.

        By the names of the config. Left out: what changes speed, files or rounding alone, and what
        only a start reads.
        """
        config = self.config
        distilled_from = self.teacher_checkpoint
        # The keys are stored in checkpoints: renaming one would let a changed field pass.
        decisive = {
            "seed": config.seed,
            "data.records": self.dataset.fingerprint(),
            "data.flip": config.data.flip,
            # The same name and size can be another data set.
            "data.content": f"of checksum {self.dataset.content()}",
            "train.batch_size": config.train.batch_size,
            "train.label_dropout": config.train.label_dropout,
            "train.min_snr_gamma": config.train.min_snr_gamma,
            "train.vb_weight": config.train.vb_weight,
            "teacher.checkpoint": distilled_from
            and f"of checksum {distilled_from.report.checksum}",
            "teacher.num_heads": config.teacher.num_heads,
            "teacher.dtype": config.teacher.dtype,
        }
        if isinstance(self.dataset, caption_records.BucketedDataset):
            decisive["text.caption_ratio"] = config.text.caption_ratio
            if self.is_told_tokens:
                decisive["text.tokenizer"] = self.tokenizer.sha256
            if encoder := self.caption_encoder:
                decisive["text.features"] = encoder.identity() | {"dtype": config.text.dtype}
        for group in ("model", "distill", "optimizer", "ema"):
            for name, value in config[group].items():
                if name != "implementation":
                    decisive[f"{group}.{name}"] = value
        # Which parameters have the rate of inherited ones is asked at every start.
        if config.optimizer.inherited_rate != 1:
            decisive["inherit"] = config.inherit.to_dict()
        # A cosine's length decides every step; a constant rate's does not.
        if config.optimizer.schedule != "constant":
            decisive["train.steps"] = config.train.steps
        return decisive

    def run_hash(self) -> str:
        """Tells runs apart whose weights, step by step, are not the same."""
        init = self.init_checkpoint
        decisive = self.decisive_fields() | {
            "init": init.report.checksum if init else "random",
            "inherit": self.config.inherit.to_dict(),
        }
        return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()[:16]


def _dtype(name: str) -> Any:
    return jax.numpy.dtype(name).type


class _NullCaption:
    """A leaf, (n, C) float32, that is made when it is first read.

    Plans and checks of shapes need no text encoder.
    """

    dtype = np.dtype(np.float32)
    ndim = 2

    def __init__(self, shape: tuple[int, int], make: Callable[[], np.ndarray]):
        self.shape = shape
        self.size = shape[0] * shape[1]
        self._make = make

    def __getitem__(self, index: Any) -> np.ndarray:
        return self._make()[index]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self._make().astype(dtype or self.dtype)
