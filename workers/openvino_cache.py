"""Exported graphs on disk, so that a model is traced once and not at every load.

    folder/<fingerprint>-<the rest of the key>/graph.xml, graph.bin, sums.json

An entry is written under another name and renamed into place whole, so workers that start together do not see each
other's halves. It is used only if its bytes have the checksums that were written with it: whatever is wrong with
one, it is a miss, and so is a folder that cannot be written. The weights in an entry are mapped and not read into
memory, so workers of one machine share them. Of one model the `KEPT` entries used last are kept.
"""

from __future__ import annotations

import hashlib
import json
import logging
import mmap
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

import crc32c
import numpy as np

from workers.openvino_api import opset13, ov

if TYPE_CHECKING:
    from collections.abc import Iterable

log = logging.getLogger(__name__)

KEPT = 4
FORMAT = 2
"""Raise it whenever the graph that `workers.openvino_export` makes of the same model changes."""

_BIG = 1 << 16
_ALIGNMENT = 64
_WRITTEN = (ov.Type.f32, ov.Type.f16, ov.Type.bf16, ov.Type.i8)
"""Types whose bytes numpy sees as they are; bfloat16 comes as float16, which is as wide."""
_GRAPH, _WEIGHTS, _SUMS = "graph.xml", "graph.bin", "sums.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class GraphKey:
    """All that a graph follows from. versions: of the libraries that have a part in it."""

    fingerprint: str
    dtype: str
    weights: str
    max_model_len: int
    versions: tuple[str, ...]

    def folder_name(self) -> str:
        facts = json.dumps([FORMAT, *astuple(self)])
        return f"{self.fingerprint[:32]}-{hashlib.sha256(facts.encode()).hexdigest()[:32]}"


class GraphCache:
    """Graphs by key, in a folder of the user's that need not exist."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def fetch(self, key: GraphKey, make: Callable[[], ov.Model]) -> tuple[ov.Model, bool]:
        """The graph, and whether it stands by itself, being on disk.

        One that `make` had to make, and that could not be kept, may share memory with what it was made of.
        """
        entry = self._folder / key.folder_name()
        found = _read(entry)
        if found is None:
            made = make()
            if not self._store(entry, made) or (found := _read(entry)) is None:
                return made, False
        return found, True

    def _store(self, entry: Path, graph: ov.Model) -> bool:
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=".new-", dir=self._folder) as temporary:
                new = Path(temporary) / "entry"
                _write(new, graph)
                if entry.exists():  # what is there could not be read, or is another worker's of this moment
                    entry.rename(Path(temporary) / "old")
                new.rename(entry)
            _forget_others(self._folder, entry)
        except (OSError, RuntimeError) as error:  # a full disk, a folder of somebody else's, OpenVINO's own
            log.warning("the graph is not kept in %s, so the next load will take as long: %s", self._folder, error)
            return False
        return True


def _write(folder: Path, graph: ov.Model) -> None:
    """Write the graph; the big constants ourselves.

    OpenVINO's writer holds the interpreter, a second for each gigabyte, while this worker should answer heartbeats.
    So they are parameters while it writes, and become constants again in its file and in the graph.
    """
    folder.mkdir()
    cut = _cut_weights(graph)
    try:
        ov.save_model(graph, folder / _GRAPH, compress_to_fp16=False)
    finally:
        for parameter, constant in cut.values():
            parameter.output(0).replace(constant.output(0))
            graph.remove_parameter(parameter)
    tree = ElementTree.parse(folder / _GRAPH)
    with (folder / _WEIGHTS).open("ab") as file:
        for layer in tree.iterfind("layers/layer[@type='Parameter']"):
            if (found := cut.get(layer.attrib["name"])) is None:
                continue
            data = np.ascontiguousarray(found[1].data)
            file.write(bytes(-file.tell() % _ALIGNMENT))
            facts = {"offset": str(file.tell()), "size": str(data.nbytes)}
            layer.set("type", "Const")
            layer[0].attrib.update(facts)
            file.write(data.reshape(-1).view(np.uint8).data)
    tree.write(folder / _GRAPH)
    sums = {name: _checksum(folder / name) for name in (_GRAPH, _WEIGHTS)}
    (folder / _SUMS).write_text(json.dumps(sums))


def _cut_weights(graph: ov.Model) -> dict[str, tuple[Any, Any]]:
    """Put a parameter in the place of every big constant; returns both of each, by the parameter's name."""
    cut: dict[str, tuple[Any, Any]] = {}
    for node in graph.get_ops():
        if node.get_type_name() != "Constant" or node.get_byte_size() < _BIG:
            continue
        if node.get_element_type() in _WRITTEN:
            parameter = opset13.parameter(ov.PartialShape(list(node.get_output_shape(0))), node.get_element_type())
            name = f"kvcache.weight/{len(cut)}"
            parameter.set_friendly_name(name)
            node.output(0).replace(parameter.output(0))
            cut[name] = (parameter, node)
    graph.add_parameters([parameter for parameter, _ in cut.values()])
    return cut


def _read(entry: Path) -> ov.Model | None:
    """None if it is not there, or not as it was written."""
    if not entry.is_dir():
        return None
    try:
        sums: Any = json.loads((entry / _SUMS).read_bytes())
        if sums != {name: _checksum(entry / name) for name in (_GRAPH, _WEIGHTS)}:
            raise ValueError("its bytes have changed")
        graph = ov.Core().read_model(entry / _GRAPH, entry / _WEIGHTS)
        os.utime(entry)
    except (OSError, RuntimeError, ValueError) as error:
        log.warning("the graph kept in %s is made anew: %s", entry, error)
        return None
    return graph


def _checksum(path: Path) -> int:
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        return int(crc32c.crc32c(data))


def _forget_others(folder: Path, entry: Path) -> None:
    """Remove the least recently used entries of the model that `entry` is of, but for `KEPT`."""
    model = entry.name.partition("-")[0]
    others: Iterable[Path] = (path for path in folder.glob(f"{model}-*") if path != entry)
    for old in sorted(others, key=lambda path: path.stat().st_mtime, reverse=True)[KEPT - 1 :]:
        shutil.rmtree(old, ignore_errors=True)
