"""Rules for options of the section `train`: another trainer's value as a value of ours.

A rule takes the request, an option with its value, and our option; it returns what that sets here.
"""

from __future__ import annotations

import re
from typing import Any, get_args

from modern_llm.config.training import HIGHER_IS_BETTER, LOWER_IS_BETTER, Tracker
from modern_llm.verbs.migration.request import (
    Found,
    NoEquivalent,
    Off,
    Request,
    as_number,
    truth,
)

SCHEDULES = {
    "cosine": "cosine", "cosine_with_min_lr": "cosine", "linear": "linear",
    "constant": "constant", "constant_with_warmup": "constant",
}  # fmt: skip

OPTIMIZERS = {
    "muon": "its updates have the scale of AdamW's; embeddings, head and vectors use AdamW",
    "adafactor": "the learning rate is a share of each weight's size",
}
"""Optimizers of the same name -> what differs."""


def same(request: Request, name: str, value: Any, ours: str) -> Found:
    return Found({ours: value})


def text(request: Request, name: str, value: Any, ours: str) -> Found:
    if not str(value).strip():
        raise Off("empty")
    return Found({ours: str(value)})


def file_name(request: Request, name: str, value: Any, ours: str) -> Found:
    if not str(value).strip():
        raise Off("empty")
    safe = re.sub(r"[^\w.+-]+", "-", str(value)).lstrip(".-")
    if not safe:
        raise NoEquivalent("train.run_name is part of a folder's name")
    return Found({ours: safe}, "" if safe == value else "it is part of a folder's name here")


def number(request: Request, name: str, value: Any, ours: str) -> Found:
    number = as_number(value)
    if number is None:
        raise NoEquivalent("not a number")
    return Found({ours: number})


def adam(request: Request, name: str, value: Any, ours: str) -> Found:
    chosen = request.values.get("optim") or request.values.get("optimizer") or ""
    if "adafactor" in str(chosen).lower():
        raise Off("adafactor does not use it")
    return number(request, name, value, ours)


def positive(request: Request, name: str, value: Any, ours: str) -> Found:
    number = as_number(value)
    if number is None or number <= 0:
        raise Off("no limit")
    return Found({ours: int(number)})


def flag(request: Request, name: str, value: Any, ours: str) -> Found:
    if isinstance(value, str) and value.lower() not in ("true", "false"):
        return Found({ours: True}, "activations are recomputed, not kept elsewhere")
    return Found({ours: truth(value)})


def recompute(request: Request, name: str, value: Any, ours: str) -> Found:
    if truth(request.values.get("activation_offloading")):
        raise Off("part of activation_offloading here")
    return flag(request, name, value, ours)


def offloaded(request: Request, name: str, value: Any, ours: str) -> Found:
    if not truth(value):
        raise Off("not set")
    return Found({ours: "offload"}, "the inputs of layers, from which the rest is recomputed")


def not_flag(request: Request, name: str, value: Any, ours: str) -> Found:
    return Found({ours: not truth(value)})


def batch(request: Request, name: str, value: Any, ours: str) -> Found:
    whole = request.number("batch_size")
    if whole:
        return Found({ours: int(whole)})
    each = request.number("per_device_train_batch_size", "micro_batch_size") or 1
    steps = request.number("gradient_accumulation_steps") or 1
    processes = request.processes
    note = f"{each:g} x {steps:g} x {processes} process" + ("es" if processes > 1 else "")
    return Found({ours: int(each * steps * processes)}, f"{note} (--processes)")


def epochs(request: Request, name: str, value: Any, ours: str) -> Found:
    if request.number("max_steps"):
        raise Off("max_steps comes first")
    return number(request, name, value, ours)


def schedule(request: Request, name: str, value: Any, ours: str) -> Found:
    word = str(value).rpartition(".")[2].lower()
    if word not in SCHEDULES:
        raise NoEquivalent("train.schedule is cosine, linear or constant")
    return Found({ours: SCHEDULES[word]})


def schedule_options(request: Request, name: str, value: Any, ours: str) -> Found:
    options = dict(value) if isinstance(value, dict) else {}
    rate = request.number("learning_rate")
    least = as_number(options.pop("min_lr", None))
    share = as_number(options.pop("min_lr_rate", least / rate if least and rate else None))
    if options or share is None:
        raise NoEquivalent("the only option of a schedule is train.min_learning_rate_ratio")
    return Found({ours: share})


def warmup(request: Request, name: str, value: Any, ours: str) -> Found:
    number = as_number(value)
    if not number:
        raise Off("no warm-up of a number of steps")
    if number < 1:
        return Found({"train.warmup_ratio": number})
    return Found({ours: int(number)})


def ratio(request: Request, name: str, value: Any, ours: str) -> Found:
    if request.number("warmup_steps"):
        raise Off("warmup_steps comes first")
    return number(request, name, value, ours)


def grad_norm(request: Request, name: str, value: Any, ours: str) -> Found:
    return Found({ours: as_number(value) or None})


def bf16(request: Request, name: str, value: Any, ours: str) -> Found:
    half = any(truth(request.values.get(name)) for name in ("fp16", "float16"))
    if name not in request.written and half:
        raise Off("fp16 is set")
    if not truth(value) and value not in ("auto", "full"):
        if half or any(truth(request.values.get(other)) for other in ("bf16", "pure_bf16")):
            raise Off("another precision is set")
        return Found({ours: "no"})
    kept = "the weights stay float32, the forward is bfloat16"
    return Found({ours: "bf16"}, kept if value == "full" else "")


def fp16(request: Request, name: str, value: Any, ours: str) -> Found:
    if not truth(value):
        raise Off("off")
    return Found({ours: "fp16"})


def best_metric(request: Request, name: str, value: Any, ours: str) -> Found:
    patience = request.number("early_stopping_patience", "early_stopping_steps")
    if not (truth(request.values.get("load_best_model_at_end")) or patience):
        raise Off("no best checkpoint is looked for")
    metric = f"eval/{str(value).removeprefix('eval_').removeprefix('eval/')}"
    known = [f"eval/{name}" for name in (*LOWER_IS_BETTER, *HIGHER_IS_BETTER)]
    if metric not in known:
        raise NoEquivalent(f"train.best_metric is one of {', '.join(known)}")
    return Found({ours: metric})


def optimizer(request: Request, name: str, value: Any, ours: str) -> Found:
    word = str(value).rpartition(".")[2].lower()
    for known, note in OPTIMIZERS.items():
        if known in word:
            return Found({ours: known}, note)
    if "adamw" not in word:
        raise NoEquivalent("optimizers are adamw, adamw_8bit, muon and adafactor")
    if re.search(r"8.?bit", word):
        paged = "the moments are not paged to the host" if "paged" in word else ""
        return Found({ours: "adamw_8bit"}, paged)
    if re.search(r"bit|paged|anyprecision|ao", word):
        return Found({}, "AdamW with float32 moments is used")
    raise Off("AdamW is the default")


def muon_flag(request: Request, name: str, value: Any, ours: str) -> Found:
    if not truth(value):
        raise Off("not set")
    return Found({ours: "muon"}, OPTIMIZERS["muon"])


def every(request: Request, name: str, value: Any, ours: str) -> Found:
    number = as_number(value)
    if not number:
        raise Off("not set")
    if number < 1:
        raise NoEquivalent("a share of all steps; count steps here")
    return Found({ours: int(number)})


def strategy(request: Request, name: str, value: Any, ours: str) -> Found:
    word = str(value).lower()
    if word == "steps" or (word in ("no", "false") and ours == "train.eval_every"):
        raise Off(
            "evaluation runs where evaluation data is named" if word != "steps" else "as here"
        )
    raise NoEquivalent(f"counted in steps here: set {ours}")


def per_epoch(request: Request, name: str, value: Any, ours: str) -> Found:
    if not as_number(value):
        raise Off("off")
    raise NoEquivalent(f"counted in steps here: set {ours}")


def trackers(request: Request, name: str, value: Any, ours: str) -> Found:
    words = value if isinstance(value, list) else [value]
    if words == ["all"]:
        raise NoEquivalent("name the trackers")
    words = [word for word in words if str(word) != "none"]
    if not words:
        raise Off("no tracker")
    if strange := [word for word in words if word not in get_args(Tracker)]:
        raise NoEquivalent(f"no tracker {strange[0]!r} here")
    return Found({ours: words})


def tracker_flag(request: Request, name: str, value: Any, ours: str) -> Found:
    if not truth(value):
        raise Off("off")
    return Found({ours: [_tracker(name.removeprefix("use_"))]})


def tracker_project(request: Request, name: str, value: Any, ours: str) -> Found:
    if not str(value).strip():
        raise Off("empty")
    return Found({ours: str(value), "train.trackers": [_tracker(name.partition("_")[0])]})


def _tracker(word: str) -> str:
    return {"comet": "comet_ml"}.get(word, word)
