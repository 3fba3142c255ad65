"""Build hooks of the documentation: fences without the tests' marker, generated tables and pictures of topologies."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

TABLE = "<!-- the table of all topologies -->"
PICTURES = "<!-- the pictures of all topologies -->"
FOLDER = "pictures"


def on_files(files: Any, config: Any, **_: object) -> Any:
    """Draw the topologies into the site; nothing is written below ``docs/``."""
    from mkdocs.structure.files import File

    from lightning_dopt.topology import gallery

    with tempfile.TemporaryDirectory() as folder:
        for name, path in gallery.pictures(Path(folder)).items():
            files.append(File.generated(config, f"{FOLDER}/{name}.svg", content=path.read_bytes()))
    return files


def on_page_markdown(markdown: str, **_: object) -> str:
    """Make ``python no-run`` an ordinary Python block (Python-Markdown knows fences with one word only); fill markers."""
    if TABLE in markdown or PICTURES in markdown:
        markdown = filled(markdown)
    return markdown.replace("```python no-run\n", "```python\n")


def filled(markdown: str) -> str:
    """The page with table and pictures in place of their markers."""
    from lightning_dopt.topology import by_name, gallery, names

    drawn = [name for name in names() if gallery.exists(by_name(name), gallery.PICTURED)]
    shown = "\n\n".join(f"**{name}**\n\n![{name}]({FOLDER}/{name}.svg)" for name in drawn)
    return markdown.replace(TABLE, gallery.table()).replace(PICTURES, shown)
