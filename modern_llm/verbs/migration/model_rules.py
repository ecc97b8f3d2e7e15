"""Rules for options of adapters, data and losses: another trainer's value as a value of ours."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from modern_llm.config.dpo import DIVERGENCES
from modern_llm.verbs.migration.request import (
    Found,
    NoEquivalent,
    Off,
    Request,
    as_number,
    truth,
)
from modern_llm.verbs.migration.sources import evaluation_source, sources_of
from modern_llm.verbs.migration.train_rules import number

REGULAR_EXPRESSION = re.compile(r"[\\\[\](){}|*+^$]")


def adapters(request: Request, name: str, value: Any, ours: str) -> Found:
    if request.adapters:
        return Found({ours: {}})
    if value in ("full", "", False):
        raise Off("all weights are trained")
    raise NoEquivalent("all weights are trained, or adapters of plain LoRA")


def with_adapters(rule: Callable[..., Found]) -> Callable[..., Found]:
    """Return a rule for runs with adapters alone; elsewhere the option is off."""

    def checked(request: Request, name: str, value: Any, ours: str) -> Found:
        if not request.adapters:
            raise Off("no adapter is configured")
        return rule(request, name, value, ours)

    return checked


@with_adapters
def lora(request: Request, name: str, value: Any, ours: str) -> Found:
    return number(request, name, value, ours)


@with_adapters
def lora_dropout(request: Request, name: str, value: Any, ours: str) -> Found:
    if request.stage in ("dpo", "kto"):
        if not as_number(value):
            raise Off("no dropout")
        raise NoEquivalent("DPO and KTO train without dropout, so that policy and reference agree")
    return number(request, name, value, ours)


@with_adapters
def lora_targets(request: Request, name: str, value: Any, ours: str) -> Found:
    if truth(request.values.get("lora_target_linear")):
        raise Off("lora_target_linear names all of them")
    words = value if isinstance(value, list) else [w.strip() for w in str(value).split(",")]
    if words in (["all"], ["all-linear"]):
        return Found({ours: "all-linear"})
    if any(REGULAR_EXPRESSION.search(str(word)) for word in words):
        raise NoEquivalent("a pattern there; here a list of the ends of layers' names")
    return Found({ours: words})


@with_adapters
def lora_all_linear(request: Request, name: str, value: Any, ours: str) -> Found:
    if not truth(value):
        raise Off("off")
    return Found({ours: "all-linear"})


@with_adapters
def lora_flag(request: Request, name: str, value: Any, ours: str) -> Found:
    if not truth(value):
        raise Off("off")
    return Found({ours: True})


@with_adapters
def lora_layers(request: Request, name: str, value: Any, ours: str) -> Found:
    numbers = [as_number(item) for item in (value if isinstance(value, list) else [value])]
    if not numbers or not all(isinstance(number, int) for number in numbers):
        raise NoEquivalent("a list of the numbers of layers")
    return Found({ours: numbers})


@with_adapters
def lora_list(request: Request, name: str, value: Any, ours: str) -> Found:
    words = value if isinstance(value, list) else [w.strip() for w in str(value).split(",")]
    if not [word for word in words if word]:
        raise Off("empty")
    return Found({ours: words})


def nf4(request: Request, name: str, value: Any, ours: str) -> Found:
    if not truth(value):
        raise Off("off")
    return _few_bits(request, ours, "nf4")


def int8(request: Request, name: str, value: Any, ours: str) -> Found:
    if not truth(value):
        raise Off("off")
    return _few_bits(request, ours, "int8")


def _few_bits(request: Request, ours: str, word: str) -> Found:
    if not request.adapters:
        raise NoEquivalent("only the base of adapters has few bits")
    return Found({ours: word})


def bits_of(request: Request, name: str, value: Any, ours: str) -> Found:
    word = {4: "nf4", 8: "int8"}.get(value)
    if word is None:
        raise NoEquivalent("4 or 8 bits")
    return _few_bits(request, ours, word)


@with_adapters
def nf4_type(request: Request, name: str, value: Any, ours: str) -> Found:
    if value != "nf4":
        raise NoEquivalent("4 bits are nf4 here")
    raise Off("nf4 is the one kind of 4 bits")


def eval_split(request: Request, name: str, value: Any, ours: str) -> Found:
    asked = request.values.get("eval_strategy") or request.values.get("evaluation_strategy")
    if str(asked or "no").lower() in ("no", "false"):
        raise Off("eval_strategy is no")
    return Found({ours: str(value)})


def share(request: Request, name: str, value: Any, ours: str) -> Found:
    number = as_number(value)
    if not number:
        raise Off("nothing is held out")
    if number >= 1:
        raise NoEquivalent("a number of rows there; here a share of them")
    if any(request.values.get(other) for other in ("test_datasets", "eval_dataset")):
        raise Off("other evaluation data is named")
    return Found({ours: number})


def all_answers(request: Request, name: str, value: Any, ours: str) -> Found:
    if request.stage != "sft":
        raise Off("only SFT trains on conversations")
    if not truth(value):
        raise Off("the tokens of users are never trained on")
    return Found({ours: "all"})


def last_answer(request: Request, name: str, value: Any, ours: str) -> Found:
    if request.stage != "sft":
        raise Off("only SFT trains on conversations")
    return Found({ours: "last" if truth(value) else "all"})


def template(request: Request, name: str, value: Any, ours: str) -> Found:
    if str(value).startswith("tokenizer_default"):
        raise Off("the tokenizer's own template is the default")
    if value == "jinja":
        raise Off("chat_template_jinja has it")
    raise NoEquivalent("the tokenizer's own template is used; data.template takes a text")


def chat_frame(request: Request, name: str, value: Any, ours: str) -> Found:
    if value == "empty":
        raise Off("strings are used literally by default")
    return Found({ours: "chat"})


def registered(request: Request, name: str, value: Any, ours: str) -> Found:
    names = [word.strip() for word in str(value).split(",") if word.strip()]
    if len(names) < 2:
        return Found({ours: "".join(names)})
    return Found({"data.sources": [{"dataset_name": name} for name in names]})


def training_sources(request: Request, name: str, value: Any, ours: str) -> Found:
    return Found(*sources_of(value, request.stage))


def evaluation_sources(request: Request, name: str, value: Any, ours: str) -> Found:
    return Found(*evaluation_source(value, request.stage))


def axolotl_rl(request: Request, name: str, value: Any, ours: str) -> Found:
    if request.values.get("dpo_loss_type"):
        raise Off("dpo_loss_type says more")
    return Found({ours: "sigmoid" if value == "dpo" else value})


def loss_type(request: Request, name: str, value: Any, ours: str) -> Found:
    words = [str(word) for word in (value if isinstance(value, list) else [value])]
    if request.stage == "kto":
        # LLaMA-Factory's pref_loss is of DPO and has no effect there.
        return Found({ours: words[0]} if name == "loss_type" else {})
    if request.stage != "dpo":
        if words in (["nll"], ["chunked_nll"]):
            raise Off("the mean log-prob of the answer's tokens is the loss")
        raise NoEquivalent("SFT has one loss: the negative log-likelihood")
    return Found({ours: words[0] if len(words) == 1 else words})


def loss_weights(request: Request, name: str, value: Any, ours: str) -> Found:
    weights = [as_number(weight) for weight in value] if isinstance(value, list) else []
    if not weights:
        raise Off("every loss has the weight 1")
    if None in weights:
        raise NoEquivalent("not a list of numbers")
    if len(weights) == 1:
        if weights[0] == 1:
            raise Off("the weight of the only loss")
        raise NoEquivalent("one loss has no weight: change train.learning_rate")
    return Found({ours: weights})


def f_divergence(request: Request, name: str, value: Any, ours: str) -> Found:
    word = str(value).rpartition(".")[2].lower()
    if word not in DIVERGENCES:
        raise NoEquivalent(f"dpo.f_divergence is one of {', '.join(DIVERGENCES)}")
    return Found({ours: word})


def f_alpha(request: Request, name: str, value: Any, ours: str) -> Found:
    kind = str(request.values.get("f_divergence_type", "")).rpartition(".")[2].lower()
    if kind != "alpha_divergence":
        raise Off("an option of f_divergence_type alpha_divergence alone")
    return number(request, name, value, ours)


def sync_reference(request: Request, name: str, value: Any, ours: str) -> Found:
    return sync_option(request, name, request.values.get("ref_model_sync_steps"), ours)


def sync_option(request: Request, name: str, value: Any, ours: str) -> Found:
    if not truth(request.values.get("sync_ref_model")):
        raise Off("the reference does not move")
    return number(request, name, value, ours)


def smoothing(request: Request, name: str, value: Any, ours: str) -> Found:
    if not as_number(value):
        raise Off("no smoothing")
    return number(request, name, value, ours)


def ld_alpha(request: Request, name: str, value: Any, ours: str) -> Found:
    if value in (1, 1.0):
        raise Off("1 weighs no token")
    return number(request, name, value, ours)


def discopop(request: Request, name: str, value: Any, ours: str) -> Found:
    return _of_loss(request, "discopop", name, value, ours)


def simpo(request: Request, name: str, value: Any, ours: str) -> Found:
    return _of_loss(request, "simpo", name, value, ours)


def _of_loss(request: Request, loss: str, name: str, value: Any, ours: str) -> Found:
    names = [request.values.get(n) for n in ("loss_type", "dpo_loss_type", "pref_loss", "rl")]
    if not any(loss == n or (isinstance(n, list) and loss in n) for n in names):
        raise Off(f"an option of the loss {loss} alone")
    return number(request, name, value, ours)
