"""The style sheet and the script that every page carries inside itself."""

STYLE = """
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);
font:16px/1.55 system-ui,-apple-system,'Segoe UI',Roboto,'DejaVu Sans',sans-serif}
.skip{position:absolute;left:-999em}.skip:focus{left:1rem;top:.5rem;background:var(--panel);
padding:.5rem}
header,main,footer{max-width:62rem;margin:0 auto;padding:0 1.25rem}
header{padding-top:2.25rem}
.kind{margin:0;color:var(--muted);font-size:.9rem;letter-spacing:.01em}
h1{font-size:clamp(1.35rem,1rem + 1.9vw,2.05rem);line-height:1.22;letter-spacing:-.015em;
margin:.35rem 0 .8rem;
text-wrap:balance;overflow-wrap:anywhere}
h2{font-size:1.2rem;line-height:1.3;margin:0 0 .6rem;letter-spacing:-.005em}
h3{font-size:1rem;margin:1.2rem 0 .4rem}
p{margin:.4rem 0 .8rem;max-width:46rem;overflow-wrap:anywhere}
.muted,figcaption{color:var(--muted)}
.verdict{display:flex;flex-wrap:wrap;gap:.5rem 1rem;align-items:center;margin:0 0 1rem}
.verdict p{margin:0;flex:1 1 18rem}
.badge{display:inline-block;padding:.28rem .8rem;border-radius:99px;font-weight:700;
white-space:nowrap;max-width:100%;
border:1.5px solid currentColor}
.badge.met{color:var(--met);background:var(--met-back)}
.badge.missed{color:var(--missed);background:var(--missed-back)}
.badge.unknown,.badge.undecided{color:var(--muted);background:var(--shade)}
nav ul{display:flex;flex-wrap:wrap;gap:.2rem 1.1rem;list-style:none;margin:0 0 1.4rem;padding:0;
font-size:.92rem}
a{color:var(--pruned)}
:focus-visible{outline:3px solid var(--second);outline-offset:2px;border-radius:3px}
section{background:var(--panel);border:1px solid var(--rule);border-radius:12px;
padding:1.25rem 1.4rem 1.1rem;margin:0 0 1.2rem}
.scroll{overflow-x:auto;margin:.2rem 0}
table{border-collapse:collapse;width:100%;font-size:.93rem;font-variant-numeric:tabular-nums}
caption{text-align:left;color:var(--muted);font-size:.88rem;padding:0 0 .35rem}
th,td{text-align:left;padding:.42rem .8rem .42rem 0;border-bottom:1px solid var(--rule);
vertical-align:baseline}
thead th{color:var(--muted);font-weight:600;font-size:.86rem;vertical-align:bottom}
tbody th{font-weight:600}
table:not(.facts) tbody th{min-width:clamp(7rem,22vw,12.5rem)}
caption span{display:inline-block;position:sticky;left:0;max-width:calc(100vw - 3.6rem)}
td.number,th.number{text-align:right;white-space:nowrap}
td.none{color:var(--muted);font-style:italic}
table.facts{width:auto}table.facts td{overflow-wrap:anywhere}
table.facts th{white-space:nowrap;padding-right:1.6rem}
tr.strong td,tr.strong th{font-weight:700}
td.key{color:var(--pruned)}
figure{margin:.2rem 0 .6rem}
figure svg{display:block;width:100%;height:auto;min-width:38rem}
figure.tile svg{min-width:0}
figure.lead svg{min-width:25rem}
figure.medium svg{min-width:28rem;max-width:43rem}
figcaption{font-size:.9rem;margin:.35rem 0 .2rem;max-width:48rem}
.tiles{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,24rem),1fr));
gap:1.2rem 1.6rem}
.tiles h3{margin:.2rem 0 .1rem;font-size:.95rem}
.tools{display:flex;flex-wrap:wrap;gap:.5rem;margin:.3rem 0 .5rem}
button{font:inherit;font-size:.8rem;color:var(--muted);background:none;
border:1px solid var(--rule);
border-radius:6px;padding:.14rem .6rem;cursor:pointer}
button:hover{color:var(--ink);border-color:var(--muted)}
details{margin:.3rem 0 .6rem}
summary{cursor:pointer;color:var(--muted);font-size:.92rem;padding:.15rem 0}
pre{overflow-x:auto;background:var(--shade);border-radius:8px;padding:.8rem 1rem;font-size:.84rem;
line-height:1.45}
ul.notes{margin:.2rem 0 .6rem;padding-left:1.2rem;overflow-wrap:anywhere}
ul.warnings li{border-left:4px solid var(--target);list-style:none;padding:.25rem .8rem;
margin:.4rem 0 .4rem -1.2rem;
background:var(--shade);border-radius:0 6px 6px 0}
footer{color:var(--muted);font-size:.86rem;padding-bottom:2.5rem}
.said{position:absolute;width:1px;height:1px;overflow:hidden;clip-path:inset(50%)}
@media(max-width:36rem){header,main,footer{padding-left:.7rem;padding-right:.7rem}
section{padding:1rem .8rem .8rem;border-radius:9px}
table.facts th{white-space:normal;padding-right:.8rem}}
@media print{body{background:#fff}section{break-inside:avoid;border:0;padding:0}
.tools,nav,.skip{display:none}}
"""

# A saved figure is the light one on white: a page variable means nothing in
# another program, so each `var(--role,#light)` becomes its light value.
SCRIPT = """
(function(){
'use strict';
var said=document.getElementById('said');
function tell(button,text){var old=button.textContent;said.textContent=text;
button.textContent=text;
 setTimeout(function(){button.textContent=old},1600)}
function copyByHand(text){var area=document.createElement('textarea');area.value=text;
 area.style.position='fixed';area.style.opacity='0';document.body.appendChild(area);area.select();
 var done=false;try{done=document.execCommand('copy')}catch(error){done=false}
 area.remove();return done}
function copy(button){var text=button.dataset.csv;
 function fallback(){tell(button,copyByHand(text)?'Copied':'Could not copy');button.focus()}
 if(navigator.clipboard&&navigator.clipboard.writeText){
  navigator.clipboard.writeText(text).then(function(){tell(button,'Copied')},fallback)}
 else{fallback()}}
function save(button){var drawing=button.closest('figure').querySelector('svg').cloneNode(true);
 var box=drawing.getAttribute('viewBox').split(' ');
 drawing.setAttribute('width',box[2]);drawing.setAttribute('height',box[3]);
 drawing.setAttribute('style','background:#fff');
 var text=new XMLSerializer().serializeToString(drawing)
  .replace(/var\\(--[a-z-]+,\\s*(#[0-9a-f]{6})\\)/g,'$1');
 var link=document.createElement('a');
 link.href=URL.createObjectURL(new Blob([text],{type:'image/svg+xml'}));
 link.download=button.dataset.name+'.svg';document.body.appendChild(link);link.click();
link.remove();
 setTimeout(function(){URL.revokeObjectURL(link.href)},1000);tell(button,'Saved')}
document.addEventListener('click',function(event){
 var button=event.target.closest('button');if(!button){return}
 if(button.classList.contains('copy')){copy(button)}
 if(button.classList.contains('save')){save(button)}});
})();
"""
