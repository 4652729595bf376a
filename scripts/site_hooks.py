"""What MkDocs calls while it builds the site: pages made from the code, and a check that a reader's browser fetches
nothing from other hosts.

A page that is made holds a line `<!-- made: KIND -->` and, for those who read it in the repository, where the same is
to be had there; on the site the result stands in its place. Kinds: `commands`, every command's --help; `modules`, the
first words of every module; `alerts`, those of Prometheus; the name of a file, that file.
"""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import typer
import yaml
from typer.testing import CliRunner

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # MkDocs may run where another checkout is installed

from kvcache.cli.app import app  # noqa: E402
from kvcache.cli.processes import FORWARDED  # noqa: E402

ALERTS = ROOT / "deploy" / "prometheus" / "alerts.yml"
WIDTH = 110
PACKAGES = ("bus", "kvcache", "workers")

_MADE = re.compile(r"<!-- made: (\S+) -->.*", re.DOTALL)
_FETCHED = re.compile(
    r"""<(?:script|img|iframe|source|link)\b(?![^>]*\brel=["']?canonical)[^>]*\b(?:src|href)=["']?(?:https?:)?//[^"'>\s]*"""
)
_ITEM = re.compile(r"\s*([-*]|\d+\.) ")


def on_page_markdown(markdown: str, **_: object) -> str:
    """A page's Markdown, as MkDocs is to read it."""
    found = _MADE.search(markdown)
    return with_lists_apart(markdown if found is None else markdown[: found.start()] + made(found[1]))


def on_post_build(config: Mapping[str, object]) -> None:
    """Raises SystemExit if a page would fetch something from another host."""
    pages = Path(str(config["site_dir"])).rglob("*.html")
    found = [f"{page}: {tag}" for page in pages for tag in foreign_assets(page.read_text("utf-8"))]
    if found:
        sys.exit("pages fetch from other hosts:\n" + "\n".join(found))


def made(kind: str) -> str:
    """The Markdown of one kind of page. Raises OSError for a file that is not there."""
    match kind:
        case "commands":
            return "\n".join(_section(name, text) for name, text in helps())
        case "modules":
            return "\n".join(modules())
        case "alerts":
            return "\n".join(alerts())
        case _:
            return (ROOT / kind).read_text("utf-8").replace("](docs/", "](")


def with_lists_apart(markdown: str) -> str:
    """With an empty line before each list that follows a line of text: GitHub needs none, Python-Markdown does."""
    lines: list[str] = []
    is_code = is_list = False
    for line in markdown.split("\n"):
        is_item = bool(_ITEM.match(line)) and not is_code
        if is_item and not is_list and lines and lines[-1].strip():
            lines.append("")
        is_code ^= line.lstrip().startswith("```")
        is_list = is_item or (is_list and (not line.strip() or line.startswith(" ")))
        lines.append(line)
    return "\n".join(lines)


def foreign_assets(page: str) -> list[str]:
    """The tags of a page that a browser follows to another host by itself."""
    return [match[0] for match in _FETCHED.finditer(page)]


def helps() -> Iterator[tuple[str, str]]:
    """Each command and its help, in the order of the command tree."""
    return _helps(typer.main.get_command(app), ())


def modules() -> Iterator[str]:
    """A heading for each folder of code, and a row for each file in it that says what it is."""
    for package in PACKAGES:
        for folder in sorted({path.parent for path in (ROOT / package).rglob("*.py")}):
            yield f"\n## {folder.relative_to(ROOT)}\n\n| module | what it is |\n|---|---|"
            for path in sorted(folder.glob("*.py")):
                if words := _first_words(path):
                    yield f"| `{path.name}` | {words} |"


def alerts() -> Iterator[str]:
    """A heading for each group of Prometheus' rules, and a row for each alert in it."""
    for group in yaml.safe_load(ALERTS.read_text("utf-8"))["groups"]:
        yield f"\n## {group['name']}\n\n| alert | severity | means | do |\n|---|---|---|---|"
        for rule in group["rules"]:
            severity, notes = rule["labels"]["severity"], rule["annotations"]
            cells = (rule["alert"], severity, notes["summary"], notes["description"])
            yield f"| {' | '.join(_without_values(cell) for cell in cells)} |"


def _without_values(text: str) -> str:
    """What Prometheus puts in, `{{ $labels.worker }}` or `{{ $value | humanize }}`, as `<worker>` and `<value>`."""
    named = re.sub(r"\{\{ \$(?:labels\.)?(\w+)[^}]*\}\}", r"`<\1>`", text)
    return " ".join(named.split()).replace("|", "\\|")


def _section(name: str, text: str) -> str:
    return f"{'#' * (1 + len(name.split()))} {name}\n\n```text\n{text}\n```\n"


def _helps(command: object, path: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    yield " ".join(("kvcache", *path)), _help(path)
    for name, child in getattr(command, "commands", {}).items():
        yield from _helps(child, (*path, name))


def _help(path: tuple[str, ...]) -> str:
    env = {"COLUMNS": str(WIDTH), "NO_COLOR": "1"}
    if path and path[0] in FORWARDED:  # these become other programs
        command = [sys.executable, "-m", "kvcache.cli", *path, "--help"]
        ran = subprocess.run(command, env=os.environ | env, cwd=ROOT, check=True, capture_output=True, text=True)
        return ran.stdout.rstrip()
    result = CliRunner().invoke(
        app, [*path, "--help"], prog_name="kvcache", env=env, terminal_width=WIDTH, catch_exceptions=False
    )
    return result.output.rstrip()


def _first_words(path: Path) -> str:
    """The first paragraph of a module's docstring, as one line that can stand in a table."""
    text = ast.get_docstring(ast.parse(path.read_text("utf-8"))) or ""
    return " ".join(text.split("\n\n")[0].split()).replace("|", "\\|")
