"""The style sheet of the page: colours of both modes, and the layout from phones to large screens."""

from __future__ import annotations

# Colours of runs after Okabe and Ito, told apart by people with any kind of colour vision; yellow and sky blue made to stand out on white.
STYLE = """
:root {
  --paper: #ffffff; --card: #f7f7f8; --ink: #1b1d21; --quiet: #5c626b; --rule: #e2e4e8; --link: #0b57a4;
  --heat: #0072b2; --on-heat: #ffffff;
  --k0: #3f4a5a; --k1: #8b97a8; --k2: #b4532a; --k3: #e08a4f; --k4: #f3bd8a; --k5: #7d3a78; --k6: #b98ab5; --k7: #c9ccd1;
  --c0: #0072b2; --c1: #d55e00; --c2: #009e73; --c3: #b8478a; --c4: #b98500; --c5: #2f9fd8; --c6: #6a4fb0; --c7: #666666;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #14161a; --card: #1d2025; --ink: #e8eaed; --quiet: #a2a9b3; --rule: #343941; --link: #7cb8f5;
    --heat: #4fa6e8; --on-heat: #0b0d10;
    --k0: #77859b; --k1: #b6c0ce; --k2: #c7673d; --k3: #e89a63; --k4: #f6cda4; --k5: #a05f9b; --k6: #cba5c8; --k7: #6b7280;
    --c0: #5aa9e6; --c1: #ff8a4c; --c2: #35c495; --c3: #ee8fc3; --c4: #f0c04a; --c5: #a8dcff; --c6: #b39cf0; --c7: #bdbdbd;
  }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0 auto; padding: 1.5rem 1.25rem 4rem; max-width: 78rem; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
h1 { margin: 0; font-size: 1.7rem; line-height: 1.25; overflow-wrap: anywhere; }
h2 { margin: 2.6rem 0 .7rem; font-size: 1.2rem; }
p { margin: .4rem 0; max-width: 52rem; overflow-wrap: anywhere; }
header p, .note, summary { color: var(--quiet); }
nav { display: flex; flex-wrap: wrap; gap: .1rem 1.1rem; margin-top: .6rem; }
a { color: var(--link); text-decoration: none; }
a:hover { text-decoration: underline; }
.pictures { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, 23rem), 1fr)); }
figure { margin: 0; padding: .8rem .9rem; min-width: 0; background: var(--card); border-radius: 8px;
  display: flex; flex-direction: column; }
figcaption { font-weight: 600; overflow-wrap: anywhere; }
.note { margin: .3rem 0 0; font-size: .85rem; }
details { margin-top: auto; padding-top: .4rem; font-size: .85rem; }
summary { cursor: pointer; }
.key { display: flex; flex-wrap: wrap; gap: .15rem 1.1rem; margin: .2rem 0 .5rem; padding: 0; list-style: none; font-size: .9rem; }
.key li { display: flex; align-items: center; gap: .45rem; min-width: 0; }
.key span { overflow-wrap: anywhere; }
.sample { flex: none; }
.scroll { overflow-x: auto; margin: .6rem 0; }
table { border-collapse: separate; border-spacing: 0; font-size: .92rem; font-variant-numeric: tabular-nums; }
details table { font-size: 1em; }
th, td { padding: .3rem .9rem .3rem 0; text-align: left; vertical-align: top; }
tbody tr > * { border-top: 1px solid var(--rule); }
tbody tr:last-child > * { border-bottom: 1px solid var(--rule); }
thead th { vertical-align: bottom; font-weight: 600; color: var(--quiet); }
tbody th { font-weight: 500; min-width: 6.5rem; max-width: 22rem; }
tr > th:first-child { position: sticky; left: 0; background: var(--paper); }
figure tr > th:first-child { background: var(--card); }
.numbers td, .numbers thead th + th { text-align: right; padding: .3rem 0 .3rem 1.1rem; }
.numbers thead th + th { min-width: 6rem; }
.numbers td { white-space: nowrap; }
.words thead th + th { min-width: 9rem; max-width: 14rem; }
.words td { min-width: 4rem; max-width: 46rem; }
.best { font-weight: 700; }
.picture { display: block; width: 100%; height: auto; overflow: visible; }
svg text { font: 12px system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; fill: var(--quiet); }
svg .name { fill: var(--ink); }
svg .middle { text-anchor: middle; }
svg .end { text-anchor: end; }
svg .value { fill: var(--ink); font-size: 11px; }
svg .value.dark { fill: var(--on-heat); }
.rule, .axis { stroke: var(--rule); fill: none; vector-effect: non-scaling-stroke; }
.axis { stroke: var(--quiet); }
.line { fill: none; stroke-width: 1.8; stroke-linejoin: round; vector-effect: non-scaling-stroke; }
.line.thin { stroke-width: 1; opacity: .32; }
.bar { stroke: var(--card); stroke-width: 1; }
.cell { fill: var(--heat); stroke: var(--rule); stroke-width: .5; }
.s0 { stroke: var(--c0); } .s1 { stroke: var(--c1); } .s2 { stroke: var(--c2); } .s3 { stroke: var(--c3); }
.s4 { stroke: var(--c4); } .s5 { stroke: var(--c5); } .s6 { stroke: var(--c6); } .s7 { stroke: var(--c7); }
.c0 { fill: var(--c0); } .c1 { fill: var(--c1); } .c2 { fill: var(--c2); } .c3 { fill: var(--c3); }
.c4 { fill: var(--c4); } .c5 { fill: var(--c5); } .c6 { fill: var(--c6); } .c7 { fill: var(--c7); }
.k0 { fill: var(--k0); } .k1 { fill: var(--k1); } .k2 { fill: var(--k2); } .k3 { fill: var(--k3); }
.k4 { fill: var(--k4); } .k5 { fill: var(--k5); } .k6 { fill: var(--k6); } .k7 { fill: var(--k7); }
@media (max-width: 40rem) {
  body { padding: 1rem .8rem 3rem; }
  h1 { font-size: 1.4rem; }
  figure { padding: .7rem .6rem; }
  svg text { font-size: 14px; }
  svg .value { font-size: 12px; }
}
@media print { details { display: none; } figure { break-inside: avoid; } }
"""
