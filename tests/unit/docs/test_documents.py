"""What the documents say of the code is so: files they name exist, and pages made from the code are whole."""

from __future__ import annotations

import importlib.util
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[3]
DOCUMENTS = [*sorted((ROOT / "docs").rglob("*.md")), ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
ARCHITECTURE = (ROOT / "docs" / "ARCHITECTURE.md").read_text("utf-8")
FOLDERS = ("bus", "kvcache", "workers", "tests", "scripts", "docs", ".ci")


@pytest.fixture(scope="module")
def hooks() -> ModuleType:
    """scripts/site_hooks.py; `scripts` is no package."""
    spec = importlib.util.spec_from_file_location("site_hooks", ROOT / "scripts" / "site_hooks.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def named_files(text: str) -> Iterator[str]:
    """What `folder/name`, `folder/{one,two}` and `folder/name.py` between backquotes name."""
    prose = re.sub(r"^ *```.*?^ *```", "", text, flags=re.DOTALL | re.MULTILINE)
    for span in re.findall(r"`([^`]+)`", prose):
        path = re.sub(r",\s+", ",", span)
        if not re.fullmatch(rf"({'|'.join(map(re.escape, FOLDERS))})(/[\w.{{}},*-]+)+/?", path):
            continue
        braces = re.fullmatch(r"([^{]*)\{([^}]*)\}(.*)", path)
        if braces is None:
            yield path
        else:
            yield from (braces[1] + name + braces[3] for name in braces[2].split(","))


def exists(path: str) -> bool:
    return any(any(ROOT.glob(pattern.rstrip("/"))) for pattern in (path, f"{path}.py"))


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_that_a_document_names_exist(document: Path) -> None:
    assert [path for path in named_files(document.read_text("utf-8")) if not exists(path)] == []


def test_the_map_of_the_code_names_files() -> None:
    found = set(named_files(ARCHITECTURE))
    assert {"bus/sockets", "kvcache/broker/core", "workers/openvino_graph"} <= found
    assert len(found) > 50


def test_the_bare_names_in_the_map_are_files_of_the_folder_before_them() -> None:
    """`kvcache/broker/core` and, after it in the same row, `sessions`, `members`."""
    wrong = []
    for row in ARCHITECTURE.splitlines():
        if not row.startswith("|") or "`" not in row:
            continue
        folder = ""
        for span in re.findall(r"`([^`]+)`", row):
            if "/" in span and span.split("/")[0] in FOLDERS:
                folder = span.partition("{")[0].rpartition("/")[0]
            elif folder and re.fullmatch(r"[a-z_]+", span) and not exists(f"{folder}/{span}"):
                wrong.append(f"{folder}/{span}")
    assert wrong == []


def test_every_module_has_a_row_of_its_own(hooks: ModuleType) -> None:
    rows = "\n".join(hooks.modules())
    assert "## kvcache/broker\n" in rows
    assert "| `wire.py` | Bytes to messages and back; the only place that knows either. |" in rows
    silent = [
        str(path.relative_to(ROOT))
        for package in hooks.PACKAGES
        for path in (ROOT / package).rglob("*.py")
        if path.name not in {"__init__.py", "__main__.py"} and f"| `{path.name}` |" not in rows
    ]
    assert silent == []


def test_commands_are_told_with_their_groups_and_options(hooks: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    def say_who(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, 0, stdout=f"ran {command[-2]}\n")

    monkeypatch.setattr(hooks.subprocess, "run", say_who)  # the programs behind `kvcache worker` and its like
    helps = dict(hooks.helps())
    assert helps["kvcache worker"] == "ran worker"
    assert next(iter(helps)) == "kvcache"
    assert {"kvcache up", "kvcache kv", "kvcache kv put", "kvcache models pull"} <= set(helps)
    assert "--kv-cache-memory-bytes SIZE" in helps["kvcache up"]
    assert helps["kvcache kv put"].startswith("Usage: kvcache kv put ")


def test_every_alert_has_a_row_that_says_what_to_do(hooks: ModuleType) -> None:
    rows = "\n".join(hooks.alerts())
    for alert in re.findall(r"- alert: (\w+)", hooks.ALERTS.read_text("utf-8")):
        assert re.search(rf"^\| {alert} \| (critical|warning|info) \| [^|]+ \| [^|]+ \|$", rows, re.MULTILINE), alert
    assert "The broker does not answer `<instance>`." in rows
    assert "{{" not in rows


def test_links_of_the_repositorys_own_pages_lead_to_pages_of_the_site(hooks: ModuleType) -> None:
    page = hooks.on_page_markdown("<!-- made: CHANGELOG.md -->\nSee [CHANGELOG.md](../CHANGELOG.md).\n")
    assert "](GATEWAY.md)" in page
    assert "](docs/" not in page
    assert "../CHANGELOG.md" not in page


def test_a_list_right_behind_text_is_set_apart_and_code_is_left_alone(hooks: ModuleType) -> None:
    text = "Routing\n- a\n  more\n- b\n\n  still b\n- c\n\n```\nx\n- no list\n```\n1. d\n"
    apart = "Routing\n\n- a\n  more\n- b\n\n  still b\n- c\n\n```\nx\n- no list\n```\n\n1. d\n"
    assert hooks.with_lists_apart(text) == apart


@pytest.mark.parametrize(
    ("tag", "is_foreign"),
    [
        ('<script src="https://cdn.example/x.js">', True),
        ('<link rel="stylesheet" href="//fonts.example/css">', True),
        ("<img alt=a src=http://x.example/a.png>", True),
        ('<img src="routing/hits.svg">', False),
        ('<a href="https://semver.org/">', False),
        ('<link rel="canonical" href="https://site.example/">', False),
    ],
)
def test_what_a_browser_would_fetch_elsewhere_is_found(hooks: ModuleType, tag: str, is_foreign: bool) -> None:
    assert bool(hooks.foreign_assets(tag)) == is_foreign
