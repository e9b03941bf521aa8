"""Features laid out in the plane: a picture, and an interactive page that needs nothing but itself."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from stream.records.errors import ConfigurationError
from stream.store.files import replacing

_SEED = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class FeatureMap:
    """Points of one data set, and the name of each point's class under every way to colour it."""

    title: str
    points: NDArray[np.float32]
    """`(n, 2)`."""
    classes: Mapping[str, Sequence[str]]


def choose_embedding(wanted: str | None) -> str:
    """Return the method to use; raise where UMAP is asked for and not installed."""
    has_umap = importlib.util.find_spec("umap") is not None
    if wanted is None:
        return "umap" if has_umap else "tsne"
    if wanted == "umap" and not has_umap:
        raise ConfigurationError("--embedding", "umap needs umap-learn (pip install icestream[umap])", wanted)
    return wanted


def embed(features: NDArray[np.float32], method: str) -> NDArray[np.float32]:
    """Return features `(n, d)` as points `(n, 2)`; the seed is fixed."""
    if method == "pca":
        from sklearn.decomposition import PCA

        return np.asarray(PCA(n_components=2, random_state=_SEED).fit_transform(features), np.float32)
    if method == "umap":
        import umap

        reducer = umap.UMAP(
            n_neighbors=min(15, len(features) - 1), metric="cosine", random_state=_SEED, n_jobs=1
        )
        return np.asarray(reducer.fit_transform(features), np.float32)
    from sklearn.manifold import TSNE

    perplexity = min(30.0, (len(features) - 1) / 3.0)
    tsne = TSNE(
        metric="cosine",
        init="pca" if features.shape[1] > 1 else "random",
        perplexity=perplexity,
        random_state=_SEED,
    )
    return np.asarray(tsne.fit_transform(features), np.float32)


def write_png(path: Path, maps: Sequence[FeatureMap], method: str) -> None:
    """Write one panel per map and colouring."""
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = [(each, name) for each in maps for name in each.classes]
    figure = Figure(figsize=(6.0 * len(panels), 6.0), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, (each, name) in zip(axes, panels, strict=True):
        values = np.array(each.classes[name])
        kinds = sorted(set(values.tolist()))
        palette = colormaps["tab20" if len(kinds) > 10 else "tab10"]
        for number, kind in enumerate(kinds):
            chosen = values == kind
            axis.scatter(*each.points[chosen].T, s=4, color=palette(number % palette.N), label=kind)
        axis.set(title=f"{each.title}, by {name} ({method})", xticks=[], yticks=[])
        axis.legend(fontsize=6, markerscale=2, loc="best")
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")


def write_html(path: Path, maps: Sequence[FeatureMap], method: str) -> None:
    """Write the page: choose a map and a colouring, hide classes, zoom with the wheel, drag, point to read."""
    data = [
        {
            "title": each.title,
            "points": np.round(_scaled(each.points).astype(np.float64), 4).tolist(),
            "classes": {name: _coded(values) for name, values in each.classes.items()},
        }
        for each in maps
    ]
    # "</" would end the script element wherever it stood in a name.
    text = json.dumps(data, separators=(",", ":")).replace("</", "<\\/")
    page = _PAGE.replace("@METHOD@", escape(method)).replace("@DATA@", text)
    with replacing(path) as temporary:
        temporary.write_text(page, encoding="utf-8")


def _scaled(points: NDArray[np.float32]) -> NDArray[np.float32]:
    low, high = points.min(axis=0), points.max(axis=0)
    return np.asarray((points - low) / np.maximum(high - low, 1e-12), np.float32)


def _coded(values: Sequence[str]) -> dict[str, list[str] | list[int]]:
    kinds = sorted(set(values))
    place = {kind: number for number, kind in enumerate(kinds)}
    return {"names": kinds, "of": [place[value] for value in values]}


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Features</title>
<style>
body{margin:0;font:14px system-ui,sans-serif;display:flex;height:100vh;color:#222}
aside{width:16rem;padding:1rem;overflow:auto;border-right:1px solid #ddd}
canvas{flex:1;min-width:0;cursor:crosshair}
label{display:block;margin:.2rem 0}select{width:100%}
i{display:inline-block;width:.8rem;height:.8rem;border-radius:50%;margin-right:.4rem}
#tip{position:fixed;background:#222;color:#fff;padding:.3rem .5rem;border-radius:.3rem;pointer-events:none;display:none}
</style></head><body>
<aside><h3>Features by @METHOD@</h3>
<label>Data<select id="map"></select></label><label>Colour<select id="colour"></select></label>
<div id="legend"></div><p>Wheel: zoom. Drag: move. Double click: back. Point: classes.</p></aside>
<canvas id="c"></canvas><div id="tip"></div>
<script>
const DATA=@DATA@;
const $=id=>document.getElementById(id),c=$("c"),g=c.getContext("2d"),tip=$("tip");
let hidden=new Set(),view={x:0,y:0,s:1},drag=null;
const map=()=>DATA[$("map").value],cls=()=>map().classes[$("colour").value];
const hue=(i,n)=>`hsl(${360*i/n},70%,${i%2?38:52}%)`;
function place(p){const r=Math.min(c.width,c.height)*.92*view.s;
 return [c.width/2+(p[0]-.5)*r+view.x,c.height/2-(p[1]-.5)*r+view.y];}
function draw(){g.clearRect(0,0,c.width,c.height);const k=cls(),n=k.names.length;
 map().points.forEach((p,i)=>{const t=k.of[i];if(hidden.has(t))return;const [x,y]=place(p);
  g.fillStyle=hue(t,n);g.beginPath();g.arc(x,y,2.6,0,7);g.fill();});}
function legend(){const k=cls();$("legend").replaceChildren(...k.names.map((name,i)=>{
 const l=document.createElement("label"),b=document.createElement("input"),m=document.createElement("i");
 b.type="checkbox";b.checked=!hidden.has(i);m.style.background=hue(i,k.names.length);
 b.onchange=()=>{b.checked?hidden.delete(i):hidden.add(i);draw();};l.append(b,m,name);return l;}));}
function colours(){$("colour").replaceChildren(...Object.keys(map().classes).map(n=>new Option(n,n)));fresh();}
function fresh(){hidden=new Set();legend();draw();}
function size(){c.width=c.clientWidth;c.height=c.clientHeight;draw();}
DATA.forEach((d,i)=>$("map").append(new Option(d.title,i)));
$("map").onchange=()=>{view={x:0,y:0,s:1};colours();};$("colour").onchange=fresh;
c.onwheel=e=>{e.preventDefault();const f=Math.exp(-e.deltaY/400),x=e.offsetX-c.width/2,y=e.offsetY-c.height/2;
 view={x:x-(x-view.x)*f,y:y-(y-view.y)*f,s:view.s*f};draw();};
c.onmousedown=e=>drag=[e.clientX-view.x,e.clientY-view.y];onmouseup=()=>drag=null;
c.ondblclick=()=>{view={x:0,y:0,s:1};draw();};
c.onmousemove=e=>{if(drag){view.x=e.clientX-drag[0];view.y=e.clientY-drag[1];draw();return;}
 let best=-1,near=64;map().points.forEach((p,i)=>{if(hidden.has(cls().of[i]))return;const [x,y]=place(p),
  d=(x-e.offsetX)**2+(y-e.offsetY)**2;if(d<near){near=d;best=i;}});
 tip.style.display=best<0?"none":"block";if(best<0)return;
 tip.textContent=Object.entries(map().classes).map(([n,k])=>`${n}: ${k.names[k.of[best]]}`).join("; ")+` (image ${best+1})`;
 tip.style.left=e.clientX+12+"px";tip.style.top=e.clientY+12+"px";};
onresize=size;colours();size();
</script></body></html>
"""
