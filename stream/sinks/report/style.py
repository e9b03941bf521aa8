"""The page's looks: light and dark by the reader's choice, black on white on paper."""

from __future__ import annotations

CSS = """
:root{color-scheme:light dark;
--paper:#fff;--sheet:#f5f7f9;--ink:#17212b;--soft:#5a6773;--rule:#d9dfe5;--grid:#e6eaee;
--a:#1f5fa8;--a-area:#1f5fa82e;--b:#d9822b;--c:#8a8f98;--good:#1d7f4e;--warn:#a15c00;--warn-bg:#fff3df;--bad:#b3262a;
--info-bg:#e9f1fa}
@media (prefers-color-scheme:dark){:root{
--paper:#12171d;--sheet:#1a2129;--ink:#e4e9ee;--soft:#98a5b1;--rule:#303a45;--grid:#26303a;
--a:#6db0f2;--a-area:#6db0f233;--b:#f0a758;--c:#8d97a3;--good:#56c28a;--warn:#f0b45c;--warn-bg:#33260f;--bad:#f0787b;
--info-bg:#17283a}}
*{box-sizing:border-box}
body{font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif;color:var(--ink);
background:var(--paper);margin:0 auto;max-width:1180px;padding:1.6rem 1.4rem 4rem}
h1{font-size:1.7rem;line-height:1.2;margin:0;overflow-wrap:anywhere}
h2{font-size:1.15rem;margin:2.6rem 0 .7rem;padding-top:.7rem;border-top:1px solid var(--rule)}
h3{font-size:.95rem;margin:1.4rem 0 .4rem}
p{margin:.4rem 0;max-width:80ch;overflow-wrap:anywhere}
.spans{max-width:none}
.soft,figcaption{color:var(--soft)}
figcaption strong{color:var(--ink)}
header{display:flex;gap:.4rem 1rem;align-items:baseline;flex-wrap:wrap}
.pill{border-radius:1rem;padding:.1rem .7rem;font-size:.82rem;font-weight:600;border:1px solid currentColor;color:var(--soft)}
.pill.running{color:var(--a)}.pill.ended{color:var(--good)}.pill.stopped{color:var(--warn)}
nav{font-size:.88rem;margin:.7rem 0 0}nav a{color:var(--a);margin-right:1rem;text-decoration:none}
.verdict{font-size:1.2rem;line-height:1.4;margin:1.3rem 0 1rem}
.tiles{display:grid;grid-template-columns:repeat(auto-fill,minmax(230px,1fr));gap:.7rem;margin:1rem 0}
.tile{background:var(--sheet);border-radius:.5rem;padding:.7rem .9rem}
.tile b{display:block;font-size:1.55rem;line-height:1.25;font-variant-numeric:tabular-nums;white-space:nowrap}
.tile span{display:block;font-size:.8rem;color:var(--soft);line-height:1.35}
.note{border-left:4px solid var(--a);background:var(--info-bg);padding:.5rem .9rem;border-radius:.25rem;margin:.5rem 0;
max-width:none;overflow-wrap:anywhere}
.note.warning{border-color:var(--b);background:var(--warn-bg)}
.note b{display:inline-block;margin-right:.5rem}
.pair{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,430px),1fr));gap:1.2rem;align-items:start}
.thirds{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,240px),1fr));gap:1rem}
figure{margin:0;break-inside:avoid;min-width:0}
figcaption{font-size:.85rem;margin-bottom:.3rem}
figure.wide{grid-column:1/-1}
figure img{width:100%;height:auto;background:#fff;border-radius:.4rem;padding:.4rem;display:block}
figure img.micrograph{padding:0}
.plot{width:100%;height:auto;display:block}
.tick{font-size:11px;fill:var(--soft)}
.grid{stroke:var(--grid);stroke-width:1}
.line{fill:none;stroke:var(--c);stroke-width:1.6;stroke-linejoin:round}
.line.a{stroke:var(--a)}.line.b{stroke:var(--b)}.line.c{stroke:var(--c)}
.line.thick{stroke-width:2.4}
.line.dashed,.line.threshold{stroke-dasharray:5 4;stroke-width:1.2}.line.middle{stroke-width:.8}
.line.threshold{stroke:var(--soft)}
.area{stroke:none;fill:var(--a-area)}
.dot{fill:var(--a);stroke:none}.dot.rejected{fill:var(--c)}.dot.outlier{fill:var(--bad)}.dot.b{fill:var(--b)}
.dot.accepted{fill:var(--good)}.dot.soft{fill:var(--c)}
.bar{fill:var(--c)}.bar.a{fill:var(--a)}
.legend{font-size:.82rem;color:var(--soft);display:flex;flex-wrap:wrap;gap:.1rem 1.1rem;margin:.2rem 0 0}
.legend i{display:inline-block;width:1.1rem;height:.22rem;border-radius:.1rem;vertical-align:middle;margin-right:.35rem;
background:var(--c)}
.legend i.dashed{background:repeating-linear-gradient(90deg,var(--c) 0 .25rem,transparent .25rem .42rem)}
.legend i.a{background:var(--a)}.legend i.b{background:var(--b)}.legend i.area{background:var(--a-area);height:.7rem}
.legend i.dot{width:.6rem;height:.6rem;border-radius:50%}.legend i.accepted{background:var(--good)}
.legend i.outlier{background:var(--bad)}
.outliers{font-size:.8rem;color:var(--bad);margin:.1rem 0 0}
.shares{display:flex;height:1.1rem;border-radius:.3rem;overflow:hidden;background:var(--sheet);margin:.6rem 0}
.shares i{display:block;min-width:2px}
.done{background:var(--good)}.waiting{background:var(--c)}.in_work{background:var(--a)}.rejected{background:var(--b)}
.quarantined{background:var(--bad)}
.legend i.done{background:var(--good)}.legend i.in_work{background:var(--a)}.legend i.rejected{background:var(--b)}
.legend i.quarantined{background:var(--bad)}
.scroll{overflow-x:auto;max-width:100%}
table{border-collapse:collapse;font-size:.86rem;margin:.4rem 0}
th{text-align:left;font-weight:600;color:var(--soft);white-space:nowrap}
th,td{padding:.28rem .9rem .28rem 0;border-bottom:1px solid var(--rule);vertical-align:top}
.path,.words{overflow-wrap:anywhere}.path{min-width:16rem}td.num,th.num{text-align:right;white-space:nowrap;font-variant-numeric:tabular-nums}
tr:has(.mark){background:var(--info-bg)}
.mark{color:var(--good);font-weight:600;white-space:nowrap}
.words{min-width:18rem;max-width:46rem}
.clock{white-space:nowrap;color:var(--soft);font-variant-numeric:tabular-nums}
code,pre{font:.82rem/1.45 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}
pre{background:var(--sheet);padding:.8rem 1rem;border-radius:.4rem;overflow:auto;white-space:pre-wrap}
details{margin:.6rem 0}summary{cursor:pointer;font-weight:600}
footer{margin-top:3rem;font-size:.82rem;color:var(--soft)}
@media print{
:root{color-scheme:light;--paper:#fff;--sheet:#f4f4f4;--ink:#000;--soft:#444;--rule:#ccc;--grid:#e4e4e4;--a:#1f5fa8;
--a-area:#1f5fa82e;--b:#d9822b;--c:#777;--good:#1d7f4e;--warn:#a15c00;--warn-bg:#fff;--bad:#b3262a;--info-bg:#fff}
*{print-color-adjust:exact;-webkit-print-color-adjust:exact}
html{font-size:11px}body{max-width:none;padding:0;font-size:1rem}nav{display:none}h2{margin-top:1.6rem}
h2{break-after:avoid}h3{break-after:avoid}tr,.tile,.note{break-inside:avoid}
.pair{grid-template-columns:1fr 1fr;gap:.7rem}.thirds{grid-template-columns:1fr 1fr 1fr}.words,.path{min-width:0}.scroll{overflow:visible}
details::details-content{content-visibility:visible;height:auto}
@page{margin:14mm}}
""".strip()
