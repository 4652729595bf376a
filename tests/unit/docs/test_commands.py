"""Commands that the documents show are there, with the flags they are shown with."""

from __future__ import annotations

import io
import re
import shlex
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import typer

import kvcache.bench.main
import kvcache.broker.main
import kvcache.gateway.main
import kvcache.simulate.main
import workers.main
from kvcache.cli.app import app
from kvcache.cli.processes import FORWARDED
from tests.unit.docs.test_documents import DOCUMENTS, ROOT

PROGRAMS: dict[str, Callable[[Sequence[str]], int]] = {
    "bench": kvcache.bench.main.main,
    "broker": kvcache.broker.main.main,
    "gateway": kvcache.gateway.main.main,
    "record": kvcache.broker.main.main,
    "simulate": kvcache.simulate.main.main,
    "worker": workers.main.main,
}
"""What `kvcache NAME` becomes."""


def shown(text: str) -> Iterator[list[str]]:
    """The words behind `kvcache` of each command in a text: in a line of code, or between backquotes."""
    blocks = re.findall(r"^```bash\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    code = "\n".join(blocks).replace("\\\n", " ")
    for pattern, where in (
        (r"^(?:\w+=\S+ )*kvcache (.*)$", code),
        (r"^ {4}kvcache (.*)$", text),
        (r"`kvcache ([^`]+)`", text),
    ):
        for words in re.findall(pattern, where, re.MULTILINE):
            yield shlex.split(words, comments=True)


def unknown(words: Sequence[str], helps: dict[str, str]) -> list[str]:
    """What of a command does not exist: its name, or flags."""
    command: object = typer.main.get_command(app)
    names = list(words)
    while (children := getattr(command, "commands", None)) and names and not names[0].startswith("-"):
        if names[0] not in children:
            return [] if names[0].isupper() else names[:1]
        command = children[names.pop(0)]
    own, _, of_workers = " ".join(words).partition(" -- ")
    if words and words[0] in FORWARDED:
        known = _flags(helps[words[0]])
    else:
        known = {name for it in getattr(command, "params", ()) for name in (*it.opts, *it.secondary_opts)} | {"--help"}
    return sorted(_flags(own) - known) + sorted(_flags(of_workers) - _flags(helps["worker"]))


def _flags(text: str) -> set[str]:
    return set(re.findall(r"(?<![\w-])--[a-z][\w-]*", text))


@pytest.fixture(scope="module")
def helps() -> dict[str, str]:
    """The help of each of `PROGRAMS`."""
    found = {}
    for name, main in PROGRAMS.items():
        with redirect_stdout(io.StringIO()) as written, pytest.raises(SystemExit, match="0"):
            main(["--help"])
        found[name] = written.getvalue()
    return found


def test_all_programs_behind_the_command_are_known_here() -> None:
    assert set(PROGRAMS) == set(FORWARDED)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_in_documents_exist_with_their_flags(document: Path, helps: dict[str, str]) -> None:
    wrong = {" ".join(words): unknown(words, helps) for words in shown(document.read_text("utf-8"))}
    assert {command: what for command, what in wrong.items() if what} == {}


def test_wrong_commands_are_found(helps: dict[str, str]) -> None:
    text = (
        "`kvcache serve m --port 1`, `kvcache serve --prot 1`, `kvcache kv pit`, `kvcache worker --modle x`\n"
        "```bash\nKVCACHE_HOME=/x kvcache up \\\n    --model m -- --runer torch   # --not-a-flag\n```\n"
    )
    assert sorted(it for words in shown(text) for it in unknown(words, helps)) == [
        "--modle",
        "--prot",
        "--runer",
        "pit",
    ]
