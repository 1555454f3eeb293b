import numpy as np
import pandas as pd

from asym.readme import write_readmes
from asym.runs import write_csv, write_text


def test_findings_are_the_tested_claims_in_brief(tmp_path):
    claims = pd.DataFrame(
        [
            ("C4", "sudoku", 12.64, 8.5, 17.0, 500, "up to +18.2", "reproduced"),
            ("C4", "graph_coloring", -1.0, -3.0, 1.0, 500, "up to +18.2", "inconclusive"),
            ("C7", "sudoku", -0.123, -0.2, -0.1, 96, "yes", "not reproduced"),
            ("C10", "sudoku", 0.8, np.nan, np.nan, 3, "yes", "inconclusive"),
            ("C8", "sudoku", np.nan, np.nan, np.nan, 0, "up to +6.0", "inconclusive"),
        ],
        columns=["claim", "task", "estimate", "low", "high", "n", "paper", "verdict"],
    )
    write_csv(tmp_path / "claims.csv", claims)
    write_text(tmp_path / "README.md", "<!-- findings: claims.csv -->\n<!-- end -->")
    write_readmes(tmp_path)
    assert (tmp_path / "README.md").read_text(encoding="utf-8").splitlines()[1:-1] == [
        "| claim | compared | Sudoku | Graph Coloring | paper |",
        "| --- | --- | --- | --- | --- |",
        "| C4 | NGDiff − token-averaged | ✓ 12.6 [8.5, 17.0] | ? -1.0 [-3.0, 1.0] | up to +18.2 |",
        "| C7 | r with reasoning − with perception | ✗ -0.12 [-0.20, -0.10] |  | yes |",
        "| C10 | ρ of screening and gain | ? 0.80 |  | yes |",
    ]
