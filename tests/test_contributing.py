"""The worked examples of CONTRIBUTING.md run as they stand: one file and one table line each."""

from __future__ import annotations

import re
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import make, run

from diffeff.anatomy import table as families
from diffeff.errors import ConfigError, MethodInapplicable, PlanConflict
from diffeff.methods import FeatureCache
from diffeff.methods import table as methods
from diffeff.pipeline import DiffEffPipeline
from diffeff.plan import Plan

TEXT = (Path(__file__).parent.parent / "CONTRIBUTING.md").read_text("utf-8")
METHOD, FAMILY = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)
LINES = dict(re.findall(r'The line in the table: `"(\w+)": "([\w.:]+)",`', TEXT))


@pytest.fixture
def added(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, types.ModuleType]]:
    """Both files as modules where the text says they go, and both table lines."""
    modules = {}
    for name, code in (("diffeff.methods.pruning.block_skip", METHOD), ("diffeff.anatomy.allegro", FAMILY)):
        module = modules[name] = types.ModuleType(name)
        monkeypatch.setitem(sys.modules, name, module)
        exec(compile(code, name, "exec"), module.__dict__)
    for name, place in LINES.items():
        monkeypatch.setitem(methods.TABLE if name == "block_skip" else families.TABLE, name, place)
    return modules


def test_a_fifth_method(added: dict[str, Any], tmp_path: Path) -> None:
    plan = Plan.from_dict({"diffeff_plan": 1, "methods": [{"use": "block_skip", "blocks": [1, 2]}]})
    assert Plan.load(plan.save(tmp_path / "plan.json")) == plan
    pipe = DiffEffPipeline(make("wan"))
    plain = run("wan", pipe)
    pipe.apply(plan)
    assert not torch.equal(run("wan", pipe), plain)
    assert pipe.report is not None
    share = pipe.report.blocks["cond"]
    assert share.total - share.computed == 2 * 6  # two blocks in each of six steps
    with pytest.raises(PlanConflict, match="block_skip"):
        pipe.apply([*plan.methods, FeatureCache(site="segment")])
    assert pipe.remove() is pipe
    assert torch.equal(run("wan", pipe), plain)
    with pytest.raises(ConfigError, match=r"block_skip\.blocks"):
        methods.config_class("block_skip")(blocks=(-1,))
    with pytest.raises(MethodInapplicable, match="unet"):
        DiffEffPipeline(make("sd"), plan=plan)


def test_an_eleventh_family(added: dict[str, Any]) -> None:
    import diffusers

    transformer = diffusers.AllegroTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        num_layers=3,
        cross_attention_dim=24,
        sample_height=8,
        sample_width=8,
        sample_frames=4,
        caption_channels=8,
    )
    described = families.describe(transformer)
    assert (described.family, described.generic) == ("allegro", False)
    assert [block.name for block in described.blocks] == [f"transformer_blocks.{i}" for i in range(3)]
    assert [site.kind for site in described.blocks[0].attentions] == ["self", "cross"]
    arguments = {"hidden_states": torch.zeros(1, 4, 4, 8, 8)}
    grid = described.grid(described.attentions[0], 4 * 4 * 4, arguments)
    assert grid is not None
    assert (grid.frames, grid.height, grid.width) == (4, 4, 4)
