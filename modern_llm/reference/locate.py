"""Which store a run reads: by the digest of the reference's weights, or by the digest it is told.

Called by the reference pass and the verbs.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from modern_llm.config.dpo import DPOConfig
from modern_llm.config.errors import StorageError
from modern_llm.distributed.runtime import Runtime
from modern_llm.models.checkpoint_tensors import stored_tensors, weight_files
from modern_llm.models.load import Checkpoint
from modern_llm.reference.keys import scoring_recipe
from modern_llm.reference.store.layout import Identity
from modern_llm.reference.store.paths import read_manifest, stores_in
from modern_llm.reference.store.store import ReferenceStore
from modern_llm.reference.weights_digest import remembered_digest
from modern_llm.storage.file_digests import cache_root

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class FoundStore:
    """A reference by its digest, and the store of its values (None for a live reference)."""

    digest: str
    store: ReferenceStore | None
    foreign: bool = False
    """Whether the weights are not at hand: the digest was told."""


def find_store(runtime: Runtime, checkpoint: Checkpoint, dpo: DPOConfig) -> FoundStore:
    """Return the store of the reference's values; it need not exist yet.

    Args:
        checkpoint: of the reference, unless `dpo.reference_digest` tells of another.

    Raises:
        StorageError: no store, or several, have the digest that was told.
    """
    recipe = recipe_of(checkpoint, runtime)
    if dpo.reference_digest is not None:
        store = _opened(runtime, lambda: _told(runtime.forward_dtype, dpo))
        return FoundStore(store.identity.reference, store, foreign=True)
    digest = digest_of_checkpoint(runtime, checkpoint)
    if dpo.reference == "model":
        return FoundStore(digest, None)
    identity = Identity(digest, recipe)
    if dpo.reference_store is None:
        store = ReferenceStore.at(cache_root(), identity)
    else:
        folder = dpo.reference_store
        store = _opened(runtime, lambda: folder)
        _must_be(store, identity)
    if runtime.is_main:
        log.info("reference: store %s", store.folder)
        if not store.shards:
            _say_what_differs(identity)
    return FoundStore(digest, store)


def _opened(runtime: Runtime, find: Callable[[], Path]) -> ReferenceStore:
    """Open a standing store; on rank 0 alone must it be there, which is the one that reads it."""

    def look() -> tuple[Path, Identity]:
        folder = find()
        return folder, ReferenceStore.open(folder).identity

    return ReferenceStore(*runtime.on_main(look))


def recipe_of(checkpoint: Checkpoint, runtime: Runtime) -> str:
    """Return the scoring recipe of a run."""
    return scoring_recipe(checkpoint.config, runtime.forward_dtype)


def digest_of_checkpoint(runtime: Runtime, checkpoint: Checkpoint) -> str:
    """Return the digest of a checkpoint's weights, read once a machine, the same on every rank."""
    files = weight_files(checkpoint)
    with runtime.one_per_machine_first():
        digest = remembered_digest(
            files,
            lambda: stored_tensors(checkpoint, files),
            cache_root() / "digests",
            recipe_facts(checkpoint),
        )
    runtime.agree(digest, "the reference's weights")
    return digest


def recipe_facts(checkpoint: Checkpoint) -> str:
    """Return what of a configuration decides which tensors count: the architecture, and ties."""
    config = checkpoint.config
    return f"{config.model_type} tied={getattr(config, 'tie_word_embeddings', None)}"


def _say_what_differs(identity: Identity) -> None:
    """Where other values are kept under this root, say in what they are not those of this run."""
    for folder in stores_in(cache_root()):
        other = read_manifest(folder)
        if other is None or other == identity:
            continue
        if other.reference == identity.reference:
            log.info(
                "reference: %s holds values of these weights, scored otherwise (%s, not %s)",
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


def _told(compute: str, dpo: DPOConfig) -> Path:
    """Find the store of a digest that was told; rank 0 only."""
    told = dpo.reference_digest or ""
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
        if identity.reference.startswith(told) and scored == compute:
            fitting.append(folder)
        else:
            others.append(f"{folder} holds {identity.reference[:16]} in {scored}")
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        raise StorageError(
            f"dpo.reference_digest {told[:16]}: several stores hold such values "
            f"({', '.join(map(str, fitting))}); name one with dpo.reference_store"
        )
    raise StorageError(
        f"dpo.reference_digest {told[:16]}: no store holds values of these weights in {compute}"
        f"{'; ' + '; '.join(others[:3]) if others else ''}; name its folder with "
        "dpo.reference_store, or look at the digest (`modern-llm reference info`)"
    )


def _must_be(store: ReferenceStore, identity: Identity) -> None:
    if store.identity.reference != identity.reference:
        raise StorageError(
            f"dpo.reference_store {store.folder}: holds values of other weights "
            f"({store.identity.reference[:16]}, the reference is {identity.reference[:16]}); name "
            "the right folder or checkpoint"
        )
    if store.identity.recipe != identity.recipe:
        raise StorageError(
            f"dpo.reference_store {store.folder}: scored otherwise ({store.identity.recipe}, this "
            f"run needs {identity.recipe}); train with the same mixed_precision, or fill it anew"
        )
