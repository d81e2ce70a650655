"""Tables of the studies that stand beside the benches: what was asked, each row's figures, and whether it holds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from diffeff.eval.render.records import Row, newest
from diffeff.eval.render.tables import DASH, markdown

__all__ = ["STUDIES", "Study"]

MIB = 2**20


@dataclass(frozen=True)
class Study:
    """One benchmark's table: the newest row of each combination of `keys`, a line of cells per row under `head`."""

    command: str
    keys: tuple[str, ...]
    head: tuple[str, ...]
    line: Callable[[Row], Sequence[str]]

    def table(self, rows: Sequence[Row]) -> str:
        """Markdown; the command that makes the rows when there are none."""
        chosen = newest(rows, *self.keys)
        return markdown(self.head, map(self.line, chosen)) if chosen else f"Not measured yet: `{self.command}` does."


def _oracle(row: Row) -> list[str]:
    return [
        str(row["seed"]),
        f"{row['computed']} of {row['steps']}",
        str(row["schedules"]),
        f"{row['search']['error']:.4f} ({row['search']['branches_run']} branches run)",
        f"{row['oracle']['error']:.4f}",
        f"{100 * row['gap']:.1f} %",
    ]


def _transfer(row: Row) -> list[str]:
    own = row.get("tuned_there") or row["tuned_on"]
    return [str(row["model"]), str(row["to"]), _decibels(own), _decibels(row["there"]), f"{row['loss']:.2f} dB"]


def _decibels(found: Mapping[str, float]) -> str:
    return f"{found['psnr']:.1f} [{found['low']:.1f}, {found['high']:.1f}], {found['prompts']:.0f} prompts"


def _adherence(row: Row) -> list[str]:
    psnr, counts = row["psnr"], row["attributes"]
    whole = counts["all"]
    single = [f"{name} {found['right']}" for name, found in counts.items() if name != "all"]
    return [
        str(row["model"]),
        str(row["plan"]),
        f"{psnr['mean']:.1f} dB [{psnr['low']:.1f}, {psnr['high']:.1f}], worst {psnr['worst']:.1f}",
        _right(whole, row["prompts"]),
        _right(whole["plain"], row["prompts"]),
        ", ".join(single),
    ]


def _right(found: Mapping[str, float], trials: int) -> str:
    return f"{found['right']} of {trials} [{100 * found['low']:.1f}, {100 * found['high']:.1f} %]"


def _architectures(row: Row) -> list[str]:
    speed = row["speedup"]
    return [
        f"{row['model']} ({row['note']})",
        str(row["method"]),
        f"{100 * row['compute_left']:.0f} %",
        f"{speed['median']:.2f} ({speed['q1']:.2f} to {speed['q3']:.2f})",
        f"{100 * row['share_of_ideal']:.0f} %",
        "yes" if row["holds"] else "no",
    ]


def _idle(row: Row) -> list[str]:
    return [
        str(row["method"]),
        f"{row['ratio_median']:.3f} ({row['ratio_min']:.2f} to {row['ratio_max']:.2f})",
        "yes" if row["holds"] else "no",
        "yes" if row["said_so"] else "no",
    ]


def _slicing(row: Row) -> list[str]:
    size = (
        f"{row['frames']} x {row['size']} x {row['size']}"
        if "size" in row
        else f"{row['grid']}, {row['layers'] or 'a single'} block"
    )
    return [
        str(row["model"]),
        f"{size}, {row['dtype']}",
        str(row["arm"]),
        _mebibytes(row.get("live_peak_bytes")),
        _mebibytes(row.get("rss_peak_bytes")),
        _mebibytes(row.get("skip_bytes")),
        _time(row),
        f"{row['error']:.0e}" if row.get("error") else DASH,
    ]


def _mebibytes(count: float | None) -> str:
    return DASH if count is None else f"{count / MIB:.0f} MiB"


def _time(row: Row) -> str:
    if "ratio_median" not in row:
        return DASH
    return f"{row['ratio_median']:.2f} ({row['ratio_min']:.2f} to {row['ratio_max']:.2f})"


def _memory(row: Row) -> list[str]:
    if "error" in row:
        return [str(row["case"]), "failed", DASH, DASH, DASH]
    resident = row["rss_ratio"]
    return [
        str(row["case"]),
        str(row["stage"]),
        _mebibytes(row["measured_live"]),
        f"{row['live_ratio']:.3f}",
        DASH if resident is None else f"{resident:.2f} of {_mebibytes(row['measured_growth'])}",
    ]


def _fit(row: Row) -> list[str]:
    return [
        str(row["model"]),
        _mebibytes(row["plain_estimate"]),
        _mebibytes(row["budget"]),
        str(row["chosen"]["step"]) if row["chosen"] else DASH,
        _mebibytes(row["measured"]),
        "yes" if row["kept"] else "no",
    ]


def _kernels(row: Row) -> list[str]:
    head = [str(row["kernel"]), str(row["shape"]), str(row["arm"])]
    if row["status"] != "ok":
        return [*head, str(row["reason"]), DASH, DASH]
    ratio = row["ratio"]
    times = DASH if not ratio else f"{ratio['median']:.2f} ({ratio['q1']:.2f} to {ratio['q3']:.2f})"
    return [*head, f"{row['path']}, {row['milliseconds']['median']:.3f} ms", times, str(row["copies"])]


STUDIES: Mapping[str, Study] = {
    "oracle": Study(
        "python -m diffeff.eval.oracle >> eval/results/oracle.jsonl",
        ("seed", "computed"),
        ("seed", "computed", "schedules tried", "error of the search's", "least error", "gap"),
        _oracle,
    ),
    "transfer": Study(
        "python -m diffeff.eval.transfer >> eval/results/transfer.jsonl",
        ("model", "to"),
        ("model", "carried to", "PSNR where it was tuned, or of one tuned there", "PSNR there", "loss"),
        _transfer,
    ),
    "adherence": Study(
        "python -m diffeff.eval.adherence MODEL PLAN >> eval/results/adherence.jsonl",
        ("model", "plan"),
        ("model", "plan", "PSNR to plain", "show all that was asked for", "plain does", "of these, each alone"),
        _adherence,
    ),
    "architectures": Study(
        "python -m diffeff.eval.architectures -o eval/results/architectures.jsonl",
        ("model", "method", "device", "dtype"),
        ("model", "cache", "compute left", "speed-up (quartiles)", "of what that allows", "at least 90 %"),
        _architectures,
    ),
    "idle_caches": Study(
        "python -m diffeff.eval.overhead --caches >> eval/results/overhead.jsonl",
        ("model", "method"),
        ("cache that skips nothing", "time attached / plain (range)", "at most 1.02", "report says so"),
        _idle,
    ),
    "slicing": Study(
        "python -m diffeff.eval.slicing --rounds 3 --rss",
        ("model", "size", "grid", "layers", "dtype", "arm", "measure"),
        ("model", "size", "arm", "live activations", "resident", "skip connections alone", "CPU time / plain (range)",
         "error"),
        _slicing,
    ),
    "memory": Study(
        "python -m diffeff.eval.memory",
        ("case",),
        ("case", "stage that binds", "live activations", "estimated / measured", "estimated / resident growth"),
        _memory,
    ),
    "memory fit": Study(
        "python -m diffeff.eval.memory",
        ("model",),
        ("model", "plain, estimated", "budget", "step taken", "resident peak", "kept"),
        _fit,
    ),
    "kernels": Study(
        "diffeff bench kernels -o eval/results/kernels.jsonl",
        ("device", "dtype", "kernel", "shape", "arm"),
        ("kernel", "shape", "way", "ran as", "times baseline's speed (quartiles)", "copies"),
        _kernels,
    ),
}  # fmt: skip
"""By the name of the benchmark in its rows."""
