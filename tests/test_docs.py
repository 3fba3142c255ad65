"""The documentation is right: code runs, tables of refusals hold, links lead somewhere, nothing is left out."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

import lightning_dopt
from lightning_dopt import Plan, Sync, compress, outer, plans, topology

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))
FENCE = re.compile(r"^```([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
STARTS = re.compile(r"\.fit\(|init_process_group\(|ProcessGroupWorld\(")

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)


def prose(page: Path) -> str:
    """A page without its fenced blocks."""
    return FENCE.sub("", page.read_text())


@each_page
def test_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = page.read_text()
    names: dict[str, Any] = {"__name__": f"docs.{page.stem}"}
    for block in FENCE.finditer(text):
        if block[1].strip() == "python":
            assert not STARTS.search(block[2]), "blocks that start processes are marked `python no-run`"
            above = "\n" * (text[: block.start()].count("\n") + 1)  # errors name the line of the page
            exec(compile(above + block[2], str(page), "exec", dont_inherit=True), names)


@each_page
def test_blocks_that_do_not_run_are_python(page: Path) -> None:
    for block in FENCE.finditer(page.read_text()):
        assert block[1].strip() in ("", "python", "python no-run", "sh", "text", "yaml")
        if block[1].strip() == "python no-run":
            compile(block[2], str(page), "exec")
        if block[1].strip() == "yaml":
            yaml.safe_load(block[2])


def tables(page: Path) -> dict[str, list[str]]:
    """The code in the first column of each table of a page, by the heading above it."""
    found: dict[str, list[str]] = {}
    heading = ""
    for line in page.read_text().splitlines():
        if line.startswith("#"):
            heading = line.lstrip("# ")
        elif row := re.match(r"\| `(.+?)` \|", line):
            found.setdefault(heading, []).append(row[1])
    return found


REFUSALS = tables(DOCS / "refusals.md")


def make(code: str) -> Plan:
    names = {**vars(topology), **vars(compress), **vars(lightning_dopt)}
    made = eval(code, names)
    return made if isinstance(made, Plan) else Plan([made] if isinstance(made, Sync) else [])


@pytest.mark.parametrize("code", REFUSALS["When a sync or a plan is made"])
def test_refused_when_made(code: str) -> None:
    with pytest.raises(ValueError, match=r"^[^\n]+$"):
        make(code)


@pytest.mark.parametrize("code", REFUSALS["When the number of workers is known"])
def test_refused_for_six_workers(code: str) -> None:
    plan = make(code)
    with pytest.raises(ValueError, match=r"^[^\n]+$"):
        plan.check(6)


@pytest.mark.parametrize("code", REFUSALS["What warns"])
def test_warns(code: str) -> None:
    with pytest.warns(UserWarning, match="Sync"):
        make(code)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        make(code).check(6)


def anchors(page: Path) -> set[str]:
    """The names that headings get in links."""
    heads = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).strip().replace(" ", "-") for head in heads}


@each_page
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if target.startswith("https://"):
            continue
        file, _, anchor = target.partition("#")
        other = DOCS / file if file else page
        assert other in PAGES, target
        assert not anchor or anchor in anchors(other), target


def test_every_page_is_in_the_menu() -> None:
    config = yaml.safe_load((ROOT / "mkdocs.yml").read_text())

    def pages(node: Any) -> list[str]:
        if isinstance(node, str):
            return [node]
        return [p for child in (node.values() if isinstance(node, dict) else node) for p in pages(child)]

    assert sorted(pages(config["nav"])) == [p.name for p in PAGES]


def public() -> set[str]:
    top = {k for k, v in vars(lightning_dopt).items() if not k.startswith("_") and not isinstance(v, ModuleType)}
    parts = {k for k, v in vars(outer).items() if isinstance(v, type) and v.__module__ == outer.__name__}
    return top | parts | set(topology.__all__) | set(compress.__all__) | set(plans.__all__)


def test_every_public_name_is_explained() -> None:
    """In code, since some names are ordinary words."""
    code = []
    for page in PAGES:
        code += [block[2] for block in FENCE.finditer(page.read_text())] + re.findall(r"`([^`\n]+)`", prose(page))
    words = set(re.findall(r"\w+", " ".join(code)))
    missing = sorted(public() - words - {"annotations"})
    assert not missing, f"no page under docs/ mentions {', '.join(missing)}"
