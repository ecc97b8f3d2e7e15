"""Read the configuration file of another trainer: YAML, or the literals of a Python script.

A script is parsed with `ast` and never executed: what is no literal is reported as not read.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from modern_llm.config.errors import ConfigError
from modern_llm.config.foreign import TOOLS
from modern_llm.config.foreign.rows import Tool
from modern_llm.config.kto import LABELLED_LOSSES
from modern_llm.storage.regular_files import read_text
from modern_llm.storage.untrusted import LARGEST_YAML, parse_yaml

CONFIGURATIONS = {
    "DPOConfig": "dpo",
    "KTOConfig": "kto",
    "SFTConfig": "sft",
    "TrainingArguments": "",
}
TRAINERS = {"DPOTrainer": "dpo", "KTOTrainer": "kto", "SFTTrainer": "sft"}
ADAPTERS = {
    "r": "lora_r", "target_modules": "lora_target_modules", "task_type": "lora_task_type",
    "modules_to_save": "lora_modules_to_save", "target_parameters": "lora_target_parameters",
}  # fmt: skip
"""Arguments of peft's `LoraConfig` under TRL's names."""
PEFT_DEFAULTS = {"lora_r": 8, "lora_alpha": 8}
OURS = {"train", "data", "dpo"}


@dataclass
class Foreign:
    """What a file of another trainer says."""

    values: dict[str, Any]
    stage: str = ""
    """The stage, where a script says it."""
    tool: Tool | None = None
    unread: dict[str, str] = field(default_factory=dict)
    """Options of a script whose values are no literals, with the expression."""


def read_foreign(path: Path) -> Foreign:
    """Return the options in a file, nothing executed.

    Raises:
        ConfigError: it cannot be read, is no configuration, or is one of this package.
    """
    try:
        text = read_text(path, LARGEST_YAML, encoding="utf-8-sig")
    except OSError as error:
        raise ConfigError([f"{path}: {error.strerror}; check the path"]) from error
    except ValueError as error:  # no UTF-8, or too large
        raise ConfigError([f"{path}: not a text file of a configuration: {error}"]) from error
    if path.suffix == ".py":
        return _of_script(path, text)
    try:
        values, _ = parse_yaml(text)
    except yaml.YAMLError as error:
        reason = getattr(error, "problem", None) or str(error)
        raise ConfigError([f"{path}: not YAML or JSON: {reason}"]) from error
    if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
        raise ConfigError([f"{path}: not a configuration: give a mapping of options"])
    if isinstance(values.get("train"), dict) or OURS <= set(values):
        raise ConfigError([f"{path}: is a configuration of modern-llm already: run it with dpo"])
    return Foreign(values)


def tool_of(foreign: Foreign, path: Path) -> Tool:
    """Return the trainer whose options these are: the one that alone knows some of them.

    Raises:
        ConfigError: the names fit none, or several as well.
    """
    if foreign.tool is not None:
        return foreign.tool
    names = set(foreign.values)
    known = {tool.name: tool.names() & names for tool in TOOLS}
    if not any(known.values()):
        raise ConfigError([f"{path}: no option of TRL, Axolotl or LLaMA-Factory; give such a file"])
    own = {
        tool.name: known[tool.name] - set().union(*(o.names() for o in TOOLS if o is not tool))
        for tool in TOOLS
    }
    best = max(len(known[tool.name]) for tool in TOOLS)
    found = [tool for tool in TOOLS if own[tool.name] and len(known[tool.name]) == best]
    if len(found) != 1:
        fits = ", ".join(tool.name for tool in TOOLS if len(known[tool.name]) == best)
        raise ConfigError([f"{path}: its options fit {fits}: say which with --tool"])
    return found[0]


def stage_of(tool: Tool, foreign: Foreign, path: Path) -> str:
    """Return the stage that the file is for.

    Raises:
        ConfigError: it is for a stage that is not here, or names no stage.
    """
    values = foreign.values
    if foreign.stage:
        return foreign.stage
    if tool.name == "Axolotl":
        rewards = [n for n in ("reward_model", "process_reward_model") if values.get(n) is True]
        said = rewards[0] if rewards else values.get("rl")
        stages = {
            None: "sft",
            "dpo": "dpo",
            "kto": "kto",
            "ipo": "dpo",
            "simpo": "dpo",
            "orpo": "dpo",
        }
        if said is None and values.get("pretraining_dataset"):
            return "pretrain"
    elif tool.name == "LLaMA-Factory":
        said = values.get("stage", "sft")
        stages = {"dpo": "dpo", "kto": "kto", "sft": "sft", "pt": "pretrain"}
    else:
        return _of_trl(values, path)
    if said not in stages:
        raise ConfigError(
            [f"{path}: trains {said}: the stages here are pretrain, sft, dpo and kto"]
        )
    return stages[said]


def _of_trl(values: dict[str, Any], path: Path) -> str:
    """Return the verb of TRL that a file is for, by the options that one of them has alone."""
    names = set(values)
    of_kto = values.get("loss_type") in tuple(LABELLED_LOSSES)
    if of_kto or names & {"desirable_weight", "undesirable_weight"}:
        return "kto"
    dpo = names & {
        "beta", "loss_weights", "label_smoothing", "ld_alpha", "precompute_ref_log_probs",
        "precompute_ref_batch_size", "f_divergence_type", "sync_ref_model", "use_weighting",
        "discopop_tau", "rpo_alpha", "max_prompt_length", "disable_dropout", "reference_free",
    }  # fmt: skip
    sft = names & {
        "packing", "packing_strategy", "eval_packing", "dataset_text_field", "completion_only_loss",
        "assistant_only_loss", "chat_template_path", "eos_token", "shuffle_dataset",
    }  # fmt: skip
    if bool(dpo) == bool(sft):
        raise ConfigError([f"{path}: fits `trl dpo` and `trl sft`: say --stage dpo or --stage sft"])
    return "dpo" if dpo else "sft"


def _of_script(path: Path, text: str) -> Foreign:
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ConfigError([f"{path}: not Python: {error}"]) from error
    script = _Script(tree)
    found = [call for name in CONFIGURATIONS for call in script.calls(name)]
    if len(found) != 1:
        many = f"{len(found)} calls" if found else "no call"
        raise ConfigError(
            [
                f"{path}: {many} of DPOConfig, KTOConfig, SFTConfig or TrainingArguments: "
                "one is needed"
            ]
        )
    foreign = Foreign({}, tool=TOOLS[0])
    name = _called(found[0])
    trainers = {stage for trainer, stage in TRAINERS.items() if script.calls(trainer)}
    foreign.stage = CONFIGURATIONS[name] or (trainers.pop() if len(trainers) == 1 else "")
    if not foreign.stage:
        raise ConfigError([f"{path}: TrainingArguments without one DPOTrainer or SFTTrainer"])
    script.take(found[0], foreign, first="output_dir")
    _take_adapters(script, foreign)
    _take_model(script, foreign)
    _take_data(script, foreign)
    return foreign


class _Script:
    """Calls and constants of a parsed script."""

    def __init__(self, tree: ast.AST):
        self._nodes = list(ast.walk(tree))
        self._constants: dict[str, list[ast.expr]] = {}
        for node in self._nodes:
            if isinstance(node, ast.Assign) and len(node.targets) == 1:
                if isinstance(node.targets[0], ast.Name):
                    self._constants.setdefault(node.targets[0].id, []).append(node.value)

    def calls(self, name: str) -> list[ast.Call]:
        """Return the calls of a function or method of this name."""
        return [
            node for node in self._nodes if isinstance(node, ast.Call) and _called(node) == name
        ]

    def literal(self, node: ast.expr) -> Any:
        """Return the value of a literal, of a name that one literal is assigned to, of Path(...).

        Raises:
            ValueError: it is none of these.
        """
        if isinstance(node, ast.Name):
            found = self._constants.get(node.id, [])
            if len(found) != 1 or isinstance(found[0], ast.Name):
                raise ValueError("not a literal")
            return self.literal(found[0])
        if isinstance(node, ast.Call) and _called(node) == "Path" and len(node.args) == 1:
            return self.literal(node.args[0])
        return ast.literal_eval(node)

    def take(
        self, call: ast.Call, foreign: Foreign, names: dict[str, str] | None = None, first: str = ""
    ) -> None:
        """Add the arguments of a call to the options, under the names of TRL."""
        given = [(keyword.arg or "**", keyword.value) for keyword in call.keywords]
        given += [(first or f"argument {at}", node) for at, node in enumerate(call.args)]
        for name, node in given:
            name = (names or {}).get(name, name)
            try:
                foreign.values[name] = self.literal(node)
            except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
                foreign.unread[name] = ast.unparse(node)


def _take_adapters(script: _Script, foreign: Foreign) -> None:
    calls = script.calls("LoraConfig")
    if len(calls) == 1:
        foreign.values["use_peft"] = True
        foreign.values |= PEFT_DEFAULTS
        script.take(calls[0], foreign, ADAPTERS)
    elif calls:
        foreign.unread["LoraConfig"] = f"{len(calls)} calls"


def _take_model(script: _Script, foreign: Foreign) -> None:
    """Find the model: the argument of a trainer, or of AutoModel...from_pretrained."""
    nodes = [
        keyword.value
        for name in TRAINERS
        for call in script.calls(name)
        for keyword in call.keywords
        if keyword.arg == "model"
    ]
    for call in script.calls("from_pretrained"):
        if call.args and "Model" in ast.unparse(call.func):
            nodes.append(call.args[0])
    names = set()
    for node in nodes:
        try:
            names.add(script.literal(node))
        except (ValueError, TypeError, SyntaxError, RecursionError):
            continue
    names = {name for name in names if isinstance(name, str)}
    if len(names) == 1:
        foreign.values["model_name_or_path"] = names.pop()
    elif names:
        foreign.unread["model"] = " or ".join(sorted(names))


def _take_data(script: _Script, foreign: Foreign) -> None:
    """Find the data set, where one is loaded."""
    calls = script.calls("load_dataset")
    if len(calls) != 1:
        if calls:
            foreign.unread["load_dataset"] = " and ".join(ast.unparse(call) for call in calls)
        return
    found = Foreign({})
    positional = dict(zip(("path", "name"), calls[0].args, strict=False))
    keywords = [ast.keyword(name, node) for name, node in positional.items()]
    script.take(ast.Call(calls[0].func, [], keywords + calls[0].keywords), found)
    foreign.unread |= {f"load_dataset {name}": text for name, text in found.unread.items()}
    if "path" in found.values:
        foreign.values["datasets"] = [found.values]


def _called(call: ast.Call) -> str:
    return ast.unparse(call.func).rpartition(".")[2]
