"""Load any causal LM: a Hub id, a `transformers` folder, a `.pt` file, or a run's checkpoint.

Gives the model, its tokenizer, and what can be known of both before any weight is read. No remote
code is run.
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
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.initialization import no_init_weights

from modern_llm.config.errors import StorageError, UserError
from modern_llm.config.printable import first_line
from modern_llm.models import pt_checkpoint
from modern_llm.models.adapters import base_of, merged
from modern_llm.models.attention.sequence import SequenceGroup
from modern_llm.models.capabilities import probe
from modern_llm.models.routers import router_loss_of
from modern_llm.models.run_checkpoint import checkpoint_folder, is_run_checkpoint, load_weights
from modern_llm.models.scorer import TokenScorer
from modern_llm.models.unread import adopt
from modern_llm.storage.atomic import verified_manifest
from modern_llm.storage.regular_files import check_regular
from modern_llm.storage.untrusted import read_json

log = logging.getLogger(__name__)

LARGEST_INDEX = 100_000_000
"""Bytes of an index of weight files."""


@dataclass(frozen=True)
class Checkpoint:
    """Description of a checkpoint whose weights are not read yet."""

    place: str
    """Hub id or path, as the user wrote it."""
    config: PretrainedConfig
    has_tokenizer: bool
    base: str | None = None
    """Base checkpoint of the adapters in this folder; None for a whole model."""

    @property
    def is_pt(self) -> bool:
        """Whether it is a `.pt` file."""
        return self.place.endswith(".pt")

    @property
    def is_run(self) -> bool:
        """Whether it is a checkpoint that a run saved."""
        return is_run_checkpoint(Path(self.place))

    @property
    def vocabulary(self) -> int:
        """Rows of the embedding."""
        return int(self.config.get_text_config().vocab_size)

    @property
    def positions(self) -> int | None:
        """Maximum number of positions, None without a limit."""
        return getattr(self.config.get_text_config(), "max_position_embeddings", None)


def inspect_checkpoint(place: str | Path) -> Checkpoint:
    """Return the checkpoint at `place`, or raise `UserError` with the accepted forms.

    Args:
        place: Hub id, `transformers` folder, `.pt` file, a checkpoint that a run saved
            (`RUN/checkpoints/step-00000500`, or the newest or best as `RUN/last`, `RUN/best`).
    """
    place = checkpoint_folder(place)
    if place.endswith(".pt"):
        return Checkpoint(place, pt_checkpoint.read_config(Path(place)), has_tokenizer=False)
    path = Path(place)
    if place.startswith((".", "/", "~")) and not path.exists():  # a Hub id has none of these first
        raise UserError(f"checkpoint {place}: no such folder or file; check the path")
    base = base_of(path)
    if base is not None:
        if base_of(Path(base)) is not None:
            # peft supports only a plain model as the base.
            raise UserError(
                f"checkpoint {place}: adapters on {base}, which holds adapters too or is this "
                "folder; merge those first (modern-llm export)"
            )
        inner = inspect_checkpoint(base)
        return Checkpoint(place, inner.config, _load_tokenizer(place) is not None, base)
    if path.exists() and not (path / "config.json").is_file():
        if is_run_checkpoint(path):
            raise UserError(
                f"checkpoint {place}: was saved by a version that left out the model's "
                "configuration; resume its run once, or give the final model"
            )
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
    except Exception as error:  # a broken config.json may raise anything
        raise UserError(
            f"checkpoint {place}: neither a folder here nor a model that the Hub gives "
            f"({first_line(error)}); check the path or the id"
        ) from error
    if type(config) not in AutoModelForCausalLM._model_mapping:
        raise UserError(
            f"checkpoint {place}: transformers has no causal language model of type "
            f"{config.model_type}; give a decoder"
        )
    return Checkpoint(place, config, has_tokenizer=_load_tokenizer(place) is not None)


def _forget_implementations(config: PretrainedConfig) -> None:
    """Clear the configured kernels of attention and experts: they may be foreign code of the
    Hub."""
    for name in ("_attn_implementation_internal", "_experts_implementation_internal"):
        if getattr(config, name, None) is not None:
            setattr(config, name, None)
    for value in vars(config).values():
        if isinstance(value, PretrainedConfig):
            _forget_implementations(value)


def parts_of(index: Path, place: str) -> list[str]:
    """Return the names of the weight files that an index lists; all must be in its folder."""
    try:
        names = sorted(set(read_json(index, LARGEST_INDEX)["weight_map"].values()))
        outside = [name for name in names if Path(name).name != name or name == ".."]
    except (OSError, ValueError, LookupError, AttributeError, TypeError, RecursionError) as error:
        raise UserError(
            f"checkpoint {place}: {index.name} is not an index of weight files; fetch it again"
        ) from error
    if outside:
        raise UserError(
            f"checkpoint {place}: {index.name} names {outside[0]!r}, which leads out of its "
            "folder; such a file is not read"
        )
    return names


def load_model(
    checkpoint: Checkpoint | str | Path, quantize: str | None = None, *, as_stored: bool = False
) -> PreTrainedModel:
    """Return the model in float32 on the CPU; adapters in a folder are merged into their base.

    Args:
        checkpoint: or what `inspect_checkpoint` reads, such as a Hub id or a folder.
        quantize: "nf4" or "int8" for quantized frozen weights on the GPU.
        as_stored: keep the weights of a `transformers` folder in the dtype of its files. They are
            then memory-mapped and shared by the processes of a machine. For callers that convert
            them to 16 bits.
    """
    if not isinstance(checkpoint, Checkpoint):
        checkpoint = inspect_checkpoint(checkpoint)
    if checkpoint.base is not None:
        return merged(load_model(inspect_checkpoint(checkpoint.base)), Path(checkpoint.place))
    if checkpoint.is_pt:
        return pt_checkpoint.load_model(Path(checkpoint.place))
    if checkpoint.is_run:
        return _load_from_run(checkpoint, quantize)
    extra = {} if quantize is None else {"quantization_config": _few_bits(quantize)}
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            checkpoint.place,
            config=copy.deepcopy(checkpoint.config),  # already read, and without foreign kernels
            dtype="auto" if as_stored else torch.float32,
            output_loading_info=True,
            trust_remote_code=False,
            **extra,
        )
    except SafetensorError as error:
        raise StorageError(
            f"checkpoint {checkpoint.place}: damaged weights ({first_line(error)}); fetch it again"
        ) from error
    except Exception as error:  # a broken file may raise anything
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


def _load_from_run(checkpoint: Checkpoint, quantize: str | None) -> PreTrainedModel:
    """Return the model of a run's checkpoint, whether one rank wrote it or each its pieces."""
    folder = Path(checkpoint.place)
    if quantize is not None:
        raise UserError(
            f"checkpoint {folder}: quantize reads transformers folders; export this one first "
            "(modern-llm export)"
        )
    verified_manifest(folder)
    with no_init_weights():  # all of them are read below
        model = AutoModelForCausalLM.from_config(
            copy.deepcopy(checkpoint.config), dtype=torch.float32, trust_remote_code=False
        )
    model.tie_weights()  # part of the initialization
    load_weights(folder, model)
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model.eval()


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
    measured: PreTrainedModel | None = None,
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
    sequence: SequenceGroup | None = None,
) -> TokenScorer:
    """Probe `model` and wrap it.

    Args:
        measured: the first layers of a `model` whose weights are not read yet; they are probed.
        attention: "auto" uses trees if they are exact, "tree" or the name of a backend requires
            them, "separate" does not use them.
        lean: see `probe`.
        router_loss: weight of the routers' load-balancing loss; None follows the checkpoint. Use 0
            for a model that is only scored.
        dropout: whether the model trains with dropout; False switches it off, with everything else
            that differs in training mode. None is for a model that is only scored.
        device, dtype: of the attention in the run, see `probe`.
        sequence: the processes that split the rows of the run, see `TokenScorer`.
    """
    tried = None if attention in ("auto", "tree", "separate") else (attention,)
    probed = measured or model
    # Before the probe: after it only `TokenScorer` may call the model.
    routers = router_loss_of(probed, router_loss)
    capabilities = probe(
        probed,
        trees=attention != "separate",
        tried=tried,
        lean=lean,
        dropout=dropout,
        device=device,
        dtype=dtype,
        sequence=sequence,
    )
    if measured is not None:
        adopt(model, measured, dropout=dropout)
        measured.to("meta")  # free it now: the probe's functions are in reference cycles
    if attention not in ("auto", "separate") and not capabilities.trees:
        raise UserError(
            f"attention: {attention}: {type(model).__name__} cannot "
            f"({'; '.join(capabilities.notes)}); use attention: auto or separate"
        )
    return TokenScorer(model, capabilities, routers, sequence)


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
    """Refuse a local folder with files that block a reader, such as pipes."""
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
    """Return the tokenizer at `place`, None if there is none; a damaged one is refused."""
    place = checkpoint_folder(place)
    check_folder(place, "tokenizer")
    try:
        tokenizer = AutoTokenizer.from_pretrained(place, trust_remote_code=False)
        # A folder without tokenizer files yields an empty tokenizer of the model's class.
        if not len(tokenizer):
            return None
        # Some damage shows only in use, some of it as a Rust panic, which is not an `Exception`.
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
    """Return a note if a tokenizer has ids outside an embedding of `vocabulary` rows, else None.

    Text models of a multimodal family have such ids, for images or for padding.
    """
    outside = {at: token for token, at in tokenizer.get_vocab().items() if at >= vocabulary}
    if not outside:
        return None
    return (
        f"{len(outside)} of the tokenizer's ids are outside the embedding, which has {vocabulary} "
        f"rows (first: {outside[min(outside)]!r}); a data row with such an id is refused"
    )


def check_id(
    highest: int, vocabulary: int, tokenizer: PreTrainedTokenizerBase | None, place: str
) -> None:
    """Refuse a token id outside an embedding of `vocabulary` rows.

    Args:
        highest: the largest id of a row.
        place: the row, as `file:line`.
    """
    if highest >= vocabulary:
        token = tokenizer and tokenizer.convert_ids_to_tokens(highest)
        shown = f" ({token!r})" if token else ""
        raise UserError(
            f"{place}: token id {highest}{shown} but embedding has {vocabulary} rows; use the "
            "tokenizer that the model was trained with, or remove such rows"
        )
