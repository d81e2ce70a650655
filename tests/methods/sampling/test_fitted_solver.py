"""The fitted solver is refused where a run begins later than it was fitted for, before anything is touched."""

from __future__ import annotations

import pytest
import torch
from every import CONFIGS
from tiny import make, run

from diffeff.errors import MethodInapplicable
from diffeff.pipeline import DiffEffPipeline


@pytest.mark.parametrize("family", ["sd-img2img", "wan-v2v", "animatediff-v2v"])
def test_runs_that_begin_late_are_refused_at_apply(family: str) -> None:
    (config,) = [config for config in CONFIGS if config.name == "fitted_solver"]
    pipe = DiffEffPipeline(make(family))
    with pytest.raises(MethodInapplicable, match="begin later"):
        pipe.apply([config])
    assert torch.equal(run(family, pipe, steps=4), run(family, make(family), steps=4))
