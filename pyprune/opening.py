"""Where every model that is pruned or measured begins: opened, or taken as given; and what is measured on it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from pyprune import preflight
from pyprune.checkpoint.load import check_finite, open_model
from pyprune.discovery.discover import discover
from pyprune.discovery.groups import Groups
from pyprune.discovery.roles import HEADS
from pyprune.evaluation.generation import continuation
from pyprune.evaluation.loglikelihood import known_positions
from pyprune.evaluation.perplexity import perplexity
from pyprune.evaluation.stages import Stages
from pyprune.importance.calibration import Calibration, check_vocabulary, load_calibration
from pyprune.importance.modes import check_weights
from pyprune.stage_options import CalibrationConfig, EvalConfig, ModelConfig
from pyprune.texts import window_prefix


@dataclass
class Opened:
    """A model and what belongs to it.

    Attributes:
        model: in memory; None once it was handed over.
        tokenizer: or None.
        name: folder, hub name, or class.
        weights_bytes: of its files, or of its parameters.
        mine: it was opened here, so that nobody else holds it.
    """

    model: Any
    tokenizer: Any
    name: str
    weights_bytes: int
    mine: bool

    def hand_over(self) -> Any:
        """The model, which is not held here any longer if nobody else does."""
        model = self.model
        if self.mine:
            self.model = None
        return model


def open_or_take(config: ModelConfig, stages: Stages, model: Any = None, tokenizer: Any = None) -> Opened:
    """The model that ``config`` names, or ``model`` itself.

    Raises:
        PyPruneError: it cannot be opened, its weights are not in memory or not finite, or options do not go with an
            object.
    """
    if model is None:
        name = preflight.named(config.model_name_or_path)
        device = preflight.device(config.device)
        with stages("load"):
            model, own = open_model(name, config.dtype, None if device == "cpu" else device, config.trust_remote_code)
        found = sum(f.stat().st_size for f in Path(name).glob("*.safetensors"))
        return Opened(model, own if tokenizer is None else tokenizer, name, found or tensor_bytes(model), mine=True)
    preflight.check_object(model, config)
    if not any(hasattr(module, "_hf_hook") for module in model.modules()):  # accelerate fetches weights when it runs
        check_weights(model)
    name = getattr(model, "name_or_path", "") or type(model).__name__
    check_finite(model, name)
    return Opened(model, tokenizer, name, tensor_bytes(model), mine=False)


def groups_of(model: Any) -> Groups:
    """The model's groups. Surgery carries position-dependent slopes (ALiBi) over to the heads that stay."""
    return discover(model).thaw(HEADS)


def calibration_for(one: Opened, config: CalibrationConfig) -> Calibration:
    """Raises PyPruneError: there is no such text, or the model has too few positions or words for it."""
    found = load_calibration(
        config.calibration, one.tokenizer, samples=config.samples, length=config.length,
        batch_size=config.batch_size, seed=config.seed, field=config.text_field,
        longest=known_positions(one.model), bos=config.bos,
    )  # fmt: skip
    preflight.check_length("length", found.length, one.model)
    check_vocabulary(found, one.model)
    return found


def measure(
    model: Any, tokenizer: Any, config: EvalConfig, windows: Tensor | None, text: str, stages: Stages, when: str = ""
) -> dict[str, Any]:
    """{"perplexity": ..., "continuation": ...}, each None when it was not asked for.

    Args:
        windows: token ids, int64 [windows, length], or None.
        text: name of the text that they are of.
        when: behind the names of the stages.
    """
    out: dict[str, Any] = {"perplexity": None, "continuation": None}
    if windows is not None:
        with stages("perplexity" + when, bar=False):
            found = perplexity(
                model, windows, text=text, batch_size=config.eval_batch_size, label="perplexity" + when,
                protocol=config.protocol, prefix=window_prefix(config, tokenizer),
            )  # fmt: skip
        out["perplexity"] = found.to_dict()
    if config.prompt is not None:
        with stages("generate" + when):
            out["continuation"] = continuation(model, tokenizer, config.prompt, config.max_new_tokens)
    return out


def tensor_bytes(model: Any) -> int:
    """Bytes of the parameters; tied ones count once."""
    return sum(p.numel() * p.element_size() for p in model.parameters())
