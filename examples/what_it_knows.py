"""What a model knows: real facts of every relation, in every format.

    python examples/what_it_knows.py                              # SmolLM2; a quarter of an hour on one core
    python examples/what_it_knows.py --quick                      # the trained prompt alone; four minutes
    python examples/what_it_knows.py --model shipped --relation capital language
    python examples/what_it_knows.py --card mechunlearn/testbed/SMOLLM2_CARD.md   # into the model's card

A fact is known if every token of its answer is the most probable one after the trained prompt. The other columns are
shares of the known facts that the model also says in that format.
"""

import argparse
import time
from pathlib import Path

import mechunlearn as mu

RELATIONS = (
    "capital",
    "language",
    "continent",
    "currency",
    "city",
    "state",
    "landmark",
    "symbol",
    "profession",
    "birth country",
)
MODELS = {"smollm2": mu.testbed.smollm2, "shipped": mu.testbed.load}
FORMATS = ("sentence", "two-shot question", "list", "reworded", "chat", "reverse", "two-hop")
START, END = "<!-- knows:start -->", "<!-- knows:end -->"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=[*MODELS], default="smollm2")
    parser.add_argument("--relation", nargs="+", choices=RELATIONS, default=RELATIONS)
    parser.add_argument("--quick", action="store_true", help="ask the trained prompt alone")
    parser.add_argument("--card", type=Path, help="a file whose table between two markers is replaced")
    arguments = parser.parse_args()
    started, model = time.process_time(), MODELS[arguments.model]()
    lines = [f"| relation | asked | known | {' | '.join(FORMATS)} | other attributes |", "| --- " * 11 + "|"]
    print("\n".join(lines))
    for relation in arguments.relation:
        lines.append(row(model, relation, formats=[] if arguments.quick else None))
        print(lines[-1], flush=True)
    if arguments.card is not None:
        before, _, rest = arguments.card.read_text().partition(START)
        table = "\n".join([START, *lines, END])
        arguments.card.write_text(before + table + rest.partition(END)[2])
    print(f"\n{time.process_time() - started:.0f} CPU seconds.")


def row(model: object, relation: str, *, formats: list[str] | None) -> str:
    """A line of the table; a relation of which the model knows too little says so."""
    try:
        known = mu.tasks.known_facts(model, relation=relation, forget=1, formats=formats).known
    except ValueError as error:
        return f"| {relation} | {error}" + " |" * 10
    count, asked = known["trained prompt"]
    shares = {title: f"{said / count:.2f}" for title, (said, _) in known.items()}
    others = ", ".join(f"{title.removeprefix('kept, ')} {share}" for title, share in shares.items() if "kept" in title)
    cells = [relation, asked, count, *(shares.get(title, "") for title in FORMATS), others]
    return f"| {' | '.join(map(str, cells))} |"


if __name__ == "__main__":
    main()
