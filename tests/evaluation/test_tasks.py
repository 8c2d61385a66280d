"""Task files, what is wrong with them, and accuracy as its definition says."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from helpers_tasks import records, write_task

from pyprune.errors import PyPruneError
from pyprune.evaluation.tasks import Question, Task, accuracy, read_task, requests_of

GOOD = {"context": "Q:", "choices": ["a", "b"], "label": 1}


def without(field: str) -> dict:
    return {k: v for k, v in GOOD.items() if k != field}


@pytest.mark.parametrize("name", ["piqa.jsonl", "piqa.jsonl.gz"])
def test_questions_are_read_in_order_and_the_task_is_named_after_the_file(tmp_path: Path, name: str) -> None:
    task = read_task(str(write_task(tmp_path / name, records())))
    assert task.name == "piqa"
    assert [(q.context, list(q.choices), q.label) for q in task.questions] == [
        (r["context"], r["choices"], r["label"]) for r in records()
    ]


def test_a_limit_keeps_the_first_questions(tmp_path: Path) -> None:
    task = read_task(str(write_task(tmp_path / "t.jsonl", records())), limit=3)
    assert [q.context for q in task.questions] == [r["context"] for r in records()[:3]]


def test_unknown_fields_and_blank_lines_do_not_matter(tmp_path: Path) -> None:
    file = tmp_path / "t.jsonl"
    file.write_text(json.dumps({**GOOD, "id": 7}) + "\n\n")
    assert len(read_task(str(file)).questions) == 1


def test_line_separators_inside_a_text_do_not_end_the_record(tmp_path: Path) -> None:
    file = tmp_path / "t.jsonl"
    file.write_text(json.dumps({**GOOD, "context": "a\u2028b\x85c"}, ensure_ascii=False) + "\n", encoding="utf-8")
    assert read_task(str(file)).questions[0].context == "a\u2028b\x85c"


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (json.dumps(without("context")), "has no field 'context'. It has: choices, label."),
        (json.dumps(without("choices")), "has no field 'choices'"),
        (json.dumps(without("label")), "has no field 'label'"),
        (json.dumps({**GOOD, "label": 2}), "field 'label' is 2, and there are 2 choices. Count from 0: 0 to 1."),
        (json.dumps({**GOOD, "label": -1}), "field 'label' is -1, and there are 2 choices"),
        (json.dumps({**GOOD, "label": "b"}), "field 'label' is 'b', not the index of a choice"),
        (json.dumps({**GOOD, "label": True}), "field 'label' is True, not the index of a choice"),
        (json.dumps({**GOOD, "choices": ["a"]}), "field 'choices' is not a list of two or more texts"),
        (json.dumps({**GOOD, "choices": ["a", ""]}), "field 'choices' is not a list of two or more texts"),
        (json.dumps({**GOOD, "choices": "ab"}), "field 'choices' is not a list of two or more texts"),
        (json.dumps({**GOOD, "context": 3}), "field 'context' is not text"),
        ("[1, 2]", "is not a JSON object"),
        ("{", "is not JSON"),
    ],
)
def test_a_bad_line_is_named_with_file_line_and_field(tmp_path: Path, line: str, said: str) -> None:
    file = tmp_path / "t.jsonl"
    file.write_text(json.dumps(GOOD) + "\n\n" + line + "\n")
    with pytest.raises(PyPruneError) as caught:
        read_task(str(file), limit=1)
    assert str(caught.value).startswith("tasks ") and f"{file} (line 3)" in str(caught.value)
    assert said in str(caught.value)


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text("\n")
    with pytest.raises(PyPruneError, match="holds no questions"):
        read_task(str(tmp_path / "t.jsonl"))


def test_files_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    with pytest.raises(PyPruneError, match="does not exist"):
        read_task(str(tmp_path / "absent.jsonl"))
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(PyPruneError, match="is a folder"):
        read_task(str(tmp_path / "folder.jsonl"))
    (tmp_path / "plain.jsonl.gz").write_text(json.dumps(GOOD))
    with pytest.raises(PyPruneError, match="cannot be read"):
        read_task(str(tmp_path / "plain.jsonl.gz"))
    (tmp_path / "latin.jsonl").write_bytes(b'{"context": "\xe9"}')
    with pytest.raises(PyPruneError, match="it is not UTF-8"):
        read_task(str(tmp_path / "latin.jsonl"))


def test_requests_put_one_space_before_every_choice() -> None:
    task = Task("t", (Question("Q:", ("a", "b c"), 0), Question("", ("d", "e"), 1)))
    assert requests_of(task) == [("Q:", " a"), ("Q:", " b c"), ("", " d"), ("", " e")]


def test_acc_norm_divides_by_the_characters_of_the_choice_without_its_space() -> None:
    # By the sum "ab" wins (-3 > -4); a character of "wxyz" is likelier (-1 > -1.5).
    task = Task("t", (Question("Q:", ("ab", "wxyz"), 1),))
    found = accuracy(task, [-3.0, -4.0], "file")
    assert (found.acc, found.acc_norm, found.acc_stderr) == (0.0, 1.0, None)


def test_characters_are_counted_not_bytes() -> None:
    # A byte of "éé" is likelier than one of "abc" (-1 > -1.2), a character is not (-2 < -1.2).
    task = Task("t", (Question("Q:", ("abc", "éé"), 0),))
    assert accuracy(task, [-3.6, -4.0], "file").acc_norm == 1.0


def test_the_first_of_equal_choices_is_taken_and_errors_are_those_of_a_mean() -> None:
    question = Question("Q:", ("same", "same"), 0)
    task = Task("t", (question, question, question, Question("Q:", ("same", "same"), 1)))
    found = accuracy(task, [-1.0, -1.0] * 4, "file")
    assert found.acc == found.acc_norm == 0.75
    values = [1, 1, 1, 0]
    assert found.acc_stderr == pytest.approx(math.sqrt(sum((v - 0.75) ** 2 for v in values) / 3) / math.sqrt(4))
    assert found.questions == 4
