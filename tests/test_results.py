"""The committed results are what their own rows say, and what the README shows."""

import hashlib
import re
from pathlib import Path

import pandas as pd
import pytest

from asym.claims import read_claims, recompute
from asym.params import ParamsError
from asym.readme import READMES, write_readmes
from asym.runs import read_manifest, repo_root, write_text

README = {name: (repo_root() / name).read_text(encoding="utf-8") for name in READMES}
SHOWN = sorted(set(re.findall(r"<!-- table: (results/\w+)/tables/\w+.csv -->", README["results/README.md"])))
STUDIES = [repo_root() / folder for folder in SHOWN if (repo_root() / folder / "tables" / "claims.csv").exists()]


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


@pytest.mark.parametrize("name", READMES)
def test_the_readmes_show_the_tables_as_they_are(name, tmp_path):
    for folder in (repo_root() / "results").iterdir():
        if folder.is_dir():
            (tmp_path / "results").mkdir(exist_ok=True)
            (tmp_path / "results" / folder.name).symlink_to(folder)
    write_text(tmp_path / name, README[name])
    write_readmes(tmp_path)
    assert (tmp_path / name).read_text(encoding="utf-8") == README[name]
    assert "<!-- end -->" in README[name]
    assert "(not computed yet)" not in README[name]


def test_every_file_that_the_readmes_name_exists():
    linked = [(name, path) for name, text in README.items() for path in re.findall(r"\]\(([^)#]+)[^)]*\)", text)]
    linked = [(repo_root() / name).parent / path for name, path in linked if "://" not in path]
    assert len(linked) > 10
    assert [path for path in linked if not path.exists()] == []


def test_a_folder_that_holds_no_study_is_refused(tmp_path):
    with pytest.raises(ParamsError, match="must be the results folder of a study"):
        recompute(Path(tmp_path))
