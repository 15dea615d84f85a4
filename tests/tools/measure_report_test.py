"""What opens a report says what it lacks; `tests/report/browser_test.py` opens some."""

from launch import cli
from tools import measure_report


def run(*argv):
    values = measure_report.FLAGS
    return cli.run(measure_report.main, values, measure_report.__doc__, list(argv))


def test_a_report_that_is_not_there_is_told(tmp_path, capsys):
    assert run(f"--report={tmp_path / 'report.html'}") == 2
    assert "which is no file; launch.explain writes one" in capsys.readouterr().err


def test_a_system_without_a_browser_is_told(tmp_path, capsys, monkeypatch):
    (tmp_path / "report.html").write_text("<p>")
    monkeypatch.setattr(measure_report.shutil, "which", lambda name: None)
    assert run(f"--report={tmp_path / 'report.html'}") == 2
    assert "This needs selenium" in capsys.readouterr().err
