"""The table of results."""

from aether.evaluate.tasks.table import table


def test_a_line_a_metric_with_its_standard_error():
    first = dict(task="choice", path="x", examples=1234, accuracy=0.25, accuracy_stderr=0.0125)
    first |= dict(accuracy_norm=0.5, accuracy_norm_stderr=0.0142)
    second = dict(task="documents", path="y", documents=1, tokens=99, word_perplexity=12345.678)
    second |= dict(word_perplexity_stderr=None, bits_per_byte=float("inf"), bits_per_byte_stderr=None)
    lines = table({"choice-x": first, "documents-y": second}).splitlines()
    assert [line.split() for line in lines[1:]] == [
        ["choice-x", "accuracy", "0.2500", "±", "0.0125", "1,234", "examples"],
        ["accuracy", "norm", "0.5000", "±", "0.0142"],
        ["documents-y", "word", "perplexity", "12,345.7", "–", "1", "document"],
        ["bits", "per", "byte", "inf", "–"],
    ]
    at = lines[1].index("0.2500") + len("0.2500")
    assert all(line[at - 1].isalnum() and line[at : at + 2] == "  " for line in lines)
