"""The tables in the README files, filled from results/, so that no number in them is typed."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from asym.claims import CORRELATIONS
from asym.runs import write_text

READMES = ("README.md", "results/README.md", "params/README.md")
MARKS = {"reproduced": "✓", "not reproduced": "✗", "inconclusive": "?"}


def write_readmes(root: Path) -> None:
    """Refresh the tables in the README files, so that no number in them is typed.

    Between `<!-- table: PATH -->` and `<!-- end -->` stands the CSV file at PATH, estimates to one decimal
    (correlations to two), their intervals in brackets; after `<!-- findings: PATH -->`, a claims table in brief. Paths
    are those from the root.
    """
    block = re.compile(r"(<!-- (table|findings): (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)

    def fill(match: re.Match) -> str:
        path = root / match[3]
        if not path.exists():
            return f"{match[1]}(not computed yet)\n{match[4]}"
        table = pd.read_csv(path)
        return match[1] + _markdown(_findings(table) if match[2] == "findings" else table) + match[4]

    for readme in (root / name for name in READMES):
        if readme.exists():
            text = readme.read_text(encoding="utf-8")
            if (filled := block.sub(fill, text)) != text:
                write_text(readme, filled)


def _findings(claims: pd.DataFrame) -> pd.DataFrame:
    """A claims table in brief: a row per claim that was tested, with what it compares, a column per task."""
    from asym.figures import TASKS  # here, because it takes seconds

    tested = claims[claims.n > 0]
    cells = [f"{MARKS[row.verdict]} {_estimate(row)}" for row in tested.itertuples()]
    wide = tested.assign(cell=cells).pivot(index="claim", columns="task", values="cell").rename(columns=TASKS)
    wide = wide.reindex(tested.claim.unique()).sort_index(axis=1, ascending=False)
    about = {
        "claim": [claim.split()[0] for claim in wide.index],
        "compared": [_compared(claim) for claim in wide.index],
    }
    paper = tested.drop_duplicates("claim").set_index("claim").paper
    return wide.assign(**about, paper=paper)[[*about, *wide.columns, "paper"]]


def _estimate(row: Any) -> str:
    """Estimate and interval of one line of a table, as far as there are any."""
    digits = 2 if getattr(row, "claim", "") in CORRELATIONS else 1
    interval = "" if np.isnan(row.low) else f" [{row.low:.{digits}f}, {row.high:.{digits}f}]"
    return "" if np.isnan(row.estimate) else f"{row.estimate:.{digits}f}{interval}"


def _compared(claim: str) -> str:
    """What a claim compares, in words."""
    from asym.forest import CLAIMS

    return CLAIMS.get(claim, claim)


def _markdown(table: pd.DataFrame) -> str:
    """A table as Markdown; estimate, low and high become one column, or one per measure where there are several."""
    if {"estimate", "low", "high"} <= set(table):
        shown = [_estimate(row) for row in table.itertuples()]
        table = table.assign(estimate=shown).drop(columns=["low", "high"])
    if "claim" in table and "compared" not in table:
        table.insert(1, "compared", table.claim.map(_compared))
    if "measure" in table:
        measures = list(table.measure.unique())
        about = [name for name in table if name not in ("measure", "estimate")]
        table = table.pivot(index=about, columns="measure", values="estimate").reset_index()
        table = table[[name for name in about if name not in ("n", "seeds")] + measures + ["n", "seeds"]]
    lines = [
        list(table),
        ["---"] * table.shape[1],
        *table.astype(object).where(table.notna(), "").astype(str).values.tolist(),
    ]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
