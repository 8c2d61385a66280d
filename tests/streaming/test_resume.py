"""A run that is killed goes on when it is started again, and ends with the same bytes."""

from __future__ import annotations

import random
import signal
from pathlib import Path

import pytest
import torch
from helpers_fresh import PACKAGE, pyprune_fresh, run_fresh
from helpers_streaming import contents

import pyprune
from pyprune.errors import PyPruneError
from pyprune.streaming import shards, workspace
from pyprune.streaming.disk import DiskModel
from pyprune.streaming.workspace import Workspace, workspace_path

KILLED = """
import os, signal, sys
from pyprune.streaming import shards, workspace
from pyprune.__main__ import main
left = int(sys.argv.pop(1))
before = workspace.put
def put(work, target):
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    before(work, target)
workspace.put = shards.put = put
sys.argv[0] = "pyprune"
main()
"""


def options(model: Path, text: Path, out: Path, **changes) -> dict:
    more = {
        "criterion": "param_second",
        "calibration": str(text),
        "samples": 3,
        "length": 32,
        "max_shard_size": "300KB",
    }
    return {"model": str(model), "ratio": 0.3, "stream": True, "output_dir": str(out), **more, **changes}


def written_by(given: dict, monkeypatch) -> int:
    """Run it, and count the files that it finished in its workspace."""
    count, before = 0, workspace.put

    def put(work, target):
        nonlocal count
        count += 1
        before(work, target)

    with monkeypatch.context() as patch:
        for module in (workspace, shards):
            patch.setattr(module, "put", put)
        pyprune.prune(**given)
    return count


class Stop(BaseException):
    """Like an interrupt."""


def stopped(given: dict, after: int, monkeypatch) -> None:
    """Run it until it has finished ``after`` files."""
    left, before = after, workspace.put

    def put(work, target):
        nonlocal left
        if left == 0:
            raise Stop
        left -= 1
        before(work, target)

    with monkeypatch.context() as patch:
        for module in (workspace, shards):
            patch.setattr(module, "put", put)
        with pytest.raises(Stop):
            pyprune.prune(**given)


@pytest.mark.slow
def test_sigkill_at_random_moments_and_a_rerun_give_the_same_bytes(sharded, text, tmp_path, monkeypatch) -> None:
    total = written_by(options(sharded, text, tmp_path / "whole"), monkeypatch)
    assert total > 25
    draw, out = random.Random(5), tmp_path / "resumed"
    flags = [str(sharded), "--quiet"]
    for name, value in options(sharded, text, out).items():
        flags += [] if name in ("model", "stream") else [f"--{name}", str(value)]
    for _ in range(2):
        left = str(draw.randint(2, total // 3))
        ended = run_fresh(KILLED, left, "prune", "--stream", *flags, cwd=tmp_path, path=(PACKAGE,))
        assert ended.status == -signal.SIGKILL, ended.err
        assert not out.exists() and workspace_path(out).is_dir()
    ended = pyprune_fresh("prune", "--stream", *flags, cwd=tmp_path)
    assert ended.status == 0, ended.err
    assert contents(out) == contents(tmp_path / "whole")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["resumed", "whole"]


@pytest.mark.slow
def test_an_interrupt_behind_any_file_and_a_rerun_give_the_same_bytes(sharded, text, tmp_path, monkeypatch) -> None:
    total = written_by(options(sharded, text, tmp_path / "whole", roles=["hidden"], round_to=8), monkeypatch)
    expected = contents(tmp_path / "whole")
    for after in range(1, total, 13):
        given = options(sharded, text, tmp_path / f"out{after}", roles=["hidden"], round_to=8)
        stopped(given, after, monkeypatch)
        left = written_by(given, monkeypatch)
        assert left <= total - after + 2 * 3 + 1, "finished layers were computed again"
        assert contents(tmp_path / f"out{after}") == expected


def test_finished_layers_are_not_read_again(sharded, text, tmp_path, monkeypatch) -> None:
    given = options(sharded, text, tmp_path / "out", criterion="l2", calibration=None, samples=None, length=None)
    stopped(given, 20, monkeypatch)
    done = {f.stem for f in (workspace_path(tmp_path / "out") / "sums").glob("*.safetensors")}
    assert len(done) == 19  # the first file is the settings
    reads: list[str] = []
    before = DiskModel.read

    def read(self, name, *more):
        reads.append(name)
        return before(self, name, *more)

    monkeypatch.setattr(DiskModel, "read", read)
    pyprune.prune(**given)
    everything = len(reads)
    reads.clear()
    pyprune.prune(
        **options(sharded, text, tmp_path / "other", criterion="l2", calibration=None, samples=None, length=None)
    )
    assert len(reads) - everything == 19


def test_other_settings_are_refused_with_their_names_and_overwrite_begins_anew(
    sharded, text, tmp_path, monkeypatch
) -> None:
    out = tmp_path / "out"
    stopped(options(sharded, text, out), 9, monkeypatch)
    other = options(sharded, text, out, ratio=0.2, samples=2)
    with pytest.raises(PyPruneError, match=r"other settings.*samples, ratio") as error:
        pyprune.prune(**other)
    assert error.value.option == "output_dir" and workspace_path(out).is_dir()
    pyprune.prune(**other, overwrite=True)
    pyprune.prune(**options(sharded, text, tmp_path / "plain", ratio=0.2, samples=2))
    assert contents(out) == contents(tmp_path / "plain")
    assert not workspace_path(out).exists()


def test_a_changed_text_counts_as_another_setting(sharded, text, tmp_path, monkeypatch) -> None:
    mine = tmp_path / "train.txt"
    mine.write_text(text.read_text())
    stopped(options(sharded, mine, tmp_path / "out"), 9, monkeypatch)
    mine.write_text(text.read_text()[5000:])
    with pytest.raises(PyPruneError, match="calibration differ"):
        pyprune.prune(**options(sharded, mine, tmp_path / "out"))


def test_two_processes_do_not_work_on_one_output(sharded, text, tmp_path) -> None:
    space = Workspace(tmp_path / "out", {})
    with pytest.raises(PyPruneError, match="another process"):
        pyprune.prune(**options(sharded, text, tmp_path / "out"))
    space.close()


def test_what_a_killed_save_left_is_cleared_away(sharded, text, tmp_path, monkeypatch) -> None:
    given = options(sharded, text, tmp_path / "out")
    stopped(given, 9, monkeypatch)
    (tmp_path / ".out.0123abcd.partial").mkdir()
    pyprune.prune(**given)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_process_that_begins_while_another_ends_has_a_workspace_of_its_own(tmp_path, monkeypatch) -> None:
    first, second = Workspace(tmp_path / "out", {"a": 1}), []
    first.save("sums/x", {"t": torch.ones(2)})
    real = workspace.shutil.rmtree

    def between(*given, **options):
        monkeypatch.setattr(workspace.shutil, "rmtree", real)
        second.append(Workspace(tmp_path / "out", {"a": 1}))
        real(*given, **options)

    monkeypatch.setattr(workspace.shutil, "rmtree", between)
    first.remove()
    assert not second[0].resumed and not second[0].has("sums/x")
    second[0].save("sums/x", {"t": torch.zeros(2)})
    assert second[0].load("sums/x")["t"].tolist() == [0, 0]
    second[0].remove()
    assert list(tmp_path.iterdir()) == []
