"use strict";
// Values under the pointer, in all charts at once. The page shows everything else without a script.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const plots = [...document.querySelectorAll("[data-plot]")];
  const tip = document.getElementById("tip");
  if (!plots.length) return;
  const [first, last] = data.span;
  const width = Math.max(last - first, 1e-9);
  const crosses = plots.map((plot) => {
    const cross = document.createElement("i");
    cross.className = "cross";
    cross.hidden = true;
    plot.append(cross);
    return cross;
  });
  const main = data.series.find((one) => one.plot === "loss") || data.series[0];
  let current = last;

  function nearest(steps, step) {
    let low = 0, high = steps.length - 1;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (steps[middle] < step) low = middle + 1; else high = middle;
    }
    return low > 0 && step - steps[low - 1] < steps[low] - step ? low - 1 : low;
  }

  function shown(value) {
    if (value === null) return "not finite";
    const size = Math.abs(value);
    if (size && (size < 1e-3 || size >= 1e9)) return value.toExponential(2);
    if (size >= 1000) return Math.round(value).toLocaleString("en");
    return String(Number(value.toPrecision(4)));
  }

  function row(table, label, value) {
    const line = table.insertRow();
    line.insertCell().textContent = label;
    line.insertCell().textContent = value;
  }

  function fill(step) {
    tip.replaceChildren();
    const title = document.createElement("b");
    const phase = data.phases.find(([, from, to]) => step >= from && step <= to);
    title.textContent = `step ${step.toLocaleString("en")}` + (phase ? ` · ${phase[0]}` : "");
    const table = document.createElement("table");
    for (const one of data.series) {
      const at = nearest(one.steps, step);
      // A distant value, as of the nearest validation, has its step beside it.
      const far = Math.abs(one.steps[at] - step) > 0.02 * width;
      const where = far ? ` (step ${Math.round(one.steps[at]).toLocaleString("en")})` : "";
      row(table, one.label + where, shown(one.values[at]));
    }
    tip.append(title, table);
    for (const [at, text] of data.marks.filter(([at]) => Math.abs(at - step) <= 0.006 * width).slice(0, 4)) {
      const line = document.createElement("div");
      line.textContent = `${text}, step ${at.toLocaleString("en")}`;
      tip.append(line);
    }
  }

  function show(step, plot, y) {
    current = Math.min(last, Math.max(first, step));
    const share = (current - first) / width;
    crosses.forEach((cross) => {
      cross.hidden = false;
      cross.style.left = `${100 * share}%`;
    });
    fill(current);
    tip.hidden = false;
    const box = plot.getBoundingClientRect();
    const x = box.left + share * box.width;
    const left = x + 14 + tip.offsetWidth < innerWidth ? x + 14 : Math.max(4, x - 14 - tip.offsetWidth);
    tip.style.left = `${Math.min(left, innerWidth - tip.offsetWidth - 4)}px`;
    tip.style.top = `${Math.max(4, Math.min(y + 12, innerHeight - tip.offsetHeight - 4))}px`;
  }

  function hide() {
    tip.hidden = true;
    crosses.forEach((cross) => { cross.hidden = true; });
  }

  for (const plot of plots) {
    const point = (event) => {
      const box = plot.getBoundingClientRect();
      const step = first + ((event.clientX - box.left) / box.width) * width;
      show(main ? main.steps[nearest(main.steps, step)] : Math.round(step), plot, event.clientY);
    };
    plot.addEventListener("pointermove", point);
    plot.addEventListener("pointerdown", point);
    plot.addEventListener("pointerleave", hide);
    plot.addEventListener("blur", hide);
    plot.addEventListener("keydown", (event) => {
      const way = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (!way || !main) return;
      event.preventDefault();
      const stride = event.shiftKey ? 10 : 1;
      const at = nearest(main.steps, current) + way * stride;
      const box = plot.getBoundingClientRect();
      show(main.steps[Math.min(main.steps.length - 1, Math.max(0, at))], plot, box.top + 20);
    });
  }
})();
