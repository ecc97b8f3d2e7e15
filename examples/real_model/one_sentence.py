"""Teach a chat model to answer in one sentence: one_sentence.py MODEL FOLDER [--small]

The model answers questions about some topics. Of each answer with several sentences, the first one
alone is preferred to the whole: no one labels anything. DPO trains LoRA adapters on these pairs.
Then questions about other topics are answered by the model before and after, and printed side by
side, with what was won and what was lost.
"""

import argparse
import json
import math
import re
from pathlib import Path

import torch

import modern_llm as ml
from modern_llm.config import PreferenceDatasetConfig
from modern_llm.evaluation.pairs import evaluate_pairs
from modern_llm.evaluation.statistics import wilson
from modern_llm.inference.chat import answer_prompts
from modern_llm.models.load import load_model, load_tokenizer

TOPICS = (
    "volcanoes, the human heart, chess, coffee, glaciers, bees, the printing press, rainbows, "
    "jazz, photosynthesis, bridges, the Roman Empire, earthquakes, bicycles, whales, bread, "
    "electric cars, the Moon, vaccines, origami, deserts, violins, tea, lighthouses"
).split(", ")
UNSEEN = (
    "owls, the Silk Road, tides, mathematics, soap, marathons, penguins, the telephone, rice, "
    "thunderstorms, libraries, kites"
).split(", ")
QUESTIONS = (
    "What should I know about {}?",
    "Can you tell me something interesting about {}?",
    "Why do people care about {}?",
    "How would you explain {} to a child?",
)
TEXT = Path(__file__).parents[2] / "README.md"
END = re.compile(r"(?:(?<=[.!?])|(?<=[.!?][\"')]))\s+(?=[A-Z0-9\"'(*-])")


def sentences(answer: str) -> list[str]:
    """Split an answer at the ends of its sentences and at line breaks."""
    lines = (line.strip() for line in answer.splitlines())
    return [part for line in lines if line for part in END.split(line)]


def is_one_sentence(answer: str) -> bool:
    """Whether an answer is one whole sentence."""
    return len(sentences(answer)) == 1 and answer.rstrip().endswith((".", "!", "?"))


def ask(model: Path, questions: list[str], **options: float) -> list[str]:
    """Return the model's answers of at most 80 tokens."""
    prompts = [[{"role": "user", "content": question}] for question in questions]
    return answer_prompts(str(model), prompts, max_new_tokens=80, **options)


def make_pairs(model: Path, questions: list[str], file: Path) -> int:
    """Write a pair for each question that the model answers with several sentences."""
    rows = []
    for question, answer in zip(questions, ask(model, questions, temperature=0.7), strict=True):
        first, *more = sentences(answer) or [""]
        if more and first.endswith((".", "!", "?")):
            turns = [{"role": "assistant", "content": text} for text in (first, answer)]
            prompt = [{"role": "user", "content": question}]
            rows.append({"prompt": prompt, "chosen": turns[:1], "rejected": turns[1:]})
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return len(rows)


@torch.no_grad()
def perplexity(model: Path, text: str) -> float:
    """Return the perplexity of a text, in windows of 256 tokens."""
    ids = torch.tensor(load_tokenizer(str(model))(text)["input_ids"])
    loaded = load_model(str(model)).eval()
    windows = [part[None] for part in ids.split(256) if len(part) > 1]
    losses = [loaded(input_ids=part, labels=part).loss.item() for part in windows]
    sizes = [part.shape[1] - 1 for part in windows]
    return math.exp(sum(a * b for a, b in zip(losses, sizes, strict=True)) / sum(sizes))


def share(answers: list[str]) -> str:
    """Return the share of one-sentence answers with its 95% interval."""
    count = sum(map(is_one_sentence, answers))
    low, high = wilson(count, len(answers))
    return f"{count} of {len(answers)} ({low:.0%} to {high:.0%})"


def main(model: Path, folder: Path, topics: list[str], unseen: list[str]) -> None:
    """Make the pairs, train, and print what changed."""
    folder.mkdir(parents=True, exist_ok=True)
    pairs, held_out = folder / "pairs.jsonl", folder / "held_out.jsonl"
    asked = [question.format(topic) for topic in unseen for question in QUESTIONS[:2]]
    known = [question.format(topic) for topic in topics for question in QUESTIONS]
    counts = make_pairs(model, known, pairs), make_pairs(model, asked, held_out)
    print(f"{counts[0]} pairs to train on, {counts[1]} held out, of other topics", flush=True)
    final = ml.dpo(
        model, pairs, eval_data=held_out, output_dir=folder / "run", run_name="one-sentence",
        lora=True, batch_size=8, epochs=2, learning_rate=1e-4, warmup_steps=2, eval_every=6,
        log_every=1,
        # Without it both answers become less likely, and the model learns to say nothing at all.
        nll_coefficient=1.0,
    )  # fmt: skip
    data = PreferenceDatasetConfig(dataset_name=str(held_out))
    judged = evaluate_pairs(str(final), data, reference=str(model))
    before, after = ask(model, asked), ask(final, asked)
    text = TEXT.read_text(encoding="utf-8")
    low, high = judged["accuracy_interval"]
    print(f"\nheld-out reward accuracy: {judged['accuracy']:.0%} ({low:.0%} to {high:.0%})")
    print(f"one-sentence answers before: {share(before)}, after: {share(after)}")
    print(f"perplexity of other text before: {perplexity(model, text):.2f}, ", end="")
    print(f"after: {perplexity(final, text):.2f}")
    for question, old, new in list(zip(asked, before, after, strict=True))[:6:2]:
        print(f"\n{question}\n  before: {' '.join(old.split())}\n  after:  {' '.join(new.split())}")


if __name__ == "__main__":
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("model", type=Path)
    options.add_argument("folder", type=Path)
    options.add_argument("--small", action="store_true", help="a few topics, to see that it runs")
    given = options.parse_args()
    few = slice(0, 4) if given.small else slice(None)
    main(given.model, given.folder, TOPICS[few], UNSEEN[few])
