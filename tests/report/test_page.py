"""The page of a search: what it says, that it stands alone, and how it looks in a browser."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from halfbyte import cli
from halfbyte.core.stages import Stage
from halfbyte.plan import LayerPlan, Plan, load_plan, save_plan
from halfbyte.report.page import PAGE, Exported, Kept, Made, add_comparison, add_export, write_page
from halfbyte.report.page.plan_map import cell_of
from tests.command_line import fails

KINDS = ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")
SCORES = {"all A8": 0.09, "all A4": 1.2, "rule": 0.2, "KL knapsack": 0.12, "plan": 0.11}
GENERATIONS = [{"evaluations": 9 * (1 + at), "best": 0.12 - at / 500, "mean": 0.2, "std": 0.02} for at in range(5)]
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
VOID = {"meta", "br", "link", "img", "input", "hr"}


def plan_in(folder, blocks=28, name="plan.json", **changes):
    """A plan with its reports."""
    names = [f"model.layers.{block}.{kind}" for block in range(blocks) for kind in KINDS]
    record = {"scores": SCORES, "validation": SCORES, "calib_tokens": 512}
    plan = Plan(
        "somebody/Tiny-1B",
        "abc",
        "gguf",
        "fused",
        {layer: LayerPlan(4, 8 if at % 3 else 4, 32) for at, layer in enumerate(names)},
        0.75,
        0.74,
        text={"name": "pydoc"},
        search=record,
        tensors={"model.embed_tokens": "Q6_K", **{layer: ("Q4_K", "Q5_K")[at % 2] for at, layer in enumerate(names)}},
        file={"scores": {"plan": 0.01}, "validation": {}, "transforms": [], "nbytes": 105_400_000, "sha256": "0" * 64},
        versions={"halfbyte": "0.1.0", "device": "a machine"},
    )
    plan = replace(plan, **changes)
    path = folder / name
    save_plan(path, plan)
    rows = [{"layer": layer, "ratio": 2.0 + at, "a_bits": 8} for at, layer in enumerate(names)]
    units = [{"unit": layer, "a_bits": 8, "loss": at / 100} for at, layer in enumerate(names)]
    history = {"generations": GENERATIONS, "scores": SCORES, "score_label": "KL, nats per token", "noise_floor": 0.001}
    made_by = {"plan": plan.hash}
    for kind, content in (
        ("sensitivity", {"a_bits": [4, 8], "layers": rows, "units": units, "score_label": "KL"}),
        ("history", history),
        ("types", history),
    ):
        (folder / f"{path.stem}.{kind}.json").write_text(json.dumps({"made_by": made_by, **content}))
    return path


def compared(config, sample="halves the list <script>alert(1)</script>", **changes):
    def row(name, nbytes, kl, speed, text):
        measured = {"bytes": nbytes, "generation_tokens_per_second": speed, "sample": text, "load_seconds": 0.2}
        holds = plan.hash if name == "mixed" else None
        return {"name": name, "engine": "llama.cpp", "measured": measured, "quality": {"kld_mean": kl}, "plan": holds}

    plan = load_plan(config, with_codes=False)
    rows = [
        row("Q4_K_M", 105_500_000, 0.0172, 140.0, "cuts the list"),
        row("mixed", 105_400_000, 0.0049, 137.0, sample),
    ]
    rows.append({"name": "original", "missing": "not asked for"})
    about = {"model": plan.model_id, "plan": plan.hash, "text": "pydoc", "machine": "a CPU", "prompt": "What is it?"}
    return {**about, "rows": rows, "seed": 0, **changes}


class Reader(HTMLParser):
    """Tags in the order that they nest, headings, identifiers, and what is fetched from elsewhere."""

    def __init__(self, text):
        super().__init__()
        self.open, self.headings, self.ids, self.fetched, self.scripts = [], [], [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        if tag not in VOID:
            self.open.append(tag)
        if re.fullmatch(r"h\d", tag):
            self.headings.append(int(tag[1]))
        self.ids += [given["id"]] if "id" in given else []
        self.scripts += [given.get("type")] if tag == "script" else []
        self.fetched += [value for key, value in attrs if key in ("src", "href") and value[:1] != "#"]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_says_what_was_found_and_stands_alone(tmp_path):
    config = plan_in(tmp_path)
    text = write_page(tmp_path / "page.html", [config], Kept([compared(config)])).read_text()
    assert (
        "At 105.4 MB, the size of Q4_K_M, KL to the original is 0.00490 against 0.0172; generation 137 tokens/s "
        "against 140 on a CPU." in text
    )
    for said in (
        "Tiny-1B",
        "original: not asked for",
        "What is it?",
        "<mark>halves</mark>",
        "a machine",
        "KL knapsack",
    ):
        assert said in text
    assert re.search(
        r"lose most at A4 alone.*<td>model.layers.27.mlp.down_proj</td><td>A8</td><td>1.11</td>", text, re.S
    )
    assert "<script>alert" not in text
    assert text.count("<svg") == 3
    assert "Not shown" not in text
    read = Reader(text)
    assert read.scripts == ["application/json"]
    assert [one for one in read.fetched if not one.startswith("data:image/png")] == []
    assert not re.search(r"url\((?!#)|@import", text)
    assert max(Counter(read.ids).values()) == 1
    assert read.headings[0] == 1
    assert all(after <= before + 1 for before, after in zip(read.headings, read.headings[1:], strict=False))


def test_without_a_comparison_the_scores_speak(tmp_path):
    config = plan_in(tmp_path, blocks=2, tensors={}, file={})
    text = write_page(tmp_path / "page.html", [config]).read_text()
    assert "KL to the original on the validation text 0.110, all A8 0.0900, all A4 1.20." in text


def test_what_is_not_beside_the_plan_is_named(tmp_path):
    config = plan_in(tmp_path, blocks=2)
    (tmp_path / "plan.sensitivity.json").unlink()
    (tmp_path / "plan.history.json").write_text("{}")
    text = write_page(tmp_path / "page.html", [config]).read_text()
    assert "plan.sensitivity.json (not beside the plan)" in text
    assert "plan.history.json (cannot be drawn: KeyError: &#39;made_by&#39;)" in text
    assert text.count("<svg") == 1
    save_plan(config, replace(load_plan(config, with_codes=False), fingerprint="another"))
    text = write_page(tmp_path / "page.html", [config]).read_text()
    assert "plan.types.json (of another plan)" in text
    assert "<svg" not in text


def test_a_headline_is_of_this_plan_and_has_no_gaps(tmp_path):
    config = plan_in(tmp_path, blocks=2)
    whole, bare = compared(config), compared(config)
    for row in bare["rows"][:2]:
        row["quality"], row["measured"]["generation_tokens_per_second"] = {"kld_mean": None}, None
    other = compared(config)
    other["rows"][1]["plan"] = "0" * 12
    noted = compared(config)
    noted["rows"][1]["note"] = "made yesterday"
    elsewhere = compared(config)
    elsewhere["rows"][1]["engine"] = "vLLM, one H100"
    text = write_page(tmp_path / "page.html", [config], Kept([elsewhere])).read_text()
    assert "is 0.00490 against 0.0172." in text  # speeds of two machines say nothing
    for comparisons, there in (([bare], False), ([other], False), ([noted], True), ([whole, bare], True)):
        text = write_page(tmp_path / "page.html", [config], Kept(comparisons)).read_text()
        assert ("against 0.0172; generation 137 tokens/s" in text) == there
        assert ("105.4 MB for 9 matrices of 3 ggml types: KL to the original on the search text" in text) != there


def test_several_plans_side_by_side(tmp_path, capsys):
    plan_in(tmp_path)
    plan_in(tmp_path, name="other.json", tensors={}, file={})
    page = tmp_path / "both.html"
    configs = f"{tmp_path / 'plan.json'},{tmp_path / 'other.json'}"
    assert cli.run("report", ["--config", configs, "--output", str(page)]) == 0
    assert capsys.readouterr().out == f"wrote {page}\n"
    text = page.read_text()
    assert "other.json: The plan" in text
    fails(capsys, cli.run("report", ["--config", configs]), match="name for the page of several plans")
    assert max(Counter(Reader(text).ids).values()) == 1


def test_refused(tmp_path, capsys):
    config = plan_in(tmp_path, blocks=2)
    other, broken = tmp_path / "other.json", tmp_path / "broken.json"
    other.write_text(json.dumps(compared(config, model="somebody/Large")))
    broken.write_text(json.dumps({"rows": 3, "model": "somebody/Tiny-1B"}))
    for comparison, match in ((other, "of another model"), (broken, "comparison, rows: "), (tmp_path / "x", "x: ")):
        code = cli.run("report", ["--config", str(config), "--comparison", str(comparison)])
        fails(capsys, code, match=match)
    assert cli.run("report", ["--config", str(config)]) == 0
    capsys.readouterr()
    fails(capsys, cli.run("report", ["--config", str(config)]), match="already exists")
    for part in ("plan.json", "plan.safetensors", "plan.types.safetensors"):
        (tmp_path / part).touch()
        code = cli.run("report", ["--config", str(config), "--output", str(tmp_path / part), "--force"])
        fails(capsys, code, match="would be written over")
    save_plan(config, replace(load_plan(config, with_codes=False), search={"scores": [1]}))
    fails(capsys, cli.run("report", ["--config", str(config), "--force"]), match="search, scores: ")
    fails(capsys, cli.run("report", ["--config", str(tmp_path / "no.json")]), match="no such plan")
    fails(capsys, cli.run("report", ["--config", "."]), match="unknown plan format")
    fails(capsys, cli.run("report", ["--config", ","]), match="expected the name of a file")


def test_a_comparison_is_kept_in_the_page(tmp_path):
    config = plan_in(tmp_path, blocks=2)
    assert add_comparison(config, compared(config)) is None  # no page that it could go into
    page = write_page(tmp_path / f"plan.{PAGE}", [config])
    for sample in "abcde":
        assert add_comparison(config, compared(config, sample=f"sample {sample}")) == page
    text = page.read_text()
    assert [sample for sample in "abcde" if f"<mark>{sample}</mark>" in text] == ["c", "d", "e"]
    assert add_comparison(config, compared(config, model="another")) is None
    assert page.read_text() == text
    assert cli.run("report", ["--config", str(config), "--force"]) == 0
    assert page.read_text() == text
    page.write_text("somebody's notes")
    assert add_comparison(config, compared(config)) is None
    assert page.read_text() == "somebody's notes"


def test_what_was_exported_and_what_stages_took_are_kept(tmp_path):
    config = plan_in(tmp_path, blocks=2)
    hash_ = load_plan(config, with_codes=False).hash
    made = Made({"encode candidates": Stage(75.2, 3_000_000_000, 18_400_000_000), "validation": Stage(0.1)})
    page = write_page(tmp_path / f"plan.{PAGE}", [config], Kept(plans={hash_: made}))
    for size in (1_000_000, 2_000_000):
        assert add_export(config, hash_, Exported("my.gguf", size, "checked: all of it")) == page
    text = page.read_text()
    assert "<td>my.gguf</td><td>2.0 MB</td><td>checked: all of it</td>" in text
    assert "1.0 MB" not in text
    assert "<td>encode candidates</td><td>1 min 15 s</td><td>3.00 GB</td><td>18.40 GB</td>" in text
    assert "<td>validation</td>" not in text  # too short to be named
    assert cli.run("report", ["--config", str(config), "--output", str(tmp_path / "copy.html")]) == 0
    assert (tmp_path / "copy.html").read_text() == text


def test_kl_of_each_kind_of_text(tmp_path):
    config = plan_in(tmp_path, blocks=2)
    comparison = compared(config)
    for row, kl in zip(comparison["rows"][:2], (0.02, 0.004), strict=True):
        row["quality"]["kld_of_texts"] = {"pydoc": kl, "code": kl / 2}
    text = write_page(tmp_path / "page.html", [config], Kept([comparison])).read_text()
    assert "<tr><td>mixed</td><td>0.00400</td><td>0.00200</td></tr>" in text


def test_a_page_in_chinese(tmp_path):
    config = plan_in(tmp_path)
    assert cli.run("report", ["--config", str(config), "--lang", "zh"]) == 0
    text = (tmp_path / f"plan.{PAGE}").read_text(encoding="utf-8")
    assert '<html lang="zh">' in text
    assert "怎样得到的" in text
    assert re.search(r"<svg.*4 位激活", text, re.DOTALL)
    assert not re.search(r"<h\d>[A-Za-z ]*</h\d>", text.replace("<h1>Tiny-1B</h1>", ""))


def test_letters_on_the_map_have_contrast():
    def light(colour):
        channels = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    for shade in range(101):
        cell = cell_of("", "A4", shade / 100)
        darker, lighter = sorted((light(cell.colour), light(cell.ink)))
        assert (lighter + 0.05) / (darker + 0.05) >= 4.5  # WCAG 2.1, level AA


@pytest.mark.skipif(CHROMIUM is None, reason="no browser")
@pytest.mark.parametrize("width", [390, 1200])
def test_nothing_is_wider_than_the_window(tmp_path, width):
    """In a real browser; the window itself cannot be as narrow as a phone, the page can."""
    config = plan_in(tmp_path)
    page = write_page(tmp_path / "page.html", [config], Kept([compared(config)]))
    measure = f"<style>html{{width:{width}px}}</style><script>document.title = document.body.scrollWidth</script>"
    page.write_text(page.read_text().replace("</body>", f"{measure}</body>"))
    shown = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom", f"file://{page}"]
    dom = subprocess.run(shown, capture_output=True, text=True, timeout=120, check=True).stdout
    assert int(re.search(r"<title>(\d+)</title>", dom)[1]) <= width
