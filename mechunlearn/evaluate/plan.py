"""What an audit runs: tests and attacks by what they say."""

from collections.abc import Mapping
from dataclasses import dataclass

from mechunlearn.evaluate.in_task import Test

CLEAN = "clean"


@dataclass(frozen=True, eq=False)
class Plan:
    """Tests and attacks by what they say; `dataclasses.replace(plan, attacks={**plan.attacks, "mine": f})` adds one.

    But for `damage`, a higher number must mean that more of the forgotten facts is found.
    """

    clean: Test
    """The forgotten facts, asked as they were trained."""
    asked: Mapping[str, Test]
    """The forgotten facts, asked in other ways."""
    latent: Mapping[str, Test]
    """What the model knows and does not say."""
    attacks: Mapping[str, Test]
    """What brings knowledge back. It has a recovered fraction if it is measured as `clean` is."""
    damage: Mapping[str, Test]
    """What should be as it was: retained facts in every format, other knowledge, text."""

    @property
    def kinds(self) -> dict[str, str]:
        """Column -> what it says: clean, asked, latent, attack or damage. ValueError for a column named twice."""
        parts = {"asked": self.asked, "latent": self.latent, "attack": self.attacks, "damage": self.damage}
        names = [CLEAN, *(name for tests in parts.values() for name in tests)]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"expected each column of an audit once, got {twice[0]!r} twice: rename one of them.")
        return {CLEAN: CLEAN} | {name: kind for kind, tests in parts.items() for name in tests}

    @property
    def tests(self) -> dict[str, Test]:
        """Every column and its test, as `compare` takes them."""
        found = {CLEAN: self.clean, **self.asked, **self.latent, **self.attacks, **self.damage}
        return {name: found[name] for name in self.kinds}
