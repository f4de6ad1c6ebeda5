"""Make the shipped emoji classes from icon sets.

A class is one emoji; a drawing is that emoji as one icon set draws it.

Why emoji: the same thing drawn by several artists is the smallest honest substitute for "the same product on several
photos", and icon sets with permissive licences are on the npm registry. The steps, each a function below:

    fetch  -> pair (which icon of which set draws which emoji) -> render -> split by class -> write

``write`` makes ``classes.json`` and ``drawings.zip`` (lossless WebP of 64 colours, 64 x 64 pixels on white), and beside
them the licence texts and ATTRIBUTION.md.
"""

from __future__ import annotations

import io
import json
import re
import subprocess
import tarfile
import zipfile
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from rich.progress import track

from lcl_adapter.files import scratch_folder

SIZE = 64


@dataclass(frozen=True)
class IconSet:
    """One npm icon package. ``ships`` is false for a set that is only used to name icons or to train the tower."""

    name: str
    version: str
    licence: str
    credit: str
    ships: bool = True

    @property
    def package(self) -> str:
        return f"@iconify-json/{self.name}"


SETS = (
    IconSet("noto", "1.2.9", "Apache-2.0", "Noto Emoji, Google Inc, https://github.com/googlefonts/noto-emoji"),
    IconSet("noto-v1", "1.2.5", "Apache-2.0", "Noto Emoji (v1), Google Inc, https://github.com/googlefonts/noto-emoji"),
    IconSet("fxemoji", "1.2.2", "Apache-2.0", "Firefox OS Emoji, Mozilla, https://github.com/mozilla/fxemoji"),
    IconSet("twemoji", "1.2.5", "CC-BY-4.0", "Twitter Emoji, Twitter, https://github.com/jdecked/twemoji"),
    IconSet("emojione", "1.2.3", "CC-BY-4.0", "Emoji One 2.3, Emoji One, https://github.com/EmojiTwo/emojitwo"),
    IconSet("fluent-emoji", "1.2.7", "MIT", "Fluent Emoji, Microsoft, https://github.com/microsoft/fluentui-emoji"),
    # The drawings of fluent-emoji without shading. Near copies would make episodes too easy, so this set only trains
    # the tower.
    IconSet("fluent-emoji-flat", "1.2.6", "MIT", "Fluent Emoji Flat, Microsoft, https://github.com/microsoft/fluentui-emoji", ships=False),
)
EMOJI_DATA = "emoji-datasource@16.0.0"  # names, categories, subcategories (MIT)
LICENCE_TEXTS = "spdx-license-list@6.10.0"  # the full text of each licence, as SPDX publishes it

# Answers to the question "what kind of thing is this": one word per category, short enough for a tiny language model.
KINDS = {
    "Smileys & Emotion": "feeling",
    "People & Body": "person",
    "Animals & Nature": "nature",
    "Food & Drink": "food",
    "Travel & Places": "travel",
    "Activities": "activity",
    "Objects": "object",
    "Symbols": "symbol",
}
SPLITS = ("train", "validation", "held_out")


@dataclass
class EmojiClass:
    """One emoji. ``icons`` maps a set's name to (icon name, mirrored)."""

    id: str
    name: str
    category: str
    subcategory: str
    icons: dict[str, tuple[str, bool]] = field(default_factory=dict)
    split: str = ""

    @property
    def lookalike(self) -> bool:
        """Whether it differs from other classes in one detail: clock faces, hearts, squares, circles, keycaps.

        Such a class is never used as a *hard* neighbour, because that would measure eyesight and not learning from
        context.
        """
        return self.subcategory in {"keycap", "geometric", "heart"} or bool(re.match(r"clock\d|moon|.* moon", self.name))


def fetch(folder: Path) -> None:
    """Download and unpack the npm packages into ``folder``. Packages that are already in it are not downloaded again."""
    folder.mkdir(parents=True, exist_ok=True)
    packages = [f"{s.package}@{s.version}" for s in SETS] + [EMOJI_DATA, LICENCE_TEXTS]
    for spec in packages:
        target = folder / spec.split("/")[-1].rsplit("@", 1)[0]
        if target.exists():
            continue
        packed = subprocess.run(["npm", "pack", "--silent", spec], cwd=folder, check=True, capture_output=True, text=True)
        archive = folder / packed.stdout.strip().splitlines()[-1]
        with scratch_folder(target) as partial, tarfile.open(archive) as tar:
            members = [m for m in tar.getmembers() if "/img/" not in m.name]
            tar.extractall(partial, members=members, filter="data")
            (partial / "package").rename(target)
        archive.unlink()


def _codepoints(unified: str) -> str:
    """The form that all sets share: lower case, no leading zeros, no variation selectors (``1F1E6-FE0F`` -> ``1f1e6``)."""
    return "-".join(part.lstrip("0") for part in unified.lower().split("-") if part != "fe0f")


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def _squash(text: str) -> str:
    return re.sub(r"[^a-z0-9]", "", text.lower())


def _concept(emoji: EmojiClass) -> str:
    """A key for emoji that look alike: the gender, role and family variants of a person.

    Only one class is made per concept.
    """
    if emoji.category != "People & Body":
        return emoji.id
    if emoji.subcategory == "family":
        return "family"
    parts = [p for p in emoji.id.split("-") if p not in {"200d", "2640", "2642", "27a1"}]
    if len(parts) > 1 and parts[0] in {"1f468", "1f469", "1f9d1"}:
        parts[0] = "1f9d1"
    return "-".join(parts)


def pair(folder: Path) -> list[EmojiClass]:
    """Find the icon of each set that draws an emoji.

    Some sets list code points, which are exact. In the others an icon is identified by its name. The name table is a
    vote of the exact sets, their aliases and the emoji's own names.
    """
    classes: dict[str, EmojiClass] = {}
    short_names: dict[str, list[str]] = {}
    full_names: dict[str, str] = {}
    for entry in json.loads((folder / "emoji-datasource" / "emoji.json").read_text()):
        if entry["category"] in {"Component", "Flags"} or "1F3FB" in entry["unified"]:
            continue
        code = _codepoints(entry["unified"])
        name = re.sub(r"[_-]+", " ", entry["short_names"][0]).strip()
        classes[code] = EmojiClass(code, name, entry["category"], entry["subcategory"])
        short_names[code], full_names[code] = entry["short_names"], entry["name"]

    icons: dict[str, dict[str, Any]] = {s.name: json.loads((folder / s.name / "icons.json").read_text()) for s in SETS}
    chars: dict[str, dict[str, str]] = {}
    for s in SETS:
        listed = json.loads((folder / s.name / "chars.json").read_text())
        chars[s.name] = {_codepoints(code): icon for code, icon in listed.items()}
    chars["fluent-emoji"] = chars["fluent-emoji-flat"]  # the same names, listed by the flat set only

    votes: dict[str, Counter[str]] = defaultdict(Counter)
    for set_name in ("noto", "twemoji", "fluent-emoji-flat"):
        drawn: dict[str, set[str]] = defaultdict(set)
        for code, icon in chars[set_name].items():
            if code in classes:
                drawn[icon].add(code)
                votes[icon][code] += 2
        for alias, target in icons[set_name].get("aliases", {}).items():
            if set(target) == {"parent"}:  # a mirrored alias is another picture
                for code in drawn.get(target["parent"], ()):
                    votes[alias][code] += 1
    for code in classes:
        votes[_slug(full_names[code])][code] += 1
    by_name = {name: count.most_common(1)[0][0] for name, count in votes.items()}

    def resolve(set_name: str, icon: str) -> tuple[str, bool] | None:
        mirrored = False
        while icon not in icons[set_name]["icons"]:
            alias = icons[set_name].get("aliases", {}).get(icon)
            if alias is None:
                return None
            mirrored ^= bool(alias.get("hFlip"))
            icon = alias["parent"]
        return icon, mirrored

    for set_name in ("noto", "twemoji", "fluent-emoji", "fluent-emoji-flat"):
        for code, icon in chars[set_name].items():
            if code in classes and (resolved := resolve(set_name, icon)):
                classes[code].icons[set_name] = resolved

    for set_name in ("noto-v1", "emojione"):
        aliases = icons[set_name].get("aliases", {})
        for icon in icons[set_name]["icons"]:
            names = [icon] + [a for a, t in aliases.items() if t == {"parent": icon}]
            tally: Counter[str] = Counter()
            for position, name in enumerate(names):
                if name in by_name:
                    tally[by_name[name]] += 3 if position == 0 else 1
            if tally:
                classes[tally.most_common(1)[0][0]].icons.setdefault(set_name, (icon, False))

    squashed: dict[str, Counter[str]] = defaultdict(Counter)  # fxemoji writes names without separators
    for name, code in by_name.items():
        squashed[_squash(name)][code] += 1
    for code in classes:
        squashed[_squash(full_names[code])][code] += 3
        for short in short_names[code]:
            squashed[_squash(short)][code] += 2
    for icon in icons["fxemoji"]["icons"]:
        key = _squash(icon)
        tries = (key, key.replace("symbol", ""), key + "face", key + "symbol", key.replace("face", ""), key + "sign", key.replace("sign", ""))
        hit = next((t for t in (*tries, "face" + key) if t in squashed), None)
        if hit:
            classes[squashed[hit].most_common(1)[0][0]].icons.setdefault("fxemoji", (icon, False))

    concepts: dict[str, list[EmojiClass]] = defaultdict(list)
    for emoji in classes.values():
        if emoji.icons:
            concepts[_concept(emoji)].append(emoji)
    chosen = [min(group, key=lambda e: (-len(e.icons), len(e.id))) for group in concepts.values()]
    return sorted(chosen, key=lambda e: (e.category, e.subcategory, e.id))


def render(folder: Path, classes: list[EmojiClass]) -> dict[tuple[str, str], np.ndarray]:
    """Draw every icon at twice the size on white and halve it. Returns (class id, set name) -> uint8 [64, 64, 3]."""
    import resvg_py

    icons = {s.name: json.loads((folder / s.name / "icons.json").read_text()) for s in SETS}
    drawings: dict[tuple[str, str], np.ndarray] = {}
    for emoji in track(classes, description="drawing"):
        for set_name, (icon, mirrored) in emoji.icons.items():
            svg = _svg(icons[set_name], icon, mirrored)
            png = resvg_py.svg_to_bytes(svg_string=svg, width=2 * SIZE, height=2 * SIZE)
            image = Image.open(io.BytesIO(bytes(png))).convert("RGBA")
            page = Image.new("RGBA", image.size, "white")
            page.alpha_composite(image)
            pixels = np.asarray(page.convert("RGB").resize((SIZE, SIZE), Image.Resampling.LANCZOS))
            if pixels.min() <= 240:  # a blank drawing is an error in the icon set
                drawings[emoji.id, set_name] = pixels
    return drawings


def _svg(icon_set: dict[str, Any], icon: str, mirrored: bool) -> str:
    entry = icon_set["icons"][icon]
    width, height, left, top = (
        entry.get(key, icon_set.get(key, default)) for key, default in (("width", 16), ("height", 16), ("left", 0), ("top", 0))
    )
    body = entry["body"].replace("currentColor", "#000")
    if mirrored:
        body = f'<g transform="translate({2 * left + width} 0) scale(-1 1)">{body}</g>'
    side = max(width, height)
    box = f"{left - (side - width) / 2} {top - (side - height) / 2} {side} {side}"
    space = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    return f'<svg {space} viewBox="{box}" width="128" height="128">{body}</svg>'


def split_by_class(classes: list[EmojiClass], seed: int = 0) -> None:
    """Split 70 / 10 / 20 % within every subcategory, so that held-out classes have held-out neighbours."""
    rng = np.random.default_rng(seed)
    groups: dict[tuple[str, str], list[EmojiClass]] = defaultdict(list)
    for emoji in classes:
        groups[emoji.category, emoji.subcategory].append(emoji)
    for key in sorted(groups):
        members = [groups[key][i] for i in rng.permutation(len(groups[key]))]
        held_out = int(0.2 * len(members) + rng.random())
        if len(members) >= 5:
            held_out = max(held_out, 2)
        validation = min(int(0.1 * len(members) + rng.random()), len(members) - held_out)
        for position, emoji in enumerate(members):
            emoji.split = "held_out" if position < held_out else "validation" if position < held_out + validation else "train"


def write(folder: Path, target: Path, classes: list[EmojiClass], drawings: dict[tuple[str, str], np.ndarray]) -> None:
    """Write the shipped files: ``classes.json``, ``drawings.zip``, ATTRIBUTION.md and the licence texts."""
    target.mkdir(parents=True, exist_ok=True)
    shipped = [s.name for s in SETS if s.ships]
    records = []
    with zipfile.ZipFile(target / "drawings.zip", "w", zipfile.ZIP_STORED) as archive:
        for emoji in classes:
            drawn_by = [name for name in shipped if (emoji.id, name) in drawings]
            if len(drawn_by) < 2:
                continue
            for set_name in drawn_by:
                palette = Image.fromarray(drawings[emoji.id, set_name]).quantize(64, dither=Image.Dither.NONE)
                buffer = io.BytesIO()
                palette.convert("RGB").save(buffer, "WEBP", lossless=True, method=6)
                # The date is fixed so that every build gives the same archive, byte for byte.
                archive.writestr(zipfile.ZipInfo(f"{emoji.id}/{set_name}.webp", (2026, 1, 1, 0, 0, 0)), buffer.getvalue())
            records.append(
                {
                    "id": emoji.id,
                    "name": emoji.name,
                    "kind": KINDS[emoji.category],
                    "subcategory": emoji.subcategory,
                    "lookalike": emoji.lookalike,
                    "split": emoji.split,
                    "drawings": drawn_by,
                }
            )
    lines = ",\n".join(json.dumps(record, ensure_ascii=False) for record in records)
    (target / "classes.json").write_text(f"[\n{lines}\n]\n", encoding="utf-8")
    _write_licences(folder, target)


def _write_licences(folder: Path, target: Path) -> None:
    rows = "\n".join(f"| {s.name} {s.version} | {s.credit} | {s.licence} | `LICENSES/{s.licence}.txt` |" for s in SETS if s.ships)
    (target / "ATTRIBUTION.md").write_text(
        "# Who drew these pictures\n\n"
        "`drawings.zip` holds emoji of the icon sets below, from the npm packages `@iconify-json/<set>`. Changes made: each drawing was\n"
        "rendered at 64 x 64 pixels on white and reduced to 64 colours. Names, categories and subcategories in `classes.json` come from\n"
        "`emoji-datasource` 16.0.0 (MIT, Cal Henderson). Licences are as the packages declare them.\n\n"
        f"| set and version | by | licence | text |\n|---|---|---|---|\n{rows}\n",
        encoding="utf-8",
    )
    texts = target / "LICENSES"
    texts.mkdir(exist_ok=True)
    for licence in sorted({s.licence for s in SETS}):
        record = json.loads((folder / "spdx-license-list" / "licenses" / f"{licence}.json").read_text())
        text = record["licenseText"]
        if licence == "MIT":
            text = text.replace("<year>", "").replace("<copyright holders>", "Microsoft Corporation")
        (texts / f"{licence}.txt").write_text(text.rstrip() + "\n", encoding="utf-8")


def load_work(path: Path) -> tuple[np.ndarray, list[str], list[str]]:
    """All drawings, also of sets that do not ship: pixels [N, 64, 64, 3], class ids [N], set names [N]."""
    arrays = np.load(path)
    return arrays["pixels"], arrays["ids"].tolist(), arrays["sets"].tolist()


def build(work: Path, target: Path) -> None:
    """Run all steps. They need about three minutes on one core."""
    npm = work / "npm"
    fetch(npm)
    classes = pair(npm)
    drawings = render(npm, classes)
    split_by_class(classes)
    write(npm, target, classes, drawings)
    keys = sorted(drawings)
    np.savez_compressed(work / "drawings.npz", pixels=np.stack([drawings[k] for k in keys]), ids=[k[0] for k in keys], sets=[k[1] for k in keys])
