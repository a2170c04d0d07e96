"""How a report looks: its style sheet. Light and dark follow the reader's setting; paper is always light."""

STYLE = """
:root { --ink: #24292f; --faint: #6e7782; --line: #d8dee5; --paper: #ffffff; --soft: #f6f8fa; --link: #0969da;
  --good: #1a7f37; --bad: #b35900; color-scheme: light dark; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6edf3; --faint: #9aa5b1; --line: #333c47; --paper: #12161b; --soft: #1b2128; --link: #6cb0ff;
    --good: #56d364; --bad: #f0a35e; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 74rem; margin: 0 auto; padding: 2rem 1.25rem 4rem; }
h1 { font-size: 2rem; line-height: 1.2; margin: 0 0 .5rem; }
h2 { font-size: 1.35rem; margin: 3rem 0 .75rem; padding-top: .75rem; border-top: 1px solid var(--line); }
h3 { font-size: 1.05rem; margin: 1.5rem 0 .5rem; }
p, ul { max-width: 48rem; }
.lead { font-size: 1.1rem; }
.facts, footer { color: var(--faint); }
.warning { border-left: 4px solid var(--bad); padding: .4rem .8rem; background: var(--soft); }
nav { display: flex; flex-wrap: wrap; gap: .25rem 1.25rem; margin: 1.5rem 0 0; }
a { color: var(--link); }
dl.leaders { display: flex; flex-wrap: wrap; gap: .75rem; margin: .5rem 0 1.25rem; }
dl.leaders div { background: var(--soft); border: 1px solid var(--line); border-radius: 8px; padding: .6rem 1rem;
  min-width: 12rem; }
dl.leaders dt { color: var(--faint); font-size: .85rem; }
dl.leaders dd { margin: 0; font-weight: 600; }
dl.leaders dd.worst { font-weight: 400; color: var(--faint); font-size: .85rem; }
ul.against, ul.for { list-style: none; padding: 0; }
ul.against li, ul.for li { border-left: 4px solid var(--bad); padding: .25rem 0 .25rem .8rem; margin: .4rem 0; }
ul.for li { border-left-color: var(--line); }
.wide { overflow-x: auto; margin: 1.25rem 0; }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; color: var(--faint); padding-bottom: .5rem; max-width: 48rem; }
th, td { text-align: right; padding: .35rem .6rem; border-bottom: 1px solid var(--line); white-space: nowrap; }
thead th { color: var(--faint); font-weight: 500; white-space: normal; vertical-align: bottom; }
th:first-child { text-align: left; padding-left: 0; }
tbody th { font-weight: 600; }
td.best { color: var(--good); font-weight: 600; }
td.worst { color: var(--bad); }
td small { font-weight: 400; }
figure { margin: 2rem 0; }
figure svg { width: 100%; max-width: 54rem; height: auto; display: block; }
figure svg text { font-family: system-ui, -apple-system, "Segoe UI", Roboto, Arial, sans-serif; }
figcaption { color: var(--faint); font-size: .9rem; max-width: 48rem; margin-top: .5rem; }
figcaption b { color: var(--ink); }
details { background: var(--soft); border: 1px solid var(--line); border-radius: 8px; padding: .6rem 1rem; }
summary { cursor: pointer; }
pre { overflow-x: auto; font-size: .85rem; }
footer { margin-top: 3rem; font-size: .85rem; }
@media print {
  :root { --ink: #000; --faint: #444; --line: #bbb; --paper: #fff; --soft: #fff; --good: #1a7f37; --bad: #b35900; }
  body { font-size: 10pt; } nav { display: none; } main { max-width: none; padding: 0; }
  figure, table { break-inside: avoid; } h2, h3 { break-after: avoid; } }
"""
