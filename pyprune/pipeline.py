"""The whole line: discover, score, select, compensate, apply, measure, save. The only file that sees every stage.

Everything that can be refused is refused before scoring begins: options, names, texts and their length, the output
folder, the disk's room, and whether the size asked for can be reached at all.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from pyprune import layer_removal, method, preflight
from pyprune.basis import Rebased, change_basis
from pyprune.checkpoint.load import check_finite, open_model
from pyprune.checkpoint.outline import open_outline
from pyprune.checkpoint.profiles import check_fits, save_as
from pyprune.checkpoint.save import save
from pyprune.compensation.cache import LIMIT, Folder
from pyprune.compensation.checks import check_plan, check_samples, judged_roles
from pyprune.compensation.gains import fit_gains, reference
from pyprune.compensation.stage import Compensation, compensate
from pyprune.config import InspectConfig, PruneConfig, ScoringConfig
from pyprune.discovery.discover import discover
from pyprune.discovery.groups import Groups
from pyprune.errors import PyPruneError
from pyprune.evaluation.generation import continuation, paired_samples
from pyprune.evaluation.loglikelihood import known_positions
from pyprune.evaluation.overlap import overlap_notes
from pyprune.evaluation.perplexity import perplexity
from pyprune.evaluation.stages import Stages
from pyprune.importance.cache import cached
from pyprune.importance.calibration import SCORE_LENGTH, Calibration, check_vocabulary, first_tokens, load_calibration
from pyprune.importance.scores import Scores
from pyprune.importance.scoring import score
from pyprune.report.data import Report, versions
from pyprune.report_pipeline import add_page, ask
from pyprune.schedule import search_options
from pyprune.search.plan import check_roles, search_plan
from pyprune.search.plan import check_samples as check_search_samples
from pyprune.selection.compose import compose
from pyprune.selection.plan import Plan
from pyprune.selection.requests import parse_layers
from pyprune.selection.scope import layer_count, roles_to_share
from pyprune.selection.searched import ON_MODEL
from pyprune.selection.select import goal_of, select
from pyprune.stage_options import AUTO, CalibrationConfig, EvalConfig, ModelConfig, ScoreConfig
from pyprune.streaming.run import prune_from_disk
from pyprune.surgery.apply import apply
from pyprune.surgery.skeleton import is_stock
from pyprune.trial import first_that_fits


@dataclass
class PruneResult:
    """What :func:`prune` gives.

    Attributes:
        model: the smaller model, of the same class; None with ``stream``, which leaves it on disk.
        tokenizer: as given or opened; None without one.
        groups: what is coupled in the dense model.
        scores: of the dense model, for the roles and layers that could be cut; with ``remove_layers`` of the model that
            it leaves, or, when nothing else goes, what each layer is worth.
        plan: over the dense model's groups, also when it was made in several steps.
        report: what was asked and measured.
        recipe: every option.
    """

    model: Any
    tokenizer: Any
    groups: Groups
    scores: Scores
    plan: Plan
    report: Report
    recipe: PruneConfig


@dataclass
class _Dense:
    """The model to start from. ``mine`` when it was opened here, so that nobody else holds it."""

    model: Any
    tokenizer: Any
    name: str
    weights_bytes: int
    mine: bool


def prune(
    model: Any, *, tokenizer: Any = None, config: str | Path | None = None, copy: bool = False, **options: Any
) -> PruneResult:
    """Prune a causal language model: the whole line.

        out = pyprune.prune("folder", ratio=0.2, calibration="train.txt", eval_text="test.txt", output_dir="smaller")
        out = pyprune.prune(model, ratio=0.2, calibration=token_ids)  # int64 [samples, length]

    Args:
        model: a folder, a hub name, or a transformers model. **A model's weights are used up**: they move to the
            smaller one.
        tokenizer: for texts, when ``model`` is an object.
        config: a YAML recipe; ``options`` win over it.
        copy: leave a model object as it is, at the price of memory for both.
        options: those of ``pyprune prune --help`` under the same names: ``ratio``, ``target_params``, ``widths``,
            ``criterion``, ``calibration``, ``samples``, ``length``, ``allocation``, ``roles``, ``layers``,
            ``iterative_steps``, ``eval_text``, ``output_dir``, ... Here ``calibration`` is also token ids or any
            iterable of batches, and ``eval_text`` also token ids.

    Returns:
        The smaller model, its plan and report; saved too when ``output_dir`` is given.

    Raises:
        PyPruneError: an option that does not exist or cannot be met, or an input that cannot be used. Nothing is left
            behind.
    """
    named = isinstance(model, (str, Path))
    recipe = PruneConfig.build({**options, "model_name_or_path": model} if named else options, config)
    return run(recipe, None if named else model, tokenizer, copy)


def run(recipe: PruneConfig, model: Any = None, tokenizer: Any = None, copy: bool = False) -> PruneResult:
    """:func:`prune` with its options gathered in a recipe."""
    recipe = method.for_profile(recipe)
    if recipe.streaming.stream:
        streamed = PruneResult(None, *prune_from_disk(recipe, model, tokenizer), recipe)
        if recipe.page.report:
            add_page(str(recipe.save.output_dir), streamed.groups, streamed.scores, streamed.plan)
        return streamed
    preflight.check_request(recipe)
    by_depth = recipe.depth.remove_layers is not None
    stages = Stages()
    dense = _open(recipe.model, stages, model, tokenizer)
    ready = None if recipe.select.scores_file is None else preflight.read_scores(recipe.select.scores_file)
    with stages("read text"):
        batches = None
        if _reads_batches(recipe, scored=ready is None):
            batches = _calibration(recipe.calibration, dense)
        windows, text = preflight.windows(recipe.evaluation, dense.model, dense.tokenizer)
    with stages("discover"):
        groups = _groups(dense.model)
        ways = method.ways(recipe, groups, 0 if batches is None else batches.samples)
        settled, asked, trial, smallest = first_that_fits(ways, dense.model, groups, batches, ready)
        method.tell(recipe, settled)
        recipe = settled
        if batches is not None and recipe.select.allocation in ON_MODEL:
            check_roles([r for r in trial.details["roles"] if r not in ("layers", "sublayers")])
            check_search_samples(batches)
        if batches is not None and recipe.compensate.compensation != "none":
            check_plan(layer_removal.inside(trial) if by_depth else trial, recipe.compensate.compensation)
            check_samples(batches, recipe.compensate.compensation, recipe.compensate.compensation_gains)
        recipe = method.for_saving(recipe, smallest)
        if recipe.save.profile is not None:
            check_fits(recipe.save.profile, smallest, dense.tokenizer)
        preflight.check_space(recipe.save, trial.details["achieved"]["with_embeddings"]["after"], dense.model)
    prompts = preflight.prompts(recipe, dense.tokenizer)
    roles, layers = trial.details["roles"], trial.details["layers"]
    chooses = recipe.compensate.compensation == "obs"
    said = recipe.compensate.compensation_criterion
    judge = _second(recipe, said) if chooses and said != "none" else None
    if judge is not None:
        judged_roles(roles, said)
    before = _measure(dense.model, dense, recipe.evaluation, windows, text, stages, " before")
    before["samples"] = ask(dense.model, dense.tokenizer, prompts, recipe, stages, " before")
    prompts = prompts[: len(before["samples"])]

    sums = None if recipe.score.cache is None else Folder(Path(recipe.score.cache))
    dense_says = None
    if batches is not None and recipe.compensate.compensation_gains:
        with stages("ask the dense model", bar=False):
            dense_says = reference(dense.model, batches, sums, _limit(recipe))

    first: Scores | None = None
    depth: dict[str, Any] | None = None
    costs = _second(recipe, recipe.select.allocation_criterion)
    plan, smaller, now = Plan(), dense.model, groups
    made: list[Compensation] = []
    if dense.mine:
        dense.model = None
    if by_depth:
        with stages("choose layers", bar=False):
            plan, first = layer_removal.choose(smaller, groups, batches, recipe)
        removed = {k: plan.details[k] for k in ("layer_part", "removed_layers")}
        depth = layer_removal.summary(recipe.depth, plan)
        with stages("remove layers"):
            smaller = apply(smaller, plan, copy=copy)
            if dense.mine:
                _leave_file(smaller)
            now = _groups(smaller)
            asked, roles, layers = layer_removal.requests_after(recipe.select, groups, plan, now)
    fresh = not by_depth  # whether `smaller` is still the dense model
    rebased: Rebased | None = None
    if recipe.basis.value_basis == "principal" and batches is not None:
        with stages("change basis", bar=False):
            if copy and fresh:
                smaller, copy = deepcopy(smaller), False
            chosen = now.prunable(roles, layers)
            rebased = change_basis(smaller, chosen, batches, token_weighting=recipe.score.token_weights)
    for number, request in enumerate(asked, start=1):
        step = f" {number} of {len(asked)}" if len(asked) > 1 else ""
        if number > 1:
            with stages("discover" + step):
                now = _groups(smaller)
        with stages("score" + step, bar=False):
            scores = ready if ready is not None else _score(smaller, now, batches, recipe, roles, layers)
        shares = None
        if costs is not None:
            with stages("score for allocation" + step, bar=False):
                shares = _score(smaller, now, batches, recipe, roles, layers, costs)
        worth = None
        if judge is not None:
            with stages("score for choice" + step, bar=False):
                heard = judged_roles(roles, said)
                worth = shares if judge == costs else None
                worth = worth or _score(smaller, now, batches, recipe, heard, layers, judge)
                worth = worth.among(g.name for g in now.prunable(heard, layers))
        # Which units stand for a width before compensation chooses them anew.
        order = scores
        if worth is not None:
            order, shares = scores.weighed(worth), scores if shares is None else shares
        if recipe.select.allocation in ON_MODEL:
            with stages("search" if recipe.select.allocation == "search" else "measure widths", bar=False):
                file = preflight.search_file(recipe) if recipe.select.allocation == "search" else None
                cut = search_plan(
                    smaller,
                    now,
                    order,
                    batches,
                    **search_options(recipe, request),
                    allocation_scores=shares,
                    file=file,
                )
        else:
            with stages("select" + step):
                cut = select(now, order, **request, allocation_scores=shares)
        if batches is not None and recipe.compensate.compensation != "none" and cut.cuts:
            with stages("compensate" + step, bar=False):
                if copy and number == 1 and fresh:
                    smaller = deepcopy(smaller)
                made.append(_compensate(smaller, cut, batches, recipe, worth, sums))
                cut = made[-1].plan
        with stages("prune" + step):
            smaller = apply(smaller, cut, copy=copy and number == 1 and fresh and not made)
            plan = cut if number == 1 and fresh else compose(groups, plan, cut)
            if dense.mine and number == 1 and fresh:
                _leave_file(smaller)
        first = scores if number == 1 else first
    if dense_says is not None and made:
        with stages("fit gains", bar=False):
            made[-1].gains = found = fit_gains(smaller, dense_says, sums, _limit(recipe))
            made[-1].notes += [] if found.note is None else [found.note]
    assert first is not None
    wanted = recipe.to_dict()
    plan.details["asked"] = {k: wanted[k] for k in ("ratio", "target_params", "widths", "iterative_steps")}
    if by_depth:
        plan.details |= removed
    if "steps" in plan.details and (recipe.select.ratio or recipe.select.target_params) is not None:
        found = plan.details["achieved"]["with_embeddings" if recipe.select.count_embeddings else "without_embeddings"]
        goal = goal_of(recipe.select.ratio, recipe.select.target_params, found["before"])
        plan.details["notes"] += goal.missed_by(found["after"])

    after = _measure(smaller, dense, recipe.evaluation, windows, text, stages, " after")
    after["samples"] = ask(smaller, dense.tokenizer, prompts, recipe, stages, " after")
    report = Report(
        model=dense.name,
        model_class=type(smaller).__name__,
        parameters=plan.details["achieved"],
        weights_bytes={"before": dense.weights_bytes, "after": _tensor_bytes(smaller)},
        perplexity=_paired(before, after, "perplexity"),
        continuation=_paired(before, after, "continuation", prompt=recipe.evaluation.prompt),
        samples=paired_samples(prompts, before["samples"], after["samples"]),
        stages=stages.to_list(),
        plan=plan.details,
        scores={"criterion": first.criterion, **first.details},
        depth=depth,
        basis=None if rebased is None else rebased.to_dict(),
        compensation=[c.to_dict() for c in made] or None,
        recipe=recipe.to_dict(),
        versions=versions(),
        warnings=[
            *groups.warnings,
            *overlap_notes(recipe.calibration.calibration, batches, recipe.evaluation.eval_text, windows),
            *plan.details["notes"],
            *([] if rebased is None else rebased.notes),
            *(n for c in made for n in c.notes),
            *_how_to_open(smaller, recipe.save.profile),
        ],
    )
    if recipe.save.output_dir is not None:
        _save(smaller, dense.tokenizer, plan, report, recipe, stages)
        if recipe.page.report:
            add_page(recipe.save.output_dir, groups, first, plan)
        if recipe.select.allocation == "search":
            preflight.forget_search(recipe)
    return PruneResult(smaller, dense.tokenizer, groups, first, plan, report, recipe)


def inspect_model(recipe: InspectConfig) -> tuple[str, Groups]:
    """Class name and groups of a model; only its configuration is read."""
    model = open_outline(_name(recipe.model.model_name_or_path), recipe.model.trust_remote_code)
    return type(model).__name__, _groups(model)


def score_model(recipe: ScoringConfig, model: Any = None, tokenizer: Any = None) -> tuple[Groups, Scores]:
    """Groups and scores of a model; the scores are saved too when ``output_file`` is given."""
    preflight.check_scoring(recipe.score, recipe.calibration.calibration)
    preflight.check_file(recipe.save)
    stages = Stages()
    dense = _open(recipe.model, stages, model, tokenizer)
    with stages("read text"):
        batches = _calibration(recipe.calibration, dense) if preflight.needs_batches(recipe.score) else None
    with stages("discover"):
        groups = _groups(dense.model)
        roles = roles_to_share(groups, recipe.scope.roles, ())
        layers = None if recipe.scope.layers is None else parse_layers(recipe.scope.layers, layer_count(groups))
    with stages("score", bar=False):
        scores = _score(dense.model, groups, batches, recipe, roles, layers)
    if recipe.save.output_file is not None:
        preflight.write_scores(scores, recipe.save.output_file)
    return groups, scores


def _groups(model: Any) -> Groups:
    """The model's groups. Surgery carries position-dependent slopes (ALiBi) over to the heads that stay."""
    return discover(model).thaw(("kv_heads", "query_heads"))


def _name(model_name_or_path: str | None) -> str:
    if model_name_or_path is None:
        raise PyPruneError("model_name_or_path", None, "no model is given", "Name a folder or a model on the hub.")
    return model_name_or_path


def _open(config: ModelConfig, stages: Stages, model: Any, tokenizer: Any) -> _Dense:
    if model is None:
        name = _name(config.model_name_or_path)
        device = preflight.device(config.device)
        with stages("load"):
            model, own = open_model(name, config.dtype, None if device == "cpu" else device, config.trust_remote_code)
        found = sum(f.stat().st_size for f in Path(name).glob("*.safetensors"))
        return _Dense(model, own if tokenizer is None else tokenizer, name, found or _tensor_bytes(model), mine=True)
    preflight.check_object(model, config)
    name = getattr(model, "name_or_path", "") or type(model).__name__
    check_finite(model, name)
    return _Dense(model, tokenizer, name, _tensor_bytes(model), mine=False)


def _calibration(calibration: CalibrationConfig, dense: _Dense) -> Calibration:
    found = load_calibration(
        calibration.calibration, dense.tokenizer, samples=calibration.samples, length=calibration.length,
        batch_size=calibration.batch_size, seed=calibration.seed, field=calibration.text_field,
        longest=known_positions(dense.model), bos=calibration.bos,
    )  # fmt: skip
    preflight.check_length("length", found.length, dense.model)
    check_vocabulary(found, dense.model)
    return found


def _reads_batches(recipe: PruneConfig, scored: bool) -> bool:
    """Whether any stage reads calibration; ``scored``: criterion included."""
    second = recipe.select.allocation_criterion
    if second == AUTO:  # whichever it comes to
        return True
    asked = [recipe.score] * scored + ([] if second is None else [replace(recipe.score, criterion=second, route=None)])
    if recipe.depth.remove_layers is not None or recipe.compensate.compensation != "none":
        return True
    if recipe.basis.value_basis == "principal":
        return True
    return recipe.select.allocation in ON_MODEL or any(preflight.needs_batches(c) for c in asked)


def _score(
    model: Any, groups: Groups, batches: Calibration | None, recipe: Any, roles: list[str], layers: list[int] | None,
    config: ScoreConfig | None = None,
) -> Scores:  # fmt: skip
    config = config or recipe.score
    options: dict[str, Any] = {
        "criterion": config.criterion, "aggregation": config.aggregation, "route": config.route,
        "seed": recipe.calibration.seed, "activation_memory": config.activation_memory,
        "token_weights": config.token_weights,
    }  # fmt: skip
    read = batches if preflight.needs_batches(config) else None
    if read is not None and config.score_tokens is not None:
        read = first_tokens(read, config.score_tokens, SCORE_LENGTH)
    asked = {**options, "groups": [g.to_dict() for g in groups.prunable(roles, layers)]}
    return cached(
        config.cache, model, read, asked, lambda: score(model, groups, read, roles=roles, layers=layers, **options)
    )


def _second(recipe: PruneConfig, criterion: str | None) -> ScoreConfig | None:
    """How units are scored by a criterion beside the first; None without one."""
    if criterion is None:
        return None
    tokens = recipe.select.allocation_tokens or recipe.score.score_tokens
    return replace(recipe.score, criterion=criterion, route=None, score_tokens=tokens)


def _compensate(
    model: Any, plan: Plan, batches: Calibration, recipe: PruneConfig, worth: Scores | None, sums: Folder | None
) -> Compensation:
    config, scoring = recipe.compensate, recipe.score
    return compensate(
        model, plan, batches, config.compensation, token_weighting=scoring.token_weights,
        target=config.compensation_target, scope=config.compensation_scope, worth=worth, cache=sums,
        cache_limit=_limit(recipe),
    )  # fmt: skip


def _limit(recipe: PruneConfig) -> float:
    """GiB of sums in a cache folder."""
    return LIMIT if recipe.compensate.cache_limit is None else recipe.compensate.cache_limit


def _measure(
    model: Any, dense: _Dense, config: EvalConfig, windows: Tensor | None, text: str, stages: Stages, when: str
) -> dict[str, Any]:
    """{"perplexity": ..., "continuation": ...}, each None when it was not asked for."""
    out: dict[str, Any] = {"perplexity": None, "continuation": None}
    if windows is not None:
        with stages("perplexity" + when, bar=False):
            found = perplexity(
                model, windows, text=text, batch_size=config.eval_batch_size, label="perplexity" + when,
                protocol=config.protocol, prefix=preflight.window_prefix(config, dense.tokenizer),
            )  # fmt: skip
        out["perplexity"] = found.to_dict()
    if config.prompt is not None:
        with stages("generate" + when):
            out["continuation"] = continuation(model, dense.tokenizer, config.prompt, config.prompt_tokens)
    return out


def _paired(before: dict[str, Any], after: dict[str, Any], key: str, **more: Any) -> dict[str, Any] | None:
    return None if before[key] is None else {**more, "before": before[key], "after": after[key]}


def _save(model: Any, tokenizer: Any, plan: Plan, report: Report, recipe: PruneConfig, stages: Stages) -> None:
    """Save, and complete the report with what is known only afterwards: the files' size and the time it took."""
    target, plain = str(recipe.save.output_dir), recipe.to_dict()
    report.output_dir = str(Path(target).absolute())
    with stages("save"), preflight.renamed(folder="output_dir"):
        options: dict[str, Any] = {
            "plan": plan, "report": report, "recipe": plain, "overwrite": recipe.save.overwrite,
            "max_shard_size": recipe.save.max_shard_size,
        }  # fmt: skip
        if recipe.save.profile is None:
            folder = save(model, tokenizer, target, **options)
        else:
            folder = save_as(recipe.save.profile, model, tokenizer, target, **options)
    written = [*folder.glob("*.safetensors"), *folder.glob("*.gguf")]
    report.weights_bytes["after"] = sum(f.stat().st_size for f in written)
    report.stages = stages.to_list()


def _how_to_open(model: Any, profile: str | None) -> list[str]:
    if is_stock(model.config) or profile is not None:
        return []
    return ["Layers have sizes that plain transformers cannot build, so only pyprune.load opens the result."]


def _leave_file(model: Any) -> None:
    """Copy tensors on the CPU, one at a time. Those that were not cut still lie in the checkpoint file's mapping,
    which would keep the whole dense model resident."""
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.device.type == "cpu":
            tensor.data = tensor.data.clone()


def _tensor_bytes(model: Any) -> int:
    """Bytes of the parameters; tied ones count once."""
    return sum(p.numel() * p.element_size() for p in model.parameters())
