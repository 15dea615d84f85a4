"""Any run as a model of lm-evaluation-harness, which comes with the extra `lm_eval`.

    from aether.evaluate.harness import AetherLM
    lm_eval.simple_evaluate(model=AetherLM("runs/x"), tasks=["lambada_openai"])

`AetherLM` is made as it is first asked for, a subclass of the harness's `LM`, and then known to it as the model
`aether` too. The command line is `launch/harness.py`.
"""

import functools
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tqdm import tqdm

from aether.data.tokenizers import Tokenizer
from aether.errors import InputError
from aether.evaluate.likelihood import Scorer
from aether.evaluate.load import load_run
from aether.evaluate.requests import pair, rolling
from aether.evaluate.tasks.run import language_model
from aether.generate.decode import Decoder
from aether.generate.text import decode_stream, encode_prompt

LONGEST = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
SETTINGS = ("until", *LONGEST, "do_sample", "temperature", "top_k", "top_p")


def __getattr__(name: str) -> Any:
    if name == "AetherLM":
        return _model_class()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@functools.cache
def _model_class() -> type:
    try:
        import lm_eval.models  # noqa: F401  (its own models; registered later, they would be missing)
        from lm_eval.api.model import LM
        from lm_eval.api.registry import register_model
    except ImportError as e:
        raise InputError(
            f"lm-evaluation-harness is not installed or lacks a package ({e}): pip install -e '.[harness]'."
        ) from e
    made = type("AetherLM", (Answers, LM), dict(__doc__=Answers.__doc__, __module__=__name__))
    return register_model("aether")(made)


class Answers:
    """What the harness asks of a model, answered by a run.

    Log-likelihoods are those of `launch.evaluate`'s tasks. Prompts to go on from begin with an end of text, as
    documents do, and are cut off at the left to leave room for what is generated, or to half the context.

    Args:
      workdir: of the run.
      step: of the checkpoint; the last by default.
      average: see `load_run`.
      batch_size: as the next two, what the harness tells every model; batches are as large as those of the training.
      max_batch_size: not used.
      device: not used; a run is on all devices that JAX sees.
    """

    def __init__(
        self,
        workdir: str,
        step: int | None = None,
        average: str = "auto",
        batch_size: Any = None,
        max_batch_size: Any = None,
        device: Any = None,
    ):
        super().__init__()
        self.run = load_run(workdir, step, average=average)
        self.tokens: Tokenizer = language_model(self.run, "The harness")
        self.length = self.run.config.data.context
        self.scorer = Scorer(self.run)
        self.decoder = Decoder(self.run.graph, self.length, self.tokens.eot, self.tokens.vocab_size)

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Return (log p, greedy) of each (context, continuation)."""
        asked = [self._pair(i, *request.args) for i, request in enumerate(requests)]
        return [(s.log_p, s.greedy) for s in self.scorer(asked, "loglikelihood")]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Return log p of each (text,) as a whole document."""
        windows = [
            list(rolling(self.tokens.encode(request.args[0]), self.tokens.eot, self.length)) for request in requests
        ]
        scores = iter(self.scorer([w for part in windows for w in part], "loglikelihood_rolling"))
        return [sum(next(scores).log_p for _ in part) for part in windows]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Return what follows each (context, settings), up to the first of the texts in `until`."""
        hidden = disable_tqdm or not sys.stderr.isatty()
        shown = tqdm(requests, desc="generate_until", file=sys.stderr, disable=hidden)
        return [self._continued(i, *request.args) for i, request in enumerate(shown)]

    def _pair(self, i: int, context: str, continuation: str) -> Any:
        try:
            return pair(self.tokens, context, continuation, self.length)
        except InputError as e:
            raise InputError(f"Request {i} of the harness: {e}") from e

    def _continued(self, i: int, context: str, settings: Mapping[str, Any]) -> str:
        until, most, how = read_settings(settings)
        room = max(self.length - most, self.length // 2, 2) - 1
        ids = encode_prompt(self.tokens, context)[-room:]
        steps = self.decoder.stream(self.run.params, ids, most, seed=i, **how)
        return cut(decode_stream(self.tokens, (int(row[0]) for row in steps)), until)


def read_settings(settings: Mapping[str, Any]) -> tuple[list[str], int, dict[str, Any]]:
    """Return (until, most tokens, settings of `Decoder.stream`) of what a task of the harness asks for.

    The likeliest token is taken unless `do_sample` is true, or is left out and the temperature is above 0.

    Raises:
      InputError: a setting that the decoder does not have.
    """
    unknown = [name for name in settings if name not in SETTINGS]
    if unknown:
        raise InputError(
            f"The task asks to generate with {', '.join(unknown)}, which a run does not have; it has "
            f"{', '.join(SETTINGS)}."
        )
    until = settings.get("until") or []
    most = next((int(settings[name]) for name in LONGEST if settings.get(name) is not None), 256)
    warm = float(settings.get("temperature") or 0.0)
    sampled = settings.get("do_sample")
    temperature = (warm or 1.0) if sampled else warm if sampled is None else 0.0
    how = dict(temperature=temperature, top_k=int(settings.get("top_k") or 0), top_p=float(settings.get("top_p") or 1))
    return [until] if isinstance(until, str) else [word for word in until if word], most, how


def cut(pieces: Iterator[str], until: Sequence[str]) -> str:
    """Return text up to the first occurrence of any of these, reading no more pieces than that takes."""
    text = ""
    for piece in pieces:
        text += piece
        found = [at for at in (text.find(word) for word in until) if at >= 0]
        if found:
            return text[: min(found)]
    return text
