"""Every family's description against what its real pipeline does: streams, order, attentions, grids, rows, guidance."""

from __future__ import annotations

from functools import cache
from itertools import pairwise
from typing import Any

import pytest
import torch
from tiny import FAMILIES, TEXT, call_kwargs, make
from torch import Tensor, nn
from watch import Call, Watch, named_arguments, watching

from diffeff.anatomy.table import denoisers
from diffeff.anatomy.types import CFG, DenoiserMap, Segment, Streams, deep_segment
from diffeff.core.run import StepCall

NAMES = tuple(FAMILIES)
STEPS = 2

# Frames, height and width of the image tokens at the finest level, worked out from tiny.py's latent sizes by hand.
VIDEO = (3, 4, 6)
FINEST = {
    **dict.fromkeys(["wan", "wan-2expert", "wan-i2v", "wan-v2v", "wan-vace"], VIDEO),
    **dict.fromkeys(["cogvideox", "ltx", "hunyuanvideo"], VIDEO),
    **dict.fromkeys(["flux", "flux-cfg", "sd3", "pixart"], (1, 4, 6)),
    "dit": (1, 4, 4),
    **dict.fromkeys(["sd", "sd-img2img", "sd-controlnet", "animatediff", "animatediff-v2v", "svd"], (1, 8, 12)),
    **dict.fromkeys(["sdxl", "animatediff-sdxl"], (1, 4, 6)),  # their first level has no attention
}
FRAMES = 4  # of the UNets that see several
# Blocks after which the model itself adds to the image stream.
BETWEEN = {"wan-vace": {"blocks.0", "blocks.2"}, "sd-controlnet": {"mid_block"}}


class Seen:
    """One watched run of one family."""

    def __init__(self, name: str, **options: Any) -> None:
        self.name = name
        self.pipe = make(name)
        self.batch = min(2, FAMILIES[name].max_batch)
        options = {"steps": STEPS, "batch": self.batch, **options}
        self.kwargs = call_kwargs(name, self.pipe, **options)
        self.maps = denoisers(self.pipe)
        self.map = self.maps[0]
        self.watch = _watch(self.pipe, self.map, self.kwargs)

    def blocks(self) -> list[tuple[Any, Call]]:
        """(site, call) of every block call."""
        sites = {block.name: block for block in self.map.blocks}
        return [(sites[block.name], block) for call in self.watch.calls for block in call.blocks]


def _watch(pipe: Any, described: DenoiserMap, kwargs: dict[str, Any]) -> Watch:
    blocks = [(block.name, block.module) for block in described.blocks]
    inner = [(site.name, site.module) for site in described.attentions]
    step, updates = pipe.scheduler.step, []
    pipe.scheduler.step = lambda *a, **k: (updates.append(1), step(*a, **k))[1]
    try:
        with torch.no_grad(), watching(described.module, blocks, inner) as watch:
            pipe(**kwargs)
    finally:
        del pipe.scheduler.step
    watch.updates = len(updates)
    return watch


@cache
def seen(name: str) -> Seen:
    return Seen(name)


@pytest.fixture(params=NAMES)
def run(request: pytest.FixtureRequest) -> Seen:
    return seen(request.param)


# --- streams ------------------------------------------------------------------------------------------------------
def test_blocks_run_once_each_in_the_described_order(run: Seen) -> None:
    expected = [block.name for block in run.map.blocks]
    assert len(expected) >= 4
    assert run.watch.calls
    for call in run.watch.calls:
        assert [block.name for block in call.blocks] == expected
    assert [block.index for block in run.map.blocks] == list(range(len(expected)))
    assert all(run.map.module.get_submodule(block.name) is block.module for block in run.map.blocks)


def test_each_block_reads_what_the_one_before_returned(run: Seen) -> None:
    for call in run.watch.calls:
        for before, after in pairwise(call.blocks):
            if before.name in BETWEEN.get(run.name, ()):
                continue
            out = run.map.blocks[_index(run, before)].io.outputs(before.result)
            into = run.map.blocks[_index(run, after)].io.read(after.args, after.kwargs)
            assert into.image is out.image
            assert into.text is out.text


def _index(run: Seen, call: Call) -> int:
    return next(block.index for block in run.map.blocks if block.name == call.name)


def test_streams_are_the_image_and_the_text(run: Seen) -> None:
    image_tokens = torch.Size(FINEST[run.name]).numel()
    for site, call in run.blocks():
        streams, after = site.io.read(call.args, call.kwargs), site.io.outputs(call.result)
        if not run.map.residual:
            assert streams.text is None
            assert streams.image.ndim == 4
            continue
        assert streams.image.shape == after.image.shape
        assert streams.image.shape[1] == image_tokens
        if streams.text is not None:
            assert streams.text.shape[1] == TEXT
            dropped = run.name == "sd3" and site.index == len(run.map.blocks) - 1
            assert (after.text is None) == dropped
            assert dropped or after.text.shape == streams.text.shape


def test_text_is_a_stream_exactly_where_blocks_return_it(run: Seen) -> None:
    joint = {site.kind for site in run.map.attentions} == {"joint"} or run.name == "sd3"
    for site, call in run.blocks():
        assert isinstance(call.result, tuple) == (joint or site.group == "down")
        assert (site.io.read(call.args, call.kwargs).text is not None) == joint


def test_replace_and_write_are_exact(run: Seen) -> None:
    for site, call in run.blocks():
        streams = site.io.read(call.args, call.kwargs)
        args, kwargs = site.io.replace(call.args, call.kwargs, streams)
        assert _same(args, call.args)
        assert _same(kwargs, call.kwargs)
        other = streams.map(lambda x: x + 1)
        args, kwargs = site.io.replace(call.args, call.kwargs, other)
        again = site.io.read(args, kwargs)
        assert again.image is other.image
        assert again.text is other.text
        assert (len(args), kwargs.keys()) == (len(call.args), call.kwargs.keys())
        assert _same(site.io.write(site.io.outputs(call.result), call.result), call.result)
        written = site.io.outputs(site.io.write(other, call.result))
        assert written.image is other.image
        assert written.text is other.text


def _same(a: Any, b: Any) -> bool:
    """The same objects in the same containers."""
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(a[k] is b[k] for k in a)
    if isinstance(a, tuple):
        return isinstance(b, tuple) and len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))
    return a is b


# --- skipping -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("name", [n for n in NAMES if n not in ("sd-img2img", "animatediff-v2v")])
def test_a_skipped_segment_that_returns_the_true_output_changes_nothing(name: str, depth: int) -> None:
    run = seen(name)
    segment = run.map.segment(depth) if run.map.residual else deep_segment(run.map, depth)
    call = run.watch.calls[-1]
    expected = _tensor(call.result)
    assert torch.equal(_predict_with(run, segment, call), expected)
    wrong = _predict_with(run, segment, call, error=1.0)
    assert not torch.equal(wrong, expected)


def test_skipped_blocks_are_not_computed_and_their_stand_ins_not_consumed() -> None:
    """The stand-ins are zeros, so an output that leaked one into a computed block would differ; odd sizes too."""
    run = Seen("sd", size=(10, 14))
    for depth in (1, 2, 3):
        call = run.watch.calls[0]
        assert torch.equal(_predict_with(run, deep_segment(run.map, depth), call), _tensor(call.result))


def _predict_with(run: Seen, segment: Segment, call: Call, error: float = 0.0) -> Tensor:
    """The denoiser's prediction when the segment's blocks are skipped and its last returns what it had computed."""
    results = {block.name: block.result for block in call.blocks}
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        for site in segment.blocks:
            true = site.io.outputs(results[site.name]).map(lambda x: x + error)
            last = true if site is segment.blocks[-1] else None
            patch.setattr(site.module, "forward", _skipping(site, results[site.name], last), raising=True)
        return _tensor(run.map.module(*call.args, **call.kwargs))


def _skipping(site: Any, result: Any, last: Streams | None) -> Any:
    memo = site.io.memo(result)

    def forward(*args: Any, **kwargs: Any) -> Any:
        stand_in = site.io.skipped(site.io.read(args, kwargs), memo)
        if site.group in ("down", "mid", "up"):
            shapes = [t.shape for t in _tensors(stand_in)]
            assert shapes == [t.shape for t in _tensors(result)]
        return stand_in if last is None else site.io.write(last, stand_in)

    return forward


def _tensors(value: Any) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else [t for part in value for t in _tensors(part)]


def _tensor(result: Any) -> Tensor:
    return result[0]


# --- attentions ---------------------------------------------------------------------------------------------------
def test_attentions_have_the_described_heads_and_lengths(run: Seen) -> None:
    sites = {site.name: site for site in run.map.attentions}
    met = set()
    for block, call in run.blocks():
        for kernel in call.kernels:
            assert kernel.inside in sites, f"an attention of {block.name} that the description does not have"
            site = sites[kernel.inside]
            assert site.block == block.index
            assert run.map.module.get_submodule(site.name) is site.module
            assert (kernel.q.shape[1], kernel.q.shape[3]) == (site.heads, site.head_dim)
            queries, keys = kernel.q.shape[2], kernel.k.shape[2]
            if site.kind == "cross":
                assert keys in (TEXT, 512, 5, 1)  # prompts, Wan's prompts, CLIP tokens, SVD's image
            else:
                assert keys == queries
            if site.kind == "temporal":
                assert queries == FRAMES
            met.add(site.name)
    assert met == set(sites)


def test_grid_tells_every_self_and_joint_sequence(run: Seen) -> None:
    sites = {site.name: site for site in run.map.attentions}
    finest = 0
    for call in run.watch.calls:
        arguments = named_arguments(run.map.module, call)
        for kernel in (kernel for block in call.blocks for kernel in block.kernels):
            site, tokens = sites[kernel.inside], kernel.q.shape[2]
            grid = run.map.grid(site, tokens, arguments)
            if site.kind in ("cross", "temporal"):
                assert grid is None
                continue
            assert grid is not None
            assert grid.image_tokens + grid.text == tokens
            assert grid.text == (TEXT if site.kind == "joint" else 0)
            finest = max(finest, grid.image_tokens)
            if grid.image_tokens == torch.Size(FINEST[run.name]).numel():
                assert (grid.frames, grid.height, grid.width) == FINEST[run.name]
            assert run.map.grid(site, tokens - 1, arguments) is None
    assert finest == torch.Size(FINEST[run.name]).numel()


@pytest.mark.parametrize("name", ["sd", "animatediff", "sdxl"])
def test_grid_of_unets_at_odd_sizes(name: str) -> None:
    run = Seen(name, size=(10, 14), batch=1, steps=1)
    levels = {(10, 14), (5, 7), (3, 4)} if name != "sdxl" else {(5, 7), (3, 4)}
    sites = {site.name: site for site in run.map.attentions}
    found = set()
    for call in run.watch.calls:
        for kernel in (kernel for block in call.blocks for kernel in block.kernels):
            site = sites[kernel.inside]
            grid = run.map.grid(site, kernel.q.shape[2], named_arguments(run.map.module, call))
            assert (grid is not None) == (site.kind == "self")
            if grid is not None:
                found.add((grid.height, grid.width))
    assert found == levels


@pytest.mark.parametrize("name", ["flux", "sd3", "cogvideox", "hunyuanvideo"])
def test_text_tokens_sit_where_the_grid_says(name: str) -> None:
    """Another prompt changes the first block's queries at the text tokens, and nowhere else."""
    run, other = Seen(name, batch=1), Seen(name, batch=1)
    other.kwargs = {**other.kwargs, "generator": torch.Generator().manual_seed(0)}
    for key in ("prompt_embeds", "negative_prompt_embeds"):
        if key in other.kwargs:
            other.kwargs[key] = other.kwargs[key].flip(1) + 1
    other.watch = _watch(other.pipe, other.map, other.kwargs)
    kernels = [one.watch.calls[0].blocks[0].kernels[0] for one in (run, other)]
    changed = (kernels[0].q != kernels[1].q).any(3).all(1).all(0)
    site = next(site for site in run.map.attentions if site.name == kernels[0].inside)
    grid = run.map.grid(site, len(changed), named_arguments(run.map.module, run.watch.calls[0]))
    assert grid is not None
    expected = torch.zeros(len(changed), dtype=torch.bool)
    expected[slice(None, grid.text) if grid.text_first else slice(grid.image_tokens, None)] = True
    assert torch.equal(changed, expected)


def test_flux_has_no_grid_when_reference_tokens_ride_along() -> None:
    run = seen("flux")
    arguments = named_arguments(run.map.module, run.watch.calls[0])
    site, ids = run.map.attentions[0], arguments["img_ids"]
    reference = ids.clone()
    reference[:, 0] = 1
    both = {**arguments, "img_ids": torch.cat([ids, reference])}
    assert run.map.grid(site, 24 + TEXT, arguments) is not None
    assert run.map.grid(site, 48 + TEXT, both) is None


def test_feed_forwards_are_modules_of_their_block(run: Seen) -> None:
    for block in run.map.blocks:
        for path in block.feed_forward:
            assert path.startswith(block.name + ".")
            assert type(run.map.module.get_submodule(path)).__name__ == "FeedForward"
    expected = {id(m) for b in run.map.blocks for m in b.module.modules() if type(m).__name__ == "FeedForward"}
    found = [run.map.module.get_submodule(path) for block in run.map.blocks for path in block.feed_forward]
    assert len(found) == len(expected)
    assert {id(m) for m in found} == expected


# --- rows and guidance --------------------------------------------------------------------------------------------
def test_signature_and_argument_names(run: Seen) -> None:
    call = run.watch.calls[0]
    arguments = named_arguments(run.map.module, call)
    assert list(arguments) == [n for n in arguments if n in run.map.signature]
    assert isinstance(arguments[run.map.sample], Tensor)
    assert arguments[run.map.timestep] is not None
    assert run.map.text is None or isinstance(arguments[run.map.text], Tensor)
    assert set(run.map.rows) <= set(run.map.signature)
    for name, value in arguments.items():
        assert run.map.argument(name, call.args, call.kwargs) is value


def test_each_row_alone_gives_that_row_of_the_batch(run: Seen) -> None:
    """Complete and correct `rows`: a row argument left out, or one too many, fails or changes the prediction."""
    call = run.watch.calls[0]
    step = StepCall(run.map, "cond", call.args, call.kwargs)
    with torch.no_grad():
        if step.rows == 1:  # a pipeline that takes one video only: two different rows by hand
            pair = {key: torch.cat([v, 0.5 * v]) for key, v in step.arguments.items() if _is_row(run.map, key, v)}
            step = StepCall(run.map, "cond", (), {**step.arguments, **pair})
        whole = _tensor(run.map.module(*step.args, **step.kwargs))
        assert step.rows == whole.shape[0] >= 2
        assert not torch.allclose(whole[0], whole[-1], atol=1e-3)
        for row in (0, step.rows - 1):
            alone = step.take(torch.tensor([row]))
            assert alone.rows == 1
            found = _tensor(run.map.module(*alone.args, **alone.kwargs))
            torch.testing.assert_close(found, whole[row : row + 1], atol=2e-5, rtol=2e-4)


def _is_row(described: DenoiserMap, name: str, value: Any) -> bool:
    return name in described.rows and isinstance(value, Tensor) and value.ndim > 0


def test_every_batched_tensor_is_declared_a_row(run: Seen) -> None:
    """Row arguments divide by the batch; of the undeclared, none looks like one."""
    for call in run.watch.calls:
        arguments = named_arguments(run.map.module, call)
        rows = arguments[run.map.sample].shape[0]
        for name, value in arguments.items():
            leads = [t.shape[0] for t in _leaves(value) if t.ndim]
            if name in run.map.rows:
                assert all(lead % rows == 0 for lead in leads), name
            elif rows > 1 and name not in ("image_rotary_emb", "img_ids", "txt_ids"):  # these count tokens
                assert rows not in leads, f"{name} looks like it has batch rows"


def _leaves(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return [t for part in parts for t in _leaves(part)]


def test_guidance_calls_and_rows(run: Seen) -> None:
    count = len(run.watch.calls)
    rows = {call_rows(run, call) for call in run.watch.calls}
    if run.map.cfg in (CFG.BATCHED_UNCOND_FIRST, CFG.BATCHED_COND_FIRST):
        assert (count, rows) == (run.watch.updates, {2 * run.batch})
    elif run.name == "flux-cfg" or run.map.cfg is CFG.SEPARATE:
        experts = 1 if run.name != "wan-2expert" else 0.5  # the first of two experts is watched
        assert (count, rows) == (2 * run.watch.updates * experts, {run.batch})
    else:
        assert run.map.cfg is CFG.DISTILLED
        assert (count, rows) == (run.watch.updates, {run.batch})


@pytest.mark.parametrize("name", [n for n in NAMES if not n.startswith("flux") and n != "hunyuanvideo"])
def test_without_guidance_there_is_one_branch(name: str) -> None:
    run = Seen(name, guidance=False)
    experts = 1 if name != "wan-2expert" else 0.5
    assert len(run.watch.calls) == run.watch.updates * experts > 0
    assert {call_rows(run, call) for call in run.watch.calls} == {run.batch}


def call_rows(run: Seen, call: Call) -> int:
    return named_arguments(run.map.module, call)[run.map.sample].shape[0]


def test_guided_tells_both_branches_from_one() -> None:
    """Where the latents' batch tells nothing, the map does: DiT's pipeline steps the doubled latents."""
    assert [name for name in NAMES if seen(name).map.guided is not None] == ["dit"]
    for guidance in (True, False):
        run = Seen("dit", guidance=guidance)
        told = {run.map.guided(named_arguments(run.map.module, call)) for call in run.watch.calls}
        assert told == {guidance}


def test_the_unconditional_branch_is_where_cfg_says(run: Seen) -> None:
    calls = [named_arguments(run.map.module, call) for call in run.watch.calls]
    if run.map.cfg is CFG.BATCHED_COND_FIRST:
        labels = calls[0]["class_labels"]
        assert (labels[: run.batch] < 1000).all()
        assert (labels[run.batch :] == 1000).all()
        return
    texts = [call[run.map.text] for call in calls]
    if run.map.cfg is CFG.BATCHED_UNCOND_FIRST:
        uncond, cond = texts[0].chunk(2)
    else:
        cond, uncond = texts[0], (texts[1] if len(texts) == 2 * run.watch.updates else None)
    if run.name == "svd":
        assert not uncond.any()
        assert cond.any()
        return
    per_row = len(cond) // run.batch  # frames repeat the text
    assert torch.equal(cond[::per_row], run.kwargs["prompt_embeds"])
    if uncond is not None:
        assert torch.equal(uncond[::per_row], run.kwargs["negative_prompt_embeds"])


def test_wan_with_two_experts_has_two_maps() -> None:
    pipe = make("wan-2expert")
    high, low = denoisers(pipe)
    assert (high.name, low.name) == ("transformer", "transformer_2")
    assert high.module is pipe.transformer
    assert low.module is pipe.transformer_2
    counts = [len(_watch(pipe, one, call_kwargs("wan-2expert", pipe, steps=6)).calls) for one in (high, low)]
    assert sum(counts) == 12
    assert min(counts) > 0


def test_vace_side_blocks_stand_outside_the_stack() -> None:
    run = seen("wan-vace")
    assert all(block.name.startswith("blocks.") for block in run.map.blocks)
    assert "vace_blocks" in " ".join(run.map.notes)


def test_a_compiled_block_keeps_its_place() -> None:
    pipe = make("wan")
    pipe.transformer.blocks[1] = torch.compile(pipe.transformer.blocks[1])
    (described,) = denoisers(pipe)
    plain: nn.Module = make("wan").transformer
    assert [b.name for b in described.blocks] == [f"blocks.{i}" for i in range(len(plain.blocks))]
    assert described.blocks[1].module is pipe.transformer.blocks[1]
    assert described.blocks[1].io == described.blocks[0].io
    for site in described.attentions:
        assert described.module.get_submodule(site.name) is site.module
