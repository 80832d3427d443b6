"""How the page looks, and the script that keeps it fresh. Both stand in the page; nothing is from elsewhere."""

from __future__ import annotations

STYLE = """
:root { color-scheme: light dark; --ink: #1c2430; --faint: #667080; --paper: #f6f7f9; --card: #fff; --line: #dfe3e9;
  --good: #1a7f4b; --bad: #c0322b; --busy: #2465c8; --wait: #b7791f; --lone: #b7791f; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e8ee; --faint: #98a3b3; --paper: #12161c; --card: #1b212a;
  --line: #313a47; --good: #4cc38a; --bad: #ff7b72; --busy: #6ea8ff; --wait: #e3b341; --lone: #e3b341; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
main, footer, #silent { max-width: 62rem; margin: 0 auto; padding: 0 1rem; }
h1 { font-size: 1rem; font-weight: 600; color: var(--faint); margin: 1.2rem 0 .4rem; }
h2 { font-size: 1.1rem; margin: 0 0 .6rem; }
.state { font-size: 1.35rem; line-height: 1.35; font-weight: 600; margin: 0 0 1rem; padding: .8rem 1rem;
  background: var(--card); border: 1px solid var(--line); border-left: .5rem solid var(--good); border-radius: .4rem;
  overflow-wrap: anywhere; }
.state.bad { border-left-color: var(--bad); }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(9rem, 1fr)); gap: .8rem; margin: 0 0 1rem; }
.tile, section { background: var(--card); border: 1px solid var(--line); border-radius: .4rem; padding: .8rem 1rem; }
.tile dt { color: var(--faint); font-size: .85rem; }
.tile dd { margin: 0; font-size: 1.5rem; font-weight: 600; font-variant-numeric: tabular-nums; white-space: nowrap; }
.tile small { display: block; font-size: .8rem; font-weight: 400; color: var(--faint); white-space: normal; }
dl { margin: 0; }
.rates { display: grid; grid-template-columns: repeat(auto-fit, minmax(5.5rem, 1fr)); gap: .4rem .8rem;
  margin: 0 0 1rem; font-variant-numeric: tabular-nums; }
.rates dt { color: var(--faint); font-size: .85rem; } .rates dd { margin: 0; white-space: nowrap; }
section { margin: 0 0 1rem; }
.two { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)); gap: 0 1rem; }
.three { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 16rem), 1fr)); gap: 1rem; }
.four { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 13rem), 1fr)); gap: 1rem 1.5rem;
  align-items: start; }
figure { margin: 0; min-width: 0; }
figcaption { display: flex; justify-content: space-between; gap: .5rem; font-size: .85rem; }
figcaption span, .axis { color: var(--faint); }
.axis { display: flex; justify-content: space-between; font-size: .75rem; }
svg.plot { display: block; width: 100%; height: 6.5rem; }
svg.bar { display: block; width: 100%; height: .7rem; }
svg path { stroke: none; fill-opacity: .25; }
svg path.edge { fill: none; stroke-width: 2; vector-effect: non-scaling-stroke; }
svg path.grid { fill: none; stroke: var(--line); stroke-width: 1; vector-effect: non-scaling-stroke; }
.rate, .pairs { fill: var(--busy); } .rate.edge, .pairs.edge { stroke: var(--busy); }
svg path.waiting { fill: none; } .waiting.edge { stroke: var(--wait); }
.happy { fill: var(--good); } .lonely { fill: var(--lone); } .errory { fill: var(--bad); } .part { fill: var(--busy); }
.key::before { content: ""; display: inline-block; width: .7em; height: .7em; margin-right: .4em; }
.key.happy::before { background: var(--good); } .key.lonely::before { background: var(--lone); }
.key.errory::before { background: var(--bad); } .key.pairs::before { background: var(--busy); }
.key.waiting::before { background: var(--wait); }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .6rem .25rem 0; text-align: right; white-space: nowrap; border-top: 1px solid var(--line); }
thead th, tr:first-child > * { border-top: 0; }
th { font-weight: 400; color: var(--faint); font-size: .85rem; }
th:first-child, td:first-child { text-align: left; }
tbody th { color: var(--ink); font-size: 1rem; }
td.graph { width: 40%; min-width: 6rem; }
td.words, th.words { white-space: normal; text-align: left; }
p { margin: 0 0 .6rem; } p.faint, footer { color: var(--faint); font-size: .85rem; }
footer { padding-bottom: 2rem; } a { color: var(--busy); }
#silent { background: var(--bad); color: #fff; padding: .5rem 1rem; }
@media (max-width: 42rem) { .tiles { grid-template-columns: 1fr 1fr; } }
@media (max-width: 30rem) { body { font-size: 15px; } .state { font-size: 1.15rem; } .tile dd { font-size: 1.25rem; }
  section { padding: .7rem .8rem; } td.graph { display: none; } }
"""

SCRIPT = """
(() => {
  const every = 5000, silent = document.getElementById("silent");
  let at = Date.now(), busy = false;
  async function refresh() {
    if (document.hidden || busy || String(getSelection())) return;
    busy = true;
    try {
      const answer = await fetch(location.href, {cache: "no-store", signal: AbortSignal.timeout(8000)});
      if (!answer.ok) throw new Error();
      const page = new DOMParser().parseFromString(await answer.text(), "text/html");
      document.querySelector("main").replaceWith(page.querySelector("main"));
      document.querySelector("link[rel=icon]").replaceWith(page.querySelector("link[rel=icon]"));
      document.title = page.title;
      at = Date.now();
      silent.hidden = true;
    } catch {
      silent.textContent = "relay-status has not answered for " + Math.round((Date.now() - at) / 1000) +
        " seconds; what is below is as old.";
      silent.hidden = false;
    }
    busy = false;
  }
  setInterval(refresh, every);
  document.addEventListener("visibilitychange", refresh);
})();
"""
