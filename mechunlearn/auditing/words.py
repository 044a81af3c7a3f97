"""An audit in words: the verdict, and tables with a line for each test, since there are more tests than models."""

from collections.abc import Iterable, Mapping, Sequence
from math import isnan

from mechunlearn.auditing.findings import EDIT, NEVER_KNEW, WORST, Finding, worst_case
from mechunlearn.auditing.plans import CLEAN
from mechunlearn.evaluate.report.report import Report


def verdict(report: Report, found: Sequence[Finding], kinds: Mapping[str, str]) -> str:
    """What was found in the edited model, and what it lost besides, in some sentences."""
    own = [each for each in found if each.row == EDIT]
    defined = [each for each in own if not isnan(each.left.value)]
    unclear = [each for each in own if isnan(each.left.value)]
    floor = "a model that never knew" if any(each.row == NEVER_KNEW for each in found) else "chance"
    clean = next(each.left for each in own if each.test == CLEAN)
    sentences = [
        f"Asked as trained, {clean} of the knowledge is left (0: as in {floor}; 1: as in the original).",
        _what_finds_it(defined, floor),
        f"No answer from {'; '.join(f'{each.test} ({each.left.reason})' for each in unclear)}." if unclear else "",
        _largest_drop(report, [name for name, kind in kinds.items() if kind == "damage"]),
    ]
    return " ".join(sentence for sentence in sentences if sentence)


def markdown(report: Report, found: Sequence[Finding], kinds: Mapping[str, str], no_random: str = "") -> str:
    """Verdict, what each test found in each model, what is left and recovered, side effects, and what it all means."""
    rows = list(report.weights)
    damage = [name for name, kind in kinds.items() if kind == "damage"]
    parts = [verdict(report, found, kinds), _values(found, rows)]
    parts += [_fractions(found, row) for row in rows if row not in ("original", NEVER_KNEW)]
    parts += [_damage(report, damage)] if damage else []
    return "\n\n".join([*parts, "\n".join(f"- {note}" for note in _notes(report, found, no_random))])


def _what_finds_it(defined: Sequence[Finding], floor: str) -> str:
    more = sorted((each for each in defined if _finds_more(each)), key=lambda each: -each.left.value)
    if not more:
        return f"None of {len(defined)} tests and attacks finds more than in {floor}. Others might."
    shown = "; ".join(f"{each.test}, {each.left}" for each in more[:5])
    rest = f"; and {len(more) - 5} more" if len(more) > 5 else ""
    return f"{len(more)} of {len(defined)} tests and attacks find more than in {floor}: {shown}{rest}."


def _finds_more(each: Finding) -> bool:
    """Clearly more than is there to find; of an attack also more than before it."""
    return each.left.low > 0 and (each.recovery is None or each.recovery.recovered.low > 0)


def _largest_drop(report: Report, damage: Sequence[str]) -> str:
    """Of what is a share, since a loss has no scale of its own."""
    table, results = report.table, report.results
    shares = [name for name in damage if name in results["original"] and results["original"][name].unit == "share"]
    drops = {name: table.loc["original", name] - table.loc[EDIT, name] for name in shares}
    drops = {name: drop for name, drop in drops.items() if not isnan(drop)}
    if not drops:
        return ""
    name = max(drops, key=lambda name: drops[name])
    before, after = table.loc["original", name], table.loc[EDIT, name]
    if drops[name] < 0.0005:
        return f"None of {len(drops)} numbers that should stay falls."
    return f"Of {len(drops)} numbers that should stay, {name!r} falls most: {before:.3f} to {after:.3f}."


def _values(found: Sequence[Finding], rows: Sequence[str]) -> str:
    by_place = {(each.row, each.test): each for each in found}
    lines = [["found by", "kind", *rows, "chance"]]
    for each in found:
        if each.row == "original":
            numbers = [_found(by_place[row, each.test]) for row in rows]
            lines.append([each.test, each.kind, *numbers, "" if each.chance is None else f"{each.chance:.3f}"])
    worst = [worst_case(found, row) for row in rows]
    largest = ["undefined" if each is None else f"{each.left.value:.2f}, {each.test}" for each in worst]
    return _grid([*lines, [f"**{WORST}** (fraction left)", "", *largest, ""]])


def _fractions(found: Sequence[Finding], row: str) -> str:
    lines = [[row, "left", "recovered", "taught", "net"]]
    for each in found:
        if each.row == row:
            own = each.recovery
            rest = ["", "", ""] if own is None else [str(own.recovered), str(own.taught), str(own.net)]
            lines.append([each.test, str(each.left), *rest])
    return _grid(lines)


def _damage(report: Report, names: Sequence[str]) -> str:
    table = report.table
    lines = [["side effects", *table.index]]
    lines += [[name, *(_number(value) for value in table[name])] for name in names]
    return _grid([*lines, ["edited weights", *(f"{count:,}" for count in report.weights.values())]])


def _notes(report: Report, found: Sequence[Finding], no_random: str) -> list[str]:
    rows = list(report.weights)
    never = "never knew" if NEVER_KNEW in rows else "chance"
    return [
        *_senses(found),
        "attacks: at the budget at which they find most. In brackets: what they find there about nobody; below, an "
        "attack counts by how much more than that it finds, at the budget at which that is most",
        f"left = (this model - {never}) / (original - {never}), each under the same test or after the same attack",
        f"recovered = (after the attack - before) / (original - {never}), these two before it; taught: what the attack "
        "adds to a model that never knew; net = recovered - taught. None is clipped to 0..1",
        f"{WORST}: the largest fraction left, and so somewhat above 0 even where nothing is left: numbers are noisy",
        "intervals: 95 %, bootstrap over facts and, with several seeds, over seeds. Of many, some miss by chance",
        *_missing(rows, no_random),
        *(f"failed: {c.row}, {c.test}: {' '.join(c.error.split())}" for c in report.cells if c.result is None),
    ]


def _senses(found: Iterable[Finding]) -> list[str]:
    senses: dict[str, list[str]] = {}
    for each in found:
        if each.row == "original" and each.sense:
            senses.setdefault(each.sense, []).append(each.test)
    return [f"{sense}: {'; '.join(tests)}" for sense, tests in senses.items()]


def _missing(rows: Sequence[str], no_random: str) -> list[str]:
    notes = []
    if NEVER_KNEW not in rows:
        notes.append(
            "no model that never knew was given, so chance stands in, and an attack that teaches counts as one that "
            'recovers: pass never_knew=..., for the shipped model mu.testbed.load(without="basketball")'
        )
    if set(rows) <= {"original", EDIT, NEVER_KNEW}:
        why = f" ({no_random})" if no_random else ""
        notes.append(
            f"there is no edit at random places{why}, so nothing says whether the place matters: pass "
            "others={'random': ...}, the same editor on mu.localize.random_like(where, model)"
        )
    elif no_random:
        notes.append(f"random places: {no_random}")
    return notes


def _found(each: Finding) -> str:
    return _number(each.value.value) + ("" if each.nobody is None else f" ({each.nobody:.3f})")


def _number(value: float) -> str:
    return "failed" if isnan(value) else f"{value:.3f}"


def _grid(lines: Sequence[Sequence[str]]) -> str:
    head, *body = (f"| {' | '.join(line)} |" for line in lines)
    return "\n".join([head, f"| {' | '.join(['---'] * len(lines[0]))} |", *body])
