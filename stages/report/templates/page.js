"use strict";
(() => {
  const byId = (id) => document.getElementById(id);
  const make = (tag, text, name) => {
    const element = document.createElement(tag);
    if (text !== undefined) element.textContent = text;
    if (name) element.className = name;
    return element;
  };
  const clamp = (value, low, high) => Math.min(high, Math.max(low, value));

  // Storage may be switched off; the page works without it and then forgets.
  const store = (kind, key, value) => {
    try {
      if (value === undefined) return JSON.parse(window[kind].getItem(key));
      window[kind].setItem(key, JSON.stringify(value));
    } catch (error) { /* nothing is kept */ }
    return null;
  };
  const key = "sollune-report:" + location.pathname;

  // Colours
  const theme = byId("theme");
  const applyTheme = (name) => {
    if (name === "light" || name === "dark") document.documentElement.dataset.theme = name;
    else delete document.documentElement.dataset.theme;
  };
  theme.value = ["light", "dark"].includes(store("localStorage", "sollune-theme")) ? store("localStorage", "sollune-theme") : "auto";
  applyTheme(theme.value);
  theme.addEventListener("change", () => { applyTheme(theme.value); store("localStorage", "sollune-theme", theme.value); });

  // What a renewed page takes over from the one before.
  const before = store("sessionStorage", key) || {};

  // Pictures
  const { pictures, runs } = JSON.parse(byId("pictures-data").textContent);
  const state = { run: 0, samples: null, student: null, row: 0, open: false };
  const view = { scale: 1, x: 0, y: 0 };
  const sheets = () => runs[state.run].sheets;
  const sheetNumber = () => {
    const found = sheets().findIndex((sheet) => sheet.samples === state.samples);
    return found < 0 ? sheets().length - 1 : found;
  };
  const sheet = () => sheets()[sheetNumber()];
  const students = () => sheet().columns.map((title, number) => number).filter((number) => number !== sheet().teachers[number] || sheet().whole);
  const shownColumns = () => sheet().whole ? [0] : [sheet().teachers[student()], student()];
  const student = () => {
    const number = sheet().columns.indexOf(state.student);
    return students().includes(number) ? number : sheet().student;
  };

  const showSlider = (id, most, value, text) => {
    const slider = byId(id);
    slider.max = most;
    slider.value = value;
    slider.disabled = most === 0;
    slider.setAttribute("aria-valuetext", text);
    byId(id + "-text").textContent = text;
  };
  const showSliders = (prefix) => {
    showSlider(prefix + "checkpoint", sheets().length - 1, sheetNumber(), "after " + sheet().samples.toLocaleString("en") + " samples");
    showSlider(prefix + "steps", students().length - 1, students().indexOf(student()), sheet().columns[student()]);
  };
  const showImage = (image, picture, text) => {
    if (image.src !== pictures[picture]) image.src = pictures[picture];
    image.alt = text;
  };
  const showCards = () => {
    const cards = byId("cards");
    const own = sheet();
    const columns = shownColumns();
    cards.classList.toggle("whole", own.whole);
    const signature = [state.run, own.rows.length, columns.length, own.rows.join("\n")].join("|");
    if (cards.dataset.signature !== signature) {
      cards.dataset.signature = signature;
      cards.replaceChildren(...own.rows.map((prompt, row) => {
        const card = make("div", undefined, "card");
        const words = make("p", own.whole ? "The whole grid" : "“" + prompt + "”", "prompt");
        words.dir = "auto";
        card.append(words);
        const pair = make("div", undefined, own.whole ? "" : "pair");
        columns.forEach(() => {
          const button = make("button");
          button.type = "button";
          button.append(make("img"), make("span"));
          button.addEventListener("click", () => openZoom(row, button));
          pair.append(button);
        });
        card.append(pair);
        return card;
      }));
    }
    own.rows.forEach((prompt, row) => {
      [...cards.children[row].querySelectorAll("button")].forEach((button, number) => {
        const title = own.columns[columns[number]];
        showImage(button.querySelector("img"), own.cells[row][columns[number]], title + ", after " + own.samples + " samples: " + prompt);
        button.querySelector("span").textContent = title;
        button.setAttribute("aria-label", "Enlarge: " + title + ", " + prompt);
      });
    });
  };
  const showPictures = () => {
    byId("run").value = state.run;
    showSliders("");
    showCards();
    if (state.open) showZoom();
  };

  // One picture enlarged beside its teacher's; both move together.
  let opener = null;
  const applyView = () => {
    document.querySelectorAll(".pane").forEach((pane) => {
      const [wide, high] = [pane.clientWidth, pane.clientHeight];
      view.x = clamp(view.x, wide * (1 - view.scale), 0);
      view.y = clamp(view.y, high * (1 - view.scale), 0);
      pane.querySelector("img").style.transform = `translate(${view.x}px, ${view.y}px) scale(${view.scale})`;
      pane.querySelector("img").style.imageRendering = view.scale > 3 ? "pixelated" : "auto";
    });
  };
  const zoomAt = (factor, x, y) => {
    const scale = clamp(view.scale * factor, 1, 16);
    view.x = x - (x - view.x) * scale / view.scale;
    view.y = y - (y - view.y) * scale / view.scale;
    view.scale = scale;
    applyView();
  };
  const zoomCentre = (factor) => {
    const pane = document.querySelector(".pane");
    zoomAt(factor, pane.clientWidth / 2, pane.clientHeight / 2);
  };
  const resetView = () => { Object.assign(view, { scale: 1, x: 0, y: 0 }); applyView(); };
  const showZoom = () => {
    const own = sheet();
    state.row = clamp(state.row, 0, own.rows.length - 1);
    const columns = shownColumns();
    const panes = byId("zoom-panes");
    panes.classList.toggle("whole", own.whole);
    while (panes.children.length > columns.length) panes.lastChild.remove();
    while (panes.children.length < columns.length) {
      const pane = make("div", undefined, "pane");
      const image = make("img");
      image.draggable = false;
      pane.append(image, make("span"));
      panes.append(pane);
      addPointers(pane);
    }
    columns.forEach((column, number) => {
      const pane = panes.children[number];
      showImage(pane.querySelector("img"), own.cells[state.row][column], own.columns[column] + ": " + own.rows[state.row]);
      pane.querySelector("span").textContent = own.columns[column];
    });
    byId("zoom-title").textContent = own.whole ? "The whole grid" : "“" + own.rows[state.row] + "”";
    showSliders("zoom-");
    applyView();
  };
  const openZoom = (row, from) => {
    opener = from;
    state.row = row;
    state.open = true;
    byId("zoom").showModal();
    resetView();
    showZoom();
  };
  const addPointers = (pane) => {
    const held = new Map();
    pane.addEventListener("wheel", (event) => {
      event.preventDefault();
      const frame = pane.getBoundingClientRect();
      zoomAt(Math.exp(-event.deltaY / 400), event.clientX - frame.left, event.clientY - frame.top);
    }, { passive: false });
    pane.addEventListener("pointerdown", (event) => { pane.setPointerCapture(event.pointerId); held.set(event.pointerId, event); });
    pane.addEventListener("pointermove", (event) => {
      const last = held.get(event.pointerId);
      if (!last) return;
      if (held.size === 1) {
        view.x += event.clientX - last.clientX;
        view.y += event.clientY - last.clientY;
        applyView();
      } else {
        const other = [...held.values()].find((one) => one.pointerId !== event.pointerId);
        const length = (one) => Math.hypot(one.clientX - other.clientX, one.clientY - other.clientY) || 1;
        const frame = pane.getBoundingClientRect();
        zoomAt(length(event) / length(last), (event.clientX + other.clientX) / 2 - frame.left, (event.clientY + other.clientY) / 2 - frame.top);
      }
      held.set(event.pointerId, event);
    });
    for (const name of ["pointerup", "pointercancel"]) pane.addEventListener(name, (event) => held.delete(event.pointerId));
    pane.addEventListener("dblclick", resetView);
  };
  const turn = (by) => { state.row = (state.row + by + sheet().rows.length) % sheet().rows.length; showZoom(); };

  if (runs.length) {
    byId("run").addEventListener("change", (event) => {
      Object.assign(state, { run: Number(event.target.value), samples: null, student: null, row: 0 });
      showPictures();
    });
    for (const prefix of ["", "zoom-"]) {
      byId(prefix + "checkpoint").addEventListener("input", (event) => {
        const number = Number(event.target.value);
        state.samples = number === sheets().length - 1 ? null : sheets()[number].samples;  // the newest stays the newest
        showPictures();
      });
      byId(prefix + "steps").addEventListener("input", (event) => {
        state.student = sheet().columns[students()[Number(event.target.value)]];
        showPictures();
      });
    }
    byId("zoom-close").addEventListener("click", () => byId("zoom").close());
    byId("zoom").addEventListener("close", () => { state.open = false; if (opener && opener.isConnected) opener.focus(); });
    byId("zoom").addEventListener("click", (event) => { if (event.target === byId("zoom")) byId("zoom").close(); });
    byId("zoom-in").addEventListener("click", () => zoomCentre(1.5));
    byId("zoom-out").addEventListener("click", () => zoomCentre(1 / 1.5));
    byId("zoom-reset").addEventListener("click", resetView);
    byId("zoom-before").addEventListener("click", () => turn(-1));
    byId("zoom-next").addEventListener("click", () => turn(1));
    byId("zoom-panes").addEventListener("keydown", (event) => {
      const moves = { ArrowLeft: [40, 0], ArrowRight: [-40, 0], ArrowUp: [0, 40], ArrowDown: [0, -40] };
      if (event.key === "+" || event.key === "=") zoomCentre(1.5);
      else if (event.key === "-") zoomCentre(1 / 1.5);
      else if (event.key === "0") resetView();
      else if (moves[event.key]) { view.x += moves[event.key][0]; view.y += moves[event.key][1]; applyView(); }
      else return;
      event.preventDefault();
    });
    const named = runs.findIndex((run) => run.name === before.run);
    Object.assign(state, { run: Math.max(0, named), samples: before.samples ?? null, student: before.student ?? null });
    showPictures();
  }

  // Charts: values under the pointer, and lines shown or hidden.
  const number = (value) => value === null || value === undefined ? "–" : Math.abs(value) >= 1000 ? Math.round(value).toLocaleString("en") : String(Number(value.toPrecision(3)));
  const hidden = new Set(before.hidden || []);
  document.querySelectorAll(".chart").forEach((chart) => {
    const data = JSON.parse(chart.querySelector(".chart-data").textContent);
    const lines = data.series.map((one) => ({ name: one.name, values: new Map(one.points) }));
    const drawing = chart.querySelector("svg");
    const pointer = chart.querySelector(".pointer");
    const reading = chart.querySelector(".reading");
    let at = null;
    const isOff = (line) => hidden.has(chart.id + "/" + lines[line].name);
    const show = (index) => {
      at = clamp(index, 0, data.xs.length - 1);
      const x = data.xs[at];
      const place = data.left + (x - data.range[0]) / (data.range[1] - data.range[0]) * (data.right - data.left);
      pointer.setAttribute("x1", place);
      pointer.setAttribute("x2", place);
      const shown = lines.filter((line, i) => !isOff(i) && line.values.has(x));
      reading.textContent = number(x) + " " + data.label.split(":")[0] + " · " + shown.map((line) => line.name + " " + number(line.values.get(x))).join(" · ");
    };
    const leave = () => { at = null; reading.textContent = ""; pointer.setAttribute("x1", -9); pointer.setAttribute("x2", -9); };
    drawing.addEventListener("pointermove", (event) => {
      const frame = drawing.getBoundingClientRect();
      const share = ((event.clientX - frame.left) / frame.width * data.width - data.left) / (data.right - data.left);
      const x = data.range[0] + share * (data.range[1] - data.range[0]);
      let best = 0;
      data.xs.forEach((one, i) => { if (Math.abs(one - x) < Math.abs(data.xs[best] - x)) best = i; });
      show(best);
    });
    drawing.addEventListener("pointerleave", leave);
    drawing.addEventListener("blur", leave);
    drawing.addEventListener("keydown", (event) => {
      const steps = { ArrowLeft: -1, ArrowRight: 1, Home: -Infinity, End: Infinity };
      if (!(event.key in steps)) return;
      event.preventDefault();
      show(at === null ? (steps[event.key] > 0 ? 0 : data.xs.length - 1) : at + steps[event.key]);
    });
    const apply = () => chart.querySelectorAll("[data-line]").forEach((element) => {
      const off = isOff(Number(element.dataset.line));
      if (element.tagName === "BUTTON") element.setAttribute("aria-pressed", String(!off));
      else element.classList.toggle("off", off);
    });
    chart.querySelectorAll(".legend button").forEach((button) => button.addEventListener("click", () => {
      const name = chart.id + "/" + lines[Number(button.dataset.line)].name;
      if (!hidden.delete(name)) hidden.add(name);
      apply();
    }));
    apply();
  });

  // A page of a run in training renews itself and comes back as it was.
  const details = [...document.querySelectorAll("details")];
  const live = byId("live");
  const keep = () => store("sessionStorage", key, {
    run: runs.length ? runs[state.run].name : null, samples: state.samples, student: state.student,
    hidden: [...hidden], scroll: window.scrollY, live: live ? live.checked : true,
    open: details.map((one) => one.open), focus: document.activeElement ? document.activeElement.id : "",
  });
  const seconds = Number(document.body.dataset.reloadSeconds);
  if ((before.open || []).length === details.length) details.forEach((one, i) => { one.open = before.open[i]; });
  if (before.scroll && !location.hash) window.scrollTo(0, before.scroll);
  else if (before.scroll && before.renewed) window.scrollTo(0, before.scroll);
  if (before.focus && byId(before.focus)) byId(before.focus).focus({ preventScroll: true });
  if (live && before.live === false) live.checked = false;
  window.addEventListener("pagehide", keep);
  if (seconds > 0) {
    history.scrollRestoration = "manual";
    setInterval(() => {
      // Nothing is taken from under somebody who has a picture enlarged or turned it off.
      if ((live && !live.checked) || state.open || document.hidden) return;
      keep();
      location.reload();
    }, seconds * 1000);
  }
  document.documentElement.dataset.ready = "yes";
})();
