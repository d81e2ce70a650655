"""``python -m diffeff.zoo.train NAME``: train a bundled model from scratch, or continue an interrupted run."""

from __future__ import annotations

import argparse
import importlib
import logging
from collections.abc import Callable, Sequence
from pathlib import Path

from diffeff.zoo.train.harness import TrainOptions, pick_device

#: name -> (module:function, default minutes on one CPU core)
TRAINERS: dict[str, tuple[str, float]] = {
    "digits-dit": ("diffeff.zoo.train.digits:train", 7.0),
    "sprites-sd": ("diffeff.zoo.train.sd:train", 38.0),
    "sprites-motion": ("diffeff.zoo.train.motion:train", 40.0),
    "sprites-wan": ("diffeff.zoo.train.wan:train", 90.0),
    "sprites-encoder": ("diffeff.zoo.train.encoder:train", 12.0),
}


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line and run one trainer."""
    parser = argparse.ArgumentParser(prog="python -m diffeff.zoo.train", description=__doc__)
    parser.add_argument("name", choices=sorted(TRAINERS))
    parser.add_argument("--minutes", type=float, help="wall-clock budget")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    parser.add_argument("--out", type=Path, help="folder for the finished pipeline (default: ./NAME)")
    parser.add_argument("--work", type=Path, help="folder for checkpoints and logs (default: ./.train/NAME)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fresh", action="store_true", help="ignore checkpoints and start over")
    parser.add_argument("--resume", action="store_true", help="continue from checkpoints (the default)")
    args = parser.parse_args(argv)
    if args.fresh and args.resume:
        parser.error("--fresh and --resume exclude each other")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    target, minutes = TRAINERS[args.name]
    module, function = target.split(":")
    train: Callable[[TrainOptions], None] = getattr(importlib.import_module(module), function)
    train(
        TrainOptions(
            name=args.name,
            out=args.out or Path(args.name),
            work=args.work or Path(".train") / args.name,
            minutes=args.minutes or minutes,
            device=pick_device(args.device),
            seed=args.seed,
            resume=not args.fresh,
        )
    )


if __name__ == "__main__":
    main()
