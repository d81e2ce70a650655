"""Style and behaviour of the HTML pages. They load nothing: no font, no script, no picture from elsewhere."""

from __future__ import annotations

from diffeff.eval.render.style import LOOKS

__all__ = ["SCRIPT", "style_sheet"]


def style_sheet() -> str:
    """The CSS: colours of the packages for light and dark ground, then everything else."""
    light = "".join(f"--p-{name}:{look.light};" for name, look in LOOKS.items())
    dark = "".join(f"--p-{name}:{look.dark};" for name, look in LOOKS.items())
    classes = "".join(f".p-{name}{{--own:var(--p-{name})}}" for name in LOOKS)
    at_night = f"@media screen and (prefers-color-scheme:dark){{:root{{{_DARK}{dark}}}}}"
    return f":root{{{_LIGHT}{light}}}{at_night}{classes}{_STYLE}"


_LIGHT = (
    "color-scheme:light dark;--paper:#f6f7f8;--card:#fff;--ink:#18202a;--faint:#566070;--line:#dce0e5;--link:#005f99;"
    "--front:#ffd97a;--good:#00694e;--good-bg:#e1f3ec;--bad:#a32c12;--bad-bg:#fdebe6;--warn:#7a5700;--warn-bg:#fdf3d6;"
    "--own:#7a5230;"
)
_DARK = (
    "--paper:#12161b;--card:#1a2027;--ink:#e8ebef;--faint:#a3adb9;--line:#323b46;--link:#7cc4f5;--front:#6b5617;"
    "--good:#5fd6b0;--good-bg:#12352b;--bad:#ff9d85;--bad-bg:#3f1d15;--warn:#f0cf72;--warn-bg:#3a2f10;--own:#cfa27c;"
)

_STYLE = """
*{box-sizing:border-box}
html{scroll-behavior:smooth}
body{margin:0;background:var(--paper);color:var(--ink);
font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
main,header{max-width:1180px;margin:0 auto;padding:0 20px}
header{padding-top:28px}
.kicker{color:var(--faint);font-size:.85rem;letter-spacing:.04em;margin:0}
h1{font-size:1.75rem;line-height:1.2;margin:.15em 0 .3em}
h2{font-size:1.3rem;margin:2.2em 0 .5em;padding-top:.4em;border-top:1px solid var(--line)}
h3{font-size:1.05rem;margin:1.6em 0 .5em}
p{margin:.5em 0;max-width:76ch}
a{color:var(--link)}
.meta{color:var(--faint);font-size:.92rem;max-width:none}
nav ul{list-style:none;display:flex;flex-wrap:wrap;gap:6px 18px;padding:0;margin:.6em 0}
.skip{position:absolute;left:-9999px}
.skip:focus{left:12px;top:12px;background:var(--card);padding:8px 12px;z-index:9}
:focus-visible{outline:3px solid var(--link);outline-offset:2px;border-radius:3px}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(255px,1fr));gap:14px;margin:14px 0}
.card{background:var(--card);border:1px solid var(--line);border-left:5px solid var(--own);border-radius:8px;
padding:14px 16px}
.card h3{margin:0;font-size:.92rem;font-weight:600;color:var(--faint)}
.card .big{font-size:2.1rem;font-weight:700;line-height:1.15;margin:.1em 0 0;color:var(--own)}
.card .big small{font-size:1rem;font-weight:500;color:var(--ink)}
.card .name{font-weight:650;margin:0;overflow-wrap:anywhere}
.card dl{display:grid;grid-template-columns:auto 1fr;gap:2px 12px;margin:.6em 0 0;font-size:.9rem}
.card dt{color:var(--faint)}
.card dd{margin:0;font-variant-numeric:tabular-nums}
.card .next{font-size:.88rem;color:var(--faint);margin:.7em 0 0;border-top:1px solid var(--line);padding-top:.5em}
.good{--own:var(--good)}.bad{--own:var(--bad)}.warn{--own:var(--warn)}.calm{--own:var(--faint)}
ul.said{margin:.4em 0;padding-left:1.2em;max-width:90ch}
ul.said li{margin:.25em 0}
.chip{display:inline-block;border-radius:99px;padding:0 9px;font-size:.78rem;font-weight:600;line-height:1.6;
white-space:nowrap;
background:var(--line);color:var(--ink)}
.chip.ok{background:var(--good-bg);color:var(--good)}.chip.no{background:var(--bad-bg);color:var(--bad)}
.chip.hm{background:var(--warn-bg);color:var(--warn)}
.plot,.wide{overflow-x:auto;background:var(--card);border:1px solid var(--line);border-radius:8px}
.plot svg{display:block;width:100%;min-width:640px;height:auto;padding:6px}
svg text{font:12px system-ui,-apple-system,"Segoe UI",Roboto,sans-serif;fill:var(--faint)}
svg .axis{font-size:12.5px;fill:var(--ink)}
svg .grid{stroke:var(--line)}
svg .start{stroke:var(--faint);stroke-dasharray:4 4}
svg .ceiling{stroke:var(--line);stroke-width:7}
svg .front{fill:none;stroke:var(--front);stroke-width:11;stroke-linejoin:round;stroke-linecap:round;opacity:.75}
svg .curve,svg .sweep{fill:none;stroke:var(--own);stroke-width:2}
svg .sweep{stroke-width:1.3;opacity:.8}
svg .whisker{stroke:var(--own);opacity:.55}
svg .mark{fill:var(--own);stroke:var(--card);stroke-width:1}
svg .hit{fill:transparent}
svg .dot:hover .mark,svg .dot:focus .mark{stroke:var(--ink);stroke-width:2.5}
svg .label{fill:var(--own);paint-order:stroke;stroke:var(--card);stroke-width:3px;font-size:11px;pointer-events:none}
svg .label.strong{font-size:12.5px;font-weight:650}
.chosen [data-group]:not(.on){opacity:.14}
.legend{display:flex;flex-wrap:wrap;gap:6px;margin:10px 0;align-items:center}
.legend button{display:inline-flex;gap:6px;align-items:center}
.legend svg{width:18px;height:18px}
.legend .key{font-size:.85rem;color:var(--faint);display:inline-flex;gap:6px;align-items:center;padding:0 6px}
.front-key{width:22px;height:9px;border-radius:5px;background:var(--front);display:inline-block}
button{font:inherit;font-size:.87rem;color:var(--ink);background:var(--card);border:1px solid var(--line);
border-radius:6px;
padding:4px 10px;cursor:pointer}
button:hover{border-color:var(--faint)}
button[aria-pressed=true]{background:var(--ink);color:var(--paper)}
#tip{position:fixed;z-index:8;pointer-events:none;background:var(--ink);color:var(--paper);border-radius:6px;
padding:8px 11px;
font-size:.84rem;line-height:1.4;white-space:pre-line;max-width:340px;box-shadow:0 4px 18px #0005}
#tip::first-line{font-weight:700}
table{border-collapse:collapse;width:100%;font-size:.88rem;font-variant-numeric:tabular-nums}
caption{text-align:left;color:var(--faint);padding:9px 12px;font-size:.88rem}
th,td{padding:7px 9px;text-align:right;border-top:1px solid var(--line);vertical-align:top;white-space:nowrap}
thead th{border-top:0;background:var(--card);vertical-align:bottom}
th:first-child,td.words,th.words,.facts td,.facts th{text-align:left;white-space:normal;overflow-wrap:break-word}
td.words{min-width:9em}
.facts td{overflow-wrap:anywhere}
tbody th{font-weight:600;min-width:190px}
tbody th,thead th:first-child{position:sticky;left:0;background:var(--card)}
td small,th small{display:block;color:var(--faint)}
td small,th small{font-size:.87em}
td small.note{white-space:normal;min-width:11em;max-width:20em;margin-left:auto}
th small{font-weight:400;max-width:46ch}
tbody tr:hover,tbody tr:hover th{background:color-mix(in srgb,var(--link) 7%,var(--card))}
tbody tr:target,tbody tr:target th{background:color-mix(in srgb,var(--front) 45%,var(--card))}
tbody th i{display:inline-block;width:9px;height:9px;border-radius:2px;background:var(--own);margin-right:7px}
thead button{border:0;padding:2px 0;background:none;font-weight:650;text-align:inherit;white-space:normal}
thead button::after{content:"\\a0\\2195";color:var(--faint)}
th[aria-sort=ascending] button::after{content:"\\a0\\2191";color:inherit}
th[aria-sort=descending] button::after{content:"\\a0\\2193";color:inherit}
td.works{background:var(--good-bg)}td.fails{background:var(--bad-bg)}td.idle{background:var(--warn-bg)}
td .one{white-space:nowrap}
td.quote{font-family:ui-monospace,Consolas,monospace;font-size:.83rem}
.clips{display:grid;grid-template-columns:repeat(auto-fill,minmax(148px,1fr));gap:16px;margin:12px 0}
.clips.large{grid-template-columns:repeat(auto-fill,minmax(300px,1fr))}
.clips.frames{grid-template-columns:1fr}
figure{margin:0}
figcaption{font-size:.84rem;margin-top:5px;overflow-wrap:anywhere}
figcaption small{display:block;color:var(--faint);font-size:.92em}
.clip{overflow:hidden;border-radius:5px;background:#8883;border:2px solid transparent}
figure.plain .clip{border-color:var(--p-plain)}
.clip img{display:block;width:100%;height:auto;image-rendering:pixelated}
.play .clip{aspect-ratio:var(--ratio)}
.play .clip img{width:calc(var(--n)*100%);max-width:none;animation:clip calc(var(--n)*.14s) steps(var(--n)) infinite}
.paused .clip img{animation-play-state:paused}
@keyframes clip{to{transform:translateX(-100%)}}
.pairs{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,430px),1fr));gap:12px}
.pair{background:var(--card);border:1px solid var(--line);border-radius:8px;padding:12px}
.pair>div{display:grid;grid-template-columns:1fr 1fr;gap:12px}
.pair img,.pair video{width:100%;height:auto;border-radius:5px;background:#8883;display:block}
.pair img.tiny,.pair video.tiny{image-rendering:pixelated}
details{background:var(--card);border:1px solid var(--line);border-radius:8px;margin:10px 0;padding:0 14px}
summary{cursor:pointer;font-weight:600;padding:9px 0}
details[open]{padding-bottom:12px}
pre{overflow-x:auto;font:.82rem/1.45 ui-monospace,Consolas,monospace;background:var(--paper);padding:9px 11px;
border-radius:6px;
white-space:pre-wrap;overflow-wrap:anywhere}
.bar{display:block;min-width:120px;margin:2px 0 0 auto}
.bar .span{fill:var(--own);opacity:.35}.bar .value{fill:var(--own)}.bar .base{stroke:var(--line)}
footer{color:var(--faint);font-size:.85rem;padding:30px 0}
@media screen and (max-width:800px){th,td{padding:6px 8px}tbody th{min-width:150px}svg text{font-size:15px}
svg .axis{font-size:16px}svg .label{font-size:13.5px}svg .label.strong{font-size:15px}}
@media (min-width:570px) and (max-width:840px){.cards:has(>:nth-child(3):last-child)>:last-child{grid-column:1/-1}}
@media (max-width:600px){.pair>div{grid-template-columns:1fr}h1{font-size:1.4rem}}
@media (prefers-reduced-motion:reduce){html{scroll-behavior:auto}}
@page{size:A4 landscape;margin:12mm}
@media print{body{background:#fff;font-size:11pt}.plot,.wide{overflow:visible;border:0}
.controls,.skip,nav,#tip{display:none}
table{font-size:7.5pt}thead button,.chip,caption{font-size:inherit}.plot svg{max-height:150mm}
th,td{padding:3px 5px}thead button::after{content:""}.card,figure,tr,.pair{break-inside:avoid}
td.quote{font-size:inherit}
.clips{grid-template-columns:1fr 1fr}.clips .clip{aspect-ratio:auto}.clips .clip img{width:100%;animation:none}
main,header{max-width:none;padding:0}h2,h3{break-after:avoid}tbody th{min-width:0}.plot svg{min-width:0}}
"""

SCRIPT = """
"use strict";
(() => {
  const all = (selector, root = document) => [...root.querySelectorAll(selector)];

  // A tooltip that follows the keyboard as well as the pointer; Escape hides it.
  const tip = document.getElementById("tip");
  const hide = () => { tip.hidden = true; };
  const show = (dot) => {
    const box = dot.getBoundingClientRect();
    tip.textContent = dot.dataset.tip;
    tip.hidden = false;
    const left = Math.min(box.right + 8, innerWidth - tip.offsetWidth - 10);
    const above = box.top - tip.offsetHeight - 8;
    tip.style.left = Math.max(8, left) + "px";
    tip.style.top = (above > 8 ? above : box.bottom + 8) + "px";
  };
  for (const dot of all(".dot")) {
    dot.addEventListener("pointerenter", () => show(dot));
    dot.addEventListener("pointerleave", hide);
    dot.addEventListener("focus", () => show(dot));
    dot.addEventListener("blur", hide);
  }
  addEventListener("keydown", (event) => { if (event.key === "Escape") hide(); });
  addEventListener("scroll", hide, { passive: true });

  // Bring out one line of the plot.
  for (const legend of all(".legend")) {
    const plot = legend.previousElementSibling;
    for (const button of all("button", legend)) {
      button.addEventListener("click", () => {
        const on = button.getAttribute("aria-pressed") !== "true";
        for (const other of all("button", legend)) other.setAttribute("aria-pressed", String(on && other === button));
        plot.classList.toggle("chosen", on);
        for (const part of all("[data-group]", plot)) {
          part.classList.toggle("on", on && part.dataset.group === button.dataset.group);
        }
      });
    }
  }

  // Sorting: numbers by data-value, the rest as text; rows without a value stay at the end either way.
  const value = (row, column) => {
    const cell = row.cells[column];
    if (!cell || cell.colSpan > 1 || cell.dataset.value === undefined) return null;
    const number = Number(cell.dataset.value);
    return Number.isNaN(number) ? cell.dataset.value : number;
  };
  const parts = (text) => String(text).split(/(\\d+(?:\\.\\d+)?)/); // words and numbers, in turns
  const compare = (a, b) => {
    if (typeof a === "number" && typeof b === "number") return a === b ? 0 : a < b ? -1 : 1;
    const [left, right] = [parts(a), parts(b)];
    for (let i = 0; i < Math.min(left.length, right.length); i += 1) {
      if (left[i] !== right[i]) {
        return i % 2 ? Number(left[i]) - Number(right[i]) : left[i].localeCompare(right[i], "en");
      }
    }
    return left.length - right.length;
  };
  for (const button of all("th[aria-sort] button")) {
    const head = button.closest("th");
    button.addEventListener("click", () => {
      const first = head.dataset.first || "descending";
      const second = first === "descending" ? "ascending" : "descending";
      const order = head.getAttribute("aria-sort") === first ? second : first;
      for (const other of all("th[aria-sort]", head.parentNode)) other.setAttribute("aria-sort", "none");
      head.setAttribute("aria-sort", order);
      const body = head.closest("table").tBodies[0];
      const sign = order === "ascending" ? 1 : -1;
      const rows = [...body.rows].map((row) => [value(row, head.cellIndex), row]);
      rows.sort(([a], [b]) => (a === null) - (b === null) || (a === null ? 0 : sign * compare(a, b)));
      body.append(...rows.map(([, row]) => row));
    });
  }

  // Clips: played in step from their strips of frames, unless the reader prefers no motion.
  const calm = matchMedia("(prefers-reduced-motion: reduce)").matches;
  for (const box of all("[data-clips]")) {
    const clips = document.getElementById(box.dataset.clips);
    const [play, frames] = all("button", box);
    const set = (mode) => {
      clips.classList.toggle("play", mode !== "frames");
      clips.classList.toggle("paused", mode === "paused");
      clips.classList.toggle("frames", mode === "frames");
      play.textContent = mode === "play" ? "Pause" : "Play";
      frames.setAttribute("aria-pressed", String(mode === "frames"));
    };
    box.hidden = false;
    play.addEventListener("click", () => set(play.textContent === "Pause" ? "paused" : "play"));
    frames.addEventListener("click", () => set(frames.getAttribute("aria-pressed") === "true" ? "paused" : "frames"));
    set(calm ? "frames" : "play");
  }
  for (const video of all("video")) if (!calm) video.play().catch(() => {});

  // On paper everything is unfolded but what lies two folds deep.
  addEventListener("beforeprint", () => all("details").forEach((one) => {
    one.open = !one.parentElement.closest("details");
  }));
})();
"""
