"""Two processes with two devices each: both get all scores, and one of them leaves the results."""

import json
import shutil

import numpy as np
import pytest

from aether.evaluate.likelihood import Scorer
from aether.evaluate.requests import Request
from aether.evaluate.tasks.run import evaluate_tasks

SCRIPT = """
    import json
    import numpy as np
    from aether.evaluate.likelihood import Scorer
    from aether.evaluate.load import load_run
    from aether.evaluate.requests import Request
    from aether.evaluate.tasks.run import evaluate_tasks

    run, rng = load_run(HOME), np.random.default_rng(3)
    assert run.mesh.shape["data"] == 4 and jax.process_count() == 2
    requests = [Request(rng.integers(0, 257, n).astype("int32"), n // 2) for n in (33, 30, 20, 9, 8, 2, 3, 2, 5)]
    print(json.dumps([Scorer(run)(requests), evaluate_tasks(HOME, ["pairs:" + FILE])["tasks"]]))
"""


@pytest.mark.slow
def test_both_processes_get_all_scores(bytes_run, loaded, tmp_path, run_processes):
    folder, file = shutil.copytree(bytes_run, tmp_path / "run"), tmp_path / "p.jsonl"
    file.write_text(json.dumps(dict(sentence_good="It is.", sentence_bad="It are.")) + "\n")
    script = SCRIPT.replace("HOME", repr(str(folder))).replace("FILE", repr(str(file)))
    outs = [json.loads(out.splitlines()[-1]) for out in run_processes(script, 2, 2, timeout=300)]
    assert outs[0] == outs[1]
    assert [len(list((folder / name).iterdir())) for name in ("evaluation", "tensorboard")] == [1, 1]
    rng = np.random.default_rng(3)
    requests = [Request(rng.integers(0, 257, n).astype("int32"), n // 2) for n in (33, 30, 20, 9, 8, 2, 3, 2, 5)]
    for (log_p, greedy), one in zip(outs[0][0], Scorer(loaded)(requests), strict=True):
        assert log_p == pytest.approx(one.log_p, rel=1e-5) and greedy == one.greedy
    assert outs[0][1] == evaluate_tasks(bytes_run, [f"pairs:{file}"])["tasks"]
