"""Episodes as the model reads them: every picture at its place, every learned token in colour."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, PackageLoader
from PIL import Image, ImageDraw, ImageFont

from lcl_adapter.base.encoder import IGNORED, Encoded
from lcl_adapter.data.sources import Picture
from lcl_adapter.errors import RecipeError
from lcl_adapter.files import whole_file, write_text
from lcl_adapter.report.thumbs import SIDE, data_url, thumbnail
from lcl_adapter.training.collate import Collator

GREEN, GREY, INK = (11, 110, 79), (105, 110, 118), (24, 26, 30)


@dataclass(frozen=True)
class Piece:
    """A picture, or consecutive tokens that are all learned or all not. ``branch`` 0 is the support set."""

    branch: int
    picture: Picture | None = None
    text: str = ""
    learned: bool = False


@dataclass(frozen=True)
class Strip:
    """One conversation to show."""

    source: str
    policy: str
    origin: str
    tokens: int
    learned: int
    pieces: tuple[Piece, ...]


def pieces_of(encoded: Encoded, collator: Collator) -> tuple[Piece, ...]:
    """The pieces of an encoded row.

    Learned tokens are read from its labels, and not from the turns, to show any mistake in them.
    """
    encoder = collator.encoder
    pictures = iter(encoded.pictures)
    pieces: list[Piece] = []
    run: list[int] = []
    state: tuple[int, bool] = (0, False)

    def close() -> None:
        if run:
            pieces.append(Piece(state[0], text=encoder.tokenizer.decode(run), learned=state[1]))
            run.clear()

    position = 0
    while position < len(encoded):
        token, branch = encoded.ids[position], encoded.branch[position]
        if token == encoder.image_token_id:
            close()
            picture = next(pictures)
            pieces.append(Piece(branch, picture=picture))
            position += encoder.tokens_of(picture)
            continue
        now = (branch, encoded.labels[position] != IGNORED)
        if now != state:
            close()
            state = now
        run.append(token)
        position += 1
    close()
    return tuple(pieces)


def policy_of(collator: Collator, source: str) -> str:
    """The policy of a source; for plain questions, their type."""
    options = collator.mixture.options[source]
    return str(getattr(options, "policy", options.type))


def strips(collator: Collator, each: int, sources: Sequence[str] = (), policies: Sequence[str] = ()) -> list[Strip]:
    """The first ``each`` conversations of every source, in the order of the schedule.

    sources, policies: only these, all if empty.
    """
    mixture = collator.mixture
    wanted = [n for n in mixture.options if (not sources or n in sources) and (not policies or policy_of(collator, n) in policies)]
    by_source: dict[str, list[Strip]] = {name: [] for name in wanted}
    for index in range(mixture.total + each * 100 * len(mixture.options)):
        if all(len(s) >= each for s in by_source.values()):
            break
        source = mixture.slot(index).source
        if source in by_source and len(by_source[source]) < each:
            conversation, encoded = collator.usable(index)
            learned = sum(label != IGNORED for label in encoded.labels)
            pieces = pieces_of(encoded, collator)
            by_source[source].append(Strip(source, policy_of(collator, source), conversation.origin, len(encoded), learned, pieces))
    return [strip for group in by_source.values() for strip in group]


def write_preview(
    collator: Collator, each: int, title: str, out: Path, png: bool, sources: Sequence[str] = (), policies: Sequence[str] = ()
) -> list[Path]:
    """Write the page, and with ``png`` a picture of it.

    Returns the paths. Raises RecipeError if no source is left to show.
    """
    if png and out.suffix == ".png":
        raise RecipeError([f"--out {out}: the page is HTML, and its picture goes beside it; give a name that ends in .html"])
    shown = strips(collator, each, sources, policies)
    if not shown:
        there = ", ".join(f"{n} ({policy_of(collator, n)})" for n in collator.mixture.options)
        raise RecipeError([f"no source has {', '.join([*sources, *policies])}; the recipe has {there}"])
    page = Environment(loader=PackageLoader("lcl_adapter.report", "."), autoescape=True).get_template("preview.html")
    kinds = {key: list(dict.fromkeys(getattr(s, key) for s in shown)) for key in ("source", "policy")}
    write_text(out, page.render(title=title, strips=shown, kinds=kinds, url=data_url))
    if not png:
        return [out]
    picture = out.with_suffix(".png")
    with whole_file(picture) as partial:
        draw(shown).save(partial, format="PNG")
    return [out, picture]


def draw(shown: Sequence[Strip], width: int = 1280) -> Image.Image:
    """The strips, one below the other, in one picture."""
    font, small = _font(14), _font(12)
    pages = [_draw_strip(strip, width, font, small) for strip in shown]
    sheet = Image.new("RGB", (width, sum(p.height for p in pages)), "white")
    top = 0
    for page in pages:
        sheet.paste(page, (0, top))
        top += page.height
    return sheet


def _draw_strip(strip: Strip, width: int, font: ImageFont.FreeTypeFont, small: ImageFont.FreeTypeFont) -> Image.Image:
    page = Image.new("RGB", (width, 4000), "white")
    pen = ImageDraw.Draw(page)
    pen.text((16, 10), f"{strip.source}   {strip.origin}   {strip.tokens} tokens, {strip.learned} learned", fill=GREY, font=small)
    x, y, branch = 16, 32, 0
    line = 24
    for piece in strip.pieces:
        if piece.branch != branch:
            branch, x, y = piece.branch, 16, y + line + 8
            pen.text((x, y), f"query {branch}", fill=GREY, font=small)
            x, line = x + 62, 24
        if piece.picture is not None:
            if x + SIDE > width - 16:
                x, y = 16, y + line + 4
            page.paste(thumbnail(piece.picture), (x, y))
            x, line = x + SIDE + 6, SIDE
            continue
        for word in piece.text.replace("\n", "⏎").split(" "):
            size = pen.textlength(word + " ", font=font)
            if x + size > width - 16:
                x, y, line = 16, y + line + 4, 24
            if piece.learned:
                pen.rectangle((x - 2, y - 1, x + size - 2, y + 19), fill=(206, 238, 222))
            pen.text((x, y), word, fill=GREEN if piece.learned else INK, font=font)
            x += int(size)
    return page.crop((0, 0, width, y + line + 20))


def _font(size: int) -> ImageFont.FreeTypeFont:
    """DejaVu, which matplotlib contains, so that the picture is the same on every machine."""
    from matplotlib import get_data_path

    return ImageFont.truetype(str(Path(get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"), size)
