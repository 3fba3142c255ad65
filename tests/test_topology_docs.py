"""The generated parts of the topologies page: every named graph, its figures and its picture."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

from lightning_dopt.topology import by_name, gallery, names, summary

DOCS = Path(__file__).parent.parent / "docs"


def hooks() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_hooks", DOCS / "hooks.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_table_has_a_row_per_name_and_three_figures_per_size() -> None:
    rows = {
        line.split("|")[1].strip(" `"): [c.strip() for c in line.split("|")[2:-1]]
        for line in gallery.table((4, 6)).splitlines()[2:]
    }
    assert list(rows) == names()
    assert rows["complete"] == ["3", "3", "exact in 1", "5", "5", "exact in 1"]
    assert rows["ring"] == ["2", "2", "0.667", "2", "2", f"{summary(by_name('ring'), 6).spectral_gap:.3f}"]
    assert rows["hypercube"] == ["2", "2", "0.667", "-", "-", "-"]
    assert rows["base_graph"] == ["1", "1", "exact in 2", "1", "0.75", "exact in 4"]


def test_the_page_is_filled() -> None:
    module = hooks()
    page = (DOCS / "topologies.md").read_text()
    assert page.count(module.TABLE) == page.count(module.PICTURES) == 1
    found = module.on_page_markdown(page)
    assert module.TABLE not in found
    assert module.PICTURES not in found
    shown = re.findall(r"!\[(\w+)\]\(pictures/(\w+)\.svg\)", found)
    assert [a for a, _ in shown] == [b for _, b in shown] == names()
    assert "python no-run" not in module.on_page_markdown("```python no-run\npass\n```\n")


def test_pictures_are_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(gallery, "names", lambda: ["ring", "hypercube", "alternating_ring"])
    assert {name: path.name for name, path in gallery.pictures(tmp_path, 6).items()} == {
        "ring": "ring.svg",
        "alternating_ring": "alternating_ring.svg",
    }
    assert "<svg" in (tmp_path / "ring.svg").read_text()
