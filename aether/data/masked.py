"""Masked language modelling: windows of text with some tokens to be filled in (Devlin et al., 2019)."""

from collections.abc import Iterable, Sequence

import numpy as np

from aether.data.pack import Window, Windows

_SHARES = (0.8, 0.9)  # below the first a chosen token is masked, below the second it becomes another, else it stays


class MaskedWindows:
    """The windows of `Windows` as an encoder learns from them.

    Each is a dict of int32 arrays (T,), of the first T of the window's T + 1 tokens: every token of the text is in one
    window at most, and if the windows are padded in exactly one (but for the very last token where T divides what is
    before it).
      tokens: what is read: of the chosen tokens 80 % are `mask_id`, 10 % another id, 10 % as they are.
      targets: the tokens as they are in the text.
      segments, positions: as in `Windows`.
      mask: 1 where the token was chosen, and is to be predicted.

    Chosen are round(rate · n) of the n tokens that are neither end of text nor padding, at random, and one at least:
    with an exact number the loss varies less than with a draw for each token.

    Args:
      windows: what to mask.
      rate: share of the tokens to choose.
      mask_id: of the mask.
      vocab: ids below it may stand in place of others.
    """

    def __init__(self, windows: Windows, rate: float, mask_id: int, vocab: int):
        self.windows, self.rate, self.mask_id, self.vocab = windows, rate, mask_id, vocab

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> Window:
        """Return a window for evaluation, masked in the same way at every call and on every host."""
        return self.draw(index, (0, index))

    def draw(self, index: int, seed: Sequence[int]) -> Window:
        """Return a window for training, masked as the seed has it."""
        window, rng = self.windows[index], np.random.default_rng(seed)
        targets, segments, positions = (window[key][:-1] for key in ("tokens", "segments", "positions"))
        candidates = np.flatnonzero((segments > 0) & (targets != self.windows.eot))
        count = min(max(round(self.rate * len(candidates)), 1), len(candidates))
        chosen = rng.choice(candidates, count, replace=False)
        mask = np.zeros(len(targets), np.int32)
        mask[chosen] = 1
        tokens = targets.copy()
        tokens[chosen] = self._disguised(targets[chosen], rng)
        return dict(tokens=tokens, targets=targets, segments=segments, positions=positions, mask=mask)

    def _disguised(self, ids: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        kind, shift = rng.random(len(ids)), rng.integers(1, self.vocab, len(ids))
        other = (ids + shift) % self.vocab
        return np.where(kind < _SHARES[0], self.mask_id, np.where(kind < _SHARES[1], other, ids))

    def blank(self) -> Window:
        """Return a row that pads a batch: nothing in it is scored."""
        size = self.windows.context
        text = {key: np.full(size, self.windows.eot, np.int32) for key in ("tokens", "targets")}
        return dict(**text, **{key: np.zeros(size, np.int32) for key in ("segments", "positions", "mask")})

    def fetch(self, indices: Iterable[int]) -> None:
        """Fetch what these windows lack of a remote folder."""
        self.windows.fetch(indices)

    def name(self, index: int) -> str:
        """Return where a window lies, for messages."""
        return self.windows.name(index)
