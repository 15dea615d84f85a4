"""The tables of blockwise against plain attention, at a length that takes no time."""

from launch import cli
from tools import attention


def test_tables(monkeypatch, capsys):
    monkeypatch.setattr(attention, "SCORES", ("yat",))
    monkeypatch.setattr(attention, "LENGTHS", (400,))
    cli.parse(attention.FLAGS, ["--rounds=1", "--heads=2", "--block=32"])
    attention.main(attention.FLAGS)
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in capsys.readouterr().out.splitlines()]
    (*_, memory), (*_, time) = lines[:3], lines[3:]
    assert memory[:2] == time[:2] == ["yat", "400"] and len(lines) == 6
    plain, blocks, ratio = map(float, memory[2:])
    assert plain > 2 * blocks and abs(ratio - plain / blocks) < 0.2
    assert all(float(cell) > 0 for cell in time[2:])
