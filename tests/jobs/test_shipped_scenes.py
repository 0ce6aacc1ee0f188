"""The shipped teacher of digit scenes follows its captions, and by the path of the text alone."""

import json

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from configs import quickstart_t2i
from lit_jax import pictures, sharding
from lit_jax.data import digit_scenes
from lit_jax.evaluation import geneval
from lit_jax.evaluation.digit_detector import DigitDetector
from lit_jax.experiment import Experiment

# Of each task; the first prompts are all of seen pairs.
A_TASK = 4


@pytest.fixture(scope="module")
def score():
    """The teacher's parameters, and (params, shift) -> the share of 24 pictures that are right.

    Each is drawn from its prompt, or from the `shift`-th one after it of the same task.
    """
    config = quickstart_t2i.get_config()
    config.sample.update(sampler="dpm++", steps=12, batch_size=24)
    config.mesh.cpu_devices = 0
    scenes = digit_scenes.prompts()
    number = [
        task * digit_scenes.PROMPTS_A_TASK + digit_scenes.UNSEEN_PROMPTS + i
        for task in range(len(digit_scenes.TASKS))
        for i in range(A_TASK)
    ]
    config.sample.update(prompt_file="", prompts=tuple(scenes[i].caption for i in number))
    experiment = Experiment(config)
    experiment.mesh = sharding.make_mesh(1, 1, devices=jax.devices()[:1])
    sampler = experiment.sampler(experiment.teacher, 24)
    index = np.arange(len(number))
    told = experiment.conditions(index, "balanced")
    asked = [json.loads(scenes[i].metadata()) for i in number]
    detect = DigitDetector()

    def share(params, shift=0):
        rows = index // A_TASK * A_TASK + (index + shift) % A_TASK
        condition = {name: value[rows] for name, value in told.items()}
        images = pictures.to_uint8(sampler(params, index, condition))
        return np.mean([each["correct"] for each in geneval.results(asked, detect(images))])

    # Unlike most programs of the suite this one runs longer than it compiles.
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", False)
    yield experiment.load_teacher(), share
    jax.config.update("jax_disable_most_optimizations", before)


def test_pictures_show_what_their_captions_say(score):
    """Most are right; a teacher of no use would be right in 1 of 28 (the judge's floor)."""
    params, share = score
    assert share(params) >= 0.6


def test_captions_of_other_prompts_make_other_pictures(score):
    params, share = score
    assert share(params, shift=1) <= 0.15


def test_without_cross_attention_a_caption_says_nothing(score):
    params, share = score
    flat = flatten_dict(params)
    silent = {
        path: jax.device_put(np.zeros(leaf.shape, leaf.dtype), leaf.sharding)
        if path[1:3] == ("cross_attn", "proj")
        else leaf
        for path, leaf in flat.items()
    }
    changed = [path for path in flat if not np.array_equal(silent[path], flat[path])]
    assert {path[-1] for path in changed} == {"kernel", "bias"}
    assert share(unflatten_dict(silent)) <= 0.15
