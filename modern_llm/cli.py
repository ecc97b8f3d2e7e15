"""`modern-llm VERB`: reads settings, calls the Python API, turns errors into one line and a status.

Nothing heavy is imported before a verb runs, so that `--help` answers at once. Every verb is also
`python -m modern_llm VERB`, and under `accelerate launch -m modern_llm VERB`.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NoReturn

import modern_llm
from modern_llm.config.errors import UserError, close_to, status_of
from modern_llm.config.printable import PrintableFormatter, json_line
from modern_llm.distributed.shutdown.signals import StopRequest
from modern_llm.verbs import (
    completion,
    demo,
    doctor,
    evaluate,
    export,
    generate,
    inspect,
    migrate,
    plan,
    presets,
    reference,
    report,
    score,
)
from modern_llm.verbs.command_line import CONFIGURATIONS
from modern_llm.verbs.settings import Settings, read_settings
from modern_llm.verbs.stages import STAGES

LONGEST_WORD = 500
"""Characters of one word in an error's line; a path has fewer."""

# verb -> (settings, what it does); a verb of two words is one of a group: `reference fill`
VERBS: dict[str, tuple[type[Settings], Callable[[Any], dict[str, Any]]]] = {
    "demo": (demo.DemoSettings, demo.demo),
    **{stage.name: (stage.settings, stage.verb) for stage in STAGES},
    "inspect": (inspect.InspectSettings, inspect.inspect),
    "plan": (plan.PlanSettings, plan.plan),
    "migrate": (migrate.MigrateSettings, migrate.migrate),
    "presets": (presets.PresetsSettings, presets.presets),
    "completion": (completion.CompletionSettings, lambda s: completion.completion(s, VERBS)),
    "doctor": (doctor.DoctorSettings, doctor.doctor),
    "report": (report.ReportSettings, report.report),
    "reference fill": (reference.FillSettings, reference.fill),
    "reference export": (reference.ExportSettings, reference.export),
    "reference verify": (reference.VerifySettings, reference.verify),
    "reference info": (reference.InfoSettings, reference.info),
    "reference merge": (reference.MergeSettings, reference.merge),
    "reference prune": (reference.PruneSettings, reference.prune),
    "score": (score.ScoreSettings, score.score),
    "evaluate": (evaluate.EvaluateSettings, evaluate.evaluate),
    "export": (export.ExportSettings, export.export),
    "generate": (generate.GenerateSettings, generate.generate),
}

# Verbs that stop where nothing is lost (status 75); a signal ends the others at once.
STOPPED_BY_SIGNALS = {
    "demo", "reference fill", "reference export", "reference verify", "score", "evaluate",
    *(stage.name for stage in STAGES),
}  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    """Run one verb and return the exit status (0, 2, 3, 4, 5, 75; 1 is a bug of ours)."""
    arguments = sys.argv[1:] if arguments is None else arguments
    verb, rest = _split(arguments)
    if verb in ("--version", "-V", "version"):
        print(f"modern-llm {modern_llm.__version__}")
        return 0
    group = [name for name in VERBS if name.startswith(f"{verb} ")]
    if verb in ("-h", "--help") or (group and rest[:1] in (["-h"], ["--help"])):
        print(_overview(group or VERBS))
        return 0
    # To the last line: a launcher whose other process has ended asks this one to end as well.
    with StopRequest() if verb in STOPPED_BY_SIGNALS else nullcontext():
        return _reported(verb, rest)


def _reported(verb: str, rest: list[str]) -> int:
    """Run a verb; an error becomes one line and a status."""
    debug = "--debug" in rest
    try:
        return _run(verb, rest)
    except KeyboardInterrupt as interrupt:
        print(
            "modern-llm: error: interrupted; run the same command again to resume",
            file=sys.stderr,
            flush=True,
        )
        return status_of(interrupt)
    except BrokenPipeError:
        return 141
    except Exception as failure:
        error, speaks = _of_many(failure)
        status = status_of(error)
        if debug or status == 1:
            raise
        if speaks:
            print(f"modern-llm: error: {_one_line(error)}", file=sys.stderr, flush=True)
        return status


def run() -> NoReturn:
    """Run the verb that the command line names and end this process with its status."""
    # OpenMP reads it when torch is imported. By default its threads spin while they wait for each
    # other: beside other work on the same cores training took twice the time and three times the
    # processor time, and alone it is no faster.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    try:
        status = main()
    except Exception:  # a bug of ours: its traceback, as Python would show it
        sys.excepthook(*sys.exc_info())
        status = 1
    leave(status)


def leave(status: int) -> NoReturn:
    """End this process with `status`, and the process groups before it where there are any."""
    if "torch.distributed" in sys.modules:
        from modern_llm.distributed.shutdown import process_exit

        process_exit.leave(status)
    sys.exit(status)


def _of_many(failure: Exception) -> tuple[BaseException, bool]:
    """Return what an error means among several processes, and whether this one prints it."""
    if "torch.distributed" not in sys.modules or "WORLD_SIZE" not in os.environ:
        # Nothing heavy was imported: of what is wrong before that, rank 0 speaks for all.
        return failure, os.environ.get("RANK", "0") == "0" or not isinstance(failure, UserError)
    from modern_llm.distributed.health.peer_failure import as_peer_error, may_speak

    error = as_peer_error(failure)
    return error, may_speak(error)


def _run(verb: str, rest: list[str]) -> int:
    if verb not in VERBS:
        raise UserError(_no_verb(verb))
    schema, run = VERBS[verb]
    settings = read_settings(schema.variant(rest), rest, verb)
    _check_world(settings.expect_world)
    with _logging(settings.debug):
        result = run(settings)
    if os.environ.get("RANK", "0") == "0" and settings.json_output:
        print(json_line(result), flush=True)
    return 0


def _check_world(expected: int | None) -> None:
    """Refuse a world of another size: some launchers quietly start one process for two."""
    found = int(os.environ.get("WORLD_SIZE", "1"))
    if expected is not None and expected != found:
        raise UserError(
            f"--expect-world {expected}, but the launcher started {found}: on a CPU use torchrun "
            f"--nproc_per_node {expected}, or accelerate launch --config_file "
            f"accelerate_configs/ddp.yaml --num_processes {expected} (accelerate launch --cpu "
            "quietly starts one process)"
        )


def _split(arguments: list[str]) -> tuple[str, list[str]]:
    """Return the verb, of one word or two, and what follows it."""
    verb, *rest = arguments or [""]
    members = [name for name in VERBS if name.startswith(f"{verb} ")]
    if not members:
        return verb, rest
    if rest and not rest[0].startswith("-"):
        return f"{verb} {rest[0]}", rest[1:]
    return verb, rest


def _no_verb(verb: str) -> str:
    """Return what is wrong with a first word that is no verb."""
    members = [name for name in VERBS if name.startswith(f"{verb} ")]
    if members:
        return f"{verb} needs a second word: one of {', '.join(members)}"
    if not verb:
        return f"a verb is missing: one of {', '.join(VERBS)}; see modern-llm --help"
    if verb.startswith("-") or verb.endswith(CONFIGURATIONS):
        return f"a verb comes first, not {verb!r}, as in: modern-llm dpo RUN.yaml"
    return f"unknown verb {verb!r}{close_to(verb, VERBS)}: one of {', '.join(VERBS)}"


def _overview(verbs: Iterable[str] = VERBS) -> str:
    lines = [
        "usage: modern-llm VERB [RUN.yaml] [--section.option VALUE ...]",
        "",
        "verbs:",
    ]
    lines += [f"  {verb:<17} {' '.join((VERBS[verb][0].__doc__ or '').split())}" for verb in verbs]
    lines += [
        "",
        "modern-llm VERB --help lists the options of one verb; --version shows the version.",
    ]
    return "\n".join(lines)


def _one_line(error: Exception) -> str:
    """Return an error's message as one printable line: it may quote bytes of a damaged file."""
    words = (
        word if len(word) <= LONGEST_WORD else f"{word[: LONGEST_WORD // 2]}...{word[-20:]}"
        for word in str(error).split()
    )
    return "".join(c if c.isprintable() else "?" for c in " ".join(words))


@contextmanager
def _logging(debug: bool) -> Iterator[None]:
    """Our lines on stderr, rank 0 only; other packages speak up from warnings on."""
    main_process = os.environ.get("RANK", "0") == "0"
    handler = logging.StreamHandler()
    handler.setFormatter(PrintableFormatter("%(message)s"))
    ours = logging.getLogger("modern_llm")
    before = ours.level, ours.propagate
    ours.addHandler(handler)
    ours.setLevel(logging.DEBUG if debug else logging.INFO if main_process else logging.ERROR)
    ours.propagate = False
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    # Kernels of the Hub are code that nobody here chose.
    os.environ.setdefault("USE_HUB_KERNELS", "NO")
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
    run()
