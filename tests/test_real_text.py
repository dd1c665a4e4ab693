"""Texts out of Debian packages, whole pages, and references in a manual."""

import gzip
import hashlib
import io
import lzma
import re
import tarfile
import zlib

import pytest

from lrs_utils.tasks import country_pages, files, long_text, long_texts, manual, references

PACKAGE = "d/debian-x/debian-x_1_all.deb"
TITLES = [f"Title of part {letter}" for letter in "abcdefgh"]


@pytest.fixture
def packed(tmp_path, monkeypatch):
    """Puts a file into a Debian package in the cache; returns what `debian_file` takes."""
    monkeypatch.setenv("LRS_CACHE", str(tmp_path))

    def put(package, member, content):
        archive = io.BytesIO()
        with tarfile.open(fileobj=archive, mode="w") as tar:
            info = tarfile.TarInfo(f"./{member}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
        parts = {"debian-binary": b"2.0\n", "control.tar.xz": b"odd", "data.tar.xz": lzma.compress(archive.getvalue())}
        data = b"!<arch>\n"
        for name, part in parts.items():
            data += (
                f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(part):<10}`\n".encode() + part + b"\n" * (len(part) % 2)
            )
        path = tmp_path / "packages" / package.rpartition("/")[2]
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(data)
        return package, hashlib.sha256(data).hexdigest(), member

    return put


def test_a_file_comes_out_of_a_debian_package_of_the_right_hash(packed):
    package, sha256, member = packed(PACKAGE, "usr/share/x.txt", b"content")
    assert files.debian_file(package, sha256, member) == b"content"
    with pytest.raises(ValueError, match="has SHA-256"):
        files.debian_file(package, "0" * 64, member)


def test_novels_are_read_from_r_s_data_base(packed, monkeypatch):
    def vector(lines):
        data = b"X\n" + b"\0" * 29
        for line in lines:
            data += b"\0\4\0\t" + len(line.encode()).to_bytes(4) + line.encode()
        return len(data).to_bytes(4) + zlib.compress(data)

    content = vector(["EMMA", "", "Grüße"]) + vector(["PERSUASION"])
    monkeypatch.setattr(long_text, "_NOVELS", packed(PACKAGE, "data/Rdata.rdb", content))
    assert long_texts("austen", 2) == ["EMMA\n\nGrüße", "PERSUASION"]
    with pytest.raises(ValueError, match="n_texts is 3; there are 1 to 2 of Austen's texts"):
        long_texts("austen", 3)


@pytest.fixture
def book(packed, monkeypatch):
    contents = "Contents " + " ".join(f"1.{i + 1}. {title}" for i, title in enumerate(TITLES)) + " "
    body = ["1.1. Console basics"]
    for i, title in enumerate(TITLES):
        body.append(f"1.{i + 1}. {title} " + " ".join(f"w{i}x{n}" for n in range(120)))
    body += [f"and more of it (see Section\xa01.{i + 1}, “{title}”)." for i, title in enumerate(TITLES)]
    text = gzip.compress((contents + "\n    ".join(body)).encode())
    monkeypatch.setattr(manual, "_PACKAGE", packed(PACKAGE, "manual.txt.gz", text))
    manual._manual.cache_clear()
    yield text
    manual._manual.cache_clear()


def test_a_reference_is_asked_for_the_title_that_stands_so_many_words_before(book):
    suite = references(40, 5, seed=1)
    assert suite == references(**suite.recipe)
    for probe in suite.probes:
        [question] = probe.questions
        section, _, before = probe.context.partition("\n\n")
        number = re.fullmatch(r" Section ([\d.]+),", question.prompt)[1]
        assert section.startswith(f"{number}. {question.answer} w")
        assert len(section.split()) == 80
        assert len(before.split()) == 40
        assert question.answer not in before
        assert question.answer_prefix == " “"
    assert len({probe.questions[0].answer for probe in suite.probes}) == 5
    with pytest.raises(ValueError, match="n_contexts is 50; at 40 words there are 1 to"):
        references(40, 50)


def test_whole_pages_are_asked_for_short_values_that_stand_once():
    suite = country_pages(6, seed=2, n_questions=8)
    assert suite == country_pages(**suite.recipe)
    for probe in suite.probes:
        country = probe.context.split("\n")[0]
        assert len(probe.context.split()) <= 2205
        assert len(probe.questions) >= 2
        assert [q.position for q in probe.questions] == sorted(q.position for q in probe.questions)
        for question in probe.questions:
            assert question.prompt.startswith(f"{country}, ")
            field = question.prompt.removeprefix(f"{country}, ")
            assert probe.context.count(question.answer.strip()) == 1
            assert f"{field}{question.answer}" in probe.context
    with pytest.raises(ValueError, match="n_contexts is 300; there are 1 to"):
        country_pages(300)
