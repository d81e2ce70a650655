"""DeepCache: the same modules computed and the same latents as the package, and right where it goes wrong."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch
from calls import computed
from tiny import make, run

from diffeff.errors import MethodInapplicable
from diffeff.methods.caching.published.deepcache import DeepCache
from diffeff.pipeline import DiffEffPipeline

package = pytest.importorskip("DeepCache", reason="decisions are compared with the package (pip extra: peers)")
pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:__array_wrap__ must accept:DeprecationWarning"),
]


def resnets(unet: Any) -> dict[str, str]:
    """Every resnet, by the module that tells whether it was computed."""
    return {name: "conv1" for name, module in unet.named_modules() if type(module).__name__ == "ResnetBlock2D"}


def helper(pipe: Any, interval: int, branch: int = 0) -> Any:
    """The package, switched on."""
    found = package.DeepCacheSDHelper(pipe=pipe)
    found.set_params(cache_interval=interval, cache_branch_id=branch)
    found.enable()
    return found


@pytest.mark.parametrize("branch", [0, 1, 2, 3, 4])
@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_the_same_modules_and_latents_as_the_package(family: str, branch: int) -> None:
    reference, ours = make(family), make(family)
    helper(reference, 3, branch)
    latents: list[torch.Tensor] = []
    expected = computed(
        reference.unet, lambda: latents.append(run(family, reference, steps=8)), resnets(reference.unet)
    )
    pipe = DiffEffPipeline(ours, [DeepCache(interval=3, level=branch // 3, layer=branch % 3)])
    found = computed(ours.unet, lambda: latents.append(run(family, pipe, steps=8)), resnets(ours.unet))
    assert found == expected
    torch.testing.assert_close(latents[1], latents[0])


def test_heun_repeats_timesteps_and_the_package_looks_them_up() -> None:
    """The second evaluation at a timestep finds the first one's place: only even or only odd places are ever met."""

    def deep_steps(pipe: Any, go: Any) -> list[int]:
        return computed(pipe.unet, go, {"mid_block.resnets.0": "conv1"})["mid_block.resnets.0"]

    reference, ours = make("sd"), make("sd")
    for pipe in (reference, ours):
        pipe.scheduler = diffusers.HeunDiscreteScheduler.from_config(pipe.scheduler.config)
    helper(reference, 2)
    assert deep_steps(reference, lambda: run("sd", reference, steps=6)) == [0]  # never refreshed
    wrapped = DiffEffPipeline(ours, [DeepCache(interval=2)])
    assert deep_steps(ours, lambda: run("sd", wrapped, steps=6)) == [0, 2, 4, 6, 8, 10]


def test_one_feature_map_per_branch_is_held() -> None:
    pipe = DiffEffPipeline(make("sd"), [DeepCache()])
    run("sd", pipe, steps=6)
    assert pipe.report is not None
    details = pipe.report.methods[0].details["unet"]
    assert details["bytes_held"] == 2 * 16 * 8 * 12 * 4  # channels of the outermost level, both branches, float32


@pytest.mark.parametrize("family", ["animatediff", "svd", "sd-controlnet", "sd-img2img"])
def test_other_unets_stay_near_the_plain_run(family: str) -> None:
    plain = run(family, make(family), steps=12)
    pipe = DiffEffPipeline(make(family), [DeepCache(interval=2)])
    found = run(family, pipe, steps=12)
    assert pipe.report is not None
    assert pipe.report.methods[0].engaged
    assert pipe.report.blocks["cond"].computed < 0.62 * pipe.report.blocks["cond"].total
    assert 0 < float((found - plain).norm() / plain.norm()) < 0.12


def test_interval_one_is_exact() -> None:
    pipe = DiffEffPipeline(make("sd"), [DeepCache(interval=1)])
    assert torch.equal(run("sd", pipe, steps=4), run("sd", make("sd"), steps=4))


def test_the_centred_schedule_gathers_where_it_is_told() -> None:
    pipe = DiffEffPipeline(make("sd"), [DeepCache(interval=4, schedule="centred", centre=0.5, power=2.0)])
    run("sd", pipe, steps=40)
    assert pipe.report is not None
    skipped = set(pipe.report.methods[0].details["unet"]["skipped_steps"])
    done = [i for i in range(40) if i not in skipped]
    assert done[0] == 0
    assert 8 <= len(done) <= 11
    assert sum(12 <= i < 28 for i in done) > sum(i < 12 for i in done)


@pytest.mark.parametrize(("family", "options"), [("wan", {}), ("sd", {"level": 3}), ("sd", {"layer": 5})])
def test_what_has_no_such_depth_is_refused(family: str, options: dict[str, int]) -> None:
    with pytest.raises(MethodInapplicable, match="deepcache"):
        DiffEffPipeline(make(family), [DeepCache(**options)])
