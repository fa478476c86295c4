"""What is wrong with a trace: detectors over canonical requests, arrays in, findings out.

A :class:`Checker` is fed the requests of a trace one by one and keeps little: sums, a few examples, and a bounded
sample of rows. Each detector states what it assumes of a sound trace and how rarely it would fire on one.
"""

from tracekit.checks.checker import OF_INGEST, Checker, findings_of_parts
from tracekit.checks.finding import SEVERITIES, Finding, Severity, is_serious, ordered

__all__ = ["OF_INGEST", "SEVERITIES", "Checker", "Finding", "Severity", "findings_of_parts", "is_serious", "ordered"]
