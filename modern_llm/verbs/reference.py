"""The verbs `reference fill`, `export`, `verify`, `info`, `merge` and `prune`."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, StringConstraints

from modern_llm.config import PreferenceDatasetConfig, TrainingConfig
from modern_llm.config.dpo import DPOConfig
from modern_llm.config.errors import ConfigError, StorageError
from modern_llm.config.printable import one_line
from modern_llm.verbs.command_line import CONFIGURATIONS
from modern_llm.verbs.settings import Settings, sections_of
from modern_llm.verbs.stage_settings import DpoSettings, KtoSettings, training_config

if TYPE_CHECKING:
    from modern_llm.reference.commands import Request
    from modern_llm.reference.store.store import ReferenceStore

log = logging.getLogger(__name__)


PART = r"^[1-9]\d*/[1-9]\d*$"


class FillSettings(DpoSettings):
    """Score what the reference store lacks for a run's pairs, without training; where there is a
    section kto, for its labelled responses."""

    example: ClassVar[str] = "modern-llm reference fill run.yaml --part 1/8"

    part: Annotated[str, StringConstraints(pattern=PART)] = "1/1"
    """Part of the data that this job fills, such as 3/8; merge the stores of all parts after."""

    @classmethod
    def variant(cls, arguments: list[str]) -> type[Settings]:
        """Return the settings of a KTO run where the command line or its file has a section kto."""
        words = [word.removeprefix("--config=") for word in arguments]
        files = [Path(word) for word in words if word.endswith(CONFIGURATIONS)]
        named = any(word.startswith("--kto.") for word in words)
        if named or any("kto" in sections_of(file) for file in files if file.is_file()):
            return KtoFillSettings
        return cls


class KtoFillSettings(KtoSettings):
    """Score what the reference store lacks for a KTO run's responses, without training."""

    example: ClassVar[str] = FillSettings.example

    part: Annotated[str, StringConstraints(pattern=PART)] = "1/1"
    """As for a DPO run."""


class ExportSettings(DpoSettings):
    """Write a run's pairs with the reference's log-probs, for a trainer that has no store."""

    example: ClassVar[str] = "modern-llm reference export run.yaml --output pairs.parquet"

    output: Path
    """The .parquet or .jsonl file to write; held-out pairs go to NAME.evaluation.parquet."""
    format: Literal["trl"] = "trl"
    """Whose columns are written: those of TRL 1.16."""
    force: bool = False
    """Overwrite the file that --output names."""


class RunOfStore(Settings):
    """A store: a folder, or the store of a run with these sections."""

    store: Path | None = None
    """Folder of a store."""
    sft_checkpoint: str | None = None
    """As for dpo; with train, dpo and data, in place of store."""
    train: TrainingConfig | None = None
    dpo: DPOConfig = Field(default_factory=DPOConfig)
    data: PreferenceDatasetConfig = Field(default_factory=PreferenceDatasetConfig)
    tokenizer_name: str | None = None
    """Hub id or folder of the tokenizer, in place of the checkpoint's."""
    plugins: list[str] = Field(default_factory=list)
    """Modules to import first, on every process: package.module,package.other. They register losses
    and formats of your own."""


class VerifySettings(RunOfStore):
    """Check every byte of a store; with a run's sections, also score a sample again."""

    example: ClassVar[str] = "modern-llm reference verify --store stores/hh"

    sample: Annotated[int, Field(gt=0)] = 64
    """Answers to score again, if a run is named."""


class InfoSettings(Settings):
    """Show reference, recipe, rows, tokens and bytes of a store."""

    example: ClassVar[str] = "modern-llm reference info --store stores/hh"

    store: Path | None = None
    """Folder of a store; by default all under MODERN_LLM_CACHE."""


class MergeSettings(Settings):
    """Merge stores of the same reference and recipe into one; the sources stay unchanged."""

    example: ClassVar[str] = "modern-llm reference merge --sources stores/a --sources stores/b"

    sources: Annotated[list[Path], Field(min_length=1)]
    """Folders of stores."""
    into: Path | None = None
    """Folder of the merged store, new or existing; by default the one under MODERN_LLM_CACHE."""


class PruneSettings(RunOfStore):
    """Remove damaged and left-over files and merge small shards; with a run's sections, also
    remove the entries that its pairs do not use."""

    example: ClassVar[str] = "modern-llm reference prune --store stores/hh"


def fill(settings: FillSettings | KtoFillSettings) -> dict[str, Any]:
    """Fill the store; return needed, found, scored, store and reference."""
    from modern_llm.reference.commands import fill_reference

    _refuse_without_effect(settings)
    first, count = map(int, settings.part.split("/"))
    return fill_reference(
        settings.sft_checkpoint,
        training_config(settings),
        settings.kto if isinstance(settings, KtoFillSettings) else settings.dpo,
        settings.data,
        settings.tokenizer_name,
        part=(first, count),
    )


def export(settings: ExportSettings) -> dict[str, Any]:
    """Fill the store and write the pairs with its values; return how many, and the file."""
    from modern_llm.data.table.pair_files import SUFFIXES
    from modern_llm.reference.commands import Request
    from modern_llm.reference.exported import export_reference

    _refuse_without_effect(settings)
    output = settings.output
    if output.suffix not in SUFFIXES:
        raise ConfigError([f"output {output}: name a file that ends with {' or '.join(SUFFIXES)}"])
    if not output.parent.is_dir():
        raise ConfigError([f"output {output}: {output.parent} is not a folder; create it"])
    if output.exists() and not settings.force:
        raise ConfigError([f"output {output}: exists; name another, or add --force"])
    request = Request(
        settings.sft_checkpoint,
        training_config(settings),
        settings.dpo,
        settings.data,
        settings.tokenizer_name,
    )
    return export_reference(request, output)


def _refuse_without_effect(settings: FillSettings | KtoFillSettings | ExportSettings) -> None:
    without_effect = {
        "resume": "a store is always continued",
        "dry_run": "nothing is trained",
        "profile": "it traces training steps",
        "sweep": "name the runs of a sweep one by one; most share one store",
    }
    if problems := [
        f"{name} has no effect here, {why}: remove it"
        for name, why in without_effect.items()
        if getattr(settings, name)
    ]:
        raise ConfigError(problems)


def verify(settings: VerifySettings) -> dict[str, Any]:
    """Check a store; return its folder and the numbers of shards and rescored answers."""
    from modern_llm.reference.commands import verify_reference
    from modern_llm.reference.store.store import ReferenceStore

    if (request := _request(settings)) is not None:
        return verify_reference(request, settings.sample)
    assert settings.store is not None
    store = ReferenceStore.open(settings.store)
    shards, problems = store.verify()
    if problems:
        raise StorageError(f"{store.folder}: {'; '.join(problems)}; fill it again")
    log.info("reference: %s: %d shards, every byte is what was written", store.folder, shards)
    return {"store": str(store.folder), "shards": shards, "rescored": 0}


def info(settings: InfoSettings) -> dict[str, Any]:
    """Describe one store or all; print and return the description."""
    from modern_llm.reference.store.paths import stores_in
    from modern_llm.reference.store.store import ReferenceStore
    from modern_llm.storage.file_digests import cache_root

    folders = [settings.store] if settings.store else stores_in(cache_root())
    stores = [_describe(ReferenceStore.open(folder)) for folder in folders]
    if not settings.json_output:
        for store in stores:
            for name, value in store.items():
                shown = f"{value:,}" if isinstance(value, int) else one_line(value)
                print(f"{name:<10} {shown}")
            print()
        if not stores:
            print(f"no store under {one_line(cache_root())}")
    return {"stores": stores}


def merge(settings: MergeSettings) -> dict[str, Any]:
    """Merge stores; return the description of the merged one."""
    from modern_llm.reference.store.store import ReferenceStore
    from modern_llm.storage.file_digests import cache_root

    sources = [ReferenceStore.open(folder) for folder in settings.sources]
    identity = sources[0].identity
    for source in sources[1:]:
        if source.identity != identity:
            raise ConfigError(
                [
                    f"sources {source.folder}: holds {tuple(source.identity)}, "
                    f"{sources[0].folder} holds {tuple(identity)}: only values of the same weights "
                    "and recipe can be in one store"
                ]
            )
    if settings.into is None:
        target = ReferenceStore.at(cache_root(), identity)
    elif settings.into.is_dir() and any(settings.into.iterdir()):
        target = ReferenceStore.open(settings.into)
    else:
        target = ReferenceStore(settings.into, identity)
    if target.identity != identity:
        raise ConfigError([f"into {target.folder}: holds values of other weights or recipe"])
    for source in sources:
        if source.folder.resolve() != target.folder.resolve():
            target.copy_from(source)
    target.compact()
    target.claims.close()
    found = _describe(target)
    log.info(
        "reference: %d stores merged into %s: %d rows", len(sources), target.folder, len(target)
    )
    return found


def prune(settings: PruneSettings) -> dict[str, Any]:
    """Clean one store or all; return their descriptions."""
    from modern_llm.reference.commands import keep_needed
    from modern_llm.reference.store.paths import stores_in
    from modern_llm.reference.store.store import ReferenceStore
    from modern_llm.storage.file_digests import cache_root

    request = _request(settings, needed=False)
    if request is not None:
        folders = [Path(keep_needed(request)["store"])]
    else:
        folders = [settings.store] if settings.store else stores_in(cache_root())
    result = []
    for folder in folders:
        store = ReferenceStore.open(folder)
        removed = store.clean()
        store.compact()
        store.claims.close()
        result.append(_describe(store) | {"removed": removed})
        log.info("reference: %s: %d files removed, %d rows", folder, removed, len(store))
    return {"stores": result}


def _request(settings: RunOfStore, *, needed: bool = True) -> Request | None:
    """Return the run whose store is meant; None if a folder or nothing is named."""
    from modern_llm.reference.commands import Request

    if settings.store is not None and settings.sft_checkpoint is not None:
        raise ConfigError(["store and sft_checkpoint both name a store: keep one"])
    if settings.sft_checkpoint is None:
        if settings.store is None and needed:
            raise ConfigError(
                ["name a store (--store FOLDER), or a run (--config FILE and --sft_checkpoint)"]
            )
        return None
    if settings.train is None:
        raise ConfigError(["train: required beside sft_checkpoint; give the run's --config"])
    return Request(
        settings.sft_checkpoint,
        settings.train,
        settings.dpo,
        settings.data,
        settings.tokenizer_name,
    )


def _describe(store: ReferenceStore) -> dict[str, Any]:
    """Return the description of one store, as `info` shows it."""
    shards = store.shards
    return {
        "store": str(store.folder),
        "reference": store.identity.reference,
        "recipe": store.identity.recipe,
        "shards": len(shards),
        "rows": sum(len(shard) for shard in shards),
        "tokens": sum(shard.layout.targets for shard in shards),
        "per_token": sum(len(shard) for shard in shards if shard.layout.ragged),
        "bytes": sum(shard.size for shard in shards),
        "damaged": len(list(store.folder.glob("damaged-*"))),
    }
