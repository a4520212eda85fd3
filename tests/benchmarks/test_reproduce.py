"""The page of reproductions is made from the files of results and from nothing else; a killed run goes on."""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
import figures  # noqa: E402
import reproduce  # noqa: E402

RESULT = {
    "a": figures.across([0.5, 0.7, 0.6]),
    "b": {"deep": figures.across([0.4, 0.6, 0.7])},
    "kept": figures.across([True, True, False]),
    "count": figures.across([33, 33, 33]),
    "rows": {"heads off, t=5": {"miou": 0.25, "miou_interval": [0.2, 0.3]}},
    "gain": {"difference": 0.1, "interval": [0.02, 0.18]},
    "loss": {"rho": -0.5, "interval": [-0.8, -0.1]},
    "maybe": {"rho": 0.5, "interval": [-0.1, 0.8]},
}


def test_mean_and_standard_deviation():
    found = figures.across([0.5, 0.7, 0.9])
    assert found["mean"] == pytest.approx(0.7) and found["spread"] == pytest.approx(statistics.stdev([0.5, 0.7, 0.9]))
    assert found["each"] == [0.5, 0.7, 0.9] and figures.across([2])["spread"] == 0


@pytest.mark.parametrize(
    "place, shown",
    [
        ("a", "0.600 ± 0.100"),
        ("b/deep", "0.567 ± 0.153"),
        ("kept", "2 of 3 seeds"),
        ("count", "33"),
        ("rows/heads off, t=5", "0.250 (0.200 to 0.300)"),
        ("gain", "0.100 (0.020 to 0.180)"),
        ("a > b/deep", "undecided (2 of 3 seeds)"),
        ("a > a", "**does not hold** (0 of 3 seeds)"),
        ("count > a", "holds (3 of 3 seeds)"),
        ("gain > 0", "holds"),
        ("loss > 0", "**does not hold**"),
        ("maybe > 0", "undecided"),
    ],
)
def test_a_place_is_filled(place, shown):
    assert reproduce.page(f"x {{{{atlas: {place}}}}} y", {"atlas": RESULT}) == f"x {shown} y"


def test_without_a_result_nothing_is_said():
    assert (
        reproduce.page("{{atlas: any/thing > 0}} and {{atlas: a}}", {"atlas": None}) == "not measured and not measured"
    )


def test_a_wrong_place_is_an_error():
    with pytest.raises(KeyError, match=r"no 'c' of 'b/c' in the result, but deep"):
        reproduce.page("{{atlas: b/c}}", {"atlas": RESULT})
    with pytest.raises(KeyError, match="other"):
        reproduce.page("{{other: a}}", {"atlas": RESULT})


def test_the_page_is_the_template_filled():
    """Who changes one of the two, or the results: ``python benchmarks/reproduce.py --page``."""
    results = {name: reproduce.measured(name, reproduce.weights(name)) for name in reproduce.RUNS}
    assert reproduce.PAGE.read_text() == reproduce.page(reproduce.TEMPLATE.read_text(), results)


def test_every_place_names_a_benchmark_that_exists():
    template = reproduce.TEMPLATE.read_text()
    assert {place[1] for place in reproduce.PLACE.finditer(template)} == {*reproduce.RUNS}
    assert all((BENCHMARKS / command.split()[0]).is_file() for command in reproduce.RUNS.values())


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """Two benchmarks, the second of which fails as long as there is a file ``broken``; a template; no results."""
    script = "import json, pathlib, sys\n"
    script += "here = pathlib.Path(__file__).parent\n"
    script += "(here / 'log').open('a').write(sys.argv[1])\n"
    script += "if sys.argv[1] == 'b' and (here / 'broken').exists(): raise SystemExit(3)\n"
    script += "pathlib.Path(sys.argv[-1]).write_text(json.dumps({'value': 0.25}))\n"
    (tmp_path / "one.py").write_text(script)
    (tmp_path / "template.md").write_text("{{a: value}} {{b: value}}")
    (tmp_path / "broken").touch()
    for name, value in (("HERE", tmp_path), ("TEMPLATE", tmp_path / "template.md"), ("PAGE", tmp_path / "page.md")):
        monkeypatch.setattr(reproduce, name, value)
    monkeypatch.setattr(reproduce, "RUNS", {"a": "one.py a", "b": "one.py b"})
    for function in (reproduce.measured, reproduce.run):
        monkeypatch.setattr(function, "__defaults__", (tmp_path / "results",))
    monkeypatch.setattr(reproduce, "weights", lambda name: (tmp_path / "weights").read_text())
    monkeypatch.setattr(sys, "argv", ["reproduce.py"])
    (tmp_path / "weights").write_text("first")
    return tmp_path


def test_what_is_there_is_not_run_again(workplace):
    assert reproduce.main() == 1  # b fails, and says so
    assert (workplace / "page.md").read_text() == "0.250 not measured"
    (workplace / "broken").unlink()
    assert reproduce.main() == 0
    assert (workplace / "page.md").read_text() == "0.250 0.250"
    assert (workplace / "log").read_text() == "abb"
    assert json.loads((workplace / "results" / "a.json").read_text())["command"] == "one.py a"


def test_other_weights_or_another_command_are_measured_anew(workplace, monkeypatch):
    (workplace / "broken").unlink()
    assert reproduce.main() == 0
    (workplace / "weights").write_text("second")
    monkeypatch.setattr(sys, "argv", ["reproduce.py", "--page"])
    assert reproduce.main() == 0 and (workplace / "page.md").read_text() == "not measured not measured"
    monkeypatch.setattr(sys, "argv", ["reproduce.py", "a"])
    assert reproduce.main() == 0 and (workplace / "page.md").read_text() == "0.250 not measured"
    monkeypatch.setitem(reproduce.RUNS, "a", "one.py a --more 1")
    assert reproduce.main() == 0 and (workplace / "log").read_text() == "abaa"
