"""The photo packages: Debian's archive and Qt's resource files read by hand, pinned hashes, and no network."""

from __future__ import annotations

import hashlib
import io
import struct
import tarfile
import urllib.error
import urllib.request
import zlib
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lcl_adapter.errors import DataError
from lcl_adapter.files import PARTIAL
from tools.photo import deb, packages, rcc
from tools.photo.packages import PACKAGES, WALLPAPERS, package_file


def ar(members: Mapping[str, bytes]) -> bytes:
    """An ``ar`` archive, as Debian's packages are."""
    data = b"!<arch>\n"
    for name, content in members.items():
        data += f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(content):<10}`\n".encode() + content + b"\n" * (len(content) % 2)
    return data


def tar(files: Mapping[str, bytes], form: str = "xz", link: str = "") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=f"w:{form}") as archive:  # type: ignore[call-overload]
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
        if link:
            member = tarfile.TarInfo(link)
            member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"
            archive.addfile(member)
    return buffer.getvalue()


def package_of(files: Mapping[str, bytes], form: str = "xz", link: str = "") -> bytes:
    return ar({"debian-binary": b"2.0\n", "control.tar.xz": b"odd", f"data.tar{form and '.'}{form}": tar(files, form, link)})


def unpacked(path: Path, data: bytes) -> dict[str, bytes]:
    path.write_bytes(data)
    return dict(deb.files(path, lambda name: True))


FILES = {"./usr/share/a.png": b"picture", "./usr/share/doc/copyright": b"GPL-2" * 100}
NAMES = {name.removeprefix("./"): content for name, content in FILES.items()}


@pytest.mark.parametrize("form", ["xz", "gz", "bz2", ""])
def test_the_files_of_a_debian_package(form: str, tmp_path: Path) -> None:
    assert unpacked(tmp_path / "a.deb", package_of(FILES, form, link="./usr/link")) == NAMES, "a link is left out"


def test_only_wanted_files_are_read(tmp_path: Path) -> None:
    (tmp_path / "a.deb").write_bytes(package_of(FILES))
    assert dict(deb.files(tmp_path / "a.deb", {"usr/share/a.png"}.__contains__)) == {"usr/share/a.png": b"picture"}


@given(st.integers(0, len(package_of(FILES)) - 1))
@settings(max_examples=60, deadline=None)
def test_a_truncated_package_is_refused(tmp_path_factory: pytest.TempPathFactory, size: int) -> None:
    path = tmp_path_factory.getbasetemp() / "truncated.deb"
    with pytest.raises(DataError, match="Fetch"):
        unpacked(path, package_of(FILES)[:size])


@pytest.mark.parametrize("left", [0, 5, 40, len(tar(FILES)) // 2, -40, -4])
def test_an_archive_that_is_truncated_inside_an_intact_package(left: int, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="truncated"):
        unpacked(tmp_path / "a.deb", ar({"data.tar.xz": tar(FILES)[:left]}))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"PK\x03\x04", "not a Debian package"),
        (ar({"debian-binary": b"2.0\n"}), r"no data\.tar"),
        (ar({"data.tar.zst": b"(\xb5/\xfd"}), "compressed with zst"),
        (ar({"data.tar.xz": b"x"}).replace(b"1         `\n", b"-1        `\n"), "header at byte 8 is broken"),
        (ar({"data.tar.xz": b"x"}).replace(b"1         `\n", b"999999999 `\n"), "has 999999999 bytes, the file ends after"),
        (package_of({"../../etc/cron.d/x": b"x"}), r"'\.\./\.\./etc/cron\.d/x' leads out"),
        (package_of({"/etc/cron.d/x": b"x"}), "leads out"),
    ],
)
def test_a_hostile_package_is_refused(data: bytes, message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        unpacked(tmp_path / "a.deb", data)


def test_a_file_that_unpacks_to_too_much_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deb, "LARGEST", 100)
    with pytest.raises(DataError, match="500 bytes, more than 100"):
        unpacked(tmp_path / "a.deb", package_of(FILES))


# Qt's resource files


def resource(files: Mapping[str, bytes], version: int = 3, compressed: bool = False, folder: str = "top") -> bytes:
    """A resource file with all files in one folder."""
    names, content, nodes = b"", b"", b""
    locale, tail = struct.pack(">HH", 0, 0), bytes(8) if version > 1 else b""

    def named(text: str) -> int:
        nonlocal names
        offset = len(names)
        names += struct.pack(">HI", len(text), 0) + text.encode("utf-16-be")
        return offset

    nodes += struct.pack(">IHII", 0, 2, 1, 1) + tail
    parts = folder.split("/")
    for number, part in enumerate(parts, 2):
        nodes += struct.pack(">IHII", named(part), 2, 1 if number <= len(parts) else len(files), number) + tail
    for name, data in files.items():
        nodes += struct.pack(">IH", named(name), int(compressed)) + locale + struct.pack(">I", len(content)) + tail
        stored = struct.pack(">I", len(data)) + zlib.compress(data) if compressed else data
        content += struct.pack(">I", len(stored)) + stored
    head = 24 if version == 3 else 20
    offsets = (head + len(content) + len(names), head, head + len(content))
    return b"qres" + struct.pack(">4I", version, *offsets) + bytes(head - 20) + content + names + nodes


PICTURES = {"a.webp": b"picture", "b.webp": b"another" * 9, "ü.webp": b""}


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("version", [1, 2, 3])
def test_the_files_of_a_resource_file(version: int, compressed: bool) -> None:
    assert dict(rcc.files(resource(PICTURES, version, compressed), "a.rcc")) == {f"top/{name}": data for name, data in PICTURES.items()}


@given(st.integers(0, len(resource(PICTURES)) - 9))  # the last eight bytes are the date of the last file, which is not read
def test_a_truncated_resource_file_is_refused(size: int) -> None:
    with pytest.raises(DataError, match=r"a\.rcc: "):
        dict(rcc.files(resource(PICTURES)[:size], "a.rcc"))


@given(st.binary(max_size=200), st.integers(1, 3))
def test_any_bytes_are_read_or_refused(data: bytes, version: int) -> None:
    for case in (data, b"qres" + struct.pack(">I", version) + data):
        with suppress(DataError):
            dict(rcc.files(case, "a.rcc"))


def changed(old: bytes, new: bytes, **options: Any) -> bytes:
    data = resource({"a.webp": b"picture"}, **options)
    assert data.count(old) == 1
    return data.replace(old, new)


TOP = struct.pack(">IHII", 0, 2, 1, 1)  # the first node: a folder whose one child is node 1


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"PK\x03\x04" + bytes(60), "does not begin with 'qres'"),
        (changed(b"qres\0\0\0\3", b"qres\0\0\0\x09"), "version 9"),
        (resource({"..": b"x"}), r"the name '\.\.' leads out"),
        (resource({"a/b": b"x"}), "leads out"),
        (changed(struct.pack(">I", 7) + b"picture", struct.pack(">I", 2**31) + b"picture"), "beyond its end"),
        (changed(TOP, struct.pack(">IHII", 0, 2, 2**32 - 1, 1)), "contains itself|beyond its end"),
        (changed(TOP, struct.pack(">IHII", 0, 2, 1, 0)), "contains itself"),
        (
            changed(struct.pack(">I", 7) + zlib.compress(b"picture"), struct.pack(">I", 8) + zlib.compress(b"picture"), compressed=True),
            "another length",
        ),
        (changed(zlib.compress(b"picture")[:4], b"oops", compressed=True), "broken"),
    ],
)
def test_a_hostile_resource_file_is_refused(data: bytes, message: str) -> None:
    with pytest.raises(DataError, match=message):
        dict(rcc.files(data, "a.rcc"))


def test_a_resource_that_unpacks_to_too_much_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rcc, "LARGEST", 100)
    with pytest.raises(DataError, match="another length"):
        dict(rcc.files(resource({"a.webp": bytes(1000)}, compressed=True), "a.rcc"))


# Where the packages come from

CONTENT = package_of(FILES)
SMALL = replace(WALLPAPERS, sha256=hashlib.sha256(CONTENT).hexdigest(), size=len(CONTENT))


@pytest.fixture(autouse=True)
def _no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No apt-get, no https, and a cache of its own."""

    def refused(*args: object, **options: object) -> None:
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setenv("LCL_ADAPTER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setattr(urllib.request, "urlopen", refused)


def apt_get(folder: Path, script: str) -> None:
    (folder / "bin").mkdir()
    (folder / "bin/apt-get").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "bin/apt-get").chmod(0o755)


@pytest.mark.parametrize("name", SMALL.names)
def test_a_given_package_is_used_under_either_of_its_names(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(CONTENT)
    assert package_file(SMALL, tmp_path) == tmp_path / name
    assert not packages.downloads().exists()


def test_a_downloaded_package_is_not_downloaded_again(tmp_path: Path) -> None:
    packages.downloads().mkdir(parents=True)
    (packages.downloads() / SMALL.file).write_bytes(CONTENT)
    assert package_file(SMALL, tmp_path) == packages.downloads() / SMALL.file


def test_a_package_with_another_hash_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / SMALL.file).write_bytes(CONTENT + b"\n")
    with pytest.raises(DataError, match=rf"{SMALL.file}: not plasma-workspace-wallpapers 5\.27\.5-2: its SHA-256 is [0-9a-f]{{64}}"):
        package_file(SMALL, tmp_path)


def test_without_a_network_the_message_names_the_files_and_where_they_belong(tmp_path: Path) -> None:
    with pytest.raises(DataError) as raised:
        package_file(SMALL, tmp_path)
    message = str(raised.value)
    assert "there is no apt-get" in message
    assert "Name or service not known" in message
    assert SMALL.url in message
    assert str(packages.downloads()) in message
    assert "--packages" in message
    assert all(package.file in message for package in PACKAGES)
    assert not list(packages.downloads().glob("*"))


def test_apt_get_is_asked_for_the_pinned_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "content").write_bytes(CONTENT)
    apt_get(tmp_path, f'echo "$@" > {tmp_path}/asked; /bin/cp {tmp_path}/content {SMALL.names[1]}')
    assert package_file(SMALL).read_bytes() == CONTENT
    assert (tmp_path / "asked").read_text() == "-q download plasma-workspace-wallpapers=4:5.27.5-2\n"
    assert [file.name for file in packages.downloads().iterdir()] == [SMALL.file]


def test_what_apt_get_answers_is_in_the_message(tmp_path: Path) -> None:
    apt_get(tmp_path, 'echo "E: Version not found" >&2; exit 100')
    with pytest.raises(DataError, match="apt-get: E: Version not found"):
        package_file(SMALL)


class Answer(io.BytesIO):
    """What a server sends."""


def test_the_pool_is_asked_where_there_is_no_apt_get(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(urllib.request, "urlopen", lambda url, timeout: Answer(CONTENT) if url == SMALL.url else None)
    assert package_file(SMALL).read_bytes() == CONTENT


@pytest.mark.parametrize("end", [len(CONTENT) // 2, 0])
def test_a_download_that_ends_early_leaves_no_file(end: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(urllib.request, "urlopen", lambda url, timeout: Answer(CONTENT[:end]))
    with pytest.raises(DataError, match="its SHA-256 is"):
        package_file(SMALL)
    assert not list(packages.downloads().iterdir())


def test_a_connection_that_breaks_leaves_no_file(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(Answer):
        def read(self, size: int | None = -1) -> bytes:
            raise ConnectionResetError(104, "Connection reset by peer")

    monkeypatch.setattr(urllib.request, "urlopen", lambda url, timeout: Broken(CONTENT))
    with pytest.raises(DataError, match="Connection reset by peer"):
        package_file(SMALL)
    assert not list(packages.downloads().iterdir())


def test_a_killed_download_is_never_used(tmp_path: Path) -> None:
    """The partial file of a killed process has another name."""
    packages.downloads().mkdir(parents=True)
    (packages.downloads() / f"{SMALL.file}.1-2-3{PARTIAL}").write_bytes(CONTENT[:9])
    with pytest.raises(DataError, match="cannot be fetched"):
        package_file(SMALL)


def test_the_urls_are_debians() -> None:
    assert {package.url for package in PACKAGES} == {
        "https://deb.debian.org/debian/pool/main/g/gcompris-qt/gcompris-qt-data_3.1-2_all.deb",
        "https://deb.debian.org/debian/pool/main/t/tuxpaint-stamps/tuxpaint-stamps-default_2022.06.04-1_all.deb",
        "https://deb.debian.org/debian/pool/main/p/plasma-workspace-wallpapers/plasma-workspace-wallpapers_5.27.5-2_all.deb",
    }
