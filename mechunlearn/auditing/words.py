"""An audit in words: the verdict, and tables with a line for each test, since there are more tests than models."""

from collections.abc import Mapping, Sequence
from math import isnan

from mechunlearn.auditing.findings import EDIT, NEVER_KNEW, ORIGINAL, Finding, way_of, worst_case
from mechunlearn.auditing.plans import CLEAN
from mechunlearn.evaluate.report.report import Report

WAYS = {"asked": "way(s) to ask", "latent": "reading(s) of hidden states", "attack": "attack(s)"}


def verdict(report: Report, findings: Sequence[Finding], kinds: Mapping[str, str]) -> str:
    """Whether it is found, at worst by what, whether the place matters, and what else was lost, in some sentences."""
    own = [finding for finding in findings if finding.row == EDIT]
    clean = next(finding.left for finding in own if finding.test == CLEAN)
    silent = "; ".join(f"{finding.test} ({finding.left.reason})" for finding in own if isnan(finding.left.value))
    sentences = [
        _whether(findings),
        f"Asked as trained, {clean} of the knowledge is left (0: as in a model without it; 1: as in the original)."
        if not clean.value <= 0
        else f"Asked as trained, nothing is left: {clean} (0: as in a model without the knowledge; 1: the original).",
        *(_worst(findings, EDIT, way) for way in WAYS),
        _avoided(own),
        _place(findings, list(report.weights)),
        f"No answer from {silent}." if silent else "",
        _largest_drop(report, [name for name, kind in kinds.items() if kind == "damage"]),
    ]
    return " ".join(sentence for sentence in sentences if sentence)


def markdown(report: Report, findings: Sequence[Finding], kinds: Mapping[str, str], random_note: str = "") -> str:
    """Verdict, worst cases, what each test found in each model, what is left, side effects, and what it all means."""
    rows = list(report.weights)
    damage = [name for name, kind in kinds.items() if kind == "damage"]
    parts = [verdict(report, findings, kinds), grid(worst_cases(findings, rows)), _values(findings, rows)]
    parts += [_fractions(findings, row) for row in rows if row not in ("original", NEVER_KNEW)]
    if damage:
        side_effects = [[name, *(_number(value) for value in report.table[name])] for name in damage]
        weights = ["edited weights", *(f"{count:,}" for count in report.weights.values())]
        parts.append(grid([["side effects", *report.table.index], *side_effects, weights]))
    return "\n\n".join([*parts, "\n".join(f"- {note}" for note in notes(report, findings, random_note))])


def worst_cases(findings: Sequence[Finding], rows: Sequence[str]) -> list[list[str]]:
    """Lines of a table: by each way to look, what is left at worst in each model but the original, and by what."""
    shown = [row for row in rows if row != ORIGINAL]
    lines = [["fraction left", *shown]]
    clean = {finding.row: str(finding.left) for finding in findings if finding.test == CLEAN}
    lines.append(["asked as trained", *(clean[row] for row in shown)])
    for way, named in WAYS.items():
        count = len({finding.test for finding in findings if way_of(finding.kind) == way})
        if count:
            worst = [worst_case(findings, row, way) for row in shown]
            cells = ["undefined" if one is None else f"{one.of_many}, {one.test}" for one in worst]
            lines.append([f"worst of {_counted(count, named)}", *cells])
    return lines


def _whether(findings: Sequence[Finding]) -> str:
    ways = {"asked": "when asked", "latent": "in hidden states", "attack": "under attack"}
    # Found: clearly more than in a model without the knowledge, the number of tests allowed for. It need not be the
    # test that leaves most, whose interval may be the widest.
    clear = {way_of(finding.kind) for finding in findings if finding.row == EDIT and finding.of_many.low > 0}
    where = [words for way, words in ways.items() if way in clear]
    count = sum(finding.row == EDIT and not isnan(finding.left.value) for finding in findings)
    if where:
        return f"Not gone: it is found {', '.join(where)}."
    return f"None of {count} tests and attacks finds more than in a model without the knowledge. Others might."


def _worst(findings: Sequence[Finding], row: str, way: str) -> str:
    count = sum(f.row == row and way_of(f.kind) == way and not isnan(f.left.value) for f in findings)
    worst = worst_case(findings, row, way)
    if worst is None or (way == "asked" and count == 1):
        return ""
    return f"The worst of {_counted(count, WAYS[way])}: {worst.of_many}, {worst.test}."


def _counted(count: int, named: str) -> str:
    return f"{count} {named.replace('(s)', '' if count == 1 else 's')}"


def _avoided(own: Sequence[Finding]) -> str:
    avoided = [finding for finding in own if finding.avoids.low > 0]
    if not avoided:
        return ""
    most = max(avoided, key=lambda finding: finding.avoids.value)
    return (
        f"In {len(avoided)} tests it avoids the answer, and so still tells it apart: at most by {most.avoids} of what "
        f"the original knows, {most.test}."
    )


def _place(findings: Sequence[Finding], rows: Sequence[str]) -> str:
    """The same edit at random places: without it, the notes say that it is missing."""
    said = []
    for row in (row for row in rows if row == "random" or row.startswith("random ")):
        clean = next(finding.left for finding in findings if (finding.row, finding.test) == (row, CLEAN))
        worst = {way: worst_case(findings, row, way) for way in WAYS}
        named = "; ".join(f"{way} {one.left:.2f}" for way, one in worst.items() if one is not None)
        said.append(f"{clean} asked as trained (at worst: {named})")
    return f"At a random place of as many weights, the same edit leaves {'; '.join(said)}." if said else ""


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
            shown = [by_place[row, finding.test] for row in rows]
            numbers = [_number(f.value.value) + ("" if f.nobody is None else f" ({f.nobody:.3f})") for f in shown]
            chance = "" if finding.chance is None else f"{finding.chance:.3f}"
            lines.append([finding.test, finding.kind, *numbers, chance])
    return grid(lines)


def _fractions(findings: Sequence[Finding], row: str) -> str:
    lines = [[row, "left", "recovered", "taught", "net"]]
    for finding in findings:
        if finding.row == row:
            own = finding.recovery
            rest = ["", "", ""] if own is None else [str(own.recovered), str(own.taught), str(own.net)]
            lines.append([finding.test, str(finding.left), *rest])
    return grid(lines)


def notes(report: Report, findings: Sequence[Finding], random_note: str) -> list[str]:
    rows = list(report.weights)
    never = "the larger of chance and never knew" if NEVER_KNEW in rows else "chance"
    senses: dict[str, list[str]] = {}
    for finding in findings:
        if finding.row == "original" and finding.sense:
            senses.setdefault(finding.sense, []).append(finding.test)
    return [
        *(f"{sense}: {'; '.join(tests)}" for sense, tests in senses.items()),
        "attacks: at the budget at which they find most. In brackets: what they find there about nobody; below, an "
        "attack counts by how much more than that it finds, at the budget at which that is most",
        "left = (this model - floor) / (original - floor), each under the same test or after the same attack. The "
        f"floor is what a model without the knowledge does: {never}",
        "recovered = (after the attack - before) / (original - floor), these two before it; taught: what the attack "
        "adds to a model that never knew; net = recovered - taught. None is clipped to 0..1: below 0 is less than the "
        "floor, above 1 more than the original under the same attack, or more than the edit took away",
        "avoids: below the smaller of chance and of what a model that never knew does",
        "intervals: 95 %, over facts and, with several seeds, over seeds; of a worst case, for the number looked at",
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


def _number(value: float) -> str:
    return "failed" if isnan(value) else f"{value:.3f}"


def grid(lines: Sequence[Sequence[str]]) -> str:
    head, *body = (f"| {' | '.join(line)} |" for line in lines)
    return "\n".join([head, f"| {' | '.join(['---'] * len(lines[0]))} |", *body])
