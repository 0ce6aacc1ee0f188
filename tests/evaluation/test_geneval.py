"""GenEval's prompts byte for byte, and the summary of its scorer's results."""

import hashlib
import json

import pytest
from etils import epath

from configs import debug
from lit_jax.evaluation import geneval
from lit_jax.jobs import evaluate


def test_the_prompts_are_the_published_file():
    lines = geneval.prompts()
    assert len(lines) == 553
    digest = hashlib.sha256("".join(line + "\n" for line in lines).encode()).hexdigest()
    assert digest == "5c48e0813e812e3c373fa5c8ed07a8f0a483be30272b4427b0559c8048e67c13"
    counts = [sum(json.loads(line)["tag"] == task for line in lines) for task in geneval.TASKS]
    assert counts == [80, 99, 80, 94, 100, 100]


def test_the_folder_is_the_one_that_the_scorer_reads(tmp_path):
    folder = epath.Path(tmp_path)
    lines = geneval.prompts()[:2]
    geneval.write_metadata(folder, lines)
    assert (tmp_path / "00001" / "metadata.jsonl").read_text() == lines[1]
    assert geneval.image_path(folder, 1, 3) == folder / "00001" / "samples" / "0003.png"


def results(path, rights):
    """A result file: for each task the images of each prompt, right or wrong."""
    lines = [
        json.dumps({"filename": f"{i}.png", "tag": task, "prompt": f"{task} {p}", "correct": right})
        for task, prompts in rights.items()
        for p, images in enumerate(prompts)
        for i, right in enumerate(images)
    ]
    path.write_text("\n".join(lines) + "\n")
    return path


def test_the_overall_score_is_the_mean_of_the_tasks_shares_of_images(tmp_path):
    """Not of all images: the tasks have other numbers of them."""
    rights = dict.fromkeys(geneval.TASKS, [[True]])
    rights["counting"] = [[True, False], [False, False], [False, False]]
    scores = geneval.summarise(results(tmp_path / "results.jsonl", rights))
    assert scores.tasks["counting"] == pytest.approx(1 / 6)
    assert scores.prompts["counting"] == pytest.approx(1 / 3)
    assert scores.overall == pytest.approx((5 + 1 / 6) / 6)
    # Of the one task that varies, a sixth of the mean: sqrt(1/6 * 5/6 / 6) / 6.
    assert scores.standard_error == pytest.approx((5 / 36 / 6) ** 0.5 / 6)
    assert scores.images == 11
    assert "counting           0.167    0.333" in scores.table()


@pytest.mark.parametrize(
    "line, why",
    [
        ("{}", "line 7 is no result"),
        ("[1]", "line 7 is no result"),
        ("[" * 100_000, "line 7 is no result"),
        ('{"tag": "cats", "correct": true, "prompt": "a"}', "line 7 has tag 'cats'"),
        ('{"tag": "colors", "correct": 1, "prompt": "a"}', "correct 1;"),
    ],
)
def test_a_line_that_is_no_result_is_named(tmp_path, line, why):
    path = results(tmp_path / "results.jsonl", dict.fromkeys(geneval.TASKS, [[True]]))
    with path.open("a") as file:
        file.write(line)
    with pytest.raises(ValueError, match=why):
        geneval.summarise(path)


def test_a_missing_task_is_named(tmp_path):
    path = results(tmp_path / "results.jsonl", {"colors": [[True]]})
    with pytest.raises(ValueError, match="no result of single_object, two_object"):
        geneval.summarise(path)


def test_the_evaluation_job_leaves_the_summary(tmp_path):
    config = debug.get_config()
    config.evaluate.geneval = str(
        results(tmp_path / "results.jsonl", dict.fromkeys(geneval.TASKS, [[True, False]]))
    )
    evaluate.run(config, tmp_path / "run")
    written = json.loads((tmp_path / "run" / "geneval.json").read_text())
    assert written["overall"] == 0.5 and written["images"] == 12
    config.evaluate.geneval = str(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="^evaluate.geneval = .*nowhere: no such file"):
        evaluate.run(config, tmp_path / "other")
    assert not (tmp_path / "other").exists()
