from benchmarks.support.table import failures, format_tables
from tests.benchmarks.rows import row

ROWS = [
    row(),
    row("cp_x", 0.5, 80.0),
    row("cp_x", 0.5, 82.0, seed=1),
    row("cp_x", 0.1, 60.0),
    row("lowrank", 0.5, 85.0, fitted="data"),
    row("lowrank", 0.1, reason="too small", fitted="data"),
    row("lowrank", 0.1, reason="too small", fitted="data", finetune=5),
    row("cp_x", 0.1, 70.0, finetune=5),
]


def cells(text, start):
    """The cells of the first line of a Markdown table that begins with a method."""
    line = next(line for line in text.splitlines() if line.startswith(f"| {start} "))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_markdown_has_a_line_for_each_method_and_the_best_in_bold():
    text = format_tables(ROWS, "markdown")
    assert "**accuracy (%), as decomposed**" in text
    assert "**accuracy (%), after 5 steps of fine-tuning**" in text
    assert "**output error, as decomposed**" in text
    assert cells(text, "method") == ["method", "0.5", "0.1"]
    assert cells(text, "original") == ["original", "90.00", ""]
    assert cells(text, "cp_x") == ["cp_x", "81.00 ± 1.41", "**60.00**"]
    assert cells(text, "lowrank, data") == ["lowrank, data", "**85.00**", "–"]


def test_costs_are_said_once_for_each_network():
    text = format_tables(ROWS, "markdown")
    macs = text.split("**MACs, of the original's**")[1]
    assert cells(macs, "cp_x") == ["cp_x", "0.490 ± 0.000", "0.098"]
    assert cells(macs, "lowrank, data") == ["lowrank, data", "0.490", "–"]
    assert text.count("**measured time, of the original's**") == 1
    time = text.split("**measured time, of the original's**")[1]
    assert cells(time, "cp_x") == ["cp_x", "**0.50**", "**0.10**"]  # measured once for all seeds


def test_costs_of_what_was_only_recovered_are_said_too():
    rows = [row(), row("cp", 0.5), row("lowrank", 0.5, recover="refit", time=0.4)]
    text = format_tables(rows, "markdown")
    macs = text.split("**MACs, of the original's**")[1]
    assert cells(macs, "lowrank") == ["lowrank", "0.490"]
    assert cells(macs.split("**seconds to decompose and refit**")[1], "lowrank")[1] == "1.50"


def test_equals_are_all_the_best():
    text = format_tables([row("cp", 0.5, 80.0), row("lowrank", 0.5, 80.0)], "markdown")
    assert cells(text, "cp")[1] == cells(text, "lowrank")[1] == "**80.00**"


def test_latex_is_escaped():
    text = format_tables(ROWS, "latex")
    assert r"cp\_x" in text
    assert r"81.00 $\pm$ 1.41" in text
    assert r"\textbf{60.00}" in text
    assert "% accuracy (%), as decomposed" in text
    assert r"lowrank, data & \textbf{85.00} & --" in " ".join(text.split()).replace("  ", " ")


def test_plain_text_marks_the_best_by_a_star():
    assert "*60.00" in format_tables(ROWS, "text")


def test_a_reason_is_told_once_for_each_method():
    assert failures(ROWS) == ["lowrank at 0.1 (seed 0) left out: too small"]
    assert failures(ROWS[3:]) == ["lowrank at 0.1 left out: too small"]
