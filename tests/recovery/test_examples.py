"""Which tokens of a record carry loss, and what is refused."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import torch
from helpers_recovery import chat_tokenizer
from helpers_run import byte_tokenizer

from pyprune.errors import PyPruneError
from pyprune.recovery.examples import Encoder
from pyprune.recovery.records import check_source, read_records


def spoken(encoder: Encoder, record) -> tuple[str, str]:
    """(the whole example as text, the part of it that carries loss)."""
    example = encoder(record, "here")
    text = encoder.tokenizer.decode(example.ids.tolist())
    return text, encoder.tokenizer.decode(example.ids[example.learned].tolist())


def test_the_prompt_of_an_instruction_carries_no_loss_and_its_answer_does() -> None:
    record = {"instruction": "Add.", "input": "1 and 2", "output": "3 is it"}
    text, learned = spoken(Encoder(byte_tokenizer()), record)
    assert learned == "3 is it</s>"
    assert text.startswith("Below is an instruction that describes a task, paired with an input")
    assert text.endswith("### Instruction:\nAdd.\n\n### Input:\n1 and 2\n\n### Response:\n3 is it</s>")


def test_an_instruction_without_input_has_the_shorter_wording() -> None:
    text, _ = spoken(Encoder(byte_tokenizer()), {"instruction": "Hi", "output": "Ho"})
    assert "### Input" not in text and "paired" not in text and text.endswith("### Response:\nHo</s>")


def test_prompts_are_learned_when_asked() -> None:
    encoder = Encoder(byte_tokenizer(), train_on_prompts=True)
    example = encoder({"prompt": "abc", "completion": "de"}, "here")
    assert example.learned.tolist() == [False] + 5 * [True]


def test_all_of_a_plain_text_but_its_first_token_carries_loss() -> None:
    example = Encoder(byte_tokenizer())({"text": "abc"}, "here")
    assert example.learned.tolist() == [False, True, True, True] and not example.whole


def test_a_tokenizer_that_begins_texts_with_a_mark_keeps_doing_so() -> None:
    class Marked:
        bos_token_id, eos_token_id = 7, 8

        def __call__(self, text, add_special_tokens=True, verbose=True):
            return {"input_ids": ([7] if add_special_tokens else []) + [ord(c) for c in text]}

    encoder = Encoder(Marked())
    assert encoder({"text": "ab"}, "here").ids.tolist() == [7, 97, 98, 8]
    assert encoder({"prompt": "a", "completion": "b"}, "here").ids.tolist() == [7, 97, 98, 8]


def test_only_what_the_assistant_says_in_a_conversation_carries_loss() -> None:
    messages = [
        {"role": "system", "content": "Be short."}, {"role": "user", "content": "One?"},
        {"role": "assistant", "content": "1"}, {"role": "user", "content": "Two?"},
        {"role": "assistant", "content": "2"}, {"role": "user", "content": "unanswered"},
    ]  # fmt: skip
    text, learned = spoken(Encoder(chat_tokenizer()), {"messages": messages})
    assert learned == "1</s>\n2</s>\n"
    assert text == chat_tokenizer().apply_chat_template(messages[:5], tokenize=False)


def test_instructions_take_the_chat_template_when_asked() -> None:
    record = {"instruction": "Add.", "input": "1 2", "output": "3"}
    text, learned = spoken(Encoder(chat_tokenizer(), instruction_format="chat"), record)
    assert text == "<|user|>\nAdd.\n\n1 2</s>\n<|assistant|>\n3</s>\n" and learned == "3</s>\n"


def test_a_conversation_without_a_chat_template_is_refused() -> None:
    with pytest.raises(PyPruneError, match=r"here.*is a conversation, and the tokenizer has no chat template"):
        Encoder(byte_tokenizer())({"messages": [{"role": "assistant", "content": "a"}]}, "here")


@pytest.mark.parametrize("messages", [[], "text", [{"role": "user"}], [3]])
def test_messages_of_another_form_are_refused(messages) -> None:
    with pytest.raises(PyPruneError, match="no list of role and content"):
        Encoder(chat_tokenizer())({"messages": messages}, "here")


def test_a_conversation_without_an_answer_is_refused() -> None:
    with pytest.raises(PyPruneError, match="no message of the assistant"):
        Encoder(chat_tokenizer())({"messages": [{"role": "user", "content": "a"}]}, "here")


def test_a_template_that_rewrites_earlier_turns_is_refused() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{{ messages | length }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    with pytest.raises(PyPruneError, match="cannot be told apart"):
        Encoder(tokenizer)({"messages": turns}, "here")


def test_a_record_without_known_fields_names_file_line_and_fields(tmp_path: Path) -> None:
    file = tmp_path / "data.jsonl"
    file.write_text('{"text": "good"}\n\n{"question": "a", "answer": "b"}\n')
    encoder = Encoder(byte_tokenizer())
    with pytest.raises(PyPruneError) as caught:
        for record, where in read_records(str(file), 0):
            encoder(record, where)
    message = str(caught.value)
    assert "data.jsonl (line 3)" in message and "It has: question, answer." in message and "instruction" in message


@pytest.mark.parametrize("record", [{"text": 5}, {"question": "a", "text": None}, {"instruction": "a", "output": 5}])
def test_a_known_field_that_is_no_text_is_named(record: dict) -> None:
    with pytest.raises(PyPruneError, match=rf"data 'here': has a field '{list(record)[-1]}' that is no text\."):
        Encoder(byte_tokenizer())(record, "here")


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.jsonl", '{"text": "x"}\n{"text"\n', "line 2 is not JSON"),
        ("a.json", '[{"text": "x"},]', "line 1 is not JSON"),
        ("a.jsonl", "[" * 100_000, "line 1 is not JSON: maximum recursion depth"),
        ("a.jsonl", '{"text": ' + "1" * 5000 + "}", "line 1 is not JSON: Exceeds the limit"),
        ("a.json", "[" * 100_000, "is not JSON: maximum recursion depth"),
        ("a.json", '{"text": "x"}', "is no list of records"),
        ("a.jsonl", "\n\n", "holds no records"),
        ("a.txt", "  \n", "holds no records"),
        ("a.jsonl.gz", "not gzip", "cannot be read"),
    ],
)
def test_damaged_and_empty_files_are_refused(tmp_path: Path, name: str, content: str, said: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(PyPruneError, match=said):
        list(read_records(str(tmp_path / name), 0))


@pytest.mark.parametrize(
    ("source", "said"),
    [("absent.jsonl", "does not exist"), (".", "is a folder"), ("odd.bin", "not a kind of file"), (3, "nothing to")],
)
def test_sources_that_cannot_be_are_refused_before_anything_is_read(tmp_path, monkeypatch, source, said) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "odd.bin").write_text("x")
    with pytest.raises(PyPruneError, match=said):
        check_source(source, "data")


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_a_record_may_hold_the_line_separators_of_unicode(tmp_path: Path, name: str) -> None:
    records = [{"text": f"one{mark}two"} for mark in ("\u2028", "\u2029", "\x85", "\x0c")]
    content = "\r\n".join(json.dumps(r, ensure_ascii=False) for r in records)
    with (gzip.open if name.endswith(".gz") else open)(tmp_path / name, "wb") as file:
        file.write(content.encode())
    found = list(read_records(str(tmp_path / name), 0))
    assert [r for r, _ in found] == records
    assert found[-1][1].endswith("(line 4)")


def test_every_kind_of_source_gives_its_records(tmp_path: Path) -> None:
    records = [{"text": "one"}, {"text": "two"}]
    lines = "\n".join(map(json.dumps, records))
    (tmp_path / "a.jsonl").write_text(lines)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (tmp_path / "c.json").write_text(json.dumps(records))
    (tmp_path / "d.txt").write_text("one\n\ntwo")
    for name in ("a.jsonl", "b.jsonl.gz", "c.json"):
        assert [r for r, _ in read_records(str(tmp_path / name), 0)] == records
    assert [r for r, _ in read_records(str(tmp_path / "d.txt"), 0)] == ["one\n\ntwo"]
    assert [r for r, _ in read_records(records, 0)] == records
    ids = torch.tensor([[1, 2], [3, 4]])
    assert [r.tolist() for r, _ in read_records(ids, 0)] == ids.tolist()


def test_a_hugging_face_dataset_is_read_by_name(monkeypatch) -> None:
    import datasets

    asked = []

    def load(name, configuration, split, streaming):
        asked.append((name, configuration, split, streaming))
        return datasets.Dataset.from_list([{"text": "a"}, {"text": "b"}]).to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert sorted(r["text"] for r, _ in read_records("owner/name:conf:test", 0)) == ["a", "b"]
    assert asked == [("owner/name", "conf", "test", True)]


def test_a_dataset_that_is_nowhere_is_refused() -> None:
    with pytest.raises(PyPruneError, match="neither a file nor a dataset that can be opened"):
        list(read_records("nobody/nothing-of-the-kind", 0))
