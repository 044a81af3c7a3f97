"""Is it really gone? Tests, attacks, controls and a verdict; may use all three verbs."""

from mechunlearn.auditing.findings import Finding
from mechunlearn.auditing.plans import Plan, full, quick
from mechunlearn.auditing.verdict import Audit, audit

__all__ = ["Audit", "Finding", "Plan", "audit", "full", "quick"]
