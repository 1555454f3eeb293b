"""The committed results are what their own rows say, and what the README shows."""

import hashlib
import re
from pathlib import Path

import pandas as pd
import pytest

from asym.claims import read_claims, recompute
from asym.params import ParamsError
from asym.runs import read_manifest, repo_root
from asym.study import write_readme

README = (repo_root() / "README.md").read_text(encoding="utf-8")
STUDIES = [repo_root() / folder for folder in re.findall(r"<!-- table: (results/\w+)/tables/claims.csv -->", README)]


@pytest.mark.parametrize("results", STUDIES, ids=lambda path: path.name)
def test_claims_are_those_of_the_stored_rows(results):
    stored = read_claims(results / "tables" / "claims.csv")
    pd.testing.assert_frame_equal(recompute(results), stored, check_dtype=False, rtol=1e-6, atol=1e-4)


@pytest.mark.parametrize("results", STUDIES, ids=lambda path: path.name)
def test_the_manifest_holds_the_hash_of_every_file(results):
    files = {path.relative_to(repo_root()).as_posix() for path in results.rglob("*") if path.is_file()}
    hashes = read_manifest(results)["files"]
    assert files == {*hashes, f"results/{results.name}/manifest.json"}
    assert all(hashlib.sha256((repo_root() / name).read_bytes()).hexdigest() == value for name, value in hashes.items())


def test_the_readme_shows_the_tables_as_they_are(tmp_path):
    (tmp_path / "results").symlink_to(repo_root() / "results")
    (tmp_path / "README.md").write_text(README, encoding="utf-8")
    write_readme(tmp_path)
    assert (tmp_path / "README.md").read_text(encoding="utf-8") == README
    assert "(not computed yet)" not in README


def test_every_file_that_the_readme_names_exists():
    linked = [name for name in re.findall(r"\]\(([^)#]+)\)", README) if "://" not in name]
    assert len(linked) > 10
    assert [name for name in linked if not (repo_root() / name).exists()] == []


def test_a_folder_that_holds_no_study_is_refused(tmp_path):
    with pytest.raises(ParamsError, match="must be the results folder of a study"):
        recompute(Path(tmp_path))
