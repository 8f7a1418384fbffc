"""What the notebooks draw: `charts` of numbers, `diagrams` of ideas, and a `stepper` that moves."""

from .charts import COLOURS, MARKERS, accuracy, fan, heat, losses, new, spectra
from .drawing import Drawing
from .diagrams import (
    adapter,
    attention,
    block,
    bypass,
    gather,
    gptq,
    low_rank,
    memory,
    methods,
    prefix,
    tape,
)
from .stepper import Stepper, compress_steps, picture, rank_steps, stepper, walk
