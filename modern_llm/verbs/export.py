"""The verb `export`: a checkpoint in another form, and on request on the Hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal

from modern_llm.config.errors import ConfigError
from modern_llm.config.printable import one_line
from modern_llm.verbs.settings import Settings


class ExportSettings(Settings):
    """Turn a checkpoint into a .pt file or a transformers folder; merge an adapter; push."""

    example: ClassVar[str] = "modern-llm export --model runs/dpo/last --output model"

    model: str
    """Hub id, transformers folder, .pt file, checkpoint of a run (RUN/last, RUN/best), or folder of
    a peft adapter."""
    output: Path
    """What to write: a .pt file by that ending, else a folder; nothing may stand there yet."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Dtype of the weights."""
    merge: bool = False
    """Merge an adapter into its base."""
    tokenizer_name: str | None = None
    """Hub id or folder of the tokenizer, for a checkpoint without one."""
    push_to_hub: str | None = None
    """Repository of the Hub (OWNER/NAME) to upload the folder to; nothing is ever pushed
    without it."""
    public: bool = False
    """Make a new repository public; it is private by default."""


def export(settings: ExportSettings) -> dict[str, Any]:
    """Write the export, push it if asked; return where it is."""
    from modern_llm.export.checkpoint import export_checkpoint, push

    if settings.public and settings.push_to_hub is None:
        raise ConfigError(["public has no effect without push_to_hub: remove it"])
    if settings.push_to_hub is not None and settings.output.suffix == ".pt":
        raise ConfigError(["push_to_hub uploads a folder, output is a .pt file: name a folder"])
    result = export_checkpoint(
        settings.model,
        settings.output,
        dtype=settings.dtype,
        tokenizer_name=settings.tokenizer_name,
        merge=settings.merge,
    )
    if settings.push_to_hub is not None:
        url = push(settings.output, settings.push_to_hub, private=not settings.public)
        result["pushed_to"] = url
    if not settings.json_output:
        place = one_line(result["output"])
        print(f"{place}: {result['parameters']:,} parameters in {result['dtype']}")
        if "pushed_to" in result:
            print(one_line(result["pushed_to"]))
    return result
