"""The evaluation command: files, answers that are saved and continued, scores."""

import json
import subprocess
import sys

import pytest
from absl import flags

from tokenflow_jax import cli, log
from tokenflow_jax.evals import understanding
from tokenflow_jax.evals.understanding_scores import TASKS

QUESTIONS = [
    {"question_id": "a", "image": "x.png", "text": "Is there a dog?", "label": "yes"},
    {"question_id": "b", "image": "y.png", "text": "Is there a cat?", "label": "no"},
    {"question_id": "c", "text": "Is ice cold?", "label": "yes"},
]


class Known:
    """A model with given answers, which remembers the questions."""

    def __init__(self, answers):
        self.answers, self.asked = answers, []

    def answer(self, questions, images, max_new):
        self.asked += zip(questions, images, strict=True)
        return [self.answers[question.splitlines()[0]] for question in questions]


def test_asking(tmp_path):
    model = Known({"Is there a dog?": "Yes", "Is there a cat?": "Yes", "Is ice cold?": "no"})
    found = dict(understanding.ask(model, TASKS["pope"], QUESTIONS, tmp_path, batch_size=2))
    assert found == {"a": "Yes", "b": "Yes", "c": "no"}
    text, image = model.asked[0]
    assert text.endswith("single word or phrase.") and image == str(tmp_path / "x.png")
    assert model.asked[2][1] is None
    figures = understanding.score("pope", QUESTIONS, found)
    assert figures["accuracy"] == pytest.approx(1 / 3) and figures["questions"] == 3
    with pytest.raises(ValueError, match="1 questions have no answer"):
        understanding.score("pope", QUESTIONS, {"a": "yes", "b": "no"})


def test_files(tmp_path):
    file = tmp_path / "q.jsonl"
    file.write_bytes("\ufeff".encode() + b"\n".join(json.dumps(q).encode() for q in QUESTIONS))
    assert understanding.read_questions(file) == QUESTIONS
    assert [q["question_id"] for q in understanding.read_questions(file, 2)] == ["a", "b"]
    file.write_text('{"text": "x"}\n[1]\n\nno\n')
    with pytest.raises(ValueError, match=r"\[2, 4\]"):
        understanding.read_questions(file)
    answers = tmp_path / "a.jsonl"
    answers.write_text('{"question_id": 1, "answer": "ä"}\n{"question_id": 2, "text": "b"}\n{"que')
    assert understanding.read_answers(answers) == {1: "ä", 2: "b"}


def test_a_killed_run_continues(tmp_path):
    """Only questions without an answer are asked."""
    model = Known({"Is there a cat?": "No.", "Is ice cold?": "Yes"})
    out = tmp_path / "answers.jsonl"
    out.write_text('{"question_id": "a", "answer": "yes"}\n{"question_id": "b", "ans')
    understanding.answers_to(out, QUESTIONS, model, TASKS["pope"], tmp_path)
    assert [question.splitlines()[0] for question, _ in model.asked] == list(model.answers)
    figures = understanding.score("pope", QUESTIONS, understanding.read_answers(out))
    assert figures["accuracy"] == 1.0


def test_the_command_scores_any_answers(tmp_path):
    file, answers = tmp_path / "q.jsonl", tmp_path / "a.jsonl"
    file.write_text("\n".join(map(json.dumps, QUESTIONS)))
    answers.write_text("\n".join(json.dumps({"question_id": q["question_id"], "answer": "yes"})
                                 for q in QUESTIONS))  # fmt: skip
    run = [sys.executable, "-m", "tokenflow_jax.evals.understanding", f"--file={file}"]
    done = subprocess.run(
        [*run, "--task=pope", f"--predictions={answers}"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "accuracy: 0.6667" in done.stdout + done.stderr
    wrong = subprocess.run([*run, "--task=pope"], capture_output=True, text=True, check=False)
    assert wrong.returncode == 2 and "checkpoint (or predictions)" in wrong.stderr


TWINS = [
    {"question_id": "p.png", "image": "p.png", "category": "existence", "text": t, "answer": a}
    for t, a in (("Is there a cat?", "Yes"), ("Is there a dog?", "No"))
]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_questions_that_share_an_id_have_answers_of_their_own(tmp_path):
    questions = understanding.read_questions(write(tmp_path / "q.jsonl", TWINS))
    rows = [{"question_id": "p.png", "answer": a} for a in ("yes", "no")]
    answers = understanding.read_answers(write(tmp_path / "a.jsonl", rows))
    assert understanding.score("mme", questions, answers)["perception"] == 200
    swapped = understanding.read_answers(write(tmp_path / "a.jsonl", rows[::-1]))
    assert understanding.score("mme", questions, swapped)["perception"] == 0
    one = understanding.read_answers(write(tmp_path / "a.jsonl", rows[:1]))
    with pytest.raises(ValueError, match="1 questions have no answer"):
        understanding.score("mme", questions, one)
    many = understanding.read_answers(write(tmp_path / "a.jsonl", [*rows, rows[0]]))
    with pytest.raises(ValueError, match=r"more answers than questions have the ids \['p.png'\]"):
        understanding.score("mme", questions, many)


@pytest.mark.parametrize("foreign", ["x", 1, 0, 5, -1, None, [1], {}, 2.5, True])
def test_an_occurrence_of_the_files_own_does_not_disturb(tmp_path, foreign):
    rows = [q | {"occurrence": foreign} for q in (*TWINS, QUESTIONS[0])]
    questions = understanding.read_questions(write(tmp_path / "q.jsonl", rows))
    assert list(map(understanding.key_of, questions)) == ["p.png", ("p.png", 1), "a"]
    assert understanding.read_questions(tmp_path / "q.jsonl", 1)[0] == TWINS[0]


@pytest.mark.parametrize("foreign", ["x", -1, None, [1], {}, 2.5, True])
def test_an_occurrence_that_is_no_number_leaves_answers_in_order(tmp_path, foreign):
    rows = [{"question_id": "p", "answer": a, "occurrence": foreign} for a in ("yes", "no")]
    answers = understanding.read_answers(write(tmp_path / "a.jsonl", rows))
    assert answers == {"p": "yes", ("p", 1): "no"}


@pytest.mark.parametrize("again", [{"occurrence": 1}, {"occurrence": 0}, {}])
def test_different_answers_to_one_question_are_refused(tmp_path, again):
    rows = [{"question_id": "p", "answer": "yes"}, {"question_id": "p", "answer": "no"} | again]
    rows.append({"question_id": "p", "answer": "maybe", "occurrence": 1})
    with pytest.raises(
        ValueError, match=r"a.jsonl, line [23]: another answer to question 'p', occ"
    ):
        understanding.read_answers(write(tmp_path / "a.jsonl", rows))


def test_the_same_answer_twice_is_one(tmp_path):
    rows = [{"question_id": "p", "answer": "yes"}]
    rows += [{"question_id": "p", "answer": "no", "occurrence": 1}] * 2
    answers = understanding.read_answers(write(tmp_path / "a.jsonl", rows))
    assert answers == {"p": "yes", ("p", 1): "no"}


def test_a_limit_takes_answers_to_the_other_questions(tmp_path):
    questions = write(tmp_path / "q.jsonl", TWINS)
    rows = [{"question_id": "p.png", "answer": a} for a in ("yes", "no")]
    options = flags.FlagValues()
    understanding.define_flags(cli.Define(options))
    run = ["run", "--task=mme", f"--file={questions}", "--limit=1"]
    options([*run, f"--predictions={write(tmp_path / 'a.jsonl', rows)}"])
    understanding.main(options)
    figures = json.loads((tmp_path / "a.jsonl.score.json").read_text())["figures"]
    assert figures["questions"] == 1 and figures["existence/accuracy"] == 1
    write(tmp_path / "a.jsonl", [*rows, rows[0]])
    with pytest.raises(ValueError, match="more answers than questions"):
        understanding.main(options)


def test_the_second_question_of_an_id_is_asked_after_a_kill(tmp_path):
    class Assistant:
        def answer(self, texts, pictures, **options):
            return ["yes" if "cat" in text else "no" for text in texts]

    questions = understanding.read_questions(write(tmp_path / "q.jsonl", TWINS))
    out = write(tmp_path / "a.jsonl", [{"question_id": "p.png", "answer": "yes"}])
    task = understanding.TASKS["mme"]
    understanding.answers_to(out, questions, Assistant(), task, tmp_path)
    answers = understanding.read_answers(out)
    assert list(answers.values()) == ["yes", "no"]
    assert understanding.score("mme", questions, answers)["perception"] == 200


def test_pictures_outside_the_folder_are_refused_by_name(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "link.png").symlink_to("/dev/zero")
    names = ["../x.png", "/dev/zero", "link.png", ["x.png"], "a.png"]
    questions = [{"question_id": i, "image": name, "text": "?"} for i, name in enumerate(names)]
    model = Known({"?": "yes"})
    with pytest.raises(ValueError, match="pictures that cannot be shown") as error:
        list(understanding.ask(model, TASKS["pope"], questions, tmp_path / "folder"))
    assert str(error.value).count("\n") == 4 and not model.asked
    assert "question 1: outside the folder: '/dev/zero'" in str(error.value)
    assert "pass allow_outside if that is intended" in str(error.value)
    allowed = understanding.ask(
        model, TASKS["pope"], questions[:3], tmp_path / "folder", allow_outside=True
    )
    assert len(list(allowed)) == 3


def test_questions_and_answers_in_arrays_and_with_separators_in_texts(tmp_path):
    questions = [q | {"text": q["text"] + "\u2028\x85"} for q in QUESTIONS]
    answers = [{"question_id": q["question_id"], "answer": "yes\u2029"} for q in QUESTIONS]
    for indent in (None, 2):
        (tmp_path / "q.json").write_text(json.dumps(questions, indent=indent, ensure_ascii=False))
        (tmp_path / "a.json").write_text(json.dumps(answers, indent=indent, ensure_ascii=False))
        assert understanding.read_questions(tmp_path / "q.json") == questions
        assert set(understanding.read_answers(tmp_path / "a.json").values()) == {"yes\u2029"}
    lines = "\n".join(json.dumps(q, ensure_ascii=False) for q in questions)
    (tmp_path / "q.jsonl").write_text(lines)
    assert understanding.read_questions(tmp_path / "q.jsonl") == questions


@pytest.mark.parametrize(
    "line", [b"[" * 100_000, b"1" * 5000, b'{"question_id": [1]}', b'{"question_id": {}}',
             b'{"text": "\xff"}'],
)  # fmt: skip
def test_a_line_that_is_no_question_is_named(tmp_path, line):
    (tmp_path / "q.jsonl").write_bytes(json.dumps(QUESTIONS[0]).encode() + b"\n" + line)
    with pytest.raises(ValueError, match=r"q\.jsonl: lines \[2\] are no JSON objects"):
        understanding.read_questions(tmp_path / "q.jsonl")
    assert understanding.read_answers(tmp_path / "q.jsonl") == {"a": "Is there a dog?"}


def test_ids_that_are_not_unicode_are_saved(tmp_path):
    questions = [{"question_id": "a\ud83d", "text": "Is ice cold?", "label": "yes"}]
    out = tmp_path / "answers.jsonl"
    model = Known({"Is ice cold?": "yes"})
    understanding.answers_to(out, questions, model, TASKS["pope"], tmp_path)
    assert understanding.read_answers(out) == {"a\ud83d": "yes"}


def test_wrong_paths_are_known_before_the_model_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr(understanding.answer, "load_assistant", lambda options: pytest.fail("late"))
    file = write(tmp_path / "q.jsonl", [QUESTIONS[2] | {"image": "/etc/passwd"}])
    out = tmp_path / "in_the_way" / "a.jsonl"
    options = flags.FlagValues()
    understanding.define_flags(cli.Define(options))
    options(["run", "--task=pope", "--checkpoint=x", f"--file={file}", f"--out={out}"])
    with pytest.raises(ValueError, match="outside the folder"):
        understanding.main(options)
    write(file, QUESTIONS)
    (tmp_path / "in_the_way").write_text("")
    with pytest.raises(OSError, match="cannot write into the folder"):
        understanding.main(options)


@pytest.mark.parametrize(
    "task,change,message",
    [
        ("pope", {"text": None}, "no question in"),
        ("pope", {"label": "perhaps"}, "POPE's label must be yes or no"),
        ("vqa", {"label": None}, "no answer to compare with"),
        ("mme", {}, "MME needs category and image"),
        ("choice", {}, "no options in"),
        ("choice", {"options": ["a dog", "a cat"]}, "the right answer 'yes' is none of the opt"),
        ("pope", {"image": "absent.png"}, "there is no picture"),
    ],
)
def test_what_a_task_lacks_is_known_before_the_model_is_loaded(
    tmp_path, monkeypatch, task, change, message
):
    monkeypatch.setattr(understanding.answer, "load_assistant", lambda options: pytest.fail("late"))
    file = write(tmp_path / "q.jsonl", [QUESTIONS[2] | change])
    options = flags.FlagValues()
    understanding.define_flags(cli.Define(options))
    options(["run", f"--task={task}", "--checkpoint=x", f"--file={file}"])
    with pytest.raises(ValueError, match="1 of 1 questions do not fit") as error:
        understanding.main(options)
    assert f"question 'c': {message}" in str(error.value)


def test_questions_without_any_answer_are_asked_and_not_scored():
    questions = [{"question_id": i, "text": "Is ice cold?"} for i in range(2)]
    assert not understanding.check(TASKS["pope"], questions, [None, None])
    assert understanding.check(TASKS["pope"], QUESTIONS, [None] * 3)


def test_instructions_that_the_training_lacks(tmp_path):
    line = TASKS["pope"].instruction
    runs = {"total_steps": 9}
    chats = {"name": "jsonl", "path": str(tmp_path / "chats.jsonl"), "mixture": ()}
    emoji = {"name": "emoji", "path": "", "mixture": ()}
    assert understanding.is_unknown(line, {**runs, "data": emoji})
    assert not understanding.is_unknown(line, {"data": emoji})  # a released model
    assert not understanding.is_unknown(line, {**runs, "data": chats})  # it is gone
    turns = [{"from": "human", "value": f"Is it?\n{line}"}, {"from": "gpt", "value": "Yes"}]
    write(tmp_path / "chats.jsonl", [{"conversations": turns}])
    assert not understanding.is_unknown(line, {**runs, "data": chats})
    assert understanding.is_unknown(TASKS["choice"].instruction, {**runs, "data": chats})
    both = {**emoji, "name": "mixture", "mixture": (f"1 jsonl {chats['path']}", "1 emoji")}
    assert not understanding.is_unknown(line, {**runs, "data": both})
    assert understanding.is_unknown(TASKS["choice"].instruction, {**runs, "data": both})


def test_long_asking_tells_how_far_it_is(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(log, "_PROGRESS_S", -1.0)
    model = Known({"Is there a dog?": "Yes", "Is there a cat?": "Yes", "Is ice cold?": "no"})
    out = tmp_path / "a.jsonl"
    understanding.answers_to(out, QUESTIONS, model, TASKS["pope"], tmp_path, batch_size=1)
    assert "ask: 2 of 3" in caplog.text and "questions/s, eta" in caplog.text
