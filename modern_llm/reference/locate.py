"""The store of a run: found by the digest of the reference's weights, or by a given digest."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path

from modern_llm.config.errors import StorageError
from modern_llm.config.reference import ReferenceConfig
from modern_llm.distributed.runtime import Runtime
from modern_llm.models.checkpoint_tensors import stored_tensors, weight_files
from modern_llm.models.load import Checkpoint, inspect_checkpoint
from modern_llm.reference.keys import scoring_recipe
from modern_llm.reference.store.layout import Identity
from modern_llm.reference.store.paths import read_manifest, stores_in
from modern_llm.reference.store.store import ReferenceStore
from modern_llm.reference.weights_digest import remembered_digest
from modern_llm.storage.file_digests import cache_root

log = logging.getLogger(__name__)


def find_store(
    runtime: Runtime, checkpoint: Checkpoint, dpo: ReferenceConfig
) -> tuple[str, ReferenceStore | None]:
    """Return the digest of the reference, and its store (None for `reference: model`).

    The store need not exist yet, unless a digest or folder is given.

    Args:
        checkpoint: of the reference; its weights are not read if `reference_digest` is set.

    Raises:
        StorageError: the given folder has other values, or no single store has the given digest.
    """
    if dpo.reference_digest is not None:
        store = _open(runtime, lambda: _folder_of_digest(runtime.forward_dtype, dpo))
        return store.identity.reference, store
    digest = digest_of_checkpoint(runtime, checkpoint)
    if dpo.reference == "model":
        return digest, None
    identity = Identity(digest, scoring_recipe(checkpoint.config, runtime.forward_dtype))
    if dpo.reference_store is None:
        store = ReferenceStore.at(cache_root(), identity)
    else:
        folder = dpo.reference_store
        store = _open(runtime, lambda: folder)
        _check_identity(store, identity, dpo.section_name)
    if runtime.is_main:
        log.info("reference: store %s", store.folder)
        if not store.shards:
            _log_similar_stores(identity)
    return digest, store


def store_of(
    reference: str | Path | Checkpoint, compute: str = "float32", root: Path | None = None
) -> ReferenceStore:
    """Return the store of a checkpoint's log-probs: the one that a run with this reference uses.

    It need not exist yet. For scripts of your own; a run calls `find_store`.

    Args:
        reference: Hub id, folder, `.pt` file or a run's checkpoint; only its weights are digested.
        compute: precision of the forward whose log-probs it holds, as `Runtime.forward_dtype`.
        root: folder of the stores; by default `MODERN_LLM_CACHE` or a folder beside the Hub's.

    Raises:
        UserError: no such checkpoint.
        StorageError: its files are damaged or change while they are read.
    """
    checkpoint = reference if isinstance(reference, Checkpoint) else inspect_checkpoint(reference)
    identity = Identity(_digest(checkpoint), scoring_recipe(checkpoint.config, compute))
    return ReferenceStore.at(root or cache_root(), identity)


def _open(runtime: Runtime, find: Callable[[], Path]) -> ReferenceStore:
    """Open an existing store. Only rank 0 reads it, so the other ranks need not see its folder."""

    def open_folder() -> tuple[Path, Identity]:
        folder = find()
        return folder, ReferenceStore.open(folder).identity

    return ReferenceStore(*runtime.on_main(open_folder))


def digest_of_checkpoint(runtime: Runtime, checkpoint: Checkpoint) -> str:
    """Return the digest of a checkpoint's weights, read once per machine, equal on every rank."""
    with runtime.one_per_machine_first():
        digest = _digest(checkpoint)
    runtime.agree(digest, "the reference's weights")
    return digest


def _digest(checkpoint: Checkpoint) -> str:
    """Return the digest of a checkpoint's weights, from the cache if its files are unchanged."""
    files = weight_files(checkpoint)
    return remembered_digest(
        files,
        lambda: stored_tensors(checkpoint, files),
        cache_root() / "digests",
        _fingerprint(checkpoint),
    )


def _fingerprint(checkpoint: Checkpoint) -> str:
    """Return the parts of a configuration that decide which tensors count: architecture, ties."""
    config = checkpoint.config
    return f"{config.model_type} tied={getattr(config, 'tie_word_embeddings', None)}"


def _log_similar_stores(identity: Identity) -> None:
    """Log the stores that differ from a run's only in the weights or only in the recipe."""
    for folder in stores_in(cache_root()):
        other = read_manifest(folder)
        if other is None or other == identity:
            continue
        if other.reference == identity.reference:
            log.info(
                "reference: %s holds values of these weights with another recipe (%s, not %s)",
                folder.name,
                other.recipe,
                identity.recipe,
            )
        elif other.recipe == identity.recipe:
            log.info(
                "reference: %s holds values of other weights (%s, not %s)",
                folder.name,
                other.reference[:16],
                identity.reference[:16],
            )


def _folder_of_digest(compute: str, dpo: ReferenceConfig) -> Path:
    """Return the folder of the store with `reference_digest`; rank 0 only."""
    digest, place = dpo.reference_digest or "", dpo.section_name
    candidates = stores_in(cache_root())
    if dpo.reference_store is not None:
        candidates = [dpo.reference_store]
    fitting, others = [], []
    for folder in candidates:
        try:
            identity = ReferenceStore.open(folder).identity
        except StorageError as error:
            others.append(str(error))
            continue
        scored = json.loads(identity.recipe).get("compute")
        if identity.reference.startswith(digest) and scored == compute:
            fitting.append(folder)
        else:
            others.append(f"{folder} holds {identity.reference[:16]} in {scored}")
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        raise StorageError(
            f"{place}.reference_digest {digest[:16]}: several stores have it "
            f"({', '.join(map(str, fitting))}); name one with {place}.reference_store"
        )
    raise StorageError(
        f"{place}.reference_digest {digest[:16]}: no store holds values of these weights in "
        f"{compute}{'; ' + '; '.join(others[:3]) if others else ''}; name its folder with "
        f"{place}.reference_store, or look at the digest (`modern-llm reference info`)"
    )


def _check_identity(store: ReferenceStore, identity: Identity, place: str) -> None:
    """Raise `StorageError` if a store holds values of other weights or of another recipe.

    Args:
        place: section of the configuration, for the message.
    """
    if store.identity.reference != identity.reference:
        raise StorageError(
            f"{place}.reference_store {store.folder}: holds values of other weights "
            f"({store.identity.reference[:16]}, the reference is {identity.reference[:16]}); name "
            "the right folder or checkpoint"
        )
    if store.identity.recipe != identity.recipe:
        raise StorageError(
            f"{place}.reference_store {store.folder}: has the recipe {store.identity.recipe}, this "
            f"run needs {identity.recipe}; train with the same mixed_precision, or fill it again"
        )
