"""``pyprune export``: a checkpoint in the form that another program opens."""

from __future__ import annotations

from typing import Any

import click

from pyprune.cli.options import verb
from pyprune.cli.output import emit, reporting
from pyprune.config import ExportingConfig
from pyprune.errors import PyPruneError
from pyprune.units import size

HELP = """Write MODEL for another program.

MODEL is a folder that `pyprune prune` wrote, or any Hugging Face checkpoint. Its widths do not change; a profile that
cannot hold them says why, and names the nearest ones that fit. `pyprune prune --profile` keeps to them from the start.

\b
uniform        the same widths in every layer       plain transformers, vLLM, TensorRT-LLM
hetero-hf      any widths                           plain transformers, with the modelling file in the folder
hetero-decilm  FFN in multiples of 256, all heads   vLLM, TensorRT-LLM (DeciLMForCausalLM)
gguf           Llama and Mistral, one head width    llama.cpp and what is built on it
"""

EXAMPLES = """
Examples:
  One file for llama.cpp, in half precision, tokenizer and chat template included:
    pyprune export smaller --profile gguf --dtype float16 --output smaller.gguf

  A folder whose layers have different widths, for machines without pyprune:
    pyprune export smaller --profile hetero-hf --output smaller-hf
"""


def register(cli: click.Group) -> None:
    @verb(cli, ExportingConfig, "export", HELP, EXAMPLES)
    def run(flags: dict[str, Any], config: str | None, json: bool, quiet: bool) -> None:
        recipe = ExportingConfig.build(flags, config)
        model, target = recipe.model, recipe.export
        if model.model_name_or_path is None:
            raise PyPruneError("model_name_or_path", None, "no model is given", "Name a folder or a model on the hub.")
        if target.output is None:
            raise PyPruneError("output", None, "nothing says where to write", "Give a folder, or a file for gguf.")
        from pyprune.checkpoint.profiles import export

        with reporting(quiet):
            path = export(
                model.model_name_or_path, target.output, target.profile, dtype=target.dtype,
                overwrite=target.overwrite, trust_remote_code=model.trust_remote_code,
            )  # fmt: skip
        files = [path] if path.is_file() else sorted(f for f in path.iterdir() if f.is_file())
        sizes = {f.name: f.stat().st_size for f in files}
        data = {"output": str(path), "profile": target.profile, "files": sizes}
        emit(data, json, lambda: [f"{path} ({size(sum(sizes.values()))}, profile {target.profile})"])
