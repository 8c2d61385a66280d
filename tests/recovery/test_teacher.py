"""The teacher: its cache, and which models may teach."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
import torch
from helpers_recovery import LORA, logits, rows, sentences, small_llama, trainer
from helpers_run import byte_tokenizer

from pyprune import recover, save
from pyprune.errors import PyPruneError
from pyprune.importance.fingerprint import fingerprint_of_weights
from pyprune.recovery import adapter
from pyprune.recovery.adapter import adapted
from pyprune.recovery.loss import teacher_answers
from pyprune.recovery.packing import collate
from pyprune.recovery.teacher import Teacher, check_vocabulary
from pyprune.recovery.train import autocast

CPU = torch.device("cpu")


def teacher(folder: Path, model=None, k: int = 8, temperature: float = 1.0) -> Teacher:
    model = small_llama(7) if model is None else model
    return Teacher(
        model, fingerprint_of_weights(model), folder, k, temperature, True, lambda: autocast(CPU, False)
    )  # fmt: skip


def test_answers_from_the_cache_are_those_of_the_model_in_the_order_of_the_batch(tmp_path) -> None:
    given = rows(8, packing=False)[:3]
    model = small_llama(7)
    batch = collate(given, positions=True)
    labels = batch.pop("labels")
    with torch.no_grad():
        wanted = teacher_answers(model(**batch, use_cache=False).logits, labels, 8, 1.0)
    for expected in (0, 3):
        source = teacher(tmp_path)
        found = source(given, CPU)
        assert (source.reused, source.computed) == (expected, 3 - expected)
        assert torch.equal(found.tokens, wanted.tokens)
        torch.testing.assert_close(found.log_probs, wanted.log_probs, rtol=1e-3, atol=1e-2)


def test_the_cache_serves_the_same_rows_in_any_mix_and_no_others(tmp_path) -> None:
    a, b = rows(20, seed=1), rows(20, seed=2)
    teacher(tmp_path)(a[:4], CPU)
    mixed = teacher(tmp_path)
    mixed([b[0], a[2], a[1]], CPU)
    assert (mixed.reused, mixed.computed) == (2, 1)


@pytest.mark.parametrize("change", [{"k": 4}, {"temperature": 2.0}, {"model": small_llama(8)}])
def test_another_teacher_or_setting_has_a_cache_of_its_own(tmp_path, change) -> None:
    teacher(tmp_path)(rows()[:2], CPU)
    other = teacher(tmp_path, **change)
    other(rows()[:2], CPU)
    assert other.computed == 2


def test_a_damaged_answer_is_worked_out_anew(tmp_path) -> None:
    teacher(tmp_path)(rows()[:1], CPU)
    (file,) = tmp_path.rglob("*.safetensors")
    good = file.read_bytes()
    file.write_bytes(good[: len(good) // 2])
    again = teacher(tmp_path)
    again(rows()[:1], CPU)
    assert again.computed == 1 and file.read_bytes() == good


def test_a_full_disk_leaves_no_half_answer(tmp_path, monkeypatch) -> None:
    def full(tensors, file):
        Path(file).write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(PyPruneError, match=r"distill_cache.*cannot be written: No space left"):
        teacher(tmp_path)(rows()[:1], CPU)
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]


def test_a_student_that_learns_from_its_teacher_alone_comes_nearer_to_it(tmp_path) -> None:
    dense, student = small_llama(7), small_llama(3)
    apart = []
    with adapted(student, adapter.Lora(16, 32, 0.0, "all-linear"), 0) as wrapped:
        for _ in range(2):
            p, q = (torch.log_softmax(logits(m), -1) for m in (dense, wrapped))
            apart.append(float((p.exp() * (p - q)).sum(-1).mean()))
            source = teacher(tmp_path, dense, k=258)
            trainer(wrapped, rows(200), teacher=source, distill_weight=1.0, learning_rate=0.02).run()
    assert apart[1] < apart[0]


def test_half_weight_is_half_of_each_loss(tmp_path) -> None:
    found = []
    for weight in (0.0, 0.5, 1.0):
        with adapted(small_llama(), LORA, 0) as wrapped:
            run = trainer(wrapped, teacher=teacher(tmp_path), distill_weight=weight)
            with torch.no_grad():
                found.append(float(run._loss(rows()[:3], 1.0)))
    assert found[1] == pytest.approx((found[0] + found[2]) / 2, rel=1e-5)
    assert found[0] != found[2]


def test_a_teacher_of_another_width_is_refused() -> None:
    ours, theirs = small_llama(), small_llama(vocab_size=300)
    with pytest.raises(PyPruneError, match=r"teacher 'dense': has a vocabulary of 300 tokens, and the model.* 258"):
        check_vocabulary(theirs, None, ours, None, "dense")


def test_a_teacher_with_other_words_is_refused() -> None:
    other = byte_tokenizer()
    other.add_tokens(["word"])
    with pytest.raises(PyPruneError, match=r"teacher 'dense': has another vocabulary: 1 tokens differ"):
        check_vocabulary(small_llama(), other, small_llama(), byte_tokenizer(), "dense")
    check_vocabulary(small_llama(), byte_tokenizer(), small_llama(), byte_tokenizer(), "dense")


def test_a_run_with_a_teacher_reuses_a_kept_cache_and_otherwise_leaves_none(tmp_path) -> None:
    save(small_llama(7), byte_tokenizer(), tmp_path / "dense")
    options = {"data": sentences(60), "cutoff": 64, "lora_r": 2, "val_tokens": 128, "teacher": tmp_path / "dense"}
    reports = []
    for name in ("a", "b"):
        cache = {"distill_cache": tmp_path / "cache", "output_dir": tmp_path / name}
        reports.append(recover(small_llama(), tokenizer=byte_tokenizer(), **options, **cache).report)
    first, second = (r["teacher"] for r in reports)
    assert first["reused"] == 0 < first["computed"] == second["reused"] and second["computed"] == 0
    assert reports[0]["losses"] == reports[1]["losses"]
    recover(small_llama(), tokenizer=byte_tokenizer(), **options, output_dir=tmp_path / "c")
    assert {p.name for p in tmp_path.iterdir()} == {"dense", "cache", "a", "b", "c"}


def test_answers_are_those_of_the_very_weights_and_their_precision(tmp_path) -> None:
    """A single number of the teacher's largest matrix is another."""
    options = {
        "data": sentences(40), "cutoff": 64, "lora_r": 2, "val_tokens": 128, "distill_cache": tmp_path / "cache",
    }  # fmt: skip
    dense = small_llama(7)
    one = save(dense, byte_tokenizer(), tmp_path / "one")
    with torch.no_grad():
        dense.model.embed_tokens.weight[5, 3] += 1
    other = save(dense, byte_tokenizer(), tmp_path / "other")
    for teacher, more in ((one, {"bf16": False}), (other, {"bf16": False}), (one, {"bf16": True})):
        report = recover(small_llama(), tokenizer=byte_tokenizer(), teacher=teacher, **options, **more).report
        assert report["teacher"]["reused"] == 0 < report["teacher"]["computed"]
