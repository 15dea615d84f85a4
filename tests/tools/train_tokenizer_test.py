import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from aether.data.tokenizers import load_tokenizer

TOOL = Path(__file__).parents[2] / "tools/train_tokenizer.py"
CODE = "def main(x):\n    for i in range(x):\n        print(i, 'naïve')\n\n" * 50


def call(*arguments):
    command = [sys.executable, str(TOOL), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ)


@pytest.mark.parametrize("kind", ["bpe", "unigram", "char"])
def test_a_model_gives_back_every_byte(tmp_path, kind):
    (tmp_path / "code.py").write_text(CODE)
    size = 300 if kind == "bpe" else 285
    done = call(
        f"--path={tmp_path}/code.py", f"--out={tmp_path}/m/code.model", f"--vocab_size={size}", f"--type={kind}"
    )
    assert done.returncode == 0, done.stderr
    tokenizer = load_tokenizer(str(tmp_path / "m/code.model"))
    assert json.loads(done.stdout)["vocab_size"] == tokenizer.vocab_size <= size
    for text in (CODE, " \n\t  leading", "日本 \u2581", "<|endoftext|>", ""):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text.encode()
        assert tokenizer.token_bytes[ids].sum() == len(text.encode())
        assert tokenizer.eot not in ids.tolist()
    assert tokenizer.pieces[tokenizer.eot] == b""
    if kind != "char":
        assert len(tokenizer.encode(CODE)) < (0.6 if kind == "bpe" else 0.8) * len(CODE)


def test_wrong_input_is_one_sentence_and_exit_2(tmp_path):
    (tmp_path / "a.txt").write_text("few words")
    for arguments, say in (
        (
            [f"--path={tmp_path}/a.txt", f"--out={tmp_path}/a.model", "--vocab_size=9999"],
            "--vocab_size=9999 does not fit",
        ),
        ([f"--path={tmp_path}/a.txt", f"--out={tmp_path}/a.bin"], "ending .model"),
        ([f"--path={tmp_path}/b.txt", f"--out={tmp_path}/a.model"], "b.txt does not exist"),
        ([f"--path={tmp_path}/a.txt", f"--out={tmp_path}/a.model", "--type=words"], "type"),
    ):
        done = call(*arguments)
        assert done.returncode == 2 and say in done.stderr and done.stdout == "", done
        assert "Traceback" not in done.stderr and len(done.stderr.strip().splitlines()) == 1


def test_help():
    done = call("--help")
    assert done.returncode == 0 and "--vocab_size" in done.stdout
