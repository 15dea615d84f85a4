"""The picture of telemetry: every layer is on it in its own colour, whatever their number and what is missing."""

import io
import json

import numpy as np
import pytest
from PIL import Image

from aether.errors import InputError
from aether.train.metrics import read
from aether.train.panels import ATTENTION, PANELS, UNITS, draw_telemetry


def lines(rng, layers, steps=(10, 20, 30)):
    """Made-up lines, one number of them missing once."""
    found = []
    for step in steps:
        for k in range(layers):
            shared = {n: rng.uniform(0.1, 1) for n in PANELS if n not in ("entropy", "dead_share", "squared_norm")}
            found.append({"step": step, "split": f"blocks.{k}.attention", **shared, "entropy": rng.uniform(1, 2)})
            own = dict(dead_share=0.25, squared_norm=rng.uniform(1, 1e4), scale=None if step == 20 else 1.0)
            found.append({"step": step, "split": f"blocks.{k}.mlp.hidden"} | shared | own)
    return found


def pixels(png):
    image = Image.open(io.BytesIO(png)).convert("RGB")
    assert image.width == 1800 and 900 < image.height < 1700
    return np.asarray(image).reshape(-1, 3).astype(int)


def inked(found, name, share):
    """The number of pixels of a colour of a map, as lines that are 10 % transparent have it."""
    from matplotlib import colormaps

    color = 255 * (0.9 * np.array(colormaps[name](share)[:3]) + 0.1)
    return int(np.sum(np.abs(found - color).max(-1) < 6))


def test_layers_are_coloured_by_kind_and_depth(rng):
    both = pixels(draw_telemetry(lines(rng, 2), "a run"))
    for kind in (ATTENTION, UNITS):
        for share in (0.35, 1.0):
            assert inked(both, kind, share) > 1000, (kind, share)
    units = [line for line in lines(rng, 2) if line["split"].endswith("hidden")]
    alone = pixels(draw_telemetry(units))
    assert inked(alone, UNITS, 1.0) > 1000 and inked(alone, ATTENTION, 1.0) < 50


def test_a_file_is_read_but_for_a_torn_line(rng, tmp_path):
    path, found = tmp_path / "telemetry.jsonl", lines(rng, 1, steps=(7,))
    path.write_text("".join(json.dumps(line) + "\n" for line in found) + '{"step": 8, "spl')
    assert draw_telemetry(read(path)) == draw_telemetry(found)


def test_many_layers_fit_and_none_are_refused(rng):
    found = pixels(draw_telemetry(lines(rng, 48)))
    assert inked(found, UNITS, 1.0) > 200
    with pytest.raises(InputError, match="no telemetry to draw; train with train.telemetry_every above 0"):
        draw_telemetry([])
