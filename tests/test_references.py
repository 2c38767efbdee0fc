"""Every paper that the code cites is resolved in docs/references.md, and none goes by a number of ours."""

import pathlib
import re

ROOT = pathlib.Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "references.md").read_text(encoding="utf-8")
ROWS = [[cell.strip() for cell in row.split("|")[1:-1]] for row in PAGE.splitlines() if re.match(r"\| [^-c]", row)]
TEXTS = {
    path.relative_to(ROOT): path.read_text(encoding="utf-8")
    for folder in ("ddpo_jax", "configs", "tests")
    for path in sorted((ROOT / folder).rglob("*"))
    if path.suffix in (".py", ".md") and path != pathlib.Path(__file__)
}


def test_every_citation_has_a_row():
    known = {row[0] for row in ROWS}
    cited = {
        (found, str(path))
        for path, text in TEXTS.items()
        for found in re.findall(r"[A-Z][a-z]+ et al\. \d{4}|\"[A-Z][A-Za-z ]+\" \(anonymous\)", " ".join(text.split()))
    }
    assert len(cited) > 20
    assert sorted((name, path) for name, path in cited if name not in known) == []


def test_every_arxiv_id_of_the_code_is_in_the_table_with_its_paper():
    ids = {row[0]: row[2] for row in ROWS}
    for path, text in TEXTS.items():
        for found in re.findall(r"arXiv:(\d{4}\.\d{5})", text):
            assert found in ids.values(), f"{path}: arXiv:{found}"
        for name, found in re.findall(r"([A-Z][a-z]+ et al\. \d{4}),\s+arXiv:(\d{4}\.\d{5})", text):
            assert ids[name] == found, f"{path}: {name}"


def test_the_files_of_the_table_are_there():
    for row in ROWS:
        files = re.findall(r"`([\w/]+(?:\.py|/))`", row[3])
        assert files, row[0]
        previous = ROOT
        for file in files:
            places = [ROOT / "ddpo_jax" / file, ROOT / file, previous / file]  # the last: "`algorithms/a.py`, `b.py`"
            (found,) = [place for place in places if place.exists()][:1] or [None]
            assert found is not None, f"{row[0]}: {file}"
            previous = found.parent


def test_no_paper_goes_by_a_number_of_ours():
    for path, text in TEXTS.items():
        for line in text.splitlines():
            numbered = re.search(r"(?<!\d)(?<!\d[ .,])\b00[0-4]\b|\bspec section\b", line)  # not 0.003 nor 100 000
            assert not numbered, f"{path}: {line}"
