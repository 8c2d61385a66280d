"""A run that was cut short goes on, and leaves nothing half-done behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from helpers_run import ROOT
from safetensors.torch import load_file

from pyprune.errors import PyPruneError
from pyprune.runs.record import Record, alone
from pyprune.runs.stages import Evaluate, Export, Recover


class Killed(BaseException):
    pass


def entry(place, stage: str) -> dict:
    return json.loads((place / "work/run.json").read_text())["stages"][stage]


def test_after_a_kill_between_stages_the_finished_ones_stay(place, monkeypatch) -> None:
    def killed(self, resume: bool) -> str:
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(Recover, "execute", killed)
        with pytest.raises(Killed):
            place.go()
    assert entry(place, "prune")["done"] and not entry(place, "recover")["done"]
    before = (place / "work/pruned/model.safetensors").stat().st_mtime_ns
    assert place.why()["recover"] == "was interrupted"
    assert place.go(until="recover") == {
        "prune": "up to date", "recover": "go on", "eval": "left out", "export": "left out", "report": "left out",
    }  # fmt: skip
    assert (place / "work/pruned/model.safetensors").stat().st_mtime_ns == before


def test_a_training_that_was_killed_goes_on_and_ends_as_if_it_had_not_been(finished, monkeypatch) -> None:
    from pyprune.recovery.train import Trainer

    finished.recipe["recover"] |= {"epochs": 1.0, "eval_steps": 2, "early_stopping_patience": 0}
    steps, real = [], Trainer._step

    def step(self, progress):
        if len(steps) == 5:
            raise Killed
        steps.append(1)
        return real(self, progress)

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "_step", step)
        with pytest.raises(Killed):
            finished.go(until="recover")
    assert list((finished / "work/recovered.unfinished").glob("step-*"))
    steps.clear()

    def counted(self, progress):
        steps.append(1)
        return real(self, progress)

    monkeypatch.setattr(Trainer, "_step", counted)
    assert finished.go(until="recover")["recover"] == "go on"
    continued = len(steps)
    one = load_file(finished / "work/recovered/model.safetensors")
    assert not (finished / "work/recovered.unfinished").exists()
    steps.clear()
    assert finished.go(until="recover", force=["recover"])["recover"] == "run"
    assert 0 < continued < len(steps)
    other = load_file(finished / "work/recovered/model.safetensors")
    assert all((one[k] == other[k]).all() for k in other)


def test_a_killed_training_with_another_option_begins_anew(finished, monkeypatch) -> None:
    from pyprune.recovery.train import Trainer

    finished.recipe["recover"] |= {"epochs": 1.0, "eval_steps": 1}
    real = Trainer._step

    def step(self, progress):
        if self.history.step == 3:
            raise Killed
        return real(self, progress)

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "_step", step)
        with pytest.raises(Killed):
            finished.go(until="recover")
    finished.recipe["recover"]["lora_r"] = 3
    assert finished.why()["recover"] == "was interrupted, option lora_r: 2 -> 3"
    assert finished.go(until="recover")["recover"] == "run"
    assert not (finished / "work/recovered.unfinished").exists()


def test_a_kill_between_the_output_and_its_record_runs_the_stage_again(place, monkeypatch) -> None:
    real = Record.put

    def put(self, stage, found, recipe):
        if found.done:
            raise Killed
        real(self, stage, found, recipe)

    with monkeypatch.context() as patched:
        patched.setattr(Record, "put", put)
        with pytest.raises(Killed):
            place.go(until="prune")
    assert (place / "work/pruned/model.safetensors").exists()
    assert place.go(until="prune")["prune"] == "go on"
    assert place.go(until="prune")["prune"] == "up to date"


def test_log_likelihoods_of_tasks_outlive_a_kill_and_not_a_force(finished, monkeypatch) -> None:
    from pyprune.evaluation.resume import Store

    lines = [{"context": f"{n} red", "choices": [" house", " river"], "label": n % 2} for n in range(6)]
    (finished / "t.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    finished.recipe["eval"] |= {"tasks": "t.jsonl", "task_batch_size": 2}
    added, real = [], Store.add

    def add(self, *what):
        if len(added) == limit:
            raise Killed
        added.append(what)
        real(self, *what)

    monkeypatch.setattr(Store, "add", add)
    limit = 8
    with pytest.raises(Killed):
        finished.go(until="eval")
    kept = len((finished / "work/eval/.likelihoods.jsonl").read_text().splitlines()) - 1
    assert 0 < kept <= 8
    added.clear()
    limit = 1000
    assert finished.go(until="eval")["eval"] == "go on"
    assert len(added) == 3 * 12 - kept
    added.clear()
    finished.go(until="eval", force=["eval"])
    assert len(added) == 3 * 12


def test_a_failed_stage_says_which_and_the_next_run_tries_it_again(finished, monkeypatch) -> None:
    finished.recipe["export"]["dtype"] = "float32"

    def refused(self, resume: bool) -> str:
        raise PyPruneError("output", "x", "cannot be written", "Free some space.")

    with monkeypatch.context() as patched:
        patched.setattr(Export, "execute", refused)
        with pytest.raises(PyPruneError, match=r"Free some space\. \(Stage export of run\.yaml\.\)"):
            finished.go()
    assert finished.go() == {
        "prune": "up to date", "recover": "up to date", "eval": "up to date", "export": "go on", "report": "up to date",
    }  # fmt: skip


def test_an_input_that_changes_while_an_earlier_stage_runs_is_noticed(finished, monkeypatch) -> None:
    real = Evaluate.execute

    def meddled(self, resume: bool) -> str:
        with (finished / "test.txt").open("a") as file:
            file.write("More.")
        return real(self, resume)

    finished.recipe["eval"]["eval_windows"] = 1
    with monkeypatch.context() as patched:
        patched.setattr(Evaluate, "execute", meddled)
        finished.go(until="eval")
    assert finished.why()["eval"] == "input eval_text test.txt: changed"


@pytest.mark.slow
def test_a_process_that_is_killed_leaves_a_work_folder_that_goes_on(place) -> None:
    place.recipe["recover"] |= {"epochs": 50, "eval_steps": 2, "early_stopping_patience": 0}
    place.write()
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "pyprune", "run", "run.yaml", "--quiet"], cwd=place.root, env=environment
    )
    try:
        end = time.monotonic() + 120
        while not list((place / "work").glob("recovered.unfinished/step-*")):
            assert process.poll() is None and time.monotonic() < end
            time.sleep(0.05)
        with pytest.raises(PyPruneError, match="another run works in it"), alone(place / "work"):
            pass
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert place.why(until="recover")["prune"] == "nothing changed"
    assert place.why(until="recover")["recover"] == "was interrupted"
    left = int(max(p.name for p in (place / "work").glob("recovered.unfinished/step-*"))[5:])
    from pyprune.recovery.unfinished import Unfinished

    assert left >= 2 and Unfinished(place / "work/recovered.unfinished", {}, None).exists()
