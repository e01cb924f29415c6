"""The figure and the page of a table."""

import dataclasses
import json
import re
from html import unescape

import pytest

from suites import catalog, figures, record, report, table
from tests.suites.arena import cell, finished


@pytest.fixture
def written(tmp_path, capsys):
    """A folder in which the table of two methods stands, one of whose cells went wrong."""
    cells = [cell(method, seed=seed) for method in ("full", "lora") for seed in (0, 1)]
    for each in cells[:-1]:
        record.write(finished(each, target=0.25 + each.seed), each.record_path(tmp_path))
    wrong = record.Record.of(cells[-1], "failed", "no <luck> & less", record.now())
    record.write(wrong, cells[-1].record_path(tmp_path))
    table.present(cells, tmp_path)
    return tmp_path, capsys.readouterr().out


def test_the_page_has_tables_cells_software_and_the_figure(written):
    out, printed = written
    page = (out / "tables" / "small.html").read_text()
    assert f"{out / 'tables' / 'small'}.md, .tex, .csv, -tasks.csv, .html" in printed
    for words in ("<h2>Quality</h2>", "<h2>Cost</h2>", "0.750 ± ", "A CPU, 2 threads", "2.13.0"):
        assert words in page
    assert "failed: no &lt;luck&gt; &amp; less" in page
    assert page.count(">JSON</a>") == 4
    shown = json.loads(unescape(page.split("<h2>Methods</h2><details><pre>")[1].split("</pre>")[0]))
    assert shown["lora"]["options"]["alpha_over_rank"] == 2.0
    assert shown["full"]["tuning"] == {"lr": 1e-3, "weight_decay": 0.0}
    assert ("data:image/png;base64," in page) == (out / "figures" / "small.png").exists()


def test_the_page_links_to_its_records(written):
    out, _ = written
    page = out / "tables" / "small.html"
    links = [unescape(link) for link in re.findall(r'href="([^"]+)"', page.read_text())]
    assert len(links) == 4
    assert all(record.read(page.parent / link).suite_name == "small" for link in links)


def test_the_figure_is_for_screens_and_for_paper(written):
    pytest.importorskip("matplotlib")
    out, printed = written
    assert f"{out / 'figures' / 'small'}.png, .pdf" in printed
    assert (out / "figures" / "small.png").read_bytes().startswith(b"\x89PNG")
    assert (out / "figures" / "small.pdf").read_bytes().startswith(b"%PDF")


def panels(*records):
    return figures._panels(report.frame(records))


def test_the_figure_shows_what_there_is():
    ratio, peak = "step_ratio_to_lora", "train_peak_bytes"
    both = [finished(cell("full")), finished(cell())]
    assert panels(*both) == [("target", "retention"), (ratio, peak)]
    assert panels(both[0])[1] == ("step_seconds", peak)
    footprint = cell(suite=catalog.SUITES["footprint_tiny"])
    assert panels(finished(footprint, scores={})) == [(ratio, peak)]
    target = {"t": finished(cell()).scores["t"]}
    assert panels(finished(cell(), scores=target)) == [(ratio, "target"), (ratio, peak)]
    base = dataclasses.replace(finished(cell("base"), scores={}), phases={})
    assert panels(base) == []


def test_without_matplotlib_there_is_a_page_but_no_figure(tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "find_spec", lambda name: None)
    record.write(finished(cell()), cell().record_path(tmp_path))
    assert table.present([cell()], tmp_path) == 0
    assert "<img" not in (tmp_path / "tables" / "small.html").read_text()
    assert not (tmp_path / "figures").exists()
