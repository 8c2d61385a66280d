"""Where calibration batches come from, that they can be made again, and how bad sources are refused."""

from __future__ import annotations

import gzip
import json
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers_llama import llama_groups, tiny_llama
from safetensors.torch import save_file
from torch import Tensor

from pyprune.errors import PyPruneError
from pyprune.importance import Calibration, load_calibration, score
from pyprune.importance.calibration import SPREAD, first_tokens
from pyprune.importance.sources import read_documents, read_tokens


def tokenizer(text: str, **_: Any) -> dict[str, list[int]]:
    """A word is a token; it is its own number."""
    return {"input_ids": [int(word) for word in text.split()]}


def beginning(text: str, add_special_tokens: bool = True, **_: Any) -> dict[str, list[int]]:
    """As ``tokenizer``, with 9998 and 9999 before every text and 9997 behind it."""
    ids = tokenizer(text)["input_ids"]
    return {"input_ids": [99998, 9999, *ids, 99997] if add_special_tokens else ids}


def ending(text: str, add_special_tokens: bool = True, **_: Any) -> dict[str, list[int]]:
    ids = tokenizer(text)["input_ids"]
    return {"input_ids": [*ids, 99997] if add_special_tokens else ids}


def words(start: int, count: int) -> str:
    return " ".join(str(i) for i in range(start, start + count))


def rows(calibration: Calibration) -> torch.Tensor:
    return torch.cat([b["input_ids"] for b in calibration])


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "train.txt"
    path.write_text(words(0, 500))
    return path


def test_a_text_gives_random_crops_that_do_not_overlap(text: Path) -> None:
    made = load_calibration(text, tokenizer, samples=9, length=20, batch_size=4, seed=3)
    assert [b["input_ids"].shape[0] for b in made] == [4, 4, 1]
    ids = rows(made)
    assert ids.shape == (9, 20) and ids.dtype == torch.int64
    assert (ids.diff(dim=1) == 1).all()  # each is a stretch of the text
    assert len(ids.unique()) == 180
    assert (ids[1:, 0] < ids[:-1, 0]).any()  # in random order


def test_the_seed_decides_the_crops(text: Path) -> None:
    def starts(seed: int) -> list[int]:
        return rows(load_calibration(text, tokenizer, samples=6, length=10, seed=seed))[:, 0].tolist()

    assert starts(1) == starts(1) != starts(2)


def test_crops_reach_every_part_of_a_text() -> None:
    stream = torch.arange(100)
    seen = torch.cat([rows(load_calibration(stream, samples=8, length=10, seed=s)).flatten() for s in range(60)])
    counts = seen.bincount(minlength=100)
    assert counts.min() > 0 and counts[10:90].min() > 20


def test_a_text_that_is_just_long_enough_is_used_whole(text: Path) -> None:
    assert len(rows(load_calibration(text, tokenizer, samples=50, length=10)).unique()) == 500


def test_a_text_that_is_too_short_says_what_it_has_and_what_is_needed(text: Path) -> None:
    with pytest.raises(
        PyPruneError, match=r"train\.txt.*has 500 tokens, and 32 samples of 128 need 4096.*at most samples=3"
    ):
        load_calibration(text, tokenizer, samples=32, length=128)
    with pytest.raises(PyPruneError, match="smaller length"):
        load_calibration(text, tokenizer, samples=1, length=501)


def test_compressed_text_is_read(tmp_path: Path, text: Path) -> None:
    packed = tmp_path / "train.txt.gz"
    packed.write_bytes(gzip.compress(text.read_bytes()))
    a, b = (rows(load_calibration(p, tokenizer, samples=3, length=8)) for p in (text, packed))
    assert torch.equal(a, b)


def records(path: Path, sizes: list[int], field: str = "text") -> Path:
    starts = np.cumsum([0, *sizes]).tolist()
    lines = [json.dumps({field: words(a, n), "id": i}) for i, (a, n) in enumerate(zip(starts, sizes, strict=False))]
    path.write_bytes(gzip.compress("\n".join(lines).encode()) if path.suffix == ".gz" else "\n".join(lines).encode())
    return path


@pytest.mark.parametrize("name", ["docs.jsonl", "docs.jsonl.gz"])
def test_records_in_random_order_give_samples_spread_over_all_of_them(tmp_path: Path, name: str) -> None:
    path = records(tmp_path / name, [40] * 20)
    ids = rows(load_calibration(path, tokenizer, samples=10, length=20, seed=1))
    assert (ids.diff(dim=1) == 1).all()  # text as it stands
    assert len((ids[:, 0] // 40).unique()) == 10 and not (ids[:, 0].diff() > 0).all()
    assert torch.equal(rows(load_calibration(path, tokenizer, samples=10, length=20, seed=1)), ids)
    assert not torch.equal(rows(load_calibration(path, tokenizer, samples=10, length=20, seed=2)), ids)


def test_records_shorter_than_a_sample_are_joined(tmp_path: Path) -> None:
    path = records(tmp_path / "lines.jsonl", [7] * 40)
    ids = rows(load_calibration(path, tokenizer, samples=10, length=25))
    assert len(ids.unique()) == 250 and (ids.diff(dim=1) == 1).double().mean() > 0.8


def test_of_many_records_no_more_are_tokenised_than_samples_spread_over(tmp_path: Path) -> None:
    path, read = records(tmp_path / "many.jsonl", [50] * 400), []

    def counting(text: str, **options: Any) -> dict[str, list[int]]:
        read.append(text)
        return tokenizer(text, **options)

    made = load_calibration(path, counting, samples=4, length=25)
    assert (made.samples, made.length) == (4, 25) and len(read) == SPREAD * 4 * 25 // 50


def test_another_field_of_the_records_can_be_named(tmp_path: Path) -> None:
    path = records(tmp_path / "chat.jsonl", [30, 30], field="output")
    assert rows(load_calibration(path, tokenizer, samples=2, length=9, field="output")).shape == (2, 9)
    with pytest.raises(PyPruneError, match=r"chat\.jsonl.*no text in a field 'text'.*It has: output, id"):
        load_calibration(path, tokenizer, samples=2, length=9)


class FakeDataset(list[Any]):
    def shuffle(self, seed: int, buffer_size: int) -> FakeDataset:
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))
        return FakeDataset([self[i] for i in order])


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """A stand-in for the package ``datasets``; the list receives the calls."""
    calls: list[Any] = []
    module = types.ModuleType("datasets")

    def load_dataset(name: str, configuration: str | None, split: str, streaming: bool) -> FakeDataset:
        calls.append((name, configuration, split, streaming))
        if name == "no/such":
            raise ConnectionError("cannot reach the hub\nlong trace")
        return FakeDataset({"text": words(100 * i, 40)} for i in range(30))

    module.load_dataset = load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", module)
    return calls


def test_a_dataset_is_streamed_by_name_configuration_and_split(hub: list[Any]) -> None:
    made = load_calibration("owner/corpus:raw-v1:test", tokenizer, samples=4, length=30, seed=1)
    load_calibration("corpus", tokenizer, samples=1, length=30)
    assert hub == [("owner/corpus", "raw-v1", "test", True), ("corpus", None, "train", True)]
    assert rows(made).shape == (4, 30) and made.source == "owner/corpus:raw-v1:test"


def test_a_dataset_that_cannot_be_reached_is_one_clear_line(hub: list[Any]) -> None:
    with pytest.raises(PyPruneError, match=r"no/such.*neither a file nor a dataset.*cannot reach the hub\. ") as error:
        load_calibration("no/such", tokenizer)
    assert "\n" not in str(error.value) and "long trace" not in str(error.value)


def test_a_dataset_without_the_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(PyPruneError, match=r"wikitext.*is no file.*pip install datasets"):
        load_calibration("wikitext", tokenizer)


@pytest.mark.parametrize("suffix", [".npy", ".safetensors"])
def test_token_files_are_taken_row_by_row(tmp_path: Path, suffix: str) -> None:
    tokens = torch.randint(0, 90, (6, 16), dtype=torch.int32)
    path = tmp_path / f"tokens{suffix}"
    if suffix == ".npy":
        np.save(path, tokens.numpy())
    else:
        save_file({"input_ids": tokens, "other": torch.zeros(1)}, path)
    whole = load_calibration(path, batch_size=4)
    assert torch.equal(rows(whole), tokens.long()) and whole.seed is None
    part = load_calibration(path, samples=2, length=5)
    assert torch.equal(rows(part), tokens[:2, :5].long())
    with pytest.raises(PyPruneError, match="holds 6 samples of 16 tokens, not 7 of 16"):
        load_calibration(path, samples=7)


def test_a_stream_of_token_ids_is_cropped() -> None:
    ids = rows(load_calibration(torch.arange(300), samples=4, length=50))
    assert ids.shape == (4, 50) and (ids.diff(dim=1) == 1).all()


def test_batches_of_any_kind_are_taken_as_they_are() -> None:
    ids = torch.randint(0, 90, (7, 6))
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    stream = iter([
        {"input_ids": ids[:2], "attention_mask": mask[:2]},
        ids[2:5],
        ids[5].tolist(),
        {"input_ids": ids[6].tolist(), "attention_mask": [1] * 6},
    ])  # fmt: skip
    made = load_calibration(stream)
    assert torch.equal(rows(made), ids)
    assert (made.samples, made.length, made.tokens, len(made)) == (7, 6, 40, 4)
    assert made.batches[3]["attention_mask"].shape == (1, 6)


def test_an_endless_stream_of_batches_ends_with_the_samples_asked() -> None:
    def endless() -> Any:
        while True:
            yield torch.ones(4, 5, dtype=torch.int64)

    made = load_calibration(endless(), samples=10)
    assert [b["input_ids"].shape[0] for b in made] == [4, 4, 2] and made.samples == 10
    with pytest.raises(PyPruneError, match="holds 4 samples, and 10 were asked"):
        load_calibration([torch.ones(4, 5, dtype=torch.int64)], samples=10)


def test_a_calibration_describes_itself(text: Path) -> None:
    made = load_calibration(text, tokenizer, samples=9, length=20, batch_size=4, seed=3)
    assert str(made) == "train.txt: 9 samples of 20 tokens, seed 3"
    want = {"source": "train.txt", "samples": 9, "length": 20, "tokens": 180, "seed": 3, "batches": 3, "prefix": 0}
    assert made.to_dict() == want and json.loads(json.dumps(want)) == want
    assert load_calibration(made) is made


def test_evaluation_text_is_one_stream_in_its_own_order(tmp_path: Path) -> None:
    path = records(tmp_path / "docs.jsonl", [3, 4, 5])
    assert read_tokens(str(path), tokenizer).tolist() == list(range(12))


def test_records_without_text_count_where_perplexity_is_measured(tmp_path: Path) -> None:
    """Published figures on WikiText join all rows of the data set, empty ones too."""
    rows = ["", " = A = \n", "", " text \n", " "]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows), encoding="utf-8")

    def characters(text: str, **_: object) -> dict[str, list[int]]:
        return {"input_ids": [ord(c) for c in text]}

    assert "".join(map(chr, read_tokens(str(path), characters).tolist())) == "\n\n".join(rows)
    assert list(read_documents(str(path))) == [" = A = \n", " text \n"]


def test_what_unicode_calls_the_end_of_a_line_ends_no_record(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_text('{"text": "1 2\u2028 3"}\n{"text": "4\u0085 5"}\r\n', encoding="utf-8")
    assert len(list(read_documents(str(path), "text", None))) == 2


def _write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("empty.txt", b"", "holds no text"),
        ("blank.txt", b" \n\t\n", "holds no text"),
        ("empty.jsonl", b"\n", "holds no text"),
        ("latin.txt", b"\xe9\xff caf\xe9", "not UTF-8"),
        ("broken.txt.gz", b"not gzip", "cannot be read"),
        ("short.txt.gz", gzip.compress(b"1 2 3 4 5 6 7 8", mtime=0)[:-9], "cannot be read"),
        ("broken.jsonl", b'{"text": "1 2"}\n{"text": ', "line 2 is not JSON"),
        ("long.jsonl", b'{"text": ' + b"9" * 5000 + b"}\n", "line 1 is not JSON"),
        ("deep.jsonl", b"[" * 100_000 + b"\n", "line 1 is not JSON"),
        ("list.jsonl", b"[1, 2]\n", "no text in a field 'text'"),
        ("broken.npy", b"junk", "cannot be read"),
        ("broken.safetensors", b"junk", "cannot be read"),
        ("table.csv", b"a,b\n", "is not a kind of file"),
    ],
)
def test_files_that_hold_nothing_usable_are_named(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    with pytest.raises(PyPruneError, match=message) as error:
        load_calibration(_write(tmp_path / name, data), tokenizer, samples=2, length=2)
    assert name in str(error.value) and error.value.option == "calibration"


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((2, 3), dtype=np.float32), "not token ids"),
        (np.zeros((2, 3, 4), dtype=np.int64), "has shape"),
        (np.zeros((0, 3), dtype=np.int64), "is empty"),
        (np.zeros((3, 1), dtype=np.int64), "nothing to predict"),
    ],
)
def test_arrays_that_are_no_token_ids_are_refused(array: Any, message: str) -> None:
    with pytest.raises(PyPruneError, match=message):
        load_calibration(array)


@pytest.mark.parametrize("name", ["missing.txt", "./nowhere", "/no/such/file", "missing.npy", "deep/down/there"])
def test_a_file_that_is_missing_is_not_taken_for_a_dataset(hub: list[Any], name: str) -> None:
    with pytest.raises(PyPruneError, match="does not exist"):
        load_calibration(name, tokenizer)
    assert not hub


def test_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PyPruneError, match="is a folder"):
        load_calibration(tmp_path, tokenizer)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (17, "nothing to calibrate on"),
        ([], "holds no batches"),
        ([{"attention_mask": torch.ones(1, 4)}], "neither input_ids nor labels"),
        ([3.5], "is a float"),
        ([torch.rand(2, 3)], "not token ids"),
    ],
)
def test_objects_that_are_no_batches_are_refused(source: Any, message: str) -> None:
    with pytest.raises(PyPruneError, match=message):
        load_calibration(source)


@pytest.mark.parametrize(("option", "value"), [("samples", 0), ("length", 1), ("batch_size", 0)])
def test_sizes_below_the_least_are_refused(text: Path, option: str, value: int) -> None:
    with pytest.raises(PyPruneError, match=f"{option} {value}: must be at least"):
        load_calibration(text, tokenizer, **{option: value})


def test_text_without_a_tokenizer_is_refused(text: Path) -> None:
    with pytest.raises(PyPruneError, match="there is no tokenizer"):
        load_calibration(text)


@pytest.mark.parametrize("bad", [97, 5000, -1])
def test_token_ids_outside_the_vocabulary_are_refused_before_anything_runs(bad: int) -> None:
    model = tiny_llama()
    ids = torch.randint(0, 97, (3, 8))
    ids[2, 5] = bad
    with pytest.raises(PyPruneError, match=rf"holds token id {bad}, and the model's vocabulary has 97 tokens"):
        score(model, llama_groups(model.config, model), ids)


@pytest.mark.parametrize(
    ("labels", "message"),
    [(torch.full((2, 8), -1), "holds label -1, which is no token"), (torch.rand(2, 8), "which is no token"),
     (torch.full((2, 8), 500), "holds token id 500, and the model's vocabulary has 97 tokens")],
    ids=["negative", "fractions", "too large"],
)  # fmt: skip
def test_labels_that_are_no_tokens_are_refused(labels: Tensor, message: str) -> None:
    model = tiny_llama()
    batch = {"input_ids": torch.randint(0, 97, (2, 8)), "labels": labels}
    with pytest.raises(PyPruneError, match=message):
        score(model, llama_groups(model.config, model), [batch])


def test_a_sample_with_nothing_to_predict_is_refused() -> None:
    model = tiny_llama()
    ids = torch.randint(0, 97, (2, 8))
    mask = torch.ones_like(ids)
    mask[1, 1:] = 0
    with pytest.raises(PyPruneError, match="'sample 1 of a batch': has no token to predict"):
        score(model, llama_groups(model.config, model), [{"input_ids": ids, "attention_mask": mask}])


@pytest.mark.parametrize(
    ("have", "asked", "samples", "length"),
    [
        (200_000, {}, 128, 512),
        (65_536, {}, 128, 512),
        (30_000, {}, 58, 512),
        (10_000, {}, 32, 312),
        (1_000, {}, 7, 128),
        (100, {}, 1, 100),
        (200_000, {"longest": 256}, 128, 256),
        (1_000, {"samples": 20}, 20, 50),
        (1_000, {"length": 100}, 10, 100),
        (200_000, {"samples": 4}, 4, 512),
        (2_000, {"longest": 64}, 31, 64),
    ],
)
def test_what_is_not_asked_for_is_128_of_512_tokens_or_what_the_text_gives(have, asked, samples, length) -> None:
    made = load_calibration(torch.arange(have), **asked)
    assert (made.samples, made.length) == (samples, length)


def test_records_give_what_they_have_when_no_number_is_asked_for(tmp_path: Path) -> None:
    made = load_calibration(records(tmp_path / "records.jsonl", [40, 20] * 40), tokenizer, length=30)
    assert (made.samples, made.length) == (80, 30)


def test_the_first_tokens_are_whole_sequences_and_padding_is_no_token() -> None:
    ids = torch.arange(40).reshape(8, 5)
    mask = torch.ones(8, 5, dtype=torch.int64)
    mask[1, 3:] = 0
    batches = [{"input_ids": i, "attention_mask": m} for i, m in zip(ids.split(3), mask.split(3), strict=True)]
    calibration = load_calibration(batches)
    few = first_tokens(calibration, 18)
    assert [b["input_ids"].tolist() for b in few] == [ids[:3].tolist(), ids[3:4].tolist()]
    assert (few.samples, few.tokens, few.length) == (4, 18, 5)
    assert first_tokens(calibration, 1000).samples == 8


def test_first_tokens_that_are_all_padding_are_refused() -> None:
    ids = torch.arange(40).reshape(2, 20)
    mask = torch.zeros_like(ids)
    mask[1] = 1
    with pytest.raises(PyPruneError, match="score_tokens 20: hold no token to predict"):
        first_tokens(load_calibration([{"input_ids": ids, "attention_mask": mask}]), 20, 8)


def test_the_first_tokens_in_shorter_samples_are_the_same_tokens() -> None:
    ids = torch.arange(60).reshape(3, 20)
    mask = torch.ones_like(ids)
    mask[1, 8:] = 0
    few = first_tokens(load_calibration([{"input_ids": ids[:2], "attention_mask": mask[:2]}, ids[2:]]), 60, 8)
    assert [tuple(b["input_ids"].shape) for b in few] == [(2, 8), (1, 8), (1, 4), (1, 8), (1, 8), (1, 4)]
    assert torch.equal(torch.cat([b["input_ids"] for b in few][3:], dim=1), ids[2:])
    assert (few.length, few.tokens, few.samples) == (8, 48, 7)


@pytest.mark.parametrize("kind", ["text", "records"])
def test_every_sample_begins_as_the_tokenizer_begins_texts(kind: str, text: Path, tmp_path: Path) -> None:
    source = text if kind == "text" else records(tmp_path / "records.jsonl", [40, 20] * 40)
    made = load_calibration(source, beginning, samples=5, length=12, bos=True)
    assert (made.samples, made.length, made.tokens, made.prefix) == (5, 12, 60, 2)
    assert (rows(made)[:, :2] == torch.tensor([99998, 9999])).all()
    assert not rows(made)[:, 2:].eq(9998).any()
    plain = load_calibration(source, tokenizer, samples=5, length=12)
    without = load_calibration(source, beginning, samples=5, length=12)
    assert without.prefix == 0 and torch.equal(rows(without), rows(plain))
    with pytest.raises(PyPruneError, match="bos True: adds nothing: the tokenizer puts no token before texts"):
        load_calibration(source, ending, samples=5, length=12, bos=True)


def test_token_ids_are_taken_as_they_are(tmp_path: Path) -> None:
    np.save(tmp_path / "ids.npy", np.arange(40).reshape(4, 10))
    made = load_calibration(str(tmp_path / "ids.npy"), beginning, bos=True)
    assert made.prefix == 0 and torch.equal(rows(made), torch.arange(40).reshape(4, 10))


def test_a_length_that_the_beginning_takes_up_is_refused(text: Path) -> None:
    with pytest.raises(PyPruneError, match="length 2: leaves no text behind the 2 tokens"):
        load_calibration(text, beginning, samples=2, length=2, bos=True)
    assert rows(load_calibration(text, beginning, samples=2, length=3, bos=True)).shape == (2, 3)


def test_shorter_samples_of_the_first_tokens_begin_so_too(text: Path) -> None:
    whole = load_calibration(text, beginning, samples=3, length=22, bos=True)
    few = first_tokens(whole, 66, 8)
    assert [tuple(b["input_ids"].shape) for b in few] == [(1, 8), (1, 8), (1, 8), (1, 4)] * 3
    assert all(b["input_ids"][0, :2].tolist() == [99998, 9999] for b in few)
    assert torch.equal(torch.cat([b["input_ids"][0, 2:] for b in few]), rows(whole)[:, 2:].flatten())


def test_batches_of_a_dataset_of_one_tensor_are_token_ids() -> None:
    ids = torch.randint(0, 97, (6, 16))
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(ids), batch_size=2)
    assert torch.equal(torch.cat([b["input_ids"] for b in load_calibration(loader)]), ids)


def test_a_mask_of_another_shape_is_refused_and_what_is_of_generation_left_out() -> None:
    ids = torch.randint(0, 97, (6, 16))
    with pytest.raises(PyPruneError, match=r"attention_mask of \[6, 15\] beside input_ids of \[6, 16\]"):
        load_calibration([{"input_ids": ids, "attention_mask": torch.ones(6, 15)}])
    (batch,) = load_calibration([{"input_ids": ids, "use_cache": False}])
    assert list(batch) == ["input_ids"]


def test_a_text_of_one_character_asks_for_more_text(tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("7")
    with pytest.raises(PyPruneError, match=r"need 2\. Give more text\."):
        load_calibration(str(tmp_path / "one.txt"), tokenizer)
