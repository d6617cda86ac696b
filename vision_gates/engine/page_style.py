"""How the pages of this package look, and the escaping of what they show. Light or dark as the reader's system is."""

import html
from typing import Any

__all__ = ["PAGE_STYLE", "escaped"]

PAGE_STYLE = """
:root{color-scheme:light dark;--page:#f4f6f8;--card:#fff;--ink:#17202b;--soft:#5a6675;--rule:#e1e6eb;--fill:#eef2f5;
--a:#0072b2;--b:#d55e00;--c:#009e73;--warn:#8a5a00}
@media(prefers-color-scheme:dark){:root{--page:#0e1318;--card:#171d24;--ink:#e7ecf1;--soft:#9aa7b5;--rule:#2a333d;
--fill:#222a33;--a:#56b4e9;--b:#e69f00;--c:#2fc59a;--warn:#f0c060}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);
font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif;font-variant-numeric:tabular-nums}
main{max-width:1120px;margin:0 auto;padding:36px 24px 64px}
header{display:flex;flex-wrap:wrap;gap:20px 48px;align-items:flex-end;justify-content:space-between;margin-bottom:26px}
h1{font-size:29px;line-height:1.2;margin:0 0 4px;overflow-wrap:anywhere}
h2{font-size:18px;margin:0 0 14px}h3{font-size:14px;margin:24px 0 10px}
p{margin:0 0 12px}.soft{color:var(--soft)}.small{font-size:13px}.note{color:var(--warn);font-size:13px}
.hero{display:flex;gap:14px;align-items:flex-end}.hero b{font-size:50px;line-height:1;font-weight:650;color:var(--a)}
.hero span{color:var(--soft);font-size:14px;line-height:1.35}
section{background:var(--card);border:1px solid var(--rule);border-radius:12px;padding:22px 24px;margin-bottom:20px}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(128px,1fr));gap:12px;margin-bottom:20px}
.tile{background:var(--fill);border-radius:9px;padding:10px 14px}.tile b{display:block;font-size:22px;font-weight:600}
.tile span{color:var(--soft);font-size:13px}
dl{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(420px,100%),1fr));gap:0 40px;margin:0}
dl div{display:flex;gap:14px;padding:7px 0;border-bottom:1px solid var(--rule)}
dt{flex:0 0 96px;color:var(--soft)}dd{margin:0;overflow-wrap:anywhere;min-width:0}dl .wide{grid-column:1/-1}
code,pre{font:12.5px/1.55 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}
pre{overflow:auto;margin:14px 0 0;background:var(--fill);border-radius:9px;padding:14px 16px}
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(300px,1fr));gap:24px 30px}
svg{display:block;width:100%;height:auto;overflow:visible}
svg text{fill:var(--soft);font-size:11px}svg .title{fill:var(--ink);font-size:13px;font-weight:600}
svg .key,svg .name{fill:var(--ink)}svg .grid{stroke:var(--rule)}svg .mark{stroke:var(--soft);stroke-dasharray:3 3}
svg .line{fill:none;stroke-width:2;stroke-linejoin:round;stroke-linecap:round}
svg .line.a{stroke:var(--a)}svg .line.b{stroke:var(--b)}svg .line.c{stroke:var(--c)}
svg .dot.a{fill:var(--a)}svg .dot.b{fill:var(--b)}svg .dot.c{fill:var(--c)}
svg .frame{fill:var(--fill)}svg .hit{fill:var(--a)}svg .slip{fill:var(--b)}
svg .count{fill:var(--ink)}svg .count.strong{fill:var(--card);font-weight:600}svg .pixels{image-rendering:pixelated}
.scroll{overflow-x:auto}
table{border-collapse:collapse;width:100%}th,td{text-align:right;padding:7px 12px;border-bottom:1px solid var(--rule)}
th{color:var(--soft);font-weight:500;font-size:13px;white-space:nowrap}
th:first-child,td:first-child{text-align:left;padding-left:0}tr.minor td{color:var(--soft)}
td{white-space:nowrap}td:first-child{white-space:normal;min-width:120px}
td i{display:inline-block;width:64px;height:6px;border-radius:3px;margin-right:10px;vertical-align:2px;background:
linear-gradient(var(--a),var(--a)) 0/var(--w) 100% no-repeat var(--fill)}
.split{display:grid;grid-template-columns:minmax(0,1fr) minmax(0,1fr);gap:36px;align-items:start}
.stack{display:grid;gap:24px}.stack .matrix{margin:0 auto}
@media(max-width:860px){.split{grid-template-columns:1fr}}
.legend{display:flex;flex-wrap:wrap;gap:6px 20px;margin:0 0 16px;font-size:13px}
.swatch{display:inline-block;width:12px;height:12px;border-radius:3px;margin-right:7px;vertical-align:-1px}
.samples{display:grid;grid-template-columns:repeat(auto-fill,minmax(500px,1fr));gap:22px 30px}
@media(max-width:600px){.samples{grid-template-columns:1fr}}
figure{margin:0;min-width:0}.views{display:grid;grid-template-columns:repeat(4,1fr);gap:4px}
.view{position:relative;width:min(100%,var(--most,100%));aspect-ratio:var(--shape);
background:#000 var(--image) center/100% 100% no-repeat;
border-radius:4px;overflow:hidden}
.view img{position:absolute;inset:0;width:100%;height:100%;image-rendering:pixelated}.view:hover img{opacity:0}
figcaption{font-size:13px;margin-top:6px;overflow-wrap:anywhere;line-height:1.4}
.plane{margin:2px 0 8px;font-size:12px;color:var(--soft)}
.volumes{grid-template-columns:repeat(auto-fill,minmax(min(470px,100%),1fr))}
.heads{display:grid;grid-template-columns:repeat(4,1fr);gap:4px;color:var(--soft);font-size:12px;margin-bottom:3px}
.badge{display:inline-block;border-radius:4px;padding:0 7px;margin-right:8px;font-size:12px;background:var(--b);
color:var(--card);font-weight:600}
.gallery{display:grid;grid-template-columns:repeat(auto-fill,minmax(150px,1fr));gap:18px}
.gallery img{display:block;width:100%;aspect-ratio:1;object-fit:contain;background:#000;border-radius:6px}
.gallery .tiny{image-rendering:pixelated}
.maps{display:grid;grid-template-columns:repeat(auto-fill,minmax(150px,1fr));gap:12px 8px;font-size:12px;
line-height:1.35}.maps .view img{image-rendering:auto}.maps .view .cells{image-rendering:pixelated}
.maps .heats::before{content:"";position:absolute;inset:0;background:inherit;filter:grayscale(1)}
.maps .heats:hover::before{opacity:0}
.maps p{margin:4px 0 0}.gates figure{margin-bottom:22px}
.bar{display:flex;flex-wrap:wrap;align-items:center;gap:4px 10px;font-size:13px;margin:0 0 16px}
.bar i{width:150px;height:11px;border-radius:3px}
.heat{width:auto;margin-bottom:14px}.heat td{text-align:center;border:2px solid var(--card);border-radius:5px;
padding:5px 12px}.heat th{text-align:center;border:0}
.heat td:first-child{text-align:left;min-width:0;white-space:nowrap}
.wrong{color:var(--b);font-weight:600}.right{color:var(--a);font-weight:600}
.side{position:absolute;color:#fff;text-shadow:0 0 3px #000,0 0 3px #000;
font-size:12px;font-weight:600;line-height:1;pointer-events:none}
.side.w{left:5px;top:50%;transform:translateY(-50%)}.side.e{right:5px;top:50%;transform:translateY(-50%)}
.side.n{top:5px;left:50%;transform:translateX(-50%)}.side.s{bottom:5px;left:50%;transform:translateX(-50%)}
summary{cursor:pointer;font-weight:600;font-size:18px}footer{color:var(--soft);font-size:13px;text-align:center}
"""


def escaped(value: Any) -> str:
    """Text of a value that is safe in HTML."""
    return html.escape(str(value))
