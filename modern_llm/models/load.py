"""Load any causal LM: a Hub id, a `transformers` folder, or a `.pt` file.

Gives the model, the tokenizer's whereabouts and what can be known of both before any weight is
read.
No remote code is run. Called by the stages and by `score` and `generate`.
"""

from __future__ import annotations

import copy
import logging
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from modern_llm.config.errors import StorageError, UserError
from modern_llm.config.printable import first_line
from modern_llm.models import pt_checkpoint
from modern_llm.models.adapters import base_of, merged
from modern_llm.models.capabilities import probe
from modern_llm.models.routers import router_loss_of
from modern_llm.models.scorer import TokenScorer
from modern_llm.storage.regular_files import check_regular
from modern_llm.storage.untrusted import read_json

log = logging.getLogger(__name__)

LARGEST_INDEX = 100_000_000
"""Bytes of an index of weight files."""


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint is, before its weights are read."""

    place: str
    """As the user said it."""
    config: PretrainedConfig
    has_tokenizer: bool
    base: str | None = None
    """The checkpoint that the adapters in this folder stand on; None for a whole model."""

    @property
    def is_pt(self) -> bool:
        """Whether it is a `.pt` file."""
        return self.place.endswith(".pt")

    @property
    def vocabulary(self) -> int:
        """Rows of the embedding."""
        return int(self.config.get_text_config().vocab_size)

    @property
    def positions(self) -> int | None:
        """Positions the model is made for, or None where it has no bound."""
        return getattr(self.config.get_text_config(), "max_position_embeddings", None)


def inspect_checkpoint(place: str | Path) -> Checkpoint:
    """Say what stands at `place`, or raise `UserError` with what was looked for."""
    place = str(place)
    if place.endswith(".pt"):
        return Checkpoint(place, pt_checkpoint.read_config(Path(place)), has_tokenizer=False)
    path = Path(place)
    base = base_of(path)
    if base is not None:
        if base_of(Path(base)) is not None:
            # peft itself would not follow: its base is a plain model.
            raise UserError(
                f"checkpoint {place}: adapters on {base}, which holds adapters too or stand on "
                "themselves; merge those first (modern-llm export)"
            )
        inner = inspect_checkpoint(base)
        return Checkpoint(place, inner.config, _load_tokenizer(place) is not None, base)
    if path.exists() and not (path / "config.json").is_file():
        raise UserError(
            f"checkpoint {place}: no config.json in it; give a transformers folder, a .pt file or "
            "a Hub id"
        )
    check_folder(place, "checkpoint")
    for index in sorted(path.glob("*.index.json")) if path.is_dir() else ():
        parts_of(index, place)
    try:
        config = AutoConfig.from_pretrained(place, trust_remote_code=False)
        _forget_implementations(config)
    except Exception as error:  # a broken config.json raises whatever its reader stumbles over
        raise UserError(
            f"checkpoint {place}: neither a folder here nor a model that the Hub gives "
            f"({first_line(error)}); check the path or the id"
        ) from error
    if type(config) not in AutoModelForCausalLM._model_mapping:
        raise UserError(
            f"checkpoint {place}: {config.model_type} is no causal language model that "
            "transformers knows; give a decoder"
        )
    return Checkpoint(place, config, has_tokenizer=_load_tokenizer(place) is not None)


def _forget_implementations(config: PretrainedConfig) -> None:
    """Leave the choice of attention and experts to `transformers`: a configuration may name a
    kernel of the Hub, which is somebody's code."""
    for name in ("_attn_implementation_internal", "_experts_implementation_internal"):
        if getattr(config, name, None) is not None:
            setattr(config, name, None)
    for value in vars(config).values():
        if isinstance(value, PretrainedConfig):
            _forget_implementations(value)


def parts_of(index: Path, place: str) -> list[str]:
    """Return the names of the weight files that an index lists; all must lie beside it."""
    try:
        names = sorted(set(read_json(index, LARGEST_INDEX)["weight_map"].values()))
        outside = [name for name in names if Path(name).name != name or name == ".."]
    except (OSError, ValueError, LookupError, AttributeError, TypeError, RecursionError) as error:
        raise UserError(
            f"checkpoint {place}: {index.name} is no index of weight files; fetch it again"
        ) from error
    if outside:
        raise UserError(
            f"checkpoint {place}: {index.name} names {outside[0]!r}, which is no file beside it; "
            "an index that leads out of its folder is not followed"
        )
    return names


def load_model(
    checkpoint: Checkpoint, quantize: str | None = None, *, as_stored: bool = False
) -> PreTrainedModel:
    """Return the model in float32 on the CPU: training keeps float32 weights, autocast lowers the
    forward. Adapters in a folder are merged into the model that they stand on.

    Args:
        quantize: "nf4" or "int8" for frozen weights in few bits, on the GPU.
        as_stored: leave the weights of a `transformers` folder in the dtype of its files. They are
            then mapped, not copied: the processes of a machine share them until one writes. For
            those who round them to 16 bits at once.
    """
    if checkpoint.base is not None:
        return merged(load_model(inspect_checkpoint(checkpoint.base)), Path(checkpoint.place))
    if checkpoint.is_pt:
        return pt_checkpoint.load_model(Path(checkpoint.place))
    extra = {} if quantize is None else {"quantization_config": _few_bits(quantize)}
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            checkpoint.place,
            config=copy.deepcopy(checkpoint.config),  # read once, and without foreign code
            dtype="auto" if as_stored else torch.float32,
            output_loading_info=True,
            trust_remote_code=False,
            **extra,
        )
    except SafetensorError as error:
        raise StorageError(
            f"checkpoint {checkpoint.place}: damaged weights ({first_line(error)}); fetch it again"
        ) from error
    except Exception as error:  # as above, of any file in the folder
        raise UserError(
            f"checkpoint {checkpoint.place}: its weights cannot be loaded ({first_line(error)}); "
            "check the folder or the id"
        ) from error
    wrong = sorted(report["missing_keys"]) + sorted(str(key) for key in report["mismatched_keys"])
    if wrong:
        raise UserError(
            f"checkpoint {checkpoint.place}: weights missing or of another shape: "
            f"{', '.join(wrong[:5])}"
            f"{' ...' if len(wrong) > 5 else ''}; they would be random, so the checkpoint is "
            "refused"
        )
    return model


def _few_bits(quantize: str) -> BitsAndBytesConfig:
    if quantize == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )


def make_scorer(
    model: PreTrainedModel,
    attention: str = "auto",
    *,
    lean: bool = True,
    router_loss: float | None = 0.0,
    dropout: bool | None = None,
) -> TokenScorer:
    """Probe `model` and wrap it.

    Args:
        attention: "auto" uses trees where they are exact, "tree" insists, "separate" does not try;
            the name of a backend insists on that one.
        lean: see `probe`.
        router_loss: weight of the routers' load-balancing loss; None follows the checkpoint, 0 is
            for a model that is only asked.
        dropout: whether the model trains with dropout; False switches it off, with all else that
            only training does. None is for a model that is only asked.
    """
    # Before the probe: afterwards the model may be asked through `TokenScorer` only.
    routers = router_loss_of(model, router_loss)
    tried = None if attention in ("auto", "tree", "separate") else (attention,)
    capabilities = probe(
        model, trees=attention != "separate", tried=tried, lean=lean, dropout=dropout
    )
    if attention not in ("auto", "separate") and not capabilities.trees:
        raise UserError(
            f"attention: {attention}: {type(model).__name__} cannot "
            f"({'; '.join(capabilities.notes)}); use attention: auto or separate"
        )
    return TokenScorer(model, capabilities, routers)


def load_tokenizer(place: str | Path) -> PreTrainedTokenizerBase:
    """Return the tokenizer at a folder or Hub id, or raise `UserError`."""
    tokenizer = _load_tokenizer(str(place))
    if tokenizer is None:
        raise UserError(
            f"tokenizer {place}: neither a folder with a tokenizer nor one that the Hub gives; "
            "check the path or the id (tokenizer_name)"
        )
    return tokenizer


def check_folder(place: str, kind: str) -> None:
    """Refuse a local folder with files that `transformers` would wait for, such as pipes."""
    folder = Path(place)
    for path in folder.iterdir() if folder.is_dir() else ():
        try:
            if path.exists() and not path.is_dir():
                check_regular(path)
        except OSError as error:
            raise UserError(
                f"{kind} {place}: {path.name} is {error.strerror}; fetch it again"
            ) from error


def _load_tokenizer(place: str) -> PreTrainedTokenizerBase | None:
    """Return the tokenizer at `place`, None where there is none; one that is broken is refused."""
    check_folder(place, "tokenizer")
    try:
        tokenizer = AutoTokenizer.from_pretrained(place, trust_remote_code=False)
        # A folder without tokenizer files yields an empty tokenizer of the model's class.
        if not len(tokenizer):
            return None
        # Some damage shows only in use, and some of it is no `Exception` but a panic in Rust.
        tokenizer("a b")
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        if any(Path(place).glob("tokenizer*.json")):
            raise UserError(
                f"tokenizer {place}: its files are damaged ({first_line(error)}); fetch it again"
            ) from error
        if not isinstance(error, (OSError, ValueError, KeyError)):
            raise
        log.debug("no tokenizer at %s: %s", place, first_line(error))
        return None
    return tokenizer


def outside_note(tokenizer: PreTrainedTokenizerBase, vocabulary: int) -> str | None:
    """Return what to say of a tokenizer with ids outside an embedding of `vocabulary` rows.

    Text models with the tokenizer of a larger family have such ids for images, or for padding.
    """
    outside = {at: token for token, at in tokenizer.get_vocab().items() if at >= vocabulary}
    if not outside:
        return None
    return (
        f"{len(outside)} of the tokenizer's ids are outside the embedding, which has {vocabulary} "
        f"rows (first: {outside[min(outside)]!r}); a row that holds one is refused"
    )


def check_id(highest: int, vocabulary: int, tokenizer: PreTrainedTokenizerBase, place: str) -> None:
    """Refuse a token id outside an embedding of `vocabulary` rows.

    Args:
        highest: the largest id of a row.
        place: the row, as `file:line`.
    """
    if highest >= vocabulary:
        token = tokenizer.convert_ids_to_tokens(highest)
        raise UserError(
            f"{place}: token id {highest} ({token!r}) but embedding has {vocabulary} rows; use the "
            "tokenizer that the model was trained with, or remove such rows"
        )
