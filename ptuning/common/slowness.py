"""What makes this process compute slower than it could: said when it is noticed, and again in its results.

A log of a long run hides a warning; the summary at the end, the results' JSON and the page show it again.
"""

import warnings

reasons = {}  # each once, in order


def runs_slower(reason: str) -> None:
    """Warn of a reason, and keep it for slow_because()."""
    reasons[reason] = True
    warnings.warn(reason, stacklevel=2)


def slow_because() -> dict[str, str]:
    """{"slow_because": the reasons so far} for results and status; {} where there are none."""
    return {"slow_because": " ".join(reasons)} if reasons else {}
