"""The images behind a run's answers, as small pictures a page can hold: results name images, data has the pixels."""

from __future__ import annotations

import base64
import io
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np

from llm_unlearn.config import build_config
from llm_unlearn.data.source import DataConfig, open_corpus
from llm_unlearn.errors import UserError
from llm_unlearn.files import read_json
from llm_unlearn.log import get_logger

log = get_logger(__name__)
LARGEST = 96  # pixels a side


def pictures(folder: Path, questions: Collection[str]) -> dict[str, str]:
    """Return image -> data URI of a PNG for the images named, from the data the run in `folder` names itself.

    {} where that data is not to be had any more, or is not what the run saw: a report does without.
    """
    file = folder / "run.json"
    origin: dict[str, Any] = read_json(file).get("origin", {}) if file.exists() else {}
    data = origin.get("config", {}).get("data")
    if not data:
        return {}
    try:
        corpus = open_corpus(build_config(DataConfig, data))
    except UserError as error:
        log.warning("the report shows no images: %s", error)
        return {}
    if corpus.kind != "image" or origin.get("data") != corpus.identity:
        log.warning("the report shows no images: the data is not what %s was made from any more", folder)
        return {}
    rows = {row.question: row for rows in corpus.splits.values() for row in rows}
    pixels = {name: getattr(rows[name], "pixels", None) for name in questions if name in rows}
    return {name: data_uri(image) for name, image in pixels.items() if image is not None}


def data_uri(pixels_CHW: np.ndarray) -> str:
    """Return an image as a PNG of at most `LARGEST` pixels a side in a data URI.

    Args:
        pixels_CHW: 1 or 3 channels; values outside 0..1 (normalised ones) are stretched to it, channels together.
    """
    from PIL import Image

    image = np.asarray(pixels_CHW, dtype=np.float64)
    low, high = image.min(), image.max()
    if low < 0 or high > 1:
        image = (image - low) / (high - low or 1.0)
    whole = np.rint(255 * np.clip(image, 0, 1)).astype(np.uint8)
    picture = Image.fromarray(whole[0] if len(whole) == 1 else np.moveaxis(whole, 0, 2))
    picture.thumbnail((LARGEST, LARGEST))  # never larger than it is: the page scales it up
    out = io.BytesIO()
    picture.save(out, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(out.getvalue()).decode()
