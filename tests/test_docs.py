"""The documentation is right: code runs, tables of refusals hold, links lead somewhere, nothing is left out."""

from __future__ import annotations

import inspect
import math
import re
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml

import lightning_dopt
from lightning_dopt import (
    Plan,
    Sync,
    Until,
    asynchronous,
    bilevel,
    callbacks,
    combine,
    compress,
    local,
    lowrank,
    outer,
    pipeline,
    plans,
    sharded,
    topology,
)
from lightning_dopt.forecast import forecast

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
    modules = (topology, compress, combine, local, lightning_dopt)
    names = {name: value for module in modules for name, value in vars(module).items()}
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
        if other.suffix == ".png":
            assert other.exists(), target
            continue
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
    modules = (topology, compress, plans, combine, local, callbacks, asynchronous, sharded, lowrank, bilevel, pipeline)
    return top | parts | {name for module in modules for name in module.__all__}


def test_every_public_name_is_explained() -> None:
    """In code, since some names are ordinary words."""
    code = []
    for page in PAGES:
        code += [block[2] for block in FENCE.finditer(page.read_text())] + re.findall(r"`([^`\n]+)`", prose(page))
    words = set(re.findall(r"\w+", " ".join(code)))
    missing = sorted(public() - words - {"annotations"})
    assert not missing, f"no page under docs/ mentions {', '.join(missing)}"


# ---------------------------------------------------------------------- choosing.md: the table of all methods


def method_rows() -> dict[str, dict[str, str]]:
    """The table of all methods, by method and column."""
    part = (DOCS / "choosing.md").read_text().split("## All methods")[1].split("\n## ")[0]
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in part.splitlines() if line[:1] == "|"]
    return {row[0].strip("`"): dict(zip(lines[0], row, strict=True)) for row in lines[2:]}


ROWS = method_rows()
DIGRAPH = [[1, 2], [2], [3], [4, 5], [5, 0], [6], [7], [0]]
top = compress.TopK(0.25)
COARSE: dict[str, dict[str, Any]] = {
    "powersgd": {},
    "dgc": {"ratio": 0.25, "momentum": 0.5, "warmup": (), "dense_below": None},
    "gmf": {"ratio": 0.25, "momentum": 0.5},
    "terngrad": {},
    "qsgd": {"dense_below": None},
    "sign_sgd": {},
    "ef21": {"codec": top},
    "econtrol": {"codec": top},
    "diana": {},
    "fedzip": {"ratio": 0.25},
    "sketched": {"codec": compress.RandK(0.25)},
    "scaffold": {},
    "scallion": {"codec": compress.RandK(0.5)},
    "scafcom": {"codec": compress.TopK(0.5)},
}
OPTIONS: dict[str, dict[str, Any]] = {
    "weighted_gossip": {"counts": [1] * 8},
    "local_gda": {"maximise": "x.*"},
    "apfl": {"match": "*"},
    "cellm": {"match": "*"},
    "dipaco": {"paths": [[0]] * 8, "modules": ["*"]},
}
each_method = pytest.mark.parametrize("name", plans.__all__)


def fits(name: str, topology: Any) -> str:
    """What a plan says of a topology of eight: ``""`` if it is refused, else ``"yes"``, or ``"warned"``."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            getattr(plans, name)(topology=topology, **OPTIONS.get(name, {})).check(8)
        except ValueError:
            return ""
    return "warned" if caught else "yes"


def test_the_table_has_all_methods() -> None:
    assert set(ROWS) == set(plans.__all__)


@each_method
def test_messages_of_the_table(name: str) -> None:
    plan = getattr(plans, name)(**OPTIONS.get(name, {}))
    often = [sync for sync in plan if not sync.when.at_end]
    often = [sync for sync in often if not isinstance(sync.when, Until)]  # another follows
    parts = {getattr(sync.what, "of", 1) for sync in often}
    assert int(ROWS[name]["messages"]) * max(parts, default=1) == sum(
        sync.combine.exchanges(sync.peers, 8) for sync in often
    )


@each_method
def test_vectors_of_the_table(name: str) -> None:
    """What lives inside one step only (copies in flight, of gradients) is left out; so are a plan's small numbers."""
    options = {"topology": topology.Directed(DIGRAPH)} if name in ("sgp", "push_diging") else OPTIONS.get(name, {})
    shapes = {f"x.{k}.weight": (1000, 100) for k in range(10)}
    memory = forecast(getattr(plans, name)(**options), 8, shapes, steps=1).memory
    kept = sum(v for k, v in memory.items() if k not in ("in flight", "gradient copy", "tracker copy")) / 4e6
    said, _, per_neighbour = ROWS[name]["vectors"].partition(" ")
    assert int(said) * (2 if per_neighbour else 1) == round(kept)  # of rank 0, the root of a tree


@each_method
def test_exactness_of_the_table(name: str) -> None:
    width = 64 if name in COARSE else 1  # so that compressors have something to leave out
    minimisers = torch.stack([(k + 1) * (1 + torch.arange(width) * (1.0 + k)).cos() / math.cos(1) for k in range(4)])
    best = (torch.arange(1.0, 5.0)[:, None] * minimisers).sum(0) / 10

    def backward(rank: int, parameters: dict[str, torch.Tensor], step: int) -> None:
        parameters["x"].grad = (rank + 1) * (parameters["x"].detach() - minimisers[rank])

    if name in ("drcgd", "riemannian_tracking"):
        pytest.skip("trains matrices, see test_stiefel.py")
    if name == "local_gda":
        pytest.skip("plays games, see test_federated.py")
    special: dict[str, dict[str, Any]] = {
        "weighted_gossip": {"counts": [1] * 4},
        "streaming_diloco": {"fragments": 1},
        "apfl": {"match": "*"},
        "cellm": {"match": "*"},
        "dipaco": {"paths": [[0]] * 4, "modules": ["*"]},
        "fedspeed": {"sync_every": 10, "rho": 0.0, "weight": 1.0},
        "post_local_sgd": {"start": 20},
        "desloc": {"states": {"momentum_buffer": 512}},
        "mt_dao": {"states": {"momentum_buffer": 32}},
        "savic": {"scope": "local"},
        **COARSE,
    }
    plan = getattr(plans, name)(**special.get(name, {}))
    momentum = 0.5 if name in ("qg_dsgdm", "dmsgd", "desloc", "mt_dao") else 0.0

    def sgd(ps: list[torch.Tensor]) -> torch.optim.Optimizer:
        return torch.optim.SGD(ps, lr=0.04, momentum=momentum)

    start = torch.zeros(width, dtype=torch.float64)
    run = lightning_dopt.Simulation(plan, 4, lambda rank: {"x": start.clone()}, backward, sgd).run(500).finish()
    error = float((run.stacked() - best).abs().max())
    if ROWS[name]["exact"] in ("yes", "nearly"):
        assert error < 1e-3
    else:
        assert ROWS[name]["exact"] in ("no", "as `b` fades")
        assert error > 1e-2


@each_method
def test_graphs_of_the_table(name: str) -> None:
    row = ROWS[name]
    if "topology" not in inspect.signature(getattr(plans, name)).parameters:
        assert (row["changing"], row["directed"]) == ("-", "-")
        return
    changing = {"": "no", "yes": "yes", "warned": "low momentum"}[fits(name, topology.RandomPairs())]
    balanced, push = fits(name, topology.Exponential()), fits(name, topology.Directed(DIGRAPH))
    assert (row["changing"], row["directed"]) == (changing, "any" if push else "balanced" if balanced else "no")
