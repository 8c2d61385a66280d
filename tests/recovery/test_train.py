"""Training on tiny models: it learns, keeps the best, never rises, and the ways to run it agree."""

from __future__ import annotations

import json
import math

import pytest
import torch
from helpers_recovery import LORA, other_rows, rows, small_llama, trainer

from pyprune.errors import PyPruneError
from pyprune.parsing import MAX_SEED
from pyprune.recovery import adapter, train
from pyprune.recovery.adapter import Lora, adapted
from pyprune.recovery.schedule import Pace, rate


def trained(model=None, lora: Lora = LORA, **changes):
    """(history, nll of the model that comes out, the adapter) of a run."""
    model = small_llama() if model is None else model
    with adapted(model, lora, 0) as wrapped:
        run = trainer(wrapped, **changes)
        history = run.run()
        return history, run.nll(), adapter.copied(adapter.state(wrapped))


def test_training_lowers_the_validation_loss_and_the_result_is_the_best_moment() -> None:
    history, nll, _ = trained()
    found = [v["nll"] for v in history.validations]
    assert found[0] - min(found) > 0.3
    assert nll == pytest.approx(min(found), abs=1e-6) == history.best_nll
    assert [v["step"] for v in history.validations] == [0, 5, 10]
    assert len(history.losses) == len(history.rates) == history.step == 10


def test_the_greatest_seed_that_is_allowed_trains() -> None:
    assert len(trained(seed=MAX_SEED)[0].losses) == 10


def test_the_first_loss_is_that_of_the_untrained_model_over_all_learned_tokens() -> None:
    history, _, _ = trained(train_batch_size=40, micro_batch_size=3)
    from pyprune.recovery.loss import training_loss
    from pyprune.recovery.packing import collate

    batch = collate(rows(), positions=True)
    labels = batch.pop("labels")
    with torch.no_grad():
        wanted = training_loss(small_llama()(**batch, use_cache=False).logits, labels) / (labels[:, 1:] != -100).sum()
    assert history.losses[0] == pytest.approx(float(wanted), rel=1e-5)


def test_training_that_ruins_the_model_gives_the_model_back_as_it_came() -> None:
    history, nll, held = trained(train=other_rows(), learning_rate=0.05)
    assert all(v["nll"] > history.validations[0]["nll"] + 0.02 for v in history.validations[1:])
    assert history.best_step == 0 and nll == pytest.approx(history.validations[0]["nll"], abs=1e-6)
    assert all(not t.any() for n, t in held.items() if "lora_B" in n)


def test_a_loss_that_is_not_finite_ends_training_with_a_note_and_the_best_so_far(monkeypatch) -> None:
    real, calls = train.training_loss, []

    def broken(logits, labels, *more, **options):
        calls.append(torch.is_grad_enabled())
        return real(logits, labels, *more, **options) * (
            math.nan if sum(calls) > 12 and torch.is_grad_enabled() else 1.0
        )

    monkeypatch.setattr(train, "training_loss", broken)
    history, nll, _ = trained()
    assert history.step == 6 and "not finite at step 6" in history.notes[0]
    assert nll == pytest.approx(min(v["nll"] for v in history.validations), abs=1e-6)


def test_a_validation_that_is_not_finite_is_the_worst_of_all_and_can_be_written_down(monkeypatch) -> None:
    real, calls = train.Trainer.nll, []

    def broken(self):
        calls.append(0)
        return real(self) if len(calls) < 3 else math.nan

    monkeypatch.setattr(train.Trainer, "nll", broken)
    with adapted(small_llama(), LORA, 0) as wrapped:
        history = trainer(wrapped).run()
    assert [v["nll"] == train.OVERFLOW for v in history.validations] == [False, False, True]
    assert history.best_step == 5 and json.dumps(history.validations, allow_nan=False)


def test_training_stops_when_validation_has_not_improved_for_as_long_as_asked() -> None:
    mixed = rows(40) + other_rows(400)
    history, nll, _ = trained(train=mixed, learning_rate=0.02, eval_steps=2, early_stopping_patience=2)
    assert 0 < history.best_step < history.step < 100
    steps = [v["step"] for v in history.validations]
    assert [v["step"] for v in history.validations if v["step"] > history.best_step] == steps[-2:]
    assert nll == pytest.approx(history.best_nll, abs=1e-6)


def test_micro_batches_do_not_change_the_result() -> None:
    curves = [trained(micro_batch_size=n)[0].losses for n in (1, 4)]
    torch.testing.assert_close(torch.tensor(curves[0]), torch.tensor(curves[1]), rtol=1e-4, atol=1e-5)


def test_packed_rows_are_trained_on_apart() -> None:
    """One packed row a step gives the loss of its documents one by one."""
    packed = rows(12, 256)
    single = rows(12, 256, packing=False)
    a = trained(train=packed, train_batch_size=len(packed))[0].losses[0]
    b = trained(train=single, train_batch_size=len(single))[0].losses[0]
    assert len(packed) < len(single) and a == pytest.approx(b, rel=1e-5)


def test_the_same_seed_gives_the_same_curve_and_another_one_another() -> None:
    lora = Lora(4, 8, 0.2, "all-linear")
    curves = [trained(lora=lora, seed=seed)[0].losses for seed in (0, 0, 1)]
    assert curves[0] == curves[1] != curves[2]


def test_bfloat16_follows_float32() -> None:
    exact, rough = (trained(bf16=flag)[0] for flag in (False, True))
    assert exact.losses != rough.losses
    assert rough.best_nll == pytest.approx(exact.best_nll, abs=0.05)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bf16", [False, True])
def test_models_in_half_precision_are_trained_with_adapters_in_float32(dtype: torch.dtype, bf16: bool) -> None:
    history, _, held = trained(small_llama().to(dtype), bf16=bf16)
    assert history.validations[0]["nll"] - history.best_nll > 0.3
    assert {t.dtype for t in held.values()} == {torch.float32}


def test_gradient_checkpointing_changes_nothing_but_memory() -> None:
    model = small_llama()
    plain, saving = trained()[0].losses, trained(model, gradient_checkpointing=True)[0].losses
    torch.testing.assert_close(torch.tensor(plain), torch.tensor(saving), rtol=1e-5, atol=1e-6)
    assert not any(getattr(m, "gradient_checkpointing", False) for m in model.modules())


def test_gradient_checkpointing_recomputes_the_layers() -> None:
    model = small_llama()
    calls = []
    model.model.layers[0].mlp.register_forward_pre_hook(lambda *a: calls.append(torch.is_grad_enabled()))
    with adapted(model, LORA, 0) as wrapped:
        run = trainer(wrapped, train=rows()[:4], gradient_checkpointing=True, micro_batch_size=4, eval_steps=100)
        run.run()
    assert len(calls) >= 2 + 2  # two validations; forward and again backward of one step


def test_a_time_budget_ends_training_with_the_rate_near_zero(monkeypatch) -> None:
    clock = iter(range(10**6))
    monkeypatch.setattr("pyprune.recovery.schedule.time.monotonic", lambda: float(next(clock)))
    history, _, _ = trained(train=rows(2000), max_minutes=2.0, warmup_steps=0, eval_steps=None)
    assert 10 < history.step < 120
    assert history.rates[0] > 0.9 * 5e-3 and history.rates[-1] < 0.1 * 5e-3
    assert all(a >= b for a, b in zip(history.rates, history.rates[1:], strict=False))
    assert history.validations[-1]["step"] == history.step


def test_a_step_that_would_mostly_lie_beyond_the_time_is_not_begun() -> None:
    with adapted(small_llama(), LORA, 0) as wrapped:
        run = trainer(wrapped, max_minutes=10.0)
        run.history.step = 4
        assert [run._ends(at) for at in (0.5, 0.88, 0.9, 1.0)] == [False, False, True, True]
        plain = trainer(wrapped)
        plain.history.step = 9
        assert not plain._ends(0.9)


def test_a_short_time_is_not_spent_on_validation(monkeypatch) -> None:
    """A pass over two rows takes a second here, and one validation may take three hundredths of two minutes."""
    clock = iter(range(10**6))
    monkeypatch.setattr("pyprune.recovery.train.time.monotonic", lambda: float(next(clock)))
    validation = rows(40, seed=9)
    with adapted(small_llama(), LORA, 0) as wrapped:
        run = trainer(wrapped, validation=validation, max_minutes=2.0)
        run._trim_validation()
        assert list(run.validation_rows) == validation[:7]
        assert f"on 7 of its {len(validation)} rows" in run.history.notes[0]
        unhurried = trainer(wrapped, validation=validation, max_minutes=60.0)
        unhurried._trim_validation()
        assert list(unhurried.validation_rows) == validation and not unhurried.history.notes


def test_validations_are_fewer_when_they_would_take_more_than_a_tenth_of_the_time() -> None:
    with adapted(small_llama(), LORA, 0) as wrapped:
        run = trainer(wrapped, max_minutes=10.0)
        run.history.validations.append({"seconds": 20.0})
        run._fit_budget()
        assert run.validations_wanted == 3 and run.pace.minutes == pytest.approx(10 - 1 / 3)


def test_rates_rise_and_then_fall_to_zero() -> None:
    found = [rate(s / 100, s, "cosine", 9) for s in range(101)]
    assert found[0] == pytest.approx(0.1) and max(found) == pytest.approx(1, abs=0.03) and found[100] == 0
    assert rate(0.5, 50, "linear", 0) == 0.5 and rate(0.9, 90, "constant", 0) == 1


def test_the_rate_has_risen_after_a_tenth_of_a_run_that_the_clock_ends_early() -> None:
    assert rate(0.1, 1, "constant", 20) == 1 and rate(0.05, 1, "constant", 20) == 0.5


def test_progress_is_the_larger_of_steps_and_time() -> None:
    assert Pace(10).progress(5, 1e9) == 0.5
    assert Pace(10, 1.0).progress(1, 30.0) == 0.5
    assert Pace(10, 1.0).progress(9, 30.0) == 0.9 and Pace(10, 1.0).progress(1, 99.0) == 1


def test_a_damaged_model_is_refused_before_training() -> None:
    model = small_llama()
    with torch.no_grad():
        model.lm_head.weight.mul_(math.inf)
    with adapted(model, LORA, 0) as wrapped, pytest.raises(PyPruneError, match="not finite"):
        trainer(wrapped).run()


def test_every_module_is_in_its_own_mode_after_training() -> None:
    model = small_llama().train()
    model.model.layers[1].mlp.eval()
    with adapted(model, LORA, 0) as wrapped:
        trainer(wrapped).run()
    assert model.training and model.model.layers[0].mlp.training and not model.model.layers[1].mlp.training
