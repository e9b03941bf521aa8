"""The orientation diagnostics as one HTML file that needs nothing else: numbers, cFSC fan, map of directions, views.

Everything is inline (data as base64 bytes, drawing in plain JavaScript on SVG and canvas), so that the file can be
mailed and opened offline. Pointing at a direction shows its conical FSC beside all others.
"""

from __future__ import annotations

import base64
import html
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from models.reconstruction.figures import VIEW_ORDER, view_histogram
from models.reconstruction.fsc import GOLD_STANDARD_THRESHOLD
from models.reconstruction.grids import healpix_directions
from models.reconstruction.orientation import CFAR_LIMIT, SCF_LIMIT, OrientationDiagnostics

_UNDEFINED = -128
"""Marks an empty cone where correlations are stored in hundredths."""


def write_orientation_page(
    diagnostics: OrientationDiagnostics,
    path: Path,
    *,
    title: str = "",
    resolution_angstrom: float | None = None,
) -> None:
    """Write the page; `resolution_angstrom` is the corrected half-map resolution if it is known."""
    data = json.dumps(_page_data(diagnostics), separators=(",", ":"), allow_nan=False)
    page = (
        _PAGE.replace("@TITLE@", html.escape(title or "Orientation diagnostics"))
        .replace("@ROWS@", _rows(diagnostics, resolution_angstrom))
        .replace("@DATA@", data)
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")


def _page_data(diagnostics: OrientationDiagnostics) -> dict[str, Any]:
    """Return what the script draws; curves as lists with null where undefined."""
    cfsc = torch.nan_to_num(diagnostics.cfsc * 100.0, nan=float(_UNDEFINED)).round().clamp(-128, 100)
    document: dict[str, Any] = {
        "box": diagnostics.box_px * diagnostics.pixel_size_angstrom,
        "threshold": GOLD_STANDARD_THRESHOLD,
        "shells": int(diagnostics.cfsc.shape[1]),
        "cfsc": base64.b64encode(cfsc.to(torch.int8).numpy().tobytes()).decode("ascii"),
        "directions": _rounded(diagnostics.directions.flatten(), 4),
        "resolution": _rounded(diagnostics.direction_resolution_angstrom, 2),
        "signal": _rounded(diagnostics.relative_signal, 3),
        "mean": _rounded(diagnostics.cfsc_mean, 4),
        "low": _rounded(diagnostics.cfsc_min, 4),
        "high": _rounded(diagnostics.cfsc_max, 4),
        "sd": _rounded(diagnostics.cfsc_sd, 4),
        "global": _rounded(diagnostics.global_fsc, 4),
        "fso": _rounded(diagnostics.fso, 4),
        "views": None,
    }
    if diagnostics.views is not None:
        _, counts = view_histogram(diagnostics.views)
        document["views"] = [int(c) for c in counts]
        document["viewDirections"] = _rounded(healpix_directions(VIEW_ORDER).flatten(), 4)
    return document


def _rounded(values: Float[Tensor, " n"], digits: int) -> list[float | None]:
    return [None if math.isnan(v) else round(v, digits) for v in np.asarray(values, dtype=float).tolist()]


def _rows(diagnostics: OrientationDiagnostics, resolution_angstrom: float | None) -> str:
    """Return the table of numbers, each with what it is to be compared with."""
    null = diagnostics.cfar_null
    versus = f"isotropic maps like these: {null:.2f}; " if null is not None else ""
    rows = [
        (
            "resolution (FSC 0.143, corrected)",
            "none" if resolution_angstrom is None else f"{resolution_angstrom:.2f} Å",
            "one number for all directions: blind to missing views",
        ),
        (
            "cFAR",
            f"{diagnostics.cfar:.3f}",
            f"{versus}below {CFAR_LIMIT} in large boxes: directions are missing",
        ),
        (
            "worst to best direction",
            f"{diagnostics.worst_resolution_angstrom:.1f} to {diagnostics.best_resolution_angstrom:.1f} Å",
            "conical FSC, 20° half-angle, crossing of 0.143",
        ),
        ("sphericity (3DFSC)", f"{diagnostics.sphericity:.3f}", "1 = sphere; Fourier body at 0.5"),
        (
            "relative signal",
            f"{float(diagnostics.relative_signal.min()):.2f} to {float(diagnostics.relative_signal.max()):.2f}",
            "by view, 1 = average (icestream's definition)",
        ),
    ]
    if diagnostics.scf_star is not None and diagnostics.view_efficiency is not None:
        n = 0 if diagnostics.views is None else len(diagnostics.views)
        rows += [
            ("SCF*", f"{diagnostics.scf_star:.3f}", f"from {n:,} views; even views: above {SCF_LIMIT}"),
            ("E_od", f"{diagnostics.view_efficiency:.3f}", "efficiency of the views; good: above 0.8"),
        ]
    return "".join(
        f"<tr><th>{html.escape(a)}</th><td>{html.escape(b)}</td><td class=n>{html.escape(c)}</td></tr>"
        for a, b, c in rows
    )


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">
<title>@TITLE@</title>
<style>
body{font:14px/1.45 system-ui,sans-serif;margin:1.2rem auto;max-width:1180px;padding:0 1rem;color:#1c2733;background:#fff}
h1{font-size:1.25rem;margin:.2rem 0 .6rem}h2{font-size:1rem;margin:.2rem 0}
table{border-collapse:collapse;margin-bottom:1rem}th{text-align:left;font-weight:500;padding:.15rem 1rem .15rem 0}
td{padding:.15rem 1rem .15rem 0;font-variant-numeric:tabular-nums}.n{color:#66717d}
.g{display:grid;grid-template-columns:repeat(auto-fit,minmax(460px,1fr));gap:1.2rem}
svg,canvas{width:100%;height:auto;display:block}button{font:inherit;border:1px solid #b8c2cc;background:#f4f6f8;
border-radius:4px;padding:.1rem .6rem;margin-right:.3rem;cursor:pointer}button.on{background:#1f5fa8;color:#fff}
#tip{min-height:1.5em;color:#1f5fa8}text{font-size:11px;fill:#333}
</style></head><body>
<h1>@TITLE@</h1><table>@ROWS@</table>
<div class="g"><div><h2>Conical FSC of all directions</h2><svg id="fan" viewBox="0 0 560 360"></svg>
<div id="tip">Point at a direction on the map; click to hold it.</div></div>
<div><h2 id="maptitle"></h2><div id="buttons"></div><canvas id="map" width="1040" height="520"></canvas>
<canvas id="bar" width="1040" height="46"></canvas></div>
<div><h2>Crossing of 0.143 by direction</h2><svg id="hist" viewBox="0 0 560 240"></svg></div></div>
<script id="data" type="application/json">@DATA@</script>
<script>
"use strict";
const D=JSON.parse(document.getElementById("data").textContent);
const raw=Uint8Array.from(atob(D.cfsc),c=>c.charCodeAt(0)),C=new Int8Array(raw.buffer),S=D.shells,N=D.directions.length/3;
const el=(t,a,p)=>{const e=document.createElementNS("http://www.w3.org/2000/svg",t);for(const k in a)e.setAttribute(k,a[k]);p.appendChild(e);return e};
// ---- curves
const fan=document.getElementById("fan"),L=46,R=548,T=12,B=312,fx=s=>L+(R-L)*s/(S-1),fy=v=>B-(B-T)*(v+.1)/1.15;
function path(v){let p="",on=false;v.forEach((y,s)=>{if(y===null||s<1){on=false;return}p+=(on?"L":"M")+fx(s).toFixed(1)+" "+fy(y).toFixed(1);on=true});return p}
const cut=el("clipPath",{id:"c"},el("defs",{},fan));el("rect",{x:L,y:T,width:R-L,height:B-T},cut);
function band(lo,hi,o){const a=[],b=[];for(let s=1;s<S;s++)if(lo[s]!==null){a.push(fx(s)+","+fy(lo[s]));b.unshift(fx(s)+","+fy(hi[s]))}
 el("polygon",{points:a.concat(b).join(" "),fill:"#1f5fa8","fill-opacity":o,"clip-path":"url(#c)"},fan)}
function axis(svg,bottom,label){for(let i=1;i<=6;i++){const s=(S-1)*i/6,x=fx(s);el("line",{x1:x,x2:x,y1:bottom,y2:bottom+4,stroke:"#333"},svg);
 const t=el("text",{x:x,y:bottom+17,"text-anchor":"middle"},svg);t.textContent=(D.box/s).toFixed(1)}
 const t=el("text",{x:(L+R)/2,y:bottom+34,"text-anchor":"middle"},svg);t.textContent=label;el("line",{x1:L,x2:R,y1:bottom,y2:bottom,stroke:"#333"},svg)}
band(D.low,D.high,.13);band(D.mean.map((m,i)=>m===null?null:m-D.sd[i]),D.mean.map((m,i)=>m===null?null:m+D.sd[i]),.28);
[[D.mean,"#1f5fa8",2,""],[D.global,"#111",1.2,""],[D.fso,"#d9822b",1.5,"2 3"]].forEach(c=>el("path",{d:path(c[0]),fill:"none",stroke:c[1],"stroke-width":c[2],"stroke-dasharray":c[3],"clip-path":"url(#c)"},fan));
el("line",{x1:L,x2:R,y1:fy(D.threshold),y2:fy(D.threshold),stroke:"#333","stroke-dasharray":"5 4","stroke-width":.8},fan);
[0,.143,.5,1].forEach(v=>{const t=el("text",{x:L-6,y:fy(v)+4,"text-anchor":"end"},fan);t.textContent=v});
el("line",{x1:L,x2:L,y1:T,y2:B,stroke:"#333"},fan);axis(fan,B,"resolution / Å");
el("rect",{x:R-240,y:T-4,width:246,height:74,fill:"#fff","fill-opacity":.8},fan);
[["mean, ± SD, range of directions","#1f5fa8"],["global FSC","#111"],["share of directions above 0.143 (FSO)","#d9822b"],["the direction pointed at","#b3262a"]].forEach((l,i)=>{
 el("rect",{x:R-232,y:T+4+i*16,width:14,height:3,fill:l[1]},fan);const t=el("text",{x:R-213,y:T+9+i*16},fan);t.textContent=l[0]});
const one=el("path",{"clip-path":"url(#c)",fill:"none",stroke:"#b3262a","stroke-width":1.8},fan);
// ---- histogram of crossings
const hist=document.getElementById("hist"),count=new Array(S).fill(0);
D.resolution.forEach(r=>count[Math.min(S-1,Math.round(D.box/r))]++);
const most=Math.max(...count),hb=190;
count.forEach((c,s)=>{if(c)el("rect",{x:fx(s)-.42*(R-L)/S,width:.84*(R-L)/S,y:hb-(hb-14)*c/most,height:(hb-14)*c/most,fill:"#1f5fa8"},hist)});
axis(hist,hb,"resolution / Å");const mt=el("text",{x:L+4,y:12},hist);mt.textContent="highest bar: "+(100*most/N).toFixed(0)+" % of directions";
// ---- map of the sphere (Mollweide)
const stops=[[68,1,84],[59,82,139],[33,145,140],[94,201,98],[253,231,37]];
function colour(t){t=Math.max(0,Math.min(.9999,t))*4;const i=Math.floor(t),f=t-i;return stops[i].map((c,k)=>c+(stops[i+1][k]-c)*f)}
const map=document.getElementById("map"),g=map.getContext("2d"),W=map.width,H=map.height;
function vector(px,py){const x=(px+.5)/W*2-1,y=1-(py+.5)/H*2;if(x*x+y*y>1)return null;const th=Math.asin(y),lat=Math.asin((2*th+Math.sin(2*th))/Math.PI),
 lon=Math.PI*x/Math.max(1e-9,Math.cos(th));return[Math.cos(lat)*Math.cos(lon),Math.cos(lat)*Math.sin(lon),Math.sin(lat),lon,lat]}
function nearest(v,dirs,fold){let best=-2,at=0;for(let i=0,j=0;j<dirs.length;i++,j+=3){let c=v[0]*dirs[j]+v[1]*dirs[j+1]+v[2]*dirs[j+2];if(fold&&c<0)c=-c;if(c>best){best=c;at=i}}return at}
const step=4,cache={};
function lookup(key,dirs,fold){if(cache[key])return cache[key];const a=new Int32Array((W/step)*(H/step)).fill(-1);
 for(let y=0;y<H/step;y++)for(let x=0;x<W/step;x++){const v=vector(x*step+1.5,y*step+1.5);if(v)a[y*W/step+x]=nearest(v,dirs,fold)}return cache[key]=a}
const kinds={resolution:["Resolution by direction (Å at cFSC 0.143)",D.resolution,true],signal:["Relative signal by view (below 1: such views are missed)",D.signal,false]};
if(D.views)kinds.views=["Views: particles per 7° bin",D.views,false];
let kind="resolution";
function draw(k){kind=k;const[title,values,flip]=kinds[k],at=k==="views"?lookup("v",D.viewDirections,false):lookup("d",D.directions,true);
 let lo=Math.min(...values),hi=Math.max(...values);if(k==="views")lo=0;if(hi<=lo)hi=lo+1;
 g.clearRect(0,0,W,H);for(let y=0;y<H/step;y++)for(let x=0;x<W/step;x++){const i=at[y*W/step+x];if(i<0)continue;
  let t=(values[i]-lo)/(hi-lo);if(flip)t=1-t;const c=colour(t);g.fillStyle="rgb("+c.map(Math.round)+")";g.fillRect(x*step,y*step,step,step)}
 g.strokeStyle="#fff8";g.lineWidth=1;for(let lon=-120;lon<=120;lon+=60){g.beginPath();for(let i=-90;i<=90;i+=3){let th=i*Math.PI/180,la=th;for(let n=0;n<8;n++)th-=(2*th+Math.sin(2*th)-Math.PI*Math.sin(la))/(2+2*Math.cos(2*th)+1e-6);
  const X=W/2*(1+lon/180*Math.cos(th)),Y=H/2*(1-Math.sin(th));i===-90?g.moveTo(X,Y):g.lineTo(X,Y)}g.stroke()}
 document.getElementById("maptitle").textContent=title;const b=document.getElementById("bar").getContext("2d");b.clearRect(0,0,W,46);
 for(let x=0;x<W/2;x++){let t=x/(W/2);const c=colour(flip?1-t:t);b.fillStyle="rgb("+c.map(Math.round)+")";b.fillRect(W/4+x,4,1,14)}
 b.fillStyle="#333";b.font="20px system-ui,sans-serif";b.textAlign="center";const f=v=>k==="views"?v.toFixed(0):k==="signal"?v.toFixed(2):v.toFixed(1);
 b.fillText(f(lo),W/4,40);b.fillText(f((lo+hi)/2),W/2,40);b.fillText(f(hi),3*W/4,40);
 document.querySelectorAll("button").forEach(x=>x.classList.toggle("on",x.dataset.k===k))}
for(const[k,name]of[["resolution","resolution"],["signal","relative signal"],["views","views"]])if(kinds[k]){const b=document.createElement("button");
 b.textContent=name;b.dataset.k=k;b.onclick=()=>draw(k);document.getElementById("buttons").appendChild(b)}
let held=false;
function show(e){const r=map.getBoundingClientRect(),v=vector((e.clientX-r.left)*W/r.width,(e.clientY-r.top)*H/r.height);if(!v)return;
 const i=nearest(v,D.directions,true),y=[];for(let s=0;s<S;s++){const c=C[i*S+s];y.push(c===-128?null:c/100)}one.setAttribute("d",path(y));
 let t="longitude "+(v[3]*180/Math.PI).toFixed(0)+"°, latitude "+(v[4]*180/Math.PI).toFixed(0)+"°: "+D.resolution[i].toFixed(1)+" Å, relative signal "+D.signal[i].toFixed(2);
 if(D.views)t+=", "+D.views[nearest(v,D.viewDirections,false)]+" particles see it head-on";document.getElementById("tip").textContent=t}
map.onmousemove=e=>{if(!held)show(e)};map.onclick=e=>{held=!held;show(e)};
const asked=location.hash.slice(1);draw(kinds[asked]?asked:"resolution");
</script></body></html>
"""
