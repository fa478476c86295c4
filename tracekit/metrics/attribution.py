"""Attribution: what the reduction of unique experts is made of."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from tracekit.metrics.intervals import Interval, jackknife
from tracekit.metrics.ladder import RUNGS
from tracekit.schema import CAUSES


def telescope(rungs: dict[str, NDArray[np.float64]], judged: bool = True, enough: bool = True) -> list[dict[str, Any]]:
    """Split the drop from ``uniform`` to observed into causes.

    Parameters
    ----------
    rungs
        Unique experts under each rung of the ladder, ``[replicates]`` each, plain estimate first.
    judged
        Whether intervals were asked for: then a label without one is not resolved.
    enough
        Whether there are enough requests for an interval.

    Returns
    -------
    One row per cause. A label is a cause of its own only where popularity >= label >= request and the interval of its
    share excludes 0: a label that holds one or few requests overfits. Otherwise its drop is 0 and ``request`` starts
    from popularity. Shares are left out where the interval of the whole drop includes 0.
    """
    total = rungs["uniform"] - rungs["observed"]
    some = np.array([enough])
    total_interval = jackknife(total[:, None]).where(some)
    shares_defined = not bool(total_interval.contains(0.0)[0]) and total[0] != 0

    def share_of(drop: NDArray[np.float64]) -> Interval:
        with np.errstate(invalid="ignore", divide="ignore"):
            return jackknife((drop / total)[:, None]).where(some)

    label_share = share_of(rungs["popularity"] - rungs["label"])
    ordered = bool(rungs["popularity"][0] >= rungs["label"][0] >= rungs["request"][0])
    decided = not judged or not np.isnan(label_share.lo[0])
    has_label = ordered and decided and _trusted(label_share) and not bool(label_share.contains(0.0)[0])
    path = [name for name in RUNGS if name != "label" or has_label]
    rows = []
    for cause, rung in zip(CAUSES, RUNGS[1:], strict=True):
        if rung not in path:
            level = float(rungs["popularity"][0])
            rows.append({"cause": cause, "unique_before": level, "unique_after": level, "drop": 0.0, "resolved": False})
            continue
        before, after = rungs[path[path.index(rung) - 1]], rungs[rung]
        share = share_of(before - after)
        row = {
            "cause": cause,
            "unique_before": float(before[0]),
            "unique_after": float(after[0]),
            "drop": float(before[0] - after[0]),
            "resolved": shares_defined and _trusted(share),
        }
        if shares_defined:
            row |= {"share": float(share.estimate[0]), "share_lo": float(share.lo[0]), "share_hi": float(share.hi[0])}
        rows.append(row)
    return rows


def _trusted(share: Interval) -> bool:
    """Return whether a share is a number that its interval, if there is one, contains."""
    if np.isnan(share.lo[0]):
        return bool(np.isfinite(share.estimate[0]))
    return bool(share.contains(share.estimate)[0])
