"""Parse Dockerfiles and .dockerignore as an image builder does. Supports only what the files of ccrun use."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Final

import attrs

ROOT: Final = Path(__file__).parents[2]
CONTAINERS: Final = ROOT / "containers"


@attrs.frozen(kw_only=True)
class Instruction:
    """One instruction, such as `COPY --from=build /a /b`: its name, its flags, and the remaining text."""

    name: str
    flags: dict[str, str]
    value: str

    @property
    def words(self) -> list[str]:
        """The words after the flags, or the strings of the exec form."""
        words: list[str] = json.loads(self.value) if self.value.startswith("[") else self.value.split()
        return words

    @property
    def variables(self) -> dict[str, str]:
        """The variables of ENV, the labels of LABEL, the argument of ARG."""
        found = re.findall(r'([\w.]+)=(?:"([^"]*)"|(\S*))', self.value)
        return {name: quoted or plain for name, quoted, plain in found}


@attrs.frozen(kw_only=True)
class Stage:
    """One FROM and the instructions after it."""

    base: str
    name: str | None
    instructions: Sequence[Instruction]

    def all(self, name: str) -> list[Instruction]:
        """Return all instructions with this name."""
        return [instruction for instruction in self.instructions if instruction.name == name]

    def last(self, name: str) -> Instruction:
        """Return the last instruction with this name, which overrides the others."""
        return self.all(name)[-1]

    @property
    def environment(self) -> dict[str, str]:
        """All variables that ENV sets."""
        return {name: value for each in self.all("ENV") for name, value in each.variables.items()}


def read(path: Path) -> list[Stage]:
    """Return the stages of a Dockerfile."""
    lines = [line for line in path.read_text().splitlines() if not line.lstrip().startswith("#")]
    stages: list[Stage] = []
    for text in "\n".join(lines).replace("\\\n", "").splitlines():
        if not text.strip():
            continue
        name, _, rest = text.partition(" ")
        flags = {}
        while flag := re.match(r"\s*--([a-z-]+)=(\S+)", rest):
            flags[flag[1]] = flag[2]
            rest = rest[flag.end() :]
        instruction = Instruction(name=name, flags=flags, value=re.sub(r"\s{2,}", " ", rest).strip())
        if name == "FROM":
            base, *alias = instruction.words
            stages.append(Stage(base=base, name=alias[1] if alias else None, instructions=()))
        else:
            stages[-1] = attrs.evolve(stages[-1], instructions=(*stages[-1].instructions, instruction))
    return stages


def in_build_context(path: str, ignore_file: Path = ROOT / ".dockerignore") -> bool:
    """Return whether .dockerignore includes a file. The last line that matches it, or a directory above it, decides."""
    included = True
    names = [str(each) for each in (PurePosixPath(path), *PurePosixPath(path).parents)]
    for line in ignore_file.read_text().splitlines():
        if line and not line.startswith("#"):
            pattern = re.compile(_regex(line.removeprefix("!").strip("/")))
            if any(pattern.fullmatch(name) for name in names):
                included = line.startswith("!")
    return included


def _regex(pattern: str) -> str:
    parts = re.split(r"(\*\*/|\*|\[[^\]]+\])", pattern)
    wild = {"**/": "(?:.*/)?", "*": "[^/]*"}
    return "".join(wild.get(part, part if part.startswith("[") else re.escape(part)) for part in parts)
