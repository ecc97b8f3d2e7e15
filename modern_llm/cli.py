"""`modern-llm VERB`: reads settings, calls the Python API, turns errors into one line and a status.

Nothing heavy is imported before a verb runs, so that `--help` answers at once. Every verb is also
`python -m modern_llm VERB`, and under `accelerate launch -m modern_llm VERB`.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from modern_llm.config import (
    DocumentDatasetConfig,
    InstructionDatasetConfig,
    ModernLLMConfig,
    PreferenceDatasetConfig,
    TrainingConfig,
)
from modern_llm.config.errors import UserError, status_of
from modern_llm.config.files import Settings, read_settings
from modern_llm.training.dpo_config import DPOConfig


class TrainingSettings(Settings):
    """Shared by the three stages."""

    train: TrainingConfig
    tokenizer_name: str | None = None
    """Hub id or folder of the tokenizer; comes before the checkpoint's own."""
    resume: bool = False
    """Go on with the run in output_dir, and refuse to start where there is none."""


class PretrainSettings(TrainingSettings):
    """Pretrain a new model on documents."""

    model: ModernLLMConfig
    data: DocumentDatasetConfig = Field(default_factory=DocumentDatasetConfig)


class SftSettings(TrainingSettings):
    """Fine-tune a checkpoint on instructions."""

    pretrain_checkpoint: str
    """Hub id, transformers folder or .pt file to start from."""
    data: InstructionDatasetConfig = Field(default_factory=InstructionDatasetConfig)


class DpoSettings(TrainingSettings):
    """Train a policy on preference pairs against a frozen reference, which is scored once."""

    sft_checkpoint: str
    """Hub id, transformers folder or .pt file: the policy's start and the reference."""
    dpo: DPOConfig = Field(default_factory=DPOConfig)
    data: PreferenceDatasetConfig = Field(default_factory=PreferenceDatasetConfig)


class ScoreSettings(Settings):
    """Write the log-prob sums of both answers of every pair, one JSON object a line."""

    model: str
    """Hub id, transformers folder or .pt file whose log-probs are asked for."""
    reference: str | None = None
    """A second model scored on the same pairs."""
    data: str
    """Preference data: Hub id, file or folder."""
    output: Path
    """The .jsonl file to write."""
    split: str | None = None
    """Split of a Hub data set."""
    template: str | None = None
    """As in the data section of dpo."""
    tokenizer_name: str | None = None
    """Hub id or folder of the tokenizer; comes before the model's own."""
    max_length: Annotated[int, Field(ge=2)] = 512
    """Tokens of prompt and response together."""
    max_prompt_length: Annotated[int, Field(ge=0)] | None = None
    """Tokens of the prompt's end that are kept at least; half of max_length unless said."""
    mixed_precision: Literal["no", "fp32", "bf16", "fp16"] = "no"
    """Dtype of the forward: no, bf16 or fp16."""
    on_bad_row: Literal["error", "skip"] = "error"
    """What a row of broken structure does: error or skip."""


class GenerateSettings(Settings):
    """Answer prompts with a model."""

    model: str
    """Hub id, transformers folder or .pt file."""
    prompt: str | None = None
    """One prompt; read from --prompts, or line by line from standard input, where it is not
    given."""
    prompts: Path | None = None
    """A file of prompts: one a line, or .jsonl objects with a field prompt."""
    template: str | None = None
    """chat wraps each prompt as a user turn; a text with {prompt} frames it; none uses it
    literally."""
    tokenizer_name: str | None = None
    """Hub id or folder of the tokenizer; comes before the model's own."""
    max_new_tokens: Annotated[int, Field(gt=0)] = 128
    """Most tokens of an answer."""
    temperature: Annotated[float, Field(ge=0)] = 0.0
    """0 takes the likeliest token; above, tokens are drawn."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Draw from the likeliest tokens that make up this share; needs a temperature above 0."""
    seed: Annotated[int, Field(ge=0)] | None = None
    """Seed of the draws, 0 unless said; needs a temperature above 0."""
    batch_size: Annotated[int, Field(gt=0)] = 16
    """Prompts that are answered together."""


class DemoSettings(Settings):
    """Pretrain, fine-tune and align a small model on generated questions, in a few minutes on a
    CPU."""

    output_dir: Path = Path("experiments/demo")
    """Where data, models and the table go; a finished demo there is made anew."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of the corpus, the weights and the order."""


def _training(settings: TrainingSettings) -> TrainingConfig:
    import dataclasses

    return dataclasses.replace(settings.train, resume="must") if settings.resume else settings.train


def _pretrain(settings: PretrainSettings) -> dict[str, Any]:
    from modern_llm.training.train_lm import run_training

    folder = run_training(
        settings.model, _training(settings), settings.data, settings.tokenizer_name
    )
    return {"final": str(folder)}


def _sft(settings: SftSettings) -> dict[str, Any]:
    from modern_llm.training.train_sft import run_sft

    folder = run_sft(
        settings.pretrain_checkpoint, _training(settings), settings.data, settings.tokenizer_name
    )
    return {"final": str(folder)}


def _dpo(settings: DpoSettings) -> dict[str, Any]:
    from modern_llm.training.train_dpo import run_dpo

    folder = run_dpo(
        settings.sft_checkpoint,
        _training(settings),
        settings.dpo,
        settings.data,
        settings.tokenizer_name,
    )
    return {"final": str(folder)}


def _score(settings: ScoreSettings) -> dict[str, Any]:
    from modern_llm.training.score import score_pairs

    data = PreferenceDatasetConfig(
        dataset_name=settings.data,
        split=settings.split,
        template=settings.template,
        on_bad_row=settings.on_bad_row,
    )
    return score_pairs(
        settings.model,
        data,
        settings.output,
        reference=settings.reference,
        tokenizer_name=settings.tokenizer_name,
        max_length=settings.max_length,
        max_prompt_length=settings.max_prompt_length,
        mixed_precision=settings.mixed_precision,
    )


def _generate(settings: GenerateSettings) -> dict[str, Any]:
    from modern_llm.models.generate import read_prompts
    from modern_llm.training.answer import answer_prompts

    prompts = read_prompts(settings.prompt, settings.prompts)
    answers = answer_prompts(
        settings.model,
        prompts,
        template=settings.template,
        tokenizer_name=settings.tokenizer_name,
        max_new_tokens=settings.max_new_tokens,
        temperature=settings.temperature,
        top_p=settings.top_p,
        seed=settings.seed,
        batch_size=settings.batch_size,
    )
    if not settings.json_output:
        for answer in answers:
            print(answer)
    return {"answers": [{"prompt": p, "answer": a} for p, a in zip(prompts, answers, strict=True)]}


def _demo(settings: DemoSettings) -> dict[str, Any]:
    from modern_llm.demo.run import run_demo

    return run_demo(settings.output_dir, seed=settings.seed)


# verb -> (settings, what it does)
VERBS: dict[str, tuple[type[Settings], Callable[[Any], dict[str, Any]]]] = {
    "demo": (DemoSettings, _demo),
    "pretrain": (PretrainSettings, _pretrain),
    "sft": (SftSettings, _sft),
    "dpo": (DpoSettings, _dpo),
    "score": (ScoreSettings, _score),
    "generate": (GenerateSettings, _generate),
}


def main(arguments: list[str] | None = None) -> int:
    """Run one verb and return the exit status (0, 2, 3, 4, 5, 75; 1 is a bug of ours)."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_overview())
        return 0 if arguments else 2
    verb, *rest = arguments
    debug = "--debug" in rest
    try:
        return _run(verb, rest)
    except KeyboardInterrupt as interrupt:
        print(
            "modern-llm: error: interrupted; the same command goes on from what is on disk",
            file=sys.stderr,
            flush=True,
        )
        return status_of(interrupt)
    except BrokenPipeError:
        return 141
    except Exception as error:
        status = status_of(error)
        if debug or status == 1:
            raise
        if os.environ.get("RANK", "0") == "0" or not isinstance(error, UserError):
            print(f"modern-llm: error: {_one_line(error)}", file=sys.stderr, flush=True)
        return status


def _run(verb: str, rest: list[str]) -> int:
    if verb not in VERBS:
        import difflib

        close = difflib.get_close_matches(verb, VERBS, n=1)
        hint = f" (did you mean {close[0]}?)" if close else ""
        raise UserError(f"unknown verb {verb!r}{hint}: one of {', '.join(VERBS)}")
    schema, run = VERBS[verb]
    settings = read_settings(schema, rest, verb)
    with _logging(settings.debug):
        result = run(settings)
    if os.environ.get("RANK", "0") == "0" and settings.json_output:
        print(json.dumps(result, ensure_ascii=False), flush=True)
    return 0


def _overview() -> str:
    lines = [
        "usage: modern-llm VERB [--config FILE.yaml] [--section.option VALUE ...]",
        "",
        "verbs:",
    ]
    lines += [
        f"  {verb:<10} {(schema.__doc__ or '').strip()}" for verb, (schema, _) in VERBS.items()
    ]
    lines += ["", "modern-llm VERB --help lists the options of one verb."]
    return "\n".join(lines)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


@contextmanager
def _logging(debug: bool) -> Iterator[None]:
    """Our lines on stderr, rank 0 only; other packages speak up from warnings on."""
    main_process = os.environ.get("RANK", "0") == "0"
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    ours = logging.getLogger("modern_llm")
    before = ours.level, ours.propagate
    ours.addHandler(handler)
    ours.setLevel(logging.DEBUG if debug else logging.INFO if main_process else logging.ERROR)
    ours.propagate = False
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    if not debug:
        transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        ours.removeHandler(handler)
        ours.level, ours.propagate = before


if __name__ == "__main__":
    sys.exit(main())
