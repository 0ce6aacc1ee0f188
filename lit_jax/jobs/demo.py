"""--mode=demo: a web page on which teacher and student draw side by side.

    python -m lit_jax.main --config=configs/NAME.py --mode=demo --workdir=DIR

It needs `pip install gradio`. See docs/demo.md.
"""

import dataclasses
import importlib.util
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from absl import logging
from etils import epath
from ml_collections import ConfigDict

from lit_jax import conditions, pictures, sharding
from lit_jax.experiment import Experiment
from lit_jax.porting.read import load_params
from lit_jax.runtime.exit_status import TryAgainError
from lit_jax.samplers import SamplerSettings
from lit_jax.sampling import Sampler

# Pictures on the way to an image, about:
# a browser shows no more in a second.
PREVIEWS = 12
SHOWN_PIXELS = 256  # smaller pictures are enlarged to it
MOST_STEPS = 250
MOST_GUIDANCE = 20.0


def run(config: ConfigDict, workdir: epath.PathLike) -> None:
    """Serves the page until it is stopped by Ctrl-C or SIGTERM.

    That is its good end.
    Raises: ValueError or FileNotFoundError, before anything is loaded, for a
      config that cannot be run; ValueError where gradio is not installed,
      OSError where the port is taken.
    """
    if importlib.util.find_spec("gradio") is None:
        raise ValueError("--mode=demo needs the package gradio: pip install gradio")
    studio = Studio(config, epath.Path(workdir))
    page = make_page(studio)
    try:
        address = serve(page, config.demo.host, config.demo.port)
        logging.info("the page is at %s; Ctrl-C closes it", address)
        threading.Event().wait()
    except TryAgainError:
        logging.info("the page is closed")
    finally:
        page.close()


def serve(page: Any, host: str, port: int) -> str:
    """Starts to serve a page of gradio in the background.

    Args: port: 0: one that is free.
    Returns: its address.
    Raises: OSError naming the field of a port that is taken.
    """
    try:
        _, address, _ = page.launch(
            server_name=host,
            server_port=port or _free_port(host),
            prevent_thread_lock=True,
            quiet=True,
            share=False,
        )
    except OSError as error:
        raise OSError(
            f"demo.port = {port} on demo.host = {host} cannot be served at: {error}"
        ) from error
    return address


def _free_port(host: str) -> int:
    with socket.socket() as free:
        free.bind((host, 0))
        return free.getsockname()[1]


# ---- What draws --------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Request:
    """What a person asks for.

    Attributes:
      wanted: a class, by the name in `Studio.classes`, or a prompt.
    """

    wanted: str
    seed: int
    cfg_scale: float
    sampler: str
    steps: int


@dataclasses.dataclass(frozen=True)
class View:
    """A model's picture on its way, (h, w, 1 or 3) uint8, and a line about it."""

    image: np.ndarray | None
    line: str


class Studio:
    """The models of a config, on one device, drawing step by step.

    Raises: ValueError or FileNotFoundError for a config that cannot be sampled
      from.
    Attributes:
      models: the sampler and the parameters of each, by its name on the page.
    """

    def __init__(self, config: ConfigDict, workdir: epath.Path):
        experiment = Experiment(config)
        # A picture of each model at a time needs no more.
        first = jax.devices()[:1]
        experiment.mesh = sharding.make_mesh(1, 1, devices=first)
        experiment.check_platform()
        checkpoint = experiment.read_sampled(workdir)
        self.experiment = experiment
        self.defaults = experiment.sampler_settings
        self.samplers = experiment.process.samplers
        self.is_told_captions = experiment.is_told_captions
        count = conditions.count_classes(experiment.model_config)
        numbers = [str(i) for i in range(count)]
        self.classes = list(checkpoint.class_names) or numbers
        # While it is held, a prompt costs no loading.
        self._encoder = None
        if self.is_told_captions and not experiment.is_told_tokens:
            self._encoder = experiment.load_text_encoder()

        self.models: dict[str, tuple[Sampler, Any]] = {}
        self._compiled: set[Any] = set()
        teacher = experiment.teacher
        if teacher:
            logging.info("loading the teacher %s", config.teacher.checkpoint)
            sampler = experiment.sampler(teacher, batch_size=1)
            self.models["teacher"] = sampler, experiment.load_teacher()

        name = "student" if teacher else "model"
        logging.info("loading the %s %s", name, checkpoint.report.source)
        stored = checkpoint.params
        shardings = sharding.fsdp_sharding(stored, experiment.mesh)
        model = experiment.for_drawing(experiment.model)
        params = load_params(stored, shardings)
        params = experiment.drawn_params(model, params)
        self.models[name] = experiment.sampler(model, batch_size=1), params

    @property
    def names(self) -> list[str]:
        """Of the models, the teacher first."""
        return list(self.models)

    def settings(self, request: Request) -> SamplerSettings:
        """The sampler of a request. Raises: ValueError for one that cannot be."""
        base = self.defaults
        if request.sampler != base.sampler:
            # Spacing and variance of the config may be of another sampler.
            base = dataclasses.replace(
                base,
                sampler=request.sampler,
                spacing="",
                variance="",
            )
        return dataclasses.replace(
            base,
            steps=request.steps,
            cfg_scale=request.cfg_scale,
        )

    def condition(self, wanted: str) -> dict[str, np.ndarray]:
        """What the models are told, arrays (1, ...)."""
        if self.is_told_captions:
            return self.experiment.encode([wanted])[0]
        first = np.zeros(1, np.int32)
        return self.experiment.conditions(first, (self.classes.index(wanted),))

    def draw(self, request: Request) -> Iterator[dict[str, View]]:
        """Pictures of all models, step by step; the last ones are the images.

        The models take turns, so that both are seen to come; the time is each
        one's own, without compilation.
        Raises: ValueError for a request that cannot be drawn.
        """
        settings = self.settings(request)
        samplers = {
            name: sampler.with_settings(settings).with_seed(request.seed)
            for name, (sampler, _) in self.models.items()
        }
        condition = self.condition(request.wanted)
        views = {name: View(None, "compiling") for name in self.models}
        streams = {}
        for name, sampler in samplers.items():
            params = self.models[name][1]
            if self._is_new(name, sampler, condition):
                yield dict(views)
                first = next(self._stream(sampler, params, condition))
                self._image(sampler, first)
            streams[name] = self._stream(sampler, params, condition)

        steps = request.steps
        every = max(1, steps // PREVIEWS)
        seconds = dict.fromkeys(self.models, 0.0)
        for step in range(1, steps + 1):
            is_last = step == steps
            is_shown = is_last or step % every == 0
            for name, stream in streams.items():
                started = time.monotonic()
                latents = jax.block_until_ready(next(stream))
                seconds[name] += time.monotonic() - started
                image = views[name].image
                if is_shown:
                    started = time.monotonic()
                    image = self._image(samplers[name], latents)
                    # The decoder's part of a preview is no time of the image's.
                    if is_last:
                        seconds[name] += time.monotonic() - started
                line = f"step {step} of {steps}, {seconds[name]:.2f} s"
                if is_last:
                    line = f"{seconds[name]:.2f} s an image, {steps} steps"
                views[name] = View(image, line)
            if is_shown:
                yield dict(views)

    def _stream(self, sampler, params, condition):
        return sampler.stream(params, np.zeros(1, np.int32), condition)

    def _image(self, sampler, latents):
        return pictures.to_uint8(np.asarray(sampler.decode(latents))[0])

    def _is_new(self, name, sampler, condition):
        """Whether the first step will be compiled."""
        shapes = sorted((key, value.shape) for key, value in condition.items())
        key = (name, sampler.step_kind, tuple(shapes))
        is_new = key not in self._compiled
        self._compiled.add(key)
        return is_new


# ---- The page ----------------------------------------------------------------


def make_page(studio: Studio) -> Any:
    """The page of a studio, a `gradio.Blocks`.

    Its function "draw" can be called by clients too.
    """
    import gradio  # an extra: no other job needs it

    def draw(wanted, seed, cfg_scale, sampler, steps):
        request = Request(wanted, int(seed or 0), float(cfg_scale), sampler, int(steps))
        try:
            for views in studio.draw(request):
                shown = [views[name] for name in studio.names]
                images = [enlarge(view.image) for view in shown]
                yield *images, *(view.line for view in shown)
        except ValueError as error:
            raise gradio.Error(str(error), print_exception=False) from error

    defaults = studio.defaults
    with gradio.Blocks(title="lit_jax", analytics_enabled=False) as page:
        gradio.Markdown(_title(studio.names))
        with gradio.Row():
            if studio.is_told_captions:
                wanted: Any = gradio.Textbox(label="prompt", elem_id="wanted")
            else:
                wanted = gradio.Dropdown(
                    studio.classes,
                    value=studio.classes[0],
                    label="class",
                    elem_id="wanted",
                )
            seed = gradio.Number(
                studio.experiment.config.seed,
                label="seed",
                precision=0,
                minimum=0,
                maximum=2**31 - 1,
            )
            button = gradio.Button(
                "draw",
                variant="primary",
                elem_id="draw",
            )
        with gradio.Row():
            cfg_scale = gradio.Slider(
                0.0,
                MOST_GUIDANCE,
                defaults.cfg_scale,
                step=0.1,
                label="guidance",
            )
            sampler = gradio.Dropdown(
                list(studio.samplers),
                value=defaults.sampler,
                label="sampler",
            )
            steps = gradio.Slider(
                1,
                max(MOST_STEPS, defaults.steps),
                defaults.steps,
                step=1,
                label="steps",
            )
        images = []
        lines = []
        with gradio.Row():
            for name in studio.names:
                with gradio.Column():
                    image = gradio.Image(
                        label=name,
                        elem_id=f"{name}_image",
                        format="png",
                    )
                    line = gradio.Textbox(
                        label=f"{name}: time",
                        elem_id=f"{name}_line",
                    )
                    images.append(image)
                    lines.append(line)
        button.click(
            draw,
            [wanted, seed, cfg_scale, sampler, steps],
            [*images, *lines],
            api_name="draw",
            show_progress="hidden",
        )
    return page.queue(default_concurrency_limit=1)


def _title(names: Sequence[str]) -> str:
    if len(names) == 1:
        return "### What the model draws"
    return "### The same noise through the teacher and through the student with linear attention"


def enlarge(image: np.ndarray | None) -> np.ndarray | None:
    """A picture (h, w, 1 or 3) uint8 in RGB.

    Small ones are enlarged, so that their pixels are seen.
    """
    if image is None:
        return None
    h, w, _ = image.shape
    times = max(1, round(SHOWN_PIXELS / max(h, w)))
    image = image.repeat(times, axis=0).repeat(times, axis=1)
    h, w, _ = image.shape
    return np.broadcast_to(image, (h, w, 3)).copy()
