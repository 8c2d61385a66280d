"""What can be refused before long work begins: names, devices, files and folders, sizes."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from pyprune.config import PruneConfig
from pyprune.errors import PyPruneError, unknown_name
from pyprune.evaluation.loglikelihood import known_positions
from pyprune.stage_options import (
    AUTO,
    EvalConfig,
    ModelConfig,
    SaveConfig,
    ScoreConfig,
    SelectConfig,
    SourceConfig,
    Stage,
)

UNSAVED = "note: no output_dir: nothing will be saved"


@contextmanager
def renamed(**options: str) -> Iterator[None]:
    """Errors about a stage's argument, named after the option that the user gave: ``renamed(folder="output_dir")``."""
    try:
        yield
    except PyPruneError as error:
        if error.option not in options:
            raise
        raise PyPruneError(options[error.option], error.value, error.problem, error.hint) from error


def named(model_name_or_path: str | None) -> str:
    """Raises PyPruneError: no model is given."""
    if model_name_or_path is None:
        raise PyPruneError("model_name_or_path", None, "no model is given", "Name a folder or a model on the hub.")
    return model_name_or_path


_LOSS = "group_fisher"  # reads what any criterion reads that method best may settle


def check_request(recipe: PruneConfig) -> None:
    """Something says how much goes, names are known, texts are there, and the output may be written."""
    from pyprune.layer_removal import check, cuts_widths

    asked = recipe.select
    sized, by_depth = cuts_widths(asked), recipe.depth.remove_layers is not None
    if not sized and not by_depth:
        hint = "Give ratio, target_params, widths or remove_layers."
        raise PyPruneError("ratio", None, "nothing says how much to remove", hint)
    if by_depth:
        check(recipe)
        _need_text(recipe.calibration.calibration, "layers are chosen on text", "Give a text.", recipe.score.cache)
    _check_names(recipe)
    check_budget(recipe)
    check_search(recipe)
    check_basis(recipe)
    _check_output(recipe)
    if asked.scores_file is None and sized:
        check_scoring(recipe.score, recipe.calibration.calibration)
    elif asked.scores_file is not None and asked.iterative_steps > 1:
        problem = "scores are made anew in every step, so they cannot come from a file"
        raise PyPruneError("iterative_steps", asked.iterative_steps, problem, "Leave scores_file out, or use 1.")
    _check_depth(recipe)
    _check_shares(recipe)
    _check_compensation(recipe)
    check_evaluation(recipe.evaluation)
    if recipe.calibration.calibration is None:
        ways = [n for n in vars(recipe.calibration) if n not in ("calibration", "seed")]
        check_effect(recipe.calibration, "calibration", ways)


def _need_text(calibration: Any, why: str, hint: str, cache: str | None = None) -> None:
    """There is a text, because of ``why``, and what is measured on it can be kept in ``cache``."""
    from pyprune.importance.cache import check_folder

    if calibration is None:
        raise PyPruneError("calibration", None, f"is missing, and {why}", hint)
    check_source("calibration", calibration)
    if cache is not None:
        check_folder(cache)


def _check_names(recipe: PruneConfig) -> None:
    """The allocation is known, and method best is asked for where something is left to it."""
    from pyprune.selection.select import ALLOCATIONS

    asked = recipe.select
    for option, value, kind in (
        ("allocation", asked.allocation, "an allocation"),
        ("allocation_criterion", asked.allocation_criterion, "a criterion"),
        ("compensation_criterion", recipe.compensate.compensation_criterion, "a criterion"),
    ):
        if value == AUTO and asked.method != "best":
            hint = f"Give method best, or name {kind}."
            raise PyPruneError(option, AUTO, "is what method best settles, and it is not asked for", hint)
    if asked.allocation not in (AUTO, *ALLOCATIONS):
        raise unknown_name("allocation", asked.allocation, ALLOCATIONS)


def _check_output(recipe: PruneConfig) -> None:
    """The cut goes with the profile, and the folder may be written and holds nothing that is read or kept."""
    from pyprune.checkpoint.atomic import check_target

    if recipe.save.profile is not None:
        hold_to_profile(recipe.select, recipe.save.profile)
    if recipe.save.output_dir is None:
        return
    check_apart(
        recipe.save.output_dir,
        read={
            "model_name_or_path": recipe.model.model_name_or_path,
            "calibration": recipe.calibration.calibration,
            "eval_text": recipe.evaluation.eval_text,
            "scores_file": recipe.select.scores_file,
            "prompts": recipe.page.prompts,
        },
        kept={"cache": recipe.score.cache, "search_file": recipe.search.search_file},
    )
    with renamed(folder="output_dir"):
        check_target(recipe.save.output_dir, recipe.save.overwrite)


def _check_depth(recipe: PruneConfig) -> None:
    """Nothing is said of layers that are not removed."""
    for name, default in (("layer_part", "layer"), ("layer_criterion", "block_influence")):
        value = getattr(recipe.depth, name)
        if recipe.depth.remove_layers is None and value != default:
            hint = "Say how many with remove_layers, or leave it out."
            raise PyPruneError(name, value, "says what goes of layers, and none are removed", hint)


def _check_shares(recipe: PruneConfig) -> None:
    """A criterion by which layers share out what goes is one that the allocation reads, and has its text."""
    from pyprune.selection.select import ALLOCATIONS

    asked = recipe.select
    if asked.allocation_tokens is not None and asked.allocation_criterion is None:
        hint = "Name allocation_criterion too, or use score_tokens."
        raise PyPruneError("allocation_tokens", asked.allocation_tokens, "is for a criterion that is not named", hint)
    if asked.allocation_criterion not in (None, AUTO) and asked.allocation != AUTO:
        if not ALLOCATIONS[asked.allocation].scored:
            problem = f"says how much each layer loses, and allocation {asked.allocation} reads no scores for that"
            hint = "Use allocation knapsack or global, or leave it out."
            raise PyPruneError("allocation_criterion", asked.allocation_criterion, problem, hint)
    if asked.allocation_criterion is not None:
        named = _LOSS if asked.allocation_criterion == AUTO else asked.allocation_criterion
        check_scoring(replace(recipe.score, criterion=named, route=None), recipe.calibration.calibration)


def _check_compensation(recipe: PruneConfig) -> None:
    """Options of a compensation go together, and it has its text."""
    from pyprune.compensation.checks import check_scope

    how, settled = recipe.compensate, recipe.select.method != "best"
    none = how.compensation == "none"
    if settled:
        check_scope(how.compensation_scope, how.compensation, how.compensation_target)
    if how.compensation_gains and none and settled:
        problem = "are fitted behind a compensation, and there is none"
        raise PyPruneError("compensation_gains", True, problem, "Give compensation too, or leave it out.")
    if not none:
        why = f"compensation {how.compensation} is fitted on text"
        _need_text(recipe.calibration.calibration, why, "Give a text, or use compensation none.", recipe.score.cache)
    judge = how.compensation_criterion
    if judge not in ("none", AUTO):
        if how.compensation != "obs":
            problem = "has a say in which units go, and only compensation obs chooses them anew"
            raise PyPruneError("compensation_criterion", judge, problem, "Use compensation obs, or leave it out.")
        check_scoring(replace(recipe.score, criterion=judge, route=None), recipe.calibration.calibration)
    if how.cache_limit is not None:
        for name, missing in (("cache", recipe.score.cache is None), ("compensation", none and settled)):
            if missing:
                problem = f"bounds what compensation keeps in a cache folder, and there is no {name}"
                raise PyPruneError("cache_limit", how.cache_limit, problem, f"Give {name} too, or leave it out.")


def check_evaluation(config: EvalConfig) -> None:
    """The text is there, and nothing is said of one that is not given."""
    check_source("eval_text", config.eval_text)
    if config.eval_text is None:
        check_effect(config, "eval_text", [n for n in vars(config) if n.startswith("eval_") or n == "protocol"])


def check_effect(config: Stage, missing: str, options: Sequence[str]) -> None:
    """Raises PyPruneError: one of ``options`` says how something is done with ``missing``, which is not given."""
    for name in options:
        value = getattr(config, name)
        if value != getattr(type(config)(), name):
            problem = f"is for option {missing}, which is not given"
            raise PyPruneError(name, value, problem, f"Give {missing} too, or leave it out.")


def check_apart(output_dir: str | Path, read: Mapping[str, Any], kept: Mapping[str, Any]) -> None:
    """Nothing that is read or kept is or lies in the output folder, which is made whole in the end, and replaced whole.

    Args:
        read: option -> its value, or a list of values; those that name nothing on the disk do not matter.
        kept: option -> a file or folder that is written on the way, or None.

    Raises:
        PyPruneError: something is or does.
    """
    target = Path(output_dir).expanduser().resolve()
    for option, value in (*read.items(), *kept.items()):
        for one in value if isinstance(value, list | tuple) else (value,):
            if not isinstance(one, str | Path):
                continue
            path = Path(one).expanduser().resolve()
            if path.is_relative_to(target) and (option in kept or path.exists()):
                lies = "is" if path == target else "lies in"
                hint = "Name another place for one of them."
                raise PyPruneError(option, str(one), f"{lies} the output folder, {output_dir}", hint)


def check_budget(recipe: PruneConfig) -> None:
    """A budget other than parameters has a ratio that is of it, and goes with the other options."""
    asked = recipe.select
    if asked.budget_length is not None and asked.budget != "memory":
        problem = f"is of the KV cache, and the budget is {asked.budget}"
        raise PyPruneError("budget_length", asked.budget_length, problem, "Use budget memory, or leave it out.")
    if asked.budget == "parameters":
        return
    if asked.ratio is None:
        raise PyPruneError("budget", asked.budget, "is what a ratio is of, and none is given", "Give ratio.")
    for name, given in (
        ("stream", recipe.streaming.stream), ("remove_layers", recipe.depth.remove_layers is not None),
        ("iterative_steps", asked.iterative_steps > 1),
    ):  # fmt: skip
        if given:
            hint = "Use budget parameters, or leave the other out."
            raise PyPruneError("budget", asked.budget, f"does not go with {name}, which counts parameters", hint)


def check_basis(recipe: PruneConfig) -> None:
    """Another basis of values is for cuts of them, found on text, in a model that is in memory."""
    value, asked = recipe.basis.value_basis, recipe.select
    if value == "own":
        return
    if recipe.streaming.stream:
        problem = "runs the model on text, and stream has one layer of it in memory"
        raise PyPruneError("value_basis", value, problem, "Leave stream out, or use own.")
    if asked.scores_file is not None:
        problem = "makes other units than those that a file has scores of"
        raise PyPruneError("value_basis", value, problem, "Leave scores_file out, or use own.")
    if "vo_dim" not in (*(asked.roles or ()), *(asked.widths or ())):
        raise PyPruneError("value_basis", value, "is for role vo_dim, which is not cut", "Add it to roles, or use own.")
    why, hint = f"value_basis {value} is found on text", "Give a text, or use value_basis own."
    _need_text(recipe.calibration.calibration, why, hint)


def check_search(recipe: PruneConfig) -> None:
    """An allocation on the model has text to measure on and goes with the other options; those of the search are for no
    other allocation."""
    from pyprune import schedule
    from pyprune.selection.searched import ON_MODEL

    options, name = recipe.search, recipe.select.allocation
    if name != "search":
        for option, value in vars(options).items():
            if value is not None:
                problem = "is for allocation search, which is not asked for"
                raise PyPruneError(option, value, problem, "Give allocation search too, or leave it out.")
    if name not in ON_MODEL:
        return
    if recipe.streaming.stream:
        problem = "runs the whole model many times, and stream has one layer of it in memory"
        raise PyPruneError("allocation", name, problem, "Leave stream out, or use knapsack or log_depth.")
    if recipe.select.iterative_steps > 1:
        problem = f"does not go with allocation {name}, which measures the whole cut"
        raise PyPruneError("iterative_steps", recipe.select.iterative_steps, problem, "Leave one of them out.")
    why, hint = f"allocation {name} measures on text", "Give a text, or use another allocation."
    _need_text(recipe.calibration.calibration, why, hint)
    file = schedule.search_file(recipe) if name == "search" else None
    if file is not None and (file.is_dir() or not os.access(_existing_parent(file), os.W_OK)):
        raise PyPruneError("search_file", str(file), "cannot be written", "Name a file in a folder that is there.")


def _existing_parent(file: Path) -> Path:
    """The folder of ``file``; where it will be made, the nearest one that is there."""
    return next(p for p in file.absolute().parents if p.exists())


def hold_to_profile(asked: SelectConfig, profile: str) -> None:
    """Changes a request, in place, so that what comes of it fits the profile, where the user left that open.

    Raises:
        PyPruneError: what was asked contradicts the profile; or its library is missing.
    """
    from pyprune.checkpoint.profiles import get_profile
    from pyprune.selection.select import ALLOCATIONS

    module = get_profile(profile)
    hint = "Choose another profile: gguf and hetero-hf hold different widths in different layers."
    allocation = ALLOCATIONS.get(asked.allocation)  # an unknown name is refused where names are checked
    if module.EVEN and allocation is not None and allocation.by_layer:
        problem = f"gives layers different widths, which profile {profile} does not hold"
        raise PyPruneError("allocation", asked.allocation, problem, f"Use uniform. {hint}")
    sized = asked.ratio is not None or asked.target_params is not None
    inside = [
        role for role in (*((asked.roles or ("ffn",)) if sized else ()), *(asked.widths or ())) if role != "layers"
    ]
    if module.EVEN and asked.layers is not None and inside:
        raise PyPruneError("layers", asked.layers, f"would differ from the others, and profile {profile} is even", hint)
    if module.ROLES is None:
        return
    for option, roles in (("roles", asked.roles), ("widths", asked.widths)):
        for role in roles or ():
            if role not in module.ROLES:
                problem = f"is cut, and profile {profile} holds cuts of {', '.join(module.ROLES)} only"
                raise PyPruneError(option, role, problem, "Leave it out, or choose another profile.")
    if sized and asked.roles is None and "kv_heads" not in module.ROLES:
        asked.roles = ("ffn",)
    for role, step in module.ROUND_TO.items():
        _hold_rounding(asked, profile, role, step)


def _hold_rounding(asked: SelectConfig, profile: str, role: str, step: int) -> None:
    given = asked.round_to
    own = given.get(role) if isinstance(given, dict) else given
    if own is not None and own % step:
        near = -(-own // step) * step
        problem = f"is no multiple of {step}, in which profile {profile} wants {role}"
        raise PyPruneError("round_to", own, problem, f"Use {near}, or leave it out.")
    sized = asked.ratio is not None or asked.target_params is not None
    if (sized and role in (asked.roles or ())) or role in (asked.widths or {}):
        asked.round_to = {**(given if isinstance(given, dict) else {}), role: own or step}


def check_scoring(config: ScoreConfig, calibration: Any) -> None:
    """Criterion, aggregation and route exist, and there is calibration where the criterion reads it."""
    from pyprune.importance.aggregation import check_aggregation
    from pyprune.importance.cache import check_folder
    from pyprune.importance.scoring import check_route, get_criterion

    if config.cache is not None:
        check_folder(config.cache)
    check_aggregation(config.aggregation)
    check_route(config.route, get_criterion(config.criterion))
    if needs_batches(config):
        why = f"criterion {config.criterion} is measured on text"
        _need_text(calibration, why, "Give a text, or use criterion l1, l2 or random.")


def needs_batches(config: ScoreConfig) -> bool:
    """Whether the criterion reads calibration batches.

    Raises:
        PyPruneError: there is no such criterion.
    """
    from pyprune.importance.scoring import get_criterion

    return get_criterion(config.criterion).calibrated


def check_source(option: str, source: Any) -> None:
    """A source that is given by name is a file that is there, or may be a data set."""
    from pyprune.importance.sources import kind_of

    if isinstance(source, str):
        kind_of(source, option)


def check_object(model: Any, config: ModelConfig) -> None:
    """A model that came as an object is a causal LM, and nothing is asked that only opening one could do."""
    for name, value in vars(config).items():
        if value != getattr(ModelConfig(), name):
            problem = "is for a model that is opened by its name, and this one came as an object"
            raise PyPruneError(name, value, problem, "Leave it out.")
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if head is None:
        hint = "Pass a causal language model, as AutoModelForCausalLM opens it."
        raise PyPruneError("model", type(model).__name__, "has no causal language-model head", hint)


def check_model(name: str, option: str = "model_name_or_path") -> None:
    """A model that is named by a path is a checkpoint there."""
    from pyprune.checkpoint.files import check_folder
    from pyprune.checkpoint.load import looks_like_a_path

    path = Path(name)
    if path.is_dir():
        with renamed(model_name_or_path=option):
            check_folder(path)
    elif not path.exists() and looks_like_a_path(name):
        raise PyPruneError(option, name, "does not exist", "Check the path; it is read from the working directory.")


def check_windows(config: EvalConfig, model: SourceConfig) -> None:
    """A model that is named has a configuration, and evaluation windows are no longer than the positions in it."""
    from pyprune.checkpoint.load import open_config

    name = str(model.model_name_or_path)
    if Path(name).suffix == ".gguf":  # its configuration comes with its weights
        return
    found = open_config(name, model.trust_remote_code)
    if config.eval_text is not None:
        check_length("eval_length", config.eval_length, SimpleNamespace(config=found))


def check_length(option: str, length: int, model: Any) -> None:
    """Sequences are no longer than the positions that the model knows."""
    known = known_positions(model)
    if known is not None and known < length:
        raise PyPruneError(option, length, f"is more than the {known} positions that the model knows", f"Use {known}.")


def device(name: str) -> str:
    """The device that an option's value means on this machine.

    Raises:
        PyPruneError: the device is not there.
    """
    import torch

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        return "cuda" if gpus else "cpu"
    if name.startswith("cuda") and int(name.partition(":")[2] or 0) >= gpus:
        problem = f"there are {gpus} CUDA devices" if gpus else "there is no usable CUDA device"
        raise PyPruneError("device", name, problem, "Use cpu, or see what `pyprune env` finds.")
    return name


def check_space(config: SaveConfig, parameters: int, model: Any) -> None:
    """The disk has room for a model of ``parameters`` parameters in the type that ``model`` has."""
    from pyprune.checkpoint.atomic import OTHER_FILES
    from pyprune.checkpoint.atomic import check_space as check

    if config.output_dir is not None:
        width = next(model.parameters()).element_size()
        with renamed(folder="output_dir"):
            check(Path(config.output_dir).absolute(), parameters * width + OTHER_FILES)
