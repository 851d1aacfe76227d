"""Text sources: disjoint parts, honest fallback, windows."""

from __future__ import annotations

import pytest

from halfbyte.calibration.text import cut, load_text, scored, scored_of_each, split
from halfbyte.core import environment as hub
from halfbyte.core.errors import HalfbyteError
from halfbyte.evaluate.quality import evaluation_text


def test_parts_of_a_text_do_not_overlap():
    lines = [f"line {number:04}\n" for number in range(1000)]
    parts = split("".join(lines))
    found = [set(part.splitlines()) for part in parts.values()]
    assert sum(map(len, found)) == len(set.union(*found))
    assert [len(part) for part in found[:3]] == [500, 100, 100]
    assert 270 < len(found[3]) <= 280


def test_pydoc_parts_are_long_and_disjoint():
    text = load_text("pydoc")
    assert all(len(part) > 40_000 for part in text.parts.values())
    assert text.parts["search"][:2000] not in text.parts["eval"]
    assert text.record()["search"] != text.record()["eval"]


def test_auto_says_what_it_used(monkeypatch, tmp_path):
    monkeypatch.setattr(hub, "reachable", lambda: False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    text = load_text("auto")
    assert text.name == "pydoc,code"
    assert "wikitext2 was not available" in text.note


def test_texts_are_mixed_in_equal_parts(tmp_path):
    chinese = tmp_path / "chinese.txt"
    chinese.write_text("半个字节\n" * 4000, encoding="utf-8")
    mixed = load_text(f"pydoc, code,{chinese}")
    single = {name: load_text(name) for name in ("pydoc", "code", str(chinese))}
    assert mixed.name == f"pydoc,code,{chinese}"
    for part, text in mixed.parts.items():
        shortest = min(len(one.parts[part]) for one in single.values())
        first = [one.parts[part][:2000] for one in single.values()]
        assert text.startswith("\n".join(first))  # whoever scores its first windows scores all of them
        assert abs(len(text) - 3 * shortest) <= 3 * shortest / 2000 + 3
    searched = mixed.record()["search"]
    assert evaluation_text(str(chinese), searched)[1] == {str(chinese): single[str(chinese)].parts["eval"]}
    assert evaluation_text(mixed.name, searched)[1] == {name: one.parts["eval"] for name, one in single.items()}
    assert evaluation_text(str(chinese), None)[1] == {str(chinese): chinese.read_text(encoding="utf-8")}


def test_code_is_valid_and_as_long_as_pydoc():
    parts = load_text("code").parts
    assert all(len(part) > 40_000 for part in parts.values())
    assert "def " in parts["calib"]


@pytest.mark.network
def test_wikitext2_comes_from_the_hub():
    if not hub.reachable():
        pytest.skip("the model hub cannot be reached")
    text = load_text("wikitext2")
    assert "Robert Boulter" in text.parts["eval"][:400]


def test_unknown_and_unreadable_sources_are_refused(tmp_path):
    with pytest.raises(HalfbyteError, match="text cannot be read"):
        load_text("pydoc,")
    with pytest.raises(HalfbyteError, match="no such text"):
        load_text(str(tmp_path / "missing.txt"))
    binary = tmp_path / "binary.txt"
    binary.write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(HalfbyteError, match="not a UTF-8"):
        load_text(str(binary))


def test_windows_in_a_row_and_spread():
    ids = list(range(100))
    assert cut(ids, 10, 3) == [ids[0:10], ids[10:20], ids[20:30]]
    assert cut(ids, 10, 2, spread=True) == [ids[0:10], ids[50:60]]
    assert len(cut(ids, 10, 99)) == 10


def test_text_shorter_than_a_window_is_refused():
    with pytest.raises(HalfbyteError, match="expected 512 tokens, got 40"):
        cut(list(range(40)), 512, 1)


def test_bos_is_in_front_of_the_text_and_of_every_window():
    assert scored(list(range(20)), 10, 2, bos=99, where="t") == [[99, *range(9)], [99, *range(10, 19)]]


def test_windows_of_several_texts_are_shared_out():
    texts = {"long": "a" * 100, "short": "b" * 25, "third": "c" * 100}
    windows, names = scored_of_each(lambda text: [ord(one) for one in text], texts, 10, 8, bos=None, where="texts")
    assert names == ["long"] * 3 + ["short"] * 2 + ["third"] * 2  # the short one has no third window
    assert {chr(window[5]) for window in windows} == {"a", "b", "c"}
    assert scored_of_each(list, texts, 10, 1, bos=None, where="texts")[1] == ["long"]
    with pytest.raises(HalfbyteError, match="short: text is shorter"):
        scored_of_each(list, {"long": "a" * 100, "short": "b"}, 10, 2, bos=None, where="texts")
