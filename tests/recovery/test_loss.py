"""The losses beside their formulas in float64."""

from __future__ import annotations

import pytest
import torch

from pyprune.recovery import loss as module
from pyprune.recovery.loss import teacher_answers, training_loss

B, L, V = 2, 7, 11


def inputs(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(seed)
    labels = torch.randint(V, (B, L))
    labels[0, :3] = -100
    labels[1, 5] = -100
    return 2 * torch.randn(B, L, V), 2 * torch.randn(B, L, V), labels


def test_the_text_loss_is_the_sum_over_learned_tokens() -> None:
    logits, _, labels = inputs()
    wanted = 0.0
    for b in range(B):
        for t in range(L - 1):
            if labels[b, t + 1] != -100:
                wanted -= torch.log_softmax(logits[b, t].double(), 0)[labels[b, t + 1]].item()
    assert training_loss(logits, labels).item() == pytest.approx(wanted, rel=1e-6)


def divergence(teacher: torch.Tensor, student: torch.Tensor, labels: torch.Tensor, t: float, k: int) -> float:
    """T^2 KL over the teacher's k tokens and the rest together."""
    total = 0.0
    for b in range(B):
        for i in range(L - 1):
            if labels[b, i + 1] == -100:
                continue
            p, q = (torch.softmax(x[b, i].double() / t, 0) for x in (teacher, student))
            top = p.topk(k).indices
            groups = [([j], True) for j in top.tolist()]
            rest = [j for j in range(V) if j not in set(top.tolist())]
            for members in [g for g, _ in groups] + ([rest] if rest else []):
                a, c = p[members].sum(), q[members].sum()
                total += float(a * (a / c).log())
    return t * t * total


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("k", [1, 4, V])
def test_the_teacher_loss_is_the_divergence_over_its_tokens_and_the_rest(k: int, temperature: float) -> None:
    teacher, student, labels = inputs()
    answers = teacher_answers(teacher, labels, k, temperature)
    found = training_loss(student, labels, answers, 1.0, temperature).item()
    assert found == pytest.approx(divergence(teacher, student, labels, temperature, k), rel=1e-4)


def test_more_tokens_never_lower_the_divergence_and_all_of_them_give_the_whole() -> None:
    teacher, student, labels = inputs()
    found = [training_loss(student, labels, teacher_answers(teacher, labels, k, 1.0), 1.0).item() for k in (1, 3, 8, V)]
    assert found == sorted(found)


def test_a_student_equal_to_its_teacher_has_no_loss_and_no_gradient() -> None:
    teacher, _, labels = inputs()
    student = teacher.clone().requires_grad_()
    loss = training_loss(student, labels, teacher_answers(teacher, labels, 4, 2.0), 1.0, 2.0)
    loss.backward()
    assert abs(loss.item()) < 1e-5 and student.grad.abs().max() < 1e-5


def test_asking_for_more_tokens_than_there_are_gives_all() -> None:
    teacher, _, labels = inputs()
    assert teacher_answers(teacher, labels, 100, 1.0).tokens.shape[1] == V


def test_a_certain_teacher_gives_a_finite_loss() -> None:
    teacher, student, labels = inputs()
    teacher[..., 3] += 1000
    assert torch.isfinite(training_loss(student, labels, teacher_answers(teacher, labels, 2, 1.0), 1.0))


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_the_gradient_is_that_of_the_formula_in_float64_however_small_the_pieces(weight: float, monkeypatch) -> None:
    teacher, student, labels = inputs()
    temperature, k, factor = 2.0, 4, 0.25
    chosen = labels[:, 1:] != -100
    top = (teacher[:, :-1][chosen] / temperature).topk(k).indices
    z = student.double().requires_grad_()
    rows = z[:, :-1][chosen]
    text = torch.nn.functional.cross_entropy(rows, labels[:, 1:][chosen], reduction="sum")
    p, q = (torch.softmax(x / temperature, -1).gather(1, top) for x in (teacher[:, :-1][chosen].double(), rows))
    a, b = 1 - p.sum(1), 1 - q.sum(1)
    taught = temperature**2 * ((p * (p / q).log()).sum() + (a * (a / b).log()).sum())
    wanted = factor * ((1 - weight) * text + weight * taught)
    wanted.backward()
    for size in (1, 3 * 4 * V, 1 << 20):
        monkeypatch.setattr(module, "PIECE_BYTES", size)
        given = student.clone().requires_grad_()
        answers = teacher_answers(teacher, labels, k, temperature)
        loss = training_loss(given, labels, answers, weight, temperature, factor)
        loss.backward()
        assert loss.item() == pytest.approx(wanted.item(), rel=1e-5)
        torch.testing.assert_close(given.grad.double(), z.grad, rtol=1e-4, atol=1e-6)


def test_the_gradient_of_narrow_logits_is_narrow_and_rounded_once() -> None:
    _, student, labels = inputs()
    wide = student.bfloat16().float().requires_grad_()
    narrow = student.bfloat16().requires_grad_()
    training_loss(wide, labels, factor=0.1).backward()
    training_loss(narrow, labels, factor=0.1).backward()
    assert narrow.grad.dtype == torch.bfloat16 and torch.equal(narrow.grad, wide.grad.bfloat16())
