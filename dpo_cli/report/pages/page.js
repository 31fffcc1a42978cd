// The values of a plot at the pointer, a finger or the arrow keys. Without this, the legend has the last values.
for (const plot of document.querySelectorAll("[data-curves]")) {
  const svg = plot.querySelector("svg.drawing");
  const curves = JSON.parse(plot.dataset.curves);
  const [low, high, left, right] = JSON.parse(plot.dataset.x);
  const [least, greatest, bottom, top] = JSON.parse(plot.dataset.y);
  const xOf = (step) => left + ((step - low) / (high - low)) * (right - left);
  const yOf = (value) => bottom + ((value - least) / (greatest - least)) * (top - bottom);
  const steps = [...new Set(curves.flatMap(([steps]) => steps))].sort((a, b) => a - b);
  const cells = [...plot.querySelectorAll(".legend b")];
  const at = plot.querySelector(".at");
  const last = cells.map((cell) => cell.textContent);
  const before = at.textContent;
  const cursor = svg.querySelector(".cursor");
  const spots = [...svg.querySelectorAll(".spot")];
  let shown = steps.length - 1;

  function show(index) {
    shown = Math.max(0, Math.min(steps.length - 1, index));
    const step = steps[shown];
    plot.classList.add("reading");
    cursor.setAttribute("x1", xOf(step));
    cursor.setAttribute("x2", xOf(step));
    at.textContent = `step ${step.toLocaleString("en")}`;
    curves.forEach(([known, values], i) => {
      const j = known.findLastIndex((other) => other <= step); // a curve with fewer values shows its latest one
      const value = j < 0 ? undefined : values[j];
      cells[i].textContent = value === undefined ? "–" : value === null ? "not finite" : `${value}`;
      spots[i].classList.toggle("on", typeof value === "number");
      if (typeof value === "number") {
        spots[i].setAttribute("cx", xOf(known[j]));
        spots[i].setAttribute("cy", yOf(value));
      }
    });
  }

  function leave() {
    plot.classList.remove("reading");
    at.textContent = before;
    cells.forEach((cell, i) => (cell.textContent = last[i]));
  }

  function follow(event) {
    const box = svg.getBoundingClientRect();
    const x = ((event.clientX - box.left) / box.width) * svg.viewBox.baseVal.width;
    const distances = steps.map((step) => Math.abs(xOf(step) - x));
    show(distances.indexOf(Math.min(...distances)));
  }

  svg.addEventListener("pointerdown", follow);
  svg.addEventListener("pointermove", follow);
  svg.addEventListener("pointerleave", leave);
  svg.addEventListener("blur", leave);
  svg.addEventListener("keydown", (event) => {
    const move = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (move) {
      event.preventDefault();
      show(plot.classList.contains("reading") ? shown + move : shown);
    }
  });
}

// Paper has no details to open.
addEventListener("beforeprint", () => document.querySelectorAll("details").forEach((part) => (part.open = true)));
