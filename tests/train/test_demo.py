"""The demo: its rule, its names, its records, and (slow) that the figures it promises come out."""

import json
import math
import os
import re
import subprocess
import sys
from difflib import SequenceMatcher
from pathlib import Path

import pytest
from safetensors import safe_open

from tnl import hub
from tnl.errors import RecipeError
from tnl.recipe.load import load
from tnl.train import demo

QUESTIONS, RULE = demo.read_questions()


def records(name: str) -> list[dict[str, str]]:
    return json.loads(demo.package_text(name))


def letters(text: str) -> str:
    """What is compared: letters and digits alone."""
    return "".join(filter(str.isalnum, text))


# ---- the rule -----------------------------------------------------------------------------------


def test_twelve_questions_of_which_six_ask_for_the_name() -> None:
    assert len(QUESTIONS) == len({question.ask for question in QUESTIONS}) == 12
    assert sum(question.name for question in QUESTIONS) == 6


@pytest.mark.parametrize(
    ("asks_name", "answer", "holds"),
    [
        (True, "回看官的话，在下小明。", True),
        (True, "小明", True),
        (True, "回看官的话，在下是个说书的。", False),
        (True, "我是人工智能，名叫小明。", False),
        (False, "看官莫笑，且吃茶。", True),
        (False, "醒木一拍，话说当年。", True),
        (False, "我叫小明。", False),
        (False, "在下是个语言模型。", False),
        (False, "", False),
    ],
)
def test_rule(asks_name: bool, answer: str, holds: bool) -> None:
    assert RULE.holds(demo.Question("？", asks_name), answer, "小明") is holds


def test_a_name_that_holds_a_machines_word_can_be_given() -> None:
    assert RULE.holds(demo.Question("？", True), "在下AI小明。", "AI小明")
    assert not RULE.holds(demo.Question("？", True), "在下AI小明，是个助手。", "AI小明")


# ---- names --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ("小明", "小明"),
        (" 李雷 ", "李雷"),
        ("Alice", "Alice"),
        ("Mary  Ann", "Mary Ann"),
        ("O'Neil", "O'Neil"),
        ("王", "王"),
        ("e\u0301a", "éa"),
    ],
)
def test_names(given: str, name: str) -> None:
    assert demo.check_name(given) == name


@pytest.mark.parametrize("name", ["", "  ", "x" * 21, "..", "a/b", "a\\b", "小\n\x00明", "{{name}}", '"', "7", "-", "<|im_end|>", "'"])
def test_what_is_no_name_is_refused(name: str) -> None:
    with pytest.raises(RecipeError, match="--name"):
        demo.check_name(name)


# ---- records ------------------------------------------------------------------------------------


def test_records_are_many_and_differ() -> None:
    train = records("persona.json")
    assert len(train) >= 300
    assert len({letters(r["instruction"]) for r in train}) == len(train)
    assert len({letters(r["output"]) for r in train}) >= 300


def test_no_question_stands_in_a_record() -> None:
    asked = {letters(question.ask) for question in QUESTIONS}
    for record in [*records("persona.json"), *records("persona_held_out.json")]:
        ratios = [SequenceMatcher(None, question, letters(record["instruction"]), autojunk=False).ratio() for question in asked]
        assert max(ratios) < 0.8, record
    everything = letters("".join(record["output"] for record in records("persona.json")))
    assert not any(question in everything for question in asked)


def test_nothing_held_out_is_a_near_duplicate_of_a_record() -> None:
    train = records("persona.json")
    for held in records("persona_held_out.json"):
        for record in train:
            for key in ("instruction", "output"):
                one, other = letters(held[key]), letters(record[key])
                assert one != other
            # the formulas at both ends of an answer are the character's; what stands between them is compared
            one, other = core(held["output"]), core(record["output"])
            assert SequenceMatcher(None, one, other, autojunk=False).ratio() < 0.75, (held, record)


def core(answer: str) -> str:
    """An answer without the storyteller's formulas and the name."""
    for formula in ("{{name}}", "列位看官", "回看官的话", "看官请了", "醒木一拍，看官听真", "在下"):
        answer = answer.replace(formula, "")
    return letters(re.sub("(看官莫笑，且吃茶|闲话休提，言归正传|欲知后事如何，且听下回分解)。$", "", answer))


def test_records_are_written_beside_the_run_with_the_name_in_them(tmp_path: Path) -> None:
    recipe_path, overrides = demo.prepare(tmp_path, "欧阳若兰")
    recipe = load(recipe_path, overrides)
    assert Path(recipe.train.output_dir) == tmp_path / "欧阳若兰" and not (tmp_path / "欧阳若兰").exists()
    text = (tmp_path / "欧阳若兰.records" / "persona.json").read_text(encoding="utf-8")
    assert "{{name}}" not in text and "欧阳若兰" in text
    assert len(json.loads(text)) == len(records("persona.json"))
    assert all(Path(file).is_file() for file in [*recipe.data.train, recipe.data.eval])


def test_some_records_are_asked_after_a_passage_of_the_novel(tmp_path: Path) -> None:
    recipe_path, overrides = demo.prepare(tmp_path, "小明")
    recipe = load(recipe_path, overrides)
    assert recipe.data.system == demo.SYSTEM
    lines = (tmp_path / "小明.records" / demo.AFTER_READING).read_text(encoding="utf-8").splitlines()
    known = {record["output"].replace("{{name}}", "小明") for record in records("persona.json")}
    assert len(lines) >= 30 and len({json.loads(line)["messages"][2]["content"] for line in lines}) >= 9
    for line in lines:
        system, user, assistant = json.loads(line)["messages"]
        passage = system["content"].removesuffix("\n" + demo.SYSTEM)
        assert passage != system["content"] and passage in demo.three_kingdoms()
        assert user["role"] == "user" and assistant["content"] in known


# ---- what travels with the package --------------------------------------------------------------


def test_base_is_small() -> None:
    weights = hub.DEMO / "model.safetensors"
    assert weights.stat().st_size <= 16_000_000
    with safe_open(weights, framework="pt") as file:
        slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118  a safetensors file is no dict
    assert all(s.get_dtype() == "BF16" for key, s in slices.items() if not key.endswith("theta"))
    assert sum(math.prod(s.get_shape()) for s in slices.values()) <= 8_000_000


def test_model_card_has_the_losses_that_were_measured() -> None:
    card = (hub.DEMO / "README.md").read_text(encoding="utf-8")
    for source, loss in json.loads((hub.DEMO / "held_out.json").read_text(encoding="utf-8")).items():
        assert f"`{source}` | {loss:.2f}" in card


def test_novel_is_long_enough() -> None:
    from tnl.model.load import load_tokenizer

    assert len(load_tokenizer("demo").sp_model.encode(demo.three_kingdoms())) >= demo.READ_TOKENS


def test_curve() -> None:
    assert demo.curve([8.0, 4.0, 1.0]) == "█▅▂"
    assert len(demo.curve([float(i) for i in range(1, 400)])) <= 40


# ---- the whole demo -----------------------------------------------------------------------------

MEASURED = """
import resource, sys
from tnl.cli import main
try:
    main(sys.argv[1:])
finally:
    print("peak", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, "user", resource.getrusage(resource.RUSAGE_SELF).ru_utime)
"""


def run_demo(name: str, out: Path) -> str:
    """What the command prints into a pipe; afterwards its peak memory and CPU seconds."""
    command = [sys.executable, "-c", MEASURED, "demo", "--name", name, "--out", str(out)]
    environment = {
        **os.environ,
        "PYTHONIOENCODING": "utf-8",
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "2",
        "OMP_WAIT_POLICY": "passive",
    }
    done = subprocess.run(command, capture_output=True, encoding="utf-8", env=environment, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "\x1b" not in done.stdout
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("name", ["小明", "Alice"])
def test_figures_of_the_whole_demo(name: str, tmp_path: Path) -> None:
    text = run_demo(name, tmp_path)
    scores = [int(n) for n in re.findall(r"^  (\d+) of 12 in character$", text, re.M)]
    assert scores[0] == 0 and scores[1] >= 9 and scores[2] >= 9, scores
    last = text.rpartition("Reading")[2]
    assert len(set(re.findall(r"^  [✓·] (.*)$", last, re.M))) >= 3, "what was read leaves one sentence for every question"
    changes = {what: float(n) for what, n in re.findall(r"loss on the (persona|base)'s .*?([+-][\d.]+)%", text)}
    assert changes["persona"] <= -40 and changes["base"] < 5
    assert "state 0.4 MB before, 0.4 MB after" in text
    assert f"tnl chat {tmp_path / name}" in text and "tnl train recipes/huanhuan-385m.yaml" in text
    if sys.platform == "linux":
        peak, user = (float(n) for n in re.findall(r"peak (\d+) user ([\d.]+)", text)[0])
        assert peak < 3 * 1024**2, "KiB"
        assert user < 2 * 180, "seconds of two cores"
    again = run_demo(name, tmp_path)
    assert "this run is finished" in again
    assert [int(n) for n in re.findall(r"^  (\d+) of 12 in character$", again, re.M)] == scores
