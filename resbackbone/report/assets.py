"""The style sheet and the one script of a page."""

STYLE = """
:root {
  color-scheme: light dark;
  --paper: #ffffff; --sheet: #f6f7f9; --ink: #1b1f24; --faint: #5b6470; --line: #d9dde3; --accent: #0b62c4;
  --heat: 11, 98, 196;
  --s0: #0b62c4; --s1: #c2410c; --s2: #15803d; --s3: #a21caf; --s4: #92700c; --s5: #0e7490;
  --s6: #be123c; --s7: #4d5562;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #13161b; --sheet: #1c2027; --ink: #e6e9ee; --faint: #9aa4b2; --line: #343b46; --accent: #79b2ff;
    --heat: 121, 178, 255;
    --s0: #79b2ff; --s1: #ff9d66; --s2: #6ddc8b; --s3: #e39bf2; --s4: #e3c04f; --s5: #5fd3e6;
    --s6: #ff8fa3; --s7: #b6bfcb;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--paper); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; overflow-wrap: anywhere;
}
main { max-width: 74rem; margin: 0 auto; padding: 1.25rem 1rem 3rem; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: 0; }
h2 { font-size: 1.15rem; margin: 0 0 .6rem; }
h3 { font-size: .95rem; margin: 1rem 0 .4rem; }
header p, p.absent, figcaption, .tile span, .legend { color: var(--faint); }
header p { margin: .2rem 0 .8rem; }
p { margin: .4rem 0; max-width: 65rem; }
p.absent { border-left: 3px solid var(--line); padding-left: .7rem; align-self: start; }
nav { display: flex; flex-wrap: wrap; gap: .25rem 1rem; border-bottom: 1px solid var(--line); padding-bottom: .7rem; }
a { color: var(--accent); text-decoration: none; }
a:hover { text-decoration: underline; }
section { margin-top: 2rem; scroll-margin-top: .5rem; }
.tiles { display: grid; grid-template-columns: repeat(auto-fill, minmax(7.2rem, 1fr)); gap: .6rem; margin: .4rem 0; }
.tile { background: var(--sheet); border: 1px solid var(--line); border-radius: .5rem; padding: .5rem .75rem; }
.tile b { display: block; font-size: 1.45rem; line-height: 1.3; font-variant-numeric: tabular-nums; }
.tile span { font-size: .8rem; }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 22rem), 1fr)); gap: 1rem; }
figure { margin: .5rem 0; min-width: 0; }
figcaption { font-size: .85rem; margin-bottom: .25rem; }
figure.chart figcaption { color: var(--ink); font-weight: 600; }
svg { display: block; width: 100%; height: auto; }
svg text { font: 11px system-ui, sans-serif; fill: var(--faint); }
.axis { stroke: var(--line); stroke-width: 1; }
.curve { fill: none; stroke-width: 1.7; stroke-linejoin: round; }
.band { opacity: .18; stroke: none; }
.c0 { --c: var(--s0); } .c1 { --c: var(--s1); } .c2 { --c: var(--s2); } .c3 { --c: var(--s3); }
.c4 { --c: var(--s4); } .c5 { --c: var(--s5); } .c6 { --c: var(--s6); } .c7 { --c: var(--s7); }
.curve { stroke: var(--c); }
.band, .dot { fill: var(--c); }
.legend { display: flex; flex-wrap: wrap; gap: 0 .9rem; font-size: .85rem; }
.legend i {
  display: inline-block; width: .9em; height: .25em; border-radius: 2px; background: var(--c); vertical-align: middle;
  margin-right: .35em;
}
code { font-size: .9em; white-space: nowrap; }
.box {
  overflow: auto; width: fit-content; max-width: 100%; max-height: 32rem; margin: .5rem 0;
  border: 1px solid var(--line); border-radius: .5rem;
  background:  /* a shadow at an edge behind which there is more: the first two move with the table, and cover it */
    linear-gradient(to left, var(--paper) 40%, transparent) right / 2.4rem 100% no-repeat local,
    linear-gradient(to top, var(--paper) 40%, transparent) bottom / 100% 2.4rem no-repeat local,
    linear-gradient(to left, var(--line), transparent) right / 1rem 100% no-repeat scroll,
    linear-gradient(to top, var(--line), transparent) bottom / 100% 1rem no-repeat scroll;
}
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .7rem; text-align: left; border-bottom: 1px solid var(--line); vertical-align: top; }
tbody tr:last-child > * { border-bottom: 0; }
th { background: var(--sheet); position: sticky; top: 0; white-space: nowrap; font-weight: 600; }
td { overflow-wrap: break-word; }
td:not(.number) { min-width: 6.5rem; }
td:last-child:not(.number) { min-width: 13rem; overflow-wrap: anywhere; }
td.number { text-align: right; white-space: nowrap; }
th.number { text-align: right; }
th button { all: unset; cursor: pointer; display: block; width: 100%; }
th button:focus-visible { outline: 2px solid var(--accent); }
th button::after { content: "↕" / ""; color: var(--faint); padding-left: .4em; font-weight: 400; }
th[aria-sort=ascending] button::after { content: "↑" / ""; color: var(--ink); }
th[aria-sort=descending] button::after { content: "↓" / ""; color: var(--ink); }
.bar { width: clamp(3.5rem, 14vw, 8rem); height: .7rem; margin: .35rem 0; }
td:has(.bar):not(.number) { min-width: 0; }
.bar rect { fill: var(--s0); }
.matrix td { text-align: center; min-width: 2.6rem; }
.matrix td:first-child { min-width: 6.5rem; text-align: left; position: sticky; left: 0; background: var(--paper); }
.h1 { background: rgba(var(--heat), .08); } .h2 { background: rgba(var(--heat), .2); }
.h3 { background: rgba(var(--heat), .35); } .h4 { background: rgba(var(--heat), .5); }
.matrix td:last-child:not(.number) { min-width: 2.6rem; }
.matrix td:not(.right) { --heat: 210, 80, 30; }
.matrix td.right { font-weight: 700; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 15rem), 1fr)); gap: .4rem; }
.gallery { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 33rem), 1fr)); gap: 1rem; }
.pair svg { max-height: 26rem; background: var(--sheet); border-radius: .3rem; }
.pair text { fill: #000; stroke: none; }
.found, .truth { fill: none; stroke-width: 2; vector-effect: non-scaling-stroke; }
.wrong { stroke-dasharray: 5 4; }
.thumbs { display: grid; grid-template-columns: repeat(auto-fill, minmax(8.5rem, 1fr)); gap: .8rem; }
.thumbs img { width: 100%; display: block; border-radius: .3rem; }
.thumbs img.small { image-rendering: pixelated; }
@media (max-width: 30rem) {
  main { padding: 1rem .75rem 2rem; }
  table { font-size: .85rem; }
  th, td { padding: .3rem .45rem; }
  td:not(.number) { min-width: 4rem; }
}
@media print {
  .box { max-height: none; overflow: visible; }
  nav, th button::after { display: none; }
  th { position: static; }
  figure, tr { break-inside: avoid; }
}
"""

SCRIPT = """
// A click on a header sorts its table by that column: numbers from the largest, text from A; again, the other way.
for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0];
  [...table.tHead.rows[0].cells].forEach((header, column) => {
    const key = (row) => {
      const cell = row.cells[column], value = cell.dataset.value;
      return value === undefined ? cell.textContent : value === "" ? null : Number(value);
    };
    const numeric = [...body.rows].some((row) => row.cells[column].dataset.value !== undefined);
    if (header.textContent === "") return;
    const button = document.createElement("button");
    button.type = "button";
    button.append(...header.childNodes);
    header.append(button);
    button.addEventListener("click", () => {
      const now = header.getAttribute("aria-sort"), first = numeric ? "descending" : "ascending";
      const order = now === null ? first : now === "ascending" ? "descending" : "ascending";
      for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
      header.setAttribute("aria-sort", order);
      const sign = order === "ascending" ? 1 : -1;
      body.append(...[...body.rows].sort((a, b) => {
        const [x, y] = [key(a), key(b)];
        if (x === null || y === null) return (x === null) - (y === null);  // what is undefined comes last
        return sign * (numeric ? x - y : x.localeCompare(y));
      }));
    });
  });
}
"""
