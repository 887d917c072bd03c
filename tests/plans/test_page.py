"""Tables as pages of one file."""

import re
import sys
from html.parser import HTMLParser

import pytest
import torch
from torch import nn

import tdecomp
from tdecomp.pictures.figure import as_svg
from tests.models import MODELS
from tests.plans.test_report import NASTY, nasty

VOID = {"meta", "img"}


class Page(HTMLParser):
    """A page that is well formed: what is opened is closed, in order."""

    def __init__(self, file):
        super().__init__()
        self.open, self.found, self.words = [], [], []
        self.text = file.read_text(encoding="utf-8")
        self.feed(self.text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)

    def tags(self, name):
        return [attrs for tag, attrs in self.found if tag == name]


@pytest.fixture(scope="module")
def report():
    case = MODELS["cnn"]
    return tdecomp.decompose(
        case.build(), ("tucker2", "svd"), rank=0.25, example_inputs=case.inputs(), progress=False
    ).report


def test_a_page_shows_all_of_a_report_and_fetches_nothing(report, tmp_path):
    report.to_html(tmp_path / "report.html")
    page = Page(tmp_path / "report.html")
    order = [page.text.index(words) for words in (report.warnings[0], "<li>6 of 7", "<table")]
    assert order == sorted(order)
    assert len(page.tags("tr")) == 1 + 7 + 2
    for row in report:
        assert row.name in page.words
    chains = [words for words in page.words if " and its chain by " in words]
    assert len(page.tags("details")) == 6 == len(page.tags("svg"))
    assert any(words.startswith("features.3: Conv2d(16→24") for words in chains)
    (picture,) = page.tags("img")
    assert picture["src"].startswith("data:image/svg+xml;base64,")
    assert picture["alt"]
    outside = re.sub(r'xmlns="[^"]*"', "", page.text)
    assert not re.search(r'https?://|src="(?!data:)|href=|@import|url\(', outside)


def test_numbers_are_sorted_by_their_value(report, tmp_path):
    report.to_html(tmp_path / "report.html")
    keys = [a["data-key"] for a in Page(tmp_path / "report.html").tags("td") if "data-key" in a]
    assert repr(float(report["features.3"].macs_after)) in keys
    assert repr(report["features.3"].weight_error) in keys


def test_a_plan_has_a_page_too(tmp_path):
    tdecomp.plan(MODELS["cnn"].build(), "svd", rank=2).to_html(tmp_path / "plan.html")
    assert "expected error" in Page(tmp_path / "plan.html").words


def test_the_remarks_of_a_row_are_those_of_the_table(tmp_path):
    torch.manual_seed(0)
    conv = nn.Conv2d(8, 8, 3)
    model = nn.Sequential(conv, conv)
    report = tdecomp.decompose(model, "cp", rank=4, progress=False).report
    report.to_html(tmp_path / "report.html")
    (remarks,) = [words for words in Page(tmp_path / "report.html").words if "also 1" in words]
    assert "; component norms " in remarks
    assert remarks in str(report)


def test_names_are_escaped(tmp_path):
    nasty().to_html(tmp_path / "report.html")
    page = Page(tmp_path / "report.html")
    assert NASTY in page.words
    assert not page.tags("b")


def test_names_are_no_formulas():
    model = nn.Sequential()
    model.add_module("a$x^2$", nn.Linear(16, 16))
    model.add_module("b$\\nothing$" + 40 * "b", nn.Linear(16, 16))
    model.eval()
    x = torch.randn(4, 16)
    plan = tdecomp.plan(model, "svd", rank=4, example_inputs=x, progress=False)
    for figure in (plan.plot(), tdecomp.sensitivity(model, "svd", progress=False).plot()):
        assert "a$x^2$" in as_svg(figure)


def test_a_page_is_no_folder(report, tmp_path):
    with pytest.raises(IsADirectoryError, match="is a folder; expected the name of a file"):
        report.to_html(tmp_path)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        report.to_html(tmp_path / "nowhere/report.html")


def test_without_matplotlib_a_page_says_what_its_picture_needs(report, tmp_path, monkeypatch):
    monkeypatch.delitem(sys.modules, "tdecomp.pictures.figure", raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    report.to_html(tmp_path / "report.html")
    page = Page(tmp_path / "report.html")
    assert not page.tags("img")
    assert any("pip install 'tdecomp-torch[plot]'" in words for words in page.words)
