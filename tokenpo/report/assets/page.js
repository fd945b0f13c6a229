(() => {
  "use strict";
  const byId = (id) => document.getElementById(id);
  const read = (node) => (node ? JSON.parse(node.textContent) : []);
  const make = (tag, name, content) => {
    const node = document.createElement(tag);
    if (name) node.className = name;
    if (content !== undefined) node.textContent = content;
    return node;
  };
  const number = (value, signed) => {
    if (value === null || value === undefined) return "–";
    const size = Math.abs(value);
    const digits = size === 0 ? "0" : size >= 1000 || size < 0.001 ? size.toPrecision(3) : size.toFixed(size >= 100 ? 1 : 3);
    return (value < 0 ? "−" : signed && value > 0 ? "+" : "") + digits;
  };

  const sum = (value, signed) => `${value < 0 ? "−" : signed && value > 0 ? "+" : ""}${Math.abs(value).toFixed(2)}`;

  // Heat maps -------------------------------------------------------------------------------------------------------
  const layers = read(byId("layers"));
  const SHADES = 12;
  const SLOTS = ["--a", "--b", "--c", "--d", "--e", "--f"];
  const main = byId("main");
  const card = byId("card");
  const built = new Map(); // .side -> {box, text, data, spans}
  let stacked = false;
  let active = [];

  const shade = (layer, value) => {
    if (!value) return "transparent";
    const step = Math.min(SHADES, Math.ceil((Math.abs(value) / layer.limit) * SHADES));
    return `var(--${value < 0 ? "n" : layer.signed ? "p" : "s"}${step})`;
  };

  const paint = (state) => {
    if (!state.spans) return;
    const columns = active.map((i) => state.data.v[i]);
    for (const span of state.spans) {
      columns.forEach((values, slot) =>
        span.style.setProperty(SLOTS[slot], values ? shade(layers[active[slot]], values[span.piece]) : "transparent"));
    }
  };

  const sums = (side, state) => {
    const line = side.querySelector(".sums");
    line.replaceChildren();
    for (const i of active) {
      const values = state.data.v[i];
      if (!values) continue;
      if (line.childNodes.length) line.append(" · ");
      const item = make("span", "", `Σ ${layers[i].title} `);
      item.append(make("b", "", sum(values.reduce((a, b) => a + (b || 0), 0), layers[i].signed)));
      line.append(item);
    }
  };

  const build = (side, all, index) => {
    const box = side.querySelector(".text");
    let state = built.get(side);
    if (!state) built.set(side, (state = { box, text: box.textContent, data: all()[index], spans: null }));
    if (state.spans) return;
    const { n, c, s } = state.data;
    const whole = document.createDocumentFragment();
    state.spans = [];
    let at = 0, token = 0;
    for (let run = 0; run < n.length; run++) {
      const part = state.text.slice(at, at + n[run]);
      at += n[run];
      if (!c[run]) { whole.append(part); continue; }
      const span = make("span", n[run] ? (/^[ \t]*\n+[ \t]*$/.test(part) ? "t nl" : "t") : "t odd", n[run] ? part : s[run]);
      span.piece = state.spans.length;
      span.token = token;
      span.count = c[run];
      span.tabIndex = token ? -1 : 0;
      token += c[run];
      state.spans.push(span);
      whole.append(span);
    }
    state.total = token;
    box.replaceChildren(whole);
    paint(state);
    sums(side, state);
  };

  const fold = (side) => {
    const state = built.get(side);
    if (!state || !state.spans || side.contains(document.activeElement)) return;
    state.spans = null;
    state.box.textContent = state.text;
  };

  const visit = (entries) => {
    for (const { target, isIntersecting } of entries) {
      let found = null;
      const all = () => (found = found || read(target.querySelector("script.data")));
      target.querySelectorAll(".side").forEach((side, i) => {
        waiting.delete(side);
        if (isIntersecting) waiting.set(side, () => build(side, all, i));
        else fold(side);
      });
    }
    work();
  };

  const waiting = new Map(); // one response a frame, so that scrolling stays smooth
  let working = false;
  const work = () => {
    if (working || !waiting.size) return;
    working = true;
    const [side, task] = waiting.entries().next().value;
    waiting.delete(side);
    task();
    requestAnimationFrame(() => { working = false; work(); });
  };

  const legend = (layer, place) => {
    const node = make("div", "legend"), name = make("b", "", layer.title);
    if (stacked) name.prepend(make("i", "", String(place + 1)));
    node.append(name, make("div", `strip ${layer.signed ? "signed" : "rising"}`));
    const ticks = make("div", "ticks");
    const end = number(layer.limit, layer.signed);
    if (layer.signed) ticks.append(make("span", "", number(-layer.limit, true)));
    ticks.append(make("span", "", "0"), make("span", "", `${end}${layer.unit ? " " + layer.unit : ""}`));
    node.append(ticks);
    node.title = `${layer.note} Colours end at the 98% quantile of the size of the values.`;
    return node;
  };

  const choose = (list) => {
    active = list.slice(0, SLOTS.length);
    main.className = stacked ? `stacked k${active.length}` : "";
    document.querySelectorAll(".chip").forEach((chip) =>
      chip.setAttribute("aria-pressed", String(active.includes(Number(chip.dataset.layer)))));
    byId("stack").setAttribute("aria-pressed", String(stacked));
    byId("legends").replaceChildren(...active.map((i, place) => legend(layers[i], place)));
    built.forEach((state, side) => { paint(state); sums(side, state); });
  };

  const press = (button) => {
    if (button.id === "stack") {
      stacked = !stacked;
      return choose(stacked ? preferred() : active.slice(0, 1));
    }
    const layer = Number(button.dataset.layer);
    if (!stacked) return choose([layer]);
    const rest = active.includes(layer) ? active.filter((i) => i !== layer) : [...active, layer].sort((a, b) => a - b);
    if (rest.length) choose(rest);
  };

  const preferred = () => {
    const wanted = layers.map((layer, i) => (layer.shown ? i : -1)).filter((i) => i >= 0);
    return wanted.length ? wanted : active.length ? active : [0];
  };

  const visible = (content) => content.replace(/ /g, "␣").replace(/\n/g, "↵").replace(/\t/g, "⇥").replace(
    /[\p{Cf}\p{Cc}\u2028\u2029]/gu, (c) => `⟨U+${c.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}⟩`);

  const show = (span) => {
    const state = built.get(span.closest(".side"));
    const last = span.token + span.count;
    const where = span.count === 1 ? `token ${last}` : `tokens ${span.token + 1}–${last}, values summed`;
    const table = make("table");
    layers.forEach((layer, i) => {
      const values = state.data.v[i];
      if (!values) return;
      const value = values[span.piece];
      const row = make("tr"), head = make("th"), cell = make("td", "", number(value, layer.signed));
      const swatch = make("span", "swatch");
      swatch.style.setProperty("--a", shade(layer, value));
      head.scope = "row";
      head.append(swatch, layer.title);
      if (layer.unit) cell.append(" ", make("small", "", layer.unit));
      row.append(head, cell);
      table.append(row);
    });
    card.replaceChildren(
      make("div", "what", visible(span.textContent)), make("div", "where", `${where} of ${state.total}`), table);
    card.hidden = false;
    const box = span.getClientRects()[0], size = card.getBoundingClientRect();
    const below = box.bottom + 8 + size.height < innerHeight;
    card.style.left = `${Math.max(8, Math.min(box.left, innerWidth - size.width - 8))}px`;
    card.style.top = `${below ? box.bottom + 8 : Math.max(8, box.top - size.height - 8)}px`;
  };

  const walk = (span, key) => {
    const { spans } = built.get(span.closest(".side"));
    const i = spans.indexOf(span);
    const to = { ArrowRight: i + 1, ArrowDown: i + 10, ArrowLeft: i - 1, ArrowUp: i - 10, Home: 0, End: spans.length - 1 }[key];
    if (to === undefined) return false;
    const next = spans[Math.max(0, Math.min(spans.length - 1, to))];
    span.tabIndex = -1;
    next.tabIndex = 0;
    next.focus();
    return true;
  };

  if (layers.length) {
    stacked = preferred().length > 1;
    choose(preferred());
    const watch = new IntersectionObserver(visit, { rootMargin: "700px" });
    document.querySelectorAll(".heat").forEach((group) => watch.observe(group));
    const token = (event) => (event.target.closest ? event.target.closest(".t") : null);
    document.addEventListener("click", (event) => {
      const button = event.target.closest("button");
      if (button) press(button);
    });
    document.addEventListener("pointerover", (event) => {
      const span = token(event);
      if (span) show(span);
      else if (!document.activeElement.classList.contains("t")) card.hidden = true;
    });
    document.addEventListener("focusin", (event) => {
      const span = token(event);
      if (!span) return;
      span.setAttribute("aria-describedby", "card");
      show(span);
    });
    document.addEventListener("focusout", (event) => {
      const span = token(event);
      if (!span) return;
      span.removeAttribute("aria-describedby");
      card.hidden = true;
    });
    document.addEventListener("keydown", (event) => {
      if (event.key === "Escape") card.hidden = true;
      const span = token(event);
      if (span && !event.ctrlKey && !event.metaKey && !event.altKey && walk(span, event.key)) event.preventDefault();
    });
    addEventListener("scroll", () => { if (!document.activeElement.classList.contains("t")) card.hidden = true; }, { passive: true });
  }

  // Curves ----------------------------------------------------------------------------------------------------------
  const panels = read(byId("panels"));
  const WIDE = 380, HIGH = 210, LEFT = 46, RIGHT = 10, TOP = 10, BOTTOM = 24;
  const svgNode = (tag, attributes, content) => {
    const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
    if (content !== undefined) node.textContent = content;
    return node;
  };
  const ticks = (low, high, count) => {
    const rough = (high - low) / count, power = 10 ** Math.floor(Math.log10(rough));
    const step = [1, 2, 5, 10].map((m) => m * power).find((s) => s >= rough);
    const found = [];
    for (let x = Math.ceil(low / step) * step; x <= high + step * 1e-6; x += step) found.push(Number(x.toPrecision(12)));
    return found;
  };
  const smoothed = (points, weight) => {
    let mean = 0, mass = 0;
    return points.map(([x, y]) => {
      mean = weight * mean + (1 - weight) * y;
      mass = weight * mass + (1 - weight);
      return [x, mean / mass];
    });
  };

  const draw = (figure, weight) => {
    const panel = panels[Number(figure.dataset.panel)];
    const all = panel.series.flatMap((series) => series.points);
    const xs = all.map((p) => p[0]), ys = all.map((p) => p[1]).concat(panel.line ? [panel.line[1]] : []);
    const range = (values) => values.reduce(([a, b], v) => [Math.min(a, v), Math.max(b, v)], [Infinity, -Infinity]);
    const [left, right] = range(xs);
    let [low, high] = range(ys);
    const pad = (high - low) * 0.06 || Math.abs(high) * 0.1 || 1;
    low -= pad; high += pad;
    const px = (x) => LEFT + ((x - left) / (right - left || 1)) * (WIDE - LEFT - RIGHT);
    const py = (y) => TOP + ((high - y) / (high - low)) * (HIGH - TOP - BOTTOM);
    const path = (points) => points.map(([x, y], i) => `${i ? "L" : "M"}${px(x).toFixed(1)},${py(y).toFixed(1)}`).join("");
    const svg = svgNode("svg", { viewBox: `0 0 ${WIDE} ${HIGH}`, role: "img" });
    for (const y of ticks(low, high, 4)) {
      svg.append(svgNode("line", { class: "axis", x1: LEFT, x2: WIDE - RIGHT, y1: py(y), y2: py(y) }),
        svgNode("text", { class: "tick", x: LEFT - 6, y: py(y) + 4, "text-anchor": "end" }, String(y)));
    }
    for (const x of ticks(left, right, 5)) {
      svg.append(svgNode("text", { class: "tick", x: px(x), y: HIGH - 6, "text-anchor": "middle" }, String(x)));
    }
    if (panel.line) svg.append(svgNode("line", { class: "mark", x1: LEFT, x2: WIDE - RIGHT, y1: py(panel.line[1]), y2: py(panel.line[1]) }));
    const curves = panel.series.map((series) => (series.points.length > 24 ? smoothed(series.points, weight) : series.points));
    panel.series.forEach((series, i) => {
      if (curves[i] !== series.points) svg.append(svgNode("path", { class: `raw c${i % 5}`, d: path(series.points) }));
      svg.append(svgNode("path", { class: `smooth c${i % 5}`, d: path(curves[i]) }));
      if (curves[i] === series.points) {
        for (const [x, y] of series.points) svg.append(svgNode("circle", { class: `dot c${i % 5}`, cx: px(x), cy: py(y), r: 2.6 }));
      }
    });
    const cross = svgNode("line", { class: "cross", y1: TOP, y2: HIGH - BOTTOM, visibility: "hidden" });
    svg.append(cross);
    const keys = figure.querySelector(".keys");
    const say = (at) => {
      keys.replaceChildren(...panel.series.map((series, i) => {
        const points = curves[i];
        const near = points.reduce((a, b) => (Math.abs(b[0] - at) < Math.abs(a[0] - at) ? b : a), points[0]);
        const key = make("span", `c${i % 5}`);
        key.append(make("i"), `${series.name} ${near ? number(near[1]) : ""}`);
        return key;
      }));
      if (panel.line) keys.append(make("span", "note", `${panel.line[0]} ${number(panel.line[1])}`));
    };
    say(right);
    const ends = curves.map((points, i) => `${panel.series[i].name}: ${number(points[0][1])} at first, ${number(points[points.length - 1][1])} at last`);
    svg.setAttribute("aria-label", `${panel.title} over steps ${left} to ${right}. ${ends.join("; ")}.`);
    svg.addEventListener("pointermove", (event) => {
      const box = svg.getBoundingClientRect();
      const x = left + (((event.clientX - box.left) / box.width) * WIDE - LEFT) / (WIDE - LEFT - RIGHT) * (right - left);
      const at = Math.max(left, Math.min(right, x));
      cross.setAttribute("x1", px(at));
      cross.setAttribute("x2", px(at));
      cross.setAttribute("visibility", "visible");
      say(at);
    });
    svg.addEventListener("pointerleave", () => { cross.setAttribute("visibility", "hidden"); say(right); });
    const old = figure.querySelector("svg");
    if (old) old.replaceWith(svg);
    else figure.append(svg);
  };

  if (panels.length) {
    const slider = byId("smooth");
    const redraw = () => {
      byId("smoothed").textContent = Number(slider.value).toFixed(2);
      document.querySelectorAll(".curve").forEach((figure) => draw(figure, Number(slider.value)));
    };
    slider.addEventListener("input", redraw);
    redraw();
  }
})();
