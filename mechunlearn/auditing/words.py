"""An audit in words: the verdict, and tables with a line for each test, since there are more tests than models."""

from collections.abc import Mapping, Sequence
from math import isnan

from mechunlearn.auditing.findings import EDIT, NEVER_KNEW, WORST, Finding, worst_case
from mechunlearn.auditing.plans import CLEAN
from mechunlearn.evaluate.report.report import Report


def verdict(report: Report, findings: Sequence[Finding], kinds: Mapping[str, str]) -> str:
    """What was found in the edited model, and what it lost besides, in some sentences."""
    own = [finding for finding in findings if finding.row == EDIT]
    defined = [finding for finding in own if not isnan(finding.left.value)]
    unclear = [finding for finding in own if isnan(finding.left.value)]
    floor = "a model that never knew" if any(finding.row == NEVER_KNEW for finding in findings) else "chance"
    clean = next(finding.left for finding in own if finding.test == CLEAN)
    silent = "; ".join(f"{finding.test} ({finding.left.reason})" for finding in unclear)
    sentences = [
        f"Asked as trained, {clean} of the knowledge is left (0: as in {floor}; 1: as in the original).",
        _what_finds_it(defined, floor),
        f"No answer from {silent}." if silent else "",
        _largest_drop(report, [name for name, kind in kinds.items() if kind == "damage"]),
    ]
    return " ".join(sentence for sentence in sentences if sentence)


def markdown(report: Report, findings: Sequence[Finding], kinds: Mapping[str, str], random_note: str = "") -> str:
    """Verdict, what each test found in each model, what is left and recovered, side effects, and what it all means."""
    rows = list(report.weights)
    damage = [name for name, kind in kinds.items() if kind == "damage"]
    parts = [verdict(report, findings, kinds), _values(findings, rows)]
    parts += [_fractions(findings, row) for row in rows if row not in ("original", NEVER_KNEW)]
    parts += [_damage(report, damage)] if damage else []
    return "\n\n".join([*parts, "\n".join(f"- {note}" for note in _notes(report, findings, random_note))])


def _what_finds_it(defined: Sequence[Finding], floor: str) -> str:
    # Clearly more than is there to find; of an attack also more than before it.
    more = [f for f in defined if f.left.low > 0 and (f.recovery is None or f.recovery.recovered.low > 0)]
    more.sort(key=lambda finding: -finding.left.value)
    if not more:
        return f"None of {len(defined)} tests and attacks finds more than in {floor}. Others might."
    shown = "; ".join(f"{finding.test}, {finding.left}" for finding in more[:5])
    rest = f"; and {len(more) - 5} more" if len(more) > 5 else ""
    return f"{len(more)} of {len(defined)} tests and attacks find more than in {floor}: {shown}{rest}."


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


def _values(findings: Sequence[Finding], rows: Sequence[str]) -> str:
    by_place = {(finding.row, finding.test): finding for finding in findings}
    lines = [["found by", "kind", *rows, "chance"]]
    for finding in findings:
        if finding.row == "original":
            numbers = [_value(by_place[row, finding.test]) for row in rows]
            chance = "" if finding.chance is None else f"{finding.chance:.3f}"
            lines.append([finding.test, finding.kind, *numbers, chance])
    worst = [worst_case(findings, row) for row in rows]
    largest = ["undefined" if finding is None else f"{finding.left.value:.2f}, {finding.test}" for finding in worst]
    return _grid([*lines, [f"**{WORST}** (fraction left)", "", *largest, ""]])


def _fractions(findings: Sequence[Finding], row: str) -> str:
    lines = [[row, "left", "recovered", "taught", "net"]]
    for finding in findings:
        if finding.row == row:
            own = finding.recovery
            rest = ["", "", ""] if own is None else [str(own.recovered), str(own.taught), str(own.net)]
            lines.append([finding.test, str(finding.left), *rest])
    return _grid(lines)


def _damage(report: Report, names: Sequence[str]) -> str:
    table = report.table
    lines = [["side effects", *table.index]]
    lines += [[name, *(_number(value) for value in table[name])] for name in names]
    return _grid([*lines, ["edited weights", *(f"{count:,}" for count in report.weights.values())]])


def _notes(report: Report, findings: Sequence[Finding], random_note: str) -> list[str]:
    rows = list(report.weights)
    never = "never knew" if NEVER_KNEW in rows else "chance"
    senses: dict[str, list[str]] = {}
    for finding in findings:
        if finding.row == "original" and finding.sense:
            senses.setdefault(finding.sense, []).append(finding.test)
    return [
        *(f"{sense}: {'; '.join(tests)}" for sense, tests in senses.items()),
        "attacks: at the budget at which they find most. In brackets: what they find there about nobody; below, an "
        "attack counts by how much more than that it finds, at the budget at which that is most",
        f"left = (this model - {never}) / (original - {never}), each under the same test or after the same attack",
        f"recovered = (after the attack - before) / (original - {never}), these two before it; taught: what the attack "
        "adds to a model that never knew; net = recovered - taught. None is clipped to 0..1",
        f"{WORST}: the largest fraction left, and so somewhat above 0 even where nothing is left: numbers are noisy",
        "intervals: 95 %, bootstrap over facts and, with several seeds, over seeds. Of many, some miss by chance",
        *_missing(rows, random_note),
        *(f"failed: {c.row}, {c.test}: {' '.join(c.error.split())}" for c in report.cells if c.result is None),
    ]


def _missing(rows: Sequence[str], random_note: str) -> list[str]:
    notes = []
    if NEVER_KNEW not in rows:
        notes.append(
            "no model that never knew was given, so chance stands in, and an attack that teaches counts as one that "
            'recovers: pass never_knew=..., for the shipped model mu.testbed.load(without="basketball")'
        )
    if set(rows) <= {"original", EDIT, NEVER_KNEW}:
        why = f" ({random_note})" if random_note else ""
        notes.append(f"there is no edit at random places, so nothing says whether the place matters{why}")
    elif random_note:
        notes.append(f"random places: {random_note}")
    return notes


def _value(finding: Finding) -> str:
    return _number(finding.value.value) + ("" if finding.nobody is None else f" ({finding.nobody:.3f})")


def _number(value: float) -> str:
    return "failed" if isnan(value) else f"{value:.3f}"


def _grid(lines: Sequence[Sequence[str]]) -> str:
    head, *body = (f"| {' | '.join(line)} |" for line in lines)
    return "\n".join([head, f"| {' | '.join(['---'] * len(lines[0]))} |", *body])
