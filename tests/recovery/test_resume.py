"""An interrupted training goes on as if it had not been interrupted."""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_recovery import other_rows, rows, small_llama, trainer
from helpers_run import ROOT, write_model, write_text

from pyprune.checkpoint.atomic import complete_folder
from pyprune.cli.main import main
from pyprune.errors import PyPruneError
from pyprune.recovery import adapter
from pyprune.recovery.adapter import Lora, adapted
from pyprune.recovery.unfinished import LOG, Unfinished

DROPPING = Lora(4, 8, 0.2, "all-linear")
OPTIONS = (
    "--data", "train.txt", "--cutoff", "64", "--train_batch_size", "2", "--lora_r", "4", "--lora_dropout", "0.1",
    "--val_tokens", "512", "--eval_steps", "4", "--output_dir", "out", "--no_bf16", "--json",
)  # fmt: skip


def place(folder: Path) -> Unfinished:
    return Unfinished(folder, {"seed": 0}, complete_folder)


class Stop(Exception):
    pass


def interrupted(folder: Path, at: int, **changes) -> None:
    """A training that stops at a step."""
    with adapted(small_llama(), DROPPING, 0) as wrapped, pytest.raises(Stop):
        run = trainer(wrapped, unfinished=place(folder), eval_steps=3, **changes)
        real = run._step

        def step(progress):
            if run.history.step == at:
                raise Stop
            return real(progress)

        run._step = step
        run.run()


def finished(folder: Path | None, resume: bool, **changes):
    with adapted(small_llama(), DROPPING, 0) as wrapped:
        work = None if folder is None else place(folder)
        run = trainer(wrapped, unfinished=work, eval_steps=3, **changes)
        return run.run(resume), adapter.copied(adapter.state(wrapped))


@pytest.mark.parametrize("at", [3, 5, 9])
def test_a_resumed_training_has_the_curve_and_the_adapter_of_one_that_was_not_interrupted(tmp_path, at: int) -> None:
    interrupted(tmp_path, at)
    whole, wanted = finished(None, False)
    resumed, found = finished(tmp_path, True)
    assert resumed.losses == whole.losses and resumed.rates == whole.rates
    assert [v["nll"] for v in resumed.validations] == [v["nll"] for v in whole.validations]
    assert all(torch.equal(found[n], wanted[n]) for n in wanted)


def test_the_best_moment_before_the_interruption_is_not_forgotten(tmp_path) -> None:
    ruin = {"train": rows(12) + other_rows(40), "learning_rate": 0.02, "lr_scheduler": "constant"}
    interrupted(tmp_path, 10, **ruin)
    whole, wanted = finished(None, False, **ruin)
    resumed, found = finished(tmp_path, True, **ruin)
    assert resumed.best_step == whole.best_step == 6 < whole.step
    assert all(torch.equal(found[n], wanted[n]) for n in wanted)


def test_only_the_last_checkpoint_stays(tmp_path) -> None:
    interrupted(tmp_path, 9)
    assert [p.name for p in sorted(tmp_path.iterdir())] == [LOG, "step-000009"]
    assert not list(tmp_path.rglob("*.pt")) and not list(tmp_path.rglob("*.bin"))


def test_what_a_kill_left_of_a_checkpoint_goes_with_the_next_one(tmp_path) -> None:
    interrupted(tmp_path, 5)
    (tmp_path / ".step-000006.12345678.partial").mkdir()
    finished(tmp_path, True)
    assert not list(tmp_path.glob(".step-*"))


def test_a_kill_while_checkpoints_are_removed_leaves_none_or_whole_ones(tmp_path, monkeypatch) -> None:
    interrupted(tmp_path, 5)

    def killed(folder: Path, **options) -> None:
        (Path(folder) / "state.json").unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("pyprune.recovery.unfinished.shutil.rmtree", killed)
        place(tmp_path).remove()
    assert not place(tmp_path).exists() and place(tmp_path).load() is None
    place(tmp_path).remove()
    assert not tmp_path.exists()


def test_resuming_under_other_settings_says_what_differs(tmp_path) -> None:
    interrupted(tmp_path, 5)
    other = Unfinished(tmp_path, {"seed": 1, "text": "x"}, complete_folder)
    with pytest.raises(PyPruneError, match=r"resume.*begun otherwise: seed was 0 and is 1, text was None and is x"):
        other.load()


def test_a_damaged_checkpoint_is_named(tmp_path) -> None:
    interrupted(tmp_path, 5)
    (tmp_path / "step-000003" / "state.json").write_text("{")
    with pytest.raises(PyPruneError, match=r"step-000003.*cannot be read"):
        place(tmp_path).load()


def test_a_full_disk_keeps_the_checkpoint_before(tmp_path, monkeypatch) -> None:
    interrupted(tmp_path, 5)

    def full(*arguments, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("safetensors.torch.save_file", full)
        with (
            adapted(small_llama(), DROPPING, 0) as wrapped,
            pytest.raises(PyPruneError, match=r"checkpoint_dir.*the disk is full"),
        ):
            trainer(wrapped, unfinished=place(tmp_path), eval_steps=3).run(resume=True)
    assert [p.name for p in sorted(tmp_path.iterdir())] == [LOG, "step-000003"]
    assert finished(tmp_path, True)[0].losses == finished(None, False)[0].losses


@pytest.mark.parametrize(
    ("number", "hint"), [(errno.ENOSPC, "Free some space."), (errno.EROFS, "Name another folder.")]
)
def test_a_folder_that_cannot_be_written_is_told_with_what_helps(tmp_path, monkeypatch, number: int, hint: str) -> None:
    def failing(*arguments, **options):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(Path, "mkdir", failing)
    with pytest.raises(PyPruneError, match=rf"checkpoint_dir.*cannot be written: {os.strerror(number)}. {hint}"):
        place(tmp_path / "new").log({})


@pytest.mark.slow
def test_a_killed_command_goes_on_with_resume_to_the_same_curve_and_weights(tmp_path, monkeypatch, capsys) -> None:
    write_model(tmp_path / "model", hidden_size=32, intermediate_size=48, num_hidden_layers=2)
    write_text(tmp_path / "train.txt", 6000)
    monkeypatch.chdir(tmp_path)

    def call(*more: str) -> dict[str, Any]:
        capsys.readouterr()
        assert main(["recover", "model", *OPTIONS, *more]) == 0
        return json.loads(capsys.readouterr().out)

    wanted = call("--output_dir", "whole")
    assert wanted["steps"] > 30
    killed_at = random.randint(6, 30)
    log = tmp_path / "out.unfinished" / LOG
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(torch.get_num_threads())}
    command = [sys.executable, "-m", "pyprune", "recover", "model", *OPTIONS]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (log.exists() and log.read_text().count('"loss"') >= killed_at):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "out").exists()

    assert main(["recover", "model", *OPTIONS]) == 2
    assert "holds an unfinished training. Set resume to go on" in capsys.readouterr().err
    found = call("--resume")
    assert found["losses"] == wanted["losses"], f"killed after step {killed_at}"
    names = [tmp_path / d / "model.safetensors" for d in ("out", "whole")]
    assert names[0].read_bytes() == names[1].read_bytes()
    assert {p.name for p in tmp_path.iterdir()} == {"model", "train.txt", "whole", "out"}


def test_a_layer_that_no_token_reaches_is_saved_and_goes_on_too(tmp_path) -> None:
    """Such as an expert: Adam has nothing of it."""

    def with_a_spare() -> Any:
        model = small_llama()
        model.model.layers[0].mlp.spare = torch.nn.Linear(32, 32)
        return model

    place_ = place(tmp_path / "work")
    with adapted(with_a_spare(), DROPPING, 0) as wrapped:
        trainer(wrapped, unfinished=place_, eval_steps=3).run()
    moment = place_.load()
    assert moment is not None and "exp_avg" in "".join(moment.optimizer)
    assert not any("spare" in name for name in moment.optimizer) and any("spare" in n for n in moment.adapter)
    with adapted(with_a_spare(), DROPPING, 0) as wrapped:
        again = trainer(wrapped, unfinished=place_, eval_steps=3)
        again._restore(moment)
        reached = [name for name, p in again.parameters.items() if again.optimizer.state.get(p)]
        assert reached and not any("spare" in name for name in reached)
