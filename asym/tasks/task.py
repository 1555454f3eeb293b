"""What a task is, and the two things all tasks share: how hard a drawing is to see, how free a trace is to vary."""

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from random import Random
from typing import Any, ClassVar, Protocol

import numpy as np
from matplotlib import get_data_path
from PIL import Image, ImageDraw, ImageFont

MAX_JSON = 4_000  # characters; a 9×9 grid takes about 250, and the parser must stay fast on anything
OVERSAMPLING = 3  # drawn larger and reduced, so that thin lines and tilted digits stay smooth

# matplotlib brings these fonts with it: the same glyphs on every machine.
FONTS = ("DejaVuSans", "DejaVuSerif", "DejaVuSansMono", "DejaVuSans-Bold", "DejaVuSerif-Italic", "STIXGeneral")


class Task(Protocol):
    """A puzzle whose picture has a canonical text p*, so that seeing and solving can be scored apart.

    A problem is an immutable, hashable value in labelled canonical form: two problems are the same exactly when they
    are equal. Texts are JSON. `parse_*` and `problem` raise ValueError with a short reason, never anything else.
    """

    name: ClassVar[str]

    def sample(self, rng: Random) -> Any:
        """A problem, drawn from the whole space."""

    def sample_scene(self, rng: Random) -> Any:
        """Something that can be drawn and transcribed but not guessed: what the eye is trained on."""

    def draw(self, problem: Any, drawing: "Drawing", rng: Random) -> Image.Image:
        """The image of a problem."""

    def prompt(self, problem: Any, style: str) -> str:
        """The question that goes with the image; `style` is "brief" or "full"."""

    def transcribe(self, problem: Any) -> str:
        """p*: the canonical text of what the image shows."""

    def describe(self, problem: Any) -> str:
        """The problem in words, another surface form than p*: what half of the language stage reads."""

    def explain(self, problem: Any, rng: Random, verbosity: int, variation: float) -> tuple[str, str]:
        """A chain of thought from the exact solution path, at its end `verbosity` rounds, counted down, that verify
        the solution, and the answer it arrives at. `variation`: see `Variation`.
        """

    def parse_perception(self, text: str, problem: Any) -> Any:
        """What a response says it sees; `problem` gives only what the image's frame fixes (its size)."""

    def parse_answer(self, text: str, problem: Any) -> Any:
        """The answer of a response."""

    def solves(self, answer: Any, problem: Any) -> bool:
        """Whether the answer solves the problem: judged from the problem alone, every valid answer counts."""

    def similarity(self, seen: Any, other: Any) -> float:
        """Graded agreement of two transcriptions in [0, 1], 1 exactly when they are equal."""

    def solve(self, seen: Any) -> Any | None:
        """An exact solution of what was seen, or None when it has none (or none that can be found in bounded time)."""

    def answer(self, problem: Any) -> str:
        """A correct answer, as text."""

    def valid(self, seen: Any) -> bool:
        """Whether what was seen could be a problem of this task at all."""

    def ground_truth(self, problem: Any) -> str:
        """The problem as the published `ground_truth` column has it, as JSON text."""

    def problem(self, ground_truth: Any) -> Any:
        """The inverse of `ground_truth`, from its JSON text or value."""


def read_json(text: str) -> Any:
    """`json.loads` for hostile text: bounded in length, and every way to fail is a ValueError."""
    if len(text) > MAX_JSON:
        raise ValueError(f"more than {MAX_JSON} characters")
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise ValueError("not valid JSON") from None


def is_int(value: Any) -> bool:
    """A whole number in the JSON sense: true and 1.0 are not."""
    return type(value) is int


# Words that mean the same: what a trace says is fixed by the problem, how it says it is not.
OPENERS = ("now", "next", "ok", "look", "well", "and", "here", "fine")
FINE = ("good", "ok", "fine", "right", "true", "yes", "sound", "sure")
SO = ("so", "hence", "then", "thus", "therefore", "giving", "leaving", "making")


class Variation:
    """The free choices of a trace, from one canonical trace (0) to freely varied (1), at equal expected length.

    With probability `variation` a choice is random; otherwise it is the canonical one: the first option, and for an
    optional remark the one that keeps its rate by counting (a rate of 0.25 is then every fourth time).
    """

    def __init__(self, rng: Random, variation: float):
        self.rng, self.variation = rng, variation
        self._owed: dict[str, float] = {}

    def _free(self) -> bool:
        return self.rng.random() < self.variation

    def pick(self, options):
        """One of the options."""
        return self.rng.choice(options) if self._free() else options[0]

    def order(self, items) -> list:
        """The items, in some order."""
        items = list(items)
        return self.rng.sample(items, len(items)) if self._free() else items

    def happens(self, remark: str, rate: float) -> bool:
        """Whether an optional remark is made here; `rate` is its long-run frequency."""
        if self._free():
            return self.rng.random() < rate
        self._owed[remark] = self._owed.get(remark, 0.5) + rate
        if self._owed[remark] < 1:
            return False
        self._owed[remark] -= 1
        return True


@dataclass(frozen=True)
class Drawing:
    """How hard an image is to read. Lengths are fractions of the image's side unless said otherwise.

    Attributes:
        size: side of the square image, pixels.
        fonts: names of the fonts a digit may be set in.
        jitter: largest displacement of a digit, as a fraction of its cell.
        tilt: largest rotation of a digit, degrees.
        contrast: smallest distance between ink and paper, 0..1.
        line_width: (thinnest, thickest) line.
        layout: largest displacement of a node from its place on the circle.
        noise: standard deviation of the pixel noise, 0..1 of the full range.
    """

    size: int = 64
    fonts: tuple[str, ...] = FONTS[:1]
    jitter: float = 0.0
    tilt: float = 0.0
    contrast: float = 1.0
    line_width: tuple[float, float] = (0.016, 0.016)
    layout: float = 0.0
    noise: float = 0.0

    @classmethod
    def at(cls, difficulty: float, size: int) -> "Drawing":
        """All knobs turned together, from a clean drawing (0) to a hard one (1)."""
        return cls(
            size=size,
            fonts=FONTS[: 1 + round(difficulty * (len(FONTS) - 1))],
            jitter=0.30 * difficulty,
            tilt=35.0 * difficulty,
            contrast=1.0 - 0.65 * difficulty,
            line_width=(0.016 * (1 - 0.4 * difficulty), 0.016 * (1 + difficulty)),
            layout=0.22 * difficulty,
            noise=0.16 * difficulty,
        )


@cache
def _font(name: str, pixels: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(str(Path(get_data_path(), "fonts", "ttf", f"{name}.ttf")), pixels)


class Canvas:
    """An image being drawn with one `Drawing`: coordinates are fractions of its side."""

    def __init__(self, drawing: Drawing, rng: Random):
        self.drawing, self.rng = drawing, rng
        self._side = drawing.size * OVERSAMPLING
        # Ink and paper keep at least `contrast` between them, wherever they lie on the grey scale.
        self.paper = 1.0 - rng.uniform(0, 1 - drawing.contrast) * 0.5
        self.ink = self.paper - rng.uniform(drawing.contrast, self.paper)
        self._image = Image.new("L", (self._side, self._side), round(255 * self.paper))
        self._draw = ImageDraw.Draw(self._image)

    def line(self, start: tuple[float, float], end: tuple[float, float], weight: float = 1.0) -> None:
        """A straight line; `weight` scales its width."""
        width = max(1, round(self.rng.uniform(*self.drawing.line_width) * weight * self._side))
        points = [(x * self._side, y * self._side) for x, y in (start, end)]
        self._draw.line(points, fill=round(255 * self.ink), width=width)

    def disc(self, centre: tuple[float, float], radius: float) -> None:
        """A circle filled with paper."""
        (x, y), r = (c * self._side for c in centre), radius * self._side
        width = max(1, round(self.drawing.line_width[0] * self._side))
        self._draw.ellipse((x - r, y - r, x + r, y + r), round(255 * self.paper), round(255 * self.ink), width)

    def digit(self, text: str, centre: tuple[float, float], cell: float, height: float) -> None:
        """A label, displaced and tilted within its cell as the drawing allows. `cell`, `height`: side and font size."""
        uniform, drawing = self.rng.uniform, self.drawing
        font = _font(self.rng.choice(drawing.fonts), round(height * self._side))
        stamp = Image.new("L", (round(cell * self._side),) * 2, 0)
        ImageDraw.Draw(stamp).text((stamp.width / 2,) * 2, text, fill=255, font=font, anchor="mm")
        stamp = stamp.rotate(uniform(-drawing.tilt, drawing.tilt), Image.Resampling.BILINEAR)
        dx, dy = (uniform(-drawing.jitter, drawing.jitter) * cell for _ in range(2))
        corner = [round((c + d - cell / 2) * self._side) for c, d in zip(centre, (dx, dy), strict=True)]
        self._image.paste(round(255 * self.ink), tuple(corner), stamp)

    def finish(self) -> Image.Image:
        """The image at its final size, with its noise, as RGB."""
        small = self._image.resize((self.drawing.size,) * 2, Image.Resampling.BOX)
        if self.drawing.noise:
            noise = np.random.default_rng(self.rng.getrandbits(64)).normal(0, 255 * self.drawing.noise, small.size)
            small = Image.fromarray(np.clip(np.asarray(small) + noise, 0, 255).astype(np.uint8))
        return small.convert("RGB")
