"""The page and its Markdown: numbers are those of the records, pictures are whole, and nothing of a run is taken for markup."""

from __future__ import annotations

import json
import re
import shlex
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from ngpt.report.__main__ import main
from ngpt.report.page import Section, Table, write_report
from ngpt.report.runs import RunHistory, find_runs

VOID = {"meta", "wbr"}
HOSTILE = """<script>alert("1")</script>|`*x*` _y_ [z](http://evil.example) '"><img src=x onerror=alert(1)>&amp;\n# A"""


class Page(HTMLParser):
    """Elements, their attributes and texts; complains about elements that are not closed in their order."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.tables: list[list[list[str]]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in {"td", "th"}:
            self.tables[-1][-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data
        if {"td", "th"} & set(self._open):
            self.tables[-1][-1][-1] += data

    def table(self, *header: str) -> list[list[str]]:
        """The rows of the table whose header begins so."""
        return next(table[1:] for table in self.tables if table[0][: len(header)] == list(header))

    def has_table(self, *header: str) -> bool:
        return any(table[0][: len(header)] == list(header) for table in self.tables)


def report(folder: Path, *paths: Path, sections: list[Section] | None = None) -> tuple[Page, str, str]:
    """The page as parsed, as text, and the Markdown."""
    page = write_report(find_runs(paths), folder / "report", title="T", sections=sections or [])
    text = page.read_text(encoding="utf-8")
    return Page(text), text, (folder / "report" / "report.md").read_text(encoding="utf-8")


def pictures(text: str) -> list[ElementTree.Element]:
    return [ElementTree.fromstring(one) for one in re.findall(r"<svg.*?</svg>", text, re.DOTALL)]


def test_the_results_are_the_last_values_of_the_records(write_run, make_records, tmp_path: Path) -> None:
    items = make_records(200)
    items[5]["val/loss"], items[5]["memory/peak_allocated_gib"] = 2.5, 6.75  # the best evaluation and the peak were not the last ones
    page, _, markdown = report(tmp_path, write_run("a", items))
    header = next(table[0] for table in page.tables if "perplexity" in table[0])
    row = dict(zip(header, page.table("run", "held-out loss")[0], strict=True))
    assert row == {
        "run": "a",
        "held-out loss": "3.525",
        "best": "2.500",
        "perplexity": "0.5000",
        "bits a byte": "1.008",
        "train loss": "3.025",
        "tokens": "409,600",
        "time": "0:06:40",
        "tokens/s": "1,100",
        "peak memory, GiB": "6.750",
        "optimizer state, GiB": "0.7500",
        "steps": "200",
    }
    assert f"| a | {' | '.join(list(row.values())[1:])} |" in markdown


def test_the_numbers_of_every_chart_are_the_records(write_run, make_records, tmp_path: Path) -> None:
    items = make_records(200)
    _, text, markdown = report(tmp_path, write_run("a", items), write_run("b", make_records(200, loss=2.0)))
    for metric, title in (
        ("val/loss", "Held-out loss, nats a token"),
        ("optim/lr", "Learning rate"),
        ("train/loss", "Train loss, nats a token"),
    ):
        of_run = {f"{item['tokens']:,}": item[metric] for item in items if metric in item}
        body = text.split(f"<figcaption>{title}</figcaption>")[1].split("</figure>")[0]
        rows = Page(body.strip()).tables[0]
        assert rows[0] == ["tokens", "a", "b"]
        assert 4 <= len(rows) <= 14
        for tokens, value, _ in rows[1:]:
            assert float(value) == pytest.approx(of_run[tokens], rel=1e-4)
            assert f"| {tokens} | {value} |" in markdown
        assert rows[-1][0] == "409,600"


def test_a_place_where_a_run_has_no_record_gets_a_dash_and_nothing_is_interpolated(write_run, make_records, tmp_path: Path) -> None:
    _, text, _ = report(tmp_path, write_run("a", make_records(60)), write_run("b", make_records(60, every=7)))
    body = text.split("<figcaption>Learning rate</figcaption>")[1].split("</figure>")[0]
    rows = {row[0]: row[1:] for row in Page(body.strip()).tables[0][1:]}
    assert rows["2,048"] == ["0.0098361", "0.0098361"]
    assert rows["122,880"] == ["0.00016393", "-"]


def test_the_lowest_loss_is_marked_where_several_runs_have_one(write_run, make_records, tmp_path: Path) -> None:
    runs = [write_run(name, make_records(100, loss=loss)) for name, loss in (("a", 3.0), ("b", 2.0), ("c", 4.0))]
    _, text, markdown = report(tmp_path, *runs)
    assert re.findall(r'<td class="best">([^<]+)</td>', text) == ["2.550", "2.550"]
    assert "| b | **2.550** | **2.550** |" in markdown
    assert 'class="best"' not in report(tmp_path, runs[0])[1]


def test_every_picture_is_well_formed_named_and_without_numbers_that_are_none(write_run, make_records, tmp_path: Path) -> None:
    items = make_records(200)
    items[3]["train/loss"] = None
    _, text, _ = report(tmp_path, write_run("a", items), write_run("b", make_records(60)))
    found = pictures(text)
    named = [picture for picture in found if picture.attrib.get("role") == "img"]
    assert len(named) >= 10
    assert all(len(picture.attrib["aria-label"]) > 20 for picture in named)
    assert all(picture.attrib.get("aria-hidden") == "true" for picture in found if picture not in named)
    assert "nan" not in "".join(ElementTree.tostring(picture, encoding="unicode").lower() for picture in found).replace("nanogpt", "")


def test_the_page_asks_the_network_for_nothing(write_run, make_records, tmp_path: Path) -> None:
    page, text, _ = report(tmp_path, write_run("a", make_records(60), name=HOSTILE))
    tags = {tag for tag, _ in page.elements}
    assert not tags & {"script", "link", "img", "iframe", "object", "embed", "base", "form", "image", "use", "foreignobject"}
    for tag, attributes in page.elements:
        assert not any(name.startswith("on") or name in {"src", "srcset", "xlink:href", "action", "style"} for name in attributes), tag
        assert attributes.get("href", "#").startswith("#")
    style = re.search(r"<style>(.*?)</style>", text, re.DOTALL)[1]
    assert not re.search(r"url\(|@import|http|//", style)


def test_names_and_values_of_runs_are_text_and_nothing_else(write_run, make_records, tmp_path: Path) -> None:
    items = make_records(100)
    items.append({"step": 100, "tokens": 204_800, "layers/model.layers.0.<b>x</b>.weight/captured_energy": 0.5, "subspace/rank": 0.5})
    evil = write_run("evil", items, name=HOSTILE, data={"path": HOSTILE, HOSTILE: 1}, optimizer={"name": "x"})
    (evil / "loss_spikes.jsonl").write_text(json.dumps({"step": 50, "what": HOSTILE, "loss": "<i>"}) + "\n")
    plain = write_run("plain", make_records(100), optimizer={"name": "y"})
    harmless = {tag for tag, _ in report(tmp_path, plain, plain.parent / "plain")[0].elements}
    page, _, markdown = report(
        tmp_path, evil, plain, sections=[Section(HOSTILE, [HOSTILE, Table([HOSTILE, "n"], [[HOSTILE, "1"]], HOSTILE)])]
    )
    assert {tag for tag, _ in page.elements} <= harmless | {
        "li",
        "ul",
        "section",
        "details",
        "summary",
        "figure",
        "figcaption",
        "wbr",
        "rect",
    }
    assert page.text.count(HOSTILE) > 10
    assert page.table("run", "held-out loss")[0][0] == HOSTILE
    unescaped = re.sub(r"\\.", "", markdown)
    assert not re.search(r"[<>`\[\]&]", unescaped)
    for block in re.findall(r"(?:^\|.*\n)+", unescaped, re.MULTILINE):
        assert len({line.count("|") for line in block.splitlines()}) == 1
    assert all(re.match(r"#+ ", line) for line in markdown.splitlines() if line.startswith("#"))
    assert "\n# A" not in markdown


def test_only_settings_that_differ_are_listed(write_run, make_records, tmp_path: Path) -> None:
    common = {"model": {"name": "llama_9m", "rope": 1e4}}
    runs = [
        write_run("a", make_records(60), optimizer={"name": "adamw", "lr": 0.1, "betas": [0.9, 0.99]}, **common),
        write_run("b", make_records(60), optimizer={"name": "galore", "lr": 0.1, "betas": [0.9, 0.999], "rank": 4}, **common),
    ]
    page, _, _ = report(tmp_path, *runs)
    assert sorted(page.table("setting")) == [
        *(["optimizer.betas", "[0.9, 0.99]", "[0.9, 0.999]"], ["optimizer.name", "adamw", "galore"], ["optimizer.rank", "-", "4"])
    ]
    assert (
        "All settings but the names of the runs are the same"
        in report(tmp_path, runs[0], write_run("c", [], optimizer={"name": "adamw", "lr": 0.1, "betas": [0.9, 0.99]}, **common))[0].text
    )
    alone = dict(map(tuple, report(tmp_path, runs[1])[0].table("setting", "value")))
    assert (alone["optimizer.rank"], alone["model.name"], alone["trainer.max_steps"]) == ("4", "llama_9m", "200")


def test_the_environment_is_that_of_the_manifest(write_run, make_records, tmp_path: Path) -> None:
    runs = [write_run("a", make_records(60)), write_run("b", make_records(60))]
    manifest = json.loads((runs[1] / "manifest.json").read_text())
    manifest["starts"].append(manifest["starts"][0] | {"device": "NVIDIA H200", "resumed_from": "step-0000050"})
    (runs[1] / "manifest.json").write_text(json.dumps(manifest))
    page, _, _ = report(tmp_path, *runs)
    assert dict(map(tuple, page.table("environment", "value"))) == {
        "first start": "2026-01-02 03:04:05 UTC",
        "commit": "0123456789ab with changes",
        "devices": "2",
        "platform": "Linux-6",
        "python": "3.11.2",
        "torch": "2.9.9",
    }
    assert page.table("environment", "a", "b") == [
        ["starts", "1", "2"],
        ["device", "cpu, 2 threads", "NVIDIA H200"],
        ["continued from", "-", "step-0000050"],
    ]
    assert page.table("run", "command")[0] == ["a", "python -m ngpt.train experiment=quickstart 'run.name=two words'"]


def test_events_are_counted_listed_and_marked_at_their_tokens(write_run, make_records, tmp_path: Path) -> None:
    items = make_records(200)
    items[-1] |= {"train/loss_spikes": 2, "optim/skipped_steps": 1}
    items[-2] |= {"train/loss_spikes": 2, "optim/skipped_steps": 1}
    folder = write_run("a", items)
    event = {"step": 105, "what": "loss spike, update skipped", "loss": "9.5", "grad_norm": "70.1", "batches": []}
    (folder / "loss_spikes.jsonl").write_text(json.dumps(event) + "\n")
    page, text, _ = report(tmp_path, folder)
    assert page.table("run", "loss spikes") == [["a", "2", "1"]]
    assert page.table("run", "step") == [["a", "105", "loss spike, update skipped", "9.5", "70.1"]]
    loss = next(picture for picture in pictures(text) if picture.attrib.get("aria-label", "").startswith("Loss, "))
    mark = next(path for path in loss.iter("path") if path.attrib["d"].endswith("h8z"))
    assert mark[0].text == "a, step 105: loss spike, update skipped, loss 9.5"
    labels = {text.text: float(text.attrib["x"]) for text in loss.iter("text")}
    across = float(re.match(r"M([\d.]+)", mark.attrib["d"])[1])
    assert across == pytest.approx(labels["0"] + (labels["200k"] - labels["0"]) * 105 * 2048 / 200_000, abs=0.2)
    assert "None: no loss spike" in report(tmp_path, write_run("b", make_records(50)))[0].text


def test_subspace_health_is_drawn_from_the_statistics_of_layers(write_run, make_records, tmp_path: Path) -> None:
    items = make_records(100)
    for step in (50, 100):
        layers = {
            f"layers/model.layers.{layer}.{name}.weight/{figure}": value
            for layer in range(3)
            for name in ("mlp.up_proj", "self_attn.q_proj")  # the order of a backward pass
            for figure, value in (
                ("captured_energy", step / 200 + layer / 10),
                ("overlap", 0.25),
                ("rank", 8 + layer),
                ("update_rms", 1e-3),
            )
        }
        items.append({"step": step, "tokens": step * 2048, "subspace/captured_energy": step / 200, "subspace/overlap": 0.25, **layers})
    items.sort(key=lambda item: item["step"])
    page, text, _ = report(tmp_path, write_run("a", items, optimizer={"update_proj_gap": 200}))
    energy = next(table for table in page.tables if table[0] == ["matrix", "layer 0", "layer 1", "layer 2"])
    assert energy[1:] == [["q_proj", "0.5000", "0.6000", "0.7000"], ["up_proj", "0.5000", "0.6000", "0.7000"]]
    body = text.split("<figcaption>Captured gradient energy, mean of projected matrices, %</figcaption>")[1].split("</figure>")[0]
    assert Page(body.strip()).tables[0][1:] == [["102,400", "25.000"], ["204,800", "50.000"]]
    assert "Rank by matrix and layer, step 100" in page.text
    without, _, _ = report(tmp_path, write_run("b", make_records(50), optimizer={"update_proj_gap": 200}))
    assert "logger.statistics_every=100" in without.text
    unprojected, _, _ = report(tmp_path, write_run("c", make_records(50), optimizer={"name": "adamw"}))
    assert "Subspace health" not in unprojected.text


def test_memory_is_by_kind_and_the_largest_of_each(write_run, make_records, tmp_path: Path) -> None:
    items = make_records(100)
    items[2]["memory/gradients_gib"] = 0.625
    page, _, _ = report(tmp_path, write_run("a", items))
    assert page.table("run", "weights") == [["a", "1.500", "0.6250", "0.2500", "0.5000", "2.875"]]
    assert page.table("run", "peak in use, GiB") == [["a", "6.250", "7.500"]]


def test_a_run_that_goes_on_says_how_far_it_is(write_run, make_records, tmp_path: Path) -> None:
    folder = write_run("a", make_records(150))
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 160, "tok')
    page, _, _ = report(tmp_path, folder)
    assert "a is not done: step 150 of 200 (75 %)." in page.text
    assert page.table("run", "held-out loss")[0][-1] == "150 of 200"
    by_tokens = write_run("b", make_records(150), trainer={"max_tokens": 200 * 2048 - 5, "global_batch_size": 16, "seq_len": 128})
    assert "b is not done: step 150 of 200 (75 %)." in report(tmp_path, by_tokens)[0].text


def test_a_run_without_records_is_reported_as_that(write_run, make_records, tmp_path: Path) -> None:
    empty = write_run("empty", [])
    page, _, _ = report(tmp_path, empty)
    assert "metrics.jsonl has no records yet." in page.text
    page, _, _ = report(tmp_path, empty, write_run("full", make_records(50)))
    assert [row[0] for row in page.table("run", "held-out loss")] == ["empty", "full"]
    assert "metrics.jsonl has no records yet: empty." in page.text


def test_sections_of_others_stand_first(write_run, make_records, tmp_path: Path) -> None:
    section = Section("Verdict", ["B is better.", Table(["run", "loss"], [["A", "3.2"], ["B", "3.1"]], "means of 3 seeds")])
    page, text, markdown = report(tmp_path, write_run("a", make_records(50)), sections=[section])
    assert page.table("run", "loss") == [["A", "3.2"], ["B", "3.1"]]
    assert text.index("B is better.") < text.index("<h2>Results</h2>")
    assert markdown.index("## Verdict") < markdown.index("means of 3 seeds") < markdown.index("## Results")


def test_long_histories_of_many_runs_stay_a_small_file(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    values = rng.normal(3, 0.1, size=(12, 4_000)).tolist()
    names = ("train/loss", "train/perplexity", "optim/lr", "optim/grad_norm", "throughput/tokens_per_sec", "throughput/mfu", "time/step_s")
    runs = [
        RunHistory(f"run {number}", tmp_path, {}, {}, [{"step": s, "tokens": s} | dict.fromkeys(names, v) for s, v in enumerate(own, 1)])
        for number, own in enumerate(values)
    ]
    assert 100_000 < write_report(runs[:8], tmp_path, title="T").stat().st_size < 1_500_000
    assert write_report(runs, tmp_path, title="T").stat().st_size < 1_500_000


# ------------------------------------------------------------------------------------------------------------------ the command
def test_the_command_writes_beside_a_single_run_and_says_where(write_run, make_records, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_run("a", make_records(50))
    (folder / "manifest.json").unlink()
    assert main([str(folder)]) == 0
    written = capsys.readouterr()
    assert written.out.splitlines() == [str(folder / "report" / name) for name in ("report.html", "report.md")]
    assert written.err == "a: manifest.json is missing\n"
    assert (folder / "report" / "report.html").read_text().count("<h1>a</h1>") == 1


def test_the_command_writes_several_runs_to_one_place(
    write_run, make_records, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a", "b"):
        write_run(f"runs/{name}", make_records(50))
    monkeypatch.chdir(tmp_path)
    assert main(["runs"]) == 0
    assert "<h1>a, b</h1>" in Path("report/report.html").read_text()
    assert main(["runs", "--to", "elsewhere", "--title", "Both"]) == 0
    assert "# Both" in Path("elsewhere/report.md").read_text()
    assert main(["runs"]) == 0  # the report itself is no run


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nowhere"], "nowhere: no such folder"),
        (["empty"], "no run in it"),
        (["a", "--to", "a/metrics.jsonl"], "the report cannot be written"),
    ],
)
def test_mistakes_are_one_line_and_exit_2(
    arguments: list[str], said: str, write_run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run("a", [])
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert said in error
    assert len(error.splitlines()) == 1


def test_the_commands_of_the_page_about_reports_work(write_run, make_records, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (Path(__file__).resolve().parents[2] / "docs" / "report.md").read_text(encoding="utf-8")
    commands = re.findall(r"^python -m ngpt.report (.*)$", text, re.MULTILINE)
    assert len(commands) == 3
    for name in ("quickstart", "adamw", "natural_galore"):
        write_run(f"runs/{name}", make_records(50))
    monkeypatch.chdir(tmp_path)
    assert [main(shlex.split(command)) for command in commands] == [0, 0, 0]
    assert all(Path(folder, "report.html").exists() for folder in ("runs/quickstart/report", "compared", "report"))
