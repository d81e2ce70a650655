"""The token site: which tokens are computed, how many, what the rest keeps, and what is really saved."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny import make, run
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from diffeff.anatomy.types import Grid
from diffeff.core.config import Config
from diffeff.core.method import AttentionCall
from diffeff.core.run import Clock
from diffeff.errors import MethodInapplicable
from diffeff.methods import FORA, DuCa, ToCa
from diffeff.methods.caching.token_scores import Place, Scoring, Shown, attended, chosen, entropies, windows
from diffeff.pipeline import DiffEffPipeline
from diffeff.plan import Plan

WHOLE = {"layer_slope": 0.0, "time_slope": 0.0, "cross": 1.0, "feed_forward": 1.0}
DITS = ["wan", "pixart", "flux-cfg", "sd3", "cogvideox"]


# --- scores -------------------------------------------------------------------------------------------------------
def attention(*, mask: Tensor | None = None, tokens: int = 6, keys: int = 5) -> tuple[AttentionCall, Tensor]:
    """A call, and its probabilities [rows, heads, queries, keys]."""
    draw = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 3, tokens, 4, generator=draw), torch.randn(2, 3, keys, 4, generator=draw)
    logits = q @ k.transpose(-1, -2) / 2
    if mask is not None:
        logits = logits.masked_fill(~mask, float("-inf"))
    return AttentionCall(q, k, k, {"attn_mask": mask}), logits.softmax(-1)


@pytest.mark.parametrize("masked", [False, True])
def test_scores_are_those_of_the_whole_attention_map(masked: bool) -> None:
    mask = torch.tensor([True, True, False, True, False]).expand(2, 1, 6, 5) if masked else None
    call, probabilities = attention(mask=mask)
    assert torch.allclose(attended(call), probabilities.sum(2).mean(1), atol=1e-6)
    expected = -(probabilities * probabilities.clamp_min(1e-30).log()).sum(-1).mean(1)
    assert torch.allclose(entropies(call), expected, atol=1e-6)


def test_mass_is_estimated_from_a_sample_of_queries() -> None:
    call, probabilities = attention(tokens=1000)
    share = attended(call) / 256
    assert torch.allclose(share, probabilities.mean((1, 2)), atol=0.05)
    assert torch.allclose(share.sum(1), torch.ones(2), atol=1e-5)


def test_windows_are_cut_per_frame_and_smaller_at_the_border() -> None:
    found = windows(Grid(2, 3, 4), 2, torch.device("cpu")).reshape(2, 3, 4)
    assert found[0].tolist() == [[0, 0, 1, 1], [0, 0, 1, 1], [2, 2, 3, 3]]
    assert torch.equal(found[1], found[0] + 4)


def test_the_score_adds_waiting_and_raises_the_best_of_each_window() -> None:
    grid = Grid(1, 2, 4)
    base = torch.tensor([[3.0, 1.0, 2.0, 0.0, 0.0, 1.0, 0.0, 1.0]])
    stale = torch.tensor([[0, 4, 0, 0, 0, 0, 0, 0]], dtype=torch.int32)
    plain = Scoring(0.5, 0.0)(base, stale, 4, Place(0, grid, 0))
    assert torch.allclose(plain, F.normalize(base, dim=1) + 0.5 * stale / 4)
    spread = Scoring(0.5, 1.0)(base, stale, 4, Place(0, grid, 0))
    raised = (spread != plain).nonzero()[:, 1].tolist()
    assert raised == [0, 2] if plain[0, 0] > plain[0, 1] else [1, 2]
    assert torch.allclose(spread[0, raised], 2 * plain[0, raised])
    behind = Scoring(0.0, 1.0)(torch.cat([base[:, :3], base], 1), torch.zeros(1, 11), 4, Place(0, grid, 3))
    before = F.normalize(torch.cat([base[:, :3], base], 1), dim=1)
    assert (behind != before).nonzero()[:, 1].tolist() == [3, 5]


def test_the_best_are_chosen_in_their_order() -> None:
    assert chosen(torch.tensor([[0.1, 0.9, 0.5, 0.7], [0.4, 0.3, 0.2, 0.1]]), 2).tolist() == [[1, 3], [0, 1]]


@pytest.mark.parametrize("text_first", [True, False])
def test_tokens_are_found_in_the_sequence_of_the_attention(text_first: bool) -> None:
    shown = Shown(grid=Grid(1, 2, 3, text=4, text_first=text_first))
    shown.mass["cond"] = torch.arange(10.0)[None]
    text, image = (range(4), range(4, 10)) if text_first else (range(6, 10), range(6))
    for tokens, expected, context in ((10, range(10), False), (6, image, False), (4, text, True)):
        hidden = torch.zeros(1, tokens, 2)
        found = shown.base("attention", "cond", hidden, shown.place(tokens, context))
        assert found[0].tolist() == [float(i) for i in expected]
    joint = shown.place(10, False)
    assert joint is not None
    assert joint.image == image.start
    assert shown.place(7, False) is None
    assert not shown.base("attention", "cond", torch.zeros(1, 12, 2), None).any()
    assert not shown.base("entropy", "cond", torch.zeros(1, 6, 2), shown.place(6, False)).any()


# --- real models --------------------------------------------------------------------------------------------------
def applied(family: str, config: Config) -> Any:
    pipe = DiffEffPipeline(make(family))
    pipe.apply(Plan([config]))
    return pipe


@pytest.mark.parametrize("family", DITS)
def test_all_tokens_and_computed_attention_are_bit_exact_and_a_share_is_not(family: str) -> None:
    plain = run(family, make(family), steps=4)
    whole = applied(family, ToCa(ratio=1.0, attention="compute", **WHOLE))
    assert torch.equal(run(family, whole, steps=4), plain)
    some = applied(family, ToCa(ratio=0.5, **WHOLE))
    found = run(family, some, steps=4)
    assert not torch.equal(found, plain)
    details = some.report.methods[0].details
    assert details["skipped_steps"] in ([1, 2], [2])  # a batch shows its guidance at the first update only
    assert details["tokens_computed_in_part"] / details["tokens_in_part"] == pytest.approx(0.5, abs=0.1)


def test_no_tokens_at_all_is_the_reuse_of_whole_modules() -> None:
    expected = run("ltx", applied("ltx", FORA(interval=3)), steps=4)
    assert torch.equal(run("ltx", applied("ltx", ToCa(ratio=0.0)), steps=4), expected)


class Linears(TorchFunctionMode):
    """Multiplications of every linear layer in the blocks, call by call, seams or not."""

    def __init__(self, pipe: DiffEffPipeline) -> None:
        super().__init__()
        self.seen: dict[str, list[int]] = defaultdict(list)
        self.names = {
            id(layer.weight): f"{block.name}.{path}"
            for block in pipe.denoisers[0].blocks
            for path, layer in block.module.named_modules()
            if isinstance(layer, nn.Linear)
        }

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if func is F.linear and id(args[1]) in self.names:
            self.seen[self.names[id(args[1])]].append(found.numel() * args[1].shape[1])
        return found


@pytest.mark.parametrize("family", ["wan", "ltx", "sd3", "flux-cfg"])
def test_what_is_left_out_is_not_multiplied(family: str) -> None:
    """At a cached step the linear layers of feed-forward modules are given half of the tokens, self-attention none."""
    pipe = applied(family, ToCa(ratio=0.5, interval=2, **WHOLE))
    with Linears(pipe) as linears:
        run(family, pipe, steps=2, guidance=False)
    counts = linears.seen
    forward = {
        name: calls for name, calls in counts.items() if ".ff" in name or name.endswith(("proj_mlp", "proj_out"))
    }
    assert forward
    for name, (whole, part) in forward.items():
        assert part / whole == pytest.approx(0.5, abs=0.15), name
    joint = {name: calls for name, calls in counts.items() if "attn1.to_" in name or ".attn.to_" in name}
    assert joint
    assert all(len(calls) == 1 for calls in joint.values())
    cross = {name: calls for name, calls in counts.items() if "attn2.to_q" in name and family != "sd3"}
    assert all(part * 2 == whole for whole, part in cross.values())
    assert bool(cross) == (family in ("wan", "ltx"))


def test_tokens_take_turns_and_the_rest_keeps_its_output() -> None:
    """With no score but the time waited, two cached steps at one half compute every token once."""
    outputs: list[Tensor] = []
    pipe = applied("ltx", ToCa(ratio=0.5, interval=3, score="entropy", staleness=4.0, spread=0.0, **WHOLE))
    module = next(m.module for m in pipe.denoisers[0].modules if m.kind == "feed_forward" and m.block == 1)
    module.register_forward_hook(lambda m, args, out: outputs.append(out.clone()))
    run("ltx", pipe, steps=3, guidance=False)
    whole, one, two = outputs
    first, second = ((b != a).any(-1)[0] for a, b in ((whole, one), (one, two)))
    assert int(first.sum()) == whole.shape[1] // 2
    assert torch.equal(second, ~first)
    assert torch.equal(two[0, first], one[0, first])


def test_the_share_falls_over_blocks_and_steps_and_differs_by_module() -> None:
    pipe = DiffEffPipeline(make("wan"))
    sites = pipe.denoisers[0].modules
    blocks = len(pipe.denoisers[0].blocks)
    first, last = (next(s for s in sites if s.kind == "feed_forward" and s.block == b) for b in (0, blocks - 1))
    cross = next(s for s in sites if s.kind == "cross")
    start, end = Clock(0, 10), Clock(9, 10)
    config = ToCa(ratio=0.1)
    assert config.share(first, start, blocks) == pytest.approx(0.1 * 1.6 * 1.9 * 1.6)
    assert config.share(last, start, blocks) == pytest.approx(0.1 * 0.4 * 1.9 * 1.6)
    assert config.share(cross, start, blocks) == pytest.approx(0.1 * 1.6 * 1.9 * 0.6)
    assert config.share(first, end, blocks) < 0.4 * config.share(first, start, blocks)
    assert ToCa(ratio=1.0).share(first, start, blocks) == 1.0


def test_a_batched_call_chooses_the_tokens_of_each_row_as_a_call_of_its_own_does() -> None:
    """Both branches in one call, two rows each, against one row each (to rounding)."""
    both = run("sd3", applied("sd3", ToCa(ratio=0.4)), steps=4, batch=2)
    pipe = applied("sd3", ToCa(ratio=0.4))
    single = run("sd3", pipe, steps=4)
    assert torch.isfinite(both).all()
    assert both.shape[0] == 2 * single.shape[0]
    assert pipe.report.methods[0].engaged


def test_scores_choose_different_tokens_and_are_reproducible() -> None:
    names = ("attention", "entropy", "random", "random")
    one, two, three, four = (
        run("ltx", applied("ltx", ToCa(ratio=0.2, score=n, staleness=0.0)), steps=4) for n in names
    )
    assert torch.equal(three, four)
    assert not torch.equal(one, two)
    assert not torch.equal(two, three)


@pytest.mark.parametrize("family", ["sd"])
def test_unets_are_refused_with_another_way(family: str) -> None:
    with pytest.raises(MethodInapplicable, match=r"UNet.*deepcache"):
        DiffEffPipeline(make(family)).apply(Plan([ToCa()]))


# --- DuCa ---------------------------------------------------------------------------------------------------------
def test_duca_alternates_steps_without_blocks_and_steps_of_some_tokens() -> None:
    pipe = applied("wan", DuCa(interval=5, ratio=0.5, **WHOLE))
    seen: list[int] = []
    step = pipe.denoisers[0].module
    inner = next(m.module for m in pipe.denoisers[0].modules if m.kind == "feed_forward").net[2]
    step.register_forward_pre_hook(lambda *_: seen.append(0))
    inner.register_forward_hook(lambda m, args, out: seen.__setitem__(-1, out.shape[1]))
    run("wan", pipe, steps=10, guidance=False)
    tokens = seen[0]
    assert seen == [tokens, 0, tokens // 2, 0, tokens // 2] * 2
    assert pipe.report.methods[0].engaged


def test_duca_says_which_steps_skip_all_blocks() -> None:
    config = DuCa(interval=4, first=2, last=1)
    assert [i for i in range(10) if config.aggressive(i, 9 - i)] == [2, 4, 6, 8]
    assert not DuCa(interval=1).aggressive(3, 3)
    assert DuCa(interval=1).exact


@pytest.mark.parametrize("family", ["flux-cfg", "sd3"])
def test_duca_runs_on_joint_and_batched_models(family: str) -> None:
    pipe = applied(family, DuCa(ratio=0.5))
    assert torch.isfinite(run(family, pipe, steps=4)).all()
    assert pipe.report.methods[0].engaged
