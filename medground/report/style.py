"""The page's style sheet and script, as text: a page is one file."""

STYLE = """
:root {
  color-scheme: light;
  --page: #f4f6f9; --card: #ffffff; --ink: #16202e; --muted: #5c6878; --line: #e1e6ed; --grid: #e9edf2;
  --wash: #f7f9fb;
  --s0: #2468d8; --s1: #d9730d; --s2: #0c8f7c; --s3: #8351c6; --s4: #cb3a60; --s5: #7d8796;
  --s6: #a68a00; --s7: #1a8fb8;
  --truth: #3ddc97; --before: #ff9f43; --after: #4cc2ff;
}
@media screen and (prefers-color-scheme: dark) {
  :root {
    color-scheme: dark;
    --page: #0e131a; --card: #171d26; --ink: #e8edf4; --muted: #98a4b5; --line: #2a323e; --grid: #232b36;
    --wash: #1c232d;
    --s0: #6aa5ff; --s1: #f59a45; --s2: #3cc4ae; --s3: #b48cf0; --s4: #f27a99; --s5: #96a1b1;
    --s6: #d9c14a; --s7: #5ec4e6;
  }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
main { max-width: 1180px; margin: 0 auto; padding: 32px 20px 48px; }
h1 { font-size: 30px; line-height: 1.15; letter-spacing: -0.02em; margin: 2px 0 16px; overflow-wrap: anywhere; }
h2 { font-size: 20px; letter-spacing: -0.01em; margin: 44px 0 14px; }
h3 { font-size: 13px; font-weight: 600; margin: 0; color: var(--muted); }
p { margin: 0 0 12px; }
small, .small, .note { font-size: 12.5px; color: var(--muted); }
.small { margin: 0; }
.eyebrow { margin: 0; font-size: 12px; font-weight: 600; letter-spacing: 0.08em; text-transform: uppercase;
  color: var(--s0); }
.facts { display: flex; flex-wrap: wrap; gap: 10px 28px; margin: 0; }
.facts dt { font-size: 12px; color: var(--muted); }
.facts dd { margin: 0; font-weight: 550; overflow-wrap: anywhere; }
.progress { margin: 18px 0 0; padding: 10px 14px; border: 1px solid var(--s1); border-radius: 10px;
  background: var(--card); }
.lead { max-width: 76ch; font-size: 16.5px; }
.nothing { color: var(--muted); font-style: italic; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(200px, 1fr)); gap: 12px; margin: 0 0 14px; }
.tile, .chart, .scroll, details { background: var(--card); border: 1px solid var(--line); border-radius: 12px; }
.tile { padding: 14px 16px 12px; }
.big { margin: 2px 0; font-size: 25px; line-height: 1.3; letter-spacing: -0.02em; font-variant-numeric: tabular-nums;
  white-space: nowrap; }
.big .old { color: var(--muted); font-size: 17px; }
.big .arrow { color: var(--muted); font-size: 17px; padding: 0 6px; }
.scroll { overflow-x: auto; margin: 0 0 12px; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: 9px 14px; text-align: left; vertical-align: top; border-top: 1px solid var(--line); }
thead tr:first-child > * { border-top: 0; }
thead th { font-size: 13px; vertical-align: bottom; }
th small, td small { display: block; font-weight: 400; }
tbody th { font-weight: 550; }
.metrics td { min-width: 118px; }
.metrics tbody th { min-width: 190px; }
.many td { min-width: 96px; padding: 9px 8px; } .many th { padding: 9px 8px; }
.many tbody th { min-width: 140px; } .many th:first-child { padding-left: 14px; }
.tile .small span { float: right; }
.none { color: var(--muted); }
.categories th, .categories td { padding: 6px 12px; vertical-align: middle; }
.categories thead th[colspan] { border-left: 1px solid var(--line); }
.categories .wide { width: 20%; min-width: 96px; }
.range { display: block; width: 100%; max-width: 150px; height: auto; margin-top: 4px; overflow: visible; }
.categories .range { margin: 0; }
.range .track { stroke: var(--line); }
.range rect { opacity: 0.35; }
.pair { display: grid; grid-template-columns: minmax(0, 1.75fr) minmax(0, 1fr); gap: 12px; align-items: start;
  margin-top: 18px; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(330px, 100%), 1fr)); gap: 12px; }
.chart { margin: 0; padding: 12px 12px 8px; min-width: 0; display: flex; flex-direction: column; }
.chart svg { width: 100%; height: auto; display: block; margin-top: auto; }
.chart .note { margin: 2px 0 0; text-align: right; }
figcaption { font-size: 13.5px; font-weight: 600; padding: 0 4px 2px; }
.legend { list-style: none; display: flex; flex-wrap: wrap; gap: 0 14px; margin: 0; padding: 0 4px; font-size: 12px;
  color: var(--muted); }
.legend i, .layer i { display: inline-block; width: 14px; height: 0; border-top: 3px solid; border-radius: 2px;
  margin-right: 5px; vertical-align: middle; }
svg text { fill: var(--muted); font-size: 10.5px; font-variant-numeric: tabular-nums; }
.grid { stroke: var(--grid); }
.axis { stroke: var(--muted); opacity: 0.6; }
.line { fill: none; stroke-width: 1.9; stroke-linejoin: round; stroke-linecap: round; stroke: currentColor; }
.line.raw { stroke-width: 1; opacity: 0.28; }
.band { opacity: 0.16; stroke: none; fill: currentColor; }
.area { opacity: 0.75; fill: currentColor; }
.dot, .range rect, .range circle { fill: currentColor; }
.s0 { color: var(--s0); } .s1 { color: var(--s1); } .s2 { color: var(--s2); }
.s3 { color: var(--s3); } .s4 { color: var(--s4); } .s5 { color: var(--s5); }
.s6 { color: var(--s6); } .s7 { color: var(--s7); }
.hover rect { fill: transparent; }
.hover line { stroke: var(--ink); opacity: 0; }
.hover:hover line { opacity: 0.45; }
.controls { display: flex; flex-wrap: wrap; align-items: center; gap: 8px 18px; margin: 8px 0 14px;
  font-size: 13.5px; }
.controls select { font: inherit; color: inherit; background: var(--card); border: 1px solid var(--line);
  border-radius: 8px; padding: 4px 6px; max-width: 190px; }
.layers { display: flex; flex-wrap: wrap; gap: 4px 14px; }
.layer { display: flex; align-items: center; gap: 5px; cursor: pointer; }
.layer i { width: 20px; height: 13px; border: 2px solid; border-radius: 0; margin: 0; background: #10151c padding-box; }
i.thought { color: var(--s5); border-style: dotted; }
i.truth { color: var(--truth); } i.before { color: var(--before); border-style: dashed;
  } i.after { color: var(--after); }
.gallery { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(204px, 46%), 1fr)); gap: 12px; }
.film { font: inherit; color: inherit; text-align: left; padding: 0; border: 1px solid var(--line);
  border-radius: 12px;
  overflow: hidden; background: var(--card); cursor: pointer; display: flex; flex-direction: column; }
.film:hover { border-color: var(--muted); }
.film:focus-visible, summary:focus-visible { outline: 2px solid var(--s0); outline-offset: 2px; }
.film[hidden] { display: none; }
.film svg, dialog svg { width: 100%; aspect-ratio: 1; background: #000; display: block; }
.film > .phrase { padding: 9px 12px 0; font-size: 13.5px; line-height: 1.35; overflow-wrap: anywhere;
  display: -webkit-box; -webkit-box-orient: vertical; -webkit-line-clamp: 3; overflow: hidden;
  unicode-bidi: isolate; }
.scores { padding: 3px 12px 10px; margin-top: auto; font-variant-numeric: tabular-nums; font-size: 13.5px; }
.scores .before { color: var(--s1); } .scores .after { color: var(--s0); font-weight: 650; }
.scores em { float: right; font-style: normal; font-size: 11.5px; color: var(--muted); border: 1px solid var(--line);
  border-radius: 6px; padding: 0 5px; margin-left: 4px; }
svg rect.truth, svg rect.before, svg rect.after { fill: none; stroke-width: 2; vector-effect: non-scaling-stroke; }
svg rect.truth { stroke: var(--truth); } svg rect.after { stroke: var(--after); }
svg rect.before { stroke: var(--before); stroke-dasharray: 5 4; }
svg rect.thought { stroke-width: 1.6; stroke-dasharray: 0.1 4.4; stroke-linecap: round; }
.gallery rect.thought { display: none; }
.no-truth rect.truth, .no-before rect.before, .no-after rect.after, .no-thought rect.thought { display: none; }
dialog { width: min(980px, 94vw); max-height: 92vh; padding: 0; border: 1px solid var(--line); border-radius: 14px;
  background: var(--card); color: var(--ink); }
dialog::backdrop { background: rgb(5 9 15 / 0.6); }
.opened { display: grid; grid-template-columns: minmax(0, 1fr) minmax(0, 1fr); }
.opened .words { padding: 18px 20px; overflow: auto; max-height: 90vh; }
.opened h3 { margin: 14px 0 2px; }
.opened h3::before { content: ""; display: inline-block; width: 16px; height: 10px; margin-right: 7px;
  border: 2px solid; background: #10151c padding-box; }
.opened h3.truth::before { border-color: var(--truth); } .opened h3.after::before { border-color: var(--after); }
.opened h3.before::before { border-color: var(--before); border-style: dashed; }
.opened .title { font-size: 17px; font-weight: 650; overflow-wrap: anywhere; margin: 0 0 4px; unicode-bidi: isolate; }
.opened pre { margin: 4px 0 0; padding: 9px 11px; background: var(--wash); border: 1px solid var(--line);
  border-radius: 8px;
  white-space: pre-wrap; overflow-wrap: anywhere; font-size: 12.5px; }
.opened .bar { display: flex; gap: 8px; margin-top: 18px; }
.opened .bar button { font: inherit; font-size: 13px; color: inherit; background: var(--wash);
  border: 1px solid var(--line);
  border-radius: 8px; padding: 4px 12px; cursor: pointer; }
details { padding: 10px 16px; margin: 0 0 10px; }
summary { cursor: pointer; font-weight: 600; }
details .scroll { border: 0; margin: 8px 0 0; }
.values th, .values td { padding: 3px 10px; font-size: 12.5px;
  font-family: ui-monospace, "DejaVu Sans Mono", monospace;
  overflow-wrap: anywhere; }
.values th { font-weight: 400; color: var(--muted); width: 34%; }
footer { margin-top: 40px; font-size: 12.5px; color: var(--muted); }
@media (max-width: 900px) { .pair { grid-template-columns: minmax(0, 1fr); } }
@media (max-width: 640px) {
  main { padding: 20px 12px 32px; }
  h1 { font-size: 24px; }
  .tiles { grid-template-columns: 1fr 1fr; gap: 8px; }
  .tile { padding: 10px 12px; }
  .big { font-size: 20px; } .big .old, .big .arrow { font-size: 14px; } .big .arrow { padding: 0 3px; }
  .opened { grid-template-columns: minmax(0, 1fr); }
  .tile .small span { display: block; float: none; }
  th, td { padding: 8px 9px; }
  .metrics td { min-width: 92px; } .metrics tbody th { min-width: 124px; }
}
@media print {
  body { background: #fff; } main { max-width: none; padding: 0; }
  .controls select, .controls output { display: none; }
  .scroll { overflow: visible; }
  .metrics th, .metrics td { min-width: 0; padding: 6px 4px; font-size: 11px; }
  .metrics small, .many tbody th { font-size: 9.5px; min-width: 0; }
  .pair { grid-template-columns: minmax(0, 1fr); } .pair .chart { max-width: 390px; }
  .charts { grid-template-columns: 1fr 1fr; }
  .gallery { grid-template-columns: repeat(4, 1fr); }
  .chart, .film, .tile, tr { break-inside: avoid; }
  h2 { break-after: avoid; }
}
"""

SCRIPT = """
(function () {
  "use strict";
  var source = document.getElementById("film-texts");
  if (!source) { return; }
  var films = JSON.parse(source.textContent);
  var gallery = document.getElementById("gallery");
  var controls = document.getElementById("controls");
  var dialog = document.getElementById("completions");
  var cards = Array.from(gallery.children);
  var order = {
    high: function (a, b) { return b.dataset.iou - a.dataset.iou; },
    low: function (a, b) { return a.dataset.iou - b.dataset.iou; },
    gain: function (a, b) { return b.dataset.gain - a.dataset.gain; }
  };

  function arrange() {
    var kind = controls.elements.kind.value, category = controls.elements.category.value;
    var sorted = cards.slice();
    if (controls.elements.sort.value) { sorted.sort(order[controls.elements.sort.value]); }
    var count = 0;
    sorted.forEach(function (card) {
      var fits = (!kind || card.dataset.kinds.split(" ").includes(kind)) &&
        (!category || card.dataset.category === category);
      card.hidden = !fits;
      count += fits;
      gallery.appendChild(card);
    });
    controls.elements.count.textContent = count + (count === 1 ? " film" : " films");
    controls.querySelectorAll("[data-layer]").forEach(function (box) {
      [gallery, dialog].forEach(function (place) {
        place.classList.toggle("no-" + box.dataset.layer, !box.checked);
      });
    });
  }

  // texts are set as text, never as markup
  function add(parent, tag, text, style) {
    var element = document.createElement(tag);
    if (text) { element.textContent = text; }
    if (style) { element.className = style; }
    return parent.appendChild(element);
  }

  function answer(words, name, found) {
    if (!found) { return; }
    add(words, "h3", name + " training: IoU " + found.iou, name);
    add(words, "p", found.boxes, "small");
    if (found.thoughts) { add(words, "p", "while thinking: " + found.thoughts, "small"); }
    add(words, "pre", found.text || "(empty)");
  }

  function open(card) {
    var film = films[card.dataset.index];
    var pressed = dialog.contains(document.activeElement) ? document.activeElement.textContent : "";
    dialog.replaceChildren();
    var opened = add(dialog, "div", "", "opened");
    opened.appendChild(card.querySelector("svg").cloneNode(true));
    var words = add(opened, "div", "", "words");
    add(words, "p", film.phrase, "title");
    add(words, "p", film.category + " · " + film.id, "small");
    add(words, "h3", "truth", "truth");
    add(words, "p", film.truth, "small");
    answer(words, "before", film.before);
    answer(words, "after", film.after);
    var bar = add(words, "div", "", "bar");
    [["previous", -1], ["next", 1]].forEach(function (item) {
      add(bar, "button", item[0]).onclick = function () { step(card, item[1]); };
    });
    add(bar, "button", "close").onclick = function () { dialog.close(); };
    dialog.onkeydown = function (event) {
      if (event.key === "ArrowLeft") { step(card, -1); }
      if (event.key === "ArrowRight") { step(card, 1); }
    };
    if (!dialog.open) { dialog.showModal(); }
    // what had the focus is gone, and keys with it
    var same = Array.from(bar.children).find(function (button) { return button.textContent === pressed; });
    (same || bar.children[1]).focus();
  }

  function step(card, by) {
    var shown = Array.from(gallery.children).filter(function (other) { return !other.hidden; });
    open(shown[(shown.indexOf(card) + by + shown.length) % shown.length]);
  }

  controls.addEventListener("change", arrange);
  gallery.addEventListener("click", function (event) {
    var card = event.target.closest(".film");
    if (card) { open(card); }
  });
  dialog.addEventListener("click", function (event) { if (event.target === dialog) { dialog.close(); } });
  arrange();
  document.documentElement.dataset.ready = String(films.length);
})();
"""

LIVE_SCRIPT = """
(function () {
  "use strict";
  // a page that is served asks for its version, and comes again, as it stood, when there is another
  var version = "VERSION", key = "medground", title = document.title;

  function fields() { return Array.from(document.querySelectorAll("main select, main input")); }
  function folds() { return Array.from(document.querySelectorAll("main details")); }
  function nameOf(field, at) { return field.name || field.dataset.layer || String(at); }
  function valueOf(field) { return field.type === "checkbox" ? field.checked : field.value; }

  function save() {
    var state = { y: window.scrollY, open: folds().map(function (fold) { return fold.open; }), fields: {} };
    fields().forEach(function (field, at) { state.fields[nameOf(field, at)] = valueOf(field); });
    sessionStorage.setItem(key, JSON.stringify(state));
  }

  function restore() {
    var state = JSON.parse(sessionStorage.getItem(key) || "null"), forms = new Set();
    sessionStorage.removeItem(key);
    if (!state) { return; }
    folds().forEach(function (fold, at) { fold.open = Boolean(state.open[at]); });
    fields().forEach(function (field, at) {
      var value = state.fields[nameOf(field, at)];
      if (value === undefined) { return; }
      if (field.type === "checkbox") { field.checked = value; }
      // a choice that is gone leaves the field as it is
      else if (!field.options || Array.from(field.options).some(function (o) { return o.value === value; })) {
        field.value = value;
      }
      if (field.form) { forms.add(field.form); }
    });
    forms.forEach(function (form) { form.dispatchEvent(new Event("change")); });
    window.scrollTo(0, state.y);
  }

  function look() {
    fetch("/version", { cache: "no-store" }).then(function (answer) {
      if (!answer.ok) { throw new Error(String(answer.status)); }
      return answer.text();
    }).then(function (now) {
      document.title = title;
      // who reads a film's answers is not disturbed
      if (now !== version && !document.querySelector("dialog[open]")) { save(); location.reload(); }
    }).catch(function () { document.title = "(not served) " + title; });
  }

  if ("scrollRestoration" in history) { history.scrollRestoration = "manual"; }
  restore();
  document.documentElement.dataset.version = version;
  setInterval(look, 3000);
})();
"""
