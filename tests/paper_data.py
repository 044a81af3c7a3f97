"""A tiny checkpoint of each of the paper's architectures on the disk, and small data in the schemas of its tasks."""

import json
from itertools import product
from pathlib import Path
from typing import Any

import tiny
import torch

SPORTS = ("football", "baseball", "basketball")
FIRST = ("Adam", "Brian", "Carl", "David", "Eric", "Frank", "George", "Henry", "Ivan", "Jack")
LAST = ("Archer", "Baker", "Cooper")


def checkpoint(architecture: str, folder: Path) -> Path:
    """A random model that reads the shipped model's tokens, long enough for multiple choice."""
    from mechunlearn.testbed import load_huggingface

    _, tokenizer = load_huggingface()
    model = tiny.huggingface(architecture)
    torch.manual_seed(0)
    model.resize_token_embeddings(len(tokenizer))
    model.config.max_position_embeddings = 512
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def athletes(path: Path) -> Path:
    """30 of them, ten of each sport; nobody real."""
    names = [f"{first} {last}" for first, last in product(FIRST, LAST)]
    lines = [f"{name},{SPORTS[place % 3]}" for place, name in enumerate(names)]
    path.write_text("\n".join(["athlete,sport", *lines]) + "\n")
    return path


def counterfact(folder: Path, count: int) -> tuple[Path, Path]:
    """Records and questions about houses, in CounterFact's schema."""
    records, questions = [], []
    colours = ("red", "green", "blue", "white")
    for case in range(count):
        name = f"{FIRST[case % 10]} the {LAST[case // 10 % 3]} {case // 30 + 1}"
        true, new, *others = colours[case % 4 :] + colours[: case % 4]
        rewrite = {"prompt": "The house of {} is", "subject": name, "relation_id": "P1"}
        rewrite |= {"target_true": {"str": true}, "target_new": {"str": new}}
        paraphrases = [f"Everybody knows that {name} lives in a house that is"]
        neighbours = [f"The house of {FIRST[(case + 4) % 10]} is"]
        record: dict[str, Any] = {"case_id": case, "requested_rewrite": rewrite}
        records.append({**record, "paraphrase_prompts": paraphrases, "neighborhood_prompts": neighbours})
        asked = {"case_id": case, "question": f"Which colour is the house of {name}?", "target_true": true}
        questions.append({**asked, "targets_false": [new, *others]})
    paths = folder / "records.json", folder / "questions.json"
    for path, content in zip(paths, (records, questions), strict=True):
        path.write_text(json.dumps(content))
    return paths
