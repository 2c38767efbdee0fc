"""The README's table of faults: every row names a test that is there, and no fault is tested that it leaves out."""

import ast
import pathlib
import re

ROOT = pathlib.Path(__file__).resolve().parent.parent


def test_every_row_is_a_test_and_every_test_a_row():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (path,) = re.findall(r"^\| what happened .*\(`(.+)`\) \|$", text, re.MULTILINE)
    table = text.partition("| what happened ")[2].partition("\n\n")[0]
    named = set(re.findall(r"`(test_\w+)`", table))
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    there = {node.name for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")}
    quick = {"test_kill_9_at_any_moment"}  # two of the fifty
    assert named == there - quick
