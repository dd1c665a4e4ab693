import pytest

from lrs_utils import supported


@pytest.mark.parametrize(("installed", "allowed"), [("5.20.0", True), ("5.19.3", False), ("6.0.0rc1", False)])
def test_a_version_outside_the_bounds_is_refused_with_what_to_install(monkeypatch, installed, allowed):
    monkeypatch.setattr(
        supported, "requires", lambda _: ["transformers<6,>=5.20", "numpy>=99", "peft>=99; extra == 'tune'"]
    )
    monkeypatch.setattr(supported, "version", lambda _: installed)
    if allowed:
        supported.refuse_unsupported()
    else:
        with pytest.raises(
            ImportError, match=rf"transformers <6,>=5.20, not on {installed}: pip install 'transformers<6"
        ):
            supported.refuse_unsupported()


def test_a_build_with_a_local_version_is_its_release(monkeypatch):
    monkeypatch.setattr(supported, "requires", lambda _: ["torch<2.14,>=2.9"])
    monkeypatch.setattr(supported, "version", lambda _: "2.13.0+cu128")
    supported.refuse_unsupported()
