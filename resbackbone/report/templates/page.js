// A click on a header sorts its table by that column: numbers from the largest, text from A. A second click reverses it.
for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0];
  [...table.tHead.rows[0].cells].forEach((header, column) => {
    const key = (row) => {
      const cell = row.cells[column], value = cell.dataset.value;
      return value === undefined ? cell.textContent : value === "" ? null : Number(value);
    };
    const numeric = [...body.rows].some((row) => row.cells[column].dataset.value !== undefined);
    if (header.textContent === "") return;
    const button = document.createElement("button");
    button.type = "button";
    button.append(...header.childNodes);
    header.append(button);
    button.addEventListener("click", () => {
      const now = header.getAttribute("aria-sort"), first = numeric ? "descending" : "ascending";
      const order = now === null ? first : now === "ascending" ? "descending" : "ascending";
      for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
      header.setAttribute("aria-sort", order);
      const sign = order === "ascending" ? 1 : -1;
      body.append(...[...body.rows].sort((a, b) => {
        const [x, y] = [key(a), key(b)];
        if (x === null || y === null) return (x === null) - (y === null);  // undefined values come last
        return sign * (numeric ? x - y : x.localeCompare(y));
      }));
    });
  });
}

// Over a chart, a line follows the pointer, and a note beside it has the values of the curves there.
for (const chart of document.querySelectorAll("figure.chart")) {
  const svg = chart.querySelector("svg"), note = document.createElement("div");
  const curves = [...chart.querySelectorAll("g[data-points]")].map((g) => [g.dataset.name, JSON.parse(g.dataset.points)]);
  if (!curves.length) continue;
  note.className = "note";
  chart.append(note);
  const show = (hidden, at = 0, text = "") => {
    note.hidden = hidden;
    note.textContent = text;
    svg.querySelector(".cursor").setAttribute("transform", `translate(${at} 0)`);
    svg.classList.toggle("pointed", !hidden);
  };
  show(true);
  svg.addEventListener("pointerleave", () => show(true));
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect(), scale = svg.viewBox.baseVal.width / box.width;
    const distance = ([place]) => Math.abs(place - (event.clientX - box.left) * scale);
    const nearest = (points) => points.reduce((a, b) => (distance(b) < distance(a) ? b : a));
    const found = curves.map(([name, points]) => [name, nearest(points)]);
    const [at, x] = nearest(found.map(([, point]) => point));
    const there = found.filter(([, [place]]) => Math.abs(place - at) < 3).map(([name, [, , y]]) => `${name}: ${y}`);
    show(false, at, [`${svg.dataset.x}: ${x}`, ...there].join("\n"));
    note.style.left = `${Math.max(0, Math.min(at / scale + 12, chart.clientWidth - note.offsetWidth))}px`;
  });
}
