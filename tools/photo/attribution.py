"""Who made the photos, and under which licence, as the packages' own copyright files declare it.

Debian's machine-readable format: paragraphs of ``Key: value``, with continued lines indented. The last paragraph whose
``Files`` match decides. Source: https://www.debian.org/doc/packaging-manuals/copyright-format/1.0/
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath

from tools.photo.packages import GCOMPRIS, PACKAGES
from tools.photo.sources import Sources, real_classes

PICTURES = {".jpg", ".jpeg", ".png", ".webp"}
ACTIVITIES = "src/activities/"  # in the names of gcompris' copyright file


@dataclass(frozen=True)
class Licence:
    """One paragraph: patterns of file names, who has the copyright, the licence's short name, and where it is from."""

    patterns: tuple[str, ...]
    holder: str
    licence: str
    comment: str = ""

    @property
    def whole_package(self) -> bool:
        return self.patterns == ("*",)


def licences(text: str) -> list[Licence]:
    """The paragraphs of a copyright file that declare files, in its order."""
    declared = []
    for paragraph in re.split(r"\n\s*\n", text):
        fields: dict[str, str] = {}
        for match in re.finditer(r"^(\S+?):[ \t]*(.*(?:\n[ \t].*)*)", paragraph, re.MULTILINE):
            fields[match[1].lower()] = match[2]
        if "files" in fields:
            holder = "; ".join(line.strip() for line in fields.get("copyright", "").splitlines() if line.strip())
            licence = fields.get("license", "").splitlines()[:1]
            declared.append(
                Licence(tuple(fields["files"].split()), holder, licence[0].strip() if licence else "", " ".join(fields.get("comment", "").split()))
            )
    return declared


def licence_of(name: str, declared: list[Licence]) -> Licence:
    """The licence of a file: of the last paragraph that names it.

    Suffixes of pictures are not compared: the package holds WebP copies of the JPEG and PNG files that its copyright file names.
    """

    def matches(pattern: str) -> bool:
        listed = PurePosixPath(pattern)
        stems = (str(path.with_suffix("")) for path in (PurePosixPath(name), listed))
        return fnmatchcase(name, pattern) or (listed.suffix in PICTURES and fnmatchcase(*stems))

    return next(one for one in reversed(declared) if any(matches(pattern) for pattern in one.patterns))


def write(sources: Sources, file: Path) -> None:
    """Write ATTRIBUTION.md."""
    file.write_text(page(sources), encoding="utf-8")


def page(sources: Sources) -> str:
    """The text of ATTRIBUTION.md: each package, and each photo of gcompris with the licence that is declared for it."""
    declared = {package.name: licences(sources.copyright(package)) for package in PACKAGES}
    lines = [
        "# Who made these photos",
        "",
        "The photos come out of three Debian packages. Licences are those that the packages' copyright files declare.",
        "What was changed: photos were scaled down; cut-outs were laid on backgrounds; defects were drawn on some.",
        "",
        "| package | version | copyright | licence |",
        "|---|---|---|---|",
    ]
    for package in PACKAGES:
        whole = next(one for one in declared[package.name] if one.whole_package)
        holders = whole.holder.split("; ")
        listed = "; ".join(holders[:3]) + (f"; and {len(holders) - 3} others" if holders[3:] else "")
        lines.append(f"| {package.name} | {package.version} | {_cell(listed)} | {whole.licence} |")
    lines += [
        "",
        "The emoji in `train.zip` are those of `lcl_adapter/pocket/data/ATTRIBUTION.md`.",
        "",
        f"## Photos of {GCOMPRIS.name}",
        "",
        "A photo that is not declared by name falls under the line of the whole package.",
        "The declarations are older than some photos: several names of fish declare another fish than the one that the photo shows.",
        "Ask upstream before you publish one of these photos.",
        "",
        "| photo | copyright | licence | from |",
        "|---|---|---|---|",
    ]
    for reference in sorted(photo for one in real_classes() for photo in one.photos if photo.startswith("gcompris:")):
        name = reference.partition(":")[2]
        own = licence_of(ACTIVITIES + name, declared[GCOMPRIS.name])
        holder, licence = ("not by name", own.licence) if own.whole_package else (_cell(own.holder), own.licence)
        lines.append(f"| {name} | {holder} | {licence} | {_cell(own.comment)} |")
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "/")
