import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np

TOOL = Path(__file__).parents[2] / "tools/prepare_text.py"


def call(*arguments, tool=TOOL, **env):
    command = [sys.executable, str(tool), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **env})


def test_a_folder_is_prepared_and_described(tmp_path):
    (tmp_path / "in").mkdir()
    for i in range(6):
        (tmp_path / f"in/{i}.txt").write_text(f"text {i} " * 10)
    (tmp_path / "in/bad.bin").write_bytes(b"\xff\xfe")
    done = call(f"--path={tmp_path}/in", f"--out={tmp_path}/out", "--workers=2", "--validation_fraction=0.3")
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert (said["tokens"], said["documents"], said["bytes"], said["skipped"]) == (426, 6, 420, 1)
    assert sum(said["splits"].values()) == 426 and said["splits"]["validation"] > 0
    assert "skipped bad.bin" in done.stderr
    assert len(np.load(tmp_path / "out/tokens-00000.npy")) == 426
    again = call(f"--path={tmp_path}/in", f"--out={tmp_path}/out", "--validation_fraction=0.3")
    assert again.returncode == 0 and json.loads(again.stdout) == said


def test_wrong_input_is_one_sentence_and_exit_2(tmp_path):
    for arguments, say in (
        ([f"--path={tmp_path}/none.txt", f"--out={tmp_path}/out"], "none.txt does not exist"),
        ([f"--out={tmp_path}/out"], "--path is missing"),
        ([f"--path={TOOL}", f"--out={tmp_path}/out", "--tokenizer=words"], "'words'; it takes bytes"),
        ([f"--path={TOOL}", f"--out={TOOL}"], "is a file"),
    ):
        done = call(*arguments)
        assert done.returncode == 2 and say in done.stderr and done.stdout == "", done
        assert "Traceback" not in done.stderr and len(done.stderr.strip().splitlines()) == 1


def test_help(tmp_path):
    done = call("--help")
    assert done.returncode == 0 and "--validation_fraction" in done.stdout
