"""GenEval's prompts byte for byte, its rules, and the summary of its scorer's results."""

import hashlib
import json

import numpy as np
import pytest
from etils import epath
from PIL import Image

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
    assert scores.unseen == {}  # an official result does not say what training showed


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


# ---- The rules -----------------------------------------------------------------------------------


def at(x, y, size=2.0):
    return (x - size / 2, y - size / 2, x + size / 2, y + size / 2)


@pytest.mark.parametrize(
    "x, y, expected",
    [
        (-10, 0, {"left of"}),
        (10, 1, {"right of"}),
        (0, -10, {"above"}),
        (1, 10, {"below"}),
        (-10, -10, {"left of", "above"}),  # 0.7 of the length on both axes
        (-10, 5, {"left of"}),  # 0.41 of the length below
        (0.3, 0.3, set()),  # within 0.1 of both sizes, 2 and 2
        (0.5, 0, set()),  # 0.1 of 0.5 are left, which is not more than half
        (1.0, 0, {"right of"}),  # 0.6 of 1.0
    ],
)
def test_a_relation_is_more_than_half_of_the_offset_beyond_the_margin(x, y, expected):
    """x to the right, y down."""
    assert geneval.relations(at(5 + x, 7 + y), at(5, 7)) == expected


def test_the_margin_is_of_both_boxes_sizes():
    """0.1 of 2 and of 6, whichever of the two is the larger."""
    for a, b in ((2, 6), (6, 2)):
        assert geneval.relations(at(5 + 1.5, 7, a), at(5, 7, b)) == set()  # 0.7 of 1.5
        assert geneval.relations(at(5 + 1.7, 7, a), at(5, 7, b)) == {"right of"}  # 0.9 of 1.7


def seen(*objects):
    return [geneval.Detected(name, at(x, 0), color) for name, x, color in objects]


ONE = {"class": "dog", "count": 1}


@pytest.mark.parametrize(
    "asked, objects, expected",
    [
        ({"include": [ONE]}, seen(("dog", 0, "red")), True),
        ({"include": [ONE]}, seen(("cat", 0, "red")), False),
        ({"include": [ONE]}, seen(("cat", 0, "red"), ("dog", 9, "red")), True),
        ({"include": [ONE | {"count": 2}]}, seen(("dog", 0, "red")), False),
        # Only the first so many are looked at.
        ({"include": [ONE | {"color": "red"}]}, seen(("dog", 0, "red"), ("dog", 9, "blue")), True),
        ({"include": [ONE | {"color": "red"}]}, seen(("dog", 0, "blue"), ("dog", 9, "red")), False),
        (
            {"include": [ONE | {"count": 2, "color": "red"}]},
            seen(("dog", 0, "red"), ("dog", 9, "blue")),
            False,
        ),
        (
            {"include": [ONE], "exclude": [ONE | {"count": 2}]},
            seen(("dog", 0, "red"), ("dog", 9, "red")),
            False,
        ),
        (
            {"include": [ONE], "exclude": [ONE | {"count": 2}]},
            seen(("dog", 0, "red"), ("cat", 9, "red")),
            True,
        ),
        (
            {"include": [ONE, {"class": "cat", "count": 1, "position": ["left of", 0]}]},
            seen(("dog", 9, "red"), ("cat", 0, "red")),
            True,
        ),
        (
            {"include": [ONE, {"class": "cat", "count": 1, "position": ["left of", 0]}]},
            seen(("dog", 0, "red"), ("cat", 9, "red")),
            False,
        ),
        # To all of them.
        (
            {
                "include": [
                    ONE | {"count": 2},
                    {"class": "cat", "count": 1, "position": ["left of", 0]},
                ]
            },
            seen(("dog", 9, "red"), ("dog", -9, "red"), ("cat", 0, "red")),
            False,
        ),
    ],
)
def test_a_picture_is_judged_by_genevals_rules(asked, objects, expected):
    assert geneval.is_correct(asked, objects) is expected


def picture(color):
    return np.full((4, 4, 3), color, np.uint8)


def dogs(images):
    """As many dogs as the first pixel's red says."""
    return [
        [geneval.Detected("dog", (0, 0, 1, 1), "red")] * int(image[0, 0, 0]) for image in images
    ]


def test_a_folder_is_judged_image_by_image(tmp_path):
    lines = [
        json.dumps({"tag": task, "include": [ONE], "prompt": f"a {task}", "seen": task != "colors"})
        for task in geneval.TASKS
    ]
    folder = epath.Path(tmp_path)
    geneval.write_metadata(folder, lines)
    for prompt in range(6):
        for image, count in enumerate((1, 0 if prompt == 3 else 2)):
            path = geneval.image_path(folder, prompt, image)
            path.parent.mkdir(exist_ok=True)
            Image.fromarray(picture(count)).save(path)
    found = geneval.judge(folder, dogs)
    assert len(found) == 12
    assert found[7] == {
        "filename": "00003/samples/0001.png", "tag": "colors", "prompt": "a colors",
        "seen": False, "correct": False,
    }  # fmt: skip
    scores = geneval.score(found)
    assert scores.tasks == dict.fromkeys(geneval.TASKS, 1.0) | {"colors": 0.5}
    assert scores.unseen == {"colors": 0.5} and scores.seen == {}
    assert "colors             0.500    1.000             0.500" in scores.table()
    # Another result of that task, of a prompt that training knows.
    more = geneval.score([*found, found[0] | {"tag": "colors", "prompt": "b", "seen": True}])
    assert more.unseen == {"colors": 0.5} and more.seen == {"colors": 1.0}
    assert "task              images  prompts     seen   unseen" in more.table()
    assert "colors             0.667    1.000    1.000    0.500" in more.table()
    (tmp_path / "00002" / "samples" / "0000.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match="00002/samples/0000.png: no picture"):
        geneval.judge(folder, dogs)
    (tmp_path / "00001" / "metadata.jsonl").write_text('{"tag": "colors", "prompt": "a dog"}')
    with pytest.raises(ValueError, match="00001/metadata.jsonl: no line of GenEval's metadata"):
        geneval.judge(folder, dogs)
    for path in (tmp_path / "00000" / "samples").iterdir():
        path.unlink()
    with pytest.raises(FileNotFoundError, match="00000/samples: no image of 'a single_object'"):
        geneval.judge(folder, dogs)
    with pytest.raises(FileNotFoundError, match="no folder of a prompt"):
        geneval.judge(folder / "00003", dogs)
