"""DPO in a plain Accelerate script: python examples/pieces.py MODEL PAIRS FOLDER"""

import sys
from itertools import chain, islice, repeat
from pathlib import Path

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader

import modern_llm as ml
from modern_llm.data.table.build import prepare_tables
from modern_llm.models.load import load_model, load_tokenizer, make_scorer
from modern_llm.reference.answers import Answers
from modern_llm.reference.locate import store_of
from modern_llm.reference.store.entries import Entries


def train(model, pairs, folder, *, steps=20, batch_size=8, rate=5e-6, beta=0.1, max_length=512):
    accelerator = Accelerator()
    with accelerator.main_process_first():  # pairs become token ids, once per machine
        data, tables = ml.PreferenceDatasetConfig(dataset_name=str(pairs)), Path(folder) / "tables"
        table = prepare_tables(data, load_tokenizer(model), tables, max_length=max_length).train
    scorer = make_scorer(load_model(model).to(accelerator.device), dropout=False)
    collator = ml.PairCollator(table, scorer)
    loader = DataLoader(range(len(table)), batch_size, shuffle=True, collate_fn=collator)
    optimizer = torch.optim.AdamW(scorer.parameters(), lr=rate, weight_decay=0.0)
    scorer, optimizer, loader = accelerator.prepare(scorer, optimizer, loader)

    def sums(batch):  # (P, 2) log-probs of the chosen and rejected responses, in nats
        output = scorer(batch.ids, batch.positions, batch.segments, batch.targets)
        return batch.sums(output.logprobs)

    answers, compute, device = Answers(table), accelerator.mixed_precision, accelerator.device
    store = store_of(model, "float32" if compute == "no" else compute)
    missing = (~store.known(answers.keys))[answers.of_pairs].any(1).nonzero()[0].tolist()
    accelerator.wait_for_everyone()  # all processes have the same list before one appends
    for batch in accelerator.prepare(DataLoader(missing, batch_size, collate_fn=collator)):
        keys = answers.keys[answers.of_pairs[batch.examples]].ravel()
        with torch.no_grad():
            values = sums(batch).float().cpu().numpy().ravel()
        store.append(Entries(keys, values, batch.lengths.int().cpu().numpy().ravel()))
    accelerator.wait_for_everyone()
    store.refresh()
    reference = torch.tensor(store.find(answers.keys).sums[answers.of_pairs], device=device)
    losses = []
    for batch in islice(chain.from_iterable(repeat(loader)), steps):
        loss = ml.preference_loss(sums(batch), reference[batch.examples], batch.lengths, beta=beta)
        accelerator.backward(loss.mean())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(accelerator.reduce(loss.detach().mean(), "mean").item())
        accelerator.print(f"step={len(losses)} loss={losses[-1]:.4f}")
    if accelerator.is_main_process:
        accelerator.unwrap_model(scorer).model.save_pretrained(Path(folder) / "final")
    return losses


if __name__ == "__main__":
    train(*sys.argv[1:4])
